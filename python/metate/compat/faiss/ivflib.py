"""faiss' functions over indexes of lists, alone or within others."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from metate.compat.faiss.base import Index, given
from metate.compat.faiss.composite import IndexIDMap, IndexPreTransform, IndexRefine
from metate.compat.faiss.ivf import IndexIVF
from metate.compat.faiss.lists import ArrayInvertedLists, append_codes, same_training, stored
from metate.compat.faiss.quantizer import as_array
from metate.compat.faiss.selectors import SearchParametersIVF, SearchParametersPreTransform
from metate.compat.faiss.statistics import indexIVF_stats


def extract_index_ivf(index: Index) -> IndexIVF:
    """The index of lists within others."""
    found = try_extract_index_ivf(index)
    if found is None:
        raise RuntimeError(f"extract_index_ivf: {type(index).__name__} has no lists")
    return found


def try_extract_index_ivf(index: Index) -> IndexIVF | None:
    """The same; None where there is none."""
    while not isinstance(index, IndexIVF):
        if isinstance(index, IndexRefine):
            index = index.base_index
        elif isinstance(index, (IndexIDMap, IndexPreTransform)):
            index = index.index
        else:
            return None
    return index


def check_compatible_for_merge(index1: Index, index2: Index) -> None:
    """Raises where two indexes are not of one kind and training."""
    same_training("check_compatible_for_merge", extract_index_ivf(index2)._inner, extract_index_ivf(index1)._inner)


def merge_into(index0: Index, index1: Index, shift_ids: bool) -> None:
    """Moves all that index1 holds to index0, under ids that follow its number of vectors if they are shifted."""
    to, source = extract_index_ivf(index0), extract_index_ivf(index1)
    to.merge_from(source, to.ntotal if shift_ids else 0)


def _behind_transforms(index: Index, x: Any, n: int) -> Any:
    rows = as_array(x).reshape(n, index.d)
    return index.apply_chain(rows) if isinstance(index, IndexPreTransform) else rows


def search_centroid(index: Index, x: Any, n: int, centroid_ids: Any) -> None:
    """The lists that n vectors belong to, written into `centroid_ids`."""
    given((extract_index_ivf(index).quantizer.assign(_behind_transforms(index, x, n), 1)[:, 0], centroid_ids))


def search_and_return_centroids(
    index: Index, n: int, xin: Any, k: int, distances: Any, labels: Any, query_centroid_ids: Any,
    result_centroid_ids: Any,
) -> None:  # fmt: skip
    """A search, and the lists of queries and of what is found, -1 where nothing is; all written into what is given."""
    found, ids = index.search(as_array(xin).reshape(n, index.d), k)
    home = stored(extract_index_ivf(index)._inner, ids.reshape(-1))[0].reshape(n, k)
    given((found, distances), (ids, labels), (np.where(ids < 0, -1, home), result_centroid_ids))
    if query_centroid_ids is not None:
        search_centroid(index, xin, n, query_centroid_ids)


def get_invlist_range(index: Index, i0: int, i1: int) -> ArrayInvertedLists:
    """A copy of the lists from i0 to i1."""
    return ArrayInvertedLists.of(extract_index_ivf(index).invlists, range(i0, i1))


def set_invlist_range(index: Index, i0: int, i1: int, src: Any) -> None:
    """Puts the lists of `src` where those from i0 to i1 were."""
    ivf = extract_index_ivf(index)
    if src.nlist != i1 - i0 or not 0 <= i0 <= i1 <= ivf.nlist:
        raise RuntimeError(f"set_invlist_range: {src.nlist} lists for {i0} to {i1}, expected as many, of {ivf.nlist}")
    kept = ArrayInvertedLists.of(src, range(src.nlist))
    old = [ivf.invlists.get_ids(i) for i in range(i0, i1)]
    ivf.remove_ids(np.concatenate([np.zeros(0, np.int64), *old]))
    home = np.repeat(np.arange(i0, i1), [len(ids) for ids in kept.ids])
    if len(home):
        append_codes(ivf._inner, home, np.concatenate(kept.codes), np.concatenate(kept.ids))


def _params(index: Index, params: SearchParametersIVF | None) -> Any:
    asked = SearchParametersIVF(nprobe=extract_index_ivf(index).nprobe) if params is None else params
    return SearchParametersPreTransform(index_params=asked) if isinstance(index, IndexPreTransform) else asked


def _counted(search: Any, output_stats: bool) -> tuple[Any, ...]:
    """What a search finds and, if wanted, how many vectors it compared and how long it took."""
    before, wanted, began = indexIVF_stats.ndis, indexIVF_stats.wanted, time.perf_counter()
    indexIVF_stats.wanted = wanted or output_stats
    try:
        found = search()
    finally:
        indexIVF_stats.wanted = wanted
    stats = {
        "ndis": indexIVF_stats.ndis - before, "pre_transform_ms": 0.0, "coarse_quantizer_ms": 0.0,
        "invlist_scan_ms": 1e3 * (time.perf_counter() - began),
    }  # fmt: skip
    return (*found, stats) if output_stats else found


def search_with_parameters(
    index: Index, x: Any, k: int, params: SearchParametersIVF | None = None, output_stats: bool = False
) -> tuple[Any, ...]:
    """A search by other parameters than the index' own; also a dict of counts and times, of which the last has all."""
    return _counted(lambda: index.search(x, k, params=_params(index, params)), output_stats)


def range_search_with_parameters(
    index: Index, x: Any, radius: float, params: SearchParametersIVF | None = None, output_stats: bool = False
) -> tuple[Any, ...]:
    """The same within a distance."""
    return _counted(lambda: index.range_search(x, radius, params=_params(index, params)), output_stats)
