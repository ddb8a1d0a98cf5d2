// What runs, and how it is cut.
#include "host.h"

namespace metate::cuda::paged {
namespace {

int64_t most_columns(const PagedAttention& a) {
    return a.q.size[3] > a.out.size[3] ? a.q.size[3] : a.out.size[3];
}

Problem problem_of(const PagedAttention& a, const Device& device) {
    Problem p{};
    p.a = a;
    p.tokens = static_cast<int>(a.q.size[1]);
    p.heads = static_cast<int>(a.q.size[2]);
    p.kv_heads = static_cast<int>(a.k_cache.size[2]);
    p.group = p.kv_heads > 0 ? p.heads / p.kv_heads : 1;
    p.sequences = static_cast<int>(a.block_table.size[0]);
    p.page_size = static_cast<int>(a.k_cache.size[1]);
    p.pages = static_cast<int>(a.k_cache.size[0]);
    p.packed = static_cast<bool>(a.cu_seqlens_q);
    const int64_t capacity = a.block_table.size[1] * p.page_size, longest = p.tokens + capacity;
    const int64_t rows = static_cast<int64_t>(p.tokens) * p.group;
    if (longest >= int64_t{1} << 30 || rows >= int64_t{1} << 30)
        refuse("paged_attention", "2^30 rows of queries or positions of keys; up to 2^30 - 1");
    p.capacity = static_cast<int>(capacity);
    const int64_t whole = longest + (a.positions ? farthest : 0);  // as wide as no window
    p.left = static_cast<int>(a.window_left < whole ? a.window_left : whole);
    p.right = static_cast<int>(a.window_right < whole ? a.window_right : whole);
    // What a split leaves behind grows with the group and with the columns of values, and so does what it should read.
    p.shortest = most_columns(a) > 256 ? 512 : 256;
    while (p.shortest < 16 * p.group) p.shortest *= 2;
    p.splits = (p.capacity + p.shortest - 1) / p.shortest;
    const int64_t wanted = 32 * device.processors, there = static_cast<int64_t>(p.sequences) * p.kv_heads;
    const int64_t at_once = wanted / (there + 1) + 1;
    p.at_once = p.splits < 1 ? 1 : static_cast<int>(at_once < p.splits ? at_once : p.splits);
    p.by_group = flash::divider(p.group);
    p.by_page = flash::divider(p.page_size > 0 ? p.page_size : 1);
    p.scale = static_cast<float>(a.scale);
    p.softcap = static_cast<float>(a.softcap);
    return p;
}

// How many partial results there may be; none where no sequence can have two splits.
int64_t partial_entries(const Problem& p) {
    const int64_t of_one = static_cast<int64_t>(p.tokens) * p.group;
    const int64_t rows = p.packed ? of_one : of_one * p.sequences;
    const int64_t blocks = p.packed ? 1 : (of_one + split_rows - 1) / split_rows;
    if (p.splits <= blocks) return 0;
    const int64_t narrow = rows * p.splits, wide = static_cast<int64_t>(split_rows) * p.splits * p.sequences + rows;
    return (narrow < wide ? narrow : wide) * p.kv_heads;
}

int slots_of(const Problem& p, int rows) {
    const int64_t all = static_cast<int64_t>(p.tokens) * p.group;
    const int64_t slots = p.packed ? all / rows + p.sequences : (all + rows - 1) / rows * p.sequences;
    if (slots * p.at_once * p.kv_heads > 0x7fffffff) refuse("paged_attention", "more than 2^31 tiles of rows");
    return static_cast<int>(slots);
}

// Tokens of no sequence are nobody's: they get 0 and -inf.
struct Clear {
    View<4> out;
    View<3> lse;
};

METATE_KERNEL(128, 1)
clear_kernel(METATE_PARAMETER(Clear, f)) {
    const int64_t heads = f.out.size[2], head = block_index().x % heads, token = block_index().x / heads;
    auto* const out = static_cast<uint16_t*>(f.out.data) + token * f.out.stride[1] + head * f.out.stride[2];
    for (int64_t c = thread_index(); c < f.out.size[3]; c += 128) store_global(out + c * f.out.stride[3], uint16_t{0});
    auto* const lse = static_cast<float*>(f.lse.data) + head * f.lse.stride[1] + token * f.lse.stride[2];
    if (thread_index() == 0) store_global(lse, -infinite());
}

}  // namespace
}  // namespace metate::cuda::paged

namespace metate::cuda {

void paged_attention(const PagedAttention& a, const Device& device) {
    using namespace paged;
    if (a.q.dtype != DType::bf16 && a.q.dtype != DType::f16) refuse("paged_attention", "q is not a 16-bit float");
    if (a.q.size[3] > 576 || a.out.size[3] > 512)
        refuse("paged_attention", "head dimensions go up to 576, those of values up to 512");
    if (most_columns(a) > 256 && shared_limit(device) < wide_shared)
        refuse("paged_attention", "head dimensions above 256 need 163 KiB of shared memory");
    Problem p = problem_of(a, device);
    const Cache k = cache_of(a.k_cache, a.k_scale, a.q.dtype), v = cache_of(a.v_cache, a.v_scale, a.q.dtype);
    if (p.packed) {
        const int64_t rows = a.q.size[1] * a.q.size[2];
        launch(clear_kernel, {static_cast<int>(rows)}, 128, 0, device.stream, Clear{a.out, a.lse});
    }
    if (p.sequences > 0 && p.tokens > 0 && p.heads > 0) {
        p.entries = partial_entries(p);
        const int64_t rows_of_sums = a.sums ? a.q.size[0] * p.tokens * p.heads : 0;
        const size_t bytes = static_cast<size_t>(p.entries) * (a.out.size[3] + 2) * sizeof(float);
        if (const size_t all = rows_of_sums * sizeof(Words<2>) + bytes) {
            auto* const scratch = static_cast<Words<2>*>(device.scratch(all, device.context));
            p.softmax = a.sums ? scratch : nullptr;
            p.partial = reinterpret_cast<float*>(scratch + rows_of_sums);
        }
        Attend f{p, k, v, 0, false, flash::moves_vectors(a.q), are_in_keys(v, k)};
        const int64_t rows = static_cast<int64_t>(p.tokens) * p.group, columns = most_columns(a);
        const int many_rows = columns > 256 ? 32 : columns > 128 ? few_rows : 64;
        if (many_rows == few_rows || rows <= few_rows || p.packed) {
            f.few_alone = p.packed && many_rows != few_rows;
            f.slots = f.few_alone ? p.sequences : slots_of(p, few_rows);
            columns > 256 ? attend_wide<1>(f, device.stream) : attend_few(f, device.stream);
        }
        if (many_rows != few_rows && rows > few_rows) {
            f.few_alone = false;
            f.slots = slots_of(p, many_rows);
            columns > 256 ? attend_wide<2>(f, device.stream) : attend_many(f, device.stream);
        }
        if (p.entries > 0) merge_splits(p, device.stream);
    }
    if (a.sums) sum_columns(p, k, device.stream);
}

}  // namespace metate::cuda
