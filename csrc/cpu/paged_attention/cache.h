// Where the rows of a paged cache lie, and the reading of what they hold.
#pragma once

#include "../../paged_attention.h"
#include "../vec.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t max_key_dim = 576;
constexpr int block = 2 * width;  // elements read at a time

struct nibbles {  // two 4-bit codes
    uint8_t bits;
};
struct e4m3 {
    uint8_t bits;
};
template <class S>
struct whole {};  // codes as whole numbers, which the products of integer.h take
template <class S>
struct pairs {};  // codes as pairs of bfloat16, exactly
template <class S>
constexpr bool is_whole = false;
template <class S>
constexpr bool is_whole<whole<S>> = true;
template <class S>
constexpr bool is_pairs = false;
template <class S>
constexpr bool is_pairs<pairs<S>> = true;

// Elements are read as two vectors. Where they come in pairs, the first vector holds the even elements of a block, the
// second the odd ones; else they are halves of the block. What is read is the number divided by `unit`.
template <class S>
constexpr bool in_pairs = __is_same(S, bf16) || __is_same(S, nibbles);
template <class S>
constexpr bool quantised = __is_same(S, int8_t) || __is_same(S, nibbles) || __is_same(S, e4m3);
template <class S>
constexpr bool has_nibbles = __is_same(S, nibbles) || __is_same(S, whole<nibbles>) || __is_same(S, pairs<nibbles>);
template <class S>
constexpr float unit = __is_same(S, e4m3) ? e4m3_unit : 1.0f;
template <class S>
METATE_FN constexpr int64_t bytes_before(int64_t element) {
    return has_nibbles<S> ? element / 2 : element * static_cast<int64_t>(sizeof(S));
}

constexpr float nibble_values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// The first n of a block; what follows them is finite.
template <class S>
METATE_FN void read(const uint8_t* p, int64_t n, vf& a, vf& b) {
    if constexpr (__is_same(S, bf16)) {
        const vi x = n >= block ? load(reinterpret_cast<const int32_t*>(p)) : load_bytes(p, 2 * n);
        a = as_float(shift_left(x, 16));
        b = as_float(bit_and(x, splat(static_cast<int32_t>(0xffff0000u))));
    } else if constexpr (__is_same(S, nibbles)) {
        const vi x = load_wide(p, smaller((n + 1) / 2, width));
        const Table16 table = table16(nibble_values);
        a = lookup(table, x);
        b = lookup(table, shift_right(x, 4));
    } else {
        const auto* from = reinterpret_cast<const S*>(p);
        const auto one = [](const S* x, int64_t count) {
            if constexpr (__is_same(S, int8_t))
                return to_float(load_wide(x, smaller(count, width)));
            else if constexpr (__is_same(S, e4m3))
                return load_e4m3(&x->bits, smaller(count, width));
            else
                return count >= width ? load(x) : load(x, count);
        };
        a = one(from, n);
        b = n > width ? one(from + width, n - width) : splat(0.0f);
    }
}

// Products take words: floats, or where the instruction set has their dot product pairs, of bfloat16 as they lie or of
// codes as numbers of 16 bits. Pairs are of neighbours in a row of keys, and of two rows of values.
#if defined(METATE_HAS_BF16_DOT)
template <class S>
constexpr bool has_pairs = quantised<S>;  // where queries are bfloat16
template <class S>
constexpr bool has_bf16_dots = __is_same(S, bf16) || is_pairs<S>;
#else
template <class S>
constexpr bool has_pairs = false;
template <class S>
constexpr bool has_bf16_dots = false;
#endif
template <class S>
constexpr bool has_dots = has_bf16_dots<S> || is_whole<S>;
template <class S>
constexpr int elements_of_word = has_dots<S> ? 2 : 1;
template <class S>
constexpr bool is_wide = __is_same(S, pairs<e4m3>) || __is_same(S, whole<int8_t>);
template <class S>
constexpr int block_of = is_wide<S> ? 2 * block : block;  // elements of a row that are read at a time
template <class S>
constexpr int vectors_of_block = block_of<S> / width / elements_of_word<S>;  // of a row of keys
template <class S>
METATE_FN constexpr int64_t words_of_row(int64_t elements) {
    return round_up(elements, block_of<S>) / elements_of_word<S>;
}

template <bool condition, class Yes, class No>
struct Either {
    using type = Yes;
};
template <class Yes, class No>
struct Either<false, Yes, No> {
    using type = No;
};
template <class S>
using Words = typename Either<has_dots<S>, vi, vf>::type;
template <class S>
using Sum = typename Either<is_whole<S>, vi, vf>::type;

template <class S>
METATE_FN Words<S> as_words(vf x) {
    if constexpr (has_dots<S>)
        return as_int(x);
    else
        return x;
}
METATE_FN vf as_floats(vf x) {
    return x;
}
METATE_FN vf as_floats(vi x) {
    return as_float(x);
}
METATE_FN vf value_of(vf sum) {
    return sum;
}
METATE_FN vf value_of(vi sum) {
    return to_float(sum);
}
#if defined(METATE_HAS_VNNI_FORMS)
METATE_FN vi add_product(vi sum, vi a, vi b) {
    vnni_add_word_dot(sum, a, b);
    return sum;
}
METATE_FN void take_codes(const uint8_t* p, int64_t n, vi (&x)[1], whole<nibbles>) {
    const vi codes = load_wide(p, smaller((n + 1) / 2, width));
    x[0] = sub_words(bit_and(bit_or(codes, shift_left(codes, 12)), splat(0x000f000f)), splat(0x00080008));
}
// Bytes as words: the even ones, then the odd ones.
METATE_FN void widen_bytes(vi codes, vi& even, vi& odd) {
    const vi sign = splat(0x00800080);
    even = sub_words(exor(bit_and(codes, splat(0x00ff00ff)), sign), sign);
    odd = shift_right_signed_words(codes, 8);
}
METATE_FN void take_codes(const uint8_t* p, int64_t n, vi (&x)[2], whole<int8_t>) {
    widen_bytes(load_bytes(p, n), x[0], x[1]);
}
METATE_FN void take_codes(const uint8_t* first, const uint8_t* second, int64_t n, vi (&x)[4], whole<int8_t>) {
    vi low = load_bytes(first, n), high = load_bytes(second, n);
    zip_parts(low, high);
    widen_bytes(low, x[0], x[1]);
    widen_bytes(high, x[2], x[3]);
}
#endif

#if defined(METATE_HAS_BF16_DOT)
// The bytes of the bfloat16 of each e4m3 number without its sign, the low ones and then the high ones.
struct E4m3Bytes {
    alignas(64) uint8_t at[2][128];
    constexpr E4m3Bytes() : at{} {
        for (int code = 0; code < 128; ++code) {
            const int exponent = code >> 3;
            const float size = exponent ? static_cast<float>(8 + code % 8) : static_cast<float>(code);
            const float value = size * static_cast<float>(1 << (exponent ? exponent - 1 : 0)) / 512.0f;
            const uint32_t bits = code == 127 ? 0x7fc00000u : __builtin_bit_cast(uint32_t, value);
            at[0][code] = static_cast<uint8_t>(bits >> 16);
            at[1][code] = static_cast<uint8_t>(bits >> 24);
        }
    }
};
constexpr E4m3Bytes e4m3_bytes;

// Bytes of e4m3 as bfloat16: of every 16 of them, the first eight in one vector, the last eight in the other.
METATE_FN void widen_e4m3(vi codes, vi& first, vi& last) {
    const auto half = [&](int i) {
        const auto* p = reinterpret_cast<const int32_t*>(e4m3_bytes.at[i]);
        return vbmi_lookup_bytes(load(p), load(p + width), codes);
    };
    first = half(0);
    last = bit_or(half(1), bit_and(codes, splat(static_cast<int32_t>(0x80808080u))));
    zip_bytes(first, last);
}
METATE_FN void take_pairs(const uint8_t* p, int64_t n, vi (&x)[2], pairs<e4m3>) {
    widen_e4m3(load_bytes(p, n), x[0], x[1]);
}
METATE_FN void take_pairs(const uint8_t* first, const uint8_t* second, int64_t n, vi (&x)[4], pairs<e4m3>) {
    vi low = load_bytes(first, n), high = load_bytes(second, n);
    zip_bytes(low, high);
    widen_e4m3(low, x[0], x[1]);
    widen_e4m3(high, x[2], x[3]);
}
METATE_FN void take_pairs(const uint8_t* p, int64_t n, vi (&x)[1], pairs<int8_t>) {
    vf a, b;
    read<int8_t>(p, n, a, b);
    x[0] = narrow_pairs(a, b);
}
METATE_FN void take_pairs(const uint8_t* p, int64_t n, vi (&x)[1], pairs<nibbles>) {
    vf even, odd;
    read<nibbles>(p, n, even, odd);
    x[0] = bit_or(shift_right(as_int(even), 16), as_int(odd));
}
#endif

// The first n of a block of a row of keys.
template <class S>
METATE_FN void take_key(const uint8_t* p, int64_t n, Words<S> (&x)[vectors_of_block<S>]) {
    if constexpr (is_whole<S>)
        take_codes(p, n, x, S{});
    else if constexpr (is_pairs<S>)
        take_pairs(p, n, x, S{});
    else if constexpr (has_dots<S>)
        x[0] = n >= block ? load(reinterpret_cast<const int32_t*>(p)) : load_bytes(p, 2 * n);
    else
        read<S>(p, n, x[0], x[1]);
}

// The first n columns of a block of two rows of values, or of the first where words are single elements.
template <class S>
METATE_FN void take_values(const uint8_t* first, const uint8_t* second, int64_t n, Words<S> (&x)[block_of<S> / width]) {
    if constexpr (__is_same(S, pairs<e4m3>)) {
        take_pairs(first, second, n, x, S{});
    } else if constexpr (__is_same(S, whole<int8_t>)) {
        take_codes(first, second, n, x, S{});
    } else if constexpr (has_dots<S>) {
        Words<S> key[1];
        take_key<S>(first, n, key);
        x[0] = key[0];
        take_key<S>(second, n, key);
        x[1] = key[0];
        zip_parts(x[0], x[1]);
    } else {
        read<S>(first, n, x[0], x[1]);
    }
}
alignas(64) constexpr uint8_t row_of_zeros[2 * max_key_dim] = {};  // the second of the last value

// Where element i of a block stands when read.
template <class S>
METATE_FN constexpr int64_t place(int64_t i) {
    const int64_t inside = i % block_of<S>, before = i - inside;
    if (__is_same(S, pairs<e4m3>)) return before + inside / 8 % 2 * block + inside / 16 * 8 + i % 8;
    if (__is_same(S, whole<int8_t>)) return before + inside % 2 * block + inside / 2;
    return in_pairs<S> && !has_dots<S> ? before + inside % 2 * width + inside / 2 : i;
}
// Which column stands at place i of a row of values.
template <class S>
METATE_FN constexpr int64_t column_of(int64_t i) {
    const int64_t inside = i % block_of<S>, before = i - inside, vector = inside / width, lane = i % width;
    if (__is_same(S, whole<int8_t>)) return before + lane / 4 * 16 + vector / 2 * 8 + lane % 4 * 2 + vector % 2;
    if (has_dots<S>) return before + lane / 4 * (block_of<S> / 4) + vector * 4 + lane % 4;
    return in_pairs<S> ? before + 2 * lane + vector : i;
}

METATE_FN int32_t at(const View<1>& view, int64_t i) {
    return static_cast<const int32_t*>(view.data)[i * view.stride[0]];
}
METATE_FN int32_t at(const View<2>& view, int64_t i, int64_t j) {
    return static_cast<const int32_t*>(view.data)[i * view.stride[0] + j * view.stride[1]];
}

// One sequence of the batch.
struct Sequence {
    int64_t number;
    int64_t batch, q0, queries;  // where its queries are in q, out, lse and bits
    int64_t keys, left_pad;
};

inline Sequence sequence_of(const PagedAttention& a, int64_t n) {
    Sequence s{n, n, 0, a.q.size[1], at(a.seq_lens, n), a.left_pad ? at(a.left_pad, n) : 0};
    if (a.cu_seqlens_q) {
        s.batch = 0;
        s.q0 = at(a.cu_seqlens_q, n);
        s.queries = at(a.cu_seqlens_q, n + 1) - s.q0;
    }
    return s;
}

// The page and row of keys, in units of a cache's elements.
struct Slot {
    int64_t page, row;
};

METATE_FN const uint8_t* row_of(const View<4>& cache, Slot slot, int64_t head) {
    return static_cast<const uint8_t*>(cache.data) +
           (slot.page * cache.stride[0] + slot.row * cache.stride[1] + head * cache.stride[2]) * bytes_of(cache.dtype);
}

METATE_FN float* scale_at(const View<3>& scales, Slot slot, int64_t head) {
    return static_cast<float*>(scales.data) + slot.page * scales.stride[0] + slot.row * scales.stride[1] +
           head * scales.stride[2];
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
