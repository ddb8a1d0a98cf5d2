// Interleaved codes of 4 and 8 bits, looked up with byte and word shuffles in tables of rounded-down bytes: a lower
// bound of every key, for little. Rows whose bound does not exceed the worst of the best are summed exactly.
//
// An entry becomes ⌊(key - least key of its table) · inverse⌋, clipped to 255. With 4 bits, sums are clipped bytes and
// `inverse` makes 254 of what the limit leaves above the sum of least keys, so that a clipped sum is one too large.
// With 8 bits, sums are words and an entry is a share of the widest table. The limit is first raised by what float32
// sums may be off.
#pragma once

#include "scan.h"

namespace metate::cpu::METATE_ISA {
namespace {

#if defined(METATE_HAS_BYTE_SHUFFLES)

#if defined(METATE_HAS_WORD_SHUFFLES)
constexpr int most_filtered_bits = 8;
#else
constexpr int most_filtered_bits = 4;
#endif
constexpr int64_t most_columns_4 = 64;   // more, and a byte is too coarse a sum
constexpr int64_t most_columns_8 = 256;  // more, and a word is too small for one
constexpr int64_t chunk_rows = 4096;     // between two looks at the limit

// What a worker keeps of the query that it scans.
struct Filter {
    int64_t query;     // -1: of none yet
    float* least;      // of each table, the least key
    double base;       // their sum
    double size;       // the sum of the largest magnitudes
    double range;      // of the widest table
    double inverse;    // of `entries`
    uint8_t* entries;  // rounded tables

    METATE_FN bool usable() const { return base - base == 0.0 && size < 1e37; }
};

template <int bits>
METATE_FN constexpr int64_t padded_columns(int64_t M) {
    return bits == 4 ? (M + width / 4 - 1) / (width / 4) * (width / 4) : M;
}

template <int bits>
METATE_FN Filter* take_filter(Arena& arena, int64_t M) {
    Filter* const f = arena.take<Filter>(1);
    float* const least = arena.take<float>(M);
    uint8_t* const entries = arena.take<uint8_t>(padded_columns<bits>(M) << bits);
    if (f) f->least = least, f->entries = entries;
    return f;
}

void measure(Filter& f, const Scan& scan, int64_t q) {
    const vf sign = splat(scan.call.search.largest ? -1.0f : 1.0f);
    const float* table = scan.table(q);
    f = {q, f.least, 0.0, 0.0, 0.0, 0.0, f.entries};
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

template <int bits>
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
        if constexpr (bits == 4) {
            for (int64_t l = 0; l < 16; l += width, to += width) store_bytes(to, entry(l));
        } else {
#if defined(METATE_HAS_WORD_SHUFFLES)
            for (int64_t l = 0; l < 128; l += width, to += 2 * width)
                store_words(reinterpret_cast<uint16_t*>(to), bit_or(entry(l), shift_left(entry(l + 128), 8)));
#endif
        }
    }
    for (; bits == 4 && to < f.entries + 16 * padded_columns<4>(scan.M); ++to) *to = 0;
}

// Rows whose exact distance is wanted, a few at a time.
template <int bits>
struct Survivors {
    const Scan& scan;
    int64_t q, p;
    Best& best;
    int64_t rows[rows_together];
    int count = 0;

    void flush() {
        const uint8_t* blocks[rows_together];
        int64_t places[rows_together];
        for (int i = 0; i < rows_together; ++i) {
            const int64_t row = rows[i < count ? i : 0];
            blocks[i] = scan.block(row);
            places[i] = row % block_codes;
        }
        float sum[rows_together];
        add_entries(sum, scan, scan.table(q), [&](int i, int64_t m) { return code_in<bits>(blocks[i], places[i], m); });
        const float limit = best.limit();
        for (int i = 0; i < count; ++i) scan.offer(sum[i], rows[i], q, p, limit, best);
        count = 0;
    }
    METATE_FN void add(int64_t row) {
        if (!kept(scan.call.search, row)) return;
        rows[count++] = row;
        if (count == rows_together) flush();
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
template <int bits>
struct Chunk {
    const Scan& scan;
    const Filter& filter;
    const RowTerms& terms;
    int64_t first, last;
    uint16_t most;  // of a sum, with 8 bits
};

// Bit i: row i of the block is first … last.
METATE_FN uint32_t inside(int64_t block, int64_t first, int64_t last) {
    uint32_t rows = ~0u;
    if (first > block) rows &= ~0u << (first - block);
    if (last < block + block_codes) rows &= ~(~0u << (last - block));
    return rows;
}

METATE_FN void scan_chunk(const Chunk<4>& c, Survivors<4>& found) {
    constexpr int at_once = width / 4;
    const vi halves = splat(0x0f0f0f0f);
    const int64_t M = c.scan.M, whole = M / at_once * at_once;
    uint8_t terms[2 * block_codes] = {};
    const float inverse = static_cast<float>(c.filter.inverse * (1 - 0x1p-18));
    for (int64_t row = c.first / block_codes * block_codes; row < c.last; row += block_codes) {
        const uint8_t* const block = c.scan.block(row);
        vi low = splat(0), high = splat(0);
        const auto add = [&](int64_t m, int64_t bytes) __attribute__((always_inline)) {
            const vi codes = load_bytes(block + 16 * m, bytes), table = load_bytes(c.filter.entries + 16 * m, 64);
            low = add_clipped_bytes(low, lookup_bytes(table, bit_and(codes, halves)));
            high = add_clipped_bytes(high, lookup_bytes(table, bit_and(shift_right_words(codes, 4), halves)));
        };
#pragma GCC unroll 4
        for (int64_t m = 0; m < whole; m += at_once) add(m, 64);
        if (whole < M) add(whole, 16 * (M - whole));
        if (c.terms.bias) {
            const int64_t begin = row < c.first ? c.first - row : 0;
            round_terms(terms + begin, c.terms, row + begin, c.last, block_codes - begin, inverse);
        }
        uint32_t near = below_clip(fold_clipped_bytes(low, high), terms);
        if (__builtin_expect(near != 0, 0)) {
            near &= inside(row, c.first, c.last);
            for (; near; near &= near - 1) found.add(row + __builtin_ctz(near));
        }
    }
}

#if defined(METATE_HAS_WORD_SHUFFLES)
METATE_FN void scan_chunk(const Chunk<8>& c, Survivors<8>& found) {
    constexpr int64_t together = 2 * block_codes;
    const float inverse = static_cast<float>(c.filter.inverse * (1 - 0x1p-18));
    const int64_t M = c.scan.M;
    for (int64_t row = c.first / block_codes * block_codes; row < c.last; row += together) {
        const uint8_t* const block = c.scan.block(row);
        const uint8_t* const next = row + block_codes < c.last ? block + M * block_codes : block;
        vi even = splat(0), odd = splat(0);
        for (int64_t m = 0; m < M; ++m) {
            const vi codes = load_halves(block + m * block_codes, next + m * block_codes);
            Table256 table;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) table.words[i] = load_bytes(c.filter.entries + 256 * m + 64 * i, 64);
            even = add_words(even, lookup_words(table, codes, shift_left_words(codes, 8)));
            odd = add_words(odd, lookup_words(table, shift_right_words(codes, 8), codes));
        }
        if (c.terms.bias) {
            const int64_t begin = row < c.first ? c.first - row : 0;
            uint16_t terms[2 * together] = {};
            round_terms(terms + begin, c.terms, row + begin, c.last, together - begin, inverse);
            even = add_clipped_words(even, load_every_other(terms, 0));
            odd = add_clipped_words(odd, load_every_other(terms, 1));
        }
        uint64_t near = at_most(even, odd, c.most);
        if (__builtin_expect(near != 0, 0)) {
            const uint64_t second = row + block_codes < c.last ? inside(row + block_codes, c.first, c.last) : 0;
            near &= second << 32 | inside(row, c.first, c.last);
            for (; near; near &= near - 1) found.add(row + __builtin_ctzll(near));
        }
    }
}
#endif

template <int bits>
void scan_filtered(const Scan& scan, Filter& f, int64_t q, int64_t p, Span span, Best& best) {
    if (f.query != q) measure(f, scan, q);
    if (!f.usable() || scan.M > (bits == 4 ? most_columns_4 : most_columns_8))
        return scan_blocks<bits>(scan, q, p, span, best);
    const double sign = scan.call.search.largest ? -1.0 : 1.0;
    const double bias = scan.call.bias ? sign * static_cast<double>(scan.bias(q, p)) : 0.0;
    Survivors<bits> found{scan, q, p, best, {}};
    for (int64_t length = 4 * block_codes; span.first < span.last; length = smaller(4 * length, chunk_rows)) {
        const int64_t end = smaller(span.last, (span.first + length) / block_codes * block_codes);
        if (best.limit() == infinity) {  // until the best are as many as are wanted
            scan_blocks<bits>(scan, q, p, {span.first, end}, best);
            span.first = end;
            continue;
        }
        const RowTerms terms = terms_of(scan, span.first, end);
        const double base = f.base + bias + static_cast<double>(terms.least);
        const double size = f.size + __builtin_fabs(bias) + static_cast<double>(terms.size);
        const double limit = static_cast<double>(best.limit());
        const double room = limit + static_cast<double>(scan.M + 4) * 0x1p-23 * (size + __builtin_fabs(limit)) - base;
        if (!(room - room == 0.0)) {
            scan_blocks<bits>(scan, q, p, {span.first, end}, best);
        } else if (room >= 0.0) {
            const double widest = bits == 4 || f.range > room ? room : f.range;
            const double inverse = (bits == 4 ? 254.0 : 255.0) / (widest > 1e-30 ? widest : 1e-30);
            if (bits == 4 ? f.inverse != inverse : f.inverse * 1.5 < inverse || f.inverse > 1.5 * inverse)
                round_tables<bits>(f, scan, inverse);
            const double most = room * f.inverse;
            scan_chunk(
                Chunk<bits>{scan, f, terms, span.first, end, static_cast<uint16_t>(most < 65535.0 ? most : 65535.0)},
                found);
            if (found.count) found.flush();
        }
        span.first = end;
    }
}

#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
