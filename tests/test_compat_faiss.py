"""metate.compat.faiss says what faiss says: search by every class, factory strings, selectors, files, and refusals."""

import copy
import importlib
import io
import os
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from metate import FormatError, compat
from metate.compat import faiss
from metate.search import read_faiss

FOLDER = Path(__file__).parent / "data" / "faiss"
EXPECTED = np.load(FOLDER / "expected.npz")
RANDOM = np.random.default_rng(0)
D = 8
X, Q = (RANDOM.standard_normal((n, D)).astype(np.float32) for n in (60, 5))


def with_map(index):
    """From ids to vectors, which lists have when they are told to."""
    if (lists := faiss.try_extract_index_ivf(index)) is not None:
        with pytest.raises(RuntimeError, match="make_direct_map"):
            index.reconstruct(0)
        lists.make_direct_map()
    return index


def brute_force(x, ids, k, product=False):
    key = -(Q @ x.T) if product else ((Q[:, None] - x) ** 2).sum(2)
    return np.asarray(ids)[key.argsort(1)[:, :k]]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.index")), ids=lambda path: path.stem)
def test_files_of_faiss(path, tmp_path):
    index = faiss.read_index(str(path))
    distances, ids = index.search(EXPECTED["q"], 5)
    np.testing.assert_allclose(distances, EXPECTED[f"{path.stem}.D"], rtol=1e-5, atol=2e-6)
    assert np.array_equal(np.sort(ids, 1), np.sort(EXPECTED[f"{path.stem}.I"], 1))
    faiss.write_index(index, str(tmp_path / "index"))
    if path.stem != "pq_fast_ip":  # in blocks of 64 rows, which are written as ones of 32
        assert (tmp_path / "index").read_bytes() == path.read_bytes()
    assert np.array_equal(faiss.clone_index(index).search(EXPECTED["q"], 5)[1], ids)


@pytest.mark.parametrize(
    "description",
    ["Flat", "PQ4x4", "IVF4,Flat", "IVF4,PQ4x4np", "OPQ4_4,IVF4,PQ4x4", "RR4,PQ2x4", "PQ2x4,RFlat", "IDMap,Flat",
     "IDMap2,PQ2x4,RFlat", "SQ8", "SQfp16", "IDMap2,SQbf16", "PQ4x4fs", "IVF4,PQ4x4fs", "IVF4,PQ2x4fsr",
     "PQ4x4,Refine(SQ8)", "IVF4,SQ8", "L2norm,IVF4,SQfp16"],
)  # fmt: skip
@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_factory(description, metric):
    index, product = faiss.index_factory(D, description, metric), metric == faiss.METRIC_INNER_PRODUCT
    index.train(X)
    assert index.is_trained and index.d == D and index.metric_type == metric
    ids = np.arange(60) * 3 if "IDMap" in description else np.arange(60)
    (index.add_with_ids if "IDMap" in description else lambda x, ids: index.add(x))(X, ids)
    if "IVF" in description:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", 4)
    if "RFlat" in description or "Refine" in description:
        (index.index if "IDMap" in description else index).k_factor = 60
    distances, found = index.search(Q, 6)
    if "Flat" in description:
        assert np.array_equal(found, brute_force(X, ids, 6, product))
    if "IDMap," not in description:
        vectors = with_map(index).reconstruct_batch(ids)
        assert np.array_equal(vectors[7], index.reconstruct(int(ids[7])))
        if "OPQ" not in description and "RR" not in description:
            assert (found == brute_force(vectors, ids, 6, product)).mean() > 0.9
    tensors = index.search(torch.from_numpy(Q), 6)
    assert all(
        isinstance(t, torch.Tensor) and np.allclose(t, e) for t, e in zip(tensors, (distances, found), strict=True)
    )
    lims, near, _ = index.range_search(Q, float(np.median(distances)))
    assert lims[-1] == len(near)
    assert index.search(Q, 61)[1][:, 60].tolist() == [-1] * 5
    assert set(np.abs(index.search(Q, 61)[0][:, 60]).tolist()) == {float(np.finfo(np.float32).max)}
    assert index.ntotal == 60
    index.reset()
    assert index.ntotal == 0 and index.is_trained


def test_removing_shifts_flat_ids_and_keeps_those_of_lists():
    flat, lists = faiss.IndexFlatL2(D), faiss.index_factory(D, "IVF2,Flat")
    lists.train(X)
    for index in (flat, lists):
        index.add(X)
        assert index.remove_ids(faiss.IDSelectorRange(5, 10)) == 5
        assert index.remove_ids(np.array([0, 100])) == 1
    kept = np.r_[1:5, 10:60]
    assert np.array_equal(flat.reconstruct_n(), X[kept])
    flat.add(X[:1])
    assert flat.ntotal == 55 and np.array_equal(flat.reconstruct(54), X[0])
    assert np.array_equal(with_map(lists).reconstruct(59), X[59])
    with pytest.raises(RuntimeError):
        lists.reconstruct(7)


def test_selectors():
    chosen = [
        (faiss.IDSelectorRange(10, 20), range(10, 20)),
        (faiss.IDSelectorBatch([3, 5, 99]), [3, 5]),
        (faiss.IDSelectorArray(np.array([3, 5])), [3, 5]),
        (faiss.IDSelectorBitmap(np.packbits(np.arange(16) % 2, bitorder="little")), range(1, 16, 2)),
        (faiss.IDSelectorNot(faiss.IDSelectorRange(3, 60)), range(3)),
        (faiss.IDSelectorAnd(faiss.IDSelectorRange(0, 9), faiss.IDSelectorBatch([2, 30])), [2]),
        (faiss.IDSelectorOr(faiss.IDSelectorRange(0, 2), faiss.IDSelectorBatch([2, 30])), [0, 1, 2, 30]),
        (faiss.IDSelectorXOr(faiss.IDSelectorRange(0, 3), faiss.IDSelectorBatch([2, 30])), [0, 1, 30]),
        (faiss.PyCallbackIDSelector(lambda i: i in (4, 6)), [4, 6]),
        (faiss.IDSelectorTranslated(np.arange(60)[::-1], faiss.IDSelectorRange(0, 2)), [58, 59]),
        (faiss.IDSelectorAll(), range(60)),
    ]
    flat, ivf, mapped = faiss.IndexFlatL2(D), faiss.index_factory(D, "IVF3,Flat"), faiss.index_factory(D, "IDMap,Flat")
    ivf.train(X)
    flat.add(X)
    ivf.add(X)
    mapped.add_with_ids(X, np.arange(60))
    for sel, ids in chosen:
        ids = np.array(ids)
        for index, params in [
            (flat, faiss.SearchParameters(sel=sel)),
            (ivf, faiss.SearchParametersIVF(sel=sel, nprobe=3)),
            (mapped, faiss.SearchParameters(sel=sel)),
        ]:
            found = index.search(Q, 3, params=params)[1]
            assert np.array_equal(found[:, : len(ids)], brute_force(X[ids], ids, 3)), type(sel)
        assert sel.is_member(int(ids[0])) and len(ids) == sum(map(sel.is_member, range(60)))
    named = faiss.index_factory(D, "IDMap,Flat")
    named.add_with_ids(X, 1000 * np.arange(60))
    for sel in (
        faiss.IDSelectorBatch([2000, 5000]),
        faiss.IDSelectorTranslated(named, faiss.IDSelectorBatch([2000, 5000])),
    ):
        found = named.search(Q, 3, params=faiss.SearchParameters(sel=sel))[1]
        assert np.array_equal(np.sort(found, 1), [[-1, 2000, 5000]] * 5)
    bounds = np.zeros(2, np.uint64)
    faiss.IDSelectorRange(3, 30, True).find_sorted_ids_bounds(
        5, np.array([1, 3, 7, 29, 31, 32]), bounds[:1], bounds[1:]
    )
    assert bounds.tolist() == [1, 4]
    with pytest.raises(RuntimeError, match="SearchParametersIVF"):
        flat.search(Q, 1, params=faiss.SearchParametersIVF())


def test_a_quantizer_that_comes_filled_is_kept():
    quantizer = faiss.IndexFlatL2(D)
    quantizer.add(X[:4])
    index = faiss.IndexIVFPQ(quantizer, D, 4, 2, 4)
    index.by_residual = False
    index.train(X)
    index.add_with_ids(X, np.arange(60) + 5)
    assert np.array_equal(quantizer.reconstruct_n(), X[:4])
    assert sum(index.invlists.list_size(i) for i in range(4)) == 60
    home = ((X[:, None] - X[:4]) ** 2).sum(2).argmin(1)
    assert np.array_equal(index.invlists.get_ids(2), np.flatnonzero(home == 2) + 5)
    assert np.array_equal(index.quantizer.assign(X, 1)[:, 0], home)
    assert faiss.IndexIVFFlat(quantizer, D, 4).is_trained
    index.update_vectors(np.array([9, 7]), X[:2])
    assert index.ntotal == 60 and index.search(X[:1], 60)[1].shape == (1, 60)
    assert np.array_equal(with_map(index).reconstruct(9), index.reconstruct(5))
    assert index.pq.decode(index.pq.compute_codes(X)).shape == X.shape and index.pq.centroids.shape == (16 * D,)


@pytest.mark.parametrize(
    "description", ["Flat", "PQ4x4", "IVF4,Flat", "IVF4,PQ4x4", "IVF4,SQ8", "RR4,IVF4,PQ2x4", "IDMap,Flat"]
)
def test_merging(description):
    whole = faiss.index_factory(D, description)
    whole.train(X)
    parts = [faiss.clone_index(whole) for _ in range(2)]
    named, lists = "IDMap" in description, "IVF" in description
    for index, rows in zip((whole, *parts), (slice(60), slice(23), slice(23, 60)), strict=True):
        index.add_with_ids(X[rows], 7 * np.arange(60)[rows]) if named else index.add(X[rows])
    parts[0].merge_from(parts[1], **({"add_id": 23} if lists else {}))
    assert parts[1].ntotal == 0 and parts[0].ntotal == 60
    for index in (whole, parts[0]):
        if lists:
            faiss.extract_index_ivf(index).nprobe = 4
    for a, b in zip(whole.search(Q, 60), parts[0].search(Q, 60), strict=True):
        assert np.array_equal(a, b)
    stranger = faiss.index_factory(D, description)
    stranger.train(X[::-1].copy() + 1)
    if description != "Flat" and not named:
        with pytest.raises(RuntimeError, match="another kind or training"):
            parts[0].merge_from(stranger)


def test_subsets_of_lists():
    index = faiss.index_factory(D, "IVF4,PQ4x4")
    index.train(X)
    index.add_with_ids(X, np.arange(60) * 2)
    index.nprobe = 4
    for kind, parts in {
        0: [(0, 50), (50, 120)], 1: [(4, 0), (4, 2)], 2: [(0, 11), (11, 60)], 3: [(2, 0), (2, 1)], 4: [(0, 1), (1, 4)],
    }.items():  # fmt: skip
        empty = faiss.clone_index(index)
        empty.reset()
        copies = [faiss.clone_index(empty) for _ in parts]
        for copied, (a1, a2) in zip(copies, parts, strict=True):
            index.copy_subset_to(copied, kind, a1, a2)
            assert copied.check_ids_sorted()
        assert sum(copied.ntotal for copied in copies) == 60 and index.ntotal == 60
        for copied in copies:
            empty.merge_from(copied)
        assert np.array_equal(empty.search(Q, 60)[1], index.search(Q, 60)[1]), kind
    with pytest.raises(RuntimeError, match="subset_type"):
        index.copy_subset_to(empty, 5, 0, 1)


@pytest.mark.parametrize("description", ["IVF4,Flat", "IVF4,PQ4x4", "IVF300,PQ4x4", "IVF4,SQ8"])
@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_lists_and_codes(description, metric):
    index = faiss.index_factory(D, description, metric)
    x = RANDOM.standard_normal((400, D)).astype(np.float32)
    index.train(x)
    index.add(x)
    index.nprobe = 3
    distances, ids = index.search(Q, 9)
    near, lists = index.quantizer.search(Q, 3)
    chosen = index.search_preassigned(Q, 9, lists, near)
    assert np.array_equal(chosen[1], ids)
    np.testing.assert_allclose(chosen[0], distances, rtol=1e-5, atol=1e-5)  # its biases are those that were given
    lists[:, 1:] = -1
    only = index.search_preassigned(Q, 500, lists, near)[1]
    assert [set(row[row >= 0]) for row in only] == [set(index.invlists.get_ids(int(i))) for i in lists[:, 0]]
    near, lists = index.quantizer.search(Q, 3)
    radius = 1.001 * float(np.median(distances[ids >= 0]))
    for a, b in zip(index.range_search(Q, radius), index.range_search_preassigned(Q, radius, lists, near), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    found = index.search_and_return_codes(Q, 9, include_listnos=True)
    there = ids >= 0
    decoded = index.sa_decode(found[2][there])
    np.testing.assert_allclose(decoded, with_map(index).reconstruct_batch(ids[there]), atol=1e-6)
    assert np.array_equal(found[1], ids) and found[2].shape == (5, 9, index.sa_code_size())
    assert np.array_equal(index.search_and_return_codes(Q, 9)[2], found[2][..., index.coarse_code_size() :])
    np.testing.assert_allclose(index.sa_decode(index.sa_encode(x)), index.reconstruct_n(), atol=1e-6)
    computer = index.get_distance_computer()
    computer.set_query(Q[0])
    assert abs(computer(int(ids[0, 0])) - distances[0, 0]) < 1e-4
    assert computer.symmetric_dis(3, 3) == pytest.approx(0 if metric else np.square(index.reconstruct(3)).sum())
    with pytest.raises(RuntimeError, match="Iq holds"):
        index.search_preassigned(Q, 9, lists + 300, near)


def test_codes_of_composed_indexes():
    for description, size in (("OPQ4_4,Flat", 16), ("PQ4x4,RFlat", 34), ("IDMap,PQ2x8", 2), ("PQ4x6", 3)):
        index = faiss.index_factory(D, description)
        x = RANDOM.standard_normal((300, D)).astype(np.float32)
        index.train(x)
        codes = index.sa_encode(x)
        assert codes.shape == (300, size) == (300, index.sa_code_size())
        assert np.array_equal(index.sa_encode(index.sa_decode(codes)), codes) or "OPQ" in description


@pytest.mark.parametrize(
    "description", ["Flat", "PQ4x4", "IVF4,Flat", "IVF4,PQ4x4", "RR4,IVF4,Flat", "IDMap2,PQ4x4", "IDMap,IVF4,PQ4x4"]
)
def test_codes_are_added(description):
    index, named = faiss.index_factory(D, description), "IDMap" in description
    index.train(X)
    index.add_with_ids(X, np.arange(60) * 2) if named else index.add(X)
    expected, codes = index.search(Q, 60), index.sa_encode(X)
    index.reset()
    index.add_sa_codes(codes[:20], np.arange(20, dtype=np.int32) * 2 if named else None)
    index.add_sa_codes(codes[20:], np.arange(20, 60) * 2 if named else None)
    for a, b in zip(index.search(Q, 60), expected, strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(AssertionError):
        index.add_sa_codes(codes[:, 1:])
    if "Flat" in description:
        codes[3] = 255  # no list, or no number
        with pytest.raises(RuntimeError, match=r"lists|finite"):
            index.add_sa_codes(codes)
    assert index.ntotal == 60


def test_lists_of_a_pq_index_and_refinement_by_one(tmp_path):
    for description in ("IVF16(PQ2x4),Flat", "IVF16(PQ4x4),PQ4x4", "PQ2x4,Refine(PQ8x4)"):
        index = faiss.index_factory(D, description)
        index.train(X)
        index.add(X)
        faiss.write_index(index, str(tmp_path / "index"))
        again = faiss.read_index(str(tmp_path / "index"))
        for one in (index, again):
            if "IVF" in description:
                home = np.square(X[:, None] - one.quantizer.reconstruct_n()).sum(2).argmin(1)
                assert all(np.array_equal(one.invlists.get_ids(i), np.flatnonzero(home == i)) for i in range(16))
                assert isinstance(one.quantizer, faiss.IndexPQ)
                one.nprobe = 16
            else:
                one.k_factor = 10
            distances, ids = one.search(Q, 6)
            gaps = Q[:, None] - one.search_and_reconstruct(Q, 6)[2]
            np.testing.assert_allclose(distances, np.square(gaps).sum(2), rtol=1e-4)
            assert np.array_equal(ids, index.search(Q, 6)[1])
            assert "Flat" not in description or np.array_equal(ids, brute_force(X, np.arange(60), 6))
        if "IVF" in description:
            assert np.array_equal(read_faiss(tmp_path / "index").search(Q, 6, nprobe=16)[1], ids)
        else:
            with pytest.raises(FormatError, match="refine index"):
                read_faiss(tmp_path / "index")
            damaged = faiss.serialize_index(index).copy()
            damaged[69] = 0  # the base is not trained
            with pytest.raises(FormatError, match="refined index"):
                faiss.deserialize_index(damaged)


@pytest.mark.parametrize("description", ["IVF6,Flat", "IVF6,PQ4x4", "IVF6,SQfp16"])
def test_at_most_so_many_codes(description):
    index = faiss.index_factory(D, description)
    index.train(X)
    index.add(X)
    index.remove_ids(np.arange(0, 60, 9))
    lists = index.quantizer.search(Q, 4)[1]
    for most in (1, 7, 20, 1000):
        found = index.search(Q, 60, params=faiss.SearchParametersIVF(nprobe=4, max_codes=most))[1]
        for row, probed in zip(found, lists, strict=True):
            seen = np.concatenate([index.invlists.get_ids(int(i)) for i in probed])[:most]
            assert set(row[row >= 0]) == set(seen)
    index.max_codes, index.nprobe = 7, 4
    assert np.array_equal(index.search(Q, 7)[1], index.search(Q, 60)[1][:, :7])


def test_budgets_of_a_search_count_what_a_selector_keeps():
    index = faiss.index_factory(D, "IVF8,Flat")
    index.train(X)
    index.add_with_ids(X, np.arange(60.0))
    index.remove_ids(np.arange(0, 60, 7))
    sel, lists = faiss.IDSelectorRange(10, 45), index.quantizer.search(Q, 6)[1]
    stats = faiss.cvar.indexIVF_stats
    for most in (0, 1, 7, 20):
        for full in (False, True):
            asked = faiss.SearchParametersIVF(sel=sel, nprobe=6, max_codes=most, ensure_topk_full=full)
            stats.reset()
            found, compared = index.search(Q, 3, params=asked)[1], 0
            for row, probed in zip(found, lists, strict=True):
                left, seen = (max(most, 3) if full else most) if most else 100, []
                for ids in (index.invlists.get_ids(int(i)) for i in probed):
                    kept = [i for i in (ids if full else ids[: max(left, 0)]) if 10 <= i < 45 and left > 0]
                    left, seen, compared = left - len(kept), seen + kept, compared + len(kept)
                assert set(row[row >= 0]) <= set(seen) and (row >= 0).sum() == min(3, len(seen))
            assert (stats.ndis, stats.nq) == (compared, 5)


def test_range_search_ends_after_lists_without_results():
    index = faiss.index_factory(D, "IVF12,Flat")
    index.train(X)
    index.add(X)
    index.nprobe, radius = 12, 9.0
    lists, whole = index.quantizer.search(Q, 12)[1], index.range_search(Q, radius)
    assert len(whole[1]) > 20
    for most in (1, 2, 12):
        asked = faiss.SearchParametersIVF(nprobe=12, max_empty_result_buckets=most)
        lims, distances, ids = index.range_search(Q, radius, params=asked)
        for q in range(5):
            inside, kept, turn = set(whole[2][whole[0][q] : whole[0][q + 1]]), [], 0
            for i in lists[q]:
                hits = inside & set(index.invlists.get_ids(int(i)))
                kept, turn = kept + sorted(hits), 0 if hits else turn + 1
                if turn == most:
                    break
            assert ids[lims[q] : lims[q + 1]].tolist() == sorted(kept)
            assert np.allclose(distances[lims[q] : lims[q + 1]], ((X[sorted(kept)] - Q[q]) ** 2).sum(1), rtol=1e-5)
    index.parallel_mode = 1
    with pytest.raises(RuntimeError, match="parallel_mode"):
        index.range_search(Q, radius, params=faiss.SearchParametersIVF(max_empty_result_buckets=1))


@pytest.mark.parametrize("make", [faiss.IndexIVFFlat, lambda *how: faiss.IndexIVFPQ(*how[:3], 4, 4, how[3])])
@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_lists_may_be_found_by_another_metric(make, metric, tmp_path):
    product, ids = metric == faiss.METRIC_INNER_PRODUCT, np.arange(60)[::-1] * 2
    quantizer = (faiss.IndexFlatL2 if product else faiss.IndexFlatIP)(D)
    index = make(quantizer, D, 6, metric)
    index.train(X)
    index.add(X[:20])
    index.reset()
    index.add_with_ids(X, ids)
    index.nprobe = 2
    home, probed = quantizer.assign(X, 1)[:, 0], quantizer.assign(Q, 2)
    vectors = with_map(index).reconstruct_batch(ids)
    key = -(Q @ vectors.T) if product else ((Q[:, None] - vectors) ** 2).sum(2)
    key[~(home == probed[:, :, None]).any(1)] = np.inf
    distances, found = index.search(Q, 4)
    assert np.array_equal(found, ids[key.argsort(1)[:, :4]])
    np.testing.assert_allclose(distances, np.sort(key, 1)[:, :4] * (-1 if product else 1), rtol=1e-4, atol=1e-5)
    assert np.array_equal(index.search_preassigned(Q, 4, probed, None)[1], found)
    radius = float(np.median(distances))
    lims, _, near = index.range_search(Q, radius, params=faiss.SearchParametersIVF(nprobe=2))
    inside = key < (-radius if product else radius)
    assert [set(near[a:b]) for a, b in pairwise(lims)] == [set(ids[row]) for row in inside]
    faiss.write_index(index, str(tmp_path / "index"))
    assert np.array_equal(faiss.read_index(str(tmp_path / "index")).search(Q, 4)[1], found)
    with pytest.raises(FormatError, match="metric of the quantizer"):
        read_faiss(tmp_path / "index")
    with pytest.raises(ValueError, match="not finite"):
        index.add(X * np.float32("nan"))


@pytest.mark.parametrize("description", ["IVF5,Flat", "PCA4,IVF5,PQ2x4"])
def test_functions_over_lists(description):
    index = faiss.index_factory(D, description)
    index.train(X)
    other = faiss.clone_index(index)
    index.add(X[:40])
    other.add(X[40:])
    faiss.check_compatible_for_merge(index, other)
    faiss.merge_into(index, other, True)
    assert index.ntotal == 60 and other.ntotal == 0
    ivf, asked = faiss.extract_index_ivf(index), faiss.SearchParametersIVF(nprobe=3)
    distances, ids, stats = faiss.search_with_parameters(index, Q, 4, asked, output_stats=True)
    lims, near, places = faiss.range_search_with_parameters(index, Q, float(np.median(distances)), asked)
    ivf.nprobe = 3
    assert np.array_equal(index.search(Q, 4)[1], ids) and stats["ndis"] >= 5 * 4
    assert np.array_equal(index.range_search(Q, float(np.median(distances)))[2], places) and lims[-1] == len(near)
    found, labels, own, theirs = (np.empty(shape, kind) for shape, kind in [
        ((5, 4), np.float32), ((5, 4), np.int64), (5, np.int64), ((5, 4), np.int64)])  # fmt: skip
    faiss.search_and_return_centroids(index, 5, Q, 4, found, labels, own, theirs)
    assert np.array_equal(labels, ids) and np.array_equal(found, distances)
    members = [set(ivf.invlists.get_ids(i)) for i in range(5)]
    assert all(label in members[home] for label, home in zip(labels.flat, theirs.flat, strict=True))
    assert np.array_equal(own, ivf.quantizer.assign(index.apply_py(Q) if "PCA" in description else Q, 1)[:, 0])
    lists = faiss.get_invlist_range(index, 1, 4)
    faiss.set_invlist_range(other, 1, 4, lists)
    assert other.ntotal == sum(map(lists.list_size, range(3))) == sum(map(len, members[1:4]))
    faiss.set_invlist_range(index, 1, 4, lists)
    assert np.array_equal(index.search(Q, 4)[1], ids) and index.ntotal == 60
    with pytest.raises(RuntimeError, match="no lists"):
        faiss.extract_index_ivf(faiss.IndexFlatL2(D))
    assert faiss.try_extract_index_ivf(faiss.IndexFlatL2(D)) is None


def test_results_in_parts_are_those_of_all():
    flat = {product: (faiss.IndexFlatIP if product else faiss.IndexFlatL2)(D) for product in (False, True)}
    for product, index in flat.items():
        index.add(X)
        distances, ids = index.search(Q, 7)
        parts = []
        for first in (0, 25, 50):
            index.reset()
            index.add(X[first : first + 25])
            found = index.search(Q, 7)
            parts.append((found[0], np.where(found[1] < 0, -1, found[1] + first)))
        heap = faiss.ResultHeap(5, 7, keep_max=product)
        for part in parts[1:]:
            heap.add_result(*part)
        heap.add_result_subset(np.arange(5), *parts[0])
        heap.finalize()
        merged = faiss.merge_knn_results(*(np.stack(part) for part in zip(*parts, strict=True)), keep_max=product)
        for found in ((heap.D, heap.I), merged):
            assert np.array_equal(found[0], distances) and np.array_equal(found[1], ids)
        assert faiss.is_similarity_metric(index.metric_type) == product
    assert faiss.imbalance_factor(4, 2, np.array([0, 0, 1, 1])) == 1 and faiss.imbalance_factor(2, 2, [1, 1]) == 2


@pytest.mark.parametrize("description", ["IVF4,PQ4x4", "OPQ4_4,PQ2x4", "IDMap,L2norm,PCA4,Flat"])
def test_streams(description, tmp_path):
    """A pipe stays open: no byte behind the index is waited for."""
    index = faiss.index_factory(D, description)
    index.train(X)
    (index.add_with_ids(X, np.arange(60)) if "IDMap" in description else index.add(X))
    data = faiss.serialize_index(index)
    read, write = os.pipe()
    with os.fdopen(read, "rb") as near, os.fdopen(write, "wb") as far:
        faiss.write_index(index, faiss.PyCallbackIOWriter(lambda part: os.write(far.fileno(), part), 100))
        os.write(far.fileno(), b"behind")
        faiss.write_index(None, faiss.PyCallbackIOWriter(lambda part: os.write(far.fileno(), part)))
        reader = faiss.PyCallbackIOReader(lambda size: os.read(near.fileno(), size), 77)
        assert np.array_equal(faiss.serialize_index(faiss.read_index(reader)), data)
        behind = np.zeros(6, np.uint8)
        assert reader(behind, 2, 3) == 3 and behind.tobytes() == b"behind" and faiss.read_index(reader) is None
    for buffered in (False, True):
        writer, reader = faiss.FileIOWriter(str(tmp_path / "index")), None
        faiss.write_index(index, faiss.BufferedIOWriter(writer, 12) if buffered else writer)
        reader = faiss.FileIOReader(str(tmp_path / "index"))
        again = faiss.read_index(faiss.BufferedIOReader(reader, 12) if buffered else reader)
        assert np.array_equal(faiss.serialize_index(again), data)
    assert np.array_equal(faiss.serialize_index(faiss.read_index(faiss.ZeroCopyIOReader(data, data.size))), data)
    twice = bytearray(data.tobytes())
    if "IVF" in description:
        twice[-8:] = twice[-16:-8]
        for read in (faiss.read_index, lambda reader: faiss.deserialize_index(np.frombuffer(twice, np.uint8))):
            with pytest.raises(RuntimeError, match="given twice"):
                read(faiss.ZeroCopyIOReader(twice, len(twice)))
    for size in range(0, len(data), 7):
        with pytest.raises(FormatError, match="the file ends there"):
            faiss.read_index(faiss.ZeroCopyIOReader(data, size))


def test_product_quantizers_have_files(tmp_path):
    index = faiss.IndexPQ(D, 4, 4)
    index.train(X)
    faiss.write_ProductQuantizer(index.pq, str(tmp_path / "pq"))
    again = faiss.read_ProductQuantizer(str(tmp_path / "pq"))
    assert (again.M, again.nbits, again.dsub, again.ksub) == (4, 4, 2, 16)
    assert np.array_equal(again.centroids, index.pq.centroids)
    assert np.array_equal(again.compute_codes(X), index.pq.compute_codes(X))
    for damaged in ((tmp_path / "pq").read_bytes() + b"x", (tmp_path / "pq").read_bytes()[:-1], b""):
        (tmp_path / "pq").write_bytes(damaged)
        with pytest.raises(RuntimeError, match=r"search\.read_faiss"):
            faiss.read_ProductQuantizer(str(tmp_path / "pq"))


def test_trained_by_hand():
    quantizer = faiss.IndexFlatL2(D)
    quantizer.add(X[:4])
    index, again = (faiss.IndexIVFPQ(quantizer, D, 4, 2, 4) for _ in range(2))
    with pytest.raises(RuntimeError, match="not trained"):
        again.is_trained = True
    index.pq.cp.niter = 3
    index.train(X)
    again.pq = index.pq
    again.is_trained = True
    for one in (index, again):
        one.add(X)
    assert np.array_equal(index.search(Q, 5)[0], again.search(Q, 5)[0])
    alone = faiss.ProductQuantizer(D, 2, 4)
    faiss.copy_array_to_vector(index.pq.centroids, alone.centroids)
    assert np.array_equal(alone.compute_codes(X), index.pq.compute_codes(X))
    tables = np.zeros((5, 2, 16), np.float32)
    alone.compute_distance_tables(5, Q, tables)
    centroids = alone.centroids.reshape(2, 16, D // 2)
    np.testing.assert_allclose(tables[:, 1], np.square(Q[:, None, D // 2 :] - centroids[1]).sum(2), rtol=1e-5)


def test_a_refined_range_has_the_distances_of_full_vectors():
    index = faiss.index_factory(D, "PQ2x4,RFlat")
    index.train(X)
    index.add(X)
    lims, distances, ids = index.range_search(Q, 6.0)
    query = np.repeat(np.arange(5), np.diff(lims))
    assert len(ids) > 5 and (distances < 6).all()
    np.testing.assert_allclose(distances, np.square(Q[query] - X[ids]).sum(1), rtol=1e-5)
    index.k_factor = 1000
    assert np.array_equal(
        index.range_search(Q, 6.0)[0], np.r_[0, (np.square(Q[:, None] - X).sum(2) < 6).sum(1).cumsum()]
    )


@pytest.mark.parametrize("description", ["PCA4,Flat", "L2norm,RR4,IVF3,SQ8"])
def test_distances_behind_transforms(description):
    index = faiss.index_factory(D, description)
    index.train(X)
    index.add(X)
    between, (distances, ids) = index.get_distance_computer(), index.search(Q, 3)
    for query, near, found in zip(Q, distances, ids, strict=True):
        between.set_query(query)
        np.testing.assert_allclose([between(int(i)) for i in found], near, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
@pytest.mark.parametrize("successive", [True, False])
def test_shards_find_what_one_index_finds(metric, successive):
    whole, shards = faiss.IndexFlat(D, metric), faiss.IndexShards(D, True, successive)
    for _ in range(3):
        flat = faiss.IndexFlat(D, metric)
        shards.add_shard(flat if successive else faiss.IndexIDMap(flat))
    for index in (whole, shards):
        index.train(X)
        index.add(X)
    assert shards.ntotal == 60 and shards.count() == 3 and shards.at(1).ntotal == 20 and shards.is_trained
    for k in (4, 70):
        for found, expected in zip(shards.search(Q, k), whole.search(Q, k), strict=True):
            assert np.array_equal(found, expected)
    radius = float(np.median(whole.search(Q, 9)[0]))
    for found, expected in zip(shards.range_search(Q, radius), whole.range_search(Q, radius), strict=True):
        assert np.array_equal(found, expected)
    with pytest.raises(RuntimeError, match="successive_ids" if successive else "IndexIDMap: add"):
        shards.add_with_ids(X, np.arange(60)) if successive else shards.at(0).add(X)
    with pytest.raises(RuntimeError, match="a shard of 3 dimensions"):
        shards.add_shard(faiss.IndexFlatL2(3))
    shards.reset()
    assert shards.ntotal == 0


def test_kmeans_and_helpers():
    means = faiss.Kmeans(D, 5, niter=8, seed=3)
    means.train(X)
    distances, near = means.assign(X)
    assert np.array_equal(near, ((X[:, None] - means.centroids) ** 2).sum(2).argmin(1)) and 1 < len(means.obj) <= 8
    assert distances.sum() <= means.obj[-1] * 1.0001 and (np.diff(means.obj) <= 1e-3).all()
    x = np.vstack([X, np.zeros((1, D), np.float32)])
    faiss.normalize_L2(x)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), [1] * 60 + [0], rtol=1e-6)
    assert np.array_equal(faiss.knn(Q, X, 4)[1], brute_force(X, np.arange(60), 4))
    clustering, index = faiss.Clustering(D, 4), faiss.IndexFlatL2(D)
    clustering.train(X, index)
    assert index.ntotal == 4 and len(clustering.centroids) == 4 * D
    stats = clustering.iteration_stats
    assert stats.at(stats.size() - 1).obj < stats.at(0).obj
    assert [one["obj"] for one in means.iteration_stats] == list(means.obj)
    again = faiss.Kmeans(D, 5, niter=3)
    again.train(X, init_centroids=means.centroids)
    assert again.obj[0] <= means.obj[-1]
    product = faiss.Clustering(D, 4)
    product.niter, product.nredo = 40, 3
    product.train(X, faiss.IndexFlatIP(D))
    centroids = product.centroids.reshape(4, D)
    near = (X @ centroids.T).argmax(1)  # means of what has the largest inner product with them; not of length 1
    np.testing.assert_allclose(centroids, [X[near == i].mean(0) for i in range(4)], rtol=1e-4, atol=1e-5)
    assert product.iteration_stats[-1].obj == pytest.approx((X @ centroids.T).max(1).sum(), rel=1e-5)
    whole = faiss.Kmeans(D, 5, int_centroids=True)
    whole.train(3 * X)
    assert np.array_equal(whole.centroids, np.round(whole.centroids))
    heavy = faiss.Kmeans(D, 1)
    heavy.train(X, weights=np.r_[np.ones(1), np.zeros(59)])
    np.testing.assert_allclose(heavy.centroids[0], X[0], rtol=1e-6)
    assert faiss.eval_intersection([[1, 2], [3, 4]], [[2, 1], [4, 5]]) == 3
    np.testing.assert_allclose(faiss.pairwise_distances(Q, X), np.square(Q[:, None] - X).sum(2), rtol=1e-5)


def test_pickles_and_reads_as_faiss_does(tmp_path):
    index = faiss.index_factory(D, "OPQ4_4,IVF4,PQ4x4np")
    index.train(X)
    index.add(X)
    for again in (pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        assert np.array_equal(again.search(Q, 5)[1], index.search(Q, 5)[1])
    (tmp_path / "index").write_bytes(faiss.serialize_index(index)[:100].tobytes())
    with pytest.raises(RuntimeError, match=str(tmp_path)):
        faiss.read_index(str(tmp_path / "index"))
    params = faiss.SearchParametersIVF(nprobe=2)
    params.quantizer_params = faiss.SearchParameters()
    with pytest.raises(NotImplementedError, match="quantizer_params"):
        faiss.extract_index_ivf(index).search(Q[:, :4], 1, params=params)
    faiss.extract_index_ivf(index).nprobe = 0
    with pytest.raises(RuntimeError, match="nprobe is 0"):
        index.search(Q, 1)


def test_installed_under_its_name():
    compat.install("faiss", force=True)
    try:
        index = importlib.import_module("faiss").IndexFlatL2(D)
        index.add(X)
        assert index.search(X[:1], 1)[1].item() == 0
    finally:
        compat.uninstall("faiss")


def test_vectors_by_themselves_are_tensors_once_torch_utils_is_imported(monkeypatch):
    index, lists = faiss.IndexFlatL2(D), faiss.index_factory(D, "IVF3,PQ2x4")
    lists.train(X)
    lists.make_direct_map()
    mapped, refined = faiss.IndexIDMap2(faiss.IndexFlatL2(D)), faiss.IndexRefineFlat(faiss.IndexFlatL2(D))
    indexes = index, lists, mapped, refined
    for one in (index, lists, refined):
        one.add(X)
    mapped.add_with_ids(X, np.arange(len(X)))
    before = [(one.reconstruct(3), one.reconstruct_n(0, 5)) for one in indexes]
    assert all(isinstance(array, np.ndarray) for pair in before for array in pair)
    monkeypatch.setattr(faiss.Index, "by_themselves", staticmethod(faiss.Index.by_themselves))  # restored at the end
    compat.install("faiss", force=True)
    try:
        assert isinstance(index.reconstruct(3), np.ndarray), "installing alone changes nothing"
        importlib.import_module("faiss.contrib.torch_utils")
    finally:
        compat.uninstall("faiss")
    for one, (row, rows) in zip(indexes, before, strict=True):
        for found, expected in ((one.reconstruct(3), row), (one.reconstruct_n(0, 5), rows)):
            assert isinstance(found, torch.Tensor) and np.array_equal(found.numpy(), expected)
        for room in (np.empty(D, np.float32), torch.empty(D)):
            assert one.reconstruct(3, room) is room and np.array_equal(np.asarray(room), row)
        for room in (np.empty((5, D), np.float32), torch.empty(5, D)):
            assert one.reconstruct_n(0, 5, room) is room and np.array_equal(np.asarray(room), rows)
        assert isinstance(one.reconstruct_batch(np.arange(5)), np.ndarray), "its ids say the kind"
        assert isinstance(one.compute_residual(X[0], 3), np.ndarray)


def test_indexes_are_written_to_memory_and_functions():
    index = faiss.index_factory(D, "IVF3,PQ2x4")
    index.train(X)
    index.add(X)
    writer, reader, parts = faiss.VectorIOWriter(), faiss.VectorIOReader(), []
    faiss.write_index(index, writer)
    faiss.write_index(index, faiss.PyCallbackIOWriter(parts.append, 100))
    assert b"".join(parts) == bytes(writer.data) and max(map(len, parts)) == 100
    faiss.copy_array_to_vector(faiss.vector_to_array(writer.data), reader.data)
    again = faiss.read_index(reader)
    assert all(np.array_equal(*pair) for pair in zip(index.search(Q, 5), again.search(Q, 5), strict=True))
    stream = io.BytesIO(bytes(writer.data))
    again = faiss.read_index(faiss.PyCallbackIOReader(stream.read, 100))
    assert all(np.array_equal(*pair) for pair in zip(index.search(Q, 5), again.search(Q, 5), strict=True))
    reader.data[:] = reader.data[:50]
    with pytest.raises(FormatError):
        faiss.read_index(reader)
