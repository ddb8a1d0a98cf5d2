// The k best of the lists that the slices of a query have found.
#include "search.h"

namespace metate::cuda::pq {
namespace {

METATE_KERNEL(threads, 1)
merge_kernel(METATE_PARAMETER(Sink, sink)) {
    METATE_SHARED(unsigned char, shared);
    const int64_t q = block_index().x, count = static_cast<int64_t>(sink.slices) * sink.k;
    Selection list(shared, sink.k);
    METATE_NO_UNROLL
    for (int64_t begin = 0; begin < count; begin += chunk) {
        uint32_t key[each];
        METATE_UNROLL
        for (int i = 0; i < each; ++i) {
            const int64_t at = begin + i * threads + thread_index();
            key[i] = at < count ? load_global<uint32_t>(sink.keys + q * count + at) : none;
        }
        list.offer(key, [&](int i) {
            return load_global<int64_t>(sink.ids + q * count + begin + i * threads + thread_index());
        });
    }
    list.finish();
    for (int i = thread_index(); i < sink.k; i += threads) write_result(sink, q * sink.k + i, list.key(i), list.id(i));
}

}  // namespace

void merge_lists(const Sink& sink, int64_t queries, const Device& device) {
    if (sink.slices > 1)
        launch(merge_kernel, {static_cast<int>(queries), 1, 1}, threads, Selection::bytes(sink.k), device.stream, sink);
}

}  // namespace metate::cuda::pq
