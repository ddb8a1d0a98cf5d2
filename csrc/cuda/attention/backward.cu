// The backward pass: the gradients of the queries, then of keys and values, then of bias and slopes where wanted. Each
// pass makes the probabilities again and owns its results, so that nothing is added atomically and no run differs.
#include "gradient.h"

namespace metate::cuda {

void attention_backward(const AttentionBackward& a, const Device& device) {
    using namespace flash;
    const Attention& t = a.problem;
    Backward b{problem_of(t, takes_general(t)),
               a.grad_out,
               a.lse,
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

    // Scratch: the summary for tiles of the fewest queries that any pass takes, then the partial sums of the slopes.
    const size_t summary = summary_bytes(b.problem, 16);
    const size_t partial =
        a.dalibi_slopes ? sizeof(float) * grid_of(b.problem, slots_of(b.problem, false, 64), t.q.size[2]) : 0;
    void* const scratch = summary + partial ? device.scratch(summary + partial, device.context) : nullptr;

    grad_queries(b, scratch, device);
    grad_keys(b, scratch, device);
    if (a.dbias || a.dalibi_slopes) {
        b.problem.unit = 1.f;
        summarise(b.problem, 64, scratch, device);
        if (a.dbias) grad_bias(b, a.dbias, device);
        if (a.dalibi_slopes) {
            grad_slopes(b, a.dalibi_slopes, reinterpret_cast<float*>(static_cast<unsigned char*>(scratch) + summary),
                        device);
        }
    }
}

}  // namespace metate::cuda
