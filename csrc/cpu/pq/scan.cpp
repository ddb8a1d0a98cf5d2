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
void scan_with_filters(const Scan& scan, const Runtime& runtime) {
    const int64_t filters = kept_filters<form>(scan.M, scan.call.tables.size[0]);
    search_rows(
        scan.call.search, runtime, bytes_of_row(scan), filters_together,
        [&](Arena& arena) { return take_filters<form>(arena, scan.M, filters); },
        [&](Filter* of) {
            for (int64_t i = 0; i < filters; ++i) of[i].query = -1;
        },
        [&](Filter* of, const Turn& turn) { scan_filtered<form>(scan, of, turn); });
}
#endif

void scan_interleaved(const Scan& scan, const Runtime& runtime) {
#if defined(METATE_HAS_BYTE_SHUFFLES)
    if (scan.call.bits == 4) return scan_with_filters<Form::nibbles>(scan, runtime);
#endif
#if defined(METATE_HAS_WORD_SHUFFLES)
    if (isa() >= Isa::avx512vbmi && scan.M <= most_columns<Form::bytes>)
        return scan_with_filters<Form::bytes>(scan, runtime);
    return scan_with_filters<Form::words>(scan, runtime);
#endif
    const auto scan_all = scan.call.bits == 4 ? scan_blocks<4> : scan_blocks<8>;
    search_rows(
        scan.call.search, runtime, bytes_of_row(scan), 1, [](Arena& arena) { return arena.take<char>(0); },
        [](char*) {}, [&](char*, const Turn& t) { scan_all(scan, t.asked[0], t.span, t.best[0]); });
}

}  // namespace

void pq_scan(const PqScan& c, const Runtime& runtime) {
    const Scan scan(c);
    if (c.blocks) return scan_interleaved(scan, runtime);
    with_bits(c.bits, [&]<int bits>() {
        search_rows(
            c.search, runtime, c.packed.size[1], 1, [](Arena& arena) { return arena.take<char>(0); }, [](char*) {},
            [&](char*, const Turn& t) { scan_packed<bits>(scan, t.asked[0], t.span, t.best[0]); });
    });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(pq_scan, PqScan, p.tables.dtype)
