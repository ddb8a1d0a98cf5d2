// What the bindings of csrc/pq.h share, of tensors and of numpy arrays: a search of lists.
#pragma once

#include <math.h>

#include "../../pq.h"
#include "../bind.h"

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

constexpr int64_t cosine = 2;  // a metric of direct calls alone, beside those of csrc/pq.h

// Rows over their lengths, which are at least 1e-12; in double precision, rounded once.
template <class T>
void normalise(const View<2>& x, T* to) {
    for (int64_t row = 0; row < x.size[0]; ++row) {
        const T* const from = static_cast<const T*>(x.data) + row * x.stride[0];
        const auto at = [&](int64_t i) { return static_cast<double>(from[i * x.stride[1]]); };
        double squares = 0;
        for (int64_t i = 0; i < x.size[1]; ++i) squares += at(i) * at(i);
        const double length = sqrt(squares), divisor = length < 1e-12 ? 1e-12 : length;
        for (int64_t i = 0; i < x.size[1]; ++i) *to++ = static_cast<T>(at(i) / divisor);
    }
}

// Queries and metric as kernels take them: a cosine is the product of a query of length 1.
struct Asked {
    Tensor queries;
    Metric metric;

    Asked(const Tensor& given, int64_t number)
        : queries(given), metric(number == cosine ? Metric::inner_product : static_cast<Metric>(number)) {
        if (number != cosine) return;
        const Tensor normal = empty(queries, {queries.size(0), queries.size(1)});
        if (normal.dtype() == DType::f64)
            normalise(view<2>(queries), static_cast<double*>(normal.data_ptr()));
        else
            normalise(view<2>(queries), static_cast<float*>(normal.data_ptr()));
        queries = normal;
    }
};

PqScan scan_of(const View<3>& tables, const Tensor& codes, const View<2>& bias, const Optional& row_bias,
               const Search& search) {
    return {tables,
            bits_of(tables.size[2]),
            codes.dim() == 2 ? view<2>(codes) : View<2>{},
            codes.dim() == 3 ? view<3>(codes) : View<3>{},
            bias,
            view<1>(row_bias),
            search};
}

// Interleaved codes, or rows of codes or vectors.
Tensor readable(const Tensor& rows) {
    return rows.dim() == 3 ? dense(rows) : with_rows(rows);
}

// What a search of lists is told beside queries.
struct Lists {
    Tensor centroids, extents, rows;
    Optional codebooks, row_bias, scale, offset, ids, keep;
    int64_t n, metric;
    bool residual;

    Lists(const Tensor& c, const Tensor& e, const Tensor& r, const Optional& books, const Optional& bias,
          const Optional& s, const Optional& o, const Optional& i, const Optional& kept, int64_t count, int64_t m,
          bool re)
        : centroids(with_rows(c)),
          extents(e),
          rows(readable(r)),
          codebooks(books ? Optional(readable_books(*books)) : books),
          row_bias(dense(bias)),
          scale(dense(s)),
          offset(dense(o)),
          ids(dense(i)),
          keep(dense(kept)),
          n(count),
          metric(m),
          residual(re) {}

    Search search(bool largest, const View<2>& distances, const View<2>& found, const View<2>& chosen) const {
        const View<2> all = view<2>(extents);
        const View<3> ranges{all.data, DType::i64, {1, all.size[0], all.size[1]}, {0, all.stride[0], all.stride[1]}};
        return {n, ranges, view<1>(ids), view<1>(keep), distances.size[1], largest, distances, found, chosen};
    }
};

template <int N>
View<N> contiguous_view(void* data, DType dtype, const int64_t (&size)[N]) {
    View<N> view{data, dtype, {}, {}};
    for (int64_t i = N - 1, next = 1; i >= 0; next *= size[i], --i) view.size[i] = size[i], view.stride[i] = next;
    return view;
}

inline void search_lists(const Lists& lists, const Tensor& asked, int64_t nprobe, const View<2>& distances,
                         const View<2>& found) {
    const int64_t Q = asked.size(0), M = lists.codebooks ? lists.codebooks->size(0) : 0;
    const int64_t L = lists.codebooks ? lists.codebooks->size(1) : 0;
    const Workspace workspace(asked, 12 * Q * nprobe + 4 * Q * M * L);
    char* const memory = static_cast<char*>(workspace.data());
    const View<2> chosen = contiguous_view(memory, DType::i64, {Q, nprobe});
    const View<2> near = contiguous_view(memory + 8 * Q * nprobe, DType::f32, {Q, nprobe});
    const Metric metric = static_cast<Metric>(lists.metric);
    const bool largest = metric == Metric::inner_product;
    METATE_LAUNCH(topk_distances, asked,
                  TopkDistances{view<2>(asked),
                                view<2>(lists.centroids),
                                {},
                                {},
                                metric,
                                {lists.centroids.size(0), {}, {}, {}, nprobe, largest, near, chosen}});
    const Search search = lists.search(largest, distances, found, chosen);
    if (!lists.codebooks) {
        METATE_LAUNCH(topk_distances, asked,
                      TopkDistances{view<2>(asked), view<2>(lists.rows), view<1>(lists.scale), view<1>(lists.offset),
                                    metric, search});
        return;
    }
    // |q - c - r|² = |q - c|² + (|r|² + 2 c·r) - 2 q·r: the list's, the row's, and that of tables of the query alone.
    const View<3> tables = contiguous_view(memory + 12 * Q * nprobe, DType::f32, {Q, M, L});
    METATE_LAUNCH(
        pq_distance_tables, asked,
        PqDistanceTables{view<2>(asked), view<3>(*lists.codebooks), lists.residual ? Metric::inner_product : metric,
                         tables, lists.residual && !largest ? -2.0f : 1.0f});
    METATE_LAUNCH(pq_scan, asked,
                  scan_of(tables, lists.rows, lists.residual ? near : View<2>{}, lists.row_bias, search));
}

}  // namespace
}  // namespace metate::bind
