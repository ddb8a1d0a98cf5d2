// What a binding knows of a tensor, whichever door it came through: torch's dispatcher (a handle of the stable ABI) or
// a direct call from Python (DLPack).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>

#include "dlpack.h"
#include "metate.h"

namespace metate::bind {

// How a dtype is called by torch's shim and by DLPack.
struct DTypeName {
    DType dtype;
    int32_t torch;
    uint8_t kind, bits;
};

constexpr int dtype_count = 10;

inline const DTypeName* dtype_names() {
    static const DTypeName names[dtype_count] = {
        {DType::f32, aoti_torch_dtype_float32(), dlpack::floating, 32},
        {DType::bf16, aoti_torch_dtype_bfloat16(), dlpack::bfloat, 16},
        {DType::f16, aoti_torch_dtype_float16(), dlpack::floating, 16},
        {DType::f64, aoti_torch_dtype_float64(), dlpack::floating, 64},
        {DType::i64, aoti_torch_dtype_int64(), dlpack::integer, 64},
        {DType::i32, aoti_torch_dtype_int32(), dlpack::integer, 32},
        {DType::u8, aoti_torch_dtype_uint8(), dlpack::natural, 8},
        {DType::u8, aoti_torch_dtype_bool(), dlpack::truth, 8},
        {DType::i8, aoti_torch_dtype_int8(), dlpack::integer, 8},
        {DType::f8, aoti_torch_dtype_float8_e4m3fn(), dlpack::e4m3fn, 8},
    };
    return names;
}

template <class Matches>
const DTypeName* find_dtype(Matches&& matches) {
    for (const DTypeName* name = dtype_names(); name != dtype_names() + dtype_count; ++name)
        if (matches(*name)) return name;
    return nullptr;
}

// torch's interface for direct calls, once Python has handed it over; null before and where torch has none.
inline const dlpack::Exchange* exchange = nullptr;

// Thrown by a binding that was called directly and needs torch's operators: Python calls it again by the dispatcher.
struct NeedsDispatcher {};

class Tensor {
  public:
    Tensor() = default;

    explicit Tensor(torch::stable::Tensor tensor) : owner_(std::move(tensor)) {
        AtenTensorHandle handle = this->handle().get();
        int64_t dims;
        int32_t torch_dtype;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dims));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes_));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides_));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data_));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index_));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type_));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &torch_dtype));
        const DTypeName* name = find_dtype([&](const DTypeName& each) { return each.torch == torch_dtype; });
        STD_TORCH_CHECK(name, "metate: no kernel reads tensors of torch dtype number ", torch_dtype);
        dims_ = static_cast<int>(dims);
        dtype_ = name->dtype;
    }

    // Memory of a result of a direct call.
    explicit Tensor(dlpack::ManagedTensor* owned) : owner_(std::make_shared<Result>(owned)) { borrow(owned->tensor); }

    // Becomes the description of memory that outlives the call.
    void borrow(const dlpack::Tensor& tensor) {
        const DTypeName* name = find_dtype([&](const DTypeName& each) {
            return each.kind == tensor.dtype.kind && each.bits == tensor.dtype.bits && tensor.dtype.lanes == 1;
        });
        if (!name || (tensor.dims && !tensor.strides)) throw NeedsDispatcher{};
        dtype_ = name->dtype;
        dims_ = tensor.dims;
        sizes_ = tensor.sizes;
        strides_ = tensor.strides;
        data_ = tensor.data ? static_cast<char*>(tensor.data) + tensor.byte_offset : nullptr;
    }

    // The same of a view, which outlives it too.
    template <int N>
    void borrow(View<N>& view) {
        dtype_ = view.dtype;
        dims_ = N;
        sizes_ = view.size;
        strides_ = view.stride;
        data_ = view.data;
    }

    int64_t dim() const { return dims_; }
    int64_t size(int i) const { return sizes_[i]; }
    int64_t stride(int i) const { return strides_[i]; }
    void* data_ptr() const { return data_; }
    DType dtype() const { return dtype_; }
    int32_t device_type() const { return device_type_; }  // as torch's shim counts; a direct call has only the CPU
    int32_t device_index() const { return device_index_; }
    bool direct() const { return !std::holds_alternative<torch::stable::Tensor>(owner_); }

    const torch::stable::Tensor& handle() const {
        if (direct()) throw NeedsDispatcher{};
        return std::get<torch::stable::Tensor>(owner_);
    }

    // Gives the memory of a result away.
    dlpack::ManagedTensor* release() {
        return std::exchange(std::get<std::shared_ptr<Result>>(owner_)->tensor, nullptr);
    }

  private:
    struct Result {
        explicit Result(dlpack::ManagedTensor* owned) : tensor(owned) {}
        Result(const Result&) = delete;
        ~Result() {
            if (tensor && tensor->deleter) tensor->deleter(tensor);
        }
        dlpack::ManagedTensor* tensor;
    };

    void* data_ = nullptr;
    int64_t *sizes_ = nullptr, *strides_ = nullptr;
    int dims_ = 0;
    DType dtype_ = DType::f32;
    int32_t device_type_ = 0, device_index_ = 0;
    std::variant<std::monostate, torch::stable::Tensor, std::shared_ptr<Result>> owner_;
};

// An argument that is a tensor, and in direct calls may be a number, of which Python would make one.
using TensorOrNumber = std::variant<Tensor, double>;

inline DType dtype(const Tensor& tensor) {
    return tensor.dtype();
}

// The view of a tensor that is there has a pointer even where torch has none because the tensor holds no element.
template <int N>
View<N> view(const Tensor& tensor) {
    alignas(64) static char nothing[64];
    STD_TORCH_CHECK(tensor.dim() == N, "metate: expected a tensor of ", N, " dimensions, got ", tensor.dim());
    View<N> view{tensor.data_ptr() ? tensor.data_ptr() : nothing, tensor.dtype(), {}, {}};
    for (int i = 0; i < N; ++i) {
        view.size[i] = tensor.size(i);
        view.stride[i] = tensor.stride(i);
    }
    return view;
}

template <int N>
View<N> view(const std::optional<Tensor>& tensor) {
    return tensor ? view<N>(*tensor) : View<N>{};
}

// Direct calls may bring tensors of another shape than the operator's, for which Python would have to make a tensor
// each time: without a dimension of size 1, which stands at `at`,
template <int N>
View<N> view_with(const Tensor& tensor, int at) {
    if (tensor.dim() == N) return view<N>(tensor);
    const View<N - 1> given = view<N - 1>(tensor);
    View<N> all{given.data, given.dtype, {}, {}};
    for (int i = 0; i < N; ++i) {
        all.size[i] = i == at ? 1 : given.size[i - (i > at)];
        all.stride[i] = i == at ? 0 : given.stride[i - (i > at)];
    }
    return all;
}

// or rows in more dimensions than one. Those that do not lie evenly are torch's to copy.
inline View<2> view_rows(const Tensor& tensor) {
    if (tensor.dim() == 2) return view<2>(tensor);
    const int last = tensor.dim() - 1;
    if (last < 0) throw NeedsDispatcher{};
    View<2> rows{tensor.data_ptr(), tensor.dtype(), {1, tensor.size(last)}, {0, tensor.stride(last)}};
    for (int i = last - 1; i >= 0; --i) {
        if (tensor.size(i) == 1) continue;
        if (rows.size[0] == 1) rows.stride[0] = tensor.stride(i);
        if (!rows.data || tensor.stride(i) != rows.size[0] * rows.stride[0]) throw NeedsDispatcher{};
        rows.size[0] *= tensor.size(i);
    }
    return rows;
}

constexpr int most_dims = 8;  // of a result

// A result of a direct call: its description and, from the next cache line on, its memory. Torch's own allocation goes
// through the dispatcher and takes as long as a small kernel; where there is no memory, it is asked and says so.
inline Tensor allocate_directly(int32_t dims, const int64_t* sizes, const int64_t* strides, const DTypeName& name) {
    struct Block {
        dlpack::ManagedTensor result;
        int64_t sizes[most_dims], strides[most_dims];
    };
    constexpr size_t line = 64, head = sizeof(Block) + line;
    size_t bytes = name.bits / 8;
    bool too_many = false;
    for (int i = 0; i < dims; ++i) too_many |= __builtin_mul_overflow(bytes, sizes[i], &bytes);
    Block* const block = too_many || bytes > PTRDIFF_MAX - head ? nullptr : static_cast<Block*>(malloc(head + bytes));
    if (!block) throw NeedsDispatcher{};
    memcpy(block->sizes, sizes, sizeof(int64_t) * dims);
    memcpy(block->strides, strides, sizeof(int64_t) * dims);
    void* const data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block) + head) / line * line);
    const auto give_back = [](dlpack::ManagedTensor* result) { free(result); };
    const dlpack::Tensor tensor{data,         {dlpack::cpu, 0}, dims, {name.kind, name.bits, 1},
                                block->sizes, block->strides,   0};
    block->result = {{dlpack::major_version, 0}, nullptr, give_back, 0, tensor};
    return Tensor(&block->result);
}

// Memory that nobody has touched yet comes a page at a time while a kernel writes; large results want large pages.
inline void prefer_large_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(MADV_HUGEPAGE) && !defined(METATE_CUDA)
    constexpr uintptr_t page = 1 << 21, least = 4 * page;
    uintptr_t bytes = static_cast<uintptr_t>(bytes_of(tensor.dtype()));
    for (int i = 0; i < tensor.dim(); ++i) bytes *= static_cast<uintptr_t>(tensor.size(i));
    if (bytes < least) return;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page, end = (begin + bytes) / page * page;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // advice: nothing depends on it
#endif
}

// An uninitialised contiguous tensor on the device of `like`, and of its dtype unless one is given.
inline Tensor empty(const Tensor& like, int dims, const int64_t* sizes, std::optional<DType> dtype = {}) {
    STD_TORCH_CHECK(dims <= most_dims, "metate: at most ", most_dims, " dimensions, got ", dims);
    const DType wanted = dtype ? *dtype : like.dtype();
    const DTypeName& name = *find_dtype([&](const DTypeName& each) { return each.dtype == wanted; });
    int64_t strides[most_dims], next = 1;
    for (int i = dims - 1; i >= 0; next *= sizes[i] > 1 ? sizes[i] : 1, --i) strides[i] = next;
    const auto allocate = [&] {
        if (like.direct()) return allocate_directly(dims, sizes, strides, name);
        AtenTensorHandle out;
        TORCH_ERROR_CODE_CHECK(
            aoti_torch_empty_strided(dims, sizes, strides, name.torch, like.device_type(), like.device_index(), &out));
        return Tensor(torch::stable::Tensor(out));
    };
    Tensor out = allocate();
    prefer_large_pages(out);
    return out;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<DType> dtype = {}) {
    return empty(like, static_cast<int>(sizes.size()), sizes.begin(), dtype);
}

// As many rows as x has, in its dimensions.
inline Tensor empty_rows(const Tensor& x, int64_t columns) {
    if (x.dim() > most_dims) throw NeedsDispatcher{};
    int64_t sizes[most_dims];
    for (int i = 0; i < x.dim(); ++i) sizes[i] = i + 1 < x.dim() ? x.size(i) : columns;
    return empty(x, static_cast<int>(x.dim()), sizes);
}

inline Tensor contiguous(const Tensor& tensor) {
    return Tensor(torch::stable::contiguous(tensor.handle()));
}

}  // namespace metate::bind
