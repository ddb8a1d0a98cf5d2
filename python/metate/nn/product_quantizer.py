"""ProductQuantizer: codebooks that learn end to end, with the operators that search with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metate.errors import fail, require_choice, require_dense
from metate.ops.pq import pq_decode, pq_distance_tables, pq_encode
from metate.ops.pq.codes import LEAST_BITS, MOST_BITS
from metate.ops.pq.kmeans import fit_centroids
from metate.scalars import is_whole, plain

ASSIGNMENTS = ("straight-through", "soft")


class ProductQuantizer(nn.Module):
    """Vectors become the nearest of 2**bits learnt centroids, in each of M parts by itself (Jégou et al. 2011).

    Args:
        dim: of a vector, a multiple of M.
        M: parts.
        bits: of a code, 1 to 16.
        assignment: how gradients pass. "straight-through": the result is what the codes decode to; the gradient reaches
            the centroids chosen, and x as if nothing had been done (Bengio et al. 2013). "soft": a mean of centroids
            weighted by softmax(-squared distance / temperature), with its own gradients (Agustsson et al. 2017); in
            evaluation mode what the codes decode to.
        temperature: of "soft"; may be lowered while training.

    `codebooks` (M, 2**bits, dim / M) begin at random, or by k-means with `fit`. An index of metate.search takes them by
    `index.set_trained({"codebooks": quantizer.codebooks})`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """

    def __init__(
        self, dim: int, M: int, bits: int = 8, *, assignment: str = "straight-through", temperature: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        op = "nn.ProductQuantizer"
        dim, M, bits = plain(dim), plain(M), plain(bits)
        if not is_whole(M, 1) or not is_whole(dim, 1) or dim % M:
            raise fail(op, "M", M, f"a divisor of dim, {dim}")
        if not is_whole(bits, LEAST_BITS, MOST_BITS):
            raise fail(op, "bits", bits, f"{LEAST_BITS} to {MOST_BITS}")
        require_choice(op, "assignment", assignment, ASSIGNMENTS)
        if not temperature > 0:
            raise fail(op, "temperature", temperature, "above 0")
        self.dim, self.M, self.bits = dim, M, bits
        self.assignment, self.temperature = assignment, temperature
        self.codebooks = nn.Parameter(torch.empty(M, 1 << bits, dim // M, dtype=torch.float32, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.codebooks, std=self.dim**-0.5)

    @torch.no_grad()
    def fit(self, x: Tensor, iterations: int = 25, seed: int = 0) -> None:
        """Codebooks by k-means of the parts of x (…, dim), at least 2**bits vectors."""
        for m, part in enumerate(self._rows(x).split(self.dim // self.M, 1)):
            books, _ = fit_centroids(part.contiguous(), 1 << self.bits, iterations=iterations, seed=seed + m)
            self.codebooks[m] = books

    def forward(self, x: Tensor) -> Tensor:
        """x (…, dim), quantised."""
        rows = self._rows(x)
        if self.assignment == "soft" and self.training:
            distances = pq_distance_tables(rows, self._books)
            weights = torch.softmax(distances / -self.temperature, 2)
            out = torch.einsum("nml,mld->nmd", weights, self._books).flatten(1)
        else:
            out = pq_decode(self.encode(rows), self._books)
            out = out + (rows - rows.detach())  # adds zeros, and a path for the gradient
        return out.view(x.shape).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The packed codes (…, ⌈M·bits/8⌉), uint8."""
        codes = pq_encode(self._rows(x), self._books)
        return codes.view(*x.shape[:-1], codes.shape[1])

    def decode(self, codes: Tensor) -> Tensor:
        """The vectors (…, dim) of codes."""
        return pq_decode(codes.reshape(-1, codes.shape[-1]), self._books).view(*codes.shape[:-1], self.dim)

    def loss(self, x: Tensor, commitment: float = 0.25) -> Tensor:
        """How far centroids are from x, and, `commitment` times, x from its centroids (van den Oord et al. 2017)."""
        rows = self._rows(x)
        nearest = pq_decode(self.encode(rows), self._books)
        return F.mse_loss(nearest, rows.detach()) + commitment * F.mse_loss(rows, nearest.detach())

    @property
    def _books(self) -> Tensor:
        """The codebooks in float32, in which codes are chosen whatever the module was moved to."""
        return self.codebooks.float()

    def _rows(self, x: Tensor) -> Tensor:
        require_dense("nn.ProductQuantizer", "x", x)
        if not x.dim() or x.shape[-1] != self.dim:
            raise fail("nn.ProductQuantizer", "x", f"of shape {tuple(x.shape)}", f"(…, {self.dim})")
        return x.reshape(-1, self.dim).float()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, M={self.M}, bits={self.bits}, assignment={self.assignment!r}"
