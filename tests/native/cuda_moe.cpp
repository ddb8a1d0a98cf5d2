// The CUDA kernels of mixtures of experts, run by the emulator, against loops in double precision: random cases over
// dtypes, strides, gathered and sorted rows, empty and crowded experts, NaN where nothing may look, and another order
// of the threads every time. `cuda_moe [cases [seed]]`

#include <numeric>

#include "moe.h"
#include "tensors.h"

using namespace metate;

namespace {

DType half_type(Random& random) {
    return chance(random, 50) ? DType::bf16 : DType::f16;
}

template <int N>
Tensor<N> make(DType dtype, std::vector<int64_t> size, Random& random, double scale = 1) {
    return Tensor<N>(dtype, size, draw(random, 0, 2), random).fill([&] { return scale * normal(random); });
}
template <int N>
View<N> none() {
    return {};
}

// Slots of tokens, some of no expert, sorted on the device and checked here.
struct Route {
    int64_t tokens, k, experts;
    Tensor<2> numbers, inverse;
    Tensor<1> order, offsets;

    int64_t rows() const { return tokens * k; }
};

Route make_route(Random& random, int tokens) {
    const int64_t k = draw(random, 1, 4), experts = pick(random, {1, 3, 8, 40});
    const bool crowded = chance(random, 30);
    Route r{tokens,
            k,
            experts,
            Tensor<2>(DType::i32, {tokens, k}, draw(random, 0, 2), random).fill([&] {
                return crowded ? experts / 2 : draw(random, -1, static_cast<int>(experts));
            }),
            Tensor<2>(DType::i32, {tokens, k}, draw(random, 0, 2), random),
            Tensor<1>(DType::i32, {tokens * k}, 0, random),
            Tensor<1>(DType::i32, {experts + 1}, 0, random)};
    cuda::moe_sort({r.numbers.view, experts, r.order.view, r.inverse.view, r.offsets.view}, emulator::device());
    int64_t row = 0;
    for (int64_t e = 0; e < experts; ++e) {
        require(r.offsets.get({e}) == static_cast<double>(row), "a wrong offset");
        for (int64_t slot = 0; slot < r.rows(); ++slot) {
            if (r.numbers.get({slot / k, slot % k}) != static_cast<double>(e)) continue;
            require(r.order.get({row}) == static_cast<double>(slot), "the order is wrong");
            require(r.inverse.get({slot / k, slot % k}) == static_cast<double>(row++), "the inverse is wrong");
        }
    }
    require(r.offsets.get({experts}) == static_cast<double>(row), "the last offset is wrong");
    for (int64_t slot = 0; slot < r.rows(); ++slot) {
        const double number = r.numbers.get({slot / k, slot % k});
        const bool kept = number >= 0 && number < static_cast<double>(experts);
        require(kept || r.inverse.get({slot / k, slot % k}) == -1, "a slot of no expert has a row");
    }
    for (; row < r.rows(); ++row) require(r.order.get({row}) == -1, "a row of no expert has a slot");
    return r;
}

// Rows moved to experts and back. Rows of no expert hold NaN.
void check_rows(const Route& r, Random& random) {
    const DType dtype = chance(random, 30) ? DType::f32 : half_type(random);
    const int64_t columns = pick(random, {1, 7, 40, 300});
    const Tensor<2> x = make<2>(dtype, {r.tokens, columns}, random);
    Tensor<2> rows(dtype, {r.rows(), columns}, draw(random, 0, 2), random);
    cuda::moe_permute({x.view, r.order.view, r.k, rows.view}, emulator::device());
    rows.each([&](const int64_t (&at)[2]) {
        const auto slot = static_cast<int64_t>(r.order.get({at[0]}));
        const double expected = slot < 0 ? 0 : x.get({slot / r.k, at[1]});
        require(rows.get(at) == expected, "a permuted row is wrong");
        if (slot < 0) rows.set(at, NAN);
    });
    const bool weighted = chance(random, 60);
    const Tensor<2> weights = make<2>(chance(random, 50) ? dtype : DType::f32, {r.tokens, r.k}, random);
    Tensor<2> out(dtype, {r.tokens, columns}, draw(random, 0, 2), random),
        dy = make<2>(dtype, {r.rows(), columns}, random);
    Tensor<2> d_weights(DType::f32, {r.tokens, r.k}, 0, random);
    const View<2> given = weighted ? weights.view : none<2>();
    cuda::moe_unpermute({rows.view, r.inverse.view, given, out.view}, emulator::device());
    cuda::moe_unpermute_backward(
        {x.view, rows.view, r.inverse.view, given, dy.view, weighted ? d_weights.view : none<2>()}, emulator::device());
    Truth<2> sums(out.view), slopes(dy.view), dots(d_weights.view);
    out.each([&](const int64_t (&at)[2]) {
        for (int64_t j = 0; j < r.k; ++j) {
            const auto row = static_cast<int64_t>(r.inverse.get({at[0], j}));
            if (row < 0) continue;
            const double weight = weighted ? weights.get({at[0], j}) : 1;
            sums(at) += weight * rows.get({row, at[1]});
            slopes({row, at[1]}) = weight * x.get(at);
            dots({at[0], j}) += x.get(at) * rows.get({row, at[1]});
        }
    });
    compare("unpermute", "out", out, sums, 2, dtype);
    compare("unpermute_backward", "dy", dy, slopes, 2, dtype);
    if (weighted) compare("unpermute_backward", "d_weights", d_weights, dots, 2, DType::f32);
}

// The best by a plain sort, and the gradient by differences.

struct Topk {
    int64_t groups, top_groups, rule;
    Score score;
    bool renormalise;
};

std::vector<double> scores_of(const std::vector<double>& logits, Score score) {
    std::vector<double> scores = logits;
    const double largest = *std::max_element(logits.begin(), logits.end());
    double total = 0;
    for (double x : logits) total += exp(x - largest);
    for (double& x : scores) {
        if (score == Score::softmax) x = exp(x - largest) / total;
        if (score == Score::sigmoid) x = 1 / (1 + exp(-x));
        if (score == Score::sqrt_softplus) x = sqrt(log1p(exp(x)));
    }
    return scores;
}

std::vector<double> weights_of(const Topk& t, const std::vector<double>& logits, const std::vector<int>& chosen) {
    std::vector<double> scores = scores_of(logits, t.score), weights;
    double total = 0;
    for (int e : chosen) weights.push_back(t.score == Score::softmax_chosen ? exp(logits[e]) : scores[e]);
    for (double w : weights) total += w;
    for (double& w : weights) {
        if (t.renormalise || t.score == Score::softmax_chosen) w /= total;
        w *= 2.5;
    }
    return weights;
}

std::vector<int> choose(const Topk& t, const std::vector<double>& logits, const Tensor<1>* bias, int64_t k) {
    const std::vector<double> scores = scores_of(logits, t.score);
    const auto size = static_cast<int64_t>(logits.size()), length = size / t.groups;
    std::vector<double> value = logits;
    for (int64_t e = 0; bias && e < size; ++e) value[e] = scores[e] + bias->get({e});
    const auto best = [](const std::vector<double>& of, std::vector<int> among, int64_t count) {
        std::stable_sort(among.begin(), among.end(), [&](int a, int b) { return of[a] > of[b]; });
        among.resize(count);
        return among;
    };
    std::vector<double> of_group;
    for (int64_t g = 0; g < t.groups; ++g) {
        std::vector<double> inside(length);
        for (int64_t i = 0; i < length; ++i)
            inside[i] = t.rule == 1 && !bias ? scores[g * length + i] : value[g * length + i];
        std::sort(inside.rbegin(), inside.rend());
        of_group.push_back(inside[0] + (t.rule == 1 && length > 1 ? inside[1] : 0));
    }
    std::vector<int> groups(t.groups), allowed;
    std::iota(groups.begin(), groups.end(), 0);
    groups = best(of_group, groups, t.top_groups);
    std::sort(groups.begin(), groups.end());
    for (int g : groups)
        for (int64_t i = 0; i < length; ++i) allowed.push_back(static_cast<int>(g * length + i));
    return best(value, allowed, k);
}

void check_routing(Random& random) {
    const int64_t tokens = draw(random, 1, 6), groups = pick(random, {1, 1, 3, 40}), length = draw(random, 1, 12);
    const Topk t{groups, draw(random, 1, static_cast<int>(groups)), draw(random, 0, 1),
                 static_cast<Score>(draw(random, 0, 3)), chance(random, 50)};
    const int64_t size = groups * length,
                  k = draw(random, 1, static_cast<int>(std::min<int64_t>(t.top_groups * length, 7)));
    const bool biased = chance(random, 40);
    const Tensor<2> logits = make<2>(chance(random, 50) ? DType::f32 : half_type(random), {tokens, size}, random);
    const Tensor<1> bias = make<1>(DType::f32, {size}, random, 0.3);
    const Tensor<2> grad = make<2>(DType::f32, {tokens, k}, random);
    Tensor<2> weights(DType::f32, {tokens, k}, 0, random), experts(DType::i32, {tokens, k}, draw(random, 0, 2), random);
    Tensor<2> d_logits(logits.view.dtype, {tokens, size}, draw(random, 0, 2), random);
    cuda::moe_topk({logits.view, biased ? bias.view : none<1>(), t.score, groups, t.top_groups, t.rule, t.renormalise,
                    2.5f, weights.view, experts.view},
                   emulator::device());
    cuda::moe_topk_backward({grad.view, logits.view, experts.view, t.score, t.renormalise, 2.5f, d_logits.view},
                            emulator::device());
    Truth<2> truth(weights.view), slopes(d_logits.view);
    for (int64_t row = 0; row < tokens; ++row) {
        std::vector<double> x(size);
        for (int64_t e = 0; e < size; ++e) x[e] = logits.get({row, e});
        const std::vector<int> chosen = choose(t, x, biased ? &bias : nullptr, k);
        const auto loss = [&] {
            const std::vector<double> w = weights_of(t, x, chosen);
            double sum = 0;
            for (int64_t j = 0; j < k; ++j) sum += w[j] * grad.get({row, j});
            return sum;
        };
        const std::vector<double> w = weights_of(t, x, chosen);
        for (int64_t j = 0; j < k; ++j) {
            require(experts.get({row, j}) == chosen[j], "another expert is chosen");
            truth({row, j}) = w[j];
        }
        for (int64_t e = 0; e < size; ++e) {
            const double at = x[e];
            x[e] = at + 1e-5;
            const double above = loss();
            x[e] = at - 1e-5;
            slopes({row, e}) = (above - loss()) / 2e-5;
            x[e] = at;
        }
    }
    compare("topk", "weights", weights, truth, 2, DType::f32);
    compare("topk_backward", "d_logits", d_logits, slopes, 2,
            logits.view.dtype == DType::f32 ? DType::f32 : d_logits.view.dtype);
}

double activate(double x, Activation activation, double alpha) {
    switch (activation) {
        case Activation::silu:
            return x / (1 + exp(-alpha * x));
        case Activation::gelu:
            return 0.5 * x * (1 + erf(x / sqrt(2)));
        case Activation::gelu_tanh:
            return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::relu:
            return std::max(x, 0.);
        default:
            return std::max(x, 0.) * std::max(x, 0.);
    }
}

void check_activation(Random& random) {
    const auto gating = static_cast<Gating>(draw(random, 0, 3));
    const auto activation = static_cast<Activation>(draw(random, 0, 4));
    const bool gated = gating != Gating::none, turns = gating == Gating::interleaved;
    const int64_t rows = draw(random, 1, 3), width = pick(random, {1, 8, 33, 300});
    const DType dtype = chance(random, 40) ? DType::f32 : half_type(random);
    const float limit = chance(random, 50) ? 0.7f : INFINITY, alpha = 1.702f, shift = chance(random, 50) ? 1.f : 0.f;
    const Tensor<2> x = make<2>(dtype, {rows, gated ? 2 * width : width}, random);
    const Tensor<2> grad = make<2>(dtype, {rows, width}, random);
    Tensor<2> out(dtype, {rows, width}, draw(random, 0, 2), random),
        dx = make<2>(dtype, {x.view.size[0], x.view.size[1]}, random);
    cuda::gated_activation({x.view, activation, gating, limit, alpha, shift, out.view}, emulator::device());
    cuda::gated_activation_backward({grad.view, x.view, activation, gating, limit, alpha, shift, dx.view},
                                    emulator::device());
    Truth<2> values(out.view), slopes(dx.view);
    out.each([&](const int64_t (&at)[2]) {
        const int64_t first = turns ? 2 * at[1] : gating == Gating::up_gate ? width + at[1] : at[1];
        const int64_t second = turns ? 2 * at[1] + 1 : gating == Gating::up_gate ? at[1] : width + at[1];
        const double gate = x.get({at[0], first}), up = gated ? x.get({at[0], second}) : 0;
        const double clamped = std::min<double>(gate, limit), bounded = std::clamp<double>(up, -limit, limit);
        const double factor = gated ? bounded + shift : 1, value = activate(clamped, activation, alpha);
        const double step = clamped * (clamped > 0 ? 1e-6 : -1e-6);  // stays on its side of 0
        const double slope =
            (activate(clamped + step, activation, alpha) - activate(clamped - step, activation, alpha)) / (2 * step);
        values(at) = value * factor;
        slopes({at[0], first}) = gate <= limit ? grad.get(at) * slope * factor : 0;
        if (gated) slopes({at[0], second}) = fabs(up) <= limit ? grad.get(at) * value : 0;
    });
    compare("activation", "out", out, values, 2, dtype);
    compare("activation_backward", "dx", dx, slopes, 2, dtype);
}

// Grouped products. Sorted rows have `head` rows of no expert in front; rows that belong to none hold NaN.

struct Rows {
    Tensor<2> x;
    Tensor<1> offsets;
    View<1> order;
    int64_t k, rows;

    // Calls visit(row, expert, row of x).
    template <typename Visit>
    void each(const Route& r, const Visit& visit) const {
        for (int64_t e = 0; e < r.experts; ++e) {
            for (auto row = static_cast<int64_t>(offsets.get({e})); row < offsets.get({e + 1}); ++row)
                visit(row, e, order ? static_cast<int64_t>(r.order.get({row})) / k : row);
        }
    }
};

Rows make_rows(const Route& r, DType dtype, int64_t columns, bool gathered, Random& random) {
    const int head = gathered ? 0 : draw(random, 0, 3);
    Rows rows{make<2>(dtype, {gathered ? r.tokens : r.rows() + head, columns}, random),
              Tensor<1>(DType::i32, {r.experts + 1}, 0, random), gathered ? r.order.view : none<1>(),
              gathered ? r.k : 1, r.rows() + head};
    for (int64_t e = 0; e <= r.experts; ++e) rows.offsets.set({e}, r.offsets.get({e}) + head);
    if (gathered) return rows;
    rows.x.each([&](const int64_t (&at)[2]) {
        const double row = static_cast<double>(at[0]);
        if (row < rows.offsets.get({0}) || row >= rows.offsets.get({r.experts})) rows.x.set(at, NAN);
    });
    return rows;
}

void check_dense(const Route& r, Random& random) {
    const DType dtype = half_type(random);
    const int64_t N = pick(random, {1, 17, 130}), K = pick(random, {1, 40, 129, 200});
    const Rows rows = make_rows(r, dtype, K, chance(random, 50), random);
    const bool transposed = chance(random, 40), biased = chance(random, 50);
    Tensor<3> stored = make<3>(dtype, {r.experts, transposed ? K : N, transposed ? N : K}, random, 0.1);
    View<3> w = stored.view;
    if (transposed) std::swap(w.size[1], w.size[2]), std::swap(w.stride[1], w.stride[2]);
    const Tensor<2> bias = make<2>(chance(random, 50) ? DType::f32 : dtype, {r.experts, N}, random);
    const Tensor<2> a = make<2>(dtype, {rows.rows, N}, random);
    Tensor<2> out = make<2>(dtype, {rows.rows, N}, random);
    Tensor<3> sums = make<3>(dtype, {r.experts, N, K}, random);
    cuda::grouped_linear(
        {rows.x.view, w, rows.offsets.view, biased ? bias.view : none<2>(), rows.order, rows.k, out.view},
        emulator::device());
    cuda::grouped_outer({a.view, rows.x.view, rows.offsets.view, rows.order, rows.k, sums.view}, emulator::device());
    Truth<2> products(out.view);
    Truth<3> outers(sums.view);
    rows.each(r, [&](int64_t row, int64_t e, int64_t source) {
        for (int64_t n = 0; n < N; ++n) {
            double sum = biased ? bias.get({e, n}) : 0;
            for (int64_t j = 0; j < K; ++j) {
                const double x = rows.x.get({source, j});
                sum += x * (transposed ? stored.get({e, j, n}) : stored.get({e, n, j}));
                outers({e, n, j}) += a.get({row, n}) * x;
            }
            products({row, n}) = sum;
        }
    });
    compare("grouped_linear", "out", out, products, 2, dtype);
    compare("grouped_outer", "out", sums, outers, 2, dtype);
}

// Weights of 4 bits in groups of 32, or of 3 bits in groups of 20, with zeros or a codebook.
void check_low_bit(const Route& r, Random& random) {
    const DType dtype = half_type(random);
    const bool four = chance(random, 60), zeros = chance(random, 50), permuted = chance(random, 40);
    const int64_t N = pick(random, {3, 130}), K = pick(random, {40, 129}), bits = four ? 4 : 3, group = four ? 32 : 20;
    const int64_t groups = (K + group - 1) / group, levels = int64_t{1} << bits;
    const Rows rows = make_rows(r, dtype, K, chance(random, 50), random);
    const auto any = [&](int most) { return [&random, most] { return draw(random, 0, most); }; };
    const auto codes =
        Tensor<3>(DType::u8, {r.experts, N, (K * bits + 7) / 8}, draw(random, 0, 1), random).fill(any(255));
    const Tensor<3> scales = make<3>(DType::f32, {r.experts, N, groups}, random, 0.1);
    const auto zero = Tensor<3>(DType::u8, {r.experts, N, groups}, 0, random).fill(any(static_cast<int>(levels) - 1));
    const Tensor<1> codebook = make<1>(DType::f32, {levels}, random);
    Tensor<2> permutation(DType::i32, {r.experts, K}, 0, random);
    for (int64_t e = 0; e < r.experts; ++e) {
        std::vector<int> order(K);
        std::iota(order.begin(), order.end(), 0);
        if (permuted) std::shuffle(order.begin(), order.end(), random);
        for (int64_t j = 0; j < K; ++j) permutation.set({e, j}, order[j]);
    }
    LowBitExperts w{};
    w.rows = N, w.columns = K, w.bits = bits, w.group_size = group, w.zero = 1;
    w.codes = codes.view, w.scales = scales.view, w.codebook = zeros ? none<1>() : codebook.view;
    w.zeros = zeros ? zero.view : none<3>(), w.permutation = permuted ? permutation.view : none<2>();
    Tensor<2> out = make<2>(dtype, {rows.rows, N}, random), back = make<2>(dtype, {rows.rows, K}, random);
    const Tensor<2> grad = make<2>(dtype, {rows.rows, N}, random);
    cuda::quant_grouped_linear({rows.x.view, w, {}, rows.offsets.view, rows.order, rows.k, false, out.view},
                               emulator::device());
    cuda::quant_grouped_matmul({grad.view, w, rows.offsets.view, back.view}, emulator::device());
    Truth<2> products(out.view), across(back.view);
    rows.each(r, [&](int64_t row, int64_t e, int64_t source) {
        for (int64_t n = 0; n < N; ++n) {
            for (int64_t j = 0; j < K; ++j) {
                int64_t code = 0;
                for (int64_t bit = j * bits; bit < (j + 1) * bits; ++bit)
                    code |= (static_cast<int64_t>(codes.get({e, n, bit / 8})) >> bit % 8 & 1) << (bit - j * bits);
                const double value =
                    zeros ? static_cast<double>(code) - 1 - zero.get({e, n, j / group}) : codebook.get({code});
                const double weight = value * scales.get({e, n, j / group});
                const auto column = static_cast<int64_t>(permutation.get({e, j}));
                products({row, n}) += rows.x.get({source, column}) * weight;
                across({row, column}) += grad.get({row, n}) * weight;
            }
        }
    });
    compare("quant_grouped_linear", "out", out, products, 4, dtype);
    compare("quant_grouped_matmul", "out", back, across, 4, dtype);
}

// A row gives the same bits in tiles of 8, 64 and 128 rows.
void check_heights(Random& random) {
    const auto x = Tensor<2>(DType::bf16, {140, 300}, 0, random).fill([&] { return normal(random); });
    const auto w = Tensor<3>(DType::bf16, {1, 40, 300}, 0, random).fill([&] { return normal(random); });
    Tensor<2> whole(DType::bf16, {140, 40}, 0, random);
    for (int64_t rows : {140, 30, 5}) {
        Tensor<1> offsets = Tensor<1>(DType::i32, {2}, 0, random).fill([] { return 0; });
        offsets.set({1}, static_cast<double>(rows));
        Tensor<2> out(DType::bf16, {rows, 40}, 0, random);
        View<2> some = x.view;
        some.size[0] = rows;
        cuda::grouped_linear({some, w.view, offsets.view, {}, {}, 1, out.view}, emulator::device());
        if (rows == 140)
            whole = std::move(out);
        else
            out.each([&](const int64_t (&at)[2]) {
                require(out.get(at) == whole.get(at), "a row depends on the number of rows");
            });
    }
}

// Nothing waits for banks where rows can be read 16 bytes at a time.
void check_traffic(Random& random) {
    const auto plain = [&] { return normal(random); };
    for (int64_t rows : {8, 64, 128}) {
        const auto x = Tensor<2>(DType::bf16, {rows, 128}, 0, random).fill(plain);
        const auto a = Tensor<2>(DType::bf16, {rows, 128}, 0, random).fill(plain);
        auto w = Tensor<3>(DType::bf16, {1, 128, 128}, 0, random).fill(plain);
        Tensor<1> offsets = Tensor<1>(DType::i32, {2}, 0, random).fill([] { return 0; });
        offsets.set({1}, static_cast<double>(rows));
        Tensor<2> out(DType::bf16, {rows, 128}, 0, random);
        emulator::count_traffic(true);
        View<3> across = w.view;
        std::swap(across.stride[1], across.stride[2]);
        cuda::grouped_linear({x.view, w.view, offsets.view, {}, {}, 1, out.view}, emulator::device());
        cuda::grouped_linear({x.view, across, offsets.view, {}, {}, 1, out.view}, emulator::device());
        cuda::grouped_outer({a.view, x.view, offsets.view, {}, 1, w.view}, emulator::device());
        const std::vector<emulator::Traffic> places = emulator::traffic();
        require(!places.empty(), "no traffic was counted");
        for (const emulator::Traffic& t : places) {
            require(t.wavefronts == t.ideal || t.place.find("schedule") != std::string::npos,
                    t.place + " takes " + std::to_string(t.wavefronts) + " wavefronts, not " + std::to_string(t.ideal));
        }
        emulator::count_traffic(false);
    }
}

// Numbers out of range, which only a kernel on a device ever meets: nothing outside the tensors is touched.
void check_wild_numbers(Random& random) {
    const auto wild = [&] { return pick(random, {-1000000, -1, 0, 3, 1000000}); };
    const Tensor<2> x = make<2>(DType::bf16, {5, 33}, random), y = make<2>(DType::bf16, {10, 33}, random);
    const Tensor<3> w = make<3>(DType::bf16, {4, 20, 33}, random);
    const auto order = Tensor<1>(DType::i32, {10}, 0, random).fill(wild),
               offsets = Tensor<1>(DType::i32, {5}, 0, random).fill(wild);
    const auto inverse = Tensor<2>(DType::i32, {5, 2}, 0, random).fill(wild);
    Tensor<2> rows(DType::bf16, {10, 33}, 0, random), out(DType::bf16, {10, 20}, 0, random),
        d_weights(DType::f32, {5, 2}, 0, random);
    Tensor<3> sums(DType::bf16, {4, 20, 33}, 0, random);
    const Tensor<2> weights = make<2>(DType::f32, {5, 2}, random);
    cuda::moe_permute({x.view, order.view, 2, rows.view}, emulator::device());
    cuda::moe_unpermute({y.view, inverse.view, weights.view, x.view}, emulator::device());
    cuda::moe_unpermute_backward({x.view, y.view, inverse.view, weights.view, rows.view, d_weights.view},
                                 emulator::device());
    cuda::grouped_linear({x.view, w.view, offsets.view, {}, order.view, 2, out.view}, emulator::device());
    cuda::grouped_outer({out.view, x.view, offsets.view, order.view, 2, sums.view}, emulator::device());
}

void check_refusals(Random& random) {
    const Tensor<2> x = make<2>(DType::f32, {2, 3}, random);
    const Tensor<3> w = make<3>(DType::f32, {1, 2, 3}, random);
    const auto offsets = Tensor<1>(DType::i32, {2}, 0, random).fill([] { return 0; });
    Tensor<2> out(DType::f32, {2, 2}, 0, random);
    const auto run = [&] {
        cuda::grouped_linear({x.view, w.view, offsets.view, {}, {}, 1, out.view}, emulator::device());
    };
    require(refuses(run), "float32 rows are taken");
}

}  // namespace

int main(int argc, char** argv) {
    return run_cases("cuda_moe", 12, argc, argv, [](Random& random, bool is_first) {
        if (is_first) check_heights(random), check_traffic(random), check_refusals(random);
        const Route route = make_route(random, pick(random, {1, 5, 70}));
        check_rows(route, random);
        check_routing(random);
        check_activation(random);
        check_dense(route, random);
        check_low_bit(make_route(random, pick(random, {1, 5, 20})), random);
        check_wild_numbers(random);
    });
}
