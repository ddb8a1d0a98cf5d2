// Starting a kernel from the host.
#pragma once

#include "platform.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

namespace metate::cuda::arch {

#if defined(__CUDACC__)
inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#endif

// Bytes of shared memory that a block may have on a GPU.
inline int64_t shared_limit(const Device& device) {
    const bool large = device.capability == 80 || device.capability == 87;
    return (large ? 163 : device.capability >= 90 && device.capability < 120 ? 227 : 99) * 1024;
}

// One copy of `parameters` for all threads. An empty grid runs nothing. Throws std::runtime_error when CUDA refuses,
// or, under the emulator, when the kernel does what it may not.
template <typename Parameters>
void launch(void (*kernel)(Parameters), Dim3 grid, int block, size_t shared_bytes, void* stream,
            const Parameters& parameters) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(__CUDACC__)
    if (shared_bytes > 48 * 1024) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
              "metate: more shared memory than the GPU has");
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    config.blockDim = dim3(static_cast<unsigned>(block));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, parameters), "metate: kernel launch failed");
#else
    (void)stream;
    struct Call {
        void (*kernel)(Parameters);
        const Parameters* parameters;
    } call{kernel, &parameters};
    const int size[3] = {grid.x, grid.y, grid.z};
    emulator::run_grid(
        [](void* context) {
            const auto* c = static_cast<const Call*>(context);
            c->kernel(*c->parameters);
        },
        &call, size, block, shared_bytes);
#endif
}

// Stream-ordered fill of device memory with a byte.
inline void fill_bytes(void* memory, int byte, size_t count, void* stream) {
#if defined(__CUDACC__)
    check(cudaMemsetAsync(memory, byte, count, static_cast<cudaStream_t>(stream)), "metate: memset failed");
#else
    (void)stream;
    __builtin_memset(memory, byte, count);
#endif
}

}  // namespace metate::cuda::arch
