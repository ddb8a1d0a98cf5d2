// Decoding: the kernels of up to 16 rows, and of every number of rows beyond 128 columns.
#include "host.h"

namespace metate::cuda::paged {

void attend_few(const Attend& f, void* stream) {
    for_kernel(f, [&]<typename T, int head, bool coded>() { launch_attend<T, head, coded, 1>(f, stream); });
}

}  // namespace metate::cuda::paged
