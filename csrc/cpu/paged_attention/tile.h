// The two products of attention over a tile of keys that lie in pages, for a few query rows: every row of the cache is
// read where it is. A row's sums do not depend on the rows beside it.
#pragma once

#include "cache.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int tile_keys = 64;

// What will be read next, in the order in which it lies in memory: asked for a few lines at a time between products,
// for a core waits once more than a dozen lines are on their way.
struct Run {
    const uint8_t* at;
    int64_t lines;
};
class Prefetch {
  public:
    // `steps` calls of fetch() are to ask for everything.
    METATE_FN void begin(const Run* runs, int64_t count, int64_t lines, int64_t steps) {
        next_ = runs;
        end_ = runs + count;
        left_ = 0;
        quota_ = (lines + steps - 1) / steps;
    }
    METATE_FN void fetch() {
        const uint8_t* at = at_;
        int64_t left = left_;
        for (int64_t wanted = quota_;;) {
            const int64_t lines = smaller(wanted, left);
            for (const uint8_t* const until = at + 64 * lines; at != until; at += 64) __builtin_prefetch(at, 0, 2);
            left -= lines;
            wanted -= lines;
            if (wanted == 0 || next_ == end_) break;
            at = next_->at;
            left = next_->lines;
            ++next_;
        }
        at_ = at;
        left_ = left;
    }

  private:
    const Run *next_ = nullptr, *end_ = nullptr;
    const uint8_t* at_ = nullptr;
    int64_t left_ = 0;
    int64_t quota_ = 0;
};

// c[r · stride + key] = q_r · k_key for `rows` rows and as many keys as fill the accumulators: `width` sums at a time.
template <class S, int rows>
__attribute__((noinline)) void multiply_keys(const uint8_t* const* keys, int64_t offset, const float* q,
                                             int64_t q_stride, int64_t d, float* c, int64_t stride, Prefetch& ahead) {
    constexpr int count = width / rows;
    vf sums[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) sums[i] = splat(0.0f);
    const auto step = [&](int64_t at, int64_t n) __attribute__((always_inline)) {
        ahead.fetch();
        vf qa[rows], qb[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            qa[r] = load(q + r * q_stride + at);
            qb[r] = load(q + r * q_stride + at + width);
        }
#pragma GCC unroll 16
        for (int k = 0; k < count; ++k) {
            vf a, b;
            read<S>(keys[k] + (offset + bytes_before<S>(at)), n, a, b);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) sums[r * count + k] = fma(a, qa[r], sums[r * count + k]);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) sums[r * count + k] = fma(b, qb[r], sums[r * count + k]);
        }
    };
    int64_t at = 0;
    for (; at + block <= d; at += block) step(at, block);
    if (at < d) step(at, d - at);
    float line[width];
    store(line, sum_rows(sums));
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) __builtin_memcpy(c + r * stride, line + r * count, count * sizeof(float));
}

// c = q kᵀ for a tile: `keys` pointers to rows, readable up to a multiple of width.
template <class S, int rows>
METATE_FN void multiply_tile_keys(const uint8_t* const* keys, int64_t offset, int64_t count, const float* q,
                                  int64_t q_stride, int64_t d, float* c, int64_t stride, Prefetch& ahead) {
    for (int64_t k = 0; k < count; k += width / rows) {
        multiply_keys<S, rows>(keys + k, offset, q, q_stride, d, c + k, stride, ahead);
    }
}

// o_r = o_r · factor_r + Σ_key p[r · stride + key] v_key for `vectors` · width columns from `at` on, `n` of them real.
template <class S, int rows, int blocks, bool whole>
__attribute__((noinline)) void multiply_values(const uint8_t* const* values, int64_t offset, int64_t count,
                                               const float* p, int64_t stride, int64_t at, int64_t n, float* o,
                                               int64_t o_stride, const float* factor, Prefetch& ahead) {
    vf sums[rows][2 * blocks];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < 2 * blocks; ++i) sums[r][i] = splat(0.0f);
    }
    for (int64_t k = 0; k < count; ++k) {
        ahead.fetch();
        const uint8_t* v = values[k] + (offset + bytes_before<S>(at));
        vf weight[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) weight[r] = splat(p[r * stride + k]);
#pragma GCC unroll 4
        for (int i = 0; i < blocks; ++i) {
            vf a, b;
            read<S>(v + bytes_before<S>(i * block), whole ? block : n, a, b);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                sums[r][2 * i] = fma(a, weight[r], sums[r][2 * i]);
                sums[r][2 * i + 1] = fma(b, weight[r], sums[r][2 * i + 1]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < 2 * blocks; ++i) {
            float* to = o + r * o_stride + at + i * width;
            store(to, fma(load(to), splat(factor[r]), sums[r][i]));
        }
    }
}

// Blocks of columns whose sums fill the registers.
template <int rows>
constexpr int blocks_of = width == 16 ? (rows == 4 ? 2 : 4) : 1;

// The same for all dv columns.
template <class S, int rows>
METATE_FN void multiply_tile_values(const uint8_t* const* values, int64_t offset, int64_t count, const float* p,
                                    int64_t stride, int64_t dv, float* o, int64_t o_stride, const float* factor,
                                    Prefetch& ahead) {
    constexpr int blocks = blocks_of<rows>;
    int64_t at = 0;
    for (; at + blocks * block <= dv; at += blocks * block) {
        multiply_values<S, rows, blocks, true>(values, offset, count, p, stride, at, blocks * block, o, o_stride,
                                               factor, ahead);
    }
    for (; at + block <= dv; at += block) {
        multiply_values<S, rows, 1, true>(values, offset, count, p, stride, at, block, o, o_stride, factor, ahead);
    }
    if (at < dv)
        multiply_values<S, rows, 1, false>(values, offset, count, p, stride, at, dv - at, o, o_stride, factor, ahead);
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
