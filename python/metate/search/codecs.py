"""How vectors stand in rows, as they are, a byte a column or product-quantised, and how rows are scanned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metate import library
from metate.ops.pq import pq_decode, pq_distance_tables, pq_encode, pq_scan, topk_distances
from metate.search.interleaved import Column, Interleaved
from metate.search.training import train_codebooks

Model = Mapping[str, Tensor]
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "sq8": torch.int8}


@dataclass(frozen=True)
class Probe:
    """What a scan looks at: rows of `columns`, for each query the ranges with their biases, of all the kept ones."""

    columns: Mapping[str, Column]
    ranges: Tensor | None
    bias: Tensor | None
    ids: Tensor | None
    keep: Tensor | None
    k: int


@dataclass(frozen=True)
class Vectors:
    """Vectors in a float dtype, or "sq8": round((x - offset) / scale) in a byte, for the extremes of each column."""

    dim: int
    storage: str = "float32"
    name: str = "vectors"

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {self.name: ((self.dim,), STORED[self.storage])}

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what training finds."""
        return {f"{self.name}.{part}": (self.dim,) for part in ("scale", "offset")} if self.storage == "sq8" else {}

    @property
    def least(self) -> int:
        """Vectors that training needs."""
        return 1 if self.trained else 0

    def laid_out(self, columns: Mapping[str, Tensor]) -> dict[str, Column]:
        """Columns as scans read them fastest."""
        return dict(columns)

    def fit(self, x: Tensor, seed: int, tick: Callable[[], None], among: Tensor | None = None) -> dict[str, Tensor]:
        if not self.trained:
            return {}
        low, high = x.amin(0), x.amax(0)
        scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
        return {f"{self.name}.scale": scale, f"{self.name}.offset": low + 128 * scale}

    def encode(self, model: Model, x: Tensor) -> dict[str, Tensor]:
        if self.storage == "sq8":
            levels = (x - model[f"{self.name}.offset"]) / model[f"{self.name}.scale"]
            x = levels.round_().clamp_(-128, 127)
        return {self.name: x.to(STORED[self.storage])}

    def decode(self, model: Model, columns: Mapping[str, Tensor]) -> Tensor:
        x = columns[self.name].float()
        if self.storage == "sq8":
            x = x * model[f"{self.name}.scale"] + model[f"{self.name}.offset"]
        return x

    def stored(self, model: Model, columns: Mapping[str, Column]) -> tuple[Tensor | None, ...]:
        """What `ivf_search` is told of rows: rows, codebooks, row_bias, scale, offset."""
        base = columns[self.name]
        assert isinstance(base, Tensor)
        return base, None, None, model.get(f"{self.name}.scale"), model.get(f"{self.name}.offset")

    def scan(self, model: Model, queries: Tensor, probe: Probe, metric: str) -> tuple[Tensor, Tensor]:
        base = probe.columns[self.name]
        assert isinstance(base, Tensor)
        return topk_distances(
            queries, base, probe.k, metric=metric, ranges=probe.ranges, ids=probe.ids,
            keep=probe.keep, scale=model.get(f"{self.name}.scale"), offset=model.get(f"{self.name}.offset"),
        )  # fmt: skip


@dataclass(frozen=True)
class Product:
    """M sub-codes of `bits`; with `residual`, of what is left of a vector when the centroid of its list is subtracted.

    Squared distances to c + r, where r is decoded, are |q - c|² + (|r|² + 2 c·r) - 2 q·r: the first belongs to the
    probed list, the second to the row (column "bias"), and the third needs tables of the query alone.
    """

    dim: int
    M: int
    bits: int
    residual: bool = False
    row_bias: bool = False

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": (((self.M * self.bits + 7) // 8,), torch.uint8)
        }
        if self.row_bias:
            found["bias"] = (), torch.float32
        return found

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        return {"codebooks": (self.M, 1 << self.bits, self.dim // self.M)}

    @property
    def least(self) -> int:
        return 1 << self.bits

    def laid_out(self, columns: Mapping[str, Tensor]) -> dict[str, Column]:
        """Columns as scans read them fastest."""
        if self.bits not in (4, 8):
            return dict(columns)
        return {**columns, "codes": Interleaved.of(columns["codes"], self.M, self.bits)}

    def fit(self, x: Tensor, seed: int, tick: Callable[[], None], among: Tensor | None = None) -> dict[str, Tensor]:
        """`among`: where the vectors lie, if errors are to be small where they are close; x may be their residuals."""
        return {"codebooks": train_codebooks(x, self.M, self.bits, seed, tick=tick, among=among)}

    def encode(self, model: Model, x: Tensor, centroids: Tensor | None = None) -> dict[str, Tensor]:
        """Of vectors, or of residuals with the centroids that were subtracted."""
        columns = {"codes": pq_encode(x, model["codebooks"])}
        if self.row_bias:
            columns["bias"] = self.bias(model, columns["codes"], centroids)
        return columns

    def bias(self, model: Model, codes: Tensor, centroids: Tensor | None) -> Tensor:
        assert centroids is not None
        r = pq_decode(codes, model["codebooks"])
        bias = torch.empty(len(codes), dtype=torch.float32, device=codes.device)
        if codes.device.type == "cpu" and library.row_bias(r.numpy(), centroids.contiguous().numpy(), bias.numpy()):
            return bias
        return (r.double() * (r.double() + 2 * centroids.double())).sum(1).float()

    def decode(self, model: Model, columns: Mapping[str, Tensor]) -> Tensor:
        return pq_decode(columns["codes"], model["codebooks"])

    def stored(self, model: Model, columns: Mapping[str, Column]) -> tuple[Tensor | None, ...]:
        """What `ivf_search` is told of rows: rows, codebooks, row_bias, scale, offset."""
        codes, row_bias = columns["codes"], columns.get("bias")
        assert row_bias is None or isinstance(row_bias, Tensor)
        return codes.blocks if isinstance(codes, Interleaved) else codes, model["codebooks"], row_bias, None, None

    def scan(self, model: Model, queries: Tensor, probe: Probe, metric: str) -> tuple[Tensor, Tensor]:
        codes, codebooks, row_bias, *_ = self.stored(model, probe.columns)
        assert codes is not None and codebooks is not None
        product = metric == "inner_product" or self.row_bias
        asked = queries.mul(-2) if self.row_bias else queries
        tables = pq_distance_tables(asked, codebooks, metric="inner_product" if product else "l2")
        return pq_scan(
            tables, codes, probe.k, n=len(probe.columns["codes"]), ranges=probe.ranges, bias=probe.bias,
            row_bias=row_bias, ids=probe.ids, keep=probe.keep, largest=metric == "inner_product",
        )  # fmt: skip
