// Pieces of work for whoever is free, and the layout of a kernel's one scratch block.
#pragma once

#include "isa.h"

namespace metate::cpu::METATE_ISA {
namespace {

// How many workers share this many pieces.
inline int workers_of(const Runtime& runtime, int64_t pieces) {
    return static_cast<int>(pieces < runtime.threads ? pieces : runtime.threads);
}

// For so many vector operations, or numbers from memory: few are not worth waking other threads, which takes
// microseconds.
inline Runtime worth(const Runtime& runtime, int64_t operations) {
    Runtime one = runtime;
    if (operations < 1 << 15) one.threads = 1;
    return one;
}

// Runs body(worker, piece) for every piece. Workers fetch pieces in ascending order: put the heavy ones first. What a
// piece computes must not depend on the worker or on the pieces that ran before.
template <class Body>
void for_pieces(const Runtime& runtime, int64_t pieces, const Body& body) {
    struct Shared {
        const Body& body;
        int64_t pieces, next;
    } shared{body, pieces, 0};
    const int workers = workers_of(runtime, pieces);
    auto work = [](int worker, void* context) {
        Shared& all = *static_cast<Shared*>(context);
        for (;;) {
            const int64_t piece = __atomic_fetch_add(&all.next, 1, __ATOMIC_RELAXED);
            if (piece >= all.pieces) return;
            all.body(worker, piece);
        }
    };
    if (workers <= 1) {
        if (pieces > 0) work(0, &shared);
        return;
    }
    runtime.parallel(workers, work, &shared);
}

// Which of n runs of pieces a piece is in: run i begins with piece first[i], run n would with the number of all pieces.
inline int64_t run_of(const int64_t* first, int64_t n, int64_t piece) {
    int64_t low = 0, high = n;
    while (high - low > 1) (first[(low + high) / 2] <= piece ? low : high) = (low + high) / 2;
    return low;
}

// Hands out consecutive 64-byte aligned arrays. Without a base it only counts, so that one function describes a layout
// both for the size to ask for and for the arrays themselves.
struct Arena {
    char* base = nullptr;
    size_t used = 0;

    template <class T>
    T* take(int64_t count) {
        T* at = reinterpret_cast<T*>(base ? base + used : nullptr);
        used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return at;
    }
};

// A call's scratch block: what `shared` takes of an arena and, behind it, what `own` takes, again for each worker. The
// result gives every worker what `own` returned for it.
template <class Shared, class Own>
auto lay_out(const Runtime& runtime, int64_t pieces, const Shared& shared, const Own& own) {
    Arena common, one;
    shared(common);
    own(one);
    char* const base =
        static_cast<char*>(runtime.scratch(common.used + one.used * static_cast<size_t>(workers_of(runtime, pieces))));
    Arena placed{base};
    shared(placed);
    return [=](int worker) {
        Arena mine{base + common.used + one.used * static_cast<size_t>(worker)};
        return own(mine);
    };
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
