// Searches of lists with numpy arrays, without a tensor between.
#include "arrays.h"

#if !defined(METATE_CUDA)
namespace metate::bind {
namespace {

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
    {
        direct::Unlocked unlocked;
        search_lists(lists, queries.tensor(), nprobe, distances.view(), found.view());
    }
    bool all = true;
    for (int64_t q = 0; q < Q; ++q) all &= static_cast<const int64_t*>(found.view().data)[q * k] != -1;
    return PyBool_FromLong(all);
}

}  // namespace

PyObject* prepare_search(PyObject*, PyObject* args) {
    static PyMethodDef method = {"search", direct::safe<search_prepared>, METH_VARARGS, nullptr};
    return prepare<Lists, std::tuple<Tensor, Tensor, Tensor, Optional, Optional, Optional, Optional, Optional, Optional,
                                     int64_t, int64_t, bool>>(method, args);
}

}  // namespace metate::bind
#endif
