// What every search does on the device: walking the rows of a query, and keeping the k best of what a block is offered.
//
// A distance becomes a 32-bit key that sorts as whole numbers do, the best first; (key, id) is a total order, so what
// is kept does not depend on who offers when.
#pragma once

#include <math.h>

#include <stdexcept>
#include <string>

#include "../../pq.h"
#include "../arch/arch.h"

namespace metate::cuda::pq {

using namespace arch;

constexpr int threads = 256, warps = threads / warp_size;
constexpr int each = 4, chunk = threads * each;  // rows that a thread, and a block, look at together
constexpr int most_results = 2048, capacity = 2 * chunk;
constexpr uint32_t none = 0xffffffffu;  // the key of a row that is not found

METATE_DEVICE bool is_finite(float x) {
    return (bits_of(x) & 0x7fffffffu) < 0x7f800000u;
}

METATE_DEVICE uint32_t key_of(float distance, bool largest) {
    if (!is_finite(distance)) return none;
    const uint32_t bits = bits_of(largest ? 0.f - distance : distance + 0.f);  // never -0
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

METATE_DEVICE float distance_of(uint32_t key, bool largest) {
    const uint32_t bits = key == none ? 0x7f800000u : key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
    return largest ? -float_of(bits) : float_of(bits);
}

METATE_DEVICE bool comes_before(uint32_t key, int64_t id, uint32_t other_key, int64_t other_id) {
    return key < other_key || (key == other_key && id < other_id);
}

METATE_INLINE int power_of_two(int64_t least) {
    int size = 1;
    while (size < least) size *= 2;
    return size;
}

// The rows of a search, as a kernel gets them.
struct Rows {
    View<3> ranges;
    View<2> lists;
    const int64_t* ids;
    const uint8_t* keep;
    int64_t n;
    int spans;  // ranges of a query
};

METATE_DEVICE void load_span(const Rows& rows, int64_t q, int p, int64_t& first, int64_t& last) {
    first = 0, last = rows.n;
    if (!rows.ranges) return;
    int64_t number = p;
    if (rows.lists) {
        number = load_global<int64_t>(static_cast<const int64_t*>(rows.lists.data) + q * rows.lists.stride[0] +
                                      p * rows.lists.stride[1]);
        q = 0;
        if (number < 0) {
            last = 0;
            return;
        }
    }
    const auto* const at =
        static_cast<const int64_t*>(rows.ranges.data) + q * rows.ranges.stride[0] + number * rows.ranges.stride[1];
    const int64_t begin = load_global<int64_t>(at), end = load_global<int64_t>(at + rows.ranges.stride[2]);
    first = begin < 0 ? 0 : begin < rows.n ? begin : rows.n;
    last = end < 0 ? 0 : end < rows.n ? end : rows.n;
}

METATE_DEVICE bool is_kept(const Rows& rows, int64_t row) {
    return !rows.keep || (load_global<uint8_t>(rows.keep + (row >> 3)) >> (row & 7) & 1);
}

METATE_DEVICE int64_t id_of(const Rows& rows, int64_t row) {
    return rows.ids ? load_global<int64_t>(rows.ids + row) : row;
}

// visit(p, first, last, begin) for every chunk of rows begin … begin + chunk - 1 of the ranges of query q that is the
// turn of this slice; begin is a multiple of `grain` that may lie before first.
template <typename Visit>
METATE_DEVICE void each_chunk(const Rows& rows, int64_t q, int slice, int slices, int64_t grain, const Visit& visit) {
    METATE_NO_UNROLL
    for (int p = 0; p < rows.spans; ++p) {
        int64_t first, last;
        load_span(rows, q, p, first, last);
        const int64_t start = first / grain * grain + static_cast<int64_t>((slice + p) % slices) * chunk;
        METATE_NO_UNROLL
        for (int64_t begin = start; begin < last; begin += static_cast<int64_t>(slices) * chunk)
            visit(p, first, last, begin);
    }
}

// Numbers things that the threads of a block choose, in the order of warps, then of choices, then of lanes.
class Places {
  public:
    static constexpr int bytes = 2 * warps * 4;
    METATE_DEVICE explicit Places(unsigned char* shared) : shared_(shared) {}

    // The places of this thread's choices, from 0; returns how many the block has. Every thread calls it.
    template <int n>
    METATE_DEVICE int assign(const bool (&chosen)[n], int (&place)[n]) {
        unsigned char* const counts = shared_ + (turn_ ^= 1) * warps * 4;
        int total = 0, before = 0;
        METATE_UNROLL
        for (int i = 0; i < n; ++i) {
            const uint32_t vote = vote_ballot(chosen[i]);
            place[i] = total + count_bits(vote & ((1u << lane()) - 1));
            total += count_bits(vote);
        }
        if (lane() == 0) store_shared(counts + warp() * 4, total);
        sync_threads();
        total = 0;
        METATE_UNROLL
        for (int w = 0; w < warps; ++w) {
            const int count = load_shared<int>(counts + w * 4);
            before += w < warp() ? count : 0;
            total += count;
        }
        METATE_UNROLL
        for (int i = 0; i < n; ++i) place[i] += before;
        return total;
    }

  private:
    unsigned char* shared_;
    int turn_ = 0;
};

// The k best (key, id) that a block is offered: a sorted list, and a queue of what may come into it.
class Selection {
  public:
    static METATE_INLINE int size_of(int k) { return power_of_two(k); }
    static METATE_INLINE int64_t bytes(int k) { return (size_of(k) + capacity) * 12 + Places::bytes; }

    METATE_DEVICE Selection(unsigned char* shared, int k)
        : ids_(shared),
          keys_(shared + (size_of(k) + capacity) * 8),
          places_(keys_ + (size_of(k) + capacity) * 4),
          k_(k),
          size_(size_of(k)) {
        for (int i = thread_index(); i < size_; i += threads) put(i, none, INT64_MAX);
    }

    METATE_DEVICE uint32_t last_key() const { return last_key_; }

    // Offers this thread's rows, id(i) being what row i is called. Every thread calls it.
    template <int n, typename Id>
    METATE_DEVICE void offer(const uint32_t (&key)[n], const Id& id) {
        bool chosen[n];
        int64_t ids[n];
        int place[n];
        METATE_UNROLL
        for (int i = 0; i < n; ++i) {
            chosen[i] = key[i] != none && key[i] <= last_key_;
            ids[i] = chosen[i] ? id(i) : 0;
            chosen[i] = chosen[i] && comes_before(key[i], ids[i], last_key_, last_id_);
        }
        const int total = places_.assign(chosen, place);
        METATE_UNROLL
        for (int i = 0; i < n; ++i)
            if (chosen[i]) put(size_ + count_ + place[i], key[i], ids[i]);
        count_ += total;
        const int wanted = k_ < 64 ? 64 : k_;
        if (count_ > (wanted < capacity - chunk ? wanted : capacity - chunk)) merge();
    }

    // After the last offer: the list is complete, and all threads may read it.
    METATE_DEVICE void finish() { merge(); }
    METATE_DEVICE uint32_t key(int i) const { return load_shared<uint32_t>(keys_ + i * 4); }
    METATE_DEVICE int64_t id(int i) const { return load_shared<int64_t>(ids_ + i * 8); }

  private:
    METATE_DEVICE void put(int i, uint32_t key, int64_t id) {
        store_shared(keys_ + i * 4, key);
        store_shared(ids_ + i * 8, id);
    }

    METATE_DEVICE void order(int low, int high, bool rising) {
        const uint32_t a = key(low), b = key(high);
        if (rising ? a < b : b < a) return;
        const int64_t a_id = id(low), b_id = id(high);
        if (comes_before(b, b_id, a, a_id) != rising) return;
        put(low, b, b_id);
        put(high, a, a_id);
    }

    // The queue sorted (a bitonic network), and its best put into the list.
    METATE_DEVICE void merge() {
        const int queued = power_of_two(count_);
        for (int i = count_ + thread_index(); i < queued; i += threads) put(size_ + i, none, INT64_MAX);
        METATE_NO_UNROLL
        for (int run = 2; run <= queued; run *= 2) {
            METATE_NO_UNROLL
            for (int step = run / 2; step > 0; step /= 2) {
                sync_threads();
                for (int i = thread_index(); i < queued / 2; i += threads) {
                    const int low = 2 * i - (i & (step - 1));
                    order(size_ + low, size_ + low + step, (low & run) == 0);
                }
            }
        }
        sync_threads();
        for (int i = thread_index(); i < (queued < size_ ? queued : size_); i += threads)
            order(size_ - 1 - i, size_ + i, true);
        METATE_NO_UNROLL
        for (int step = size_ / 2; step > 0; step /= 2) {
            sync_threads();
            for (int i = thread_index(); i < size_ / 2; i += threads) {
                const int low = 2 * i - (i & (step - 1));
                order(low, low + step, true);
            }
        }
        sync_threads();
        count_ = 0;
        last_key_ = key(k_ - 1);
        last_id_ = id(k_ - 1);
    }

    unsigned char *ids_, *keys_;
    Places places_;
    int k_, size_, count_ = 0;
    uint32_t last_key_ = none;
    int64_t last_id_ = INT64_MAX;
};

// Where the lists of the slices of a query go, and how many there are; one slice writes the results themselves.
struct Sink {
    float* distances;
    int64_t* found;
    uint32_t* keys;  // (queries, slices, k), as are the ids
    int64_t* ids;
    int k, slices;
    bool largest;
};

METATE_DEVICE void write_result(const Sink& sink, int64_t at, uint32_t key, int64_t id) {
    store_global(sink.distances + at, distance_of(key, sink.largest));
    store_global(sink.found + at, key == none ? int64_t{-1} : id);
}

METATE_DEVICE void write_list(const Sink& sink, const Selection& list, int64_t q, int slice) {
    for (int i = thread_index(); i < sink.k; i += threads) {
        const int64_t at = (q * sink.slices + slice) * sink.k + i;
        if (sink.slices == 1) {
            write_result(sink, at, list.key(i), list.id(i));
        } else {
            store_global(sink.keys + at, list.key(i));
            store_global(sink.ids + at, list.id(i));
        }
    }
}

// On the host.

inline void refuse(const char* op, const char* what) {
    throw std::invalid_argument(std::string(op) + " on cuda: " + what);
}

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

inline Rows rows_of(const Search& search) {
    const int64_t spans = search.lists ? search.lists.size[1] : search.ranges ? search.ranges.size[1] : 1;
    return {search.ranges,
            search.lists,
            static_cast<const int64_t*>(search.ids.data),
            static_cast<const uint8_t*>(search.keep.data),
            search.n,
            static_cast<int>(spans)};
}

// Slices of a query that keep the GPU busy, where a query looks at no more than `rows` rows.
inline int slices_of(int64_t queries, int64_t rows, const Device& device) {
    const int64_t wanted = ceil_div(int64_t{device.processors} * 4, queries), most = ceil_div(rows, 2 * chunk);
    const int64_t slices = wanted < most ? wanted : most;
    return slices > 1 ? static_cast<int>(slices < 65535 ? slices : 65535) : 1;
}

inline int64_t list_bytes(int64_t queries, const Sink& sink) {
    return sink.slices > 1 ? ceil_div(queries * sink.slices * sink.k, 16) * 16 * 12 : 0;
}

inline void place_lists(Sink& sink, void* memory, int64_t queries) {
    sink.ids = static_cast<int64_t*>(memory);
    sink.keys = reinterpret_cast<uint32_t*>(sink.ids + ceil_div(queries * sink.slices * sink.k, 16) * 16);
}

inline Sink sink_of(const char* op, const Search& search, int slices) {
    if (search.k > most_results) refuse(op, "k is above 2048");
    return {static_cast<float*>(search.distances.data),
            static_cast<int64_t*>(search.found.data),
            nullptr,
            nullptr,
            static_cast<int>(search.k),
            slices,
            search.largest};
}

// The results from the lists of the slices of every query.
void merge_lists(const Sink& sink, int64_t queries, const Device& device);

}  // namespace metate::cuda::pq
