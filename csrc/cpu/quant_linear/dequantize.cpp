// W itself, row by row. Codes lie along a row and so do its weights: those of 4 bits are looked up in what a group
// makes of every code, other codes become bytes first. A large W goes past the caches, where whole vectors make its
// lines.
#include "../strided.h"
#include "../vec/vbmi.h"
#include "decode.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t segment = 1024;           // columns at a time: they pass through the first-level cache
constexpr int64_t piece_weights = 1 << 15;  // of a piece
constexpr int64_t beyond_caches = 1 << 23;  // bytes of W: nobody would find it in a cache

// How codes lie, and what finds their values.
enum class Codes {
    halves,          // two of a group in a byte: in what the group makes of all 16
    swapped_halves,  // and the first one of two in the high half, which the permutation says and nothing else
    table,           // one in a byte, as all those that follow: in a register
    whole,           // they are their values
    e4m3,            // the codebook says so
    codebook,
};

struct Problem {
    LowBitMatrix w;
    View<2> out;
    float entries[256];  // of the codebook, or the codes themselves; up to 4 bits again and again
    Codes codes;
    bool streamed;  // decoded straight to where it belongs, in whole vectors
#if defined(METATE_HAS_VBMI_FORMS)
    bool has_vbmi = isa() >= Isa::avx512vbmi;
    Table256 planes[4];  // the bytes of the entries of a codebook, the lowest first
#endif

    explicit Problem(const Dequantize& call) : w(call.w), out(call.out) {
        w.group_size = smaller(w.group_size, w.columns);
        const float* const codebook = static_cast<const float*>(w.codebook.data);
        const int mask = (1 << w.bits) - 1;
        for (int i = 0; i < 256; ++i)
            entries[i] = codebook ? codebook[(i & mask) * w.codebook.stride[0]] : static_cast<float>(i & mask);
        if (w.bits == 4 && (w.group_size % 2 == 0 || w.group_size == w.columns))  // no byte has codes of two groups
            codes = swaps_pairs() ? Codes::swapped_halves : Codes::halves;
        else
            codes = !codebook ? Codes::whole : w.bits <= 4 ? Codes::table : is_e4m3() ? Codes::e4m3 : Codes::codebook;
        if (codes == Codes::swapped_halves) w.permutation = {};
#if defined(METATE_HAS_VBMI_FORMS)
        if (codes == Codes::codebook) set_planes();
#endif
        streamed = w.rows * w.columns * bytes_of(out.dtype) >= beyond_caches && is_of_vectors();
    }

#if defined(METATE_HAS_VBMI_FORMS)
    void set_planes() {
        for (int d = 0; d < 4; ++d) {
            alignas(64) uint8_t bytes[256];
            for (int i = 0; i < 256; ++i) bytes[i] = static_cast<uint8_t>(bit_cast<uint32_t>(entries[i]) >> 8 * d);
            for (int i = 0; i < 4; ++i)
                planes[d].quarters[i] = load(reinterpret_cast<const int32_t*>(bytes) + i * width);
        }
    }
#endif

    bool is_of_halves() const { return codes == Codes::halves || codes == Codes::swapped_halves; }

    bool is_of_vectors() const {
        const int64_t size = bytes_of(out.dtype), many = is_of_halves() ? 2 * width : width;
        const bool aligned = reinterpret_cast<uintptr_t>(out.data) % 64 == 0 && out.stride[0] * size % 64 == 0;
        return !w.permutation && out.stride[1] == 1 && aligned && w.columns % many == 0 && w.group_size % many == 0;
    }

    bool swaps_pairs() const {
        const int32_t* const order = static_cast<const int32_t*>(w.permutation.data);
        bool all = order && w.columns % 2 == 0;
        for (int64_t j = 0; all && j < w.columns; ++j) all = order[j * w.permutation.stride[0]] == (j ^ 1);
        return all;
    }

    bool is_e4m3() const {
        bool all = w.bits == 8;
        for (int i = 0; all && i < 256; ++i) {
            const uint8_t code = static_cast<uint8_t>(i);
            float value[width];
            store(value, load_e4m3(&code, 1) * splat(e4m3_unit));
            const bool is_nan = value[0] != value[0] && entries[i] != entries[i];
            all = is_nan || bit_cast<uint32_t>(value[0]) == bit_cast<uint32_t>(entries[i]);
        }
        return all;
    }
};

// What makes weights of the values of a group: product(value - zero, scale) + offset.
struct Level {
    float zero, scale, offset;
};

// Of the groups of a segment.
struct Levels {
    float zeros[segment + width], scales[segment + width], offsets[segment + width];

    Level operator[](int64_t i) const { return {zeros[i], scales[i], offsets[i]}; }

    void load(const LowBitMatrix& w, int64_t row, int64_t group, int64_t n) {
        const vf zero = splat(static_cast<float>(w.zero));
        for (int64_t i = 0; i < n; i += width) {
            const int64_t left = smaller(n - i, width);
            vf line[width];
            store(zeros + i, w.zeros ? to_float(zeros_of(w, row, group + i, left)) + zero : zero);
            load_levels(line, w.scales, w.super_scales, w.super_groups, row, 1, group + i, left);
            store(scales + i, line[0]);
            line[0] = splat(-0.0f);  // changes no sum, not even its sign
            if (w.offsets) load_levels(line, w.offsets, w.super_offsets, w.super_groups, row, 1, group + i, left);
            store(offsets + i, line[0]);
        }
    }
};

// a · b, rounded before it meets a sum.
METATE_FN vf product(vf a, vf b) {
    return fma(a, b, splat(-0.0f));
}

METATE_FN vf weights_of(vf values, const Level& level) {
    return product(values - splat(level.zero), splat(level.scale)) + splat(level.offset);
}

template <bool streamed, class T>
METATE_FN void put(T* to, vf x) {
    streamed ? stream(to, x) : store(to, x);
}

// Bytes of two codes each. Weights are written in vectors, up to two too many.

// Into the weights of all 16 codes.
template <class T, bool swapped, bool streamed>
METATE_FN void look_up_halves(T* to, const uint8_t* codes, int64_t n, const float* weights) {
    const Table16 table = table16(weights);
    const auto look_up = [&](vi bytes) __attribute__((always_inline)) {
        vf first = lookup(table, swapped ? shift_right(bytes, 4) : bytes);
        vf second = lookup(table, swapped ? bytes : shift_right(bytes, 4));
        interleave(first, second);
        put<streamed>(to, first);
        put<streamed>(to + width, second);
        to += 2 * width;
    };
    for (; n >= 2 * width; n -= 2 * width, codes += width) look_up(load_wide(codes, width));
    if (n > 0) look_up(load_wide(codes, ceil_div(n, 2)));
}

#if defined(METATE_HAS_WORD_SHUFFLES)
METATE_FN vi words_of(const float* p, bf16) {
    return twice(narrow_bf16(load(p)));
}
METATE_FN vi words_of(const float* p, f16) {
    return twice(narrow_f16(load(p)));
}

// The same in words: those of a table are rounded once, and a look-up finds both of a byte.
template <class T, bool swapped, bool streamed>
METATE_FN void look_up_words(T* to, const uint8_t* codes, int64_t n, const float* weights) {
    const vi table = words_of(weights, T{});
    const auto look_up = [&](vi bytes) __attribute__((always_inline)) {
        const vi words =
            swapped ? bit_or(shift_right(bytes, 4), shift_left(bytes, 16)) : bit_or(bytes, shift_left(bytes, 12));
        put<streamed>(reinterpret_cast<float*>(to), as_float(lookup_pairs(table, words, 0)));
        to += 2 * width;
    };
    for (; n >= 2 * width; n -= 2 * width, codes += width) look_up(load_wide(codes, width));
    if (n > 0) look_up(load_wide(codes, ceil_div(n, 2)));
}
#endif

template <class T, bool swapped, bool streamed>
METATE_FN void decode_halves(T* to, const uint8_t* codes, int64_t n, const float* entries, const Level& level) {
    float weights[16];
    for (int i = 0; i < 16; i += width) store(weights + i, weights_of(load(entries + i), level));
#if defined(METATE_HAS_WORD_SHUFFLES)
    if constexpr (sizeof(T) == 2) return look_up_words<T, swapped, streamed>(to, codes, n, weights);
#endif
    look_up_halves<T, swapped, streamed>(to, codes, n, weights);
}

// Bytes of one code each.

template <Codes kind>
METATE_FN vf values_of(const uint8_t* codes, int64_t n, const float* entries) {
    if constexpr (kind == Codes::e4m3) return load_e4m3(codes, n) * splat(e4m3_unit);
    const vi code = load_wide(codes, n);
    if constexpr (kind == Codes::whole) return to_float(code);
    return kind == Codes::table ? lookup(table16(entries), code) : gather(entries, code);
}

template <class T, Codes kind, bool streamed>
METATE_FN void decode_bytes(T* to, const uint8_t* codes, int64_t n, const float* entries, const Level& level) {
    for (; n >= width; n -= width, to += width, codes += width)
        put<streamed>(to, weights_of(values_of<kind>(codes, width, entries), level));
    if (n > 0) put<streamed>(to, weights_of(values_of<kind>(codes, n, entries), level));
}

#if defined(METATE_HAS_VBMI_FORMS)
// Weights of n values of a group, as decode_bytes writes them.
template <class T, bool streamed>
METATE_FN void scale_line(T* to, const float* values, int64_t n, const Level& level) {
    for (; n > 0; n -= width, to += width, values += width)
        put<streamed>(to, weights_of(n >= width ? load(values) : load(values, n), level));
}

// The entries of a codebook for n bytes, in whole fours of vectors.
inline void look_up_planes(float* to, const uint8_t* codes, int64_t n, const Table256 (&planes)[4]) {
    for (; n > 0; n -= 4 * width, codes += 4 * width, to += 4 * width) {
        vf four[4];
        vbmi_lookup_floats(four, planes, load_bytes(codes, n));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(to + i * width, four[i]);
    }
}

// n codes as bytes, rounded up to 64, of which `left` bytes are there.
inline void unpack_bits(uint8_t* to, const uint8_t* codes, int64_t left, int64_t n, int64_t bits) {
    alignas(64) uint8_t from[4 * width], first_bit[4 * width];
    for (int i = 0; i < 4 * width; ++i) {
        from[i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
        first_bit[i] = static_cast<uint8_t>(i % 8 * bits);
    }
    const auto vector = [](const uint8_t* bytes) { return load(reinterpret_cast<const int32_t*>(bytes)); };
    const vi moves = vector(from), shifts = vector(first_bit), mask = splat(((1 << bits) - 1) * 0x01010101);
    for (; n > 0; n -= 4 * width, to += 4 * width, codes += 8 * bits, left -= 8 * bits) {
        const vi eights = vbmi_move_bytes(load_bytes(codes, smaller(left, 8 * bits)), moves);
        store(reinterpret_cast<int32_t*>(to), bit_and(vbmi_move_bits(eights, shifts), mask));
    }
}
#endif

// Eight codes side by side, each as a byte.
template <int bits>
METATE_FN uint64_t bytes_of_codes(uint64_t codes) {
    constexpr uint64_t one = 1;
#if defined(__BMI2__)
    return __builtin_ia32_pdep_di(codes, ((one << bits) - 1) * 0x0101010101010101);
#else
    constexpr uint64_t ones = ((one << bits) - 1) * 0x0001000100010001;
    constexpr uint64_t twos = ((one << 2 * bits) - 1) * 0x0000000100000001, fours = (one << 4 * bits) - 1;
    codes = (codes & fours) | (codes >> 4 * bits & fours) << 32;
    codes = (codes & twos) | (codes >> 2 * bits & twos) << 16;
    return (codes & ones) | (codes >> bits & ones) << 8;
#endif
}

// n codes as bytes, rounded up to eight, of which `left` bytes are there.
template <int bits>
void unpack(uint8_t* to, const uint8_t* codes, int64_t left, int64_t n) {
    for (; n > 0; n -= 8, to += 8, codes += bits, left -= bits) {
        uint64_t eight = 0;
        if (left >= 8) {
            __builtin_memcpy(&eight, codes, 8);
        } else {
            for (int64_t i = 0; i < left; ++i) eight |= uint64_t{codes[i]} << 8 * i;
        }
        eight = bytes_of_codes<bits>(eight);
        __builtin_memcpy(to, &eight, 8);
    }
}

inline void unpack(uint8_t* to, const uint8_t* codes, int64_t left, int64_t n, int64_t bits) {
    switch (bits) {
        case 1:
            return unpack<1>(to, codes, left, n);
        case 2:
            return unpack<2>(to, codes, left, n);
        case 3:
            return unpack<3>(to, codes, left, n);
        case 4:
            return unpack<4>(to, codes, left, n);
        case 5:
            return unpack<5>(to, codes, left, n);
        case 6:
            return unpack<6>(to, codes, left, n);
        default:
            return unpack<7>(to, codes, left, n);
    }
}

// n columns of a row from `begin` on, as they are stored.
template <class T, Codes kind, bool streamed>
void decode_segment(T* to, const Problem& p, int64_t row, int64_t begin, int64_t n) {
    constexpr bool swapped = kind == Codes::swapped_halves, halves = swapped || kind == Codes::halves;
    const LowBitMatrix& w = p.w;
    const int64_t group_size = w.group_size, group = begin / group_size, from = begin * w.bits / 8;
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes.data) + row * w.codes.stride[0] + from;
    uint8_t unpacked[segment];
    int32_t row_words[segment / 8];
    if (w.in_tiles()) {
        const int32_t* const words = words_at(w, row, 0) + begin / 8 * rows_of_tile;
        for (int64_t i = 0; i < ceil_div(n, 8); ++i) row_words[i] = words[i * rows_of_tile];
        codes = reinterpret_cast<const uint8_t*>(row_words);
    }
    if (!halves && w.bits < 8) {
        const int64_t left = ceil_div(w.columns * w.bits, 8) - from;
#if defined(METATE_HAS_VBMI_FORMS)
        p.has_vbmi ? unpack_bits(unpacked, codes, left, n, w.bits) : unpack(unpacked, codes, left, n, w.bits);
#else
        unpack(unpacked, codes, left, n, w.bits);
#endif
        codes = unpacked;
    }
    Levels levels;
    levels.load(w, row, group, (begin + n - 1) / group_size - group + 1);
    int64_t end = (group + 1) * group_size - begin;
#if defined(METATE_HAS_VBMI_FORMS)
    if (kind == Codes::codebook && p.has_vbmi) {
        float values[segment];
        look_up_planes(values, codes, n, p.planes);
        for (int64_t i = 0, at = 0; at < n; at = end, end += group_size, ++i)
            scale_line<T, streamed>(to + at, values + at, smaller(end, n) - at, levels[i]);
        return;
    }
#endif
    for (int64_t i = 0, at = 0; at < n; at = end, end += group_size, ++i) {
        const int64_t count = smaller(end, n) - at;
        if constexpr (halves)
            decode_halves<T, swapped, streamed>(to + at, codes + at / 2, count, p.entries, levels[i]);
        else
            decode_bytes<T, kind, streamed>(to + at, codes + at, count, p.entries, levels[i]);
    }
}

template <class T, bool streamed>
auto decoder_of(Codes codes) {
    switch (codes) {
        case Codes::halves:
            return decode_segment<T, Codes::halves, streamed>;
        case Codes::swapped_halves:
            return decode_segment<T, Codes::swapped_halves, streamed>;
        case Codes::table:
            return decode_segment<T, Codes::table, streamed>;
        case Codes::whole:
            return decode_segment<T, Codes::whole, streamed>;
        case Codes::e4m3:
            return decode_segment<T, Codes::e4m3, streamed>;
        default:
            return decode_segment<T, Codes::codebook, streamed>;
    }
}

template <class T>
METATE_FN void copy(T* to, int64_t stride, const T* from, int64_t n) {
    if (stride == 1) {
        __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
    } else {
        for (int64_t j = 0; j < n; ++j) to[j * stride] = from[j];
    }
}

// Columns of a row from `begin` on. `line` is room for a row where columns are permuted, and else for a segment.
template <class T>
void compute_columns(const Problem& p, int64_t row, int64_t begin, int64_t end, T* line) {
    const auto decode = p.streamed ? decoder_of<T, true>(p.codes) : decoder_of<T, false>(p.codes);
    const int64_t stride = p.out.stride[1];
    const View<1>& order = p.w.permutation;
    T* const to = static_cast<T*>(p.out.data) + row * p.out.stride[0];
    for (int64_t at = begin; at < end; at += segment) {
        const int64_t n = smaller(segment, end - at);
        if (p.streamed) {
            decode(to + at, p, row, at, n);
            continue;
        }
        alignas(64) T part[segment + 2 * width];
        decode(part, p, row, at, n);
        if (order) {
            const int32_t* const places = static_cast<const int32_t*>(order.data) + at * order.stride[0];
            for (int64_t j = 0; j < n; ++j) line[places[j * order.stride[0]]] = part[j];
        } else {
            copy(to + at * stride, stride, part, n);
        }
    }
    if (order) copy(to, stride, line, end);
}

template <class T>
void run(const Dequantize& call, const Runtime& runtime) {
    const int64_t rows = call.w.rows, columns = call.w.columns;
    if (rows == 0 || columns == 0) return;
    const Problem p(call);
    // Permuted rows are gathered in a cache first: every weight is alone on its line.
    const int64_t across = p.w.permutation ? columns : piece_weights, down = larger(piece_weights / columns, 1);
    const int64_t in_row = ceil_div(columns, across), pieces = ceil_div(rows, down) * in_row;
    const Runtime workers = worth(runtime, rows * columns);
    const auto line_of = lay_out(
        workers, pieces, [](Arena&) {}, [&](Arena& arena) { return arena.take<T>(p.w.permutation ? columns : 0); });
    for_pieces(workers, pieces, [&](int worker, int64_t piece) {
        const int64_t first = piece / in_row * down, begin = piece % in_row * across;
        for (int64_t row = first; row < smaller(first + down, rows); ++row)
            compute_columns(p, row, begin, smaller(begin + across, columns), line_of(worker));
        if (p.streamed) stream_end();
    });
}

}  // namespace

void dequantize(const Dequantize& call, const Runtime& runtime) {
    with_floats(call.out.dtype, [&]<class T>() { run<T>(call, runtime); });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH_BF16(dequantize, Dequantize, p.out.dtype)
