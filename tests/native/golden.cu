// What each instruction of csrc/cuda/arch/ gives on seeded inputs. On a GPU: writes it to a file; as C++: runs the same
// kernels in the emulator and compares. So one run on real hardware checks the emulator ever after.
//
//   nvcc -std=c++20 -O3 -Icsrc -arch=native tests/native/golden.cu -o golden
//   g++ -x c++ -std=c++20 -O2 -Icsrc tests/native/golden.cu csrc/cuda/emulator/*.cpp -o golden_emulated
//   ./golden golden.bin; ./golden_emulated golden.bin
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/arch/arch.h"

using namespace metate::cuda::arch;

namespace {

constexpr int trials = 64;  // blocks; each draws its own inputs

// Every kernel: one warp per block, `words` inputs and `results` outputs for each of its lanes.
struct Recording {
    const uint32_t* inputs;
    uint32_t* results;
    int words, count;

    METATE_DEVICE uint32_t input(int i) const { return inputs[(block_index().x * 32 + lane()) * words + i]; }
    METATE_DEVICE void result(int i, uint32_t value) const {
        results[(block_index().x * 32 + lane()) * count + i] = value;
    }
};

template <typename T>
METATE_KERNEL(32, 1)
mma(METATE_PARAMETER(Recording, r)) {
    // Elements between 2^-4 and 2^4, so that sums stay finite and roundings show.
    const auto element = [&](int i) {
        const uint32_t bits = r.input(i);
        const auto tame = [&](uint32_t half) {
            const float x = (1.f + static_cast<float>(half & 1023) / 1024.f) * float_of((123 + (half >> 10 & 7)) << 23);
            return half >> 15 ? -x : x;
        };
        return pack<T>(tame(bits & 0xffff), tame(bits >> 16));
    };
    const uint32_t a[4] = {element(0), element(1), element(2), element(3)}, b[2] = {element(4), element(5)};
    float d[4];
    METATE_UNROLL
    for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(static_cast<int>(r.input(6 + i)) >> 16) * 0x1p-8f;
    mma_m16n8k16<T>(d, a, b);
    METATE_UNROLL
    for (int i = 0; i < 4; ++i) r.result(i, bits_of(d[i]));
}

METATE_KERNEL(32, 1)
matrices(METATE_PARAMETER(Recording, r)) {
    METATE_SHARED(unsigned char, shared);
    store_shared(shared + 16 * lane(), Words<4>{{r.input(0), r.input(1), r.input(2), r.input(3)}});
    sync_threads();
    // Any rows in any order, the same ones twice as well.
    const void* row = shared + 16 * (r.input(4) & 31);
    uint32_t x1[1], x2[2], x4[4], t1[1], t2[2], t4[4];
    ldmatrix_x1(x1, row);
    ldmatrix_x2(x2, row);
    ldmatrix_x4(x4, row);
    ldmatrix_x1_trans(t1, row);
    ldmatrix_x2_trans(t2, row);
    ldmatrix_x4_trans(t4, row);
    r.result(0, x1[0]);
    r.result(1, t1[0]);
    METATE_UNROLL
    for (int i = 0; i < 2; ++i) r.result(2 + i, x2[i]), r.result(4 + i, t2[i]);
    METATE_UNROLL
    for (int i = 0; i < 4; ++i) r.result(6 + i, x4[i]), r.result(10 + i, t4[i]);
}

METATE_KERNEL(32, 1)
copies(METATE_PARAMETER(Recording, r)) {
    METATE_SHARED(unsigned char, shared);
    const uint32_t* source = r.inputs + (block_index().x * 32 + lane()) * r.words;
    const int valid = static_cast<int>(r.input(4) % 17);
    cp_async_16(shared + 16 * lane(), source, valid);
    cp_async_commit();
    cp_async_16(shared + 512 + 16 * lane(), source, 16);
    cp_async_commit();
    cp_async_wait<1>();
    sync_threads();
    const auto first = load_shared<Words<4>>(shared + 16 * (lane() ^ 5));
    cp_async_wait<0>();
    sync_threads();
    const auto second = load_shared<Words<4>>(shared + 512 + 16 * (lane() ^ 9));
    METATE_UNROLL
    for (int i = 0; i < 4; ++i) r.result(i, first[i]), r.result(4 + i, second[i]);
}

METATE_KERNEL(32, 1)
exchanges(METATE_PARAMETER(Recording, r)) {
    const uint32_t value = r.input(0);
    const int uniform = block_index().x % 32;
    r.result(0, shuffle(value, static_cast<int>(r.input(1)) >> 20));
    r.result(1, shuffle_xor(value, uniform));
    r.result(2, shuffle_down(value, uniform));
    r.result(3, vote_ballot((value & 4) != 0));
    r.result(4, vote_any((value & 0x1ff) == 0));
    r.result(5, vote_all((value & 0x1ff) != 0));
    r.result(6, sync_threads_or((value & 0x3ff) == 0));
    r.result(7, bits_of(shuffle_xor(static_cast<float>(value), 31)));
}

// Any bits at all as floats: NaN, infinities and subnormals come too.
METATE_KERNEL(32, 1)
conversions(METATE_PARAMETER(Recording, r)) {
    const uint32_t x = r.input(0), y = r.input(1);
    const float half_range = float_of((x & 0x8fffffffu) | 0x30000000u);  // where f16 has its subnormals
    r.result(0, pack<bf16>(float_of(x), float_of(y)));
    r.result(1, pack<f16>(float_of(x), half_range));
    r.result(2, from_float<bf16>(float_of(y & ~0x7fffu)).bits);
    r.result(3, from_float<f16>(half_range).bits);
    r.result(4, bits_of(low<f16>(x)));
    r.result(5, bits_of(high<bf16>(y)));
}

// Arguments of moderate size first, then any.
METATE_KERNEL(32, 1)
approximations(METATE_PARAMETER(Recording, r)) {
    const float x = float_of((r.input(0) & 0x87ffffffu) | 0x38000000u), any = float_of(r.input(1));
    r.result(0, bits_of(fast_exp2(x)));
    r.result(1, bits_of(fast_log2(fabsf(x))));
    r.result(2, bits_of(fast_reciprocal(x)));
    r.result(3, bits_of(fast_exp2(any)));
    r.result(4, bits_of(fast_log2(any)));
    r.result(5, bits_of(fast_reciprocal(any)));
}

METATE_KERNEL(32, 1)
tangents(METATE_PARAMETER(Recording, r)) {
    r.result(0, bits_of(fast_tanh(float_of((r.input(0) & 0x87ffffffu) | 0x38000000u))));
    r.result(1, bits_of(fast_tanh(float_of(r.input(1)))));
}

METATE_KERNEL(32, 1)
sums(METATE_PARAMETER(Recording, r)) {
    // Small integers: the sum does not depend on the order.
    float* own = reinterpret_cast<float*>(r.results + (block_index().x * 32 + (lane() & 6)) * r.count);
    const float two[2] = {static_cast<float>(r.input(0) & 255), -static_cast<float>(r.input(1) & 255)};
    atomic_add(own, two);
    atomic_add(own, 1.f);
}

struct Instruction {
    const char* name;
    void (*kernel)(Recording);
    int words, count;
    double relative, absolute;  // how far the emulator may be from the GPU; both 0: the same bits
};

// mma: the tensor core adds with fewer guard bits than float. The rest: what the PTX manual promises, twice.
const Instruction instructions[] = {
    {"mma bf16", mma<bf16>, 10, 4, 0x1p-20, 0x1p-10},
    {"mma f16", mma<f16>, 10, 4, 0x1p-20, 0x1p-10},
    {"ldmatrix", matrices, 5, 14, 0, 0},
    {"cp.async", copies, 8, 8, 0, 0},
    {"shuffles and votes", exchanges, 2, 8, 0, 0},
    {"conversions", conversions, 2, 6, 0, 0},
    {"approximations", approximations, 2, 6, 0x1p-21, 0x1p-21},
    {"tanh", tangents, 2, 2, 0x1p-10, 0},
    {"atomic add", sums, 2, 8, 0, 0},
};

std::vector<uint32_t> inputs_of(const Instruction& instruction) {
    std::vector<uint32_t> inputs(static_cast<size_t>(trials * 32 * instruction.words));
    uint64_t state = static_cast<uint64_t>(instruction.words) * 0x9e3779b97f4a7c15u;
    for (uint32_t& word : inputs) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        word = static_cast<uint32_t>(state >> 32);
    }
    return inputs;
}

std::vector<uint32_t> results_of(const Instruction& instruction) {
    const std::vector<uint32_t> inputs = inputs_of(instruction);
    std::vector<uint32_t> results(static_cast<size_t>(trials * 32 * instruction.count));
    void *in = nullptr, *out = nullptr;
#if defined(__CUDACC__)
    const size_t in_bytes = inputs.size() * 4, out_bytes = results.size() * 4;
    check(cudaMalloc(&in, in_bytes), "inputs");
    check(cudaMalloc(&out, out_bytes), "results");
    check(cudaMemcpy(in, inputs.data(), in_bytes, cudaMemcpyHostToDevice), "copy");
    check(cudaMemset(out, 0, out_bytes), "clear");
#else
    in = const_cast<uint32_t*>(inputs.data());
    out = results.data();
#endif
    launch(instruction.kernel, {trials}, 32, 1024, nullptr,
           Recording{static_cast<uint32_t*>(in), static_cast<uint32_t*>(out), instruction.words, instruction.count});
#if defined(__CUDACC__)
    check(cudaMemcpy(results.data(), out, out_bytes, cudaMemcpyDeviceToHost), instruction.name);
    check(cudaFree(in), "inputs");
    check(cudaFree(out), "results");
#endif
    return results;
}

struct File {
    FILE* handle;
    File(const char* path, const char* mode) : handle(fopen(path, mode)) {
        if (!handle) throw std::runtime_error(std::string("cannot open ") + path);
    }
    ~File() { fclose(handle); }
};

#if defined(__CUDACC__)

void record(const char* path) {
    const File file(path, "wb");
    for (const Instruction& instruction : instructions) {
        const std::vector<uint32_t> results = results_of(instruction);
        if (fwrite(results.data(), 4, results.size(), file.handle) != results.size()) {
            throw std::runtime_error(std::string("cannot write ") + path);
        }
        printf("%-20s recorded\n", instruction.name);
    }
}

#else

bool agree(const Instruction& instruction, uint32_t gpu, uint32_t emulated) {
    if (instruction.relative == 0) return gpu == emulated;
    const double x = float_of(gpu), y = float_of(emulated);
    if (isnan(x) || isnan(y) || isinf(x) || isinf(y)) return (isnan(x) && isnan(y)) || x == y;
    return fabs(x - y) <= instruction.relative * fabs(x) + instruction.absolute;
}

void compare(const char* path) {
    const File file(path, "rb");
    bool good = true;
    for (const Instruction& instruction : instructions) {
        const std::vector<uint32_t> emulated = results_of(instruction);
        std::vector<uint32_t> gpu(emulated.size());
        if (fread(gpu.data(), 4, gpu.size(), file.handle) != gpu.size()) {
            throw std::runtime_error(std::string(path) + " ends early: record it anew");
        }
        size_t differences = 0, first = 0;
        for (size_t i = 0; i < gpu.size(); ++i) {
            if (!agree(instruction, gpu[i], emulated[i]) && differences++ == 0) first = i;
        }
        printf("%-20s %zu of %zu differ", instruction.name, differences, gpu.size());
        if (differences) {
            const size_t count = static_cast<size_t>(instruction.count);
            printf(": first in trial %zu, lane %zu, result %zu: GPU %08x, emulator %08x", first / count / 32,
                   first / count % 32, first % count, gpu[first], emulated[first]);
        }
        printf("\n");
        good = good && differences == 0;
    }
    if (!good) throw std::runtime_error("the emulator is not what the GPU is");
}

#endif

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s FILE\n", argv[0]);
        return 2;
    }
    try {
#if defined(__CUDACC__)
        record(argv[1]);
#else
        compare(argv[1]);
#endif
    } catch (const std::exception& error) {
        fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
