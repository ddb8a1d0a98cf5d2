// How attention over queries is cut into pieces of work: by shape alone, the heavy ones first.
#pragma once

#include "../parallel.h"
#include "score.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Some queries of all heads of one group (the query heads that share a key head), over a range of keys.
struct Piece {
    int64_t sequence;  // sequences_of(a) for tokens outside every sequence
    int64_t kv_head;
    int64_t first_query, queries;
    int64_t key_begin, key_end;
    int64_t part, parts;  // of a key range that was split; the parts of a piece have consecutive states
    int64_t state;        // where a part leaves its result; not used where parts is 1
    int64_t cost;
};

struct Cut {
    int64_t pieces, states, max_rows;  // max_rows: of a piece, rounded up to whole tiles
};

// The tokens of a packed batch that lie before the first or behind the last sequence: queries without keys.
inline Sequence outside_of(const Attention& a, bool behind) {
    const int64_t last = a.cu_seqlens_q.size[0] - 1, begin = behind ? offset_in(a.cu_seqlens_q, last) : 0;
    const int64_t end = behind ? a.q.size[1] : offset_in(a.cu_seqlens_q, 0);
    return {-1, 0, begin, 0, end - begin, 0, 0};
}

inline Sequence sequence_of(const Attention& a, const Piece& piece) {
    const int64_t n = piece.sequence, count = sequences_of(a);
    return n < count ? sequence_of(a, n) : outside_of(a, n > count);
}

// The sequence of a token of the views, or what lies outside.
inline Sequence sequence_at(const Attention& a, int64_t batch, int64_t token) {
    if (!a.cu_seqlens_q) return sequence_of(a, batch);
    const int64_t count = sequences_of(a);
    if (token < offset_in(a.cu_seqlens_q, 0)) return outside_of(a, false);
    for (int64_t n = 0; n < count; ++n) {
        if (token < offset_in(a.cu_seqlens_q, n + 1)) return sequence_of(a, n);
    }
    return outside_of(a, true);
}

// Whether the heads of a group have masks of their own. Then a tile holds rows of one head, or it would do the work of
// all.
inline bool has_masks_of_heads(const Attention& a) {
    const bool differ =
        (a.intervals && a.intervals.stride[1]) || (a.blocks && a.blocks.stride[1]) || (a.bits && a.bits.stride[1]);
    return differ && a.q.size[2] > a.k.size[2] && a.q.size[1] >= tile_rows;
}

// The rows of so many queries, in whole tiles where these are to be of one head.
inline int64_t rows_of(const Attention& a, int64_t queries) {
    return a.q.size[2] / a.k.size[2] * (has_masks_of_heads(a) ? round_up(queries, tile_rows) : queries);
}

// Queries in a piece: enough rows to pay for packing the keys, few enough for all workers to find work. This alone may
// follow the number of workers, for no row's result depends on the rows beside it.
inline int64_t queries_of_piece(const Attention& a, int threads) {
    constexpr int64_t least = 192, pieces_of_worker = 4;
    // Where a window is limited, rows meet few blocks of keys: fewer rows are still in the cache when the next block
    // comes.
    const bool is_narrow = a.window_left >= 0 && a.window_right >= 0;
    const int64_t most = is_narrow ? 1024 : 4096, group = a.q.size[2] / a.k.size[2];
    const int64_t rows = clamp(a.q.size[0] * a.q.size[1] * a.q.size[2] / (pieces_of_worker * threads), least, most);
    int64_t unit = 1;  // queries that fill whole tiles
    while (rows_of(a, unit) % tile_rows || (has_masks_of_heads(a) && unit % tile_rows)) ++unit;
    const int64_t queries = round_up(rows / group, unit);
    return queries * group <= 2 * most ? queries : 1;
}

// Into how many parts the `keys` of a query range are split so that a sequence of few rows keeps many workers busy.
// The answer depends on that sequence alone: it decides in which order a row is added up.
inline int64_t parts_of(const Attention& a, const Sequence& s, int64_t keys) {
    constexpr int64_t wanted = 32, rows_of_task = 256, least_keys = 1024;
    const int64_t tasks = a.k.size[2] * ceil_div(s.queries * (a.q.size[2] / a.k.size[2]), rows_of_task);
    return tasks >= wanted / 2 ? 1 : clamp(keys / least_keys, 1, ceil_div(wanted, tasks));
}

// Appends the pieces of one sequence to `to`, or only counts them where that is null.
inline void cut_sequence(const Attention& a, const Sequence& s, int64_t n, int64_t step, int64_t block, Piece* to,
                         Cut& cut) {
    for (int64_t first = 0; first < s.queries; first += step) {
        const int64_t queries = s.queries - first < step ? s.queries - first : step;
        int64_t begin, end, unused;
        window_of(a, s, first, begin, unused);
        window_of(a, s, first + queries - 1, unused, end);
        const int64_t keys = end > begin ? end - begin : 0, parts = parts_of(a, s, keys);
        const int64_t part_keys = round_up(ceil_div(keys, parts), block);
        begin = begin / block * block;
        if (end < begin) end = begin;
        for (int64_t h = 0; h < a.k.size[2]; ++h) {
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t from = clamp(begin + part * part_keys, begin, end);
                const int64_t until = part + 1 == parts ? end : clamp(from + part_keys, begin, end);
                const int64_t cost = queries * (until - from);
                if (to) to[cut.pieces] = {n, h, first, queries, from, until, part, parts, cut.states, cost};
                ++cut.pieces;
                if (parts > 1) ++cut.states;
            }
        }
        const int64_t rows = round_up(rows_of(a, queries), tile_rows);
        if (rows > cut.max_rows) cut.max_rows = rows;
    }
}

inline Cut cut_queries(const Attention& a, int threads, int64_t block, Piece* to) {
    Cut cut{};
    if (a.k.size[2] == 0) return cut;
    const int64_t step = queries_of_piece(a, threads), count = sequences_of(a);
    for (int64_t n = 0; n < count; ++n) cut_sequence(a, sequence_of(a, n), n, step, block, to, cut);
    if (a.cu_seqlens_q) {
        for (int behind = 0; behind < 2; ++behind) {
            cut_sequence(a, outside_of(a, behind), count + behind, step, block, to, cut);
        }
    }
    return cut;
}

// Heavy pieces first: heap sort by falling cost.
inline void sort_by_cost(Piece* piece, int64_t n) {
    const auto sink = [&](int64_t at, int64_t end) {
        for (int64_t child; (child = 2 * at + 1) < end; at = child) {
            if (child + 1 < end && piece[child + 1].cost < piece[child].cost) ++child;
            if (piece[at].cost <= piece[child].cost) return;
            const Piece swapped = piece[at];
            piece[at] = piece[child];
            piece[child] = swapped;
        }
    };
    for (int64_t i = n / 2 - 1; i >= 0; --i) sink(i, n);
    for (int64_t end = n - 1; end > 0; --end) {
        const Piece swapped = piece[0];
        piece[0] = piece[end];
        piece[end] = swapped;
        sink(0, end);
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
