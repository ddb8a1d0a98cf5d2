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
    Word *a, *b;
    float* sums;
};

template <class Word>
Workspace<Word> workspace(Arena& arena) {
    return {arena.take<Word>(piece_rows * longest), arena.take<Word>(piece_columns * longest),
            arena.take<float>(piece_rows * piece_columns)};
}

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

// One tile of sums to rows n … and columns k … of the result of an expert.
template <class T>
void write_tile(const View<3>& out, int64_t expert, int64_t n, int64_t k, const float* sums, bool streamed) {
    for (int64_t i = 0; i < smaller(tile_rows, out.size[1] - n); ++i, sums += panel) {
        T* const line =
            static_cast<T*>(out.data) + expert * out.stride[0] + (n + i) * out.stride[1] + k * out.stride[2];
        if (streamed && out.size[2] - k >= panel) {
            stream(line, load(sums));
            stream(line + width, load(sums + width));
            continue;
        }
        for (int64_t c = 0; c < smaller(panel, out.size[2] - k); c += width)
            store_any(line + c * out.stride[2], out.stride[2], load(sums + c), out.size[2] - k - c);
    }
}

template <class T, class Word>
void compute_piece(const GroupedOuter& call, int64_t expert, int64_t n, int64_t k, bool streamed,
                   const Workspace<Word>& at) {
    const View<3>& out = call.out;
    const int64_t begin = index_at(call.offsets, expert), end = index_at(call.offsets, expert + 1);
    const int64_t rows = smaller(piece_rows, out.size[1] - n), columns = smaller(piece_columns, out.size[2] - k);
    const View<1> sorted{};
    const Rows left{call.a, sorted, 1}, right{call.b, call.order, call.k};
    constexpr int64_t tile = tile_rows * panel, at_once = longest * elements_of<Word>;
    const int64_t row_tiles = ceil_div(rows, tile_rows);
    int64_t r = begin;
    do {  // once for no rows: zeros
        const int64_t count = smaller(at_once, end - r), words = steps_of<Word>(count);
        pack<tile_rows, T>(left, r, count, n, rows, at.a);
        pack<panel, T>(right, r, count, k, columns, at.b);
        for (int64_t c = 0; c < columns; c += panel) {
            for (int64_t i = 0; i < row_tiles; ++i) {
                // One chunk needs no sums of its own for every tile.
                float* const sums = at.sums + (end - begin > at_once ? (c / panel * row_tiles + i) * tile : 0);
                const int64_t row = i * tile_rows;
                const int high = static_cast<int>(smaller(tile_rows, rows - row));
                const Product<Word> product{
                    at.a + row * words, tile_rows, at.b + c * words, words, sums, panel, nullptr};
                r == begin ? multiply<Left::columns, Into::set>(high, columns - c, product)
                           : multiply<Left::columns, Into::add>(high, columns - c, product);
                if (r + count == end) write_tile<T>(out, expert, n + row, k + c, sums, streamed);
            }
        }
        r += at_once;
    } while (r < end);
}

template <class T, class Word>
void run(const GroupedOuter& call, const Runtime& runtime) {
    const View<3>& out = call.out;
    const int64_t down = ceil_div(out.size[1], piece_rows), across = ceil_div(out.size[2], piece_columns);
    const int64_t pieces = out.size[0] * down * across;
    if (pieces == 0) return;
    const Runtime workers = worth(runtime, out.size[0] * out.size[1] * out.size[2]);
    const auto own = lay_out(workers, pieces, [](Arena&) {}, workspace<Word>);
    const bool streamed = is_streamed<T>(out);
    for_pieces(workers, pieces, [&](int worker, int64_t piece) {
        // By turns: two workers that were first to write to one large page would each clear it.
        const int64_t expert = piece % out.size[0], rest = piece / out.size[0];
        compute_piece<T>(call, expert, rest / across * piece_rows, rest % across * piece_columns, streamed,
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
