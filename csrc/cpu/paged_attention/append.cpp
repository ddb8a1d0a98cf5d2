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
void rotate(const AppendKv& a, int64_t position, float* x) {
    const auto* cos = static_cast<const float*>(a.cos.data) + position * a.cos.stride[0];
    const auto* sin = static_cast<const float*>(a.sin.data) + position * a.sin.stride[0];
    const int64_t half = a.cos.size[1], gap = a.interleaved ? 1 : half, step = a.interleaved ? 2 : 1;
    for (int64_t i = 0; i < half; ++i) {
        const float c = cos[i * a.cos.stride[1]], s = sin[i * a.sin.stride[1]];
        float &first = x[i * step], &second = x[i * step + gap];
        const float rotated = first * c - second * s;
        second = second * c + first * s;
        first = rotated;
    }
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

// x / scale to the nearest whole number within a range; anything where that is no number.
METATE_FN int32_t code_of(float x, float scale, float least, float most) {
    const float y = scale == 0.0f ? 0.0f : x / scale;
    return static_cast<int32_t>(nearbyintf(y < most ? y > least ? y : least : most));
}

uint8_t to_e4m3(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), size = bits & 0x7fffffffu;
    const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80);
    if (size > 0x7f800000u) return sign | 0x7f;
    if (size >= 0x43e00000u) return sign | 0x7e;  // 448
    if (size < 0x3c800000u) {                     // below 2^-6 the step is 2^-9: adding 2^14 rounds to it
        const float shifted = bit_cast<float>(size) + 0x1p14f;
        return static_cast<uint8_t>(sign | (bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(0x1p14f)));
    }
    const uint32_t rounded = size + 0x7ffffu + (size >> 20 & 1);
    return static_cast<uint8_t>(sign | ((rounded >> 20) - (120u << 3)));
}

// Writes a head to its row of a cache: `step` numbers fit the largest magnitude where there are scales.
struct Place {
    const View<4>& cache;
    const View<3>& scales;
    Slot slot;
    int64_t head;

    template <class S>
    S* row() const {
        return const_cast<S*>(reinterpret_cast<const S*>(row_of<S>(cache, slot, head)));
    }
    float set_scale(const float* x, int64_t n, float step) const {
        const float scale = largest_magnitude(x, n) / step;
        static_cast<float*>(
            scales.data)[slot.page * scales.stride[0] + slot.row * scales.stride[1] + head * scales.stride[2]] = scale;
        return scale;
    }
};

void write_int8(const float* x, int64_t n, const Place& place) {
    const float scale = place.set_scale(x, n, 127.0f);
    int8_t* to = place.row<int8_t>();
    for (int64_t i = 0; i < n; ++i) {
        to[i * place.cache.stride[3]] = static_cast<int8_t>(code_of(x[i], scale, -127.0f, 127.0f));
    }
}

void write_nibbles(const float* x, int64_t n, const Place& place) {
    const float scale = place.set_scale(x, n, 7.0f);
    uint8_t* to = place.row<uint8_t>();
    for (int64_t i = 0; i < n; i += 2) {
        const int32_t low = code_of(x[i], scale, -8.0f, 7.0f) + 8, high = code_of(x[i + 1], scale, -8.0f, 7.0f) + 8;
        to[i / 2 * place.cache.stride[3]] = static_cast<uint8_t>(low | high << 4);
    }
}

void write_e4m3(const float* x, int64_t n, const Place& place) {
    const float scale = place.scales ? place.set_scale(x, n, 448.0f) : 1.0f;
    uint8_t* to = place.row<uint8_t>();
    for (int64_t i = 0; i < n; ++i) to[i * place.cache.stride[3]] = to_e4m3(scale == 0.0f ? 0.0f : x[i] / scale);
}

template <class T>
void write(const float* x, int64_t n, const Place& place) {
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
void append_head(const AppendKv& a, int64_t token, int64_t head, Slot slot) {
    float line[max_head_dim];
    const auto from = [&](const View<3>& x) {
        return static_cast<const T*>(x.data) + token * x.stride[0] + head * x.stride[1];
    };
    load_line(from(a.k), a.k.stride[2], a.k.size[2], line);
    if (a.cos) rotate(a, integer_at(a.positions, token), line);
    write<T>(line, a.k.size[2], {a.k_cache, a.k_scale, slot, head});
    if (a.v.size[2] == 0) return;
    load_line(from(a.v), a.v.stride[2], a.v.size[2], line);
    write<T>(line, a.v.size[2], {a.v_cache, a.v_scale, slot, head});
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
