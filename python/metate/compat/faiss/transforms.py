"""Linear transforms before an index."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from metate.compat.faiss.parameters import Only
from metate.compat.faiss.quantizer import ProductQuantizer, as_array, like, normalize_L2
from metate.op import below_autocast
from metate.search.training import train_rotation

Floats = npt.NDArray[np.float32]


class VectorTransform:
    """What all have: d_in, d_out, is_trained, train, apply, reverse_transform."""

    def __init__(self, d_in: int, d_out: int, is_trained: bool) -> None:
        self.d_in, self.d_out, self.is_trained = d_in, d_out, is_trained

    def train(self, x: Any) -> None:
        """Nothing to learn."""

    def apply(self, x: Any) -> Any:
        raise NotImplementedError

    def apply_py(self, x: Any) -> Any:
        return self.apply(x)

    def reverse_transform(self, x: Any) -> Any:
        raise NotImplementedError


class NormalizationTransform(VectorTransform):
    """x → x / |x|; zeros stay. Lengths do not come back."""

    norm = Only(2.0)

    def __init__(self, d: int, norm: float = 2.0) -> None:
        super().__init__(d, d, True)
        self.norm = norm

    def apply(self, x: Any) -> Any:
        unit = as_array(x).copy()
        normalize_L2(unit)
        return like(x, unit)

    def reverse_transform(self, x: Any) -> Any:
        return x


class LinearTransform(VectorTransform):
    """x → A x + b, A (d_out, d_in)."""

    def __init__(self, d_in: int, d_out: int, have_bias: bool = False, A: Floats | None = None) -> None:
        super().__init__(d_in, d_out, A is not None)
        self._A = np.zeros((d_out, d_in), np.float32) if A is None else A
        self.have_bias, self._b, self.is_orthonormal = have_bias, np.zeros(d_out, np.float32), False

    @property
    def A(self) -> Floats:
        """What is written into it is the matrix, once is_trained is set."""
        return self._A.reshape(-1)

    @property
    def b(self) -> Floats:
        return self._b if self.have_bias else self._b[:0]

    def set(self, A: Floats, b: Floats | None = None) -> None:
        """Numbers from elsewhere."""
        self._A, self.have_bias = as_array(A).reshape(self.d_out, self.d_in), b is not None
        self._b, self.is_trained = self._b if b is None else as_array(b), True

    def set_is_orthonormal(self) -> None:
        """Says in `is_orthonormal` whether rows have length 1 and are at right angles."""
        A = self._A.astype(np.float64)
        self.is_orthonormal = bool(np.abs(A @ A.T - np.eye(self.d_out)).max(initial=0) < 4e-5)

    def apply(self, x: Any) -> Any:
        """In float64, so that a row does not depend on how many rows come with it."""
        return like(x, (as_array(x).astype(np.float64) @ self._matrix().T + self._b).astype(np.float32))

    def reverse_transform(self, x: Any) -> Any:
        return like(
            x, ((as_array(x) - self._b).astype(np.float64) @ np.linalg.pinv(self._matrix()).T).astype(np.float32)
        )

    def _matrix(self) -> Floats:
        if not self.is_trained:
            raise RuntimeError(f"{type(self).__name__}: not trained; call train(x)")
        return self._A


class RandomRotationMatrix(LinearTransform):
    def __init__(self, d_in: int, d_out: int, seed: int = 12345) -> None:
        super().__init__(d_in, d_out)
        self.init(seed)

    def init(self, seed: int) -> None:
        normal = np.random.default_rng(seed).standard_normal((max(self.d_in, self.d_out),) * 2)
        self.set(np.linalg.qr(normal)[0][: self.d_out, : self.d_in])


class PCAMatrix(LinearTransform):
    """Onto the principal directions, each scaled by its eigenvalue to `eigen_power` (-0.5 whitens), turned at random if
    wanted. Eigenvalues are sums over the points, as faiss has them."""

    balanced_bins = Only(0)

    def __init__(self, d_in: int, d_out: int, eigen_power: float = 0.0, random_rotation: bool = False) -> None:
        super().__init__(d_in, d_out, True)
        if d_out > d_in:
            raise RuntimeError(f"PCAMatrix: d_out is {d_out}, expected at most d_in={d_in}")
        self.eigen_power, self.random_rotation, self.epsilon = eigen_power, random_rotation, 0.0
        self.max_points_per_d = 1000
        self.mean = self.eigenvalues = self.PCAMat = np.zeros(0, np.float32)

    def train(self, x: Any) -> None:
        points, most = as_array(x).astype(np.float64), self.max_points_per_d * self.d_in
        if len(points) > most:
            points = points[np.sort(np.random.default_rng(1234).choice(len(points), most, replace=False))]
        mean = points.mean(0)
        values, vectors = np.linalg.eigh((points - mean).T @ (points - mean))
        self.mean, self.eigenvalues = as_array(mean), as_array(values[::-1].clip(0))
        self.PCAMat = as_array(vectors.T[::-1]).reshape(-1)
        self.prepare_Ab()

    def prepare_Ab(self) -> None:
        """Makes A and b of what training found."""
        A = self.PCAMat.reshape(-1, self.d_in)[: self.d_out].astype(np.float64)
        if self.eigen_power:
            with np.errstate(divide="ignore", invalid="ignore"):
                A *= (self.eigenvalues[: self.d_out, None].astype(np.float64) + self.epsilon) ** self.eigen_power
        if not np.isfinite(A).all():
            raise RuntimeError("PCAMatrix: an eigenvalue is 0, expected more, or an epsilon that is")
        if self.random_rotation:
            A = RandomRotationMatrix(self.d_out, self.d_out, 5)._matrix() @ A
        self.set(as_array(A), as_array(-A @ self.mean))


class OPQMatrix(LinearTransform):
    """A trained rotation before product quantisation to M codes; to d2 <= d dimensions, the principal ones."""

    def __init__(self, d: int, M: int = 1, d2: int = -1) -> None:
        super().__init__(d, d if d2 == -1 else d2)
        if self.d_out > d or self.d_out % M:
            raise RuntimeError(f"OPQMatrix: d2 is {self.d_out}, expected a multiple of M={M} up to d={d}")
        self.M, self.niter, self.pq, self.verbose = M, 20, None, False
        self.max_train_points = 256 * 256

    def train(self, x: Any) -> None:
        points = torch.from_numpy(as_array(x))
        if len(points) > self.max_train_points:
            generator = torch.Generator("cpu").manual_seed(1234)
            points = points[torch.randperm(len(points), generator=generator, device="cpu")[: self.max_train_points]]
        project = torch.eye(self.d_in, dtype=torch.float32, device="cpu")
        if self.d_out < self.d_in:
            centred = (points - points.mean(0)).double()
            project = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, : self.d_out].T.float()
        quantizer: ProductQuantizer | None = self.pq
        bits = 8 if quantizer is None else quantizer.nbits
        bits = min(bits, max(4, len(points).bit_length() - 1))
        with below_autocast():
            self.set((train_rotation(points @ project.T, self.M, bits, 1234, self.niter) @ project).numpy())
