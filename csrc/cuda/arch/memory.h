// Loads, stores, asynchronous copies and atomics. Shared memory goes through these functions, never through plain
// pointers: that is how the emulator sees misalignment, accesses out of bounds, races and bank conflicts.
#pragma once

#include "platform.h"

namespace metate::cuda::arch {

#if defined(__CUDACC__)
METATE_DEVICE uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The same addresses, of which the compiler knows where they lead. Told by __builtin_assume, nvcc 13.0 took code that
// runs for code that cannot, and left it out.
METATE_DEVICE void* in_shared(const void* address) {
    return __cvta_shared_to_generic(__cvta_generic_to_shared(address));
}
METATE_DEVICE void* in_global(const void* address) {
    return __cvta_global_to_generic(__cvta_generic_to_global(address));
}
#endif

// T is any plain type of 2, 4, 8 or 16 bytes and the address a multiple of its size: load_shared<Words<4>>(p).
template <typename T>
METATE_DEVICE T load_shared(const void* address METATE_SITE) {
#if defined(__CUDACC__)
    if constexpr (sizeof(T) == 16) {
        const uint4 value = *static_cast<const uint4*>(in_shared(address));
        return reinterpret_cast<const T&>(value);
    } else {
        return *static_cast<const T*>(in_shared(address));
    }
#else
    emulator::check_shared_load(address, sizeof(T), where);
    T value;
    __builtin_memcpy(&value, address, sizeof(T));
    return value;
#endif
}

template <typename T>
METATE_DEVICE void store_shared(void* address, const T& value METATE_SITE) {
#if defined(__CUDACC__)
    if constexpr (sizeof(T) == 16) {
        *static_cast<uint4*>(in_shared(address)) = reinterpret_cast<const uint4&>(value);
    } else {
        *static_cast<T*>(in_shared(address)) = value;
    }
#else
    emulator::check_shared_store(address, sizeof(T), where);
    __builtin_memcpy(address, &value, sizeof(T));
#endif
}

template <typename T>
METATE_DEVICE T load_global(const void* address METATE_SITE) {
#if defined(__CUDACC__)
    if constexpr (sizeof(T) == 16) {
        const uint4 value = *static_cast<const uint4*>(in_global(address));
        return reinterpret_cast<const T&>(value);
    } else {
        return *static_cast<const T*>(in_global(address));
    }
#else
    emulator::check_global(address, sizeof(T), "load_global", where);
    T value;
    __builtin_memcpy(&value, address, sizeof(T));
    return value;
#endif
}

template <typename T>
METATE_DEVICE void store_global(void* address, const T& value METATE_SITE) {
#if defined(__CUDACC__)
    if constexpr (sizeof(T) == 16) {
        *static_cast<uint4*>(in_global(address)) = reinterpret_cast<const uint4&>(value);
    } else {
        *static_cast<T*>(in_global(address)) = value;
    }
#else
    emulator::check_global(address, sizeof(T), "store_global", where);
    __builtin_memcpy(address, &value, sizeof(T));
#endif
}

// Copies valid_bytes (0…16) bytes of global memory and zeros up to 16, both addresses multiples of 16. Nobody may
// read the destination before this thread's cp_async_wait, other threads not before a barrier after it.
METATE_DEVICE void cp_async_16(void* shared, const void* global, int valid_bytes METATE_SITE) {
#if defined(__CUDACC__)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid_bytes));
#else
    emulator::cp_async_16(shared, global, valid_bytes, where);
#endif
}

// Closes the group of all copies that this thread issued since the last commit; an empty group counts.
METATE_DEVICE void cp_async_commit() {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulator::cp_async_commit();
#endif
}

// Waits until at most the `pending` last committed groups of this thread are still under way.
template <int pending>
METATE_DEVICE void cp_async_wait() {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
    emulator::cp_async_wait(pending);
#endif
}

METATE_DEVICE void atomic_add(float* global, float value METATE_SITE) {
#if defined(__CUDACC__)
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "f"(value) : "memory");
#else
    emulator::atomic_add(global, &value, 1, where);
#endif
}

// Two neighbours, at a multiple of 8 bytes; each is added atomically, not the pair.
METATE_DEVICE void atomic_add(float* global, const float (&values)[2] METATE_SITE) {
#if defined(__CUDACC__)
    atomic_add(global, values[0]);
    atomic_add(global + 1, values[1]);
#else
    emulator::atomic_add(global, values, 2, where);
#endif
}

}  // namespace metate::cuda::arch
