"""Attention forward, training, column sums and merging, beside PyTorch, ONNX Runtime, OpenVINO, ggml and flash-attn.

Layouts that a rival prefers, masks and compilations are made outside the timing. A rival that lacks a dtype gets the
same inputs in float32 and says so in its name.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import metate
from metate.bench import ggml
from metate.bench.onnx_session import session
from metate.bench.openvino_request import opset, request
from metate.bench.run import Run, Setup, Skip, Workload, call_op
from metate.op import Case
from metate.ops.attention.declaration import attention_op, backward_op, column_sums_op, delta_op, merge_op

Sets = list[tuple[Tensor, ...]]  # (batch, heads, seqlen, head_dim), contiguous
NAIVE_BYTES = 2 << 30


def workloads(compile: bool) -> list[Workload]:
    forward = {"torch naive": naive, "torch SDPA": sdpa}
    if compile:
        forward["torch flex_attention, compiled"] = flex
    training = {"torch naive": naive_training, "torch SDPA": sdpa_training}
    if torch.cuda.is_available():
        forward["torch SDPA flash"] = lambda setup: sdpa(setup, SDPBackend.FLASH_ATTENTION)
        forward["torch SDPA cuDNN"] = lambda setup: sdpa(setup, SDPBackend.CUDNN_ATTENTION)
        forward["flash-attn"] = flash
        training["torch SDPA flash"] = lambda setup: sdpa_training(setup, SDPBackend.FLASH_ATTENTION)
        training["torch SDPA cuDNN"] = lambda setup: sdpa_training(setup, SDPBackend.CUDNN_ATTENTION)
    else:
        forward["onnxruntime GroupQueryAttention, float32"] = onnxruntime
        forward["openvino ScaledDotProductAttention"] = openvino
        forward["ggml flash_attn_ext, float32 or float16"] = flash_attention
    dtypes = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32, torch.bfloat16]

    def workload(name: str, op: Any, rivals: Any, ours: Any = call_op, **others: Any) -> Workload:
        settings: dict[str, Any] = {"flops": op.flops, "dtypes": dtypes, "label": label, **others}
        return Workload(name, op, op.domain.sweep, rivals, ours, **settings)

    both = lambda case: attention_op.flops(case) + backward_op.flops(case)  # noqa: E731
    return [
        workload("attention", attention_op, forward, checked=1),
        workload("attention, forward and backward", backward_op, training, train_ours, flops=both, checked=3),
        workload("attention, delta of the backward", delta_op, {"torch": reference}, label=rows_label),
        workload("attention column sums", column_sums_op, {"torch naive": naive_sums}),
        workload("merge of attention states", merge_op, {"torch": reference}, label=merge_label),
    ]


def label(case: Case) -> str:
    heads = f"H{case['Hq']}" + (f"/{case['Hkv']}" if case["Hkv"] != case["Hq"] else "")
    marks = [mark for mark in ("causal",) if case.get(mark)]
    if "window" in case:
        marks.append(f"window {case['window'][0] + 1}")
    if "lengths_q" in case:
        marks.append(f"{len(case['lengths_q'])} packed")
    return " ".join([f"B{case['B']} S{case['Sq']} {heads} D{case['D']}", *marks])


def rows_label(case: Case) -> str:
    return f"B{case['B']} S{case['S']} H{case['H']} D{case['Dv']}"


def merge_label(case: Case) -> str:
    return f"n{case['n']} {rows_label(case)}"


# What rivals get.


def heads_first(setup: Setup, names: Sequence[str] = ("q", "k", "v"), dtype: torch.dtype | None = None) -> Sets:
    """The inputs as (batch, heads, seqlen, head_dim); packed sequences of one length become the batch."""
    sets = []
    for named in setup.named:
        tensors = [named[name].to(dtype or setup.dtype) for name in names]
        if "lengths_q" in setup.case:
            lengths = {*setup.case["lengths_q"], *setup.case["lengths_k"]}
            if len(lengths) > 1 or sum(setup.case["lengths_q"]) != setup.case["Sq"]:
                raise Skip("packed sequences of different lengths")
            tensors = [t.view(-1, *lengths, *t.shape[2:]) for t in tensors]
        sets.append(tuple(t.transpose(1, 2).contiguous() for t in tensors))
    return sets


def back(out: Tensor, setup: Setup) -> Tensor:
    """(batch, heads, seqlen, head_dim) in our layout, for the comparison."""
    return out.transpose(1, 2).reshape(setup.case["B"], setup.case["Sq"], out.shape[1], out.shape[3])


def allowed(setup: Setup, sets: Sets) -> Tensor | None:
    """The mask as a bool matrix, None where plain causal says it all."""
    if "window" not in setup.case:
        return None
    sq, sk = sets[0][0].shape[2], sets[0][1].shape[2]
    distance = torch.arange(sk) - torch.arange(sq)[:, None] - (sk - sq)
    return ((distance <= 0) & (distance >= -setup.case["window"][0])).to(setup.device)


def _rotate(sets: Sets, setup: Setup, call: Callable[..., Tensor]) -> Run:
    @torch.no_grad()
    def run(i: int) -> Tensor:
        return back(call(*sets[i % len(sets)]), setup)

    return run


# Forward.


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The textbook formula; query heads of a group become rows, so that nothing is repeated."""
    B, H, S, D = q.shape
    scores = q.reshape(B, k.shape[1], -1, D) @ k.transpose(-1, -2) * D**-0.5
    seen = torch.ones(S, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - S) if mask is None else mask
    scores = scores.view(B, H, S, -1).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1).view(B, k.shape[1], -1, k.shape[2]) @ v).view(B, H, S, v.shape[3])


def _room_for_scores(setup: Setup, sets: Sets) -> None:
    q, k = sets[0][0], sets[0][1]
    size = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
    if size > NAIVE_BYTES:
        raise Skip(f"its score matrix takes {size / 2**30:.1f} GiB")


def naive(setup: Setup) -> Run:
    sets = heads_first(setup)
    _room_for_scores(setup, sets)
    mask = allowed(setup, sets)
    return _rotate(sets, setup, lambda q, k, v: plain(q, k, v, mask))


def sdpa(setup: Setup, backend: SDPBackend | None = None) -> Run:
    sets = heads_first(setup)
    call = _sdpa_call(setup, sets)
    if backend is None:
        return _rotate(sets, setup, call)

    def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return call(q, k, v)

    return _rotate(sets, setup, forced)


def _sdpa_call(setup: Setup, sets: Sets) -> Callable[..., Tensor]:
    mask, grouped = allowed(setup, sets), setup.case["Hq"] != setup.case["Hkv"]
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def flex(setup: Setup) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # past a number of recompilations it would run uncompiled
    sets = heads_first(setup)
    q, k = sets[0][0], sets[0][1]
    left = setup.case["window"][0] if "window" in setup.case else q.shape[2]
    mask = create_block_mask(
        lambda b, h, i, j: (j <= i) & (j >= i - left), None, None, q.shape[2], k.shape[2], device=setup.device
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = q.shape[1] != k.shape[1]
    return _rotate(sets, setup, lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped))


def flash(setup: Setup) -> Run:
    if importlib.util.find_spec("flash_attn") is None:
        raise Skip("not installed")
    from flash_attn import flash_attn_func

    window = setup.case.get("window", (-1, -1))
    sets = [tuple(t.transpose(1, 2).contiguous() for t in tensors) for tensors in heads_first(setup)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_func(q, k, v, causal=True, window_size=window)
        return out.transpose(1, 2)

    return _rotate(sets, setup, call)


def onnxruntime(setup: Setup) -> Run:
    return group_queries(heads_first(setup, dtype=torch.float32), setup.case)


def group_queries(sets: Sets, case: Case) -> Run:
    """GroupQueryAttention of the last tokens: past and present share a buffer, inputs and outputs are bound once."""
    session = _group_query_session(*sets[0][:2], case)
    bound = [_bind(session, *tensors) for tensors in sets]

    def run(i: int) -> Tensor:
        binding, out, _ = bound[i % len(bound)]
        session.run_with_iobinding(binding)
        return torch.from_numpy(out).view(case["B"], case["Sq"], case["Hq"], -1)

    return run


def _group_query_session(q: Tensor, k: Tensor, case: Case) -> Any:
    (B, H, S, D), (_, G, T, _) = q.shape, k.shape
    window = {"local_window_size": case["window"][0] + 1} if "window" in case else {}
    tokens, past = ((B, S, G * D), np.float32), ((B, G, T, D), np.float32)
    inputs = {
        "q": ((B, S, H * D), np.float32),
        "k": tokens,
        "v": tokens,
        "past_k": past,
        "past_v": past,
        "last": ((B,), np.int32),
        "total": ((1,), np.int32),
    }
    outputs = {"out": inputs["q"], "present_k": past, "present_v": past}
    return session("GroupQueryAttention", inputs, outputs, {}, num_heads=H, kv_num_heads=G, **window)


def _bind(session: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Any, Any]:
    import onnxruntime as ort

    def tokens_first(x: Tensor) -> Any:
        return x.transpose(1, 2).flatten(2).contiguous().numpy()

    B, _, T, _ = k.shape
    arrays = {
        "q": tokens_first(q),
        "k": tokens_first(k[:, :, T - q.shape[2] :]),
        "v": tokens_first(v[:, :, T - q.shape[2] :]),
        "last": np.full(B, T - 1, np.int32),
        "total": np.array([T], np.int32),
    }
    out = np.empty_like(arrays["q"])
    binding = session.io_binding()
    for name, array in arrays.items():
        binding.bind_cpu_input(name, array)
    pasts = [ort.OrtValue.ortvalue_from_numpy(x.contiguous().numpy()) for x in (k, v)]
    for letter, past in zip("kv", pasts, strict=True):
        binding.bind_ortvalue_input(f"past_{letter}", past)
        binding.bind_ortvalue_output(f"present_{letter}", past)
    binding.bind_output("out", "cpu", 0, np.float32, out.shape, out.ctypes.data)
    return binding, out, (arrays, pasts)


def openvino(setup: Setup) -> Run:
    """It has no grouped heads: keys and values are repeated outside the timing."""
    if "window" in setup.case:
        raise Skip("no window")
    group = setup.case["Hq"] // setup.case["Hkv"]
    sets = [
        (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
        for q, k, v in heads_first(setup, dtype=torch.float32)
    ]
    run = scaled_products(sets, setup.dtype, causal=True)
    return lambda i: back(run(i), setup)


def scaled_products(sets: Sets, dtype: torch.dtype, causal: bool) -> Run:
    """OpenVINO's ScaledDotProductAttention, computed in a dtype."""
    ov, operators = opset()
    parameters = [operators.parameter(list(t.shape), ov.Type.f32) for t in sets[0]]
    out = operators.scaled_dot_product_attention(*parameters, causal=causal)
    called = request(out, parameters, dtype)
    tensors = [[ov.Tensor(t.contiguous().numpy(), shared_memory=True) for t in tensors] for tensors in sets]

    def run(i: int) -> Tensor:
        for index, tensor in enumerate(tensors[i % len(tensors)]):
            called.set_input_tensor(index, tensor)
        called.infer()
        return torch.from_numpy(called.get_output_tensor(0).data)

    return run


def flash_attention(setup: Setup) -> Run:
    """ggml is faster with float16 than with bfloat16; it wants every mask spelt out."""
    sets = heads_first(setup, dtype=half_as_float16(setup.dtype))
    mask = allowed(setup, sets)
    if mask is None:
        mask = torch.ones(sets[0][0].shape[2], sets[0][1].shape[2], dtype=torch.bool).tril()
    run = ggml.flash_attention(sets, torch.zeros(mask.shape).masked_fill_(~mask, -math.inf))
    return lambda i: back(run(i).transpose(1, 2), setup)


def half_as_float16(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.bfloat16 else dtype


# Training.


def _train(
    leaves: list[list[Tensor]], grads: list[Tensor], call: Callable[..., Tensor], layout: Callable[[Tensor], Tensor]
) -> Run:
    def run(i: int) -> tuple[Tensor, ...]:
        tensors = leaves[i % len(leaves)]
        for tensor in tensors:
            tensor.grad = None
        call(*tensors).backward(grads[i % len(grads)])
        return tuple(layout(tensor.grad) for tensor in tensors if tensor.grad is not None)

    return run


def train_ours(setup: Setup, backend: str) -> Run:
    leaves = [[named[x].clone().requires_grad_() for x in "qkv"] for named in setup.named]
    grads = [named["grad_out"] for named in setup.named]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = metate.attention(q, k, v, causal=True, backend=backend)
        return out

    return _train(leaves, grads, call, lambda grad: grad)


def _train_rival(setup: Setup, call: Callable[[Sets], Callable[..., Tensor]]) -> Run:
    sets = heads_first(setup, ("q", "k", "v", "grad_out"))
    leaves = [[t.requires_grad_() for t in tensors[:3]] for tensors in sets]
    return _train(leaves, [tensors[3] for tensors in sets], call(sets), lambda grad: grad.transpose(1, 2))


def naive_training(setup: Setup) -> Run:
    def call(sets: Sets) -> Callable[..., Tensor]:
        _room_for_scores(setup, sets)
        return lambda q, k, v: plain(q, k, v, None)

    return _train_rival(setup, call)


def sdpa_training(setup: Setup, backend: SDPBackend | None = None) -> Run:
    run = _train_rival(setup, lambda sets: _sdpa_call(setup, sets))
    if backend is None:
        return run

    def forced(i: int) -> Any:
        with sdpa_kernel(backend):
            return run(i)

    return forced


# Column sums, merging.


def naive_sums(setup: Setup) -> Run:
    sets = heads_first(setup, ("q", "k"))
    _room_for_scores(setup, sets)

    @torch.no_grad()
    def run(i: int) -> Tensor:
        q, k = sets[i % len(sets)]
        B, H, S, D = q.shape
        scores = (q.reshape(B, k.shape[1], -1, D) @ k.transpose(-1, -2) * D**-0.5).view(B, H, S, -1)
        seen = torch.ones(S, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - S)
        return scores.masked_fill(~seen, -math.inf).softmax(-1, dtype=torch.float32).sum(-2)

    return run


def reference(setup: Setup) -> Run:
    return lambda i: setup.op.reference(*setup.sets[i % len(setup.sets)])
