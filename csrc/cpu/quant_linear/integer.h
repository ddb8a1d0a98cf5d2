// Products in whole numbers: x as multiples of a step, cut into digits of 8 bits, times codes as bytes.
//
// A segment is a run of columns that share a group of W and a step of x. Its sums are exact, whatever the instructions
// and the order. They meet their step first, and what a group has gathered in a block its scale: total = fma(sum over
// segments of value · step, scale, total). One digit is a call with int8 activations; three are 16-bit floats, of which
// numbers down to 2^-14 of the segment's largest keep all their bits. Where the numbers of a segment are alike in size,
// the lowest digit would say less than the dtype of x can: it is 0, and blocks of such segments do without it.
#pragma once

#include "decode.h"
#include "product.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Four codes in each lane of a vector are a quad. Where a shift and a mask find four of them in a dword, quads are
// interleaved in units of a dword's codes.
METATE_FN constexpr int unit_of(int64_t bits) {
    return bits == 4 ? 8 : bits == 2 ? 16 : 4;
}

// The columns of 16 in the order of the bytes of their quads.
struct Order {
    int32_t column[16];
};
METATE_FN Order order_of(int64_t bits) {
    const int unit = unit_of(bits), step = unit / 4;
    Order order;
    for (int i = 0; i < 16; ++i) order.column[i] = i / unit * unit + i % unit / 4 + i % 4 * step;
    return order;
}

struct Segment {
    int first_quad, quads;  // of the block; its first and last units may have columns of other segments
    int offset;             // quads of the block's segments before this one
    int begin, end;         // columns within the block
    int64_t group;
    bool is_last;  // of its group in the block
};

// How the sums of a segment are formed.
enum class Sums {
    dots,   // by VNNI
    words,  // in 16 bits: 8 quads of codes up to 4 bits
    pairs,  // two products in 16 bits: 7 bits by 8, or 8 by 7
};

// A codebook of 4-bit codes whose entries are whole: `unit` times the byte that a code finds, less 128.
struct ByteTable {
    float unit;  // 0: there is none, codes are numbers already
    uint8_t bytes[16];
};

inline ByteTable byte_table_of(const float* entries) {
    float most = 0;
    for (int i = 0; i < 16; ++i) most = __builtin_fmaxf(most, __builtin_fabsf(entries[i]));
    if (!(most >= 0x1p-100f && most <= 0x1p16f)) return {};  // or steps times powers of the radix overflow
    const float power = bit_cast<float>(bit_cast<uint32_t>(most) & 0x7f800000);  // at most `most`
    ByteTable table{most > power / 64 * 127 ? power / 32 : power / 64, {}};
    for (int i = 0; i < 16; ++i) {
        const float value = entries[i] / table.unit;
        if (!(value == __builtin_nearbyintf(value))) return {};
        table.bytes[i] = static_cast<uint8_t>(static_cast<int>(value) + 128);
    }
    return table;
}

struct Arithmetic {
    int digits;  // 0: floats instead
    Sums sums;
    float radix;
    ByteTable table;
};

inline Arithmetic arithmetic_of(const QuantLinear& call, const Values& values, int64_t least_group) {
    const bool has_vnni = width == 16 && isa() >= Isa::avx512vnni;
    if (call.w.group_size < least_group) return {};
    if (!has_vnni && (call.w.codebook || !call.int8_activations)) return {};
    if (call.x.dtype == DType::f32 && !call.int8_activations) return {};
    ByteTable table{};
    if (call.w.codebook) {
        if (call.w.bits == 4) table = byte_table_of(values.entries);
        if (!table.unit) return {};
    }
    if (!call.int8_activations) return {3, Sums::dots, 256.0f, table};
    if (has_vnni) return {1, Sums::dots, 0, table};
    if (call.w.bits == 8) return {2, Sums::pairs, 128.0f, table};
    return {1, call.w.bits <= 4 ? Sums::words : Sums::pairs, 0, table};
}

// The segments of block k; returns how many. Steps of int8 activations change every `longest` columns.
inline int segments_of(Segment* to, const LowBitMatrix& w, int64_t k, bool int8_activations) {
    Chunk chunks[block];
    const int count = chunks_of(chunks, w.columns, w.group_size, k), unit = unit_of(w.bits);
    int n = 0, quads = 0;
    for (int c = 0; c < count; ++n) {
        Segment& segment = to[n];
        segment = {chunks[c].begin / unit * unit / 4, 0, quads, chunks[c].begin, chunks[c].end, chunks[c].group, true};
        if (n > 0) to[n - 1].is_last = to[n - 1].group != segment.group;
        while (++c < count && !int8_activations && chunks[c].group == segment.group) segment.end = chunks[c].end;
        segment.quads = static_cast<int>(ceil_div(segment.end, unit)) * unit / 4 - segment.first_quad;
        quads += segment.quads;
    }
    return n;
}

// A line of dwords for every block and row of x: the digits of its segments, highest digit first, a quad a dword; and
// for each segment the sums of its digits (in the low halves), what its sums start from, its step and, as floats, the
// sum of its numbers and those of its group before it; at the end, the number of digits that are not 0 throughout the
// block.
//
// Codes are not centered: where all have one center, sums start from -center times those of the digits, the first two
// digits together and the last. Where centers differ, from the sums of the digits, for each center to multiply; of one
// digit, also from -common_center times those, for codes that were moved to that center.
constexpr int common_center = 128;
constexpr int segment_terms = 4, step_term = 2, total_term = 3;  // of a segment, after two that its sums start from

struct IntegerRows {
    int32_t* lines;
    int64_t rows, most_quads, most_segments;
    int digits;

    METATE_FN int64_t sums_at() const { return most_quads * digits; }
    METATE_FN int64_t terms_at() const { return sums_at() + most_segments * digits; }
    METATE_FN int64_t used_at() const { return terms_at() + most_segments * segment_terms; }
    METATE_FN int64_t stride() const { return round_up(used_at() + 1, 16); }
    METATE_FN int64_t block_stride() const { return rows * stride(); }
    METATE_FN int32_t* line(int64_t k, int64_t row) const { return lines + k * block_stride() + row * stride(); }
};

// Activations.

struct Magnitude {
    float largest;
    bool finite;
};

inline Magnitude magnitude_of(const float* x, int n) {
    const vf zero = splat(0.0f);
    vf most = zero, poison = zero;
    for (int i = 0; i < n; i += width) {
        const vf part = n - i >= width ? load(x + i) : load(x + i, n - i);
        most = max(abs(part), most);
        poison = fma(part, zero, poison);
    }
    return {largest(most), !(sum(poison) != 0)};
}

// The power of two that makes numbers up to `largest` whole ones up to 2^22; not so small that its inverse overflows.
METATE_FN float power_step(float largest) {
    const uint32_t exponent = bit_cast<uint32_t>(largest) >> 23;
    return bit_cast<float>((exponent < 24 ? 3 : exponent - 21) << 23);
}

// A segment with an infinite number: one infinite step. NaN, or another infinite number, which might cancel, makes the
// step NaN.
inline float infinite_step(int32_t* q, const float* x, int n) {
    float step = 0;
    for (int i = 0; i < n; ++i) {
        q[i] = x[i] == __builtin_inff() ? 1 : x[i] == -__builtin_inff() ? -1 : 0;
        if (q[i] || x[i] != x[i]) step = step == 0 && q[i] ? __builtin_inff() : __builtin_nanf("");
    }
    return step;
}

// q[i] = x[i] · inverse as a whole number; returns the sum of squares.
inline float round_numbers(int32_t* q, const float* x, int n, float inverse) {
    vf squares = splat(0.0f);
    for (int i = 0; i < n; i += width) {
        const vi part = to_int((n - i >= width ? load(x + i) : load(x + i, n - i)) * splat(inverse));
        store(q + i, part);
        squares = fma(to_float(part), to_float(part), squares);
    }
    return sum(squares);
}

// x[i] as q[i] steps; returns the step.
inline float round_to_int8(int32_t* q, const float* x, int n) {
    const Magnitude size = magnitude_of(x, n);
    if (!size.finite) {
        infinite_step(q, x, n);
        return __builtin_nanf("");
    }
    const bool rounds_to_0 = !(size.largest > 0 && 127 / size.largest < __builtin_inff());
    round_numbers(q, x, n, rounds_to_0 ? 0 : 127 / size.largest);
    return size.largest / 127;
}

// The same for 16-bit floats. The lowest of three digits is 0 where the root mean square of the numbers is `enough` or
// more without it.
inline float round_floats(int32_t* q, int32_t& used, const float* x, int n, float enough) {
    const Magnitude size = magnitude_of(x, n);
    if (!size.finite) {
        used = 3;
        return infinite_step(q, x, n);
    }
    const float step = power_step(size.largest), inverse = 1 / step;
    if (round_numbers(q, x, n, inverse / 256) < enough * enough * static_cast<float>(n) && size.largest > 0) {
        used = 3;
        round_numbers(q, x, n, inverse);
        return step;
    }
    for (int i = 0; i < n; i += width) store(q + i, shift_left(load(q + i), 8));
    return step;
}

// Moves x by at most a quarter (bfloat16) or half (float16) as much as it was rounded by, in the root mean square.
template <class T>
constexpr float enough_for = __is_same(T, bf16) ? 0x1p10f : 0x1p11f;

// Bytes 0, 1, … of a number become its signed digits, the lowest first.
template <int digits>
METATE_FN vi digits_of(vi q) {
    if (digits == 1) return q;
    if (digits == 3) return exor(add(q, splat(0x808080)), splat(0x808080));
    const vi low = add(q, splat(64)), high = shift_right(add(q, splat(64 + 128)), 7);  // the highest is -1, 0 or 1
    return bit_or(bit_and(sub(bit_and(low, splat(127)), splat(64)), splat(0xff)),
                  shift_left(bit_and(sub(high, splat(1)), splat(0xff)), 8));
}

// The quads of a segment, the sums of its digits and the sum of its numbers in steps. `q` holds every column of the
// segment's units and zeros up to a multiple of 16; as much is written.
template <int digits>
float write_digits(int32_t* to, int32_t* sums, const int32_t* q, const Segment& segment, const Order& order,
                   float radix) {
    float total = 0;
    for (int d = 0; d < digits; ++d, to += segment.quads) {
        vi sum4 = splat(0);
        for (int i = 0; i < 4 * segment.quads; i += width) {
            const Table16 columns = table16(reinterpret_cast<const float*>(q + i / 16 * 16));
            const vi ordered = as_int(lookup(columns, load(order.column + i % 16)));
            store_bytes(reinterpret_cast<uint8_t*>(to) + i,
                        shift_right(digits_of<digits>(ordered), 8 * (digits - 1 - d)));
        }
        for (int64_t i = 0; i < segment.quads; i += width) {
            const vi part = load_bytes(reinterpret_cast<const uint8_t*>(to + i), 4 * (segment.quads - i));
            sum4 = add(sum4, multiply_words(multiply_bytes(splat(0x01010101), part), splat(0x00010001)));
        }
        const float digit_sum = sum(to_float(sum4));
        sums[d] = static_cast<int32_t>(digit_sum) & 0xffff;
        total = total * radix + digit_sum;
    }
    return total;
}

// A segment of one digit and `longest` columns, which most are, without what others need. False where a number is not
// finite, and then nothing is written.
METATE_FN bool pack_chunk(int32_t* line, const IntegerRows& to, const float* x, const Segment& segment, int number,
                          const Order& order, float unit, int center) {
    constexpr int vectors = longest / width;
    vf most = splat(0.0f), poison = splat(0.0f);
    for (int v = 0; v < vectors; ++v) {
        const vf part = load(x + v * width);
        most = max(abs(part), most);
        poison = fma(part, splat(0.0f), poison);
    }
    if (bits_of(is_nan(poison))) return false;
    const float size = largest(most), ratio = 127 / size;
    const vf inverse = splat(size > 0 && ratio < __builtin_inff() ? ratio : 0);
    int32_t q[longest];
    vi sums = splat(0);
    for (int v = 0; v < vectors; ++v) {
        const vi part = to_int(load(x + v * width) * inverse);
        store(q + v * width, part);
        sums = add(sums, part);
    }
    uint8_t* const bytes = reinterpret_cast<uint8_t*>(line + segment.offset);
    for (int i = 0; i < longest; i += width) {
        const Table16 columns = table16(reinterpret_cast<const float*>(q + i / 16 * 16));
        store_bytes(bytes + i, as_int(lookup(columns, load(order.column + i % 16))));
    }
    const float total = sum(to_float(sums)), step = size / 127;
    line[to.sums_at() + number] = static_cast<int32_t>(total) & 0xffff;
    int32_t* const term = line + to.terms_at() + number * segment_terms;
    term[0] = static_cast<int32_t>(total) * center;
    term[1] = static_cast<int32_t>(total) * -common_center;
    term[step_term] = bit_cast<int32_t>(step * unit);
    term[total_term] = bit_cast<int32_t>(total * step);
    return true;
}

template <int digits>
void pack_segment(int32_t* line, const IntegerRows& to, const float* x, const Segment& segment, int number,
                  const Order& order, const Arithmetic& arithmetic, int center, float enough) {
    const float unit = arithmetic.table.unit ? arithmetic.table.unit : 1.0f;
    const int begin = segment.begin - segment.first_quad * 4, n = segment.end - segment.begin;
    if (digits == 1 && n == longest && 4 * segment.quads == n &&
        pack_chunk(line, to, x + segment.begin, segment, number, order, unit, center))
        return;
    int32_t q[block + 32] = {};
    const float step = digits == 3 ? round_floats(q + begin, line[to.used_at()], x + segment.begin, n, enough)
                                   : round_to_int8(q + begin, x + segment.begin, n);
    const float total = write_digits<digits>(line + segment.offset * digits, line + to.sums_at() + number * digits, q,
                                             segment, order, arithmetic.radix);
    int32_t* const sums = line + to.sums_at() + number * digits;
    int32_t* const term = line + to.terms_at() + number * segment_terms;
    for (int part = 0, d = 0; d < digits; ++part) {
        int32_t start = static_cast<int16_t>(sums[d++]);
        if (part == 0 && d < digits)
            start = start * static_cast<int32_t>(arithmetic.radix) + static_cast<int16_t>(sums[d++]);
        term[part] = start * center;
        if (digits == 1) term[1] = start * -common_center;
    }
    term[step_term] = bit_cast<int32_t>(step * unit);
    term[total_term] = bit_cast<int32_t>(total * step);
}

// The segments of every block, and the groups that their scales come from.
struct IntegerPlan {
    Segment* segments;
    int count;
};

template <class T>
void pack_integers(const IntegerRows& to, const IntegerPlan* plans, const QuantLinear& call,
                   const Arithmetic& arithmetic, float center, const Runtime& runtime) {
    const int factor = has_own_centers(call.w) ? 1 : -static_cast<int>(center);
    const int64_t columns = call.w.columns, rows_at_once = 16, row_pieces = ceil_div(to.rows, rows_at_once);
    const Order order = order_of(call.w.bits);
    for_pieces(runtime, ceil_div(columns, block) * row_pieces, [&](int, int64_t piece) {
        const int64_t k = piece / row_pieces, first = piece % row_pieces * rows_at_once;
        for (int64_t row = first; row < smaller(to.rows, first + rows_at_once); ++row) {
            const T* from = static_cast<const T*>(call.x.data) + row * call.x.stride[0];
            float x[block];
            pack_line(x, from, call.x.stride[1], call.w.permutation, k * block, smaller(block, columns - k * block));
            int32_t* const line = to.line(k, row);
            line[to.used_at()] = to.digits < 2 ? 1 : 2;
            for (int i = 0; i < plans[k].count; ++i) {
                const Segment& segment = plans[k].segments[i];
                switch (to.digits) {
                    case 1:
                        pack_segment<1>(line, to, x, segment, i, order, arithmetic, factor, 0);
                        break;
                    case 2:
                        pack_segment<2>(line, to, x, segment, i, order, arithmetic, factor, 0);
                        break;
                    default:
                        pack_segment<3>(line, to, x, segment, i, order, arithmetic, factor, enough_for<T>);
                }
            }
            int32_t* total = line + to.terms_at() + total_term;
            for (int i = 1; i < plans[k].count; ++i, total += segment_terms) {
                const float sum = bit_cast<float>(total[0]) + bit_cast<float>(total[segment_terms]);
                if (!plans[k].segments[i - 1].is_last) total[segment_terms] = bit_cast<int32_t>(sum);
            }
        }
    });
}

// Weights.

// The quads of 32 columns whose dwords start at `words`, `panel` dwords apart.
template <int bits>
METATE_FN void decode_quads(int32_t* to, const int32_t* words) {
    constexpr int mask = (1 << bits) - 1, each = 8 / bits;
    if constexpr (8 % bits == 0 && bits > 1) {
#pragma GCC unroll 8
        for (int at = 0; at < bits; ++at) {
            const vi word = load(words + at * width);
#pragma GCC unroll 8
            for (int j = 0; j < each; ++j, to += panel)
                store(to, bits == 8 ? word : bit_and(j ? shift_right(word, j * bits) : word, splat(mask * 0x01010101)));
        }
        return;
    }
#pragma GCC unroll 32
    for (int quad = 0; quad < 8; ++quad, to += panel) {
        vi bytes = splat(0);
#pragma GCC unroll 4
        for (int byte = 0; byte < 4; ++byte) {
            const int bit = (4 * quad + byte) * bits, at = bit / 32, shift = bit % 32;
            vi code = load(words + at * width);
            if (shift + bits > 32)
                code = bit_or(shift_right(code, shift), shift_left(load(words + (at + 1) * width), 32 - shift));
            const int move = shift + bits > 32 ? -8 * byte : shift - 8 * byte;
            code = move > 0 ? shift_right(code, move) : move < 0 ? shift_left(code, -move) : code;
            bytes = bit_or(bytes, bit_and(code, splat(static_cast<int32_t>(static_cast<uint32_t>(mask) << 8 * byte))));
        }
        store(to, bytes);
    }
}

template <int bits>
void decode_block(int32_t* to, const int32_t* words, int64_t columns) {
    for (; columns > 0; columns -= 32, words += bits * width, to += 8 * panel) decode_quads<bits>(to, words);
}

inline void decode_bytes(int32_t* to, const int32_t* words, int64_t columns, int64_t bits) {
    switch (bits) {
        case 1:
            return decode_block<1>(to, words, columns);
        case 2:
            return decode_block<2>(to, words, columns);
        case 3:
            return decode_block<3>(to, words, columns);
        case 4:
            return decode_block<4>(to, words, columns);
        case 5:
            return decode_block<5>(to, words, columns);
        case 6:
            return decode_block<6>(to, words, columns);
        case 7:
            return decode_block<7>(to, words, columns);
        default:
            return decode_block<8>(to, words, columns);
    }
}

// Codes of a panel's half become the bytes that they stand for.
inline void find_bytes([[maybe_unused]] int32_t* codes, [[maybe_unused]] int64_t columns,
                       [[maybe_unused]] const ByteTable& table) {
#if defined(METATE_HAS_VNNI_FORMS)
    const vi bytes = table_of_bytes(table.bytes);
    for (int64_t quad = 0; quad < ceil_div(columns, 32) * 8; ++quad, codes += panel)
        store(codes, lookup_bytes(bytes, load(codes)));
#endif
}

// Of codes with their own centers, what is subtracted from those of `width` rows for n groups from `group` on: its
// negative, a vector a group, `stride` dwords apart.
inline void load_centers(int32_t* to, int64_t stride, const LowBitMatrix& w, int64_t row, int64_t group, int64_t n) {
    const int64_t rows = smaller(w.rows - row, width);
    const vi base = splat(static_cast<int32_t>(w.zero));
    for (int64_t g = 0; g < n; g += width) {
        vf lines[width];
        for (int i = 0; i < width; ++i) {
            const vi zeros = i < rows ? zeros_of(w, row + i, group + g, smaller(n - g, width)) : splat(0);
            lines[i] = as_float(add(base, zeros));
        }
        transpose(lines);
        for (int j = 0; j < smaller(n - g, width); ++j) store(to + (g + j) * stride, sub(splat(0), as_int(lines[j])));
    }
}

// Centers of n groups, as load_centers stores them, of `halves` of a panel, become what is added to each of a quad's
// codes instead, so that all have one center: common_center - center. False where a byte could not hold the sum; then
// nothing is written.
inline bool to_moves([[maybe_unused]] int32_t* centers, [[maybe_unused]] int64_t n, [[maybe_unused]] int halves,
                     [[maybe_unused]] int64_t bits) {
#if defined(METATE_HAS_VNNI_FORMS)
    const vi common = splat(common_center), many = splat(257 - (1 << bits));
    vm all = first(width);
    const int begin = halves & 1 ? 0 : width, end = halves & 2 ? panel : width;
    for (int v = begin; v < end; v += width) {
        for (int64_t g = 0; g < n; ++g)
            all = static_cast<vm>(all & below_unsigned(add(load(centers + g * panel + v), common), many));
    }
    if (bits_of(all) != bits_of(first(width))) return false;
    for (int v = begin; v < end; v += width) {
        for (int32_t* at = centers + v; at < centers + n * panel; at += panel)
            store(at, multiply(add(load(at), common), splat(0x01010101)));
    }
    return true;
#else
    return false;
#endif
}

// Codes of a block with their own centers become bytes with one: code + common_center - center. False where a byte
// could not hold that, or quads have columns of two segments; then nothing is written.
inline bool join_centers([[maybe_unused]] int32_t* codes, [[maybe_unused]] const IntegerPlan& plan,
                         [[maybe_unused]] const int32_t* centers, [[maybe_unused]] int64_t first_group,
                         [[maybe_unused]] int64_t bits, [[maybe_unused]] int64_t rows) {
#if defined(METATE_HAS_VNNI_FORMS)
    const vi common = splat(common_center), many = splat(257 - (1 << bits));
    vm all = first(width);
    for (int s = 0; s < plan.count; ++s) {
        const Segment& segment = plan.segments[s];
        if (segment.begin != 4 * segment.first_quad) return false;
        for (int64_t v = 0; v < rows; v += width) {
            const vi move = add(load(centers + (segment.group - first_group) * panel + v), common);
            all = static_cast<vm>(all & below_unsigned(move, many));
        }
    }
    if (bits_of(all) != bits_of(first(width))) return false;
    for (int s = 0; s < plan.count; ++s) {
        const Segment& segment = plan.segments[s];
        for (int64_t v = 0; v < rows; v += width) {
            const vi move = add(load(centers + (segment.group - first_group) * panel + v), common);
            const vi bytes = multiply(move, splat(0x01010101));
            int32_t* at = codes + segment.first_quad * panel + v;
            for (int quad = 0; quad < segment.quads; ++quad, at += panel) store(at, add(load(at), bytes));
        }
    }
    return true;
#else
    return false;
#endif
}

// Products.

struct IntegerTile {
    const int32_t* x;  // lines `stride` dwords apart
    int64_t stride, sums_at, terms_at, used_at;
    int start;             // which of the terms sums of one digit start from
    const int32_t* codes;  // (quad, lane) at quad · panel + lane; or transposed words of 4-bit codes, half by half
    const Segment* segments;
    int count;
    const int32_t* centers;  // like the scales, where codes have their own; or
    bool are_moves;          // to_moves() of them
    const float *scales, *corrections;
    int64_t first_group;
    float radix;
    float *total, *earlier;  // of the span, and of those before it: rows `panel` floats apart
    bool begins, ends;       // the span, where that is done here
    bool are_groups;         // every segment is all of its group
    int fetched;             // lines of codes, beside each segment with dwords of tiles
    const uint8_t* ahead;    // what to fetch beside products in words: lines `row_bytes` apart
    int64_t row_bytes;
};

template <Sums kind>
METATE_FN void add_products(vi& sum, vi codes, vi x) {
#if defined(METATE_HAS_VNNI_FORMS)
    if (kind == Sums::dots) return vnni_add_dot(sum, codes, x);
#endif
    if (kind == Sums::words)
        sum = add_words(sum, multiply_bytes(codes, x));
    else
        sum = add(sum, multiply_words(multiply_bytes(codes, x), splat(0x00010001)));
}

// Quad q of one half of a panel; with `in_words`, of codes that were not decoded before.
template <bool in_words>
METATE_FN vi quad_at(const int32_t* codes, int q, int half) {
    if (!in_words) return load(codes + q * panel + half * width);
    const vi word = load(codes + half * most_words + q / 2 * width);
    return bit_and(q % 2 ? shift_right(word, 4) : word, splat(0x0f0f0f0f));
}

// What the sums of row r of a segment start from: all digits but the last of three, or that one.
template <bool own_centers>
METATE_FN vi start_of(const IntegerTile& t, int s, int r, int part, vi center) {
    const vi start = splat(t.x[r * t.stride + t.terms_at + segment_terms * s + t.start + part]);
    return own_centers ? multiply(center, start) : start;
}

// Few rows have too few chains of additions to keep the processor busy: they form `together` sums for each output.
// Digits after the first `used` are 0.
template <int rows, int digits, Sums kind, bool in_words, int used, bool own_centers>
__attribute__((noinline)) void multiply_segments(const IntegerTile& tile) {
    constexpr int chains = rows * used * 2;
    constexpr int together = kind != Sums::dots || chains > 6 ? 1 : chains > 3 ? 2 : 4;
    constexpr int last = used > 1 ? 1 : 0;  // of the digits whose sums are joined as whole numbers
    const IntegerTile t = tile;             // which no store to the totals can change
    vf part[rows][2] = {};                  // of a group
    const auto scale = [&](vf gathered, int s, int64_t at, int r, int v) __attribute__((always_inline)) {
        float* const total = t.total + r * panel + v * width;
        vf result = fma(gathered, load(t.scales + at + v * width), load(total));
        if (t.corrections) {
            const float x_sum = bit_cast<float>(t.x[r * t.stride + t.terms_at + segment_terms * s + total_term]);
            result = fma(splat(x_sum), load(t.corrections + at + v * width), result);
        }
        store(total, result);
    };
    const uint8_t* ahead = t.ahead;
    for (int s = 0; s < t.count; ++s) {
        const Segment segment = t.segments[s];
        const int64_t at = (segment.group - t.first_group) * panel;
        vi center[2] = {};
        if (own_centers) center[0] = load(t.centers + at), center[1] = load(t.centers + at + width);
        vi sum[together][used][rows][2];
#pragma GCC unroll 4
        for (int q = 0; q < together; ++q) {
#pragma GCC unroll 3
            for (int d = 0; d < used; ++d) {
#pragma GCC unroll 12
                for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
                    for (int v = 0; v < 2; ++v)
                        sum[q][d][r][v] = q > 0 || d < last || kind == Sums::words
                                            ? splat(0)
                                            : start_of<own_centers>(t, s, r, d - last, center[v]);
                }
            }
        }
        const int32_t* codes = t.codes + (in_words ? segment.first_quad / 2 * width : segment.first_quad * panel);
        const int32_t* x = t.x + segment.offset * digits;
        const int64_t quads = segment.quads;
        const auto add_quads = [&]<int n>() __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int q = 0; q < n; ++q) {
                if (in_words && q % (block / 4 / panel) == 0) {
                    __builtin_prefetch(ahead, 0, 2);
                    ahead += t.row_bytes;
                }
                const vi first = quad_at<in_words>(codes, q, 0), second = quad_at<in_words>(codes, q, 1);
#pragma GCC unroll 3
                for (int d = 0; d < used; ++d) {
#pragma GCC unroll 12
                    for (int r = 0; r < rows; ++r) {
                        const vi a = splat(x[r * t.stride + d * quads + q]);
                        add_products<kind>(sum[q % together][d][r][0], first, a);
                        add_products<kind>(sum[q % together][d][r][1], second, a);
                    }
                }
            }
            codes += in_words ? n / 2 * width : n * panel;
            x += n;
        };
        int64_t left = quads;
        constexpr int least = in_words ? 2 : 1, most = together > least ? together : least;
        for (; left >= most; left -= most) add_quads.template operator()<most>();
        for (; most > least && left > 0; left -= least) add_quads.template operator()<least>();
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
            vf step = splat(bit_cast<float>(t.x[r * t.stride + t.terms_at + segment_terms * s + step_term]));
            if (used < digits) step = step * splat(t.radix);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
#pragma GCC unroll 3
                for (int d = 0; d < used; ++d) {
#pragma GCC unroll 4
                    for (int q = 1; q < together; ++q) sum[0][d][r][v] = add(sum[0][d][r][v], sum[q][d][r][v]);
                }
                vi whole = sum[0][last][r][v];
                if (last) whole = add(shift_left(sum[0][0][r][v], digits == 3 ? 8 : 7), whole);
                if (kind == Sums::words)
                    whole = add(multiply_words(whole, splat(0x00010001)), start_of<own_centers>(t, s, r, 0, center[v]));
                vf value = to_float(whole);
                if (used == 3) value = fma(value, splat(t.radix), to_float(sum[0][used - 1][r][v]));
                if (digits == 3 || t.are_groups)
                    scale(value * step, s, at, r, v);
                else
                    part[r][v] = fma(value, step, part[r][v]);
            }
        }
        if (digits == 3 || t.are_groups || !segment.is_last) continue;
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                scale(part[r][v], s, at, r, v);
                part[r][v] = splat(0.0f);
            }
        }
    }
}

template <int digits, Sums kind, int rows, bool in_words = false, int used = digits>
METATE_FN void multiply_heights(IntegerTile& t, int64_t n) {
    for (; n >= rows; n -= rows, t.x += rows * t.stride, t.total += rows * panel)
        t.centers ? multiply_segments<rows, digits, kind, in_words, used, true>(t)
                  : multiply_segments<rows, digits, kind, in_words, used, false>(t);
    if constexpr (rows > 1) multiply_heights<digits, kind, (rows == 6 ? 4 : rows / 2), in_words, used>(t, n);
}

// 16-bit floats: one run of rows after another that need as many digits.
inline void multiply_floats(IntegerTile& t, int64_t n) {
    for (int64_t run = 0; n > 0; n -= run) {
        const int32_t used = t.x[t.used_at];
        for (run = 1; run < n && t.x[run * t.stride + t.used_at] == used;) ++run;
        used == 2 ? multiply_heights<3, Sums::dots, 6, false, 2>(t, run) : multiply_heights<3, Sums::dots, 4>(t, run);
    }
}

constexpr int word_rows = 4;  // of x, with which 4-bit codes are multiplied as they are decoded

// n rows of x with one panel; moves the tile behind them.
inline void multiply_integers(const Arithmetic& arithmetic, IntegerTile& tile, int64_t n, bool in_words) {
    constexpr bool wide = width == 16;
    if (in_words) return multiply_heights<1, Sums::words, word_rows, true>(tile, n);
    if constexpr (wide) {
        if (arithmetic.digits == 3) return multiply_floats(tile, n);
        if (arithmetic.sums == Sums::dots) return multiply_heights<1, Sums::dots, 6>(tile, n);
    }
    if (arithmetic.digits == 2) return multiply_heights<2, Sums::pairs, wide ? 4 : 2>(tile, n);
    if (arithmetic.sums == Sums::words) return multiply_heights<1, Sums::words, wide ? 6 : 4>(tile, n);
    multiply_heights<1, Sums::pairs, wide ? 6 : 4>(tile, n);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
