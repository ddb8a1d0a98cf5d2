// Which keys a query sees, and its logits: masks, softcap, bias, ALiBi and dropout of csrc/attention.h, a vector of
// keys at a time.
//
// Keys are handled in chunks of 32, one mask word each; a block is a few chunks that start at a multiple of 64.
#pragma once

#include "../../attention.h"
#include "gemm.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int chunk = 32;       // keys per mask word
constexpr int max_chunks = 16;  // in a block
static_assert(chunk % panel == 0);

// One entry of the batch, or one packed sequence.
struct Sequence {
    int64_t number;  // within the sequence batch; -1: tokens outside every sequence
    int64_t batch;   // first index into the views
    int64_t q0, k0;  // where its queries and keys start in the views
    int64_t queries, keys;
    int64_t diagonal;  // query i stands at key i + diagonal

    // Of a head: so few that each counts, and that what short chains cost does not.
    bool has_few_scores() const { return queries * keys <= 512; }
};

METATE_FN int64_t sequences_of(const Attention& a) {
    return a.cu_seqlens_q ? a.cu_seqlens_q.size[0] - 1 : a.q.size[0];
}

METATE_FN int64_t offset_in(const View<1>& cumulative, int64_t n) {
    return static_cast<const int32_t*>(cumulative.data)[n * cumulative.stride[0]];
}

inline Sequence sequence_of(const Attention& a, int64_t n) {
    Sequence s{n, n, 0, 0, a.q.size[1], a.k.size[1], 0};
    if (a.cu_seqlens_q) {
        s.batch = 0;
        s.q0 = offset_in(a.cu_seqlens_q, n);
        s.k0 = offset_in(a.cu_seqlens_k, n);
        s.queries = offset_in(a.cu_seqlens_q, n + 1) - s.q0;
        s.keys = offset_in(a.cu_seqlens_k, n + 1) - s.k0;
    }
    s.diagonal = a.top_left ? 0 : s.keys - s.queries;
    return s;
}

// Element (b, i, h, 0) of q, k, v, out and their gradients: i counts within the sequence.
template <class T>
METATE_FN T* row_at(const View<4>& view, int64_t batch, int64_t i, int64_t h) {
    return static_cast<T*>(view.data) + batch * view.stride[0] + i * view.stride[1] + h * view.stride[2];
}
// Element (b, h, i) of lse and delta.
template <class T>
METATE_FN T* value_at(const View<3>& view, int64_t batch, int64_t h, int64_t i) {
    return static_cast<T*>(view.data) + batch * view.stride[0] + h * view.stride[1] + i * view.stride[2];
}

// One query of one head.
struct Row {
    int64_t query, head;
    int64_t begin, end;  // the keys that window and interval allow; begin >= end: none
    const int32_t* bits;
    const uint8_t* blocks;
    const char* bias;
    float slope;
};

// The keys that the window allows query i.
METATE_FN void window_of(const Attention& a, const Sequence& s, int64_t i, int64_t& begin, int64_t& end) {
    const int64_t at = i + s.diagonal;
    begin = a.window_left >= 0 ? clamp(at - a.window_left, 0, s.keys) : 0;
    end = a.window_right >= 0 ? clamp(at + a.window_right + 1, 0, s.keys) : s.keys;
}

// Row m of the block mask.
METATE_FN const uint8_t* blocks_of(const Attention& a, const Sequence& s, int64_t m, int64_t h) {
    return static_cast<const uint8_t*>(a.blocks.data) + s.batch * a.blocks.stride[0] + h * a.blocks.stride[1] +
           m * a.blocks.stride[2];
}

inline Row row_of(const Attention& a, const Sequence& s, int64_t i, int64_t h) {
    Row row{i, h, 0, 0, nullptr, nullptr, nullptr, 0.0f};
    window_of(a, s, i, row.begin, row.end);
    if (a.intervals) {
        const auto& view = a.intervals;
        const auto* at = static_cast<const int32_t*>(view.data) + s.batch * view.stride[0] + h * view.stride[1] +
                         (s.q0 + i) * view.stride[2];
        row.begin = clamp(at[0], row.begin, s.keys);
        row.end = clamp(at[view.stride[3]], 0, row.end);
    }
    if (a.bits) {
        row.bits = static_cast<const int32_t*>(a.bits.data) + s.batch * a.bits.stride[0] + h * a.bits.stride[1] +
                   i * a.bits.stride[2];
    }
    if (a.blocks) row.blocks = blocks_of(a, s, i / a.block_m, h);
    if (a.bias) {
        row.bias = static_cast<const char*>(a.bias.data) +
                   bytes_of(a.bias.dtype) * (s.batch * a.bias.stride[0] + h * a.bias.stride[1] + i * a.bias.stride[2]);
    }
    if (a.alibi_slopes && s.number >= 0) {
        const auto& view = a.alibi_slopes;
        const int64_t batch = s.number < view.size[0] ? s.number : 0;
        row.slope = static_cast<const float*>(view.data)[batch * view.stride[0] + h * view.stride[1]];
    }
    return row;
}

// Masks.

// Bits begin … end-1 of a word whose bit 0 is key `key`.
METATE_FN uint32_t range_word(int64_t begin, int64_t end, int64_t key) {
    const int64_t low = clamp(begin - key, 0, chunk), high = clamp(end - key, 0, chunk);
    if (low >= high) return 0;
    return static_cast<uint32_t>((uint64_t{1} << high) - (uint64_t{1} << low));
}

// The keys key … key+31 that a row may see.
inline uint32_t mask_word(const Attention& a, const Row& row, int64_t key) {
    uint32_t word = range_word(row.begin, row.end, key);
    if (word && row.bits) word &= static_cast<uint32_t>(row.bits[key / chunk * a.bits.stride[3]]);
    if (word && row.blocks) {
        for (int64_t block = key / a.block_n; block * a.block_n < key + chunk; ++block) {
            const int64_t begin = block * a.block_n;
            if (begin < row.end && !row.blocks[block * a.blocks.stride[3]])
                word &= ~range_word(begin, begin + a.block_n, key);
        }
    }
    return word;
}

struct TileMask {
    int64_t begin, end;  // every key that some row sees, counted from the start of the block, lies within
    uint32_t any;        // bit c: some row sees a key of chunk c; the other chunks need no work
    uint32_t all;        // bit c: every row sees all keys of chunk c, and words[...][c] is not set
    uint32_t words[tile_rows][max_chunks];
};

// Adds the chunks of a block at `key` of which a row of the block mask allows keys, and those of which it forbids some.
inline void add_blocks(const Attention& a, const uint8_t* blocks, int64_t key, int chunks, uint32_t& allowed,
                       uint32_t& forbidden) {
    const int64_t keys = chunks * chunk;
    for (int64_t n = key / a.block_n; n < a.blocks.size[3] && n * a.block_n < key + keys; ++n) {
        const int64_t begin = n * a.block_n - key, end = begin + a.block_n;
        (blocks[n * a.blocks.stride[3]] ? allowed : forbidden) |=
            range_word(clamp(begin, 0, keys) / chunk, ceil_div(clamp(end, 0, keys), chunk), 0);
    }
}

// Some rows: the keys within which all lies that one of them sees, and those that each may see but for bits and blocks.
struct Span {
    int rows;
    int64_t begin, end, inner_begin, inner_end;
};

inline Span span_of(const Row* row, int rows) {
    constexpr int64_t far = INT64_MAX / 2;
    Span span{rows, far, -far, -far, far};
    for (int r = 0; r < rows; ++r) {
        span.inner_begin = larger(span.inner_begin, row[r].begin);
        span.inner_end = smaller(span.inner_end, row[r].end);
        if (row[r].begin >= row[r].end) continue;
        span.begin = smaller(span.begin, row[r].begin);
        span.end = larger(span.end, row[r].end);
    }
    return span;
}

// What the rows of a span may see of the chunks of a block that starts at `key`.
inline void mask_tile(const Attention& a, const Span& span, const Row* row, int64_t key, int chunks, TileMask& mask) {
    const int64_t keys = chunks * chunk;
    mask.begin = clamp(span.begin - key, 0, keys);
    mask.end = clamp(span.end - key, 0, keys);
    uint32_t allowed = 0, forbidden = 0;
    const uint8_t* seen = nullptr;
    for (int r = 0; a.blocks && r < span.rows; ++r) {
        if (row[r].blocks == seen || row[r].begin >= row[r].end) continue;
        seen = row[r].blocks;
        add_blocks(a, seen, key, chunks, allowed, forbidden);
    }
    mask.any = range_word(mask.begin / chunk, ceil_div(mask.end, chunk), 0);
    if (a.blocks) mask.any &= allowed;
    mask.all = range_word(ceil_div(clamp(span.inner_begin - key, 0, keys), chunk),
                          clamp(span.inner_end - key, 0, keys) / chunk, 0);
    mask.all &= a.bits ? 0 : mask.any & ~forbidden;
    for (uint32_t left = mask.any & ~mask.all; left; left &= left - 1) {
        const int c = __builtin_ctz(left);
        uint32_t any = 0, all = ~0u;
        for (int r = 0; r < span.rows; ++r) {
            const uint32_t word = mask.words[r][c] = mask_word(a, row[r], key + c * chunk);
            any |= word;
            all &= word;
        }
        if (!any) mask.any &= ~(1u << c);
        if (all == ~0u) mask.all |= 1u << c;
    }
}

// The products of a tile with what it sees of a block of packed keys: `p` names the block's first key and column. Keys
// of a chunk that no row sees may be left out.
template <int64_t longest, class Word>
inline void multiply_keys(int rows, const TileMask& mask, Product<Word> p) {
    const Word* const keys = p.b;
    float* const s = p.c;
    for (uint32_t chunks = mask.any; chunks; chunks &= chunks - 1) {
        const int64_t from = __builtin_ctz(chunks) * chunk;
        for (int64_t key = from; key < from + chunk && key < mask.end; key += panel) {
            p.b = keys + key * p.steps;
            p.c = s + key;
            multiply<Left::rows, Into::set, longest>(rows, mask.end - key, p);
        }
    }
}

// x where the word allows the keys of vector v of its chunk, else `other`.
METATE_FN vf keep(uint32_t word, int v, vf x, vf other) {
    return select(mask_of(word >> v * width), x, other);
}

// Logits.

struct Scoring {
    float scale, softcap;
    bool plain;      // logits are products times scale > 0 and nothing else: then to_logits is not called
    float exponent;  // exp(logit) = 2^(exponent · x), x the product if plain, else the logit
};

inline Scoring scoring_of(const Attention& a) {
    Scoring s;
    s.scale = static_cast<float>(a.scale);
    s.softcap = static_cast<float>(a.softcap);
    s.plain = !a.bias && !a.alibi_slopes && !(a.softcap > 0) && a.scale > 0;
    s.exponent = s.plain ? static_cast<float>(a.scale * 1.4426950408889634) : log2_e;
    return s;
}

// Bias of n <= width keys from `key` on; other lanes hold anything.
inline vf bias_at(const Attention& a, const Row& row, int64_t key, int64_t n) {
    const int64_t stride = a.bias.stride[3];
    const auto from = [&](auto* data) {
        const auto* at = data + key * stride;
        if (stride == 1) return n >= width ? load(at) : load(at, n);
        if (stride == 0) return splat(to_float(*at));
        float line[width] = {};
        for (int64_t i = 0; i < n && i < width; ++i) line[i] = to_float(at[i * stride]);
        return load(line);
    };
    switch (a.bias.dtype) {
        case DType::bf16:
            return from(reinterpret_cast<const bf16*>(row.bias));
        case DType::f16:
            return from(reinterpret_cast<const f16*>(row.bias));
        default:
            return from(reinterpret_cast<const float*>(row.bias));
    }
}

// Turns the products of a row with the keys of a block into logits, in place, for the given chunks. Where softcap is on
// and `derivative` is not null, that becomes d capped / d (scale · product).
inline void to_logits(const Attention& a, const Scoring& scoring, const Sequence& s, const Row& row, int64_t key,
                      uint32_t chunks, float* x, float* derivative = nullptr) {
    const float cap = scoring.softcap;
    for (; chunks; chunks &= chunks - 1) {
        const int64_t first_key = __builtin_ctz(chunks) * chunk;
        for (int64_t j = first_key; j < first_key + chunk && key + j < s.keys; j += width) {
            vf y = load(x + j) * splat(scoring.scale);
            if (cap > 0) {
                const vf t = tanh(y / splat(cap));
                y = t * splat(cap);
                if (derivative) store(derivative + j, splat(1.0f) - t * t);
            }
            if (row.bias) y = y + bias_at(a, row, key + j, s.keys - key - j);
            if (a.alibi_slopes) {
                const auto ahead = static_cast<int32_t>(row.query + s.diagonal - key - j);
                y = y - splat(row.slope) * to_float(abs(sub(splat(ahead), lanes())));
            }
            store(x + j, y);
        }
    }
}

// Dropout.

// Bit t: key 64 · group + t is kept.
inline uint64_t kept_keys(const Attention& a, int64_t number, int64_t query, int64_t head, int64_t group) {
    uint64_t kept = 0;
    for (int base = 0; base < 16; base += width) {
        vi c0 = add(lanes(), splat(static_cast<int32_t>(group * 16 + base)));
        vi c1 = splat(static_cast<int32_t>(query)), c3 = splat(static_cast<int32_t>(a.offset));
        vi c2 = splat(static_cast<int32_t>(number * a.q.size[2] + head));
        uint32_t k0 = static_cast<uint32_t>(a.seed), k1 = static_cast<uint32_t>(a.seed >> 32);
        for (int round = 0; round < 10; ++round) {
            vi high0, low0, high1, low1;
            multiply(c0, splat(static_cast<int32_t>(0xd2511f53u)), high0, low0);
            multiply(c2, splat(static_cast<int32_t>(0xcd9e8d57u)), high1, low1);
            c0 = exor(exor(high1, c1), splat(static_cast<int32_t>(k0)));
            c2 = exor(exor(high0, c3), splat(static_cast<int32_t>(k1)));
            c1 = low1;
            c3 = low0;
            k0 += 0x9e3779b9u;
            k1 += 0xbb67ae85u;
        }
        const vi threshold = splat(static_cast<int32_t>(a.dropout_threshold)), words[4] = {c0, c1, c2, c3};
        for (int w = 0; w < 4; ++w) {
            const uint64_t dropped = bits_of(below_unsigned(words[w], threshold));
            kept |= (~dropped & ((uint64_t{1} << width) - 1)) << (w * 16 + base);
        }
    }
    return kept;
}

// kept[c], for the given chunks of a block: the keys of chunk c that dropout keeps for a row.
inline void kept_words(const Attention& a, const Sequence& s, const Row& row, int64_t key, uint32_t chunks,
                       uint32_t* kept) {
    for (int c = 0; chunks >> c; c += 2) {
        if (!(chunks >> c & 3)) continue;
        const uint64_t both = kept_keys(a, s.number, row.query, row.head, (key + c * chunk) / 64);
        kept[c] = static_cast<uint32_t>(both);
        kept[c + 1] = static_cast<uint32_t>(both >> 32);
    }
}

// Vector operations of a pass over all logits.
inline int64_t operations_of(const Attention& a) {
    return a.q.size[0] * a.q.size[1] * a.q.size[2] * a.k.size[1] * (a.q.size[3] + a.v.size[3]) / 16;
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
