// The two products of attention over a tile of keys that lie in pages, for a few query rows: every row of the cache is
// read where it is. A row's sums do not depend on the rows beside it.
#pragma once

#include "cache.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int tile_keys = 64;
constexpr int group_keys = 16;  // keys of a tile whose products are found for all heads before those of the next keys

// Memory that will be read, in its order.
struct Run {
    const uint8_t *at, *end;
};

// Asks for what will be read next, a few lines at a time between products: a core waits once more than a dozen lines
// are on their way.
class Prefetch {
  public:
    // `steps` calls of fetch() are to ask for everything.
    void begin(const Run* runs, const Run* end, int64_t steps) {
        int64_t lines = 0;
        for (const Run* run = runs; run != end; ++run) lines += ceil_div(run->end - run->at, 64);
        next_ = runs;
        end_ = end;
        at_ = until_ = nullptr;
        due_ = 0;
        pace_ = ceil_div(unit * lines, larger(steps, 1));
    }
    METATE_FN void fetch() {
        due_ += pace_;
        if (due_ < batch * unit) return;
        do {
            if (at_ >= until_) {
                if (next_ == end_) {
                    pace_ = due_ = 0;
                    return;
                }
                at_ = next_->at;
                until_ = next_->end;
                ++next_;
            }
#pragma GCC unroll 4
            for (int i = 0; i < batch; ++i) __builtin_prefetch(at_ + i * 64, 0, 2);
            at_ += batch * 64;
            due_ -= batch * unit;
        } while (due_ >= batch * unit);
    }

  private:
    static constexpr int64_t unit = 256;  // of a line
    static constexpr int batch = 4;       // lines asked for together
    const Run *next_ = nullptr, *end_ = nullptr;
    const uint8_t *at_ = nullptr, *until_ = nullptr;
    int64_t due_ = 0, pace_ = 0;
};

// c[r · stride + key] = q_r · k_key for `rows` rows of words and `count` keys: pointers to rows, readable up to a
// multiple of width.
template <class S, int rows>
__attribute__((noinline)) void multiply_keys(const uint8_t* const* keys, int64_t offset, int64_t count, const float* q,
                                             int64_t q_stride, int64_t d, float* c, int64_t stride, Prefetch& shared) {
    constexpr int together = width / rows;  // keys whose sums fill the accumulators
    Prefetch ahead = shared;
    for (int64_t first = 0; first < count; first += together) {
        const uint8_t* key[together];
        vf sums[width];
#pragma GCC unroll 16
        for (int k = 0; k < together; ++k) key[k] = keys[first + k] + offset;
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) sums[i] = splat(0.0f);
        const auto step = [&](int64_t at, int64_t n) __attribute__((always_inline)) {
            ahead.fetch();
            constexpr int vectors = vectors_of_block<S>;
            Words<S> x[rows][vectors];
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v)
                    x[r][v] = as_words<S>(load(q + r * q_stride + at / elements_of_word<S> + v * width));
            }
#pragma GCC unroll 16
            for (int k = 0; k < together; ++k) {
                Words<S> y[vectors];
                take_key<S>(key[k] + bytes_before<S>(at), n, y);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
                    for (int r = 0; r < rows; ++r)
                        sums[r * together + k] = add_product(sums[r * together + k], y[v], x[r][v]);
                }
            }
        };
        int64_t at = 0;
        for (; at + block <= d; at += block) step(at, block);
        if (at < d) step(at, d - at);
        float line[width];
        store(line, sum_rows(sums));
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
            __builtin_memcpy(c + r * stride + first, line + r * together, together * sizeof(float));
    }
    shared = ahead;
}

// Sums over the keys of a tile, group after group, and what they are added to when they are complete:
// o = o · factor + sum. Rows are `stride` apart.
struct Sums {
    float *sum, *o;
    int64_t stride;
    const float* factor;
    bool is_first, is_last;
};

// Adds Σ_key p[r · stride + key] v_key for `blocks` blocks of columns from `at` on, `n` columns of them real; p is in
// words.
template <class S, int rows, int blocks, bool whole>
__attribute__((noinline)) void multiply_values(const uint8_t* const* values, int64_t offset, int64_t count,
                                               const float* p, int64_t stride, int64_t at, int64_t n, const Sums& to,
                                               Prefetch& shared) {
    Prefetch ahead = shared;
    vf sums[rows][2 * blocks];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < 2 * blocks; ++i)
            sums[r][i] = to.is_first ? splat(0.0f) : load(to.sum + r * to.stride + at + i * width);
    }
    for (int64_t k = 0; k < count; k += elements_of_word<S>, ++p) {
        ahead.fetch();
        const uint8_t *v = values[k] + (offset + bytes_before<S>(at)), *next = row_of_zeros;
        if (has_dots<S> && k + 1 < count) next = values[k + 1] + (offset + bytes_before<S>(at));
        Words<S> weight[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) weight[r] = as_words<S>(splat(p[r * stride]));
#pragma GCC unroll 4
        for (int i = 0; i < blocks; ++i) {
            Words<S> x[2];
            take_values<S>(v + bytes_before<S>(i * block), next + bytes_before<S>(i * block), whole ? block : n, x);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                sums[r][2 * i] = add_product(sums[r][2 * i], x[0], weight[r]);
                sums[r][2 * i + 1] = add_product(sums[r][2 * i + 1], x[1], weight[r]);
            }
        }
    }
    shared = ahead;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        const vf factor = splat(to.factor[r]);
#pragma GCC unroll 8
        for (int i = 0; i < 2 * blocks; ++i) {
            const int64_t place = r * to.stride + at + i * width;
            if (to.is_last)
                store(to.o + place, fma(load(to.o + place), factor, sums[r][i]));
            else
                store(to.sum + place, sums[r][i]);
        }
    }
}

// Blocks of columns whose sums fill the registers.
template <int rows>
constexpr int blocks_of = width == 16 ? (rows == 4 ? 2 : 4) : 1;

// The same for all dv columns.
template <class S, int rows>
METATE_FN void multiply_all_values(const uint8_t* const* values, int64_t offset, int64_t count, const float* p,
                                   int64_t stride, int64_t dv, const Sums& to, Prefetch& ahead) {
    constexpr int blocks = blocks_of<rows>;
    int64_t at = 0;
    for (; at + blocks * block <= dv; at += blocks * block) {
        multiply_values<S, rows, blocks, true>(values, offset, count, p, stride, at, blocks * block, to, ahead);
    }
    for (; at + block <= dv; at += block) {
        multiply_values<S, rows, 1, true>(values, offset, count, p, stride, at, block, to, ahead);
    }
    if (at < dv) multiply_values<S, rows, 1, false>(values, offset, count, p, stride, at, dv - at, to, ahead);
}

// Calls run<n>(r) for tiles of n = 4, 2 or 1 rows from r on; rows are readable and writable up to a multiple of 4.
template <class Run>
METATE_FN void for_row_tiles(int64_t rows, const Run& run) {
    int64_t r = 0;
    for (; rows - r > 2; r += 4) run.template operator()<4>(r);
    if (rows - r == 2) run.template operator()<2>(r);
    if (rows - r == 1) run.template operator()<1>(r);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
