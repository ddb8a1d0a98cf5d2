// Registers bindings with torch and runs their kernels on torch's threads and streams.
//
// A binding file is compiled once per device: as it stands for the CPU, with METATE_CUDA for the GPU, with
// METATE_CUDA and METATE_EMULATED for the GPU kernels run on CPU tensors by the emulator. It allocates outputs, fills
// the family's struct, launches, and registers:
//
//     Tensor double_it(const Tensor& x) {
//         Tensor y = empty(x, {x.size(0)});
//         METATE_LAUNCH(double_it, x, DoubleIt{view<1>(x), view<1>(y)});
//         return y;
//     }
//     METATE_REGISTER(m) { METATE_IMPL(m, double_it); }
//
// Python defines the schemas; arguments are Tensor, std::optional<Tensor>, int64_t, double and bool; results Tensor or
// a tuple of them, or void where arguments are written. On a CPU the function has two doors: torch's dispatcher, and
// the direct call of direct.h. Only torch's stable ABI is used, so one build serves every later torch.
#pragma once

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>
#include <type_traits>

#include "metate.h"
#include "tensor.h"

#if defined(METATE_CUDA) && !defined(METATE_EMULATED)
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#endif

#if !defined(METATE_CUDA)
#include "direct.h"
#endif

#if defined(METATE_EMULATED)
#define METATE_LIBRARY metate_emulated
#define METATE_KEY CPU
#elif defined(METATE_CUDA)
#define METATE_LIBRARY metate_C
#define METATE_KEY CUDA
#else
#define METATE_LIBRARY metate_C
#define METATE_KEY CPU
#endif

#define METATE_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(METATE_LIBRARY, METATE_KEY, m)
#define METATE_IMPL(m, op) ::metate::bind::implement<&op>(m, #op)

// Runs kernel `fn` of this device with the struct that follows, on the device (and current stream) of tensor `like`.
#define METATE_LAUNCH(fn, like, ...) ::metate::bind::device::fn(__VA_ARGS__, ::metate::bind::Launch(like))

namespace metate::bind {

#if defined(METATE_CUDA)
namespace device = ::metate::cuda;
#else
namespace device = ::metate::cpu;
#endif

// Registration.

// An argument or result as the dispatcher has it.
template <class T>
struct Dispatched {
    using type = T;
    static T from(T value) { return value; }
};
template <>
struct Dispatched<Tensor> {
    using type = torch::stable::Tensor;
    static Tensor from(type tensor) { return Tensor(std::move(tensor)); }
    static type to(const Tensor& tensor) { return tensor.handle(); }
};
template <>
struct Dispatched<TensorOrNumber> {
    using type = torch::stable::Tensor;
    static TensorOrNumber from(type tensor) { return Tensor(std::move(tensor)); }
};
template <>
struct Dispatched<std::optional<Tensor>> {
    using type = std::optional<torch::stable::Tensor>;
    static std::optional<Tensor> from(type tensor) {
        return tensor ? std::optional(Tensor(*std::move(tensor))) : std::nullopt;
    }
};
template <>
struct Dispatched<void> {
    using type = void;
};
template <class... T>
struct Dispatched<std::tuple<T...>> {
    using type = std::tuple<typename Dispatched<T>::type...>;
    static type to(const std::tuple<T...>& results) {
        return std::apply([](const T&... each) { return type(Dispatched<T>::to(each)...); }, results);
    }
};

template <auto fn>
struct Boxed;

template <class Result, class... Args, Result (*fn)(Args...)>
struct Boxed<fn> {
    template <class T>
    using Of = Dispatched<std::remove_cvref_t<T>>;
    static typename Of<Result>::type call(typename Of<Args>::type... args) {
        if constexpr (std::is_void_v<Result>)
            fn(Of<Args>::from(std::move(args))...);
        else
            return Of<Result>::to(fn(Of<Args>::from(std::move(args))...));
    }
};

#if !defined(METATE_CUDA)
// A function for direct calls alone, without an operator of its own.
template <auto fn>
void offer(const char* name) {
    direct::bindings()[name] = {direct::Door<fn>::call, direct::Door<fn>::admit, {}};
}
#endif

template <auto fn, class Library>
void implement(Library& library, const char* name) {
    library.impl(name, TORCH_BOX((&Boxed<fn>::call)));
#if !defined(METATE_CUDA)
    offer<fn>(name);
#endif
}

#if !defined(METATE_CUDA)

// The CPU: torch's thread pool, and scratch memory that each thread keeps.

// A forked child has inherited torch's thread pool without its threads; a parallel region would wait for them for ever.
inline bool forked = false;
inline const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Tests set this, so that a kernel that reads scratch before writing it computes NaN.
inline bool poison_scratch = false;

inline void run_serial(int workers, void (*body)(int, void*), void* context) {
    for (int worker = 0; worker < workers; ++worker) body(worker, context);
}

inline void run_parallel(int workers, void (*body)(int, void*), void* context) {
    torch::stable::parallel_for(0, workers, 1, [=](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) body(static_cast<int>(worker), context);
    });
}

// Block 0 is the kernels', block 1 that of bindings.
template <int number>
void* scratch(size_t bytes) {
    struct Block {
        void* data = nullptr;
        size_t bytes = 0;
        ~Block() { free(data); }
    };
    static thread_local Block block;
    if (bytes > block.bytes) {
        free(block.data);
        block = {nullptr, 0};
        size_t rounded = (bytes + 4095) & ~size_t{4095};
        void* data = rounded >= bytes ? aligned_alloc(64, rounded) : nullptr;
        if (!data) throw std::bad_alloc();
        block.data = data;
        block.bytes = rounded;
    }
    if (poison_scratch && block.data) memset(block.data, 0xff, block.bytes);
    return block.data;
}

class Launch {
  public:
    explicit Launch(const Tensor&) {
        if (!forked) runtime_ = {static_cast<int>(torch::stable::get_num_threads()), run_parallel, scratch<0>};
        if (runtime_.threads < 1) runtime_.threads = 1;
    }
    operator const cpu::Runtime&() const { return runtime_; }

  private:
    cpu::Runtime runtime_{1, run_serial, scratch<0>};
};

// Memory that a binding hands from one kernel to the next, uninitialised; one at a time.
class Workspace {
  public:
    Workspace(const Tensor&, int64_t bytes) : data_(scratch<1>(static_cast<size_t>(bytes))) {}
    void* data() const { return data_; }

  private:
    void* data_;
};

#else

// The GPU: the current stream of the tensor's device, and scratch from torch's caching allocator. The allocator orders
// memory by stream, so the block may be given back as soon as the kernels that use it are launched.

class Launch {
  public:
    explicit Launch(const Tensor& like) : like_(like), guard_(like), device_(describe(like)) {
        device_.scratch = [](size_t bytes, void* self) { return static_cast<Launch*>(self)->scratch(bytes); };
        device_.context = this;
    }
    Launch(const Launch&) = delete;
    operator const cuda::Device&() const { return device_; }

  private:
    void* scratch(size_t bytes) {
        block_ = empty(like_, {static_cast<int64_t>(bytes)}, DType::u8);
        return block_->data_ptr();
    }

#if defined(METATE_EMULATED)
    struct Guard {
        explicit Guard(const Tensor&) {}
    };
    static cuda::Device describe(const Tensor&) { return {nullptr, 80, 4, nullptr, nullptr}; }
#else
    struct Guard : torch::stable::accelerator::DeviceGuard {
        explicit Guard(const Tensor& like) : DeviceGuard(like.device_index()) {}
    };

    static cuda::Device describe(const Tensor& like) {
        int index = like.device_index(), major = 0, minor = 0, processors = 0;
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
        cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
        STD_TORCH_CHECK(error == cudaSuccess, "metate: cannot query CUDA device ", index, ": ",
                        cudaGetErrorString(error));
        return {current_stream(index), major * 10 + minor, processors, nullptr, nullptr};
    }

    // Looked up at run time: only a CUDA torch exports it, and this module must load beside a CPU torch too.
    static void* current_stream(int index) {
        using Accessor = AOTITorchError (*)(int32_t, void**);
        static const auto accessor =
            reinterpret_cast<Accessor>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
        STD_TORCH_CHECK(accessor, "metate: this torch has no CUDA; install a torch built for CUDA");
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(accessor(index, &stream));
        return stream;
    }
#endif

    const Tensor& like_;
    Guard guard_;
    cuda::Device device_;
    std::optional<Tensor> block_;
};

class Workspace {
  public:
    Workspace(const Tensor& like, int64_t bytes) : block_(empty(like, {bytes}, DType::u8)) {}
    void* data() const { return block_.data_ptr(); }

  private:
    Tensor block_;
};

#endif

}  // namespace metate::bind
