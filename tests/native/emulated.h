// What the tests of the emulator share: running a lambda as a kernel, random cases, and telling what passed.
#pragma once

#include <stdio.h>
#include <stdlib.h>

#include <random>
#include <string>

#include "cuda/arch/arch.h"

using namespace metate::cuda::arch;
namespace emulator = metate::cuda::emulator;

inline void require(bool condition, const std::string& what) {
    if (!condition) throw std::runtime_error(what);
}

// Whether a launcher says no.
template <typename Body>
bool refuses(const Body& body) {
    try {
        body();
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

template <typename Body>
void call(const Body body) {
    body();
}

// Runs body() in every thread of the grid.
template <typename Body>
void run(Dim3 grid, int threads, size_t shared_bytes, const Body& body) {
    launch(call<Body>, grid, threads, shared_bytes, nullptr, body);
}

inline bool passes(const char* name, void (*test)()) {
    printf("%-28s ", name);
    try {
        test();
        printf("ok\n");
        return true;
    } catch (const std::exception& error) {
        printf("FAILED: %s\n", error.what());
        return false;
    }
}
#define TEST(name) good &= passes(#name, name)

// Random cases.

using Random = std::mt19937;

inline int draw(Random& random, int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
}
inline int pick(Random& random, std::initializer_list<int> from) {
    return from.begin()[draw(random, 0, static_cast<int>(from.size()) - 1)];
}
inline bool chance(Random& random, int percent) {
    return draw(random, 0, 99) < percent;
}
inline double normal(Random& random) {
    return std::normal_distribution<double>()(random);
}

// The whole of `program [cases [seed]]`: check(random, is_first) of every seed, with another order of the threads each
// time. What fails is told as the command that repeats it.
template <typename Check>
int run_cases(const char* program, int cases, int argc, char** argv, const Check& check) {
    if (argc > 1) cases = atoi(argv[1]);
    const int seed = argc > 2 ? atoi(argv[2]) : 1;
    int failed = 0;
    for (int n = 0; n < cases; ++n) {
        Random random(seed + n);
        emulator::set_seed(seed + n);
        try {
            check(random, n == 0);
        } catch (const std::exception& error) {
            printf("%s 1 %d: %s\n", program, seed + n, error.what());
            fflush(stdout);
            ++failed;
        }
    }
    printf("%d of %d cases failed\n", failed, cases);
    return failed != 0;
}
