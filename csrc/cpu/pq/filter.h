// Interleaved codes of 4 and 8 bits, looked up with byte and word shuffles in tables of rounded-down bytes: a lower
// bound of every key, for little. Rows whose bound does not exceed the worst of the best are summed exactly.
//
// An entry becomes ⌊(key - least key of its table) · inverse⌋, clipped to 255. Sums are clipped bytes where few columns
// make these fine enough: `inverse` makes at most 254 of what the limit leaves above the sum of least keys, so that a
// clipped sum is one too large. Else sums are words and an entry is a share of the widest table. The limit is first
// raised by what float32 sums may be off.
#pragma once

#include "scan.h"

namespace metate::cpu::METATE_ISA {
namespace {

#if defined(METATE_HAS_BYTE_SHUFFLES)

// Codes of 4 bits, and codes of 8 bits with sums of bytes or of words.
enum class Form { nibbles, bytes, words };
template <Form form>
constexpr int bits_in = form == Form::nibbles ? 4 : 8;
// More columns, and a byte is too coarse a sum, or a word too small for one.
template <Form form>
constexpr int64_t most_columns = form == Form::words ? 256 : 64;
constexpr int64_t chunk_rows = 4096;  // between two looks at the limit

// What a worker keeps of the query that it scans.
struct Filter {
    int64_t query;     // -1: of none yet
    float* least;      // of each table, the least key
    double base;       // their sum
    double size;       // the sum of the largest magnitudes
    double range;      // of the widest table
    double inverse;    // of `entries`
    uint16_t most;     // of a sum
    uint8_t* entries;  // rounded tables

    METATE_FN bool usable() const { return base - base == 0.0 && size < 1e37; }
};

template <Form form>
METATE_FN constexpr int64_t bytes_of_tables(int64_t M) {
    return form == Form::nibbles ? round_up(M, width / 4) * 16 : M * 256;
}

constexpr int filters_together = 4;       // queries that share the reading of codes
constexpr int64_t filter_room = 1 << 20;  // bytes of a worker's filters

// A filter for each of Q queries, that none is measured twice, or where they are many for each of a turn.
template <Form form>
METATE_FN int64_t kept_filters(int64_t M, int64_t Q) {
    return Q * bytes_of_tables<form>(M) <= filter_room && Q > filters_together ? Q : filters_together;
}

template <Form form>
METATE_FN Filter* take_filters(Arena& arena, int64_t M, int64_t count) {
    Filter* const filters = arena.take<Filter>(count);
    for (int64_t i = 0; i < count; ++i) {
        float* const least = arena.take<float>(M);
        uint8_t* const entries = arena.take<uint8_t>(bytes_of_tables<form>(M));
        if (filters) filters[i].least = least, filters[i].entries = entries;
    }
    return filters;
}

void measure(Filter& f, const Scan& scan, int64_t q) {
    const vf sign = splat(scan.call.search.largest ? -1.0f : 1.0f);
    const float* table = scan.table(q);
    f = {q, f.least, 0.0, 0.0, 0.0, 0.0, 0, f.entries};
    for (int64_t m = 0; m < scan.M; ++m, table += scan.L) {
        vf low = load(table) * sign, high = low;
        bool numbers = true;
        for (int64_t l = 0; l < scan.L; l += width) {
            const vf key = load(table + l) * sign;
            low = min(key, low);
            high = max(key, high);
            numbers &= bits_of(is_nan(key)) == 0;
        }
        const double least = -static_cast<double>(largest(splat(0.0f) - low)), most = largest(high);
        f.least[m] = static_cast<float>(least);
        f.base += numbers ? least : static_cast<double>(infinity);
        f.size += most > -least ? most : -least;
        f.range = most - least > f.range ? most - least : f.range;
    }
}

METATE_FN vi rounded_down(vf key, vf least, vf inverse, float most) {
    const vf steps = fma(key - least, inverse, splat(-0.5f));
    return to_int(min(max(splat(0.0f), steps), splat(most)));
}

template <Form form>
void round_tables(Filter& f, const Scan& scan, double inverse) {
    const float* table = scan.table(f.query);
    const vf sign = splat(scan.call.search.largest ? -1.0f : 1.0f);
    const vf factor = splat(static_cast<float>(inverse * (1 - 0x1p-18)));
    f.inverse = inverse;
    uint8_t* to = f.entries;
    for (int64_t m = 0; m < scan.M; ++m, table += scan.L) {
        const vf least = splat(f.least[m]);
        const auto entry = [&](int64_t l) __attribute__((always_inline)) {
            return rounded_down(load(table + l) * sign, least, factor, 255.0f);
        };
        if constexpr (form != Form::words) {
            for (int64_t l = 0; l < scan.L; l += width, to += width) store_bytes(to, entry(l));
        } else {
#if defined(METATE_HAS_WORD_SHUFFLES)
            for (int64_t l = 0; l < 128; l += width, to += 2 * width)
                store_words(reinterpret_cast<uint16_t*>(to), bit_or(entry(l), shift_left(entry(l + 128), 8)));
#endif
        }
    }
    for (uint8_t* const end = f.entries + bytes_of_tables<form>(scan.M); to < end; ++to) *to = 0;
}

// Sums the rows that a filter leaves, some at a time, and offers them. Codes of 4 bits are copied as rows come, while
// they are in the nearest cache: row after row has a lane in the vector of each number.
template <int bits>
struct Survivors {
    static constexpr int together = bits == 4 ? width : rows_together;

    const Scan* scan;
    Asked asked;
    Best* best;
    int count;
    uint32_t upper;  // of 4 bits: which rows have the upper half of their byte
    int64_t rows[together];
    uint8_t codes[bits == 4 ? most_columns<Form::nibbles> : 1][together];

    METATE_FN void begin(const Scan& of, Asked by, Best& found) {
        scan = &of, asked = by, best = &found, count = 0, upper = 0;
    }
    METATE_FN void sum_rows(float (&sum)[together]) const {
        const float* const table = scan->table(asked.q);
        if constexpr (bits == 4) {
            vf all = splat(0.0f);
            const vm in_upper = mask_of(upper);
            for (int64_t m = 0; m < scan->M; ++m) {
                const vi both = load_wide(codes[m], width);
                all = all + lookup(table16(table + 16 * m), select(in_upper, shift_right(both, 4), both));
            }
            store(sum, all);
        } else {
            const uint8_t* blocks[together];
            int64_t places[together];
            for (int i = 0; i < together; ++i) {
                const int64_t row = rows[i < count ? i : 0];
                blocks[i] = scan->block(row);
                places[i] = row % block_codes;
            }
            add_entries(sum, *scan, table, [&](int i, int64_t m) { return code_in<bits>(blocks[i], places[i], m); });
        }
    }
    void flush() {
        if (count == 0) return;
        float sum[together];
        sum_rows(sum);
        const float limit = best->limit();
        for (int i = 0; i < count; ++i) scan->offer(sum[i], rows[i], asked, limit, *best);
        count = 0;
    }
    METATE_FN void add(int64_t row) {
        if (!kept(scan->call.search, row)) return;
        if (scan->call.search.ids) __builtin_prefetch(static_cast<const int64_t*>(scan->call.search.ids.data) + row);
        if constexpr (bits == 4) {
            constexpr int64_t half = block_codes / 2;
            const uint8_t* const block = scan->block(row) + row % half;
#pragma GCC unroll 8
            for (int64_t m = 0; m < scan->M; ++m) codes[m][count] = block[m * half];
            upper = (upper & ~(1u << count)) | static_cast<uint32_t>(row % block_codes / half) << count;
        }
        rows[count++] = row;
        if (count == together) flush();
    }
    // Those of a block that `near` has a bit for: of 4 bits, the whole block costs no more than some of its rows.
    METATE_FN void add_block(int64_t row, uint32_t near) {
        constexpr int most = 6;
        if (bits == 4 && __builtin_popcount(near) > most) return offer_block<bits>(*scan, asked, row, near, *best);
        for (; near; near &= near - 1) add(row + __builtin_ctz(near));
    }
    METATE_FN void add_blocks(int64_t row, uint64_t near) {
        if (const auto first = static_cast<uint32_t>(near)) add_block(row, first);
        if (const auto second = static_cast<uint32_t>(near >> 32)) add_block(row + block_codes, second);
    }
};

// The keys that a row adds, of the rows first … last: their least, and the largest magnitude.
struct RowTerms {
    const float* bias;
    float least, size;
    vf sign;
};

METATE_FN RowTerms terms_of(const Scan& scan, int64_t first, int64_t last) {
    RowTerms t{static_cast<const float*>(scan.call.row_bias.data), 0.0f, 0.0f,
               splat(scan.call.search.largest ? -1.0f : 1.0f)};
    if (!t.bias) return t;
    vf low = splat(infinity), most = splat(0.0f);
    for (int64_t i = first; i < last; i += width) {
        const int64_t n = smaller(width, last - i);
        const vf key = (n == width ? load(t.bias + i) : load(t.bias + i, n)) * t.sign;
        low = min(n == width ? key : select(METATE_ISA::first(n), key, splat(infinity)), low);
        most = max(abs(key), most);
    }
    t.least = -largest(splat(0.0f) - low);
    t.size = largest(most);
    return t;
}

// The bytes (words) that `rows` rows add to their sums.
template <class T>
METATE_FN void round_terms(T* to, const RowTerms& t, int64_t row, int64_t last, int64_t rows, float inverse) {
    for (int64_t i = 0; i < rows; i += width) {
        const int64_t n = smaller(width, last - row - i);
        if (n <= 0) break;
        const vf key = load(t.bias + row + i, n) * t.sign;
        const vi steps = rounded_down(key, splat(t.least), splat(inverse), sizeof(T) == 1 ? 255.0f : 65535.0f);
        if constexpr (sizeof(T) == 1) store_bytes(to + i, steps);
#if defined(METATE_HAS_WORD_SHUFFLES)
        else
            store_words(to + i, steps);
#endif
    }
}

// Rows first … last of one range. A chunk begins with the limit that it finds.
struct Chunk {
    const Scan& scan;
    const RowTerms& terms;
    Span rows;

    METATE_FN int64_t begin() const { return rows.first / block_codes * block_codes; }
};

constexpr int64_t lines_ahead = 32;  // of codes that are fetched while others are looked up

// Fetches how a list begins: lists lie anywhere. Those of 8 bits are read in pieces of 32 bytes, which no processor
// foresees, and of them it fetches more. To L2: L1 waits for as few lines at once as it has buffers.
template <Form form>
METATE_FN void fetch(const Scan& scan, Span rows) {
    if (rows.first >= rows.last) return;
    constexpr int64_t most = form == Form::nibbles ? 64 : 256;
    const uint8_t* const codes = scan.block(rows.first);
    const int64_t bytes = scan.block(rows.last - 1) - codes + scan.M * scan.call.blocks.size[2];
    for (int64_t i = 0; i < smaller(64 * most, bytes); i += 64) __builtin_prefetch(codes + i, 0, 2);
    const float* const bias = static_cast<const float*>(scan.call.row_bias.data);
    if (bias)
        for (int64_t i = rows.first; i < smaller(rows.last, rows.first + 1024); i += 16)
            __builtin_prefetch(bias + i, 0, 2);
}

METATE_FN float inverse_of(const Filter& f) {
    return static_cast<float>(f.inverse * (1 - 0x1p-18));
}

// Bit i: row i of the two blocks that begin with `row` is one of the chunk's.
METATE_FN uint64_t inside_both(const Chunk& c, int64_t row) {
    const int64_t next = row + block_codes;
    const uint64_t second = next < c.rows.last ? inside(next, c.rows.first, c.rows.last) : 0;
    return second << 32 | inside(row, c.rows.first, c.rows.last);
}

// For `queries` queries: what codes have to be taken apart for is done once.
template <int queries>
METATE_FN void scan_nibbles(const Chunk& c, Filter* const* filters, Survivors<4>* const* found) {
    constexpr int at_once = width / 4, blocks = clip_pairs;
    constexpr int64_t together = blocks * block_codes;
    const vi halves = splat(0x0f0f0f0f);
    const int64_t M = c.scan.M, whole = M / at_once * at_once, last = c.rows.last;
    uint8_t terms[queries][together + block_codes] = {};
    const uint8_t* tables[queries];
    for (int q = 0; q < queries; ++q) tables[q] = filters[q]->entries;
    for (int64_t row = c.begin(); row < last; row += together) {
        const uint8_t* const block = c.scan.block(row);
        const int64_t next = row + block_codes < last ? 16 * M : 0;  // bytes; where no second block is, the first again
        for (int64_t i = 0; i < blocks * M; i += 4) __builtin_prefetch(block + 64 * lines_ahead + 16 * i);
        vi low[queries][blocks], high[queries][blocks];
#pragma GCC unroll 4
        for (int q = 0; q < queries; ++q)
            for (int b = 0; b < blocks; ++b) low[q][b] = high[q][b] = splat(0);
        const auto add = [&](int64_t m, int64_t bytes) __attribute__((always_inline)) {
            vi lower[blocks], upper[blocks];
#pragma GCC unroll 2
            for (int b = 0; b < blocks; ++b) {
                const vi codes = load_bytes(block + b * next + 16 * m, bytes);
                lower[b] = bit_and(codes, halves);
                upper[b] = bit_and(shift_right_words(codes, 4), halves);
            }
#pragma GCC unroll 4
            for (int q = 0; q < queries; ++q) {
                const vi table = load_bytes(tables[q] + 16 * m, 64);
#pragma GCC unroll 2
                for (int b = 0; b < blocks; ++b) {
                    low[q][b] = add_clipped_bytes(low[q][b], lookup_bytes(table, lower[b]));
                    high[q][b] = add_clipped_bytes(high[q][b], lookup_bytes(table, upper[b]));
                }
            }
        };
        for (int64_t m = 0; m < whole; m += at_once) add(m, 64);
        if (whole < M) add(whole, 16 * (M - whole));
        if (c.terms.bias) {
            const int64_t begin = row < c.rows.first ? c.rows.first - row : 0;
            for (int q = 0; q < queries; ++q)
                round_terms(terms[q] + begin, c.terms, row + begin, last, together - begin, inverse_of(*filters[q]));
        }
        uint64_t near[queries], any = 0;
#pragma GCC unroll 4
        for (int q = 0; q < queries; ++q) any |= near[q] = below_clip(low[q], high[q], terms[q]);
        if (__builtin_expect(any == 0, 1)) continue;
        const uint64_t rows = inside_both(c, row);
        for (int q = 0; q < queries; ++q) found[q]->add_blocks(row, near[q] & rows);
    }
}

#if defined(METATE_HAS_WORD_SHUFFLES)
constexpr int byte_vectors = 4;  // pairs of blocks that share the loads of tables

void scan_bytes(const Chunk& c, const Filter& f, Survivors<8>& found) {
    constexpr int64_t pair = 2 * block_codes;
    const int64_t M = c.scan.M, last = c.rows.last, block_bytes = M * block_codes;
    uint8_t terms[byte_vectors * pair + width] = {};
    for (int64_t row = c.begin(); row < last; row += byte_vectors * pair) {
        const uint8_t *first[byte_vectors], *second[byte_vectors];
        const uint8_t* const block = c.scan.block(row);
        const int64_t blocks = ceil_div(last - row, block_codes);
#pragma GCC unroll 4
        for (int v = 0; v < byte_vectors; ++v) {
            first[v] = block + (2 * v < blocks ? 2 * v : 0) * block_bytes;
            second[v] = block + (2 * v + 1 < blocks ? 2 * v + 1 : 0) * block_bytes;
        }
        vi sum[byte_vectors];
#pragma GCC unroll 4
        for (int v = 0; v < byte_vectors; ++v) sum[v] = splat(0);
        for (int64_t m = 0; m < M; ++m) {
            Table256 table;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) table.quarters[i] = load_bytes(f.entries + 256 * m + 64 * i, 64);
#pragma GCC unroll 4
            for (int v = 0; v < byte_vectors; ++v) {
                const vi codes = load_halves(first[v] + m * block_codes, second[v] + m * block_codes);
                __builtin_prefetch(block + (byte_vectors * (M + m) + v) * pair, 0, 2);  // of those that come next
                sum[v] = add_clipped_bytes(sum[v], vbmi_lookup_bytes(table, codes));
            }
        }
        if (c.terms.bias) {
            const int64_t begin = row < c.rows.first ? c.rows.first - row : 0;
            round_terms(terms + begin, c.terms, row + begin, last, byte_vectors * pair - begin, inverse_of(f));
        }
#pragma GCC unroll 4
        for (int v = 0; v < byte_vectors; ++v) {
            if (c.terms.bias) sum[v] = add_clipped_bytes(sum[v], load_bytes(terms + v * pair, 64));
            uint64_t near = bytes_at_most(sum[v], static_cast<uint8_t>(f.most));
            if (__builtin_expect(near == 0, 1) || row + v * pair >= last) continue;
            near &= inside_both(c, row + v * pair);
            for (; near; near &= near - 1) found.add(row + v * pair + __builtin_ctzll(near));
        }
    }
}

void scan_words(const Chunk& c, const Filter& f, Survivors<8>& found) {
    constexpr int64_t together = 2 * block_codes;
    const int64_t M = c.scan.M, last = c.rows.last;
    for (int64_t row = c.begin(); row < last; row += together) {
        const uint8_t* const block = c.scan.block(row);
        const uint8_t* const next = row + block_codes < last ? block + M * block_codes : block;
        vi even = splat(0), odd = splat(0);
        for (int64_t m = 0; m < M; ++m) {
            const vi codes = load_halves(block + m * block_codes, next + m * block_codes);
            __builtin_prefetch(block + 64 * lines_ahead + 2 * m * block_codes);
            Table256 table;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) table.quarters[i] = load_bytes(f.entries + 256 * m + 64 * i, 64);
            even = add_words(even, lookup_words(table, codes, shift_left_words(codes, 8)));
            odd = add_words(odd, lookup_words(table, shift_right_words(codes, 8), codes));
        }
        if (c.terms.bias) {
            const int64_t begin = row < c.rows.first ? c.rows.first - row : 0;
            uint16_t terms[2 * together] = {};
            round_terms(terms + begin, c.terms, row + begin, last, together - begin, inverse_of(f));
            even = add_clipped_words(even, load_every_other(terms, 0));
            odd = add_clipped_words(odd, load_every_other(terms, 1));
        }
        uint64_t near = at_most(even, odd, f.most);
        if (__builtin_expect(near == 0, 1)) continue;
        near &= inside_both(c, row);
        for (; near; near &= near - 1) found.add(row + __builtin_ctzll(near));
    }
}
#endif

template <Form form>
void scan_chunk(const Chunk& c, Filter* const* filters, Survivors<bits_in<form>>* const* found, int queries) {
    if constexpr (form == Form::nibbles) {
        for (; queries >= 4; queries -= 4, filters += 4, found += 4) scan_nibbles<4>(c, filters, found);
        for (; queries >= 2; queries -= 2, filters += 2, found += 2) scan_nibbles<2>(c, filters, found);
        if (queries) scan_nibbles<1>(c, filters, found);
    } else {
#if defined(METATE_HAS_WORD_SHUFFLES)
        constexpr auto scan = form == Form::bytes ? scan_bytes : scan_words;
        for (int i = 0; i < queries; ++i) scan(c, *filters[i], *found[i]);
#endif
    }
}

// Makes a query's filter for a chunk. False: its rows were compared without, or none of them can be near.
template <Form form>
bool filter_helps(const Chunk& c, Filter& f, Asked asked, Best& best) {
    const Scan& scan = c.scan;
    const double sign = scan.call.search.largest ? -1.0 : 1.0, limit = static_cast<double>(best.limit());
    const double bias = scan.call.bias ? sign * static_cast<double>(scan.bias(asked)) : 0.0;
    const double base = f.base + bias + static_cast<double>(c.terms.least);
    const double size = f.size + __builtin_fabs(bias) + static_cast<double>(c.terms.size);
    const double room = limit + static_cast<double>(scan.M + 4) * 0x1p-23 * (size + __builtin_fabs(limit)) - base;
    if (!f.usable() || !(room - room == 0.0)) {  // no limit yet: until the best are as many as are wanted
        const bool first = form == Form::nibbles && f.usable() && size < 1e37 && c.rows.last - c.begin() <= first_rows;
        (first ? scan_first<bits_in<form>> : scan_blocks<bits_in<form>>)(scan, asked, c.rows, best);
        return false;
    }
    if (room < 0.0) return false;
    constexpr bool in_words = form == Form::words;
    const double widest = !in_words || f.range > room ? room : f.range;
    const double inverse = (in_words ? 255.0 : 254.0) / (widest > 1e-30 ? widest : 1e-30);
    // Tables of 256 entries are rounded anew only where that is worth it; clipped bytes must stay above the limit.
    const double coarser = form == Form::nibbles ? 1.0 : 1.5, finer = in_words ? 1.5 : 1.0;
    if (f.inverse * coarser < inverse || f.inverse > finer * inverse) round_tables<form>(f, scan, inverse);
    const double most = room * f.inverse, largest_sum = in_words ? 65535.0 : 254.0;
    f.most = static_cast<uint16_t>(most < largest_sum ? most : largest_sum);
    return true;
}

template <Form form>
void scan_filtered(const Scan& scan, Filter* filters, const Turn& turn) {
    constexpr int bits = bits_in<form>, together = filters_together;
    if (scan.M > most_columns<form>) {
        for (int64_t i = 0; i < turn.count; ++i) scan_blocks<bits>(scan, turn.asked[i], turn.span, turn.best[i]);
        return;
    }
    const bool each = kept_filters<form>(scan.M, scan.call.tables.size[0]) > together;
    const auto filter_of = [&](int64_t i) -> Filter& { return filters[each ? turn.asked[i].q : i]; };
    if (turn.next.first == turn.next.last || filter_of(0).query != turn.asked[0].q) fetch<form>(scan, turn.span);
    fetch<form>(scan, turn.next);
    Survivors<bits> found[together], *near[together];
    Filter* used[together];
    for (int64_t i = 0; i < turn.count; ++i) {
        if (filter_of(i).query != turn.asked[i].q) measure(filter_of(i), scan, turn.asked[i].q);
        found[i].begin(scan, turn.asked[i], turn.best[i]);
    }
    Span rows = turn.span;
    constexpr int64_t begin = form == Form::nibbles ? first_rows : 4 * block_codes;
    int64_t length = turn.best[0].limit() < infinity ? chunk_rows : begin;
    for (; rows.first < turn.span.last; length = smaller(4 * length, chunk_rows)) {
        rows.last = smaller(turn.span.last, (rows.first + length) / block_codes * block_codes);
        const RowTerms terms = terms_of(scan, rows.first, rows.last);
        const Chunk chunk{scan, terms, rows};
        int count = 0;
        for (int64_t i = 0; i < turn.count; ++i)
            if (filter_helps<form>(chunk, filter_of(i), turn.asked[i], turn.best[i]))
                used[count] = &filter_of(i), near[count++] = found + i;
        scan_chunk<form>(chunk, used, near, count);
        for (int i = 0; i < count; ++i) near[i]->flush();
        rows.first = rows.last;
    }
}

#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
