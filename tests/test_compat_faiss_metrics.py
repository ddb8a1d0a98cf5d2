"""faiss' other metrics, codes of few bits, two layers, centroids in shards, maps from ids, and ids of one's own while
others search."""

import threading

import numpy as np
import pytest
from test_compat_faiss import D, Q, X, with_map

from metate.compat import faiss

RANDOM = np.random.default_rng(5)
METRICS = {faiss.METRIC_L1: lambda gap: np.abs(gap).sum(-1), faiss.METRIC_Linf: lambda gap: np.abs(gap).max(-1)}


def plain(metric, x, y):
    return METRICS[metric](np.float64(x)[:, None] - y).astype(np.float32)


@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("description", ["Flat", "IVF4,Flat", "IDMap2,Flat", "SQ8,RFlat", "PCA4,Flat"])
def test_other_metrics(metric, description):
    index, ids = faiss.index_factory(D, description, metric), np.arange(60)
    assert index.metric_type == metric
    index.train(X)
    index.add_with_ids(X, ids) if "IDMap" in description else index.add(X)
    if "IVF" in description:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", 4)
    if "RFlat" in description:
        index.k_factor = 60
    base, queries = (index.apply_py(v) if "PCA" in description else v for v in (X, Q))
    truth = plain(metric, queries, base)
    for one in (index, faiss.clone_index(index)):
        distances, found = one.search(Q, 9)
        assert one.metric_type == metric and np.array_equal(found, truth.argsort(1, kind="stable")[:, :9])
        assert np.array_equal(distances, np.sort(truth, 1)[:, :9])
        if "RFlat" not in description:
            lims, near, _ = one.range_search(Q, float(np.median(truth)))
            assert np.array_equal(np.diff(lims), (truth < np.median(truth)).sum(1)) and near.max() < np.median(truth)


def test_lists_by_l2_with_vectors_by_l1():
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(D), D, 4, faiss.METRIC_L1)
    index.train(X)
    index.add(X)
    index.nprobe, home = 2, np.square(X[:, None] - index.quantizer.reconstruct_n()).sum(2).argmin(1)
    truth, probed = plain(faiss.METRIC_L1, Q, X), index.quantizer.assign(Q, 2)
    truth[~(home == probed[:, :, None]).any(1)] = np.inf
    distances, found = faiss.clone_index(index).search(Q, 5)
    assert np.array_equal(distances, np.sort(truth, 1)[:, :5])
    assert np.array_equal(found, truth.argsort(1, kind="stable")[:, :5])


def test_distances_by_every_metric():
    x, y = RANDOM.random((5, 6)).astype(np.float32), RANDOM.random((3, 6)).astype(np.float32)
    a, b = np.float64(x)[:, None], np.float64(y)
    middle = (a + b) / 2
    expected = {
        faiss.METRIC_L2: ((a - b) ** 2).sum(2), faiss.METRIC_INNER_PRODUCT: a[:, 0] @ b.T,
        faiss.METRIC_Canberra: (np.abs(a - b) / (a + b)).sum(2),
        faiss.METRIC_BrayCurtis: np.abs(a - b).sum(2) / (a + b).sum(2),
        faiss.METRIC_JensenShannon: (a * np.log(a / middle) + b * np.log(b / middle)).sum(2) / 2,
        faiss.METRIC_Jaccard: np.minimum(a, b).sum(2) / np.maximum(a, b).sum(2),
        faiss.METRIC_NaNEuclidean: ((a - b) ** 2).sum(2), faiss.METRIC_GOWER: np.abs(a - b).mean(2),
    }  # fmt: skip
    for metric, truth in expected.items():
        np.testing.assert_allclose(faiss.pairwise_distances(x, y, metric), truth, rtol=1e-5)
    cubes = faiss.pairwise_distances(x, y, faiss.METRIC_Lp, 3)
    np.testing.assert_allclose(cubes, (np.abs(a - b) ** 3).sum(2), rtol=1e-5)
    assert faiss.pairwise_distances([[3, np.nan]], [[1, 7]], faiss.METRIC_NaNEuclidean) == 8
    assert np.isnan(faiss.pairwise_distances([[np.nan]], [[1]], faiss.METRIC_NaNEuclidean))
    named = faiss.pairwise_distances([[0.5, -1, np.nan]], [[0.25, -2, 1], [0.5, 0.5, 1]], faiss.METRIC_GOWER)
    assert named[0, 0] == 0.625 and np.isnan(named[0, 1])
    assert [faiss.is_similarity_metric(m) for m in (0, 1, 2, 23)] == [True, False, False, True]


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("make", ["PQ4x{}np", "IVF4,PQ4x{}np", "IDMap2,PQ4x{}np"])
def test_few_bits(make, bits):
    index, ids = faiss.index_factory(D, make.format(bits)), np.arange(60)
    index.train(X)
    index.add_with_ids(X, ids) if "IDMap" in make else index.add(X)
    if "IVF" in make:
        index.nprobe = 4
    decoded = with_map(index).reconstruct_batch(ids)
    codes = index.sa_encode(X)
    assert codes.shape[1] == -(-4 * bits // 8) + ("IVF" in make)
    np.testing.assert_allclose(index.sa_decode(codes), decoded, atol=1e-6)
    truth = np.sort(((Q[:, None] - decoded) ** 2).sum(2), 1)[:, :7]
    for one in (index, faiss.clone_index(index)):
        np.testing.assert_allclose(one.search(Q, 7)[0], truth, rtol=1e-4, atol=1e-5)


def test_two_layers():
    lists = faiss.index_factory(D, "IVF6,PQ4x3np")
    layers = faiss.index_factory(D, "Residual6,PQ4x3")
    for index in (lists, layers):
        index.train(X)
        index.add(X)
    for one in (layers, faiss.clone_index(layers)):
        assert one.ntotal == 60 and np.array_equal(one.reconstruct_n(), lists.reconstruct_n())
        assert np.array_equal(one.sa_encode(X), lists.sa_encode(X))
        assert np.array_equal(one.codes.reshape(60, -1), lists.sa_encode(X))
        with pytest.raises(RuntimeError, match="search is not there"):
            one.search(Q, 1)
    empty = faiss.clone_index(faiss.Index2Layer(faiss.IndexFlatL2(D), 6, 4, 3))
    assert not empty.is_trained and empty.ntotal == 0


def test_centroids_in_shards(tmp_path):
    index, template = faiss.index_factory(D, "IVF9,Flat"), str(tmp_path / "%d.index")
    index.train(X)
    with pytest.raises(RuntimeError, match="lists keep their numbers"):
        faiss.shard_ivf_index_centroids(index, 2, template)
    faiss.shard_ivf_index_centroids(index, 3, template, lambda number, count: number * 7 % count, True)
    centroids = index.quantizer.reconstruct_n()
    for shard in range(3):
        part = faiss.read_index(template % shard)
        own = np.flatnonzero(np.arange(9) * 7 % 3 == shard)
        assert np.array_equal(part.quantizer.id_map, own) and part.nlist == 9 and part.is_trained
        assert np.array_equal(part.quantizer.reconstruct(int(own[1])), centroids[own[1]])
        home = own[((X[:, None] - centroids[own]) ** 2).sum(2).argmin(1)]
        part.add(X)
        assert all(np.array_equal(part.invlists.get_ids(i), np.flatnonzero(home == i)) for i in range(9))
        part.nprobe = 9
        distances, ids = part.search(Q, 60)
        assert (np.sort(ids, 1) == np.arange(60)).all()
        np.testing.assert_allclose(np.sort(((Q[:, None] - X) ** 2).sum(2), 1), distances, rtol=1e-5)
    blank = faiss.IndexIVFFlat(faiss.IndexFlatL2(D), D, 9)
    blank.quantizer.add(X)
    faiss.shard_ivf_index_centroids(blank, 4, template)
    assert np.array_equal(faiss.read_index(template % 1).quantizer.reconstruct_n(), X[1::4])


@pytest.mark.parametrize("ids", [np.arange(60), np.arange(60) * 3])
@pytest.mark.parametrize("kind", [faiss.DirectMap.Array, faiss.DirectMap.Hashtable])
def test_direct_maps_stay_in_files(ids, kind):
    index = faiss.index_factory(D, "IVF4,Flat")
    index.train(X)
    index.add_with_ids(X, ids)
    for one in (index, faiss.clone_index(index)):
        with pytest.raises(RuntimeError, match="direct map not initialized"):
            one.reconstruct_batch(ids[:2])
        assert one.search_and_reconstruct(X[:1], 1)[2].shape == (1, 1, D)
    index.set_direct_map_type(kind)
    again = faiss.clone_index(index)
    assert np.array_equal(again.reconstruct_batch(ids), X) and not again.direct_map.no()
    again.make_direct_map(False)
    with pytest.raises(RuntimeError, match="direct map not initialized"):
        again.reconstruct(0)
    with pytest.raises(RuntimeError, match="type is 3"):
        again.set_direct_map_type(3)


@pytest.mark.parametrize("description", ["IDMap2,Flat", "IDMap2,PQ4x4np,RFlat"])
def test_ids_of_ones_own_stay_with_their_vectors_while_others_search(description):
    """Removals move vectors: what a search beside them finds are ids of the vectors whose distances it says."""
    index, stop, faults = faiss.index_factory(D, description), threading.Event(), []
    x = RANDOM.standard_normal((400, D)).astype(np.float32)
    index.train(x)
    removable = "RFlat" not in description
    index.add_with_ids(x[:200], np.arange(200))

    def write():
        random = np.random.default_rng(0)
        while not stop.is_set():
            gone = random.permutation(400)[:100]
            if removable:
                index.remove_ids(gone)
                index.add_with_ids(x[gone], gone)
            elif index.ntotal > 5000:
                index.reset()
            else:
                index.add_with_ids(x[gone], gone)

    def read(number):
        random, searches = np.random.default_rng(number), 0
        while not stop.is_set() or not searches:
            at = random.integers(0, 400, 4)
            distances, ids = index.search(x[at], 5)
            truth = np.square(x[at][:, None] - x[ids]).sum(2)
            assert np.allclose(distances[ids >= 0], truth[ids >= 0], rtol=1e-4, atol=1e-4)
            searches += 1

    def guarded(work, *given):
        try:
            work(*given)
        except Exception as error:
            faults.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(write,))]
    threads += [threading.Thread(target=guarded, args=(read, number)) for number in range(3)]
    for thread in threads:
        thread.start()
    stop.wait(2)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not faults, faults[0]


def test_lists_that_are_chosen_and_filled_by_hand():
    """As faiss' contrib modules do it."""
    index = faiss.index_factory(D, "IVF4,PQ4x4np")
    index.train(X)
    lists, ids = RANDOM.integers(-1, 4, 60), np.arange(60) * 2
    index.add_core(60, faiss.swig_ptr(X), faiss.swig_ptr(ids), faiss.swig_ptr(lists))
    assert all(np.array_equal(index.invlists.get_ids(i), ids[lists == i]) for i in range(4))
    assert index.invlists.code_size == 2 and index.ntotal == (lists >= 0).sum()
    near, probed = index.quantizer.search(Q, 3)
    result = faiss.RangeSearchResult(5)
    index.range_search_preassigned_c(5, faiss.swig_ptr(Q), 7.0, probed, near, result)
    expected = index.range_search_preassigned(Q, 7.0, probed, near)
    total = int(faiss.rev_swig_ptr(result.lims, 6)[-1])
    assert total == len(expected[1]) and np.array_equal(faiss.rev_swig_ptr(result.labels, total), expected[2])
    index.parallel_mode |= index.PARALLEL_MODE_NO_HEAP_INIT
    heap, whole = faiss.ResultHeap(5, 6), index.search_preassigned(Q, 6, probed, near)
    for column in range(3):
        alone = np.full_like(probed, -1)
        alone[:, column] = probed[:, column]
        index.search_preassigned(Q, 6, alone, near, D=heap.D, I=heap.I)
    assert np.array_equal(heap.I, whole[1]) and np.array_equal(heap.D, whole[0])
    table = RANDOM.integers(0, 7, (9, 5))
    rows = table.copy()
    lims = faiss.matrix_bucket_sort_inplace(rows, nbucket=8)
    places, order = faiss.bucket_sort(table)
    for b in range(7):
        assert sorted(rows.ravel()[lims[b] : lims[b + 1]]) == sorted(np.nonzero(table == b)[0])
        assert (table.ravel()[order[places[b] : places[b + 1]]] == b).all()
    copy = np.zeros(9, np.int64)
    faiss.memcpy(copy, ids, 5 * 8)
    assert copy.tolist() == [0, 2, 4, 6, 8, 0, 0, 0, 0] and faiss.get_num_gpus() == 0
