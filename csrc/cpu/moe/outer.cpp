// Σ a[r]ᵀ b[r] over the rows of each expert: the gradient of its weight.
//
// A result is one chain of fused multiply-adds over at most `longest` rows in ascending order; the chains of more rows
// are added one after another.
#include "rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int tile_rows = width == 16 ? 12 : 6, tile_columns = 2 * width;  // of the result: they fill the registers
constexpr int64_t longest = 128;
constexpr int64_t beyond_caches = 1 << 23;  // bytes
constexpr int64_t piece_rows = 4 * tile_rows, piece_columns = 32 * tile_columns;

struct Workspace {
    float *a, *b, *sums;
};

Workspace workspace(Arena& arena) {
    return {arena.take<float>(piece_rows * longest), arena.take<float>(piece_columns * longest),
            arena.take<float>(piece_rows * piece_columns)};
}

// sums (tile_rows, tile_columns) += Σ a[r]ᵀ b[r] over n packed rows.
__attribute__((noinline)) void add_tile(const float* a, const float* b, int64_t n, float* sums) {
    vf sum[tile_rows][2];
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; ++i) sum[i][0] = sum[i][1] = splat(0.0f);
    for (int64_t r = 0; r < n; ++r, a += tile_rows, b += tile_columns) {
        const vf first = load(b), second = load(b + width);
#pragma GCC unroll 12
        for (int i = 0; i < tile_rows; ++i) {
            const vf factor = splat(a[i]);
            sum[i][0] = fma(factor, first, sum[i][0]);
            sum[i][1] = fma(factor, second, sum[i][1]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; ++i, sums += tile_columns) {
        store(sums, load(sums) + sum[i][0]);
        store(sums + width, load(sums + width) + sum[i][1]);
    }
}

// Columns first … first + count of n rows as tiles of `tile` columns, (tile, row, column), zeros behind the columns.
template <int tile, class T>
void pack(const Rows& rows, int64_t row, int64_t n, int64_t first, int64_t count, float* to) {
    const int64_t stride = rows.x.stride[1];
    for (int64_t r = 0; r < n; ++r) {
        const T* const from = rows.at<T>(row + r);
        float line[piece_columns + width];
        for (int64_t c = 0; c < count; c += width)
            store(line + c, from ? load_any(from + (first + c) * stride, stride, count - c) : splat(0.0f));
        for (int64_t c = count; c < round_up(count, tile); ++c) line[c] = 0;
        for (int64_t c = 0; c < count; c += tile) memcpy(to + c * n + r * tile, line + c, tile * sizeof(float));
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
    for (int64_t i = 0; i < smaller(tile_rows, out.size[1] - n); ++i, sums += tile_columns) {
        T* const line =
            static_cast<T*>(out.data) + expert * out.stride[0] + (n + i) * out.stride[1] + k * out.stride[2];
        if (streamed && out.size[2] - k >= tile_columns) {
            stream(line, load(sums));
            stream(line + width, load(sums + width));
            continue;
        }
        for (int64_t c = 0; c < smaller(tile_columns, out.size[2] - k); c += width)
            store_any(line + c * out.stride[2], out.stride[2], load(sums + c), out.size[2] - k - c);
    }
}

template <class T>
void compute_piece(const GroupedOuter& call, int64_t expert, int64_t n, int64_t k, bool streamed, const Workspace& at) {
    const View<3>& out = call.out;
    const int64_t begin = index_at(call.offsets, expert), end = index_at(call.offsets, expert + 1);
    const int64_t rows = smaller(piece_rows, out.size[1] - n), columns = smaller(piece_columns, out.size[2] - k);
    const View<1> sorted{};
    const Rows left{call.a, sorted, 1}, right{call.b, call.order, call.k};
    constexpr int64_t tile = tile_rows * tile_columns;
    const int64_t row_tiles = ceil_div(rows, tile_rows), column_tiles = ceil_div(columns, tile_columns);
    int64_t r = begin;
    do {  // once for no rows: zeros
        const int64_t count = smaller(longest, end - r);
        pack<tile_rows, T>(left, r, count, n, rows, at.a);
        pack<tile_columns, T>(right, r, count, k, columns, at.b);
        for (int64_t i = 0; i < row_tiles; ++i) {
            for (int64_t c = 0; c < column_tiles; ++c) {
                // One chunk needs no sums of its own for every tile.
                float* const sums = at.sums + (end - begin > longest ? (i * column_tiles + c) * tile : 0);
                for (int64_t j = 0; j < tile && r == begin; j += width) store(sums + j, splat(0.0f));
                add_tile(at.a + i * count * tile_rows, at.b + c * count * tile_columns, count, sums);
                if (r + count == end)
                    write_tile<T>(out, expert, n + i * tile_rows, k + c * tile_columns, sums, streamed);
            }
        }
        r += longest;
    } while (r < end);
}

template <class T>
void run(const GroupedOuter& call, const Runtime& runtime) {
    const View<3>& out = call.out;
    const int64_t down = ceil_div(out.size[1], piece_rows), across = ceil_div(out.size[2], piece_columns);
    const int64_t pieces = out.size[0] * down * across;
    if (pieces == 0) return;
    const Runtime workers = worth(runtime, out.size[0] * out.size[1] * out.size[2]);
    const auto own = lay_out(workers, pieces, [](Arena&) {}, workspace);
    const bool streamed = is_streamed<T>(out);
    for_pieces(workers, pieces, [&](int worker, int64_t piece) {
        const int64_t rest = piece % (down * across);
        compute_piece<T>(call, piece / (down * across), rest / across * piece_rows, rest % across * piece_columns,
                         streamed, own(worker));
        if (streamed) stream_end();
    });
}

}  // namespace

void grouped_outer(const GroupedOuter& call, const Runtime& runtime) {
    with_floats(call.a.dtype, [&]<class T>() { run<T>(call, runtime); });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(grouped_outer, GroupedOuter, p.a.dtype)
