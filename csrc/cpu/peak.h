// The ceilings of this machine, for benchmarks: the most operations and the most bytes read a second.
#pragma once

#include "../metate.h"

namespace metate {

struct Peak {
    enum Kind { f32_fma, bf16_dot, int8_dot, read };
    int64_t kind;
    int64_t repeats;
    View<1> buffer;  // f32: what `read` reads, a part for each worker, `repeats` times
    View<1> work;    // f64, one for each worker: operations or bytes done; 0 where the instruction set lacks the kind
};

namespace cpu {
void peak(const Peak&, const Runtime&);
}

}  // namespace metate
