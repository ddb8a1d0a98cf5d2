// The CUDA kernels of attention, run by the emulator, against loops in double precision: random cases over every
// feature, head dimensions from 1 to 256, packed sequences, strides, NaN where nothing may look, poisoned outputs, and
// another order of the threads every time. `cuda_attention [cases [seed]]`
#include <math.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "emulated.h"
#include "tensors.h"

using namespace metate;

namespace {

struct Case {
    std::string text;
    Attention a{};
    Tensor<4> q, k, v, bias, intervals, blocks, bits, grad_out;
    Tensor<2> alibi;
    Tensor<1> sinks, ends_q, ends_k;
    std::vector<uint8_t> seen;  // of the dense case, per (b, h, i, j): what the masks say, filled by the reference
    Tensor<3> grad_lse;
};

struct Span {
    int64_t batch, row, q0, k0, queries, keys;  // row: the batch coordinate in the tensors
};

std::vector<Span> spans(const Case& c) {
    std::vector<Span> all;
    if (!c.a.cu_seqlens_q) {
        for (int64_t b = 0; b < c.a.q.size[0]; ++b) all.push_back({b, b, 0, 0, c.a.q.size[1], c.a.k.size[1]});
        return all;
    }
    for (int64_t b = 0; b + 1 < c.a.cu_seqlens_q.size[0]; ++b) {
        const auto at = [&](const Tensor<1>& t, int64_t i) { return static_cast<int64_t>(t.get({i})); };
        all.push_back({b, 0, at(c.ends_q, b), at(c.ends_k, b), at(c.ends_q, b + 1) - at(c.ends_q, b),
                       at(c.ends_k, b + 1) - at(c.ends_k, b)});
    }
    return all;
}

bool sees(const Case& c, const Span& s, int64_t h, int64_t i, int64_t j) {
    const Attention& a = c.a;
    const int64_t diagonal = a.top_left ? 0 : s.keys - s.queries;
    if (a.window_left >= 0 && j < i + diagonal - a.window_left) return false;
    if (a.window_right >= 0 && j > i + diagonal + a.window_right) return false;
    if (a.intervals) {
        if (j < c.intervals.get({s.row, h, s.q0 + i, 0}) || j >= c.intervals.get({s.row, h, s.q0 + i, 1})) return false;
    }
    if (a.blocks && c.blocks.get({s.row, h, i / a.block_m, j / a.block_n}) == 0) return false;
    if (a.bits) {
        const auto word = static_cast<uint32_t>(static_cast<int64_t>(c.bits.get({s.row, h, i, j / 32})));
        if ((word >> (j % 32) & 1) == 0) return false;
    }
    return true;
}

bool dropped(const Attention& a, int64_t bh, int64_t i, int64_t j) {
    if (a.dropout_threshold == 0) return false;
    uint32_t x[4] = {static_cast<uint32_t>((j >> 6) * 16 + (j & 15)), static_cast<uint32_t>(i),
                     static_cast<uint32_t>(bh), a.offset};
    uint32_t k0 = static_cast<uint32_t>(a.seed), k1 = static_cast<uint32_t>(a.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p = uint64_t{0xD2511F53} * x[0], r = uint64_t{0xCD9E8D57} * x[2];
        const uint32_t y[4] = {static_cast<uint32_t>(r >> 32) ^ x[1] ^ k0, static_cast<uint32_t>(r),
                               static_cast<uint32_t>(p >> 32) ^ x[3] ^ k1, static_cast<uint32_t>(p)};
        memcpy(x, y, sizeof x);
        k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    return x[j >> 4 & 3] < a.dropout_threshold;
}

struct Row {
    std::vector<int64_t> key;
    std::vector<double> logit, slope, probability;
    double lse = -infinity;
};

Row row_of(const Case& c, const Span& s, int64_t h, int64_t i) {
    const Attention& a = c.a;
    const int64_t hk = h / (a.q.size[2] / a.k.size[2]), diagonal = a.top_left ? 0 : s.keys - s.queries;
    Row row;
    for (int64_t j = 0; j < s.keys; ++j) {
        if (!sees(c, s, h, i, j)) continue;
        double x = 0, slope = 1;
        for (int64_t d = 0; d < a.q.size[3]; ++d)
            x += c.q.get({s.row, s.q0 + i, h, d}) * c.k.get({s.row, s.k0 + j, hk, d});
        x *= a.scale;
        if (a.softcap > 0) {
            const double t = tanh(x / a.softcap);
            x = a.softcap * t, slope = 1 - t * t;
        }
        if (a.bias) x += c.bias.get({s.row, h, i, j});
        if (a.alibi_slopes) x -= c.alibi.get({s.batch, h}) * fabs(static_cast<double>(i + diagonal - j));
        row.key.push_back(j), row.logit.push_back(x), row.slope.push_back(slope);
    }
    double top = a.sinks ? c.sinks.get({h}) : -infinity, total = 0;
    for (double x : row.logit) top = std::max(top, x);
    if (top == -infinity) return row.key.clear(), row;
    if (a.sinks) total += exp(c.sinks.get({h}) - top);
    for (double x : row.logit) total += exp(x - top);
    row.lse = top + log(total);
    for (double x : row.logit) row.probability.push_back(exp(x - row.lse));
    return row;
}

// ---- Cases ----------------------------------------------------------------------------------------------------------

struct Shape {
    int64_t b, sq, sk, hq, hk, d, dv;
};

// A case under construction.
struct Draft {
    Random& random;
    DType dtype;
    Shape s;
    bool packed;
    std::string features;
    int layout;

    bool has(const char* what) const { return features.find(what) != std::string::npos; }
    int64_t batch() const { return packed ? 1 : s.b; }
    template <int N>
    Tensor<N> tensor(DType type, std::vector<int64_t> size) const {
        return Tensor<N>(type, size, layout, random);
    }
    template <int N>
    Tensor<N> normals(DType type, std::vector<int64_t> size) const {
        return tensor<N>(type, size).fill([&] { return normal(random); });
    }

    std::string text() const {
        return std::string(dtype == DType::bf16 ? "bf16" : "f16") + " B" + std::to_string(s.b) + " Sq" +
               std::to_string(s.sq) + " Sk" + std::to_string(s.sk) + " Hq" + std::to_string(s.hq) + " Hkv" +
               std::to_string(s.hk) + " D" + std::to_string(s.d) + " Dv" + std::to_string(s.dv) +
               (packed ? " packed" : "") + " layout " + std::to_string(layout) + features;
    }
};

void set_scalars(const Draft& draft, Attention& a) {
    Random& random = draft.random;
    a.window_left = a.window_right = -1;
    a.scale = 1 / sqrt(static_cast<double>(draft.s.d));
    if (draft.has("causal")) a.window_right = 0;
    if (draft.has("window")) a.window_left = draw(random, 0, 70), a.window_right = draw(random, 0, 40);
    if (draft.has("left")) a.window_left = draw(random, 0, 100);
    if (draft.has("minus")) a.scale = -a.scale;
    a.top_left = draft.has("corner");
    if (draft.has("softcap")) a.softcap = 1.5;
    if (draft.has("dropout"))
        a.dropout_threshold = 1u << 30, a.dropout_scale = 4. / 3, a.seed = 0x123456789abcull + draw(random, 0, 99),
        a.offset = 7;
}

// What is added to the logits, or stands beside them.
void add_terms(const Draft& draft, Case& c) {
    Random& random = draft.random;
    const Shape& s = draft.s;
    if (draft.has("alibi")) {
        c.alibi = draft.tensor<2>(DType::f32, {s.b, s.hq}).fill([&] { return 0.02 * draw(random, 1, 10); });
        c.a.alibi_slopes = c.alibi.view;
    }
    if (draft.has("sinks")) {
        c.sinks = draft.normals<1>(DType::f32, {s.hq});
        c.a.sinks = c.sinks.view;
    }
    if (draft.has("bias")) {
        c.bias = draft.normals<4>(draft.has("bias32") ? DType::f32 : draft.dtype, {s.b, s.hq, s.sq, s.sk});
        for (int i = 0; i < 4; ++i) {
            if (c.text.find("spread" + std::to_string(i)) != std::string::npos) c.bias.broadcast(i);
        }
        c.bias.each([&](const int64_t (&at)[4]) { c.bias.set(at, chance(random, 5) ? -infinity : normal(random)); });
        c.a.bias = c.bias.view;
    }
}

// Documents, any ranges, or ranges with one end at an extreme of int32.
void add_intervals(const Draft& draft, Case& c) {
    Random& random = draft.random;
    const Shape& s = draft.s;
    c.intervals = draft.tensor<4>(DType::i32, {draft.batch(), s.hq, s.sq, 2});
    if (chance(random, 50)) c.intervals.broadcast(1);
    const int documents = draw(random, 1, 4), kind = draw(random, 0, 2);
    c.intervals.each([&](const int64_t (&at)[4]) {
        const int64_t piece = s.sk / documents + 1, low = at[2] * s.sk / std::max<int64_t>(s.sq, 1) / piece * piece;
        const int64_t value = kind == 0 ? low + at[3] * piece
                            : kind == 1 ? draw(random, -5, static_cast<int>(s.sk) + 5)
                                        : (at[3]       ? 2147483647
                                           : at[2] % 3 ? -2147483648ll
                                                       : s.sk / 2);
        c.intervals.set(at, static_cast<double>(value));
    });
    c.a.intervals = c.intervals.view;
}

void add_masks(const Draft& draft, Case& c) {
    Random& random = draft.random;
    const Shape& s = draft.s;
    Attention& a = c.a;
    if (draft.has("intervals")) add_intervals(draft, c);
    if (draft.has("blocks")) {
        a.block_m = draw(random, 1, 3) * draw(random, 5, 64), a.block_n = draw(random, 1, 3) * draw(random, 5, 64);
        const int64_t rows = (s.sq + a.block_m - 1) / a.block_m, columns = (s.sk + a.block_n - 1) / a.block_n;
        c.blocks = draft.tensor<4>(DType::u8, {s.b, s.hq, rows, columns}).fill([&] {
            return chance(random, 40) ? draw(random, 1, 255) : 0;
        });
        a.blocks = c.blocks.view;
    }
    if (draft.has("bits")) {
        c.bits = draft.tensor<4>(DType::i32, {s.b, s.hq, s.sq, (s.sk + 31) / 32}).fill([&] {
            return static_cast<double>(static_cast<int32_t>(random()));
        });
        a.bits = c.bits.view;
    }
}

// The ends of packed sequences.
Tensor<1> random_ends(const Draft& draft, int64_t tokens) {
    std::vector<int> at;
    for (int i = 0; i <= draft.s.b; ++i) at.push_back(draw(draft.random, 0, static_cast<int>(tokens)));
    std::sort(at.begin(), at.end());
    size_t next = 0;
    return draft.tensor<1>(DType::i32, {draft.s.b + 1}).fill([&] { return at[next++]; });
}

// Whether a query of the group of key head h sees key t of a row of the tensors.
bool is_seen(const Case& c, const std::vector<Span>& all, int64_t row, int64_t t, int64_t h) {
    const int64_t group = c.a.q.size[2] / c.a.k.size[2];
    for (const Span& s : all) {
        if (s.row != row || t < s.k0 || t >= s.k0 + s.keys) continue;
        for (int64_t g = h * group; g < (h + 1) * group; ++g) {
            for (int64_t i = 0; i < s.queries; ++i) {
                if (sees(c, s, g, i, t - s.k0)) return true;
            }
        }
    }
    return false;
}

bool sees_any(const Case& c, const Span& s, int64_t h, int64_t i) {
    for (int64_t j = 0; j < s.keys; ++j) {
        if (sees(c, s, h, i, j)) return true;
    }
    return false;
}

// Keys that nobody sees, and queries that see none, hold anything.
void poison_unseen(const Draft& draft, Case& c) {
    const Shape& s = draft.s;
    const std::vector<Span> all = spans(c);
    for (int64_t row = 0; row < draft.batch(); ++row) {
        for (int64_t t = 0; t < s.sk; ++t) {
            for (int64_t h = 0; h < s.hk; ++h) {
                if (is_seen(c, all, row, t, h)) continue;
                for (int64_t d = 0; d < s.d; ++d) c.k.set({row, t, h, d}, NAN);
                for (int64_t d = 0; d < s.dv; ++d) c.v.set({row, t, h, d}, d % 2 ? NAN : -infinity);
            }
        }
    }
    for (const Span& x : all) {
        for (int64_t h = 0; h < s.hq; ++h) {
            for (int64_t i = 0; i < x.queries; ++i) {
                if (sees_any(c, x, h, i)) continue;
                for (int64_t d = 0; d < s.d; ++d) c.q.set({x.row, x.q0 + i, h, d}, NAN);
                for (int64_t d = 0; d < s.dv; ++d) c.grad_out.set({x.row, x.q0 + i, h, d}, NAN);
            }
        }
    }
}

Case make_case(const Draft& draft) {
    const Shape& s = draft.s;
    const int64_t batch = draft.batch();
    Case c;
    Attention& a = c.a;
    c.text = draft.text();
    c.q = draft.normals<4>(draft.dtype, {batch, s.sq, s.hq, s.d});
    c.k = draft.normals<4>(draft.dtype, {batch, s.sk, s.hk, s.d});
    c.v = draft.normals<4>(draft.dtype, {batch, s.sk, s.hk, s.dv});
    c.grad_out = draft.normals<4>(draft.dtype, {batch, s.sq, s.hq, s.dv});
    c.grad_lse = draft.normals<3>(DType::f32, {batch, s.hq, s.sq});
    a.q = c.q.view, a.k = c.k.view, a.v = c.v.view;
    set_scalars(draft, a);
    add_terms(draft, c);
    add_masks(draft, c);
    if (draft.packed) {
        c.ends_q = random_ends(draft, s.sq), c.ends_k = random_ends(draft, s.sk);
        a.cu_seqlens_q = c.ends_q.view, a.cu_seqlens_k = c.ends_k.view;
    }
    if (draft.has("nan")) poison_unseen(draft, c);
    return c;
}

std::string random_features(Random& random, bool packed) {
    static const char* const all[] = {"causal", "window",  "left",      "corner",  "softcap", "dropout", "alibi",
                                      "sinks",  "nan",     "intervals", "minus",   "bias",    "bias32",  "blocks",
                                      "bits",   "spread0", "spread1",   "spread2", "spread3"};
    std::string features;
    const int percent = draw(random, 0, 2) * 15;
    for (size_t i = 0; i < std::size(all) - (packed ? 8 : 0); ++i) {
        if (chance(random, percent)) features += std::string(" ") + all[i];
    }
    return features;
}

int64_t random_length(Random& random) {
    static const int special[] = {0, 1, 31, 63, 64, 65, 127, 128, 129};
    return chance(random, 50) ? special[draw(random, 0, 8)] : draw(random, 1, 200);
}

Case random_case(Random& random) {
    static const int dims[] = {1, 7, 32, 64, 72, 80, 96, 111, 128, 160, 192, 255, 256};
    const bool packed = chance(random, 30);
    Shape s{};
    s.b = draw(random, 1, packed ? 4 : 2), s.hk = draw(random, 1, 2), s.hq = s.hk * draw(random, 1, 2);
    s.sq = random_length(random), s.sk = random_length(random);
    s.d = dims[draw(random, 0, 12)];
    s.dv = chance(random, 70) ? s.d : dims[draw(random, 0, 12)];
    const DType dtype = chance(random, 50) ? DType::bf16 : DType::f16;
    const int layout = draw(random, 0, 2);
    return make_case({random, dtype, s, packed, random_features(random, packed), layout});
}

// ---- Tests ----------------------------------------------------------------------------------------------------------

void check_forward(Case& c, Random& random, int layout) {
    const Attention& a = c.a;
    Tensor<4> out(a.q.dtype, {a.q.size[0], a.q.size[1], a.q.size[2], a.v.size[3]}, layout, random);
    Tensor<3> lse(DType::f32, {a.q.size[0], a.q.size[2], a.q.size[1]}, layout, random);
    cuda::attention({a, out.view, lse.view}, emulator::device());

    Truth<4> true_out(out.view);
    Truth<3> true_lse(lse.view, -infinity);
    const int64_t group = a.q.size[2] / a.k.size[2];
    for (const Span& s : spans(c)) {
        for (int64_t h = 0; h < a.q.size[2]; ++h) {
            for (int64_t i = 0; i < s.queries; ++i) {
                const Row row = row_of(c, s, h, i);
                true_lse({s.row, h, s.q0 + i}) = row.lse;
                for (size_t n = 0; n < row.key.size(); ++n) {
                    const int64_t j = row.key[n];
                    if (dropped(a, s.batch * a.q.size[2] + h, i, j)) continue;
                    const double p = row.probability[n] * (a.dropout_threshold ? a.dropout_scale : 1);
                    for (int64_t d = 0; d < a.v.size[3]; ++d) {
                        true_out({s.row, s.q0 + i, h, d}) += p * c.v.get({s.row, s.k0 + j, h / group, d});
                    }
                }
            }
        }
    }
    compare(c.text, "out", out, true_out, 1.5, a.q.dtype);
    compare(c.text, "lse", lse, true_lse, 1, DType::f32);
}

void check_column_sums(Case& c, Random& random, int layout) {
    const Attention& a = c.a;
    Tensor<3> sums(DType::f32, {a.q.size[0], a.q.size[2], a.k.size[1]}, layout, random);
    Tensor<3> lse(DType::f32, {a.q.size[0], a.q.size[2], a.q.size[1]}, layout, random);
    lse.each([&](const int64_t (&at)[3]) { lse.set(at, -infinity); });
    Truth<3> truth(sums.view);
    for (const Span& s : spans(c)) {
        for (int64_t h = 0; h < a.q.size[2]; ++h) {
            for (int64_t i = 0; i < s.queries; ++i) {
                const Row row = row_of(c, s, h, i);
                lse.set({s.row, h, s.q0 + i}, row.lse);
                for (size_t n = 0; n < row.key.size(); ++n) truth({s.row, h, s.k0 + row.key[n]}) += row.probability[n];
            }
        }
    }
    Attention without_v = a;
    without_v.v = {};
    cuda::attention_column_sums({without_v, lse.view, sums.view}, emulator::device());
    compare(c.text, "column sums", sums, truth, 4, DType::f32);
}

void check_backward(Case& c, Random& random, int layout) {
    const Attention& a = c.a;
    const int64_t heads = a.q.size[2], group = heads / a.k.size[2];
    const auto size = [](const View<4>& v) { return std::vector<int64_t>(v.size, v.size + 4); };
    Tensor<4> dq(a.q.dtype, size(a.q), layout, random), dk(a.q.dtype, size(a.k), layout, random);
    Tensor<4> dv(a.q.dtype, size(a.v), layout, random), dbias;
    Tensor<2> dalibi;
    Tensor<3> lse(DType::f32, {a.q.size[0], heads, a.q.size[1]}, layout, random);
    Tensor<3> delta(DType::f32, {a.q.size[0], heads, a.q.size[1]}, layout, random);
    AttentionBackward b{a, c.grad_out.view, lse.view, false, delta.view, dq.view, dk.view, dv.view, {}, {}};
    Truth<4> true_dq(dq.view), true_dk(dk.view), true_dv(dv.view), true_dbias(a.q);
    Truth<2> true_dalibi(View<2>{});
    if (a.bias) {
        dbias = Tensor<4>(DType::f32, size(a.bias), layout, random);
        for (int i = 0; i < 4; ++i) {
            if (a.bias.stride[i] == 0) dbias.broadcast(i);
        }
        b.dbias = dbias.view;
        true_dbias = Truth<4>(dbias.view);
    }
    if (a.alibi_slopes) {
        dalibi = Tensor<2>(DType::f32, {a.alibi_slopes.size[0], heads}, layout, random);
        b.dalibi_slopes = dalibi.view;
        true_dalibi = Truth<2>(dalibi.view);
    }
    lse.each([&](const int64_t (&at)[3]) { lse.set(at, -infinity), delta.set(at, NAN); });

    for (const Span& s : spans(c)) {
        for (int64_t h = 0; h < heads; ++h) {
            for (int64_t i = 0; i < s.queries; ++i) {
                const Row row = row_of(c, s, h, i);
                lse.set({s.row, h, s.q0 + i}, row.lse);
                const int64_t diagonal = a.top_left ? 0 : s.keys - s.queries;
                std::vector<double> dp(row.key.size());
                double sum = row.key.empty() ? 0 : -c.grad_lse.get({s.row, h, s.q0 + i});
                for (size_t n = 0; n < dp.size(); ++n) {
                    const int64_t j = row.key[n];
                    const double keep = dropped(a, s.batch * heads + h, i, j) ? 0
                                      : a.dropout_threshold                   ? a.dropout_scale
                                                                              : 1;
                    for (int64_t d = 0; d < a.v.size[3]; ++d) {
                        const double g = c.grad_out.get({s.row, s.q0 + i, h, d});
                        dp[n] += keep * g * c.v.get({s.row, s.k0 + j, h / group, d});
                        true_dv({s.row, s.k0 + j, h / group, d}) += keep * row.probability[n] * g;
                    }
                    sum += row.probability[n] * dp[n];
                }
                delta.set({s.row, h, s.q0 + i}, row.key.empty() ? NAN : sum);
                for (size_t n = 0; n < dp.size(); ++n) {
                    const int64_t j = row.key[n];
                    const double logit = row.probability[n] * (dp[n] - sum), dot = logit * row.slope[n] * a.scale;
                    for (int64_t d = 0; d < a.q.size[3]; ++d) {
                        true_dq({s.row, s.q0 + i, h, d}) += dot * c.k.get({s.row, s.k0 + j, h / group, d});
                        true_dk({s.row, s.k0 + j, h / group, d}) += dot * c.q.get({s.row, s.q0 + i, h, d});
                    }
                    if (a.bias) true_dbias({s.row, h, i, j}) += logit;
                    if (a.alibi_slopes)
                        true_dalibi({s.batch, h}) -= logit * fabs(static_cast<double>(i + diagonal - j));
                }
            }
        }
    }
    cuda::attention_backward(b, emulator::device());
    compare(c.text, "dq", dq, true_dq, 3, a.q.dtype);
    compare(c.text, "dk", dk, true_dk, 3, a.q.dtype);
    compare(c.text, "dv", dv, true_dv, 3, a.q.dtype);
    if (a.alibi_slopes) compare(c.text, "dalibi", dalibi, true_dalibi, 16, DType::f32);
    if (!a.bias) return;
    Truth<4> summed(dbias.view);  // over the dimensions along which the bias is broadcast
    const auto collapsed = [&](const int64_t (&at)[4], int64_t (&to)[4]) {
        for (int i = 0; i < 4; ++i) to[i] = a.bias.stride[i] == 0 ? 0 : at[i];
    };
    int64_t to[4];
    dbias.each([&](const int64_t (&at)[4]) { collapsed(at, to), summed(to) += true_dbias(at); });
    dbias.each([&](const int64_t (&at)[4]) { collapsed(at, to), true_dbias(at) = summed(to); });
    compare(c.text, "dbias", dbias, true_dbias, 16, DType::f32);
}

void check_merge(Random& random) {
    const DType dtype = draw(random, 0, 2) == 0 ? DType::f32 : chance(random, 50) ? DType::bf16 : DType::f16;
    const int64_t n = draw(random, 1, 4), b = draw(random, 1, 2), s = draw(random, 0, 9), h = draw(random, 1, 3);
    const int64_t d = draw(random, 0, 70);
    const int layout = draw(random, 0, 2);
    auto outs = Tensor<5>(dtype, {n, b, s, h, d}, layout, random).fill([&] { return normal(random); });
    auto lses = Tensor<4>(DType::f32, {n, b, h, s}, layout, random).fill([&] {
        return chance(random, 30) ? -infinity : 3 * normal(random);
    });
    Tensor<4> out(dtype, {b, s, h, d}, layout, random);
    Tensor<3> lse(DType::f32, {b, h, s}, layout, random);
    Truth<4> true_out(out.view);
    Truth<3> true_lse(lse.view, -infinity);
    lse.each([&](const int64_t (&at)[3]) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += exp(lses.get({i, at[0], at[1], at[2]}));
        if (sum > 0) true_lse(at) = log(sum);
        for (int64_t i = 0; i < n; ++i) {
            const double weight = sum > 0 ? exp(lses.get({i, at[0], at[1], at[2]})) / sum : 0;
            for (int64_t e = 0; e < d; ++e) {
                if (lses.get({i, at[0], at[1], at[2]}) == -infinity) outs.set({i, at[0], at[2], at[1], e}, NAN);
                if (weight > 0) true_out({at[0], at[2], at[1], e}) += weight * outs.get({i, at[0], at[2], at[1], e});
            }
        }
    });
    cuda::merge_attention_states({outs.view, lses.view, out.view, lse.view}, emulator::device());
    Case c;
    c.text = "merge " + std::to_string(n) + " " + std::to_string(s) + " " + std::to_string(d);
    compare(c.text, "merged out", out, true_out, 1, dtype);
    compare(c.text, "merged lse", lse, true_lse, 1, DType::f32);
}

void check_delta(Random& random) {
    const DType dtype = draw(random, 0, 2) == 0 ? DType::f32 : chance(random, 50) ? DType::bf16 : DType::f16;
    const int64_t b = draw(random, 1, 2), s = draw(random, 0, 9), h = draw(random, 0, 3), d = draw(random, 1, 140);
    const int layout = draw(random, 0, 2);
    auto out = Tensor<4>(dtype, {b, s, h, d}, layout, random).fill([&] { return normal(random); });
    auto grad = Tensor<4>(dtype, {b, s, h, d}, layout, random).fill([&] { return normal(random); });
    auto grad_lse = Tensor<3>(DType::f32, {b, h, s}, layout, random).fill([&] { return normal(random); });
    const bool has_lse = chance(random, 50);
    Tensor<3> delta(DType::f32, {b, h, s}, layout, random);
    Truth<3> truth(delta.view);
    delta.each([&](const int64_t (&at)[3]) {
        if (has_lse) truth(at) = -grad_lse.get({at[0], at[1], at[2]});
        for (int64_t e = 0; e < d; ++e) {
            truth(at) += out.get({at[0], at[2], at[1], e}) * grad.get({at[0], at[2], at[1], e});
        }
    });
    cuda::attention_delta({out.view, grad.view, has_lse ? grad_lse.view : View<3>{}, delta.view}, emulator::device());
    compare("delta " + std::to_string(s) + " " + std::to_string(d), "delta", delta, truth, 2, DType::f32);
}

// Shared memory is read and written without bank conflicts where tensors come in vectors.
void check_traffic(Random& random) {
    for (int d : {64, 96, 128, 192, 256}) {
        Case c = make_case({random, DType::bf16, {1, 128, 128, 1, 1, d, d}, false, " causal", 0});
        emulator::count_traffic(true);
        check_forward(c, random, 0);
        check_backward(c, random, 0);
        const std::vector<emulator::Traffic> places = emulator::traffic();
        require(!places.empty(), "no traffic was counted");
        for (const emulator::Traffic& t : places) {
            require(t.wavefronts == t.ideal, t.place + " takes " + std::to_string(t.wavefronts) + " wavefronts, not " +
                                                 std::to_string(t.ideal) + ", in: " + c.text);
        }
        emulator::count_traffic(false);
    }
}

}  // namespace

int main(int argc, char** argv) {
    return run_cases("cuda_attention", 60, argc, argv, [](Random& random, bool is_first) {
        Case c = random_case(random);
        check_forward(c, random, draw(random, 0, 2));
        check_column_sums(c, random, draw(random, 0, 2));
        check_backward(c, random, draw(random, 0, 2));
        check_delta(random);
        check_merge(random);
        if (is_first) check_traffic(random);
    });
}
