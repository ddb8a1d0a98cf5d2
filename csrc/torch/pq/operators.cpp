// Binds csrc/pq.h: the operators declared in python/metate/ops/pq.
#include "lists.h"

namespace metate::bind {
namespace {

// What a search needs beside what it compares; the tensors that were copied for it live as long.
struct Searching {
    Optional ids, keep;
    Tensor distances, found;
    Search search;

    Searching(const Tensor& queries, int64_t n, const Optional& ranges, const Optional& given_ids,
              const Optional& given_keep, int64_t k, bool largest)
        : ids(dense(given_ids)),
          keep(dense(given_keep)),
          distances(empty(queries, {queries.size(0), k})),
          found(empty(queries, {queries.size(0), k}, DType::i64)),
          search{n, view<3>(ranges), view<1>(ids), view<1>(keep), k, largest, view<2>(distances), view<2>(found)} {}
};

Tensor pq_distance_tables(const Tensor& queries, const Tensor& codebooks, int64_t metric) {
    const Tensor books = readable_books(codebooks);
    const Asked asked(queries, metric);
    Tensor tables = empty(queries, {queries.size(0), codebooks.size(0), codebooks.size(1)});
    METATE_LAUNCH(pq_distance_tables, queries,
                  PqDistanceTables{view<2>(asked.queries), view<3>(books), asked.metric, view<3>(tables)});
    return tables;
}

Tensor pq_encode(const Tensor& x, const Tensor& codebooks) {
    const Tensor rows = with_rows(x), books = dense(codebooks);
    const int64_t bits = code_bits(books.size(1));
    Tensor codes = empty(rows, {rows.size(0), (books.size(0) * bits + 7) / 8}, DType::u8);
    METATE_LAUNCH(pq_encode, rows, PqEncode{view<2>(rows), view<3>(books), bits, view<2>(codes)});
    return codes;
}

Tensor pq_decode(const Tensor& codebooks, const Tensor& codes) {
    const Tensor rows = with_rows(codes), books = dense(codebooks);
    Tensor out = empty(books, {rows.size(0), books.size(0) * books.size(2)});
    METATE_LAUNCH(pq_decode, books, PqDecode{view<3>(books), view<2>(rows), code_bits(books.size(1)), view<2>(out)});
    return out;
}

std::tuple<Tensor, Tensor> pq_scan(const Tensor& tables, const Tensor& codes, const Optional& ranges,
                                   const Optional& bias, const Optional& row_bias, const Optional& ids,
                                   const Optional& keep, int64_t n, int64_t k, bool largest) {
    const Tensor table = dense(tables), stored = readable(codes);
    const Optional added = dense(row_bias);
    const Searching made(table, n, ranges, ids, keep, k, largest);
    METATE_LAUNCH(pq_scan, table,
                  PqScan{view<3>(table), code_bits(table.size(2)), rows_of(stored), blocks_of(stored), view<2>(bias),
                         view<1>(added), made.search});
    return {made.distances, made.found};
}

std::tuple<Tensor, Tensor> topk_distances(const Tensor& queries, const Tensor& base, const Optional& ranges,
                                          const Optional& scale, const Optional& offset, const Optional& ids,
                                          const Optional& keep, int64_t k, int64_t metric, bool largest) {
    const Asked asked(with_rows(queries), metric);
    const Tensor rows = with_rows(base);
    const Optional factors = dense(scale), terms = dense(offset);
    const Searching made(asked.queries, rows.size(0), ranges, ids, keep, k, largest);
    METATE_LAUNCH(topk_distances, asked.queries,
                  TopkDistances{view<2>(asked.queries), view<2>(rows), view<1>(factors), view<1>(terms), asked.metric,
                                made.search});
    return {made.distances, made.found};
}

std::tuple<Tensor, Tensor> ivf_search(const Tensor& queries, const Tensor& centroids, const Tensor& extents,
                                      const Tensor& rows, const Optional& codebooks, const Optional& row_bias,
                                      const Optional& scale, const Optional& offset, const Optional& ids,
                                      const Optional& keep, int64_t n, int64_t nprobe, int64_t k, int64_t metric,
                                      bool residual) {
    const Asked asked(with_rows(queries), metric);
    const Lists lists(centroids, extents, rows, codebooks, row_bias, scale, offset, ids, keep, n,
                      static_cast<int64_t>(asked.metric), residual);
    Tensor distances = empty(queries, {queries.size(0), k}), found = empty(queries, {queries.size(0), k}, DType::i64);
    search_lists(lists, asked.queries, nprobe, view<2>(distances), view<2>(found));
    return {distances, found};
}

METATE_REGISTER(m) {
    METATE_IMPL(m, ivf_search);
    METATE_IMPL(m, pq_distance_tables);
    METATE_IMPL(m, pq_encode);
    METATE_IMPL(m, pq_decode);
    METATE_IMPL(m, pq_scan);
    METATE_IMPL(m, topk_distances);
}

}  // namespace

}  // namespace metate::bind
