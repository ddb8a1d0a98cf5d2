// What differs between the two compilers of a kernel source: nvcc builds it for a GPU, g++ for the SIMT emulator.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../../metate.h"

#if defined(__CUDACC__)
#define METATE_DEVICE __device__ __forceinline__
// template <…> METATE_KERNEL(threads, blocks_per_processor) name(METATE_PARAMETER(Parameters, p)) { … }
#define METATE_KERNEL(threads, blocks_per_processor) __global__ void __launch_bounds__(threads, blocks_per_processor)
#define METATE_PARAMETER(type, name) const __grid_constant__ type name
#define METATE_UNROLL _Pragma("unroll")
#define METATE_NO_UNROLL _Pragma("unroll 1")
// Declares `type* name`, the block's dynamic shared memory (size: launch), aligned to 128 bytes.
#define METATE_SHARED(type, name)                                          \
    extern __shared__ __align__(128) unsigned char metate_shared_memory[]; \
    type* const name = reinterpret_cast<type*>(metate_shared_memory)
#define METATE_SITE
#define METATE_SITE_ALONE
#else
#include <source_location>

#include "../emulator/emulator.h"
#define METATE_DEVICE inline
#define METATE_KERNEL(threads, blocks_per_processor) void
#define METATE_PARAMETER(type, name) const type name
#define METATE_UNROLL
#define METATE_NO_UNROLL
#define METATE_SHARED(type, name) type* const name = static_cast<type*>(::metate::cuda::emulator::shared_memory())
// The last parameter of every instruction: where in the kernel it stands, for the emulator's reports.
#define METATE_SITE , ::std::source_location where = ::std::source_location::current()
#define METATE_SITE_ALONE ::std::source_location where = ::std::source_location::current()
#endif

namespace metate::cuda::arch {

constexpr int warp_size = 32;
constexpr uint32_t full_warp = 0xffffffffu;

// Element types of the tensor cores, as they lie in memory.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <typename A, typename B>
constexpr bool is_same = false;
template <typename A>
constexpr bool is_same<A, A> = true;

// N consecutive 32-bit words that move as one access: Words<4> is the 16-byte vector load.
template <int N>
struct alignas(4 * N) Words {
    uint32_t word[N];

    METATE_INLINE uint32_t& operator[](int i) { return word[i]; }
    METATE_INLINE const uint32_t& operator[](int i) const { return word[i]; }
};

struct Dim3 {
    int x = 1, y = 1, z = 1;
};

// Blocks are one-dimensional: warp() and lane() split thread_index() for every kernel alike.
METATE_DEVICE int thread_index() {
#if defined(__CUDACC__)
    return static_cast<int>(threadIdx.x);
#else
    return emulator::thread_index();
#endif
}

METATE_DEVICE int block_size() {
#if defined(__CUDACC__)
    return static_cast<int>(blockDim.x);
#else
    return emulator::block_size();
#endif
}

METATE_DEVICE Dim3 block_index() {
#if defined(__CUDACC__)
    return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
#else
    const int* index = emulator::block_index();
    return {index[0], index[1], index[2]};
#endif
}

METATE_DEVICE Dim3 grid_size() {
#if defined(__CUDACC__)
    return {static_cast<int>(gridDim.x), static_cast<int>(gridDim.y), static_cast<int>(gridDim.z)};
#else
    const int* size = emulator::grid_size();
    return {size[0], size[1], size[2]};
#endif
}

METATE_DEVICE int lane() {
    return thread_index() & (warp_size - 1);
}
METATE_DEVICE int warp() {
    return thread_index() / warp_size;
}

}  // namespace metate::cuda::arch
