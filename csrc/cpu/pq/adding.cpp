// Rows behind lists: where vectors go, and their copies or codes.
#include "../../pq.h"
#include "../parallel.h"
#include "codes.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace metate::cpu::METATE_ISA {

void pq_encode(const PqEncode&, const Runtime&);
void pq_decode(const PqDecode&, const Runtime&);
void topk_distances(const TopkDistances&, const Runtime&);

namespace {

using Came = PqAdd::Came;
using Words = uint32_t __attribute__((vector_size(16)));

const float* vector_of(const PqAdd& c, int64_t i) {
    return static_cast<const float*>(c.x.data) + i * c.x.size[1];
}

// Scans read whole blocks, also while rows of them are written of which they know nothing yet, and make nothing of what
// changes meanwhile: no race of theirs, whatever ThreadSanitizer would say.
#define METATE_BESIDE_SCANS __attribute__((no_sanitize("thread")))

// A row of interleaved codes becomes what packed ones say.
METATE_BESIDE_SCANS void put_interleaved(const View<3>& blocks, int64_t row, const uint8_t* codes) {
    const int64_t M = blocks.size[1], bytes = blocks.size[2];
    uint8_t* const to = static_cast<uint8_t*>(blocks.data) + row / block_codes * M * bytes + row % bytes;
    if (bytes == block_codes) {
        for (int64_t m = 0; m < M; ++m) to[m * bytes] = codes[m];
        return;
    }
    const int shift = row % block_codes < bytes ? 0 : 4;  // two rows share a byte
    for (int64_t m = 0; m < M; ++m) {
        const int code = codes[m / 2] >> (m % 2 * 4) & 15;
        to[m * bytes] = static_cast<uint8_t>((to[m * bytes] & (240 >> shift)) | code << shift);
    }
}

void put_codes_of(const PqAdd& c, int64_t row, const uint8_t* codes, int64_t bytes) {
    if (c.blocks) return put_interleaved(c.blocks, row, codes);
    __builtin_memcpy(static_cast<uint8_t*>(c.rows.data) + row * bytes, codes, static_cast<size_t>(bytes));
}

METATE_BESIDE_SCANS void put_bias(const View<1>& row_bias, int64_t row, float bias) {
    static_cast<float*>(row_bias.data)[row] = bias;
}

// Σ r (r + 2 c) in double precision.
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
        __builtin_memcpy(&words, x + first, static_cast<size_t>(4 * n));
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
        __builtin_memcpy(to + i, &words, static_cast<size_t>(4 * n));
    });
}

// Gives every vector its row behind its list, which grows. False where one has no room.
bool find_places(const PqAdd& c) {
    const auto* const start = static_cast<const int64_t*>(c.start.data);
    const auto* const room = static_cast<const int64_t*>(c.room.data);
    for (int64_t i = 0; i < c.x.size[0]; ++i) {
        const int64_t list = c.lists[i];
        if (c.length[list] == room[list]) return false;
        c.places[i] = start[list] + c.length[list]++;
    }
    return true;
}

// Copies vectors first … last, of which those that stay neighbours go together. False where one is not finite.
bool put_vectors(const PqAdd& c, int64_t first, int64_t last) {
    const int64_t D = c.x.size[1];
    float* const rows = static_cast<float*>(c.rows.data);
    bool finite = true;
    for (int64_t end; finite && first < last; first = end) {
        for (end = first + 1; end < last && c.places[end] == c.places[end - 1] + 1;) ++end;
        finite = copy_finite(rows + c.places[first] * D, vector_of(c, first), (end - first) * D);
    }
    return finite;
}

bool put_all_vectors(const PqAdd& c, const Runtime& runtime) {
    constexpr int64_t alone = 1 << 17;  // numbers that are worth a piece of their own
    const int64_t n = c.x.size[0], together = larger(1, alone / c.x.size[1]);
    bool finite = true;
    for_pieces(runtime, ceil_div(n, together), [&](int, int64_t piece) {
        if (!put_vectors(c, piece * together, smaller(n, (piece + 1) * together)))
            __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
    return finite;
}

void put_all_codes(const PqAdd& c, const Runtime& runtime) {
    const int64_t n = c.x.size[0], D = c.x.size[1], bits = c.bits(), bytes = c.code_bytes();
    const int64_t most = smaller(n, PqAdd::together);
    float* const values = static_cast<float*>(c.workspace);
    float* const decoded = values + most * D;
    for (int64_t first = 0; first < n; first += most) {
        const int64_t count = smaller(most, n - first);
        const float* const own = vector_of(c, first);
        const auto centroid = [&](int64_t i) {
            return static_cast<const float*>(c.centroids.data) + c.lists[first + i] * D;
        };
        for (int64_t i = 0; c.residual && i < count; ++i)
            for (int64_t j = 0; j < D; ++j) values[i * D + j] = own[i * D + j] - centroid(i)[j];
        const View<2> codes = contiguous_view(decoded + most * D, DType::u8, {count, bytes});
        float* const from = c.residual ? values : const_cast<float*>(own);
        METATE_ISA::pq_encode({contiguous_view(from, DType::f32, {count, D}), c.codebooks, bits, codes}, runtime);
        if (c.row_bias) {
            METATE_ISA::pq_decode({c.codebooks, codes, bits, contiguous_view(decoded, DType::f32, {count, D})},
                                  runtime);
            for (int64_t i = 0; i < count; ++i)
                put_bias(c.row_bias, c.places[first + i], row_bias_of(decoded + i * D, centroid(i), D));
        }
        for (int64_t i = 0; i < count; ++i)
            put_codes_of(c, c.places[first + i], static_cast<const uint8_t*>(codes.data) + i * bytes, bytes);
    }
}

// Writes rows, of which nobody knows yet. False where vectors are not finite.
bool put_rows(const PqAdd& c, const Runtime& runtime) {
    if (!c.codebooks) {
        if (!put_all_vectors(c, runtime)) return false;
    } else {
        put_all_codes(c, runtime);
    }
    if (!c.ids) return true;
    int64_t* const ids = static_cast<int64_t*>(c.ids.data);
    for (int64_t i = 0; i < c.x.size[0]; ++i) ids[c.places[i]] = c.named ? c.named[i] : c.first_id + i;
    return true;
}

// The lists that vectors go to; false where one is not finite, for which no list is found.
bool find_lists(const PqAdd& c, const Runtime& runtime) {
    const int64_t n = c.x.size[0];
    if (!c.centroids) {
        for (int64_t i = 0; i < n; ++i) c.lists[i] = 0;
        return true;
    }
    METATE_ISA::topk_distances({c.x,
                                c.centroids,
                                {},
                                {},
                                c.metric,
                                {c.centroids.size[0],
                                 {},
                                 {},
                                 {},
                                 1,
                                 c.metric == Metric::inner_product,
                                 contiguous_view(c.workspace, DType::f32, {n, 1}),
                                 contiguous_view(c.lists, DType::i64, {n, 1})}},
                               runtime);
    bool found = true;
    for (int64_t i = 0; i < n; ++i) found &= c.lists[i] >= 0;
    return found;
}

Came add(const PqAdd& c, const Runtime& runtime) {
    if (!c.known && !find_lists(c, runtime)) return Came::refused;
    const bool fits = find_places(c);
    // Copies of vectors are checked as they are made, and those to come must be known to succeed.
    const bool checked = c.known || c.centroids || (fits && !c.codebooks);
    if (!checked && !all_finite(vector_of(c, 0), c.x.size[0] * c.x.size[1])) return Came::refused;
    if (!fits) return Came::no_room;
    return put_rows(c, runtime) ? Came::done : Came::refused;
}

}  // namespace

void pq_add(const PqAdd& c, const Runtime& runtime) {
    *c.came = add(c, runtime);
}

void pq_row_bias(const PqRowBias& c, const Runtime&) {
    const int64_t D = c.decoded.size[1];
    for (int64_t i = 0; i < c.bias.size[0]; ++i)
        static_cast<float*>(c.bias.data)[i] = row_bias_of(static_cast<const float*>(c.decoded.data) + i * D,
                                                          static_cast<const float*>(c.centroids.data) + i * D, D);
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(pq_add, PqAdd, p.x.dtype)
METATE_DISPATCH(pq_row_bias, PqRowBias, p.bias.dtype)
