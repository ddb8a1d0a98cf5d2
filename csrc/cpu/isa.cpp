// Which instruction sets this machine has, and which one the environment allows.
#include "isa.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace metate::cpu {
namespace {

#if defined(__x86_64__)
uint64_t states_kept_by_the_system() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
}

Isa best_of_machine() {
    constexpr uint64_t ymm = 0x6, zmm = 0xe6;  // XCR0: SSE and AVX; and opmask, ZMM_Hi256, Hi16_ZMM
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::baseline;
    const bool has_xsave = c & bit_OSXSAVE, has_fma = c & bit_FMA, has_f16c = c & bit_F16C;
    if (!has_xsave || !has_fma || !has_f16c) return Isa::baseline;
    const uint64_t kept = states_kept_by_the_system();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2) || (kept & ymm) != ymm) return Isa::baseline;
    const uint32_t skylake =
        bit_AVX512F | bit_AVX512CD | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL | bit_BMI | bit_BMI2;
    if ((b & skylake) != skylake || (kept & zmm) != zmm) return Isa::avx2;
    if (!(c & bit_AVX512VNNI)) return Isa::avx512;
    if (!(c & bit_AVX512VBMI)) return Isa::avx512vnni;
    const bool has_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
    return has_bf16 ? Isa::avx512bf16 : Isa::avx512vbmi;
}
#else
Isa best_of_machine() {
    return Isa::baseline;
}
#endif

struct Choice {
    Isa best, used;
    bool refused;
};

Choice choose() {
    Choice choice{best_of_machine(), best_of_machine(), false};
    const char* wanted = getenv("METATE_ISA");
    if (!wanted || !*wanted) return choice;
    choice.refused = true;
    for (int i = 0; i <= static_cast<int>(choice.best); ++i) {
        if (strcmp(wanted, name_of(static_cast<Isa>(i))) == 0) {
            choice.used = static_cast<Isa>(i);
            choice.refused = false;
        }
    }
    return choice;
}

const Choice& choice() {
    static const Choice made = choose();
    return made;
}

}  // namespace

Isa isa() {
    return choice().used;
}

bool has_isa(Isa isa) {
    return isa <= choice().best;
}

bool isa_was_refused() {
    return choice().refused;
}

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::baseline:
            return "baseline";
        case Isa::avx2:
            return "avx2";
        case Isa::avx512:
            return "avx512";
        case Isa::avx512vnni:
            return "avx512vnni";
        case Isa::avx512vbmi:
            return "avx512vbmi";
        case Isa::avx512bf16:
            return "avx512bf16";
    }
    return "";
}

}  // namespace metate::cpu
