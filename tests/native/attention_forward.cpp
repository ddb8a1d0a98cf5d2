// attention, attention_delta, attention_column_sums and merge_attention_states of every instruction set against loops
// in double precision: random cases over every feature, odd shapes and strides, NaN where nothing may look, bytes
// beyond the tensors, poisoned scratch and outputs, and bits that depend neither on workers nor on layout nor on batch
// neighbours.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "cpu/isa.h"
#include "passes.h"

namespace metate::cpu {
#define DECLARE(isa)                                                          \
    namespace isa {                                                           \
    void attention(const AttentionForward&, const Runtime&);                  \
    void attention_delta(const AttentionDelta&, const Runtime&);              \
    void attention_column_sums(const AttentionColumnSums&, const Runtime&);   \
    void merge_attention_states(const MergeAttentionStates&, const Runtime&); \
    }
DECLARE(baseline)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
namespace avx512bf16 {  // of the others it has no pass
void attention(const AttentionForward&, const Runtime&);
}
#endif
}  // namespace metate::cpu

using namespace metate;

namespace {

struct Pass {
    const char* name;
    void (*attention)(const AttentionForward&, const cpu::Runtime&);
    void (*delta)(const AttentionDelta&, const cpu::Runtime&);
    void (*column_sums)(const AttentionColumnSums&, const cpu::Runtime&);
    void (*merge)(const MergeAttentionStates&, const cpu::Runtime&);
};

std::vector<Pass> passes() {
#define PASS(isa)                                                                           \
    {#isa, cpu::isa::attention, cpu::isa::attention_delta, cpu::isa::attention_column_sums, \
     cpu::isa::merge_attention_states}
    std::vector<Pass> all{PASS(baseline)};
#if defined(__x86_64__)
    if (cpu::has_isa(cpu::Isa::avx2)) all.push_back(PASS(avx2));
    if (cpu::has_isa(cpu::Isa::avx512)) {
        all.push_back(PASS(avx512));
        Pass pairs = all.back();
        pairs.name = "avx512bf16", pairs.attention = cpu::avx512bf16::attention;  // its dot product is emulated
        all.push_back(pairs);
    }
#endif
    return all;
}

// Memory between two unreadable pages, its last or its first byte at the fence.
struct Guarded {
    static constexpr size_t page = 4096;
    size_t pages;
    uint8_t *map, *data;

    Guarded(size_t bytes, bool at_end) : pages((bytes + page - 1) / page + 2) {
        void* got = mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (got == MAP_FAILED) abort();
        map = static_cast<uint8_t*>(got);
        mprotect(map, page, PROT_NONE);
        mprotect(map + (pages - 1) * page, page, PROT_NONE);
        data = at_end ? map + (pages - 1) * page - bytes : map + page;
        memset(data, 0xfb, bytes);
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(map, pages * page); }
};

double load(DType dtype, const void* data, int64_t i) {
    switch (dtype) {
        case DType::f64:
            return static_cast<const double*>(data)[i];
        case DType::f32:
            return static_cast<const float*>(data)[i];
        case DType::f16:
            return static_cast<const _Float16*>(data)[i];
        case DType::i32:
            return static_cast<const int32_t*>(data)[i];
        case DType::u8:
            return static_cast<const uint8_t*>(data)[i];
        default:
            break;
    }
    const uint32_t bits = uint32_t{static_cast<const uint16_t*>(data)[i]} << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

void store(DType dtype, void* data, int64_t i, double x) {
    switch (dtype) {
        case DType::f64:
            static_cast<double*>(data)[i] = x;
            return;
        case DType::f32:
            static_cast<float*>(data)[i] = static_cast<float>(x);
            return;
        case DType::f16:
            static_cast<_Float16*>(data)[i] = static_cast<_Float16>(static_cast<float>(x));
            return;
        case DType::i32:
            static_cast<int32_t*>(data)[i] = static_cast<int32_t>(static_cast<uint32_t>(static_cast<int64_t>(x)));
            return;
        case DType::u8:
            static_cast<uint8_t*>(data)[i] = static_cast<uint8_t>(x);
            return;
        default:
            break;
    }
    const float y = static_cast<float>(x);
    uint32_t bits;
    memcpy(&bits, &y, 4);
    bits = isnan(y) ? 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits >> 16);
}

// A tensor in guarded memory, with its dimensions in some order and gaps between its elements.
template <int N>
struct Tensor {
    View<N> view{};
    std::shared_ptr<Guarded> memory;
    size_t bytes = 0;

    double get(const int64_t (&at)[N]) const { return load(view.dtype, view.data, offset(at)); }
    void set(const int64_t (&at)[N], double x) { store(view.dtype, view.data, offset(at), x); }
    int64_t offset(const int64_t (&at)[N]) const {
        int64_t sum = 0;
        for (int i = 0; i < N; ++i) sum += at[i] * view.stride[i];
        return sum;
    }
    template <class F>
    void each(const F& visit) const {
        int64_t at[N] = {}, count = 1;
        for (int i = 0; i < N; ++i) count *= view.size[i];
        for (; count > 0; --count) {
            visit(at);
            for (int i = N - 1; i >= 0 && ++at[i] == view.size[i]; --i) at[i] = 0;
        }
    }
};

struct Layout {
    int order = 0;    // 0: as named, 1: the two middle dimensions swapped, 2: the last dimension outermost
    int64_t gap = 1;  // elements from one to the next in the innermost dimension
    bool at_end = true;
};

template <int N>
Tensor<N> make(DType dtype, const int64_t (&size)[N], Layout layout, const bool (&repeated)[N] = {}) {
    Tensor<N> t;
    t.view.dtype = dtype;
    int order[N];
    for (int i = 0; i < N; ++i) order[i] = i;
    if (N == 4 && layout.order == 1) std::swap(order[1], order[2]);
    if (layout.order == 2) std::swap(order[0], order[N - 1]);
    int64_t stride = layout.gap, last = 0;
    bool empty = false;
    for (int i = N - 1; i >= 0; --i) {
        const int d = order[i];
        t.view.size[d] = size[d];
        t.view.stride[d] = repeated[d] ? 0 : stride;
        if (!repeated[d]) {
            last += (size[d] - 1) * stride;
            stride *= size[d] > 0 ? size[d] + (layout.gap > 1 ? 1 : 0) : 1;
        }
        empty |= size[d] == 0;
    }
    t.bytes = static_cast<size_t>(empty ? 0 : last + 1) * static_cast<size_t>(bytes_of(dtype));
    t.memory = std::make_shared<Guarded>(t.bytes, layout.at_end);
    t.view.data = t.memory->data;
    return t;
}

// Scratch full of NaN, and workers in any order.
std::unique_ptr<Guarded> scratch_block;
void* take_scratch(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    scratch_block = std::make_unique<Guarded>(bytes, true);
    memset(scratch_block->data, 0xff, bytes);
    return scratch_block->data;
}
void run_threads(int workers, void (*body)(int, void*), void* context) {
    std::vector<std::thread> threads;
    for (int i = workers - 1; i >= 0; --i) threads.emplace_back(body, i, context);
    for (auto& thread : threads) thread.join();
}
cpu::Runtime workers(int n) {
    return {n, run_threads, take_scratch};
}

// The contract, in double precision.

struct Drawn {
    std::string name;
    DType dtype;
    int64_t sequences, batch, heads, kv_heads, queries, keys, d, dv;
    Attention a{};
    Tensor<4> q, k, v, bias, intervals, blocks, bits;
    Tensor<2> slopes;
    Tensor<1> sinks, cu_q, cu_k;

    void connect() {
        a.q = q.view, a.k = k.view, a.v = v.view, a.bias = bias.view, a.alibi_slopes = slopes.view;
        a.sinks = sinks.view, a.intervals = intervals.view, a.blocks = blocks.view, a.bits = bits.view;
        a.cu_seqlens_q = cu_q.view, a.cu_seqlens_k = cu_k.view;
    }
};

bool philox_keeps(const Attention& a, int64_t head_of_batch, int64_t i, int64_t j) {
    uint32_t c[4] = {static_cast<uint32_t>((j >> 6) * 16 + (j & 15)), static_cast<uint32_t>(i),
                     static_cast<uint32_t>(head_of_batch), a.offset};
    uint32_t key[2] = {static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t x = uint64_t{0xd2511f53} * c[0], y = uint64_t{0xcd9e8d57} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(y >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(y),
                                  static_cast<uint32_t>(x >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(x)};
        memcpy(c, next, sizeof c);
        key[0] += 0x9e3779b9;
        key[1] += 0xbb67ae85;
    }
    return c[j >> 4 & 3] >= a.dropout_threshold;
}

struct Range {
    int64_t q0, k0, queries, keys;
};
Range range_of(const Drawn& c, int64_t n) {
    if (!c.cu_q.view) return {0, 0, c.queries, c.keys};
    const auto at = [](const Tensor<1>& t, int64_t i) { return static_cast<int64_t>(t.get({i})); };
    return {at(c.cu_q, n), at(c.cu_k, n), at(c.cu_q, n + 1) - at(c.cu_q, n), at(c.cu_k, n + 1) - at(c.cu_k, n)};
}

bool allowed(const Drawn& c, const Range& r, int64_t b, int64_t h, int64_t i, int64_t j) {
    const Attention& a = c.a;
    const int64_t at = i + (a.top_left ? 0 : r.keys - r.queries);
    if (a.window_left >= 0 && j < at - a.window_left) return false;
    if (a.window_right >= 0 && j > at + a.window_right) return false;
    if (a.intervals && (j < c.intervals.get({b, h, r.q0 + i, 0}) || j >= c.intervals.get({b, h, r.q0 + i, 1})))
        return false;
    if (a.blocks && c.blocks.get({b, h, i / a.block_m, j / a.block_n}) == 0) return false;
    return !a.bits || (static_cast<uint32_t>(static_cast<int32_t>(c.bits.get({b, h, i, j / 32}))) >> j % 32 & 1);
}

double logit(const Drawn& c, const Range& r, int64_t n, int64_t b, int64_t h, int64_t i, int64_t j) {
    const Attention& a = c.a;
    double s = 0;
    const int64_t kv = h / (c.heads / c.kv_heads);
    for (int64_t d = 0; d < c.d; ++d) s += c.q.get({b, r.q0 + i, h, d}) * c.k.get({b, r.k0 + j, kv, d});
    s *= a.scale;
    if (a.softcap > 0) s = a.softcap * tanh(s / a.softcap);
    if (a.bias) s += c.bias.get({b, h, i, j});
    if (a.alibi_slopes)
        s -= c.slopes.get({n, h}) * fabs(static_cast<double>(i + (a.top_left ? 0 : r.keys - r.queries) - j));
    return s;
}

struct Truth {
    std::vector<double> out, lse, sums;  // (B, Sq, Hq, Dv), (B, Hq, Sq), (B, Hq, Sk)
};

Truth truth_of(const Drawn& c) {
    Truth t;
    t.out.assign(static_cast<size_t>(c.batch * c.queries * c.heads * c.dv), 0.0);
    t.lse.assign(static_cast<size_t>(c.batch * c.heads * c.queries), -INFINITY);
    t.sums.assign(static_cast<size_t>(c.batch * c.heads * c.keys), 0.0);
    for (int64_t n = 0; n < c.sequences; ++n) {
        const Range r = range_of(c, n);
        const int64_t b = c.cu_q.view ? 0 : n;
        std::vector<double> s(static_cast<size_t>(r.keys));
        for (int64_t h = 0; h < c.heads; ++h) {
            for (int64_t i = 0; i < r.queries; ++i) {
                const double sink = c.a.sinks ? c.sinks.get({h}) : -INFINITY;
                double top = sink, total = 0;
                for (int64_t j = 0; j < r.keys; ++j) {
                    s[static_cast<size_t>(j)] = allowed(c, r, b, h, i, j) ? logit(c, r, n, b, h, i, j) : -INFINITY;
                    top = std::max(top, s[static_cast<size_t>(j)]);
                }
                if (top == -INFINITY) continue;
                for (const double x : s) total += exp(x - top);
                total += exp(sink - top);
                t.lse[static_cast<size_t>((b * c.heads + h) * c.queries + r.q0 + i)] = top + log(total);
                double* out = t.out.data() + ((b * c.queries + r.q0 + i) * c.heads + h) * c.dv;
                for (int64_t j = 0; j < r.keys; ++j) {
                    double p = exp(s[static_cast<size_t>(j)] - top) / total;
                    t.sums[static_cast<size_t>((b * c.heads + h) * c.keys + r.k0 + j)] += p;
                    if (p == 0) continue;
                    if (c.a.dropout_threshold) p *= philox_keeps(c.a, n * c.heads + h, i, j) ? c.a.dropout_scale : 0;
                    for (int64_t d = 0; d < c.dv; ++d) {
                        out[d] += p * c.v.get({b, r.k0 + j, h / (c.heads / c.kv_heads), d});
                    }
                }
            }
        }
    }
    return t;
}

// Drawing cases.

using Random = std::mt19937_64;
int64_t pick(Random& random, std::initializer_list<int64_t> from) {
    return from.begin()[random() % from.size()];
}
bool chance(Random& random, int percent) {
    return static_cast<int>(random() % 100) < percent;
}
double normal(Random& random) {
    return std::normal_distribution<double>()(random);
}
Layout layout(Random& random) {
    return {static_cast<int>(random() % 3), pick(random, {1, 1, 1, 2, 3}), chance(random, 50)};
}

void draw_masks(Drawn& c, Random& random) {
    Attention& a = c.a;
    a.window_left = chance(random, 30) ? pick(random, {0, 1, 5, 32, 100}) : -1;
    a.window_right = chance(random, 50) ? pick(random, {0, 0, 0, 1, 40}) : -1;
    a.top_left = chance(random, 25);
    if (chance(random, 25)) {
        const bool same[4] = {chance(random, 30), chance(random, 50), false, false};
        c.intervals = make<4>(DType::i32, {c.batch, c.heads, c.queries, 2}, layout(random), same);
        c.intervals.each([&](const int64_t (&at)[4]) {
            c.intervals.set(
                at, static_cast<double>(static_cast<int64_t>(random() % static_cast<uint64_t>(c.keys + 20)) - 10 +
                                        (at[3] ? c.keys / 2 : 0)));
        });
    }
    if (c.cu_q.view) return;
    if (chance(random, 20)) {
        a.block_m = pick(random, {1, 16, 64, 100});
        a.block_n = pick(random, {1, 16, 32, 64, 100});
        const bool same[4] = {false, chance(random, 50), false, false};
        const int64_t m = (c.queries + a.block_m - 1) / a.block_m, n = (c.keys + a.block_n - 1) / a.block_n;
        c.blocks = make<4>(DType::u8, {c.batch, c.heads, m, n}, layout(random), same);
        c.blocks.each([&](const int64_t (&at)[4]) { c.blocks.set(at, chance(random, 50)); });
    }
    if (chance(random, 20)) {
        c.bits = make<4>(DType::i32, {c.batch, c.heads, c.queries, (c.keys + 31) / 32}, layout(random));
        c.bits.each([&](const int64_t (&at)[4]) {
            c.bits.set(at, chance(random, 20)   ? 0
                           : chance(random, 20) ? 4294967295.0
                                                : static_cast<double>(static_cast<uint32_t>(random())));
        });
    }
}

void draw_scores(Drawn& c, Random& random) {
    Attention& a = c.a;
    const DType wide = c.dtype == DType::f64 ? DType::f64 : DType::f32;
    a.scale = chance(random, 10) ? -0.3 : chance(random, 5) ? 0.0 : 1 / sqrt(static_cast<double>(c.d));
    a.softcap = chance(random, 20) ? 3.0 : 0.0;
    if (!c.cu_q.view && chance(random, 25)) {
        const bool same[4] = {chance(random, 50), chance(random, 50), chance(random, 30), chance(random, 20)};
        c.bias =
            make<4>(chance(random, 50) ? wide : c.dtype, {c.batch, c.heads, c.queries, c.keys}, layout(random), same);
        c.bias.each([&](const int64_t (&at)[4]) { c.bias.set(at, chance(random, 10) ? -INFINITY : normal(random)); });
    }
    if (chance(random, 20)) {
        c.slopes = make<2>(wide, {c.sequences, c.heads}, layout(random));
        c.slopes.each([&](const int64_t (&at)[2]) { c.slopes.set(at, fabs(normal(random)) * 0.1); });
    }
    if (chance(random, 20)) {
        c.sinks = make<1>(wide, {c.heads}, layout(random));
        c.sinks.each([&](const int64_t (&at)[1]) { c.sinks.set(at, normal(random)); });
    }
    if (chance(random, 20)) {
        a.dropout_threshold = 0x40000000;
        a.dropout_scale = 1 / 0.75;
        a.seed = random();
        a.offset = static_cast<uint32_t>(random());
    }
}

void draw_packing(Drawn& c, Random& random) {
    c.sequences = static_cast<int64_t>(random() % 5);
    c.batch = 1;
    for (auto* cu : {&c.cu_q, &c.cu_k}) {
        const int64_t tokens = cu == &c.cu_q ? c.queries : c.keys;
        *cu = make<1>(DType::i32, {c.sequences + 1}, layout(random));
        std::vector<int64_t> ends;
        for (int64_t n = 0; n <= c.sequences; ++n)
            ends.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(tokens + 1)));
        std::sort(ends.begin(), ends.end());
        for (int64_t n = 0; n <= c.sequences; ++n) cu->set({n}, static_cast<double>(ends[static_cast<size_t>(n)]));
    }
}

Drawn draw(uint64_t seed, DType dtype) {
    Random random(seed);
    Drawn c;
    c.name = "seed " + std::to_string(seed);
    c.dtype = dtype;
    c.batch = c.sequences = pick(random, {1, 1, 2, 3, 0});
    c.kv_heads = pick(random, {1, 1, 2, 3});
    c.heads = c.kv_heads * pick(random, {1, 1, 2, 4, 5});
    c.queries = pick(random, {1, 1, 2, 5, 13, 33, 63, 65, 130, 0});
    c.keys = chance(random, 5) ? 2300 : pick(random, {1, 2, 31, 33, 63, 65, 100, 257, 530, 0});
    c.d = pick(random, {1, 3, 8, 16, 17, 32, 40, 64, 65, 80, 96, 128});
    c.dv = chance(random, 50) ? c.d : pick(random, {1, 7, 16, 24, 33, 64, 100, 128});
    if (chance(random, 4)) c.d = 512, c.dv = 511, c.keys = 70, c.queries = 14;
    if (chance(random, 20)) draw_packing(c, random);
    const bool one_head[4] = {false, false, chance(random, 10), false};
    c.q = make<4>(dtype, {c.batch, c.queries, c.heads, c.d}, layout(random));
    c.k = make<4>(dtype, {c.batch, c.keys, c.kv_heads, c.d}, layout(random), one_head);
    c.v = make<4>(dtype, {c.batch, c.keys, c.kv_heads, c.dv}, layout(random));
    for (auto* t : {&c.q, &c.k, &c.v}) t->each([&](const int64_t (&at)[4]) { t->set(at, normal(random)); });
    draw_masks(c, random);
    draw_scores(c, random);
    c.connect();
    return c;
}

// Running and checking.

int failures = 0;
void fail(const Pass& pass, const Drawn& c, const std::string& what) {
    static const char* names[] = {"f64", "f32", "bf16", "f16"};
    printf("FAIL %s %s %s: %s (sequences %ld heads %ld/%ld queries %ld keys %ld d %ld dv %ld)\n", pass.name,
           names[static_cast<int>(c.dtype)], c.name.c_str(), what.c_str(), c.sequences, c.heads, c.kv_heads, c.queries,
           c.keys, c.d, c.dv);
    if (++failures > 20) exit(1);
}

struct Result {
    Tensor<4> out;
    Tensor<3> lse, sums;
};

Result run(const Pass& pass, const Drawn& c, int threads, Layout how) {
    Result r;
    const DType wide = c.dtype == DType::f64 ? DType::f64 : DType::f32;
    r.out = make<4>(c.dtype, {c.batch, c.queries, c.heads, c.dv}, how);
    r.lse = make<3>(wide, {c.batch, c.heads, c.queries}, how);
    r.sums = make<3>(wide, {c.batch, c.heads, c.keys}, how);
    pass.attention({c.a, r.out.view, r.lse.view}, workers(threads));
    pass.column_sums({c.a, r.lse.view, r.sums.view}, workers(threads));
    return r;
}

template <int N>
bool same_bits(const Tensor<N>& a, const Tensor<N>& b) {
    bool same = true;
    a.each([&](const int64_t (&at)[N]) {
        const auto size = bytes_of(a.view.dtype);
        same &= memcmp(static_cast<const char*>(a.view.data) + a.offset(at) * size,
                       static_cast<const char*>(b.view.data) + b.offset(at) * size, static_cast<size_t>(size)) == 0;
    });
    return same;
}

template <int N>
void check_near(const Pass& pass, const Drawn& c, const char* what, const Tensor<N>& got,
                const std::vector<double>& truth, double relative) {
    double worst = 0, largest = 0;
    size_t i = 0;
    for (const double x : truth) largest = isfinite(x) ? std::max(largest, fabs(x)) : largest;
    got.each([&](const int64_t (&at)[N]) {
        const double x = got.get(at), t = truth[i++], error = x == t ? 0 : fabs(x - t);
        worst = error <= worst ? worst : isnan(error) ? INFINITY : error;
    });
    if (!(worst <= relative * (1 + largest))) fail(pass, c, std::string(what) + " is off by " + std::to_string(worst));
}

void check_case(const Pass& pass, const Drawn& c) {
    const bool rounds_p = !strcmp(pass.name, "avx512bf16") && c.dtype == DType::bf16;
    const double out_error = c.dtype == DType::f64 ? 1e-14
                           : c.dtype == DType::f32 ? 2e-6
                           : c.dtype == DType::f16 ? 6e-4
                           : rounds_p              ? 8e-3
                                                   : 4e-3;
    const Truth truth = truth_of(c);
    const Result one = run(pass, c, 1, {});
    check_near(pass, c, "out", one.out, truth.out, out_error);
    const double sum_error = c.dtype == DType::f64 ? 1e-14 : 3e-6;
    check_near(pass, c, "lse", one.lse, truth.lse, sum_error);
    check_near(pass, c, "sums", one.sums, truth.sums, sum_error);
    const Result three = run(pass, c, 3, {1, 2, false});
    if (!same_bits(one.out, three.out) || !same_bits(one.lse, three.lse) || !same_bits(one.sums, three.sums)) {
        fail(pass, c, "bits differ with three workers and strided outputs");
    }
}

// A call may write its elements and nothing between them.
template <int N>
bool gaps_untouched(const Tensor<N>& t) {
    std::vector<uint8_t> copy(t.memory->data, t.memory->data + t.bytes);
    const auto size = static_cast<size_t>(bytes_of(t.view.dtype));
    t.each([&](const int64_t (&at)[N]) { memset(copy.data() + static_cast<size_t>(t.offset(at)) * size, 0xfb, size); });
    for (const uint8_t byte : copy) {
        if (byte != 0xfb) return false;
    }
    return true;
}

Tensor<4> copy_of(const Tensor<4>& t) {
    const auto& size = t.view.size;
    Tensor<4> copy = make<4>(t.view.dtype, {size[0], size[1], size[2], size[3]}, {});
    t.each([&](const int64_t (&at)[4]) { copy.set(at, t.get(at)); });
    return copy;
}

// The same values elsewhere in memory, and the first sequence without the others.
void check_layout_and_neighbours(const Pass& pass, const Drawn& c) {
    const Result whole = run(pass, c, 1, {1, 2, true});
    if (!gaps_untouched(whole.out) || !gaps_untouched(whole.lse) || !gaps_untouched(whole.sums)) {
        fail(pass, c, "wrote between the elements of an output");
    }
    Drawn other = c;
    other.q = copy_of(c.q), other.k = copy_of(c.k), other.v = copy_of(c.v);
    other.connect();
    const Result dense = run(pass, other, 1, {});
    if (!same_bits(whole.out, dense.out) || !same_bits(whole.lse, dense.lse) || !same_bits(whole.sums, dense.sums)) {
        fail(pass, c, "bits depend on the strides of q, k, v");
    }
    if (c.cu_q.view || c.batch < 2) return;
    other.batch = other.sequences = 1;
    other.connect();
    for (auto* view : {&other.a.q, &other.a.k, &other.a.v}) view->size[0] = 1;
    const Result alone = run(pass, other, 1, {});
    if (!same_bits(alone.out, dense.out) || !same_bits(alone.lse, dense.lse) || !same_bits(alone.sums, dense.sums)) {
        fail(pass, c, "bits of the first sequence depend on the others");
    }
}

// Keys and values that a row masks may be anything: the row's bits are those with zeros there.
void check_masked_poison(const Pass& pass, const Drawn& c, uint64_t seed) {
    Random random(seed);
    if (c.batch == 0 || c.keys == 0) return;
    Drawn zero = c, poisoned = c;
    zero.k = copy_of(c.k), zero.v = copy_of(c.v), poisoned.k = copy_of(c.k), poisoned.v = copy_of(c.v);
    std::vector<bool> bad(static_cast<size_t>(c.keys));
    for (int64_t count = 1 + static_cast<int64_t>(random() % 3); count > 0; --count) {
        const int64_t j = static_cast<int64_t>(random() % static_cast<uint64_t>(c.keys));
        bad[static_cast<size_t>(j)] = true;
        const double poison = chance(random, 50) ? NAN : INFINITY;
        for (const double x : {0.0, poison}) {
            Drawn& to = x == 0 ? zero : poisoned;
            to.k.each([&](const int64_t (&at)[4]) {
                if (at[1] == j) to.k.set(at, x);
            });
            to.v.each([&](const int64_t (&at)[4]) {
                if (at[1] == j) to.v.set(at, x);
            });
        }
    }
    zero.connect();
    poisoned.connect();
    const Result clean = run(pass, zero, 1, {}), dirty = run(pass, poisoned, 1, {});
    bool same = true;
    for (int64_t n = 0; n < c.sequences; ++n) {
        const Range r = range_of(c, n);
        const int64_t b = c.cu_q.view ? 0 : n;
        for (int64_t h = 0; h < c.heads; ++h) {
            for (int64_t i = 0; i < r.queries; ++i) {
                bool sees_bad = false;
                for (int64_t j = 0; j < r.keys; ++j)
                    sees_bad |= bad[static_cast<size_t>(r.k0 + j)] && allowed(c, r, b, h, i, j);
                if (sees_bad) continue;
                for (int64_t d = 0; d < c.dv; ++d) {
                    const int64_t at[4] = {b, r.q0 + i, h, d};
                    same &= clean.out.get(at) == dirty.out.get(at);
                }
                const int64_t at[3] = {b, h, r.q0 + i};
                same &= clean.lse.get(at) == dirty.lse.get(at);
            }
        }
    }
    if (!same) fail(pass, c, "masked keys leak");
}

// Partial results with every lse from -inf up, merged; parts without keys hold NaN, which must not come through.
void check_merge(const Pass& pass, DType dtype, uint64_t seed) {
    Random random(seed);
    Drawn c;
    c.name = "merge, seed " + std::to_string(seed);
    c.dtype = dtype;
    const int64_t n = pick(random, {0, 1, 2, 3, 9}), batch = pick(random, {0, 1, 2}), heads = pick(random, {1, 3});
    c.batch = batch, c.heads = heads, c.queries = pick(random, {0, 1, 7, 70}),
    c.dv = pick(random, {1, 5, 16, 33, 64, 700});
    const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
    auto outs = make<5>(dtype, {n, batch, c.queries, heads, c.dv}, layout(random));
    auto lses = make<4>(wide, {n, batch, heads, c.queries}, layout(random));
    lses.each([&](const int64_t (&at)[4]) { lses.set(at, chance(random, 30) ? -INFINITY : 20 * normal(random)); });
    outs.each([&](const int64_t (&at)[5]) {
        outs.set(at, lses.get({at[0], at[1], at[3], at[2]}) == -INFINITY ? NAN : normal(random));
    });
    std::vector<double> lse, out;
    auto merged_lse = make<3>(wide, {batch, heads, c.queries}, layout(random));
    auto merged = make<4>(dtype, {batch, c.queries, heads, c.dv}, layout(random));
    merged_lse.each([&](const int64_t (&at)[3]) {
        double top = -INFINITY, total = 0;
        for (int64_t i = 0; i < n; ++i) top = std::max(top, lses.get({i, at[0], at[1], at[2]}));
        for (int64_t i = 0; i < n && top > -INFINITY; ++i) total += exp(lses.get({i, at[0], at[1], at[2]}) - top);
        lse.push_back(top + log(total));
    });
    merged.each([&](const int64_t (&at)[4]) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) {
            const double part = lses.get({i, at[0], at[2], at[1]});
            if (part == -INFINITY) continue;
            const double all = lse[static_cast<size_t>((at[0] * heads + at[2]) * c.queries + at[1])];
            sum += exp(part - all) * outs.get({i, at[0], at[1], at[2], at[3]});
        }
        out.push_back(sum);
    });
    pass.merge({outs.view, lses.view, merged.view, merged_lse.view}, workers(1));
    check_near(pass, c, "merged lse", merged_lse, lse, dtype == DType::f64 ? 1e-14 : 5e-7);
    const double error = dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 2e-6 : dtype == DType::f16 ? 6e-4 : 4e-3;
    check_near(pass, c, "merged out", merged, out, error);
    if (!gaps_untouched(merged)) fail(pass, c, "wrote between the elements of an output");
    auto again = make<4>(dtype, {batch, c.queries, heads, c.dv}, {});
    auto again_lse = make<3>(wide, {batch, heads, c.queries}, {});
    pass.merge({outs.view, lses.view, again.view, again_lse.view}, workers(3));
    if (!same_bits(merged, again) || !same_bits(merged_lse, again_lse)) fail(pass, c, "bits of merged states differ");
}

void check_delta(const Pass& pass, DType dtype, uint64_t seed) {
    Random random(seed);
    Drawn c;
    c.name = "delta, seed " + std::to_string(seed);
    c.dtype = dtype;
    const int64_t batch = pick(random, {0, 1, 2}), heads = pick(random, {0, 1, 3});
    c.batch = batch, c.heads = heads, c.queries = pick(random, {0, 1, 7, 70}), c.dv = pick(random, {1, 5, 16, 33, 700});
    const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
    auto out = make<4>(dtype, {batch, c.queries, heads, c.dv}, layout(random));
    auto grad = make<4>(dtype, {batch, c.queries, heads, c.dv}, layout(random));
    auto grad_lse = make<3>(wide, {batch, heads, c.queries}, layout(random));
    for (auto* x : {&out, &grad}) x->each([&](const int64_t (&at)[4]) { x->set(at, normal(random)); });
    grad_lse.each([&](const int64_t (&at)[3]) { grad_lse.set(at, normal(random)); });
    const bool has_lse = chance(random, 50);
    auto delta = make<3>(wide, {batch, heads, c.queries}, layout(random));
    std::vector<double> expected;
    delta.each([&](const int64_t (&at)[3]) {
        double sum = has_lse ? -grad_lse.get(at) : 0;
        for (int64_t e = 0; e < c.dv; ++e)
            sum += out.get({at[0], at[2], at[1], e}) * grad.get({at[0], at[2], at[1], e});
        expected.push_back(sum);
    });
    const View<3> lse = has_lse ? grad_lse.view : View<3>{};
    pass.delta({out.view, grad.view, lse, delta.view}, workers(1));
    check_near(pass, c, "delta", delta, expected, dtype == DType::f64 ? 1e-13 : 2e-5);
    if (!gaps_untouched(delta)) fail(pass, c, "wrote between the elements of delta");
    auto again = make<3>(wide, {batch, heads, c.queries}, {});
    pass.delta({out.view, grad.view, lse, again.view}, workers(3));
    if (!same_bits(delta, again)) fail(pass, c, "bits of delta differ");
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t count = argc > 1 ? strtoull(argv[1], nullptr, 10) : 40,
                   first = argc > 2 ? strtoull(argv[2], nullptr, 10) : 0;
    for (const Pass& pass : passes()) {
        for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
            if (!takes(pass.name, dtype)) continue;
            for (uint64_t seed = first; seed < first + count; ++seed) {
                const Drawn c = draw(seed, dtype);
                check_case(pass, c);
                check_layout_and_neighbours(pass, c);
                check_masked_poison(pass, c, seed);
                check_delta(pass, dtype, seed);
                check_merge(pass, dtype, seed);
            }
        }
    }
    printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures != 0;
}
