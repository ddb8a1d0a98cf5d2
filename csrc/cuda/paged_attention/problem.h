// Which queries and keys belong together, who sees whom, and how the keys are cut into splits.
//
// The query heads that share a head of the cache are rows of one block: row r of a sequence is query r / group, head
// r % group of the group. Keys are cut at fixed positions, and every split is a softmax of its own: what a row gives
// depends on its own sequence alone. The more rows a sequence has, the longer are its splits, so that there is work
// enough for the GPU and no more to merge than that takes.
#pragma once

#include "../../paged_attention.h"
#include "../attention/score.h"

namespace metate::cuda::paged {

using namespace arch;
using flash::Divider;
using flash::infinite;
using flash::least;
using flash::log2_e;
using flash::most;

constexpr int split_rows = 64;     // rows for which a split has its shortest length
constexpr int farthest = 1 << 28;  // position, either way
constexpr int few_rows = 16;       // sequences of up to so many rows have kernels of their own

// The contract's problem with what every block would otherwise work out for itself.
struct Problem {
    PagedAttention a;
    int tokens, heads, kv_heads, group;
    int sequences, capacity, page_size, pages;
    int left, right;       // the window, -1: no limit
    int shortest, splits;  // keys of the shortest split, and how many of them a sequence may have
    int at_once;           // splits of a sequence that have a block each; a block goes on to the next ones
    bool packed;
    Divider by_group, by_page;
    float scale, softcap;
    float* partial;  // what splits leave behind: all outputs, then all sums, then all maxima
    int64_t entries;
    Words<2>* softmax;  // (batch, head, query), where column sums are asked for
};

// One sequence in one head of the cache. Bounds that lie are cut to what the tensors hold.
struct Span {
    int sequence, batch, kv_head;  // batch indexes tensors, 0 when packed
    int first_query, queries, keys, first_key;

    METATE_DEVICE int place() const { return keys - queries; }  // position of the first query
};

// Of row i: probability = 2^(logit - largest) · share, with binary logits. For sums, which would show what an lse was
// rounded by.
METATE_DEVICE Words<2>* softmax_at(const Problem& p, const Span& s, int i, int h) {
    return p.softmax + (static_cast<int64_t>(s.batch) * p.heads + h) * p.tokens + s.first_query + i;
}

// The lse of row i, and its softmax where it is wanted. `total`: the sum of powers relative to `base`.
METATE_DEVICE void store_softmax(const Problem& p, const Span& s, int i, int h, float base, float total) {
    const View<3>& lse = p.a.lse;
    store_global(static_cast<float*>(lse.data) + s.batch * lse.stride[0] + h * lse.stride[1] +
                     (s.first_query + i) * lse.stride[2],
                 (base + log2f(total)) * flash::ln_2);
    if (!p.softmax) return;
    store_global(softmax_at(p, s, i, h), Words<2>{{bits_of(base), bits_of(total == 0.f ? 0.f : 1.f / total)}});
}

METATE_DEVICE int number(const View<1>& view, int64_t i) {
    return load_global<int>(static_cast<const int32_t*>(view.data) + i * view.stride[0]);
}

METATE_DEVICE int packed_start(const Problem& p, int sequence) {
    return most(0, least(number(p.a.cu_seqlens_q, sequence), p.tokens));
}

METATE_DEVICE Span span_of(const Problem& p, int sequence, int kv_head) {
    Span s{sequence, p.packed ? 0 : sequence, kv_head, 0, p.tokens, 0, 0};
    if (p.packed) {
        s.first_query = packed_start(p, sequence);
        s.queries = most(0, packed_start(p, sequence + 1) - s.first_query);
    }
    s.keys = most(0, least(number(p.a.seq_lens, sequence), p.capacity));
    if (p.a.left_pad) s.first_key = most(0, number(p.a.left_pad, sequence));
    return s;
}

// The last packed sequence k with start(k) · rows / block + k · apart <= slot.
METATE_DEVICE int packed_owner(const Problem& p, int slot, int rows, int block, int apart) {
    int low = 0, high = p.sequences - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (packed_start(p, middle) * rows / block + middle * apart <= slot) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

struct Splits {
    int length, first, count;  // the first that any query of the sequence sees
};

METATE_DEVICE Splits splits_of(const Problem& p, const Span& s) {
    const int length = p.shortest * most(1, (s.queries * p.group + split_rows - 1) / split_rows);
    const int low = most(s.first_key, p.left >= 0 && !p.a.positions ? s.place() - p.left : 0);
    const int first = most(0, low) / length;
    return {length, first, most(0, (s.keys + length - 1) / length - first)};
}

// Where the partial result of a row in a split lies. A sequence has at most rows · splits of them, and at most
// split_rows · splits + rows, so the lesser sum over those before it is enough.
METATE_DEVICE int64_t partial_entry(const Problem& p, const Span& s, int split, int row) {
    const int64_t before = (static_cast<int64_t>(s.batch) * p.tokens + s.first_query) * p.group;
    const int64_t wide = static_cast<int64_t>(s.sequence) * split_rows * p.splits + before, narrow = before * p.splits;
    const int64_t first = narrow < wide ? narrow : wide;
    return (first + static_cast<int64_t>(split) * s.queries * p.group + row) * p.kv_heads + s.kv_head;
}

// Where query i of a sequence stands. Numbers that lie are cut to what sums of them may be.
METATE_DEVICE int position_of(const Problem& p, const Span& s, int i) {
    const View<2>& v = p.a.positions;
    const int batch = opaque(s.batch), query = opaque(s.first_query) + i;  // or addresses outlive the walk over keys
    const int given = load_global<int>(static_cast<const int32_t*>(v.data) + batch * v.stride[0] + query * v.stride[1]);
    return most(-farthest, least(given, farthest));
}

// What dot products are multiplied by: binary logits they are then, unless a cap follows.
METATE_DEVICE float factor_of(const Problem& p) {
    return p.softcap > 0.f ? p.scale : p.scale * log2_e;
}

// The binary logit that a row has beside those of its keys.
METATE_DEVICE float sink_of(const Problem& p, const Span& s, int i, int h) {
    const View<3>& v = p.a.sinks;
    if (!v) return -infinite();
    const int batch = opaque(s.batch), query = opaque(s.first_query) + i;
    return log2_e * load_global<float>(static_cast<const float*>(v.data) + batch * v.stride[0] + h * v.stride[1] +
                                       query * v.stride[2]);
}

// softcap · tanh(x / softcap). tanh x = 1 - 2 / (exp 2x + 1): its absolute error, which is what a logit needs, stays at
// 2^-22.
METATE_DEVICE float capped(float x, float softcap) {
    return softcap * (1.f - 2.f * fast_reciprocal(1.f + fast_exp2(x * (2.f * log2_e / softcap))));
}

struct Keys {
    int low, high;

    METATE_DEVICE bool hold(int j) const { return j >= low && j < high; }
};

// One row: a query in one of the heads.
struct Row {
    int query, head;  // query -1: there is none
    float slope;

    METATE_DEVICE Row(const Problem& p, const Span& s, int r) {
        query = p.by_group(r);
        head = s.kv_head * p.group + r - query * p.group;
        *this = Row(p, s, query < s.queries ? query : -1, head);
    }

    METATE_DEVICE Row(const Problem& p, const Span& s, int i, int h) : query(i), head(h), slope(0.f) {
        if (p.a.alibi_slopes && i >= 0) {
            const View<2>& v = p.a.alibi_slopes;
            slope = log2_e *
                    load_global<float>(static_cast<const float*>(v.data) + s.sequence * v.stride[0] + h * v.stride[1]);
        }
    }

    // Read anew for each tile: it would take registers from the products.
    METATE_DEVICE int position(const Problem& p, const Span& s) const {
        return p.a.positions && query >= 0 ? position_of(p, s, query) : s.place() + query;
    }

    // The keys that it sees, as far as a range can say it.
    METATE_DEVICE Keys keys(const Problem& p, const Span& s) const {
        if (query < 0) return {0, 0};
        const int at = position(p, s);
        return {most(s.first_key, p.left >= 0 ? at - p.left : 0),
                p.right >= 0 ? least(s.keys, at + p.right + 1) : s.keys};
    }

    // Whether the tree lets it see one of the sequence's own newest keys, or an older one.
    METATE_DEVICE bool in_tree(const Problem& p, const Span& s, int j) const {
        const int newest = j - s.place();
        if (newest < 0) return true;
        const View<3>& v = p.a.bits;
        if (newest >= v.size[2] * 32) return false;
        const int64_t row = s.batch * v.stride[0] + (s.first_query + query) * v.stride[1];
        return load_global<uint32_t>(static_cast<const uint32_t*>(v.data) + row + (newest >> 5) * v.stride[2]) >>
                   (newest & 31) &
               1;
    }

    METATE_DEVICE bool sees(const Problem& p, const Span& s, int j) const {
        return keys(p, s).hold(j) && (!p.a.bits || in_tree(p, s, j));
    }

    // What the tree says of `count` columns of a product's fragments, the first of which is key j: a bit for each.
    METATE_DEVICE uint32_t tree_columns(const Problem& p, const Span& s, int j, int count) const {
        const Keys range = keys(p, s);
        uint32_t columns = 0;
        METATE_NO_UNROLL
        for (int e = 0; e < count; ++e) {
            const int key = j + e / 2 * 8 + e % 2;
            if (range.hold(key) && in_tree(p, s, key)) columns |= 1u << e;
        }
        return columns;
    }

    METATE_DEVICE float penalty(int distance) const {
        return slope * static_cast<float>(distance < 0 ? -distance : distance);
    }

    // The binary logit of a dot product times its factor, rounded as in `make_logits`: beside the largest one nothing
    // but zero must be left of it.
    METATE_DEVICE float logit(const Problem& p, const Span& s, float x, int j) const {
        const float away = p.a.alibi_slopes ? penalty(position(p, s) - j) : 0.f;
        return (p.softcap > 0.f ? product(log2_e, capped(x, p.softcap)) : x) - away;
    }
};

}  // namespace metate::cuda::paged
