// f(gate) · (up + shift) and its gradient.
#include "functions.h"
#include "rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t piece_elements = 1 << 13;

// Derivatives that end in 0 and 1 have long done so here; beyond, their terms would overflow.
METATE_FN vf before_overflow(vf x) {
    const vf far = splat(1000.0f);
    return max(splat(0.0f) - far, min(far, x));
}

// f and its derivative.
template <Activation activation>
METATE_FN vf activate(vf x, vf alpha, vf* slope) {
    const vf zero = splat(0.0f), half = splat(0.5f), one = splat(1.0f);
    if constexpr (activation == Activation::silu) {
        const vf z = alpha * x;
        vf rest;
        const vf s = sigmoid(z, slope ? &rest : nullptr);
        if (slope) *slope = s * fma(before_overflow(z), rest, one);
        return x * s;
    } else if constexpr (activation == Activation::gelu) {
        const vf below = normal_below(x), near = before_overflow(x);
        if (slope) *slope = fma(near * splat(0.39894228f), exp(splat(-0.5f) * near * near), below);
        return x * below;
    } else if constexpr (activation == Activation::gelu_tanh) {
        const vf c = splat(0.79788456f), cubic = splat(0.044715f), near = before_overflow(x), square = near * near;
        const vf t = tanh(c * fma(cubic * square, near, near)), below = half * (one + t);
        if (slope) *slope = fma(half * near * (one - t * t), c * fma(splat(3 * 0.044715f), square, one), below);
        return x * below;
    } else {
        const vf positive = select(less(x, zero), zero, x);  // NaN stays
        if constexpr (activation == Activation::relu) {
            if (slope) *slope = select(less(zero, x), one, zero);
            return positive;
        }
        if (slope) *slope = positive + positive;
        return positive * positive;
    }
}

// Where the numbers of a row stand: gates, and ups unless there are none.
struct Halves {
    int64_t gate, up, stride;
    bool by_turns;  // side by side
};

Halves halves_of(Gating gating, int64_t width_of_result, int64_t stride) {
    switch (gating) {
        case Gating::gate_up:
            return {0, width_of_result * stride, stride, false};
        case Gating::up_gate:
            return {width_of_result * stride, 0, stride, false};
        case Gating::interleaved:
            return {0, stride, 2 * stride, stride == 1};
        default:
            return {0, -1, stride, false};
    }
}

// The numbers of one vector of a row, after the limit.
struct Inputs {
    vf gate, up;
    vm gate_passes, up_passes;
};

template <class T>
METATE_FN Inputs read(const T* row, const Halves& halves, int64_t i, int64_t left, vf limit, vf shift) {
    Inputs in{};
    vf gate, up = splat(1.0f);
    if (halves.by_turns && left >= width) {
        gate = load(row + 2 * i);
        up = load(row + 2 * i + width);
        separate(gate, up);
    } else {
        gate = load_any(row + halves.gate + i * halves.stride, halves.stride, left);
        if (halves.up >= 0) up = load_any(row + halves.up + i * halves.stride, halves.stride, left);
    }
    in.gate = min(limit, gate);
    in.gate_passes = not_less(limit, gate);
    in.up = up;
    if (halves.up >= 0) {
        in.up = max(splat(0.0f) - limit, min(limit, up)) + shift;
        in.up_passes = not_less(limit, abs(up));
    }
    return in;
}

template <Activation activation, class T>
void forward(const GatedActivation& call, int64_t r) {
    const int64_t n = call.out.size[1];
    const Halves halves = halves_of(call.gating, n, call.x.stride[1]);
    const T* const x = static_cast<const T*>(call.x.data) + r * call.x.stride[0];
    T* const out = static_cast<T*>(call.out.data) + r * call.out.stride[0];
    const vf limit = splat(call.limit), alpha = splat(call.alpha), shift = splat(call.shift);
    for (int64_t i = 0; i < n; i += width) {
        const Inputs in = read(x, halves, i, n - i, limit, shift);
        store_any(out + i * call.out.stride[1], call.out.stride[1],
                  activate<activation>(in.gate, alpha, nullptr) * in.up, n - i);
    }
}

template <Activation activation, class T>
void backward(const GatedActivationBackward& call, int64_t r) {
    const int64_t n = call.grad.size[1];
    const Halves halves = halves_of(call.gating, n, call.x.stride[1]);
    const Halves to = halves_of(call.gating, n, call.dx.stride[1]);
    const T* const x = static_cast<const T*>(call.x.data) + r * call.x.stride[0];
    const T* const grad = static_cast<const T*>(call.grad.data) + r * call.grad.stride[0];
    T* const dx = static_cast<T*>(call.dx.data) + r * call.dx.stride[0];
    const vf limit = splat(call.limit), alpha = splat(call.alpha), shift = splat(call.shift), zero = splat(0.0f);
    for (int64_t i = 0; i < n; i += width) {
        const Inputs in = read(x, halves, i, n - i, limit, shift);
        const vf g = load_any(grad + i * call.grad.stride[1], call.grad.stride[1], n - i);
        vf slope;
        const vf value = activate<activation>(in.gate, alpha, &slope);
        vf d_gate = select(in.gate_passes, g * slope * in.up, zero), d_up = select(in.up_passes, g * value, zero);
        if (to.by_turns && n - i >= width) {
            interleave(d_gate, d_up);
            store(dx + 2 * i, d_gate);
            store(dx + 2 * i + width, d_up);
            continue;
        }
        store_any(dx + to.gate + i * to.stride, to.stride, d_gate, n - i);
        if (to.up >= 0) store_any(dx + to.up + i * to.stride, to.stride, d_up, n - i);
    }
}

// run<activation>() of a number known at run time.
template <class Run>
METATE_FN void with_activation(Activation activation, const Run& run) {
    switch (activation) {
        case Activation::silu:
            return run.template operator()<Activation::silu>();
        case Activation::gelu:
            return run.template operator()<Activation::gelu>();
        case Activation::gelu_tanh:
            return run.template operator()<Activation::gelu_tanh>();
        case Activation::relu:
            return run.template operator()<Activation::relu>();
        default:
            return run.template operator()<Activation::relu2>();
    }
}

template <class Body>
void for_rows(const Runtime& runtime, const View<2>& x, const Body& body) {
    const int64_t step = larger(piece_elements / larger(x.size[1], 1), 1);
    for_pieces(worth(runtime, x.size[0] * x.size[1]), ceil_div(x.size[0], step), [&](int, int64_t piece) {
        for (int64_t r = piece * step; r < smaller(x.size[0], (piece + 1) * step); ++r) body(r);
    });
}

}  // namespace

void gated_activation(const GatedActivation& call, const Runtime& runtime) {
    with_floats(call.x.dtype, [&]<class T>() {
        with_activation(call.activation, [&]<Activation activation>() {
            for_rows(runtime, call.x, [&](int64_t r) { forward<activation, T>(call, r); });
        });
    });
}

void gated_activation_backward(const GatedActivationBackward& call, const Runtime& runtime) {
    with_floats(call.x.dtype, [&]<class T>() {
        with_activation(call.activation, [&]<Activation activation>() {
            for_rows(runtime, call.x, [&](int64_t r) { backward<activation, T>(call, r); });
        });
    });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(gated_activation, GatedActivation, p.x.dtype)
METATE_DISPATCH(gated_activation_backward, GatedActivationBackward, p.x.dtype)
