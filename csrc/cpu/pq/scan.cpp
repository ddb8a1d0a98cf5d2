// Scans of codes: packed rows, and the choice between exact sums and the filter of interleaved ones.
#include "filter.h"

namespace metate::cpu::METATE_ISA {
namespace {

template <int known_bits>
void scan_packed(const Scan& scan, Asked asked, Span span, Best& best) {
    const int64_t bits = known_bits ? known_bits : scan.call.bits;
    const float* const table = scan.table(asked.q);
    for (int64_t first = span.first; first < span.last; first += rows_together) {
        const int count = static_cast<int>(smaller(rows_together, span.last - first));
        const uint8_t* rows[rows_together];
#pragma GCC unroll 8
        for (int i = 0; i < rows_together; ++i) rows[i] = scan.packed(first + (i < count ? i : 0));
        float sum[rows_together];
        add_entries(sum, scan, table, [&](int i, int64_t m) { return code_at(rows[i], m, bits); });
        const float limit = best.limit();
        for (int i = 0; i < count; ++i) scan.offer(sum[i], first + i, asked, limit, best);
    }
}

// Interleaved codes.
METATE_FN int64_t bytes_of_row(const Scan& scan) {
    return scan.M * scan.call.bits / 8 + (scan.call.row_bias ? 4 : 0);
}

#if defined(METATE_HAS_BYTE_SHUFFLES)
template <Form form>
void scan_with_filters(const Scan& scan, const Runtime& runtime, const float* limits) {
    const int64_t filters = kept_filters<form>(scan.M, scan.call.tables.size[0]);
    search_rows(
        scan.call.search, runtime, bytes_of_row(scan), filters_together,
        [&](Arena& arena) { return take_filters<form>(arena, scan.M, filters); },
        [&](Filter* of) {
            for (int64_t i = 0; i < filters; ++i) of[i].query = -1;
        },
        [&](Filter* of, const Turn& turn) { scan_filtered<form>(scan, of, turn); }, limits);
}

// Where many rows are wanted, most of those that are offered are pushed out by later ones. A sample tells about how
// good the last of the best is: the rest is passed over, and a query that is left with too few is asked again.
constexpr int64_t many_wanted = 32;             // results
constexpr int64_t stretches = 64, one_of = 32;  // that a sample is made of, and its share of the rows
constexpr int64_t least_sampled = stretches * one_of * block_codes;

METATE_FN bool worth_sample(const PqScan& c) {
    const Search& s = c.search;
    return s.k >= many_wanted && s.n >= least_sampled && s.n >= 4 * one_of * s.k && !s.ranges && !c.bias &&
           cut_by_rows(s);
}

// A key for every query that rather more than k rows do not exceed, but for one query of some hundreds; null if that is
// not known of all. The results have the room for it.
template <Form form>
const float* likely_limits(const PqScan& c, const Runtime& runtime) {
    const int64_t Q = c.tables.size[0], step = c.search.n / stretches;
    int64_t rows[stretches][2];
    for (int64_t i = 0; i < stretches; ++i) {
        rows[i][0] = i * step / block_codes * block_codes;
        rows[i][1] = rows[i][0] + round_up(step / one_of, block_codes);
    }
    const double expected = static_cast<double>(c.search.k) / one_of;
    const int64_t k = static_cast<int64_t>(expected + 2 * __builtin_sqrt(expected)) + 3;
    float* const distances = static_cast<float*>(c.search.distances.data);
    PqScan sample = c;
    sample.search.ranges = {rows, DType::i64, {Q, stretches, 2}, {0, 2, 1}};
    sample.search.k = k;
    sample.search.distances = contiguous_view(distances, DType::f32, {Q, k});
    sample.search.found = contiguous_view(c.search.found.data, DType::i64, {Q, k});
    scan_with_filters<form>(Scan(sample), runtime, nullptr);
    bool known = true;
    for (int64_t q = 0; q < Q; ++q) {
        distances[q] = key_of(c.search, distances[q * k + k - 1]);
        known &= distances[q] < infinity;
    }
    return known ? distances : nullptr;
}

template <Form form>
void scan_with_limits(const PqScan& c, const Runtime& runtime) {
    const float* const limits = worth_sample(c) ? likely_limits<form>(c, runtime) : nullptr;
    scan_with_filters<form>(Scan(c), runtime, limits);
    const int64_t Q = limits ? c.tables.size[0] : 0, k = c.search.k;
    for (int64_t q = 0; q < Q; ++q) {
        float* const distances = static_cast<float*>(c.search.distances.data) + q * k;
        if (__builtin_fabsf(distances[k - 1]) < infinity) continue;
        PqScan again = c;
        again.tables.data = static_cast<float*>(c.tables.data) + q * c.tables.size[1] * c.tables.size[2];
        again.tables.size[0] = 1;
        again.search.distances = contiguous_view(distances, DType::f32, {1, k});
        again.search.found = contiguous_view(static_cast<int64_t*>(c.search.found.data) + q * k, DType::i64, {1, k});
        scan_with_filters<form>(Scan(again), runtime, nullptr);
    }
}
#endif

void scan_interleaved(const PqScan& c, const Runtime& runtime) {
#if defined(METATE_HAS_BYTE_SHUFFLES)
    if (c.bits == 4) return scan_with_limits<Form::nibbles>(c, runtime);
#endif
#if defined(METATE_HAS_WORD_SHUFFLES)
    if (isa() >= Isa::avx512vbmi && c.tables.size[1] <= most_columns<Form::bytes>)
        return scan_with_limits<Form::bytes>(c, runtime);
    return scan_with_limits<Form::words>(c, runtime);
#endif
    const Scan scan(c);
    const auto scan_all = c.bits == 4 ? scan_blocks<4> : scan_blocks<8>;
    search_rows(
        c.search, runtime, bytes_of_row(scan), 1, [](Arena& arena) { return arena.take<char>(0); }, [](char*) {},
        [&](char*, const Turn& t) { scan_all(scan, t.asked[0], t.span, t.best[0]); });
}

}  // namespace

void pq_scan(const PqScan& c, const Runtime& runtime) {
    if (c.blocks) return scan_interleaved(c, runtime);
    const Scan scan(c);
    with_bits(c.bits, [&]<int bits>() {
        search_rows(
            c.search, runtime, c.packed.size[1], 1, [](Arena& arena) { return arena.take<char>(0); }, [](char*) {},
            [&](char*, const Turn& t) { scan_packed<bits>(scan, t.asked[0], t.span, t.best[0]); });
    });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(pq_scan, PqScan, p.tables.dtype)
