// The rows of each expert times its weight.
//
// Every result is the sum of chains of products of `depth` words (gemm.h), of fewer where there are few columns, in
// ascending order, added one after another.
// Few rows take the weight as it lies, transposed in registers unless it lies transposed (few_rows.h). Many rows are
// transposed themselves, once, and the weight is what a product spreads; a transposed weight is packed for them.
#include "few_rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

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
        __builtin_prefetch(later + at);
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

// The lines of `width` rows of a piece of the result, which would be waited for while they are written.
template <class T>
METATE_FN void fetch_results(const GroupedLinear& call, const Span& span, int64_t row, int64_t n, int64_t columns) {
    const View<2>& out = call.out;
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t r = row; r < smaller(row + width, span.rows); ++r) {
        const T* const to = static_cast<const T*>(out.data) + (span.first + r) * out.stride[0] + n * out.stride[1];
        for (int64_t c = 0; c < columns; c += line) __builtin_prefetch(to + c * out.stride[1], 1);
    }
}

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
    const int64_t columns = smaller(piece_rows, p.call.out.size[1] - n);
    for (int64_t i = 0; i < piece_rows * pitch; i += width) store(at.totals + i, splat(0.0f));
    Tile<T, Word> next = tiles.tile(0, at.tiles[0], panels);
    next.look_up();
    while (next.rows > 0) next.copy();
    for (int64_t i = 0; i < tiles.count; ++i) {
        next = tiles.tile(i + 1, at.tiles[(i + 1) % 2], panels);
        next.look_up();
        if (i + 1 == tiles.count) fetch_results<T>(p.call, span, 0, n, columns);
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
    for (int64_t j = 0; j < panels; ++j) {
        const int64_t first = p.first_of(span, j), end = p.first_of(span, j + 1);
        for (int64_t r = first; r < end; r += width) {
            fetch_results<T>(p.call, span, smaller(r + width, end), n, columns);
            for (int64_t c = 0; c < columns; c += width)
                write_square<T>(p.call, span, at.totals + c * pitch + j * panel + r - first, pitch, r, end, n + c);
        }
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
        if (p.takes_few(span)) return few_columns;
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
    for_pieces(worth(runtime, p.rows.count() * p.columns()), spans * parts,
               [&](int, int64_t piece) { copy_rows(p, list[piece / parts], piece % parts); });
    for_pieces(workers, p.pieces[spans], [&](int worker, int64_t piece) {
        const int64_t at = run_of(p.pieces, spans, piece);
        const Span& span = list[at];
        const int64_t n = (piece - p.pieces[at]) * columns_of(span);
        if (p.takes_lanes(span))
            compute_lanes(p, span, n, smaller(N, n + few_columns), weight_of(piece + workers.threads));
        else if (p.takes_few(span))
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
