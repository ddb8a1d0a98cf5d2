#include "fiber.h"

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// switch_stack(void** save, void* load): the callee-saved registers go to the old stack and come from the new one.
// Rounding modes and the like are never changed by a kernel, so they need no saving.
asm(R"(
    .text
    .hidden metate_emulator_switch_stack
    .globl metate_emulator_switch_stack
    .type metate_emulator_switch_stack, @function
metate_emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size metate_emulator_switch_stack, . - metate_emulator_switch_stack
)");
extern "C" void metate_emulator_switch_stack(void** save, void* load);
#endif

namespace metate::cuda::emulator {
namespace {

constexpr size_t stack_bytes = 256 * 1024;

#if defined(__SANITIZE_ADDRESS__)
// Both ends of the switch under way: the side that arrives learns the bounds of the stack that was left.
thread_local Fiber* leaving;
thread_local Fiber* entering;
#endif

}  // namespace

Stack::Stack() : bytes(stack_bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* mapped =
        mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapped, page, PROT_NONE);
    memory = static_cast<char*>(mapped) + page;
}

Stack::Stack(Stack&& other) noexcept : memory(std::exchange(other.memory, nullptr)), bytes(other.bytes) {}

Stack::~Stack() {
    if (!memory) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory, bytes);
#endif
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    munmap(memory - page, bytes + page);
}

void prepare(Fiber& fiber, const Stack& stack, void (*entry)()) {
    fiber = Fiber{};
    fiber.stack = stack.memory;
    fiber.bytes = stack.bytes;
#if defined(__SANITIZE_ADDRESS__)
    // A fiber that was abandoned after an error leaves the marks of its frames behind.
    __asan_unpoison_memory_region(stack.memory, stack.bytes);
#endif
#if defined(__x86_64__)
    // What metate_emulator_switch_stack pops: six registers, then the address of entry, above which the ABI wants the
    // stack to look as after a call.
    // Stacks start at different lines of the cache: as equal parts of pages, all would compete for the same few.
    const size_t shift = reinterpret_cast<uintptr_t>(stack.memory) / 4096 * 448 % 4096;
    void** top = reinterpret_cast<void**>(stack.memory + stack.bytes - shift) - 1;
    top[0] = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack.memory;
    fiber.context.uc_stack.ss_size = stack.bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
    leaving = &from;
    entering = &to;
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.bytes);
#endif
#if defined(__x86_64__)
    metate_emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
    arrived();
}

void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(entering->fake_stack, &bottom, &size);
    leaving->stack = static_cast<char*>(const_cast<void*>(bottom));
    leaving->bytes = size;
#endif
}

}  // namespace metate::cuda::emulator
