// The CUDA kernels of the low-bit products, run by the emulator, against loops in double precision: random cases over
// every width, form and dtype of a weight, odd sizes, strides, NaN where nothing may look, poisoned outputs, and
// another order of the threads every time. `cuda_quant_linear [cases [seed]]`
#include <math.h>
#include <string.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "emulated.h"
#include "quant_linear.h"

using namespace metate;

namespace {

// A matrix with gaps of 0xff (NaN) between its rows. Layouts: 0 contiguous, 1 rows apart by a multiple of 16 bytes,
// 2 columns apart, too, and nothing aligned, 3 transposed.
struct Matrix {
    View<2> view{};
    std::vector<uint8_t> memory;

    Matrix() = default;
    Matrix(DType dtype, int64_t rows, int64_t columns, int layout) {
        const int64_t bytes = bytes_of(dtype), column = layout == 2 ? 2 : layout == 3 ? rows + 1 : 1;
        int64_t row = layout == 3 ? 1 : column * columns;
        if (layout == 1) row = (row * bytes + 31) / 16 * 16 / bytes;
        if (layout == 2) row += 1;
        memory.assign((rows * row + columns * column + 8) * bytes + 32, 0xff);
        auto start = (reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16 + (layout == 2 ? bytes : 0);
        view = {reinterpret_cast<void*>(start), dtype, {rows, columns}, {row, column}};
    }
    Matrix(Matrix&&) = default;
    Matrix& operator=(Matrix&&) = default;

    uint8_t* at(int64_t i, int64_t j) const {
        return static_cast<uint8_t*>(view.data) + (i * view.stride[0] + j * view.stride[1]) * bytes_of(view.dtype);
    }
    double get(int64_t i, int64_t j) const {
        const void* const from = at(i, j);
        switch (view.dtype) {
            case DType::bf16:
                return to_float(*static_cast<const bf16*>(from));
            case DType::f16:
                return to_float(*static_cast<const f16*>(from));
            case DType::f32:
                return *static_cast<const float*>(from);
            case DType::i32:
                return *static_cast<const int32_t*>(from);
            case DType::i8:
                return *static_cast<const int8_t*>(from);
            default:
                return *static_cast<const uint8_t*>(from);
        }
    }
    void set(int64_t i, int64_t j, double x) {
        void* const to = at(i, j);
        switch (view.dtype) {
            case DType::bf16:
                *static_cast<bf16*>(to) = from_float<bf16>(static_cast<float>(x));
                break;
            case DType::f16:
                *static_cast<f16*>(to) = from_float<f16>(static_cast<float>(x));
                break;
            case DType::f32:
                *static_cast<float*>(to) = static_cast<float>(x);
                break;
            case DType::i32:
                *static_cast<int32_t*>(to) = static_cast<int32_t>(x);
                break;
            case DType::i8:
                *static_cast<int8_t*>(to) = static_cast<int8_t>(x);
                break;
            default:
                *static_cast<uint8_t*>(to) = static_cast<uint8_t>(x);
        }
    }
    template <typename Value>
    Matrix&& fill(const Value& value) && {
        for (int64_t i = 0; i < view.size[0]; ++i)
            for (int64_t j = 0; j < view.size[1]; ++j) set(i, j, value());
        return std::move(*this);
    }
    View<1> vector() const { return {view.data, view.dtype, {view.size[1]}, {view.stride[1]}}; }
};

struct Case {
    std::string text;
    LowBitMatrix w{};
    Matrix codes, scales, super_scales, zeros, offsets, super_offsets, codebook, permutation, x, grad, bias;
    std::vector<double> dense;  // W, its columns where they belong

    double weight(int64_t n, int64_t k) const { return dense[n * w.columns + k]; }
};

struct Shape {
    int m, n, k, bits, group, super_groups;
    const char* form;
    DType dtype, scales;
    bool permuted, bias;
    int layout;
};

// Scales, or offsets where `sign` is -1.
void make_levels(const Shape& s, double sign, Matrix& fine, Matrix& coarse, Random& random) {
    const int64_t groups = (s.k + s.group - 1) / s.group;
    const double unit = sign < 0 ? -0.01 * (1 << s.bits) / 2 : 0.01;
    const auto value = [&] { return unit * (1 + fabs(normal(random))); };
    if (!s.super_groups) {
        fine = Matrix(s.scales, s.n, groups, s.layout).fill(value);
        return;
    }
    fine = Matrix(DType::i8, s.n, groups, s.layout).fill([&] { return draw(random, -63, 63); });
    coarse = Matrix(s.scales, s.n, (groups + s.super_groups - 1) / s.super_groups, s.layout).fill([&] {
        return value() / 32;
    });
}

void make_weight(Case& c, const Shape& s, Random& random) {
    const int64_t groups = (s.k + s.group - 1) / s.group;
    const std::string form = s.form;
    c.w.rows = s.n, c.w.columns = s.k, c.w.bits = s.bits;
    c.w.group_size = s.group, c.w.super_groups = s.super_groups;
    c.codes = Matrix(DType::u8, s.n, (s.k * s.bits + 7) / 8, s.layout == 1 ? 1 : 0).fill([&] {
        return draw(random, 0, 255);
    });
    make_levels(s, 1, c.scales, c.super_scales, random);
    if (form == "codebook") {
        c.codebook = Matrix(DType::f32, 1, 1 << s.bits, s.layout).fill([&] { return normal(random); });
    } else if (form == "symmetric") {
        c.w.zero = 1 << (s.bits - 1);
    } else if (form == "zeros") {
        c.w.zero = draw(random, 0, 1);
        c.zeros = Matrix(DType::u8, s.n, groups, s.layout).fill([&] { return draw(random, 0, 1 << s.bits) & 255; });
    } else {
        make_levels(s, -1, c.offsets, c.super_offsets, random);
    }
    std::vector<int> order(s.k);
    std::iota(order.begin(), order.end(), 0);
    if (s.permuted) {
        std::shuffle(order.begin(), order.end(), random);
        size_t next = 0;
        c.permutation = Matrix(DType::i32, 1, s.k, s.layout).fill([&] { return order[next++]; });
        c.w.permutation = c.permutation.vector();
    }
    c.w.codes = c.codes.view, c.w.scales = c.scales.view, c.w.super_scales = c.super_scales.view;
    c.w.zeros = c.zeros.view, c.w.offsets = c.offsets.view, c.w.super_offsets = c.super_offsets.view;
    if (form == "codebook") c.w.codebook = c.codebook.vector();

    c.dense.resize(static_cast<size_t>(s.n) * s.k);
    for (int64_t n = 0; n < s.n; ++n) {
        for (int64_t j = 0; j < s.k; ++j) {
            int code = 0;
            for (int b = 0; b < s.bits; ++b) {
                const int64_t bit = j * s.bits + b;
                code |= (*c.codes.at(n, bit / 8) >> (bit % 8) & 1) << b;
            }
            const int64_t g = j / s.group;
            const auto level = [&](const Matrix& fine, const Matrix& coarse) {
                return fine.get(n, g) * (coarse.view ? coarse.get(n, g / s.super_groups) : 1);
            };
            const double value =
                c.codebook.view ? c.codebook.get(0, code) : code - c.w.zero - (c.zeros.view ? c.zeros.get(n, g) : 0);
            c.dense[n * s.k + order[j]] =
                value * level(c.scales, c.super_scales) + (c.offsets.view ? level(c.offsets, c.super_offsets) : 0);
        }
    }
}

Case make_case(const Shape& s, Random& random) {
    Case c;
    c.text = std::string(s.dtype == DType::bf16 ? "bf16" : "f16") + " M" + std::to_string(s.m) + " N" +
             std::to_string(s.n) + " K" + std::to_string(s.k) + " bits " + std::to_string(s.bits) + " group " +
             std::to_string(s.group) + " super " + std::to_string(s.super_groups) + " " + s.form +
             (s.permuted ? " permuted" : "") + (s.bias ? " bias" : "") + " layout " + std::to_string(s.layout);
    make_weight(c, s, random);
    const auto plain = [&] { return normal(random); };
    c.x = Matrix(s.dtype, s.m, s.k, s.layout).fill(plain);
    c.grad = Matrix(s.dtype, s.m, s.n, s.layout).fill(plain);
    if (s.bias) c.bias = Matrix(chance(random, 50) ? DType::f32 : s.dtype, 1, s.n, s.layout).fill(plain);
    return c;
}

Shape random_shape(Random& random) {
    static const char* const forms[] = {"codebook", "symmetric", "zeros", "offsets"};
    static const DType floats[] = {DType::f32, DType::bf16, DType::f16};
    Shape s{};
    s.m = chance(random, 50) ? pick(random, {0, 1, 7, 8, 9, 32, 33, 64, 65}) : draw(random, 1, 80);
    s.n = chance(random, 50) ? pick(random, {0, 1, 63, 64, 65, 127, 128, 129}) : draw(random, 1, 300);
    s.k = chance(random, 50) ? pick(random, {0, 1, 63, 65, 128, 129, 512, 1024, 1100}) : draw(random, 1, 700);
    s.bits = chance(random, 60) ? 4 : draw(random, 1, 8);
    s.group = chance(random, 60) ? pick(random, {32, 64, 128}) : pick(random, {1, 3, 7, 8, 16, 33, 100, 2000});
    s.super_groups = chance(random, 25) ? draw(random, 1, 20) : 0;
    s.form = forms[draw(random, 0, 3)];
    s.dtype = chance(random, 50) ? DType::bf16 : DType::f16;
    s.scales = floats[draw(random, 0, 2)];
    s.permuted = chance(random, 25), s.bias = chance(random, 40);
    s.layout = draw(random, 0, 3);
    return s;
}

// The largest error allowed: a rounding of every weight and of the result.
void compare(const Case& c, const char* name, const Matrix& got, const std::vector<double>& truth,
             const std::vector<double>& size) {
    const double unit = got.view.dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
    for (int64_t i = 0; i < got.view.size[0]; ++i) {
        for (int64_t j = 0; j < got.view.size[1]; ++j) {
            const size_t at = i * got.view.size[1] + j;
            const double x = got.get(i, j), y = truth[at], allowed = unit * (1.1 * fabs(y) + 2.5 * size[at]) + 1e-6;
            if (fabs(x - y) <= allowed) continue;
            require(false, std::string(name) + "[" + std::to_string(i) + "," + std::to_string(j) + "] is " +
                               std::to_string(x) + ", should be " + std::to_string(y) + " within " +
                               std::to_string(allowed) + " in: " + c.text);
        }
    }
}

// x · weights of (rows of x) × outputs, where `weight(output, k)` is summed over k; beside it the size that errors of
// the terms add up to, each as likely up as down.
template <typename Weight>
void check(const Case& c, const char* name, const Matrix& x, const Matrix& got, const Matrix* bias,
           const Weight& weight) {
    const int64_t outputs = got.view.size[1];
    std::vector<double> truth, size;
    for (int64_t i = 0; i < x.view.size[0]; ++i) {
        for (int64_t o = 0; o < outputs; ++o) {
            double sum = bias ? bias->get(0, o) : 0, squares = 0;
            for (int64_t k = 0; k < x.view.size[1]; ++k) {
                const double term = x.get(i, k) * weight(o, k);
                sum += term, squares += term * term;
            }
            truth.push_back(sum), size.push_back(sqrt(squares));
        }
    }
    compare(c, name, got, truth, size);
}

Matrix run_linear(const Case& c, const View<2>& x, int layout) {
    Matrix out(x.dtype, x.size[0], c.w.rows, layout);
    cuda::quant_linear({x, c.w, c.bias.view ? c.bias.vector() : View<1>{}, false, out.view}, emulator::device());
    return out;
}

Matrix run_matmul(const Case& c, const View<2>& x, int layout) {
    Matrix out(x.dtype, x.size[0], c.w.columns, layout);
    cuda::quant_matmul({x, c.w, out.view}, emulator::device());
    return out;
}

// A row alone gives the bits that it gives among others.
template <typename Run>
void check_alone(const Case& c, const Matrix& x, const Matrix& out, const Run& run) {
    if (x.view.size[0] < 2) return;
    const int64_t row = x.view.size[0] / 2;
    View<2> alone = x.view;
    alone.data = x.at(row, 0);
    alone.size[0] = 1;
    const Matrix single = run(c, alone, 0);
    for (int64_t o = 0; o < out.view.size[1]; ++o)
        require(memcmp(single.at(0, o), out.at(row, o), 2) == 0, "a row depends on the number of rows in: " + c.text);
}

void check_case(const Shape& s, Random& random) {
    const Case c = make_case(s, random);
    const Matrix out = run_linear(c, c.x.view, draw(random, 0, 3));
    check(c, "out", c.x, out, c.bias.view ? &c.bias : nullptr, [&](int64_t o, int64_t k) { return c.weight(o, k); });
    check_alone(c, c.x, out, run_linear);
    const Matrix product = run_matmul(c, c.grad.view, draw(random, 0, 3));
    check(c, "product", c.grad, product, nullptr, [&](int64_t o, int64_t n) { return c.weight(n, o); });
    check_alone(c, c.grad, product, run_matmul);
}

View<3> stack(const Matrix& m, int64_t count) {
    const int64_t rows = m.view.size[0] / count;
    return {m.view.data,
            m.view.dtype,
            {count, rows, m.view.size[1]},
            {rows * m.view.stride[0], m.view.stride[0], m.view.stride[1]}};
}

// Low-rank updates: x · aᵀ by adapter, the product that takes them, and sums over the rows of each adapter.
void check_update(const Case& c, Random& random) {
    const int64_t m = c.x.view.size[0], n = c.w.rows, k = c.w.columns;
    const int adapters = draw(random, 1, 3), rank = pick(random, {0, 1, 5, 16, 17, 40}), layout = draw(random, 0, 3);
    const auto plain = [&] { return normal(random); };
    const Matrix a = Matrix(c.x.view.dtype, adapters * rank, k, layout).fill(plain);
    const Matrix b = Matrix(c.x.view.dtype, adapters * n, rank, layout).fill([&] { return 0.05 * normal(random); });
    const Matrix scaling = Matrix(DType::f32, 1, adapters, layout).fill(plain);
    const Matrix ids = Matrix(DType::i32, 1, m, layout).fill([&] { return draw(random, -1, adapters); });
    Matrix low(DType::f32, m, rank, draw(random, 0, 3)), out(c.x.view.dtype, m, n, draw(random, 0, 3));
    Matrix sums(DType::f32, adapters * rank, k, draw(random, 0, 3));
    cuda::lora_shrink({c.x.view, stack(a, adapters), ids.vector(), low.view}, emulator::device());
    cuda::quant_linear(
        {c.x.view, c.w, {}, false, out.view, {low.view, stack(b, adapters), scaling.vector(), ids.vector()}},
        emulator::device());
    cuda::lora_outer({c.x.view, low.view, ids.vector(), stack(sums, adapters)}, emulator::device());

    std::vector<double> truth[3], size[3];
    const auto add = [&](int which, double value, double squares) {
        truth[which].push_back(value), size[which].push_back(sqrt(squares));
    };
    for (int64_t i = 0; i < m; ++i) {
        const int64_t own = static_cast<int64_t>(ids.get(0, i)), adapter = own < adapters ? own : -1;
        for (int64_t r = 0; r < rank; ++r) {
            double sum = 0, squares = 0;
            for (int64_t j = 0; j < k && adapter >= 0; ++j) {
                const double term = c.x.get(i, j) * a.get(adapter * rank + r, j);
                sum += term, squares += term * term;
            }
            add(0, sum, squares);
        }
        for (int64_t o = 0; o < n; ++o) {
            double sum = 0, squares = 0;
            const auto count = [&](double term) { sum += term, squares += term * term; };
            for (int64_t j = 0; j < k; ++j) count(c.x.get(i, j) * c.weight(o, j));
            for (int64_t r = 0; r < rank && adapter >= 0; ++r)
                count(scaling.get(0, adapter) * low.get(i, r) * b.get(adapter * n + o, r));
            add(1, sum, squares);
        }
    }
    for (int64_t r = 0; r < adapters * rank; ++r) {
        for (int64_t j = 0; j < k; ++j) {
            double sum = 0, squares = 0;
            for (int64_t i = 0; i < m; ++i) {
                const bool own = ids.get(0, i) == static_cast<double>(r / rank);
                const double term = own ? low.get(i, r % rank) * c.x.get(i, j) : 0;
                sum += term, squares += term * term;
            }
            add(2, sum, squares * 0x1p-20);  // nothing is rounded to 16 bits
        }
    }
    compare(c, "low", low, truth[0], size[0]);
    compare(c, "updated", out, truth[1], size[1]);
    compare(c, "sums", sums, truth[2], size[2]);
}

// Shared memory is read and written without bank conflicts, but for the lookups in codebooks of more than 32 entries
// and for codes of other than 4 and 8 bits, which are read a byte at a time.
void check_traffic(Random& random) {
    for (const char* form : {"codebook", "zeros"}) {
        for (int group : {64, 16}) {
            for (int m : {1, 20, 64}) {
                const Shape s{m, 256, 512, 4, group, 0, form, DType::bf16, DType::f16, false, false, 0};
                emulator::count_traffic(true);
                check_case(s, random);
                const std::vector<emulator::Traffic> places = emulator::traffic();
                require(!places.empty(), "no traffic was counted");
                for (const emulator::Traffic& t : places) {
                    require(t.wavefronts == t.ideal, t.place + " takes " + std::to_string(t.wavefronts) +
                                                         " wavefronts, not " + std::to_string(t.ideal));
                }
                emulator::count_traffic(false);
            }
        }
    }
}

void check_refusals(Random& random) {
    const Shape s{2, 3, 64, 4, 32, 0, "zeros", DType::bf16, DType::f32, false, false, 0};
    const Case c = make_case(s, random);
    Matrix out(DType::bf16, 2, 3, 0);
    const auto is_refused = [&](const View<2>& x, bool int8_activations) {
        return refuses([&] { cuda::quant_linear({x, c.w, {}, int8_activations, out.view}, emulator::device()); });
    };
    View<2> wide = c.x.view;
    wide.dtype = DType::f32;
    require(is_refused(wide, false), "float32 rows are taken");
    require(is_refused(c.x.view, true), "8-bit activations are taken");
}

}  // namespace

int main(int argc, char** argv) {
    return run_cases("cuda_quant_linear", 60, argc, argv, [](Random& random, bool is_first) {
        const Shape shape = random_shape(random);
        check_case(shape, random);
        check_update(make_case(shape, random), random);
        if (is_first) check_traffic(random), check_refusals(random);
    });
}
