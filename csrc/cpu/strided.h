// Vectors of elements that lie any stride apart.
#pragma once

#include "vec.h"

namespace metate::cpu::METATE_ISA {
namespace {

// At most a whole vector of the n elements, zeros after them.
template <class T>
METATE_FN vf load_any(const T* from, int64_t stride, int64_t n) {
    if (stride == 1) return n >= width ? load(from) : load(from, n);
    float line[width] = {};
    for (int64_t i = 0; i < n && i < width; ++i) line[i] = to_float(from[i * stride]);
    return load(line);
}

template <class T>
METATE_FN void store_any(T* to, int64_t stride, vf x, int64_t n) {
    if (stride == 1) return n >= width ? store(to, x) : store(to, x, n);
    float line[width];
    store(line, x);
    for (int64_t i = 0; i < n && i < width; ++i) to[i * stride] = from_float<T>(line[i]);
}

// run<T>() with the elements of a dtype.
template <class Run>
METATE_FN void with_floats(DType dtype, const Run& run) {
    if (only_bf16 || dtype == DType::bf16) return run.template operator()<bf16>();
    if constexpr (!only_bf16) dtype == DType::f16 ? run.template operator()<f16>() : run.template operator()<float>();
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
