"""metate.compat.faiss refuses what is wrong, says what it is, and changes nothing."""

import numpy as np
import pytest
import torch
from test_compat_faiss import D, Q, X

from metate import FormatError
from metate.compat import faiss

CLASSES = [
    "Flat", "SQ8", "PQ2x4", "PQ2x4fs", "IVF4,Flat", "IVF4,SQ8", "IVF4,PQ2x4", "IVF4,PQ2x4fs", "IDMap,Flat",
    "IDMap2,PQ2x4", "OPQ2_8,IVF4,PQ2x4", "PCA4,Flat", "L2norm,IVF4,Flat", "PQ2x4,Refine(Flat)", "IVF4,PQ2x4,RFlat",
]  # fmt: skip


@pytest.mark.parametrize("description", CLASSES)
def test_bad_input_changes_nothing(description):
    index, nan, ids = faiss.index_factory(D, description), X.copy(), np.arange(60)
    nan[59, 3] = np.nan
    mapped = description.startswith("IDMap")
    add = index.add_with_ids if mapped else lambda x, ids: index.add(x)
    if not index.is_trained:
        for call in (lambda: add(X, ids), lambda: index.search(Q, 1)):
            with pytest.raises(RuntimeError, match="not trained"):
                call()
    index.train(X)
    add(X, ids)
    if (lists := faiss.try_extract_index_ivf(index)) is not None:
        lists.make_direct_map()
    before, stored = index.search(Q, 70), faiss.serialize_index(index)
    assert (before[1][:, 60:] == -1).all()
    calls = [
        (lambda: add(X[:, :3], ids), AssertionError, "vectors of shape"),
        (lambda: add(nan, ids), (RuntimeError, ValueError), "not finite"),
        (lambda: add(nan * np.float32(np.inf), ids), (RuntimeError, ValueError), "not finite"),
        (lambda: index.search(Q[:, :3], 1), AssertionError, "vectors of shape"),
        (lambda: index.search(Q[0], 1), AssertionError, "vectors of shape"),
        (lambda: index.search(nan, 1), (RuntimeError, ValueError), "not finite"),
        (lambda: index.range_search(nan, 1.0), (RuntimeError, ValueError), "not finite"),
        (lambda: index.search(Q, 0), AssertionError, "k is 0"),
        (lambda: index.search(Q, -3), AssertionError, "k is -3"),
        (lambda: index.train(X[:, :3]), AssertionError, "vectors of shape"),
        (lambda: faiss.deserialize_index(stored[:-9]), (RuntimeError, FormatError), "ends there"),
    ]
    if not mapped or description.startswith("IDMap2"):
        calls.append((lambda: index.reconstruct(1000), RuntimeError, "in the index"))
    if mapped:
        calls.append((lambda: index.add_with_ids(X, ids[:5]), AssertionError, "ids of shape"))
    if isinstance(index, faiss.IndexIVF):
        calls += [
            (lambda: index.add_with_ids(X[:2], np.array([99, 7])), ValueError, "holding 7 twice or again"),
            (lambda: index.add_with_ids(X[:2], np.array([-1, 99])), ValueError, "holding -1"),
            (lambda: index.search(Q, 1, params=faiss.SearchParametersIVF(nprobe=0)), RuntimeError, "nprobe is 0"),
            (lambda: index.update_vectors(np.array([3, 99]), X[:2]), RuntimeError, "not all in the index"),
            (lambda: index.update_vectors(np.array([3, 4]), nan[58:]), (RuntimeError, ValueError), "not finite"),
            (lambda: index.update_vectors(np.array([3, 3]), X[:2]), RuntimeError, "not all in the index"),
        ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
        assert index.ntotal == 60 and np.array_equal(faiss.serialize_index(index), stored)
    assert all(np.array_equal(a, b) for a, b in zip(before, index.search(Q, 70), strict=True))


def test_refusals():
    index = faiss.index_factory(D, "IVF3,PQ2x4")
    for call, error in [
        (lambda: index.add(X), RuntimeError),
        (lambda: index.search(Q, 1), RuntimeError),
        (lambda: index.train(X[:, :3]), AssertionError),
        (lambda: faiss.index_factory(D, "HNSW32"), RuntimeError),
        (lambda: faiss.index_factory(D, "PQ3x4"), RuntimeError),
        (lambda: faiss.IndexFlatL2(D).add_with_ids(X, np.arange(60)), RuntimeError),
        (lambda: faiss.IndexIVFFlat(faiss.index_factory(D, "IVF2,Flat"), D, 3), NotImplementedError),
        (lambda: faiss.index_factory(D, "PQ2x4,Refine(PQ3x4)"), RuntimeError),
        (lambda: faiss.index_factory(D, "IVF3(HNSW),Flat"), RuntimeError),
        (lambda: faiss.IndexFlat(D, faiss.METRIC_Canberra), NotImplementedError),
        (lambda: faiss.IndexIVFFlat(faiss.IndexFlatL2(D + 1), D, 3), RuntimeError),
        (lambda: faiss.index_factory(D, "IDMap,Flat").add(X), RuntimeError),
        (lambda: faiss.IndexPQ(D, 2, 4, faiss.METRIC_L1), ValueError),
        (lambda: faiss.IndexPQFastScan(D, 2, 4, faiss.METRIC_L2, 40), RuntimeError),
        (lambda: faiss.IndexBinary(D), NotImplementedError),
        (lambda: faiss.IndexHNSW(faiss.IndexFlatL2(D)), NotImplementedError),
        (lambda: faiss.IndexScalarQuantizer(D, faiss.ScalarQuantizer.QT_4bit), RuntimeError),
        (lambda: faiss.pairwise_distances(X, X, 7), RuntimeError),
        (lambda: faiss.shard_ivf_index_centroids(index), RuntimeError),
    ]:
        with pytest.raises(error):
            call()
    assert index.ntotal == 0 and not index.is_trained


def test_what_is_not_there_is_not_ignored():
    lists = faiss.IndexIVFPQ(faiss.IndexFlatL2(D), D, 3, 2, 4)
    for index, name, value in [
        (lists, "quantizer_trains_alone", 2), (lists, "clustering_index", faiss.IndexFlatL2(D)),
        (lists.polysemous_training, "ntrain_permutation", 5),
    ]:  # fmt: skip
        setattr(index, name, getattr(index, name))
        with pytest.raises(NotImplementedError, match=f"{name} of {type(index).__name__} is"):
            setattr(index, name, value)


def test_what_is_no_array_of_numbers_is_named():
    index = faiss.IndexFlatL2(8)
    index.add(np.eye(8, dtype=np.float32))
    for given, message in [
        ([[1.0] * 8], "vectors are list, expected a numpy array"),
        (torch.eye(8).to_sparse(), "sparse"),
        (torch.empty(2, 8, device="meta"), "a meta tensor"),
        (np.ones((2, 8), np.complex64), "complex64"),
    ]:
        for call in (index.add, lambda x: index.search(x, 1)):
            with pytest.raises((TypeError, NotImplementedError), match=message):
                call(given)
    for k in (0, 1.5, "3", None):
        with pytest.raises(AssertionError, match="expected an integer from 1 on"):
            index.search(np.eye(8, dtype=np.float32), k)
    with pytest.raises(AssertionError, match=r"shape \(8, 3\), expected room for them, not \(8, 2\)"):
        index.search(np.eye(8, dtype=np.float32), 3, D=np.zeros((8, 2), np.float32))
    assert index.ntotal == 8


def test_float16_and_bfloat16_go_through_transforms():
    index = faiss.index_factory(8, "OPQ4,PQ4x4np,RFlat")
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    index.train(x)
    index.add(x)
    assert torch.equal(index.search(x[:5], 3)[1], index.search(x[:5].float(), 3)[1])
