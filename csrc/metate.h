// The whole C++ vocabulary: what a kernel is told about a tensor and about the machine that runs it.
// No torch, no standard containers: these headers are compiled once per instruction set and for the GPU, where an
// out-of-line template would become a weak symbol that the linker may pick for every machine.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define METATE_INLINE __host__ __device__ __forceinline__
#else
#define METATE_INLINE __attribute__((always_inline)) inline
#endif

namespace metate {

enum class DType : int8_t { f64, f32, bf16, f16, i64, i32, u8, i8, f8 };  // f8: e4m3fn

METATE_INLINE constexpr int64_t bytes_of(DType dtype) {
    return dtype == DType::f64 || dtype == DType::i64                     ? 8
         : dtype == DType::f32 || dtype == DType::i32                     ? 4
         : dtype == DType::u8 || dtype == DType::i8 || dtype == DType::f8 ? 1
                                                                          : 2;
}

// A strided tensor. Sizes and strides count elements; a stride of 0 repeats (broadcasts) the dimension.
// An absent optional tensor has data == nullptr.
template <int N>
struct View {
    void* data;
    DType dtype;
    int64_t size[N];
    int64_t stride[N];

    METATE_INLINE explicit operator bool() const { return data != nullptr; }
};

namespace cpu {

// What a CPU kernel gets from its caller. Results never depend on `threads`: work is cut by shape, and workers fetch
// the pieces in any order.
struct Runtime {
    int threads;  // how many workers are worth starting, at least 1
    // Runs body(worker, context) for worker = 0 … workers-1, perhaps at the same time, perhaps one after another.
    void (*parallel)(int workers, void (*body)(int worker, void* context), void* context);
    // At least `bytes` of uninitialised memory, 64-byte aligned, valid until the kernel returns; one block per call of
    // the kernel (a second request invalidates the first). Throws when there is no memory: call it outside `parallel`.
    void* (*scratch)(size_t bytes);
};

}  // namespace cpu

namespace cuda {

// What a CUDA launcher gets from its caller: it launches on `stream` and never synchronises.
struct Device {
    void* stream;                                   // cudaStream_t
    int capability;                                 // 80, 90, …
    int processors;                                 // number of multiprocessors
    void* (*scratch)(size_t bytes, void* context);  // as cpu::Runtime::scratch, in device memory, stream-ordered
    void* context;
};

}  // namespace cuda
}  // namespace metate
