// Stacks that take turns on one host thread: a switch in a few instructions on x86-64, ucontext elsewhere.
// AddressSanitizer is told of every switch.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace metate::cuda::emulator {

struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context{};
#endif
    char* stack = nullptr;  // lowest address
    size_t bytes = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
};

// A stack with a guard page below it.
struct Stack {
    char* memory;
    size_t bytes;
    Stack();
    Stack(Stack&&) noexcept;
    ~Stack();
};

// Makes `fiber` start entry() on `stack` when it is next switched to. entry() first calls arrived() and never returns.
void prepare(Fiber& fiber, const Stack& stack, void (*entry)());

// Suspends `from`, the running fiber, and resumes `to`; `last` when `from` will never run again.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);

// Ends a switch on the side of a fiber that starts.
void arrived();

}  // namespace metate::cuda::emulator
