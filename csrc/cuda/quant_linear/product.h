// The products with a low-bit matrix on the tensor cores. A block makes 128 outputs of up to 64 rows of x and walks
// along what is summed in steps of 128: asynchronous copies bring codes and x, the weights are made where they are
// multiplied.
//
// The order of the sum inside a step is free as long as both operands keep to it. Step 128 is four parts of 32 columns,
// one for each thread of a quad: thread t multiplies columns 32·t + 8·w … + 7 in turn w, which it finds in one vector
// of x and in one word of 4-bit codes. The weights are the left operand, so each is decoded once in a block.
//
// What is summed is cut into slices by the sizes of W alone. With few rows of x every slice is a block of its own, and
// a second kernel adds the slices; with many, a block adds its slices in the same order. So a row of the result does
// not depend on how many there are, bit for bit.
#pragma once

#include "low_rank.h"

namespace metate::cuda::lowbit {

// direct: 4 bits and groups of whole parts, decoded into registers. staged: anything, decoded into shared memory first.
// transposed: staged, and summed over the rows of W. dense: weights of 16 bits, that are codes and values at once;
// dense_transposed: summed over their rows.
enum class Kind { direct, staged, transposed, dense, dense_transposed };

METATE_INLINE constexpr bool is_dense(Kind kind) {
    return kind == Kind::dense || kind == Kind::dense_transposed;
}
METATE_INLINE constexpr bool is_transposed(Kind kind) {
    return kind == Kind::transposed || kind == Kind::dense_transposed;
}

constexpr int step = 128;     // columns (or rows) of W summed at a time, and outputs of a block
constexpr int threads = 128;  // four warps, each with 32 outputs
constexpr int pitch = step * 2;

struct Product {
    Weight w;
    const unsigned char* x;  // rows of 16-byte vectors
    int64_t x_pitch;         // in elements
    View<2> out;
    View<1> bias, places;  // places: the column of each output, where it is not its number
    LowRank update;        // to be added, as a slice of its own after the others
    float* partial;        // (slices, rows of x, outputs rounded up to 128), where slices are blocks
    int x_rows, x_tiles, outputs, summed;
    int steps, slice_steps;
    bool vector_out;
};

METATE_INLINE constexpr int stages_of(Kind kind, int rows) {
    return is_dense(kind) ? (rows == 8 ? 3 : 2) : kind != Kind::direct ? 2 : rows == 8 ? 4 : 3;
}
METATE_INLINE constexpr int stage_bytes(int bits, int rows) {
    return step * step / 8 * bits + rows * pitch;
}
METATE_INLINE constexpr size_t shared_bytes(Kind kind, int bits, int rows) {
    const size_t stages = static_cast<size_t>(stages_of(kind, rows)) * stage_bytes(bits, rows);
    return is_dense(kind) ? stages : stages + (kind == Kind::direct ? 0 : step * pitch) + (4 << bits);
}

// Rows of 128 elements in chunks of 16 bytes, permuted so that eight lanes always meet eight groups of banks: the
// quad's chunks 4·t + w of two rows of a fragment, or one chunk of the eight rows that ldmatrix reads.
struct RowTile {
    METATE_DEVICE static int offset(int row, int chunk, int flip) {
        return row * pitch + ((chunk ^ (chunk >> 3 & 1) ^ flip) << 4);
    }
    METATE_DEVICE static int x(int row, int chunk) { return offset(row, chunk, (row & 1) << 1); }
    METATE_DEVICE static int w(int row, int chunk) { return offset(row, chunk, (row >> 2 & 1) << 1); }
    METATE_DEVICE static int transposed(int row, int chunk) {
        return row * pitch + ((chunk ^ (row & 1) ^ (row >> 5 & 3) << 1) << 4);
    }
};

// Where a row of 4-bit codes lies: of rows four apart, as a fragment reads them, two fill all banks.
METATE_DEVICE int code_row(int row) {
    return row ^ (row >> 2 & 1);
}

// source(row) is the row of x for a row of the tile, -1 for none.
template <int rows, typename Source>
METATE_DEVICE void load_x(unsigned char* tile, const Product& p, const Source& source, int column) {
    const int thread = opaque(thread_index());
    METATE_UNROLL
    for (int i = 0; i < rows * 16 / threads; ++i) {
        const int index = i * threads + thread, row = index / 16, chunk = index % 16, at = column + chunk * 8;
        const int from = source(row), bytes = from >= 0 ? most(least(p.summed - at, 8), 0) * 2 : 0;
        cp_async_16(tile + RowTile::x(row, chunk), p.x + (from * p.x_pitch + at) * 2, bytes);
    }
}

// Codes of 128 rows and 128 columns, 16 · bits bytes a row; zeros outside the matrix.
METATE_DEVICE void load_codes(unsigned char* tile, const Weight& w, int bits, int first, int column) {
    const int from = column / 8 * bits;
    const auto* const data = static_cast<const unsigned char*>(w.m.codes.data) + from;
    if (w.vectors) {
        METATE_UNROLL
        for (int index = opaque(thread_index()); index < step * bits; index += threads) {
            const int row = index / bits, chunk = index % bits * 16;
            const int bytes = first + row < w.rows ? most(least(w.row_bytes - from - chunk, 16), 0) : 0;
            cp_async_16(tile + code_row(row) * bits * 16 + chunk, data + (first + row) * w.m.codes.stride[0] + chunk,
                        bytes);
        }
        return;
    }
    METATE_NO_UNROLL
    for (int index = thread_index(); index < step * bits * 4; index += threads) {
        const int row = index / (bits * 4), chunk = index % (bits * 4) * 4;
        uint32_t word = 0;
        for (int i = 0; i < 4; ++i) {
            if (first + row >= w.rows || from + chunk + i >= w.row_bytes) break;
            const auto* const at = data + (first + row) * w.m.codes.stride[0] + chunk + i;
            word |= static_cast<uint32_t>(load_global<uint8_t>(at)) << (8 * i);
        }
        store_shared(tile + code_row(row) * bits * 16 + chunk, word);
    }
}

// 128 rows and 128 columns of weights of 16 bits, zeros outside the matrix.
template <bool transposed>
METATE_DEVICE void load_weights(unsigned char* tile, const Weight& w, int first, int column) {
    const View<2>& m = w.m.codes;
    const auto* const data = static_cast<const uint16_t*>(m.data);
    const auto place = [&](int row, int chunk) {
        return tile + (transposed ? RowTile::transposed(row, chunk) : RowTile::w(row, chunk));
    };
    if (w.vectors) {
        const int thread = opaque(thread_index());
        METATE_UNROLL
        for (int i = 0; i < step * 16 / threads; ++i) {
            const int index = i * threads + thread, row = index / 16, chunk = index % 16, at = column + chunk * 8;
            const int bytes = first + row < w.rows ? most(least(w.columns - at, 8), 0) * 2 : 0;
            cp_async_16(place(row, chunk), data + (first + row) * m.stride[0] + at, bytes);
        }
        return;
    }
    METATE_NO_UNROLL
    for (int index = thread_index(); index < step * step; index += threads) {
        const int row = index / step, at = index % step;
        const bool inside = first + row < w.rows && column + at < w.columns;
        const auto* const from = data + (first + row) * m.stride[0] + (column + at) * m.stride[1];
        store_shared(place(row, at / 8) + at % 8 * 2, inside ? load_global<uint16_t>(from) : uint16_t{0});
    }
}

// The decoded weights of 128 rows and 128 columns.
template <typename T, bool transposed>
METATE_DEVICE void stage_weights(unsigned char* tile, const unsigned char* codes, const Weight& w, int first,
                                 int column, const unsigned char* table) {
    METATE_NO_UNROLL
    for (int index = thread_index(); index < step * 16; index += threads) {
        const int row = index / 16, chunk = index % 16;
        const uint64_t word = load_codes(codes + (code_row(row) * 16 + chunk) * w.bits, w.bits);
        const auto weights = decode_any<T>(w, word, first + row, column + chunk * 8, table);
        store_shared(tile + (transposed ? RowTile::transposed(row, chunk) : RowTile::w(row, chunk)), weights);
    }
}

// The left operands of turn w, fragment i of 16 outputs, half s: [i][s].
using Left = uint32_t[2][2][4];

// From pairs of a thread's four rows.
METATE_DEVICE void set_left(Left& left, const uint32_t (&pairs)[4][4]) {
    METATE_UNROLL
    for (int i = 0; i < 16; ++i) left[i / 8][i % 4 / 2][i % 2 * 2 + i / 4 % 2] = pairs[i / 4][i % 4];
}

template <typename T, int fragments>
METATE_DEVICE void multiply(float (&sum)[2][fragments][4], const Left& left, const unsigned char* x) {
    METATE_UNROLL
    for (int j = 0; j < fragments; ++j) {
        const auto right = load_shared<Words<4>>(x + j * 8 * pitch);
        METATE_UNROLL
        for (int s = 0; s < 2; ++s) {
            METATE_UNROLL
            for (int i = 0; i < 2; ++i) {
                mma_m16n8k16<T>(sum[i][j], left[i][s], {right[2 * s], right[2 * s + 1]});
            }
        }
    }
}

// Number r (0…3) of a thread's outputs; r / 2 is its fragment. Decoded ones are neighbours.
template <Kind kind>
METATE_DEVICE int output_of(int r) {
    const int base = warp() * 32, g = lane() >> 2;
    return base + (is_transposed(kind) ? 8 * r + g : 4 * g + r);
}

// One step of this warp, from tiles of x and of codes (direct) or weights.
template <typename T, int fragments, Kind kind>
METATE_DEVICE void multiply_step(float (&sum)[2][fragments][4], const unsigned char* x, const unsigned char* tile,
                                 const Levels<4>& levels, const unsigned char* table) {
    const int g = lane() >> 2, t = lane() & 3, x_offset = RowTile::x(g, 4 * t);
    Words<4> words[4];
    if constexpr (kind == Kind::direct) {
        METATE_UNROLL
        for (int r = 0; r < 4; ++r) words[r] = load_shared<Words<4>>(tile + code_row(output_of<kind>(r)) * 64 + t * 16);
    }
    METATE_UNROLL
    for (int w = 0; w < 4; ++w) {
        Left left;
        if constexpr (is_transposed(kind)) {
            METATE_UNROLL
            for (int i = 0; i < 4; ++i) {  // lane 8·m + r: row r of matrix m; bit 1 of m is the half of the sum
                const int r = lane() & 7, row = 32 * (r >> 1) + 8 * w + 4 * (i & 1) + 2 * (lane() >> 4) + (r & 1);
                ldmatrix_x4_trans(left[i / 2][i % 2],
                                  tile + RowTile::transposed(row, warp() * 4 + (i / 2) * 2 + (lane() >> 3 & 1)));
            }
        } else {
            uint32_t pairs[4][4];
            if constexpr (kind == Kind::staged || kind == Kind::dense) {
                METATE_UNROLL
                for (int r = 0; r < 4; ++r) {
                    const auto weights = load_shared<Words<4>>(tile + RowTile::w(output_of<kind>(r), 4 * t + w));
                    METATE_UNROLL
                    for (int e = 0; e < 4; ++e) pairs[r][e] = weights[e];
                }
            } else if (table) {
                METATE_UNROLL
                for (int r = 0; r < 4; ++r)
                    look_up_nibbles<T>(pairs[r], words[r][w], levels.scale[r], levels.offset[r], table);
            } else {
                METATE_UNROLL
                for (int r = 0; r < 4; ++r)
                    decode_nibbles<T>(pairs[r], words[r][w], levels.scale[r], levels.offset[r], levels.zero[r]);
            }
            set_left(left, pairs);
        }
        multiply<T>(sum, left, x + (x_offset ^ w << 4));
    }
}

template <typename T>
METATE_DEVICE float bias_at(const View<1>& bias, int output) {
    if (!bias) return 0.f;
    const int64_t at = output * bias.stride[0];
    if (bias.dtype == DType::f32) return load_global<float>(static_cast<const float*>(bias.data) + at);
    return to_float(load_global<T>(static_cast<const T*>(bias.data) + at));
}

// The column of an output.
METATE_DEVICE int64_t place_of(const Product& p, int output) {
    if (!p.places) return output;
    return load_global<int32_t>(static_cast<const int32_t*>(p.places.data) + output * p.places.stride[0]);
}

template <typename T>
METATE_DEVICE T* place_of(const Product& p, int row, int output) {
    return static_cast<T*>(p.out.data) + row * p.out.stride[0] + place_of(p, output) * p.out.stride[1];
}

// Writes this thread's sums: the partial ones of a slice, or results.
template <typename T, int fragments, Kind kind>
METATE_DEVICE void write(const Product& p, const float (&sum)[2][fragments][4], int first, int first_output) {
    const int64_t partial_pitch = (p.outputs + step - 1) / step * step;
    int output[4];
    float bias[4] = {};
    METATE_UNROLL
    for (int r = 0; r < 4; ++r) {
        output[r] = first_output + output_of<kind>(r);
        if (!p.partial && output[r] < p.outputs) bias[r] = bias_at<T>(p.bias, output[r]);
    }
    METATE_UNROLL
    for (int j = 0; j < 2 * fragments; ++j) {
        const int row = first + j / 2 * 8 + (lane() & 3) * 2 + j % 2;
        if (row >= p.x_rows) continue;
        float value[4];
        METATE_UNROLL
        for (int r = 0; r < 4; ++r) value[r] = sum[r / 2][j / 2][r % 2 * 2 + j % 2] + bias[r];
        if (p.partial) {
            float* const to = p.partial + (static_cast<int64_t>(block_index().z) * p.x_rows + row) * partial_pitch;
            if constexpr (is_transposed(kind)) {
                METATE_UNROLL
                for (int r = 0; r < 4; ++r) store_global(to + output[r], value[r]);
            } else {
                store_global(to + output[0],
                             Words<4>{{bits_of(value[0]), bits_of(value[1]), bits_of(value[2]), bits_of(value[3])}});
            }
            continue;
        }
        if (!is_transposed(kind) && p.vector_out && output[3] < p.outputs) {
            store_global(place_of<T>(p, row, output[0]),
                         Words<2>{{pack<T>(value[0], value[1]), pack<T>(value[2], value[3])}});
            continue;
        }
        METATE_UNROLL
        for (int r = 0; r < 4; ++r) {
            if (output[r] < p.outputs) store_global(place_of<T>(p, row, output[r]), from_float<T>(value[r]));
        }
    }
}

template <int m, int n>
METATE_DEVICE void clear(float (&d)[m][n][4]) {
    METATE_UNROLL
    for (int i = 0; i < m * n * 4; ++i) d[i / 4 / n][i / 4 % n][i % 4] = 0.f;
}

// The update of this warp's outputs of rows `first` …, in fragments `at` … of them. Thread t of a quad multiplies ranks
// 4·t … 4·t + 3 of sixteen: as in the other sums, their order is free.
template <typename T, int at, int count, int fragments, Kind kind>
METATE_DEVICE void add_update(float (&total)[2][fragments][4], const Product& p, int first, int first_output,
                              int adapter) {
    const LowRank& u = p.update;
    const int adapters = static_cast<int>(u.right.size[0]), rank = static_cast<int>(u.right.size[2]);
    const int t = lane() & 3, first_row = first + at * 8;
    const float scaling = load_global<float>(static_cast<const float*>(u.scaling.data) + adapter * u.scaling.stride[0]);
    float sum[2][count][4];
    clear(sum);
    METATE_NO_UNROLL
    for (int r = 4 * t; r < rank + 4 * t; r += 16) {
        uint32_t left[2][4];
        METATE_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int output = first_output + output_of<kind>(i);
            uint32_t pairs[2] = {};
            if (output < p.outputs) {
                const int64_t line = adapter * u.right.stride[0] + place_of(p, output) * u.right.stride[1];
                load_four<T>(pairs, u.right.data, u.right.dtype, line, u.right.stride[2], r, rank, 1.f);
            }
            left[i / 2][i % 2] = pairs[0];
            left[i / 2][i % 2 + 2] = pairs[1];
        }
        METATE_UNROLL
        for (int j = 0; j < count; ++j) {
            const int row = first_row + j * 8 + (lane() >> 2);
            uint32_t right[2] = {};
            if (row < p.x_rows)
                load_four<T>(right, u.low.data, u.low.dtype, row * u.low.stride[0], u.low.stride[1], r, rank, scaling);
            METATE_UNROLL
            for (int i = 0; i < 2; ++i) mma_m16n8k16<T>(sum[i][j], left[i], right);
        }
    }
    METATE_UNROLL
    for (int j = 0; j < 2 * count; ++j) {
        const int row = first_row + j / 2 * 8 + t * 2 + j % 2;
        const bool own = row < p.x_rows && adapter_of(u.ids, adapters, row) == adapter;
        METATE_UNROLL
        for (int r = 0; r < 4; ++r)
            if (own) total[r / 2][at + j / 2][r % 2 * 2 + j % 2] += sum[r / 2][j / 2][r % 2 * 2 + j % 2];
    }
}

// The update of all rows, in parts small enough for the registers that the totals leave.
template <typename T, int fragments, Kind kind, int at = 0>
METATE_DEVICE void add_low_rank(float (&total)[2][fragments][4], const Product& p, int first, int first_output) {
    constexpr int count = fragments < 2 ? fragments : 2;
    const int rows = least(count * 8, p.x_rows - first - at * 8);
    METATE_NO_UNROLL
    for (int adapter = -1;;) {
        adapter = next_adapter(p.update.ids, static_cast<int>(p.update.right.size[0]), first + at * 8, rows, adapter);
        if (adapter == no_adapter) break;
        add_update<T, at, count, fragments, kind>(total, p, first, first_output, adapter);
    }
    if constexpr (at + count < fragments) add_low_rank<T, fragments, kind, at + count>(total, p, first, first_output);
}

// What this warp's outputs from `first_output` on sum up over the steps begin … end - 1, for rows that source names.
template <typename T, int fragments, Kind kind, typename Source>
METATE_DEVICE void sum_steps(float (&total)[2][fragments][4], const Product& p, unsigned char* shared,
                             const Source& source, int first_output, int begin, int end) {
    constexpr int rows = fragments * 8, stages = stages_of(kind, rows);
    const Weight& w = p.w;
    const int bits = is_dense(kind) ? 16 : kind == Kind::direct ? 4 : w.bits, bytes = stage_bytes(bits, rows);
    unsigned char* const weights = shared + stages * bytes;
    unsigned char* const entries = weights + (kind == Kind::direct ? 0 : step * pitch);
    const unsigned char* const table = !is_dense(kind) && w.m.codebook ? entries : nullptr;

    const auto row_of = [&](int n) { return is_transposed(kind) ? n * step : first_output; };
    const auto column_of = [&](int n) { return is_transposed(kind) ? first_output : n * step; };
    const auto load = [&](int n) {
        if (n < end) {
            unsigned char* const stage = shared + (n - begin) % stages * bytes;
            if constexpr (is_dense(kind)) {
                load_weights<is_transposed(kind)>(stage, w, row_of(n), column_of(n));
            } else {
                load_codes(stage, w, bits, row_of(n), column_of(n));
            }
            load_x<rows>(stage + bits * step * step / 8, p, source, n * step);
        }
        cp_async_commit();
    };
    METATE_UNROLL
    for (int n = 0; n < stages - 1; ++n) load(begin + n);
    if (table) {
        for (int i = thread_index(); i < 1 << bits; i += threads) {
            const auto* const from = static_cast<const float*>(w.m.codebook.data) + i * w.m.codebook.stride[0];
            store_shared(entries + i * 4, load_global<float>(from));
        }
    }

    float sum[2][fragments][4];
    clear(sum);
    clear(total);
    METATE_NO_UNROLL
    for (int n = begin; n < end; ++n) {
        RawLevels<4> raw{};
        Levels<4> levels;
        if constexpr (kind == Kind::direct) {
            const int group = (n * step + (lane() & 3) * 32) / w.group_size;
            const int row = opaque(first_output + output_of<kind>(0));  // else twenty addresses live across the loop
            load_levels(raw, w, row, group);
        }
        cp_async_wait<stages - 2>();
        sync_threads();
        load(n + stages - 1);
        const unsigned char *const codes = shared + (n - begin) % stages * bytes, *tile = codes;
        if constexpr (kind == Kind::direct) {
            make_levels(levels, w, raw);
        } else if constexpr (!is_dense(kind)) {
            stage_weights<T, is_transposed(kind)>(weights, codes, w, row_of(n), column_of(n), table);
            sync_threads();
            tile = weights;
        }
        const unsigned char* const x = codes + bits * step * step / 8;
        if constexpr (is_dense(kind)) {
            multiply_step<T, fragments, kind>(total, x, tile, levels, table);
        } else {
            multiply_step<T, fragments, kind>(sum, x, tile, levels, table);
            if ((n + 1) % p.slice_steps != 0 && n + 1 != end) continue;
            METATE_UNROLL
            for (int i = 0; i < 8 * fragments; ++i)
                total[i / 4 / fragments][i / 4 % fragments][i % 4] += sum[i / 4 / fragments][i / 4 % fragments][i % 4];
            clear(sum);
        }
    }
    cp_async_wait<0>();
}

template <typename T, int fragments, Kind kind>
METATE_KERNEL(threads, fragments == 1 ? 5 : 2)
product_kernel(METATE_PARAMETER(Product, p)) {
    METATE_SHARED(unsigned char, shared);
    const int first = block_index().x % p.x_tiles * fragments * 8, first_output = block_index().x / p.x_tiles * step;
    const int begin = p.partial ? block_index().z * p.slice_steps : 0;
    const int end = p.partial ? least(begin + p.slice_steps, p.steps) : p.steps;
    const auto source = [&](int row) { return first + row < p.x_rows ? first + row : -1; };
    float total[2][fragments][4];
    sum_steps<T, fragments, kind>(total, p, shared, source, first_output, begin, end);
    if (p.update.low && (!p.partial || begin >= p.steps))
        add_low_rank<T, fragments, kind>(total, p, first, first_output);
    write<T, fragments, kind>(p, total, first, first_output);
}

}  // namespace metate::cuda::lowbit
