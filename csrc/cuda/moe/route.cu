// Choosing experts: a warp finds the best of a row one after another, each the best of those behind the last, so that
// nothing is stored but what was chosen; then the gradient of the weights.
#include "numbers.h"

namespace metate::cuda {
namespace {

using namespace moe;

// The best first: NaN, then the larger value, then the lower number.
struct Candidate {
    int value, number;

    METATE_DEVICE static Candidate of(float x, int number) {
        const int bits = static_cast<int>(bits_of(x + 0.f));  // one zero
        return {x != x ? 0x7fffffff : bits < 0 ? bits ^ 0x7fffffff : bits, number};
    }
    METATE_DEVICE float number_of_value() const {
        return float_of(static_cast<uint32_t>(value < 0 ? value ^ 0x7fffffff : value));
    }
    METATE_DEVICE bool better_than(const Candidate& other) const {
        return value != other.value ? value > other.value : number < other.number;
    }
};

METATE_DEVICE constexpr Candidate worst() {
    return {static_cast<int>(0x80000000u), 0x7fffffff};
}
METATE_DEVICE constexpr Candidate before_all() {
    return {0x7fffffff, -1};
}

METATE_DEVICE Candidate best_of_lanes(Candidate c) {
    METATE_UNROLL
    for (int flip = 16; flip > 0; flip /= 2) {
        const Candidate other{shuffle_xor(c.value, flip), shuffle_xor(c.number, flip)};
        if (other.better_than(c)) c = other;
    }
    return c;
}

METATE_DEVICE float own_score(float x, Score score) {
    if (score == Score::sigmoid) return sigmoid(x);
    if (score == Score::sqrt_softplus) return sqrtf((x > 0.f ? x : 0.f) + log1pf(expf(-fabsf(x))));
    return x;
}

// A row of logits and, where scores are a softmax over it, what they are divided by.
struct Row {
    View<2> logits;
    int64_t row;
    int size;
    Score score;
    float largest = 0.f, total = 1.f;

    METATE_DEVICE float logit(int expert) const {
        return number_at(logits.data, logits.dtype, row * logits.stride[0] + expert * logits.stride[1]);
    }
    METATE_DEVICE void find_total() {
        if (score != Score::softmax) return;
        largest = -INFINITY;
        for (int expert = lane(); expert < size; expert += warp_size) largest = fmaxf(largest, logit(expert));
        largest = largest_of_lanes(largest);
        total = 0.f;
        for (int expert = lane(); expert < size; expert += warp_size) total += expf(logit(expert) - largest);
        total = add_lanes(total);
    }
    METATE_DEVICE float score_of(float logit) const {
        return score == Score::softmax ? expf(logit - largest) / total : own_score(logit, score);
    }
};

struct Topk {
    MoeTopk call;
    int size, k, groups, group_size, top_groups;
};

// What an expert is chosen by.
METATE_DEVICE float value_of(const Topk& f, const Row& row, int expert) {
    const float logit = row.logit(expert);
    const View<1>& bias = f.call.bias;
    return bias ? row.score_of(logit) + number_at(bias.data, bias.dtype, expert * bias.stride[0]) : logit;
}

METATE_DEVICE Candidate value_of_group(const Topk& f, const Row& row, int group) {
    Candidate best = worst(), second = worst();
    METATE_NO_UNROLL
    for (int expert = group * f.group_size; expert < (group + 1) * f.group_size; ++expert) {
        const bool plain = f.call.group_rule == 1 && !f.call.bias;
        const auto c = Candidate::of(plain ? row.score_of(row.logit(expert)) : value_of(f, row, expert), expert);
        if (c.better_than(best)) {
            second = best;
            best = c;
        } else if (c.better_than(second)) {
            second = c;
        }
    }
    float value = best.number_of_value();
    if (f.call.group_rule == 1 && f.group_size > 1) value += second.number_of_value();
    return Candidate::of(value, group);
}

// The numbers of the best groups, for the whole warp.
METATE_DEVICE void choose_groups(const Topk& f, const Row& row, unsigned char* chosen) {
    const Candidate own = lane() < f.groups ? value_of_group(f, row, lane()) : worst();
    Candidate last = before_all();
    METATE_NO_UNROLL
    for (int i = 0; i < f.top_groups; ++i) {
        Candidate best = last.better_than(own) ? own : worst();
        for (int group = lane() + warp_size; group < f.groups; group += warp_size) {
            const Candidate c = value_of_group(f, row, group);
            if (last.better_than(c) && c.better_than(best)) best = c;
        }
        last = best_of_lanes(best);
        if (lane() == 0) store_shared(chosen + i * 4, last.number);
    }
    sync_warp();
}

METATE_DEVICE float* weight_at(const View<2>& weights, int64_t row, int choice) {
    return static_cast<float*>(weights.data) + row * weights.stride[0] + choice * weights.stride[1];
}

// From what was chosen to weights: each lane keeps to the choices that it wrote.
METATE_DEVICE void finish_weights(const Topk& f, int64_t row, float largest) {
    const View<2>& weights = f.call.weights;
    float factor = 1.f;
    const auto sum = [&] {
        float total = 0.f;
        for (int j = lane(); j < f.k; j += warp_size) total += load_global<float>(weight_at(weights, row, j));
        return add_lanes(total);
    };
    if (f.call.score == Score::softmax_chosen) {
        for (int j = lane(); j < f.k; j += warp_size) {
            float* const at = weight_at(weights, row, j);
            store_global(at, expf(load_global<float>(at) - largest));
        }
        factor = sum();
        for (int j = lane(); j < f.k; j += warp_size) {
            float* const at = weight_at(weights, row, j);
            store_global(at, load_global<float>(at) / factor);
        }
    }
    factor = f.call.renormalise ? sum() + 1e-20f : 1.f;
    for (int j = lane(); j < f.k; j += warp_size) {
        float* const at = weight_at(weights, row, j);
        store_global(at, load_global<float>(at) / factor * f.call.scaling);
    }
}

METATE_KERNEL(block_threads, 1)
topk_kernel(METATE_PARAMETER(Topk, f)) {
    METATE_SHARED(unsigned char, shared);
    unsigned char* const groups = shared + warp() * f.top_groups * 4;
    Row row{f.call.logits, warp_number(), f.size, f.call.score};
    if (row.row >= f.call.logits.size[0]) return;
    row.find_total();
    if (f.groups > 1) choose_groups(f, row, groups);
    const int candidates = f.groups > 1 ? f.top_groups * f.group_size : f.size;
    Candidate last = before_all();
    float largest = -INFINITY;
    METATE_NO_UNROLL
    for (int j = 0; j < f.k; ++j) {
        Candidate best = worst();
        METATE_NO_UNROLL
        for (int i = lane(); i < candidates; i += warp_size) {
            int expert = i;
            if (f.groups > 1)
                expert = load_shared<int>(groups + i / f.group_size * 4) * f.group_size + i % f.group_size;
            const auto c = Candidate::of(value_of(f, row, expert), expert);
            if (last.better_than(c) && c.better_than(best)) best = c;
        }
        last = best_of_lanes(best);
        const float logit = row.logit(last.number);
        largest = fmaxf(largest, logit);
        if (lane() != j % warp_size) continue;
        store_global(weight_at(f.call.weights, row.row, j), row.score_of(logit));
        store_global(static_cast<int32_t*>(f.call.experts.data) + row.row * f.call.experts.stride[0] +
                         j * f.call.experts.stride[1],
                     last.number);
    }
    finish_weights(f, row.row, largest);
}

struct TopkBackward {
    MoeTopkBackward call;
    int size, k;
};

// The choices of a row with their slopes: `slopes` and `experts` are lists in shared memory. Returns Σ grad · weight.
METATE_DEVICE float make_slopes(const TopkBackward& f, const Row& row, unsigned char* slopes, unsigned char* experts) {
    const MoeTopkBackward& c = f.call;
    float largest = -INFINITY, total = 1.f;
    const auto expert_of = [&](int j) { return integer_at(c.experts, row.row, j); };
    const auto chosen = [&](const auto& visit) {
        for (int j = lane(); j < f.k; j += warp_size) {
            const int expert = expert_of(j);
            if (expert >= 0 && expert < f.size) visit(j, row.logit(expert));
        }
    };
    if (c.score == Score::softmax_chosen) {
        chosen([&](int, float logit) { largest = fmaxf(largest, logit); });
        largest = largest_of_lanes(largest);
        total = 0.f;
        chosen([&](int, float logit) { total += expf(logit - largest); });
        total = add_lanes(total);
    }
    const auto weight_of = [&](float logit) {
        return c.score == Score::softmax_chosen ? expf(logit - largest) / total : row.score_of(logit);
    };
    const auto grad_of = [&](int j) {  // rounded, or it would not cancel against their sum
        const int64_t at = row.row * c.grad.stride[0] + j * c.grad.stride[1];
        return product(load_global<float>(static_cast<const float*>(c.grad.data) + at), c.scaling);
    };
    float sum = 1.f, common = 0.f;
    if (c.renormalise) {
        sum = 0.f;
        chosen([&](int, float logit) { sum += weight_of(logit); });
        sum = add_lanes(sum) + 1e-20f;
        chosen([&](int j, float logit) { common += grad_of(j) * (weight_of(logit) / sum); });  // all of one alone
        common = add_lanes(common);
    }
    const auto slope_of = [&](int j) { return (grad_of(j) - common) / sum; };
    float dot = 0.f;
    chosen([&](int j, float logit) { dot += slope_of(j) * weight_of(logit); });
    dot = add_lanes(dot);
    for (int j = lane(); j < f.k; j += warp_size) store_shared(experts + j * 4, expert_of(j));
    chosen([&](int j, float logit) {
        const float weight = weight_of(logit);
        float slope = slope_of(j);
        if (c.score == Score::softmax_chosen) slope = weight * (slope - dot);
        if (c.score == Score::sigmoid) slope = slope * weight * (1.f - weight);
        if (c.score == Score::sqrt_softplus) slope = slope * sigmoid(logit) / (2.f * weight);
        store_shared(slopes + j * 4, slope);
    });
    sync_warp();
    return dot;
}

METATE_DEVICE void store_number(void* data, DType dtype, int64_t at, float value) {
    switch (dtype) {
        case DType::bf16:
            return store_global(static_cast<bf16*>(data) + at, from_float<bf16>(value));
        case DType::f16:
            return store_global(static_cast<f16*>(data) + at, from_float<f16>(value));
        default:
            return store_global(static_cast<float*>(data) + at, value);
    }
}

METATE_KERNEL(block_threads, 1)
topk_backward_kernel(METATE_PARAMETER(TopkBackward, f)) {
    METATE_SHARED(unsigned char, shared);
    unsigned char *const slopes = shared + warp() * f.k * 8, *const experts = slopes + f.k * 4;
    Row row{f.call.logits, warp_number(), f.size, f.call.score};
    if (row.row >= f.call.logits.size[0]) return;
    row.find_total();
    const float common = make_slopes(f, row, slopes, experts);
    for (int expert = lane(); expert < f.size; expert += warp_size) {
        float slope = 0.f;
        for (int j = 0; j < f.k; ++j)
            if (load_shared<int>(experts + j * 4) == expert) slope += load_shared<float>(slopes + j * 4);
        if (f.call.score == Score::softmax) slope = row.score_of(row.logit(expert)) * (slope - common);
        const View<2>& out = f.call.d_logits;
        store_number(out.data, out.dtype, row.row * out.stride[0] + expert * out.stride[1], slope);
    }
}

constexpr int64_t most_shared = 48 * 1024;

}  // namespace

void moe_topk(const MoeTopk& call, const Device& device) {
    const int64_t shared = call.groups > 1 ? call.top_groups * 4 * warps : 0;
    if (call.logits.dtype == DType::f64) refuse("moe_topk", "logits are float64");
    if (shared > most_shared) refuse("moe_topk", "more than 3072 groups are chosen");
    const int size = static_cast<int>(call.logits.size[1]), groups = static_cast<int>(call.groups);
    const Topk f{call,   size,          static_cast<int>(call.weights.size[1]),
                 groups, size / groups, static_cast<int>(call.top_groups)};
    launch_warps("moe_topk", topk_kernel, call.logits.size[0], static_cast<size_t>(shared), device, f);
}

void moe_topk_backward(const MoeTopkBackward& call, const Device& device) {
    const int64_t shared = call.experts.size[1] * 8 * warps;
    if (call.logits.dtype == DType::f64) refuse("moe_topk_backward", "logits are float64");
    if (shared > most_shared) refuse("moe_topk_backward", "more than 1536 experts are chosen for a row");
    const TopkBackward f{call, static_cast<int>(call.logits.size[1]), static_cast<int>(call.experts.size[1])};
    launch_warps("moe_topk_backward", topk_backward_kernel, call.logits.size[0], static_cast<size_t>(shared), device,
                 f);
}

}  // namespace metate::cuda
