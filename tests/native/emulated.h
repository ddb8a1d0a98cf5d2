// What the tests of the emulator share: running a lambda as a kernel, and telling what passed.
#pragma once

#include <stdio.h>

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
