// Searches of all rows of the ranges of a query: eight lanes compare a row in float32 and tell how far that may be off;
// what may be among the best is compared again in float64.
#include "vectors.h"

namespace metate::cuda::pq {
namespace {

constexpr int row_lanes = 8, beside = 4;  // lanes that share a row, rows that they compare at a time

struct Direct {
    Vectors v;
    Rows rows;
    Sink sink;
    int pitch;     // columns in shared memory
    bool vectors;  // whether 16 bytes of a row can be read at once
};

METATE_DEVICE float widen(float x) {
    return x;
}
METATE_DEVICE float widen(bf16 x) {
    return to_float(x);
}
METATE_DEVICE float widen(f16 x) {
    return to_float(x);
}
METATE_DEVICE float widen(int8_t x) {
    return x;
}

// Element i of 16 bytes.
template <typename T>
METATE_DEVICE float element(const Words<4>& words, int i) {
    if constexpr (sizeof(T) == 4) {
        return float_of(words[i]);
    } else if constexpr (sizeof(T) == 1) {
        return static_cast<int8_t>(words[i / 4] >> i % 4 * 8);
    } else {
        return to_float(T{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)});
    }
}

// A distance, and what its error is relative to.
struct Sum {
    float value = 0.f, size = 0.f;
};

// `shared` holds the query, and beside int8 the scales and offsets of its columns.
template <typename T>
METATE_DEVICE void add_column(Sum& sum, const Direct& f, float x, float y, const unsigned char* shared, int k) {
    if constexpr (sizeof(T) == 1)
        y = fmaf(y, load_shared<float>(shared + (f.pitch + k) * 4), load_shared<float>(shared + (2 * f.pitch + k) * 4));
    const float gap = fabsf(x - y);
    if (f.v.is(Metric::l2)) {
        sum.value = fmaf(gap, gap, sum.value);
        if constexpr (sizeof(T) == 1) sum.size = fmaf(gap, fabsf(y), sum.size);
    } else if (f.v.is(Metric::inner_product)) {
        sum.value = fmaf(x, y, sum.value);
        sum.size += fabsf(x * y);
    } else {
        sum.value = f.v.is(Metric::l1) ? sum.value + gap : fmaxf(sum.value, gap);
        if constexpr (sizeof(T) == 1) sum.size += fabsf(y);
    }
}

template <typename T>
METATE_DEVICE void add_columns(Sum (&sum)[beside], const Direct& f, const unsigned char* shared,
                               const T* const (&row)[beside]) {
    constexpr int width = 16 / sizeof(T);
    const int part = lane() % row_lanes;
    int k = part * width;
    METATE_NO_UNROLL
    for (; f.vectors && k + width <= f.v.D; k += row_lanes * width) {
        Words<4> words[beside];
        METATE_UNROLL
        for (int r = 0; r < beside; ++r) words[r] = row[r] ? load_global<Words<4>>(row[r] + k) : Words<4>{};
        METATE_UNROLL
        for (int i = 0; i < width; ++i) {
            const float x = load_shared<float>(shared + (k + i) * 4);
            METATE_UNROLL
            for (int r = 0; r < beside; ++r) add_column<T>(sum[r], f, x, element<T>(words[r], i), shared, k + i);
        }
    }
    // What is left of a row, column by column.
    METATE_NO_UNROLL
    for (k = (f.vectors ? f.v.D / width * width : 0) + part; k < f.v.D; k += row_lanes) {
        const float x = load_shared<float>(shared + k * 4);
        METATE_UNROLL
        for (int r = 0; r < beside; ++r)
            if (row[r]) add_column<T>(sum[r], f, x, widen(load_global<T>(row[r] + k * f.v.base.stride[1])), shared, k);
    }
}

METATE_DEVICE float over_lanes(float x, bool largest = false) {
    METATE_UNROLL
    for (int flip = row_lanes / 2; flip > 0; flip /= 2) {
        const float other = shuffle_xor(x, flip);
        x = largest ? fmaxf(x, other) : x + other;
    }
    return x;
}

// Of a warp's rows in a chunk, 32 beside each other belong to turn i: its lanes own one each.
METATE_DEVICE int first_row(int i) {
    return (warp() * each + i) * warp_size;
}

METATE_DEVICE int own_row(int i) {
    return first_row(i) + lane() % row_lanes * (warp_size / row_lanes) + lane() / row_lanes;
}

METATE_DEVICE void stage_query(unsigned char* shared, const Direct& f, int64_t q) {
    for (int k = thread_index(); k < f.v.D; k += threads) {
        store_shared(shared + k * 4, stored_at(f.v.queries, q, k));
        if (!f.v.scale) continue;
        store_shared(shared + (f.pitch + k) * 4, load_global<float>(f.v.scale + k));
        store_shared(shared + (2 * f.pitch + k) * 4, load_global<float>(f.v.offset + k));
    }
    sync_threads();
}

// The least key that a lane's row of turn i may have.
template <typename T>
METATE_DEVICE uint32_t bound_row(const Direct& f, const unsigned char* shared, int64_t first, int64_t last,
                                 int64_t begin) {
    const float error = static_cast<float>(f.v.D + 16) * 0x1p-22f;
    uint32_t bound = none;
    METATE_NO_UNROLL
    for (int step = 0; step < row_lanes; step += beside) {
        const T* row[beside];
        Sum sum[beside];
        METATE_UNROLL
        for (int r = 0; r < beside; ++r) {
            const int64_t at = begin + (step + r) * (warp_size / row_lanes) + lane() / row_lanes;
            const bool inside = at >= first && at < last && is_kept(f.rows, at);
            row[r] = inside ? static_cast<const T*>(f.v.base.data) + at * f.v.base.stride[0] : nullptr;
        }
        add_columns<T>(sum, f, shared, row);
        METATE_UNROLL
        for (int r = 0; r < beside; ++r) {
            const float value = over_lanes(sum[r].value, f.v.is(Metric::linf));
            const float size = over_lanes(sum[r].size) + (f.v.is(Metric::inner_product) ? 0.f : value);
            const float least = (f.v.largest ? -value : value) - (error * size + 0x1p-120f * (f.v.D + 1));
            const uint32_t key = !row[r] ? none : is_finite(least) ? key_of(least, false) : 0;
            if (step + r == lane() % row_lanes) bound = key;
        }
    }
    return bound;
}

template <typename T>
METATE_KERNEL(threads, 2)
direct_kernel(METATE_PARAMETER(Direct, f)) {
    METATE_SHARED(unsigned char, shared);
    const int64_t q = block_index().x;
    stage_query(shared, f, q);
    Selection list(shared + f.pitch * (f.v.scale ? 12 : 4), f.sink.k);
    each_chunk(f.rows, q, block_index().y, f.sink.slices, 1, [&](int, int64_t first, int64_t last, int64_t begin) {
        METATE_NO_UNROLL
        for (int i = 0; i < each; ++i) {
            const uint32_t bound = bound_row<T>(f, shared, first, last, begin + first_row(i));
            const int64_t row = begin + own_row(i);
            const bool near = bound != none && bound <= list.last_key();
            const uint32_t key[1] = {near ? exact_key(f.v, q, row) : none};
            list.offer(key, [&](int) { return id_of(f.rows, row); });
        }
    });
    list.finish();
    write_list(f.sink, list, q, block_index().y);
}

}  // namespace

void search_rows(const Vectors& vectors, const Rows& rows, const Sink& sink, int64_t queries, const Device& device) {
    const View<2>& base = vectors.base;
    const int width = static_cast<int>(16 / bytes_of(base.dtype));
    Direct f{vectors, rows, sink, (vectors.D + 3) / 4 * 4, false};
    f.vectors = reinterpret_cast<uintptr_t>(base.data) % 16 == 0 &&
                (base.size[0] <= 1 || base.stride[0] % width == 0) && (vectors.D <= 1 || base.stride[1] == 1);
    const int64_t bytes = int64_t{f.pitch} * (f.v.scale ? 12 : 4) + Selection::bytes(sink.k);
    if (bytes > shared_limit(device))
        refuse("topk_distances", "more columns than shared memory holds beside k results");
    const auto kernel = base.dtype == DType::f32  ? direct_kernel<float>
                      : base.dtype == DType::bf16 ? direct_kernel<bf16>
                      : base.dtype == DType::f16  ? direct_kernel<f16>
                                                  : direct_kernel<int8_t>;
    launch(kernel, {static_cast<int>(queries), sink.slices, 1}, threads, bytes, device.stream, f);
}

}  // namespace metate::cuda::pq
