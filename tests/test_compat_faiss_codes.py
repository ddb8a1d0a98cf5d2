"""metate.compat.faiss where codes alone are searched, their order, metrics set late, and faiss' random numbers."""

import numpy as np
import pytest

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
