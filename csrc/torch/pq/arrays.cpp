// Indexes of numpy arrays: searches of lists, and rows that are added, without a tensor between.
#include <cstring>

#include "lists.h"

#if !defined(METATE_CUDA)
namespace metate::bind {
namespace {

using namespace direct;

constexpr Py_ssize_t array_guards = 2;  // the first, which concern more than tensors

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
        valid_ = PyObject_GetBuffer(object, &buffer_, PyBUF_ND | PyBUF_FORMAT | flags) == 0;
        if (!valid_) {
            PyErr_Clear();
            return;
        }
        if (buffer_.ndim < 1 || buffer_.ndim > 2 || buffer_.itemsize != bytes_of(dtype) || !is_native(dtype)) return;
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
    // Numbers of this machine, where it reads them.
    bool is_native(DType dtype) const {
        const char* const format = buffer_.format ? buffer_.format : "";
        const bool known = dtype == DType::f32 ? *format == 'f' : *format == 'l' || *format == 'q';
        return known && format[1] == 0 && reinterpret_cast<uintptr_t>(buffer_.buf) % bytes_of(dtype) == 0;
    }

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
        nprobe > lists.centroids.size(0) || direct::dispatcher_is_wanted(array_guards))
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
    Tensor rows, start, room;
    int64_t metric;
    bool residual;

    Pool(const Optional& c, const Optional& books, const Tensor& r, const Optional& i, const Optional& bias,
         const Tensor& s, const Tensor& free, int64_t m, bool re)
        : centroids(c),
          codebooks(books),
          ids(i),
          row_bias(bias),
          rows(r),
          start(s),
          room(free),
          metric(m),
          residual(re) {}

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
    using Words = int32_t __attribute__((vector_size(64)));
    constexpr int64_t lanes = sizeof(Words) / 4;
    const auto magnitudes = [&](int64_t first, int64_t n) {
        Words words = {};
        std::memcpy(&words, x + first, static_cast<size_t>(4 * n));
        return words & 0x7fffffff;
    };
    Words most = {};
    int64_t i = 0;
    const auto meet = [&](Words words) { most = words > most ? words : most; };
    for (; i + lanes <= count; i += lanes) meet(magnitudes(i, lanes));
    if (i < count) meet(magnitudes(i, count - i));
    bool finite = true;
    for (int64_t lane = 0; lane < lanes; ++lane) finite &= most[lane] < 0x7f800000;
    return finite;
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

// Adds vectors x to a pool: as row rows[i] under ids[i], or id first_id + i, in list lists[i].
void put_rows(const Pool& pool, Array& x, const int64_t* lists, const int64_t* rows, const int64_t* ids,
              int64_t first_id) {
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
    int64_t* const names = static_cast<int64_t*>(pool.ids->data_ptr());
    for (int64_t i = 0; i < n; ++i) names[rows[i]] = ids ? ids[i] : first_id + i;
}

// add(x, length, places, ids, first_id, known): writes vectors, the lists and then the rows that they went to, and the
// lengths that lists have then; `ids`: theirs, or None, and they follow first_id; `known`: lists are right already.
// None where one of them has no room; False where vectors are not finite or arrays are not what the pool takes.
PyObject* add_prepared(PyObject* capsule, PyObject* args) {
    const Pool& pool = Prepared<Pool>::of(capsule);
    PyObject* objects[4];
    long long first_id;
    int known;
    if (!PyArg_ParseTuple(args, "OOOOLp", objects, objects + 1, objects + 2, objects + 3, &first_id, &known))
        return nullptr;
    Array x(objects[0], DType::f32, 0), length(objects[1], DType::i64, PyBUF_WRITABLE);
    Array places(objects[2], DType::i64, PyBUF_WRITABLE);
    std::optional<Array> ids;
    if (objects[3] != Py_None) ids.emplace(objects[3], DType::i64, 0);
    const int64_t n = x.size(0), count = pool.start.size(0);
    const int64_t D = pool.codebooks ? pool.codebooks->size(0) * pool.codebooks->size(2) : pool.rows.size(1);
    if (!x.is(n, D) || n < 1 || !length.is(count) || !places.is(places.size(0)) || places.size(0) < 2 * n ||
        (ids && !(pool.ids && ids->is(n))) || direct::dispatcher_is_wanted(array_guards))
        Py_RETURN_FALSE;
    bool finite = false, fits = false;
    try {
        std::optional<direct::Unlocked> unlocked;
        if (pool.centroids || pool.codebooks || n * D > 1 << 14) unlocked.emplace();
        int64_t *const list = places.data<int64_t>(), *const row = list + n;
        // Where one is not finite no list is found.
        finite = known || pool.centroids || all_finite(x.data<float>(), n * D);
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
            std::memcpy(row, list, static_cast<size_t>(8 * n));
            for (int64_t i = 0; i < n; ++i) finite &= list[i] >= 0;
            fits = finite && find_rows(row, n, static_cast<const int64_t*>(pool.start.data_ptr()),
                                       static_cast<const int64_t*>(pool.room.data_ptr()), length.data<int64_t>());
            if (fits) put_rows(pool, x, list, row, ids ? ids->data<const int64_t>() : nullptr, first_id);
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
        if (!exchange || !reader.read(args, values)) Py_RETURN_NONE;
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
    return prepare<Pool, std::tuple<Optional, Optional, Tensor, Optional, Optional, Tensor, Tensor, int64_t, bool>>(
        method, args);
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

}  // namespace metate::bind
#endif
