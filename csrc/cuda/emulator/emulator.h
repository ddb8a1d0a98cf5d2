// The SIMT emulator: what the instructions of arch/ mean, run on a CPU by one fiber per CUDA thread, block after block.
// It is adversarial where the hardware may be: threads run in an order drawn from the seed, shared memory starts as
// NaN, asynchronous copies land only at the wait that guarantees them. What a kernel may not do becomes an Error that
// names the place.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../metate.h"

namespace metate::cuda::emulator {

using Site = std::source_location;

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// ---- The host's side ------------------------------------------------------------------------------------------------

// The order in which threads run, from the next launch of this host thread on. Equal seeds give equal runs.
void set_seed(uint64_t seed);

// A machine for the launchers of metate::cuda, of two processors, its scratch on the host and filled with NaN: sm_80,
// or sm_86 with the least shared memory that any GPU since has. Without a capability either, by the seed.
Device device(int capability = 0);

// Shared-memory traffic of one place in a kernel: `wavefronts` is what the accesses took, `ideal` what they would take
// without bank conflicts.
struct Traffic {
    std::string place;  // file:line and instruction
    int64_t accesses, wavefronts, ideal;
};

// Counts bank conflicts in the launches of this host thread between count_traffic(true) and traffic().
void count_traffic(bool on);
std::vector<Traffic> traffic();

// Runs body(context) once per thread of the grid.
void run_grid(void (*body)(void*), void* context, const int (&grid)[3], int block, size_t shared_bytes);

// ---- The device's side: called from inside a kernel, through arch/ --------------------------------------------------

int thread_index();
int block_size();
const int* block_index();
const int* grid_size();
void* shared_memory();

void sync_threads(const Site&);
bool sync_threads_or(bool predicate, const Site&);
void barrier_sync(int barrier, int threads, const Site&);
void barrier_arrive(int barrier, int threads, const Site&);
void sync_warp(uint32_t mask, const Site&);
uint32_t ballot(bool predicate, uint32_t mask, const Site&);

enum class Shuffle { index, flip, down };
uint32_t shuffle_word(Shuffle, uint32_t value, int operand, uint32_t mask, const Site&);

template <typename T>
T shuffle(Shuffle kind, T value, int operand, uint32_t mask, const Site& where) {
    static_assert(sizeof(T) == 4);
    return __builtin_bit_cast(T, shuffle_word(kind, __builtin_bit_cast(uint32_t, value), operand, mask, where));
}

// The checks before an access of `bytes` bytes, a power of two.
void check_shared_load(const void* address, size_t bytes, const Site&);
void check_shared_store(const void* address, size_t bytes, const Site&);
void check_global(const void* address, size_t bytes, const char* what, const Site&);
void atomic_add(float* global, const float* values, int count, const Site&);

void cp_async_16(void* shared, const void* global, int valid_bytes, const Site&);
void cp_async_commit();
void cp_async_wait(int pending);

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, const Site&);
void mma_m16n8k16(bool is_bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site&);

// Conversions, round to nearest even; every NaN becomes 0x7fff as on the GPU.
uint16_t round(bool is_bf16, float value);
float widen(bool is_bf16, uint16_t bits);

// The approximations: subnormals are flushed, and fast_tanh has no more digits than the GPU promises.
float fast_exp2(float);
float fast_log2(float);
float fast_reciprocal(float);
float fast_tanh(float);

}  // namespace metate::cuda::emulator
