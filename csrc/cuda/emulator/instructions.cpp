// What the warp's instructions compute: shuffles, votes, ldmatrix, mma, conversions and approximations.
#include <float.h>
#include <math.h>
#include <string.h>

#include <bit>

#include "machine.h"

namespace metate::cuda::emulator {
namespace {

constexpr uint32_t full_warp = ~0u;

float flushed(float x) {
    return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x;
}

struct Shuffled {
    Shuffle kind;
    uint32_t value, result;
    int operand;
    const Site* where;
};

// The source lane by the PTX manual, for segments of 32 lanes.
int source_lane(Shuffle kind, int lane, int operand) {
    const int amount = operand & 31;
    switch (kind) {
        case Shuffle::index:
            return amount;
        case Shuffle::flip:
            return lane ^ amount;
        case Shuffle::down:
            return lane + amount < lanes ? lane + amount : lane;
    }
    __builtin_unreachable();
}

void act_shuffle(void* const* operands, uint32_t mask) {
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const int lane = std::countr_zero(rest);
        auto* mine = static_cast<Shuffled*>(operands[lane]);
        const int source = source_lane(mine->kind, lane, mine->operand);
        if (!(mask >> source & 1)) {
            fail("shuffle", *mine->where,
                 "lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
                     ", which is not in the mask");
        }
        mine->result = static_cast<const Shuffled*>(operands[source])->value;
    }
}

struct Vote {
    bool predicate;
    uint32_t result;
};

void act_ballot(void* const* operands, uint32_t mask) {
    uint32_t votes = 0;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const int lane = std::countr_zero(rest);
        votes |= uint32_t{static_cast<const Vote*>(operands[lane])->predicate} << lane;
    }
    for (uint32_t rest = mask; rest; rest &= rest - 1)
        static_cast<Vote*>(operands[std::countr_zero(rest)])->result = votes;
}

struct Matrices {
    uint32_t* r;
    int count;
    bool transposed;
    const void* row;
    const Site* where;
};

void act_ldmatrix(void* const* operands, uint32_t) {
    const auto& first = *static_cast<const Matrices*>(operands[0]);
    SharedMemory& shared = running->shared;
    const Actor warp{running->current->warp(), whole_warp};
    for (int m = 0; m < first.count; ++m) {
        uint16_t matrix[8][8];
        for (int row = 0; row < 8; ++row) {
            const auto& lane = *static_cast<const Matrices*>(operands[8 * m + row]);
            shared.read(warp, shared.offset(lane.row, 16, "ldmatrix", *lane.where), 16, "ldmatrix", *lane.where);
            memcpy(matrix[row], lane.row, 16);
        }
        for (int lane = 0; lane < lanes; ++lane) {
            const int i = lane / 4, j = lane % 4 * 2;
            const uint32_t low = first.transposed ? matrix[j][i] : matrix[i][j];
            const uint32_t high = first.transposed ? matrix[j + 1][i] : matrix[i][j + 1];
            static_cast<const Matrices*>(operands[lane])->r[m] = low | high << 16;
        }
    }
}

struct Multiply {
    float* d;
    const uint32_t *a, *b;
};

template <bool is_bf16>
float element(uint32_t packed, int half) {
    const uint32_t bits = packed >> 16 * half & 0xffff;
    if (is_bf16) return __builtin_bit_cast(float, bits << 16);
    const uint32_t magnitude = bits & 0x7fff;
    if (magnitude - 0x400 >= 0x7800)
        return widen(false, static_cast<uint16_t>(bits));  // zero, subnormal, infinite, NaN
    return __builtin_bit_cast(float, (bits & 0x8000) << 16 | ((magnitude << 13) + (112u << 23)));
}

// The products are exact in float; they are added one k after another, rounding each time.
template <bool is_bf16>
void act_mma(void* const* operands, uint32_t) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < lanes; ++lane) {
        const auto& own = *static_cast<const Multiply*>(operands[lane]);
        const int g = lane / 4, t = lane % 4 * 2;
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 8 + half] = element<is_bf16>(own.a[i], half);
            for (int i = 0; i < 2; ++i) {
                b[t + i * 8 + half][g] = element<is_bf16>(own.b[i], half);
                d[g + i * 8][t + half] = own.d[2 * i + half];
            }
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int lane = 0; lane < lanes; ++lane) {
        const auto& own = *static_cast<const Multiply*>(operands[lane]);
        for (int i = 0; i < 4; ++i) own.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
}

}  // namespace

uint32_t shuffle_word(Shuffle kind, uint32_t value, int operand, uint32_t mask, const Site& where) {
    const char* const names[] = {"shuffle", "shuffle_xor", "shuffle_down"};
    if (kind != Shuffle::index && (operand < 0 || operand > 31)) {
        fail(names[static_cast<int>(kind)], where, "distance " + std::to_string(operand) + ": 0 to 31");
    }
    Shuffled own{kind, value, 0, operand, &where};
    meet(names[static_cast<int>(kind)], mask, where, &own, act_shuffle);
    return own.result;
}

uint32_t ballot(bool predicate, uint32_t mask, const Site& where) {
    Vote own{predicate, 0};
    meet("vote", mask, where, &own, act_ballot);
    return own.result;
}

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, const Site& where) {
    const int lane = running->current->lane();
    if (lane < 8 * matrices) {
        const size_t offset = running->shared.offset(row, 16, "ldmatrix", where);
        record("ldmatrix", *running->current, offset, 16, where);
    }
    Matrices own{r, matrices, transposed, row, &where};
    meet("ldmatrix", full_warp, where, &own, act_ldmatrix);
}

void mma_m16n8k16(bool is_bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& where) {
    Multiply own{d, a, b};
    if (is_bf16) {
        meet("mma bf16", full_warp, where, &own, act_mma<true>);
    } else {
        meet("mma f16", full_warp, where, &own, act_mma<false>);
    }
}

uint16_t round(bool is_bf16, float value) {
    uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return 0x7fff;
    if (is_bf16) return static_cast<uint16_t>(sign | (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
    if (bits < 0x38800000) {
        // Below 2^-14: adding 0.5 leaves the subnormal, a multiple of 2^-24, rounded in the low bits.
        const float shifted = __builtin_bit_cast(float, bits) + 0.5f;
        return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((bits >> 13) - (112 << 10)));
}

float widen(bool is_bf16, uint16_t half) {
    if (is_bf16) return __builtin_bit_cast(float, uint32_t{half} << 16);
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fff;
    if (magnitude > 0x7c00) return __builtin_bit_cast(float, 0x7fffffff);
    if (magnitude == 0x7c00) return __builtin_bit_cast(float, sign | 0x7f800000);
    if (magnitude < 0x400) return copysignf(static_cast<float>(magnitude) * 0x1p-24f, sign ? -1.0f : 1.0f);
    return __builtin_bit_cast(float, sign | ((magnitude << 13) + (112u << 23)));
}

float fast_exp2(float x) {
    return flushed(exp2f(flushed(x)));
}

float fast_log2(float x) {
    return flushed(log2f(flushed(x)));
}

float fast_reciprocal(float x) {
    return flushed(1.0f / flushed(x));
}

float fast_tanh(float x) {
    const float y = tanhf(x);
    if (isnan(y)) return y;
    // The GPU promises a relative error of 2^-11; here are the digits that leaves.
    return __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, y) + 0x1000) & ~0x1fffu);
}

}  // namespace metate::cuda::emulator
