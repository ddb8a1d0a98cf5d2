// Sums of the points of each cluster, which k-means moves its centroids by.
#include "arrays.h"

#if !defined(METATE_CUDA)
namespace metate::bind {
namespace {

using Four = float __attribute__((vector_size(16), aligned(4), may_alias));

// Records of `period` points of d columns; point j of record i belongs to cluster numbers[i · period + j]. Clusters of
// different points of a record are different ones.
struct Clusters {
    const float* x;
    const int64_t* numbers;
    float* sums;
    int64_t records, period, d;

    // Adds columns first … last of all records, one after another: each sum is one worker's, whoever helps.
    void add(int64_t first, int64_t last) const {
        for (int64_t i = 0; i < records; ++i)
            for (int64_t c = first; c < last; c = (c / d + 1) * d) {
                const int64_t point = i * period + c / d, begin = c % d,
                              end = last - c < d - begin ? last - c + begin : d;
                const float* const from = x + point * d;
                float* const to = sums + numbers[point] * d;
                int64_t j = begin;
                for (; j + 4 <= end; j += 4)
                    *reinterpret_cast<Four*>(to + j) += *reinterpret_cast<const Four*>(from + j);
                for (; j < end; ++j) to[j] += from[j];
            }
    }
};

// Where points stand alone, their columns are shared out, in cache lines.
void add_all(const Clusters& clusters, const cpu::Runtime& runtime) {
    constexpr int64_t worth_workers = 1 << 17;  // numbers
    struct Shared {
        const Clusters& clusters;
        int64_t unit, units, workers;
    } shared{clusters, clusters.period > 1 ? clusters.d : 16, 0, 1};
    const int64_t columns = clusters.period * clusters.d;
    shared.units = (columns + shared.unit - 1) / shared.unit;
    if (clusters.records * columns >= worth_workers)
        shared.workers = shared.units < runtime.threads ? shared.units : runtime.threads;
    const auto work = [](int worker, void* context) {
        const Shared& all = *static_cast<const Shared*>(context);
        const int64_t columns = all.clusters.period * all.clusters.d;
        const int64_t last = all.units * (worker + 1) / all.workers * all.unit;
        all.clusters.add(all.units * worker / all.workers * all.unit, last < columns ? last : columns);
    };
    if (shared.workers > 1)
        runtime.parallel(static_cast<int>(shared.workers), work, &shared);
    else
        work(0, &shared);
}

}  // namespace

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
        const Launch launch(x.tensor());
        direct::Unlocked unlocked;
        add_all({x.data<float>(), all, sums.data<float>(), n / period, period, d}, launch);
    }
    Py_RETURN_NONE;
}

}  // namespace metate::bind
#endif
