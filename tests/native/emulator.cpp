// The emulator's instructions against the tables of the PTX manual, written out here a second time, and every mistake
// it claims to find made once. Usage: native_emulator; prints one line a test and exits with 1 when one fails.
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <set>
#include <string>
#include <thread>
#include <vector>

#include "emulated.h"

namespace {

uint32_t random_state = 1;
uint32_t random_bits() {
    return random_state = random_state * 1664525u + 1013904223u;
}
float random_float() {
    return static_cast<float>(random_bits() >> 8) * 0x1p-23f - 1.0f;
}

template <typename T>
uint32_t pair_of(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// ---- Instructions ---------------------------------------------------------------------------------------------------

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": element i of a lane's fragment.
struct Position {
    int row, column;
};
Position fragment_a(int lane, int i) {
    return {lane / 4 + ((i >= 2 && i < 4) || i >= 6 ? 8 : 0), lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
Position fragment_b(int lane, int i) {
    return {lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane / 4};
}
Position fragment_c(int lane, int i) {
    return {lane / 4 + (i >= 2 ? 8 : 0), lane % 4 * 2 + (i & 1)};
}

template <typename T>
void mma_layout() {
    float a[16][16], b[16][8], c[16][8], d[16][8];
    for (auto& row : a)
        for (float& x : row) x = to_float(from_float<T>(random_float()));
    for (auto& row : b)
        for (float& x : row) x = to_float(from_float<T>(random_float()));
    for (auto& row : c)
        for (float& x : row) x = random_float();
    run({}, 32, 0, [&] {
        uint32_t fa[4], fb[2];
        float fd[4];
        for (int i = 0; i < 8; i += 2) {
            const Position p = fragment_a(lane(), i), q = fragment_a(lane(), i + 1);
            fa[i / 2] = pair_of<T>(a[p.row][p.column], a[q.row][q.column]);
        }
        for (int i = 0; i < 4; i += 2) {
            const Position p = fragment_b(lane(), i), q = fragment_b(lane(), i + 1);
            fb[i / 2] = pair_of<T>(b[p.row][p.column], b[q.row][q.column]);
        }
        for (int i = 0; i < 4; ++i) fd[i] = c[fragment_c(lane(), i).row][fragment_c(lane(), i).column];
        mma_m16n8k16<T>(fd, fa, fb);
        for (int i = 0; i < 4; ++i) d[fragment_c(lane(), i).row][fragment_c(lane(), i).column] = fd[i];
    });
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 8; ++j) {
            double truth = c[i][j];
            for (int k = 0; k < 16; ++k) truth += static_cast<double>(a[i][k]) * b[k][j];
            require(fabs(truth - d[i][j]) < 1e-5, "d[" + std::to_string(i) + "][" + std::to_string(j) + "]");
        }
    }
}

// A NaN or infinity in one row of a stays in that row of d.
void mma_special_values() {
    float d[32][4];
    run({}, 32, 0, [&] {
        uint32_t a[4] = {}, b[2] = {pair_of<bf16>(1, 1), pair_of<bf16>(1, 1)};
        if (lane() == 5) a[1] = pair_of<bf16>(NAN, 0);       // row 1 + 8
        if (lane() == 9) a[0] = pair_of<bf16>(INFINITY, 0);  // row 2
        float own[4] = {};
        mma_m16n8k16<bf16>(own, a, b);
        memcpy(d[lane()], own, sizeof own);
    });
    for (int l = 0; l < 32; ++l) {
        for (int i = 0; i < 4; ++i) {
            const int row = fragment_c(l, i).row;
            require(row == 9 ? isnan(d[l][i]) : d[l][i] == (row == 2 ? INFINITY : 0.0f), "row " + std::to_string(row));
        }
    }
}

// PTX ISA, ldmatrix: each lane gets one row-fragment of each matrix; the threads 8m to 8m + 7 give its row addresses.
void ldmatrix_layout() {
    for (int form = 0; form < 6; ++form) {
        const int count = 1 << form % 3;
        const bool transposed = form >= 3;
        uint32_t got[32][4] = {};
        run({}, 32, 64 * 16, [&] {
            METATE_SHARED(char, shared);
            const auto row_of = [](int i) { return (i * 13 + 5) % 64; };  // rows anywhere
            Words<4> row;
            for (int c = 0; c < 4; ++c)
                row[c] = static_cast<uint32_t>(lane() * 8 + 2 * c) | static_cast<uint32_t>(lane() * 8 + 2 * c + 1)
                                                                         << 16;
            store_shared(shared + 16 * row_of(lane()), row);
            sync_warp();
            const void* address = lane() < 8 * count ? shared + 16 * row_of(lane()) : nullptr;
            uint32_t x1[1], x2[2], x4[4];
            if (form == 0) ldmatrix_x1(x1, address);
            if (form == 1) ldmatrix_x2(x2, address);
            if (form == 2) ldmatrix_x4(x4, address);
            if (form == 3) ldmatrix_x1_trans(x1, address);
            if (form == 4) ldmatrix_x2_trans(x2, address);
            if (form == 5) ldmatrix_x4_trans(x4, address);
            memcpy(got[lane()], count == 1 ? x1 : count == 2 ? x2 : x4, sizeof(uint32_t) * static_cast<size_t>(count));
        });
        for (int l = 0; l < 32; ++l) {
            for (int m = 0; m < count; ++m) {
                for (int half = 0; half < 2; ++half) {
                    int row = l / 4, column = 2 * (l % 4) + half;
                    if (transposed) std::swap(row, column);
                    require((got[l][m] >> 16 * half & 0xffff) == static_cast<uint32_t>((m * 8 + row) * 8 + column),
                            "form " + std::to_string(form) + " lane " + std::to_string(l));
                }
            }
        }
    }
}

void shuffles() {
    for (int operand = -40; operand < 72; ++operand) {
        run({}, 64, 0, [&] {
            const int base = warp() * 1000;
            require(shuffle(base + lane(), operand) == base + (operand & 31), "shuffle");
            if (operand < 0 || operand > 31) return;
            require(shuffle_xor(static_cast<float>(lane()), operand) == static_cast<float>(lane() ^ operand), "xor");
            const int below = lane() + operand > 31 ? lane() : lane() + operand;
            require(shuffle_down(static_cast<uint32_t>(lane()), operand) == static_cast<uint32_t>(below), "down");
        });
    }
    // Both halves of a warp at once, each with its own mask and its own place.
    run({}, 32, 0, [] {
        if (lane() < 16) {
            require(shuffle_xor(lane(), 5, 0xffffu) == (lane() ^ 5), "lower half");
        } else {
            require(shuffle_xor(lane(), 3, 0xffff0000u) == (lane() ^ 3), "upper half");
        }
    });
}

void votes() {
    run({}, 32, 0, [] {
        require(vote_ballot(lane() % 3 == 0) == 0x49249249u, "ballot");
        require(vote_any(lane() == 7) && !vote_any(false), "any");
        require(vote_all(lane() < 32) && !vote_all(lane() != 31), "all");
        if (lane() < 8) {
            require(vote_all(lane() < 8, 0xff) && vote_ballot(lane() == 1, 0xff) == 2, "masked");
        }
    });
    run({}, 128, 0, [] {
        require(sync_threads_or(thread_index() == 77), "or: one");
        require(!sync_threads_or(false), "or: none");
    });
}

void asynchronous_copies() {
    alignas(16) uint8_t source[17][16];
    for (int i = 0; i < 17; ++i)
        for (int j = 0; j < 16; ++j) source[i][j] = static_cast<uint8_t>(16 * i + j + 1);
    run({}, 32, 32 * 16, [&] {
        METATE_SHARED(uint8_t, shared);
        if (lane() >= 17) return;
        uint8_t* own = shared + 16 * lane();
        cp_async_16(own, source[lane()], lane());
        const auto poisoned = [&] { return own[0] == 0xff && own[15] == 0xff; };
        require(poisoned(), "poisoned when issued");
        cp_async_commit();
        cp_async_commit();  // empty, and counts
        cp_async_wait<2>();
        require(poisoned(), "two groups may be pending");
        cp_async_wait<1>();
        for (int j = 0; j < 16; ++j) require(own[j] == (j < lane() ? source[lane()][j] : 0), "valid bytes, then zeros");
        cp_async_16(own, source[lane()], 16);
        cp_async_wait<0>();
        require(poisoned(), "what was not committed is not waited for");
    });
}

void barriers() {
    run({3}, 256, 256 * 4, [] {
        METATE_SHARED(int, shared);
        for (int round = 0; round < 10; ++round) {
            store_shared(shared + thread_index(), thread_index() + round);
            sync_threads();
            const int other = (thread_index() * 37 + 11) % 256;
            require(load_shared<int>(shared + other) == other + round, "sync_threads");
            sync_threads();
        }
    });
    // Warps 0-1 and 2-3 each at their own barrier; then a producer that never waits for its consumers.
    run({}, 128, 128 * 4, [] {
        METATE_SHARED(int, shared);
        const int half = warp() / 2, neighbour = thread_index() ^ 32;
        store_shared(shared + thread_index(), thread_index());
        barrier_sync(1 + half, 64);
        require(load_shared<int>(shared + neighbour) == neighbour, "barrier_sync");
        sync_threads();
        if (warp() == 0) {
            store_shared(shared + lane(), -lane());
            barrier_arrive(3, 128);
        } else {
            barrier_sync(3, 128);
            require(load_shared<int>(shared + lane()) == -lane(), "barrier_arrive");
        }
    });
}

void atomics() {
    alignas(8) float sums[4] = {};
    run({5, 2, 3}, 64, 0, [&] {
        const Dim3 size = grid_size();
        require(size.x == 5 && size.y == 2 && size.z == 3 && block_size() == 64, "sizes");
        atomic_add(sums, 1.0f);
        const float two[2] = {static_cast<float>(block_index().x), static_cast<float>(block_index().z)};
        atomic_add(sums + 2, two);
    });
    require(sums[0] == 64 * 30 && sums[1] == 0 && sums[2] == 64 * 6 * 10 && sums[3] == 64 * 10 * 3, "sums");
}

// Rounding done in double with the step of the target: `digits` after the point, exponents from `lowest` on.
double rounded(float x, int digits, int lowest, double largest) {
    if (isinf(x) || x == 0) return x;
    const double step = ldexp(1.0, (ilogb(x) < lowest ? lowest : ilogb(x)) - digits);
    const double y = nearbyint(x / step) * step;
    return fabs(y) > largest ? copysign(INFINITY, x) : y;
}

void conversions() {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const f16 half{static_cast<uint16_t>(bits)};
        const float wide = to_float(half);
        const int exponent = bits >> 10 & 31;
        const double magnitude = ldexp((bits & 1023) + (exponent ? 1024 : 0), (exponent ? exponent : 1) - 25);
        const bool nan = exponent == 31 && (bits & 1023);
        if (nan) {
            require(isnan(wide) && from_float<f16>(wide).bits == 0x7fff, "f16 NaN");
        } else {
            require(fabs(wide) == (exponent == 31 ? INFINITY : magnitude) && signbit(wide) == (bits >> 15),
                    "f16 value");
            require(from_float<f16>(wide).bits == bits, "f16 there and back");
            require(from_float<bf16>(to_float(bf16{half.bits})).bits == bits || isnan(to_float(bf16{half.bits})),
                    "bf16");
        }
    }
    for (int i = 0; i < 500000; ++i) {
        uint32_t bits = random_bits();
        if (i % 4 == 0) bits = (bits & ~0xffffu) | 0x8000;          // ties of bf16
        if (i % 4 == 1) bits = (bits & ~0x1fffu) | 0x1000;          // ties of f16
        if (i % 8 == 5) bits = (bits & 0x8fffffffu) | 0x30000000u;  // around f16's subnormals
        const float x = float_of(bits);
        if (isnan(x)) {
            require(pack<f16>(x, x) == 0x7fff7fffu && pack<bf16>(x, x) == 0x7fff7fffu, "NaN");
            continue;
        }
        require(to_float(from_float<f16>(x)) == rounded(x, 10, -14, 65504), "f16 of " + std::to_string(x));
        require(to_float(from_float<bf16>(x)) == rounded(x, 7, -126, 0x1.fep127), "bf16 of " + std::to_string(x));
        require(low<f16>(pack<f16>(x, 1)) == to_float(from_float<f16>(x)) && high<bf16>(pack<bf16>(2, -3)) == -3,
                "pack");
    }
    require(from_float<bf16>(-0.0f).bits == 0x8000 && from_float<f16>(-0.0f).bits == 0x8000, "-0");
}

void approximations() {
    for (int i = 0; i < 100000; ++i) {
        const float x = ldexpf(random_float(), static_cast<int>(random_bits() >> 8) % 14);
        const double e = exp2(static_cast<double>(x));
        if (fabs(x) < 126) require(fabs(fast_exp2(x) - e) <= e * 0x1p-22, "exp2");
        if (x > 0)
            require(fabs(fast_log2(x) - log2(static_cast<double>(x))) <=
                        0x1p-22 * fmax(1, fabs(log2(static_cast<double>(x)))),
                    "log2");
        if (x != 0) require(fabs(fast_reciprocal(x) * static_cast<double>(x) - 1) <= 0x1p-23, "reciprocal");
        require(fabs(fast_tanh(x) - tanh(static_cast<double>(x))) <= 0x1p-11 * fabs(tanh(static_cast<double>(x))),
                "tanh");
    }
    require(fast_exp2(-INFINITY) == 0 && fast_exp2(INFINITY) == INFINITY && isnan(fast_exp2(NAN)), "exp2");
    require(fast_exp2(-130) == 0 && fast_exp2(-0x1p-140f) == 1, "exp2 flushes");
    require(fast_log2(0) == -INFINITY && isnan(fast_log2(-1)) && fast_log2(0x1p-140f) == -INFINITY, "log2");
    require(fast_reciprocal(0x1p-140f) == INFINITY && fast_reciprocal(0x1p127f) == 0, "reciprocal flushes");
    require(fast_tanh(100) == 1 && isnan(fast_tanh(NAN)), "tanh");
}

// ---- Whole kernels --------------------------------------------------------------------------------------------------

// c = a·b (m×64 by 64×64): two cp.async stages, a swizzle without bank conflicts, 4 warps of 16×64.
struct Product {
    const uint16_t *a, *b;  // m×k and k×64, k a multiple of 32
    float* c;
    int k;
};

METATE_KERNEL(128, 1) multiply(METATE_PARAMETER(Product, p)) {
    METATE_SHARED(char, shared);
    constexpr int stage_bytes = 64 * 64 + 32 * 128;
    const auto address_a = [&](int stage, int row, int chunk) {
        return shared + stage * stage_bytes + row * 64 + ((chunk ^ (row >> 1)) & 3) * 16;
    };
    const auto address_b = [&](int stage, int row, int chunk) {
        return shared + stage * stage_bytes + 64 * 64 + row * 128 + ((chunk ^ row) & 7) * 16;
    };
    const uint16_t* a = p.a + int64_t{64} * p.k * block_index().x;
    const auto fetch = [&](int step) {
        for (int i = thread_index(); i < 256; i += 128) {
            cp_async_16(address_a(step % 2, i / 4, i % 4), a + i / 4 * p.k + step * 32 + i % 4 * 8, 16);
            cp_async_16(address_b(step % 2, i / 8, i % 8), p.b + (step * 32 + i / 8) * 64 + i % 8 * 8, 16);
        }
        cp_async_commit();
    };
    float sums[8][4] = {};
    fetch(0);
    for (int step = 0; step < p.k / 32; ++step) {
        cp_async_wait<0>();
        sync_threads();
        if (step + 1 < p.k / 32) fetch(step + 1);
        for (int k = 0; k < 2; ++k) {
            uint32_t fa[4], fb[4];
            ldmatrix_x4(fa, address_a(step % 2, warp() * 16 + lane() % 16, 2 * k + lane() / 16));
            for (int n = 0; n < 4; ++n) {
                ldmatrix_x4_trans(fb, address_b(step % 2, k * 16 + lane() % 16, 2 * n + lane() / 16));
                mma_m16n8k16<bf16>(sums[2 * n], fa, {fb[0], fb[1]});
                mma_m16n8k16<bf16>(sums[2 * n + 1], fa, {fb[2], fb[3]});
            }
        }
    }
    for (int n = 0; n < 8; ++n) {
        for (int i = 0; i < 4; ++i) {
            const int row = block_index().x * 64 + warp() * 16 + fragment_c(lane(), i).row;
            p.c[row * 64 + n * 8 + fragment_c(lane(), i).column] = sums[n][i];
        }
    }
}

std::vector<uint16_t> random_matrix(size_t size) {
    std::vector<uint16_t> matrix(size);
    for (uint16_t& x : matrix) x = from_float<bf16>(random_float()).bits;
    return matrix;
}

double seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void product() {
    const int m = 128, k = 128;
    alignas(16) static std::vector<uint16_t> a = random_matrix(m * k), b = random_matrix(k * 64);
    std::vector<float> c(m * 64), first;
    emulator::count_traffic(true);
    double spent = 0;
    const int rounds = 10;
    for (int round = 0; round < rounds; ++round) {
        emulator::set_seed(static_cast<uint64_t>(round));
        const double start = seconds();
        launch(multiply, {m / 64}, 128, 2 * (64 * 64 + 32 * 128), nullptr, Product{a.data(), b.data(), c.data(), k});
        if (round > 0) spent += seconds() - start;
        if (round == 0) {
            const auto traffic = emulator::traffic();
            require(traffic.size() == 4, "two copies and two ldmatrix");
            for (const auto& t : traffic) require(t.accesses > 0 && t.wavefronts == t.ideal, "conflicts at " + t.place);
            emulator::count_traffic(false);
            first = c;
        }
        require(c == first, "every schedule gives the same bits");
    }
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < 64; ++j) {
            double truth = 0;
            for (int t = 0; t < k; ++t) {
                truth += static_cast<double>(to_float(bf16{a[static_cast<size_t>(i * k + t)]})) *
                         to_float(bf16{b[static_cast<size_t>(t * 64 + j)]});
            }
            require(fabs(truth - c[static_cast<size_t>(i * 64 + j)]) < 1e-4, "product");
        }
    }
    printf("(%.0f MFLOP/s) ", 2e-6 * m * 64 * k * (rounds - 1) / spent);
}

// The order in which the warps of a block run: the same for one seed, different from seed to seed.
void schedules() {
    std::set<std::string> orders;
    for (int seed = 0; seed < 40; ++seed) {
        std::string order[2];
        for (std::string& log : order) {
            emulator::set_seed(static_cast<uint64_t>(seed / 2));
            run({2}, 128, 0, [&] {
                for (int i = 0; i < 3; ++i) {
                    sync_warp();
                    log += static_cast<char>('a' + thread_index() % 26);
                }
            });
        }
        require(order[0] == order[1], "one seed, one schedule");
        orders.insert(order[0]);
    }
    require(orders.size() == 20, "20 seeds, 20 schedules");
}

void host_threads() {
    const auto work = [] {
        for (int i = 0; i < 20; ++i) barriers();
    };
    std::thread other(work);
    work();
    other.join();
}

void scratch_is_poisoned() {
    const metate::cuda::Device device = emulator::device();
    const auto* memory = static_cast<const float*>(device.scratch(4000, device.context));
    for (int i = 0; i < 1000; ++i) require(isnan(memory[i]), "scratch");
    run({0, 1, 1}, 32, 0, [] { require(false, "an empty grid runs nothing"); });
}

}  // namespace

int main() {
    bool good = true;
    TEST(mma_layout<bf16>);
    TEST(mma_layout<f16>);
    TEST(mma_special_values);
    TEST(ldmatrix_layout);
    TEST(shuffles);
    TEST(votes);
    TEST(asynchronous_copies);
    TEST(barriers);
    TEST(atomics);
    TEST(conversions);
    TEST(approximations);
    TEST(product);
    TEST(schedules);
    TEST(host_threads);
    TEST(scratch_is_poisoned);
    return good ? 0 : 1;
}
