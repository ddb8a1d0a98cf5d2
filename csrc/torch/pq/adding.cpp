// Rows that are added to indexes, of numpy arrays, without a tensor between, and lists that move to have room for them.
#include <cstring>
#include <memory>

#include "arrays.h"

#if !defined(METATE_CUDA)
namespace metate::bind {
namespace {

using Came = PqAdd::Came;

constexpr int64_t most_added = int64_t{1} << 26;  // numbers that are added without a sign of progress

// Columns that rows are added to, and what they come with.
struct Pool {
    PqAdd add;

    Pool(const Optional& centroids, const Optional& codebooks, const Tensor& rows, const Optional& ids,
         const Optional& row_bias, const Tensor& start, const Tensor& room, int64_t metric, bool residual)
        : add{{},
              centroids ? view<2>(*centroids) : View<2>{},
              codebooks ? view<3>(*codebooks) : View<3>{},
              rows_of(rows),
              blocks_of(rows),
              view<1>(row_bias),
              view<1>(ids),
              view<1>(start),
              view<1>(room),
              static_cast<Metric>(metric),
              residual} {}

    int64_t columns() const { return add.codebooks ? add.codebooks.size[0] * add.codebooks.size[2] : add.rows.size[1]; }
};

PyObject* bytes_of_numbers(const int64_t* numbers, int64_t count) {
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(numbers), static_cast<Py_ssize_t>(8 * count));
}

// add(x, length, ids, first_id, lists, places): writes vectors behind lists of `length` rows, under `ids`, or None, and
// they follow first_id; `lists`: those that vectors go to, or None. Answers the lengths that lists have then, as bytes,
// or, if `places` are wanted, (lengths, the lists and then the rows that vectors went to); (None, lists) where one of
// them has no room; False where vectors are not finite or arrays are not what the pool takes.
PyObject* add_prepared(PyObject* capsule, PyObject* args) {
    const Pool& pool = Prepared<Pool>::of(capsule);
    PyObject* objects[4];
    long long first_id;
    int wanted;
    if (!PyArg_ParseTuple(args, "OOOLOp", objects, objects + 1, objects + 2, &first_id, objects + 3, &wanted))
        return nullptr;
    Array x(objects[0], DType::f32, 0);
    const Numbers length(objects[1]), known(objects[3]);
    std::optional<Array> ids;
    if (objects[2] != Py_None) ids.emplace(objects[2], DType::i64, 0);
    const int64_t n = x.size(0), D = pool.columns(), count = pool.add.start.size[0];
    if (!x.is(n, D) || n < 1 || n * D > most_added || length.count() != count || (known && known.count() != n) ||
        (ids && !(pool.add.ids && ids->is(n))) || direct::dispatcher_is_wanted(array_guards))
        Py_RETURN_FALSE;
    Came came = Came::refused;
    PyObject* const after = bytes_of_numbers(length.data(), count);
    if (!after) return nullptr;
    std::unique_ptr<int64_t[]> places;
    try {
        places.reset(new int64_t[static_cast<size_t>(2 * n)]);
        std::optional<direct::Unlocked> unlocked;
        if (pool.add.centroids || pool.add.codebooks || n * D > 1 << 14) unlocked.emplace();
        if (known) std::memcpy(places.get(), known.data(), static_cast<size_t>(8 * n));
        PqAdd add = pool.add;
        add.x = x.view();
        add.named = ids ? ids->data<const int64_t>() : nullptr;
        add.first_id = first_id;
        add.known = static_cast<bool>(known);
        add.length = reinterpret_cast<int64_t*>(PyBytes_AsString(after));
        add.lists = places.get();
        add.places = places.get() + n;
        add.came = &came;
        const Tensor like = x.tensor();
        const Workspace workspace(like, add.workspace_bytes());
        add.workspace = workspace.data();
        METATE_LAUNCH(pq_add, like, add);
    } catch (...) {
        Py_DECREF(after);
        return direct::raise();
    }
    if (came == Came::done && !wanted) return after;
    PyObject* answer = nullptr;
    if (came == Came::done)
        answer = Py_BuildValue("(ON)", after, bytes_of_numbers(places.get(), 2 * n));
    else if (came == Came::no_room)
        answer = Py_BuildValue("(ON)", Py_None, bytes_of_numbers(places.get(), n));
    else
        answer = PyBool_FromLong(0);
    Py_DECREF(after);
    return answer;
}

}  // namespace

PyObject* prepare_add(PyObject*, PyObject* args) {
    static PyMethodDef method = {"add", direct::safe<add_prepared>, METH_VARARGS, nullptr};
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
    METATE_LAUNCH(pq_row_bias, decoded.tensor(),
                  PqRowBias{decoded.view(), centroids.view(), contiguous_view(bias.data<float>(), DType::f32, {n})});
    Py_RETURN_NONE;
}

// copy_lists(target, source, to, from, count): whether it has copied rows from[i] … from[i] + count[i] - 1 of one
// column to rows to[i] … of another. By one thread: where memory is new, two that touch it first can take ten times as
// long.
PyObject* copy_lists(PyObject*, PyObject* args) {
    try {
        std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> values;
        direct::Reader reader(false);
        if (!exchange || !reader.read(args, values)) Py_RETURN_FALSE;
        const auto& [target, source, to, from, count] = values;
        int64_t bytes = bytes_of(source.dtype());
        for (int i = 1; i < source.dim(); ++i) bytes *= source.size(i);
        const auto number = [](const Tensor& of, int64_t i) { return static_cast<const int64_t*>(of.data_ptr())[i]; };
        direct::Unlocked unlocked;
        for (int64_t i = 0; i < count.size(0); ++i)
            std::memcpy(static_cast<char*>(target.data_ptr()) + number(to, i) * bytes,
                        static_cast<const char*>(source.data_ptr()) + number(from, i) * bytes,
                        static_cast<size_t>(number(count, i) * bytes));
    } catch (const NeedsDispatcher&) {
        Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

}  // namespace metate::bind
#endif
