// The rows of each expert times its weight.
//
// Every result is the sum of chains of products of `depth` words (gemm.h), of fewer where there are few columns, in
// ascending order, added one after another.
// Few rows take the weight as it lies, transposed in registers unless it lies transposed: memory bounds them. Many rows
// are transposed themselves, once, and the weight is what a product spreads; a transposed weight is packed for them.
#include "../attention/gemm.h"
#include "rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t depth = long_chain;  // words of a packed panel, which stays in the first-level cache
constexpr int64_t few_words = 256;  // of a row: so few that each rounding counts, and what short chains cost does not
constexpr int64_t rows_at_once = 3 * panel;
static_assert(rows_at_once % tile_rows == 0);
constexpr int few = width == 16 ? 12 : 4;  // rows whose sums fit the registers beside a square of the weight
constexpr int strip_rows = 4;              // and beside strips of a transposed one
constexpr int64_t ahead = 1024;  // bytes of each row of the weight on their way to the second cache, for few rows
constexpr int64_t few_bytes = 1 << 19;  // of the weight in a piece of few rows

// A run of rows of one expert.
struct Span {
    int64_t expert, first, rows;
    int64_t place;  // among the rows of x as words
};

template <class T, class Word>
struct Problem {
    const GroupedLinear& call;
    Rows rows;
    Word* x;          // of all spans, `pitch` words a row
    int64_t* pieces;  // before each span
    int64_t pitch;

    explicit Problem(const GroupedLinear& c)
        : call(c),
          rows{c.x, c.order, c.k},
          x(nullptr),
          pieces(nullptr),
          pitch(round_up(words(), width) + width) {}  // not a power of two: rows would share lines of the cache
    int64_t columns() const { return call.x.size[1]; }
    Word* words_of(const Span& span) const { return x + span.place * pitch; }
    bool lies_in_rows() const { return call.w.stride[2] == 1; }
    bool takes_squares(const Span& span) const { return lies_in_rows() && span.rows <= few; }
    bool takes_tiles(const Span& span) const { return lies_in_rows() && span.rows > few; }
    // The first row of a panel of many. A panel of half a vector's rows would wait for its loads: the one before it
    // leaves it some of its own.
    int64_t first_of(const Span& span, int64_t number) const {
        const bool is_last = number > 0 && number == (span.rows - 1) / panel;
        const bool is_small = is_last && takes_tiles(span) && (span.rows - 1) % panel < half;
        return smaller(number * panel, span.rows) - (is_small ? half : 0);
    }
    bool takes_strips(const Span& span) const {
        return !lies_in_rows() && call.w.stride[1] == 1 && span.rows <= strip_rows;
    }
    int64_t words() const { return steps_of<Word>(columns()); }
    int64_t chain() const { return (words() <= few_words ? short_chain : depth) * elements_of<Word>; }  // columns
    const T* weight(int64_t expert, int64_t n, int64_t k) const {
        const View<3>& w = call.w;
        return static_cast<const T*>(w.data) + expert * w.stride[0] + n * w.stride[1] + k * w.stride[2];
    }
};

// visit(span) for the rows of every expert that has any.
template <class T, class Word, class Visit>
void for_spans(const Problem<T, Word>& p, const Visit& visit) {
    Span span{0, 0, 0, 0};
    for (; span.expert + 1 < p.call.offsets.size[0]; ++span.expert) {
        const int64_t end = index_at(p.call.offsets, span.expert + 1);
        for (span.first = index_at(p.call.offsets, span.expert); span.first < end; span.first += rows_at_once) {
            span.rows = smaller(rows_at_once, end - span.first);
            visit(span);
            span.place += p.takes_tiles(span) ? round_up(span.rows, panel) : span.rows;
        }
    }
}

template <class T, class Word>
void copy_row(const Problem<T, Word>& p, int64_t row, Word* to) {
    const T* const from = p.rows.template at<T>(row);
    const int64_t stride = p.call.x.stride[1];
    constexpr int64_t at_once = max_head_dim / elements_of<Word>;
    for (int64_t at = 0; at < p.pitch; at += at_once) {
        const int64_t k = at * elements_of<Word>, n = from ? clamp(p.columns() - k, 0, max_head_dim) : 0;
        pack_row(to + at, smaller(at_once, p.pitch - at), n > 0 ? from + k * stride : nullptr, stride, n);
    }
}

// `n` rows side by side as half a panel: word (k, row) at k · panel + row; zeros stand for rows that there are not.
template <class T, class Word>
void copy_columns(const Problem<T, Word>& p, int64_t row, int64_t n, Word* to) {
    constexpr int64_t unit = width * elements_of<Word>;
    const int64_t stride = p.call.x.stride[1];
    const T* from[width];
    for (int i = 0; i < width; ++i) from[i] = i < n ? p.rows.template at<T>(row + i) : nullptr;
    for (int64_t k = 0; k < p.columns(); k += unit, to += width * panel) {
        const int64_t left = smaller(unit, p.columns() - k);
        vf square[width];
        for (int i = 0; i < width; ++i) {
            T line[unit];
            square[i] =
                from[i] ? load_words(contiguous(from[i] + k * stride, stride, left, line), left, to) : splat(0.0f);
        }
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) store_words(to + i * panel, square[i]);
    }
}

// Panel number `number` of the rows of a span, or as many of its rows.
template <class T, class Word>
void copy_rows(const Problem<T, Word>& p, const Span& span, int64_t number) {
    const int64_t first = p.first_of(span, number), end = p.first_of(span, number + 1);
    Word* const to = p.words_of(span) + number * panel * p.pitch;
    if (p.takes_tiles(span)) {
        for (int64_t c = 0; c < end - first; c += width)
            copy_columns(p, span.first + first + c, end - first - c, to + c);
        return;
    }
    for (int64_t r = first; r < end; ++r) copy_row(p, span.first + r, p.words_of(span) + r * p.pitch);
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
    static_assert(short_chain * elements_of<Word> % step == 0);
    const int64_t stride = p.call.w.stride[1], columns = p.columns(), chain = p.chain();
    vf sum[rows];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) total[r] = sum[r] = splat(0.0f);
    for (int64_t k = 0; k < columns; k += step, x += square_words<T, Word>) {
        const T* const soon = k + far < columns ? w + k + far : next ? next + (k + far - columns) : nullptr;
        for (int64_t i = 0; soon && k % line == 0 && i < n; ++i) __builtin_prefetch(soon + i * stride, 0, 2);
        vf square[width];
        load_square(square, w + k, stride, n, columns - k);
        add_square<T>(sum, square, x, p.pitch);
        if (((k + step) & (chain - 1)) > 0 && k + step < columns) continue;  // a power of two
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
            total[r] = total[r] + sum[r];
            sum[r] = splat(0.0f);
        }
    }
}

// Rows behind those of the span are readable, and not written.
template <int rows, class T, class Word>
void compute_few(const Problem<T, Word>& p, const Span& span, int64_t n, int64_t end, const T* after) {
    if constexpr (rows > 1) {
        constexpr int fewer = rows > 4 ? rows - 2 : rows - 1;
        if (span.rows <= fewer) return compute_few<fewer>(p, span, n, end, after);
    }
    for (; n < end; n += width) {
        const int64_t count = smaller(width, end - n);
        const T* const next = n + width >= end     ? after
                            : n + 2 * width <= end ? p.weight(span.expert, n + width, 0)
                                                   : nullptr;
        vf total[rows];
        multiply_few<rows>(p, p.words_of(span), p.weight(span.expert, n, 0), count, next, total);
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
    const int64_t stride = p.call.w.stride[2], columns = p.columns(), chain = p.chain();
    const int64_t count = smaller(strips_columns, p.call.out.size[1] - n);
    const Word* x = p.words_of(span);
    constexpr int64_t at_once = strip_of(rows) * width;
    float totals[rows * strips_columns] = {};
    for (int64_t k = 0; k < columns; k += chain, x += chain / elements_of<Word>) {
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

constexpr int64_t piece_rows = 8 * tile_rows;  // of the weight
constexpr int64_t piece_columns = 4 * panel;   // of the result, where the weight is packed
constexpr int64_t tile_pitch = depth + width;  // of a tile's rows, which would share lines of the cache otherwise

template <class Word>
struct Workspace {
    Word* tiles[2];
    Word* panel;
    float* totals;  // (row of the weight, row of x), or the other way round
};

template <class Word>
Workspace<Word> workspace(Arena& arena) {
    return {{arena.take<Word>(tile_rows * tile_pitch), arena.take<Word>(tile_rows * tile_pitch)},
            arena.take<Word>(panel * depth),
            arena.take<float>(rows_at_once * larger(piece_rows, piece_columns))};
}

// Rows of the weight as words, copied beside the products of those before them, while the same of `later` rows on are
// fetched.
template <class T, class Word>
struct Tile {
    const T *from, *later;
    int64_t stride, columns, rows;
    Word* to;
    int64_t at_once, at = 0;

    // Each row may be on a page whose address is unknown as yet: all are looked up side by side.
    METATE_FN void look_up() const {
        for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(later + r * stride, 0, 2);
    }
    METATE_FN void copy() {
        constexpr int64_t unit = width * elements_of<Word>;
        __builtin_prefetch(later + at, 0, 2);
        store_words(to + at / elements_of<Word>, load_words(from + at, smaller(unit, columns - at), to));
        at += unit;
        if (at < columns) return;
        at = 0;
        from += stride;
        later += stride;
        to += tile_pitch;
        --rows;
    }
};

template <class T, class Word>
struct CopyBeside {
    Tile<T, Word>& tile;
    METATE_FN void operator()() const {
        for (int64_t i = 0; i < tile.at_once && tile.rows > 0; ++i) tile.copy();
    }
};

// The tiles of a piece, chain after chain.
template <class T, class Word>
struct Tiles {
    const Problem<T, Word>& p;
    int64_t expert, n, chain;
    const T* after;  // the weight of what comes behind the last tile, or null
    int64_t in_chain, count;

    Tiles(const Problem<T, Word>& problem, int64_t of, int64_t first, const T* next)
        : p(problem),
          expert(of),
          n(first),
          chain(p.chain()),
          after(next),
          in_chain(ceil_div(smaller(piece_rows, p.call.out.size[1] - n), tile_rows)),
          count(in_chain * ceil_div(p.columns(), chain)) {}
    int64_t row(int64_t i) const { return i % in_chain * tile_rows; }
    int64_t column(int64_t i) const { return i / in_chain * chain; }
    int64_t rows(int64_t i) const {
        return smaller(smaller(tile_rows, piece_rows - row(i)), p.call.out.size[1] - n - row(i));
    }
    int64_t columns(int64_t i) const { return smaller(chain, p.columns() - column(i)); }
    const T* first(int64_t i) const { return p.weight(expert, n + row(i), column(i)); }

    Tile<T, Word> tile(int64_t i, Word* to, int64_t panels) const {
        if (i >= count) return {};
        constexpr int64_t steps_between = 4;  // two calls of Beside
        const int64_t vectors = rows(i) * ceil_div(columns(i), width * elements_of<Word>);
        const int64_t calls = larger(panels * (steps_of<Word>(columns(i - 1)) / steps_between), 1);
        return {first(i),
                i + 1 < count ? first(i + 1)
                : after       ? after
                              : first(i),
                p.call.w.stride[1],
                columns(i),
                rows(i),
                to,
                ceil_div(vectors, calls)};
    }
};

// Rows … end - 1 of a span, `width` at most.
template <class T>
void write_square(const GroupedLinear& call, const Span& span, const float* totals, int64_t pitch, int64_t row,
                  int64_t end, int64_t n) {
    vf square[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) square[i] = load(totals + i * pitch);
    transpose(square);
    const int64_t left = call.out.size[1] - n;
    const vf bias = bias_at<T>(call, span.expert, n, left);
    for (int i = 0; i < width && row + i < end; ++i) write<T>(call, span.first + row + i, n, square[i] + bias, left);
}

// A tile of the weight times a panel of `count` rows of x.
template <class T, class Word>
METATE_FN void multiply_panel(int64_t rows, int64_t count, const Product<Word>& product, Tile<T, Word>& next) {
    const CopyBeside<T, Word> beside{next};
    if constexpr (half > 0) {
        if (rows == tile_rows && count > width && count <= width + half)
            return multiply_tile<Left::rows, Into::add, tile_rows, 1, true>(product, beside);
    }
    multiply<Left::rows, Into::add>(static_cast<int>(rows), count, product, beside);
}

template <class T, class Word>
void compute_tiles(const Problem<T, Word>& p, const Span& span, int64_t n, const T* after, const Workspace<Word>& at) {
    const Tiles<T, Word> tiles(p, span.expert, n, after);
    const int64_t panels = ceil_div(span.rows, panel), pitch = panels * panel;
    for (int64_t i = 0; i < piece_rows * pitch; i += width) store(at.totals + i, splat(0.0f));
    Tile<T, Word> next = tiles.tile(0, at.tiles[0], panels);
    next.look_up();
    while (next.rows > 0) next.copy();
    for (int64_t i = 0; i < tiles.count; ++i) {
        next = tiles.tile(i + 1, at.tiles[(i + 1) % 2], panels);
        next.look_up();
        const int64_t words = tiles.column(i) / elements_of<Word>;
        for (int64_t j = 0; j < panels; ++j)
            multiply_panel(
                tiles.rows(i), p.first_of(span, j + 1) - p.first_of(span, j),
                Product<Word>{at.tiles[i % 2], tile_pitch, p.words_of(span) + j * panel * p.pitch + words * panel,
                              steps_of<Word>(tiles.columns(i)), at.totals + tiles.row(i) * pitch + j * panel, pitch,
                              nullptr},
                next);
        while (next.rows > 0) next.copy();
    }
    for (int64_t c = 0; c < smaller(piece_rows, p.call.out.size[1] - n); c += width)
        for (int64_t j = 0; j < panels; ++j) {
            const int64_t first = p.first_of(span, j), end = p.first_of(span, j + 1);
            for (int64_t r = 0; r < end - first; r += width)
                write_square<T>(p.call, span, at.totals + c * pitch + j * panel + r, pitch, first + r, end, n + c);
        }
}

// Many rows with a weight that lies transposed, or anyhow.

// A panel of the weight: columns n … n + count, `left` columns of the product from k on.
template <class T, class Word>
void pack_panel(const Problem<T, Word>& p, int64_t expert, int64_t n, int64_t count, int64_t k, int64_t left,
                Word* to) {
    const int64_t stride = p.call.w.stride[1], step = p.call.w.stride[2];
    const T* const from = p.weight(expert, n, k);
    if (stride == 1)
        pack_rows(to, from, step, 1, left, count, steps_of<Word>(left), 0);
    else
        pack_transposed(to, from, stride, step, count, left);
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
    if (k >= p.columns() || w.stride[1] != 1) return {};
    const int64_t size = static_cast<int64_t>(sizeof(T)), bytes = smaller(panel, w.size[1] - c) * size,
                  left = smaller(p.chain(), p.columns() - k);
    const int64_t begin = left * part / parts, n = left * (part + 1) / parts - begin;
    return {reinterpret_cast<const char*>(p.weight(expert, c, k + begin)), w.stride[2] * size, bytes, n,
            ceil_div(n * ceil_div(bytes, 64), larger(steps / steps_between, 1))};
}

template <class T, class Word>
void compute_panels(const Problem<T, Word>& p, const Span& span, int64_t n, const Workspace<Word>& at) {
    const int64_t chain = p.chain(), N = p.call.out.size[1], last = smaller(n + piece_columns, N),
                  row_tiles = ceil_div(span.rows, tile_rows);
    for (int64_t i = 0; i < row_tiles * tile_rows * piece_columns; i += width) store(at.totals + i, splat(0.0f));
    for (int64_t k = 0; k < p.columns(); k += chain) {
        const int64_t left = smaller(chain, p.columns() - k), steps = steps_of<Word>(left);
        for (int64_t c = n; c < last; c += panel) {
            const int64_t count = smaller(panel, last - c);
            pack_panel(p, span.expert, c, count, k, left, at.panel);
            for (int64_t i = 0; i < row_tiles; ++i) {
                const int64_t row = i * tile_rows;
                const Fetch next = c + panel < last ? fetch_panel(p, span.expert, c + panel, k, i, row_tiles, steps)
                                                    : fetch_panel(p, span.expert, n, k + chain, i, row_tiles, steps);
                multiply<Left::rows, Into::add>(
                    static_cast<int>(smaller(tile_rows, span.rows - row)), count,
                    Product<Word>{p.words_of(span) + row * p.pitch + k / elements_of<Word>, p.pitch, at.panel, steps,
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
    Problem<T, Word> p(call);
    int64_t spans = 0, rows = 0;
    for_spans(p, [&](const Span& span) {
        ++spans;
        rows = span.place + round_up(span.rows, panel);
    });
    const int64_t N = call.out.size[1];
    if (spans == 0 || N == 0) return;
    Span* list = nullptr;
    const int64_t row_bytes = larger(p.columns() * static_cast<int64_t>(sizeof(T)), 1);
    const int64_t few_columns = round_up(clamp(few_bytes / row_bytes, width, N), width);
    const Runtime workers = worth(runtime, N * p.columns());
    const auto own = lay_out(
        workers, spans * ceil_div(N, width),
        [&](Arena& arena) {
            list = arena.take<Span>(spans);
            p.pieces = arena.take<int64_t>(spans + 1);
            p.x = arena.take<Word>((rows + tile_rows) * p.pitch);  // tiles run on behind the last row
        },
        workspace<Word>);
    const auto columns_of = [&](const Span& span) {
        if (p.takes_squares(span)) return few_columns;
        return p.takes_tiles(span) ? piece_rows : p.takes_strips(span) ? strips_columns : piece_columns;
    };
    p.pieces[0] = 0;
    int64_t n = 0;
    for_spans(p, [&](const Span& span) {
        list[n++] = span;
        p.pieces[n] = p.pieces[n - 1] + ceil_div(N, columns_of(span));
    });
    // The weight of a piece that takes it as it lies, or null. As many pieces on as there are workers is what a worker
    // gets next, most likely.
    const auto weight_of = [&](int64_t piece) -> const T* {
        if (piece >= p.pieces[spans]) return nullptr;
        const int64_t at = run_of(p.pieces, spans, piece), n = (piece - p.pieces[at]) * columns_of(list[at]);
        return p.lies_in_rows() && n + width <= N ? p.weight(list[at].expert, n, 0) : nullptr;
    };
    constexpr int64_t parts = rows_at_once / panel;
    for_pieces(worth(runtime, rows * p.columns()), spans * parts,
               [&](int, int64_t piece) { copy_rows(p, list[piece / parts], piece % parts); });
    for_pieces(workers, p.pieces[spans], [&](int worker, int64_t piece) {
        const int64_t at = run_of(p.pieces, spans, piece);
        const Span& span = list[at];
        const int64_t n = (piece - p.pieces[at]) * columns_of(span);
        if (p.takes_squares(span))
            compute_few<few>(p, span, n, smaller(N, n + few_columns), weight_of(piece + workers.threads));
        else if (p.takes_tiles(span))
            compute_tiles(p, span, n, weight_of(piece + workers.threads), own(worker));
        else if (p.takes_strips(span))
            compute_strips<strip_rows>(p, span, n);
        else
            compute_panels(p, span, n, own(worker));
    });
}

}  // namespace

void grouped_linear(const GroupedLinear& call, const Runtime& runtime) {
    with_words(call.x.dtype, [&]<class T, class Word>() { run<T, Word>(call, runtime); });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH_BF16(grouped_linear, GroupedLinear, p.x.dtype)
