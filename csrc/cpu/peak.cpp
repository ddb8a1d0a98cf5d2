// Independent chains of one instruction, enough of them to hide its latency; and loads that nothing waits for.
#include "peak.h"

#include "vec.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int chains = 12;

// What the chains add up to goes into a volatile, so that they are not optimised away.
METATE_FN void keep(float x) {
    volatile float sink = x;
    (void)sink;
}

double multiply_add(int64_t repeats) {
    vf sums[chains];
    for (int i = 0; i < chains; ++i) sums[i] = splat(1.0f + static_cast<float>(i));
    const vf factor = splat(0.999f), addend = splat(0.001f);
    for (int64_t r = 0; r < repeats; ++r)
        for (int i = 0; i < chains; ++i) sums[i] = fma(sums[i], factor, addend);
    for (int i = 1; i < chains; ++i) sums[0] = sums[0] + sums[i];
    keep(sum(sums[0]));
    return 2.0 * width * chains * static_cast<double>(repeats);
}

double dot_bf16([[maybe_unused]] int64_t repeats) {
#if defined(__AVX512BF16__)
    vf sums[chains];
    for (int i = 0; i < chains; ++i) sums[i] = splat(1.0f + static_cast<float>(i));
    const vi pairs = splat(0x3c003c00);
    for (int64_t r = 0; r < repeats; ++r)
        for (int i = 0; i < chains; ++i) sums[i] = dot(sums[i], pairs, pairs);
    for (int i = 1; i < chains; ++i) sums[0] = sums[0] + sums[i];
    keep(sum(sums[0]));
    return 4.0 * width * chains * static_cast<double>(repeats);
#else
    return 0;
#endif
}

double dot_int8([[maybe_unused]] int64_t repeats) {
#if defined(__AVX512VNNI__)
    vi sums[chains];
    for (int i = 0; i < chains; ++i) sums[i] = splat(i);
    const vi bytes = splat(0x01010101);
    for (int64_t r = 0; r < repeats; ++r)
        for (int i = 0; i < chains; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], bytes, bytes);
    for (int i = 1; i < chains; ++i) sums[0] = add(sums[0], sums[i]);
    keep(sum(to_float(sums[0])));
    return 8.0 * width * chains * static_cast<double>(repeats);
#else
    return 0;
#endif
}

double read(const float* data, int64_t count, int64_t repeats) {
    constexpr int streams = 8;
    const int64_t step = streams * width, whole = count / step * step;
    vf sums[streams];
    for (int i = 0; i < streams; ++i) sums[i] = splat(0.0f);
    for (int64_t r = 0; r < repeats; ++r)
        for (int64_t at = 0; at < whole; at += step)
            for (int i = 0; i < streams; ++i) sums[i] = sums[i] + load(data + at + i * width);
    for (int i = 1; i < streams; ++i) sums[0] = sums[0] + sums[i];
    keep(sum(sums[0]));
    return static_cast<double>(whole) * sizeof(float) * static_cast<double>(repeats);
}

double work_of(const Peak& p, int worker, int workers) {
    switch (p.kind) {
        case Peak::f32_fma:
            return multiply_add(p.repeats);
        case Peak::bf16_dot:
            return dot_bf16(p.repeats);
        case Peak::int8_dot:
            return dot_int8(p.repeats);
        case Peak::read: {
            const int64_t part = p.buffer.size[0] / workers;
            return read(static_cast<const float*>(p.buffer.data) + worker * part, part, p.repeats);
        }
        default:
            return 0;
    }
}

}  // namespace

void peak(const Peak& p, const Runtime& runtime) {
    struct Call {
        const Peak& p;
        int workers;
    } call{p, static_cast<int>(p.work.size[0] < runtime.threads ? p.work.size[0] : runtime.threads)};
    auto body = [](int worker, void* context) {
        const Call& all = *static_cast<Call*>(context);
        static_cast<double*>(all.p.work.data)[worker] = work_of(all.p, worker, all.workers);
    };
    runtime.parallel(call.workers, body, &call);
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH_BF16(peak, Peak, DType::bf16)
