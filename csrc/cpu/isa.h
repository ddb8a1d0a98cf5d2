// Compiles a kernel file once per instruction set and picks one at run time.
//
// The build compiles each file of csrc/cpu but isa.cpp once per instruction set, with that set's flags and
// -DMETATE_ISA=<name>. A kernel lives in namespace metate::cpu::<name>; METATE_DISPATCH, at the end of its file, emits
// the chooser in the baseline pass only. A file that multiplies pairs of bfloat16 ends with METATE_DISPATCH_BF16
// instead, and only then the build makes an avx512bf16 pass of it, for calls of bfloat16 alone. Everything but the
// entry points stands in an unnamed namespace: whatever the linker could merge across passes might run on a machine
// that lacks the instructions.
#pragma once

#include "../metate.h"

namespace metate::cpu {

// avx512vnni and avx512vbmi have no passes of their own: kernels of the avx512 pass ask isa() before they use their
// instructions. Each has what those before it have.
enum class Isa { baseline, avx2, avx512, avx512vnni, avx512vbmi, avx512bf16 };
constexpr int isa_count = 6;

Isa isa();          // the best of this machine; METATE_ISA in the environment lowers it
bool has_isa(Isa);  // whether this machine and this build have it
const char* name_of(Isa);
bool isa_was_refused();  // METATE_ISA names no instruction set of this machine, and isa() is the best one instead

// Double precision has one implementation, the baseline's.
inline __attribute__((always_inline)) Isa isa_for(DType dtype) {
    return dtype == DType::f64 ? Isa::baseline : isa();
}

}  // namespace metate::cpu

// `dtype` names the data type of the call `p`.
#if !defined(METATE_ISA_BASELINE)
#define METATE_DISPATCH(fn, Params, dtype)
#define METATE_DISPATCH_BF16(fn, Params, dtype)
#elif defined(__x86_64__)
#define METATE_DISPATCH(fn, Params, dtype) METATE_DISPATCH_TO(avx512, fn, Params, dtype)
#define METATE_DISPATCH_BF16(fn, Params, dtype) \
    namespace metate::cpu::avx512bf16 {         \
    void fn(const Params&, const Runtime&);     \
    }                                           \
    METATE_DISPATCH_TO(avx512bf16, fn, Params, dtype)
#define METATE_DISPATCH_TO(best, fn, Params, dtype)                      \
    namespace metate::cpu {                                              \
    namespace avx2 {                                                     \
    void fn(const Params&, const Runtime&);                              \
    }                                                                    \
    namespace avx512 {                                                   \
    void fn(const Params&, const Runtime&);                              \
    }                                                                    \
    void fn(const Params& p, const Runtime& runtime) {                   \
        switch (isa_for(dtype)) {                                        \
            case Isa::avx512bf16:                                        \
                if ((dtype) == DType::bf16) return best::fn(p, runtime); \
                [[fallthrough]];                                         \
            case Isa::avx512vbmi:                                        \
            case Isa::avx512vnni:                                        \
            case Isa::avx512:                                            \
                return avx512::fn(p, runtime);                           \
            case Isa::avx2:                                              \
                return avx2::fn(p, runtime);                             \
            case Isa::baseline:                                          \
                return baseline::fn(p, runtime);                         \
        }                                                                \
    }                                                                    \
    }
#else
#define METATE_DISPATCH_BF16 METATE_DISPATCH
#define METATE_DISPATCH(fn, Params, dtype)             \
    namespace metate::cpu {                            \
    void fn(const Params& p, const Runtime& runtime) { \
        baseline::fn(p, runtime);                      \
    }                                                  \
    }
#endif
