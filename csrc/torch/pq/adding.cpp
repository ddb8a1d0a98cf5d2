// Rows that are added to indexes, of numpy arrays, without a tensor between, and lists that move to have room for them.
#include <cstring>
#include <memory>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "arrays.h"

#if !defined(METATE_CUDA)
namespace metate::bind {
namespace {

constexpr int64_t most_added = int64_t{1} << 26;  // numbers that are added without a sign of progress

using Words = uint32_t __attribute__((vector_size(16)));

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

// Gives store(i, words, n) the n <= 4 numbers from i on, and says whether all of them are finite: an exponent of ones
// and a one more carry into the sign.
template <class Store>
bool all_finite(const float* x, int64_t count, const Store& store) {
    constexpr int64_t lanes = sizeof(Words) / 4, together = 4;
    Words any[together] = {};
    const auto meet = [&](int64_t first, int64_t n, Words& seen) {
        Words words = {};
        std::memcpy(&words, x + first, static_cast<size_t>(4 * n));
        seen |= (words & 0x7fffffff) + 0x00800000;
        store(first, words, n);
    };
    int64_t i = 0;
    for (; i + together * lanes <= count; i += together * lanes)
        for (int64_t j = 0; j < together; ++j) meet(i + j * lanes, lanes, any[j]);
    for (; i < count; i += lanes) meet(i, count - i < lanes ? count - i : lanes, any[0]);
    const Words all = (any[0] | any[1]) | (any[2] | any[3]);
    return ((all[0] | all[1] | all[2] | all[3]) >> 31) == 0;
}

bool all_finite(const float* x, int64_t count) {
    return all_finite(x, count, [](int64_t, const Words&, int64_t) {});
}

// Copies numbers, and says whether all are finite. Many go around the caches: nobody reads them soon.
bool copy_finite(float* to, const float* x, int64_t count) {
#if defined(__SSE2__)
    constexpr int64_t many = 1 << 11;
    if (count >= many && count % 4 == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(Words) == 0) {
        const bool finite = all_finite(x, count, [&](int64_t i, const Words& words, int64_t) {
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), reinterpret_cast<const __m128i&>(words));
        });
        _mm_sfence();
        return finite;
    }
#endif
    return all_finite(x, count, [&](int64_t i, const Words& words, int64_t n) {
        std::memcpy(to + i, &words, static_cast<size_t>(4 * n));
    });
}

// Gives every vector its row behind its list, which grows. False where one has no room.
bool find_rows(const int64_t* lists, int64_t* rows, int64_t count, const Pool& pool, int64_t* length) {
    const auto* const start = static_cast<const int64_t*>(pool.start.data_ptr());
    const auto* const room = static_cast<const int64_t*>(pool.room.data_ptr());
    for (int64_t i = 0; i < count; ++i) {
        const int64_t list = lists[i];
        if (length[list] == room[list]) return false;
        rows[i] = start[list] + length[list]++;
    }
    return true;
}

// Vectors that go to rows of a pool, in lists, under ids or those that follow first_id.
struct Added {
    const Pool& pool;
    Array& x;
    const int64_t *lists, *rows, *ids;
    int64_t first_id;

    int64_t count() const { return x.size(0); }
    const float* vector(int64_t i) const { return x.data<float>() + i * x.size(1); }
};

// Copies vectors first … last, of which those that stay neighbours go together. False where one is not finite.
bool put_vectors(const Added& added, int64_t first, int64_t last) {
    const int64_t D = added.x.size(1);
    float* const pool = static_cast<float*>(added.pool.rows.data_ptr());
    bool finite = true;
    for (int64_t end; finite && first < last; first = end) {
        for (end = first + 1; end < last && added.rows[end] == added.rows[end - 1] + 1;) ++end;
        finite = copy_finite(pool + added.rows[first] * D, added.vector(first), (end - first) * D);
    }
    return finite;
}

// By all workers where that is worth starting them.
bool put_all_vectors(const Added& added) {
    constexpr int64_t worth_workers = 1 << 18;  // numbers
    struct Shared {
        const Added& added;
        int64_t workers;
        bool finite;
    } shared{added, 1, true};
    const Launch launch(added.pool.rows);
    const cpu::Runtime& runtime = launch;
    if (added.count() * added.x.size(1) >= worth_workers) shared.workers = runtime.threads;
    const auto work = [](int worker, void* context) {
        Shared& all = *static_cast<Shared*>(context);
        const int64_t n = all.added.count();
        if (!put_vectors(all.added, n * worker / all.workers, n * (worker + 1) / all.workers))
            __atomic_store_n(&all.finite, false, __ATOMIC_RELAXED);
    };
    if (shared.workers > 1)
        runtime.parallel(static_cast<int>(shared.workers), work, &shared);
    else
        work(0, &shared);
    return shared.finite;
}

void put_codes(const Added& added) {
    constexpr int64_t together = 4096;
    const Pool& pool = added.pool;
    const int64_t n = added.count(), D = added.x.size(1), most = n < together ? n : together;
    const int64_t M = pool.codebooks->size(0), L = pool.codebooks->size(1), bytes = (M * bits_of(L) + 7) / 8;
    const Tensor like = added.x.tensor();
    const Workspace workspace(like, (8 * D + bytes) * most);
    float* const values = static_cast<float*>(workspace.data());
    const View<3> books = view<3>(*pool.codebooks);
    for (int64_t first = 0; first < n; first += together) {
        const int64_t count = n - first < together ? n - first : together;
        const float* const own = added.vector(first);
        const auto centroid = [&](int64_t i) {
            return static_cast<const float*>(pool.centroids->data_ptr()) + added.lists[first + i] * D;
        };
        for (int64_t i = 0; pool.residual && i < count; ++i)
            for (int64_t j = 0; j < D; ++j) values[i * D + j] = own[i * D + j] - centroid(i)[j];
        const View<2> coded = contiguous_view(values + most * D * 2, DType::u8, {count, bytes});
        float* const from = pool.residual ? values : const_cast<float*>(own);
        METATE_LAUNCH(pq_encode, like,
                      PqEncode{contiguous_view(from, DType::f32, {count, D}), books, bits_of(L), coded});
        if (pool.row_bias) {
            float* const decoded = values + most * D;
            METATE_LAUNCH(pq_decode, like,
                          PqDecode{books, coded, bits_of(L), contiguous_view(decoded, DType::f32, {count, D})});
            for (int64_t i = 0; i < count; ++i)
                static_cast<float*>(pool.row_bias->data_ptr())[added.rows[first + i]] =
                    row_bias_of(decoded + i * D, centroid(i), D);
        }
        for (int64_t i = 0; i < count; ++i)
            pool.put(added.rows[first + i], static_cast<const char*>(coded.data) + i * bytes, bytes);
    }
}

// Writes rows, of which no snapshot knows yet. False where vectors are not finite.
bool put_rows(const Added& added) {
    if (!added.pool.codebooks) {
        if (!put_all_vectors(added)) return false;
    } else {
        put_codes(added);
    }
    if (!added.pool.ids) return true;
    int64_t* const names = static_cast<int64_t*>(added.pool.ids->data_ptr());
    for (int64_t i = 0; i < added.count(); ++i) names[added.rows[i]] = added.ids ? added.ids[i] : added.first_id + i;
    return true;
}

// The lists that vectors go to; false where one is not finite, for which no list is found.
bool find_lists(const Pool& pool, Array& x, int64_t* lists) {
    const int64_t n = x.size(0);
    if (!pool.centroids) {
        std::memset(lists, 0, static_cast<size_t>(8 * n));
        return true;
    }
    const Tensor like = x.tensor();
    const Workspace workspace(like, 4 * n);
    const Metric metric = static_cast<Metric>(pool.metric);
    METATE_LAUNCH(topk_distances, like,
                  TopkDistances{x.view(),
                                view<2>(*pool.centroids),
                                {},
                                {},
                                metric,
                                {pool.centroids->size(0),
                                 {},
                                 {},
                                 {},
                                 1,
                                 metric == Metric::inner_product,
                                 contiguous_view(workspace.data(), DType::f32, {n, 1}),
                                 contiguous_view(lists, DType::i64, {n, 1})}});
    bool found = true;
    for (int64_t i = 0; i < n; ++i) found &= lists[i] >= 0;
    return found;
}

// What came of an addition: `no_room` where a list has none, `refused` where vectors are not finite.
enum class Came { done, no_room, refused };

// `lists` are known, or are found.
Came add_rows(const Added& added, int64_t* lists, int64_t* rows, int64_t* length, bool known) {
    const Pool& pool = added.pool;
    const int64_t n = added.count();
    if (!known && !find_lists(pool, added.x, lists)) return Came::refused;
    const bool fits = find_rows(lists, rows, n, pool, length);
    // Copies of vectors are checked as they are made, and those to come must be known to succeed.
    const bool checked = known || pool.centroids || (fits && !pool.codebooks);
    if (!checked && !all_finite(added.vector(0), n * added.x.size(1))) return Came::refused;
    if (!fits) return Came::no_room;
    return put_rows(added) ? Came::done : Came::refused;
}

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
    const int64_t n = x.size(0), count = pool.start.size(0);
    const int64_t D = pool.codebooks ? pool.codebooks->size(0) * pool.codebooks->size(2) : pool.rows.size(1);
    if (!x.is(n, D) || n < 1 || n * D > most_added || length.count() != count || (known && known.count() != n) ||
        (ids && !(pool.ids && ids->is(n))) || direct::dispatcher_is_wanted(array_guards))
        Py_RETURN_FALSE;
    Came came = Came::refused;
    PyObject* const after = bytes_of_numbers(length.data(), count);
    if (!after) return nullptr;
    int64_t* const lengths = reinterpret_cast<int64_t*>(PyBytes_AsString(after));
    std::unique_ptr<int64_t[]> places;
    try {
        places.reset(new int64_t[static_cast<size_t>(2 * n)]);
        std::optional<direct::Unlocked> unlocked;
        if (pool.centroids || pool.codebooks || n * D > 1 << 14) unlocked.emplace();
        int64_t *const lists = places.get(), *const rows = lists + n;
        if (known) std::memcpy(lists, known.data(), static_cast<size_t>(8 * n));
        came = add_rows({pool, x, lists, rows, ids ? ids->data<const int64_t>() : nullptr, first_id}, lists, rows,
                        lengths, static_cast<bool>(known));
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
    for (int64_t i = 0; i < n; ++i)
        bias.data<float>()[i] = row_bias_of(decoded.data<float>() + i * D, centroids.data<float>() + i * D, D);
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
