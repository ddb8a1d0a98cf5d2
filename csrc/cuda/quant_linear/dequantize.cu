// W itself: a thread makes eight neighbouring weights of a row, as the declaration rounds them.
#include "host.h"

namespace metate::cuda {
namespace {

using namespace lowbit;

constexpr int eights = 256;  // of a block, a thread each

struct Dense {
    Weight w;
    View<2> out;
    int64_t count;  // of eights
    int across;     // of them in a row
    bool vectors;   // rows of the result can be written 16 bytes at a time
};

// The codes of eight columns, which fill `bits` bytes or, at the end of a row, the `left` that are there.
METATE_DEVICE uint64_t load_eight(const unsigned char* from, int64_t stride, int bits, int left) {
    uint64_t codes = 0;
    METATE_NO_UNROLL
    for (int i = 0; i < least(bits, left); ++i)
        codes |= static_cast<uint64_t>(load_global<uint8_t>(from + i * stride)) << (8 * i);
    return codes;
}

template <typename T>
METATE_DEVICE T rounded_to(float weight) {
    if constexpr (is_same<T, float>) {
        return weight;
    } else {
        return from_float<T>(weight);
    }
}

template <typename T>
METATE_DEVICE void store_one(const Dense& f, int row, int column, float weight) {
    if (column >= f.w.columns) return;
    int64_t place = column;
    if (f.w.m.permutation)
        place = load_global<int32_t>(static_cast<const int32_t*>(f.w.m.permutation.data) +
                                     column * f.w.m.permutation.stride[0]);
    store_global(static_cast<T*>(f.out.data) + row * f.out.stride[0] + place * f.out.stride[1], rounded_to<T>(weight));
}

// Eight weights that move through registers, two words of 16 bits or of 32 at a time.
template <typename T>
struct Eight {
    Words<4> first{}, last{};

    METATE_DEVICE void append(float a, float b) {
        if constexpr (is_same<T, float>) {
            first = {{first[2], first[3], last[0], last[1]}};
            last = {{last[2], last[3], bits_of(a), bits_of(b)}};
        } else {
            last = {{last[1], last[2], last[3], pack<T>(a, b)}};
        }
    }
    METATE_DEVICE void store(T* to) const {
        if constexpr (is_same<T, float>) {
            store_global(to, first);
            store_global(to + 4, last);
        } else {
            store_global(to, last);
        }
    }
};

template <typename T>
METATE_KERNEL(eights, 1)
dequantize_kernel(METATE_PARAMETER(Dense, f)) {
    METATE_SHARED(unsigned char, table);
    const Weight& w = f.w;
    for (int i = thread_index(); w.m.codebook && i < 1 << w.bits; i += eights) {
        const auto* const from = static_cast<const float*>(w.m.codebook.data) + i * w.m.codebook.stride[0];
        store_shared(table + i * 4, load_global<float>(from));
    }
    sync_threads();
    const int64_t index = static_cast<int64_t>(block_index().x) * eights + thread_index();
    if (index >= f.count) return;
    const int row = static_cast<int>(index / f.across), column = static_cast<int>(index % f.across) * 8;
    const int from = column / 8 * w.bits;
    const auto* const codes =
        static_cast<const unsigned char*>(w.m.codes.data) + row * w.m.codes.stride[0] + from * w.m.codes.stride[1];
    const uint64_t eight = load_eight(codes, w.m.codes.stride[1], w.bits, w.row_bytes - from);
    const bool whole = f.vectors && column + 8 <= w.columns;
    Eight<T> weights;
    float pair[2];
    int at = column;
    decode_each(w, eight, row, column, table, [&](int e, float value, const Levels<1>& level) {
        pair[e] = product(value, level.scale[0]);
        if (w.m.offsets) pair[e] += level.offset[0];
        if (e == 0) return;
        if (whole) {
            weights.append(pair[0], pair[1]);
        } else {
            store_one<T>(f, row, at, pair[0]);
            store_one<T>(f, row, at + 1, pair[1]);
        }
        at += 2;
    });
    if (whole) weights.store(static_cast<T*>(f.out.data) + row * f.out.stride[0] + column);
}

}  // namespace

void dequantize(const Dequantize& call, const Device& device) {
    constexpr int64_t limit = int64_t{1} << 27;
    if (call.w.rows >= limit || call.w.columns >= limit) refuse("dequantize", "more than 2^27 rows or columns");
    if (call.w.rows == 0 || call.w.columns == 0) return;
    const int64_t across = ceil_div(call.w.columns, 8), count = call.w.rows * across, blocks = ceil_div(count, eights);
    if (blocks > 0x7fffffff) refuse("dequantize", "more than 2^42 weights");
    const View<2>& out = call.out;
    const bool vectors = !call.w.permutation && out.stride[1] == 1 && reinterpret_cast<uintptr_t>(out.data) % 16 == 0 &&
                         out.stride[0] * bytes_of(out.dtype) % 16 == 0;
    const auto kernel = out.dtype == DType::f32  ? dequantize_kernel<float>
                      : out.dtype == DType::bf16 ? dequantize_kernel<bf16>
                                                 : dequantize_kernel<f16>;
    const Dense parameters{weight_of(call.w), out, count, static_cast<int>(across), vectors};
    launch(kernel, {static_cast<int>(blocks), 1, 1}, eights, size_t{4} << call.w.bits, device.stream, parameters);
}

}  // namespace metate::cuda
