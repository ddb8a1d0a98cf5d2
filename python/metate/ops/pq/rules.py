"""What the operators of product quantisation refuse, their gradients, and how they are batched and sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metate.errors import fail
from metate.op import Op, loop_vmap
from metate.ops.pq.codes import BLOCK, bits_of, row_bytes, unpack_codes

Args = tuple[Any, ...]
Splits = list[tuple[dict[str, int], dict[str, int]]]  # dimensions that outputs and arguments are split over

# Refusals.


def refused_float64(x: Tensor, *_: Any) -> str | None:
    return "float64: up to float32" if x.dtype == torch.float64 else None


def refused_by_cuda(columns: int, **places: int) -> Callable[..., str | None]:
    """Searches whose lists, and queries beside them, do not fit shared memory; places: of k among the arguments."""

    def refusal(*args: Any) -> str | None:
        queries = args[0]
        for name, place in places.items():
            if args[place] > 2048:
                return f"{name} = {args[place]}: up to 2048"
        return f"{queries.shape[1]} columns: up to {columns}" if queries.shape[1] > columns else None

    return refusal


def _validate_books(op: str, columns: Any, codebooks: Tensor) -> int:
    """Codebooks (M, L, D/M) for vectors of `columns`; the bits of a code."""
    bits = bits_of(op, "codebooks", codebooks.shape[1])
    M, width = codebooks.shape[0], codebooks.shape[2]
    if M < 1 or width < 1:
        raise fail(op, "codebooks", f"of shape {tuple(codebooks.shape)}", "at least one sub-vector and one column")
    if columns is not None and M * width != columns:
        raise fail(op, "codebooks", f"for {M} sub-vectors of {width} columns", f"{columns} columns in all")
    return bits


def _validate_metric(op: str, metric: int, vectors: bool) -> None:
    """By codes, metrics are sums over sub-vectors that tables hold."""
    if metric not in ((0, 1, 3, 4) if vectors else (0, 1)):
        others = ", 3 (L1) or 4 (Linf)" if vectors else ": codes have no others"
        raise fail(op, "metric", metric, f"0 (squared Euclidean distance), 1 (inner product){others}")


def coded_bytes(op: str, codebooks: Tensor) -> int:
    """Bytes of the codes of a vector."""
    return row_bytes(codebooks.shape[0], bits_of(op, "codebooks", codebooks.shape[1]))


def validate_tables(queries: Tensor, codebooks: Tensor, metric: int) -> None:
    _validate_books("pq_distance_tables", queries.shape[1], codebooks)
    _validate_metric("pq_distance_tables", metric, False)


def validate_encode(x: Tensor, codebooks: Tensor) -> None:
    _validate_books("pq_encode", x.shape[1], codebooks)


def validate_decode(codebooks: Tensor, codes: Tensor) -> None:
    bits = _validate_books("pq_decode", None, codebooks)
    _validate_codes("pq_decode", "codes", codes, codebooks.shape[0], bits)


def _validate_codes(op: str, name: str, codes: Tensor, M: Any, bits: int) -> None:
    shape = f"of shape {tuple(codes.shape)}"
    if len(codes.shape) == 2:
        if codes.shape[1] != row_bytes(M, bits):
            raise fail(op, name, shape, f"(…, {row_bytes(M, bits)}) for {M} sub-codes of {bits} bits")
    elif bits not in (4, 8):
        raise fail(op, name, "in blocks", f"rows: blocks hold codes of 4 or 8 bits, not {bits}")
    elif codes.shape[2] != BLOCK * bits // 8:
        raise fail(op, name, shape, f"blocks of {BLOCK * bits // 8} bytes a sub-code")


def _validate_search(op: str, k: int, ranges: Tensor | None, bias: Tensor | None) -> None:
    if not 1 <= k < 2**31:
        raise fail(op, "k", k, "1 to 2**31 - 1")
    if ranges is None and bias is not None and bias.shape[1] != 1:
        raise fail(op, "bias", f"of shape {tuple(bias.shape)}", f"({bias.shape[0]}, 1) without ranges")


def _validate_count(op: str, n: int) -> None:
    if n < 0:  # whole blocks of interleaved codes do not show it
        raise fail(op, "n", n, "0 or more, the number of rows")


def validate_scan(
    tables: Tensor, codes: Tensor, ranges: Tensor | None, bias: Tensor | None, row_bias: Tensor | None,
    ids: Tensor | None, keep: Tensor | None, n: int, k: int, largest: bool,
) -> None:  # fmt: skip
    op, M = "pq_scan", tables.shape[1]
    bits = bits_of(op, "tables", tables.shape[2])
    if M < 1:
        raise fail(op, "tables", f"of shape {tuple(tables.shape)}", "at least one sub-vector")
    _validate_count(op, n)
    _validate_codes(op, "codes", codes, M, bits)
    _validate_search(op, k, ranges, bias)


def validate_topk(
    queries: Tensor, base: Tensor, ranges: Tensor | None, scale: Tensor | None, offset: Tensor | None,
    ids: Tensor | None, keep: Tensor | None, k: int, metric: int, largest: bool,
) -> None:  # fmt: skip
    op, int8 = "topk_distances", base.dtype == torch.int8
    _validate_given(op, {"scale": scale, "offset": offset}, int8, "a number a column beside an int8 base")
    _validate_metric(op, metric, True)
    _validate_search(op, k, ranges, None)


def _validate_given(op: str, arguments: dict[str, Tensor | None], wanted: bool, what: str) -> None:
    for name, tensor in arguments.items():
        if (tensor is None) == wanted:
            raise fail(op, name, "None" if tensor is None else "given", f"{what}, None otherwise")


def validate_ivf(
    queries: Tensor, centroids: Tensor, extents: Tensor, rows: Tensor, codebooks: Tensor | None,
    row_bias: Tensor | None, scale: Tensor | None, offset: Tensor | None, ids: Tensor | None, keep: Tensor | None,
    n: int, nprobe: int, k: int, metric: int, residual: bool,
) -> None:  # fmt: skip
    op, D = "ivf_search", queries.shape[1]
    _validate_count(op, n)
    _validate_metric(op, metric, codebooks is None)
    _validate_search(op, k, None, None)
    if not 1 <= nprobe <= max(centroids.shape[0], 1):
        raise fail(op, "nprobe", nprobe, f"1 to {centroids.shape[0]}, the number of lists")
    if codebooks is not None:
        _validate_codes(op, "rows", rows, codebooks.shape[0], _validate_books(op, D, codebooks))
    elif residual:
        raise fail(op, "residual", True, "False without codebooks")
    elif tuple(rows.shape[1:]) != (D,):
        raise fail(op, "rows", f"of shape {tuple(rows.shape)}", f"(n, {D}): vectors, where there are no codebooks")
    if (rows.dtype == torch.uint8) == (codebooks is None):
        expected = "vectors without codebooks" if codebooks is None else "uint8: codes of the codebooks"
        raise fail(op, "rows", rows.dtype, expected, error=TypeError)
    _validate_given(
        op, {"scale": scale, "offset": offset}, rows.dtype == torch.int8, "a number a column beside int8 rows"
    )
    _validate_given(op, {"row_bias": row_bias}, residual and metric == 0, "a number a row of residual codes and L2")


# Gradients.


def save(ctx: Any, inputs: Args, output: Any) -> None:
    tensors = [a for a in inputs if isinstance(a, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.scalars = inputs[len(tensors) :]


def backward_tables(ctx: Any, grad: Tensor) -> Args:
    """Of Σ (q - c)², or of Σ q c."""
    queries, codebooks = ctx.saved_tensors
    M, _, width = codebooks.shape
    parts = queries.reshape(queries.shape[0], M, width)
    by_query = torch.einsum("qml,mld->qmd", grad, codebooks)
    by_book = torch.einsum("qml,qmd->mld", grad, parts)
    if ctx.scalars[0] == 0:
        by_query = 2 * (grad.sum(2)[..., None] * parts - by_query)
        by_book = 2 * (grad.sum(0)[..., None] * codebooks - by_book)
    return by_query.reshape(queries.shape), by_book, None


def backward_decode(ctx: Any, grad: Tensor) -> Args:
    """Sums over the rows that have a centroid."""
    codebooks, codes = ctx.saved_tensors
    M, levels, width = codebooks.shape
    indices = unpack_codes(codes, M, bits_of("pq_decode", "codebooks", levels)).long()
    numbers = (indices + levels * torch.arange(M, device=indices.device)).flatten()
    total = grad.new_zeros(M * levels, width).index_add(0, numbers, grad.reshape(-1, width))
    return total.view(codebooks.shape), None


# Batching and sharding.


def fold_vmap(op: Op, info: Any, in_dims: Args, args: Args) -> tuple[Any, Any]:
    """Where the rows of the first argument alone are mapped, there are more of them."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        return loop_vmap(op, info, in_dims, args)
    x = args[0].movedim(in_dims[0], 0)
    return op(x.flatten(0, 1), *args[1:]).unflatten(0, x.shape[:2]), 0


def shard_rows(output: str, argument: str) -> Any:
    return lambda op, args: [({output: 0}, {argument: 0})]


def shard_queries(op: Op, args: Args) -> Splits:
    """Over queries; everything else is everywhere."""
    named = dict(zip(op.parameters, args, strict=False))
    split = [name for name in ("tables", "queries", "ranges", "bias") if named.get(name) is not None]
    return [({"distances": 0, "ids": 0}, dict.fromkeys(split, 0))]
