// Sums of the points of each cluster, which k-means moves its centroids by.
#include "arrays.h"

#if !defined(METATE_CUDA)
namespace metate::bind {

// add_to_clusters(x, numbers, sums, period): adds every row of x (n, d) to that of sums (clusters, d) that its number
// says.
PyObject* add_to_clusters(PyObject*, PyObject* args) {
    PyObject* objects[3];
    long long period;
    if (!PyArg_ParseTuple(args, "OOOL", objects, objects + 1, objects + 2, &period)) return nullptr;
    Array x(objects[0], DType::f32, 0), numbers(objects[1], DType::i64, 0),
        sums(objects[2], DType::f32, PyBUF_WRITABLE);
    const int64_t n = x.size(0), d = x.size(1), count = sums.size(0);
    bool fits = x.is(n, d) && numbers.is(n) && sums.is(count, d) && period > 0 && n % period == 0;
    const int64_t* const all = numbers.data<const int64_t>();
    for (int64_t i = 0; fits && i < n; ++i) fits = static_cast<uint64_t>(all[i]) < static_cast<uint64_t>(count);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "metate: add_to_clusters takes (n, d), (n) below k and (k, d) in one piece");
        return nullptr;
    }
    {
        const Tensor like = x.tensor();
        direct::Unlocked unlocked;
        METATE_LAUNCH(
            add_to_clusters, like,
            AddToClusters{x.view(), contiguous_view(const_cast<int64_t*>(all), DType::i64, {n}), sums.view(), period});
    }
    Py_RETURN_NONE;
}

}  // namespace metate::bind
#endif
