// Attention backward: dq, dk, dv, and on request the gradients of the bias and of the ALiBi slopes.
//
// A piece of work is a block of keys of one key head, or all of them. It keeps its dk and dv in cache while it walks
// over the queries of the group, and adds its part of dq to a float copy of dq, where tiles take turns by ascending
// key: a tile waits for the tile of the block before. So one pass of five products does, sums have one order however
// many workers there are, and memory stays linear in the length. Pieces are fetched in ascending order and a tile waits
// only for tiles of earlier pieces: somebody can always go on, even if workers run one after another.
#include <sched.h>

#include "backward_exact.h"
#include "differentiate.h"

namespace metate::cpu::METATE_ISA {
namespace {

// One key head of one sequence and the query heads that share it.
struct Head {
    Sequence s;
    int64_t kv, tiles, blocks;  // tiles of queries, blocks of keys
    int64_t first_tile;         // of the first query head, in Plan::range and turn; `tiles` for each query head
    int64_t shared_row;         // the first of Plan::shared if several workers share the head, else -1
};

struct Work {
    int64_t head;
    int64_t begin, end;  // blocks of keys
};

struct Range {
    int32_t begin, end;  // blocks of keys that a tile of queries may see
};

// What becomes of the gradient of the bias, by the dimensions over which it is summed.
enum class BiasSum { none, elements, columns, rows };

template <class Word>
struct Plan {
    int64_t heads, work, tiles, own_rows, shared_rows;
    Head* head;
    Work* piece;
    Range* range;
    int32_t* turn;    // the next block of keys to add to a tile of dq
    int32_t* packed;  // what has become of the operands of a tile of queries, see pack_tile
    Rows<Word> shared;
    Place* place;       // of the rows whose softmax is to be found
    double* bias_sum;   // (batch, head, key) or (batch, head, query)
    double* slope_sum;  // per tile
};

template <class Word>
struct Call {
    const AttentionBackward& args;
    const Attention& a;
    Blocking size;
    int64_t group;
    BiasSum bias_sum;
    Plan<Word> plan;
    Workspace<Word>* work;
    Walk walk;  // where the softmax of rows is to be found
    RowSoftmax softmax;
    int64_t places;
    WalkScratch<Word>* walks;
};

// Scheduling.

// Visits every head with whether its blocks are to be pieces of their own: those behind which too little work is left
// to keep the other workers busy. Workers on one head wait for each other now and then, so these are to be few.
template <class Visit>
inline void each_head(const Attention& a, const Blocking& size, int threads, const Visit& visit) {
    const int64_t sequences = sequences_of(a), kv_heads = a.k.size[2], group = kv_heads ? a.q.size[2] / kv_heads : 0;
    double left = 0;
    for (int64_t n = 0; n < sequences; ++n) {
        const Sequence s = sequence_of(a, n);
        left += static_cast<double>(s.queries) * static_cast<double>(s.keys) * static_cast<double>(kv_heads);
    }
    int64_t first_tile = 0;
    for (int64_t n = 0; n < sequences; ++n) {
        const Sequence s = sequence_of(a, n);
        const double cost = static_cast<double>(s.queries) * static_cast<double>(s.keys);
        for (int64_t kv = 0; kv < kv_heads; ++kv) {
            const Head head{s, kv, ceil_div(s.queries, size.queries), ceil_div(s.keys, size.keys), first_tile, -1};
            left -= cost;
            visit(head, threads > 1 && head.blocks > 1 && (threads - 1) * cost > left);
            first_tile += group * head.tiles;
        }
    }
}

template <class Word>
inline void count_plan(Call<Word>& call, int threads) {
    Plan<Word>& plan = call.plan;
    each_head(call.a, call.size, threads, [&](const Head& head, bool shared) {
        const int64_t rows = call.group * round_up(head.s.queries, tile_rows);
        ++plan.heads;
        plan.work += shared ? head.blocks : 1;
        plan.tiles += call.group * head.tiles;
        if (shared) plan.shared_rows += rows;
        if (!shared && rows > plan.own_rows) plan.own_rows = rows;
    });
}

template <class Word>
inline void fill_plan(Call<Word>& call, int threads) {
    Plan<Word>& plan = call.plan;
    int64_t heads = 0, work = 0, shared_rows = 0;
    each_head(call.a, call.size, threads, [&](const Head& head, bool shared) {
        plan.head[heads] = head;
        for (int64_t b = 0; shared && b < head.blocks; ++b) plan.piece[work++] = {heads, b, b + 1};
        if (!shared) plan.piece[work++] = {heads, 0, head.blocks};
        if (shared) {
            plan.head[heads].shared_row = shared_rows;
            shared_rows += call.group * round_up(head.s.queries, tile_rows);
        }
        ++heads;
    });
}

// The blocks of keys each tile of queries may see: all of them where the bias wants every element of its gradient.
template <class Word>
inline void find_ranges(const Call<Word>& call, const Head& head) {
    const Attention& a = call.a;
    for (int64_t t = 0; t < call.group * head.tiles; ++t) {
        const int64_t first = t % head.tiles * call.size.queries, h = head.kv * call.group + t / head.tiles;
        const int64_t end_of_tile = first + call.size.queries,
                      last = end_of_tile < head.s.queries ? end_of_tile : head.s.queries;
        int64_t begin = head.s.keys, end = 0, unused;
        for (int64_t i = first; a.intervals && i < last; ++i) {
            const Row row = row_of(a, head.s, i, h);
            if (row.begin >= row.end) continue;
            if (row.begin < begin) begin = row.begin;
            if (row.end > end) end = row.end;
        }
        if (!a.intervals) {
            window_of(a, head.s, first, begin, unused);
            window_of(a, head.s, last - 1, unused, end);
        }
        Range range{static_cast<int32_t>(begin / call.size.keys), static_cast<int32_t>(ceil_div(end, call.size.keys))};
        if (begin >= end) range = {0, 0};
        if (call.bias_sum == BiasSum::elements) range = {0, static_cast<int32_t>(head.blocks)};
        call.plan.range[head.first_tile + t] = range;
        call.plan.turn[head.first_tile + t] = range.begin;
        call.plan.packed[head.first_tile + t] = 0;
    }
}

inline void wait_for(const int32_t* counter, int64_t value) {
    for (int n = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; ++n) {
        if (n >= 64) sched_yield();
    }
}

// Gradients of the bias and of the slopes.

inline BiasSum bias_sum_of(const View<4>& dbias) {
    if (!dbias) return BiasSum::none;
    return dbias.stride[3] == 0 ? BiasSum::rows : dbias.stride[2] == 0 ? BiasSum::columns : BiasSum::elements;
}

// How many query heads before this one its bias was used last; 0: never.
template <class Word>
inline int64_t heads_since_bias(const Call<Word>& call, int64_t batch, int64_t h) {
    const View<4>& bias = call.args.dbias;
    if (h > 0 && bias.stride[1] == 0) return 1;
    if (batch == 0 || bias.stride[0] != 0) return 0;
    return bias.stride[1] == 0 ? 1 : call.a.q.size[2];
}

// ds into dbias, which another head may have begun.
template <class Word>
inline void add_to_bias(const Call<Word>& call, const Sequence& s, int64_t h, bool is_first, const Workspace<Word>& w) {
    const View<4>& bias = call.args.dbias;
    float* const to = static_cast<float*>(bias.data) + s.batch * bias.stride[0] + h * bias.stride[1] +
                      w.first * bias.stride[2] + w.key * bias.stride[3];
    for (int64_t r = 0; r < w.queries; ++r) {
        const float* const ds = w.ds + r * call.size.line;
        float* const row = to + r * bias.stride[2];
        for (int64_t j = 0; j < w.keys; ++j) {
            float& x = row[j * bias.stride[3]];
            x = is_first ? ds[j] : x + ds[j];
        }
    }
}

template <class Word>
inline void add_to_column_sums(const Call<Word>& call, const Sequence& s, int64_t h, const Workspace<Word>& w) {
    double* const to = call.plan.bias_sum + (s.batch * call.a.q.size[2] + h) * s.keys + w.key;
    for (int64_t j = 0; j < w.keys; j += width) {
        vf sums = splat(0.0f);
        for (int64_t r = 0; r < w.queries; ++r) sums = sums + load(w.ds + r * call.size.line + j);
        float line[width];
        store(line, sums);
        for (int64_t i = 0; i < width && j + i < w.keys; ++i) to[j + i] += static_cast<double>(line[i]);
    }
}

// What tiles may add only in turn: sums over keys.
template <class Word>
inline void add_row_sums(const Call<Word>& call, const Sequence& s, int64_t h, int64_t tile, const Workspace<Word>& w) {
    double slope_sum = 0;
    for (int64_t r = 0; r < w.queries; ++r) {
        vf total = splat(0.0f), moment = splat(0.0f);
        for (int64_t j = 0; j < w.keys; j += width) {
            const vf live = select(first(w.keys - j < width ? w.keys - j : width), load(w.ds + r * call.size.line + j),
                                   splat(0.0f));
            const auto ahead = static_cast<int32_t>(w.first + r + s.diagonal - w.key - j);
            total = total + live;
            moment = fma(live, to_float(abs(sub(splat(ahead), lanes()))), moment);
        }
        slope_sum -= static_cast<double>(sum(moment));
        if (call.bias_sum == BiasSum::rows) {
            call.plan.bias_sum[(s.batch * call.a.q.size[2] + h) * s.queries + w.first + r] +=
                static_cast<double>(sum(total));
        }
    }
    if (call.plan.slope_sum) call.plan.slope_sum[tile] += slope_sum;
}

// The gradient of a bias that is broadcast along queries or keys, from the sums of each head.
template <class Word>
inline void reduce_bias(const Call<Word>& call) {
    const View<4>& bias = call.args.dbias;
    const int kept = call.bias_sum == BiasSum::rows ? 2 : 3;
    int64_t extent[4], repeats[4];
    for (int n = 0; n < 4; ++n) {
        extent[n] = bias.stride[n] == 0 ? 1 : bias.size[n];
        repeats[n] = bias.stride[n] == 0 ? bias.size[n] : 1;
    }
    const auto sum_at = [&](int64_t b, int64_t h, int64_t i) {
        double total = 0;
        for (int64_t batch = b; batch < b + repeats[0]; ++batch) {
            for (int64_t head = h; head < h + repeats[1]; ++head) {
                const double* const from = call.plan.bias_sum + (batch * bias.size[1] + head) * bias.size[kept];
                for (int64_t n = i; n < i + repeats[kept]; ++n) total += from[n];
            }
        }
        return static_cast<float>(total);
    };
    for (int64_t b = 0; b < extent[0]; ++b) {
        for (int64_t h = 0; h < extent[1]; ++h) {
            float* const row = static_cast<float*>(bias.data) + b * bias.stride[0] + h * bias.stride[1];
            for (int64_t i = 0; i < extent[kept]; ++i) row[i * bias.stride[kept]] = sum_at(b, h, i);
        }
    }
}

template <class Word>
inline void reduce_slopes(const Call<Word>& call) {
    const View<2>& to = call.args.dalibi_slopes;
    clear<float>(to);
    for (int64_t n = 0; n < call.plan.heads; ++n) {
        const Head& head = call.plan.head[n];
        const int64_t batch = head.s.number < to.size[0] ? head.s.number : 0;
        for (int64_t g = 0; g < call.group; ++g) {
            const double* const sums = call.plan.slope_sum + head.first_tile + g * head.tiles;
            double total = 0;
            for (int64_t t = 0; t < head.tiles; ++t) total += sums[t];
            static_cast<float*>(to.data)[batch * to.stride[0] + (head.kv * call.group + g) * to.stride[1]] +=
                static_cast<float>(total);
        }
    }
}

// The pass.

// Packs q and dout of a tile, or waits until the worker that came first has done so: `state` goes from 0 over 1 to
// `done` and what is finite.
template <class Word, class T>
inline void pack_tile(const Call<Word>& call, const Sequence& s, int64_t h, int32_t* state, Workspace<Word>& w) {
    constexpr int32_t done = 4, finite_queries = 1, finite_gradients = 2;
    int32_t now = 0;
    if (__atomic_compare_exchange_n(state, &now, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) {
        const bool queries = pack_queries<Word, T>(call.a.q, s, h, call.size.depth, w, w.query_rows, w.query_panels);
        const bool gradients = pack_queries<Word, T>(call.args.grad_out, s, h, call.size.value_depth, w,
                                                     w.gradient_rows, w.gradient_panels);
        now = done + (queries ? finite_queries : 0) + (gradients ? finite_gradients : 0);
        __atomic_store_n(state, now, __ATOMIC_RELEASE);
    } else if (now < done) {
        wait_for(state, done);
        now = __atomic_load_n(state, __ATOMIC_ACQUIRE);
    }
    w.finite_queries = now & finite_queries;
    w.finite_gradients = now & finite_gradients;
}

// One tile, of which w.key and w.keys are set and the keys packed.
template <class Word, class T>
inline void run_tile(const Call<Word>& call, const Head& head, int64_t g, int64_t t, int64_t block,
                     const Rows<Word>& rows, Workspace<Word>& w) {
    const Attention& a = call.a;
    const int64_t h = head.kv * call.group + g, tile = head.first_tile + g * head.tiles + t;
    const Range range = call.plan.range[tile];
    w.first = t * call.size.queries;
    w.queries = head.s.queries - w.first < call.size.queries ? head.s.queries - w.first : call.size.queries;
    w.groups = ceil_div(w.queries, tile_rows);
    const int64_t row = g * round_up(head.s.queries, tile_rows) + w.first;
    float* const to = rows.dq + row * call.size.depth;
    const bool is_seen = see(call.args, call.softmax, head.s, h, w);
    if (is_seen) {
        place_operands(call.size, rows.packed + row * (call.size.depth + call.size.value_depth), w);
        pack_tile<Word, T>(call, head.s, h, call.plan.packed + tile, w);
        if (a.dropout_threshold) draw_dropout(a, head.s, h, w);
        differentiate_tile(a, call.softmax.scoring, head.s, call.size, w);
    }
    if (call.bias_sum == BiasSum::elements) {
        if (!is_seen) __builtin_memset(w.ds, 0, static_cast<size_t>(w.queries * call.size.line) * sizeof(float));
        const int64_t since = heads_since_bias(call, head.s.batch, h);
        if (since > 0) wait_for(call.plan.turn + tile - since * head.tiles, block + 1);
        add_to_bias(call, head.s, h, since == 0, w);
    }
    if (is_seen && call.bias_sum == BiasSum::columns) add_to_column_sums(call, head.s, h, w);
    const bool has_row_sums = is_seen && (call.plan.slope_sum || call.bias_sum == BiasSum::rows);
    if (has_row_sums) {
        wait_for(call.plan.turn + tile, block);
        add_row_sums(call, head.s, h, tile, w);
    }
    if (is_seen) {
        if (w.derivative) apply_softcap(call.size, w);
        if constexpr (elements_of<Word> == 2) {
            if (!w.plain) narrow_tile(call.size, w);
        }
        add_key_gradients(call.size, a.q.size[3], a.v.size[3], w);
    }
    wait_for(call.plan.turn + tile, block);
    if (block == range.begin)
        __builtin_memset(to, 0, static_cast<size_t>(w.groups * tile_rows * call.size.depth) * sizeof(float));
    if (is_seen) add_query_gradient(call.size, a.q.size[3], w, to);
    if (block + 1 == range.end) {
        store_gradient<T>(call.args.dq, head.s.batch, head.s.q0 + w.first, w.queries, h, to, call.size.depth,
                          call.softmax.scoring.scale);
    }
    __atomic_store_n(call.plan.turn + tile, static_cast<int32_t>(block + 1), __ATOMIC_RELEASE);
}

// dq of the tiles that see no key at all.
template <class Word, class T>
inline void clear_blind_tiles(const Call<Word>& call, const Head& head) {
    for (int64_t t = 0; t < call.group * head.tiles; ++t) {
        const Range range = call.plan.range[head.first_tile + t];
        const int64_t first = t % head.tiles * call.size.queries, left = head.s.queries - first;
        if (range.begin < range.end) continue;
        store_gradient<T>(call.args.dq, head.s.batch, head.s.q0 + first,
                          left < call.size.queries ? left : call.size.queries, head.kv * call.group + t / head.tiles,
                          nullptr, 0, 0.0f);
    }
}

template <class Word, class T>
inline void run_piece(const Call<Word>& call, const Work& piece, Workspace<Word>& w) {
    const Head& head = call.plan.head[piece.head];
    const Rows<Word>& shared = call.plan.shared;
    const int64_t at = head.shared_row;
    const Rows<Word> rows = at < 0 ? w.own
                                   : Rows<Word>{shared.dq + at * call.size.depth,
                                                shared.packed + at * (call.size.depth + call.size.value_depth)};
    if (piece.begin == 0) clear_blind_tiles<Word, T>(call, head);
    for (int64_t block = piece.begin; block < piece.end; ++block) {
        w.key = block * call.size.keys;
        w.keys = head.s.keys - w.key < call.size.keys ? head.s.keys - w.key : call.size.keys;
        pack_keys<Word, T>(call.a, head.s, head.kv, w);
        __builtin_memset(w.dk, 0, static_cast<size_t>(call.size.keys * call.size.depth) * sizeof(float));
        __builtin_memset(w.dv, 0, static_cast<size_t>(call.size.keys * call.size.value_depth) * sizeof(float));
        for (int64_t t = 0; t < call.group * head.tiles; ++t) {
            const Range range = call.plan.range[head.first_tile + t];
            if (block < range.begin || block >= range.end) continue;
            run_tile<Word, T>(call, head, t / head.tiles, t % head.tiles, block, rows, w);
        }
        const int64_t first = head.s.k0 + w.key;
        store_gradient<T>(call.args.dk, head.s.batch, first, w.keys, head.kv, w.dk, call.size.depth,
                          call.softmax.scoring.scale);
        store_gradient<T>(call.args.dv, head.s.batch, first, w.keys, head.kv, w.dv, call.size.value_depth, 1.0f);
    }
}

// Zeros for the tokens before the first and after the last sequence.
template <class T>
inline void clear_outside(const View<4>& view, const View<1>& cumulative) {
    const int64_t begin = offset_in(cumulative, 0), end = offset_in(cumulative, cumulative.size[0] - 1);
    for (int64_t h = 0; h < view.size[2]; ++h) {
        store_gradient<T>(view, 0, 0, begin, h, nullptr, 0, 0.0f);
        store_gradient<T>(view, 0, end, view.size[1] - end, h, nullptr, 0, 0.0f);
    }
}

template <class Word>
inline void lay_out(Arena& arena, Call<Word>& call, int workers) {
    Plan<Word>& plan = call.plan;
    const Attention& a = call.a;
    const int64_t heads = a.q.size[0] * a.q.size[2];
    call.work = arena.take<Workspace<Word>>(workers);
    plan.head = arena.take<Head>(plan.heads);
    plan.piece = arena.take<Work>(plan.work);
    plan.range = arena.take<Range>(plan.tiles);
    plan.turn = arena.take<int32_t>(plan.tiles);
    plan.packed = arena.take<int32_t>(plan.tiles);
    plan.shared = take_rows<Word>(arena, call.size, plan.shared_rows);
    const bool has_sums = call.bias_sum == BiasSum::rows || call.bias_sum == BiasSum::columns;
    plan.bias_sum =
        has_sums ? arena.take<double>(heads * (call.bias_sum == BiasSum::rows ? a.q.size[1] : a.k.size[1])) : nullptr;
    plan.slope_sum = call.args.dalibi_slopes ? arena.take<double>(plan.tiles) : nullptr;
    if (call.places) {
        plan.place = arena.take<Place>(call.places);
        call.softmax.found = arena.take<Softmax>(heads * a.q.size[1]);
        call.walks = arena.take<WalkScratch<Word>>(workers);
    }
    for (int n = 0; n < workers; ++n) {
        if (call.places) {
            const WalkScratch<Word> walk = take_walk<Word>(call.walk, arena);
            if (arena.base) call.walks[n] = walk;
        }
        Workspace<Word> counted;
        lay_out(arena, call.size, a.softcap > 0, plan.own_rows, arena.base ? call.work[n] : counted);
    }
}

template <class Word, class T>
void run(const AttentionBackward& args, const Runtime& runtime) {
    const Attention& a = args.problem;
    const int64_t group = a.k.size[2] ? a.q.size[2] / a.k.size[2] : 0;
    const RowSoftmax softmax{scoring_of(a), args.lse, static_cast<float>(largest_lse(a.q.dtype)), nullptr};
    Call<Word> call{args,    a, blocking_of(a), group, bias_sum_of(args.dbias), {}, nullptr, walk_of<Word>(a),
                    softmax, 0, nullptr};
    if (!args.partial && has_coarse(args.lse, softmax.limit)) call.places = places_of(call.walk, nullptr);
    count_plan(call, runtime.threads);
    Plan<Word>& plan = call.plan;
    const int workers = workers_of(runtime, larger(plan.work, call.places * a.k.size[2]));
    Arena arena;
    lay_out(arena, call, workers);
    arena = {static_cast<char*>(runtime.scratch(arena.used)), 0};
    lay_out(arena, call, workers);
    fill_plan(call, runtime.threads);
    const int64_t heads = a.q.size[0] * a.q.size[2],
                  length = call.bias_sum == BiasSum::rows ? a.q.size[1] : a.k.size[1];
    for (int64_t n = 0; plan.bias_sum && n < heads * length; ++n) plan.bias_sum[n] = 0;
    for (int64_t n = 0; plan.slope_sum && n < plan.tiles; ++n) plan.slope_sum[n] = 0;
    for_pieces(runtime, plan.heads, [&](int, int64_t n) { find_ranges(call, plan.head[n]); });
    if (call.places) {
        places_of(call.walk, plan.place);
        find_softmaxes<T, Word>(runtime, call.walk, call.softmax, plan.place, call.places,
                                [&](int worker) { return call.walks[worker]; });
    }
    for_pieces(runtime, plan.work,
               [&](int worker, int64_t n) { run_piece<Word, T>(call, plan.piece[n], call.work[worker]); });
    if (a.cu_seqlens_q) {
        clear_outside<T>(args.dq, a.cu_seqlens_q);
        clear_outside<T>(args.dk, a.cu_seqlens_k);
        clear_outside<T>(args.dv, a.cu_seqlens_k);
    }
    if (call.bias_sum == BiasSum::elements && heads == 0) clear<float>(args.dbias);
    if (plan.bias_sum) reduce_bias(call);
    if (plan.slope_sum) reduce_slopes(call);
}

}  // namespace

void attention_backward(const AttentionBackward& args, const Runtime& runtime) {
#if defined(METATE_ISA_BASELINE)
    if (args.problem.q.dtype == DType::f64) return backward_exact(args, runtime);
#endif
    with_words(args.problem.q.dtype,
               [&]<class T, class Word>() { run<Word, T>(args, worth(runtime, 2 * operations_of(args.problem))); });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH_BF16(attention_backward, AttentionBackward, p.problem.q.dtype)
