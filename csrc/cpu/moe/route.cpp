// The choice of experts, its gradient, and the sorting of choices.
#include <math.h>

#include "functions.h"
#include "rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int32_t barred = -2147483647 - 1, best_of_all = 2147483647;

// An integer that orders as floats do, NaN above all, both zeros alike.
METATE_FN int32_t key_of(float x) {
    if (x != x) return best_of_all;
    const int32_t bits = bit_cast<int32_t>(x + 0.0f);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

template <class T>
void read_row(float* to, const View<2>& x, int64_t t) {
    const T* const row = static_cast<const T*>(x.data) + t * x.stride[0];
    for (int64_t e = 0; e < x.size[1]; e += width)
        store(to + e, load_any(row + e * x.stride[1], x.stride[1], x.size[1] - e));
}

METATE_FN float softplus(float x) {
    return x > 20 ? x : static_cast<float>(log1p(::exp(static_cast<double>(x))));
}

// Scores of n logits, which are followed by room for a whole vector.
void score_row(float* scores, const float* logits, int64_t n, Score score) {
    float largest_logit = -__builtin_inff();
    if (score == Score::softmax)
        for (int64_t e = 0; e < n; ++e) largest_logit = logits[e] > largest_logit ? logits[e] : largest_logit;
    vf total = splat(0.0f);
    for (int64_t e = 0; e < n; e += width) {
        const int64_t left = smaller(n - e, width);
        const vf x = load(logits + e, left);
        if (score == Score::softmax) {
            const vf power = exp(x - splat(largest_logit));
            store(scores + e, power);
            total = total + (left < width ? load(scores + e, left) : power);
        } else {
            store(scores + e, score == Score::sigmoid ? sigmoid(x) : x);
        }
    }
    if (score == Score::softmax) {
        const vf sum_of_all = splat(sum(total));
        for (int64_t e = 0; e < n; e += width) store(scores + e, load(scores + e) / sum_of_all);
    }
    if (score == Score::sqrt_softplus)
        for (int64_t e = 0; e < n; ++e) scores[e] = sqrtf(softplus(scores[e]));
}

// The first of the largest of n keys.
int64_t best_of(const int32_t* keys, int64_t n) {
    int32_t most = barred;
    for (int64_t i = 0; i < n; ++i) most = keys[i] > most ? keys[i] : most;
    int64_t at = 0;
    while (keys[at] != most) ++at;
    return at;
}

struct Workspace {
    float *logits, *scores;
    int32_t *keys, *groups;
    double* weights;
};

Workspace workspace(Arena& arena, int64_t experts, int64_t groups, int64_t k) {
    return {arena.take<float>(experts + width), arena.take<float>(experts + width), arena.take<int32_t>(experts),
            arena.take<int32_t>(groups), arena.take<double>(k)};
}

// Bars the experts of all groups but the best.
void bar_groups(const MoeTopk& call, const Workspace& at, const float* values) {
    const int64_t size = call.logits.size[1] / call.groups;
    for (int64_t g = 0; g < call.groups; ++g) {
        const int32_t* const keys = at.keys + g * size;
        const int64_t first = best_of(keys, size);
        at.groups[g] = keys[first];
        if (call.group_rule == 0) continue;
        const float* const value = values + g * size;
        int64_t best = 0, second = -1;
        for (int64_t i = 1; i < size; ++i) {
            if (key_of(value[i]) > key_of(value[best])) {
                second = best;
                best = i;
            } else if (second < 0 || key_of(value[i]) > key_of(value[second])) {
                second = i;
            }
        }
        at.groups[g] = key_of(value[best] + (second < 0 ? 0.0f : value[second]));
    }
    for (int64_t i = 0; i < call.top_groups; ++i) {
        const int64_t g = best_of(at.groups, call.groups);
        at.groups[g] = barred;
    }
    // What is barred now was chosen; keys of groups are never as low.
    for (int64_t g = 0; g < call.groups; ++g)
        for (int64_t i = 0; at.groups[g] != barred && i < size; ++i) at.keys[g * size + i] = barred;
}

// The scores of the chosen to weights.
void weigh(double* weights, int64_t k, Score score, bool renormalise, double scaling) {
    if (score == Score::softmax_chosen) {
        double most = weights[0], total = 0;
        for (int64_t j = 1; j < k; ++j) most = weights[j] > most ? weights[j] : most;
        for (int64_t j = 0; j < k; ++j) total += weights[j] = ::exp(weights[j] - most);
        for (int64_t j = 0; j < k; ++j) weights[j] /= total;
    }
    double total = 1e-20;
    for (int64_t j = 0; j < k && renormalise; ++j) total += weights[j];
    for (int64_t j = 0; j < k; ++j) weights[j] *= renormalise ? scaling / total : scaling;
}

METATE_FN float& float_at(const View<2>& x, int64_t i, int64_t j) {
    return static_cast<float*>(x.data)[i * x.stride[0] + j * x.stride[1]];
}

template <class T>
void choose(const MoeTopk& call, int64_t t, const Workspace& at) {
    const int64_t experts = call.logits.size[1], k = call.weights.size[1];
    read_row<T>(at.logits, call.logits, t);
    score_row(at.scores, at.logits, experts, call.score);
    float* const values = at.logits;  // what is chosen by; the logits are not needed any more
    if (call.bias)
        for (int64_t e = 0; e < experts; ++e)
            values[e] = at.scores[e] + static_cast<const float*>(call.bias.data)[e * call.bias.stride[0]];
    for (int64_t e = 0; e < experts; ++e) at.keys[e] = key_of(values[e]);
    if (call.groups > 1) bar_groups(call, at, call.bias ? values : at.scores);
    for (int64_t j = 0; j < k; ++j) {
        const int64_t e = best_of(at.keys, experts);
        at.keys[e] = barred;
        static_cast<int32_t*>(call.experts.data)[t * call.experts.stride[0] + j * call.experts.stride[1]] =
            static_cast<int32_t>(e);
        at.weights[j] = static_cast<double>(at.scores[e]);
    }
    weigh(at.weights, k, call.score, call.renormalise, static_cast<double>(call.scaling));
    for (int64_t j = 0; j < k; ++j) float_at(call.weights, t, j) = static_cast<float>(at.weights[j]);
}

// The gradient of the weights of one row, as in reference.py.
template <class T>
void choose_backward(const MoeTopkBackward& call, int64_t t, const Workspace& at) {
    const int64_t experts = call.logits.size[1], k = call.grad.size[1];
    read_row<T>(at.logits, call.logits, t);
    score_row(at.scores, at.logits, experts, call.score);
    double* const grads = at.weights + k;
    for (int64_t j = 0; j < k; ++j) at.weights[j] = static_cast<double>(at.scores[index_at(call.experts, t, j)]);
    if (call.score == Score::softmax_chosen) weigh(at.weights, k, call.score, false, 1);
    double total = 1e-20, common = 0;
    for (int64_t j = 0; j < k; ++j) {
        total += at.weights[j];
        grads[j] = static_cast<double>(float_at(call.grad, t, j)) * static_cast<double>(call.scaling);
        common += grads[j] * at.weights[j];
    }
    for (int64_t j = 0; j < k && call.renormalise; ++j) grads[j] = (grads[j] - common / total) / total;
    common = 0;
    for (int64_t j = 0; j < k; ++j) common += grads[j] * at.weights[j];
    const bool everywhere = call.score == Score::softmax;
    float* const out = at.logits;  // read before it is written
    for (int64_t j = 0; j < k; ++j) {
        const double weight = at.weights[j];
        if (call.score == Score::softmax_chosen) grads[j] = weight * (grads[j] - common);
        if (call.score == Score::sigmoid) grads[j] *= weight * (1 - weight);
        if (call.score == Score::sqrt_softplus) {
            const double x = static_cast<double>(at.logits[index_at(call.experts, t, j)]);
            grads[j] *= 1 / (1 + ::exp(-x)) / (2 * weight);
        }
    }
    for (int64_t e = 0; e < experts; ++e) out[e] = everywhere ? static_cast<float>(-common) : 0.0f;
    for (int64_t j = 0; j < k; ++j) out[index_at(call.experts, t, j)] += static_cast<float>(grads[j]);
    for (int64_t e = 0; e < experts && everywhere; ++e) out[e] *= at.scores[e];
    T* const row = static_cast<T*>(call.d_logits.data) + t * call.d_logits.stride[0];
    for (int64_t e = 0; e < experts; e += width)
        store_any(row + e * call.d_logits.stride[1], call.d_logits.stride[1], load(out + e), experts - e);
}

// Tokens in pieces, each worker with a workspace of its own.
template <class Body>
void for_tokens(const Runtime& runtime, int64_t tokens, int64_t experts, int64_t groups, int64_t k, const Body& body) {
    const int64_t step = larger((1 << 12) / experts, 1), pieces = ceil_div(tokens, step);
    const Runtime workers = worth(runtime, tokens * experts);
    const auto own =
        lay_out(workers, pieces, [](Arena&) {}, [&](Arena& arena) { return workspace(arena, experts, groups, k); });
    for_pieces(workers, pieces, [&](int worker, int64_t piece) {
        for (int64_t t = piece * step; t < smaller(tokens, (piece + 1) * step); ++t) body(t, own(worker));
    });
}

}  // namespace

void moe_topk(const MoeTopk& call, const Runtime& runtime) {
    const int64_t tokens = call.logits.size[0], experts = call.logits.size[1];
    if (tokens == 0) return;
    with_floats(call.logits.dtype, [&]<class T>() {
        for_tokens(runtime, tokens, experts, call.groups, call.weights.size[1],
                   [&](int64_t t, const Workspace& at) { choose<T>(call, t, at); });
    });
}

void moe_topk_backward(const MoeTopkBackward& call, const Runtime& runtime) {
    const int64_t tokens = call.logits.size[0], experts = call.logits.size[1];
    if (tokens == 0 || experts == 0) return;
    with_floats(call.logits.dtype, [&]<class T>() {
        for_tokens(runtime, tokens, experts, 1, 2 * call.grad.size[1],
                   [&](int64_t t, const Workspace& at) { choose_backward<T>(call, t, at); });
    });
}

// One worker: counting costs less than waking others.
void moe_sort(const MoeSort& call, const Runtime&) {
    const int64_t tokens = call.experts.size[0], k = call.experts.size[1], experts = call.num_experts;
    int32_t *const offsets = static_cast<int32_t*>(call.offsets.data), *const order =
                                                                           static_cast<int32_t*>(call.order.data);
    int32_t* const inverse = static_cast<int32_t*>(call.inverse.data);
    const auto is_expert = [&](int64_t e) { return e >= 0 && e < experts; };
    for (int64_t e = 0; e <= experts; ++e) offsets[e] = 0;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < k; ++j)
            if (const int64_t e = index_at(call.experts, t, j); is_expert(e)) ++offsets[e + 1];
    for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
    const int64_t rows = offsets[experts];
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < k; ++j) {
            const int64_t e = index_at(call.experts, t, j);
            const int32_t row = is_expert(e) ? offsets[e]++ : -1;
            if (row >= 0) order[row] = static_cast<int32_t>(t * k + j);
            inverse[t * k + j] = row;
        }
    }
    // Each offset has moved to the next one.
    for (int64_t e = experts; e > 0; --e) offsets[e] = offsets[e - 1];
    offsets[0] = 0;
    for (int64_t r = rows; r < tokens * k; ++r) order[r] = -1;
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(moe_topk, MoeTopk, p.logits.dtype)
METATE_DISPATCH(moe_topk_backward, MoeTopkBackward, p.logits.dtype)
METATE_DISPATCH(moe_sort, MoeSort, p.experts.dtype)
