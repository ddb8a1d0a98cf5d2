// What the splits of a row say together: one block for each query and head.
#include <math.h>

#include "host.h"

namespace metate::cuda::paged {
namespace {

constexpr int merge_threads = 64;

template <typename T>
METATE_KERNEL(merge_threads, 1)
merge_kernel(METATE_PARAMETER(Problem, p)) {
    const int h = block_index().x % p.heads, token = block_index().x / p.heads;
    const int sequence = p.packed ? packed_owner(p, token, 1, 1, 0) : token / p.tokens;
    const Span s = span_of(p, sequence, h / p.group);
    const int i = p.packed ? token - s.first_query : token % p.tokens;
    const Splits splits = splits_of(p, s);
    if (i < 0 || i >= s.queries || splits.count <= 1) return;

    const int64_t columns = p.a.out.size[3];
    const float *const sums = p.partial + p.entries * columns, *const tops = sums + p.entries;
    const int64_t first = partial_entry(p, s, 0, i * p.group + h % p.group);
    const int64_t ahead = partial_entry(p, s, 1, i * p.group + h % p.group) - first;
    const float sink = sink_of(p, s, i, h);
    float top = sink;
    for (int n = 0; n < splits.count; ++n) top = fmaxf(top, load_global<float>(tops + first + n * ahead));
    const float base = top == -infinite() ? 0.f : top;
    float total = fast_exp2(sink - base);
    for (int n = 0; n < splits.count; ++n) {
        const int64_t entry = first + n * ahead;
        total += load_global<float>(sums + entry) * fast_exp2(load_global<float>(tops + entry) - base);
    }
    const float scale = total == 0.f ? 0.f : 1.f / total;
    const View<4>& out = p.a.out;
    for (int64_t column = thread_index(); column < columns; column += merge_threads) {
        float x = 0.f;
        for (int n = 0; n < splits.count; ++n) {
            const int64_t entry = first + n * ahead;
            x += load_global<float>(p.partial + entry * columns + column) *
                 fast_exp2(load_global<float>(tops + entry) - base);
        }
        store_global(static_cast<T*>(out.data) + s.batch * out.stride[0] + (s.first_query + i) * out.stride[1] +
                         h * out.stride[2] + column * out.stride[3],
                     from_float<T>(x * scale));
    }
    if (thread_index() == 0) store_softmax(p, s, i, h, base, total);
}

}  // namespace

void merge_splits(const Problem& p, void* stream) {
    const int64_t blocks = p.a.q.size[0] * p.a.q.size[1] * p.a.q.size[2];
    if (blocks > 0x7fffffff) refuse("paged_attention", "more than 2^31 rows");
    const auto kernel = p.a.q.dtype == DType::bf16 ? merge_kernel<bf16> : merge_kernel<f16>;
    launch(kernel, {static_cast<int>(blocks)}, merge_threads, 0, stream, p);
}

}  // namespace metate::cuda::paged
