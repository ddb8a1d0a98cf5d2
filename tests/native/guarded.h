// Memory that notices a kernel reading or writing beyond its tensor.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

// Memory between two unreadable pages, the last byte (or the first) at the fence.
struct Guarded {
    size_t bytes, pages;
    uint8_t *map, *data;

    Guarded(size_t n, bool left) : bytes(n) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        pages = (n + page - 1) / page + 2;
        map = static_cast<uint8_t*>(
            mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(map, page, PROT_NONE);
        mprotect(map + (pages - 1) * page, page, PROT_NONE);
        data = left ? map + page : map + (pages - 1) * page - n;
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(map, pages * static_cast<size_t>(sysconf(_SC_PAGESIZE))); }
};
