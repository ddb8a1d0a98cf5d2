// The step both passes of the backward share: from the two dot products of a query and a key, q·k and dO·v, to the
// probability and to the gradient of the scaled dot product. Also the parameters of those passes.
#pragma once

#include "rows.h"

namespace metate::cuda::flash {

struct Backward {
    Problem problem;
    View<4> grad_out;
    Rows rows;
    View<3> delta;
    View<4> dq, dk, dv;
    int tiles;
    bool vector_q, vector_k, vector_v, vector_grad_out, vector_dq, vector_dk, vector_dv;
};

// Of a row: its softmax as in Rows, and delta: 0 if it saw nothing, whatever its gradient was.
struct RowState {
    float largest, lse, delta;
};

METATE_DEVICE RowState row_state(const Backward& b, const Sequence& s, int head, int i) {
    const float largest = load_global<float>(row_values(b.problem, b.rows.largest, s, head) + i);
    const float lse = load_global<float>(row_values(b.problem, b.rows.lse, s, head) + i);
    const float delta = load_global<float>(row_values(b.problem, b.delta, s, head) + i * b.delta.stride[2]);
    return {largest, lse, lse == infinite() ? 0.f : delta};
}

// s: dot products into probabilities, after dropout, but for its factor. error: dO·v into gradients of the scaled dot
// products (of the logits, where not `derive`). rows(line) is the RowState of a line's query.
template <typename T, bool derive, bool general, bool across, int m, int n, typename Rows>
METATE_DEVICE void differentiate(float (&s)[m][n][4], float (&error)[m][n][4], const Scorer<general>& scorer,
                                 const Lines<across, m, n>& lines, TileKind kind, const Rows& rows) {
    using L = Lines<across, m, n>;
    const Problem& p = scorer.p;
    const bool drops = general && p.a.dropout_threshold != 0;
    uint32_t kept[L::lines] = {};
    if (drops) {
        lines.keep(kept, p, scorer.s, scorer.head);
        lines.drop(error, kept, p.dropout_scale);
    }
    METATE_UNROLL
    for (int line = 0; line < L::lines; ++line) {
        const float delta = rows(line).delta;
        METATE_UNROLL
        for (int place = 0; place < L::places; ++place) lines.at(error, line, place) -= delta;
    }
    if constexpr (general) make_logits<T, derive>(s, error, scorer, lines);
    if (kind == partial) {
        mask(s, scorer, lines);
        METATE_UNROLL
        for (int e = 0; e < m * n * 4; ++e) {
            if (s[e / 4 / n][e / 4 % n][e % 4] == -infinite()) error[e / 4 / n][e / 4 % n][e % 4] = 0.f;
        }
    }
    METATE_UNROLL
    for (int line = 0; line < L::lines; ++line) {
        const RowState row = rows(line);
        METATE_UNROLL
        for (int place = 0; place < L::places; ++place) {
            float& x = lines.at(s, line, place);
            x = fast_exp2((x - row.largest) * p.unit - row.lse);
            lines.at(error, line, place) *= x;
        }
    }
    if (drops) lines.drop(s, kept, 1.f);
}

// The passes; each launches what it needs. Scratch holds the summary of one at a time.
void grad_queries(Backward b, void* scratch, const Device& device);
void grad_keys(Backward b, void* scratch, const Device& device);
void grad_bias(const Backward& b, const View<4>& dbias, const Device& device);
void grad_slopes(const Backward& b, const View<2>& dslopes, float* partial, const Device& device);

}  // namespace metate::cuda::flash
