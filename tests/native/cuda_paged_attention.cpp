// The CUDA kernels of paged attention, run by the emulator, against loops in double precision: random cases over every
// cache dtype, page size and mask, packed sequences, strides, NaN where nothing may look, and another order of the
// threads every time. `cuda_paged_attention [cases [seed]]`

#include "paged_attention.h"
#include "tensors.h"

using namespace metate;

namespace {

// ---- The cache ------------------------------------------------------------------------------------------------------

double float8(int byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    if ((byte & 127) == 127) return NAN;
    const double size = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    return byte & 128 ? -size : size;
}

// The byte of the nearest e4m3 number, of two as near the even one.
int to_float8(double x) {
    int best = 0;
    for (int byte = 1; byte < 127; ++byte) {
        const double was = fabs(fabs(x) - float8(best)), is = fabs(fabs(x) - float8(byte));
        if (is < was || (is == was && byte % 2 == 0)) best = byte;
    }
    return best | (std::signbit(x) ? 128 : 0);
}

struct Store {
    DType dtype;
    bool scaled;
    bool packed() const { return dtype == DType::u8; }
    int64_t columns(int64_t numbers) const { return packed() ? numbers / 2 : numbers; }
};

struct Cache {
    Store store;
    Tensor<4> cells;
    Tensor<3> scales;

    double operator()(int64_t page, int64_t row, int64_t head, int64_t column) const {
        double x = cells.get({page, row, head, store.packed() ? column / 2 : column});
        const int byte = static_cast<int>(x) & 255;
        if (store.packed()) x = (byte >> (column % 2 * 4) & 15) - 8;
        if (store.dtype == DType::f8) x = float8(byte);
        return store.scaled ? x * scales.get({page, row, head}) : x;
    }
};

Cache make_cache(Random& random, Store store, int64_t pages, int64_t size, int64_t heads, int64_t numbers, int layout) {
    Cache c{store, Tensor<4>(store.dtype, {pages, size, heads, store.columns(numbers)}, layout, random), {}};
    if (store.scaled) c.scales = Tensor<3>(DType::f32, {pages, size, heads}, layout, random);
    return c;
}

void fill_row(Random& random, Cache& c, int64_t page, int64_t row) {
    for (int64_t h = 0; h < c.cells.view.size[2]; ++h) {
        for (int64_t d = 0; d < c.cells.view.size[3]; ++d) {
            int code = draw(random, 0, 255);
            if (c.store.dtype == DType::f8 && !c.store.scaled) code = code & 0xbf;  // up to 1.875
            if (c.store.dtype == DType::f8 && code % 128 == 127) --code;
            const bool coded = bytes_of(c.store.dtype) == 1;
            c.cells.set({page, row, h, d}, !coded ? normal(random) : c.store.dtype == DType::i8 ? code - 128 : code);
        }
        const double unit = c.store.dtype == DType::i8 ? 0.01 : c.store.dtype == DType::u8 ? 0.2 : 0.01;
        if (c.store.scaled) c.scales.set({page, row, h}, unit * (1 + draw(random, 0, 9)) / 5);
    }
}

// ---- Attention ------------------------------------------------------------------------------------------------------

struct Case {
    std::string text;
    PagedAttention a{};
    Cache k, v;
    Tensor<4> q, out;
    Tensor<3> bits, lse, sums, sinks;
    Tensor<2> table, alibi, positions;
    Tensor<1> lens, pads, ends;
    int64_t sequences, page_size;
};

int64_t place_of(const Case& c, int64_t newest, int64_t row, int64_t token) {
    return c.a.positions ? static_cast<int64_t>(c.positions.get({row, token})) : newest;
}

bool sees(const Case& c, int64_t b, int64_t n, int64_t row, int64_t q0, int64_t i, int64_t j) {
    const PagedAttention& a = c.a;
    const auto keys = static_cast<int64_t>(c.lens.get({b}));
    const int64_t position = place_of(c, keys - n + i, row, q0 + i), newest = j - (keys - n);
    if (a.left_pad && j < c.pads.get({b})) return false;
    if (a.window_left >= 0 && j < position - a.window_left) return false;
    if (a.window_right >= 0 && j > position + a.window_right) return false;
    if (!a.bits || newest < 0) return true;
    const auto word = static_cast<uint32_t>(static_cast<int64_t>(c.bits.get({row, q0 + i, newest / 32})));
    return word >> (newest % 32) & 1;
}

struct Shape {
    int64_t b, sq, most, page, hk, group, d, dv;
};

Case make_case(Random& random, DType dtype, const Shape& s, Store store, const std::string& features, int layout) {
    const auto has = [&](const char* what) { return features.find(what) != std::string::npos; };
    const auto plain = [&] { return normal(random); };
    Case c;
    PagedAttention& a = c.a;
    c.text = std::string(dtype == DType::bf16 ? "bf16" : "f16") + " cache " +
             std::to_string(static_cast<int>(store.dtype)) + (store.scaled ? " scaled" : "") + " B" +
             std::to_string(s.b) + " Sq" + std::to_string(s.sq) + " keys " + std::to_string(s.most) + " page " +
             std::to_string(s.page) + " Hkv" + std::to_string(s.hk) + " group " + std::to_string(s.group) + " D" +
             std::to_string(s.d) + " Dv" + std::to_string(s.dv) + " layout " + std::to_string(layout) + features;
    const bool packed = has("packed");
    const int64_t batch = packed ? 1 : s.b, heads = s.hk * s.group, width = (s.most + s.page - 1) / s.page;
    const int64_t pages = s.b * width + 2, words = (s.sq + 31) / 32;
    c.sequences = s.b, c.page_size = s.page;
    c.q = Tensor<4>(dtype, {batch, s.sq, heads, s.d}, layout, random).fill(plain);
    c.k = make_cache(random, store, pages, s.page, s.hk, s.d, layout);
    const bool latent = has("latent");  // values are the first columns of the keys
    if (!latent) c.v = make_cache(random, store, pages, s.page, s.hk, s.dv, layout);
    if (latent) {
        c.v.store = store, c.v.cells.view = c.k.cells.view, c.v.scales.view = c.k.scales.view;
        c.v.cells.view.size[3] = store.columns(s.dv);
    }
    std::vector<int> order(pages);
    for (int i = 0; i < pages; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    c.table = Tensor<2>(DType::i32, {s.b, width}, layout, random).fill([] { return -1; });
    c.lens =
        Tensor<1>(DType::i32, {s.b}, layout, random).fill([&] { return draw(random, 0, static_cast<int>(s.most)); });
    c.lens.set({0}, static_cast<double>(s.most));
    for (int64_t b = 0; b < s.b; ++b) {
        for (int64_t j = 0; j < c.lens.get({b}); ++j) {
            const int page = order[b * width + j / s.page];
            c.table.set({b, j / s.page}, page);
            fill_row(random, c.k, page, j % s.page);
            if (!latent) fill_row(random, c.v, page, j % s.page);
        }
    }
    a.window_left = a.window_right = -1;
    a.scale = (has("minus") ? -1 : 1) / sqrt(static_cast<double>(s.d));
    if (has("causal")) a.window_right = 0;
    if (has("window")) a.window_left = draw(random, 0, 300), a.window_right = draw(random, 0, 9);
    if (has("softcap")) a.softcap = 1.5;
    if (has("pads")) {
        c.pads = Tensor<1>(DType::i32, {s.b}, layout, random).fill([&] {
            return draw(random, 0, static_cast<int>(s.most));
        });
        a.left_pad = c.pads.view;
    }
    if (has("alibi")) {
        c.alibi = Tensor<2>(DType::f32, {s.b, heads}, layout, random).fill([&] { return 0.01 * draw(random, 1, 9); });
        a.alibi_slopes = c.alibi.view;
    }
    if (has("sinks")) {
        c.sinks = Tensor<3>(DType::f32, {batch, heads, s.sq}, layout, random).fill(plain);
        if (chance(random, 50)) c.sinks.view.stride[0] = c.sinks.view.stride[2] = 0;
        a.sinks = c.sinks.view;
    }
    if (has("positions")) {
        c.positions = Tensor<2>(DType::i32, {batch, s.sq}, layout, random).fill([&] {
            return draw(random, -9, static_cast<int>(s.most) + 200);
        });
        a.positions = c.positions.view;
    }
    if (has("tree")) {
        c.bits = Tensor<3>(DType::i32, {batch, s.sq, words}, layout, random).fill([&] {
            return static_cast<double>(static_cast<int32_t>(random() | random()));
        });
        a.bits = c.bits.view;
    }
    if (packed) {
        std::vector<int> at;
        for (int i = 0; i <= s.b; ++i) at.push_back(draw(random, 0, static_cast<int>(s.sq)));
        std::sort(at.begin(), at.end());
        size_t next = 0;
        c.ends = Tensor<1>(DType::i32, {s.b + 1}, layout, random).fill([&] { return at[next++]; });
        a.cu_seqlens_q = c.ends.view;
    }
    c.out = Tensor<4>(dtype, {batch, s.sq, heads, s.dv}, layout, random);
    c.lse = Tensor<3>(DType::f32, {batch, heads, s.sq}, layout, random);
    if (has("sums")) c.sums = Tensor<3>(DType::f32, {s.b, heads, width * s.page}, layout, random);
    a.q = c.q.view, a.k_cache = c.k.cells.view, a.v_cache = c.v.cells.view, a.block_table = c.table.view;
    a.seq_lens = c.lens.view, a.k_scale = c.k.scales.view, a.v_scale = c.v.scales.view;
    a.out = c.out.view, a.lse = c.lse.view, a.sums = c.sums.view;
    return c;
}

// A value as a product takes it: a code times its scale is rounded to the dtype of q. Of a row with few keys that is a
// unit of its own, beside that of the result.
double operand(double x, DType dtype) {
    const auto number = static_cast<float>(x);
    return dtype == DType::bf16 ? to_float(from_float<bf16>(number)) : to_float(from_float<f16>(number));
}

// What one row gives: its part of out, lse and sums.
void add_row(const Case& c, int64_t b, int64_t n, int64_t row, int64_t q0, int64_t i, int64_t h, Truth<4>& out,
             Truth<3>& lse, Truth<3>& sums) {
    const PagedAttention& a = c.a;
    const int64_t hk = h / (a.q.size[2] / a.k_cache.size[2]), keys = static_cast<int64_t>(c.lens.get({b}));
    std::vector<int64_t> seen;
    std::vector<double> logits;
    const auto page = [&](int64_t j) { return static_cast<int64_t>(c.table.get({b, j / c.page_size})); };
    for (int64_t j = 0; j < keys; ++j) {
        if (!sees(c, b, n, row, q0, i, j)) continue;
        double x = 0;
        for (int64_t d = 0; d < a.q.size[3]; ++d)
            x += c.q.get({row, q0 + i, h, d}) * c.k(page(j), j % c.page_size, hk, d);
        x *= a.scale;
        if (a.softcap > 0) x = a.softcap * tanh(x / a.softcap);
        if (a.alibi_slopes)
            x -= c.alibi.get({b, h}) * fabs(static_cast<double>(place_of(c, keys - n + i, row, q0 + i) - j));
        seen.push_back(j), logits.push_back(x);
    }
    const double sink = a.sinks ? c.sinks.get({row, h, q0 + i}) : -infinity;
    double top = sink, total = 0;
    for (double x : logits) top = std::max(top, x);
    if (top == -infinity) return;
    if (a.sinks) total += exp(sink - top);
    for (double x : logits) total += exp(x - top);
    lse({row, h, q0 + i}) = top + log(total);
    for (size_t m = 0; m < seen.size(); ++m) {
        const double p = exp(logits[m] - top) / total;
        const int64_t j = seen[m];
        for (int64_t d = 0; d < a.out.size[3]; ++d) {
            out({row, q0 + i, h, d}) += p * operand(c.v(page(j), j % c.page_size, hk, d), a.q.dtype);
        }
        if (a.sums) sums({b, h, j}) += p;
    }
}

void check_attention(Case& c) {
    const PagedAttention& a = c.a;
    const bool packed = static_cast<bool>(a.cu_seqlens_q);
    Truth<4> out(a.out);
    Truth<3> lse(a.lse, -infinity), sums(a.sums);
    for (int64_t b = 0; b < c.sequences; ++b) {
        const int64_t q0 = packed ? static_cast<int64_t>(c.ends.get({b})) : 0, row = packed ? 0 : b;
        const int64_t n = packed ? static_cast<int64_t>(c.ends.get({b + 1})) - q0 : a.q.size[1];
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t h = 0; h < a.q.size[2]; ++h) add_row(c, b, n, row, q0, i, h, out, lse, sums);
        }
    }
    cuda::Device device = emulator::device();
    if (device.capability != 80 && std::max(a.q.size[3], a.out.size[3]) > 256) {
        require(refuses([&] { cuda::paged_attention(a, device); }), "too large for sm_86, but not refused: " + c.text);
        device = emulator::device(80);
    }
    cuda::paged_attention(a, device);
    compare(c.text, "out", c.out, out, 1.5, a.q.dtype);
    compare(c.text, "lse", c.lse, lse, 1, DType::f32);
    if (a.sums) compare(c.text, "sums", c.sums, sums, 4, DType::f32);
}

Store random_store(Random& random, DType dtype) {
    switch (draw(random, 0, 5)) {
        case 0:
            return {DType::i8, true};
        case 1:
            return {DType::u8, true};
        case 2:
            return {DType::f8, chance(random, 50)};
        default:
            return {dtype, false};
    }
}

Case random_case(Random& random) {
    static const int dims[] = {2, 8, 32, 64, 80, 96, 128, 144, 192, 256};
    static const int pages[] = {1, 3, 8, 16, 64, 128};
    static const char* const all[] = {"causal", "window", "softcap", "pads", "alibi",    "sinks",
                                      "minus",  "tree",   "packed",  "sums", "positions"};
    const DType dtype = chance(random, 50) ? DType::bf16 : DType::f16;
    std::string features;
    const int percent = draw(random, 0, 2) * 15;
    for (const char* feature : all) {
        if (chance(random, percent)) features += std::string(" ") + feature;
    }
    Shape s{};
    s.b = draw(random, 1, 3), s.hk = draw(random, 1, 2), s.group = std::array{1, 2, 4, 5, 8, 20}[draw(random, 0, 5)];
    s.sq = chance(random, 50) ? 1 : draw(random, 0, chance(random, 20) ? 90 : 12);
    s.most = chance(random, 40) ? draw(random, 257, 900) : draw(random, 0, 130);
    s.page = pages[draw(random, 0, 5)];
    s.d = dims[draw(random, 0, 9)], s.dv = chance(random, 70) ? s.d : dims[draw(random, 0, 9)];
    if (chance(random, 20)) {
        s.d = std::array{264, 320, 512, 576}[draw(random, 0, 3)], s.dv = chance(random, 70) ? 512 : 40;
        s.b = draw(random, 1, 2), s.hk = 1, s.sq = std::min<int64_t>(s.sq, 30);
    }
    if (s.dv <= s.d && chance(random, s.d > 256 ? 60 : 10)) features += " latent";
    return make_case(random, dtype, s, random_store(random, dtype), features, draw(random, 0, 2));
}

// A key that one query of a tree sees alone: what is not a number reaches nobody else.
void check_not_numbers(Random& random) {
    static const Store stores[] = {{DType::f16, false}, {DType::i8, true}, {DType::f8, true}, {DType::u8, true}};
    for (int n = 0; n < 8; ++n) {
        const Store store = stores[n % 4];
        const int64_t width = n < 4 ? 64 : 512;
        Case c = make_case(random, DType::f16, {1, 3, 70, 16, 1, 2, width, width}, store, " tree", 0);
        for (int64_t i = 0; i < 3; ++i) c.bits.set({0, i, 0}, i == 1 ? 3 : 5);
        const int64_t key = 70 - 3 + 1, page = static_cast<int64_t>(c.table.get({0, key / 16})), row = key % 16;
        if (store.scaled) c.v.scales.set({page, row, 0}, NAN);
        c.v.cells.set({page, row, 0, 5}, store.dtype == DType::f8 ? 127 : store.scaled ? 1 : infinity);
        cuda::paged_attention(c.a, emulator::device(80));
        for (int64_t i = 0; i < 3; ++i) {
            for (int64_t h = 0; h < 2; ++h) {
                const bool number = isfinite(c.out.get({0, i, h, 5}));
                require(number == (i != 1), "a value that is not a number went astray: " + c.text);
            }
        }
    }
}

// Tiles are written and read without bank conflicts where caches come in vectors.
void check_traffic(Random& random) {
    for (int width : {64, 128, 256, 576}) {
        for (Store store : {Store{DType::bf16, false}, Store{DType::i8, true}, Store{DType::u8, true}}) {
            for (int queries : {1, 20}) {
                const Shape s{1, queries, 300, 16, 1, 4, width, std::min(width, 512)};
                Case c = make_case(random, DType::bf16, s, store, width > 512 ? " latent" : "", 0);
                emulator::count_traffic(true);
                cuda::paged_attention(c.a, emulator::device(80));
                const std::vector<emulator::Traffic> places = emulator::traffic();
                emulator::count_traffic(false);
                int counted = 0;
                for (const emulator::Traffic& t : places) {
                    const auto is_in = [&](const char* what) { return t.place.find(what) != std::string::npos; };
                    if (!is_in("cache.h") && !is_in("ldmatrix")) continue;
                    ++counted;
                    require(t.wavefronts == t.ideal, t.place + " takes " + std::to_string(t.wavefronts) +
                                                         " wavefronts, not " + std::to_string(t.ideal) + ": " + c.text);
                }
                require(counted >= 4, "no traffic was counted");
            }
        }
    }
}

// ---- Appending ------------------------------------------------------------------------------------------------------

float rotated(const Tensor<3>& k, const Tensor<2>& cos, const Tensor<2>& sin, int64_t t, int64_t h, int64_t d,
              int64_t position, bool interleaved) {
    const int64_t half = cos.view.data ? cos.view.size[1] : 0;
    const auto x = static_cast<float>(k.get({t, h, d}));
    if (d >= 2 * half) return x;
    const bool second = interleaved ? d % 2 : d >= half;
    const int64_t angle = interleaved ? d / 2 : d % half, other = interleaved ? d ^ 1 : second ? d - half : d + half;
    const volatile float a = x * static_cast<float>(cos.get({position, angle}));
    const volatile float b = static_cast<float>(k.get({t, h, other})) * static_cast<float>(sin.get({position, angle}));
    return second ? a + b : a - b;
}

void check_row(const std::string& text, const Cache& c, const std::vector<float>& x, int64_t page, int64_t row,
               int64_t h, DType plain) {
    float amax = 0;
    for (float value : x) amax = std::max(amax, fabsf(value));
    const float steps = c.store.dtype == DType::i8 ? 127 : c.store.dtype == DType::u8 ? 7 : 448;
    const float scale = c.store.scaled ? amax / steps : 1;
    if (c.store.scaled) require(c.scales.get({page, row, h}) == scale, "another scale: " + text);
    for (size_t d = 0; d < x.size(); ++d) {
        const auto at = static_cast<int64_t>(d);
        double expected = x[d], got = c.cells.get({page, row, h, c.store.packed() ? at / 2 : at});
        const float counted = scale == 0 ? 0 : x[d] / scale;
        if (plain == DType::bf16) expected = to_float(from_float<bf16>(x[d]));
        if (plain == DType::f16) expected = to_float(from_float<f16>(x[d]));
        if (c.store.dtype == DType::i8) expected = nearbyintf(counted);
        if (c.store.dtype == DType::f8) expected = to_float8(counted);
        if (c.store.packed()) {
            expected = std::clamp(nearbyintf(counted), -8.f, 7.f) + 8;
            got = static_cast<int>(got) >> (d % 2 * 4) & 15;
        }
        require(got == expected, "element " + std::to_string(d) + " is " + std::to_string(got) + ", should be " +
                                     std::to_string(expected) + ": " + text);
    }
}

void check_append(Random& random) {
    const DType dtype = std::array{DType::bf16, DType::f16, DType::f32}[draw(random, 0, 2)];
    const Store store = random_store(random, dtype);
    const int64_t tokens = draw(random, 0, 9), heads = draw(random, 1, 3), d = 2 * draw(random, 1, 70), size = 5;
    const int64_t dv = 2 * draw(random, 0, 70),
                  half = chance(random, 60) ? draw(random, 1, static_cast<int>(d / 2)) : 0;
    const int layout = draw(random, 0, 2);
    const bool interleaved = chance(random, 50), zeros = chance(random, 10);
    const auto value = [&] { return zeros ? 0 : normal(random) * (store.scaled ? 3 : 30); };
    const auto k = Tensor<3>(dtype, {tokens, heads, d}, layout, random).fill(value);
    const auto v = Tensor<3>(dtype, {tokens, heads, dv}, layout, random).fill(value);
    Cache k_cache = make_cache(random, store, 3, size, heads, d, layout),
          v_cache = make_cache(random, store, 3, size, heads, dv, layout);
    Tensor<2> cos, sin;
    Tensor<1> positions;
    const DType index = chance(random, 50) ? DType::i32 : DType::i64;
    std::vector<int> slots(15);
    for (int i = 0; i < 15; ++i) slots[i] = i;
    std::shuffle(slots.begin(), slots.end(), random);
    for (int& slot : slots) slot = chance(random, 20) ? -1 : slot;
    size_t next = 0;
    const auto mapping = Tensor<1>(index, {tokens}, layout, random).fill([&] { return slots[next++]; });
    AppendKv a{k.view,
               v.view,
               k_cache.cells.view,
               v_cache.cells.view,
               mapping.view,
               k_cache.scales.view,
               v_cache.scales.view,
               {},
               {},
               {},
               interleaved};
    if (half > 0) {
        cos = Tensor<2>(DType::f32, {20, half}, layout, random).fill([&] { return normal(random); });
        sin = Tensor<2>(DType::f32, {20, half}, layout, random).fill([&] { return normal(random); });
        positions = Tensor<1>(index, {tokens}, layout, random).fill([&] { return draw(random, 0, 19); });
        a.cos = cos.view, a.sin = sin.view, a.positions = positions.view;
    }
    cuda::append_kv(a, emulator::device());
    const std::string text = "append " + std::to_string(static_cast<int>(store.dtype)) + " tokens " +
                             std::to_string(tokens) + " D" + std::to_string(d) + " Dv" + std::to_string(dv) +
                             " layout " + std::to_string(layout) + (interleaved ? " interleaved " : " ") +
                             std::to_string(half);
    for (int64_t t = 0; t < tokens; ++t) {
        const auto slot = static_cast<int64_t>(mapping.get({t}));
        if (slot < 0) continue;
        const int64_t position = half > 0 ? static_cast<int64_t>(positions.get({t})) : 0;
        for (int64_t h = 0; h < heads; ++h) {
            std::vector<float> x(d), y(dv);
            for (int64_t e = 0; e < d; ++e) x[e] = rotated(k, cos, sin, t, h, e, position, interleaved);
            for (int64_t e = 0; e < dv; ++e) y[e] = static_cast<float>(v.get({t, h, e}));
            check_row(text, k_cache, x, slot / size, slot % size, h, store.dtype);
            check_row(text, v_cache, y, slot / size, slot % size, h, store.dtype);
        }
    }
    for (int64_t slot = 0; slot < 15; ++slot) {
        if (std::find(slots.begin(), slots.begin() + tokens, slot) != slots.begin() + tokens) continue;
        const auto cell = static_cast<const uint8_t*>(k_cache.cells.view.data) +
                          k_cache.cells.offset({slot / size, slot % size, 0, 0}) * bytes_of(store.dtype);
        require(*cell == 0xff, "a slot of no token was written: " + text);
    }
}

}  // namespace

int main(int argc, char** argv) {
    return run_cases("cuda_paged_attention", 100, argc, argv, [](Random& random, bool is_first) {
        Case c = random_case(random);
        check_attention(c);
        check_append(random);
        if (is_first) check_not_numbers(random), check_traffic(random);
    });
}
