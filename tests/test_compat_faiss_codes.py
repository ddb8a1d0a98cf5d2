"""metate.compat.faiss where codes alone are searched, their order, metrics set late, and faiss' random numbers."""

import numpy as np
import pytest
import torch

from metate import FormatError
from metate.compat import faiss
from metate.search import read_faiss

D = 8
RANDOM = np.random.default_rng(0)
X, Q = (RANDOM.standard_normal((n, D)).astype(np.float32) for n in (60, 5))


def test_searches_by_codes(tmp_path):
    random = np.random.default_rng(3)
    x, q = (random.standard_normal((n, 16)).astype(np.float32) for n in (600, 7))
    index = faiss.index_factory(16, "PQ2")
    assert index.do_polysemous_training
    index.train(x)
    index.add(x)
    rows, own = index.sa_encode(x)[None], index.sa_encode(q)[:, None]
    bits, numbers = np.unpackbits(rows ^ own, axis=2).sum(2), (rows != own).sum(2)
    decoded = index.sa_decode(index.sa_encode(q))
    symmetric = np.square(decoded[:, None] - index.reconstruct_n()).sum(2)
    full = np.square(q[:, None] - index.reconstruct_n()).sum(2)
    for kind, wanted in [
        (index.ST_HE, bits), (index.ST_generalized_HE, numbers), (index.ST_SDC, symmetric),
        (index.ST_polysemous, np.where(bits < 5, full, np.inf)),
        (index.ST_polysemous_generalize, np.where(numbers < 2, full, np.inf)),
    ]:  # fmt: skip
        index.search_type, index.polysemous_ht = kind, 5 if kind == index.ST_polysemous else 2
        faiss.cvar.indexPQ_stats.reset()
        faiss.write_index(index, str(tmp_path / "index"))
        for each in (index, faiss.read_index(str(tmp_path / "index"))):
            distances, ids = each.search(q, 30)
            best = np.sort(wanted, 1)[:, :30].astype(np.float64)
            there = np.isfinite(best)
            assert np.array_equal(ids >= 0, there)
            np.testing.assert_allclose(distances[there], best[there], rtol=1e-5)
            np.testing.assert_allclose(np.take_along_axis(wanted, ids, 1)[there], best[there], rtol=1e-5)
        stats = faiss.cvar.indexPQ_stats
        assert (stats.nq, stats.ncode) == (14, 14 * 600)
        assert kind != index.ST_polysemous or stats.n_hamming_pass == 2 * (bits < 5).sum() > 0
    with pytest.raises(FormatError, match="search_type"):
        read_faiss(tmp_path / "index")
    params = faiss.SearchParametersPQ(search_type=faiss.IndexPQ.ST_PQ)
    np.testing.assert_allclose(index.search(q, 30, params=params)[0], np.sort(full, 1)[:, :30], rtol=1e-4)
    with pytest.raises(RuntimeError, match="search_type is 9"):
        index.search(q, 1, params=faiss.SearchParametersPQ(search_type=9))
    signs = faiss.IndexPQ(16, 2, 8)
    signs.train(x)
    signs.add(x)
    signs.search_type, signs.encode_signs = signs.ST_HE, True
    codes = np.packbits(q > 0, axis=1, bitorder="little")[:, None]
    bits = np.unpackbits(codes ^ signs.sa_encode(x), axis=2).sum(2)
    assert np.array_equal(signs.search(q, 9)[0], np.sort(bits, 1)[:, :9])


def test_metric_is_set_before_training():
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(D), D, 3, 2, 4)
    index.metric_type, index.nprobe = faiss.METRIC_INNER_PRODUCT, 3
    index.train(X)
    index.add(X)
    products = np.sort(Q @ index.reconstruct_n().T, 1)[:, ::-1]
    np.testing.assert_allclose(index.search(Q, 9)[0], products[:, :9], rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="metric_type is set after training"):
        index.metric_type = faiss.METRIC_L2
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT


def test_polysemous_order_makes_bits_follow_distances():
    x = np.random.default_rng(0).standard_normal((3000, 4)).astype(np.float32)
    found, centroids = {}, {}
    bits = np.unpackbits((np.arange(64)[:, None] ^ np.arange(64)).astype(np.uint8)[..., None], axis=2).sum(2)
    for ordered in (False, True):
        index = faiss.IndexPQ(4, 2, 6)
        index.do_polysemous_training = ordered
        index.train(x)
        index.pq.compute_sdc_table()
        gaps = index.pq.sdc_table.reshape(2, 64, 64)
        found[ordered] = [np.corrcoef(bits.ravel(), each.ravel())[0, 1] for each in gaps]
        centroids[ordered] = np.sort(index.pq.centroids)
    assert min(found[True]) > max(found[False]) + 0.2
    assert np.array_equal(centroids[True], centroids[False])
    index.polysemous_training.max_memory = 1 << 17
    with pytest.raises(RuntimeError, match="max_memory"):
        index.train(x)


def test_random_numbers_are_those_of_faiss():
    """Its 1.15.1 made these."""
    np.testing.assert_array_equal(
        faiss.rand(3), np.float32([0.7639309167861938, 0.00015837955288589, 0.6090386509895325])
    )
    np.testing.assert_allclose(
        faiss.randn((1, 3)), [[0.10883748531341553, -0.45931801199913025, 0.75157231092453]], rtol=1e-6
    )
    np.testing.assert_array_equal(faiss.randint(3, vmax=1000), [24, 17, 390])
    np.testing.assert_allclose(faiss.randn(5000, 7)[-2:], [-0.460519939661026, 1.1069608926773071], rtol=1e-6)


def test_codes_set_by_hand():
    trained = faiss.index_factory(D, "PQ4x4np")
    trained.train(X)
    trained.add(X)
    made = faiss.IndexPQ(D, 4, 4)
    made.pq, made.is_trained = trained.pq, True
    made.codes = faiss.MaybeOwnedVectorUInt8(trained.codes)
    made.ntotal = len(X)
    assert all(np.array_equal(a, b) for a, b in zip(made.search(Q, 7), trained.search(Q, 7), strict=True))
    packer = made.get_CodePacker()
    blocks = faiss.AlignedTable_to_array(made.codes).reshape(-1, packer.block_size)
    assert np.array_equal(packer.unpack_1(blocks, 41), trained.sa_encode(X[41:42])[0])
    with pytest.raises(RuntimeError, match="ntotal is set to 61, expected 60"):
        made.ntotal = 61
    with pytest.raises(ValueError, match="reshape"):
        made.codes = np.zeros(3, np.uint8)
    assert made.ntotal == 60


@pytest.mark.parametrize("kind", ["IVF4,PQ4x4np", "IVF4,SQ8"])
def test_codes_are_of_residuals_or_not_as_the_index_is_told(kind):
    index = faiss.index_factory(D, kind)
    index.train(X)
    index.add_with_ids(X, np.arange(60)[::-1] + 100)
    before, index.nprobe = index.search(Q, 5), 1
    index.by_residual = not index.by_residual
    bare = index.sa_decode(index.sa_encode(X))  # codes now of x, or of x - c
    assert np.square(bare - X).sum() < np.square(X).sum()
    whole, lists = index.search(Q, 60, params=faiss.SearchParametersIVF(nprobe=4)), index.invlists
    assert sorted(whole[1][0]) == list(range(100, 160)) and sum(map(lists.list_size, range(4))) == 60
    assert [len(codes) for codes in lists.codes] == [lists.list_size(i) * lists.code_size for i in range(4)]
    index.by_residual = not index.by_residual
    assert all(np.array_equal(a, b) for a, b in zip(index.search(Q, 5), before, strict=True))


def test_attributes_of_what_is_within_are_refused_around_it():
    index = faiss.index_factory(D, "OPQ4,IVF4,PQ4x4np")
    for name in ("nprobe", "nlist"):
        with pytest.raises(AttributeError, match=f"IndexPreTransform has no {name}"):
            setattr(index, name, 2)
    index.verbose = True
    faiss.extract_index_ivf(index).nprobe = 2
    assert index.verbose and index.index.nprobe == 2


@pytest.mark.parametrize("kind", ["RFlat", "Refine(SQ8)", "Refine(PQ8x8)"])
@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_refined_searches_rank_candidates_by_their_full_vectors(kind, metric):
    x = RANDOM.standard_normal((400, D)).astype(np.float32)
    index = faiss.index_factory(D, f"PQ4x4np,{kind}", metric)
    index.train(x)
    index.add(x)
    index.k_factor = 3
    candidates, full = index.base_index.search(Q, 15)[1], index.refine_index.reconstruct_n().astype(np.float64)
    gaps = Q[:, None].astype(np.float64) - full
    distances = np.square(gaps).sum(2) if metric == faiss.METRIC_L2 else -(Q.astype(np.float64) @ full.T)
    chosen = np.take_along_axis(distances, candidates, 1)
    order = np.argsort(chosen, 1)[:, :5]
    found = index.search(Q, 5)
    assert np.array_equal(found[1], np.take_along_axis(candidates, order, 1))
    sign = 1 if metric == faiss.METRIC_L2 else -1
    np.testing.assert_allclose(found[0], sign * np.take_along_axis(chosen, order, 1), rtol=1e-5, atol=1e-5)
    assert (index.search(Q, 500)[1][:, 400:] == -1).all()


def test_vectors_of_numbers():
    numbers = faiss.Int64Vector()
    for i in range(3):
        numbers.push_back(i)
    array = faiss.vector_to_array(numbers)
    assert array.dtype == np.int64 and array.tolist() == [0, 1, 2] and (numbers.size(), numbers.at(2)) == (3, 2)
    floats = faiss.Float32Vector(2)
    faiss.copy_array_to_vector(np.array([1.5, 2, 3]), floats)
    floats.resize(4)
    assert faiss.vector_to_array(floats).tolist() == [1.5, 2, 3, 0] and floats.at(0).dtype == np.float32
    index = faiss.IndexIDMap2(faiss.IndexFlatL2(D))
    index.add_with_ids(X[:3], np.array([7, 5, 9]))
    assert [index.id_map.at(i) for i in range(3)] == [7, 5, 9]
    assert faiss.rand_smooth_vectors(4, 6).shape == (4, 6)


def test_tensors_in_tensors_out():
    index = faiss.index_factory(D, "PQ4x4np")
    index.train(X)
    index.add(X)
    x = torch.from_numpy(X[:9])
    codes = index.sa_encode(x)
    assert torch.equal(codes, torch.from_numpy(index.sa_encode(X[:9])))
    assert torch.equal(index.sa_decode(codes), torch.from_numpy(index.sa_decode(codes.numpy())))
    assert all(isinstance(found, torch.Tensor) for found in faiss.knn(x, x, 2))
    given = torch.zeros(9, 2), torch.zeros(9, 2, dtype=torch.int64), torch.zeros(9, 2, D)
    found = index.search_and_reconstruct(x, 2, *given)
    assert all(a is b for a, b in zip(found, given, strict=True)) and torch.equal(
        found[2][:, 0], index.sa_decode(codes)
    )


def test_a_range_search_that_ends_early_counts_the_lists_it_looked_into():
    index = faiss.index_factory(D, "IVF8,Flat")
    index.train(X)
    index.add(X)
    nothing, stats = faiss.IDSelectorBatch(np.array([], np.int64)), faiss.cvar.indexIVF_stats
    for most, lists in ((0, 4), (2, 2)):
        stats.reset()
        params = faiss.SearchParametersIVF(nprobe=4, max_empty_result_buckets=most, sel=nothing)
        assert index.range_search(Q[:1], 1.0, params=params)[0][-1] == 0 and stats.nlist == lists
