// The table of tiles: one block adds up the tiles of the experts, then its threads look up whose each tile is.
#include "schedule.h"

namespace metate::cuda::moe {
namespace {

constexpr int threads = 256;

// Inclusive sums over the block; `totals` holds a number for each warp.
METATE_DEVICE int sum_up_to(int value, unsigned char* totals) {
    int sum = value;
    METATE_UNROLL
    for (int distance = 1; distance < warp_size; distance *= 2) {
        const int below = shuffle(sum, lane() - distance);
        if (lane() >= distance) sum += below;
    }
    if (lane() == warp_size - 1) store_shared(totals + warp() * 4, sum);
    sync_threads();
    for (int w = 0; w < warp(); ++w) sum += load_shared<int>(totals + w * 4);
    return sum;
}

METATE_KERNEL(threads, 1)
schedule_kernel(METATE_PARAMETER(Schedule, f)) {
    METATE_SHARED(unsigned char, shared);
    unsigned char *const lasts = shared, *const begins = lasts + threads * 4, *const ends = begins + threads * 4;
    unsigned char* const totals = ends + threads * 4;
    const int thread = thread_index();
    int passed = 0;
    METATE_NO_UNROLL
    for (int base = -1; base <= f.experts; base += threads) {
        const int expert = base + thread;
        int begin = f.rows, end = f.rows;
        if (expert <= f.experts) {
            begin = offset_of(f.offsets, f.experts, f.rows, expert);
            end = most(begin, offset_of(f.offsets, f.experts, f.rows, expert + 1));
        }
        const int last = sum_up_to((end - begin + f.tile_rows - 1) / f.tile_rows, totals);
        store_shared(lasts + thread * 4, last);
        store_shared(begins + thread * 4, begin);
        store_shared(ends + thread * 4, end);
        sync_threads();
        const int here = load_shared<int>(lasts + (threads - 1) * 4);
        METATE_NO_UNROLL
        for (int tile = thread; tile < least(here, f.tiles - passed); tile += threads) {
            int low = 0;  // the first whose last tile is beyond this one
            for (int width = threads / 2; width > 0; width /= 2)
                if (load_shared<int>(lasts + (low + width - 1) * 4) <= tile) low += width;
            const int before = low > 0 ? load_shared<int>(lasts + (low - 1) * 4) : 0;
            const int first = load_shared<int>(begins + low * 4) + (tile - before) * f.tile_rows;
            store_global(f.segments + passed + tile, Segment{base + low, first, load_shared<int>(ends + low * 4), 0});
        }
        passed += here;
        sync_threads();
    }
    for (int tile = passed + thread; tile < f.tiles; tile += threads)
        store_global(f.segments + tile, Segment{0, 0, 0, 0});
}

}  // namespace

void make_schedule(const Schedule& f, const Device& device) {
    launch(schedule_kernel, {1}, threads, threads * 12 + threads / warp_size * 4, device.stream, f);
}

}  // namespace metate::cuda::moe
