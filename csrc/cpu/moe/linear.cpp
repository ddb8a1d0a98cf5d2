// The rows of each expert times its weight.
//
// Every result is one dot product in the same order: lane i of a vector adds the products of the columns i, i + width,
// … in ascending order, then the lanes are added as a tree. Tiles of rows and columns only share what they load.
// Few rows read the weight as it lies, once, which memory bounds; many rows use packed blocks of it again and again.
#include "rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int tile_rows = width == 16 ? 4 : 3, tile_columns = width == 16 ? 6 : 4;  // they fill the registers
constexpr int64_t depth = 512;  // columns of a packed block: two tiles of it fit the first-level cache
constexpr int64_t piece_columns = 8 * tile_columns;
constexpr int64_t rows_at_once = 16 * tile_rows;  // whose sums stay in the second-level cache
constexpr int64_t few = tile_rows;
constexpr int64_t few_bytes = 1 << 19;  // of the weight in a piece of few rows

// A tile of sums: `sums` goes on from earlier blocks if `goes_on`.
struct Tile {
    const float* x;               // (step, row of tile_rows, lane)
    const char* w[tile_columns];  // where each column begins, steps `step` bytes apart
    int64_t step, columns;        // columns of the product: the last step may be short
    float* sums;                  // (row, column, lane)
    bool goes_on;
    int64_t ahead;  // bytes behind each step that are fetched too; 0: none
};

template <int rows, class T>
METATE_FN void add_step(vf (&sum)[rows][tile_columns], const Tile& t, int64_t step, int64_t left) {
    vf x[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) x[r] = load(t.x + (step * tile_rows + r) * width);
#pragma GCC unroll 6
    for (int c = 0; c < tile_columns; ++c) {
        const T* const at = reinterpret_cast<const T*>(t.w[c] + step * t.step);
        const vf w = left >= width ? load(at) : load(at, left);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) sum[r][c] = fma(x[r], w, sum[r][c]);
    }
}

template <int rows, class T, bool fetches>
__attribute__((noinline)) void multiply(const Tile& t) {
    vf sum[rows][tile_columns];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 6
        for (int c = 0; c < tile_columns; ++c)
            sum[r][c] = t.goes_on ? load(t.sums + (r * tile_columns + c) * width) : splat(0.0f);
    }
    const int64_t whole = t.columns / width;
    for (int64_t step = 0; step < whole; ++step) {
        if (fetches && step * t.step % 64 == 0) {
#pragma GCC unroll 6
            for (int c = 0; c < tile_columns; ++c) __builtin_prefetch(t.w[c] + step * t.step + t.ahead, 0, 2);
        }
        add_step<rows, T>(sum, t, step, width);
    }
    if (t.columns % width) add_step<rows, T>(sum, t, whole, t.columns % width);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 6
        for (int c = 0; c < tile_columns; ++c) store(t.sums + (r * tile_columns + c) * width, sum[r][c]);
    }
}

template <class T, bool fetches, int rows = tile_rows>
METATE_FN void multiply_rows(int64_t n, const Tile& tile) {
    if constexpr (rows > 1) {
        if (n < rows) return multiply_rows<T, fetches, rows - 1>(n, tile);
    }
    multiply<rows, T, fetches>(tile);
}

struct Problem {
    const GroupedLinear& call;
    Rows rows;
    int64_t depth_steps, steps;  // vectors of a whole block and of a row
    float* x;                    // packed rows of all spans, (tile of rows, step, row, lane)
    int64_t* starts;             // of each span, in tiles

    explicit Problem(const GroupedLinear& c)
        : call(c),
          rows{c.x, c.order, c.k},
          depth_steps(depth / width),
          steps(ceil_div(c.x.size[1], width)),
          x(nullptr),
          starts(nullptr) {}
    int64_t columns() const { return call.x.size[1]; }
    float* tile_of_x(int64_t tile) const { return x + tile * steps * tile_rows * width; }
};

// The rows of a tile side by side, step by step.
template <class T>
void pack_rows(const Problem& p, int64_t first, int64_t n, float* to) {
    const int64_t columns = p.columns(), stride = p.call.x.stride[1];
    for (int64_t r = 0; r < n; ++r) {
        const T* const from = p.rows.at<T>(first + r);
        for (int64_t step = 0, left = columns; step < p.steps; ++step, left -= width)
            store(to + (step * tile_rows + r) * width,
                  from ? load_any(from + step * width * stride, stride, left) : splat(0.0f));
    }
}

// Columns n … n + count of expert e from column `first` of the product on, as tiles of (step, column, lane).
template <class T>
void pack_weight(const Problem& p, int64_t expert, int64_t n, int64_t first, int64_t count, float* to) {
    const View<3>& w = p.call.w;
    const T* const base = static_cast<const T*>(w.data) + expert * w.stride[0] + first * w.stride[2];
    const int64_t columns = smaller(depth, p.columns() - first), stride = w.stride[2];
    for (int64_t c = 0; c < count; ++c) {
        const T* const from = base + smaller(n + c, w.size[1] - 1) * w.stride[1];
        float* out = to + c * width;
        int64_t k = 0;
        for (; stride == 1 && k + width <= columns; k += width, out += tile_columns * width) store(out, load(from + k));
        for (; k < columns; k += width, out += tile_columns * width)
            store(out, load_any(from + k * stride, stride, columns - k));
    }
}

// The same where the columns of the product lie far apart and its rows close together, `width` columns at a time.
template <class T>
void pack_across(const Problem& p, int64_t expert, int64_t n, int64_t first, int64_t count, float* to) {
    const View<3>& w = p.call.w;
    const T* const base = static_cast<const T*>(w.data) + expert * w.stride[0] + first * w.stride[2];
    const int64_t columns = smaller(depth, p.columns() - first), last = smaller(n + count, w.size[1]);
    for (int64_t k = 0; k < columns; k += width) {
        for (int64_t c = 0; c < count; c += width) {
            vf square[width];
#pragma GCC unroll 16
            for (int i = 0; i < width; ++i) {
                const T* const from = base + (k + i) * w.stride[2] + n + c;
                __builtin_prefetch(from + 2 * width * w.stride[2], 0, 2);
                square[i] = k + i < columns && n + c < last ? load_any(from, 1, last - n - c) : splat(0.0f);
            }
            transpose(square);
            for (int i = 0; i < width && c + i < count; ++i) {
                const int64_t column = c + i;
                store(to + column / tile_columns * depth * tile_columns + k * tile_columns +
                          column % tile_columns * width,
                      square[i]);
            }
        }
    }
}

// Adds the lanes of the sums of a tile, and the bias.
template <class T>
void write_tile(const GroupedLinear& call, const float* sums, int64_t expert, int64_t row, int64_t rows, int64_t n) {
    const int64_t count = smaller(tile_columns, call.out.size[1] - n);
    float bias[tile_columns + width] = {};
    for (int64_t c = 0; c < count && call.bias; ++c) {
        const int64_t at = expert * call.bias.stride[0] + (n + c) * call.bias.stride[1];
        bias[c] = call.bias.dtype == DType::f32 ? static_cast<const float*>(call.bias.data)[at]
                                                : to_float(static_cast<const T*>(call.bias.data)[at]);
    }
    constexpr int all = tile_rows * tile_columns, most = (all + width - 1) / width * width;
    float totals[most + width];
#pragma GCC unroll 4
    for (int i = 0; i < most; i += width) {
        vf lines[width];
#pragma GCC unroll 16
        for (int j = 0; j < width; ++j) lines[j] = i + j < all ? load(sums + (i + j) * width) : splat(0.0f);
        store(totals + i, sum_rows(lines));
    }
    for (int64_t r = 0; r < rows; ++r) {
        T* const out = static_cast<T*>(call.out.data) + (row + r) * call.out.stride[0] + n * call.out.stride[1];
        for (int64_t c = 0; c < count; c += width)
            store_any(out + c * call.out.stride[1], call.out.stride[1],
                      load(totals + r * tile_columns + c) + load(bias + c), count - c);
    }
}

// `count` columns from n on of at most `few` rows, the weight read as it lies.
template <class T>
void compute_few(const Problem& p, const Span& span, const float* x, int64_t n, int64_t count) {
    const View<3>& w = p.call.w;
    const char* const base = static_cast<const char*>(w.data) + span.expert * w.stride[0] * bytes_of(w.dtype);
    const int64_t row_bytes = w.stride[1] * bytes_of(w.dtype);
    float sums[tile_rows * tile_columns * width];
    for (int64_t c = 0; c < count; c += tile_columns) {
        const bool more = c + 2 * tile_columns <= count;
        Tile tile{x, {}, width * bytes_of(w.dtype), p.columns(), sums, false, more ? tile_columns * row_bytes : 0};
        for (int i = 0; i < tile_columns; ++i) tile.w[i] = base + smaller(n + c + i, w.size[1] - 1) * row_bytes;
        more ? multiply_rows<T, true>(span.rows, tile) : multiply_rows<T, false>(span.rows, tile);
        write_tile<T>(p.call, sums, span.expert, span.first, span.rows, n + c);
    }
}

struct Workspace {
    float *w, *sums;
};

Workspace workspace(Arena& arena) {
    return {arena.take<float>(piece_columns * depth), arena.take<float>(rows_at_once * piece_columns * width)};
}

// Fetches part `part` of `parts` of what the next tile will pack of the weight.
template <class T>
METATE_FN void fetch_weight(const Problem& p, int64_t expert, int64_t n, int64_t first, int64_t part, int64_t parts) {
    const View<3>& w = p.call.w;
    if (w.stride[2] != 1 || n >= w.size[1]) return;
    const int64_t columns = smaller(depth, p.columns() - first), line = 64 / static_cast<int64_t>(sizeof(T));
    const int64_t lines = ceil_div(columns, line), begin = lines * part / parts, end = lines * (part + 1) / parts;
    const T* row = static_cast<const T*>(w.data) + expert * w.stride[0] + n * w.stride[1] + first;
    for (int64_t c = 0; c < smaller(tile_columns, w.size[1] - n); ++c, row += w.stride[1])
        for (int64_t i = begin; i < end; ++i) __builtin_prefetch(row + i * line, 0, 2);
}

// piece_columns columns from n on of many rows, block by block of the columns of the product.
template <class T>
void compute_many(const Problem& p, const Span& span, const float* x, int64_t n, const Workspace& at) {
    const View<3>& w = p.call.w;
    const int64_t count = smaller(piece_columns, w.size[1] - n), tiles = ceil_div(count, tile_columns);
    const int64_t row_tiles = ceil_div(span.rows, tile_rows);
    constexpr int64_t tile_sums = tile_rows * tile_columns * width;
    for (int64_t first = 0; first < p.columns() || first == 0; first += depth) {
        const int64_t columns = smaller(depth, p.columns() - first);
        const bool across = w.stride[2] != 1 && w.stride[1] == 1;
        if (across) pack_across<T>(p, span.expert, n, first, round_up(count, tile_columns), at.w);
        for (int64_t c = 0; c < tiles; ++c) {
            float* const packed = at.w + c * depth * tile_columns;
            if (!across) pack_weight<T>(p, span.expert, n + c * tile_columns, first, tile_columns, packed);
            for (int64_t r = 0; r < row_tiles; ++r) {
                const bool last = c + 1 == tiles;
                fetch_weight<T>(p, span.expert, last ? n : n + (c + 1) * tile_columns, last ? first + depth : first, r,
                                row_tiles);
                Tile tile{x + (r * p.steps + first / width) * tile_rows * width,
                          {},
                          tile_columns * width * static_cast<int64_t>(sizeof(float)),
                          columns,
                          at.sums + (r * tiles + c) * tile_sums,
                          first > 0,
                          0};
                for (int i = 0; i < tile_columns; ++i) tile.w[i] = reinterpret_cast<const char*>(packed + i * width);
                multiply_rows<float, false>(smaller(tile_rows, span.rows - r * tile_rows), tile);
            }
        }
    }
    for (int64_t r = 0; r < row_tiles; ++r) {
        for (int64_t c = 0; c < tiles; ++c)
            write_tile<T>(p.call, at.sums + (r * tiles + c) * tile_sums, span.expert, span.first + r * tile_rows,
                          smaller(tile_rows, span.rows - r * tile_rows), n + c * tile_columns);
    }
}

template <class T>
void run(const GroupedLinear& call, const Runtime& runtime) {
    clear_outside(call.out, call.offsets);
    const int64_t spans = spans_of(call.offsets, rows_at_once, nullptr), N = call.out.size[1];
    if (spans == 0 || N == 0) return;
    Problem p(call);
    Span* list = nullptr;
    const int64_t row_bytes = larger(p.columns() * static_cast<int64_t>(sizeof(T)), 1);
    const int64_t few_columns = round_up(clamp(few_bytes / row_bytes, tile_columns, N), tile_columns);
    const int64_t all_rows = p.rows.count();
    const Runtime workers = worth(runtime, N * p.columns());
    const bool direct = call.w.stride[2] == 1;
    const auto own = lay_out(
        workers, spans * ceil_div(N, tile_columns),
        [&](Arena& arena) {
            list = arena.take<Span>(spans);
            p.starts = arena.take<int64_t>(2 * (spans + 1));
            p.x = arena.take<float>((all_rows / tile_rows + spans) * p.steps * tile_rows * width);
        },
        workspace);
    spans_of(call.offsets, rows_at_once, list);
    // Row tiles and pieces before each span.
    int64_t *const tiles = p.starts, *const pieces = p.starts + spans + 1;
    tiles[0] = pieces[0] = 0;
    for (int64_t i = 0; i < spans; ++i) {
        const bool is_few = list[i].rows <= few && direct;
        tiles[i + 1] = tiles[i] + ceil_div(list[i].rows, tile_rows);
        pieces[i + 1] = pieces[i] + ceil_div(N, is_few ? few_columns : piece_columns);
    }
    const auto span_of = [&](const int64_t* starts, int64_t i) {
        int64_t low = 0, high = spans;
        while (high - low > 1) (starts[(low + high) / 2] <= i ? low : high) = (low + high) / 2;
        return low;
    };
    for_pieces(worth(runtime, all_rows * p.columns()), tiles[spans], [&](int, int64_t tile) {
        const int64_t i = span_of(tiles, tile), first = (tile - tiles[i]) * tile_rows;
        pack_rows<T>(p, list[i].first + first, smaller(tile_rows, list[i].rows - first), p.tile_of_x(tile));
    });
    for_pieces(workers, pieces[spans], [&](int worker, int64_t piece) {
        const int64_t i = span_of(pieces, piece), number = piece - pieces[i];
        const float* const x = p.tile_of_x(tiles[i]);
        if (list[i].rows <= few && direct) {
            const int64_t n = number * few_columns;
            compute_few<T>(p, list[i], x, n, smaller(few_columns, N - n));
        } else {
            compute_many<T>(p, list[i], x, number * piece_columns, own(worker));
        }
    });
}

}  // namespace

void grouped_linear(const GroupedLinear& call, const Runtime& runtime) {
    with_floats(call.x.dtype, [&]<class T>() { run<T>(call, runtime); });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(grouped_linear, GroupedLinear, p.x.dtype)
