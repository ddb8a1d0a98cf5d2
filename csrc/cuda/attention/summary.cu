// What each tile of queries sees, where every query brings its own interval: kernels that walk over tiles then skip
// what no query of a tile sees, and test nothing where all see everything.
#include "host.h"

namespace metate::cuda::flash {
namespace {

struct Summary {
    Problem problem;
    int32_t* bounds;
    int rows, slots;
};

METATE_DEVICE int least_of_warp(int value) {
    METATE_UNROLL
    for (int flip = 16; flip > 0; flip /= 2) value = least(value, shuffle_xor(value, flip));
    return value;
}

// One warp per tile.
METATE_KERNEL(32, 1)
summary_kernel(METATE_PARAMETER(Summary, a)) {
    const Problem& p = a.problem;
    const Place place = locate(p, false, a.rows, a.slots, p.heads, false);
    const Scorer<true> scorer(p, place.sequence, place.head);
    constexpr int far = 0x7fffffff;
    int any_low = far, any_high = 0, all_low = 0, all_high = far;
    for (int i = place.first + lane(); i < least(place.first + a.rows, place.sequence.queries); i += warp_size) {
        const Range range = scorer.keys_of_query(i);
        all_low = most(all_low, range.low);
        all_high = least(all_high, range.high);
        if (range.low < range.high) {
            any_low = least(any_low, range.low);
            any_high = most(any_high, range.high);
        }
    }
    const Words<4> bounds{
        static_cast<uint32_t>(least_of_warp(any_low)), static_cast<uint32_t>(-least_of_warp(-any_high)),
        static_cast<uint32_t>(-least_of_warp(-all_low)), static_cast<uint32_t>(least_of_warp(all_high))};
    const int64_t line = static_cast<int64_t>(p.packed ? 0 : place.sequence.batch) * p.heads + place.head;
    if (lane() == 0) store_global(a.bounds + (line * a.slots + place.slot) * 4, bounds);
}

}  // namespace

void summarise(Problem& p, int rows, void* memory, const Device& device) {
    if (!p.a.intervals) return;
    p.summary = static_cast<const int32_t*>(memory);
    p.summary_slots = slots_of(p, false, rows);
    launch(summary_kernel, {grid_of(p, p.summary_slots, p.a.q.size[2])}, 32, 0, device.stream,
           Summary{p, static_cast<int32_t*>(memory), rows, p.summary_slots});
}

}  // namespace metate::cuda::flash
