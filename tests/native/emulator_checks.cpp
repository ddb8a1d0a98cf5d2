// Every mistake that the emulator claims to find, made once. Prints one line a test and exits with 1 when one fails.
#include <string.h>

#include <functional>

#include "emulated.h"

namespace {

// Under every schedule body must end in an error that says `text` and where.
template <typename Body>
void expect_error(const std::string& text, int threads, size_t shared_bytes, const Body& body) {
    for (uint64_t seed = 0; seed < 20; ++seed) {
        emulator::set_seed(seed);
        std::string message = "no error";
        try {
            run({}, threads, shared_bytes, body);
        } catch (const emulator::Error& error) {
            message = error.what();
        }
        require(message.find(text) != std::string::npos && message.find("emulator_checks.cpp:") != std::string::npos,
                "expected \"" + text + "\", got \"" + message + "\"");
    }
}

void finds_missing_threads() {
    expect_error("not reached by all threads", 64, 0, [] {
        if (thread_index() != 40) sync_threads();
    });
    expect_error("same barrier", 64, 0, [] {
        if (warp() == 0) {
            sync_threads();
        } else {
            sync_threads();
        }
    });
    expect_error("left the kernel", 32, 0, [] {
        if (lane() != 3) shuffle_xor(lane(), 1);
    });
    expect_error("deadlock", 64, 0, [] {
        if (warp() == 0) barrier_sync(1, 64);
    });
    expect_error("threads 16-31 wait at", 32, 0, [] {
        if (lane() < 16) {
            sync_threads();
        } else {
            sync_warp();
        }
    });
    expect_error("only some threads", 64, 0, [] {
        if (lane() < 16) barrier_sync(1, 32);
    });
    expect_error("threads, but for", 64, 0, [] {
        const int threads = warp() ? 32 : 64;
        if (lane() == 0) barrier_sync(1, threads);
    });
    expect_error("1 to 15", 32, 0, [] { barrier_sync(16, 32); });
    expect_error("a multiple of 32", 64, 0, [] { barrier_sync(1, 48); });
}

void finds_divergence() {
    expect_error("divergent warp", 32, 0, [] {
        if (lane() & 1) {
            shuffle_xor(lane(), 2);
        } else {
            shuffle_xor(lane(), 4);
        }
    });
    expect_error("divergent warp", 32, 0, [] {
        if (lane() == 0) {
            vote_any(true);
        } else {
            sync_warp();
        }
    });
    expect_error("another mask", 32, 0, [] { sync_warp(lane() == 9 ? 0xffffu : full_warp); });
    expect_error("not in the mask", 32, 0, [] { sync_warp(1u); });
    expect_error("reads lane 16", 32, 0, [] {
        if (lane() < 16) shuffle_down(lane(), 1, 0xffffu);
    });
    expect_error("divergent warp", 32, 0, [] {
        float d[4] = {};
        if (lane() == 31) {
            mma_m16n8k16<f16>(d, {0, 0, 0, 0}, {0, 0});
        } else {
            mma_m16n8k16<bf16>(d, {0, 0, 0, 0}, {0, 0});
        }
    });
}

void finds_bad_addresses() {
    alignas(16) static float memory[64] = {};
    const auto expect = [](const std::string& text, const std::function<void(char*, char*)>& access) {
        expect_error(text, 32, 512, [&] {
            METATE_SHARED(char, shared);
            access(shared + 16 * lane(), reinterpret_cast<char*>(memory));
        });
    };
    uint32_t r[4];
    expect("not a multiple of 16", [&](char* s, char*) { ldmatrix_x4(r, s + 8); });
    expect("not a multiple of 16", [](char* s, char* g) { cp_async_16(s + 2, g, 16); });
    expect("not a multiple of 16", [](char* s, char* g) { cp_async_16(s, g + 8, 4); });
    expect("not a multiple of 16", [](char* s, char*) { load_shared<Words<4>>(s + 4); });
    expect("not a multiple of 8", [](char* s, char*) { store_shared(s + 4, Words<2>{}); });
    expect("not a multiple of 16", [](char*, char* g) { load_global<Words<4>>(g + 4); });
    expect("not a multiple of 8", [](char*, char* g) { store_global(g + 4, Words<2>{}); });
    expect("not a multiple of 8", [](char*, char* g) { atomic_add(reinterpret_cast<float*>(g + 4), {1.0f, 1.0f}); });
    expect("528 of the block's 512", [&](char* s, char*) { ldmatrix_x4(r, s + 16); });
    expect("528 of the block's 512", [](char* s, char* g) { cp_async_16(s + 16, g, 16); });
    expect("bytes -16 to", [](char* s, char*) { load_shared<float>(s - 16); });
    expect("bytes 512 to 514", [](char* s, char*) { store_shared(s + 512 - 16 * lane(), bf16{0}); });
    expect("of shared memory", [](char*, char* g) { load_shared<float>(g); });
    expect("lies in shared memory", [](char* s, char*) { load_global<float>(s); });
    expect("null", [](char* s, char*) { cp_async_16(s, nullptr, 1); });
    expect("valid bytes", [](char* s, char* g) { cp_async_16(s, g, 17); });
#if !defined(__SANITIZE_ADDRESS__)
    try {
        run({}, 32, 100, [] {
            METATE_SHARED(char, shared);
            shared[100 + lane()] = 1;
        });
        require(false, "a plain pointer went unseen");
    } catch (const emulator::Error& error) {
        require(strstr(error.what(), "outside the block's shared memory"), error.what());
    }
#endif
}

void finds_races() {
    static float source[128];
    alignas(16) static float* const aligned = source + (16 - reinterpret_cast<uintptr_t>(source) / 4 % 16) % 16;
    const auto expect = [](const std::function<void(float*, int)>& body) {
        expect_error("race: ", 64, 1024, [&] {
            METATE_SHARED(float, shared);
            body(shared, thread_index());
        });
    };
    expect([](float* s, int i) {  // read before the other warp's write is ordered
        store_shared(s + i, 1.0f);
        sync_warp();
        load_shared<float>(s + (i ^ 32));
    });
    expect([](float* s, int i) {  // no sync_warp between the lanes
        store_shared(s + i, 1.0f);
        shuffle_xor(i, 1);
        load_shared<float>(s + (i ^ 1));
    });
    expect([](float* s, int i) {  // overwritten while others may still read
        store_shared(s + i, 1.0f);
        sync_threads();
        load_shared<float>(s + (i ^ 32));
        store_shared(s + i, 2.0f);
    });
    expect([](float* s, int i) {  // both halves of the block write one place
        if (warp() == 0 || i < 33) store_shared(s + i % 32 * 2, 1.0f);
        if (warp() == 1) store_shared(s + i % 32 * 2, 1.0f);
    });
    expect([](float* s, int i) {  // waited for, but not by the threads that read
        if (warp() == 0) {
            cp_async_16(s + 4 * (i & 15), aligned, i < 16 ? 16 : 0);
            cp_async_commit();
            cp_async_wait<0>();
        }
        sync_warp();
        uint32_t r[1];
        ldmatrix_x1(r, s + 4 * (i & 7));
    });
    expect([](float* s, int i) {  // a stage is refilled before every warp has used it
        store_shared(s + 4 * i, 0.0f);
        sync_threads();
        uint32_t r[4];
        ldmatrix_x4(r, s + 4 * (i & 31));
        cp_async_16(s + 4 * ((i & 31) ^ 1), aligned, 16);
    });
    expect([](float* s, int i) {  // the named barrier is not the one of the writer
        if (warp() == 0) {
            store_shared(s + i, 1.0f);
            barrier_sync(1, 32);
        } else {
            barrier_sync(2, 32);
            load_shared<float>(s + i - 32);
        }
    });
    expect_error("has not been waited for", 32, 512, [] {
        METATE_SHARED(char, shared);
        cp_async_16(shared + 16 * lane(), aligned, 16);
        cp_async_commit();
        load_shared<float>(shared + 16 * lane());
    });
    expect_error("has not been waited for", 32, 512, [] {
        METATE_SHARED(char, shared);
        cp_async_16(shared + 16 * lane(), aligned, 16);
        cp_async_wait<0>();  // no commit
        sync_threads();
        uint32_t r[4];
        ldmatrix_x4(r, shared + 16 * lane());
    });
}

// Neighbouring 16-bit elements written by different threads are no race, nor is one's own data.
void finds_no_race_where_none_is() {
    run({}, 64, 256, [] {
        METATE_SHARED(bf16, shared);
        store_shared(shared + thread_index(), bf16{0});
        store_shared(shared + thread_index(), bf16{static_cast<uint16_t>(thread_index())});
        require(load_shared<bf16>(shared + thread_index()).bits == thread_index(), "own data");
        sync_warp();
        require(load_shared<bf16>(shared + (thread_index() ^ 1)).bits == (thread_index() ^ 1), "the warp's data");
        uint32_t r[1];
        sync_threads();
        ldmatrix_x1(r, shared + 8 * (lane() & 7));
        sync_threads();
        store_shared(shared + 63 - thread_index(), bf16{0});
    });
}

void finds_bank_conflicts() {
    const auto wavefronts = [](const std::function<void(char*)>& access) {
        emulator::count_traffic(true);
        run({2}, 64, 16384, [&] {
            METATE_SHARED(char, shared);
            access(shared);
        });
        const auto all = emulator::traffic();
        emulator::count_traffic(false);
        require(all.size() == 1 && all[0].accesses == 4, "two warps in two blocks");
        return std::pair(all[0].wavefronts / 4, all[0].ideal / 4);
    };
    using Pair = std::pair<int64_t, int64_t>;
    uint32_t r[4];
    require(wavefronts([&](char* s) { ldmatrix_x4(r, s + 128 * lane()); }) == Pair(32, 4),
            "ldmatrix, rows of 128 bytes");
    require(wavefronts([&](char* s) { ldmatrix_x4(r, s + 144 * lane()); }) == Pair(4, 4),
            "ldmatrix, rows of 144 bytes");
    require(wavefronts([](char* s) { load_shared<float>(s + 4 * lane()); }) == Pair(1, 1), "consecutive words");
    require(wavefronts([](char* s) { load_shared<float>(s + 8 * lane()); }) == Pair(2, 1), "every second word");
    require(wavefronts([](char* s) { load_shared<float>(s + 128 * lane()); }) == Pair(32, 1), "one bank");
    require(wavefronts([](char* s) { load_shared<float>(s); }) == Pair(1, 1), "broadcast");
    require(wavefronts([](char* s) { load_shared<Words<4>>(s + 16 * lane()); }) == Pair(4, 4), "16 bytes a lane");
    require(wavefronts([](char* s) { load_shared<Words<2>>(s + 16 * lane()); }) == Pair(4, 2), "8 of 16 bytes a lane");
}

void finds_bad_launches() {
    const auto expect = [](const std::string& text, Dim3 grid, int threads, size_t shared_bytes) {
        try {
            run(grid, threads, shared_bytes, [] {});
        } catch (const emulator::Error& error) {
            require(strstr(error.what(), text.c_str()), error.what());
            return;
        }
        require(false, "no error: " + text);
    };
    expect("100 threads", {}, 100, 0);
    expect("1056 threads", {}, 1056, 0);
    expect("of shared memory", {}, 32, 200 * 1024);
    expect("65536", {1, 65536, 1}, 32, 0);
    run({1, 1, 65535}, 32, 0, [] {});
}

}  // namespace

int main() {
    bool good = true;
    TEST(finds_missing_threads);
    TEST(finds_divergence);
    TEST(finds_bad_addresses);
    TEST(finds_races);
    TEST(finds_no_race_where_none_is);
    TEST(finds_bank_conflicts);
    TEST(finds_bad_launches);
    return good ? 0 : 1;
}
