"""faiss' transforms of vectors, alone and before an index."""

import numpy as np
import pytest

from metate.compat import faiss

D = 8
X = np.random.default_rng(0).standard_normal((60, D)).astype(np.float32)


def test_transforms_tell_whether_they_turn():
    turn, stretch = faiss.RandomRotationMatrix(D, 3), faiss.LinearTransform(D, D)
    stretch.set(2 * np.eye(D, dtype=np.float32))
    for transform, expected in ((turn, True), (stretch, False)):
        transform.set_is_orthonormal()
        assert transform.is_orthonormal is expected


@pytest.mark.parametrize("description", ["PCA5,IVF3,Flat", "PCAW5,Flat", "PCAR5,Flat", "PCAWR5,PQ5x4"])
def test_principal_components(description, tmp_path):
    """Directions of falling variance, white where that is wanted; the same behind a file, trained or not."""
    x = X @ np.diag(np.arange(1, D + 1)).astype(np.float32) + 3
    index = faiss.clone_index(faiss.index_factory(D, description))
    index.train(x)
    index.add(x)
    pca, spread = index.chain.at(0), np.linalg.svd(x - x.mean(0))[1] ** 2
    assert isinstance(pca, faiss.PCAMatrix) and index.index.d == 5
    np.testing.assert_allclose(pca.eigenvalues, spread, rtol=1e-4)
    y = pca.apply(x).astype(np.float64)
    expected = np.ones(5) if "W" in description else spread[:5]
    if "R" in description:
        np.testing.assert_allclose(np.linalg.eigvalsh(y.T @ y)[::-1], expected, rtol=1e-4)
    else:
        np.testing.assert_allclose(y.T @ y, np.diag(expected), rtol=1e-4, atol=1e-3)
    if "W" not in description:
        np.testing.assert_allclose(pca.reverse_transform(y.astype(np.float32)).var(0).sum(), y.var(0).sum(), rtol=1e-4)
    faiss.write_index(index, str(tmp_path / "index"))
    again = faiss.read_index(str(tmp_path / "index"))
    assert all(np.array_equal(*pair) for pair in zip(index.search(x, 5), again.search(x, 5), strict=True))
    step = again.chain.at(0)
    assert (step.eigen_power, step.random_rotation) == (pca.eigen_power, pca.random_rotation)
    step.prepare_Ab()
    assert np.array_equal(step.A, pca.A) and np.array_equal(step.b, pca.b)


def test_whitening_wants_variance():
    pca = faiss.PCAMatrix(D, D, -0.5)
    with pytest.raises(RuntimeError, match="epsilon"):
        pca.train(np.zeros((4, D), np.float32))
    pca.epsilon = 1e-3
    pca.train(np.zeros((4, D), np.float32))
    assert np.isfinite(pca.apply(X)).all()
    with pytest.raises(RuntimeError, match="at most d_in=8"):
        faiss.PCAMatrix(D, D + 1)


def test_transforms_have_files(tmp_path):
    pca = faiss.PCAMatrix(D, 4)
    pca.train(X)
    for step in (pca, faiss.NormalizationTransform(D)):
        writer, reader = faiss.VectorIOWriter(), faiss.VectorIOReader()
        faiss.write_VectorTransform(step, writer)
        reader.data.swap(writer.data)
        faiss.write_VectorTransform(step, str(tmp_path / "step"))
        for again in (faiss.read_VectorTransform(reader), faiss.read_VectorTransform(str(tmp_path / "step"))):
            assert np.array_equal(again.apply(X), step.apply(X)) and again.d_out == step.d_out
    assert np.allclose(np.linalg.norm(again.apply(X), axis=1), 1) and not again.apply(np.zeros((2, D))).any()
    (tmp_path / "step").write_bytes(b"VNrm" + (tmp_path / "step").read_bytes()[4:8] + bytes(9))
    with pytest.raises(RuntimeError, match="d_in is 0"):
        faiss.read_VectorTransform(str(tmp_path / "step"))
