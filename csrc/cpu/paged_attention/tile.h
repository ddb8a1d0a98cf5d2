// The two products of attention over a tile of keys that lie in pages, for a few query rows: every row of the cache is
// read where it is. A row's sums do not depend on the rows beside it.
#pragma once

#include "cache.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int tile_keys = 64;
constexpr int group_keys = 16;  // rows of a cache that are written out in products
// From row to row of a tile's logits, and of the weights that take their place.
constexpr int64_t line_floats = 16, p_stride = tile_keys + line_floats;

// The largest of each row, lane by lane; NaN counts for nothing.
vf largest_of_rows(vf (&rows)[width]) {
    transpose(rows);
#pragma GCC unroll 4
    for (int step = width / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < step; ++i) rows[i] = max(rows[i], rows[i + step]);
    }
    return rows[0];
}

// Asks for what will be read next, a batch of lines at a time between products. A core forgets requests while it waits
// for as many lines as it can, so that a batch may be asked for three times (Zen 5: shuffled pages of 32 KB, read with
// eight multiplications a line, came at 0.74 of the speed of linear memory when asked for once, at 0.87 so). It asks
// the first cache level, though the second may have to keep them: asked alone, that one brought up to a third fewer a
// second.
class Prefetch {
  public:
    static constexpr int batch_lines = 4;
    static constexpr int64_t batch_bytes = batch_lines * 64;
    static constexpr int64_t again = 48, last = 72;  // batches after the first request

    // Batches go into `room`, which has place for `last` of them and for all that are asked for between two calls of
    // clear(). `before` was asked for already.
    void start(const uint8_t** room, const uint8_t* const* before, int64_t count) {
        room_ = room;
        next_ = end_ = room + last;
        const uint8_t* const any = reinterpret_cast<const uint8_t*>(room);
        for (int64_t i = 0; i < last; ++i) room[i] = count ? before[larger(count - last + i, 0)] : any;
    }
    // Forgets what was to be asked for.
    void clear() {
        __builtin_memmove(room_, next_ - last, last * sizeof *room_);
        next_ = end_ = room_ + last;
    }
    void add(const uint8_t* const* batches, int64_t count) {
        __builtin_memcpy(end_, batches, static_cast<size_t>(count) * sizeof *batches);
        end_ += count;
    }
    // `steps` calls of fetch() are to ask for everything.
    void begin(int64_t steps) {
        due_ = 0;
        pace_ = ceil_div(unit * (end_ - next_), larger(steps, 1));
    }
    template <bool repeatedly = false>
    METATE_FN void fetch() {
        due_ += pace_;
        if (due_ < unit) return;
        do {
            if (next_ == end_) {
                pace_ = due_ = 0;
                return;
            }
            ask(next_[0]);
            if constexpr (repeatedly) {
                ask(next_[-again]);
                ask(next_[-last]);
            }
            ++next_;
            due_ -= unit;
        } while (due_ >= unit);
    }

  private:
    static METATE_FN void ask(const uint8_t* batch) {
#pragma GCC unroll 4
        for (int i = 0; i < batch_lines; ++i) __builtin_prefetch(batch + i * 64);
    }
    static constexpr int64_t unit = 1024;  // of a batch
    const uint8_t **room_, **next_, **end_;
    int64_t due_, pace_;
};

// Whether products ask for each batch three times: those of floats alone wait for memory enough to gain by it.
template <class S, int rows>
constexpr bool asks_again = width == 16 && rows <= 4 && !quantised<S> && !is_whole<S> && !is_pairs<S>;

// Rows of one head: of key j at[j], `offset` bytes on.
struct Lines {
    const uint8_t* const* at;
    int64_t offset;
};
// Rows that a product takes or makes: row r of head h at + h · head + r · row.
struct Matrix {
    float* at;
    int64_t head, row;
};

// Rows of a cache whose words products take as they lie may be multiplied by lanes: so many words at a time, and at
// most as many as one sum may take without being rounded too often.
template <class S>
constexpr bool has_lanes = has_bf16_dots<S> && !is_pairs<S>;
constexpr int64_t lane_words = 4, most_lane_words = 128;

// c(h, r)[key] = q(h, r) · k_key,h for `heads` heads, whose keys are next_head bytes apart, `rows` rows of words and
// `count` keys: pointers to rows, readable up to a multiple of width. All heads of a few keys come before the next
// keys, `beside` heads at a time: so each load of the innermost loop walks on from line to line. Steps from row to row
// would be taken for a pattern, and what lies behind a page be fetched.
template <class S, int rows, int beside>
__attribute__((noinline)) void multiply_keys(const Lines& keys, int64_t next_head, int64_t heads, int64_t count,
                                             Matrix q, int64_t d, Matrix c, Prefetch& shared) {
    constexpr int together = width / rows / beside, columns = block_of<S>;  // keys whose sums fill the accumulators
    constexpr int blocks = 128 / columns;                                   // of a row of one head, written out
    Prefetch ahead = shared;
    for (int64_t first = 0; first < count; first += together) {
        const uint8_t* key[together];
#pragma GCC unroll 16
        for (int k = 0; k < together; ++k) key[k] = keys.at[first + k] + keys.offset;
        for (int64_t h = 0; h < heads; h += beside) {
            Sum<S> sums[width];
#pragma GCC unroll 16
            for (int i = 0; i < width; ++i) sums[i] = Sum<S>{};
#pragma GCC unroll 2
            for (int b = 0; b < beside; ++b) {
                const float* x_of = q.at + (h + b) * q.head;
                const auto step = [&](int64_t at, int64_t n) __attribute__((always_inline)) {
                    constexpr int vectors = vectors_of_block<S>;
                    Words<S> x[rows][vectors];
#pragma GCC unroll 8
                    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
                        for (int v = 0; v < vectors; ++v)
                            x[r][v] = as_words<S>(load(x_of + r * q.row + at / elements_of_word<S> + v * width));
                    }
#pragma GCC unroll 16
                    for (int k = 0; k < together; ++k) {
                        Words<S> y[vectors];
                        take_key<S>(key[k] + bytes_before<S>(at), n, y);
#pragma GCC unroll 2
                        for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 8
                            for (int r = 0; r < rows; ++r) {
                                Sum<S>& sum = sums[(b * rows + r) * together + k];
                                sum = add_product(sum, y[v], x[r][v]);
                            }
                        }
                    }
                };
                int64_t at = 0;
                for (; beside == 1 && at + blocks * columns <= d; at += blocks * columns) {
#pragma GCC unroll 4
                    for (int i = 0; i < blocks; ++i) {
                        ahead.template fetch<asks_again<S, rows>>();
                        step(at + i * columns, columns);
                    }
                }
                for (; at + columns * beside <= d; at += columns * beside) {
                    ahead.template fetch<asks_again<S, rows>>();
#pragma GCC unroll 2
                    for (int i = 0; i < beside; ++i) step(at + i * columns, columns);
                }
                for (; at < d; at += columns) {
                    ahead.template fetch<asks_again<S, rows>>();
                    step(at, smaller(d - at, columns));
                }
#pragma GCC unroll 16
                for (int k = 0; k < together; ++k) key[k] += next_head;
            }
            float line[width];
            store(line, value_of(sum_rows(sums)));
#pragma GCC unroll 2
            for (int b = 0; b < beside; ++b) {
                float* to = c.at + (h + b) * c.head + first;
#pragma GCC unroll 8
                for (int r = 0; r < rows; ++r, to += c.row)
                    __builtin_memcpy(to, line + (b * rows + r) * together, together * sizeof(float));
            }
        }
    }
    shared = ahead;
}

#if defined(METATE_HAS_BF16_DOT)
// The same for one head and `rows` rows, as many as a vector has lanes or half as many: q has word i at i · width + r,
// or words 2 i and 2 i + 1 at i · width + 2 r. A word of a key meets those of all rows at once, and no sum is over
// lanes. Keys are readable up to a multiple of group_keys.
template <class S, int words_of_lane>
__attribute__((noinline)) void multiply_keys_by_lanes(const Lines& keys, int64_t count, const float* q, int64_t words,
                                                      const Matrix& c, int64_t rows, Prefetch& shared) {
    constexpr int together = group_keys / 2, batch = lane_words / words_of_lane;
    static_assert(group_keys == width);
    Prefetch ahead = shared;
    for (int64_t first = 0; first < count; first += group_keys) {
        vf sums[group_keys];
#pragma GCC unroll 2
        for (int half = 0; half < group_keys; half += together) {
            const int32_t* key[together];
#pragma GCC unroll 8
            for (int k = 0; k < together; ++k) {
                key[k] = reinterpret_cast<const int32_t*>(keys.at[first + half + k] + keys.offset);
                sums[half + k] = splat(0.0f);
            }
            const float* x = q;
            for (int64_t word = 0; word < words; word += lane_words, x += batch * width) {
                ahead.fetch();
#pragma GCC unroll 4
                for (int i = 0; i < batch; ++i) {
                    const Words<S> line = as_words<S>(load(x + i * width));
#pragma GCC unroll 8
                    for (int k = 0; k < together; ++k) {
                        const int32_t* const at = key[k] + word + i * words_of_lane;
                        const vi y = words_of_lane == 1 ? splat(*at) : splat_two(at);
                        sums[half + k] = add_product(sums[half + k], y, line);
                    }
                }
            }
        }
        transpose(sums);
#pragma GCC unroll 16
        for (int r = 0; r < width / words_of_lane; ++r) {
            if (r == rows) break;
            vf row = sums[r * words_of_lane];
            if (words_of_lane == 2) row = row + sums[r * words_of_lane + 1];
            store(c.at + r * c.row + first, row);
        }
    }
    shared = ahead;
}
#endif

// What becomes of sums over some keys: o = o · factor + sum · step, where whole numbers have a step; without factors o
// counts as it is. Row r of head h has its results at o + h · head + r · row, its factor and step at h · pitch + r.
struct Result {
    float* o;
    int64_t head, row, pitch;
    const float *factor, *step;
};

// Adds Σ_key p[r · p_stride + key] v_key over `count` keys for `blocks` blocks of columns, `n` columns of them real; p
// is in words.
template <class S, int rows, int blocks, bool whole_blocks, int few>
METATE_FN void multiply_columns(const uint8_t* const* values, int64_t offset, int64_t count, const float* p, int64_t n,
                                float* o, int64_t o_stride, const float* factors, const float* steps, Prefetch& ahead) {
    constexpr int each = elements_of_word<S>, columns = block_of<S>, vectors = columns / width;
    constexpr int group = few ? few : group_keys;
    Sum<S> sums[rows][vectors * blocks];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < vectors * blocks; ++i) {
            if constexpr (is_whole<S>)
                sums[r][i] = Sum<S>{};
            else
                sums[r][i] = load(o + r * o_stride + i * width);
            if constexpr (!is_whole<S>) {
                if (factors) sums[r][i] = sums[r][i] * splat(factors[r]);
            }
        }
    }
    const auto add_key = [&](int i, bool has_next) __attribute__((always_inline)) {
        ahead.template fetch<asks_again<S, rows>>();
        const uint8_t *v = values[i] + offset, *next = row_of_zeros;
        if (each == 2 && has_next) next = values[i + 1] + offset;
        Words<S> weight[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) weight[r] = as_words<S>(splat(p[r * p_stride + i / each]));
#pragma GCC unroll 4
        for (int b = 0; b < blocks; ++b) {
            Words<S> x[vectors];
            take_values<S>(v + bytes_before<S>(b * columns), next + bytes_before<S>(b * columns),
                           whole_blocks ? columns : n, x);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
                for (int j = 0; j < vectors; ++j)
                    sums[r][vectors * b + j] = add_product(sums[r][vectors * b + j], x[j], weight[r]);
            }
        }
    };
    // Written out, or one load would step from row to row.
    for (; count >= group; count -= group, values += group, p += group / each) {
#pragma GCC unroll 16
        for (int i = 0; i < group; i += each) add_key(i, true);
    }
    for (; count > 0; count -= each, values += each, ++p) add_key(0, count > 1);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < vectors * blocks; ++i) {
            float* const to = o + r * o_stride + i * width;
            if constexpr (is_whole<S>) {
                const vf old = factors ? load(to) * splat(factors[r]) : load(to);
                store(to, fma(value_of(sums[r][i]), splat(steps[r]), old));
            } else {
                store(to, sums[r][i]);
            }
        }
    }
}

// Blocks of columns whose sums fill the registers.
template <class S, int rows>
constexpr int blocks_of = width == 16 && rows < 8 ? (rows == 4 ? 2 : 4) * block / block_of<S> : 1;

// Adds Σ_key p(h, r)[key] v_key,h to the results of `heads` heads, whose values are next_head bytes apart, `rows` rows
// of words and `count` keys. All heads of `few` keys come before the next keys; 0: all keys of a head before the next
// head. The results are the same.
template <class S, int rows, int few>
__attribute__((noinline)) void multiply_values(const Lines& values, int64_t next_head, int64_t heads, int64_t count,
                                               const float* p, int64_t p_head, int64_t dv, const Result& to,
                                               Prefetch& shared) {
    const int64_t together = few ? few : count;
    constexpr int blocks = blocks_of<S, rows>, columns = block_of<S>;
    Prefetch ahead = shared;
    for (int64_t first = 0; first < count; first += together) {
        const int64_t keys = smaller(count - first, together);
        for (int64_t h = 0; h < heads; ++h) {
            const uint8_t* const* v = values.at + first;
            const int64_t offset = values.offset + h * next_head;
            const float *x = p + h * p_head + first / elements_of_word<S>, *step = to.step + h * to.pitch;
            const float* factor = first || !to.factor ? nullptr : to.factor + h * to.pitch;
            float* const o = to.o + h * to.head;
            int64_t at = 0;
            for (; at + blocks * columns <= dv; at += blocks * columns)
                multiply_columns<S, rows, blocks, true, few>(v, offset + bytes_before<S>(at), keys, x, blocks * columns,
                                                             o + at, to.row, factor, step, ahead);
            for (; blocks > 1 && at + columns <= dv; at += columns)
                multiply_columns<S, rows, 1, true, few>(v, offset + bytes_before<S>(at), keys, x, columns, o + at,
                                                        to.row, factor, step, ahead);
            if (at < dv)
                multiply_columns<S, rows, 1, false, few>(v, offset + bytes_before<S>(at), keys, x, dv - at, o + at,
                                                         to.row, factor, step, ahead);
        }
    }
    shared = ahead;
}

// Calls run<n>(r) for tiles of n = 8, where there are registers for them, 4, 2 or 1 rows from r on; rows are readable
// and writable up to a multiple of 4.
template <class S, class Run>
METATE_FN void for_row_tiles(int64_t rows, const Run& run) {
    int64_t r = 0;
    if constexpr (has_lanes<S>) {
        for (; rows - r > 4; r += 8) run.template operator()<8>(r);
    }
    for (; rows - r > 2; r += 4) run.template operator()<4>(r);
    if (rows - r == 2) run.template operator()<2>(r);
    if (rows - r == 1) run.template operator()<1>(r);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
