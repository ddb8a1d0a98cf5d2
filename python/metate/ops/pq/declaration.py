"""The operators of product quantisation, each with everything that is true of it whatever machine runs it."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from metate.op import Case, Domain, Op, loop_vmap
from metate.ops.pq import reference, rules
from metate.ops.pq.codes import interleave, pack_codes

SINGLE = (torch.float32,)
_WIDE = (torch.float32, torch.float64)
_BYTES = (torch.uint8,)
_SEARCH = {"ranges": (torch.int64,), "ids": (torch.int64,), "keep": _BYTES}
_WORDS = {"Q": "queries", "P": "probes", "D": "dim", "L": "levels", "n": "rows"}
_NO_ORDER = "the order of distances has none; train through metate.pq_distance_tables and metate.pq_decode"


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Quantising: n rows or Q queries of M sub-vectors of d columns.


def _case(rows: int, M: int, bits: int, d: int, **flags: Any) -> Case:
    return dict(rows=rows, M=M, bits=bits, d=d, **flags)


CASES = [
    _case(1, 1, 4, 1),
    _case(5, 3, 8, 5),
    _case(65, 7, 6, 4, ties=True),
    _case(63, 4, 8, 8),
    _case(17, 2, 5, 17),
    _case(9, 1, 12, 1),
    _case(3, 33, 4, 4, ties=True),
    _case(0, 2, 4, 3),
    _case(37, 11, 1, 3),
    _case(5, 3, 2, 4, ties=True),
    _case(40, 9, 3, 9),
]
SWEEP = [_case(rows, M, bits, 128 // M) for rows in (1, 64, 65536) for M, bits in ((16, 8), (32, 4))]


def draw(rng: Random) -> Case:
    """Any legal combination, small."""
    case = _case(rng.choice([0, 1, 2, 15, 40]), rng.randint(1, 9), rng.choice([4, 4, 8, rng.randint(1, 9)]),
                 rng.choice([1, 2, 3, 4, 8, 9, 16, 20]))  # fmt: skip
    return case | {"ties": True} if rng.random() < 0.3 else case


def _books(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Vectors and codebooks; `ties` makes them small whole numbers, of which many are equally near."""
    rows, M, bits, d = (case[name] for name in ("rows", "M", "bits", "d"))
    x, books = _normal(generator, rows, M * d), _normal(generator, M, 2**bits, d)
    if case.get("ties"):
        x, books = x.round(), books.round()
    return x.to(dtype), books.to(dtype)


def _codes(case: Case, rows: int, generator: torch.Generator) -> Tensor:
    return pack_codes(torch.randint(0, 2 ** case["bits"], (rows, case["M"]), generator=generator), case["bits"])


def _table_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    return (*_books(case, _working(dtype), generator), case.get("metric", 0))


def _decode_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    _, books = _books(case, _working(dtype), generator)
    return books, _codes(case, case["rows"], generator)


def _numbers(case: Case) -> float:
    return float(case["rows"] * case["M"] * case["d"])


def _coded(named: Case) -> Case:
    return {**named, "bits": named["L"].bit_length() - 1}


def _domain(make: Any, cases: list[Case]) -> Domain:
    return Domain(make, cases, SWEEP, draw, ("rows",), "rows")


tables_op = Op(
    "pq_distance_tables",
    reference.pq_distance_tables,
    words=_WORDS,
    axes={"queries": "rows D", "codebooks": "M L d"},
    dtypes={"queries": _WIDE, "codebooks": ("queries",)},
    outputs={"tables": torch.float32},
    shapes=lambda queries, codebooks, *_: ((queries.shape[0], *codebooks.shape[:2]),),
    domain=_domain(_table_inputs, [*CASES, *(case | {"metric": 1} for case in CASES[1:5])]),
    flops=lambda case: 3 * _numbers(case) * 2 ** case["bits"],
    sizes=_coded,
    autocast=(),
    vmap=rules.fold_vmap,
    sharding=rules.shard_rows("tables", "queries"),
    validate=rules.validate_tables,
    refuses=dict.fromkeys(("cpu", "cuda"), rules.refused_float64),
)
tables_op.differentiable(rules.backward_tables, rules.save)

encode_op = Op(
    "pq_encode",
    reference.pq_encode,
    words=_WORDS,
    axes={"x": "rows D", "codebooks": "M L d"},
    dtypes={"x": SINGLE, "codebooks": SINGLE},
    outputs={"codes": torch.uint8},
    shapes=lambda x, books: ((x.shape[0], rules.coded_bytes("pq_encode", books)),),
    domain=_domain(lambda case, dtype, generator: _books(case, torch.float32, generator), CASES),
    flops=lambda case: 2 * _numbers(case) * 2 ** case["bits"],
    sizes=_coded,
    autocast=(),
    vmap=rules.fold_vmap,
    sharding=rules.shard_rows("codes", "x"),
    validate=rules.validate_encode,
    gradient="codes are whole numbers; pass the gradient of the decoded vectors straight through",
)

decode_op = Op(
    "pq_decode",
    reference.pq_decode,
    words=_WORDS,
    axes={"codebooks": "M L d", "codes": "rows code_size"},
    dtypes={"codebooks": _WIDE, "codes": _BYTES},
    outputs={"out": "codebooks"},
    shapes=lambda books, codes: ((codes.shape[0], books.shape[0] * books.shape[2]),),
    domain=_domain(_decode_inputs, CASES),
    flops=_numbers,
    autocast=(),
    vmap=loop_vmap,
    sharding=rules.shard_rows("out", "codes"),
    validate=rules.validate_decode,
    refuses=dict.fromkeys(("cpu", "cuda"), rules.refused_float64),
)
decode_op.differentiable(rules.backward_decode, rules.save)


# Searching: Q queries among n rows. P: ranges of a query, absent: all rows.


def _search_inputs(case: Case, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Ranges that do not overlap, in any order, some empty, some too long; ids in no order, some twice; a bitmap."""
    Q, n, P = case["Q"], case["n"], case.get("P", 0)
    cuts = torch.randint(-n // 9, n + n // 9 + 1, (Q, 2 * P), generator=generator).sort(1).values.view(Q, P, 2)
    ids = torch.randint(-5, 2 * n + 1, (n,), generator=generator)
    keep = torch.randint(0, 256, ((n + 7) // 8,), generator=generator).to(torch.uint8)
    return cuts.flip(1) if P else None, ids if case.get("ids") else None, keep if case.get("keep") else None


def _search(Q: int, n: int, k: int, **sizes: Any) -> Case:
    return dict(Q=Q, n=n, k=k, **sizes)


SCAN_CASES = [
    _search(1, 1, 1, M=1, bits=4),
    _search(3, 65, 5, M=3, bits=8, P=2, bias=True, row_bias=True, ids=True),
    _search(2, 300, 7, M=5, bits=4, ties=True, ids=True),
    _search(2, 1000, 10, M=8, bits=4, blocks=True),
    _search(3, 999, 9, M=7, bits=4, blocks=True, P=3, bias=True, row_bias=True, ids=True, keep=True),
    _search(2, 700, 3, M=4, bits=8, blocks=True, largest=True),
    _search(9, 333, 65, M=17, bits=8, blocks=True, P=4, bias=True, keep=True, ties=True),
    _search(2, 63, 100, M=3, bits=8, blocks=True, row_bias=True),
    _search(1, 200, 1, M=2, bits=12, P=1, largest=True, row_bias=True),
    _search(2, 130, 4, M=9, bits=5, keep=True, largest=True, ties=True),
    _search(1, 33, 2, M=3, bits=16),
    _search(0, 9, 2, M=3, bits=4, blocks=True),
    _search(2, 0, 3, M=3, bits=8, P=2, bias=True),
    _search(2, 0, 3, M=4, bits=4, blocks=True),
    _search(2, 90, 4, M=11, bits=1, P=2, bias=True),
    _search(3, 70, 5, M=6, bits=3, keep=True, ids=True),
    _search(2, 2000, 1100, M=3, bits=4, blocks=True, ids=True, ties=True),
]
SCAN_SWEEP = [_search(Q, 1_000_000, 10, M=M, bits=bits, blocks=True) for Q in (1, 64) for M, bits in ((16, 8), (32, 4))]


def _draw_search(rng: Random, *flags: str) -> Case:
    n = rng.choice([0, 1, 31, 32, 33, 100, 700, 3000])
    case = _search(rng.choice([0, 1, 2, 5, 9]), n, rng.choice([1, 2, 10, 70, 600]), P=rng.choice([0, 0, 1, 3]))
    return case | {flag: True for flag in flags if rng.random() < 0.35}


def draw_scan(rng: Random) -> Case:
    case = _draw_search(rng, "ids", "keep", "largest", "ties", "row_bias", "bias", "blocks")
    bits = rng.choice([4, 8] if "blocks" in case else [4, 8, rng.randint(1, 13)])
    return case | {"M": rng.randint(1, 24), "bits": bits}


def _scan_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    Q, n, M, bits, P = case["Q"], case["n"], case["M"], case["bits"], case.get("P", 0)
    tables = _normal(generator, Q, M, 2**bits)
    if case.get("ties"):
        tables = tables.round()
    ranges, ids, keep = _search_inputs(case, generator)
    codes = _codes(case, n, generator)
    return (
        tables, interleave(codes, M, bits) if case.get("blocks") else codes, ranges,
        _normal(generator, Q, P or 1) if case.get("bias") else None,
        _normal(generator, n) if case.get("row_bias") else None, ids, keep, n, case["k"], case.get("largest", False),
    )  # fmt: skip


scan_op = Op(
    "pq_scan",
    reference.pq_scan,
    words=_WORDS,
    axes={
        "tables": "Q M L", "codes": "n code_size or n//32 M block_bytes", "ranges": "Q P 2", "bias": "Q P",
        "row_bias": "n", "ids": "n", "keep": "n//8",
    },
    dtypes={"tables": SINGLE, "codes": _BYTES, **_SEARCH, "bias": SINGLE, "row_bias": SINGLE},
    outputs={"distances": torch.float32, "ids": torch.int64},
    shapes=lambda tables, *rest: ((tables.shape[0], rest[-2]),) * 2,
    domain=Domain(_scan_inputs, SCAN_CASES, SCAN_SWEEP, draw_scan, ("Q",), "Q"),
    flops=lambda case: float(case["Q"] * case["n"] * case["M"]),
    autocast=(),
    vmap=loop_vmap,
    sharding=rules.shard_queries,
    validate=rules.validate_scan,
    refuses={"cuda": rules.refused_by_cuda(2**20, k=-2)},
    gradient=_NO_ORDER,
)  # fmt: skip


TOPK_CASES = [
    _search(1, 1, 1, D=1),
    _search(3, 65, 5, D=7, P=2, ids=True, keep=True),
    _search(5, 300, 10, D=33, near=True),
    _search(2, 130, 3, D=64, metric=1, largest=True),
    _search(70, 64, 1, D=8),
    _search(33, 257, 1, D=20, near=True, ties=True),
    _search(2, 63, 100, D=16, ids=True),
    _search(4, 400, 7, D=5, P=3, near=True, metric=1),
    _search(3, 500, 9, D=40, int8=True, keep=True),
    _search(9, 1000, 20, D=130, P=1, int8=True, largest=True),
    _search(2, 100, 2, D=3, ties=True, largest=True),
    _search(0, 9, 2, D=3),
    _search(2, 0, 3, D=3, P=2),
    _search(2, 5, 3, D=0),
    _search(5, 130, 6, D=19, metric=3, P=2, ids=True),
    _search(9, 1100, 5, D=33, metric=4, keep=True),
    _search(2, 90, 4, D=24, metric=3, int8=True, ties=True),
    _search(3, 70, 2, D=5, metric=4, int8=True, largest=True),
    _search(2, 1500, 700, D=4, P=2, ids=True, ties=True),
    _search(1, 600, 1030, D=3),
]
TOPK_SWEEP = [
    _search(1, 1_000_000, 10, D=128),
    _search(64, 1_000_000, 10, D=128),
    _search(65536, 256, 1, D=8),
    _search(65536, 1024, 1, D=128),
]


def draw_topk(rng: Random) -> Case:
    case = _draw_search(rng, "ids", "keep", "largest", "ties", "near", "int8")
    case["n"] = min(case["n"], 700)
    case["Q"] = rng.choice([case["Q"], case["Q"], 17, 33])
    return case | {"D": rng.choice([1, 3, 8, 16, 31, 64, 100]), "metric": rng.choice([0, 0, 0, 1, 1, 3, 4])}


def _topk_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """`near` puts all vectors close together and far from 0, some queries upon rows."""
    Q, n, D = case["Q"], case["n"], case["D"]
    queries, base = _normal(generator, Q, D), _normal(generator, n, D)
    if case.get("near"):
        queries, base = 50 + 0.01 * queries, 50 + 0.01 * base
        same = min(Q // 2, n)
        queries[:same] = base[:same]
    if case.get("ties"):
        queries, base = queries.round(), base.round()
    scale = offset = None
    if case.get("int8"):
        scale, offset = 0.01 + 0.01 * _normal(generator, D).abs(), _normal(generator, D)
        base = torch.randint(-128, 128, (n, D), generator=generator).to(torch.int8)
    else:
        base = base.to(torch.float32 if dtype == torch.float64 else dtype)
    ranges, ids, keep = _search_inputs(case, generator)
    return queries, base, ranges, scale, offset, ids, keep, case["k"], case.get("metric", 0), case.get("largest", False)


topk_op = Op(
    "topk_distances",
    reference.topk_distances,
    words=_WORDS,
    axes={"queries": "Q D", "base": "n D", "ranges": "Q P 2", "scale": "D", "offset": "D", "ids": "n", "keep": "n//8"},
    dtypes={
        "queries": SINGLE, "base": (torch.float32, torch.bfloat16, torch.float16, torch.int8), **_SEARCH,
        "scale": SINGLE, "offset": SINGLE,
    },
    outputs={"distances": torch.float32, "ids": torch.int64},
    shapes=lambda queries, *rest: ((queries.shape[0], rest[-3]),) * 2,
    domain=Domain(_topk_inputs, TOPK_CASES, TOPK_SWEEP, draw_topk, ("Q", "n"), "Q"),
    flops=lambda case: 2.0 * case["Q"] * case["n"] * case["D"],
    autocast=(),
    vmap=loop_vmap,
    sharding=rules.shard_queries,
    validate=rules.validate_topk,
    refuses={"cuda": rules.refused_by_cuda(4096, k=-3)},
    gradient=_NO_ORDER,
)  # fmt: skip


# Searching in the lists whose centroids are nearest.


def _ivf(Q: int, n: int, k: int, lists: int, nprobe: int, **sizes: Any) -> Case:
    return dict(Q=Q, n=n, k=k, lists=lists, nprobe=nprobe, **sizes)


IVF_CASES = [
    _ivf(1, 1, 1, 1, 1, D=1),
    _ivf(3, 65, 5, 7, 2, D=5, ids=True, keep=True),
    _ivf(2, 300, 7, 9, 4, D=6, M=3, bits=4, blocks=True, residual=True, ids=True, keep=True),
    _ivf(33, 500, 3, 5, 3, D=8, M=4, bits=4, blocks=True, ties=True),
    _ivf(9, 400, 5, 6, 2, D=8, M=2, bits=8, blocks=True, residual=True, metric=1),
    _ivf(2, 130, 4, 3, 3, D=9, M=3, bits=5, residual=True),
    _ivf(17, 300, 9, 4, 2, D=33, int8=True, ids=True),
    _ivf(5, 200, 6, 8, 8, D=16, metric=1, ties=True),
    _ivf(0, 9, 2, 3, 1, D=3),
    _ivf(2, 0, 3, 4, 2, D=4, M=2, bits=4, blocks=True),
    _ivf(3, 90, 4, 5, 2, D=8, M=4, bits=2, residual=True),
    _ivf(4, 300, 5, 7, 3, D=17, metric=3, ids=True),
]
IVF_SWEEP = [
    _ivf(Q, 1_000_000, 10, 1024, 8, D=128, M=M, bits=bits, blocks=True, residual=True)
    for Q in (1, 64) for M, bits in ((16, 8), (32, 4))
]  # fmt: skip


def draw_ivf(rng: Random) -> Case:
    flags = ("ids", "keep", "ties")
    lists = rng.randint(1, 9)
    case = _ivf(rng.choice([0, 1, 2, 5, 20]), rng.choice([0, 1, 33, 100, 700]), rng.choice([1, 2, 10, 70]), lists,
                rng.randint(1, lists), metric=rng.choice([0, 0, 1]))  # fmt: skip
    case |= {flag: True for flag in flags if rng.random() < 0.35}
    if rng.random() < 0.4:
        case["metric"] = rng.choice([case["metric"], 3, 4])
        return case | {"D": rng.choice([1, 3, 16, 31])} | ({"int8": True} if rng.random() < 0.3 else {})
    M, bits = rng.randint(1, 8), rng.choice([4, 4, 8, rng.randint(1, 9)])
    blocks = bits in (4, 8) and rng.random() < 0.6
    return case | {"D": M * rng.randint(1, 5), "M": M, "bits": bits, "blocks": blocks, "residual": rng.random() < 0.6}


def _ivf_rows(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor | None, ...]:
    """Rows, codebooks, what is added to a row, scale and offset."""
    n, D = case["n"], case["D"]
    if not case.get("M"):
        _, rows, _, scale, offset, *_ = _topk_inputs(case, dtype, generator)
        return rows, None, None, scale, offset
    M, bits = case["M"], case["bits"]
    books = _normal(generator, M, 2**bits, D // M)
    codes = _codes(case, n, generator)
    rows = interleave(codes, M, bits) if case.get("blocks") else codes
    bias = _normal(generator, n) if case.get("residual") and not case.get("metric") else None
    return rows, books.round() if case.get("ties") else books, bias, None, None


def _ivf_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Lists in any order, some empty, the last too long."""
    n, lists = case["n"], case["lists"]
    queries, centroids = _normal(generator, case["Q"], case["D"]), _normal(generator, lists, case["D"])
    if case.get("ties"):
        queries, centroids = queries.round(), centroids.round()
    inner = torch.randint(0, n + 1, (lists - 1,), generator=generator).sort().values
    cuts = torch.cat([torch.zeros(1, dtype=torch.int64), inner, torch.full((1,), n + 3)])
    extents = torch.stack([cuts[:-1], cuts[1:]], 1)[torch.randperm(lists, generator=generator)]
    _, ids, keep = _search_inputs(case, generator)
    return (
        queries, centroids, extents, *_ivf_rows(case, dtype, generator), ids, keep, n, case["nprobe"], case["k"],
        case.get("metric", 0), case.get("residual", False),
    )  # fmt: skip


ivf_op = Op(
    "ivf_search",
    reference.ivf_search_of(reference),
    made_of=reference.ivf_search_of,
    words=_WORDS,
    axes={
        "queries": "Q D", "centroids": "lists D", "extents": "lists 2", "rows": "n width or n//32 M block_bytes",
        "codebooks": "M L d", "row_bias": "n", "scale": "D", "offset": "D", "ids": "n", "keep": "n//8",
    },
    dtypes={
        "queries": SINGLE, "centroids": SINGLE, "extents": (torch.int64,),
        "rows": (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8), "codebooks": SINGLE,
        "row_bias": SINGLE, "scale": SINGLE, "offset": SINGLE, "ids": (torch.int64,), "keep": _BYTES,
    },
    outputs={"distances": torch.float32, "ids": torch.int64},
    shapes=lambda queries, *rest: ((queries.shape[0], rest[-3]),) * 2,
    domain=Domain(_ivf_inputs, IVF_CASES, IVF_SWEEP, draw_ivf, ("Q",), "Q"),
    flops=lambda case: case["Q"] * (2.0 * case["lists"] * case["D"] + case["n"] / case["lists"] * case["nprobe"]
                                    * case.get("M", 2 * case["D"])),
    autocast=(),
    vmap=loop_vmap,
    sharding=rules.shard_queries,
    validate=rules.validate_ivf,
    refuses={"cuda": rules.refused_by_cuda(4096, nprobe=-4, k=-3)},
    gradient=_NO_ORDER,
)  # fmt: skip
