// Writing of new keys and values into a paged cache: rotated, quantised, each where its slot says.
#include <math.h>
#include <string.h>

#include "../parallel.h"
#include "cache.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t piece_tokens = 8;

METATE_FN int64_t integer_at(const View<1>& view, int64_t i) {
    return view.dtype == DType::i64 ? static_cast<const int64_t*>(view.data)[i * view.stride[0]] : at(view, i);
}

template <class T>
void load_line(const T* from, int64_t stride, int64_t n, float* to) {
    int64_t i = 0;
    if (stride == 1) {
        for (; i + width <= n; i += width) store(to + i, load(from + i));
    }
    for (; i < n; ++i) to[i] = to_float(from[i * stride]);
}

template <class T>
void store_line(const float* from, int64_t n, T* to, int64_t stride) {
    int64_t i = 0;
    if (stride == 1) {
        for (; i + width <= n; i += width) store(to + i, load(from + i));
    }
    for (; i < n; ++i) to[i * stride] = from_float<T>(from[i]);
}

// Rotates pairs of a head by one row of angles.
template <int64_t step>
void rotate_pairs(const float* cos, const float* sin, int64_t half, int64_t gap, float* x) {
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i * step], second = x[i * step + gap];
        x[i * step] = first * cos[i] - second * sin[i];
        x[i * step + gap] = second * cos[i] + first * sin[i];
    }
}

void rotate(const AppendKv& a, int64_t position, float* x) {
    const int64_t half = a.cos.size[1];
    float room[2][max_key_dim / 2];
    const float* angles[2];
    for (int i = 0; i < 2; ++i) {
        const View<2>& view = i ? a.sin : a.cos;
        angles[i] = static_cast<const float*>(view.data) + position * view.stride[0];
        if (view.stride[1] == 1) continue;
        for (int64_t j = 0; j < half; ++j) room[i][j] = angles[i][j * view.stride[1]];
        angles[i] = room[i];
    }
    if (a.interleaved) return rotate_pairs<2>(angles[0], angles[1], half, 1, x);
    rotate_pairs<1>(angles[0], angles[1], half, half, x);
}

// The largest magnitude; NaN where an element is NaN: as whole numbers, magnitudes are ordered and NaN comes last.
float largest_magnitude(const float* x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t size = bit_cast<int32_t>(x[i]) & INT32_MAX;
        if (size > most) most = size;
    }
    return bit_cast<float>(most);
}

// x to the nearest whole number within a range; anything where it is no number.
METATE_FN int32_t code_of(float x, float least, float most) {
    return static_cast<int32_t>(nearbyintf(x < most ? x > least ? x : least : most));
}

METATE_FN uint8_t to_e4m3(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), size = bits & 0x7fffffffu;
    const float shifted = bit_cast<float>(size) + 0x1p14f;  // below 2^-6 the step is 2^-9: this addition rounds to it
    const uint32_t tiny = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(0x1p14f);
    const uint32_t rounded = ((size + 0x7ffffu + (size >> 20 & 1)) >> 20) - (120u << 3);
    uint32_t code = size < 0x3c800000u ? tiny : rounded;
    code = size >= 0x43e00000u ? 0x7eu : code;  // 448
    code = size > 0x7f800000u ? 0x7fu : code;
    return static_cast<uint8_t>(code | (bits >> 24 & 0x80));
}

// Writes a head to its row of a cache: `step` numbers fit the largest magnitude where there are scales.
struct Place {
    const View<4>& cache;
    const View<3>& scales;
    Slot slot;
    int64_t head;

    template <class S>
    S* row() const {
        return const_cast<S*>(reinterpret_cast<const S*>(row_of(cache, slot, head)));
    }
    void put(const uint8_t* codes, int64_t n) const {
        uint8_t* to = row<uint8_t>();
        if (cache.stride[3] == 1) {
            memcpy(to, codes, static_cast<size_t>(n));
        } else {
            for (int64_t i = 0; i < n; ++i) to[i * cache.stride[3]] = codes[i];
        }
    }
    // Makes x, n numbers, steps of the scale; a scale of 0 leaves zeros.
    void divide_by_scale(float* x, int64_t n, float step) const {
        const float scale = largest_magnitude(x, n) / step;
        *scale_at(scales, slot, head) = scale;
        if (scale == 0.0f)
            memset(x, 0, static_cast<size_t>(n) * sizeof(float));
        else
            for (int64_t i = 0; i < n; ++i) x[i] = x[i] / scale;
    }
};

void write_int8(float* x, int64_t n, const Place& place) {
    uint8_t codes[max_key_dim];
    place.divide_by_scale(x, n, 127.0f);
    for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(code_of(x[i], -127.0f, 127.0f));
    place.put(codes, n);
}

void write_nibbles(float* x, int64_t n, const Place& place) {
    uint8_t codes[max_key_dim / 2];
    place.divide_by_scale(x, n, 7.0f);
    for (int64_t i = 0; i < n / 2; ++i) {
        const int32_t low = code_of(x[2 * i], -8.0f, 7.0f) + 8, high = code_of(x[2 * i + 1], -8.0f, 7.0f) + 8;
        codes[i] = static_cast<uint8_t>(low | high << 4);
    }
    place.put(codes, n / 2);
}

void write_e4m3(float* x, int64_t n, const Place& place) {
    uint8_t codes[max_key_dim];
    if (place.scales) place.divide_by_scale(x, n, 448.0f);
    for (int64_t i = 0; i < n; ++i) codes[i] = to_e4m3(x[i]);
    place.put(codes, n);
}

template <class T>
void write(float* x, int64_t n, const Place& place) {
    switch (place.cache.dtype) {
        case DType::i8:
            return write_int8(x, n, place);
        case DType::u8:
            return write_nibbles(x, n, place);
        case DType::f8:
            return write_e4m3(x, n, place);
        default:
            return store_line(x, n, place.row<T>(), place.cache.stride[3]);
    }
}

template <class T>
void append_row(const View<3>& x, int64_t token, const Place& place, const AppendKv* rotation) {
    const T* from = static_cast<const T*>(x.data) + token * x.stride[0] + place.head * x.stride[1];
    const int64_t n = x.size[2];
    if (place.cache.dtype == x.dtype && !rotation && x.stride[2] == 1 && place.cache.stride[3] == 1) {
        memcpy(place.row<T>(), from, static_cast<size_t>(n) * sizeof(T));
        return;
    }
    float line[max_key_dim];
    load_line(from, x.stride[2], n, line);
    if (rotation) rotate(*rotation, integer_at(rotation->positions, token), line);
    write<T>(line, n, place);
}

template <class T>
void append_head(const AppendKv& a, int64_t token, int64_t head, Slot slot) {
    append_row<T>(a.k, token, {a.k_cache, a.k_scale, slot, head}, a.cos ? &a : nullptr);
    if (a.v.size[2] > 0) append_row<T>(a.v, token, {a.v_cache, a.v_scale, slot, head}, nullptr);
}

template <class T>
void run(const AppendKv& a, const Runtime& runtime) {
    const int64_t tokens = a.k.size[0], page_size = a.k_cache.size[1];
    for_pieces(runtime, ceil_div(tokens, piece_tokens), [&](int, int64_t piece) {
        const int64_t end = smaller((piece + 1) * piece_tokens, tokens);
        for (int64_t token = piece * piece_tokens; token < end; ++token) {
            const int64_t slot = integer_at(a.slot_mapping, token);
            if (slot < 0) continue;
            for (int64_t head = 0; head < a.k.size[1]; ++head) {
                append_head<T>(a, token, head, {slot / page_size, slot % page_size});
            }
        }
    });
}

}  // namespace

void append_kv(const AppendKv& a, const Runtime& runtime) {
    switch (a.k.dtype) {
        case DType::bf16:
            return run<bf16>(a, runtime);
        case DType::f16:
            return run<f16>(a, runtime);
        default:
            return run<float>(a, runtime);
    }
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(append_kv, AppendKv, p.k.dtype)
