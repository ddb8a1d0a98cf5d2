"""Product quantisation, beyond what the declaration says: bit order, layouts, exactness near zero, k-means."""

from __future__ import annotations

import pytest
import torch
from conftest import outputs

import metate
from metate.ops.pq import pack_codes, unpack_codes
from metate.ops.pq.kmeans import move_codebooks


@pytest.mark.parametrize(
    "bits,indices,expected",
    [
        (4, [1, 2, 3], [0x21, 0x03]),
        (8, [7, 255], [7, 255]),
        (5, [0b10101, 0b00011, 0b11111], [0b011_10101, 0b0_11111_00]),
        (12, [0xABC, 0x123], [0xBC, 0x3A, 0x12]),
        (16, [0x1234], [0x34, 0x12]),
    ],
)
def test_codes_are_packed_from_the_lowest_bit(bits, indices, expected):
    """As faiss' BitstringWriter does."""
    rows = torch.tensor([indices, indices[::-1]])
    codes = pack_codes(rows, bits)
    assert codes[0].tolist() == expected
    assert torch.equal(unpack_codes(codes, len(indices), bits), rows.int())


def test_interleaved_rows():
    codes = torch.arange(40, dtype=torch.uint8)[:, None] % 16
    blocks = metate.pq_interleave(codes, 1, 4)
    assert blocks.shape == (2, 1, 16)
    assert blocks[0, 0, 3] == 3 | (19 % 16) << 4 and blocks[1, 0, 7] == 39 % 16 and blocks[1, 0, 8] == 0
    assert metate.pq_interleave(codes, 1, 8)[1, 0, :8].tolist() == codes[32:, 0].tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_layouts_agree_bit_for_bit(bits):
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(3, 7, 2**bits, generator=generator)
    codes = pack_codes(torch.randint(0, 2**bits, (5000, 7), generator=generator), bits)
    plain = metate.pq_scan(tables, codes, 20)
    blocks = metate.pq_scan(tables, metate.pq_interleave(codes, 7, bits), 20, n=5000)
    assert torch.equal(plain[0], blocks[0]) and torch.equal(plain[1], blocks[1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["plain", "sorted", "rising", "sparse", "none", "ties", "nan"])
def test_many_results_of_many_rows_whatever_a_sample_says(bits, kind):
    """Interleaved rows are sampled where many are wanted: the same results if the sample misleads, one way or the
    other, or says nothing."""
    generator = torch.Generator().manual_seed(3)
    n, k, M = 70_001, 100, 6
    tables = torch.randn(3, M, 2**bits, generator=generator)
    numbers = torch.randint(0, 2**bits, (n, M), generator=generator)
    if kind == "ties":
        tables = tables.round()
    if kind in ("sorted", "rising"):  # by the distance from one query: all near it lie together, few in the sample
        sums = sum(tables[1, m][numbers[:, m]] for m in range(M))
        numbers = numbers[sums.argsort(descending=kind == "rising")]
    if kind == "sorted":  # and all of the sample's first rows near another: too many
        numbers[: n // 256] = tables[2].argmin(1)
        numbers[n // 2048 * 2 : n // 256] = tables[2].argmax(1)
    if kind == "nan":
        tables[1] = torch.nan
    keep = None
    if kind in ("sparse", "none"):
        kept = torch.rand(-(-n // 8) * 8, generator=generator) < (0.01 if kind == "sparse" else 0.0005)
        keep = (kept.view(-1, 8) * 2 ** torch.arange(8)).sum(1).to(torch.uint8)
    codes = pack_codes(numbers, bits)
    blocks = metate.pq_interleave(codes, M, bits)
    for largest in (False, True):
        how = dict(keep=keep, largest=largest)
        plain, found = metate.pq_scan(tables, codes, k, **how), metate.pq_scan(tables, blocks, k, n=n, **how)
        alone = metate.pq_scan(tables[1:2], blocks, k, n=n, **how)
        for i in (0, 1):
            assert torch.equal(plain[i], found[i]) and torch.equal(plain[i][1:2], alone[i])


@pytest.mark.parametrize("kind", ["vectors", "bytes", "nibbles", "residual", "product"])
def test_a_search_of_lists_equals_its_parts(kind):
    """Lists that many queries share, one of them long; some centroids are no numbers."""
    generator = torch.Generator().manual_seed(5)
    n, lists, nprobe, metric = 12000, 8, 6, "inner_product" if kind == "product" else "l2"
    bits, residual = 4 if kind == "nibbles" else 8, kind in ("residual", "product")
    queries, centroids = torch.randn(70, 12, generator=generator), torch.randn(lists, 12, generator=generator)
    centroids[5:] = torch.nan
    cuts = torch.tensor([0, 100, 100, 9000, 9050, 10000, 11000, 11900, n])
    extents = torch.stack([cuts[:-1], cuts[1:]], 1)
    beside = {
        "ids": torch.randperm(n, generator=generator),
        "keep": torch.full((n // 8,), 0b11101111, dtype=torch.uint8),
    }
    largest = kind == "product"
    near, probed = metate.topk_distances(queries, centroids, nprobe, metric=metric)
    ranges = torch.cat([extents, torch.zeros(1, 2, dtype=torch.int64)])[probed]
    if kind == "vectors":
        rows = torch.randn(n, 12, generator=generator)
        expected = metate.topk_distances(queries, rows, 9, ranges=ranges, **beside)
        how = {}
    else:
        books = torch.randn(3, 2**bits, 4, generator=generator)
        rows = pack_codes(torch.randint(0, 2**bits, (n, 3), generator=generator), bits)
        row_bias = torch.randn(n, generator=generator) if kind == "residual" else None
        tables = metate.pq_distance_tables(
            -2 * queries if kind == "residual" else queries, books, metric="inner_product" if residual else "l2"
        )
        rows = metate.pq_interleave(rows, 3, bits)
        bias = near if residual else None
        expected = metate.pq_scan(
            tables, rows, 9, n=n, ranges=ranges, bias=bias, row_bias=row_bias, largest=largest, **beside
        )
        how = {"codebooks": books.mT.contiguous().mT, "n": n, "residual": residual, "row_bias": row_bias}
    assert (probed == -1).any()
    for some in (slice(0, 70), slice(3, 4), slice(9, 25)):
        found = metate.ivf_search(
            queries[some], centroids, extents, rows, 9, nprobe=nprobe, metric=metric, **how, **beside
        )
        assert all(torch.equal(a, b[some]) for a, b in zip(found, expected, strict=True))


def test_a_table_that_is_no_number_finds_nothing():
    tables = torch.zeros(1, 2, 16)
    tables[0, 0, 3], tables[0, 1, 5], tables[0, 1, 6] = torch.nan, torch.inf, -torch.inf
    indices = torch.tensor([[3, 0], [0, 5], [0, 6], [0, 0], [1, 1]])
    for largest, worst in ((False, torch.inf), (True, -torch.inf)):
        for codes in (pack_codes(indices, 4), metate.pq_interleave(pack_codes(indices, 4), 2, 4)):
            distances, ids = metate.pq_scan(tables, codes, 4, n=5, largest=largest)
            assert ids.tolist() == [[3, 4, -1, -1]] and distances.tolist() == [[0, 0, worst, worst]]


def test_equal_distances_are_ordered_by_id():
    base = torch.zeros(3000, 4)
    ids = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    for k in (1, 7, 32, 33, 100, 1300, 3000):
        assert metate.topk_distances(torch.ones(2, 4), base, k, ids=ids)[1].tolist() == [list(range(k))] * 2


def test_many_results_are_the_first_of_all_sorted():
    """Gathered and sorted out now and then: near rows early, late, all alike but for a few, and rows found twice."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(5000, generator=generator)
    for column in (x, x.sort().values, x.sort(descending=True).values, (4 * x).round()):
        for k in (33, 64, 700):
            distances, ids = metate.topk_distances(torch.zeros(5, 1), column[:, None], k)
            expected = column.square().sort(stable=True)
            assert distances[4].equal(expected.values[:k]) and ids[4].equal(expected.indices[:k])
            twice = metate.topk_distances(torch.zeros(1, 1), column[:, None], k, ranges=torch.tensor([[[0, 5000]] * 2]))
            assert twice[1][0].equal(expected.indices.repeat_interleave(2)[:k])


def test_distances_near_zero_are_exact():
    """Where |q|² - 2qb + |b|² has no digit left."""
    queries = 1000 + torch.arange(40.0).view(40, 1).expand(40, 64) * 2**-10
    distances, ids = metate.topk_distances(queries, queries, 3)
    assert torch.equal(ids[:, 0], torch.arange(40)) and not distances[:, 0].any()
    assert torch.equal(distances[1:-1, 1:], torch.full((38, 2), 64 * 2.0**-20))
    assert torch.equal(ids[1:-1, 1], torch.arange(38)) and torch.equal(ids[1:-1, 2], torch.arange(2, 40))


@pytest.mark.parametrize("product,largest", [(False, False), (False, True), (True, True), (True, False)])
@pytest.mark.parametrize(
    "kind", ["plain", "equal", "on centroids", "far", "tiny", "huge", "zeros", "not numbers", "bad centroids"]
)
def test_one_nearest_of_many_is_exact(kind, product, largest):
    """However little products in whole numbers or in floats tell, of points that are far away or hardly differ."""
    generator = torch.Generator().manual_seed(7)
    queries, base = (torch.randn(n, 50, generator=generator) for n in (300, 70))
    if kind in ("equal", "on centroids"):
        base[40:] = base[:30]
    if kind == "on centroids":
        queries = base[torch.randint(0, 70, (300,), generator=generator)] + 0
    if kind in ("far", "tiny", "huge"):
        queries, base = (
            1000 * (kind == "far") + x * {"far": 1, "tiny": 1e-20, "huge": 1e18}[kind] for x in (queries, base)
        )
    if kind in ("zeros", "bad centroids"):
        queries[::7], base[9] = 0, 0
    if kind == "not numbers":
        queries[3, 5], queries[5, 1], queries[40:45] = torch.nan, torch.inf, queries[40:45] * 1e-30
    if kind == "bad centroids":
        base[3, 3], base[11, 2], base[13] = torch.nan, torch.inf, base[13] * 1e19
    metric = "inner_product" if product else "l2"
    distances, found = metate.topk_distances(queries, base, 1, metric=metric, largest=largest)
    x, y = queries.double(), base.double()
    exact = x @ y.T if product else (x[:, None] - y).square().sum(2)
    key = torch.where(exact.float().isfinite(), exact.float() * (-1 if largest else 1), torch.inf)
    best = key.min(1).values
    there = best < torch.inf
    assert torch.equal(there, found[:, 0] >= 0) and torch.equal(there, distances[:, 0].isfinite())
    torch.testing.assert_close(key.gather(1, found.clamp(min=0))[there, 0], best[there], rtol=3e-7, atol=0)
    if kind in ("equal", "on centroids"):
        assert found.max() < 40


def test_tables_add_up_to_distances():
    generator = torch.Generator().manual_seed(2)
    x, books = torch.randn(50, 12, generator=generator), torch.randn(3, 16, 4, generator=generator)
    codes = metate.pq_encode(x, books)
    decoded = metate.pq_decode(codes, books)
    for metric in ("l2", "inner_product", "cosine"):
        tables = metate.pq_distance_tables(x, books, metric=metric)
        got = metate.pq_scan(tables, codes, 5, largest=metric != "l2")
        expected = metate.topk_distances(x, decoded, 5, metric=metric)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    symmetric = metate.pq_distance_tables(x, books, symmetric=True)
    distances, _ = metate.pq_scan(symmetric, codes, 1)
    assert distances.abs().max() == 0
    with pytest.raises(ValueError, match=r"metate.pq_distance_tables: metric is 'dot', expected 'l2'"):
        metate.pq_distance_tables(x, books, metric="dot")


@pytest.mark.parametrize(("M", "bits", "d"), [(3, 4, 2), (5, 4, 4), (2, 8, 8), (1, 6, 16), (2, 5, 19), (9, 9, 1)])
def test_codes_are_those_of_the_nearest_however_many_come_together(M, bits, d):
    generator = torch.Generator().manual_seed(6)
    books = torch.randn(M, 2**bits, d, generator=generator)
    books[:, 7] = books[:, 3]
    x = torch.randn(39, M, d, generator=generator)
    x[:16] = 100 + books[:, :16].transpose(0, 1)  # far away, so that many are about as near
    x[16:22] = (books[:, 2:8] + books[:, 1:7]).transpose(0, 1) / 2
    x[22:28] *= torch.tensor([1e30, 1e19, 1e-25, torch.nan, torch.inf, 0]).view(6, 1, 1)
    codes = metate.pq_encode(x.flatten(1), books)
    found = [metate.topk_distances(x[:, m].contiguous(), books[m], 1)[1] for m in range(M)]
    assert torch.equal(unpack_codes(codes, M, bits), torch.cat(found, 1).clamp_min(0))
    for rows in (1, 2, 5, 7, 16, 20):
        parts = [metate.pq_encode(part, books) for part in x.flatten(1).split(rows)]
        assert torch.equal(torch.cat(parts), codes)


def test_codebooks_learn():
    generator = torch.Generator().manual_seed(3)
    x, books = torch.randn(30, 6, generator=generator), torch.randn(2, 16, 3, generator=generator)
    codes = metate.pq_encode(x, books)
    learned = books.clone().requires_grad_()
    (metate.pq_decode(codes, learned) - x).square().sum().backward()
    better = metate.pq_decode(codes, books - 0.1 * learned.grad)
    assert (better - x).square().sum() < (metate.pq_decode(codes, books) - x).square().sum()


@pytest.mark.parametrize("init", ["k-means++", "sample"])
@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_finds_clusters(init, spherical):
    generator = torch.Generator().manual_seed(4)
    truth = 10 * torch.eye(8)
    member = torch.arange(800) % 8
    x = truth[member] + 0.1 * torch.randn(800, 8, generator=generator)
    seed = 0 if init == "k-means++" else 8
    centroids, assignment, objective = metate.kmeans(x, 8, init=init, iterations=30, seed=seed, spherical=spherical)
    again = metate.kmeans(x, 8, init=init, iterations=30, seed=seed, spherical=spherical)
    assert torch.equal(again[0], centroids) and torch.equal(again[1], assignment)
    improved = objective.diff() * (-1 if spherical else 1)
    assert centroids.shape == (8, 8) and objective.dtype == torch.float64 and (improved <= 1e-3).all()
    if spherical:
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(8))
    if init == "k-means++":
        found = [set(assignment[member == c].tolist()) for c in range(8)]
        assert all(len(numbers) == 1 for numbers in found) and len(set.union(*found)) == 8
        expected = torch.stack([x[member == c].mean(0) for c in range(8)])
        expected = torch.nn.functional.normalize(expected, dim=1) if spherical else expected
        torch.testing.assert_close(centroids[assignment[:8]], expected, rtol=1e-4, atol=1e-3)


def test_kmeans_fills_empty_clusters():
    x = torch.cat([torch.zeros(50, 2), torch.ones(3, 2)]) + 0.01 * torch.arange(53.0)[:, None]
    centroids, assignment, _ = metate.kmeans(x, 20, init="sample", seed=1)
    assert centroids.isfinite().all() and assignment.unique().numel() > 15
    many = torch.cat([torch.ones(500, 2), 8 + torch.rand(100, 2)])  # nothing is gained where points are equal
    assert metate.kmeans(many, 32, init="sample", seed=1)[1].unique().numel() > 28
    same = metate.kmeans(torch.ones(30, 3), 4)
    assert torch.allclose(same[0], torch.ones(4, 3), rtol=1e-2) and same[1].max() < 4


def test_kmeans_begins_where_it_is_told_and_weighs_points():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(2))
    centroids, _, objective = metate.kmeans(x, 6, iterations=40)
    again = metate.kmeans(x, 6, init=centroids, iterations=3)
    torch.testing.assert_close(again[0], centroids)
    assert again[2][0] <= objective[-1] and metate.kmeans(x, 6, init=centroids[:2], iterations=0)[0][1].equal(
        centroids[1]
    )
    weights = (torch.arange(200) % 3).float()
    repeated = metate.kmeans(x.repeat_interleave(weights.long(), 0), 6, init=centroids)[0]
    torch.testing.assert_close(metate.kmeans(x, 6, init=centroids, weights=weights)[0], repeated)


@pytest.mark.parametrize("d", [1, 3, 4, 8, 17, 33, 64])
@pytest.mark.parametrize("M", [1, 5])
def test_centroids_move_to_the_means_of_their_points(M, d):
    """The same bits for any number of threads."""
    generator, n = torch.Generator().manual_seed(d), 9000
    x, books = torch.randn(n, M * d, generator=generator), torch.randn(M, 16, d, generator=generator)
    indices = torch.randint(0, 15, (n, M), generator=generator)
    indices[0] = 15  # a cluster of one
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(move_codebooks(x, pack_codes(indices, 4), books))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    parts = x.double().view(n, M, d)
    expected = torch.stack([
        torch.stack([parts[indices[:, m] == code, m].mean(0) for code in range(16)]) for m in range(M)
    ])  # fmt: skip
    torch.testing.assert_close(found[0], expected.float(), rtol=1e-5, atol=1e-5)


def test_kmeans_refuses():
    x = torch.randn(10, 3)
    for wrong, arguments, error in (
        (x.double(), {}, TypeError),
        (x[0], {}, ValueError),
        (x * torch.nan, {}, ValueError),
        (x, {"init": "best"}, ValueError),
        (x, {"init": torch.zeros(3, 3)}, ValueError),
        (x, {"weights": -torch.ones(10)}, ValueError),
        (x, {"iterations": -1}, ValueError),
        (x, {"max_points_per_centroid": 0}, ValueError),
        (x[:1], {}, ValueError),
    ):
        with pytest.raises(error, match=r"metate.kmeans: \w+ is .*, expected"):
            metate.kmeans(wrong, 2, **arguments)


def test_refusals_say_what_to_do():
    tables, codes = torch.zeros(2, 3, 16), torch.zeros(5, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="n is None, expected the number of rows"):
        metate.pq_scan(tables, metate.pq_interleave(codes, 3, 4), 1)
    with pytest.raises(ValueError, match="pq_scan: n is -2, expected 0 or more"):
        metate.pq_scan(tables, metate.pq_interleave(codes[:0], 3, 4), 1, n=-2)
    with pytest.raises(ValueError, match="codebooks is of 20 centroids"):
        metate.pq_encode(torch.zeros(2, 6), torch.zeros(3, 20, 2))
    with pytest.raises(ValueError, match="scale is None, expected a number a column"):
        metate.topk_distances(torch.zeros(2, 6), torch.zeros(3, 6, dtype=torch.int8), 1)
    lists, extents = torch.zeros(4, 6), torch.zeros(4, 2, dtype=torch.int64)
    for wrong, match in (
        ({"nprobe": 5}, "nprobe is 5, expected 1 to 4"),
        ({"rows": codes}, r"rows is of shape \(5, 2\), expected \(n, 6\): vectors"),
        ({"rows": codes, "codebooks": torch.zeros(3, 16, 2), "residual": True}, "row_bias is None, expected a number"),
        ({"residual": True}, "residual is True, expected False without codebooks"),
        ({"rows": codes[:0, None], "codebooks": torch.zeros(1, 16, 6), "n": -2}, "n is -2, expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=match):
            metate.ivf_search(torch.zeros(2, 6), lists, extents, k=1, **{"rows": torch.zeros(5, 6), **wrong})


@pytest.mark.parametrize(
    "call",
    [
        lambda x, books, codes, **how: metate.pq_distance_tables(x, books, symmetric=True, metric="cosine", **how),
        lambda x, books, codes, **how: metate.pq_encode(x, books, **how),
        lambda x, books, codes, **how: metate.pq_decode(codes, books, **how),
        lambda x, books, codes, **how: metate.pq_scan(torch.ones(1, 4, 16), codes, 3, **how),
        lambda x, books, codes, **how: metate.topk_distances(x, x, 3, metric="cosine", **how),
        lambda x, books, codes, **how: metate.ivf_search(
            x, x[:2], torch.tensor([[0, 4], [4, 9]]), x, 3, nprobe=2, **how
        ),
    ],
    ids=["tables", "encode", "decode", "scan", "topk", "ivf"],
)
def test_the_backend_of_a_call_can_be_named(call):
    x, books = torch.randn(9, 8), torch.randn(4, 16, 2)
    given = x, books, metate.pq_encode(x, books)
    results = (call(*given, backend=name) for name in (None, "cpu", "reference"))
    first, *others = (outputs(result)[-1] for result in results)
    assert all(torch.allclose(first, other) for other in others)
    with pytest.raises(ValueError, match="backend"):
        call(*given, backend="cpus")
