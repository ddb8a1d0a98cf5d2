// Binds csrc/cpu/peak.h as torch.ops.metate_C.peak; a measurement of the CPU, not an operator of metate.
#if !defined(METATE_CUDA)
#include "cpu/peak.h"

#include "bind.h"

namespace metate::bind {
namespace {

// The work each thread did: operations, or bytes of the float32 `buffer` read. The caller takes the time.
Tensor peak(const Tensor& buffer, int64_t kind, int64_t repeats) {
    STD_TORCH_CHECK(dtype(buffer) == DType::f32 && buffer.dim() == 1 && buffer.stride(0) == 1,
                    "metate.peak: buffer must be contiguous float32");
    const int64_t threads = torch::stable::get_num_threads();
    Tensor work = empty(buffer, {threads > 1 ? threads : 1}, DType::f64);
    torch::stable::Tensor zeros = work.handle();
    torch::stable::zero_(zeros);
    METATE_LAUNCH(peak, buffer, Peak{kind, repeats, view<1>(buffer), view<1>(work)});
    return work;
}

STABLE_TORCH_LIBRARY_FRAGMENT(metate_C, m) {
    m.def("peak(Tensor buffer, int kind, int repeats) -> Tensor");
}
METATE_REGISTER(m) {
    METATE_IMPL(m, peak);
}

}  // namespace
}  // namespace metate::bind
#endif
