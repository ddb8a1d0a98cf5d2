// Tiles of 16-bit matrices in shared memory: how they are laid out, filled from strided tensors, multiplied on the
// tensor cores and written back. Knows nothing of attention.
//
// A warp owns 16·m rows of a product. Warps 2p and 2p+1 share 32·m consecutive rows, in turns of eight:
//
//   tile row    0…7    8…15   16…23  24…31  32…39  …
//   warp        2p     2p+1   2p     2p+1   2p
//   fragment    upper  upper  lower  lower  upper of the next 16 rows
//
// so that a thread's rows are equal modulo 16, which is what one call of the dropout generator covers.
#pragma once

#include "../arch/arch.h"

namespace metate::cuda::flash {

using namespace arch;

// Rows of `columns` elements, in chunks of 16 bytes. The chunks of a row are permuted by the row's number, so that the
// same chunk of eight consecutive rows, which is what ldmatrix reads, lies in eight different groups of banks.
template <int columns>
struct SharedTile {
    static constexpr int chunks = columns / 8;
    static constexpr int pitch = columns * 2;
    static constexpr int mask = chunks % 8 == 0 ? 7 : 3;
    static_assert(chunks % 4 == 0);

    METATE_DEVICE static int offset(int row, int chunk) {
        const int flip = mask == 7 ? row & 7 : (row >> 1) & 3;
        return row * pitch + ((chunk ^ flip) << 4);
    }

    // The offset `chunk` chunks further on; the two chunk numbers have no bit in common, and the first is at most mask.
    METATE_DEVICE static int advance(int offset, int chunk) {
        return (offset ^ ((chunk & mask) << 4)) + (chunk & ~mask) * 16;
    }
};

// The tile row of a warp's fragment row r (0…15), the first of its `m` fragments; the others follow 32 rows apart.
METATE_DEVICE int fragment_row(int warp, int r, int m) {
    return (warp >> 1) * 32 * m + (warp & 1) * 8 + (r & 7) + (r >> 3) * 16;
}

// A matrix in global memory: `rows` × `columns` elements; `vectors`: every row can be read 16 bytes at a time.
struct Matrix {
    unsigned char* data;
    int64_t row_stride, column_stride;
    int rows, columns;
    bool vectors;

    METATE_DEVICE unsigned char* element(int row, int column) const {
        return data + (row * row_stride + column * column_stride) * 2;
    }
};

METATE_DEVICE int least(int a, int b) {
    return a < b ? a : b;
}
METATE_DEVICE int most(int a, int b) {
    return a > b ? a : b;
}

// How the threads of a block share the chunks of a tile: `across` neighbouring chunks of `at_once` rows at a time.
template <int tile_rows, int columns, int threads>
struct Sharing {
    using Tile = SharedTile<columns>;
    static constexpr int across = Tile::chunks % 8 != 0 ? 4 : threads / tile_rows > 8 ? threads / tile_rows : 8;
    static constexpr int at_once = threads / across;
    static_assert(Tile::chunks % across == 0 && at_once % 8 == 0);

    // body(offset in the tile, row, chunk) for every chunk of this thread.
    template <typename Body>
    METATE_DEVICE static void each(const Body& body) {
        const int thread = opaque(thread_index()), row = thread / across, chunk = thread % across;
        const int offset = Tile::offset(row, chunk);
        METATE_UNROLL
        for (int r = 0; r < tile_rows; r += at_once) {
            if (at_once > tile_rows && row >= tile_rows) break;
            METATE_UNROLL
            for (int c = 0; c < Tile::chunks; c += across) body(offset + r * Tile::pitch + c * 16, row + r, chunk + c);
        }
    }
};

// Starts copying rows first … first + tile_rows - 1 into a tile; what lies outside the matrix becomes 0.
template <int tile_rows, int columns, int threads>
METATE_DEVICE void load_tile(unsigned char* tile, const Matrix& matrix, int first) {
    if (matrix.vectors) {
        using Share = Sharing<tile_rows, columns, threads>;
        const int thread = opaque(thread_index()), row = thread / Share::across, chunk = thread % Share::across;
        const unsigned char* source = matrix.element(first + row, chunk * 8);
        const int64_t stride = matrix.row_stride * Share::at_once * 2;
        Share::each([&](int offset, int r, int c) {
            const int bytes = first + r < matrix.rows ? most(least(matrix.columns - c * 8, 8), 0) * 2 : 0;
            cp_async_16(tile + offset, source + (c - chunk) * 16, bytes);
            if (c - chunk == SharedTile<columns>::chunks - Share::across) source += stride;
        });
        return;
    }
    METATE_NO_UNROLL
    for (int index = thread_index(); index < tile_rows * columns; index += threads) {
        const int row = index / columns, column = index % columns;
        uint16_t bits = 0;
        if (first + row < matrix.rows && column < matrix.columns) {
            bits = load_global<uint16_t>(matrix.element(first + row, column));
        }
        store_shared(tile + SharedTile<columns>::offset(row, column / 8) + column % 8 * 2, bits);
    }
}

// Writes rows of a tile to global memory, as far as they lie inside the matrix.
template <int tile_rows, int columns, int threads>
METATE_DEVICE void store_tile(const unsigned char* tile, const Matrix& matrix, int first) {
    using Tile = SharedTile<columns>;
    METATE_NO_UNROLL
    for (int index = thread_index(); index < tile_rows * Tile::chunks; index += threads) {
        const int row = index / Tile::chunks, chunk = index % Tile::chunks;
        const int count = least(matrix.columns - chunk * 8, 8);
        if (first + row >= matrix.rows || count <= 0) continue;
        const Words<4> words = load_shared<Words<4>>(tile + Tile::offset(row, chunk));
        if (matrix.vectors && count == 8) {
            store_global(matrix.element(first + row, chunk * 8), words);
            continue;
        }
        METATE_UNROLL
        for (int e = 0; e < 8; ++e) {
            if (e < count) {
                const auto bits = static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16));
                store_global(matrix.element(first + row, chunk * 8 + e), bits);
            }
        }
    }
}

// For each of two packed elements that is infinite or NaN, all its bits.
template <typename T>
METATE_DEVICE uint32_t nonfinite(uint32_t packed) {
    constexpr uint32_t from_infinity_on = is_same<T, bf16> ? 0x00800080u : 0x04000400u;  // carries into the sign
    return ((((packed & 0x7fff7fffu) + from_infinity_on) >> 15) & 0x00010001u) * 0xffffu;
}

// Clears infinities and NaNs in a part of a tile for each thread, and says whether there were any. All must have
// arrived.
template <typename T, int tile_rows, int columns, int threads>
METATE_DEVICE bool clear_nonfinite(unsigned char* tile) {
    bool found = false;
    METATE_NO_UNROLL
    for (int index = thread_index(); index < tile_rows * columns / 8; index += threads) {
        auto words = load_shared<Words<4>>(tile + index * 16);
        uint32_t special = 0;
        METATE_UNROLL
        for (int w = 0; w < 4; ++w) {
            const uint32_t mask = nonfinite<T>(words[w]);
            words[w] &= ~mask;
            special |= mask;
        }
        if (special != 0) store_shared(tile + index * 16, words);
        found |= special != 0;
    }
    return found;
}

template <int m, int n>
METATE_DEVICE void clear(float (&d)[m][n][4]) {
    METATE_UNROLL
    for (int i = 0; i < m * n * 4; ++i) d[i / 4 / n][i / 4 % n][i % 4] = 0.f;
}

// d += a·bᵀ for this warp's rows of a tile `a` and the first 8·n rows of a tile `b`, over all their columns.
template <typename T, int columns, int m, int n>
METATE_DEVICE void multiply_transposed(float (&d)[m][n][4], const unsigned char* a, const unsigned char* b, int warp) {
    using Tile = SharedTile<columns>;
    const int l = lane();
    const int a_offset = opaque(Tile::offset(fragment_row(warp, l & 15, m), l >> 4));
    const int b_offset = opaque(Tile::offset((l & 7) + (l >> 4) * 8, l >> 3 & 1));
    METATE_UNROLL
    for (int k = 0; k < columns / 16; ++k) {
        uint32_t rows[m][4];
        METATE_UNROLL
        for (int i = 0; i < m; ++i) ldmatrix_x4(rows[i], a + Tile::advance(a_offset, 2 * k) + i * 32 * Tile::pitch);
        METATE_UNROLL
        for (int j = 0; j < n; j += 2) {
            uint32_t pair[4];
            ldmatrix_x4(pair, b + Tile::advance(b_offset, 2 * k) + j * 8 * Tile::pitch);
            METATE_UNROLL
            for (int i = 0; i < m; ++i) {
                mma_m16n8k16<T>(d[i][j], rows[i], {pair[0], pair[1]});
                mma_m16n8k16<T>(d[i][j + 1], rows[i], {pair[2], pair[3]});
            }
        }
    }
}

// A product's fragment as the left operand of the next: a[i][k] covers 16 of its columns.
template <typename T, int m, int n>
METATE_DEVICE void pack_left(uint32_t (&a)[m][n / 2][4], const float (&d)[m][n][4]) {
    METATE_UNROLL
    for (int i = 0; i < m; ++i) {
        METATE_UNROLL
        for (int k = 0; k < n / 2; ++k) {
            METATE_UNROLL
            for (int r = 0; r < 4; ++r) {
                a[i][k][r] = pack<T>(d[i][2 * k + r / 2][r % 2 * 2], d[i][2 * k + r / 2][r % 2 * 2 + 1]);
            }
        }
    }
}

// Which columns of a tile a warp's accumulator covers: pairs of 8-column fragments, every `parts`-th, from `part` on.
template <int parts>
METATE_DEVICE int chunk_of(int fragment, int part) {
    return (fragment / 2 * parts + part) * 2 + fragment % 2;
}

// d += a·b for a in registers and 16·k rows of a tile `b`.
template <typename T, int columns, int parts, int m, int n, int k>
METATE_DEVICE void multiply(float (&d)[m][n][4], const uint32_t (&a)[m][k][4], const unsigned char* b, int part) {
    using Tile = SharedTile<columns>;
    const int l = lane();
    const int b_offset = opaque(Tile::offset(l & 15, part * 2 + (l >> 4)));
    METATE_UNROLL
    for (int kk = 0; kk < k; ++kk) {
        METATE_UNROLL
        for (int j = 0; j < n; j += 2) {
            uint32_t pair[4];
            ldmatrix_x4_trans(pair, b + Tile::advance(b_offset, j * parts) + kk * 16 * Tile::pitch);
            METATE_UNROLL
            for (int i = 0; i < m; ++i) {
                mma_m16n8k16<T>(d[i][j], a[i][kk], {pair[0], pair[1]});
                mma_m16n8k16<T>(d[i][j + 1], a[i][kk], {pair[2], pair[3]});
            }
        }
    }
}

// What a product d += a·b lacks where infinities and NaNs in b were cleared: they reach the rows that give them a
// weight other than 0, so that masked rows of b may hold anything. b is read again from `matrix`, from row `first` on.
template <typename T, int parts, int m, int n, int k>
METATE_DEVICE void add_nonfinite(float (&d)[m][n][4], const uint32_t (&a)[m][k][4], const Matrix& matrix, int first,
                                 int part) {
    uint32_t weights[m][2] = {};  // bit 4·kk + e: this thread's e-th weight of its row in a[·][kk]
    METATE_UNROLL
    for (int i = 0; i < m * k * 4; ++i) {
        const uint32_t pair = a[i / 4 / k][i / 4 % k][i % 4];
        const uint32_t bits = ((pair & 0x7fffu) != 0 ? 1u : 0u) | ((pair & 0x7fff0000u) != 0 ? 2u : 0u);
        weights[i / 4 / k][i % 2] |= bits << (i / 4 % k * 4 + i % 4 / 2 * 2);
    }
    const int t = lane() & 3;
    METATE_NO_UNROLL
    for (int row = 0; row < k * 16; ++row) {
        const int bit = row / 16 * 4 + row % 16 / 8 * 2 + row % 2, owner = (lane() & ~3) | (row % 8 / 2);
        bool seen[m][2];
        METATE_UNROLL
        for (int i = 0; i < 2 * m; ++i) seen[i / 2][i % 2] = shuffle(weights[i / 2][i % 2], owner) >> bit & 1;
        if (first + row >= matrix.rows) continue;
        const unsigned char* const start = matrix.element(first + row, chunk_of<parts>(0, part) * 8 + t * 2);
        METATE_UNROLL
        for (int j = 0; j < 2 * n; ++j) {
            const int ahead = (j / 2 / 2 * parts * 2 + j / 2 % 2) * 8 + j % 2;
            T value{};
            if (chunk_of<parts>(0, part) * 8 + t * 2 + ahead < matrix.columns) {
                value = load_global<T>(start + ahead * matrix.column_stride * 2);
            }
            const float special = nonfinite<T>(value.bits) ? to_float(value) : 0.f;
            METATE_UNROLL
            for (int i = 0; i < 2 * m; ++i) d[i / 2][j / 2][i % 2 * 2 + j % 2] += seen[i / 2][i % 2] ? special : 0.f;
        }
    }
}

// Writes this warp's accumulators, times a factor for each of its rows, into a tile.
template <typename T, int columns, int parts, int m, int n>
METATE_DEVICE void put_tile(unsigned char* tile, const float (&d)[m][n][4], const float (&factor)[2 * m], int warp,
                            int part) {
    using Tile = SharedTile<columns>;
    const int l = lane(), row = fragment_row(warp, l >> 2, m);
    METATE_UNROLL
    for (int i = 0; i < 2 * m; ++i) {
        METATE_UNROLL
        for (int j = 0; j < n; ++j) {
            const float* pair = &d[i / 2][j][i % 2 * 2];
            store_shared(tile + Tile::offset(row + i * 16, chunk_of<parts>(j, part)) + (l & 3) * 4,
                         pack<T>(pair[0] * factor[i], pair[1] * factor[i]));
        }
    }
}

// Writes a block's accumulators, times a factor for each row, to global memory: through a tile that is in use no
// longer.
template <typename T, int tile_rows, int columns, int threads, int m, int n>
METATE_DEVICE void store_through(unsigned char* tile, const float (&d)[m][n][4], const float (&factor)[2 * m],
                                 const Matrix& matrix, int first) {
    cp_async_wait<0>();
    sync_threads();
    put_tile<T, columns, 1>(tile, d, factor, warp(), 0);
    sync_threads();
    store_tile<tile_rows, columns, threads>(tile, matrix, first);
}

}  // namespace metate::cuda::flash
