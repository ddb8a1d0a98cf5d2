// Sums of the probabilities of each key: a thread has one key and multiplies it with eight queries of a head at a time,
// so that one kernel serves every width and format.
#include "host.h"

namespace metate::cuda::paged {
namespace {

constexpr int sum_threads = 128, together = 8;

struct Sums {
    Problem problem;
    Cache k;
};

// Columns c … c + 7 of a row of codes or numbers, zeros beyond the last, without their scale.
template <typename T>
METATE_DEVICE void load_eight(float (&x)[8], const Cache& k, const unsigned char* row, int c, int columns) {
    METATE_NO_UNROLL
    for (int half = 0; half < 8; half += 4) {
        float four[4] = {};
        METATE_UNROLL
        for (int e = 0; e < 4; ++e) {
            const int column = c + half + e;
            if (column >= columns) continue;
            if (k.format == Format::plain) {
                four[e] = to_float(load_global<T>(row + column * k.view.stride[3] * 2));
                continue;
            }
            uint32_t code =
                load_global<uint8_t>(row + (k.format == Format::int4 ? column / 2 : column) * k.view.stride[3]);
            float values[8], bytes[4];
            if (k.format == Format::int4) {
                decode<Format::int4>(values, code >> (column % 2 * 4));
                four[e] = values[0];
            } else {
                k.format == Format::int8 ? decode<Format::int8>(bytes, code) : decode<Format::float8>(bytes, code);
                four[e] = bytes[0];
            }
        }
        METATE_UNROLL
        for (int e = 0; e < 4; ++e) (half == 0 ? x[e] : x[4 + e]) = four[e];
    }
}

template <typename T>
METATE_KERNEL(sum_threads, 1)
sums_kernel(METATE_PARAMETER(Sums, f)) {
    METATE_SHARED(float, queries);  // `together` of them, a column's side by side
    const Problem& p = f.problem;
    const int blocks = (p.capacity + sum_threads - 1) / sum_threads;
    const int first = block_index().x % blocks * sum_threads, j = first + thread_index();
    const int h = block_index().x / blocks % p.heads;
    const Span s = span_of(p, block_index().x / blocks / p.heads, h / p.group);
    const int columns = static_cast<int>(p.a.q.size[3]);
    const bool there = j >= s.first_key && j < s.keys;

    const unsigned char* row = static_cast<const unsigned char*>(f.k.view.data);
    float factor = factor_of(p);
    if (there) {
        const Place place = place_of(p, s, j);
        const View<4>& v = f.k.view;
        row += (place.page * v.stride[0] + place.row * v.stride[1] + s.kv_head * v.stride[2]) *
               (f.k.format == Format::plain ? 2 : 1);
        factor *= scale_of(f.k, p, s, j, s.first_key, s.keys);
    }

    float sum = 0.f;
    const bool in_order = !p.a.positions;  // positions are the newest places
    const int start = p.right >= 0 && in_order ? most(0, first - s.place() - p.right) : 0;
    int end = p.left >= 0 && in_order ? least(s.queries, first + sum_threads - s.place() + p.left) : s.queries;
    if (first >= s.keys) end = start;
    for (int i0 = start; i0 < end; i0 += together) {
        sync_threads();
        for (int index = thread_index(); index < columns * together; index += sum_threads) {
            const int i = i0 + index % together, c = index / together;
            float x = 0.f;
            if (i < s.queries) {
                const View<4>& q = p.a.q;
                x = to_float(load_global<T>(static_cast<const T*>(q.data) + s.batch * q.stride[0] +
                                            (s.first_query + i) * q.stride[1] + h * q.stride[2] + c * q.stride[3]));
            }
            store_shared(queries + index, x);
        }
        sync_threads();
        if (!there) continue;
        float dot[together] = {};
        METATE_NO_UNROLL
        for (int c = 0; c < columns; c += 8) {
            float x[8];
            load_eight<T>(x, f.k, row, c, columns);
            METATE_UNROLL
            for (int e = 0; e < 8; ++e) {
                if (c + e >= columns) continue;
                METATE_UNROLL
                for (int i = 0; i < together; ++i) {
                    dot[i] += x[e] * load_shared<float>(queries + (c + e) * together + i);
                }
            }
        }
        METATE_UNROLL
        for (int i = 0; i < together; ++i) {
            if (i0 + i >= s.queries) continue;
            const Row of(p, s, i0 + i, h);
            if (!of.sees(p, s, j)) continue;
            const auto softmax = load_global<Words<2>>(softmax_at(p, s, i0 + i, h));
            const float ahead = of.logit(p, s, product(dot[i], factor), j) - float_of(softmax[0]);
            // The tensor cores may have rounded the largest dot product another way.
            sum += fast_exp2(ahead > 0.f ? 0.f : ahead) * float_of(softmax[1]);
        }
    }
    const View<3>& v = p.a.sums;
    if (j < p.capacity) {
        store_global(static_cast<float*>(v.data) + s.sequence * v.stride[0] + h * v.stride[1] + j * v.stride[2], sum);
    }
}

}  // namespace

void sum_columns(const Problem& p, const Cache& k, void* stream) {
    const int64_t blocks = static_cast<int64_t>((p.capacity + sum_threads - 1) / sum_threads) * p.heads * p.sequences;
    if (blocks > 0x7fffffff) refuse("paged_attention", "column sums of more than 2^38 keys");
    const auto kernel = p.a.q.dtype == DType::bf16 ? sums_kernel<bf16> : sums_kernel<f16>;
    launch(kernel, {static_cast<int>(blocks)}, sum_threads, p.a.q.size[3] * together * sizeof(float), stream,
           Sums{p, k});
}

}  // namespace metate::cuda::paged
