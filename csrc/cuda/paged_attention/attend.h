// The kernel: a block takes up to 16 or 64 rows through the keys of some splits, with tiles of keys and values in a
// ring of asynchronous copies. With 16 rows the warps share out the keys of a tile and come together at the end; with
// 64 each has 16 rows.
#pragma once

#include "../attention/softmax.h"
#include "cache.h"

namespace metate::cuda::paged {

struct Shape {
    int head;  // columns of every tile: D and Dv padded
    bool coded;
    int row_warps;

    METATE_INLINE constexpr int key_warps() const { return row_warps > 1 ? 1 : head == 256 ? 2 : 4; }
    METATE_INLINE constexpr int warps() const { return row_warps * key_warps(); }
    METATE_INLINE constexpr int threads() const { return warps() * 32; }
    METATE_INLINE constexpr int rows() const { return row_warps * 16; }
    METATE_INLINE constexpr int step() const { return key_warps() == 1 ? 64 : key_warps() * 16; }
    METATE_INLINE constexpr int keys_of_warp() const { return step() / key_warps(); }
    METATE_INLINE constexpr int tile_bytes() const { return step() * head * (coded ? 1 : 2); }
    METATE_INLINE constexpr int stages() const { return tile_bytes() >= 1 << 14 ? 2 : 4; }
    METATE_INLINE constexpr int q_bytes() const { return rows() * head * 2; }
    METATE_INLINE constexpr int ring_bytes() const { return stages() * 2 * tile_bytes(); }
    METATE_INLINE constexpr int shared_bytes() const { return q_bytes() + ring_bytes() + stages() * 2 * step() * 4; }
};

struct Attend {
    Problem problem;
    Cache k, v;
    int slots;
    bool few_alone;  // sequences of few rows only, one slot each; false: packed sequences of few rows are left out
    bool vector_q;
    bool values_in_keys;  // values are the first columns of the keys
};

// The rows of one block and the keys that they visit in one split.
struct Visit {
    int low, high;          // keys that any row sees, as far as a range can say it
    int all_low, all_high;  // keys that every row sees

    METATE_DEVICE Visit(const Problem& p, const Span& s, int i_first, int i_last, int begin, int end) {
        low = most(most(s.first_key, p.left >= 0 ? s.place() + i_first - p.left : 0), begin);
        high = least(p.right >= 0 ? least(s.keys, s.place() + i_last + p.right + 1) : s.keys, end);
        all_low = most(s.first_key, p.left >= 0 ? s.place() + i_last - p.left : 0);
        all_high = p.right >= 0 ? least(s.keys, s.place() + i_first + p.right + 1) : s.keys;
        if (p.a.bits) all_high = least(all_high, s.place());
        if (p.a.positions) {  // in any order
            low = most(s.first_key, begin);
            high = least(s.keys, end);
            all_high = p.left < 0 && p.right < 0 ? all_high : all_low;
        }
    }
};

template <bool coded, typename Body>
METATE_DEVICE void with_format(Format format, const Body& body) {
    if constexpr (!coded) {
        body.template operator()<Format::plain>();
    } else if (format == Format::int8) {
        body.template operator()<Format::int8>();
    } else if (format == Format::float8) {
        body.template operator()<Format::float8>();
    } else {
        body.template operator()<Format::int4>();
    }
}

// The queries of a block into shared memory, their columns in the order in which products take them.
template <typename T, int head, int rows, int threads>
METATE_DEVICE void load_queries(unsigned char* tile, const Attend& f, const Span& s, int m0) {
    const Problem& p = f.problem;
    const View<4>& q = p.a.q;
    const int columns = static_cast<int>(q.size[3]);
    METATE_NO_UNROLL
    for (int index = thread_index(); index < rows * head / 8; index += threads) {
        const int r = index / (head / 8), chunk = index % (head / 8);
        const int i = p.by_group(m0 + r), h = s.kv_head * p.group + m0 + r - i * p.group;
        Words<4> words{};
        if (i < s.queries) {
            const auto* const row = static_cast<const uint16_t*>(q.data) + s.batch * q.stride[0] +
                                    (s.first_query + i) * q.stride[1] + h * q.stride[2];
            if (f.vector_q && chunk * 8 + 8 <= columns) {
                words = load_global<Words<4>>(row + chunk * 8);
            } else {
                METATE_UNROLL
                for (int e = 0; e < 8; ++e) {
                    if (chunk * 8 + e >= columns) continue;
                    const uint32_t x = load_global<uint16_t>(row + (chunk * 8 + e) * q.stride[3]);
                    words[e / 2] |= x << (e % 2 * 16);
                }
            }
        }
        METATE_UNROLL
        for (int w = 0; w < 4; ++w) {
            const int place = pair_place(f.k.format, chunk * 4 + w);
            store_shared(tile + ByteTile<head * 2>::offset(r, place / 4) + place % 4 * 4, words[w]);
        }
    }
}

// Statistics of a row in the eyes of one warp of keys: its maximum and its sum.
METATE_DEVICE void put_statistics(unsigned char* statistics, int row, float largest, float sum) {
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if ((lane() & 3) == 0) store_shared(statistics + row * 8, Words<2>{{bits_of(largest), bits_of(sum)}});
}

// Results of a split, or partial results where there are several, from statistics of `key_warps` warps and `parts`
// areas of outputs: one for each of these warps, or one for all, whose maxima are then the same.
template <typename T, int rows, int warps, int key_warps, int parts, int pitch>
METATE_DEVICE void write_rows(const Attend& f, const Span& s, const Splits& splits, int split, int m0,
                              const unsigned char* area, const unsigned char* statistics) {
    const Problem& p = f.problem;
    const int l = lane();
    METATE_NO_UNROLL
    for (int r = warp(); r < rows; r += warps) {
        const int i = p.by_group(m0 + r), h = s.kv_head * p.group + m0 + r - i * p.group;
        if (i >= s.queries) break;
        float top = -infinite(), total = 0.f, factor[key_warps];
        const auto of_warp = [&](int w) { return load_shared<Words<2>>(statistics + (w * rows + r) * 8); };
        METATE_UNROLL
        for (int w = 0; w < key_warps; ++w) top = fmaxf(top, float_of(of_warp(w)[0]));
        const bool last = splits.count <= 1;
        const float sink = last ? sink_of(p, s, i, h) : -infinite();
        top = fmaxf(top, sink);
        const float base = top == -infinite() ? 0.f : top;
        METATE_UNROLL
        for (int w = 0; w < key_warps; ++w) {
            factor[w] = fast_exp2(float_of(of_warp(w)[0]) - base);
            total += float_of(of_warp(w)[1]) * factor[w];
        }
        total += fast_exp2(sink - base);
        const float scale = !last ? 1.f : total == 0.f ? 0.f : 1.f / total;
        const int64_t entry = partial_entry(p, s, split, m0 + r);
        const int64_t columns = p.a.out.size[3];
        METATE_NO_UNROLL
        for (int column = l; column < columns; column += warp_size) {
            float x = 0.f;
            METATE_UNROLL
            for (int w = 0; w < parts; ++w) {
                x += load_shared<float>(area + (w * rows + r) * pitch + column * 4) * factor[w];
            }
            if (last) {
                const View<4>& v = p.a.out;
                store_global(static_cast<T*>(v.data) + s.batch * v.stride[0] + (s.first_query + i) * v.stride[1] +
                                 h * v.stride[2] + column * v.stride[3],
                             from_float<T>(x * scale));
            } else {
                store_global(p.partial + entry * columns + column, x);
            }
        }
        if (l != 0) continue;
        if (last) {
            store_softmax(p, s, i, h, base, total);
        } else {
            store_global(p.partial + p.entries * columns + entry, total);
            store_global(p.partial + p.entries * (columns + 1) + entry, top);
        }
    }
}

// What a split left in the registers of all warps, into `area`, a row of outputs for each row and warp of keys, and
// from there to where it belongs.
template <typename T, int head, bool coded, int row_warps>
METATE_DEVICE void finish(const Attend& f, const Span& s, const Splits& splits, int split, int m0, unsigned char* area,
                          unsigned char* statistics, float (&o)[1][head / 8][4], const float (&largest)[2],
                          const float (&sum)[2]) {
    constexpr Shape c{head, coded, row_warps};
    constexpr int pitch = head * 4;
    const int l = lane(), first = warp() / row_warps * c.rows() + warp() % row_warps * 16 + (l >> 2);
    METATE_UNROLL
    for (int r = 0; r < 2; ++r) {
        put_statistics(statistics, first + r * 8, largest[r], sum[r]);
        METATE_UNROLL
        for (int e = 0; e < head / 4; ++e) {
            const int column = output_column(f.k.format, e / 2, (l & 3) * 2 + e % 2);
            store_shared(area + (first + r * 8) * pitch + column * 4, o[0][e / 2][r * 2 + e % 2]);
        }
    }
    sync_threads();
    write_rows<T, c.rows(), c.warps(), c.key_warps(), c.key_warps(), pitch>(f, s, splits, split, m0, area, statistics);
}

// Dot products into logits, and what a row does not see to -inf. `first`: the key of the first column.
template <bool coded, int n>
METATE_DEVICE void make_logits(float (&x)[1][n][4], const Attend& f, const Span& s, const Row (&rows)[2], int first,
                               const unsigned char* counts, bool masked) {
    const Problem& p = f.problem;
    const int column = first + (lane() & 3) * 2;
    METATE_UNROLL
    for (int e = 0; e < 2 * n; ++e) {
        float factor = factor_of(p);
        if constexpr (coded) factor *= load_shared<float>(counts + (e / 2 * 8 + (lane() & 3) * 2 + e % 2) * 4);
        METATE_UNROLL
        for (int r = 0; r < 4; r += 2) x[0][e / 2][r + e % 2] = product(x[0][e / 2][r + e % 2], factor);
    }
    if (p.softcap > 0.f) {
        METATE_UNROLL
        for (int e = 0; e < 4 * n; ++e) x[0][e / 4][e % 4] = product(log2_e, capped(x[0][e / 4][e % 4], p.softcap));
    }
    if (p.a.alibi_slopes) {
        METATE_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int away = rows[r].position(p, s) - column;
            METATE_UNROLL
            for (int e = 0; e < 2 * n; ++e) x[0][e / 2][r * 2 + e % 2] -= rows[r].penalty(away - e / 2 * 8 - e % 2);
        }
    }
    if (!masked) return;
    METATE_UNROLL
    for (int r = 0; r < 2; ++r) {
        const uint32_t tree = p.a.bits ? rows[r].tree_columns(p, s, column, 2 * n) : ~0u;
        const Keys range = rows[r].keys(p, s);
        METATE_UNROLL
        for (int e = 0; e < 2 * n; ++e) {
            const int j = column + e / 2 * 8 + e % 2;
            if (!range.hold(j) || !(tree >> e & 1)) x[0][e / 2][r * 2 + e % 2] = -infinite();
        }
    }
}

// A walk of one block over the keys of a split, through a ring of tiles: keys, values, and for codes what they count.
template <typename T, int head, Format format, int row_warps>
struct Walk {
    static constexpr bool coded = format != Format::plain;
    static constexpr Shape c{head, coded, row_warps};
    static constexpr int n = c.keys_of_warp() / 8;
    using Rows = Copy<c.step(), pitch_of(format, head), c.threads()>;
    const Attend& f;
    const Span& s;
    const Visit& visit;
    const Row (&rows)[2];
    const unsigned char* q_tile;
    unsigned char *tiles, *scales;
    int pages[Rows::rows];
    float scale = 0.f;

    METATE_DEVICE unsigned char* k(int tile) const { return tiles + tile % c.stages() * 2 * c.tile_bytes(); }
    METATE_DEVICE unsigned char* v(int tile) const { return k(tile) + c.tile_bytes(); }
    METATE_DEVICE unsigned char* k_scales(int tile) const { return scales + tile % c.stages() * 2 * c.step() * 4; }
    METATE_DEVICE unsigned char* v_scales(int tile) const { return k_scales(tile) + c.step() * 4; }

    // Pages are looked up a tile before the copies that need them, and scales are read when the copies start and put
    // into the ring a tile later, so that neither is waited for.
    METATE_DEVICE void find(int tile) { Rows::find(pages, f.problem, s, tile * c.step(), visit.low, visit.high); }

    METATE_DEVICE void fetch(int tile) {
        const int first = tile * c.step();
        if (first < visit.high) {
            Rows::start(k(tile), f.k, pages, f.problem, s, first, visit.low, visit.high);
            Rows::start(v(tile), f.v, pages, f.problem, s, first, visit.low, visit.high);
            if constexpr (coded) {
                static_assert(c.threads() == 2 * c.step());
                const int t = thread_index(), j = first + t % c.step();
                scale = scale_of(t < c.step() ? f.k : f.v, f.problem, s, j, visit.low, visit.high);
            }
            find(tile + 1);
        }
        cp_async_commit();
    }

    METATE_DEVICE void keep_scales(int tile) const {
        if constexpr (coded) store_shared(k_scales(tile) + thread_index() * 4, scale);
    }

    // Scores of one tile, their softmax, and the product with the values.
    METATE_DEVICE void take(int tile, float (&o)[1][head / 8][4], float (&largest)[2], float (&sum)[2]) const {
        const int mine = warp() / row_warps * c.keys_of_warp(), first = tile * c.step();
        const bool masked = first < visit.all_low || first + c.step() > visit.all_high;
        float x[1][n][4];
        flash::clear(x);
        multiply_keys<T, format, head, n>(x, q_tile + warp() % row_warps * 16 * head * 2, k(tile), mine);
        make_logits<coded>(x, f, s, rows, first + mine, k_scales(tile) + mine * 4, masked);
        flash::softmax<false>(x, largest, sum, o, 1.f);
        uint32_t weights[1][n / 2][4];
        flash::pack_left<T>(weights, x);
        bool unsound = false;
        if (masked) unsound = any_unsound<T, format, head, c.step(), c.threads()>(v(tile), v_scales(tile));
        if (masked && sync_threads_or(unsound)) {
            multiply_unsound_values<T, format, head>(o, weights, v(tile), v_scales(tile), mine);
        } else {
            multiply_values<T, format, head>(o, weights, v(tile), v_scales(tile), mine, 0);
        }
    }

    METATE_DEVICE void run(float (&o)[1][head / 8][4], float (&largest)[2], float (&sum)[2]) {
        constexpr int ahead = c.stages() - 1;
        const int start = visit.low / c.step();
        const int end = visit.high > visit.low ? (visit.high + c.step() - 1) / c.step() : start;
        find(start);
        METATE_NO_UNROLL
        for (int i = 0; i < ahead; ++i) {
            fetch(start + i);
            keep_scales(start + i);
        }
        METATE_NO_UNROLL
        for (int tile = start; tile < end; ++tile) {
            cp_async_wait<ahead - 1>();
            sync_threads();
            fetch(tile + ahead);
            take(tile, o, largest, sum);
            keep_scales(tile + ahead);
        }
        cp_async_wait<0>();
        sync_threads();
    }
};

constexpr int blocks_per_processor(int head, int row_warps) {
    return head > 128 ? 1 : row_warps > 1 ? 2 : 3;
}

// The rows of a block, a tile of those of a sequence, from row m0 on, and which of its splits come first. False: none.
template <int rows>
METATE_DEVICE bool find_rows(const Attend& f, Span& s, int& m0, int& part) {
    const Problem& p = f.problem;
    const int kv_head = block_index().x % p.kv_heads, rest = block_index().x / p.kv_heads, slot = rest / p.at_once;
    part = rest % p.at_once;
    int sequence = slot, tile = 0;
    if (!p.packed) {
        const int tiles = f.slots / p.sequences;
        sequence = slot / tiles, tile = slot % tiles;
    } else if (!f.few_alone) {
        sequence = packed_owner(p, slot, p.group, rows, 1);
        tile = slot - sequence - packed_start(p, sequence) * p.group / rows;
    }
    s = span_of(p, sequence, kv_head);
    m0 = tile * rows;
    const int all_rows = s.queries * p.group;
    if (m0 < 0 || m0 >= all_rows) return false;
    if (p.packed && rows != few_rows && all_rows <= few_rows) return false;
    return !(p.packed && f.few_alone && all_rows > few_rows);
}

template <typename T, int head, bool coded, int row_warps>
METATE_KERNEL((Shape{head, coded, row_warps}.threads()), blocks_per_processor(head, row_warps))
attend_kernel(METATE_PARAMETER(Attend, f)) {
    METATE_SHARED(unsigned char, shared);
    constexpr Shape c{head, coded, row_warps};
    const Problem& p = f.problem;
    Span s;
    int m0, part;
    if (!find_rows<c.rows()>(f, s, m0, part)) return;

    load_queries<T, head, c.rows(), c.threads()>(shared, f, s, m0);
    unsigned char *const tiles = shared + c.q_bytes(), *const scales = tiles + c.ring_bytes();
    const int mine = m0 + warp() % row_warps * 16 + (lane() >> 2);
    const Row rows[2] = {Row(p, s, mine), Row(p, s, mine + 8)};
    const int i_first = p.by_group(m0), i_last = p.by_group(least(m0 + c.rows(), s.queries * p.group) - 1);
    const Splits splits = splits_of(p, s);
    METATE_NO_UNROLL
    for (int split = part; split < most(splits.count, 1); split += p.at_once) {
        float o[1][head / 8][4], largest[2] = {-infinite(), -infinite()}, sum[2] = {};
        flash::clear(o);
        const int begin = (splits.first + split) * splits.length;
        const Visit visit(p, s, i_first, i_last, begin, begin + splits.length);
        with_format<coded>(f.k.format, [&]<Format format>() {
            Walk<T, head, format, row_warps>{f, s, visit, rows, shared, tiles, scales, {}}.run(o, largest, sum);
        });
        constexpr int area = c.warps() * 16 * head * 4;
        static_assert(area + c.warps() * 16 * 8 <= c.ring_bytes());
        finish<T, head, coded, row_warps>(f, s, splits, split, m0, tiles, tiles + area, o, largest, sum);
        sync_threads();
    }
}

// Starts the kernel for all tiles of rows.
template <typename T, int head, bool coded, int row_warps>
void launch_attend(Attend f, void* stream) {
    constexpr Shape c{head, coded, row_warps};
    const int64_t blocks = static_cast<int64_t>(f.slots) * f.problem.at_once * f.problem.kv_heads;
    launch(attend_kernel<T, head, coded, row_warps>, {static_cast<int>(blocks)}, c.threads(), c.shared_bytes(), stream,
           f);
}

}  // namespace metate::cuda::paged
