// The scheduler: which thread runs next, who waits for whom, and what it means when nobody can go on.
#include "machine.h"

#include <string.h>

#include <algorithm>
#include <bit>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace metate::cuda::emulator {

thread_local Block* running = nullptr;
thread_local size_t max_shared_bytes = large_shared;

namespace {

thread_local uint64_t random_state = 1;
thread_local std::vector<Stack> stacks;

void thread_main() {
    arrived();
    Block& block = *running;
    Thread& thread = *block.current;
    Thread* next = nullptr;
    try {
        block.body(block.context);
        block.finish(thread);
        next = block.next();
    } catch (...) {
        block.failure = std::current_exception();
    }
    block.current = next;
    switch_fiber(thread.fiber, next ? next->fiber : block.host, true);
    __builtin_unreachable();
}

// "threads 0-31, 64"
std::string ranges(const std::vector<int>& sorted) {
    std::string text = sorted.size() == 1 ? "thread " : "threads ";
    for (size_t i = 0; i < sorted.size();) {
        size_t j = i;
        while (j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1) ++j;
        if (i) text += ", ";
        text += std::to_string(sorted[i]);
        if (j > i) text += "-", text += std::to_string(sorted[j]);
        i = j + 1;
    }
    return text;
}

}  // namespace

void set_seed(uint64_t seed) {
    random_state = seed * 0x9e3779b97f4a7c15u | 1;
}

uint32_t draw() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<uint32_t>(random_state * 0x2545f4914f6cdd1du >> 32);
}

bool same_place(const Site& a, const Site& b) {
    return a.line() == b.line() && a.column() == b.column() &&
           (a.file_name() == b.file_name() || !strcmp(a.file_name(), b.file_name()));
}

std::string describe(const Site& where) {
    return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

void fail(const char* what, const Site& where, const std::string& message) {
    std::string text = describe(where) + ": " + what + ": " + message;
    if (running && running->current) {
        const int* index = running->index;
        text += " (block " + std::to_string(index[0]) + ", " + std::to_string(index[1]) + ", " +
                std::to_string(index[2]) + ", thread " + std::to_string(running->current->index) + ")";
    }
    throw Error(text);
}

Block::Block(void (*body)(void*), void* context, const int (&grid)[3], int threads, size_t shared_bytes)
    : body(body),
      context(context),
      grid(grid),
      threads(static_cast<size_t>(threads)),
      warps(threads / lanes),
      shared(shared_bytes, warps) {
    while (stacks.size() < this->threads.size()) stacks.emplace_back();
}

void Block::reset(const int (&at)[3]) {
    std::copy(at, at + 3, index);
    for (size_t i = 0; i < threads.size(); ++i) {
        Thread& thread = threads[i];
        thread.index = static_cast<int>(i);
        thread.waits_for = nullptr;
        thread.copies.clear();
        thread.groups.clear();
        prepare(thread.fiber, stacks[i], thread_main);
    }
    for (int w = 0; w < warps; ++w) {
        warp[w] = Warp{.ready = ~0u, .waiting = 0, .exited = 0, .clock = {}};
        warp[w].clock.ticks[w] = 1;
        priority[w] = static_cast<uint8_t>(w);
    }
    for (Barrier& barrier : barriers) barrier = Barrier{};
    // Half of the blocks let some warps run far ahead of others, the rest mixes them finely.
    by_priority = draw() & 1;
    for (int w = warps - 1; w > 0; --w) std::swap(priority[w], priority[draw() % static_cast<uint32_t>(w + 1)]);
    last_warp = 0;
    shared.poison();
}

void Block::run(const int (&at)[3]) {
    reset(at);
    failure = nullptr;
    current = next();
    switch_fiber(host, current->fiber);
    if (failure) std::rethrow_exception(failure);
    for (int w = 0; w < warps; ++w) {
        if (~warp[w].exited) {
            throw Error("deadlock in block " + std::to_string(index[0]) + ", " + std::to_string(index[1]) + ", " +
                        std::to_string(index[2]) + ": " + waiting_threads());
        }
    }
    if (!shared.intact()) throw Error("a plain pointer wrote outside the block's shared memory");
    close_block_traffic();
}

// A ready thread by the schedule, nullptr when there is none. A warp keeps going most of the time: the other orders
// differ only between barriers, and the caches of the host like it.
Thread* Block::next() {
    const uint32_t random = draw();
    int chosen = -1;
    if (warp[last_warp].ready && random >> 28) {
        chosen = last_warp;
    } else {
        const int start = by_priority ? 0 : static_cast<int>(draw() % static_cast<uint32_t>(warps));
        for (int i = 0; i < warps && chosen < 0; ++i) {
            const int turn = start + i;
            const int w = priority[turn < warps ? turn : turn - warps];
            if (warp[w].ready) chosen = w;
        }
    }
    if (chosen < 0) return nullptr;
    last_warp = chosen;
    const uint32_t turn = random % lanes;
    const uint32_t lane =
        (static_cast<uint32_t>(std::countr_zero(std::rotr(warp[chosen].ready, static_cast<int>(turn)))) + turn) % lanes;
    return &threads[static_cast<size_t>(chosen) * lanes + lane];
}

void Block::sleep(const char* what, const Site& where) {
    Thread& self = *current;
    self.waits_for = what;
    self.where = where;
    warp[self.warp()].ready &= ~(1u << self.lane());
    Thread* other = next();
    current = other;
    switch_fiber(self.fiber, other ? other->fiber : host);
    self.waits_for = nullptr;
}

// A thread leaves the kernel: nobody may be waiting for it.
void Block::finish(Thread& thread) {
    Warp& own = warp[thread.warp()];
    const uint32_t bit = 1u << thread.lane();
    own.ready &= ~bit;
    own.exited |= bit;
    for (uint32_t rest = own.waiting; rest; rest &= rest - 1) {
        const Thread& other = threads[static_cast<size_t>(thread.warp() * lanes + std::countr_zero(rest))];
        if (other.mask & bit) {
            fail(other.waits_for, other.where, "a lane of the mask has left the kernel; " + waiting_threads());
        }
    }
    if (barriers[0].arrived) {
        fail("sync_threads", barriers[0].where, "not reached by all threads of the block; " + waiting_threads());
    }
}

std::string Block::waiting_threads() const {
    std::string text;
    std::vector<bool> told(threads.size());
    for (size_t i = 0; i < threads.size(); ++i) {
        const Thread& first = threads[i];
        if (told[i] || !first.waits_for) continue;
        std::vector<int> group;
        for (size_t j = i; j < threads.size(); ++j) {
            if (threads[j].waits_for == first.waits_for && same_place(threads[j].where, first.where)) {
                told[j] = true;
                group.push_back(static_cast<int>(j));
            }
        }
        text += (text.empty() ? "" : "; ") + ranges(group) + " wait at " + describe(first.where) + " (" +
                first.waits_for + ")";
    }
    std::vector<int> gone;
    for (const Thread& thread : threads) {
        if (warp[thread.warp()].exited >> thread.lane() & 1) gone.push_back(thread.index);
    }
    if (!gone.empty()) text += (text.empty() ? "" : "; ") + ranges(gone) + " left the kernel";
    return text;
}

void Block::release(Barrier& barrier) {
    for (int w = 0; w < warps; ++w) {
        const uint32_t sleepers = barrier.sleepers[w];
        if (!sleepers) continue;
        warp[w].ready |= sleepers;
        warp[w].clock.join(barrier.clock);
        ++warp[w].clock.ticks[w];
    }
    const bool any = barrier.any;
    barrier = Barrier{};
    barrier.result = any;
}

void Block::arrive(int id, int expected, bool wait, const char* what, const Site& where) {
    Thread& self = *current;
    const int w = self.warp();
    const uint32_t bit = 1u << self.lane();
    Barrier& barrier = barriers[id];
    if (!barrier.arrived) {
        barrier.expected = expected;
        barrier.where = where;
    }
    if (barrier.expected != expected) {
        fail(what, where,
             "barrier " + std::to_string(id) + " for " + std::to_string(expected) + " threads, but for " +
                 std::to_string(barrier.expected) + " at " + describe(barrier.where));
    }
    const Site& other = id == 0 ? barrier.where : barrier.warp_where[w];
    if ((id == 0 || barrier.arrivals[w]) && !same_place(other, where)) {
        fail(what, where,
             std::string("other threads of the ") + (id == 0 ? "block" : "warp") + " came to the same barrier at " +
                 describe(other));
    }
    if (barrier.arrivals[w] & bit) fail(what, where, "the thread came twice to one phase of the barrier");
    barrier.warp_where[w] = where;
    barrier.arrivals[w] |= bit;
    ++barrier.arrived;
    barrier.clock.join(warp[w].clock);
    if (wait) barrier.sleepers[w] |= bit;
    if (!wait && barrier.arrivals[w] == ~0u) ++warp[w].clock.ticks[w];
    if (barrier.arrived == barrier.expected) {
        for (int i = 0; i < warps; ++i) {
            if (barrier.arrivals[i] && ~barrier.arrivals[i]) {
                fail(what, where, "the barrier is full, but of warp " + std::to_string(i) + " only some threads came");
            }
        }
        release(barrier);
    } else if (wait) {
        sleep(what, where);
    }
}

void meet(const char* what, uint32_t mask, const Site& where, void* operands, void (*act)(void* const*, uint32_t)) {
    Block& block = *running;
    Thread& self = *block.current;
    Warp& warp = block.warp[self.warp()];
    const uint32_t bit = 1u << self.lane();
    if (!(mask & bit)) fail(what, where, "the calling lane is not in the mask");
    if (mask & warp.exited) fail(what, where, "a lane of the mask has left the kernel");
    Thread* const first = &block.threads[static_cast<size_t>(self.warp() * lanes)];
    for (uint32_t rest = warp.waiting; rest; rest &= rest - 1) {
        const Thread& other = first[std::countr_zero(rest)];
        if (!(other.mask & mask)) continue;
        if (other.mask != mask || other.waits_for != what || !same_place(other.where, where)) {
            fail(what, where,
                 "divergent warp: lane " + std::to_string(other.lane()) + " waits at " + describe(other.where) + " (" +
                     other.waits_for + ")" + (other.mask != mask ? " with another mask" : ""));
        }
        break;  // those with this mask have been compared with one another
    }
    self.mask = mask;
    self.operands = operands;
    warp.waiting |= bit;
    if ((warp.waiting & mask) != mask) {
        block.sleep(what, where);
        return;
    }
    warp.waiting &= ~mask;
    void* all[lanes];
    for (int i = 0; i < lanes; ++i) all[i] = first[i].operands;
    act(all, mask);
    warp.ready |= mask;
}

void sync_threads(const Site& where) {
    running->arrive(0, static_cast<int>(running->threads.size()), true, "sync_threads", where);
}

bool sync_threads_or(bool predicate, const Site& where) {
    running->barriers[0].any |= predicate;
    running->arrive(0, static_cast<int>(running->threads.size()), true, "sync_threads_or", where);
    return running->barriers[0].result;
}

namespace {

void check_barrier(int barrier, int threads, const char* what, const Site& where) {
    if (barrier < 1 || barrier > 15) fail(what, where, "barrier " + std::to_string(barrier) + ": 1 to 15");
    if (threads <= 0 || threads % lanes || threads > block_size()) {
        fail(what, where, std::to_string(threads) + " threads: a multiple of 32 up to the size of the block");
    }
}

}  // namespace

void barrier_sync(int barrier, int threads, const Site& where) {
    check_barrier(barrier, threads, "barrier_sync", where);
    running->arrive(barrier, threads, true, "barrier_sync", where);
}

void barrier_arrive(int barrier, int threads, const Site& where) {
    check_barrier(barrier, threads, "barrier_arrive", where);
    running->arrive(barrier, threads, false, "barrier_arrive", where);
}

void sync_warp(uint32_t mask, const Site& where) {
    meet("sync_warp", mask, where, nullptr, [](void* const*, uint32_t) {
        const int w = running->current->warp();
        ++running->warp[w].clock.ticks[w];
    });
}

int thread_index() {
    return running->current->index;
}
int block_size() {
    return static_cast<int>(running->threads.size());
}
const int* block_index() {
    return running->index;
}
const int* grid_size() {
    return running->grid;
}
void* shared_memory() {
    return running->shared.base();
}

void run_grid(void (*body)(void*), void* context, const int (&grid)[3], int threads, size_t shared_bytes) {
    if (running) throw Error("a kernel cannot launch a kernel");
    if (threads <= 0 || threads % lanes || threads > lanes * max_warps) {
        throw Error("a block of " + std::to_string(threads) + " threads: a multiple of 32 up to 1024");
    }
    if (shared_bytes > max_shared_bytes) {
        throw Error(std::to_string(shared_bytes) + " bytes of shared memory: up to " +
                    std::to_string(max_shared_bytes));
    }
    if (grid[0] <= 0 || grid[1] <= 0 || grid[1] > 65535 || grid[2] <= 0 || grid[2] > 65535) {
        throw Error("a grid of " + std::to_string(grid[0]) + " × " + std::to_string(grid[1]) + " × " +
                    std::to_string(grid[2]) + " blocks: each at least 1, y and z up to 65535");
    }
    Block block(body, context, grid, threads, shared_bytes);
    struct Running {
        explicit Running(Block* block) { running = block; }
        ~Running() { running = nullptr; }
    } scope(&block);
    // Blocks come in any order on a GPU: here from a random one on, forwards or backwards.
    const int64_t count = int64_t{1} * grid[0] * grid[1] * grid[2];
    const int64_t start = draw() % count;
    const bool backwards = draw() & 1;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t n = (start + (backwards ? count - 1 - i : i)) % count;
        block.run({static_cast<int>(n % grid[0]), static_cast<int>(n / grid[0] % grid[1]),
                   static_cast<int>(n / grid[0] / grid[1])});
    }
}

}  // namespace metate::cuda::emulator
