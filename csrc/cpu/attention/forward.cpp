// Attention forward by online softmax over packed blocks of keys.
//
// A piece of work is a range of queries of one group of heads. For each block of keys it packs the keys (transposed)
// and values once, then takes its rows a register tile at a time: logits, softmax, and the product with the values,
// all of which stay in the first two cache levels.
#include <math.h>
#include <string.h>

#include "exact.h"
#include "pieces.h"

namespace metate::cpu::METATE_ISA {
namespace {

// What the whole call shares. Sizes named `words` count 32-bit words of operands.
struct Shape {
    const AttentionForward& call;
    const Attention& a;
    Scoring scoring;
    int64_t group;  // query heads of a key head
    int64_t d, dv;
    int64_t block;                 // keys packed at a time
    int64_t d_words, q_stride;     // words of a row of q: what products read, and from row to row
    int64_t dv_columns, o_stride;  // floats of a row of o: whole panels, and from row to row
    int64_t s_stride, p_stride;    // floats of a row of logits, words of a row of probabilities
    int64_t max_rows;              // of a piece
};

// A result over some of the keys: out = o / l, maximum m of exponent · logit.
struct State {
    float *o, *m, *l;
};

template <class Word>
struct Scratch {
    Row* row;
    Span* span;  // of each tile of rows
    Word *q, *k, *v, *p;
    float* s;  // where Word is float, p takes the place of the logits it comes from
    State state;
};

// Keys of a block whose k and v fill about half of the second cache level.
template <class Word>
int64_t keys_of_block(const Attention& a) {
    constexpr int64_t budget = width == 16 ? 131072 : 65536;  // words
    const int64_t words = steps_of<Word>(a.q.size[3]) + steps_of<Word>(round_up(a.v.size[3], panel)) + 1;
    return clamp(budget / words / 64 * 64, 64, max_chunks * chunk);
}

template <class Word>
Shape shape_of(const AttentionForward& call) {
    const Attention& a = call.problem;
    Shape s{call, a, scoring_of(a), 1, a.q.size[3], a.v.size[3], keys_of_block<Word>(a), 0, 0, 0, 0, 0, 0, 0};
    if (a.k.size[2]) s.group = a.q.size[2] / a.k.size[2];
    constexpr int64_t line = 16;  // one more cache line, so that rows do not meet in one set of the cache
    s.d_words = steps_of<Word>(s.d);
    s.q_stride = round_up(s.d_words, 16) + line;
    s.dv_columns = round_up(s.dv, panel);
    s.o_stride = round_up(s.dv_columns, 16) + line;
    s.s_stride = s.block + line;
    s.p_stride = steps_of<Word>(s.block) + line;
    return s;
}

State take_state(const Shape& s, Arena& arena) {
    return {arena.take<float>(s.max_rows * s.o_stride), arena.take<float>(s.max_rows + width),
            arena.take<float>(s.max_rows + width)};
}

template <class Word>
Scratch<Word> take_scratch(const Shape& s, Arena& arena) {
    Scratch<Word> my;
    my.row = arena.take<Row>(s.max_rows);
    my.span = arena.take<Span>(s.max_rows / tile_rows);
    my.q = arena.take<Word>(s.max_rows * s.q_stride);
    my.k = arena.take<Word>(s.block * s.d_words);
    my.v = arena.take<Word>(steps_of<Word>(s.block) * s.dv_columns);
    my.s = arena.take<float>(tile_rows * s.s_stride);
    my.p = elements_of<Word> == 1 ? reinterpret_cast<Word*>(my.s) : arena.take<Word>(tile_rows * s.p_stride);
    my.state = take_state(s, arena);
    return my;
}

// A block of keys as packed: chunks `begin` … `end`-1 of it.
struct Block {
    int64_t key;
    int begin, end;
    bool finite;  // the values are
};

template <class T, class Word>
void pack_block(const Shape& s, const Sequence& seq, int64_t kv_head, Block& block, const Scratch<Word>& my) {
    const Attention& a = s.a;
    const int64_t from = block.begin * chunk, until = block.end * chunk, first = block.key + from;
    const int64_t keys = (until < seq.keys - block.key ? until : seq.keys - block.key) - from;
    pack_transposed(my.k + from * s.d_words, row_at<T>(a.k, seq.batch, seq.k0 + first, kv_head), a.k.stride[1],
                    a.k.stride[3], keys, s.d);
    block.finite =
        pack_rows(my.v + from / elements_of<Word> * panel, row_at<T>(a.v, seq.batch, seq.k0 + first, kv_head),
                  a.v.stride[1], a.v.stride[3], keys, s.dv, steps_of<Word>(keys), steps_of<Word>(s.block) * panel);
}

// Softmax of one tile.

template <int n>
METATE_FN void store_probabilities(float* to, const vf (&p)[n]) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) store(to + i * width, p[i]);
}
#if defined(METATE_HAS_BF16_DOT)
template <int n>
METATE_FN void store_probabilities(Pair* to, const vf (&p)[n]) {
    for (int i = 0; i < n; i += 2) store_words(to + i / 2 * width, as_float(narrow_pairs(p[i], p[i + 1])));
}
#endif

// The largest of a row's logits; masked ones become -inf in x.
METATE_FN float mask_and_find_largest(const TileMask& mask, int r, float* x) {
    vf top[chunk / width];
    for (vf& t : top) t = splat(-INFINITY);
    for (uint32_t left = mask.any; left; left &= left - 1) {
        const int c = __builtin_ctz(left);
        float* at = x + c * chunk;
        for (int v = 0; v < chunk / width; ++v) {
            vf y = load(at + v * width);
            if (!(mask.all >> c & 1)) {
                y = keep(mask.words[r][c], v, y, splat(-INFINITY));
                store(at + v * width, y);
            }
            top[v] = max(y, top[v]);
        }
    }
    for (int v = 1; v < chunk / width; ++v) top[0] = max(top[0], top[v]);
    return largest(top[0]);
}

// What exponentials() needs of a row and gives back.
template <class Word>
struct Exponentials {
    float exponent, m;
    const float* x;
    const uint32_t* kept;  // by dropout; null: all
    Word* p;
    vf total[chunk / width];  // before dropout
};

// p = 2^(exponent · x - m) of some chunks from c on, 0 where dropout keeps them not.
template <int chunks, class Word>
METATE_FN void exponentials(int c, Exponentials<Word>& e) {
    constexpr int vectors = chunk / width, n = chunks * vectors;
    vf y[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) y[i] = fma(load(e.x + c * chunk + i * width), splat(e.exponent), splat(-e.m));
    exp2(y);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
        e.total[i % vectors] = e.total[i % vectors] + y[i];
        if (e.kept) y[i] = keep(e.kept[c + i / vectors], i % vectors, y[i], splat(0.0f));
    }
    store_probabilities(e.p + c * chunk / elements_of<Word>, y);
}

// The same for the given chunks; returns the sum. Two chunks of wide vectors at a time keep the processor busy.
template <class Word>
METATE_FN float exponentials(uint32_t chunks, Exponentials<Word> e) {
    for (vf& t : e.total) t = splat(0.0f);
    while (chunks) {
        const int c = __builtin_ctz(chunks);
        const bool two = width == 16 && (chunks >> c & 3) == 3;
        if (two)
            exponentials<width == 16 ? 2 : 1>(c, e);
        else
            exponentials<1>(c, e);
        chunks &= ~((two ? 3u : 1u) << c);
    }
    for (int v = 1; v < chunk / width; ++v) e.total[0] = e.total[0] + e.total[v];
    return sum(e.total[0]);
}

// words[c] = the keys of chunk c whose logit is not -inf.
METATE_FN void live_words(uint32_t chunks, const float* x, uint32_t* words) {
    for (; chunks; chunks &= chunks - 1) {
        const int c = __builtin_ctz(chunks);
        uint32_t dead = 0;
        for (int v = 0; v < chunk / width; ++v) {
            dead |= bits_of(equal(load(x + c * chunk + v * width), splat(-INFINITY))) << v * width;
        }
        words[c] = ~dead;
    }
}

// A row scaled by the exponent and rounded, as its maximum is.
METATE_FN void scale_row(uint32_t chunks, float exponent, float* x) {
    for (; chunks; chunks &= chunks - 1) {
        float* at = x + __builtin_ctz(chunks) * chunk;
        for (int v = 0; v < chunk; v += width) store(at + v, load(at + v) * splat(exponent));
    }
}

// A row of q and o, not used for a whole block, on its way from the outer cache.
template <class Word>
METATE_FN void fetch_row(const Shape& s, int64_t r, const Scratch<Word>& my) {
    for (int64_t c = 0; c < s.d_words; c += 16) __builtin_prefetch(my.q + r * s.q_stride + c, 0, 2);
    for (int64_t c = 0; c < s.dv; c += 16) __builtin_prefetch(my.state.o + r * s.o_stride + c, 1, 2);
}

// Turns the products of a tile into probabilities relative to the new row maxima, and tells by which `factor` the
// results so far shrink. Where the values are not finite, mask.words comes back with the keys that take part.
template <class Word>
void softmax_tile(const Shape& s, const Sequence& seq, const Row* row, int rows, const Block& block, TileMask& mask,
                  const Scratch<Word>& my, float* m, float* l, float* factor) {
    float total[tile_rows + width] = {}, reference[tile_rows + width] = {};
    for (int r = 0; r < rows; ++r) {  // in a loop of its own: searches for maxima wait long, but not for each other
        float* x = my.s + r * s.s_stride;
        if (!s.scoring.plain) to_logits(s.a, s.scoring, seq, row[r], block.key, mask.any, x);
        const float top = s.scoring.exponent * mask_and_find_largest(mask, r, x);
        factor[r] = m[r];
        if (top > m[r]) m[r] = top;
        reference[r] = m[r] == -INFINITY ? 0.0f : m[r];
    }
    uint32_t kept[max_chunks];
    for (int r = 0; r < rows; ++r) {
        fetch_row(s, row - my.row + tile_rows + r, my);  // of the next tile; more at once would wait for each other
        float* x = my.s + r * s.s_stride;
        if (!block.finite) live_words(mask.any, x, mask.words[r]);
        if (s.a.dropout_threshold) kept_words(s.a, seq, row[r], block.key, mask.any, kept);
        const uint32_t* which = s.a.dropout_threshold ? kept : nullptr;
        float exponent = s.scoring.exponent;
        if (fabsf(reference[r]) > 1e6f) {  // what rounding the maximum took would be a power of its own
            scale_row(mask.any, exponent, x);
            exponent = 1.0f;
        }
        total[r] = exponentials<Word>(mask.any, {exponent, reference[r], x, which, my.p + r * s.p_stride, {}});
    }
    for (int r = 0; r < rows; r += width) {
        const vf shrink = exp2(load(factor + r) - load(reference + r));
        store(factor + r, shrink);
        store(l + r, fma(load(l + r), shrink, load(total + r)), rows - r < width ? rows - r : width);
    }
}

// The two products of one tile.

// Runs body(from, until) over the runs of neighbouring live chunks, cut to the keys that some row sees.
template <class Word, class Body>
METATE_FN void for_runs(const TileMask& mask, const Body& body) {
    constexpr int64_t unit = elements_of<Word>;
    for (uint32_t left = mask.any; left;) {
        const int first = __builtin_ctz(left), last = first + __builtin_ctz(~(left >> first));
        left &= static_cast<uint32_t>(~((uint64_t{1} << last) - 1));
        const int64_t from = first * chunk, until = last * chunk;
        body((mask.begin > from ? mask.begin : from) / unit, steps_of<Word>(mask.end < until ? mask.end : until));
    }
}

template <class Word>
void multiply_values(const Shape& s, int rows, const TileMask& mask, const Scratch<Word>& my, float* o,
                     const float* factor, bool fresh) {
    const int64_t panel_stride = steps_of<Word>(s.block) * panel;
    for (int64_t column = 0; column < s.dv; column += panel) {
        const Word* v = my.v + column / panel * panel_stride;
        bool later = false;
        for_runs<Word>(mask, [&](int64_t from, int64_t until) {
            const Product<Word> p{my.p + from, s.p_stride, v + from * panel, until - from, o + column,
                                  s.o_stride,  factor};
            if (later) return multiply_steps<Left::rows, Into::add>(rows, s.dv - column, p);
            later = true;
            if (fresh) return multiply_steps<Left::rows, Into::set>(rows, s.dv - column, p);
            multiply_steps<Left::rows, Into::scaled>(rows, s.dv - column, p);
        });
    }
}

// Word k of a row of b, zero where the key takes no part.
METATE_FN vf live_product(vf sum, const float* p, const float* v, const uint32_t* words, int64_t k) {
    return fma(splat(*p), words[k / chunk] >> k % chunk & 1 ? load(v) : splat(0.0f), sum);
}
#if defined(METATE_HAS_BF16_DOT)
METATE_FN vf live_product(vf sum, const Pair* p, const Pair* v, const uint32_t* words, int64_t k) {
    const uint32_t live = words[2 * k / chunk] >> 2 * k % chunk;
    return dot(sum, spread(p), keep_elements(load(reinterpret_cast<const int32_t*>(v)), live & 1, live & 2));
}
#endif

// multiply_values where values are infinite or NaN: they must not reach a row that masks them. The same sums in the
// same order, without register tiles.
template <class Word>
void multiply_live_values(const Shape& s, int rows, const TileMask& mask, const Scratch<Word>& my, float* o,
                          const float* factor, bool fresh) {
    const int64_t panel_stride = steps_of<Word>(s.block) * panel;
    for (int r = 0; r < rows; ++r) {
        for (int64_t column = 0; column < s.dv; column += width) {
            const Word* v = my.v + column / panel * panel_stride + column % panel;
            float* to = o + r * s.o_stride + column;
            bool later = false;
            for_runs<Word>(mask, [&](int64_t from, int64_t until) {
                vf sum = splat(0.0f);
                for (int64_t k = from; k < until; ++k) {
                    sum = live_product(sum, my.p + r * s.p_stride + k, v + k * panel, mask.words[r], k);
                }
                if (later)
                    store(to, combine<Into::add>(to, sum, factor, r));
                else
                    store(to, fresh ? sum : combine<Into::scaled>(to, sum, factor, r));
                later = true;
            });
        }
    }
}

// Pieces.

// Rows of a piece, with the queries packed and no key seen yet: o of a state means something where m or l do. Tiles are
// filled up with rows of zeros.
template <class T, class Word>
int64_t begin_piece(const Shape& s, const Sequence& seq, const Piece& piece, const Scratch<Word>& my) {
    const bool apart = has_masks_of_heads(s.a);
    const int64_t rows = rows_of(s.a, piece.queries), filled = round_up(rows, tile_rows), each = rows / s.group;
    const int64_t ahead = apart ? rows_ahead : ceil_div(rows_ahead, s.group);  // queries
    for (int64_t r = 0; r < filled; ++r) {
        const int64_t i = apart ? r % each : r / s.group, g = apart ? r / each : r % s.group;
        my.state.m[r] = -INFINITY;
        my.state.l[r] = 0.0f;
        if (r % tile_rows == 0) my.span[r / tile_rows].rows = 0;
        if (i >= piece.queries) {
            my.row[r] = Row{};
            memset(my.q + r * s.q_stride, 0, static_cast<size_t>(s.q_stride) * sizeof(Word));
            continue;
        }
        ++my.span[r / tile_rows].rows;
        const int64_t query = piece.first_query + i, head = piece.kv_head * s.group + g;
        Row& row = my.row[r] = row_of(s.a, seq, query, head);
        if (row.begin < piece.key_begin) row.begin = piece.key_begin;
        if (row.end > piece.key_end) row.end = piece.key_end;
        const T* q = row_at<T>(s.a.q, seq.batch, seq.q0 + query, head);
        if (query + ahead < seq.queries) {
            for (int64_t c = 0; c < s.d; c += 64 / static_cast<int64_t>(sizeof(T))) {
                __builtin_prefetch(q + ahead * s.a.q.stride[1] + c * s.a.q.stride[3], 0, 2);
            }
        }
        pack_row(my.q + r * s.q_stride, round_up(s.d_words, width), q, s.a.q.stride[3], s.d);
    }
    for (int64_t r = 0; r < filled; r += tile_rows) {
        Span& span = my.span[r / tile_rows];
        span = span_of(my.row + r, span.rows);
    }
    return rows;
}

constexpr int64_t shortest_chain = 16;  // where scores are few

template <class Word>
void add_tile(const Shape& s, const Sequence& seq, const Block& block, TileMask& mask, int64_t r, int rows,
              const Scratch<Word>& my) {
    float factor[tile_rows + width] = {};
    float* o = my.state.o + r * s.o_stride;
    bool fresh = true;  // o holds nothing yet
    for (int i = 0; i < rows; ++i) fresh &= my.state.m[r + i] == -INFINITY;
    const Product<Word> products{my.q + r * s.q_stride, s.q_stride, my.k, s.d_words, my.s, s.s_stride, nullptr};
    if (seq.has_few_scores())
        multiply_keys<shortest_chain>(rows, mask, products);
    else
        multiply_keys<long_chain>(rows, mask, products);
    softmax_tile(s, seq, my.row + r, rows, block, mask, my, my.state.m + r, my.state.l + r, factor);
    if (block.finite) return multiply_values(s, rows, mask, my, o, factor, fresh);
    multiply_live_values(s, rows, mask, my, o, factor, fresh);
}

template <class T, class Word>
void add_block(const Shape& s, const Sequence& seq, int64_t kv_head, int64_t rows, Block block,
               const Scratch<Word>& my) {
    bool packed = false;
    for (int64_t r = 0; r < rows; r += tile_rows) {
        const Span& span = my.span[r / tile_rows];
        if (span.begin >= block.key + block.end * chunk || span.end <= block.key) continue;
        TileMask mask;
        mask_tile(s.a, span, my.row + r, block.key, block.end, mask);
        if (!mask.any) continue;
        if (!packed) pack_block<T>(s, seq, kv_head, block, my);
        packed = true;
        add_tile(s, seq, block, mask, r, span.rows, my);
    }
}

// Results.

METATE_FN bool is_empty(const State& state, int64_t r) {
    return state.m[r] == -INFINITY && state.l[r] == 0.0f;
}

// Row r of a state as the output and lse of its query.
template <class T>
void write_row(const Shape& s, const Sequence& seq, const Row& row, const State& state, int64_t r) {
    float m = state.m[r], l = state.l[r], weight = 1.0f;
    if (s.a.sinks && seq.number >= 0) {
        const float sink = static_cast<const float*>(s.a.sinks.data)[row.head * s.a.sinks.stride[0]] * log2_e;
        const float highest = sink > m ? sink : m;
        if (highest > -INFINITY) {
            weight = exp2f(m - highest);
            l = l * weight + exp2f(sink - highest);
            m = highest;
        }
    }
    const AttentionForward& call = s.call;
    *value_at<float>(call.lse, seq.batch, row.head, seq.q0 + row.query) = l == 0.0f ? -INFINITY : m * ln_2 + logf(l);
    if (s.a.dropout_threshold) weight *= static_cast<float>(s.a.dropout_scale);
    const bool empty = is_empty(state, r);
    const vf scale = splat(weight / l);
    T* out = row_at<T>(call.out, seq.batch, seq.q0 + row.query, row.head);
    T line[max_head_dim];
    T* to = call.out.stride[3] == 1 ? out : line;
    for (int64_t c = 0; c < s.dv; c += width) {
        const vf x = empty ? splat(0.0f) : load(state.o + r * s.o_stride + c) * scale;
        if (s.dv - c >= width)
            store(to + c, x);
        else
            store(to + c, x, s.dv - c);
    }
    if (to == out) return;
    for (int64_t c = 0; c < s.dv; ++c) out[c * call.out.stride[3]] = line[c];
}

template <class T>
METATE_FN void fetch_out(const Shape& s, const Sequence& seq, const Row& row) {
    const View<4>& out = s.call.out;
    const T* const to = row_at<T>(out, seq.batch, seq.q0 + row.query, row.head);
    for (int64_t c = 0; c < s.dv; c += 64 / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(to + c * out.stride[3], 1, 2);
    }
}

// Adds what `part` found to `state`, row by row.
void add_state(const Shape& s, int64_t rows, const State& part, const State& state) {
    for (int64_t r = 0; r < rows; ++r) {
        if (is_empty(part, r)) continue;
        const bool alone = is_empty(state, r);
        const float highest = part.m[r] > state.m[r] ? part.m[r] : state.m[r];
        const float reference = highest == -INFINITY ? 0.0f : highest;
        const float ours = exp2f(state.m[r] - reference), theirs = exp2f(part.m[r] - reference);
        float* o = state.o + r * s.o_stride;
        const float* more = part.o + r * s.o_stride;
        for (int64_t c = 0; c < s.dv_columns; c += width) {
            const vf old = alone ? splat(0.0f) : load(o + c) * splat(ours);
            store(o + c, fma(load(more + c), splat(theirs), old));
        }
        state.l[r] = state.l[r] * ours + part.l[r] * theirs;
        state.m[r] = highest;
    }
}

// States of split pieces, and how many parts of each piece are still to come (at its first state).
struct Parts {
    State* state;
    int32_t* missing;
};

template <class T, class Word>
void run_piece(const Shape& s, const Piece& piece, Scratch<Word> my, const Parts& parts) {
    const Sequence seq = sequence_of(s.a, piece);
    if (piece.parts > 1) my.state = parts.state[piece.state];
    const int64_t rows = begin_piece<T>(s, seq, piece, my);
    int64_t begin = piece.key_end, end = piece.key_begin;
    for (int64_t r = 0; r < rows; r += tile_rows) {
        begin = smaller(begin, my.span[r / tile_rows].begin);
        end = larger(end, my.span[r / tile_rows].end);
    }
    for (int64_t key = begin / s.block * s.block; key < end; key += s.block) {
        const int64_t from = clamp(begin - key, 0, s.block), until = clamp(end - key, 0, s.block);
        const Block block{key, static_cast<int>(from / chunk), static_cast<int>(ceil_div(until, chunk)), true};
        add_block<T>(s, seq, piece.kv_head, rows, block, my);
    }
    State result = my.state;
    if (piece.parts > 1) {
        const int64_t first = piece.state - piece.part;
        if (__atomic_sub_fetch(&parts.missing[first], 1, __ATOMIC_ACQ_REL) > 0) return;
        result = parts.state[first];
        for (int64_t part = 1; part < piece.parts; ++part) add_state(s, rows, parts.state[first + part], result);
    }
    for (int64_t r = 0; r < rows; ++r) {
        if (r % tile_rows >= my.span[r / tile_rows].rows) continue;
        if (r + rows_ahead < rows) fetch_out<T>(s, seq, my.row[r + rows_ahead]);
        write_row<T>(s, seq, my.row[r], result, r);
    }
}

template <class T, class Word>
void run(const AttentionForward& call, const Runtime& runtime) {
    Shape s = shape_of<Word>(call);
    const Cut cut = cut_queries(s.a, runtime.threads, s.block, nullptr);
    if (cut.pieces == 0) return;
    s.max_rows = cut.max_rows;
    Piece* pieces = nullptr;
    Parts parts{};
    const auto shared = [&](Arena& arena) {
        pieces = arena.take<Piece>(cut.pieces);
        parts.state = arena.take<State>(cut.states);
        parts.missing = arena.take<int32_t>(cut.states);
        for (int64_t i = 0; i < cut.states; ++i) {
            const State state = take_state(s, arena);
            if (arena.base) parts.state[i] = state;
        }
    };
    const auto scratch_of =
        lay_out(runtime, cut.pieces, shared, [&](Arena& arena) { return take_scratch<Word>(s, arena); });
    cut_queries(s.a, runtime.threads, s.block, pieces);
    for (int64_t i = 0; i < cut.pieces; ++i) {
        if (pieces[i].parts > 1 && pieces[i].part == 0) {
            parts.missing[pieces[i].state] = static_cast<int32_t>(pieces[i].parts);
        }
    }
    sort_by_cost(pieces, cut.pieces);
    for_pieces(runtime, cut.pieces,
               [&](int worker, int64_t i) { run_piece<T, Word>(s, pieces[i], scratch_of(worker), parts); });
}

#if defined(METATE_ISA_BASELINE)
// Double precision, a row at a time.
void run_row_exact(const AttentionForward& call, const Sequence& seq, int64_t query, int64_t head) {
    const Attention& a = call.problem;
    const Row row = row_of(a, seq, query, head);
    const int64_t kv_head = head / (a.q.size[2] / a.k.size[2]), dv = a.v.size[3];
    const double* q = row_at<double>(a.q, seq.batch, seq.q0 + query, head);
    double m = -INFINITY, l = 0, o[max_head_dim] = {};
    const auto shrink_to = [&](double highest) {
        const double shrink = exp(m - highest);
        for (int64_t c = 0; c < dv; ++c) o[c] *= shrink;
        l *= shrink;
        m = highest;
    };
    for (int64_t j = row.begin; j < row.end; ++j) {
        if (!sees(a, row, j)) continue;
        const double* k = row_at<double>(a.k, seq.batch, seq.k0 + j, kv_head);
        const double x = logit_exact(a, seq, row, j, dot_exact(q, a.q.stride[3], k, a.k.stride[3], a.q.size[3]));
        if (x == -INFINITY) continue;
        if (x > m) shrink_to(x);
        const double p = exp(x - m), *v = row_at<double>(a.v, seq.batch, seq.k0 + j, kv_head);
        l += p;
        const double kept = keeps(a, seq, row, j) ? p : 0;
        for (int64_t c = 0; c < dv; ++c) o[c] += kept * v[c * a.v.stride[3]];
    }
    if (a.sinks && seq.number >= 0) {
        const double sink = static_cast<const double*>(a.sinks.data)[head * a.sinks.stride[0]];
        if (sink > m) shrink_to(sink);
        if (sink > -INFINITY) l += exp(sink - m);
    }
    *value_at<double>(call.lse, seq.batch, head, seq.q0 + query) = l == 0 ? -INFINITY : m + log(l);
    double* out = row_at<double>(call.out, seq.batch, seq.q0 + query, head);
    const double scale = (a.dropout_threshold ? a.dropout_scale : 1) / (l == 0 ? 1 : l);
    for (int64_t c = 0; c < dv; ++c) out[c * call.out.stride[3]] = o[c] * scale;
}

void run_exact(const AttentionForward& call, const Runtime& runtime) {
    const Attention& a = call.problem;
    const int64_t tokens = a.q.size[1];
    for_pieces(runtime, a.q.size[0] * tokens, [&](int, int64_t i) {
        const Sequence seq = sequence_at(a, i / tokens, i % tokens);
        for (int64_t head = 0; head < a.q.size[2]; ++head) run_row_exact(call, seq, i % tokens - seq.q0, head);
    });
}
#endif

}  // namespace

void attention(const AttentionForward& call, const Runtime& runtime) {
#if defined(METATE_ISA_BASELINE)
    if (call.problem.q.dtype == DType::f64) return run_exact(call, runtime);
#endif
    with_words(call.problem.q.dtype,
               [&]<class T, class Word>() { run<T, Word>(call, worth(runtime, operations_of(call.problem))); });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH_BF16(attention, AttentionForward, p.problem.q.dtype)
