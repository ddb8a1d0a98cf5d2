"""Indexes against brute force over what they decode, whatever was added, removed and asked, in whatever order."""

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metate
from metate.search import FlatIndex, IVFFlatIndex, IVFPQIndex, PQIndex
from metate.search.interleaved import Interleaved
from metate.search.storage import Lists, Places

D = 8
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((70, D)).astype(np.float32)
Q = RANDOM.standard_normal((3, D)).astype(np.float32)


def filled(index, seed=0):
    """The index with made-up centroids and codebooks: as good as trained ones where only consistency is asked."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in index.trained_shapes().items():
        tensors[name] = random.standard_normal(shape).astype(np.float32)
        if name == "rotation":
            tensors[name] = np.linalg.qr(tensors[name])[0]
        elif name.endswith("scale"):
            tensors[name] = np.full(shape, 8 / 255, np.float32)
    index.set_trained(tensors)
    return index


KINDS = {
    "flat": lambda metric: FlatIndex(D, metric),
    "half": lambda metric: FlatIndex(D, metric, storage="bfloat16"),
    "sq8": lambda metric: FlatIndex(D, metric, storage="sq8"),
    "pq": lambda metric: PQIndex(D, 4, 4, metric),
    "opq": lambda metric: PQIndex(D, 2, 5, metric, opq=True),
    "ivf": lambda metric: IVFFlatIndex(D, 5, metric),
    "ivfpq": lambda metric: IVFPQIndex(D, 5, 2, 8, metric, opq=True),
    "ivfpq, whole": lambda metric: IVFPQIndex(D, 5, 4, 4, metric, residual=False),
    "refined": lambda metric: IVFPQIndex(D, 5, 4, 4, metric, refine="float32"),
}
METRICS = ("l2", "inner_product", "cosine")


def everything(index):
    return {} if index.nlist is None else {"nprobe": index.nlist}


def brute_force(x, ids, queries, k, metric):
    """(distances, ids) of the k nearest in float64; x decoded, of unit length already for cosines."""
    x, queries, ids = x.astype(np.float64), queries.astype(np.float64), np.asarray(ids, np.int64)
    if metric == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    worst = np.inf if metric == "l2" else -np.inf
    key = ((queries[:, None] - x) ** 2).sum(2) if metric == "l2" else -(queries @ x.T)
    order = np.array([np.lexsort((ids, row)) for row in key]).reshape(len(key), -1)[:, :k]
    best = np.take_along_axis(key, order, 1) * (1 if metric == "l2" else -1)
    pad = ((0, 0), (0, k - order.shape[1]))
    return np.pad(best, pad, constant_values=worst), np.pad(ids[order], pad, constant_values=-1)


def assert_finds(index, ids, queries=Q, k=6, x=None, **how):
    x = index.reconstruct(np.array(ids, np.int64)) if x is None else x
    distances, found = index.search(queries, k, **everything(index), **how)
    expected, named = brute_force(x, ids, queries, k, index.metric)
    np.testing.assert_allclose(distances, expected, rtol=2e-5, atol=2e-5)
    apart = found != named  # where rounding decides
    assert np.allclose(np.where(apart, distances, 0), np.where(apart, expected, 0), rtol=1e-6, atol=1e-6)
    assert apart.mean() < 0.1
    return distances, found


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force_over_what_it_decodes(kind, metric):
    index = filled(KINDS[kind](metric))
    index.add(X[:40])
    index.add_with_ids(X[40:], np.arange(100, 130))
    ids = np.r_[0:40, 100:130]
    how = {"refine_factor": 100} if kind == "refined" else {}
    assert index.ntotal == 70 and index.is_trained
    assert_finds(index, ids, **how)
    assert index.remove_ids(range(0, 110, 3)) == 14 + 3
    ids = ids[(ids >= 110) | (ids % 3 != 0)]
    assert_finds(index, ids, **how)
    assert_finds(index, ids, k=80, **how)  # more than there are
    one = index.search(Q[0], 4, **everything(index))
    many = index.search(Q, 4, **everything(index))
    assert all(a.shape == (4,) for a in one) and np.array_equal(one[1], many[1][0])
    far = index.search(Q[0], 10**6, refine_factor=np.int64(10**9), **everything(index))[1]
    assert far.shape == (10**6,) and (far[: len(ids)] >= 0).all() and (far[len(ids) :] == -1).all()
    np.testing.assert_allclose(one[0], many[0][0], rtol=1e-5, atol=1e-6)


CODES = {
    "pq of 5 bits": lambda metric: PQIndex(D, 4, 5, metric),
    "pq of 8 bits": lambda metric: PQIndex(D, 2, 8, metric),
    "ivfpq of 6 bits": lambda metric: IVFPQIndex(D, 5, 4, 6, metric),
}


@pytest.mark.parametrize("kind", [*KINDS, *CODES])
@pytest.mark.parametrize("metric", METRICS)
def test_arrays_are_added_as_tensors_are(kind, metric):
    """One by one and many together, with lists that move and rows that are gone: arrays go a shorter way."""
    make = {**KINDS, **CODES}[kind]
    short, long = filled(make(metric)), filled(make(metric))
    random, total = np.random.default_rng(5), 0
    for count in (40, 1, 1, 3, 30, 1, 70, 1, 200, 1, 1):
        x = random.standard_normal((count, D)).astype(np.float32)
        short.add(x)
        long.add(torch.from_numpy(x))
        total += count
        if count == 30:
            assert short.remove_ids(range(3, 9)) == long.remove_ids(range(3, 9)) == 6
        known = np.arange(total - count, total)
        assert np.array_equal(short.reconstruct(known), long.reconstruct(known))
    assert short.ntotal == long.ntotal == total - 6 and short.next_id == total
    for found, expected in zip(*(index.search(Q, 50, **everything(index)) for index in (short, long)), strict=True):
        assert np.array_equal(found, expected)
    with pytest.raises(ValueError, match="not finite everywhere"):
        short.add(np.full((1, D), np.inf, np.float32))
    with pytest.raises(ValueError, match="of shape"):
        short.add(np.zeros((1, D + 1), np.float32))
    assert short.ntotal == total - 6


@pytest.mark.parametrize("dim", [7, 8])
@pytest.mark.parametrize("make", [FlatIndex, lambda dim: filled(IVFFlatIndex(dim, 3))])
def test_many_vectors_are_checked_as_they_are_copied(make, dim):
    """By several threads and past the caches; one that is not finite leaves the index as it was."""
    index, random = make(dim), np.random.default_rng(3)
    x = random.standard_normal((1 << 16, dim)).astype(np.float32)
    for count in (1, 300, len(x), 5):
        bad = x[:count].copy()
        bad[-1, -1] = np.nan if count % 2 else np.inf
        before = index.ntotal
        with pytest.raises(ValueError, match="not finite everywhere"):
            index.add(bad)
        assert index.ntotal == index.next_id == before
        index.add(x[:count])
        assert np.array_equal(index.reconstruct(np.arange(before, before + count)), x[:count])
    index.add_with_ids(x[:4], 10**6 + np.arange(4)[::-1])
    assert np.array_equal(index.reconstruct(10**6 + np.arange(4)), x[:4][::-1])


def test_decodes_what_was_added():
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    for kind, metric, x, bound in [
        ("flat", "l2", X, 0), ("flat", "cosine", unit, 1e-6), ("half", "l2", X, 0.02), ("sq8", "l2", X, 0.02),
        ("ivf", "inner_product", X, 0), ("refined", "l2", X, 0),
    ]:  # fmt: skip
        index = filled(KINDS[kind](metric))
        index.set_trained({**index._state.model, **({"vectors.offset": np.zeros(D, "f")} if kind == "sq8" else {})})
        index.add(x)
        assert np.abs(index.reconstruct(np.arange(70)) - x).max() <= bound, kind
    assert index.reconstruct(3).shape == (D,) and isinstance(index.reconstruct(torch.tensor([3, 4])), torch.Tensor)


def test_training_finds_structure():
    """Where coordinates of different sub-vectors depend on each other, rotation and residuals lose less."""
    random = np.random.default_rng(1)
    mixed = random.standard_normal((600, 4)) @ random.standard_normal((4, D))
    x = (mixed + 0.05 * random.standard_normal((600, D))).astype(np.float32)
    errors = {}
    for name, index in {
        "pq": PQIndex(D, 2, 4), "opq": PQIndex(D, 2, 4, opq=True), "ivfpq": IVFPQIndex(D, 8, 2, 4, opq=True),
    }.items():  # fmt: skip
        index.train(x, progress=False)
        index.add(x)
        errors[name] = float(((index.reconstruct(np.arange(600)) - x) ** 2).sum(1).mean())
        if index.opq:
            rotation = index._state.model["rotation"]
            assert torch.allclose(rotation @ rotation.T, torch.eye(D), atol=1e-5)
    spread = float(((x - x.mean(0)) ** 2).sum(1).mean())
    assert errors["ivfpq"] < errors["opq"] < errors["pq"] < 0.6 * spread
    a, b = PQIndex(D, 2, 4), PQIndex(D, 2, 4)
    for index in (a, b):
        index.train(torch.from_numpy(x))
    assert torch.equal(a._state.model["codebooks"], b._state.model["codebooks"])


def test_codes_are_finest_where_vectors_are_close():
    """Distances tell more of near neighbours there, products do not; lengths do not matter, nor vectors all alike."""
    random = np.random.default_rng(4)
    x = random.standard_normal((8000, 16)).astype(np.float32)
    x[4000:] *= 6
    x, queries = x[random.permutation(8000)], 0.7 * random.standard_normal((200, 16)).astype(np.float32)
    exact = FlatIndex(16)
    exact.add(x)
    truth = exact.search(queries, 10)[1]
    found = {}
    for lists in (None, 4):
        for metric in ("l2", "inner_product"):
            index = PQIndex(16, 4, 4, metric) if lists is None else IVFPQIndex(16, lists, 4, 4, metric)
            index.train(x, progress=False)
            judge = PQIndex(16, 4, 4) if lists is None else IVFPQIndex(16, lists, 4, 4)
            judge.set_trained(index.trained())
            judge.add(x)
            ids = judge.search(queries, 10, **({} if lists is None else {"nprobe": lists}))[1]
            found[lists, metric] = np.mean([np.isin(a, b).mean() for a, b in zip(ids, truth, strict=True)])
        assert found[lists, "l2"] > 1.1 * found[lists, "inner_product"]
    small, large = PQIndex(16, 4, 4), PQIndex(16, 4, 4)
    small.train(x, progress=False)
    large.train(1024 * x, progress=False)
    assert torch.equal(1024 * small.trained()["codebooks"], large.trained()["codebooks"])
    small.train(np.ones((20, 16), np.float32), progress=False)
    assert float((small.trained()["codebooks"] - 1).abs().max()) < 0.01


def test_rotation_of_small_vectors():
    """Variances below 1, of which few matter: their axes are dealt out to all parts."""
    random = np.random.default_rng(2)
    turn = np.linalg.qr(random.standard_normal((16, 16)))[0]
    x = (0.01 * random.standard_normal((900, 16)) * 0.6 ** np.arange(16) @ turn).astype(np.float32)
    errors = []
    for opq in (False, True):
        index = PQIndex(16, 4, 4, opq=opq)
        index.train(x, progress=False)
        index.add(x)
        errors.append(((index.reconstruct(np.arange(900)) - x) ** 2).sum())
    assert errors[1] < 0.9 * errors[0]


def test_nprobe_is_the_nearest_lists():
    index = filled(IVFFlatIndex(D, 5))
    index.add(X)
    centroids = index._state.model["centroids"].numpy()
    home = ((X[:, None] - centroids) ** 2).sum(2).argmin(1)
    for q in Q:
        nearest = ((q - centroids) ** 2).sum(1).argsort()[:2]
        inside = np.flatnonzero(np.isin(home, nearest))
        _, found = index.search(q, 5, nprobe=2)
        assert found.tolist() == brute_force(X[inside], inside, q[None], 5, "l2")[1][0].tolist()
    index.nprobe = 2
    assert np.array_equal(index.search(q, 5)[1], found)


# Filters.


def test_filters_say_the_same_in_every_way():
    index = filled(IVFPQIndex(D, 5, 4, 4))
    ids = RANDOM.permutation(200)[:70]
    index.add_with_ids(X, ids)
    index.remove_ids([int(ids[0]), 10_000])
    wanted = np.arange(40, 160, 4)
    mask = np.zeros(160, bool)
    mask[wanted] = True
    ways = [
        wanted, wanted.tolist(), torch.from_numpy(wanted), range(40, 160, 4), range(156, 39, -4), mask, mask.tolist(),
        torch.from_numpy(mask), np.packbits(mask, bitorder="little"), lambda ids: np.isin(ids, wanted),
        lambda ids: torch.from_numpy(np.isin(ids, wanted)),
    ]  # fmt: skip
    there = np.intersect1d(wanted, ids[1:])
    results = [assert_finds(index, there, k=len(there) + 2, filter=way) for way in ways]
    assert all(np.array_equal(found, results[0][1]) for _, found in results)
    assert (index.search(Q, 3, filter=[], **everything(index))[1] == -1).all()
    lims, _, _ = index.range_search(Q, np.inf, filter=wanted, **everything(index))
    assert lims.tolist() == [0, *(len(there) * (q + 1) for q in range(3))]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["flat", "ivfpq", "refined"])
def test_range_search(kind, metric):
    index = filled(KINDS[kind](metric))
    x = np.concatenate([X, X + 0.01])  # more than one turn's worth
    index.add(x)
    all_distances, all_ids = index.search(Q, 140, **everything(index))
    radius = float(np.median(all_distances))
    lims, distances, ids = index.range_search(Q, radius, **everything(index))
    inside = all_distances > radius if index.largest else all_distances < radius
    assert lims.tolist() == np.append(0, inside.sum(1).cumsum()).tolist() and lims.dtype == np.int64
    np.testing.assert_allclose(distances, all_distances[inside], rtol=1e-5, atol=1e-6)
    assert np.array_equal(ids, all_ids[inside])


# Any order of changes.

CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9)),
        st.tuples(st.just("ids"), st.sets(st.integers(0, 60), max_size=6)),
        st.tuples(st.just("remove"), st.sets(st.integers(0, 60), max_size=9)),
        st.tuples(st.just("few"), st.integers(2, 5)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(CHANGES, st.sampled_from(["flat", "ivf", "pq"]), st.integers(0, 9))
def test_any_changes_equal_a_dictionary(changes, kind, seed):
    random = np.random.default_rng(seed)
    index, model, fresh = filled(KINDS[kind]("l2")), {}, 0
    for what, how in [*changes, ("add", 1)]:
        if what == "add":
            x = random.standard_normal((how, D)).astype(np.float32)
            index.add(x)
            model.update(zip(range(fresh, fresh + how), x, strict=True))
        elif what == "ids":
            x, before = random.standard_normal((len(how), D)).astype(np.float32), index.search(Q, 3)
            if how & set(model):
                with pytest.raises(ValueError, match="new to the index"):
                    index.add_with_ids(x, list(how))
                assert all(np.array_equal(a, b) for a, b in zip(before, index.search(Q, 3), strict=True))
            else:
                index.add_with_ids(x, np.array(list(how), np.int64))
                model.update(zip(how, x, strict=True))
        elif what == "remove":
            assert index.remove_ids(list(how)) == len(how & set(model))
            model = {i: x for i, x in model.items() if i not in how}
        elif what == "few":
            gone = {i for i in model if i % how == 0}
            assert index.remove_ids(lambda ids, how=how: ids % how == 0) == len(gone)
            model = {i: x for i, x in model.items() if i not in gone}
        else:
            index.reset()
            model, fresh = {}, 0
        fresh = max([fresh, *(i + 1 for i in model)])
        assert index.ntotal == len(model)
        if model:
            x = None if kind == "pq" else np.stack(list(model.values()))
            assert_finds(index, list(model), k=4, x=x)
    with pytest.raises(KeyError, match="ids in the index"):
        index.reconstruct(10_000)


def test_storage_keeps_rows_of_older_snapshots():
    """Lists that grow, move and lose rows, each snapshot read again at the end."""
    random = np.random.default_rng(0)
    lists = Lists.empty(3, {"ids": torch.empty(0, dtype=torch.int64)})
    truth, history, fresh = {}, [], 0
    for turn in range(60):
        count = int(random.integers(0, 90 if turn % 7 == 0 else 9))
        where = random.choice(3, count, p=[0.7, 0.3, 0])
        lists = lists.append(where, {"ids": torch.arange(fresh, fresh + count)})
        truth = {**truth, **dict(zip(range(fresh, fresh + count), where.tolist(), strict=True))}
        fresh += count
        gone = random.permutation(list(truth))[: int(random.integers(0, 4))]
        rows = lists.find(gone.astype(np.int64))
        lists = lists.without(rows)
        truth = {i: place for i, place in truth.items() if i not in gone}
        history.append((lists, truth))
    for lists, truth in history:
        rows = lists.rows()
        assert dict(zip(lists.ids(rows).tolist(), lists.list_of(rows).tolist(), strict=True)) == truth
        assert lists.total == len(truth) and (lists.find(np.array(sorted(truth))) >= 0).all()
        assert (lists.find(np.arange(fresh, fresh + 5)) < 0).all()
    assert lists.capacity < 4 * lists.total


def test_places_are_few_sorted_runs():
    places = Places()
    for i in range(200):
        places = places.plus(np.array([i, i // 2]), np.array([i, 1000 + i]))
    assert len(places.runs) < 12
    assert places.find(np.array([199, 50, 400])).tolist() == [199, 1101, -1]


# Arrays in and out.


@pytest.mark.parametrize("make", [
    lambda: IVFFlatIndex(8, 5), lambda: IVFFlatIndex(8, 5, "inner_product", storage="sq8"),
    lambda: IVFPQIndex(8, 5, 4, 4), lambda: IVFPQIndex(8, 5, 2, 5, "inner_product", residual=False),
])  # fmt: skip
def test_the_short_way_of_arrays_is_that_of_tensors(make):
    random, index = np.random.default_rng(1), make()
    x = random.standard_normal((300, 8)).astype(np.float32)
    index.train(x)
    for change in (lambda: index.add(x), lambda: index.remove_ids(range(10, 100)), lambda: index.add(x[:7])):
        change()
        index.search(torch.from_numpy(x[:1]), 1)  # makes what the short way needs
        assert index._state.cache["listed"].run is not None
        for rows, k, nprobe in ((1, 1, 1), (1, 400, 5), (9, 10, 3)):
            q = x[:rows] + 0.1
            found = index.search(q, k, nprobe=nprobe)
            with metate.use("reference"):
                expected = index.search(q, k, nprobe=nprobe)
            for a, b, c in zip(found, index.search(torch.from_numpy(q), k, nprobe=nprobe), expected, strict=True):
                assert a.dtype == c.dtype and np.array_equal(a, b.numpy())
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not finite"):
        index.search(np.full((2, 8), np.nan, np.float32), 3)
    for wrong in (dict(k=0), dict(k=3, nprobe=6), dict(k=3, nprobe=0)):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            index.search(x[:1], **wrong)
    with pytest.raises(ValueError, match="8 dimensions"):
        index.search(x[:1, :7].copy(), 3)


def test_arrays_of_every_layout_and_type():
    plain = filled(KINDS["ivfpq"]("l2"))
    plain.add(X)
    expected = plain.search(Q, 5, nprobe=5)
    frozen = X.copy()
    frozen.flags.writeable = False
    wide = np.zeros((70, 2 * D), np.float32)
    wide[:, ::2] = X
    for x in (frozen, wide[:, ::2], np.asfortranarray(X), X[::-1][::-1], X.astype(">f4"), X.astype(np.float64),
              torch.from_numpy(X), torch.from_numpy(X).double(), torch.from_numpy(X).T.contiguous().T):  # fmt: skip
        index = filled(KINDS["ivfpq"]("l2"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            index.add(x)
        assert all(np.array_equal(a, b) for a, b in zip(index.search(Q, 5, nprobe=5), expected, strict=True))
    found = plain.search(torch.from_numpy(Q), 5, nprobe=5)
    assert all(isinstance(t, torch.Tensor) and np.array_equal(t, e) for t, e in zip(found, expected, strict=True))
    assert isinstance(plain.range_search(torch.from_numpy(Q), 1.0)[0], torch.Tensor)
    assert [a.shape for a in plain.search(Q[:0], 5)] == [(0, 5), (0, 5)]
    integers = FlatIndex(D)
    integers.add(np.arange(D, dtype=np.uint8)[None])
    assert integers.search(np.arange(D, dtype=np.int64), 1)[0].tolist() == [0]


def test_empty_indexes_find_nothing():
    for kind in KINDS:
        index = filled(KINDS[kind]("l2"))
        for _ in range(2):
            distances, ids = index.search(Q, 3)
            assert (ids == -1).all() and (distances == np.inf).all()
            assert index.range_search(Q, 1.0)[0].tolist() == [0, 0, 0, 0] and index.remove_ids([1]) == 0
            index.add(X[:0])
            index.add(X[:2])
            assert index.remove_ids(range(10)) == 2
    assert (filled(FlatIndex(D, "cosine")).search(Q, 1)[0] == -np.inf).all()


# Refusals: they say what is wrong, and change nothing.

NAN = X.copy()
NAN[69, 3] = np.nan
BAD = {
    "dimension": (lambda i: i.add(X[:, :5]), ValueError, r"add: x is of shape \(70, 5\), expected \(n, 8\)"),
    "query dimension": (lambda i: i.search(Q[:, :5], 1), ValueError, "search: queries is of shape"),
    "kind": (lambda i: i.add(X.tolist()), TypeError, "a numpy array or a torch tensor"),
    "complex": (lambda i: i.add(X.astype(np.complex64)), TypeError, "numbers"),
    "NaN": (lambda i: i.add(NAN), ValueError, "add: x is not finite everywhere"),
    "NaN query": (lambda i: i.search(NAN, 1), ValueError, "queries is not finite"),
    "k": (lambda i: i.search(Q, 0), ValueError, "k is 0, expected an integer from 1 on"),
    "k bool": (lambda i: i.search(Q, True), ValueError, "k is True"),
    "nprobe 0": (lambda i: i.search(Q, 1, nprobe=0), ValueError, "nprobe is 0, expected an integer from 1 to 5"),
    "nprobe 6": (lambda i: i.search(Q, 1, nprobe=6), ValueError, "nprobe is 6"),
    "factor": (lambda i: i.search(Q, 1, refine_factor=0), ValueError, "refine_factor is 0"),
    "factor bool": (lambda i: i.search(Q, 1, refine_factor=True), ValueError, "refine_factor is True"),
    "k huge": (
        lambda i: i.search(Q, 2**31),
        ValueError,
        r"search: k is 2147483648, expected .* 2\*\*31 - 1",
    ),
    "k beyond": (lambda i: i.search(Q, 2**64), ValueError, "k is 18446744073709551616"),
    "nprobe bool": (lambda i: i.search(Q, 1, nprobe=True), ValueError, "nprobe is True"),
    "negative id": (lambda i: i.add_with_ids(X[:1], [-1]), ValueError, "holding -1"),
    "huge id": (lambda i: i.add_with_ids(X[:1], [2**63 - 1]), ValueError, "holding 9223372036854775807"),
    "huge": (lambda i: i.add(X * np.float32(1e30)), ValueError, "x is huge in places"),
    "ids twice": (lambda i: i.add_with_ids(X[:2], [99, 99]), ValueError, "holding 99 twice"),
    "ids again": (lambda i: i.add_with_ids(X[:2], [99, 7]), ValueError, "holding 7 twice or again"),
    "ids short": (lambda i: i.add_with_ids(X[:2], [99]), ValueError, "1 ids, expected 2"),
    "ids float": (lambda i: i.add_with_ids(X[:1], np.array([0.5])), ValueError, "one dimension of integers"),
    "filter kind": (lambda i: i.search(Q, 1, filter="all"), TypeError, "filter is str"),
    "filter float": (lambda i: i.search(Q, 1, filter=np.array([0.5])), ValueError, "integer ids"),
    "filter answer": (lambda i: i.search(Q, 1, filter=lambda ids: ids), ValueError, "one boolean for each id"),
    "radius": (lambda i: i.range_search(Q, float("nan")), ValueError, "radius is nan"),
    "unknown id": (lambda i: i.reconstruct(99), KeyError, "ids is holding 99"),
    "filter shape": (lambda i: i.search(Q, 1, filter=np.ones((2, 2), bool)), ValueError, "filter is of shape"),
    "NaN, tensor": (lambda i: i.add(torch.from_numpy(NAN)), ValueError, "add: x is not finite everywhere"),
    "NaN, ids": (lambda i: i.add_with_ids(NAN, np.arange(99, 169)), ValueError, "add_with_ids: x is not finite every"),
    "NaN, range": (lambda i: i.range_search(NAN, 1.0), ValueError, "queries is not finite"),
    "infinite": (lambda i: i.add(np.full((1, D), -np.inf, np.float32)), ValueError, "x is not finite everywhere"),
    "ids again, array": (lambda i: i.add_with_ids(X[:2], np.array([99, 7])), ValueError, "holding 7 twice or again"),
    "removal": (lambda i: i.remove_ids("all"), TypeError, "filter is str"),
    "removal answer": (lambda i: i.remove_ids(lambda ids: ids), ValueError, "one boolean for each id"),
    "given full": (lambda i: i.set_trained(i.trained()), RuntimeError, "holding 70 vectors, expected empty"),
    "no folder": (lambda i: i.save("no/folder/index"), FileNotFoundError, "no/folder/index"),
    "train full": (lambda i: i.train(np.tile(X, (4, 1))), RuntimeError, "holding 70 vectors, expected empty"),
}


ONLY_LISTS = {"nprobe 0", "nprobe 6", "nprobe bool", "huge"}  # others take no nprobe, and compare no centroids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case, kind):
    call, error, message = BAD[case]
    index = filled(KINDS[kind]("l2"))
    index.add(X)
    before = index.search(Q, 9)
    if index.nlist is None and case in ONLY_LISTS:
        if case == "huge":
            return
        message = "nprobe is .*, expected None: this index has no lists"
    with pytest.raises(error, match=message):
        call(index)
    assert index.ntotal == index.next_id == 70
    assert all(np.array_equal(a, b) for a, b in zip(before, index.search(Q, 9), strict=True))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
@pytest.mark.parametrize("kind", ["flat", "lists"])
def test_copies_share_nothing(kind, copied):
    index = filled(IVFPQIndex(D, 5, 4, 4, opq=True, refine="sq8") if kind == "lists" else FlatIndex(D))
    index.add(X)
    index.remove_ids([3])
    before, other = index.search(Q, 9), copied(index)
    assert repr(other) == repr(index) and all(map(np.array_equal, before, other.search(Q, 9)))
    for _ in range(3):
        other.add(X + 1)
    other.remove_ids([5])
    index.add(X - 1)
    assert index.ntotal == 139 and other.ntotal == 278
    index.remove_ids(range(70, 140))
    assert all(map(np.array_equal, before, index.search(Q, 9)))


def test_bad_settings_and_untrained():
    for make, message in [
        (lambda: PQIndex(D, 3), "M is 3, expected a divisor of dim, 8"),
        (lambda: PQIndex(D, 4, 17), "bits is 17, expected 1 to 16"),
        (lambda: FlatIndex(D, storage=None), "storage is None, expected"),
        (lambda: FlatIndex(0), "dim is 0"),
        (lambda: FlatIndex(D, "L2"), "metric is 'L2', expected 'l2' or 'inner_product' or 'cosine'"),
        (lambda: FlatIndex(D, storage="int4"), "storage is 'int4'"),
        (lambda: IVFFlatIndex(D, 0), "nlist is 0"),
        (lambda: IVFFlatIndex(D, 4, seed="a"), "seed is 'a', expected an integer from 0"),
        (lambda: PQIndex(D, 4, 4, seed=-1), "seed is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    index = IVFPQIndex(D, 5, 4, 4)
    for call in (lambda: index.add(X), lambda: index.search(Q, 1), lambda: index.reconstruct(0)):
        with pytest.raises(RuntimeError, match="not trained"):
            call()
    for x, message in [(X[:15], "15 vectors, expected at least 16"), (NAN, "not finite")]:
        with pytest.raises(ValueError, match=message):
            index.train(x)
    assert not index.is_trained and index.ntotal == 0
    with pytest.raises(ValueError, match="nprobe is 1, expected None"):
        FlatIndex(D).search(Q, 1, nprobe=1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("M", [1, 3, 4])
def test_interleaved_codes_are_rows(bits, M):
    """Written row by row, in stretches that begin and end anywhere, and as a whole: the same codes are read."""
    size = (M * bits + 7) // 8
    codes = torch.from_numpy(RANDOM.integers(0, 256, (150, size), dtype=np.uint8))
    if M * bits % 8:
        codes[:, -1] &= 15
    whole = Interleaved.of(codes, M, bits)
    pieces, scattered = whole.new_empty((150, size)), whole.new_empty((150, size))
    cuts = [0, 1, 1, 31, 64, 97, 100, 150]
    for a, b in itertools.pairwise(cuts):
        pieces[a:b] = codes[a:b]
    order = torch.from_numpy(RANDOM.permutation(150))
    for part in order.split(40):
        scattered.index_copy_(0, part, codes[part])
    for found in (whole, pieces, scattered):
        assert torch.equal(found[order], codes[order]) and found.shape == (150, size)
        assert torch.equal(found.first(70)[torch.arange(70)], codes[:70])


@pytest.mark.parametrize("metric", ["l1", "linf"])
@pytest.mark.parametrize("make", [FlatIndex, lambda d, metric: IVFFlatIndex(d, 3, metric)])
def test_metrics_of_vectors_alone(make, metric, tmp_path):
    index, gaps = make(D, metric), np.abs(np.float64(Q)[:, None] - X)
    truth = (gaps.sum(2) if metric == "l1" else gaps.max(2)).astype(np.float32)
    index.train(X, progress=False)
    index.add(X)
    index.nprobe = index.nlist or 1
    index.save(tmp_path / "index")
    metate.search.write_faiss(index, tmp_path / "faiss")
    for one in (index, metate.search.load(tmp_path / "index"), metate.search.read_faiss(tmp_path / "faiss")):
        one.nprobe = one.nlist or 1
        for q in (Q, Q[:1]):
            distances, ids = one.search(q, 9)
            assert one.metric == metric and np.array_equal(distances, np.sort(truth, 1)[: len(q), :9])
            assert np.array_equal(ids, truth.argsort(1, kind="stable")[: len(q), :9])
        assert one.search(Q, 70, filter=range(5))[1][:, 5:].max() == -1
        assert one.range_search(Q, 1.0)[0][-1] == (truth < 1).sum()
    if index.nlist is not None:
        centroids = index.trained()["centroids"].numpy()
        gaps = np.abs(np.float64(X)[:, None] - centroids)
        assert np.array_equal(index.assign(X), (gaps.sum(2) if metric == "l1" else gaps.max(2)).argmin(1))
    with pytest.raises(ValueError, match="metric is 'l1'"):
        IVFPQIndex(D, 3, 4, metric="l1")
