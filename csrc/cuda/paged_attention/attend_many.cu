// Prefill in chunks, and verification of many tokens: the kernels of 64 rows.
#include "host.h"

namespace metate::cuda::paged {

void attend_many(const Attend& f, void* stream) {
    for_kernel(f, [&]<typename T, int head, bool coded>() {
        if constexpr (head <= 128) launch_attend<T, head, coded, 4>(f, stream);
    });
}

}  // namespace metate::cuda::paged
