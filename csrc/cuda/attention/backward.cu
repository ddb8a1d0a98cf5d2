// The backward pass: the gradients of the queries, then of keys and values, then of bias and slopes where wanted. Each
// pass makes the probabilities again and owns its results, so that nothing is added atomically and no run differs.
#include <math.h>

#include "gradient.h"

namespace metate::cuda {

void attention_backward(const AttentionBackward& a, const Device& device) {
    using namespace flash;
    const Attention& t = a.problem;
    Backward b{problem_of(t, takes_general(t)),
               a.grad_out,
               {},
               a.delta,
               a.dq,
               a.dk,
               a.dv,
               0,
               moves_vectors(t.q),
               moves_vectors(t.k),
               moves_vectors(t.v),
               moves_vectors(a.grad_out),
               moves_vectors(a.dq),
               moves_vectors(a.dk),
               moves_vectors(a.dv)};

    // Scratch: the summary for tiles of the fewest queries that any pass takes, the softmax of the rows, then the
    // partial sums of the slopes.
    const size_t summary = summary_bytes(b.problem, 16), rows = rows_bytes(b.problem);
    const size_t partial =
        a.dalibi_slopes ? sizeof(float) * grid_of(b.problem, slots_of(b.problem, false, 64), t.q.size[2]) : 0;
    auto* const scratch = static_cast<unsigned char*>(
        summary + rows + partial ? device.scratch(summary + rows + partial, device.context) : nullptr);

    b.rows = rows_in(b.problem, scratch + summary);
    Problem p = b.problem;
    summarise(p, 64, scratch, device);
    find_softmax(p, a.lse, a.partial ? INFINITY : largest_lse(t.q.dtype), b.rows, device);
    grad_queries(b, scratch, device);
    grad_keys(b, scratch, device);
    if (a.dbias || a.dalibi_slopes) {
        b.problem.unit = 1.f;
        summarise(b.problem, 64, scratch, device);
        if (a.dbias) grad_bias(b, a.dbias, device);
        if (a.dalibi_slopes) {
            grad_slopes(b, a.dalibi_slopes, reinterpret_cast<float*>(scratch + summary + rows), device);
        }
    }
}

}  // namespace metate::cuda
