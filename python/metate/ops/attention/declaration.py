"""The five attention operators, each with everything that is true of it whatever machine runs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from metate import masks
from metate.masks import AttentionMask
from metate.op import Case, Domain, Op
from metate.ops.attention import reference, rules

_Dtypes = dict[str, tuple[str | torch.dtype, ...]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WIDE = (torch.float32, torch.float64)
_WORDS = {
    "B": "batch", "Sq": "seqlen_q", "Sk": "seqlen_k", "S": "seqlen", "Hq": "heads", "Hkv": "kv_heads", "H": "heads",
    "D": "head_dim", "Dv": "value_dim",
}  # fmt: skip
_MASKS = {
    "intervals": "B? Hq? Sq 2",
    "blocks": "B? Hq? Sq//block_m Sk//block_n",
    "bits": "B? Hq? Sq Sk//32",
    "cu_seqlens_q": "sequences+1",
    "cu_seqlens_k": "sequences+1",
}
_MASK_DTYPES: _Dtypes = {
    "intervals": (torch.int32,), "blocks": (torch.uint8,), "bits": (torch.int32,),
    "cu_seqlens_q": (torch.int32,), "cu_seqlens_k": (torch.int32,),
}  # fmt: skip
_GIVEN = {name: f"mask.{name}" for name in ("intervals", "blocks", "bits")}  # as fields of an AttentionMask
_SCORES = {"bias": "B? Hq? Sq? Sk?", "alibi_slopes": "Hq or slopes Hq"}
_SCORE_DTYPES: _Dtypes = {"bias": ("q", torch.float32), "alibi_slopes": _WIDE}
_QKV = {"q": "B Sq Hq D", "k": "B Sk Hkv D", "v": "B Sk Hkv Dv"}
_QKV_DTYPES: _Dtypes = {"q": FLOATS, "k": ("q",), "v": ("q",)}


# Cases.


def _case(B: int, Sq: int, Sk: int, Hq: int, Hkv: int, D: int, Dv: int | None = None, **flags: Any) -> Case:
    return dict(B=B, Sq=Sq, Sk=Sk, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv or D, **flags)


CASES = [
    _case(1, 1, 1, 1, 1, 1),
    _case(2, 63, 65, 4, 2, 33, 17),
    _case(1, 65, 130, 2, 1, 64, causal=True),
    _case(1, 130, 65, 2, 2, 128, causal=True),  # rows without a key
    _case(2, 64, 64, 2, 2, 64, causal=True, top_left=True, softcap=5.0),
    _case(1, 33, 129, 2, 1, 40, window=(7, 3), alibi=1),
    _case(2, 66, 66, 2, 2, 32, window=(16, 0), sinks=True, alibi=2),
    _case(2, 37, 70, 4, 2, 16, bias=(2, 4, 37, 70), causal=True),
    _case(2, 37, 70, 4, 4, 24, bias=(1, 4, 1, 70), softcap=3.0, sinks=True),
    _case(2, 96, 96, 2, 1, 32, mask="documents"),
    _case(1, 70, 70, 2, 2, 32, mask="blocks", causal=True),
    _case(2, 40, 77, 2, 1, 32, mask="bits"),
    _case(2, 65, 129, 2, 2, 64, dropout_p=0.3, causal=True),
    _case(1, 100, 120, 4, 2, 48, lengths_q=(0, 37, 1, 60), lengths_k=(5, 50, 1, 60), causal=True, alibi=2),
    _case(1, 64, 64, 2, 2, 64, lengths_q=(40, 20), lengths_k=(20, 40), window=(9, 9), sinks=True, dropout_p=0.2),
    _case(1, 3, 5, 1, 1, 256, 512),
    _case(1, 192, 192, 1, 1, 40, causal=True),  # more keys than a block, a head_dim with a short last panel
    _case(1, 1, 300, 8, 1, 128),
    _case(1, 65, 3, 2, 2, 100, 8),  # a long product of few scores
    _case(1, 150, 200, 4, 2, 32, mask="blocks of heads"),
    _case(2, 75, 140, 4, 2, 48, causal=True, scale=3.0, sinks=True),  # an lse beyond what it may be
    _case(1, 70, 70, 2, 1, 130, scale=1.0, softcap=40.0, bias=(1, 2, 70, 70), dropout_p=0.2, mask="documents"),
    _case(1, 60, 90, 2, 2, 24, scale=9.0, partial=True),
    _case(0, 4, 4, 2, 1, 8),
    _case(2, 0, 4, 2, 1, 8),
    _case(2, 4, 0, 2, 1, 8),
]

SWEEP = [_case(1, s, s, 32, 8, 128, causal=True) for s in (512, 2048, 4096, 8192)] + [
    _case(1, 1024, 1024, 12, 12, 64, causal=True),
    _case(1, 4096, 4096, 8, 8, 64, causal=True, window=(255, 0)),
    _case(1, 4096, 4096, 8, 8, 64, lengths_q=(1024,) * 4, lengths_k=(1024,) * 4, causal=True),
]
BACKWARD_SWEEP = [_case(2, 1024, 1024, 12, 12, 64, causal=True), _case(1, 2048, 2048, 8, 2, 128, causal=True)]


def draw(rng: Random) -> Case:
    """Any legal combination, small: of fewer queries and keys where heads are wide."""
    heads, wide = rng.choice([1, 2, 3]), rng.random() < 0.1
    q = rng.choice([1, 2, 17, 50] if wide else [0, 1, 2, 17, 63, 64, 65, 130])
    k = rng.choice([1, 3, 31, 70] if wide else [0, 1, 3, 31, 64, 65, 127, 200])
    D, Dv = (rng.randint(1, 512 if wide else 140) for _ in range(2))
    case = _case(rng.randint(0, 3), q, k, heads * rng.choice([1, 2, 4]), heads, D, Dv)
    if rng.random() < 0.1:
        case["scale"] = 20 / D**0.5  # for an lse beyond what it may be
    case["causal"] = rng.random() < 0.5
    case["top_left"] = rng.random() < 0.2
    if rng.random() < 0.3:
        case["window"] = (rng.randint(-1, 70), rng.randint(-1, 70))
    for name, value in (("softcap", 4.0), ("sinks", True), ("dropout_p", rng.choice([0.01, 0.5, 0.99]))):
        if rng.random() < 0.2:
            case[name] = value
    if rng.random() < 0.2:
        case["alibi"] = rng.choice([1, 2])
    if rng.random() < 0.2 and q and k:
        cut_q, cut_k = sorted(rng.choices(range(q + 1), k=2)), sorted(rng.choices(range(k + 1), k=2))
        case.update(B=1, lengths_q=(cut_q[0], cut_q[1] - cut_q[0]), lengths_k=(cut_k[0], cut_k[1] - cut_k[0]))
        return case
    if rng.random() < 0.3:
        case["bias"] = tuple(size if rng.random() < 0.6 else 1 for size in (case["B"], case["Hq"], q, k))
    if rng.random() < 0.3:
        case["mask"] = rng.choice(["blocks", "bits", *(["documents"] if q == k else [])])
    return case


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Every argument of the attention operators by name."""
    B, Sq, Sk, Hq, Hkv, D, Dv = (case[axis] for axis in ("B", "Sq", "Sk", "Hq", "Hkv", "D", "Dv"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    named: dict[str, Any] = dict(
        q=normal(B, Sq, Hq, D).to(dtype), k=normal(B, Sk, Hkv, D).to(dtype), v=normal(B, Sk, Hkv, Dv).to(dtype),
        grad_out=normal(B, Sq, Hq, Dv).to(dtype), bias=None, alibi_slopes=None, sinks=None,
        cu_seqlens_q=None, cu_seqlens_k=None, partial=case.get("partial", False),
    )  # fmt: skip
    if "lengths_q" in case:
        for name in "qk":
            lengths = torch.tensor([0, *case[f"lengths_{name}"]])
            named[f"cu_seqlens_{name}"] = lengths.cumsum(0).to(torch.int32)
    if "bias" in case:
        named["bias"] = normal(*case["bias"]).to(wide)
    if "alibi" in case:
        entries = len(case["lengths_q"]) if "lengths_q" in case else B
        named["alibi_slopes"] = 0.1 * normal(*([entries, Hq] if case["alibi"] == 2 else [Hq])).abs().to(wide)
    if case.get("sinks"):
        named["sinks"] = normal(Hq).to(wide)
    mask = _mask(case, generator)
    left, right = case.get("window", (-1, -1))
    named.update(
        intervals=mask.intervals, blocks=mask.blocks, bits=mask.bits, scale=case.get("scale", D**-0.5),
        window_left=left, window_right=(0 if right < 0 else min(right, 0)) if case.get("causal") else right,
        top_left=case.get("top_left", False),
        softcap=case.get("softcap", 0.0), dropout_p=case.get("dropout_p", 0.0), seed=1234567890123, offset=7,
        block_m=mask.block_size[0], block_n=mask.block_size[1],
    )  # fmt: skip
    return named


def _mask(case: Case, generator: torch.Generator) -> AttentionMask:
    B, Sq, Sk, Hq = case["B"], case["Sq"], case["Sk"], case["Hq"]
    if case.get("mask") == "documents":
        return AttentionMask.documents(torch.randint(0, 2, (B, Sq), generator=generator).sort(1).values)
    if case.get("mask") in ("blocks", "blocks of heads"):
        size, heads = ((16, 24), 1) if case["mask"] == "blocks" else ((64, 32), Hq)
        visible = torch.rand(B, heads, -(-Sq // size[0]), -(-Sk // size[1]), generator=generator) < 0.6
        return AttentionMask.block_sparse(visible, size)
    if case.get("mask") == "bits":
        return AttentionMask.dense(torch.rand(B, Hq, Sq, Sk, generator=generator) < 0.5)
    return AttentionMask()


def _make(*names: str) -> Any:
    """`make` of a Domain whose operator takes these arguments."""

    def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        named = _inputs(case, dtype, generator)
        named.update(need_dbias=named["bias"] is not None, need_dalibi_slopes=named["alibi_slopes"] is not None)
        if "lse" in names:  # of the truth: an lse that plain torch rounded would cancel its own errors alone
            forward = tuple(named[name] for name in attention_op.parameters)
            out, lse = attention_op.compute(torch.float64, forward)
            delta = reference.attention_delta(out, named["grad_out"].to(out.dtype), None)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            named.update(lse=lse.to(wide), delta=delta.to(wide))
        return tuple(named[name] for name in names)

    return make


def visible_pairs(case: Case) -> int:
    """How many (query, key) pairs of one head the masks of a sweep case leave."""
    left, right = case.get("window", (-1, -1))
    right = 0 if case.get("causal") else right
    lengths = zip(case.get("lengths_q", (case["Sq"],)), case.get("lengths_k", (case["Sk"],)), strict=True)
    top_left = case.get("top_left")
    return sum(masks.visible_pairs(sq, sk, 0 if top_left else sk - sq, left, right) for sq, sk in lengths)


def _sizes(named: Case) -> Case:
    """Of a call; packed sequences of unknown lengths count as one."""
    case = {"Dv": 0, **named, "window": (named["window_left"], named["window_right"])}
    lengths = [masks.lengths_of(named[f"cu_seqlens_{name}"]) for name in "qk"]
    return case if None in lengths else {**case, "lengths_q": lengths[0], "lengths_k": lengths[1]}


def _products(forward: int, backward: int) -> Any:
    """Cost of that many products of width D and of width Dv over the visible pairs."""
    return lambda case: (
        2.0 * case["B"] * case["Hq"] * visible_pairs(case) * (forward * case["D"] + backward * case["Dv"])
    )


# Operators.


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(function.__annotations__)[:-1]


attention_op = Op(
    "attention",
    reference.attention,
    words=_WORDS,
    axes={**_QKV, **_SCORES, "sinks": "Hq", **_MASKS},
    dtypes={**_QKV_DTYPES, **_SCORE_DTYPES, "sinks": _WIDE, **_MASK_DTYPES},
    outputs={"out": "q", "lse": torch.float32},
    shapes=lambda q, k, v, *_: ((*q.shape[:3], v.shape[3]), (q.shape[0], q.shape[2], q.shape[1])),
    domain=Domain(_make(*_parameters(reference.attention)), CASES, SWEEP, draw, ("B", "Sq", "Sk"), "B"),
    flops=_products(1, 1),
    sizes=_sizes,
    autocast=("q", "k", "v"),
    vmap=rules.fold_vmap,
    sharding=rules.shardings,
    validate=rules.validate_forward,
    refuses={"cuda": lambda q, k, v, *_: rules.refused_by_cuda(q, k, v)},
    contents=("cu_seqlens_q", rules.check_forward),
    contents_in_kernel=True,
    given=_GIVEN,
)


def _delta_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor | None, ...]:
    B, S, H, Dv = (case[axis] for axis in ("B", "S", "H", "Dv"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out, grad_out = (torch.randn(B, S, H, Dv, generator=generator).to(dtype) for _ in range(2))
    return out, grad_out, torch.randn(B, H, S, generator=generator).to(wide) if case["grad_lse"] else None


def _delta_case(B: int, S: int, H: int, Dv: int, grad_lse: bool) -> Case:
    return dict(B=B, S=S, H=H, Dv=Dv, grad_lse=grad_lse)


delta_op = Op(
    "attention_delta",
    reference.attention_delta,
    words=_WORDS,
    axes={"out": "B S H Dv", "grad_out": "B S H Dv", "grad_lse": "B H S"},
    dtypes={"out": FLOATS, "grad_out": ("out",), "grad_lse": _WIDE},
    outputs={"delta": torch.float32},
    shapes=lambda out, *_: ((out.shape[0], out.shape[2], out.shape[1]),),
    domain=Domain(
        _delta_inputs,
        [
            _delta_case(*sizes)
            for sizes in (
                (1, 1, 1, 1, False),
                (2, 65, 3, 33, True),
                (1, 7, 2, 128, False),
                (1, 19, 1, 300, True),
                (0, 3, 1, 4, False),
                (2, 0, 1, 4, True),
                (1, 3, 0, 4, False),
            )
        ],
        [_delta_case(2, 1024, 12, 64, False)],
        lambda rng: _delta_case(
            rng.randint(0, 3), rng.randint(0, 130), rng.randint(0, 5), rng.randint(1, 200), rng.random() < 0.5
        ),
        ("B", "S"),
        "B",
    ),
    flops=lambda case: 2.0 * case["B"] * case["S"] * case["H"] * case["Dv"],
    autocast=(),
    vmap=rules.delta_vmap,
    sharding=rules.delta_shardings,
    validate=rules.validate_delta,
    refuses={"cuda": lambda out, *_: "float64: up to float32" if out.dtype == torch.float64 else None},
)

backward_op = Op(
    "attention_backward",
    reference.attention_backward,
    words=_WORDS,
    axes={
        "grad_out": "B Sq Hq Dv",
        **_QKV,
        "lse": "B Hq Sq",
        "delta": "B Hq Sq",
        **_SCORES,
        "sinks": "Hq",
        **_MASKS,
    },
    dtypes={
        "grad_out": ("q",),
        **_QKV_DTYPES,
        "lse": _WIDE,
        "delta": _WIDE,
        **_SCORE_DTYPES,
        "sinks": _WIDE,
        **_MASK_DTYPES,
    },
    outputs={"dq": "q", "dk": "q", "dv": "q", "dbias": torch.float32, "dalibi_slopes": torch.float32},
    shapes=rules.backward_shapes,
    domain=Domain(
        _make(*_parameters(reference.attention_backward)), CASES, BACKWARD_SWEEP, draw, ("B", "Sq", "Sk"), "B"
    ),
    flops=_products(3, 2),
    sizes=_sizes,
    autocast=("grad_out", "q", "k", "v"),
    vmap=rules.fold_vmap,
    sharding=rules.shardings,
    validate=rules.validate_backward,
    refuses={"cuda": lambda grad_out, q, k, v, *_: rules.refused_by_cuda(q, k, v)},
    contents=("cu_seqlens_q", rules.check_backward),
    contents_in_kernel=True,
    given=_GIVEN,
)

column_sums_op = Op(
    "attention_column_sums",
    reference.attention_column_sums,
    words=_WORDS,
    axes={"q": _QKV["q"], "k": _QKV["k"], "lse": "B Hq Sq", **_SCORES, "sinks": "Hq", **_MASKS},
    dtypes={"q": FLOATS, "k": ("q",), "lse": _WIDE, **_SCORE_DTYPES, "sinks": _WIDE, **_MASK_DTYPES},
    outputs={"sums": torch.float32},
    shapes=lambda q, k, *_: ((q.shape[0], q.shape[2], k.shape[1]),),
    domain=Domain(_make(*_parameters(reference.attention_column_sums)), CASES, SWEEP[:1], draw, ("B", "Sq", "Sk"), "B"),
    flops=_products(1, 0),
    sizes=_sizes,
    autocast=("q", "k"),
    vmap=rules.fold_vmap,
    sharding=rules.shardings,
    validate=rules.validate_column_sums,
    refuses={"cuda": lambda q, k, *_: rules.refused_by_cuda(q, k, k)},
    contents=("cu_seqlens_q", rules.check_column_sums),
    contents_in_kernel=True,
    given=_GIVEN,
    gradient="column sums are a statistic for cache eviction; detach them, or sum explicit probabilities",
)

attention_op.differentiable(rules.backward_of(delta_op, backward_op), rules.save_forward)
delta_op.differentiable(rules.backward_delta, rules.save_delta)
backward_op.differentiable(rules.double_backward, rules.save_backward)


def _merge_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    n, B, S, H, Dv = (case[axis] for axis in ("n", "B", "S", "H", "Dv"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lses = 3 * torch.randn(n, B, H, S, generator=generator).to(wide)
    if n > 1 and S > 1:
        lses[0, :, :, 0], lses[:, :, :, 1] = -math.inf, -math.inf  # a part without keys, a row without any
    return torch.randn(n, B, S, H, Dv, generator=generator).to(dtype), lses


def _merge_case(n: int, B: int, S: int, H: int, Dv: int) -> Case:
    return dict(n=n, B=B, S=S, H=H, Dv=Dv)


merge_op = Op(
    "merge_attention_states",
    reference.merge_attention_states,
    words=_WORDS,
    axes={"outs": "n B S H Dv", "lses": "n B H S"},
    dtypes={"outs": FLOATS, "lses": _WIDE},
    outputs={"out": "outs", "lse": torch.float32},
    shapes=lambda outs, lses: (outs.shape[1:], lses.shape[1:]),
    domain=Domain(
        _merge_inputs,
        [
            _merge_case(*sizes)
            for sizes in (
                (1, 1, 1, 1, 1),
                (2, 2, 65, 3, 33),
                (5, 1, 7, 2, 128),
                (2, 0, 3, 1, 4),
                (3, 1, 0, 2, 4),
                (0, 1, 2, 1, 4),
            )
        ],
        [_merge_case(8, 1, 4096, 32, 128)],
        lambda rng: _merge_case(
            rng.randint(0, 6), rng.randint(0, 3), rng.randint(0, 130), rng.randint(1, 4), rng.randint(1, 200)
        ),
        ("n", "B", "S"),
        "B",
    ),
    flops=lambda case: 3.0 * case["n"] * case["B"] * case["S"] * case["H"] * case["Dv"],
    autocast=(),
    vmap=rules.merge_vmap,
    sharding=lambda op, args: [
        ({"out": b, "lse": c}, {"outs": b + 1, "lses": c + 1}) for b, c in ((0, 0), (2, 1), (1, 2))
    ],
    validate=rules.validate_merge,
    refuses={"cuda": lambda outs, lses: "float64: up to float32" if outs.dtype == torch.float64 else None},
)
merge_op.differentiable(rules.backward_merge, rules.save_merge)
