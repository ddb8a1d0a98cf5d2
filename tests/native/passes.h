// Which calls a pass of an instruction set is tested with.
#pragma once

#include <string.h>

#include "metate.h"

namespace metate {

// Double precision has one pass, and one pass takes nothing but bfloat16.
inline bool takes(const char* pass, DType dtype) {
    if (!strcmp(pass, "avx512bf16")) return dtype == DType::bf16;
    return dtype != DType::f64 || !strcmp(pass, "baseline");
}

}  // namespace metate
