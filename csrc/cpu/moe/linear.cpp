// The rows of each expert times its weight.
//
// Every result is the sum of chains of products of `depth` words (gemm.h) in ascending order, added one after another.
// Few rows take the weight as it lies, transposed in registers unless it lies transposed: memory bounds them. Many rows
// share packed panels of it.
#include "../attention/gemm.h"
#include "rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t depth = long_chain;         // words of a packed panel, which stays in the first-level cache
constexpr int64_t piece_columns = 4 * panel;  // of the result, where there are many rows
constexpr int64_t rows_at_once = 8 * tile_rows;
constexpr int few = width == 16 ? 12 : 4;  // rows whose sums fit the registers beside a square of the weight
constexpr int strip_rows = 4;              // and beside strips of a transposed one
constexpr int64_t ahead = 1024;  // bytes of each row of the weight on their way to the second cache, for few rows
constexpr int64_t few_bytes = 1 << 19;  // of the weight in a piece of few rows

template <class T, class Word>
struct Problem {
    const GroupedLinear& call;
    Rows rows;
    Word* x;          // rows of all spans, `pitch` words apart
    int64_t* pieces;  // before each span
    int64_t pitch;

    explicit Problem(const GroupedLinear& c)
        : call(c),
          rows{c.x, c.order, c.k},
          x(nullptr),
          pieces(nullptr),
          pitch(round_up(words(), width) + width) {}  // not a power of two: rows would share lines of the cache
    int64_t columns() const { return call.x.size[1]; }
    int64_t words() const { return steps_of<Word>(columns()); }
    const T* weight(int64_t expert, int64_t n, int64_t k) const {
        const View<3>& w = call.w;
        return static_cast<const T*>(w.data) + expert * w.stride[0] + n * w.stride[1] + k * w.stride[2];
    }
};

template <class T, class Word>
void copy_row(const Problem<T, Word>& p, int64_t row) {
    const T* const from = p.rows.template at<T>(row);
    const int64_t stride = p.call.x.stride[1];
    constexpr int64_t at_once = max_head_dim / elements_of<Word>;
    for (int64_t at = 0; at < p.pitch; at += at_once) {
        const int64_t k = at * elements_of<Word>, n = from ? clamp(p.columns() - k, 0, max_head_dim) : 0;
        pack_row(p.x + row * p.pitch + at, smaller(at_once, p.pitch - at), n > 0 ? from + k * stride : nullptr, stride,
                 n);
    }
}

// The bias of n columns and zeros behind.
template <class T>
METATE_FN vf bias_at(const GroupedLinear& call, int64_t expert, int64_t column, int64_t n) {
    if (!call.bias) return splat(0.0f);
    const int64_t at = expert * call.bias.stride[0] + column * call.bias.stride[1];
    if (call.bias.dtype == DType::f32)
        return load_any(static_cast<const float*>(call.bias.data) + at, call.bias.stride[1], n);
    return load_any(static_cast<const T*>(call.bias.data) + at, call.bias.stride[1], n);
}

template <class T>
METATE_FN void write(const GroupedLinear& call, int64_t row, int64_t column, vf x, int64_t n) {
    T* const out = static_cast<T*>(call.out.data) + row * call.out.stride[0] + column * call.out.stride[1];
    store_any(out, call.out.stride[1], x, n);
}

// Few rows.

// What a lane holds while rows of the weight are transposed: a number, or two bfloat16 side by side.
template <class T>
constexpr int per_lane = __is_same(T, bf16) ? 2 : 1;
template <class T>
constexpr int square_columns = width * per_lane<T>;
template <class T, class Word>
constexpr int square_words = square_columns<T> / elements_of<Word>;

template <class T>
METATE_FN vf load_lanes(const T* row, int64_t n) {
    return n >= width ? load(row) : load(row, n);
}
METATE_FN vf load_lanes(const bf16* row, int64_t n) {
    if (n >= square_columns<bf16>) return load(reinterpret_cast<const float*>(row));
    bf16 line[square_columns<bf16>] = {};
    memcpy(line, row, static_cast<size_t>(n) * sizeof(bf16));
    return load(reinterpret_cast<const float*>(line));
}

// Vector i of `square`: lane i of `width` rows of the weight, of which there are n; zeros behind the columns.
template <class T>
METATE_FN void load_square(vf (&square)[width], const T* from, int64_t stride, int64_t n, int64_t left) {
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) square[i] = load_lanes(from + (i < n ? i : n - 1) * stride, left);
    transpose(square);
}

// Word i of `width` rows.
template <class T, class Word>
METATE_FN vf word(const vf (&square)[width], int i) {
    if constexpr (per_lane<T> == elements_of<Word>) return square[i];
    const vi pair = as_int(square[i / 2]);
    return as_float(i % 2 ? bit_and(pair, splat(-0x10000)) : shift_left(pair, 16));
}

template <class T, class Word, int rows>
METATE_FN void add_square(vf (&sum)[rows], const vf (&square)[width], const Word* x, int64_t pitch) {
#pragma GCC unroll 32
    for (int i = 0; i < square_words<T, Word>; ++i) {
        const vf value = word<T, Word>(square, i);
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) sum[r] = add_product(sum[r], spread(x + r * pitch + i), value);
    }
}

// `width` columns of the result of few rows; `next`: the weight of the columns after them, or null.
template <int rows, class T, class Word>
void multiply_few(const Problem<T, Word>& p, const Word* x, const T* w, int64_t n, const T* next, vf (&total)[rows]) {
    constexpr int64_t size = sizeof(T), step = square_columns<T>, far = ahead / size, line = 64 / size;
    constexpr int64_t chain = depth * elements_of<Word>;
    static_assert(chain % step == 0);
    const int64_t stride = p.call.w.stride[1], columns = p.columns();
    vf sum[rows];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) total[r] = sum[r] = splat(0.0f);
    for (int64_t k = 0; k < columns; k += step, x += square_words<T, Word>) {
        const T* const soon = k + far < columns ? w + k + far : next ? next + (k + far - columns) : nullptr;
        for (int64_t i = 0; soon && k % line == 0 && i < n; ++i) __builtin_prefetch(soon + i * stride, 0, 2);
        vf square[width];
        load_square(square, w + k, stride, n, columns - k);
        add_square<T>(sum, square, x, p.pitch);
        if ((k + step) % chain > 0 && k + step < columns) continue;
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
            total[r] = total[r] + sum[r];
            sum[r] = splat(0.0f);
        }
    }
}

// Rows behind those of the span are readable, and not written.
template <int rows, class T, class Word>
void compute_few(const Problem<T, Word>& p, const Span& span, int64_t n, int64_t end) {
    if constexpr (rows > 1) {
        constexpr int fewer = rows > 4 ? rows - 2 : rows - 1;
        if (span.rows <= fewer) return compute_few<fewer>(p, span, n, end);
    }
    for (; n < end; n += width) {
        const int64_t count = smaller(width, end - n), after = n + 2 * width <= end ? n + width : -1;
        vf total[rows];
        multiply_few<rows>(p, p.x + span.first * p.pitch, p.weight(span.expert, n, 0), count,
                           after < 0 ? nullptr : p.weight(span.expert, after, 0), total);
        const vf bias = bias_at<T>(p.call, span.expert, n, count);
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r)
            if (r < span.rows) write<T>(p.call, span.first + r, n, total[r] + bias, count);
    }
}

// Few rows with a transposed weight.

constexpr int64_t strips_columns = 8 * width;  // of a piece
constexpr int64_t steps_ahead = 1024;          // rows of the transposed weight that are on their way

// Vectors of the result that fit the registers.
constexpr int strip_of(int rows) {
    if (width == 16) return rows > 2 ? 4 : 8;
    return rows > 3 ? 2 : rows > 1 ? 4 : 8;
}

// The word of `width` columns in a row of the transposed weight and, where words are pairs, in the next one if there is
// one.
template <class T>
METATE_FN vf zip_rows(const T* row, int64_t, bool, int64_t n, const float*) {
    return load_any(row, 1, n);
}
#if defined(METATE_HAS_BF16_DOT)
METATE_FN vf zip_rows(const bf16* row, int64_t stride, bool has_next, int64_t n, const Pair*) {
    return as_float(zip_any(row, has_next ? row + stride : nullptr, 1, n));
}
#endif

// What `left` rows of the transposed weight add to `count` columns of totals (row, column), strips_columns apart.
template <bool whole, int rows, class T, class Word>
void add_strip(const Word* x, int64_t pitch, const T* w, int64_t stride, int64_t left, int64_t count, float* totals) {
    constexpr int strip = strip_of(rows), at_once = elements_of<Word>;
    vf sum[rows][strip];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < strip; ++v) sum[r][v] = splat(0.0f);
    }
    for (; left > 0; left -= at_once, w += at_once * stride, ++x) {
#pragma GCC unroll 8
        for (int v = 0; v < strip; ++v) {
            if (v * width * static_cast<int>(sizeof(T)) % 64 == 0) {
#pragma GCC unroll 2
                for (int i = 0; i < at_once; ++i) __builtin_prefetch(w + (steps_ahead + i) * stride + v * width, 0, 2);
            }
            const int64_t n = whole ? width : clamp(count - v * width, 0, width);
            const vf value = zip_rows(w + v * width, stride, left > 1, n, x);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) sum[r][v] = add_product(sum[r][v], spread(x + r * pitch), value);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < strip; ++v) {
            float* const total = totals + r * strips_columns + v * width;
            store(total, load(total) + sum[r][v]);
        }
    }
}

template <int rows, class T, class Word>
void compute_strips(const Problem<T, Word>& p, const Span& span, int64_t n) {
    if constexpr (rows > 1) {
        if (span.rows < rows) return compute_strips<rows - 1>(p, span, n);
    }
    constexpr int64_t chain = depth * elements_of<Word>;
    const int64_t stride = p.call.w.stride[2], columns = p.columns();
    const int64_t count = smaller(strips_columns, p.call.out.size[1] - n);
    const Word* x = p.x + span.first * p.pitch;
    constexpr int64_t at_once = strip_of(rows) * width;
    float totals[rows * strips_columns] = {};
    for (int64_t k = 0; k < columns; k += chain, x += depth) {
        const int64_t left = smaller(chain, columns - k);
        for (int64_t c = 0; c < count; c += at_once) {
            const T* const w = p.weight(span.expert, n + c, k);
            count - c >= at_once ? add_strip<true, rows>(x, p.pitch, w, stride, left, count - c, totals + c)
                                 : add_strip<false, rows>(x, p.pitch, w, stride, left, count - c, totals + c);
        }
    }
    for (int64_t c = 0; c < count; c += width) {
        const vf bias = bias_at<T>(p.call, span.expert, n + c, count - c);
        for (int r = 0; r < rows; ++r)
            write<T>(p.call, span.first + r, n + c, load(totals + r * strips_columns + c) + bias, count - c);
    }
}

// Many rows.

template <class Word>
struct Workspace {
    Word* w;        // a panel
    float* totals;  // (row, column), `piece_columns` columns
};

template <class Word>
Workspace<Word> workspace(Arena& arena) {
    return {arena.take<Word>(panel * depth), arena.take<float>(rows_at_once * piece_columns)};
}

// A panel of the weight: columns n … n + count, `left` columns of the product from k on.
template <class T, class Word>
void pack_panel(const Problem<T, Word>& p, int64_t expert, int64_t n, int64_t count, int64_t k, int64_t left,
                Word* to) {
    const int64_t stride = p.call.w.stride[1], step = p.call.w.stride[2];
    const T* const from = p.weight(expert, n, k);
    if (step != 1) {
        if (stride == 1)
            pack_rows(to, from, step, 1, left, count, steps_of<Word>(left), 0);
        else
            pack_transposed(to, from, stride, step, count, left);
        return;
    }
    for (int64_t i = 0; i < count; i += width) {
        Word* out = to + i;
        for (int64_t at = 0; at < left; at += square_columns<T>) {
            vf square[width];
            load_square(square, from + i * stride + at, stride, count - i, left - at);
#pragma GCC unroll 32
            for (int c = 0; c < square_words<T, Word>; ++c, out += panel) store_words(out, word<T, Word>(square, c));
        }
    }
}

// Lines of the weight that are fetched while others are multiplied, a few at a time: many at once would keep the
// product waiting for its own.
struct Fetch {
    const char* row;
    int64_t stride, bytes, rows, lines, at = 0;

    METATE_FN void operator()() {
        for (int64_t i = 0; i < lines && rows > 0; ++i) {
            __builtin_prefetch(row + at, 0, 2);
            at += 64;
            if (at < bytes) continue;
            at = 0;
            row += stride;
            --rows;
        }
    }
};

// Part `part` of `parts` of the panel that begins with columns c and k, to be fetched beside a product of `steps`.
template <class T, class Word>
METATE_FN Fetch fetch_panel(const Problem<T, Word>& p, int64_t expert, int64_t c, int64_t k, int64_t part,
                            int64_t parts, int64_t steps) {
    const View<3>& w = p.call.w;
    constexpr int64_t steps_between = 4;  // two calls of Beside
    if (k >= p.columns() || (w.stride[2] != 1 && w.stride[1] != 1)) return {};
    const int64_t size = static_cast<int64_t>(sizeof(T)), count = smaller(panel, w.size[1] - c),
                  left = smaller(depth * elements_of<Word>, p.columns() - k);
    const bool in_rows = w.stride[2] == 1;
    const int64_t rows = in_rows ? count : left, bytes = (in_rows ? left : count) * size;
    const int64_t begin = rows * part / parts, n = rows * (part + 1) / parts - begin;
    const T* const first = in_rows ? p.weight(expert, c + begin, k) : p.weight(expert, c, k + begin);
    return {reinterpret_cast<const char*>(first), w.stride[in_rows ? 1 : 2] * size, bytes, n,
            ceil_div(n * ceil_div(bytes, 64), larger(steps / steps_between, 1))};
}

template <class T, class Word>
void compute_many(const Problem<T, Word>& p, const Span& span, int64_t n, const Workspace<Word>& at) {
    constexpr int64_t chain = depth * elements_of<Word>;
    const int64_t N = p.call.out.size[1], last = smaller(n + piece_columns, N),
                  row_tiles = ceil_div(span.rows, tile_rows);
    for (int64_t i = 0; i < row_tiles * tile_rows * piece_columns; i += width) store(at.totals + i, splat(0.0f));
    for (int64_t k = 0; k < p.columns(); k += chain) {
        const int64_t left = smaller(chain, p.columns() - k), steps = steps_of<Word>(left);
        for (int64_t c = n; c < last; c += panel) {
            const int64_t count = smaller(panel, last - c);
            pack_panel(p, span.expert, c, count, k, left, at.w);
            for (int64_t i = 0; i < row_tiles; ++i) {
                const int64_t row = i * tile_rows;
                const Fetch next = c + panel < last ? fetch_panel(p, span.expert, c + panel, k, i, row_tiles, steps)
                                                    : fetch_panel(p, span.expert, n, k + chain, i, row_tiles, steps);
                multiply<Left::rows, Into::add>(
                    static_cast<int>(smaller(tile_rows, span.rows - row)), count,
                    Product<Word>{p.x + (span.first + row) * p.pitch + k / elements_of<Word>, p.pitch, at.w, steps,
                                  at.totals + row * piece_columns + c - n, piece_columns, nullptr},
                    next);
            }
        }
    }
    for (int64_t c = n; c < last; c += width) {
        const vf bias = bias_at<T>(p.call, span.expert, c, last - c);
        for (int64_t r = 0; r < span.rows; ++r)
            write<T>(p.call, span.first + r, c, load(at.totals + r * piece_columns + c - n) + bias, last - c);
    }
}

template <class T, class Word>
void run(const GroupedLinear& call, const Runtime& runtime) {
    clear_outside(call.out, call.offsets);
    const int64_t spans = spans_of(call.offsets, rows_at_once, nullptr), N = call.out.size[1];
    if (spans == 0 || N == 0) return;
    Problem<T, Word> p(call);
    Span* list = nullptr;
    const int64_t all_rows = p.rows.count(), row_bytes = larger(p.columns() * static_cast<int64_t>(sizeof(T)), 1);
    const int64_t few_columns = round_up(clamp(few_bytes / row_bytes, width, N), width);
    const Runtime workers = worth(runtime, N * p.columns());
    const auto own = lay_out(
        workers, spans * ceil_div(N, width),
        [&](Arena& arena) {
            list = arena.take<Span>(spans);
            p.pieces = arena.take<int64_t>(spans + 1);
            p.x = arena.take<Word>((all_rows + tile_rows) * p.pitch);  // tiles run on behind the last row
        },
        workspace<Word>);
    spans_of(call.offsets, rows_at_once, list);
    const bool in_rows = call.w.stride[2] == 1, in_columns = call.w.stride[1] == 1;
    const auto takes_squares = [&](const Span& span) { return in_rows && span.rows <= few; };
    const auto takes_strips = [&](const Span& span) { return !in_rows && in_columns && span.rows <= strip_rows; };
    const auto columns_of = [&](const Span& span) {
        return takes_squares(span) ? few_columns : takes_strips(span) ? strips_columns : piece_columns;
    };
    p.pieces[0] = 0;
    for (int64_t i = 0; i < spans; ++i) p.pieces[i + 1] = p.pieces[i] + ceil_div(N, columns_of(list[i]));
    for_pieces(worth(runtime, all_rows * p.columns()), ceil_div(all_rows, few), [&](int, int64_t piece) {
        for (int64_t r = piece * few; r < smaller(all_rows, (piece + 1) * few); ++r) copy_row(p, r);
    });
    for_pieces(workers, p.pieces[spans], [&](int worker, int64_t piece) {
        const int64_t at = run_of(p.pieces, spans, piece);
        const Span& span = list[at];
        const int64_t n = (piece - p.pieces[at]) * columns_of(span);
        if (takes_squares(span))
            compute_few<few>(p, span, n, smaller(N, n + few_columns));
        else if (takes_strips(span))
            compute_strips<strip_rows>(p, span, n);
        else
            compute_many(p, span, n, own(worker));
    });
}

}  // namespace

void grouped_linear(const GroupedLinear& call, const Runtime& runtime) {
    with_words(call.x.dtype, [&]<class T, class Word>() { run<T, Word>(call, runtime); });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH_BF16(grouped_linear, GroupedLinear, p.x.dtype)
