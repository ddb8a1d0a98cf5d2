"""Linear transforms before an index."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from metate.compat.faiss.quantizer import ProductQuantizer, as_array, like
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
            at = torch.randperm(len(points), generator=torch.Generator().manual_seed(1234))[: self.max_train_points]
            points = points[at]
        project = torch.eye(self.d_in)
        if self.d_out < self.d_in:
            centred = (points - points.mean(0)).double()
            project = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, : self.d_out].T.float()
        quantizer: ProductQuantizer | None = self.pq
        bits = 8 if quantizer is None else quantizer.nbits
        bits = min(bits, max(4, len(points).bit_length() - 1))
        self.set((train_rotation(points @ project.T, self.M, bits, 1234, self.niter) @ project).numpy())
