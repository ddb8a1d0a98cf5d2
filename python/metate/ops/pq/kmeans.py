"""Lloyd's k-means (Lloyd 1982), begun by sampling or by k-means++ (Arthur and Vassilvitskii 2007)."""

from __future__ import annotations

import torch
from torch import Tensor

from metate.errors import fail, require_dense
from metate.library import add_to_clusters
from metate.ops.pq.codes import bits_of, unpack_codes
from metate.ops.pq.declaration import encode_op, topk_op
from metate.scalars import is_whole, plain

_PER_CANDIDATE = 32  # points a centroid among which k-means++ chooses
_PROPOSALS = 64  # that k-means++ draws at a time


def kmeans(
    x: Tensor,
    k: int,
    *,
    init: str | Tensor = "k-means++",
    weights: Tensor | None = None,
    iterations: int = 25,
    seed: int = 0,
    spherical: bool = False,
    max_points_per_centroid: int | None = 256,
) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids that are the means of the points nearest to them (Lloyd 1982).

    Args:
        x: (n, D) float32, any strides, n >= k.
        k: how many centroids.
        init: "k-means++" (spread over the points; Arthur, Vassilvitskii 2007), "sample" (points taken at random,
            faster), or up to k centroids (c, D) to begin with, points taken at random beside them.
        weights: (n) float32, at least 0: how much each point counts in the mean.
        iterations: how often centroids move.
        seed: the same seed, the same centroids.
        spherical: centroids of length 1, points assigned to the largest inner product.
        max_points_per_centroid: train on at most k times as many points, taken at random; None trains on all.

    Returns:
        centroids (k, D) float32; assignment (n) int64, of all points to the final centroids, exact; objective
        (iterations) float64: of the points trained on, the sum of squared distances (of inner products if spherical)
        to the centroids before each move. A centroid that lost its points restarts beside that with the largest error.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; also for NaN and infinity.
    """
    centroids, objective = fit_centroids(
        x, k, init, iterations, seed, spherical, spherical, max_points_per_centroid, weights
    )
    return centroids, _assign(x.detach(), centroids, spherical)[1], objective


def fit_centroids(
    x: Tensor, k: int, init: str | Tensor = "k-means++", iterations: int = 25, seed: int = 0, unit: bool = False,
    product: bool = False, most: int | None = 256, weights: Tensor | None = None, integers: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The centroids and the objective of `kmeans`, for whom the assignment of all points would be work in vain.

    `unit`: centroids of length 1; `product`: points go to the largest inner product; `integers`: centroids are rounded.
    """
    k, iterations, most, seed = map(plain, (k, iterations, most, seed))
    _check(x, k, init, iterations, most, weights)
    if not is_whole(seed, -(2**63), 2**64 - 1):
        raise fail("kmeans", "seed", repr(seed)[:60], "an integer of 64 bits", error=TypeError)
    generator = torch.Generator("cpu").manual_seed(seed)
    points, weights = x.detach(), None if weights is None else weights.detach()
    if most is not None and x.shape[0] > k * most:
        rows = sample_rows(x.shape[0], k * most, generator).to(x.device)
        points, weights = points[rows], None if weights is None else weights[rows]
    centroids = _shaped(_begin(points, k, init, generator), unit, integers)
    objective: list[float] = []
    weighted = points if weights is None else points * weights[:, None]
    while len(objective) < iterations:
        distances, nearest = _assign(points, centroids, product)
        objective.append(distances.sum(dtype=torch.float64).item())
        if objective[-2:-1] == objective[-1:]:  # nothing moves any more
            objective += objective[-1:] * (iterations - len(objective))
            break
        centroids = _shaped(_move(weighted, weights, nearest, k, k), unit, integers)
    return centroids, torch.tensor(objective, dtype=torch.float64, device="cpu")


def fit_codebooks(
    x: Tensor, M: int, levels: int, iterations: int, begin: torch.Generator | Tensor, weights: Tensor | None = None
) -> Tensor:
    """(M, levels, D/M): k-means of every sub-vector by itself, all at once, from points taken at random, or those of
    these rows. `weights` (n): how much each row counts."""
    _check(x, levels, "sample", iterations, None, None)
    if isinstance(begin, Tensor):
        rows = begin.expand(M, levels).to(x.device)
    else:
        rows = torch.stack([sample_rows(x.shape[0], levels, begin) for _ in range(M)]).to(x.device)
    parts = x.view(x.shape[0], M, x.shape[1] // M)
    books = parts[rows, torch.arange(M, device=x.device)[:, None]]
    codes, weighted = None, x
    if weights is not None:
        weighted, weights = x * weights[:, None], weights.repeat_interleave(M)
    for _ in range(iterations):
        last, codes = codes, encode_op(x, books)
        if last is not None and torch.equal(codes, last):  # nothing moves any more
            break
        books = move_codebooks(weighted, codes, books, weights)
    return books


def move_codebooks(x: Tensor, codes: Tensor, books: Tensor, weights: Tensor | None = None) -> Tensor:
    """The means of the sub-vectors that have the same code; x (n, D) is multiplied by the weights (n M) already."""
    M, levels, width = books.shape
    numbers = unpack_codes(codes, M, bits_of("kmeans", "codebooks", levels)).long()
    numbers = (numbers + levels * torch.arange(M, device=x.device)).flatten()
    return _move(x.reshape(-1, width), weights, numbers, M * levels, levels).view(books.shape)


def _check(x: Tensor, k: int, init: str | Tensor, iterations: int, most: int | None, weights: Tensor | None) -> None:
    op = "kmeans"
    require_dense(op, "x", x)
    if x.is_meta:
        raise fail(op, "x", "a meta tensor", "one with contents", error=NotImplementedError)
    if x.dtype != torch.float32:
        raise fail(op, "x", x.dtype, "float32; convert it with .to()", error=TypeError)
    if x.dim() != 2:
        raise fail(op, "x", f"of shape {tuple(x.shape)}", "(points, columns)")
    if not is_whole(k, 1, x.shape[0]):
        raise fail(op, "k", k, f"1 to {x.shape[0]}, as many as there are points")
    if isinstance(init, Tensor):
        if init.dtype != torch.float32 or init.dim() != 2 or init.shape[1] != x.shape[1] or init.shape[0] > k:
            raise fail(op, "init", f"{init.dtype} of shape {tuple(init.shape)}", f"float32, up to ({k}, {x.shape[1]})")
        if not bool(init.isfinite().all()):
            raise fail(op, "init", "not finite everywhere", "finite numbers")
    elif init not in ("k-means++", "sample"):
        raise fail(op, "init", repr(init), "'k-means++', 'sample' or a tensor of centroids")
    if not is_whole(iterations, 0, 2**31):
        raise fail(op, "iterations", repr(iterations)[:60], "an integer from 0 to 2**31")
    if most is not None and not is_whole(most, 1):
        raise fail(op, "max_points_per_centroid", repr(most), "an integer, at least 1, or None")
    if x.shape[1] and not bool((4 * x.shape[1] * x.abs().amax().square()).isfinite()):
        raise fail(op, "x", "NaN, infinite or huge in places", "numbers whose squared distances are finite in float32")
    if weights is not None:
        require_dense(op, "weights", weights)
        if weights.device != x.device:
            raise fail(op, "weights", f"on {weights.device}", f"{x.device} like x; move it with .to()")
        if weights.dtype != torch.float32 or weights.shape != x.shape[:1]:
            raise fail(op, "weights", f"{weights.dtype} of shape {tuple(weights.shape)}", f"float32 ({x.shape[0]},)")
        if not bool((weights >= 0).all() & weights.sum().isfinite()):
            raise fail(op, "weights", "negative, NaN or huge in places", "numbers from 0 on with a finite sum")


def _begin(points: Tensor, k: int, init: str | Tensor, generator: torch.Generator) -> Tensor:
    given = init.detach() if isinstance(init, Tensor) else points[:0]
    if not isinstance(init, Tensor) and init == "k-means++":
        return _plus_plus(points, k, generator)
    rows = sample_rows(points.shape[0], k - given.shape[0], generator).to(points.device)
    return torch.cat([given, points[rows]])


def _shaped(centroids: Tensor, unit: bool, integers: bool) -> Tensor:
    centroids = torch.nn.functional.normalize(centroids, dim=1) if unit else centroids
    return centroids.round() if integers else centroids


def sample_rows(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Different numbers below n, in ascending order, that they are read fast."""
    return torch.randperm(n, generator=generator, device="cpu")[:count].sort().values


def _assign(x: Tensor, centroids: Tensor, product: bool) -> tuple[Tensor, Tensor]:
    distances, nearest = topk_op(x, centroids, None, None, None, None, None, 1, int(product), product)
    return distances[:, 0], nearest[:, 0]


def _plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Points drawn one after another, each with a chance proportional to its squared distance from those before.

    Proposals are drawn some at a time, by the distances from all points before them, and each is kept with the chance
    to which its own distance has shrunk since. That is the same distribution, and all points are compared once a time.
    """
    if x.shape[0] > _PER_CANDIDATE * k:
        x = x[sample_rows(x.shape[0], _PER_CANDIDATE * k, generator).to(x.device)]
    chosen = torch.randint(0, x.shape[0], (1,), generator=generator, device="cpu")
    nearest = _assign(x, x[chosen.to(x.device)], False)[0]
    while len(chosen) < k:
        chances = nearest.double().cumsum(0)
        last = chances[-1].item()
        if last == 0:  # fewer different points than centroids: any will do
            size = (k - len(chosen),)
            chosen = torch.cat([chosen, torch.randint(0, x.shape[0], size, generator=generator, device="cpu")])
            break
        draws = torch.rand(2, _PROPOSALS, generator=generator, dtype=torch.float64, device="cpu")
        places = torch.searchsorted(chances, (draws[0] * last).to(x.device), right=True).clamp_(max=x.shape[0] - 1)
        kept = _kept(x[places], nearest[places], draws[1])[: k - len(chosen)]
        places = places[kept.to(x.device)]
        chosen = torch.cat([chosen, places.cpu()])
        nearest = torch.minimum(nearest, _assign(x, x[places], False)[0])
    return x[chosen.to(x.device)]


def _kept(proposals: Tensor, before: Tensor, draws: Tensor) -> Tensor:
    """Which proposals stay, given their squared distances from the points before all of them."""
    gaps = torch.cdist(proposals, proposals, compute_mode="donot_use_mm_for_euclid_dist").double().square_().cpu()
    nearest, bars = before.double().cpu(), (draws * before.double().cpu()).tolist()
    kept = []
    for i, bar in enumerate(bars):
        if bar < nearest[i]:
            kept.append(i)
            nearest = torch.minimum(nearest, gaps[i])
    return torch.tensor(kept, dtype=torch.int64, device="cpu")


def _move(x: Tensor, weights: Tensor | None, nearest: Tensor, k: int, together: int) -> Tensor:
    """The means of the clusters; where there is none, half of that with the largest error is split off: of `together`
    clusters, which share their points. (Of the largest cluster nothing can be split off where its points are equal.)

    x is multiplied by the weights already.
    """
    counts = torch.bincount(nearest, weights, minlength=k)
    sums, rows = x.new_zeros(k, x.shape[1]), x.contiguous()
    if x.device.type != "cpu" or not add_to_clusters(rows.numpy(), nearest.numpy(), sums.numpy(), k // together):
        sums.scatter_add_(0, nearest[:, None].expand(x.shape), x)
    means = sums / counts.where(counts > 0, 1)[:, None]
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        points = x if weights is None else x / weights.where(weights > 0, 1)[:, None]
        gaps = (points - means[nearest]).square_().sum(1)
        error = torch.bincount(nearest, gaps if weights is None else gaps * weights, minlength=k)
        rank = [(float(e), float(size)) for e, size in zip(error.tolist(), counts.tolist(), strict=True)]
        for lost in empty:
            first = lost // together * together
            worst = max(range(first, first + together), key=rank.__getitem__)
            step = means[worst] * (2.0**-10)
            means[lost], means[worst] = means[worst] + step, means[worst] - step
            rank[lost] = rank[worst] = rank[worst][0] / 2, rank[worst][1] / 2
    return means
