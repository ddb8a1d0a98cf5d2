// attention_backward of every instruction set against loops in double precision: every feature, odd shapes, strides,
// NaN where nothing may look, bytes beyond the tensors, and bits that do not depend on workers or batch neighbours.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <array>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "cpu/isa.h"
#include "guarded.h"
#include "passes.h"

namespace metate::cpu {
#define DECLARE(isa)                                                   \
    namespace isa {                                                    \
    void attention_backward(const AttentionBackward&, const Runtime&); \
    }
DECLARE(baseline)
#if defined(__x86_64__)
DECLARE(avx2) DECLARE(avx512) DECLARE(avx512bf16)
#endif
}  // namespace metate::cpu

using namespace metate;

namespace {

using Kernel = void (*)(const AttentionBackward&, const cpu::Runtime&);
struct Pass {
    const char* name;
    Kernel kernel;
};

std::vector<Pass> passes() {
    std::vector<Pass> all{{"baseline", cpu::baseline::attention_backward}};
#if defined(__x86_64__)
    if (cpu::has_isa(cpu::Isa::avx2)) all.push_back({"avx2", cpu::avx2::attention_backward});
    if (cpu::has_isa(cpu::Isa::avx512)) {
        all.push_back({"avx512", cpu::avx512::attention_backward});
        all.push_back({"avx512bf16", cpu::avx512bf16::attention_backward});
    }
#endif
    return all;
}

float from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}
uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return isnan(x) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
double round_to(DType dtype, double x) {
    return dtype == DType::f64  ? x
         : dtype == DType::f32  ? float(x)
         : dtype == DType::bf16 ? from_bf16(to_bf16(float(x)))
                                : double(_Float16(float(x)));
}

constexpr uint8_t poison = 0xfb;
using Index = std::array<int64_t, 4>;

// A tensor of up to four dimensions: doubles outside, any dtype and any strides inside.
struct Tensor {
    DType dtype{};
    std::vector<int64_t> size;
    Index stride{};
    std::shared_ptr<Guarded> memory;

    Tensor() = default;
    // order: dimensions from the outermost in memory to the innermost; gap: the innermost stride.
    Tensor(DType type, std::vector<int64_t> shape, std::vector<int> order, int64_t gap = 1, bool left = false)
        : dtype(type), size(shape) {
        int64_t step = gap, last = 0;
        for (int n = static_cast<int>(order.size()) - 1; n >= 0; --n) {
            stride[order[n]] = step;
            last += (size[order[n]] - 1) * step;
            step *= size[order[n]];
        }
        const size_t bytes = count() ? static_cast<size_t>((last + 1) * bytes_of(type)) : 0;
        memory = std::make_shared<Guarded>(bytes, left);
        memset(memory->data, poison, bytes);
    }
    explicit operator bool() const { return memory != nullptr; }
    int64_t count() const {
        int64_t n = 1;
        for (int64_t s : size) n *= s;
        return n;
    }
    template <int N>
    View<N> view() const {
        View<N> v{};
        if (!memory) return v;
        v.data = memory->data;
        v.dtype = dtype;
        for (int n = 0; n < N; ++n) v.size[n] = size[n], v.stride[n] = stride[n];
        return v;
    }
    uint8_t* at(const Index& index) const {
        int64_t offset = 0;
        for (int n = 0; n < 4; ++n) offset += index[n] * stride[n];
        return memory->data + offset * bytes_of(dtype);
    }
    double get(const Index& index) const {
        const uint8_t* p = at(index);
        switch (dtype) {
            case DType::f64:
                return *reinterpret_cast<const double*>(p);
            case DType::f32:
                return *reinterpret_cast<const float*>(p);
            case DType::bf16:
                return from_bf16(*reinterpret_cast<const uint16_t*>(p));
            case DType::f16:
                return double(*reinterpret_cast<const _Float16*>(p));
            case DType::i32:
                return *reinterpret_cast<const int32_t*>(p);
            default:
                return *p;
        }
    }
    void set(const Index& index, double x) {
        uint8_t* p = at(index);
        switch (dtype) {
            case DType::f64:
                *reinterpret_cast<double*>(p) = x;
                break;
            case DType::f32:
                *reinterpret_cast<float*>(p) = static_cast<float>(x);
                break;
            case DType::bf16:
                *reinterpret_cast<uint16_t*>(p) = to_bf16(static_cast<float>(x));
                break;
            case DType::f16:
                *reinterpret_cast<_Float16*>(p) = static_cast<_Float16>(static_cast<float>(x));
                break;
            case DType::i32:
                *reinterpret_cast<int32_t*>(p) = static_cast<int32_t>(static_cast<int64_t>(x));
                break;
            default:
                *p = static_cast<uint8_t>(x);
        }
    }
    void each(const std::function<void(const Index&)>& visit) const {
        Index index{};
        for (int64_t n = 0; n < count(); ++n) {
            int64_t rest = n;
            for (int d = static_cast<int>(size.size()) - 1; d >= 0; --d) index[d] = rest % size[d], rest /= size[d];
            visit(index);
        }
    }
    // Whether the bytes between the elements still hold the poison.
    bool gaps_untouched() const {
        std::vector<bool> own(memory->bytes);
        each([&](auto& index) {
            const size_t offset = static_cast<size_t>(at(index) - memory->data);
            for (size_t b = 0; b < static_cast<size_t>(bytes_of(dtype)); ++b) own[offset + b] = true;
        });
        for (size_t b = 0; b < own.size(); ++b) {
            if (!own[b] && memory->data[b] != poison) return false;
        }
        return true;
    }
};

struct Case {
    std::string name;
    DType dtype = DType::f32;
    int64_t B = 1, Hq = 1, Hkv = 1, Sq = 1, Sk = 1, D = 8, Dv = 8;
    int64_t window_left = -1, window_right = -1;
    bool top_left = false;
    double softcap = 0;
    bool alibi = false, sinks = false, intervals = false, blocks = false, bits = false;
    double dropout = 0;
    std::string bias;  // four letters, '1' where it is broadcast; "" for none
    bool narrow_bias = false;
    std::vector<int> lengths_q, lengths_k;  // packed when not empty; a trailing token belongs to no sequence
    int layout = 0;
    bool nan = false;
    uint32_t seed = 1;
};

struct Inputs {
    Case c;
    Tensor q, k, v, bias, slopes, sinks, intervals, blocks, bits, cu_q, cu_k, grad_out, lse, delta, grad_lse;
    Attention problem;
};
struct Outputs {
    Tensor dq, dk, dv, dbias, dslopes;
};
struct Sequence {
    int64_t index, batch, q0, nq, k0, nk;
};

std::vector<Sequence> sequences(const Case& c) {
    std::vector<Sequence> all;
    if (c.lengths_q.empty()) {
        for (int64_t b = 0; b < c.B; ++b) all.push_back({b, b, 0, c.Sq, 0, c.Sk});
        return all;
    }
    int64_t q0 = 0, k0 = 0;
    for (size_t n = 0; n < c.lengths_q.size(); ++n) {
        all.push_back({static_cast<int64_t>(n), 0, q0, c.lengths_q[n], k0, c.lengths_k[n]});
        q0 += c.lengths_q[n], k0 += c.lengths_k[n];
    }
    return all;
}

uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, int word) {
    uint32_t x[4] = {c0, c1, c2, c3}, key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * x[0], b = uint64_t{0xCD9E8D57} * x[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(a)};
        memcpy(x, next, sizeof x);
        key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
    }
    return x[word];
}

double keep(const Attention& p, int64_t b, int64_t h, int64_t i, int64_t j) {
    if (!p.dropout_threshold) return 1;
    const uint32_t word = philox(p.seed, static_cast<uint32_t>((j >> 6) * 16 + (j & 15)), static_cast<uint32_t>(i),
                                 static_cast<uint32_t>(b * p.q.size[2] + h), p.offset, j >> 4 & 3);
    return word >= p.dropout_threshold ? p.dropout_scale : 0;
}

bool allowed(const Inputs& in, const Sequence& s, int64_t h, int64_t i, int64_t j) {
    const Case& c = in.c;
    const int64_t at = i + (c.top_left ? 0 : s.nk - s.nq);
    if (c.window_left >= 0 && j < at - c.window_left) return false;
    if (c.window_right >= 0 && j > at + c.window_right) return false;
    if (c.intervals) {
        const int64_t row = c.lengths_q.empty() ? i : s.q0 + i;
        if (j < in.intervals.get({s.batch, h, row, 0}) || j >= in.intervals.get({s.batch, h, row, 1})) return false;
    }
    if (c.blocks && in.blocks.get({s.batch, h, i / in.problem.block_m, j / in.problem.block_n}) == 0) return false;
    if (c.bits && !(static_cast<int64_t>(in.bits.get({s.batch, h, i, j / 32})) >> (j % 32) & 1)) return false;
    return true;
}

// Forward (for lse and delta) and backward, one (sequence, head) at a time. `plain` rounds every matrix to the dtype of
// the tensors and sums in float, as an unfused implementation would that is given lse and delta; its error against the
// unrounded loops is the budget.
struct Reference {
    const Inputs& in;
    bool plain;
    std::vector<double> dq, dk, dv, dbias, dslopes;

    // Rows first … first + count - 1 of a tensor.
    static std::vector<double> rows(const Tensor& t, int64_t batch, int64_t first, int64_t count, int64_t h) {
        std::vector<double> all;
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t d = 0; d < t.size[3]; ++d) all.push_back(t.get({batch, first + i, h, d}));
        }
        return all;
    }
    double add(double sum, double x) const { return plain && in.c.dtype != DType::f64 ? float(sum + x) : sum + x; }
    double narrow(double x) const { return plain ? round_to(in.c.dtype, x) : x; }
    static size_t flat(const Tensor& t, int64_t a, int64_t b, int64_t c, int64_t d) {
        return static_cast<size_t>(((a * t.size[1] + b) * t.size[2] + c) * t.size[3] + d);
    }

    void run(Inputs* statistics) {
        dq.assign(static_cast<size_t>(in.q.count()), 0);
        dk.assign(static_cast<size_t>(in.k.count()), 0);
        dv.assign(static_cast<size_t>(in.v.count()), 0);
        if (in.bias) dbias.assign(static_cast<size_t>(in.bias.count()), 0);
        if (in.slopes) dslopes.assign(static_cast<size_t>(in.slopes.count()), 0);
        for (const Sequence& s : sequences(in.c)) {
            for (int64_t h = 0; h < in.c.Hq; ++h) head(s, h, statistics);
        }
    }

    void head(const Sequence& s, int64_t h, Inputs* statistics) {
        const Case& c = in.c;
        const int64_t kv = h / (c.Hq / c.Hkv), diagonal = c.top_left ? 0 : s.nk - s.nq;
        const auto qs = rows(in.q, s.batch, s.q0, s.nq, h), ks = rows(in.k, s.batch, s.k0, s.nk, kv);
        const auto vs = rows(in.v, s.batch, s.k0, s.nk, kv), gs = rows(in.grad_out, s.batch, s.q0, s.nq, h);
        auto q = [&](int64_t i, int64_t d) { return qs[i * c.D + d]; };
        auto k = [&](int64_t j, int64_t d) { return ks[j * c.D + d]; };
        auto v = [&](int64_t j, int64_t d) { return vs[j * c.Dv + d]; };
        auto g = [&](int64_t i, int64_t d) { return gs[i * c.Dv + d]; };
        for (int64_t i = 0; i < s.nq; ++i) {
            std::vector<double> score(static_cast<size_t>(s.nk)), slope(score.size()), p(score.size()), z(score.size());
            std::vector<bool> ok(score.size());
            double top = c.sinks ? in.sinks.get({h}) : -INFINITY;
            for (int64_t j = 0; j < s.nk; ++j) {
                if (!(ok[j] = allowed(in, s, h, i, j))) continue;
                double x = 0;
                for (int64_t d = 0; d < c.D; ++d) x = add(x, q(i, d) * k(j, d));
                x = narrow(narrow(x) * in.problem.scale);
                slope[j] = 1;
                if (c.softcap > 0) {
                    const double t = tanh(x / c.softcap);
                    x = narrow(c.softcap * t), slope[j] = 1 - t * t;
                }
                if (in.bias) x += bias_at(s.batch, h, i, j);
                if (in.slopes) x -= in.slopes.get({s.index, h}) * static_cast<double>(llabs(i + diagonal - j));
                score[j] = narrow(x);
                top = fmax(top, score[j]);
            }
            double total = c.sinks ? exp(in.sinks.get({h}) - top) : 0;
            for (int64_t j = 0; j < s.nk; ++j) total += ok[j] ? exp(score[j] - top) : 0;
            const double own = top == -INFINITY ? -INFINITY : top + log(total);
            const double lse = plain ? in.lse.get({s.batch, h, s.q0 + i}) : own;
            double delta = -in.grad_lse.get({s.batch, h, s.q0 + i});
            std::vector<double> dp(score.size());
            for (int64_t j = 0; j < s.nk; ++j) {
                if (!ok[j] || lse == -INFINITY) continue;
                p[j] = narrow(exp(score[j] - lse));
                z[j] = keep(in.problem, s.index, h, i, j);
                for (int64_t d = 0; d < c.Dv; ++d) dp[j] = add(dp[j], g(i, d) * v(j, d));
                dp[j] = narrow(dp[j] * z[j]);
                delta += p[j] * dp[j];
            }
            if (plain) delta = in.delta.get({s.batch, h, s.q0 + i});
            if (statistics) {
                statistics->lse.set({s.batch, h, s.q0 + i}, lse);
                statistics->delta.set({s.batch, h, s.q0 + i}, delta);
            }
            for (int64_t j = 0; j < s.nk; ++j) {
                if (!ok[j] || lse == -INFINITY) continue;
                const double ds = narrow(p[j] * (dp[j] - narrow(delta))),
                             raw = narrow(ds * slope[j]) * in.problem.scale;
                const auto add_to = [&](double& sum, double x) { sum = add(sum, x); };
                if (in.bias) add_to(dbias[bias_index(s.batch, h, i, j)], ds);
                if (in.slopes) add_to(dslopes[s.index * c.Hq + h], -ds * static_cast<double>(llabs(i + diagonal - j)));
                const double pz = narrow(p[j] * z[j]);
                for (int64_t d = 0; d < c.D; ++d) {
                    add_to(dq[flat(in.q, s.batch, s.q0 + i, h, d)], raw * k(j, d));
                    add_to(dk[flat(in.k, s.batch, s.k0 + j, kv, d)], raw * q(i, d));
                }
                for (int64_t d = 0; d < c.Dv; ++d) add_to(dv[flat(in.v, s.batch, s.k0 + j, kv, d)], pz * g(i, d));
            }
        }
    }

    double bias_at(int64_t b, int64_t h, int64_t i, int64_t j) const {
        const auto& z = in.bias.size;
        return in.bias.get({b % z[0], h % z[1], i % z[2], j % z[3]});
    }
    size_t bias_index(int64_t b, int64_t h, int64_t i, int64_t j) const {
        const auto& z = in.bias.size;
        return flat(in.bias, b % z[0], h % z[1], i % z[2], j % z[3]);
    }
};

template <int N>
View<N> broadcast(View<N> v, std::vector<int64_t> size) {
    for (int n = 0; n < N; ++n) {
        if (v.size[n] == 1) v.stride[n] = 0;
        v.size[n] = size[n];
    }
    return v;
}

struct Draw {
    std::mt19937 engine;
    double normal(double spread = 1) { return std::normal_distribution<double>(0, spread)(engine); }
    int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
    bool chance(double p) { return std::bernoulli_distribution(p)(engine); }
};

Tensor like(const Case& c, std::vector<int64_t> shape) {
    static const std::vector<int> orders[] = {{0, 1, 2, 3}, {0, 2, 1, 3}, {0, 1, 2, 3}, {0, 2, 3, 1}};
    return Tensor(c.dtype, shape, orders[c.layout], c.layout == 2 ? 2 : 1, c.seed % 2);
}

void fill(Tensor& t, const std::function<double()>& draw) {
    t.each([&](auto& index) { t.set(index, draw()); });
}

void make_masks(Inputs& in, Draw& draw) {
    const Case& c = in.c;
    if (c.intervals) {
        in.intervals = Tensor(DType::i32, {c.B, c.Hq, c.Sq, 2}, {0, 1, 2, 3});
        for (int64_t b = 0; b < c.B; ++b)
            for (int64_t h = 0; h < c.Hq; ++h)
                for (int64_t i = 0; i < c.Sq; ++i) {
                    const int64_t low = draw.integer(-3, c.Sk), document = i / 20 * 20;
                    const bool wild = draw.chance(0.2);
                    in.intervals.set({b, h, i, 0}, static_cast<double>(wild ? low : document));
                    in.intervals.set({b, h, i, 1},
                                     static_cast<double>(wild ? draw.integer(low - 2, c.Sk + 9) : document + 20));
                }
    }
    in.problem.block_m = 16, in.problem.block_n = 48;
    if (c.blocks) {
        in.blocks = Tensor(DType::u8, {c.B, c.Hq, (c.Sq + 15) / 16, (c.Sk + 47) / 48}, {0, 1, 2, 3});
        fill(in.blocks, [&] { return draw.chance(0.5) ? static_cast<double>(draw.integer(1, 255)) : 0; });
    }
    if (c.bits) {
        in.bits = Tensor(DType::i32, {c.B, c.Hq, c.Sq, (c.Sk + 31) / 32}, {0, 1, 2, 3});
        fill(in.bits, [&] { return draw.chance(0.3) ? 0 : static_cast<double>(draw.integer(INT32_MIN, INT32_MAX)); });
    }
}

// NaN into keys, values, queries and gradients that some rows see and others must not.
void plant_nan(Inputs& in, Draw& draw) {
    const Case& c = in.c;
    for (int64_t b = 0; b < c.B; ++b) {
        for (int64_t h = 0; h < c.Hkv; ++h) {
            if (c.Sk > 0) in.k.set({b, draw.integer(0, c.Sk - 1), h, draw.integer(0, c.D - 1)}, NAN);
            if (c.Sk > 0) in.v.set({b, draw.integer(0, c.Sk - 1), h, draw.integer(0, c.Dv - 1)}, NAN);
        }
        for (int64_t h = 0; h < c.Hq; ++h) {
            if (c.Sq > 0) in.q.set({b, draw.integer(0, c.Sq - 1), h, draw.integer(0, c.D - 1)}, NAN);
            if (c.Sq > 0) in.grad_out.set({b, draw.integer(0, c.Sq - 1), h, draw.integer(0, c.Dv - 1)}, NAN);
        }
    }
}

Tensor prefix(const std::vector<int>& lengths) {
    Tensor t(DType::i32, {static_cast<int64_t>(lengths.size()) + 1}, {0});
    double sum = 0;
    t.set({0}, 0);
    for (size_t n = 0; n < lengths.size(); ++n) t.set({static_cast<int64_t>(n) + 1}, sum += lengths[n]);
    return t;
}

Inputs make_inputs(Case c) {
    Draw draw{std::mt19937(c.seed)};
    if (!c.lengths_q.empty()) {
        c.B = 1, c.Sq = c.Sk = 1;  // one token of no sequence
        for (int n : c.lengths_q) c.Sq += n;
        for (int n : c.lengths_k) c.Sk += n;
    }
    Inputs in{};
    in.c = c;
    const DType wide = c.dtype == DType::f64 ? DType::f64 : DType::f32;
    const int64_t groups = c.lengths_q.empty() ? c.B : static_cast<int64_t>(c.lengths_q.size());
    in.q = like(c, {c.B, c.Sq, c.Hq, c.D}), in.k = like(c, {c.B, c.Sk, c.Hkv, c.D});
    in.v = like(c, {c.B, c.Sk, c.Hkv, c.Dv}), in.grad_out = like(c, {c.B, c.Sq, c.Hq, c.Dv});
    for (Tensor* t : {&in.q, &in.k, &in.v, &in.grad_out}) fill(*t, [&] { return draw.normal(); });
    in.lse = in.delta = in.grad_lse = Tensor();
    in.lse = Tensor(wide, {c.B, c.Hq, c.Sq}, {0, 1, 2}), in.delta = Tensor(wide, {c.B, c.Hq, c.Sq}, {0, 2, 1});
    in.grad_lse = Tensor(DType::f64, {c.B, c.Hq, c.Sq}, {0, 1, 2});
    fill(in.grad_lse, [&] { return draw.normal(); });
    if (!c.bias.empty()) {
        const int64_t full[4] = {c.B, c.Hq, c.Sq, c.Sk};
        std::vector<int64_t> shape;
        for (int n = 0; n < 4; ++n) shape.push_back(c.bias[n] == '1' ? 1 : full[n]);
        in.bias = Tensor(c.narrow_bias ? c.dtype : wide, shape, {0, 1, 2, 3});
        fill(in.bias, [&] { return draw.chance(0.05) ? -INFINITY : draw.normal(); });
        in.problem.bias = broadcast(in.bias.view<4>(), {c.B, c.Hq, c.Sq, c.Sk});
    }
    if (c.alibi)
        in.slopes = Tensor(wide, {groups, c.Hq}, {0, 1}), fill(in.slopes, [&] { return fabs(draw.normal(0.1)); });
    if (c.sinks) in.sinks = Tensor(wide, {c.Hq}, {0}), fill(in.sinks, [&] { return draw.normal(); });
    make_masks(in, draw);
    if (c.nan) plant_nan(in, draw);
    Attention& p = in.problem;
    p.q = in.q.view<4>(), p.k = in.k.view<4>(), p.v = in.v.view<4>();
    p.alibi_slopes = in.slopes.view<2>(), p.sinks = in.sinks.view<1>(), p.intervals = in.intervals.view<4>();
    p.blocks = in.blocks.view<4>(), p.bits = in.bits.view<4>();
    if (!c.lengths_q.empty()) {
        in.cu_q = prefix(c.lengths_q), in.cu_k = prefix(c.lengths_k);
        p.cu_seqlens_q = in.cu_q.view<1>(), p.cu_seqlens_k = in.cu_k.view<1>();
    }
    p.window_left = c.window_left, p.window_right = c.window_right, p.top_left = c.top_left;
    p.scale = 0.7 / sqrt(static_cast<double>(c.D)), p.softcap = c.softcap;
    p.dropout_threshold = static_cast<uint32_t>(c.dropout * 4294967296.0), p.dropout_scale = 1 / (1 - c.dropout);
    p.seed = 0x123456789abcdef0ull + c.seed, p.offset = 77;
    return in;
}

Outputs make_outputs(const Inputs& in) {
    const Case& c = in.c;
    Outputs out;
    out.dq = like(c, in.q.size), out.dk = like(c, in.k.size), out.dv = like(c, in.v.size);
    const DType wide = c.dtype == DType::f64 ? DType::f64 : DType::f32;
    if (in.bias) out.dbias = Tensor(wide, in.bias.size, {0, 1, 2, 3});
    if (in.slopes) out.dslopes = Tensor(wide, in.slopes.size, {0, 1});
    return out;
}

AttentionBackward call(const Inputs& in, const Outputs& out) {
    AttentionBackward a{};
    a.problem = in.problem;
    a.grad_out = in.grad_out.view<4>(), a.lse = in.lse.view<3>(), a.delta = in.delta.view<3>();
    a.dq = out.dq.view<4>(), a.dk = out.dk.view<4>(), a.dv = out.dv.view<4>();
    if (out.dbias) a.dbias = broadcast(out.dbias.view<4>(), {in.c.B, in.c.Hq, in.c.Sq, in.c.Sk});
    a.dalibi_slopes = out.dslopes.view<2>();
    return a;
}

void run(Kernel kernel, const AttentionBackward& arguments, int threads) {
    static std::vector<uint8_t> scratch;
    cpu::Runtime runtime{threads,
                         [](int workers, void (*body)(int, void*), void* context) {
                             std::vector<std::thread> pool;
                             for (int w = 0; w < workers; ++w) pool.emplace_back(body, w, context);
                             for (auto& t : pool) t.join();
                         },
                         [](size_t bytes) -> void* {
                             scratch.assign(bytes + 64, poison);
                             return scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
                         }};
    kernel(arguments, runtime);
}

int failures = 0;

void fail(const Case& c, const char* pass, const std::string& what) {
    printf("FAIL %s [%s] seed %u: %s\n", c.name.c_str(), pass, c.seed, what.c_str());
    ++failures;
}

std::string text(double x) {
    char line[32];
    snprintf(line, sizeof line, "%.3g", x);
    return line;
}

void compare(const Inputs& in, const char* pass, const char* name, const Tensor& got, const std::vector<double>& truth,
             const std::vector<double>& plain) {
    if (!got) return;
    double error = 0, budget = 0, top = 0;
    size_t n = 0, wrong_nan = 0;
    got.each([&](auto& index) {
        const double g = got.get(index), t = truth[n], p = plain[n];
        ++n;
        if (isnan(t) || isnan(g)) {
            wrong_nan += isnan(t) != isnan(g);
            return;
        }
        error = fmax(error, fabs(g - t)), budget = fmax(budget, fabs(round_to(got.dtype, p) - t)),
        top = fmax(top, fabs(t));
    });
    const double ulp = got.dtype == DType::f64 ? 0x1p-46
                     : got.dtype == DType::f32 ? 0x1p-22
                     : got.dtype == DType::f16 ? 0x1p-10
                                               : 0x1p-7;
    if (wrong_nan) fail(in.c, pass, std::string(name) + ": NaN in " + std::to_string(wrong_nan) + " wrong places");
    if (!(error <= 2 * budget + 2 * ulp * top)) {
        fail(in.c, pass,
             std::string(name) + " is off by " + text(error) + ", plain by " + text(budget) + ", largest " + text(top));
    }
    if (!got.gaps_untouched()) fail(in.c, pass, std::string(name) + ": wrote between the elements");
}

bool same_bits(const Tensor& a, const Tensor& b) {
    return !a || memcmp(a.memory->data, b.memory->data, a.memory->bytes) == 0;
}

void check(const Case& c) {
    Inputs in = make_inputs(c);
    fill(in.lse, [] { return NAN; }), fill(in.delta, [] { return NAN; });
    Reference truth{in, false, {}, {}, {}, {}, {}}, plain{in, true, {}, {}, {}, {}, {}};
    truth.run(&in);
    plain.run(nullptr);
    for (const Pass& pass : passes()) {
        if (!takes(pass.name, c.dtype)) continue;
        Outputs out = make_outputs(in);
        run(pass.kernel, call(in, out), 1);
        compare(in, pass.name, "dq", out.dq, truth.dq, plain.dq);
        compare(in, pass.name, "dk", out.dk, truth.dk, plain.dk);
        compare(in, pass.name, "dv", out.dv, truth.dv, plain.dv);
        compare(in, pass.name, "dbias", out.dbias, truth.dbias, plain.dbias);
        compare(in, pass.name, "dalibi_slopes", out.dslopes, truth.dslopes, plain.dslopes);
        for (int threads : {2, 5}) {
            Outputs again = make_outputs(in);
            run(pass.kernel, call(in, again), threads);
            if (!same_bits(out.dq, again.dq) || !same_bits(out.dk, again.dk) || !same_bits(out.dv, again.dv) ||
                !same_bits(out.dbias, again.dbias) || !same_bits(out.dslopes, again.dslopes))
                fail(in.c, pass.name, "bits depend on the number of workers");
        }
    }
}

// The second batch alone gives the bits it gives among others.
void check_neighbours() {
    Case c;
    c.name = "neighbours";
    c.B = 3, c.Hq = 4, c.Hkv = 2, c.Sq = 130, c.Sk = 150, c.D = 40, c.Dv = 24, c.window_right = 0, c.alibi = true;
    Inputs in = make_inputs(c);
    Reference{in, false, {}, {}, {}, {}, {}}.run(&in);
    for (const Pass& pass : passes()) {
        if (!takes(pass.name, c.dtype)) continue;
        Outputs all = make_outputs(in), one = make_outputs(in);
        run(pass.kernel, call(in, all), 2);
        AttentionBackward a = call(in, one);
        auto second = [](auto& view) {
            view.data = static_cast<uint8_t*>(view.data) + view.stride[0] * bytes_of(view.dtype);
            view.size[0] = 1;
        };
        second(a.problem.q), second(a.problem.k), second(a.problem.v), second(a.problem.alibi_slopes);
        second(a.grad_out), second(a.lse), second(a.delta);
        second(a.dq), second(a.dk), second(a.dv);
        run(pass.kernel, a, 3);
        auto same = [](const Tensor& x, const Tensor& y) {
            const size_t bytes = static_cast<size_t>(x.stride[0] * bytes_of(x.dtype));
            return memcmp(x.memory->data + bytes, y.memory->data + bytes, bytes) == 0;
        };
        if (!same(all.dq, one.dq) || !same(all.dk, one.dk) || !same(all.dv, one.dv))
            fail(c, pass.name, "bits depend on the batch neighbours");
    }
}

std::vector<Case> listed() {
    std::vector<Case> all;
    auto add = [&](const char* name, std::function<void(Case&)> set) {
        for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
            Case c;
            c.name = name;
            c.dtype = dtype, c.B = 2, c.Hq = 4, c.Hkv = 2, c.Sq = 70, c.Sk = 101, c.D = 24, c.Dv = 40;
            set(c);
            all.push_back(c);
        }
    };
    add("plain", [](Case&) {});
    add("causal", [](Case& c) { c.window_right = 0, c.Sq = c.Sk = 230, c.D = c.Dv = 64, c.B = 1; });
    add("causal top left", [](Case& c) { c.window_right = 0, c.top_left = true, c.Sq = 131; });
    add("more queries than keys", [](Case& c) { c.window_right = 0, c.Sq = 150, c.Sk = 33; });
    add("window", [](Case& c) { c.window_left = 17, c.window_right = 5, c.Sq = c.Sk = 300, c.B = 1; });
    add("one", [](Case& c) { c.Sq = c.Sk = 1, c.D = c.Dv = 1; });
    add("no keys", [](Case& c) { c.Sk = 0; });
    add("no queries", [](Case& c) { c.Sq = 0; });
    add("no batch", [](Case& c) { c.B = 0; });
    add("no batch with a shared bias", [](Case& c) { c.B = 0, c.bias = "11MN"; });
    add("head_dim 512", [](Case& c) { c.B = 1, c.Hq = c.Hkv = 1, c.Sq = 65, c.Sk = 63, c.D = 512, c.Dv = 3; });
    add("value dim 320", [](Case& c) { c.B = 1, c.Hq = c.Hkv = 1, c.Sq = 100, c.Sk = 110, c.D = 7, c.Dv = 320; });
    add("softcap", [](Case& c) { c.softcap = 1.5; });
    add("alibi", [](Case& c) { c.alibi = true; });
    add("sinks", [](Case& c) { c.sinks = true, c.window_right = 0, c.Sk = 60; });
    add("intervals", [](Case& c) { c.intervals = true; });
    add("blocks", [](Case& c) { c.blocks = true, c.Sk = 210; });
    add("bits", [](Case& c) { c.bits = true; });
    add("dropout", [](Case& c) { c.dropout = 0.3, c.alibi = true; });
    add("nan", [](Case& c) { c.nan = true, c.window_right = 0, c.Sq = c.Sk = 120; });
    add("nan in intervals", [](Case& c) { c.nan = true, c.intervals = true, c.Sq = 80, c.Sk = 90; });
    add("transposed", [](Case& c) { c.layout = 1; });
    add("gaps", [](Case& c) { c.layout = 2; });
    add("innermost sequence", [](Case& c) { c.layout = 3, c.D = 33; });
    for (const char* bias : {"BHMN", "1HMN", "B1MN", "11MN", "BH1N", "111N", "BHM1", "1HM1", "B111", "1111"})
        add(bias, [bias](Case& c) {
            c.bias = bias, c.narrow_bias = c.dtype == DType::f16, c.window_right = bias[0] == 'B' ? 0 : -1;
        });
    add("packed", [](Case& c) {
        c.lengths_q = {5, 0, 130, 1}, c.lengths_k = {9, 4, 120, 0}, c.alibi = true, c.window_right = 0;
    });
    add("packed with intervals",
        [](Case& c) { c.lengths_q = {40, 33}, c.lengths_k = {40, 60}, c.intervals = true, c.dropout = 0.1; });
    return all;
}

Case drawn(uint32_t seed) {
    Draw d{std::mt19937(seed * 7919 + 1)};
    Case c;
    c.name = "drawn";
    c.seed = seed;
    c.dtype = std::vector<DType>{DType::f32, DType::bf16, DType::f16, DType::f64}[d.integer(0, 3)];
    c.Hkv = d.integer(1, 2), c.Hq = c.Hkv * d.integer(1, 3), c.B = d.integer(1, 2);
    c.Sq = d.integer(0, 140), c.Sk = d.integer(0, 140), c.D = d.integer(1, 80), c.Dv = d.integer(1, 80);
    c.layout = static_cast<int>(d.integer(0, 3));
    if (d.chance(0.4)) c.window_right = d.integer(0, 20);
    if (d.chance(0.3)) c.window_left = d.integer(0, 40);
    c.top_left = d.chance(0.3), c.alibi = d.chance(0.3), c.sinks = d.chance(0.2), c.intervals = d.chance(0.2);
    if (d.chance(0.2)) c.softcap = 2;
    if (d.chance(0.2)) c.dropout = 0.2;
    c.nan = d.chance(0.1) && c.dropout == 0;  // whether a dropped NaN counts is nobody's business
    if (d.chance(0.2)) {
        for (int64_t n = d.integer(1, 4); n > 0; --n) {
            c.lengths_q.push_back(static_cast<int>(d.integer(0, 60)));
            c.lengths_k.push_back(static_cast<int>(d.integer(0, 60)));
        }
        c.nan = false;
        return c;
    }
    c.blocks = d.chance(0.2), c.bits = d.chance(0.2);
    if (d.chance(0.3)) {
        for (char letter : {'B', 'H', 'M', 'N'}) c.bias += d.chance(0.5) ? '1' : letter;
        c.narrow_bias = d.chance(0.5);
    }
    return c;
}

}  // namespace

int main(int argc, char** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    const uint32_t draws = argc > 1 ? static_cast<uint32_t>(atoi(argv[1])) : 150;
    for (const Case& c : listed()) check(c);
    check_neighbours();
    for (uint32_t seed = 1; seed <= draws; ++seed) check(drawn(seed));
    printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures != 0;
}
