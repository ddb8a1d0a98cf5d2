// Bounds on the distances of groups of rows, from products of bfloat16 on the tensor cores.
//
// Rows are moved so that their middle is 0 (of L2, queries as well), which keeps the rounding small beside distances:
// |x - y|² = |x|² + |y|² - 2xy, and the first term does not change the order. A turn takes as many rows as its scratch
// memory, which the level-2 cache should hold, has room for.
#include "vectors.h"

namespace metate::cuda::pq {
namespace {

constexpr int tile = 128, depth = 64, stages = 3;  // rows and queries of a block; columns of a step; steps under way
constexpr int line = depth * 2, tile_bytes = tile * line, shared_bytes = stages * 2 * tile_bytes;
constexpr int64_t slab_bytes = 64 << 20;
constexpr int64_t most_samples = 256;

// Rows around a centre, in bfloat16.
struct Prepare {
    View<2> x;
    const float *scale, *offset, *centre;  // centre: none where vectors stay where they are
    int64_t first, count, n;               // rows first … first + count - 1 are written from 0 on
    int D, pitch;
    uint32_t* out;
    float *squares, *lengths;
};

METATE_DEVICE float moved_at(const Prepare& f, int64_t row, int k) {
    if (row >= f.n || k >= f.D) return 0.f;
    const float x = stored_at(f.x, row, k), centre = f.centre ? load_global<float>(f.centre + k) : 0.f;
    return f.scale ? fmaf(x, load_global<float>(f.scale + k), load_global<float>(f.offset + k) - centre) : x - centre;
}

// A block takes a group of rows; a warp four of them.
METATE_KERNEL(threads, 2)
prepare_kernel(METATE_PARAMETER(Prepare, f)) {
    METATE_SHARED(unsigned char, shared);
    for (int r = warp(); r < group_rows; r += warps) {
        const int64_t to = static_cast<int64_t>(block_index().x) * group_rows + r;
        float sum = 0.f;
        METATE_NO_UNROLL
        for (int k = 2 * lane(); to < f.count && k < f.pitch; k += 2 * warp_size) {
            const float a = moved_at(f, f.first + to, k), b = moved_at(f, f.first + to, k + 1);
            sum = fmaf(a, a, fmaf(b, b, sum));
            store_global(f.out + (to * f.pitch + k) / 2, pack<bf16>(a, b));
        }
        METATE_UNROLL
        for (int flip = 16; flip > 0; flip /= 2) sum += shuffle_xor(sum, flip);
        if (lane() != 0) continue;
        if (to < f.count) store_global(f.squares + to, sum);
        store_shared(shared + r * 4, sum);
    }
    sync_threads();
    if (warp() != 0 || !f.lengths) return;
    float longest = load_shared<float>(shared + lane() * 4);
    if (!is_finite(longest)) longest = float_of(0x7f800000u);
    METATE_UNROLL
    for (int flip = 16; flip > 0; flip /= 2) longest = fmaxf(longest, shuffle_xor(longest, flip));
    if (lane() == 0) store_global(f.lengths + f.first / group_rows + block_index().x, sqrtf(longest));
}

// The middle of some rows, and after it, squared, what their rounding is relative to.
struct Centre {
    Vectors v;
    float* centre;
    float* rough;
    int64_t n, samples, step;
};

METATE_KERNEL(threads, 2)
centre_kernel(METATE_PARAMETER(Centre, f)) {
    METATE_SHARED(unsigned char, shared);
    float rough = 0.f;
    for (int k = thread_index(); k < f.v.D; k += threads) {
        float sum = 0.f;
        METATE_NO_UNROLL
        for (int64_t i = 0; i < f.samples; ++i) sum += stored_at(f.v.base, i * f.step, k);
        float centre = f.samples > 0 ? sum / static_cast<float>(f.samples) : 0.f;
        if (f.v.scale) centre = fmaf(centre, load_global<float>(f.v.scale + k), load_global<float>(f.v.offset + k));
        if (!is_finite(centre)) centre = 0.f;
        store_global(f.centre + k, centre);
        float part = f.v.is(Metric::l2) ? 0.f : fabsf(centre);
        if (f.v.scale)
            part +=
                128.f * fabsf(load_global<float>(f.v.scale + k)) + fabsf(load_global<float>(f.v.offset + k) - centre);
        rough = fmaf(part, part, rough);
    }
    store_shared(shared + thread_index() * 4, rough);
    sync_threads();
    if (thread_index() != 0) return;
    rough = 0.f;
    for (int i = 0; i < threads; ++i) rough += load_shared<float>(shared + i * 4);
    store_global(f.rough, rough);
}

struct Product {
    const unsigned char *queries, *base;  // bfloat16, rows of `pitch` elements
    const float* squares;                 // of the rows
    const uint8_t* keep;
    float* out;
    int64_t count, rows, first, n, groups;  // queries; rows here, the first of them, and of all
    int pitch, group;
    bool l2, largest;
};

METATE_DEVICE int offset_of(int row, int piece) {
    return row * line + ((piece ^ (row & 7)) << 4);
}

METATE_DEVICE void load_step(unsigned char* shared, const Product& f, int step) {
    METATE_NO_UNROLL  // addresses of several copies would take the registers of sums
        for (int i = 0; i < 2 * tile * 8 / threads; ++i) {
        const int index = i * threads + thread_index(), row = index / 8 % tile, piece = index % 8;
        const bool of_base = i >= tile * 8 / threads;
        const int64_t at = static_cast<int64_t>(of_base ? block_index().x : block_index().y) * tile + row;
        const bool inside = at < (of_base ? f.rows : f.count);
        const unsigned char* const from = of_base ? f.base : f.queries;
        cp_async_16(shared + (of_base ? tile_bytes : 0) + offset_of(row, piece),
                    from + ((inside ? at * f.pitch : 0) + step * depth + piece * 8) * 2, inside ? 16 : 0);
    }
}

// A warp multiplies 32 queries with 64 rows.
METATE_DEVICE void multiply(float (&sum)[2][8][4], const unsigned char* shared) {
    const unsigned char* const base = shared + tile_bytes;
    METATE_UNROLL
    for (int k = 0; k < depth / 16; ++k) {
        uint32_t a[2][4];
        METATE_UNROLL
        for (int i = 0; i < 2; ++i)
            ldmatrix_x4(a[i], shared + offset_of(warp() % 4 * 32 + i * 16 + lane() % 16, 2 * k + lane() / 16));
        METATE_UNROLL
        for (int j = 0; j < 4; ++j) {
            uint32_t b[4];
            ldmatrix_x4(
                b, base + offset_of(warp() / 4 * 64 + j * 16 + lane() % 8 + lane() / 16 * 8, 2 * k + lane() / 8 % 2));
            METATE_UNROLL
            for (int i = 0; i < 2; ++i) {
                mma_m16n8k16<bf16>(sum[i][2 * j], a[i], {b[0], b[1]});
                mma_m16n8k16<bf16>(sum[i][2 * j + 1], a[i], {b[2], b[3]});
            }
        }
    }
}

// The least of every group, -inf where a number is none, inf where there is no row.
METATE_DEVICE void write_bounds(const Product& f, const float (&sum)[2][8][4]) {
    const int64_t first_row = static_cast<int64_t>(block_index().x) * tile + warp() / 4 * 64;
    const int64_t first_query = static_cast<int64_t>(block_index().y) * tile + warp() % 4 * 32 + lane() / 4;
    float least[2][2];
    METATE_UNROLL
    for (int j = 0; j < 8; ++j) {
        float square[2];
        bool inside[2];
        METATE_UNROLL
        for (int e = 0; e < 2; ++e) {
            const int64_t at = first_row + j * 8 + lane() % 4 * 2 + e, row = f.first + at;
            inside[e] = at < f.rows && (!f.keep || (load_global<uint8_t>(f.keep + row / 8) >> row % 8 & 1));
            square[e] = inside[e] && f.l2 ? load_global<float>(f.squares + at) : 0.f;
        }
        const int64_t row = first_row + j * 8, group = (f.first + row) / f.group;
        METATE_UNROLL
        for (int i = 0; i < 4; ++i) {
            float& found = least[i / 2][i % 2];
            if (f.group == fine_rows || j % 4 == 0) found = float_of(0x7f800000u);
            METATE_UNROLL
            for (int e = 0; e < 2; ++e) {
                const float product = sum[i / 2][j][i % 2 * 2 + e];
                float value = f.l2 ? square[e] - 2.f * product : product;
                value = !is_finite(value) ? -float_of(0x7f800000u) : f.largest ? -value : value;
                found = inside[e] ? fminf(found, value) : found;
            }
            if (f.group != fine_rows && j % 4 != 3) continue;
            found = fminf(found, shuffle_xor(found, 1));
            found = fminf(found, shuffle_xor(found, 2));
            const int64_t q = first_query + i / 2 * 16 + i % 2 * 8;
            if (lane() % 4 == 0 && q < f.count && group < f.groups) store_global(f.out + q * f.groups + group, found);
        }
    }
}

METATE_KERNEL(threads, 2)
product_kernel(METATE_PARAMETER(Product, f)) {
    METATE_SHARED(unsigned char, shared);
    const int steps = f.pitch / depth;
    float sum[2][8][4] = {};
    METATE_UNROLL
    for (int s = 0; s < stages - 1; ++s) {
        if (s < steps) load_step(shared + s * 2 * tile_bytes, f, s);
        cp_async_commit();
    }
    METATE_NO_UNROLL
    for (int s = 0; s < steps; ++s) {
        cp_async_wait<stages - 2>();
        sync_threads();
        const int next = s + stages - 1;
        if (next < steps) load_step(shared + next % stages * 2 * tile_bytes, f, next);
        cp_async_commit();
        multiply(sum, shared + s % stages * 2 * tile_bytes);
    }
    write_bounds(f, sum);
}

int64_t up(int64_t a, int64_t b) {
    return ceil_div(a, b) * b;
}

// Where everything lies in the memory of a problem.
struct Layout {
    int64_t pitch, slab, centre, queries, squares, base, base_squares, lengths, values, bytes;

    explicit Layout(const BoundsProblem& p) {
        pitch = up(p.vectors.D > 0 ? p.vectors.D : 1, depth);
        slab = slab_bytes / (pitch * 2) / tile * tile;
        slab = slab < tile ? tile : slab;
        if (slab > up(p.n, tile)) slab = up(p.n, tile);
        bytes = 0;
        centre = take((pitch + 1) * 4);
        queries = take(p.queries * pitch * 2);
        squares = take(p.queries * 4);
        base = take(slab * pitch * 2);
        base_squares = take(slab * 4);
        lengths = take(ceil_div(p.n, group_rows) * 4);
        values = take(p.queries * ceil_div(p.n, p.rows) * 4);
    }

  private:
    int64_t take(int64_t count) {
        const int64_t at = bytes;
        bytes += up(count, 256);
        return at;
    }
};

void prepare(const Prepare& f, const Device& device) {
    launch(prepare_kernel, {static_cast<int>(ceil_div(f.count, group_rows)), 1, 1}, threads, group_rows * 4,
           device.stream, f);
}

}  // namespace

int64_t bounds_bytes(const BoundsProblem& problem) {
    return Layout(problem).bytes;
}

Bounds place_bounds(const BoundsProblem& problem, void* memory, const Device& device) {
    const Layout at(problem);
    const Vectors& v = problem.vectors;
    auto* const bytes = static_cast<unsigned char*>(memory);
    auto* const centre = reinterpret_cast<float*>(bytes + at.centre);
    const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(bytes + offset); };
    const int64_t samples = problem.n < most_samples ? problem.n : most_samples;
    launch(centre_kernel, {1, 1, 1}, threads, threads * 4, device.stream,
           Centre{v, centre, centre + at.pitch, problem.n, samples, samples > 0 ? problem.n / samples : 1});
    return {floats(at.values),
            floats(at.squares),
            floats(at.lengths),
            centre + at.pitch,
            ceil_div(problem.n, problem.rows),
            problem.rows,
            (v.is(Metric::l2) ? 2.f : 1.f) * (0x1p-8f + 0x1p-15f),
            static_cast<float>(v.D + 16) * 0x1p-20f};
}

void bound_groups(const BoundsProblem& problem, const Bounds& bounds, void* memory, int64_t first, int64_t count,
                  const Device& device) {
    const Layout at(problem);
    const Vectors& v = problem.vectors;
    auto* const bytes = static_cast<unsigned char*>(memory);
    const auto words = [&](int64_t offset) { return reinterpret_cast<uint32_t*>(bytes + offset); };
    const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(bytes + offset); };
    const auto pitch = static_cast<int>(at.pitch);
    prepare({v.queries, nullptr, nullptr, v.is(Metric::l2) ? floats(at.centre) : nullptr, first, count,
             v.queries.size[0], v.D, pitch, words(at.queries), floats(at.squares), nullptr},
            device);
    for (int64_t row = 0; row < problem.n; row += at.slab) {
        const int64_t rows = problem.n - row < at.slab ? problem.n - row : at.slab;
        if (first == 0 || at.slab < problem.n)  // else they are there from the turn before
            prepare({v.base, v.scale, v.offset, floats(at.centre), row, rows, problem.n, v.D, pitch, words(at.base),
                     floats(at.base_squares), floats(at.lengths)},
                    device);
        launch(product_kernel, {static_cast<int>(ceil_div(rows, tile)), static_cast<int>(ceil_div(count, tile)), 1},
               threads, shared_bytes, device.stream,
               Product{bytes + at.queries, bytes + at.base, floats(at.base_squares), problem.keep, bounds.values, count,
                       rows, row, problem.n, bounds.groups, pitch, problem.rows, v.is(Metric::l2), v.largest});
    }
}

}  // namespace metate::cuda::pq
