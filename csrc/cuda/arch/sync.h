// Barriers, fences, and the instructions through which the lanes of a warp talk to one another.
#pragma once

#include "platform.h"

namespace metate::cuda::arch {

// All threads of the block, which must all call it at the same place.
METATE_DEVICE void sync_threads(METATE_SITE_ALONE) {
#if defined(__CUDACC__)
    __syncthreads();
#else
    emulator::sync_threads(where);
#endif
}

// sync_threads that also tells every thread whether any of them passed true.
METATE_DEVICE bool sync_threads_or(bool predicate METATE_SITE) {
#if defined(__CUDACC__)
    return __syncthreads_or(predicate) != 0;
#else
    return emulator::sync_threads_or(predicate, where);
#endif
}

// Named barrier 1…15 over `threads` threads, a multiple of 32, whole warps only (0 is sync_threads).
METATE_DEVICE void barrier_sync(int barrier, int threads METATE_SITE) {
#if defined(__CUDACC__)
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
    emulator::barrier_sync(barrier, threads, where);
#endif
}

// Counts this thread as arrived at the named barrier without waiting for the others.
METATE_DEVICE void barrier_arrive(int barrier, int threads METATE_SITE) {
#if defined(__CUDACC__)
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
    emulator::barrier_arrive(barrier, threads, where);
#endif
}

// Orders memory among the lanes of `mask`; the shuffles and votes below do not.
METATE_DEVICE void sync_warp(uint32_t mask = full_warp METATE_SITE) {
#if defined(__CUDACC__)
    __syncwarp(mask);
#else
    emulator::sync_warp(mask, where);
#endif
}

// Makes earlier global writes of this thread visible to the device before its later ones.
METATE_DEVICE void memory_fence() {
#if defined(__CUDACC__)
    __threadfence();
#endif
}

// The value of lane `source % 32`. T is float, int or uint32_t, as for all shuffles.
template <typename T>
METATE_DEVICE T shuffle(T value, int source, uint32_t mask = full_warp METATE_SITE) {
#if defined(__CUDACC__)
    return __shfl_sync(mask, value, source);
#else
    return emulator::shuffle(emulator::Shuffle::index, value, source, mask, where);
#endif
}

// The value of lane `lane() ^ flip`, flip < 32.
template <typename T>
METATE_DEVICE T shuffle_xor(T value, int flip, uint32_t mask = full_warp METATE_SITE) {
#if defined(__CUDACC__)
    return __shfl_xor_sync(mask, value, flip);
#else
    return emulator::shuffle(emulator::Shuffle::flip, value, flip, mask, where);
#endif
}

// The value of lane `lane() + distance`, or one's own beyond the last lane.
template <typename T>
METATE_DEVICE T shuffle_down(T value, int distance, uint32_t mask = full_warp METATE_SITE) {
#if defined(__CUDACC__)
    return __shfl_down_sync(mask, value, distance);
#else
    return emulator::shuffle(emulator::Shuffle::down, value, distance, mask, where);
#endif
}

METATE_DEVICE uint32_t vote_ballot(bool predicate, uint32_t mask = full_warp METATE_SITE) {
#if defined(__CUDACC__)
    return __ballot_sync(mask, predicate);
#else
    return emulator::ballot(predicate, mask, where);
#endif
}

METATE_DEVICE bool vote_any(bool predicate, uint32_t mask = full_warp METATE_SITE) {
#if defined(__CUDACC__)
    return __any_sync(mask, predicate) != 0;
#else
    return emulator::ballot(predicate, mask, where) != 0;
#endif
}

METATE_DEVICE bool vote_all(bool predicate, uint32_t mask = full_warp METATE_SITE) {
#if defined(__CUDACC__)
    return __all_sync(mask, predicate) != 0;
#else
    return emulator::ballot(predicate, mask, where) == mask;
#endif
}

}  // namespace metate::cuda::arch
