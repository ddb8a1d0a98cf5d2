"""faiss' metrics, and their distances in plain numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from metate.search.faiss_nodes import METRICS

METRIC_INNER_PRODUCT, METRIC_L2, METRIC_L1, METRIC_Linf, METRIC_Lp = range(5)
METRIC_Canberra, METRIC_BrayCurtis, METRIC_JensenShannon, METRIC_Jaccard, METRIC_NaNEuclidean, METRIC_GOWER = range(
    20, 26
)
_SIMILAR = (METRIC_INNER_PRODUCT, METRIC_Jaccard)

Doubles = npt.NDArray[np.float64]


def metric_name(metric: int) -> str:
    """What metate.search calls a metric that it searches by."""
    if metric not in METRICS:
        raise NotImplementedError(
            f"metate.compat.faiss: metric is {metric}, expected METRIC_L2, METRIC_INNER_PRODUCT, METRIC_L1 or "
            "METRIC_Linf; pairwise_distances knows the others"
        )
    return METRICS[metric]


def is_similarity_metric(metric: int) -> bool:
    """Whether the largest is the best."""
    return metric in _SIMILAR


def _jensen_shannon(x: Doubles, y: Doubles) -> Any:
    middle = (x + y) / 2
    return (-x * np.log(middle / x) - y * np.log(middle / y)).sum(-1) / 2


def _nan_euclidean(x: Doubles, y: Doubles) -> Any:
    """Of the columns that both have, scaled up to all of them."""
    gap = x - y
    there = ~np.isnan(gap)
    return np.where(there, np.square(gap), 0).sum(-1) * x.shape[-1] / there.sum(-1)


def _gower(x: Doubles, y: Doubles) -> Any:
    """Numbers lie between 0 and 1, negative ones are names; NaN where a column is neither for both."""
    there = ~np.isnan(x + y)
    named = (x < 0) & (y < 0)
    wrong = there & (((x < 0) != (y < 0)) | (x > 1) | (y > 1))
    parts = np.where(named, np.trunc(x) != np.trunc(y), np.abs(x - y))
    total = np.where(there, parts, 0).sum(-1) / there.sum(-1)
    return np.where(wrong.any(-1), np.nan, total)


_DISTANCES: dict[int, Callable[[Doubles, Doubles], Any]] = {
    METRIC_INNER_PRODUCT: lambda x, y: (x * y).sum(-1),
    METRIC_L2: lambda x, y: np.square(x - y).sum(-1),
    METRIC_L1: lambda x, y: np.abs(x - y).sum(-1),
    METRIC_Linf: lambda x, y: np.abs(x - y).max(-1, initial=0),
    METRIC_Canberra: lambda x, y: (np.abs(x - y) / (np.abs(x) + np.abs(y))).sum(-1),
    METRIC_BrayCurtis: lambda x, y: np.abs(x - y).sum(-1) / np.abs(x + y).sum(-1),
    METRIC_JensenShannon: _jensen_shannon,
    METRIC_Jaccard: lambda x, y: np.minimum(x, y).sum(-1) / np.maximum(x, y).sum(-1),
    METRIC_NaNEuclidean: _nan_euclidean,
    METRIC_GOWER: _gower,
}


def between(metric: int, x: Any, y: Any, argument: float = 0.0) -> npt.NDArray[np.float32]:
    """Distances along the last dimension, in double precision, rounded once; argument: the p of Lp."""
    wide = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if metric == METRIC_Lp:
        return (np.abs(wide[0] - wide[1]) ** argument).sum(-1).astype(np.float32)  # type: ignore[no-any-return]
    if metric not in _DISTANCES:
        raise RuntimeError(f"metric is {metric}, expected one of faiss' METRIC_…")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(_DISTANCES[metric](*wide), np.float32)
