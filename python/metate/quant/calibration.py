"""What calibration remembers of a layer's inputs: their second moments and mean magnitudes, not the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from metate.errors import fail
from metate.quant.settings import in_own_dtypes


class Calibration:
    """Statistics of the inputs of one linear layer (or of several that share them), gathered batch by batch in float32.

    Raises TypeError or ValueError naming the argument, in `add` too.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        if type(in_features) is not int or in_features < 1:
            raise fail("Calibration", "in_features", repr(in_features), "an integer, 1 or more")
        self.count = 0
        self._moments = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._magnitudes = torch.zeros(in_features, dtype=torch.float32, device=device)

    @in_own_dtypes
    def add(self, x: Tensor) -> Calibration:
        """Inputs (…, in_features), floating."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise fail("Calibration.add", "x", got, "a floating-point tensor", error=TypeError)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise fail("Calibration.add", "x", f"shape {tuple(x.shape)}", f"(…, {self.in_features})")
        rows = x.detach().reshape(-1, self.in_features).float()
        self._moments.addmm_(rows.t(), rows)
        self._magnitudes += rows.abs().sum(0)
        self.count += rows.shape[0]
        return self

    @property
    def in_features(self) -> int:
        return self._magnitudes.numel()

    @property
    def hessian(self) -> Tensor:
        """E[x xᵀ], (K, K) float32: half the Hessian of the squared output error in a row of the weight."""
        return self._moments / max(1, self.count)

    @property
    def mean_magnitude(self) -> Tensor:
        """E|x|, (K)."""
        return self._magnitudes / max(1, self.count)

    @in_own_dtypes
    def output_error(self, difference: Tensor) -> float:
        """E ‖ΔW x‖², for a difference of two weights (N, K)."""
        delta = difference.float()
        return float(((delta @ self.hessian) * delta).sum())

    @property
    def finite(self) -> bool:
        """Whether no input was NaN or infinite."""
        return bool(torch.isfinite(self._moments).all())


def check_calibration(op: str, calibration: Calibration, weight: Tensor) -> None:
    """That it is one, of this weight's inputs."""
    if not isinstance(calibration, Calibration):
        expected = "a metate.quant.Calibration of the layer's inputs"
        raise fail(op, "calibration", type(calibration).__name__, expected, error=TypeError)
    if weight.dim() != 2 or weight.shape[1] != calibration.in_features:
        expected = f"(out_features, {calibration.in_features}) as calibrated"
        raise fail(op, "weight", f"shape {tuple(weight.shape)}", expected)
    if calibration.count == 0:
        raise fail(op, "calibration", "empty", "one that has seen inputs; call its add() first")
    if not calibration.finite:
        raise fail(op, "calibration", "not finite", "inputs without NaN or infinity")
