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
    METATE_LAUNCH(pq_scan, table, scan_of(view<3>(table), stored, view<2>(bias), added, made.search));
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

void search_lists(const Lists& lists, const Tensor& asked, int64_t nprobe, const View<2>& distances,
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

std::tuple<Tensor, Tensor> ivf_search(const Tensor& queries, const Tensor& centroids, const Tensor& extents,
                                      const Tensor& rows, const Optional& codebooks, const Optional& row_bias,
                                      const Optional& scale, const Optional& offset, const Optional& ids,
                                      const Optional& keep, int64_t n, int64_t nprobe, int64_t k, int64_t metric,
                                      bool residual) {
    const Tensor asked = with_rows(queries);
    const Lists lists(centroids, extents, rows, codebooks, row_bias, scale, offset, ids, keep, n, metric, residual);
    Tensor distances = empty(asked, {asked.size(0), k}), found = empty(asked, {asked.size(0), k}, DType::i64);
    search_lists(lists, asked, nprobe, view<2>(distances), view<2>(found));
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

#if !defined(METATE_CUDA)
namespace {

using namespace direct;

// Lists that are searched from Python again and again, with numpy arrays: around a single query, making tensors costs
// more than the kernels do.
struct Prepared {
    PyObject* arguments;  // keep the memory that `lists` describes
    Lists lists;
    ~Prepared() { Py_DECREF(arguments); }
};

// A numpy array of two dimensions, in one piece.
class Array {
  public:
    Array(PyObject* object, DType dtype, int flags) {
        valid_ = PyObject_GetBuffer(object, &buffer_, PyBUF_ND | flags) == 0;
        if (!valid_) {
            PyErr_Clear();
            return;
        }
        if (buffer_.ndim != 2 || buffer_.itemsize != bytes_of(dtype)) return;
        for (int i = 0; i < 2; ++i) sizes_[i] = buffer_.shape[i];
        strides_[0] = sizes_[1];
        fits_ = true;
        dtype_ = dtype;
    }
    Array(const Array&) = delete;
    ~Array() {
        if (valid_) PyBuffer_Release(&buffer_);
    }
    bool is(int64_t rows, int64_t columns) const { return fits_ && sizes_[0] == rows && sizes_[1] == columns; }
    View<2> view() const { return contiguous_view(buffer_.buf, dtype_, {sizes_[0], sizes_[1]}); }
    int64_t size(int i) const { return sizes_[i]; }
    // While this lives.
    Tensor tensor() {
        Tensor tensor;
        tensor.borrow({buffer_.buf, {dlpack::cpu, 0}, 2, {dlpack::floating, 32, 1}, sizes_, strides_, 0});
        return tensor;
    }

  private:
    Py_buffer buffer_;
    bool valid_ = false, fits_ = false;
    DType dtype_ = DType::f32;
    int64_t sizes_[2] = {0, 0}, strides_[2] = {0, 1};
};

// search(queries, distances, found, nprobe): writes the best of every query; false where it has not, or found none.
PyObject* search_prepared(PyObject* capsule, PyObject* args) {
    const Lists& lists = static_cast<Prepared*>(PyCapsule_GetPointer(capsule, nullptr))->lists;
    PyObject* objects[3];
    long long nprobe;
    if (!PyArg_ParseTuple(args, "OOOL", objects, objects + 1, objects + 2, &nprobe)) return nullptr;
    Array queries(objects[0], DType::f32, 0), distances(objects[1], DType::f32, PyBUF_WRITABLE);
    Array found(objects[2], DType::i64, PyBUF_WRITABLE);
    const int64_t Q = queries.size(0), k = found.size(1);
    if (!queries.is(Q, lists.centroids.size(1)) || !distances.is(Q, k) || !found.is(Q, k) || k < 1 || nprobe < 1 ||
        nprobe > lists.centroids.size(0) || direct::dispatcher_is_wanted())
        Py_RETURN_FALSE;
    try {
        direct::Unlocked unlocked;
        search_lists(lists, queries.tensor(), nprobe, distances.view(), found.view());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    bool all = true;
    for (int64_t q = 0; q < Q; ++q) all &= static_cast<const int64_t*>(found.view().data)[q * k] != -1;
    return PyBool_FromLong(all);
}

}  // namespace

PyObject* prepare_search(PyObject*, PyObject* args) {
    static PyMethodDef method = {"search", search_prepared, METH_VARARGS, nullptr};
    using Values = std::tuple<Tensor, Tensor, Tensor, Optional, Optional, Optional, Optional, Optional, Optional,
                              int64_t, int64_t, bool>;
    PyObject* capsule = nullptr;
    try {
        Values values;
        direct::Reader reader(false);
        if (!exchange || !direct::read(reader, args, values)) Py_RETURN_NONE;
        auto prepared = std::apply([&](const auto&... each) { return new Prepared{args, Lists(each...)}; }, values);
        Py_INCREF(args);
        const auto free = [](PyObject* owner) { delete static_cast<Prepared*>(PyCapsule_GetPointer(owner, nullptr)); };
        capsule = PyCapsule_New(prepared, nullptr, free);
        if (!capsule) delete prepared;
    } catch (const NeedsDispatcher&) {
        Py_RETURN_NONE;
    }
    PyObject* search = capsule ? PyCFunction_NewEx(&method, capsule, nullptr) : nullptr;
    Py_XDECREF(capsule);
    return search;
}
#endif

}  // namespace metate::bind
