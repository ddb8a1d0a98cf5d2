// Σ a[r]ᵀ b[r] over the rows of each expert: the gradient of its weight.
//
// A result is one chain of products of at most `longest` words (gemm.h) of rows in ascending order; the chains of more
// rows are added one after another.
#include "../attention/gemm.h"
#include "rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t longest = long_chain;
constexpr int64_t beyond_caches = 1 << 23;  // bytes
constexpr int64_t piece_rows = 8 * tile_rows, piece_columns = 16 * panel;

template <class Word>
struct Workspace {
    Word* a;
    float* sums;
};

template <class Word>
Workspace<Word> workspace(Arena& arena) {
    return {arena.take<Word>(piece_rows * longest), arena.take<float>(piece_rows * piece_columns)};
}

// The rows of b, which all pieces of an expert share: of each expert the words from number first[expert] on, chunks of
// `longest` words as panels of their columns.
template <class Word>
struct Packed {
    Word* b;
    int64_t* first;
    int64_t columns;  // whole panels

    Word* at(int64_t expert, int64_t row, int64_t words, int64_t column) const {
        return b + (first[expert] + row / elements_of<Word>)*columns + column * words;
    }
};

template <class T>
METATE_FN vf zip_rows(const T* row, const T*, int64_t stride, int64_t n, const float*) {
    return row ? load_any(row, stride, n) : splat(0.0f);
}
#if defined(METATE_HAS_BF16_DOT)
METATE_FN vf zip_rows(const bf16* row, const bf16* next, int64_t stride, int64_t n, const Pair*) {
    return as_float(zip_any(row, next, stride, n));
}
#endif

// Columns first … first + count of n rows as tiles of `tile` columns, (tile, word of rows, column), zeros behind the
// columns.
template <int tile, class T, class Word>
void pack(const Rows& rows, int64_t row, int64_t n, int64_t first, int64_t count, Word* to) {
    const int64_t stride = rows.x.stride[1], words = steps_of<Word>(n);
    for (int64_t i = 0; i < words; ++i) {
        const int64_t r = i * elements_of<Word>;
        const T* const from = rows.at<T>(row + r);
        const T* const next = r + 1 < n && elements_of<Word> > 1 ? rows.at<T>(row + r + 1) : nullptr;
        Word line[piece_columns + 2 * width];
        for (int64_t c = 0; c < round_up(count, tile); c += width) {
            const int64_t at = (first + c) * stride, left = larger(count - c, 0);
            store_words(line + c, zip_rows(from ? from + at : from, next ? next + at : next, stride, left, to));
        }
        for (int64_t c = 0; c < count; c += tile) memcpy(to + c * words + i * tile, line + c, tile * sizeof(Word));
    }
}

// Whether results are so large that nobody finds them in a cache, and stand on whole lines of it.
template <class T>
bool is_streamed(const View<3>& out) {
    constexpr int64_t line = 64, size = sizeof(T);
    const bool aligned = reinterpret_cast<uintptr_t>(out.data) % line == 0 && out.stride[0] * size % line == 0 &&
                         out.stride[1] * size % line == 0;
    return aligned && out.stride[2] == 1 && out.size[0] * out.size[1] * out.size[2] * size >= beyond_caches;
}

// One tile of sums on its way to the result.
template <class T>
struct Writing {
    T* to;
    int64_t stride, rows;  // of the result
    const float* sums;
    bool streamed;
    int64_t at = 0;

    METATE_FN void write(int64_t c) const { streamed ? stream(to + c, load(sums + c)) : store(to + c, load(sums + c)); }
    METATE_FN void end_row() {
        at = 0;
        to += stride;
        sums += panel;
        --rows;
    }
    METATE_FN void advance() {
        write(at);
        at += width;
        if (at == panel) end_row();
    }
    METATE_FN void finish() {
        if (at > 0) advance();
        for (; rows > 0; end_row()) {
            write(0);
            write(width);
        }
    }
};

// A vector at a time, beside the products of the next tile.
template <class T>
struct WriteBeside {
    Writing<T>& tile;
    METATE_FN void operator()() const {
        if (tile.rows > 0) tile.advance();
    }
};

// Begins to write a tile to rows n … and columns k … of the result of an expert. Where columns are missing or not side
// by side, it is all written at once.
template <class T>
Writing<T> write_tile(const View<3>& out, int64_t expert, int64_t n, int64_t k, const float* sums, bool streamed) {
    T* line = static_cast<T*>(out.data) + expert * out.stride[0] + n * out.stride[1] + k * out.stride[2];
    const int64_t rows = smaller(tile_rows, out.size[1] - n), columns = smaller(panel, out.size[2] - k);
    if (columns == panel && out.stride[2] == 1) return {line, out.stride[1], rows, sums, streamed};
    for (int64_t i = 0; i < rows; ++i, sums += panel, line += out.stride[1]) {
        for (int64_t c = 0; c < columns; c += width)
            store_any(line + c * out.stride[2], out.stride[2], load(sums + c), columns - c);
    }
    return {};
}

template <class T, class Word>
void pack_columns(const GroupedOuter& call, const Packed<Word>& packed, int64_t expert, int64_t k) {
    const int64_t begin = index_at(call.offsets, expert), end = index_at(call.offsets, expert + 1);
    constexpr int64_t at_once = longest * elements_of<Word>;
    for (int64_t r = begin; r < end; r += at_once) {
        const int64_t count = smaller(at_once, end - r);
        pack<panel, T>(Rows{call.b, call.order, call.k}, r, count, k, smaller(piece_columns, call.b.size[1] - k),
                       packed.at(expert, r - begin, steps_of<Word>(count), k));
    }
}

template <class T, class Word>
void compute_piece(const GroupedOuter& call, const Packed<Word>& packed, int64_t expert, int64_t n, int64_t k,
                   bool streamed, const Workspace<Word>& at) {
    const View<3>& out = call.out;
    const int64_t begin = index_at(call.offsets, expert), end = index_at(call.offsets, expert + 1);
    const int64_t rows = smaller(piece_rows, out.size[1] - n), columns = smaller(piece_columns, out.size[2] - k);
    const View<1> sorted{};
    const Rows left{call.a, sorted, 1};
    constexpr int64_t tile = tile_rows * panel, at_once = longest * elements_of<Word>, vectors = tile / width;
    const int64_t panels = ceil_div(columns, panel);
    Writing<T> writing{};
    int64_t r = begin;
    do {  // once for no rows: zeros
        const int64_t count = smaller(at_once, end - r), words = steps_of<Word>(count);
        pack<tile_rows, T>(left, r, count, n, rows, at.a);
        const Word* const b = packed.at(expert, r - begin, words, k);
        for (int64_t row = 0; row < rows; row += tile_rows) {
            for (int64_t j = 0; j < panels; ++j) {
                const int64_t number = row / tile_rows * panels + j;
                // With one chunk only the tile before this one still needs its sums.
                float* const sums = at.sums + (end - begin > at_once ? number : number % 2) * tile;
                const int high = static_cast<int>(smaller(tile_rows, rows - row));
                const Product<Word> product{
                    at.a + row * words, tile_rows, b + j * panel * words, words, sums, panel, nullptr};
                const WriteBeside<T> beside{writing};
                r == begin ? multiply<Left::columns, Into::set>(high, columns - j * panel, product, beside)
                           : multiply<Left::columns, Into::add>(high, columns - j * panel, product, beside);
                writing.finish();
                if (r + count >= end) writing = write_tile<T>(out, expert, n + row, k + j * panel, sums, streamed);
                if (words < vectors) writing.finish();  // at once, for products so short that they end before it
            }
        }
        r += at_once;
    } while (r < end);
    writing.finish();
}

template <class T, class Word>
void run(const GroupedOuter& call, const Runtime& runtime) {
    const View<3>& out = call.out;
    const int64_t down = ceil_div(out.size[1], piece_rows), across = ceil_div(out.size[2], piece_columns);
    const int64_t experts = out.size[0], pieces = experts * down * across;
    if (pieces == 0) return;
    const Runtime workers = worth(runtime, experts * out.size[1] * out.size[2]);
    const auto words_of = [&](int64_t expert) {
        return steps_of<Word>(index_at(call.offsets, expert + 1) - index_at(call.offsets, expert));
    };
    int64_t words = 0;
    for (int64_t e = 0; e < experts; ++e) words += words_of(e);
    Packed<Word> packed{nullptr, nullptr, round_up(out.size[2], panel)};
    const auto own = lay_out(
        workers, pieces,
        [&](Arena& arena) {
            packed.first = arena.take<int64_t>(experts);
            packed.b = arena.take<Word>(words * packed.columns);
        },
        workspace<Word>);
    for (int64_t e = 0, behind = 0; e < experts; behind += words_of(e++)) packed.first[e] = behind;
    const bool streamed = is_streamed<T>(out);
    for_pieces(worth(runtime, words * packed.columns), experts * across, [&](int, int64_t piece) {
        pack_columns<T>(call, packed, piece / across, piece % across * piece_columns);
    });
    for_pieces(workers, pieces, [&](int worker, int64_t piece) {
        // By turns: two workers that were first to write to one large page would each clear it.
        const int64_t expert = piece % experts, rest = piece / experts;
        compute_piece<T>(call, packed, expert, rest / across * piece_rows, rest % across * piece_columns, streamed,
                         own(worker));
        if (streamed) stream_end();
    });
}

}  // namespace

void grouped_outer(const GroupedOuter& call, const Runtime& runtime) {
    with_words(call.a.dtype, [&]<class T, class Word>() { run<T, Word>(call, runtime); });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH_BF16(grouped_outer, GroupedOuter, p.a.dtype)
