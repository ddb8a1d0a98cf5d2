// Binds csrc/pq.h: the operators declared in python/metate/ops/pq.
#include "pq.h"

#include "bind.h"

namespace metate::bind {
namespace {

using Optional = std::optional<Tensor>;

// Kernels read rows whose elements stand side by side; other layouts are copied.
Tensor with_rows(const Tensor& tensor) {
    const int last = static_cast<int>(tensor.dim()) - 1;
    return tensor.size(last) < 2 || tensor.stride(last) == 1 ? tensor : contiguous(tensor);
}

Tensor dense(const Tensor& tensor) {
    int64_t next = 1;
    for (int i = static_cast<int>(tensor.dim()) - 1; i >= 0; next *= tensor.size(i), --i)
        if (tensor.size(i) > 1 && tensor.stride(i) != next) return contiguous(tensor);
    return tensor;
}

Optional dense(const Optional& tensor) {
    return tensor ? Optional(dense(*tensor)) : tensor;
}

// Codebooks (M, L, d), contiguous or with the same number of all centroids side by side.
Tensor readable_books(const Tensor& codebooks) {
    return codebooks.stride(1) == 1 ? codebooks : dense(codebooks);
}

int64_t bits_of(int64_t levels) {
    int64_t bits = 0;
    while (int64_t{1} << bits < levels) ++bits;
    return bits;
}

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

PqScan scan_of(const Tensor& tables, const Tensor& codes, const Optional& bias, const Optional& row_bias,
               const Search& search) {
    return {view<3>(tables),
            bits_of(tables.size(2)),
            codes.dim() == 2 ? view<2>(codes) : View<2>{},
            codes.dim() == 3 ? view<3>(codes) : View<3>{},
            view<2>(bias),
            view<1>(row_bias),
            search};
}

// Interleaved codes, or rows of codes or vectors.
Tensor readable(const Tensor& rows) {
    return rows.dim() == 3 ? dense(rows) : with_rows(rows);
}

Tensor pq_distance_tables(const Tensor& queries, const Tensor& codebooks, int64_t metric) {
    const Tensor books = readable_books(codebooks);
    Tensor tables = empty(queries, {queries.size(0), codebooks.size(0), codebooks.size(1)});
    METATE_LAUNCH(pq_distance_tables, queries,
                  PqDistanceTables{view<2>(queries), view<3>(books), static_cast<Metric>(metric), view<3>(tables)});
    return tables;
}

Tensor pq_encode(const Tensor& x, const Tensor& codebooks) {
    const Tensor rows = with_rows(x), books = dense(codebooks);
    const int64_t bits = bits_of(books.size(1));
    Tensor codes = empty(rows, {rows.size(0), (books.size(0) * bits + 7) / 8}, DType::u8);
    METATE_LAUNCH(pq_encode, rows, PqEncode{view<2>(rows), view<3>(books), bits, view<2>(codes)});
    return codes;
}

Tensor pq_decode(const Tensor& codebooks, const Tensor& codes) {
    const Tensor rows = with_rows(codes), books = dense(codebooks);
    Tensor out = empty(books, {rows.size(0), books.size(0) * books.size(2)});
    METATE_LAUNCH(pq_decode, books, PqDecode{view<3>(books), view<2>(rows), bits_of(books.size(1)), view<2>(out)});
    return out;
}

std::tuple<Tensor, Tensor> pq_scan(const Tensor& tables, const Tensor& codes, const Optional& ranges,
                                   const Optional& bias, const Optional& row_bias, const Optional& ids,
                                   const Optional& keep, int64_t n, int64_t k, bool largest) {
    const Tensor table = dense(tables), stored = readable(codes);
    const Optional added = dense(row_bias);
    const Searching made(table, n, ranges, ids, keep, k, largest);
    METATE_LAUNCH(pq_scan, table, scan_of(table, stored, bias, added, made.search));
    return {made.distances, made.found};
}

std::tuple<Tensor, Tensor> topk_distances(const Tensor& queries, const Tensor& base, const Optional& ranges,
                                          const Optional& scale, const Optional& offset, const Optional& ids,
                                          const Optional& keep, int64_t k, int64_t metric, bool largest) {
    const Tensor asked = with_rows(queries), rows = with_rows(base);
    const Optional factors = dense(scale), terms = dense(offset);
    const Searching made(asked, rows.size(0), ranges, ids, keep, k, largest);
    METATE_LAUNCH(topk_distances, asked,
                  TopkDistances{view<2>(asked), view<2>(rows), view<1>(factors), view<1>(terms),
                                static_cast<Metric>(metric), made.search});
    return {made.distances, made.found};
}

std::tuple<Tensor, Tensor> ivf_search(const Tensor& queries, const Tensor& centroids, const Tensor& extents,
                                      const Tensor& rows, const Optional& codebooks, const Optional& row_bias,
                                      const Optional& scale, const Optional& offset, const Optional& ids,
                                      const Optional& keep, int64_t n, int64_t nprobe, int64_t k, int64_t metric,
                                      bool residual) {
    const Tensor asked = with_rows(queries), stored = readable(rows);
    const bool largest = metric == static_cast<int64_t>(Metric::inner_product);
    const auto [near, lists] = topk_distances(asked, centroids, {}, {}, {}, {}, {}, nprobe, metric, largest);
    Searching made(asked, n, {}, ids, keep, k, largest);
    const View<2> of_lists = view<2>(extents);
    made.search.ranges = {of_lists.data,
                          DType::i64,
                          {1, of_lists.size[0], of_lists.size[1]},
                          {0, of_lists.stride[0], of_lists.stride[1]}};
    made.search.lists = view<2>(lists);
    if (!codebooks) {
        const Optional factors = dense(scale), terms = dense(offset);
        METATE_LAUNCH(topk_distances, asked,
                      TopkDistances{view<2>(asked), view<2>(stored), view<1>(factors), view<1>(terms),
                                    static_cast<Metric>(metric), made.search});
        return {made.distances, made.found};
    }
    // |q - c - r|² = |q - c|² + (|r|² + 2 c·r) - 2 q·r: the list's, the row's, and that of tables of the query alone.
    const Tensor books = readable_books(*codebooks);
    const Tensor tables = empty(asked, {asked.size(0), books.size(0), books.size(1)});
    METATE_LAUNCH(
        pq_distance_tables, asked,
        PqDistanceTables{view<2>(asked), view<3>(books), residual ? Metric::inner_product : static_cast<Metric>(metric),
                         view<3>(tables), residual && !largest ? -2.0f : 1.0f});
    const Optional added = dense(row_bias);
    METATE_LAUNCH(pq_scan, asked, scan_of(tables, stored, residual ? Optional(near) : Optional(), added, made.search));
    return {made.distances, made.found};
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
