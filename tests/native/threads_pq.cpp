// Searches by many threads at once while others add rows behind those that are searched, drop rows from bitmaps and
// begin anew, in all rows and in lists: built with ThreadSanitizer, every result equal, bit for bit, to that of one
// worker alone over the same snapshot, lists equal to those that one worker fills, and memory flat. METATE_TEST_SOAK:
// seconds.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "pq.h"

namespace metate::cpu::METATE_ISA {
void pq_distance_tables(const PqDistanceTables&, const Runtime&);
void pq_encode(const PqEncode&, const Runtime&);
void pq_scan(const PqScan&, const Runtime&);
void topk_distances(const TopkDistances&, const Runtime&);
void pq_add(const PqAdd&, const Runtime&);
void add_to_clusters(const AddToClusters&, const Runtime&);
}  // namespace metate::cpu::METATE_ISA

using namespace metate;
namespace kernels = metate::cpu::METATE_ISA;

namespace {

constexpr int64_t D = 24, M = 6, block = 32, capacity = 1 << 14, encoded = 300;
constexpr int64_t coded = 8;  // rows of codes for each of vectors: scans of many begin with a sample
constexpr int writers = 6, readers = 26;

template <int N>
View<N> view_of(void* data, DType dtype, std::vector<int64_t> size) {
    View<N> view{data, dtype, {}, {}};
    int64_t stride = 1;
    for (int i = N - 1; i >= 0; stride *= size[i], --i) view.size[i] = size[i], view.stride[i] = stride;
    return view;
}

// Memory that a call keeps until the same thread calls again.
void* scratch(size_t bytes) {
    thread_local std::unique_ptr<char, decltype(&free)> memory(nullptr, free);
    memory.reset(static_cast<char*>(aligned_alloc(64, (bytes + 64) / 64 * 64)));
    return memory.get();
}

void in_threads(int workers, void (*body)(int, void*), void* context) {
    std::vector<std::thread> others;
    for (int i = 1; i < workers; ++i) others.emplace_back(body, i, context);
    body(0, context);
    for (std::thread& other : others) other.join();
}

const cpu::Runtime alone{1, in_threads, scratch}, together{3, in_threads, scratch};

// Rows in the layouts that scans read; those before a snapshot's n never change.
struct Rows {
    std::vector<float> vectors = std::vector<float>(capacity * D), bias = std::vector<float>(coded * capacity);
    std::vector<uint8_t> bytes = std::vector<uint8_t>(coded * capacity * M),
                         nibbles = std::vector<uint8_t>(bytes.size() / 2);

    // Whole blocks, whose bytes nobody reads yet.
    void fill(int64_t first, int64_t last, std::minstd_rand& random) {
        for (int64_t i = first * D; i < last * D; ++i) vectors[i] = static_cast<float>(random() % 1024) / 512 - 1;
        first *= coded, last *= coded;
        for (int64_t i = first; i < last; ++i) bias[i] = static_cast<float>(random() % 64) / 64;
        for (int64_t i = first / 2 * M; i < last / 2 * M; ++i) nibbles[i] = static_cast<uint8_t>(random() >> 8);
        for (int64_t i = first * M; i < last * M; ++i) bytes[i] = static_cast<uint8_t>(random() >> 8);
    }
};

struct Snapshot {
    std::shared_ptr<Rows> rows;
    int64_t n;
    std::shared_ptr<std::vector<uint8_t>> keep;  // absent: all
};

std::mutex writing, publishing;
Snapshot newest;
std::atomic<bool> stop;
std::atomic<int64_t> searches, changes;

Snapshot snapshot() {
    const std::lock_guard held(publishing);
    return newest;
}

void publish(Snapshot next) {
    const std::lock_guard held(publishing);
    std::swap(newest, next);
}

void begin(std::minstd_rand& random) {
    auto rows = std::make_shared<Rows>();
    rows->fill(0, capacity / 2, random);
    publish({rows, capacity / 2, nullptr});
}

void change(std::minstd_rand& random) {
    const std::lock_guard held(writing);
    Snapshot next = snapshot();
    if (next.n == capacity) return begin(random);
    if (random() % 3) {
        const int64_t last = std::min(capacity, next.n + block * (1 + static_cast<int64_t>(random() % 8)));
        next.rows->fill(next.n, last, random);
        next.n = last;
    } else {
        auto keep = next.keep ? std::make_shared<std::vector<uint8_t>>(*next.keep)
                              : std::make_shared<std::vector<uint8_t>>(coded * capacity / 8, 255);
        for (int i = 0; i < 100; ++i) (*keep)[random() % keep->size()] &= static_cast<uint8_t>(random() >> 8);
        next.keep = keep;
    }
    publish(next);
}

// One search as any runtime does it.
struct Task {
    Snapshot seen;
    int64_t Q, k, bits;
    std::vector<float> queries;
    std::vector<int64_t> ranges;
    std::vector<float> books;

    Task(const Snapshot& s, std::minstd_rand& random) : seen(s) {
        Q = 1 + static_cast<int64_t>(random() % 6);
        k = random() % 4 ? 10 : 100;
        bits = random() % 2 ? 4 : 8;
        for (int64_t i = 0; i < Q * D; ++i) queries.push_back(static_cast<float>(random() % 1024) / 512 - 1);
        for (int64_t i = 0; i < (M << bits) * D / M; ++i) books.push_back(static_cast<float>(random() % 512) / 256 - 1);
        for (int64_t i = 0; random() % 2 && i < Q; ++i) {
            const int64_t cut = static_cast<int64_t>(random()) % s.n;
            ranges.insert(ranges.end(), {cut, s.n, 0, cut / 2});
        }
        if (static_cast<int64_t>(ranges.size()) != 4 * Q) ranges.clear();
    }

    struct Result {
        std::vector<float> distances;
        std::vector<int64_t> found;
        std::vector<uint8_t> codes;

        bool operator==(const Result& other) const {
            return !memcmp(distances.data(), other.distances.data(), distances.size() * sizeof(float)) &&
                   found == other.found && codes == other.codes;
        }
    };

    Result run(const cpu::Runtime& runtime) {
        Result result{std::vector<float>(2 * Q * k), std::vector<int64_t>(2 * Q * k), {}};
        const auto search = [&](int which, int64_t n) {
            Search s{n, {}, {}, {}, k, false, {}, {}};
            if (!ranges.empty()) s.ranges = view_of<3>(ranges.data(), DType::i64, {Q, 2, 2});
            if (seen.keep) s.keep = view_of<1>(seen.keep->data(), DType::u8, {n / 8});
            s.distances = view_of<2>(result.distances.data() + which * Q * k, DType::f32, {Q, k});
            s.found = view_of<2>(result.found.data() + which * Q * k, DType::i64, {Q, k});
            return s;
        };
        const auto asked = view_of<2>(queries.data(), DType::f32, {Q, D});
        const auto codebooks = view_of<3>(books.data(), DType::f32, {M, int64_t{1} << bits, D / M});
        std::vector<float> tables(Q * M << bits);
        const auto table = view_of<3>(tables.data(), DType::f32, {Q, M, int64_t{1} << bits});
        kernels::pq_distance_tables({asked, codebooks, Metric::l2, table}, runtime);
        uint8_t* const codes = bits == 4 ? seen.rows->nibbles.data() : seen.rows->bytes.data();
        kernels::pq_scan({table,
                          bits,
                          {},
                          view_of<3>(codes, DType::u8, {coded * seen.n / block, M, 4 * bits}),
                          {},
                          view_of<1>(seen.rows->bias.data(), DType::f32, {coded * seen.n}),
                          search(0, coded * seen.n)},
                         runtime);
        kernels::topk_distances({asked,
                                 view_of<2>(seen.rows->vectors.data(), DType::f32, {seen.n, D}),
                                 {},
                                 {},
                                 Metric::l2,
                                 search(1, seen.n)},
                                runtime);
        result.codes.resize(encoded * M);
        kernels::pq_encode({view_of<2>(seen.rows->vectors.data(), DType::f32, {encoded, D}), codebooks, bits,
                            view_of<2>(result.codes.data(), DType::u8, {encoded, (M * bits + 7) / 8})},
                           runtime);
        return result;
    }
};

void fail(const char* what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

// Lists, of which each has `room` rows of a pool.

constexpr int64_t lists = 8, room = 512, pool_rows = lists * room, probed = 3;

enum class Kind { vectors, nibbles, bytes };

float number_in(std::minstd_rand& random) {
    return static_cast<float>(random() % 1024) / 512 - 1;
}

// What training finds: the same for all pools.
struct Model {
    std::vector<float> centroids = std::vector<float>(lists * D), codebooks = std::vector<float>(256 * D);

    Model() {
        std::minstd_rand random(7);
        for (float& x : centroids) x = number_in(random);
        for (float& x : codebooks) x = number_in(random) / 4;
    }
    View<3> books(Kind kind) {
        if (kind == Kind::vectors) return {};
        return view_of<3>(codebooks.data(), DType::f32, {M, kind == Kind::nibbles ? 16 : 256, D / M});
    }
} model;

struct Pool {
    Kind kind;
    std::vector<uint8_t> rows;
    std::vector<float> bias = std::vector<float>(pool_rows), added;  // the vectors, in the order of their ids
    std::vector<int64_t> ids = std::vector<int64_t>(pool_rows), start, rooms = std::vector<int64_t>(lists, room);

    explicit Pool(Kind k) : kind(k) {
        rows.resize(static_cast<size_t>(pool_rows * (kind == Kind::vectors ? 4 * D : row_bytes())));
        for (int64_t i = 0; i < lists; ++i) start.push_back(i * room);
    }
    int64_t row_bytes() const { return kind == Kind::nibbles ? M / 2 : M; }
    View<2> vectors() {
        return kind == Kind::vectors ? view_of<2>(rows.data(), DType::f32, {pool_rows, D}) : View<2>{};
    }
    View<3> blocks() {
        if (kind == Kind::vectors) return {};
        return view_of<3>(rows.data(), DType::u8, {pool_rows / block, M, block * row_bytes() / M});
    }
    View<1> row_bias() { return kind == Kind::vectors ? View<1>{} : view_of<1>(bias.data(), DType::f32, {pool_rows}); }
    int64_t count() const { return static_cast<int64_t>(added.size()) / D; }

    PqAdd::Came add(const std::vector<float>& x, std::vector<int64_t>& length, const cpu::Runtime& runtime) {
        const int64_t n = static_cast<int64_t>(x.size()) / D;
        std::vector<int64_t> home(n), places(n);
        auto came = PqAdd::Came::refused;
        PqAdd call{view_of<2>(const_cast<float*>(x.data()), DType::f32, {n, D}),
                   view_of<2>(model.centroids.data(), DType::f32, {lists, D}),
                   model.books(kind),
                   vectors(),
                   blocks(),
                   row_bias(),
                   view_of<1>(ids.data(), DType::i64, {pool_rows}),
                   view_of<1>(start.data(), DType::i64, {lists}),
                   view_of<1>(rooms.data(), DType::i64, {lists}),
                   Metric::l2,
                   kind != Kind::vectors,
                   nullptr,
                   count(),
                   false,
                   length.data(),
                   home.data(),
                   places.data(),
                   nullptr,
                   &came};
        std::vector<double> workspace(call.workspace_bytes() / 8 + 1);
        call.workspace = workspace.data();
        kernels::pq_add(call, runtime);
        if (came == PqAdd::Came::done) added.insert(added.end(), x.begin(), x.end());
        return came;
    }
};

struct Listed {
    std::shared_ptr<Pool> pool;
    std::vector<int64_t> length;

    static Listed empty(Kind kind) { return {std::make_shared<Pool>(kind), std::vector<int64_t>(lists)}; }

    struct Result {
        std::vector<float> distances;
        std::vector<int64_t> found;
        bool operator==(const Result&) const = default;
    };

    Result search(std::vector<float>& queries, int64_t k, const cpu::Runtime& runtime) const {
        const int64_t Q = static_cast<int64_t>(queries.size()) / D;
        Result result{std::vector<float>(Q * k), std::vector<int64_t>(Q * k)};
        std::vector<int64_t> extents;
        for (int64_t i = 0; i < lists; ++i) extents.insert(extents.end(), {i * room, i * room + length[i]});
        const IvfSearch call{view_of<2>(queries.data(), DType::f32, {Q, D}),
                             view_of<2>(model.centroids.data(), DType::f32, {lists, D}),
                             pool->vectors(),
                             pool->blocks(),
                             model.books(pool->kind),
                             pool->kind != Kind::vectors,
                             pool->row_bias(),
                             {},
                             {},
                             Metric::l2,
                             probed,
                             {pool_rows,
                              view_of<3>(extents.data(), DType::i64, {1, lists, 2}),
                              view_of<1>(pool->ids.data(), DType::i64, {pool_rows}),
                              {},
                              k,
                              false,
                              view_of<2>(result.distances.data(), DType::f32, {Q, k}),
                              view_of<2>(result.found.data(), DType::i64, {Q, k})}};
        std::vector<double> workspace(call.workspace_bytes() / 8 + 1);
        launch_each(call, workspace.data(), [&](const auto& each) { run(each, runtime); });
        return result;
    }
    static void run(const TopkDistances& c, const cpu::Runtime& r) { kernels::topk_distances(c, r); }
    static void run(const PqDistanceTables& c, const cpu::Runtime& r) { kernels::pq_distance_tables(c, r); }
    static void run(const PqScan& c, const cpu::Runtime& r) { kernels::pq_scan(c, r); }

    int64_t total() const {
        int64_t rows = 0;
        for (const int64_t n : length) rows += n;
        return rows;
    }
    bool refilled() const;
};

// Whether one worker, given the vectors one by one, comes to the same rows.
bool Listed::refilled() const {
    Listed other = empty(pool->kind);
    for (int64_t i = 0; i < pool->count(); ++i)
        if (other.pool->add({pool->added.begin() + i * D, pool->added.begin() + (i + 1) * D}, other.length, alone) !=
            PqAdd::Came::done)
            return false;
    bool same = other.length == length && pool->count() == total();
    for (int64_t i = 0; i < lists; ++i)
        for (int64_t row = i * room; row < i * room + length[i]; ++row)
            same &= other.pool->ids[row] == pool->ids[row] && other.pool->bias[row] == pool->bias[row];
    std::vector<float> queries(pool->added.begin(), pool->added.begin() + std::min<int64_t>(4 * D, pool->added.size()));
    return same && (queries.empty() || other.search(queries, 50, alone) == search(queries, 50, alone));
}

struct Changing {
    std::mutex writing, publishing;
    Listed newest;

    explicit Changing(Kind kind) : newest(Listed::empty(kind)) {}

    Listed snapshot() {
        const std::lock_guard held(publishing);
        return newest;
    }
    void publish(Listed next) {
        const std::lock_guard held(publishing);
        std::swap(newest, next);
    }
    void change(std::minstd_rand& random) {
        const std::lock_guard held(writing);
        Listed next = snapshot();
        std::vector<float> x(D * (1 + random() % 40));
        for (float& value : x) value = number_in(random);
        const bool sound = random() % 8;
        if (!sound) x[random() % x.size()] = INFINITY;
        const auto came = next.pool->add(x, next.length, together);
        if (!sound && came != PqAdd::Came::refused) fail("a vector that is not finite was added");
        if (came == PqAdd::Came::done) publish(next);
        if (came != PqAdd::Came::no_room) return;
        if (!snapshot().refilled()) fail("lists differ from those that one worker fills");
        publish(Listed::empty(next.pool->kind));
    }
};

Changing in_lists[] = {Changing(Kind::vectors), Changing(Kind::nibbles), Changing(Kind::bytes)};

void search_lists(std::minstd_rand& random) {
    const Listed seen = in_lists[random() % 3].snapshot();
    std::vector<float> queries(D * (1 + random() % 6));
    for (float& value : queries) value = number_in(random);
    const int64_t k = random() % 4 ? 10 : 100;
    if (!(seen.search(queries, k, together) == seen.search(queries, k, alone)))
        fail("a search of lists by 3 workers differs from that of one");
}

// Sums of clusters, which all workers add to.
void sum_clusters(std::minstd_rand& random) {
    constexpr int64_t points = 6000, clusters = 20;
    std::vector<float> x(points * D), sums[2];
    std::vector<int64_t> numbers(points);
    for (float& value : x) value = number_in(random);
    for (int64_t& number : numbers) number = static_cast<int64_t>(random() % clusters);
    for (int i = 0; i < 2; ++i) {
        sums[i].resize(clusters * D);
        kernels::add_to_clusters(
            {view_of<2>(x.data(), DType::f32, {points, D}), view_of<1>(numbers.data(), DType::i64, {points}),
             view_of<2>(sums[i].data(), DType::f32, {clusters, D}), 1},
            i ? together : alone);
    }
    if (sums[0] != sums[1]) fail("sums of clusters by 3 workers differ from those of one");
}

void keep_searching(int number) {
    std::minstd_rand random(static_cast<unsigned>(number + 100));
    do {
        Task task(snapshot(), random);
        if (!(task.run(together) == task.run(alone)))
            fail("a search of all rows by 3 workers differs from that of one");
        search_lists(random);
        if (number == 0) sum_clusters(random);
        ++searches;
    } while (!stop);
}

void keep_changing(int number) {
    std::minstd_rand random(static_cast<unsigned>(number + 1));
    do {
        change(random);
        in_lists[number % 3].change(random);
        ++changes;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    } while (!stop);
}

double megabytes() {
    long pages = 0;
    FILE* const file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%*s %ld", &pages) != 1) pages = 0;
    if (file) fclose(file);
    return static_cast<double>(pages) * 4096 / 1e6;
}

}  // namespace

int main() {
    const char* const given = getenv("METATE_TEST_SOAK");
    const double seconds = given ? atof(given) : 3;
    std::minstd_rand random(1);
    begin(random);
    std::vector<std::thread> threads;
    for (int i = 0; i < writers; ++i) threads.emplace_back(keep_changing, i);
    for (int i = 0; i < readers; ++i) threads.emplace_back(keep_searching, i);
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds / 2));
    const double half = megabytes();
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds / 2));
    stop = true;
    for (std::thread& thread : threads) thread.join();
    for (Changing& each : in_lists)
        if (!each.snapshot().refilled()) fail("lists differ from those that one worker fills");
    const double whole = megabytes();
    printf("%ld searches, %ld changes, %.0f MB and %.0f MB\n", (long)searches, (long)changes, half, whole);
    if (searches < readers || changes < writers || whole > 1.25 * half + 32) {
        fprintf(stderr, "expected searches and changes by every thread, and as much memory as before\n");
        return 1;
    }
    return 0;
}
