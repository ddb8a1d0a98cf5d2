// Writing tokens into a paged cache: one warp for each token and head. Quantised, all is computed in float32, without
// fused sums, so that every machine writes the same codes.
#include <math.h>

#include "host.h"

namespace metate::cuda::paged {
namespace {

constexpr int append_threads = 128;

struct Append {
    AppendKv a;
    Cache k, v;
};

METATE_DEVICE int64_t index_at(const View<1>& view, int64_t i) {
    if (view.dtype == DType::i32) return number(view, i);
    return load_global<int64_t>(static_cast<const int64_t*>(view.data) + i * view.stride[0]);
}

METATE_DEVICE float load_number(const View<3>& view, int64_t at) {
    switch (view.dtype) {
        case DType::bf16:
            return to_float(load_global<bf16>(static_cast<const bf16*>(view.data) + at));
        case DType::f16:
            return to_float(load_global<f16>(static_cast<const f16*>(view.data) + at));
        default:
            return load_global<float>(static_cast<const float*>(view.data) + at);
    }
}

// One head of one token: its columns as numbers.
struct Head {
    const Append& f;
    const View<3>& view;
    int64_t start;
    int64_t position;
    int half;  // of the columns that turn, 0: none do

    METATE_DEVICE float raw(int column) const { return load_number(view, start + column * view.stride[2]); }

    METATE_DEVICE float operator()(int column) const {
        const float x = raw(column);
        if (column >= 2 * half) return x;
        const bool pairs = f.a.interleaved, second = pairs ? column % 2 == 1 : column >= half;
        const int angle = pairs ? column / 2 : column % half;
        const float other = raw(pairs ? column ^ 1 : second ? column - half : column + half);
        const auto table = [&](const View<2>& t) {
            return load_global<float>(static_cast<const float*>(t.data) + position * t.stride[0] + angle * t.stride[1]);
        };
        const float turned = product(other, table(f.a.sin));
        return product(x, table(f.a.cos)) + (second ? turned : -turned);
    }
};

METATE_DEVICE float largest_of_warp(float x) {
    METATE_UNROLL
    for (int flip = 16; flip > 0; flip /= 2) {
        const float other = shuffle_xor(x, flip);
        x = other > x || other != other ? other : x;  // NaN stays
    }
    return x;
}

METATE_DEVICE float clamp(float x, float low, float high) {
    return x < low ? low : x > high ? high : x;
}

// e4m3, saturating. What is below its normal numbers is rounded by adding a float whose last bit is its least number.
METATE_DEVICE uint32_t to_float8(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return sign | 0x7fu;
    const uint32_t code = size < 0x3c800000u ? bits_of(float_of(size) + 16384.f) - 0x46800000u
                                             : ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
    return sign | (code < 0x7eu ? code : 0x7eu);
}

METATE_DEVICE uint32_t code_of(float x, float scale, Format format) {
    const float steps = scale == 0.f ? 0.f : x / scale;
    if (format == Format::float8) return to_float8(steps);
    if (steps != steps) return format == Format::int4 ? 8 : 0;
    const float most_ = format == Format::int4 ? 7.f : 127.f;
    const float rounded = clamp(rintf(steps), format == Format::int4 ? -8.f : -127.f, most_);
    return static_cast<uint32_t>(static_cast<int>(rounded) + (format == Format::int4 ? 8 : 0)) & 0xffu;
}

METATE_DEVICE void store_head(const Head& head, const Cache& c, int64_t page, int64_t in_page, int h) {
    const int columns = static_cast<int>(head.view.size[2]);
    const View<4>& v = c.view;
    const int64_t row = page * v.stride[0] + in_page * v.stride[1] + h * v.stride[2];
    if (c.format == Format::plain) {
        for (int column = lane(); column < columns; column += warp_size) {
            const int64_t at = row + column * v.stride[3];
            const float x = head(column);
            if (v.dtype == DType::f32) {
                store_global(static_cast<float*>(v.data) + at, x);
            } else if (v.dtype == DType::bf16) {
                store_global(static_cast<bf16*>(v.data) + at, from_float<bf16>(x));
            } else {
                store_global(static_cast<f16*>(v.data) + at, from_float<f16>(x));
            }
        }
        return;
    }
    float scale = 1.f;
    if (c.scale) {
        float amax = 0.f;
        for (int column = lane(); column < columns; column += warp_size) {
            const float x = fabsf(head(column));
            amax = x > amax || x != x ? x : amax;
        }
        scale = largest_of_warp(amax) / (c.format == Format::int8 ? 127.f : c.format == Format::int4 ? 7.f : 448.f);
        const int64_t at = page * c.scale.stride[0] + in_page * c.scale.stride[1] + h * c.scale.stride[2];
        if (lane() == 0) store_global(static_cast<float*>(c.scale.data) + at, scale);
    }
    const int packed = c.format == Format::int4 ? 2 : 1;
    for (int column = lane(); column < columns / packed; column += warp_size) {
        uint32_t code = code_of(head(column * packed), scale, c.format);
        if (packed == 2) code |= code_of(head(column * 2 + 1), scale, c.format) << 4;
        store_global(static_cast<uint8_t*>(v.data) + row + column * v.stride[3], static_cast<uint8_t>(code));
    }
}

METATE_KERNEL(append_threads, 1)
append_kernel(METATE_PARAMETER(Append, f)) {
    const int64_t index = static_cast<int64_t>(block_index().x) * (append_threads / warp_size) + warp();
    const int64_t heads = f.a.k.size[1], token = index / heads;
    const int h = static_cast<int>(index % heads);
    if (token >= f.a.k.size[0]) return;
    const int64_t slot = index_at(f.a.slot_mapping, token), page_size = f.k.view.size[1];
    if (slot < 0 || slot >= f.k.view.size[0] * page_size) return;
    int64_t position = f.a.positions ? index_at(f.a.positions, token) : 0;
    int half = 0;
    if (f.a.cos) {
        half = static_cast<int>(f.a.cos.size[1]);
        const int64_t last = f.a.cos.size[0] - 1;
        position = position < 0 ? 0 : position > last ? last : position;
    }
    const auto head_of = [&](const View<3>& view, int turning) {
        return Head{f, view, token * view.stride[0] + h * view.stride[1], position, turning};
    };
    store_head(head_of(f.a.k, half), f.k, slot / page_size, slot % page_size, h);
    store_head(head_of(f.a.v, 0), f.v, slot / page_size, slot % page_size, h);
}

}  // namespace
}  // namespace metate::cuda::paged

namespace metate::cuda {

void append_kv(const AppendKv& a, const Device& device) {
    using namespace paged;
    if (a.k.dtype == DType::f64) refuse("append_kv", "k is float64");
    const int64_t blocks = (a.k.size[0] * a.k.size[1] + 3) / 4;
    if (blocks > 0x7fffffff) refuse("append_kv", "more than 2^33 heads of tokens");
    launch(append_kernel, {static_cast<int>(blocks)}, append_threads, 0, device.stream,
           Append{a, cache_of(a.k_cache, a.k_scale, a.k.dtype), cache_of(a.v_cache, a.v_scale, a.k.dtype)});
}

}  // namespace metate::cuda
