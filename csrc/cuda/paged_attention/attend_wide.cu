// Heads of more than 256 columns, latent attention above all: 16 or 32 rows a block. The warps share out the keys of a
// tile, and come together at its weights; then they share out the columns of its values. So no warp holds more than 64
// columns of results, and values that are the first columns of the keys (latent attention) are copied once for both
// products. Queries stay in registers, as many of them as there is room for, so that two tiles of keys fit into the
// shared memory of sm_80; beside codes, which take half of it, they lie there too.
#include "host.h"

namespace metate::cuda::paged {
namespace {

constexpr int wide_head = 576, wide_values = 512;  // columns of keys and of values, padded
constexpr int wide_steps = wide_head / 16;         // of a product over the columns of keys
constexpr int wide_warps = 8, wide_threads = wide_warps * 32, wide_step = 64;

struct Wide {
    bool coded;
    int row_warps;

    METATE_INLINE constexpr int rows() const { return row_warps * 16; }
    METATE_INLINE constexpr int key_warps() const { return wide_warps / row_warps; }
    METATE_INLINE constexpr int keys_of_warp() const { return wide_step / key_warps(); }
    METATE_INLINE constexpr int tile_bytes() const {
        return wide_step * pitch_of(coded ? Format::int8 : Format::plain, wide_head);
    }
    METATE_INLINE constexpr int ring_bytes() const { return 2 * tile_bytes(); }
    METATE_INLINE constexpr int weight_bytes() const { return rows() * wide_step * 2; }
    METATE_INLINE constexpr int maximum_bytes() const { return rows() * key_warps() * 4; }
    METATE_INLINE constexpr int scale_bytes() const { return coded ? 4 * wide_step * 4 : 0; }
    METATE_INLINE constexpr int held_steps() const { return coded ? 0 : row_warps == 1 ? wide_steps : wide_steps - 12; }
    METATE_INLINE constexpr int q_bytes() const { return (wide_steps - held_steps()) * rows() * 32; }
    METATE_INLINE constexpr int shared_bytes() const {
        return ring_bytes() + weight_bytes() + maximum_bytes() + scale_bytes() + q_bytes();
    }
};
static_assert(Wide{false, 2}.shared_bytes() <= wide_shared);

// Where the parts of a block's shared memory begin.
template <Wide c>
struct Memory {
    unsigned char* ring;

    METATE_DEVICE unsigned char* slot(int n) const { return ring + (n & 1) * c.tile_bytes(); }
    METATE_DEVICE unsigned char* weights() const { return ring + c.ring_bytes(); }
    METATE_DEVICE unsigned char* maxima() const { return weights() + c.weight_bytes(); }
    METATE_DEVICE unsigned char* k_scales(int tile) const {
        return maxima() + c.maximum_bytes() + (tile & 1) * 2 * wide_step * 4;
    }
    METATE_DEVICE unsigned char* v_scales(int tile) const { return k_scales(tile) + wide_step * 4; }
    METATE_DEVICE unsigned char* queries() const { return maxima() + c.maximum_bytes() + c.scale_bytes(); }
};

// The fragments of 16 rows of queries beside keys that are numbers: the first in registers, the others as the lanes of
// a warp take them from shared memory.
template <Wide c>
struct Fragments {
    static constexpr int held = c.held_steps();
    uint32_t q[held > 0 ? held : 1][4];
    const unsigned char* others;

    METATE_DEVICE void load(const Memory<c>& memory, const unsigned char* staged) {
        using Rows = ByteTile<wide_head * 2>;
        const int group = warp() % c.row_warps, offset = Rows::offset(group * 16 + (lane() & 15), lane() >> 4);
        unsigned char* const rest = memory.queries() + group * 512 + lane() * 16;
        METATE_UNROLL
        for (int k = 0; k < held; ++k) ldmatrix_x4(q[k], staged + Rows::advance(offset, k * 2, 0));
        METATE_UNROLL
        for (int k = held; k < wide_steps; ++k) {
            uint32_t x[4];
            ldmatrix_x4(x, staged + Rows::advance(offset, k * 2, 0));
            if (warp() >= c.row_warps) continue;
            store_shared(rest + (k - held) * c.row_warps * 512, Words<4>{{x[0], x[1], x[2], x[3]}});
        }
        others = rest;
    }

    METATE_DEVICE void get(uint32_t (&x)[4], int k) const {
        if (k < held) {
            METATE_UNROLL
            for (int e = 0; e < 4; ++e) x[e] = q[k][e];
        } else {
            const auto words = load_shared<Words<4>>(others + (k - held) * c.row_warps * 512);
            METATE_UNROLL
            for (int e = 0; e < 4; ++e) x[e] = words[e];
        }
    }
};

// s += q · kᵀ for 16 rows of queries and 8·n keys from `first` on; the sums of eight keys alone are two, of every other
// step, for one would wait for itself.
template <typename T, int n, Wide c>
METATE_DEVICE void multiply_fragments(float (&s)[1][n][4], const Fragments<c>& queries, const unsigned char* k,
                                      int first) {
    using Tile = ByteTile<pitch_of(Format::plain, wide_head)>;
    constexpr int each = n == 1 ? 2 : 1;  // steps whose keys one load brings
    const int l = lane();
    const int offset = opaque(n == 1 ? Tile::offset(first + (l & 7), l >> 3)
                                     : Tile::offset(first + (l & 7) + (l >> 4) * 8, l >> 3 & 1));
    float sums[2][4] = {};
    METATE_UNROLL
    for (int step = 0; step < wide_steps; step += each) {
        uint32_t keys[4];
        ldmatrix_x4(keys, k + Tile::advance(offset, step * 2, 0));
        METATE_UNROLL
        for (int i = 0; i < 2; ++i) {
            uint32_t rows[4];
            queries.get(rows, step + (n == 1 ? i : 0));
            mma_m16n8k16<T>(sums[i], rows, {keys[2 * i], keys[2 * i + 1]});
        }
    }
    METATE_UNROLL
    for (int e = 0; e < 4; ++e) {
        s[0][0][e] += n == 1 ? sums[0][e] + sums[1][e] : sums[0][e];
        if constexpr (n == 2) s[0][1][e] += sums[1][e];
    }
}

// A walk of one block over the keys of a split. A slot of the ring holds keys that are values too, or in turns the keys
// of a tile and its values.
template <typename T, Format format, int row_warps>
struct WideWalk {
    static constexpr bool coded = format != Format::plain;
    static constexpr Wide c{coded, row_warps};
    static constexpr int n = c.keys_of_warp() / 8, m = row_warps;
    using Rows = Copy<wide_step, pitch_of(format, wide_head), wide_threads>;
    using Weights = ByteTile<wide_step * 2>;
    const Attend& f;
    const Span& s;
    const Visit& visit;
    const Row (&rows)[2];
    const Fragments<c>& queries;
    Memory<c> memory;
    int pages[Rows::rows];
    float scale = 0.f;

    METATE_DEVICE int group() const { return warp() % row_warps; }
    METATE_DEVICE int first_key() const { return warp() / row_warps * c.keys_of_warp(); }

    // Pages are looked up a tile before the copies that need them, scales read when copies start and kept a tile later.
    METATE_DEVICE void find(int tile) { Rows::find(pages, f.problem, s, tile * wide_step, visit.low, visit.high); }

    METATE_DEVICE void fetch(int tile, int slot, const Cache& cache) const {
        const int first = tile * wide_step;
        if (first >= visit.high) return;
        Rows::start(memory.slot(slot), cache, pages, f.problem, s, first, visit.low, visit.high);
    }

    METATE_DEVICE void read_scales(int tile) {
        const int t = thread_index();
        if (!coded || t >= 2 * wide_step) return;
        scale =
            scale_of(t < wide_step ? f.k : f.v, f.problem, s, tile * wide_step + t % wide_step, visit.low, visit.high);
    }

    METATE_DEVICE void keep_scales(int tile) const {
        if (!coded || thread_index() >= 2 * wide_step) return;
        store_shared(memory.k_scales(tile) + thread_index() * 4, scale);
    }

    // The maxima of all rows so far, over all warps of keys: of rows 16·i + lane / 4 and 8 further down.
    METATE_DEVICE void find_maxima(float (&decay)[2 * m], float (&base)[2 * m], float (&largest)[2 * m]) const {
        METATE_UNROLL
        for (int r = 0; r < 2 * m; ++r) {
            float top = largest[r];
            const int row = r / 2 * 16 + r % 2 * 8 + (lane() >> 2);
            METATE_UNROLL
            for (int w = 0; w < c.key_warps(); w += 4) {
                const auto of_warps = load_shared<Words<4>>(memory.maxima() + (row * c.key_warps() + w) * 4);
                METATE_UNROLL
                for (int e = 0; e < 4; ++e) top = fmaxf(top, float_of(of_warps[e]));
            }
            base[r] = top == -infinite() ? 0.f : top;
            decay[r] = fast_exp2(largest[r] - base[r]);
            largest[r] = top;
        }
    }

    // Of what there is for all rows, what belongs to those of this warp's logits.
    METATE_DEVICE float of_group(const float (&x)[2 * m], int r) const {
        if constexpr (m == 1) return x[r];
        return group() == 0 ? x[r] : x[2 * (m - 1) + r];
    }

    // Logits into weights in shared memory.
    METATE_DEVICE void weigh(float (&x)[1][n][4], float (&o)[m][8][4], float (&largest)[2 * m], float (&sum)[2]) const {
        float decay[2 * m], base[2 * m];
        find_maxima(decay, base, largest);
        METATE_UNROLL
        for (int r = 0; r < 2; ++r) {
            const float reference = of_group(base, r);
            sum[r] *= of_group(decay, r);
            METATE_UNROLL
            for (int j = 0; j < n; ++j) {
                float* const pair = &x[0][j][r * 2];
                METATE_UNROLL
                for (int e = 0; e < 2; ++e) {
                    pair[e] = fast_exp2(pair[e] - reference);
                    sum[r] += pair[e];
                }
                const int row = group() * 16 + (lane() >> 2) + r * 8;
                store_shared(memory.weights() + Weights::offset(row, first_key() / 8 + j) + (lane() & 3) * 4,
                             pack<T>(pair[0], pair[1]));
            }
        }
        bool moved = false;
        METATE_UNROLL
        for (int r = 0; r < 2 * m; ++r) moved |= decay[r] != 1.f;
        if (!vote_any(moved)) return;
        METATE_UNROLL
        for (int i = 0; i < m * 32; ++i) o[i / 32][i / 4 % 8][i % 4] *= decay[i / 32 * 2 + i % 4 / 2];
    }

    // Adds this warp's columns of the values.
    METATE_DEVICE void add_values(float (&o)[m][8][4], const unsigned char* v, const unsigned char* scales) const {
        const int offset = opaque(Weights::offset(lane() & 15, lane() >> 4));
        METATE_UNROLL
        for (int k = 0; k < wide_step / 16; ++k) {
            uint32_t a[m][1][4];
            METATE_UNROLL
            for (int i = 0; i < m; ++i) {
                ldmatrix_x4(a[i][0], memory.weights() + Weights::advance(offset, k * 2, i * 16));
            }
            multiply_values<T, format, wide_head>(o, a, v, scales, k * 16, warp() * 64);
        }
    }

    // The same element by element: what is not a number reaches only the rows that give its key a weight.
    METATE_DEVICE void add_unsound_values(float (&o)[m][8][4], const unsigned char* v,
                                          const unsigned char* scales) const {
        METATE_NO_UNROLL
        for (int at = 0; at < m * 32; ++at) {
            const int row = at / 32 * 16 + at % 4 / 2 * 8 + (lane() >> 2);
            const int column = warp() * 64 + output_column(format, at / 4 % 8, (lane() & 3) * 2 + at % 2);
            float added = 0.f;
            METATE_NO_UNROLL
            for (int key = 0; key < wide_step; ++key) {
                const float weight =
                    to_float(load_shared<T>(memory.weights() + Weights::offset(row, key / 8) + key % 8 * 2));
                if (weight != 0.f) added += weight * value_at<T, format, wide_head>(v, scales, key, column);
            }
            METATE_UNROLL
            for (int i = 0; i < m * 32; ++i) {  // registers have no index
                if (i == at) o[i / 32][i / 4 % 8][i % 4] += added;
            }
        }
    }

    METATE_DEVICE void find_logits(float (&x)[1][n][4], int tile, bool masked) const {
        const unsigned char* const k = memory.slot(f.values_in_keys ? tile : 0);
        flash::clear(x);
        if constexpr (coded) {
            multiply_keys<T, format, wide_head, n>(x, memory.queries() + group() * 16 * wide_head * 2, k, first_key());
        } else {
            multiply_fragments<T, n>(x, queries, k, first_key());
        }
        make_logits<coded>(x, f, s, rows, tile * wide_step + first_key(), memory.k_scales(tile) + first_key() * 4,
                           masked);
        METATE_UNROLL
        for (int r = 0; r < 2; ++r) {
            float top = -infinite();
            METATE_UNROLL
            for (int e = 0; e < 2 * n; ++e) top = fmaxf(top, x[0][e / 2][r * 2 + e % 2]);
            top = fmaxf(top, shuffle_xor(top, 1));
            top = fmaxf(top, shuffle_xor(top, 2));
            const int row = group() * 16 + (lane() >> 2) + r * 8;
            const int place = row * c.key_warps() + warp() / row_warps;
            if ((lane() & 3) == 0) store_shared(memory.maxima() + place * 4, top);
        }
    }

    METATE_DEVICE void take(int tile, float (&o)[m][8][4], float (&largest)[2 * m], float (&sum)[2]) {
        const bool together = f.values_in_keys;
        const int first = tile * wide_step;
        const bool masked = first < visit.all_low || first + wide_step > visit.all_high;
        fetch(together ? tile + 1 : tile, together ? tile + 1 : 1, together ? f.k : f.v);
        cp_async_commit();
        find(tile + (together ? 2 : 1));
        read_scales(tile + 1);
        float x[1][n][4];
        find_logits(x, tile, masked);
        sync_threads();
        if (!together) fetch(tile + 1, 0, f.k);
        cp_async_commit();
        weigh(x, o, largest, sum);
        if (!together) cp_async_wait<1>();
        sync_threads();
        const unsigned char *const v = memory.slot(together ? tile : 1), *const scales = memory.v_scales(tile);
        bool unsound = false;
        if (masked) unsound = any_unsound<T, format, wide_head, wide_step, wide_threads>(v, scales);
        if (masked && sync_threads_or(unsound)) {
            add_unsound_values(o, v, scales);
        } else {
            add_values(o, v, scales);
        }
        keep_scales(tile + 1);
    }

    METATE_DEVICE void run(float (&o)[m][8][4], float (&largest)[2 * m], float (&sum)[2]) {
        const int start = visit.low / wide_step;
        const int end = visit.high > visit.low ? (visit.high + wide_step - 1) / wide_step : start;
        find(start);
        fetch(start, f.values_in_keys ? start : 0, f.k);
        cp_async_commit();
        if (f.values_in_keys) find(start + 1);
        read_scales(start);
        keep_scales(start);
        METATE_NO_UNROLL
        for (int tile = start; tile < end; ++tile) {
            cp_async_wait<0>();
            sync_threads();
            take(tile, o, largest, sum);
        }
        cp_async_wait<0>();
        sync_threads();
    }

    // What a split left in the registers of all warps, to where it belongs.
    METATE_DEVICE void finish(const Splits& splits, int split, int m0, const float (&o)[m][8][4],
                              const float (&largest)[2 * m], const float (&sum)[2]) const {
        constexpr int pitch = wide_values * 4 + 32;  // rows apart by some banks
        static_assert(c.rows() * pitch <= c.ring_bytes() && c.key_warps() * c.rows() * 8 <= c.weight_bytes());
        const int l = lane();
        METATE_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int row = warp() / row_warps * c.rows() + group() * 16 + (l >> 2) + r * 8;
            put_statistics(memory.weights(), row, of_group(largest, r), sum[r]);
        }
        METATE_UNROLL
        for (int i = 0; i < m * 32; ++i) {
            const int row = i / 32 * 16 + i % 4 / 2 * 8 + (l >> 2);
            const int column = warp() * 64 + output_column(format, i / 4 % 8, (l & 3) * 2 + i % 2);
            store_shared(memory.ring + row * pitch + column * 4, o[i / 32][i / 4 % 8][i % 4]);
        }
        sync_threads();
        write_rows<T, c.rows(), wide_warps, c.key_warps(), 1, pitch>(f, s, splits, split, m0, memory.ring,
                                                                     memory.weights());
    }
};

template <typename T, bool coded, int row_warps>
METATE_KERNEL(wide_threads, 1)
attend_wide_kernel(METATE_PARAMETER(Attend, f)) {
    METATE_SHARED(unsigned char, shared);
    constexpr Wide c{coded, row_warps};
    const Memory<c> memory{shared};
    const Problem& p = f.problem;
    Span s;
    int m0, part;
    if (!find_rows<c.rows()>(f, s, m0, part)) return;

    unsigned char* const staged = coded ? memory.queries() : memory.ring;
    load_queries<T, wide_head, c.rows(), wide_threads>(staged, f, s, m0);
    Fragments<c> queries;
    if constexpr (!coded) {
        sync_threads();
        queries.load(memory, staged);
        sync_threads();
    }
    const int mine = m0 + warp() % row_warps * 16 + (lane() >> 2);
    const Row rows[2] = {Row(p, s, mine), Row(p, s, mine + 8)};
    const int i_first = p.by_group(m0), i_last = p.by_group(least(m0 + c.rows(), s.queries * p.group) - 1);
    const Splits splits = splits_of(p, s);
    METATE_NO_UNROLL
    for (int split = part; split < most(splits.count, 1); split += p.at_once) {
        float o[row_warps][8][4], largest[2 * row_warps], sum[2] = {};
        flash::clear(o);
        METATE_UNROLL
        for (int r = 0; r < 2 * row_warps; ++r) largest[r] = -infinite();
        const int begin = (splits.first + split) * splits.length;
        const Visit visit(p, s, i_first, i_last, begin, begin + splits.length);
        with_format<coded>(f.k.format, [&]<Format format>() {
            WideWalk<T, format, row_warps> walk{f, s, visit, rows, queries, memory, {}};
            walk.run(o, largest, sum);
            walk.finish(splits, split, m0, o, largest, sum);
        });
        sync_threads();
    }
}

}  // namespace

template <int row_warps>
void attend_wide(const Attend& f, void* stream) {
    const bool coded = f.k.format != Format::plain;
    const auto start = [&]<typename T, bool of_codes>() {
        const int64_t blocks = static_cast<int64_t>(f.slots) * f.problem.at_once * f.problem.kv_heads;
        launch(attend_wide_kernel<T, of_codes, row_warps>, {static_cast<int>(blocks)}, wide_threads,
               Wide{of_codes, row_warps}.shared_bytes(), stream, f);
    };
    const auto with_type = [&]<typename T>() {
        coded ? start.template operator()<T, true>() : start.template operator()<T, false>();
    };
    f.problem.a.q.dtype == DType::bf16 ? with_type.template operator()<bf16>() : with_type.template operator()<f16>();
}

template void attend_wide<1>(const Attend&, void*);
template void attend_wide<2>(const Attend&, void*);

}  // namespace metate::cuda::paged
