// Shared memory with its checks (bounds, alignment, races), asynchronous copies, global accesses, bank conflicts.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace metate::cuda::emulator {
namespace {

constexpr size_t margin = 128;  // on both sides of shared memory; also its alignment
constexpr int canary = 0xc5;
constexpr int poison_byte = 0xff;  // NaN in every floating-point type
constexpr size_t granule_bytes = 2;

std::string hex(const void* address) {
    char text[24];
    snprintf(text, sizeof text, "%p", address);
    return text;
}

Actor self() {
    return {running->current->warp(), static_cast<uint8_t>(running->current->lane())};
}

}  // namespace

SharedMemory::SharedMemory(size_t bytes, int warps)
    : bytes(bytes),
      count((bytes + granule_bytes - 1) / granule_bytes),
      warps(warps),
      writers(count),
      readers(count * static_cast<size_t>(warps)),
      writer_sites(count),
      reader_sites(count) {
    const size_t total = (bytes + 3 * margin - 1) / margin * margin;
    char* whole = static_cast<char*>(aligned_alloc(margin, total));
    if (!whole) throw std::bad_alloc();
    memset(whole, canary, total);
    memory = whole + margin;
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(whole, margin);
    __asan_poison_memory_region(memory + bytes, total - margin - bytes);
#endif
}

SharedMemory::~SharedMemory() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory - margin, (bytes + 3 * margin - 1) / margin * margin);
#endif
    free(memory - margin);
}

void SharedMemory::poison() {
    memset(memory, poison_byte, bytes);
    std::fill(writers.begin(), writers.end(), Writer{});
    std::fill(readers.begin(), readers.end(), 0u);
}

bool SharedMemory::intact() const {
#if defined(__SANITIZE_ADDRESS__)
    return true;  // the sanitizer has seen it, and more
#else
    const auto untouched = [](char c) { return c == static_cast<char>(canary); };
    return std::all_of(memory - margin, memory, untouched) &&
           std::all_of(memory + bytes, memory + bytes + margin, untouched);
#endif
}

bool SharedMemory::contains(const void* address) const {
    const char* p = static_cast<const char*>(address);
    return p >= memory && p < memory + bytes;
}

size_t SharedMemory::offset(const void* address, size_t size, const char* what, const Site& where) const {
    const auto offset = reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(memory);
    if (reinterpret_cast<uintptr_t>(address) & (size - 1)) {
        fail(what, where,
             "byte " + std::to_string(offset) + " of shared memory is not a multiple of " + std::to_string(size));
    }
    if (offset < 0 || static_cast<size_t>(offset) + size > bytes) {
        fail(what, where,
             "bytes " + std::to_string(offset) + " to " + std::to_string(offset + static_cast<intptr_t>(size)) +
                 " of the block's " + std::to_string(bytes) + " bytes of shared memory");
    }
    return static_cast<size_t>(offset);
}

bool SharedMemory::seen(Actor by, int warp, uint32_t tick) const {
    const uint32_t known = running->warp[by.warp].clock.ticks[warp];
    return warp == by.warp ? tick < known : tick <= known;
}

void SharedMemory::check_writer(Actor by, size_t granule, const char* what, const Site& where) const {
    const Writer& writer = writers[granule];
    if (writer.in_flight) {
        fail(what, where,
             "race: the asynchronous copy of " + describe(writer_sites[granule]) +
                 " to this place has not been waited for");
    }
    if (!writer.tick || (writer.warp == by.warp && writer.lane == by.lane)) return;
    if (!seen(by, writer.warp, writer.tick)) {
        fail(what, where,
             "race: no barrier since warp " + std::to_string(writer.warp) + ", lane " + std::to_string(writer.lane) +
                 " wrote here at " + describe(writer_sites[granule]));
    }
}

void SharedMemory::read(Actor by, size_t offset, size_t size, const char* what, const Site& where) {
    const size_t first = offset / granule_bytes, end = (offset + size + 1) / granule_bytes;
    uint32_t* const own = readers.data() + static_cast<size_t>(by.warp) * count;
    const uint32_t now = running->warp[by.warp].clock.ticks[by.warp];
    for (size_t g = first; g < end; ++g) {
        if (g == first || !(writers[g] == writers[g - 1])) check_writer(by, g, what, where);
        const uint32_t other = own[g] >> 6 == now ? own[g] & 63 : uint32_t{by.lane};
        const bool alone = other == by.lane || other == whole_warp;
        own[g] = now << 6 | (alone ? by.lane : by.lane == whole_warp ? other : uint32_t{several_lanes});
        reader_sites[g] = where;
    }
}

void SharedMemory::write(Actor by, size_t offset, size_t size, const char* what, const Site& where) {
    const size_t first = offset / granule_bytes, end = (offset + size + 1) / granule_bytes;
    for (int w = 0; w < warps; ++w) {
        uint32_t* const theirs = readers.data() + static_cast<size_t>(w) * count;
        uint32_t last = 0;
        for (size_t g = first; g < end; ++g) {
            const uint32_t reader = theirs[g];
            theirs[g] = 0;
            if (reader == last) continue;
            last = reader;
            // ldmatrix has read when it returns, so what its own warp writes next comes after it.
            const bool own = w == by.warp && ((reader & 63) == by.lane || (reader & 63) == whole_warp);
            if (reader && !own && !seen(by, w, reader >> 6)) {
                fail(what, where,
                     "race: no barrier since warp " + std::to_string(w) + " read here at " + describe(reader_sites[g]));
            }
        }
    }
    for (size_t g = first; g < end; ++g) {
        if (g == first || !(writers[g] == writers[g - 1])) check_writer(by, g, what, where);
    }
    const Writer self{running->warp[by.warp].clock.ticks[by.warp], static_cast<uint8_t>(by.warp), by.lane, false};
    for (size_t g = first; g < end; ++g) {
        writers[g] = self;
        writer_sites[g] = where;
    }
}

void SharedMemory::take_off(size_t offset) {
    memset(memory + offset, poison_byte, 16);
    for (size_t i = 0; i < 16 / granule_bytes; ++i) writers[offset / granule_bytes + i].in_flight = true;
}

void SharedMemory::land(Actor by, size_t offset) {
    const uint32_t now = running->warp[by.warp].clock.ticks[by.warp];
    for (size_t i = 0; i < 16 / granule_bytes; ++i) {
        Writer& writer = writers[offset / granule_bytes + i];
        writer.in_flight = false;
        writer.tick = now;
    }
}

void check_global(const void* address, size_t bytes, const char* what, const Site& where) {
    if (!address) fail(what, where, "null pointer");
    if (running->shared.contains(address)) fail(what, where, hex(address) + " lies in shared memory, not in global");
    if (reinterpret_cast<uintptr_t>(address) & (bytes - 1)) {
        fail(what, where, hex(address) + " is not a multiple of " + std::to_string(bytes));
    }
}

void check_shared_load(const void* address, size_t bytes, const Site& where) {
    SharedMemory& shared = running->shared;
    const size_t offset = shared.offset(address, bytes, "load_shared", where);
    shared.read(self(), offset, bytes, "load_shared", where);
    record("load_shared", *running->current, offset, bytes, where);
}

void check_shared_store(const void* address, size_t bytes, const Site& where) {
    SharedMemory& shared = running->shared;
    const size_t offset = shared.offset(address, bytes, "store_shared", where);
    shared.write(self(), offset, bytes, "store_shared", where);
    record("store_shared", *running->current, offset, bytes, where);
}

// Blocks run one after another and threads change only at meetings, so a plain addition is atomic.
void atomic_add(float* global, const float* values, int count, const Site& where) {
    check_global(global, sizeof(float) * static_cast<size_t>(count), "atomic_add", where);
    for (int i = 0; i < count; ++i) global[i] += values[i];
}

void cp_async_16(void* shared, const void* global, int valid_bytes, const Site& where) {
    const char* what = "cp_async_16";
    if (valid_bytes < 0 || valid_bytes > 16) fail(what, where, std::to_string(valid_bytes) + " valid bytes: 0 to 16");
    const size_t offset = running->shared.offset(shared, 16, what, where);
    if (valid_bytes) check_global(global, 16, what, where);
    running->shared.write(self(), offset, 16, what, where);
    running->shared.take_off(offset);
    record(what, *running->current, offset, 16, where);
    running->current->copies.push_back(
        {static_cast<char*>(shared), static_cast<const char*>(global), valid_bytes, where});
}

void cp_async_commit() {
    Thread& thread = *running->current;
    size_t committed = 0;
    for (size_t group : thread.groups) committed += group;
    thread.groups.push_back(thread.copies.size() - committed);
}

void cp_async_wait(int pending) {
    Thread& thread = *running->current;
    while (thread.groups.size() > static_cast<size_t>(pending)) {
        const auto end = thread.copies.begin() + static_cast<ptrdiff_t>(thread.groups.front());
        for (auto copy = thread.copies.begin(); copy != end; ++copy) {
            const auto valid = static_cast<size_t>(copy->valid_bytes);
            if (valid) memcpy(copy->shared, copy->global, valid);
            memset(copy->shared + valid, 0, 16 - valid);
            running->shared.land(self(), running->shared.offset(copy->shared, 16, "cp_async_wait", copy->where));
        }
        thread.copies.erase(thread.copies.begin(), end);
        thread.groups.erase(thread.groups.begin());
    }
}

// ---- Bank conflicts -------------------------------------------------------------------------------------------------

namespace {

struct Access {
    int warp, occurrence, lane;  // the lanes' n-th accesses at one place belong together
    size_t offset;
};

struct Counter {
    const char* what;
    size_t bytes;
    Traffic total;
    std::vector<Access> accesses;  // of the running block
    std::vector<int> occurrences;  // per thread
};

thread_local bool counting;
thread_local std::map<std::string, Counter> counters;

// One wavefront serves every bank once. Accesses of 8 and 16 bytes go by half and quarter warps.
void count_wavefronts(Counter& counter, const Access* accesses, size_t count) {
    const int lanes_at_once = counter.bytes <= 4 ? 32 : static_cast<int>(128 / counter.bytes);
    for (int first = 0; first < lanes; first += lanes_at_once) {
        std::vector<size_t> words;
        for (size_t i = 0; i < count; ++i) {
            if (accesses[i].lane < first || accesses[i].lane >= first + lanes_at_once) continue;
            for (size_t b = 0; b < counter.bytes; b += 4) words.push_back((accesses[i].offset + b) / 4);
        }
        if (words.empty()) continue;
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        int64_t banks[32] = {};
        for (size_t word : words) ++banks[word % 32];
        counter.total.wavefronts += *std::max_element(banks, banks + 32);
        counter.total.ideal += static_cast<int64_t>((words.size() + 31) / 32);
    }
    ++counter.total.accesses;
}

}  // namespace

void count_traffic(bool on) {
    counting = on;
    counters.clear();
}

std::vector<Traffic> traffic() {
    std::vector<Traffic> all;
    for (const auto& [place, counter] : counters) all.push_back(counter.total);
    return all;
}

void record(const char* what, const Thread& thread, size_t offset, size_t bytes, const Site& where) {
    if (!counting) return;
    const std::string place = describe(where) + ":" + std::to_string(where.column()) + " " + what;
    Counter& counter = counters.try_emplace(place, Counter{what, bytes, {place, 0, 0, 0}, {}, {}}).first->second;
    counter.occurrences.resize(running->threads.size());
    int& occurrence = counter.occurrences[static_cast<size_t>(thread.index)];
    counter.accesses.push_back({thread.warp(), occurrence++, thread.lane(), offset});
}

void close_block_traffic() {
    for (auto& [place, counter] : counters) {
        auto& all = counter.accesses;
        std::sort(all.begin(), all.end(), [](const Access& a, const Access& b) {
            return a.warp != b.warp ? a.warp < b.warp : a.occurrence < b.occurrence;
        });
        for (size_t i = 0; i < all.size();) {
            size_t j = i;
            while (j < all.size() && all[j].warp == all[i].warp && all[j].occurrence == all[i].occurrence) ++j;
            count_wavefronts(counter, &all[i], j - i);
            i = j;
        }
        all.clear();
        counter.occurrences.clear();
    }
}

// ---- A machine for the launchers ------------------------------------------------------------------------------------

namespace {

struct Scratch {
    char* memory = nullptr;
    ~Scratch() { free(memory); }
};
thread_local Scratch scratch_block;

void* scratch(size_t bytes, void*) {
    free(scratch_block.memory);
    scratch_block.memory = static_cast<char*>(malloc(bytes ? bytes : 1));
    if (!scratch_block.memory) throw std::bad_alloc();
    memset(scratch_block.memory, poison_byte, bytes);
    return scratch_block.memory;
}

}  // namespace

Device device(int capability) {
    if (!capability) capability = draw() % 3 ? 80 : 86;
    max_shared_bytes = capability == 80 ? large_shared : small_shared;
    return {nullptr, capability, 2, scratch, nullptr};
}

}  // namespace metate::cuda::emulator
