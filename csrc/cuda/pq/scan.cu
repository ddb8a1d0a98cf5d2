// Scans of codes: a block has the table of a query in shared memory and adds up the entries of four rows a thread.
#include "search.h"

namespace metate::cuda {
namespace pq {
namespace {

struct Scan {
    Rows rows;
    Sink sink;
    const float* tables;
    const unsigned char* codes;
    int64_t row_stride;  // of packed codes
    View<2> bias;
    const float* row_bias;
    int M, bits, row_bytes;
    int table_bytes;       // of the copy in shared memory, or 0: tables stay where they are
    bool blocks, vectors;  // whether codes are interleaved; whether 16 bytes (of blocks: 4) can be read at once
};

METATE_DEVICE void stage_table(unsigned char* shared, const Scan& f, const float* table) {
    if (reinterpret_cast<uintptr_t>(table) % 16 == 0) {
        for (int i = thread_index() * 16; i < f.table_bytes; i += threads * 16)
            store_shared(shared + i, load_global<Words<4>>(reinterpret_cast<const unsigned char*>(table) + i));
    } else {
        for (int i = thread_index(); i < f.table_bytes / 4; i += threads)
            store_shared(shared + i * 4, load_global<float>(table + i));
    }
    sync_threads();
}

// Row number i of a thread, from the first of its chunk.
template <int bits, bool blocks>
METATE_DEVICE int row_at(int i) {
    if constexpr (!blocks) return i * threads + thread_index();
    if constexpr (bits == 8) return thread_index() * 4 + i;
    return thread_index() / 8 * 32 + thread_index() % 8 * 2 + i % 2 + i / 2 * 16;
}

// Codes 8·16 / bits of every row from byte `at` on.
template <int bits>
METATE_DEVICE void add_bytes(float (&total)[each], const unsigned char* table, const Scan& f,
                             const unsigned char* const (&row)[each], int at) {
    Words<4> words[each];
    METATE_UNROLL
    for (int i = 0; i < each; ++i) {
        words[i] = {};
        if (!row[i]) continue;
        if (f.vectors && at + 16 <= f.row_bytes) {
            words[i] = load_global<Words<4>>(row[i] + at);
        } else {
            METATE_UNROLL
            for (int b = 0; b < 16; ++b)
                if (at + b < f.row_bytes)
                    words[i][b / 4] |= static_cast<uint32_t>(load_global<uint8_t>(row[i] + at + b)) << b % 4 * 8;
        }
    }
    constexpr int per_word = 32 / bits;
    const int first = at * 8 / bits;
    METATE_UNROLL
    for (int c = 0; c < 4 * per_word; ++c) {
        if (first + c >= f.M) break;
        const unsigned char* const entries = table + ((first + c) << bits) * 4;
        METATE_UNROLL
        for (int i = 0; i < each; ++i) {
            const uint32_t code = words[i][c / per_word] >> c % per_word * bits & ((1u << bits) - 1);
            total[i] += load_shared<float>(entries + code * 4);
        }
    }
}

// All numbers of four rows of blocks.
template <int bits>
METATE_DEVICE void add_blocks(float (&total)[each], const unsigned char* table, const Scan& f, int64_t row) {
    constexpr int width = bits / 2, line = 4 * bits, ahead = 4;  // bytes of a thread, and of a block, for one number
    const unsigned char* from = f.codes + row / 32 * f.M * line + (bits == 8 ? row % 32 : row % 16);
    METATE_NO_UNROLL
    for (int first = 0; first < f.M; first += ahead, from += ahead * line) {
        uint32_t word[ahead] = {};
        METATE_UNROLL
        for (int m = 0; m < ahead; ++m) {
            if (first + m >= f.M) break;
            if (!f.vectors) {
                METATE_UNROLL
                for (int b = 0; b < width; ++b)
                    word[m] |= static_cast<uint32_t>(load_global<uint8_t>(from + m * line + b)) << 8 * b;
            } else if constexpr (bits == 8) {
                word[m] = load_global<uint32_t>(from + m * line);
            } else {
                word[m] = load_global<uint16_t>(from + m * line);
            }
        }
        METATE_UNROLL
        for (int m = 0; m < ahead; ++m) {
            if (first + m >= f.M) break;
            const unsigned char* const entries = table + ((first + m) << bits) * 4;
            METATE_UNROLL
            for (int i = 0; i < each; ++i) {
                const int shift = bits == 8 ? 8 * i : i % 2 * 8 + i / 2 * 4;
                total[i] += load_shared<float>(entries + (word[m] >> shift & ((1u << bits) - 1)) * 4);
            }
        }
    }
}

// Any width and layout, and tables that shared memory does not hold.
METATE_DEVICE uint32_t code_at(const Scan& f, int64_t row, int m) {
    if (f.blocks) {
        const int line = 4 * f.bits, place = static_cast<int>(row % line);
        const uint32_t byte = load_global<uint8_t>(f.codes + (row / 32 * f.M + m) * line + place);
        return f.bits == 8 ? byte : byte >> row % 32 / 16 * 4 & 15;
    }
    const int bit = m * f.bits, last = (bit + f.bits - 1) / 8;
    uint32_t code = 0;
    for (int byte = bit / 8; byte <= last; ++byte)
        code |= static_cast<uint32_t>(load_global<uint8_t>(f.codes + row * f.row_stride + byte))
             << (byte - bit / 8) * 8;
    return code >> bit % 8 & ((1u << f.bits) - 1);
}

METATE_DEVICE void add_any(float (&total)[each], const unsigned char* table, const float* stored, const Scan& f,
                           int64_t begin, const bool (&inside)[each]) {
    METATE_NO_UNROLL
    for (int m = 0; m < f.M; ++m) {
        METATE_UNROLL
        for (int i = 0; i < each; ++i) {
            if (!inside[i]) continue;
            const int64_t entry = (static_cast<int64_t>(m) << f.bits) + code_at(f, begin + row_at<0, false>(i), m);
            total[i] += f.table_bytes ? load_shared<float>(table + entry * 4) : load_global<float>(stored + entry);
        }
    }
}

// bits 0: any.
template <int bits, bool blocks>
METATE_KERNEL(threads, 2)
scan_kernel(METATE_PARAMETER(Scan, f)) {
    METATE_SHARED(unsigned char, shared);
    const int64_t q = block_index().x;
    const float* const stored = f.tables + (q * f.M << f.bits);
    stage_table(shared, f, stored);
    Selection list(shared + f.table_bytes, f.sink.k);
    each_chunk(f.rows, q, block_index().y, f.sink.slices, blocks ? 32 : 1,
               [&](int p, int64_t first, int64_t last, int64_t begin) {
                   bool inside[each], any = false;
                   METATE_UNROLL
                   for (int i = 0; i < each; ++i) {
                       const int64_t row = begin + row_at<bits, blocks>(i);
                       inside[i] = row >= first && row < last && is_kept(f.rows, row);
                       any = any || inside[i];
                   }
                   float total[each] = {};
                   if constexpr (bits == 0) {
                       add_any(total, shared, stored, f, begin, inside);
                   } else if constexpr (blocks) {
                       if (any) add_blocks<bits>(total, shared, f, begin + row_at<bits, true>(0));
                   } else {
                       const unsigned char* row[each];
                       METATE_UNROLL
                       for (int i = 0; i < each; ++i)
                           row[i] = inside[i] ? f.codes + (begin + row_at<bits, false>(i)) * f.row_stride : nullptr;
                       METATE_NO_UNROLL
                       for (int at = 0; at < f.row_bytes; at += 16) add_bytes<bits>(total, shared, f, row, at);
                   }
                   const float added = !f.bias ? 0.f
                                               : load_global<float>(static_cast<const float*>(f.bias.data) +
                                                                    q * f.bias.stride[0] + p * f.bias.stride[1]);
                   uint32_t key[each];
                   METATE_UNROLL
                   for (int i = 0; i < each; ++i) {
                       if (f.row_bias && inside[i])
                           total[i] += load_global<float>(f.row_bias + begin + row_at<bits, blocks>(i));
                       if (f.bias) total[i] += added;
                       key[i] = inside[i] ? key_of(total[i], f.sink.largest) : none;
                   }
                   list.offer(key, [&](int i) { return id_of(f.rows, begin + row_at<bits, blocks>(i)); });
               });
    list.finish();
    write_list(f.sink, list, q, block_index().y);
}

}  // namespace
}  // namespace pq

void pq_scan(const PqScan& call, const Device& device) {
    using namespace pq;
    const int64_t queries = call.tables.size[0], M = call.tables.size[1], table = (M << call.bits) * 4;
    if (queries == 0) return;
    if (queries > 0x7fffffff || M > 1 << 20) refuse("pq_scan", "2^31 queries or more than 2^20 sub-vectors");
    Scan f{};
    f.rows = rows_of(call.search);
    f.sink = sink_of("pq_scan", call.search, slices_of(queries, call.search.n, device));
    f.tables = static_cast<const float*>(call.tables.data);
    f.blocks = static_cast<bool>(call.blocks);
    f.codes = static_cast<const unsigned char*>(f.blocks ? call.blocks.data : call.packed.data);
    f.row_stride = call.packed.stride[0];
    f.bias = call.bias;
    f.row_bias = static_cast<const float*>(call.row_bias.data);
    f.M = static_cast<int>(M);
    f.bits = static_cast<int>(call.bits);
    f.row_bytes = static_cast<int>(ceil_div(M * call.bits, 8));
    const int grain = f.blocks ? 4 : 16;
    f.vectors = reinterpret_cast<uintptr_t>(f.codes) % grain == 0 && (f.blocks || f.row_stride % grain == 0);
    const int64_t list = Selection::bytes(f.sink.k);
    const bool staged = table + list <= shared_limit(device);
    f.table_bytes = staged ? static_cast<int>(table) : 0;
    if (f.sink.slices > 1) place_lists(f.sink, device.scratch(list_bytes(queries, f.sink), device.context), queries);
    const auto kernel = !staged || (f.bits != 4 && f.bits != 8) ? scan_kernel<0, false>
                      : f.blocks ? (f.bits == 4 ? scan_kernel<4, true> : scan_kernel<8, true>)
                                 : (f.bits == 4 ? scan_kernel<4, false> : scan_kernel<8, false>);
    launch(kernel, {static_cast<int>(queries), f.sink.slices, 1}, threads, f.table_bytes + list, device.stream, f);
    merge_lists(f.sink, queries, device);
}

}  // namespace metate::cuda
