// The stable counting sort of slots by expert: a warp owns an expert and looks at every slot twice, first to learn how
// many belong to lower experts, then to give its own their rows in turn.
#include "numbers.h"

namespace metate::cuda {
namespace {

using namespace moe;

constexpr int at_once = 4;  // slots of a lane in flight

struct Sort {
    View<2> experts, inverse;
    View<1> order, offsets;
    int slots, k, num_experts;
};

// Number of the expert of a slot: num_experts for none, more where there is no slot.
METATE_DEVICE int expert_of(const Sort& f, int64_t slot) {
    if (slot >= f.slots) return f.num_experts + 1;
    const int number = integer_at(f.experts, slot / f.k, slot % f.k);
    return number >= 0 && number < f.num_experts ? number : f.num_experts;
}

METATE_DEVICE void store(const View<1>& view, int64_t at, int value) {
    store_global(static_cast<int32_t*>(view.data) + at * view.stride[0], value);
}

METATE_KERNEL(block_threads, 1)
sort_kernel(METATE_PARAMETER(Sort, f)) {
    const int64_t expert = warp_number();
    if (expert > f.num_experts) return;
    constexpr int width = warp_size * at_once;
    int row = 0;
    METATE_NO_UNROLL
    for (int64_t first = 0; first < f.slots; first += width) {
        METATE_UNROLL
        for (int i = 0; i < at_once; ++i) row += expert_of(f, first + i * warp_size + lane()) < expert;
    }
    row = add_lanes(row);
    if (lane() == 0) store(f.offsets, expert, row);
    const bool none = expert == f.num_experts;
    METATE_NO_UNROLL
    for (int64_t first = 0; first < f.slots; first += width) {
        bool own[at_once];
        METATE_UNROLL
        for (int i = 0; i < at_once; ++i) own[i] = expert_of(f, first + i * warp_size + lane()) == expert;
        METATE_UNROLL
        for (int i = 0; i < at_once; ++i) {
            const uint32_t owned = vote_ballot(own[i]);
            const int64_t slot = first + i * warp_size + lane();
            if (own[i]) {
                const int place = row + count_bits(owned & ((1u << lane()) - 1));
                store(f.order, place, none ? -1 : static_cast<int>(slot));
                auto* const to = static_cast<int32_t*>(f.inverse.data) + slot / f.k * f.inverse.stride[0] +
                                 slot % f.k * f.inverse.stride[1];
                store_global(to, none ? -1 : place);
            }
            row += count_bits(owned);
        }
    }
}

}  // namespace

void moe_sort(const MoeSort& s, const Device& device) {
    const int64_t k = s.experts.size[1];
    const Sort f{s.experts,
                 s.inverse,
                 s.order,
                 s.offsets,
                 static_cast<int>(s.experts.size[0] * k),
                 static_cast<int>(k > 0 ? k : 1),
                 static_cast<int>(s.num_experts)};
    launch_warps("moe_sort", sort_kernel, s.num_experts + 1, 0, device, f);
}

}  // namespace metate::cuda
