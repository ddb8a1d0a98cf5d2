"""Product quantisation and brute-force search in Triton: launchers with the parameters of the declared operators.

In a search, programs take chunks of rows in turn, and torch sorts the best that each has found. Many results are found
some at a time: what keeps them sorted in registers takes minutes to compile for more.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from .. import shared
from .quantise import TINY, decode_kernel, encode_kernel, pack_kernel, tables_kernel
from .scan import scan_kernel
from .search import EMPTY
from .vectors import bounds_kernel, exact_kernel

GROUP = 32  # rows with one bound
BOUNDS = 1 << 26  # bounds kept at once
MOST, TOGETHER = 2048, 512  # results of a search, and of a pass over the rows


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _slices(queries: int, rows: int, chunk: int) -> int:
    """Programs of a query: so many that a GPU is busy."""
    return max(1, min(triton.cdiv(1024, max(queries, 1)), triton.cdiv(rows, 4 * chunk)))


class _Search:
    """What the kernels of both searches take, and results from what they write."""

    def __init__(self, beside: Tensor, n: int, ranges: Any, ids: Any, keep: Any, k: int, largest: bool, block: int):
        self.n, self.k, self.largest, self.ids = n, k, largest, _contiguous(ids)
        self.order = None if ids is None else ids.argsort(stable=True)  # row of each rank
        ranks = None if self.order is None else torch.empty_like(self.order)
        if ranks is not None:
            ranks[self.order] = torch.arange(n, device=ids.device)
        block = max(block, triton.next_power_of_2(min(k, TOGETHER)))
        slices = _slices(beside.shape[0], n, block)
        self.out = torch.empty((beside.shape[0], slices, block), dtype=torch.int64, device=beside.device)
        self.arguments = {
            "n": n, "P": 1 if ranges is None else ranges.shape[1], "ranges": ranges, "ranks": ranks,
            "ranges_strides": None if ranges is None else ranges.stride(), "keep": _contiguous(keep),
            "slices": slices, "LARGEST": largest, "ONE": k == 1, "BLOCK": block, "out": self.out,
        }  # fmt: skip

    def _keys(self, launch: Callable[[dict[str, Any]], None]) -> Tensor:
        """The k best, in passes: each finds what comes behind the last key of the one before."""
        found: list[Tensor] = []
        for first in range(0, max(min(self.k, self.n), 1), TOGETHER):
            count = min(TOGETHER, self.k - first)
            above = found[-1][:, -1].contiguous() if found else None
            if self.out.shape[0]:
                launch(self.arguments | {"k": count, "above": above})
            keys = self.out[..., :count].flatten(1)
            found.append((keys.sort(1).values if self.out.shape[1] > 1 else keys)[:, :count].clone())
        missing = self.k - sum(keys.shape[1] for keys in found)
        return torch.cat([*found, self.out.new_full((self.out.shape[0], missing), EMPTY.value)], 1)

    def results(self, launch: Callable[[dict[str, Any]], None]) -> tuple[Tensor, Tensor]:
        """By `launch(arguments)`, which adds what rows are compared by."""
        keys = self._keys(launch)
        missing, rank = keys == EMPTY.value, keys & 0xFFFFFFFF
        bits = (keys >> 32).to(torch.int32)
        distances = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
        distances = (-distances if self.largest else distances).masked_fill(
            missing, -torch.inf if self.largest else torch.inf
        )
        found = rank.masked_fill(missing, 0)
        if self.order is not None and self.ids is not None and self.n:
            found = self.ids[self.order[found]]
        return distances, found.masked_fill(missing, -1)


def pq_distance_tables(queries: Tensor, codebooks: Tensor, metric: int) -> Tensor:
    M, L, d = codebooks.shape
    out = queries.new_empty(queries.shape[0], M, L)
    arguments = {
        "queries": queries, "query_strides": queries.stride(), "books": codebooks, "book_strides": codebooks.stride(),
        "out": out, "Q": queries.shape[0], "M": M, "L": L, "d": d, "L2": metric == 0, "BLOCK": 16, "BLOCK_L": 64,
    }  # fmt: skip
    if out.numel():
        grid = (triton.cdiv(queries.shape[0], 16) * triton.cdiv(L, 64), M)
        shared.launch(tables_kernel, grid, arguments, queries)
    return out


def _bits(levels: int) -> int:
    return levels.bit_length() - 1


def pq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    M, L, d = codebooks.shape
    n, bits, block = x.shape[0], _bits(L), 32
    row_bytes = triton.cdiv(M * bits, 8)
    indices = torch.empty((n, M), dtype=torch.int32, device=x.device)
    codes = torch.empty((n, row_bytes), dtype=torch.uint8, device=x.device)
    if n:
        arguments = {
            "x": x, "x_strides": x.stride(), "books": codebooks.contiguous(), "out": indices, "n": n, "M": M, "d": d,
            "L": L, "BLOCK": block, "BLOCK_L": min(L, 64),
        }  # fmt: skip
        shared.launch(encode_kernel, (triton.cdiv(n, block), M), arguments, x)
        arguments = {
            "indices": indices, "out": codes, "count": codes.numel(), "M": M, "row_bytes": row_bytes, "BITS": bits,
            "BLOCK": 256,
        }  # fmt: skip
        shared.launch(pack_kernel, (triton.cdiv(codes.numel(), 256),), arguments, x)
    return codes


def pq_decode(codebooks: Tensor, codes: Tensor) -> Tensor:
    M, L, d = codebooks.shape
    out = codebooks.new_empty(codes.shape[0], M * d)
    if out.numel():
        arguments = {
            "codes": codes, "codes_strides": codes.stride(), "books": codebooks.contiguous(), "out": out,
            "count": out.numel(), "M": M, "D": M * d, "d": d, "BITS": _bits(L), "BLOCK": 256,
        }  # fmt: skip
        shared.launch(decode_kernel, (triton.cdiv(out.numel(), 256),), arguments, codebooks)
    return out


def pq_scan(
    tables: Tensor, codes: Tensor, ranges: Tensor | None, bias: Tensor | None, row_bias: Tensor | None,
    ids: Tensor | None, keep: Tensor | None, n: int, k: int, largest: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    search = _Search(tables, n, ranges, ids, keep, k, largest, 256)
    codes = codes.contiguous() if codes.dim() == 3 else codes
    own = {
        "tables": tables.contiguous(), "codes": codes, "codes_strides": codes.stride(), "bias": bias,
        "bias_strides": None if bias is None else bias.stride(), "row_bias": _contiguous(row_bias),
        "M": tables.shape[1], "BITS": _bits(tables.shape[2]), "BLOCKS": codes.dim() == 3,
    }  # fmt: skip
    grid = tables.shape[0], search.arguments["slices"]
    return search.results(lambda arguments: shared.launch(scan_kernel, grid, arguments | own, tables))


class _Rows:
    """A base around its middle, in bfloat16, and by how much a comparison with it may err."""

    def __init__(self, base: Tensor, scale: Tensor | None, offset: Tensor | None, metric: int):
        self.metric = metric
        sample = _values(base[:: max(1, base.shape[0] // 1024)], scale, offset)
        self.middle = sample.mean(0).nan_to_num(0.0, 0.0, 0.0)
        rows = _values(base, scale, offset) - self.middle
        self.squares = rows.square().sum(1)
        self.rows = rows.to(torch.bfloat16)
        lengths = torch.nn.functional.pad(self.squares.sqrt(), (0, -base.shape[0] % GROUP)).view(-1, GROUP)
        self.lengths = lengths.nan_to_num(torch.inf).amax(1)
        rough = self.middle if metric == 1 else self.middle * 0.0
        if scale is not None and offset is not None:
            rough = torch.maximum(rough.abs(), 128 * scale.abs() + (offset - self.middle).abs())
        self.least = rough.norm()  # the rounding of a row is relative to no less than this

    def errors(self, queries: Tensor) -> Tensor:
        """(Q, groups): what a bound may lack."""
        length = queries.norm(dim=1, keepdim=True)
        times = 2 if self.metric == 0 else 1
        rounding = times * (2.0**-8 + 2.0**-15) * length * self.lengths
        sums = (queries.shape[1] + 16) * 2.0**-20
        return rounding + sums * (length.square() + self.lengths.clamp_min(self.least).square()) + TINY.value


def _values(base: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    return base.float() if scale is None or offset is None else torch.addcmul(offset, base.float(), scale)


def _bounds(queries: Tensor, rows: _Rows, keep: Tensor | None, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """(Q, groups) below every distance of a group, up to a term of the query; (Q) what the k best are not above."""
    moved = queries - rows.middle if rows.metric == 0 else queries
    n, D = rows.rows.shape
    out = queries.new_empty(queries.shape[0], rows.lengths.shape[0])
    arguments = {
        "queries": moved.to(torch.bfloat16).contiguous(), "base": rows.rows, "squares": rows.squares, "keep": keep,
        "out": out, "Q": queries.shape[0], "n": n, "D": D, "groups": out.shape[1], "L2": rows.metric == 0,
        "LARGEST": largest, "GROUP": GROUP, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32,
    }  # fmt: skip
    grid = (triton.cdiv(queries.shape[0], 64) * triton.cdiv(n, 128),)
    shared.launch(bounds_kernel, grid, arguments, queries)
    errors = rows.errors(moved)
    above = (out + errors).nan_to_num(torch.inf, torch.inf, torch.inf)  # a group with a NaN row promises nothing
    limits = above.topk(k, 1, largest=False).values[:, -1].contiguous()
    return (out - errors).nan_to_num(-torch.inf, torch.inf, -torch.inf), limits


def topk_distances(
    queries: Tensor, base: Tensor, ranges: Tensor | None, scale: Tensor | None, offset: Tensor | None,
    ids: Tensor | None, keep: Tensor | None, k: int, metric: int, largest: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, D = base.shape
    queries, keep = queries.contiguous(), _contiguous(keep)
    base = base if base.stride(1) == 1 or D < 2 else base.contiguous()
    by_products = metric < 2 and ranges is None and n > GROUP * k
    rows = _Rows(base, scale, offset, metric) if by_products else None
    chunk = max(1, BOUNDS // triton.cdiv(n, GROUP)) if rows else max(queries.shape[0], 1)
    distances, found = [], []
    for first in range(0, max(queries.shape[0], 1), chunk):
        part = queries[first : first + chunk]
        search = _Search(part, n, ranges, ids, keep, k, largest, 64)
        bounds, limits = _bounds(part, rows, keep, k, largest) if rows and part.shape[0] else (None, None)
        own = {
            "queries": part, "base": base, "base_stride": base.stride(0), "scale": _contiguous(scale),
            "offset": _contiguous(offset), "bounds": bounds, "limits": limits, "D": D,
            "groups": triton.cdiv(n, GROUP), "METRIC": metric, "GROUP": GROUP,
            "BLOCK_K": 2048 // search.arguments["BLOCK"],
        }  # fmt: skip
        grid = part.shape[0], search.arguments["slices"]
        results = search.results(
            lambda arguments, own=own, grid=grid: shared.launch(exact_kernel, grid, arguments | own, queries)
        )
        distances.append(results[0])
        found.append(results[1])
    return torch.cat(distances), torch.cat(found)


def _refused_search(queries: Tensor, rows: int, k: int) -> str | None:
    if k > MOST:
        return f"k = {k}: up to {MOST}"
    return f"{rows} rows: fewer than 2**31" if rows >= 1 << 31 else shared.refusal(queries)


def _refused_float64(x: Tensor) -> str | None:
    return "dtype float64: float32" if x.dtype == torch.float64 else shared.refusal(x)


REFUSES = {
    "pq_distance_tables": lambda queries, *rest: _refused_float64(queries),
    "pq_encode": lambda x, *rest: _refused_float64(x),
    "pq_decode": lambda codebooks, *rest: _refused_float64(codebooks),
    "pq_scan": lambda tables, *rest: _refused_search(tables, rest[-3], rest[-2]),
    "topk_distances": lambda queries, base, *rest: _refused_search(queries, base.shape[0], rest[-3]),
    "ivf_search": lambda queries, *rest: _refused_search(queries, rest[-5], max(rest[-4], rest[-3])),
}
