// Products over any number of columns, 64 at a time: for passes whose results are small beside their operands, so that
// one kernel serves every head dimension.
#pragma once

#include "score.h"

namespace metate::cuda::flash {

constexpr int chunk = 64, chunk_threads = 128;
constexpr size_t chunked_shared_bytes = 2 * 2 * 64 * chunk * 2;

// Columns from 64·c on.
METATE_DEVICE Matrix columns_from(const Matrix& matrix, int c) {
    Matrix rest = matrix;
    rest.data = matrix.element(0, c * chunk);
    rest.columns = matrix.columns - c * chunk;
    return rest;
}

// d = a·bᵀ for 64 rows of each, by four warps. The chunks take turns in two places of `shared`.
template <typename T>
METATE_DEVICE void multiply_chunks(float (&d)[1][8][4], const Matrix& a, int first_a, const Matrix& b, int first_b,
                                   unsigned char* shared) {
    constexpr int bytes = 64 * chunk * 2;
    const int chunks = (a.columns + chunk - 1) / chunk;
    const auto load = [&](int c) {
        unsigned char* const place = shared + (c & 1) * 2 * bytes;
        if (c < chunks) {
            load_tile<64, chunk, chunk_threads>(place, columns_from(a, c), first_a);
            load_tile<64, chunk, chunk_threads>(place + bytes, columns_from(b, c), first_b);
        }
        cp_async_commit();
    };
    clear(d);
    sync_threads();
    load(0);
    METATE_NO_UNROLL
    for (int c = 0; c < chunks; ++c) {
        cp_async_wait<0>();
        sync_threads();
        load(c + 1);
        const unsigned char* const place = shared + (c & 1) * 2 * bytes;
        multiply_transposed<T, chunk>(d, place, place + bytes, warp());
    }
}

template <typename Body>
void for_dtype(DType dtype, Body body) {
    if (dtype == DType::bf16) {
        body.template operator()<bf16>();
    } else {
        body.template operator()<f16>();
    }
}

}  // namespace metate::cuda::flash
