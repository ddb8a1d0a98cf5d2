// The CUDA kernels of product quantisation and search, run by the emulator, against plain loops: random cases over
// every width and layout of codes and dtype of vectors, ranges, filters and ties, NaN where nothing may look, and
// another order of the threads every time. Searches must find the very same. `cuda_pq [cases [seed]]`

#include <functional>
#include <utility>

#include "pq.h"
#include "tensors.h"

using namespace metate;

namespace {

// A number from a few, so that distances are often equal, or from all.
double number(Random& random, bool ties) {
    return ties ? round(normal(random)) : static_cast<float>(normal(random));
}

// ---- Codes ----------------------------------------------------------------------------------------------------------

using Numbers = std::vector<std::vector<int>>;  // of every row

Numbers random_numbers(Random& random, int n, int M, int bits) {
    Numbers numbers(n, std::vector<int>(M));
    for (auto& row : numbers)
        for (int& number : row) number = draw(random, 0, (1 << bits) - 1);
    return numbers;
}

Tensor<2> packed(const Numbers& numbers, int M, int bits, int layout, Random& random) {
    const auto n = static_cast<int64_t>(numbers.size());
    Tensor<2> codes(DType::u8, {n, (M * bits + 7) / 8}, layout, random);
    codes.each([&](const int64_t (&at)[2]) {
        int byte = 0;
        for (int bit = 0; bit < 8; ++bit) {
            const int64_t place = at[1] * 8 + bit;
            if (place < M * bits) byte |= (numbers[at[0]][place / bits] >> place % bits & 1) << bit;
        }
        codes.set(at, byte);
    });
    return codes;
}

Tensor<3> interleaved(const Numbers& numbers, int M, int bits, Random& random) {
    const auto n = static_cast<int64_t>(numbers.size());
    Tensor<3> blocks(DType::u8, {(n + 31) / 32, M, 4 * bits}, 0, random);
    blocks.each([&](const int64_t (&at)[3]) {
        const auto of = [&](int64_t row) { return row < n ? numbers[row][at[1]] : draw(random, 0, (1 << bits) - 1); };
        const int64_t row = at[0] * 32 + at[2];
        blocks.set(at, bits == 8 ? of(row) : of(row) | of(row + 16) << 4);
    });
    return blocks;
}

void check_tables(Random& random) {
    const int bits = pick(random, {4, 4, 5, 8, 9}), L = 1 << bits, M = draw(random, 1, 5), Q = draw(random, 0, 20);
    const int d = bits == 4 && chance(random, 20) ? 110 : draw(random, 1, 9), layout = draw(random, 0, 2);
    const auto fill = [&] { return normal(random); };
    const Tensor<2> queries = Tensor<2>(DType::f32, {Q, M * d}, layout, random).fill(fill);
    const Tensor<3> books = Tensor<3>(DType::f32, {M, L, d}, layout, random).fill(fill);
    for (Metric metric : {Metric::l2, Metric::inner_product}) {
        const Tensor<3> out(DType::f32, {Q, M, L}, layout, random);
        cuda::pq_distance_tables({queries.view, books.view, metric, out.view}, emulator::device());
        Truth<3> truth(out.view);
        out.each([&](const int64_t (&at)[3]) {
            for (int j = 0; j < d; ++j) {
                const double q = queries.get({at[0], at[1] * d + j}), c = books.get({at[1], at[2], j});
                truth(at) += metric == Metric::l2 ? (q - c) * (q - c) : q * c;
            }
        });
        compare("tables of " + std::to_string(d) + " columns", "tables", out, truth, 1, DType::f32);
    }
}

void check_codes(Random& random) {
    const int bits = pick(random, {4, 5, 7, 8, 11}), L = 1 << bits, M = draw(random, 1, 4), n = draw(random, 0, 150);
    const int d = bits == 4 && chance(random, 20) ? 120 : draw(random, 1, 9), layout = draw(random, 0, 1);
    const bool ties = chance(random, 40);
    const auto fill = [&] { return chance(random, 1) ? NAN : number(random, ties); };
    const Tensor<2> x = Tensor<2>(DType::f32, {n, M * d}, layout, random).fill(fill);
    const Tensor<3> books = Tensor<3>(DType::f32, {M, L, d}, 0, random).fill(fill);
    const Tensor<2> codes(DType::u8, {n, (M * bits + 7) / 8}, 0, random);
    cuda::pq_encode({x.view, books.view, bits, codes.view}, emulator::device());
    Numbers numbers(n, std::vector<int>(M));
    for (int i = 0; i < n; ++i) {
        for (int m = 0; m < M; ++m) {
            float least = INFINITY;
            for (int l = 0; l < L; ++l) {
                double sum = 0;
                for (int j = 0; j < d; ++j) {
                    const double difference = x.get({i, m * d + j}) - books.get({m, l, j});
                    sum += difference * difference;
                }
                if (static_cast<float>(sum) < least) least = static_cast<float>(sum), numbers[i][m] = l;
            }
        }
    }
    const Tensor<2> expected = packed(numbers, M, bits, 0, random);
    codes.each([&](const int64_t (&at)[2]) {
        require(codes.get(at) == expected.get(at), "row " + std::to_string(at[0]) + " of " + std::to_string(M) +
                                                       " codes of " + std::to_string(bits) + " bits is wrong");
    });
    const Tensor<2> out(DType::f32, {n, M * d}, 0, random);
    cuda::pq_decode({books.view, packed(numbers, M, bits, layout, random).view, bits, out.view}, emulator::device());
    out.each([&](const int64_t (&at)[2]) {
        const double is = out.get(at), should = books.get({at[1] / d, numbers[at[0]][at[1] / d], at[1] % d});
        require(is == should || (isnan(is) && isnan(should)), "a decoded number is wrong");
    });
}

// ---- Searches -------------------------------------------------------------------------------------------------------

struct Asked {
    int Q, n, k, P;  // P 0: no ranges
    bool largest;
    Tensor<3> ranges;
    Tensor<1> ids, keep;
    Tensor<2> distances, found;

    Asked(Random& random, int queries, int rows)
        : Q(queries),
          n(rows),
          k(pick(random, {1, 1, 2, 10, 33, 100, 2048})),
          P(pick(random, {0, 0, 1, 3})),
          largest(chance(random, 30)),
          distances(DType::f32, {Q, k}, 0, random),
          found(DType::i64, {Q, k}, 0, random) {
        if (P) {
            ranges = Tensor<3>(DType::i64, {Q, P, 2}, 2, random);
            for (int q = 0; q < Q; ++q) {
                std::vector<int> cuts(2 * P);
                for (int& cut : cuts) cut = draw(random, 0, n);
                std::sort(cuts.begin(), cuts.end());
                ranges.each(
                    [&](const int64_t (&at)[3]) { ranges.set({q, at[1], at[2]}, cuts[(P - 1 - at[1]) * 2 + at[2]]); });
            }
        }
        if (chance(random, 40))
            ids = Tensor<1>(DType::i64, {n}, 0, random).fill([&] { return draw(random, -5, 2 * n); });
        if (chance(random, 40))
            keep = Tensor<1>(DType::u8, {(n + 7) / 8}, 0, random).fill([&] { return draw(random, 0, 255); });
    }

    bool keeps(int64_t row) const { return !keep.view || (static_cast<int>(keep.get({row / 8})) >> row % 8 & 1); }
    Search search() const { return {n, ranges.view, ids.view, keep.view, k, largest, distances.view, found.view}; }

    // distance(q, p, row) in float32.
    void check(const std::string& text, const std::function<float(int, int, int)>& distance) const {
        for (int q = 0; q < Q; ++q) {
            std::vector<std::pair<float, int64_t>> best;
            for (int p = 0; p < (P ? P : 1); ++p) {
                const auto first = P ? static_cast<int>(ranges.get({q, p, 0})) : 0;
                const auto last = P ? static_cast<int>(ranges.get({q, p, 1})) : n;
                for (int row = first; row < last; ++row) {
                    const float x = keeps(row) ? distance(q, p, row) : NAN;
                    const int64_t id = ids.view ? static_cast<int64_t>(ids.get({row})) : row;
                    if (isfinite(x)) best.emplace_back(largest ? -x : x, id);
                }
            }
            std::sort(best.begin(), best.end());
            for (int i = 0; i < k; ++i) {
                const bool is_there = i < static_cast<int>(best.size());
                const double d = is_there ? best[i].first : INFINITY,
                             id = is_there ? static_cast<double>(best[i].second) : -1;
                const std::string where =
                    " in result " + std::to_string(i) + " of query " + std::to_string(q) + " in: ";
                require(distances.get({q, i}) == (largest ? -d : d) && found.get({q, i}) == id,
                        std::to_string(distances.get({q, i})) + " (" + std::to_string(found.get({q, i})) + "), not " +
                            std::to_string(largest ? -d : d) + " (" + std::to_string(id) + ")" + where + text + ", k " +
                            std::to_string(k) + ", " + std::to_string(P) + " ranges");
            }
        }
    }
};

void check_scan(Random& random) {
    const int bits = pick(random, {4, 4, 8, 8, 6, 12}), L = 1 << bits;
    const int M =
        bits == 8 && chance(random, 15) ? 170 : draw(random, 1, bits == 12 ? 3 : 35);  // 170: not in shared memory
    const int n = pick(random, {0, 1, 31, 32, 33, 200, 1500, 5000}) / (M > 100 ? 10 : 1);
    const Asked asked(random, draw(random, 0, 3), n);
    const bool ties = chance(random, 40), blocks = (bits == 4 || bits == 8) && chance(random, 60);
    const Numbers numbers = random_numbers(random, n, M, bits);
    const Tensor<3> tables = Tensor<3>(DType::f32, {asked.Q, M, L}, 0, random).fill([&] {
        return chance(random, 1) ? NAN : number(random, ties);
    });
    const auto fill = [&] { return number(random, ties); };
    Tensor<2> bias, rows;
    Tensor<1> row_bias;
    Tensor<3> block;
    if (chance(random, 40)) bias = Tensor<2>(DType::f32, {asked.Q, asked.P ? asked.P : 1}, 2, random).fill(fill);
    if (chance(random, 40)) row_bias = Tensor<1>(DType::f32, {n}, 0, random).fill(fill);
    if (blocks) {
        block = interleaved(numbers, M, bits, random);
    } else {
        rows = packed(numbers, M, bits, draw(random, 0, 1), random);
    }
    cuda::pq_scan({tables.view, bits, rows.view, block.view, bias.view, row_bias.view, asked.search()},
                  emulator::device());
    asked.check("scan of " + std::to_string(n) + " × " + std::to_string(M) + " codes of " + std::to_string(bits) +
                    " bits" + (blocks ? " in blocks" : ""),
                [&](int q, int p, int row) {
                    float sum = 0;
                    for (int m = 0; m < M; ++m) sum += static_cast<float>(tables.get({q, m, numbers[row][m]}));
                    if (row_bias.view) sum += static_cast<float>(row_bias.get({row}));
                    return bias.view ? sum + static_cast<float>(bias.get({q, p})) : sum;
                });
}

void check_topk(Random& random) {
    const DType dtype = static_cast<DType>(pick(random, {static_cast<int>(DType::f32), static_cast<int>(DType::bf16),
                                                         static_cast<int>(DType::f16), static_cast<int>(DType::i8)}));
    const int D = pick(random, {0, 1, 7, 32, 100}), n = pick(random, {0, 1, 33, 300, 1300});
    const Asked asked(random, pick(random, {0, 1, 3, 9, 20}), n);
    const bool ties = chance(random, 40), spoilt = chance(random, 30);
    const double middle = chance(random, 30) ? 50 : 0;  // where products have few digits left
    const int layout = draw(random, 0, 1);
    const auto fill = [&] { return middle + number(random, ties); };
    const Tensor<2> queries = Tensor<2>(DType::f32, {asked.Q, D}, layout, random).fill(fill);
    Tensor<2> base(dtype, {n, D}, layout, random);
    base.each([&](const int64_t (&at)[2]) {
        const bool hidden = !asked.keeps(at[0]) || (spoilt && at[0] % 50 == 3);
        base.set(at, dtype == DType::i8 ? draw(random, -128, 127) : hidden ? NAN : fill());
    });
    Tensor<1> scale, offset;
    if (dtype == DType::i8) {
        scale = Tensor<1>(DType::f32, {D}, 0, random).fill([&] { return 0.01 + 0.01 * fabs(normal(random)); });
        offset = Tensor<1>(DType::f32, {D}, 0, random).fill(fill);
    }
    const Metric metric = chance(random, 50) ? Metric::l2 : Metric::inner_product;
    cuda::topk_distances({queries.view, base.view, scale.view, offset.view, metric, asked.search()},
                         emulator::device());
    asked.check("search of " + std::to_string(n) + " × " + std::to_string(D) + " for " + std::to_string(asked.Q) +
                    (metric == Metric::l2 ? " by distance" : " by product"),
                [&](int q, int, int row) {
                    double sum = 0;
                    for (int j = 0; j < D; ++j) {
                        const double x = queries.get({q, j});
                        double y = base.get({row, j});
                        if (scale.view) y = y * scale.get({j}) + offset.get({j});
                        sum += metric == Metric::l2 ? (x - y) * (x - y) : x * y;
                    }
                    return static_cast<float>(sum);
                });
}

// Tiles of vectors move and multiply without bank conflicts.
void check_traffic(Random& random) {
    const auto fill = [&] { return normal(random); };
    const Tensor<2> queries = Tensor<2>(DType::f32, {130, 130}, 0, random).fill(fill);
    const Tensor<2> base = Tensor<2>(DType::f32, {200, 130}, 0, random).fill(fill);
    const Tensor<2> distances(DType::f32, {130, 1}, 0, random), found(DType::i64, {130, 1}, 0, random);
    emulator::count_traffic(true);
    cuda::topk_distances(
        {queries.view, base.view, {}, {}, Metric::l2, {200, {}, {}, {}, 1, false, distances.view, found.view}},
        emulator::device());
    const std::vector<emulator::Traffic> places = emulator::traffic();
    emulator::count_traffic(false);
    int counted = 0;
    for (const emulator::Traffic& t : places) {
        if (t.place.find("ldmatrix") == std::string::npos && t.place.find("cp_async") == std::string::npos) continue;
        ++counted;
        require(t.wavefronts == t.ideal,
                t.place + " takes " + std::to_string(t.wavefronts) + " wavefronts, not " + std::to_string(t.ideal));
    }
    require(counted > 0, "no traffic was counted");
}

void check_refusals(Random& random) {
    const Tensor<2> queries(DType::f32, {1, 1}, 0, random), base(DType::f32, {1, 1}, 0, random);
    const Tensor<2> distances(DType::f32, {1, 2049}, 0, random), found(DType::i64, {1, 2049}, 0, random);
    const auto run = [&] {
        cuda::topk_distances(
            {queries.view, base.view, {}, {}, Metric::l2, {1, {}, {}, {}, 2049, false, distances.view, found.view}},
            emulator::device());
    };
    require(refuses(run), "2049 results are taken");
}

}  // namespace

int main(int argc, char** argv) {
    return run_cases("cuda_pq", 30, argc, argv, [](Random& random, bool is_first) {
        check_tables(random), check_codes(random), check_scan(random), check_topk(random);
        if (is_first) check_traffic(random), check_refusals(random);
    });
}
