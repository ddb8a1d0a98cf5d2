// What stands between the dot products and the probabilities: which keys a query sees, and how a dot product becomes a
// logit. Everything here is data of the problem, read at run time.
#pragma once

#include "../../attention.h"
#include "tile.h"

namespace metate::cuda::flash {

constexpr float log2_e = 1.44269504088896340736f;
constexpr float ln_2 = 0.69314718055994530942f;
METATE_DEVICE float infinite() {
    return float_of(0x7f800000u);
}

// n / d for 0 <= n < 2^31 without a division.
struct Divider {
    uint32_t magic;
    int shift;

    METATE_DEVICE int operator()(int n) const {
        return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * magic) >> shift);
    }
};

// The contract's problem with what every block would otherwise work out for itself.
struct Problem {
    Attention a;
    int queries, keys;  // of the batch, or of all packed sequences
    int heads, group;   // query heads, and how many of them share one of k and v
    int left, right;    // the window, -1: no limit
    int sequences;      // packed ones
    bool packed;
    Divider block_m, block_n;
    const int32_t* summary;  // four bounds per tile of queries (summary.cu), where there are intervals
    int summary_slots;
    float scale, unit;  // unit: from what a kernel's scores are to binary logarithms
    float softcap, dropout_scale;
};

// Query and key positions that belong together: one batch element, or one packed sequence.
struct Sequence {
    int batch;                   // counts packed sequences too
    int first_query, first_key;  // in the tensors' dimension of tokens
    int queries, keys;
    bool padding;  // tokens outside every packed sequence
};

// The k-th of the sequences + 3 ends of packed sequences; the first and the last stretch lie outside all of them.
METATE_DEVICE int packed_end(const View<1>& ends, int k, int tokens) {
    if (k == 0) return 0;
    if (k > ends.size[0]) return tokens;
    const int end = load_global<int>(static_cast<const int32_t*>(ends.data) + (k - 1) * ends.stride[0]);
    return most(0, least(end, tokens));
}

METATE_DEVICE Sequence packed_sequence(const Problem& p, int k) {
    const View<1>&q = p.a.cu_seqlens_q, &key = p.a.cu_seqlens_k;
    const bool padding = k == 0 || k == p.sequences + 1;
    const int q0 = packed_end(q, k, p.queries), k0 = packed_end(key, k, p.keys);
    return {k - 1,  q0, k0, most(0, packed_end(q, k + 1, p.queries) - q0), most(0, packed_end(key, k + 1, p.keys) - k0),
            padding};
}

// Slots number the tiles of all sequences: sequence k starts at slot end(k) / rows + k, which leaves room for its
// tiles.
METATE_DEVICE int packed_slot(const View<1>& ends, int k, int tokens, int rows) {
    return packed_end(ends, k, tokens) / rows + k;
}

METATE_DEVICE int sequence_of_slot(const Problem& p, const View<1>& ends, int tokens, int rows, int slot) {
    int low = 0, high = p.sequences + 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (packed_slot(ends, middle, tokens, rows) <= slot) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// Where a block works: `first` is its first row, a query (or a key), counted within the sequence.
struct Place {
    Sequence sequence;
    int head, slot, first;
};

// Blocks run through the slots of a head, then the heads, then the batch. `tiles`: slots per head.
METATE_DEVICE Place locate(const Problem& p, bool over_keys, int rows, int tiles, int heads, bool last_first) {
    const int index = opaque(block_index().x), rest = index / tiles;
    const int slot = last_first ? tiles - 1 - index % tiles : index % tiles;
    if (!p.packed) {
        return {{rest / heads, 0, 0, p.queries, p.keys, false}, rest % heads, slot, slot * rows};
    }
    const View<1>& ends = over_keys ? p.a.cu_seqlens_k : p.a.cu_seqlens_q;
    const int tokens = over_keys ? p.keys : p.queries;
    const int k = sequence_of_slot(p, ends, tokens, rows, slot);
    Sequence sequence = packed_sequence(p, k);
    if (sequence.padding) (over_keys ? sequence.queries : sequence.keys) = 0;
    return {sequence, rest, slot, (slot - packed_slot(ends, k, tokens, rows)) * rows};
}

// The rows of one head and sequence in a (B, S, H, D) tensor of 16-bit elements.
METATE_DEVICE Matrix matrix_of(const Problem& p, const View<4>& view, bool vectors, int batch, int token, int tokens,
                               int head) {
    const int64_t start = (p.packed ? 0 : batch) * view.stride[0] + token * view.stride[1] + head * view.stride[2];
    return {static_cast<unsigned char*>(view.data) + start * 2,
            view.stride[1],
            view.stride[3],
            tokens,
            static_cast<int>(view.size[3]),
            vectors};
}

METATE_DEVICE Matrix queries_of(const Problem& p, const View<4>& view, bool vectors, const Sequence& s, int head) {
    return matrix_of(p, view, vectors, s.batch, s.first_query, s.queries, head);
}

METATE_DEVICE Matrix keys_of(const Problem& p, const View<4>& view, bool vectors, const Sequence& s, int head) {
    return matrix_of(p, view, vectors, s.batch, s.first_key, s.keys, head);
}

// The value of a (B, Hq, Sq) float tensor's row for the queries of one head.
METATE_DEVICE float* row_values(const Problem& p, const View<3>& view, const Sequence& s, int head) {
    const int64_t start =
        (p.packed ? 0 : s.batch) * view.stride[0] + head * view.stride[1] + s.first_query * view.stride[2];
    return static_cast<float*>(view.data) + start;
}

struct Range {
    int low, high;  // low <= j < high
};

// What a tile of queries sees: all keys that any of them sees, and a range that every one of them sees whole.
struct Bounds {
    Range any, all;
};

enum TileKind : int { skipped, partial, full };

// One query head of one sequence. `general`: more than windows may be in play.
template <bool general>
struct Scorer {
    const Problem& p;
    Sequence s;
    int head;
    int diagonal;

    METATE_DEVICE Scorer(const Problem& problem, const Sequence& sequence, int query_head)
        : p(problem), s(sequence), head(query_head), diagonal(p.a.top_left ? 0 : s.keys - s.queries) {}

    // The keys that query i may see, as far as one range can say it. Queries beyond the last see none.
    METATE_DEVICE Range keys_of_query(int i) const {
        Range range{p.left >= 0 ? most(0, i + diagonal - p.left) : 0,
                    p.right >= 0 ? least(s.keys, i + diagonal + p.right + 1) : s.keys};
        if (i >= s.queries) range.high = 0;
        if constexpr (general) {
            if (p.a.intervals && i < s.queries) {
                const View<4>& v = p.a.intervals;
                const auto* at = static_cast<const int32_t*>(v.data) + (p.packed ? 0 : s.batch) * v.stride[0] +
                                 head * v.stride[1] + (s.first_query + i) * v.stride[2];
                range.low = most(range.low, load_global<int>(at));
                range.high = least(range.high, load_global<int>(at + v.stride[3]));
            }
        }
        return range;
    }

    // Queries first … first + rows - 1. `slot` numbers the tile for the summary.
    METATE_DEVICE Bounds bounds(int first, int rows, int slot) const {
        if constexpr (general) {
            if (p.a.intervals) {
                const int64_t line = static_cast<int64_t>(p.packed ? 0 : s.batch) * p.heads + head;
                const auto w = load_global<Words<4>>(p.summary + (line * p.summary_slots + slot) * 4);
                return {{static_cast<int>(w[0]), static_cast<int>(w[1])},
                        {static_cast<int>(w[2]), static_cast<int>(w[3])}};
            }
        }
        const Range upper = keys_of_query(first), lower = keys_of_query(least(first + rows, s.queries) - 1);
        return {{upper.low, lower.high}, {lower.low, upper.high}};
    }

    METATE_DEVICE bool block_seen(int i, int j) const {
        const View<4>& v = p.a.blocks;
        const auto* at = static_cast<const uint8_t*>(v.data) + s.batch * v.stride[0] + head * v.stride[1] +
                         p.block_m(i) * v.stride[2] + p.block_n(j) * v.stride[3];
        return load_global<uint8_t>(at) != 0;
    }

    // How much of the tile of queries i0 <= i < i1 and keys j0 <= j < j1 is seen.
    METATE_DEVICE TileKind kind(const Bounds& b, int i0, int i1, int j0, int j1) const {
        if (general && (j1 <= b.any.low || j0 >= b.any.high)) return skipped;
        TileKind kind = j0 >= b.all.low && j1 <= b.all.high ? full : partial;
        if constexpr (general) {
            if (p.a.blocks) {
                bool some = false;
                const int m = static_cast<int>(p.a.block_m), n = static_cast<int>(p.a.block_n);
                const int i_end = least(i1, s.queries), j_end = least(j1, s.keys);
                for (int i = i0; i < i_end; i = (p.block_m(i) + 1) * m) {
                    for (int j = j0; j < j_end; j = (p.block_n(j) + 1) * n) {
                        const bool seen = block_seen(i, j);
                        some |= seen;
                        if (!seen) kind = partial;
                    }
                }
                if (!some) return skipped;
            }
            if (p.a.bits) kind = partial;
        }
        return kind;
    }

    METATE_DEVICE float alibi_slope() const {
        const View<2>& v = p.a.alibi_slopes;
        const int64_t row = v.size[0] == 1 ? 0 : s.batch;
        return load_global<float>(static_cast<const float*>(v.data) + row * v.stride[0] + head * v.stride[1]);
    }

    METATE_DEVICE float distance(int i, int j) const {
        const int d = i + diagonal - j;
        return static_cast<float>(d < 0 ? -d : d);
    }
};

// The first tile from `n` on that is not skipped, or `end`; all lanes look at once where tiles in between may be
// skipped.
template <bool search, typename Kind>
METATE_DEVICE int next_tile(int n, int end, TileKind& found, const Kind& kind) {
    if constexpr (search) {
        for (; n < end; n += warp_size) {
            const TileKind mine = n + lane() < end ? kind(n + lane()) : skipped;
            const uint32_t votes = vote_ballot(mine != skipped);
            if (votes != 0) {
                const int first = lowest_bit(votes);
                found = static_cast<TileKind>(shuffle(static_cast<int>(mine), first));
                return n + first;
            }
        }
        return end;
    } else {
        if (n < end) found = kind(n);
        return n;
    }
}

// The tiles of `step` keys that a tile of `rows` queries sees, in ascending order.
template <bool general, int rows, int step>
struct KeyTiles {
    const Scorer<general>& scorer;
    Bounds bounds;
    int first_query, end;
    int tile;
    TileKind kind = skipped;  // of that tile

    METATE_DEVICE KeyTiles(const Scorer<general>& s, const Place& place)
        : scorer(s),
          bounds(s.bounds(place.first, rows, place.slot)),
          first_query(place.first),
          end(bounds.any.high > bounds.any.low ? (bounds.any.high + step - 1) / step : 0) {
        find(bounds.any.low / step);
    }

    METATE_DEVICE bool at_end() const { return tile >= end; }
    METATE_DEVICE int first_key() const { return tile * step; }
    METATE_DEVICE void find(int from) {
        tile = next_tile<general>(from, end, kind, [&](int n) {
            return scorer.kind(bounds, first_query, first_query + rows, n * step, (n + 1) * step);
        });
    }
};

// Philox4x32-10.
METATE_DEVICE Words<4> philox(Words<4> counter, uint32_t key0, uint32_t key1) {
    METATE_UNROLL
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * counter[0];
        const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * counter[2];
        counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(b),
                   static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(a)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// Where this thread's elements of a product lie. Rows of the product are queries and columns keys, or the other way
// round (`across`); a line holds the elements of one query, a place on it those of one key.
template <bool across, int m, int n>
struct Lines {
    static constexpr int lines = across ? 2 * n : 2 * m;
    static constexpr int places = across ? 2 * m : 2 * n;
    int row, column;  // of the thread's first element

    METATE_DEVICE Lines(int first_row, int first_column, int warp)
        : row(opaque(first_row + fragment_row(warp, lane() >> 2, m))), column(first_column + (lane() & 3) * 2) {}

    METATE_DEVICE int row_at(int i) const { return row + i * 16; }
    METATE_DEVICE int column_at(int i) const { return column + i / 2 * 8 + i % 2; }
    METATE_DEVICE int query(int line) const { return across ? column_at(line) : row_at(line); }
    METATE_DEVICE int key(int place) const { return across ? row_at(place) : column_at(place); }

    METATE_DEVICE static float& at(float (&d)[m][n][4], int line, int place) {
        const int r = across ? place : line, c = across ? line : place;
        return d[r / 2][c / 2][r % 2 * 2 + c % 2];
    }

    METATE_DEVICE static void drop(float (&d)[m][n][4], const uint32_t (&kept)[lines], float factor) {
        METATE_UNROLL
        for (int e = 0; e < lines * places; ++e) {
            float& x = at(d, e / places, e % places);
            x = kept[e / places] >> e % places & 1 ? x * factor : 0.f;
        }
    }

    // Which elements dropout keeps: bit `place` of keep[line].
    METATE_DEVICE void keep(uint32_t (&keep)[lines], const Problem& p, const Sequence& s, int head) const {
        constexpr int distinct = across ? 1 : 4;  // keys that differ modulo 16
        METATE_NO_UNROLL
        for (int i = 0; i < lines; ++i) {
            uint32_t kept = 0;
            METATE_UNROLL
            for (int d = 0; d < distinct; ++d) {
                const int j = key(d);
                const Words<4> words =
                    philox({static_cast<uint32_t>((j >> 6) * 16 + (j & 15)), static_cast<uint32_t>(query(i)),
                            static_cast<uint32_t>(s.batch * p.heads + head), p.a.offset},
                           static_cast<uint32_t>(p.a.seed), static_cast<uint32_t>(p.a.seed >> 32));
                METATE_UNROLL
                for (int place = d; place < places; place += distinct) {
                    const int which = key(place) >> 4;
                    const uint32_t a = which & 1 ? words[1] : words[0], b = which & 1 ? words[3] : words[2];
                    if ((which & 2 ? b : a) >= p.a.dropout_threshold) kept |= 1u << place;
                }
            }
            METATE_UNROLL
            for (int line = 0; line < lines; ++line) {
                if (line == i) keep[line] = kept;
            }
        }
    }

    // body(element, query, key) for all elements of this thread, lines outside.
    template <typename Body>
    METATE_DEVICE void each(float (&d)[m][n][4], const Body& body) const {
        METATE_UNROLL
        for (int line = 0; line < lines; ++line) {
            METATE_UNROLL
            for (int place = 0; place < places; ++place) body(at(d, line, place), query(line), key(place));
        }
    }
};

// Dot products into binary logits, in place. `error`, where wanted, is multiplied by the derivative of the softcap.
template <typename T, bool derive, bool across, int m, int n>
METATE_DEVICE void make_logits(float (&s)[m][n][4], float (&error)[m][n][4], const Scorer<true>& scorer,
                               const Lines<across, m, n>& lines) {
    const Problem& p = scorer.p;
    if (p.softcap > 0.f) {
        // tanh x = 1 - 2 / (exp 2x + 1): its absolute error, which is what a logit needs, stays at 2^-22.
        const float inner = 2.f * log2_e * p.scale / p.softcap, outer = p.softcap * log2_e;
        METATE_UNROLL
        for (int e = 0; e < m * n * 4; ++e) {
            float& x = s[e / 4 / n][e / 4 % n][e % 4];
            const float tanh = 1.f - 2.f * fast_reciprocal(1.f + fast_exp2(x * inner));
            x = product(tanh, outer);
            if (derive) error[e / 4 / n][e / 4 % n][e % 4] *= 1.f - tanh * tanh;
        }
    } else {
        METATE_UNROLL
        for (int e = 0; e < m * n * 4; ++e) {
            float& x = s[e / 4 / n][e / 4 % n][e % 4];
            x = product(x, p.scale * log2_e);
        }
    }
    if (p.a.bias) {
        const View<4>& v = p.a.bias;
        const int64_t start = opaque(scorer.s.batch) * v.stride[0] + opaque(scorer.head) * v.stride[1];
        const int64_t row_stride = opaque(v.stride[2]), column_stride = opaque(v.stride[3]);
        const bool wide = v.dtype == DType::f32;
        lines.each(s, [&](float& x, int i, int j) {
            if (i >= scorer.s.queries || j >= scorer.s.keys) return;
            const int64_t at = start + i * row_stride + j * column_stride;
            x += log2_e * (wide ? load_global<float>(static_cast<const float*>(v.data) + at)
                                : to_float(load_global<T>(static_cast<const T*>(v.data) + at)));
        });
    }
    if (p.a.alibi_slopes) {
        const float slope = scorer.alibi_slope() * log2_e;
        lines.each(s, [&](float& x, int i, int j) { x -= slope * scorer.distance(i, j); });
    }
}

// Takes the keys that a query does not see out: -inf for the logit.
template <bool general, bool across, int m, int n>
METATE_DEVICE void mask(float (&s)[m][n][4], const Scorer<general>& scorer, const Lines<across, m, n>& lines) {
    METATE_UNROLL
    for (int line = 0; line < lines.lines; ++line) {
        const Range range = scorer.keys_of_query(lines.query(line));
        METATE_UNROLL
        for (int place = 0; place < lines.places; ++place) {
            const int j = lines.key(place);
            if (j < range.low || j >= range.high) lines.at(s, line, place) = -infinite();
        }
    }
    if constexpr (general) {
        const Problem& p = scorer.p;
        if (p.a.blocks) {
            lines.each(s, [&](float& x, int i, int j) {
                if (i < scorer.s.queries && j < scorer.s.keys && !scorer.block_seen(i, j)) x = -infinite();
            });
        }
        if (p.a.bits) {
            const View<4>& v = p.a.bits;
            const auto* bits = static_cast<const uint32_t*>(v.data) + opaque(scorer.s.batch) * v.stride[0] +
                               opaque(scorer.head) * v.stride[1];
            constexpr int together = across                          ? 2
                                   : Lines<across, m, n>::places < 8 ? Lines<across, m, n>::places
                                                                     : 8;  // in a word
            METATE_UNROLL
            for (int g = 0; g < lines.lines * lines.places; g += together) {
                const int i = lines.query(g / lines.places), j = lines.key(g % lines.places);
                if (i >= scorer.s.queries || j >= scorer.s.keys) continue;
                const auto word = load_global<uint32_t>(bits + i * v.stride[2] + (j >> 5) * v.stride[3]);
                METATE_UNROLL
                for (int e = g; e < g + together; ++e) {
                    const int place = e % lines.places;
                    if ((word >> (lines.key(place) & 31) & 1) == 0) lines.at(s, g / lines.places, place) = -infinite();
                }
            }
        }
    }
}

}  // namespace metate::cuda::flash
