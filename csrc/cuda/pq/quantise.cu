// Distance tables, the nearest centroids of sub-vectors, and the vectors that codes stand for.
#include "search.h"

namespace metate::cuda {
namespace pq {
namespace {

constexpr int64_t most_staged = 48 * 1024;  // bytes of shared memory that leave room for several blocks

METATE_INLINE int round_up(int64_t a, int64_t b) {
    return static_cast<int>((a + b - 1) / b * b);
}

METATE_DEVICE Words<4> load_four(const unsigned char* shared) {
    return load_shared<Words<4>>(shared);
}

// Tables: a thread owns one centroid and compares it with eight queries at a time, which stand in shared memory,
// every sub-vector filled to whole fours.

constexpr int together = 8;

struct Tables {
    View<2> queries;
    View<3> books;
    View<3> out;
    int64_t Q;
    int M, L, d, padded;  // padded: d in whole fours
    int spans;            // sub-vectors that a block may touch
    bool l2, staged;
    float factor;
};

METATE_DEVICE float query_at(const Tables& f, int64_t q, int m, int j) {
    if (q >= f.Q || m >= f.M || j >= f.d) return 0.f;
    return load_global<float>(static_cast<const float*>(f.queries.data) + q * f.queries.stride[0] +
                              (static_cast<int64_t>(m) * f.d + j) * f.queries.stride[1]);
}

METATE_DEVICE void stage_queries(unsigned char* shared, const Tables& f, int64_t q, int m) {
    const int line = f.spans * f.padded;
    sync_threads();
    for (int i = thread_index(); i < together * line; i += threads)
        store_shared(shared + i * 4, query_at(f, q + i / line, m + i % line / f.padded, i % f.padded));
    sync_threads();
}

METATE_KERNEL(threads, 2)
tables_kernel(METATE_PARAMETER(Tables, f)) {
    METATE_SHARED(unsigned char, shared);
    const int64_t index = static_cast<int64_t>(block_index().x) * threads + thread_index();
    const int first = static_cast<int>(static_cast<int64_t>(block_index().x) * threads / f.L);
    const bool inside = index < static_cast<int64_t>(f.M) * f.L;
    const int m = inside ? static_cast<int>(index / f.L) : first, l = static_cast<int>(index % f.L);
    const float* const centroid =
        static_cast<const float*>(f.books.data) + m * f.books.stride[0] + l * f.books.stride[1];
    METATE_NO_UNROLL
    for (int64_t q = static_cast<int64_t>(block_index().y) * together; q < f.Q; q += grid_size().y * together) {
        if (f.staged) stage_queries(shared, f, q, first);
        if (!inside) continue;
        float sum[together] = {};
        METATE_NO_UNROLL
        for (int j = 0; j < f.padded; j += 4) {
            float c[4];
            METATE_UNROLL
            for (int i = 0; i < 4; ++i)
                c[i] = j + i < f.d ? load_global<float>(centroid + (j + i) * f.books.stride[2]) : 0.f;
            METATE_UNROLL
            for (int t = 0; t < together; ++t) {
                Words<4> words{};
                if (f.staged) words = load_four(shared + ((t * f.spans + m - first) * f.padded + j) * 4);
                METATE_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float x = f.staged ? float_of(words[i]) : query_at(f, q + t, m, j + i);
                    const float difference = x - c[i];
                    sum[t] = f.l2 ? fmaf(difference, difference, sum[t]) : fmaf(x, c[i], sum[t]);
                }
            }
        }
        METATE_UNROLL
        for (int t = 0; t < together; ++t)
            if (q + t < f.Q)
                store_global(static_cast<float*>(f.out.data) + (q + t) * f.out.stride[0] + m * f.out.stride[1] +
                                 l * f.out.stride[2],
                             sum[t] * f.factor);
    }
}

// Codes: a thread owns a row and finds the nearest centroid in float32. Where another may be as near, it looks again in
// float64.

constexpr int encode_threads = 128;

struct Encode {
    View<2> x;
    const float* books;
    uint16_t* numbers;          // (n, M)
    int M, L, d, padded, tile;  // tile: centroids that are staged together
    bool staged;
};

METATE_DEVICE const float* part_of(const Encode& f, int64_t row, int m) {
    return static_cast<const float*>(f.x.data) + row * f.x.stride[0] + static_cast<int64_t>(m) * f.d;
}

METATE_DEVICE float load_part(const Encode& f, const float* x, int j) {
    return load_global<float>(x + j * f.x.stride[1]);
}

METATE_DEVICE int nearest_exactly(const Encode& f, const float* x, const float* book) {
    uint32_t best = none;
    int found = 0;
    METATE_NO_UNROLL
    for (int l = 0; l < f.L; ++l) {
        double sum = 0;
        METATE_NO_UNROLL
        for (int j = 0; j < f.d; ++j) {
            const double difference =
                static_cast<double>(load_part(f, x, j)) - load_global<float>(book + static_cast<int64_t>(l) * f.d + j);
            sum += difference * difference;
        }
        const uint32_t key = key_of(static_cast<float>(sum), false);
        if (key < best) best = key, found = l;
    }
    return found;
}

struct Nearest {
    float least = float_of(0x7f800000u), second = float_of(0x7f800000u);
    int at = 0;

    METATE_DEVICE void add(float distance, int l) {
        if (distance < least) {
            second = least, least = distance, at = l;
        } else if (distance < second) {
            second = distance;
        }
    }
};

// Rows and eight centroids at a time from shared memory, in whole fours of columns.
METATE_DEVICE void compare_staged(Nearest& nearest, const unsigned char* own, const unsigned char* book,
                                  const Encode& f, int first, int count) {
    METATE_NO_UNROLL
    for (int l = 0; l < count; l += together) {
        float sum[together] = {};
        METATE_NO_UNROLL
        for (int j = 0; j < f.padded; j += 4) {
            const Words<4> x = load_four(own + j * encode_threads * 4);
            METATE_UNROLL
            for (int t = 0; t < together; ++t) {
                const Words<4> c = load_four(book + ((l + t) * f.padded + j) * 4);
                METATE_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float difference = float_of(x[i]) - float_of(c[i]);
                    sum[t] = fmaf(difference, difference, sum[t]);
                }
            }
        }
        METATE_UNROLL
        for (int t = 0; t < together; ++t) nearest.add(sum[t], first + l + t);
    }
}

METATE_DEVICE void stage_rows(unsigned char* shared, const Encode& f, int64_t row, int m) {
    const float* const x = part_of(f, row, m);
    METATE_NO_UNROLL
    for (int j = 0; j < f.padded; ++j) {
        const float value = row < f.x.size[0] && j < f.d ? load_part(f, x, j) : 0.f;
        store_shared(shared + ((j / 4 * encode_threads + thread_index()) * 4 + j % 4) * 4, value);
    }
}

METATE_DEVICE void stage_book(unsigned char* shared, const Encode& f, const float* book, int first, int count) {
    for (int i = thread_index(); i < count * f.padded; i += encode_threads) {
        const int l = i / f.padded, j = i % f.padded;
        store_shared(shared + i * 4,
                     j < f.d ? load_global<float>(book + static_cast<int64_t>(first + l) * f.d + j) : 0.f);
    }
}

METATE_KERNEL(encode_threads, 2)
encode_kernel(METATE_PARAMETER(Encode, f)) {
    METATE_SHARED(unsigned char, shared);
    const int64_t row = static_cast<int64_t>(block_index().x) * encode_threads + thread_index();
    const int m = block_index().y;
    const float *const x = part_of(f, row, m), *const book = f.books + static_cast<int64_t>(m) * f.L * f.d;
    unsigned char* const books = shared + encode_threads * f.padded * 4;
    Nearest nearest;
    if (f.staged) {
        stage_rows(shared, f, row, m);
        METATE_NO_UNROLL
        for (int first = 0; first < f.L; first += f.tile) {
            sync_threads();
            stage_book(books, f, book, first, f.tile);
            sync_threads();
            compare_staged(nearest, shared + thread_index() * 16, books, f, first, f.tile);
        }
    } else if (row < f.x.size[0]) {
        METATE_NO_UNROLL
        for (int l = 0; l < f.L; ++l) {
            float sum = 0.f;
            METATE_NO_UNROLL
            for (int j = 0; j < f.d; ++j) {
                const float difference =
                    load_part(f, x, j) - load_global<float>(book + static_cast<int64_t>(l) * f.d + j);
                sum = fmaf(difference, difference, sum);
            }
            nearest.add(sum, l);
        }
    }
    if (row >= f.x.size[0]) return;
    const float error = static_cast<float>(f.d + 16) * 0x1p-22f;
    const bool certain = nearest.second * (1.f - error) > nearest.least * (1.f + error) + f.d * 0x1p-120f;
    const int number = certain ? nearest.at : nearest_exactly(f, x, book);
    store_global(f.numbers + row * f.M + m, static_cast<uint16_t>(number));
}

struct Pack {
    const uint16_t* numbers;
    unsigned char* codes;
    int64_t count;
    int M, bits, row_bytes;
};

METATE_KERNEL(threads, 2)
pack_kernel(METATE_PARAMETER(Pack, f)) {
    const int64_t index = static_cast<int64_t>(block_index().x) * threads + thread_index();
    if (index >= f.count) return;
    const int64_t row = index / f.row_bytes;
    const int bit = static_cast<int>(index % f.row_bytes) * 8;
    uint32_t byte = 0;
    for (int m = bit / f.bits; m < f.M && m * f.bits < bit + 8; ++m) {
        const uint32_t number = load_global<uint16_t>(f.numbers + row * f.M + m);
        byte |= m * f.bits < bit ? number >> (bit - m * f.bits) : number << (m * f.bits - bit);
    }
    store_global(f.codes + index, static_cast<uint8_t>(byte));
}

struct Decode {
    const float* books;
    View<2> codes;
    float* out;
    int64_t count, columns;
    int d, bits;
};

METATE_KERNEL(threads, 2)
decode_kernel(METATE_PARAMETER(Decode, f)) {
    const int64_t index = static_cast<int64_t>(block_index().x) * threads + thread_index();
    if (index >= f.count) return;
    const int64_t row = index / f.columns, column = index % f.columns, m = column / f.d, bit = m * f.bits;
    const auto* const bytes = static_cast<const uint8_t*>(f.codes.data) + row * f.codes.stride[0];
    uint32_t code = 0;
    for (int64_t byte = bit / 8; byte * 8 < bit + f.bits; ++byte)
        code |= static_cast<uint32_t>(load_global<uint8_t>(bytes + byte)) << (byte - bit / 8) * 8;
    code = code >> bit % 8 & ((1u << f.bits) - 1);
    store_global(f.out + index, load_global<float>(f.books + ((m << f.bits) + code) * f.d + column % f.d));
}

int blocks_of(const char* op, int64_t count) {
    if (count > int64_t{0x7fffffff} * 128) refuse(op, "more than 2^38 elements");
    return static_cast<int>(ceil_div(count, threads));
}

}  // namespace
}  // namespace pq

void pq_distance_tables(const PqDistanceTables& call, const Device& device) {
    using namespace pq;
    const int64_t M = call.codebooks.size[0], L = call.codebooks.size[1], d = call.codebooks.size[2];
    if (call.queries.size[0] == 0) return;
    if (M * L * d >= int64_t{1} << 31) refuse("pq_distance_tables", "2^31 or more numbers in codebooks");
    Tables f{};
    f.queries = call.queries;
    f.books = call.codebooks;
    f.out = call.tables;
    f.Q = call.queries.size[0];
    f.M = static_cast<int>(M);
    f.L = static_cast<int>(L);
    f.d = static_cast<int>(d);
    f.padded = round_up(d, 4);
    f.spans = L < threads ? static_cast<int>(threads / L) : 1;
    f.l2 = call.metric == Metric::l2;
    f.factor = call.factor;
    const int64_t bytes = int64_t{together} * f.spans * f.padded * 4, tiles = ceil_div(f.Q, together);
    f.staged = bytes <= most_staged;
    const int64_t wanted = ceil_div(int64_t{device.processors} * 8, ceil_div(M * L, threads));
    const auto turns = static_cast<int>(wanted < tiles ? wanted : tiles);
    launch(tables_kernel, {blocks_of("pq_distance_tables", M * L), turns < 65535 ? turns : 65535, 1}, threads,
           f.staged ? bytes : 0, device.stream, f);
}

void pq_encode(const PqEncode& call, const Device& device) {
    using namespace pq;
    const int64_t n = call.x.size[0], M = call.codebooks.size[0], L = call.codebooks.size[1],
                  d = call.codebooks.size[2];
    if (n == 0) return;
    if (M > 65535 || d > 1 << 20) refuse("pq_encode", "more than 65535 sub-vectors or 2^20 columns each");
    auto* const numbers = static_cast<uint16_t*>(device.scratch(static_cast<size_t>(n * M) * 2, device.context));
    Encode f{call.x,
             static_cast<const float*>(call.codebooks.data),
             numbers,
             static_cast<int>(M),
             static_cast<int>(L),
             static_cast<int>(d),
             round_up(d, 4),
             static_cast<int>(L),
             false};
    while (f.tile > together && int64_t{f.tile} * f.padded * 4 > 16 * 1024) f.tile /= 2;
    const int64_t bytes = (encode_threads + int64_t{f.tile}) * f.padded * 4;
    f.staged = L >= together && bytes <= most_staged;
    launch(encode_kernel, {static_cast<int>(ceil_div(n, encode_threads)), f.M, 1}, encode_threads, f.staged ? bytes : 0,
           device.stream, f);
    const int64_t row_bytes = call.codes.size[1], count = n * row_bytes;
    launch(pack_kernel, {blocks_of("pq_encode", count), 1, 1}, threads, 0, device.stream,
           Pack{numbers, static_cast<unsigned char*>(call.codes.data), count, f.M, static_cast<int>(call.bits),
                static_cast<int>(row_bytes)});
}

void pq_decode(const PqDecode& call, const Device& device) {
    using namespace pq;
    const int64_t columns = call.out.size[1], count = call.out.size[0] * columns;
    launch(decode_kernel, {blocks_of("pq_decode", count), 1, 1}, threads, 0, device.stream,
           Decode{static_cast<const float*>(call.codebooks.data), call.codes, static_cast<float*>(call.out.data), count,
                  columns, static_cast<int>(call.codebooks.size[2]), static_cast<int>(call.bits)});
}

}  // namespace metate::cuda
