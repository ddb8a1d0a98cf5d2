// Binds csrc/pq.h: the operators declared in python/metate/ops/pq.
#include "pq.h"

#include <cstring>

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
template <class T>
struct Prepared {
    PyObject* arguments;  // keep the memory that `value` describes
    T value;
    ~Prepared() { Py_DECREF(arguments); }

    static const T& of(PyObject* capsule) {
        return static_cast<Prepared*>(PyCapsule_GetPointer(capsule, nullptr))->value;
    }
};

// A numpy array of one or two dimensions, in one piece.
class Array {
  public:
    Array(PyObject* object, DType dtype, int flags) {
        valid_ = PyObject_GetBuffer(object, &buffer_, PyBUF_ND | flags) == 0;
        if (!valid_) {
            PyErr_Clear();
            return;
        }
        if (buffer_.ndim < 1 || buffer_.ndim > 2 || buffer_.itemsize != bytes_of(dtype)) return;
        for (int i = 0; i < buffer_.ndim; ++i) sizes_[i] = buffer_.shape[i];
        strides_[0] = buffer_.ndim == 2 ? sizes_[1] : 1;
        fits_ = true;
        dtype_ = dtype;
    }
    Array(const Array&) = delete;
    ~Array() {
        if (valid_) PyBuffer_Release(&buffer_);
    }
    bool is(int64_t rows, int64_t columns) const {
        return fits_ && buffer_.ndim == 2 && sizes_[0] == rows && sizes_[1] == columns;
    }
    bool is(int64_t count) const { return fits_ && buffer_.ndim == 1 && sizes_[0] == count; }
    View<2> view() const { return contiguous_view(buffer_.buf, dtype_, {sizes_[0], sizes_[1]}); }
    template <class T>
    T* data() const {
        return static_cast<T*>(buffer_.buf);
    }
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
    const Lists& lists = Prepared<Lists>::of(capsule);
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

// Columns that rows are added to: vectors, codes, or codes interleaved, and what they come with.
struct Pool {
    Optional centroids, codebooks, ids, row_bias;
    Tensor rows;
    int64_t metric;
    bool residual;

    Pool(const Optional& c, const Optional& books, const Tensor& r, const Optional& i, const Optional& bias, int64_t m,
         bool re)
        : centroids(c), codebooks(books), ids(i), row_bias(bias), rows(r), metric(m), residual(re) {}

    // Row `row` becomes a vector, or the bytes of its codes.
    void put(int64_t row, const char* from, int64_t bytes) const {
        char* const all = static_cast<char*>(rows.data_ptr());
        if (rows.dim() == 2) {
            std::memcpy(all + row * bytes, from, static_cast<size_t>(bytes));
            return;
        }
        const int64_t M = rows.size(1), width = rows.size(2);
        char* const to = all + row / 32 * M * width + row % width;  // 32 bytes, or 16 of two rows each
        const bool upper = width == 16 && row % 32 >= 16;
        for (int64_t m = 0; m < M; ++m) {
            const int byte = static_cast<unsigned char>(from[width == 16 ? m / 2 : m]);
            char& old = to[m * width];
            if (width == 16)
                old = static_cast<char>(upper ? (old & 15) | (byte >> (m % 2 * 4) & 15) << 4
                                              : (old & 240) | (byte >> (m % 2 * 4) & 15));
            else
                old = static_cast<char>(byte);
        }
    }
};

// Σ r (r + 2 c) of decoded residuals in rows and their centroids, in double precision.
float row_bias_of(const float* r, const float* c, int64_t columns) {
    double sum = 0.0;
    for (int64_t i = 0; i < columns; ++i) {
        const double x = static_cast<double>(r[i]);
        sum += x * (x + 2 * static_cast<double>(c[i]));
    }
    return static_cast<float>(sum);
}

bool all_finite(const float* x, int64_t count) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bad |= (bits & 0x7f800000) == 0x7f800000;
    }
    return !bad;
}

// Gives every vector its row behind its list, which grows: `rows` holds lists before. False where one has no room.
bool find_rows(int64_t* rows, int64_t count, const int64_t* start, const int64_t* room, int64_t* length) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t list = rows[i];
        if (length[list] == room[list]) return false;
        rows[i] = start[list] + length[list]++;
    }
    return true;
}

// Adds vectors x to a pool: as row rows[i] under id first_id + i, in list lists[i].
void put_rows(const Pool& pool, Array& x, const int64_t* lists, const int64_t* rows, int64_t first_id) {
    constexpr int64_t together = 4096;
    const int64_t n = x.size(0), D = x.size(1), most = n < together ? n : together;
    const int64_t M = pool.codebooks ? pool.codebooks->size(0) : 0, L = pool.codebooks ? pool.codebooks->size(1) : 0;
    const int64_t bytes = pool.codebooks ? (M * bits_of(L) + 7) / 8 : 4 * D;
    const Tensor like = x.tensor();
    const Workspace workspace(like, pool.codebooks ? (8 * D + bytes) * most : 0);
    float* const values = static_cast<float*>(workspace.data());
    const View<3> books = pool.codebooks ? view<3>(*pool.codebooks) : View<3>{};
    for (int64_t first = 0; first < n; first += together) {
        const int64_t count = n - first < together ? n - first : together;
        const float* const own = x.data<float>() + first * D;
        const char* stored = reinterpret_cast<const char*>(own);
        const auto centroid = [&](int64_t i) {
            return static_cast<const float*>(pool.centroids->data_ptr()) + lists[first + i] * D;
        };
        if (pool.codebooks) {
            for (int64_t i = 0; pool.residual && i < count; ++i)
                for (int64_t j = 0; j < D; ++j) values[i * D + j] = own[i * D + j] - centroid(i)[j];
            const View<2> coded = contiguous_view(values + most * D * 2, DType::u8, {count, bytes});
            float* const from = pool.residual ? values : const_cast<float*>(own);
            METATE_LAUNCH(pq_encode, like,
                          PqEncode{contiguous_view(from, DType::f32, {count, D}), books, bits_of(L), coded});
            stored = static_cast<const char*>(coded.data);
            if (pool.row_bias) {
                float* const decoded = values + most * D;
                METATE_LAUNCH(pq_decode, like,
                              PqDecode{books, coded, bits_of(L), contiguous_view(decoded, DType::f32, {count, D})});
                for (int64_t i = 0; i < count; ++i)
                    static_cast<float*>(pool.row_bias->data_ptr())[rows[first + i]] =
                        row_bias_of(decoded + i * D, centroid(i), D);
            }
        }
        for (int64_t i = 0; i < count; ++i) pool.put(rows[first + i], stored + i * bytes, bytes);
    }
    if (!pool.ids) return;
    for (int64_t i = 0; i < n; ++i) static_cast<int64_t*>(pool.ids->data_ptr())[rows[i]] = first_id + i;
}

// add(x, start, room, length, lists, rows, first_id, known): writes vectors, the lists and rows that they went to, and
// the lengths that lists have then; `known`: lists are right already. None where one of them has no room; False where
// vectors are not finite or x is not what the pool takes.
PyObject* add_prepared(PyObject* capsule, PyObject* args) {
    const Pool& pool = Prepared<Pool>::of(capsule);
    PyObject* objects[6];
    long long first_id;
    int known;
    if (!PyArg_ParseTuple(args, "OOOOOOLp", objects, objects + 1, objects + 2, objects + 3, objects + 4, objects + 5,
                          &first_id, &known))
        return nullptr;
    Array x(objects[0], DType::f32, 0), start(objects[1], DType::i64, 0), room(objects[2], DType::i64, 0);
    Array length(objects[3], DType::i64, PyBUF_WRITABLE), lists(objects[4], DType::i64, PyBUF_WRITABLE);
    Array rows(objects[5], DType::i64, PyBUF_WRITABLE);
    const int64_t n = x.size(0), count = length.size(0);
    const int64_t D = pool.codebooks ? pool.codebooks->size(0) * pool.codebooks->size(2) : pool.rows.size(1);
    if (!x.is(n, D) || n < 1 || !start.is(count) || !room.is(count) || !length.is(count) || !lists.is(n) ||
        !rows.is(n) || direct::dispatcher_is_wanted())
        Py_RETURN_FALSE;
    bool finite = false, fits = false;
    try {
        direct::Unlocked unlocked;
        int64_t* const list = lists.data<int64_t>();
        finite = known || all_finite(x.data<float>(), n * D);
        if (finite) {
            if (pool.centroids && !known) {
                const Tensor like = x.tensor();
                const Workspace workspace(like, 4 * n);
                const Metric metric = static_cast<Metric>(pool.metric);
                METATE_LAUNCH(topk_distances, like,
                              TopkDistances{x.view(),
                                            view<2>(*pool.centroids),
                                            {},
                                            {},
                                            metric,
                                            {count,
                                             {},
                                             {},
                                             {},
                                             1,
                                             metric == Metric::inner_product,
                                             contiguous_view(workspace.data(), DType::f32, {n, 1}),
                                             contiguous_view(list, DType::i64, {n, 1})}});
            } else if (!known) {
                for (int64_t i = 0; i < n; ++i) list[i] = 0;
            }
            int64_t* const row = rows.data<int64_t>();
            std::memcpy(row, list, static_cast<size_t>(8 * n));
            for (int64_t i = 0; i < n; ++i) finite &= list[i] >= 0;
            fits = finite && find_rows(row, n, start.data<int64_t>(), room.data<int64_t>(), length.data<int64_t>());
            if (fits) put_rows(pool, x, list, row, first_id);
        }
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    if (finite && !fits) Py_RETURN_NONE;
    return PyBool_FromLong(fits);
}

// A Python function over a `T` made of arguments that stay the same; None where they cannot be read directly.
template <class T, class Values>
PyObject* prepare(PyMethodDef& method, PyObject* args) {
    PyObject* capsule = nullptr;
    try {
        Values values;
        direct::Reader reader(false);
        if (!exchange || !direct::read(reader, args, values)) Py_RETURN_NONE;
        auto prepared = std::apply([&](const auto&... each) { return new Prepared<T>{args, T(each...)}; }, values);
        Py_INCREF(args);
        const auto free = [](PyObject* owner) {
            delete static_cast<Prepared<T>*>(PyCapsule_GetPointer(owner, nullptr));
        };
        capsule = PyCapsule_New(prepared, nullptr, free);
        if (!capsule) delete prepared;
    } catch (const NeedsDispatcher&) {
        Py_RETURN_NONE;
    }
    PyObject* function = capsule ? PyCFunction_NewEx(&method, capsule, nullptr) : nullptr;
    Py_XDECREF(capsule);
    return function;
}

}  // namespace

PyObject* prepare_search(PyObject*, PyObject* args) {
    static PyMethodDef method = {"search", search_prepared, METH_VARARGS, nullptr};
    return prepare<Lists, std::tuple<Tensor, Tensor, Tensor, Optional, Optional, Optional, Optional, Optional, Optional,
                                     int64_t, int64_t, bool>>(method, args);
}

PyObject* prepare_add(PyObject*, PyObject* args) {
    static PyMethodDef method = {"add", add_prepared, METH_VARARGS, nullptr};
    return prepare<Pool, std::tuple<Optional, Optional, Tensor, Optional, Optional, int64_t, bool>>(method, args);
}

// row_bias(decoded, centroids, bias): writes it, of arrays with as many rows.
PyObject* row_bias(PyObject*, PyObject* args) {
    PyObject* objects[3];
    if (!PyArg_ParseTuple(args, "OOO", objects, objects + 1, objects + 2)) return nullptr;
    Array decoded(objects[0], DType::f32, 0), centroids(objects[1], DType::f32, 0);
    Array bias(objects[2], DType::f32, PyBUF_WRITABLE);
    const int64_t n = decoded.size(0), D = decoded.size(1);
    if (!decoded.is(n, D) || !centroids.is(n, D) || !bias.is(n)) {
        PyErr_SetString(PyExc_ValueError, "metate: row_bias takes (n, D), (n, D) and (n) float32 in one piece");
        return nullptr;
    }
    for (int64_t i = 0; i < n; ++i)
        bias.data<float>()[i] = row_bias_of(decoded.data<float>() + i * D, centroids.data<float>() + i * D, D);
    Py_RETURN_NONE;
}
#endif

}  // namespace metate::bind
