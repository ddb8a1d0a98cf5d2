// Tiles of a paged cache in shared memory, as they lie in global memory: which pages they come from, how they are
// copied, and how 8- and 4-bit codes become fragments of the tensor cores on the way to the registers.
#pragma once

#include "problem.h"

namespace metate::cuda::paged {

enum class Format : int { plain, int8, float8, int4 };

// One head of k or v. `bytes`: of a row; `vectors`: rows can be read 16 bytes at a time.
struct Cache {
    View<4> view;
    View<3> scale;
    Format format;
    int bytes;
    bool vectors;
};

struct Place {
    int page, row;
};

// Where key j lies. A page number that lies is cut to the cache.
METATE_DEVICE Place place_of(const Problem& p, const Span& s, int j) {
    const View<2>& v = p.a.block_table;
    const int nth = p.by_page(j);
    const auto* const entry = static_cast<const int32_t*>(v.data) + s.sequence * v.stride[0] + nth * v.stride[1];
    return {most(0, least(load_global<int>(entry), p.pages - 1)), j - nth * p.page_size};
}

// Rows of `pitch` bytes in chunks of 16. A line of 128 bytes holds part of a row, or several rows; chunks are permuted
// within it by the row's number, so that reading one chunk of eight consecutive rows, or two of every other, meets no
// bank twice.
template <int pitch>
struct ByteTile {
    static constexpr int chunks = pitch / 16, rows_per_line = pitch < 128 ? 128 / pitch : 1;

    METATE_DEVICE static int offset(int row, int chunk) {
        const int slot = row % rows_per_line * chunks + chunk;
        return row / rows_per_line * pitch * rows_per_line + ((slot ^ (row & 7)) << 4);
    }

    // From the offset of a chunk to one `chunk` chunks further on, whose numbers have no bit in common, and `rows`
    // rows, a multiple of 8, down.
    METATE_DEVICE static int advance(int offset, int chunk, int rows) {
        return (offset ^ ((chunk & 7) << 4)) + (chunk & ~7) * 16 + rows * pitch;
    }
};

// Bytes of a tile's row of `columns` columns: a part of a line of 128 bytes, or whole lines.
METATE_INLINE constexpr int pitch_of(Format format, int columns) {
    const int bytes = format == Format::plain ? columns * 2 : format == Format::int4 ? columns / 2 : columns;
    return bytes <= 128 ? bytes : (bytes + 127) / 128 * 128;
}

// The pages of the rows that a thread copies: rows row, row + at_once, … of a tile.
template <int step, int pitch, int threads>
struct Copy {
    using Tile = ByteTile<pitch>;
    static constexpr int across = Tile::chunks < 8 ? Tile::chunks : 8;
    static constexpr int at_once = threads / across, rows = at_once < step ? step / at_once : 1;
    static_assert(step % at_once == 0 || at_once > step);

    // Page numbers for keys from `first` on, those in [low, high) only.
    METATE_DEVICE static void find(int (&pages)[rows], const Problem& p, const Span& s, int first, int low, int high) {
        METATE_UNROLL
        for (int i = 0; i < rows; ++i) {
            const int j = first + thread_index() / across + i * at_once;
            pages[i] = j >= low && j < high ? place_of(p, s, j).page : 0;
        }
    }

    // Starts copying keys first … first + step - 1 of a head; rows outside [low, high) become 0.
    METATE_DEVICE static void start(unsigned char* tile, const Cache& c, const int (&pages)[rows], const Problem& p,
                                    const Span& s, int first, int low, int high) {
        if (!c.vectors) return copy_elements(tile, c, p, s, first, low, high);
        const int element = c.format == Format::plain ? 2 : 1;
        const int thread = opaque(thread_index()), top = thread / across, chunk = thread % across;
        const unsigned char* const head =
            static_cast<const unsigned char*>(c.view.data) + s.kv_head * c.view.stride[2] * element + chunk * 16;
        const int to = Tile::offset(top, chunk);
        METATE_UNROLL
        for (int i = 0; i < rows; ++i) {
            const int r = top + i * at_once, j = first + r;
            if (at_once > step && r >= step) break;
            const bool inside = j >= low && j < high;
            const int in_page = inside ? j - p.by_page(j) * p.page_size : 0;
            const unsigned char* const source =
                head + (pages[i] * c.view.stride[0] + in_page * c.view.stride[1]) * element;
            METATE_UNROLL
            for (int n = 0; n < Tile::chunks; n += across) {
                const int valid = inside ? most(0, least(16, c.bytes - (n + chunk) * 16)) : 0;
                cp_async_16(tile + Tile::advance(to, n, i * at_once), valid > 0 ? source + n * 16 : head, valid);
            }
        }
    }

    // The same in steps of an element, where rows are not made of whole vectors.
    METATE_DEVICE static void copy_elements(unsigned char* tile, const Cache& c, const Problem& p, const Span& s,
                                            int first, int low, int high) {
        const int element = c.format == Format::plain ? 2 : 1;
        METATE_NO_UNROLL
        for (int index = thread_index(); index < step * pitch / 4; index += threads) {
            const int r = index / (pitch / 4), word = index % (pitch / 4), j = first + r;
            uint32_t packed = 0;
            if (j >= low && j < high) {
                const Place place = place_of(p, s, j);
                const int64_t row =
                    place.page * c.view.stride[0] + place.row * c.view.stride[1] + s.kv_head * c.view.stride[2];
                METATE_NO_UNROLL
                for (int at = word * 4; at < least(word * 4 + 4, c.bytes); at += element) {
                    const auto* const from = static_cast<const unsigned char*>(c.view.data) +
                                             (row + at / element * c.view.stride[3]) * element;
                    const uint32_t x = element == 2 ? load_global<uint16_t>(from) : load_global<uint8_t>(from);
                    packed |= x << (at % 4 * 8);
                }
            }
            store_shared(tile + Tile::offset(r, word / 4) + word % 4 * 4, packed);
        }
    }
};

// The scale of key j for a cache of codes; 1 without scales, 0 for keys that are not there.
METATE_DEVICE float scale_of(const Cache& c, const Problem& p, const Span& s, int j, int low, int high) {
    if (j < low || j >= high) return 0.f;
    if (!c.scale) return 1.f;
    const Place place = place_of(p, s, j);
    const int64_t at = place.page * c.scale.stride[0] + place.row * c.scale.stride[1] + s.kv_head * c.scale.stride[2];
    return load_global<float>(static_cast<const float*>(c.scale.data) + at);
}

// The numbers of a word of four or eight codes. 2^23 + n is n in the last bits of a float.
template <Format format>
METATE_DEVICE void decode(float (&values)[format == Format::int4 ? 8 : 4], uint32_t word) {
    constexpr uint32_t magic = 0x4b000000u;
    METATE_UNROLL
    for (int i = 0; i < (format == Format::int4 ? 8 : 4); ++i) {
        if constexpr (format == Format::int4) {
            values[i] = float_of((word >> (4 * i) & 0xfu) | magic) - 8388616.f;
        } else if constexpr (format == Format::int8) {
            values[i] = float_of(((word ^ 0x80808080u) >> (8 * i) & 0xffu) | magic) - 8388736.f;
        } else {
            // e4m3 in the bits of a float is 2^-120 of itself; only its NaN must be looked for.
            const uint32_t byte = word >> (8 * i), size = byte & 0x7fu;
            const float x = float_of(size << 20 | (byte & 0x80u) << 24) * 0x1p120f;
            values[i] = size == 0x7fu ? float_of(0x7fc00000u) : x;
        }
    }
}

// How columns of codes are dealt to a product's summed dimension, so that a thread's word is what it needs: the place
// of a pair of columns among the pairs of its 16 (or, of 4-bit codes, 32) columns.
METATE_DEVICE int pair_place(Format format, int pair) {
    switch (format) {
        case Format::plain:
            return pair;
        case Format::int4:
            return (pair & ~15) + (pair >> 1 & 1) * 8 + (pair & 1) * 4 + (pair >> 2 & 3);
        default:
            return (pair & ~7) + (pair & 1) * 4 + (pair >> 1 & 3);
    }
}

// s += a · kᵀ for 16 rows of queries, whose columns are placed by pair_place, and 8·n keys from `first` on.
template <typename T, Format format, int columns, int n>
METATE_DEVICE void multiply_keys(float (&s)[1][n][4], const unsigned char* a, const unsigned char* k, int first) {
    constexpr int deep = format == Format::int4 ? 2 : 1;  // steps of 16 columns that a word serves
    using Tile = ByteTile<pitch_of(format, columns)>;
    using Rows = ByteTile<columns * 2>;
    const int l = lane(), a_offset = opaque(Rows::offset(l & 15, l >> 4));
    const int k_offset = opaque(format == Format::plain ? Tile::offset(first + (l & 7) + (l >> 4) * 8, l >> 3 & 1)
                                                        : Tile::offset(first + (l >> 2), 0) + (l & 3) * 4);
    const auto multiply = [&](int c) {
        uint32_t rows[deep][4];
        METATE_UNROLL
        for (int d = 0; d < deep; ++d) ldmatrix_x4(rows[d], a + Rows::advance(a_offset, (c * deep + d) * 2, 0));
        METATE_UNROLL
        for (int j = 0; j < n; ++j) {
            if constexpr (format == Format::plain) {
                if (j % 2 != 0) continue;
                uint32_t pair[4];
                ldmatrix_x4(pair, k + Tile::advance(k_offset, c * 2, j * 8));
                mma_m16n8k16<T>(s[0][j], rows[0], {pair[0], pair[1]});
                mma_m16n8k16<T>(s[0][j + 1], rows[0], {pair[2], pair[3]});
            } else {
                float x[4 * deep];
                decode<format>(x, load_shared<uint32_t>(k + Tile::advance(k_offset, c, j * 8)));
                METATE_UNROLL
                for (int d = 0; d < deep; ++d) {
                    mma_m16n8k16<T>(s[0][j], rows[d],
                                    {pack<T>(x[4 * d], x[4 * d + 1]), pack<T>(x[4 * d + 2], x[4 * d + 3])});
                }
            }
        }
    };
    if constexpr (format == Format::plain) {
        METATE_UNROLL
        for (int c = 0; c < columns / 16; ++c) multiply(c);
    } else {
        METATE_NO_UNROLL
        for (int c = 0; c < columns / 16 / deep; c += 2) multiply(c), multiply(c + 1);
    }
}

// The column of an output's fragment (tile of 8 columns, place there): codes deal them out as a thread's words come.
METATE_DEVICE int output_column(Format format, int tile, int place) {
    switch (format) {
        case Format::plain:
            return tile * 8 + place;
        case Format::int4:
            return tile / 8 * 64 + place * 8 + tile % 8;
        default:
            return tile / 4 * 32 + place * 4 + tile % 4;
    }
}

// o += a · v for 16·k keys from `first` on and 8·n columns from `column` on. `scales`: what the codes of each key
// count.
template <typename T, Format format, int columns, int m, int n, int k>
METATE_DEVICE void multiply_values(float (&o)[m][n][4], const uint32_t (&a)[m][k][4], const unsigned char* v,
                                   const unsigned char* scales, int first, int column) {
    const int l = lane();
    using Tile = ByteTile<pitch_of(format, columns)>;
    if constexpr (format == Format::plain) {
        const int offset = opaque(Tile::offset(first + (l & 15), column / 8 + (l >> 4)));
        METATE_UNROLL
        for (int step = 0; step < k * n / 2; ++step) {
            const int kk = step / (n / 2), j = step % (n / 2) * 2;
            uint32_t pair[4];
            ldmatrix_x4_trans(pair, v + Tile::advance(offset, j, kk * 16));
            METATE_UNROLL
            for (int i = 0; i < m; ++i) {
                mma_m16n8k16<T>(o[i][j], a[i][kk], {pair[0], pair[1]});
                mma_m16n8k16<T>(o[i][j + 1], a[i][kk], {pair[2], pair[3]});
            }
        }
    } else {
        constexpr int codes = format == Format::int4 ? 8 : 4;
        const int key = first + (l & 3) * 2, chunk = column / (4 * codes) + (l >> 4);
        const int even = opaque(Tile::offset(key, chunk) + (l >> 2 & 3) * 4);
        const int odd = opaque(Tile::offset(key + 1, chunk) + (l >> 2 & 3) * 4);
        METATE_UNROLL
        for (int kk = 0; kk < k; ++kk) {
            float scale[4];
            METATE_UNROLL
            for (int i = 0; i < 4; ++i) {
                scale[i] = load_shared<float>(scales + (key + kk * 16 + i / 2 * 8 + i % 2) * 4);
            }
            METATE_UNROLL
            for (int c = 0; c < n / codes; ++c) {
                float x[4][codes];
                METATE_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int offset = Tile::advance(i % 2 ? odd : even, c * 2, kk * 16 + i / 2 * 8);
                    decode<format>(x[i], load_shared<uint32_t>(v + offset));
                }
                METATE_UNROLL
                for (int e = 0; e < codes; ++e) {
                    const uint32_t pair[2] = {pack<T>(x[0][e] * scale[0], x[1][e] * scale[1]),
                                              pack<T>(x[2][e] * scale[2], x[3][e] * scale[3])};
                    METATE_UNROLL
                    for (int i = 0; i < m; ++i) mma_m16n8k16<T>(o[i][c * codes + e], a[i][kk], pair);
                }
            }
        }
    }
}

// One element of v as a product takes it.
template <typename T, Format format, int columns>
METATE_DEVICE float value_at(const unsigned char* v, const unsigned char* scales, int key, int column) {
    using Tile = ByteTile<pitch_of(format, columns)>;
    if constexpr (format == Format::plain) {
        return to_float(load_shared<T>(v + Tile::offset(key, column / 8) + column % 8 * 2));
    } else {
        constexpr int per_byte = format == Format::int4 ? 2 : 1, per_chunk = 16 * per_byte;
        const int offset = Tile::offset(key, column / per_chunk);
        uint32_t code = load_shared<uint8_t>(v + offset + column % per_chunk / per_byte);
        if (per_byte == 2) code >>= column % 2 * 4;
        float x[format == Format::int4 ? 8 : 4];
        decode<format>(x, code);
        return to_float(from_float<T>(x[0] * load_shared<float>(scales + key * 4)));
    }
}

// Whether some of `count` keys have a value that is not a number: looked for by all threads, each at a part.
template <typename T, Format format, int columns, int count, int threads>
METATE_DEVICE bool any_unsound(const unsigned char* v, const unsigned char* scales) {
    bool found = false;
    if constexpr (format != Format::plain) {
        for (int key = thread_index(); key < count; key += threads) {
            const float scale = load_shared<float>(scales + key * 4);
            found |= scale - scale != 0.f;
        }
    }
    if constexpr (format == Format::plain || format == Format::float8) {
        constexpr int bytes = count * pitch_of(format, columns);
        METATE_NO_UNROLL
        for (int index = thread_index(); index < bytes / 16; index += threads) {
            const auto words = load_shared<Words<4>>(v + index * 16);
            METATE_UNROLL
            for (int w = 0; w < 4; ++w) {
                if constexpr (format == Format::plain) {
                    found |= flash::nonfinite<T>(words[w]) != 0;
                } else {
                    found |= (((words[w] & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) != 0;
                }
            }
        }
    }
    return found;
}

// multiply_values, element by element: what is not a number reaches only the rows that give its key a weight.
template <typename T, Format format, int columns, int k>
METATE_DEVICE void multiply_unsound_values(float (&o)[1][columns / 8][4], const uint32_t (&a)[1][k][4],
                                           const unsigned char* v, const unsigned char* scales, int first) {
    const int l = lane();
    METATE_NO_UNROLL
    for (int j = 0; j < columns / 4; ++j) {
        const int column = output_column(format, j / 2, (l & 3) * 2 + j % 2);
        float sum[2] = {};
        METATE_NO_UNROLL
        for (int key = 0; key < k * 16; ++key) {
            uint32_t pair[2] = {};
            METATE_UNROLL
            for (int i = 0; i < 4 * k; ++i) {  // registers have no index
                if (i / 2 == key / 8) pair[i % 2] = a[0][i / 4][i % 4];
            }
            const float x = value_at<T, format, columns>(v, scales, first + key, column);
            METATE_UNROLL
            for (int r = 0; r < 2; ++r) {
                const uint32_t bits = shuffle(pair[r], (l & ~3) | key % 8 / 2);
                const float weight = key % 2 ? high<T>(bits) : low<T>(bits);
                if (weight != 0.f) sum[r] += weight * x;
            }
        }
        METATE_UNROLL
        for (int e = 0; e < columns / 2; ++e) {
            if (e / 4 * 2 + e % 2 == j) o[0][e / 4][e % 4] += sum[e % 4 / 2];
        }
    }
}

}  // namespace metate::cuda::paged
