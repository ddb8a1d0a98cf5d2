// One running block: its threads, warps, barriers and shared memory. Private to the emulator.
#pragma once

#include <exception>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace metate::cuda::emulator {

constexpr int lanes = 32;
constexpr int max_warps = 32;
constexpr size_t large_shared = 163 * 1024, small_shared = 99 * 1024;  // what sm_80 gives one block, and sm_86
extern thread_local size_t max_shared_bytes;

bool same_place(const Site&, const Site&);
std::string describe(const Site&);

// An asynchronous copy that has not landed.
struct Copy {
    char* shared;
    const char* global;
    int valid_bytes;
    Site where;
};

struct Thread {
    Fiber fiber;
    int index;
    // While it waits: for what, where, and its part in the meeting of the warp.
    const char* waits_for;
    Site where;
    uint32_t mask;
    void* operands;
    // Oldest first. groups[i] copies belong to the i-th committed group, the rest is not committed.
    std::vector<Copy> copies;
    std::vector<size_t> groups;

    int warp() const { return index / lanes; }
    int lane() const { return index % lanes; }
};

// A vector clock orders accesses to shared memory: ticks[w] is how much of warp w's past is visible here. The warp's
// own entry counts its barriers.
struct Clock {
    uint32_t ticks[max_warps];
    void join(const Clock& other) {
        for (int w = 0; w < max_warps; ++w) ticks[w] = other.ticks[w] > ticks[w] ? other.ticks[w] : ticks[w];
    }
};

struct Warp {
    uint32_t ready, waiting, exited;  // lanes; `waiting` in a meeting of the warp
    Clock clock;
};

struct Barrier {
    int expected, arrived;
    bool any, result;
    Site where;  // of the first to arrive
    uint32_t arrivals[max_warps], sleepers[max_warps];
    Site warp_where[max_warps];
    Clock clock;
};

// Who touches shared memory: a lane, or the warp as a whole, as ldmatrix does.
constexpr uint8_t whole_warp = 32;
constexpr uint8_t several_lanes = 33;
struct Actor {
    int warp;
    uint8_t lane;
};

// Who wrote two bytes of shared memory last. A tick of 0: nobody.
struct Writer {
    uint32_t tick;
    uint8_t warp, lane;
    bool in_flight;  // the destination of a copy that has not landed
    bool operator==(const Writer&) const = default;
};

class SharedMemory {
  public:
    SharedMemory(size_t bytes, int warps);
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;

    void* base() const { return memory; }
    void poison();
    bool intact() const;  // false when plain pointers wrote beyond the ends
    bool contains(const void* address) const;
    // Where an access lies, after it was found to be aligned and inside.
    size_t offset(const void* address, size_t bytes, const char* what, const Site&) const;
    void read(Actor, size_t offset, size_t bytes, const char* what, const Site&);
    void write(Actor, size_t offset, size_t bytes, const char* what, const Site&);
    // Between these two nobody may touch the 16 bytes that an asynchronous copy writes.
    void take_off(size_t offset);
    void land(Actor, size_t offset);

  private:
    bool seen(Actor by, int warp, uint32_t tick) const;
    void check_writer(Actor, size_t granule, const char* what, const Site&) const;

    size_t bytes, count;  // of granules, two bytes each
    int warps;
    char* memory;
    std::vector<Writer> writers;
    std::vector<uint32_t> readers;  // per warp and granule: tick << 6 | lane, whole_warp or several_lanes
    std::vector<Site> writer_sites, reader_sites;
};

struct Block {
    Block(void (*body)(void*), void* context, const int (&grid)[3], int threads, size_t shared_bytes);

    void run(const int (&index)[3]);

    void (*body)(void*);
    void* context;
    const int* grid;
    int index[3];
    std::vector<Thread> threads;
    int warps;
    Warp warp[max_warps];
    Barrier barriers[16];
    SharedMemory shared;

    Fiber host;
    Thread* current = nullptr;
    std::exception_ptr failure;
    int last_warp;
    uint8_t priority[max_warps];
    bool by_priority;

    Thread* next();
    void sleep(const char* what, const Site& where);
    void finish(Thread& thread);
    void arrive(int barrier, int expected, bool wait, const char* what, const Site& where);
    std::string waiting_threads() const;

  private:
    void reset(const int (&index)[3]);
    void release(Barrier& barrier);
};

extern thread_local Block* running;

uint32_t draw();  // 32 bits from the seed

[[noreturn]] void fail(const char* what, const Site& where, const std::string& message);

// All lanes of `mask` come together; the last one to come runs act(operands of lane 0…31, mask).
void meet(const char* what, uint32_t mask, const Site& where, void* operands, void (*act)(void* const*, uint32_t));

// Bank conflicts: notes one lane's access to `bytes` bytes; close_block_traffic puts the lanes together.
void record(const char* what, const Thread&, size_t offset, size_t bytes, const Site&);
void close_block_traffic();

}  // namespace metate::cuda::emulator
