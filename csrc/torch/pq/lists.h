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

// Interleaved codes, or rows of codes or vectors.
Tensor readable(const Tensor& rows) {
    return rows.dim() == 3 ? dense(rows) : with_rows(rows);
}

// As they are, or absent where they are of the other kind.
View<2> rows_of(const Tensor& rows) {
    return rows.dim() == 2 ? view<2>(rows) : View<2>{};
}
View<3> blocks_of(const Tensor& rows) {
    return rows.dim() == 3 ? view<3>(rows) : View<3>{};
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

    IvfSearch search(const View<2>& queries, int64_t nprobe, const View<2>& distances, const View<2>& found) const {
        const View<2> all = view<2>(extents);
        const View<3> ranges{all.data, DType::i64, {1, all.size[0], all.size[1]}, {0, all.stride[0], all.stride[1]}};
        const Metric by = static_cast<Metric>(metric);
        return {queries,
                view<2>(centroids),
                rows_of(rows),
                blocks_of(rows),
                codebooks ? view<3>(*codebooks) : View<3>{},
                residual,
                view<1>(row_bias),
                view<1>(scale),
                view<1>(offset),
                by,
                nprobe,
                {n, ranges, view<1>(ids), view<1>(keep), found.size[1], by == Metric::inner_product, distances, found}};
    }
};

// Launches any kernel that a search of lists is made of.
struct Kernels {
    const Tensor& like;

    void operator()(const PqDistanceTables& c) const { METATE_LAUNCH(pq_distance_tables, like, c); }
    void operator()(const PqScan& c) const { METATE_LAUNCH(pq_scan, like, c); }
    void operator()(const TopkDistances& c) const { METATE_LAUNCH(topk_distances, like, c); }
};

inline void search_lists(const Lists& lists, const Tensor& asked, int64_t nprobe, const View<2>& distances,
                         const View<2>& found) {
    const IvfSearch call = lists.search(view<2>(asked), nprobe, distances, found);
    const Workspace workspace(asked, call.workspace_bytes());
    launch_each(call, workspace.data(), Kernels{asked});
}

}  // namespace
}  // namespace metate::bind
