// Attention over a paged key-value cache, and the writing of that cache.
//
// A cache is (pages, page_size, Hkv, ·): key j of sequence b is row j % page_size of page block_table[b, j /
// page_size]. Entries of a block table behind the last used page may be anything, sequences may share pages, and what
// no query may see (unused pages, rows behind the last key) may hold NaN. A cache holds the dtype of q; or f8 (e4m3);
// or i8; or u8, two 4-bit codes a byte, element 2i in the low nibble, value = code - 8. Beside them scales, one per row
// and head: value times scale; i8 and u8 have them always, f8 may.
//
// Query i of the n of sequence b stands at position p = seq_lens[b] - n + i, or where positions[b,i] says; it may see
// key j when
//           left_pad[b] <= j < seq_lens[b]            (left_pad absent: 0)
//      and  j >= p - window_left  (window_left >= 0)  and  j <= p + window_right (window_right >= 0)
//      and  bit t % 32 of bits[b,i,t / 32], for the sequence's own newest keys t = j - (seq_lens[b] - n) in [0, n):
//           a tree of tokens; older keys are not affected
//   s = scale · q_i·k_j;  if softcap > 0: s = softcap · tanh(s / softcap);  s -= alibi_slopes[b,h] · |j - p|
// `sinks[b,h,i]` is one more logit in the denominator. lse = log(sum of exp, sinks included), natural logarithm. A row
// without a key: out 0, lse -inf (its sink with sinks). sums[b,h,j] = Σ_i exp(s_ij - lse_i), 0 where nothing is seen.
//
// Packed: with cu_seqlens_q (sequences + 1, non-decreasing), q is (1, tokens, Hq, D), sequence b has the queries
// cu_seqlens_q[b] … cu_seqlens_q[b+1]-1; tokens outside every sequence give out 0, lse -inf. out, lse, sinks, bits and
// positions are packed likewise.
//
// A result depends on its own sequence alone: not on neighbours, page size, order of pages or number of threads.
#pragma once

#include "metate.h"

namespace metate {

struct PagedAttention {
    View<4> q;             // (B, Sq, Hq, D); f32, bf16, f16, f64
    View<4> k_cache;       // (pages, page_size, Hkv, D), u8: D / 2 columns; Hq a multiple of Hkv
    View<4> v_cache;       // (pages, page_size, Hkv, Dv), dtype of k_cache; may be a view of k_cache
    View<2> block_table;   // (B, max_pages) i32
    View<1> seq_lens;      // (B) i32: keys, those of the queries included
    View<3> k_scale;       // (pages, page_size, Hkv) f32
    View<3> v_scale;       // present when k_scale is
    View<1> cu_seqlens_q;  // (B + 1) i32
    View<1> left_pad;      // (B) i32
    View<2> alibi_slopes;  // (B, Hq) f32 (f64 where q is)
    View<3> sinks;         // (B, Hq, Sq), like lse; stride 0 where queries share it
    View<3> bits;          // (B, Sq, ⌈n/32⌉) i32, like q packed or not; stride 0 where sequences share it
    View<2> positions;     // (B, Sq) i32, between -2^28 and 2^28
    double scale;
    int64_t window_left, window_right;  // -1: no limit
    double softcap;                     // 0: none
    View<4> out;                        // (B, Sq, Hq, Dv), dtype of q
    View<3> lse;                        // (B, Hq, Sq) f32 (f64 where q is)
    View<3> sums;                       // (B, Hq, max_pages · page_size), like lse; absent unless wanted
};

// Writes token t to row slot_mapping[t] % page_size of page slot_mapping[t] / page_size; a slot of -1 skips the token.
// No slot comes twice.
//
// With cos and sin, the first R = 2 · size(1) columns of every head of k are rotated first, by the row positions[t]:
//   (a, b) -> (a · cos - b · sin, b · cos + a · sin),  pairs (2i, 2i + 1) interleaved, (i, i + R/2) otherwise.
// A quantised cache takes x rounded to f32 and is computed in f32, bit for bit the same everywhere, amax over the head:
//   i8: scale = amax / 127, code = clamp(rint(x / scale), ±127);  u8: scale = amax / 7, code = clamp(rint(x / scale),
//   -8, 7) + 8;  f8: scale = amax / 448 where there are scales, else 1, code = e4m3(clamp(x / scale, ±448)).
// rint and e4m3 round to nearest even; a scale of 0 gives codes of value 0. A head that is not finite everywhere gives
// a scale that is not finite, and codes of no meaning; f8 without scales keeps NaN and saturates infinities.
struct AppendKv {
    View<3> k, v;              // (tokens, Hkv, D), (tokens, Hkv, Dv): f32, bf16, f16, f64; Dv may be 0
    View<4> k_cache, v_cache;  // as above, k's dtype or quantised; no two elements of a cache share memory
    View<1> slot_mapping;      // (tokens) i32 or i64
    View<3> k_scale, v_scale;  // (pages, page_size, Hkv) f32
    View<2> cos, sin;          // (positions, R / 2) f32
    View<1> positions;         // (tokens) i32 or i64
    bool interleaved;
};

namespace cpu {
void paged_attention(const PagedAttention&, const Runtime&);
void append_kv(const AppendKv&, const Runtime&);
}  // namespace cpu

namespace cuda {
void paged_attention(const PagedAttention&, const Device&);
void append_kv(const AppendKv&, const Device&);
}  // namespace cuda

}  // namespace metate
