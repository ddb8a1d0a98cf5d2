// Gated activations and their gradients: a warp makes 16 bytes a lane of one row at a time, in float32.
#include "numbers.h"

namespace metate::cuda {
namespace {

using namespace moe;

constexpr float gelu_slope = 1.5957691216057308f, gelu_cubic = 0.044715f;  // √(8/π); 0.5 (1 + tanh u) = sigmoid(2 u)

struct Shape {
    Activation activation;
    Gating gating;
    float limit, alpha, shift;
    int width, pieces;
    bool vectors;
};

METATE_DEVICE float gelu_argument(float x) {
    return gelu_slope * x * (1.f + gelu_cubic * x * x);
}

// The normal distribution's share below x: 1 + erf would cancel below 0.
METATE_DEVICE float normal_below(float x) {
    return 0.5f * erfcf(x * -0.70710678f);
}

METATE_DEVICE float positive(float x) {
    return x <= 0.f ? 0.f : x;  // NaN stays
}

template <int n, typename Make>
METATE_DEVICE void make_each(float (&values)[n], const Make& make) {
    METATE_UNROLL
    for (int i = 0; i < n; ++i) values[i] = make(values[i]);
}

template <int n>
METATE_DEVICE void activate(float (&values)[n], Activation activation, float alpha) {
    switch (activation) {
        case Activation::silu:
            return make_each(values, [=](float x) { return x * sigmoid(alpha * x); });
        case Activation::gelu:
            return make_each(values, [](float x) { return x * normal_below(x); });
        case Activation::gelu_tanh:
            return make_each(values, [](float x) { return x * sigmoid(gelu_argument(x)); });
        case Activation::relu:
            return make_each(values, [](float x) { return positive(x); });
        default:
            return make_each(values, [](float x) { return positive(x) * positive(x); });
    }
}

// Derivatives that end in 0 and 1 have long done so here; beyond, their terms would overflow.
METATE_DEVICE float before_overflow(float x) {
    constexpr float far = 1000.f;
    return x > far ? far : x < -far ? -far : x;
}

// Derivatives in the place of the values. 1 - sigmoid(x) would leave few digits of sigmoid(-x).
template <int n>
METATE_DEVICE void differentiate(float (&values)[n], Activation activation, float alpha) {
    switch (activation) {
        case Activation::silu:
            return make_each(values, [=](float x) {
                const float z = before_overflow(alpha * x);
                return sigmoid(z) * (1.f + z * sigmoid(-z));
            });
        case Activation::gelu:
            return make_each(values, [](float far) {
                const float x = before_overflow(far);
                return normal_below(x) + x * expf(-0.5f * x * x) * 0.39894228f;
            });
        case Activation::gelu_tanh:
            return make_each(values, [](float far) {
                const float x = before_overflow(far), z = gelu_argument(x);
                return sigmoid(z) * (1.f + x * sigmoid(-z) * gelu_slope * (1.f + 3.f * gelu_cubic * x * x));
            });
        case Activation::relu:
            return make_each(values, [](float x) { return x > 0.f ? 1.f : 0.f; });
        default:
            return make_each(values, [](float x) { return 2.f * positive(x); });
    }
}

// Gate and up of as many columns of a result as 16 bytes hold, where they stand in a row of x.
template <typename T>
struct Pair {
    static constexpr int n = Pack<T>::size;
    float gate[n], up[n];

    METATE_DEVICE static int gate_column(const Shape& s, int column) {
        return s.gating == Gating::up_gate ? s.width + column : column;
    }
    METATE_DEVICE static int up_column(const Shape& s, int column) {
        return s.gating == Gating::up_gate ? column : s.width + column;
    }

    METATE_DEVICE void load(const Shape& s, const T* row, int64_t stride, int column, int count) {
        Pack<T> first{}, second{};
        if (s.gating == Gating::interleaved) {
            first.load(row + 2 * column * stride, stride, 2 * count, s.vectors);
            second.load(row + (2 * column + n) * stride, stride, 2 * count - n, s.vectors);
            METATE_UNROLL
            for (int i = 0; i < n; ++i) {
                gate[i] = widen((i < n / 2 ? first : second).element[2 * i % n]);
                up[i] = widen((i < n / 2 ? first : second).element[2 * i % n + 1]);
            }
            return;
        }
        first.load(row + gate_column(s, column) * stride, stride, count, s.vectors);
        if (s.gating != Gating::none) second.load(row + up_column(s, column) * stride, stride, count, s.vectors);
        METATE_UNROLL
        for (int i = 0; i < n; ++i) {
            gate[i] = widen(first.element[i]);
            up[i] = widen(second.element[i]);
        }
    }

    METATE_DEVICE void store(const Shape& s, T* row, int64_t stride, int column, int count) const {
        Pack<T> first, second;
        if (s.gating == Gating::interleaved) {
            METATE_UNROLL
            for (int i = 0; i < n; ++i) {
                (i < n / 2 ? first : second).element[2 * i % n] = narrow<T>(gate[i]);
                (i < n / 2 ? first : second).element[2 * i % n + 1] = narrow<T>(up[i]);
            }
            first.store(row + 2 * column * stride, stride, 2 * count, s.vectors);
            second.store(row + (2 * column + n) * stride, stride, 2 * count - n, s.vectors);
            return;
        }
        METATE_UNROLL
        for (int i = 0; i < n; ++i) {
            first.element[i] = narrow<T>(gate[i]);
            second.element[i] = narrow<T>(up[i]);
        }
        first.store(row + gate_column(s, column) * stride, stride, count, s.vectors);
        if (s.gating != Gating::none) second.store(row + up_column(s, column) * stride, stride, count, s.vectors);
    }
};

METATE_DEVICE float at_most(float x, float limit) {
    return x > limit ? limit : x;
}
METATE_DEVICE float within(float x, float limit) {
    return x < -limit ? -limit : at_most(x, limit);
}

struct Forward {
    Shape shape;
    View<2> x, out;
};

template <typename T>
METATE_KERNEL(block_threads, 1)
forward_kernel(METATE_PARAMETER(Forward, f)) {
    const Shape& s = f.shape;
    const int64_t row = warp_number() / s.pieces;
    if (row >= f.out.size[0]) return;
    const int column = static_cast<int>(warp_number() % s.pieces * warp_size + lane()) * Pack<T>::size;
    const int count = s.width - column;
    if (count <= 0) return;
    Pair<T> x;
    x.load(s, static_cast<const T*>(f.x.data) + row * f.x.stride[0], f.x.stride[1], column, count);
    make_each(x.gate, [&](float gate) { return at_most(gate, s.limit); });
    activate(x.gate, s.activation, s.alpha);
    Pack<T> result;
    METATE_UNROLL
    for (int i = 0; i < Pack<T>::size; ++i) {
        const float factor = s.gating == Gating::none ? 1.f : within(x.up[i], s.limit) + s.shift;
        result.element[i] = narrow<T>(x.gate[i] * factor);
    }
    result.store(static_cast<T*>(f.out.data) + row * f.out.stride[0] + column * f.out.stride[1], f.out.stride[1], count,
                 s.vectors);
}

struct Backward {
    Shape shape;
    View<2> grad, x, dx;
};

template <typename T>
METATE_KERNEL(block_threads, 1)
backward_kernel(METATE_PARAMETER(Backward, f)) {
    constexpr int n = Pack<T>::size;
    const Shape& s = f.shape;
    const int64_t row = warp_number() / s.pieces;
    if (row >= f.dx.size[0]) return;
    const int column = static_cast<int>(warp_number() % s.pieces * warp_size + lane()) * n;
    const int count = s.width - column;
    if (count <= 0) return;
    Pair<T> x;
    x.load(s, static_cast<const T*>(f.x.data) + row * f.x.stride[0], f.x.stride[1], column, count);
    Pack<T> grad{};
    grad.load(static_cast<const T*>(f.grad.data) + row * f.grad.stride[0] + column * f.grad.stride[1], f.grad.stride[1],
              count, s.vectors);
    float value[n], slope[n];
    METATE_UNROLL
    for (int i = 0; i < n; ++i) value[i] = slope[i] = at_most(x.gate[i], s.limit);
    activate(value, s.activation, s.alpha);
    differentiate(slope, s.activation, s.alpha);
    METATE_UNROLL
    for (int i = 0; i < n; ++i) {
        const float g = widen(grad.element[i]), up = x.up[i];
        const float factor = s.gating == Gating::none ? 1.f : within(up, s.limit) + s.shift;
        x.gate[i] = x.gate[i] > s.limit ? 0.f : g * slope[i] * factor;  // NaN stays
        x.up[i] = fabsf(up) > s.limit ? 0.f : g * value[i];
    }
    x.store(s, static_cast<T*>(f.dx.data) + row * f.dx.stride[0], f.dx.stride[1], column, count);
}

// Vectors begin at every column that is a multiple of their size: the second half of a row, too.
template <typename Call>
Shape shape_of(const Call& c, const View<2>& x, int64_t width) {
    const int64_t size = 16 / bytes_of(x.dtype);
    const bool halves = c.gating == Gating::gate_up || c.gating == Gating::up_gate;
    const int pieces = static_cast<int>(ceil_div(width, warp_size * size));
    return {c.activation, c.gating,
            c.limit,      c.alpha,
            c.shift,      static_cast<int>(width),
            pieces,       has_vectors(x) && (!halves || width % size == 0)};
}

template <typename Body>
void for_narrow_type(const char* op, DType dtype, const Body& body) {
    if (dtype == DType::f64) refuse(op, "x is float64");
    dtype == DType::bf16  ? body.template operator()<bf16>()
    : dtype == DType::f16 ? body.template operator()<f16>()
                          : body.template operator()<float>();
}

}  // namespace

void gated_activation(const GatedActivation& g, const Device& device) {
    Forward f{shape_of(g, g.x, g.out.size[1]), g.x, g.out};
    f.shape.vectors = f.shape.vectors && has_vectors(g.out);
    if (!f.shape.pieces) return;
    for_narrow_type("gated_activation", g.x.dtype, [&]<typename T>() {
        launch_warps("gated_activation", forward_kernel<T>, g.out.size[0] * f.shape.pieces, 0, device, f);
    });
}

void gated_activation_backward(const GatedActivationBackward& g, const Device& device) {
    Backward f{shape_of(g, g.x, g.grad.size[1]), g.grad, g.x, g.dx};
    f.shape.vectors = f.shape.vectors && has_vectors(g.grad) && has_vectors(g.dx);
    if (!f.shape.pieces) return;
    for_narrow_type("gated_activation_backward", g.x.dtype, [&]<typename T>() {
        launch_warps("gated_activation_backward", backward_kernel<T>, g.x.size[0] * f.shape.pieces, 0, device, f);
    });
}

}  // namespace metate::cuda
