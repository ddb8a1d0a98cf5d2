"""ggml's CPU backend through ctypes, where its libraries are found: inside llama-cpp-python, or where the loader looks.

A graph is made of tensors whose first dimension is the one side by side in memory, the reverse of torch's order.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metate.bench.run import Run, Skip
from metate.low_bit import unpack_codes
from metate.memory import prefer_large_pages

F32, F16, Q4_0, I32, BF16 = 0, 1, 2, 26, 30  # enum ggml_type
_MEMORY = 16 << 20  # for the descriptions of tensors; their data lie in buffers of the backend
_Pointer = ctypes.c_void_p


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _Pointer)(lambda level, text, data: None)


class _Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", _Pointer), ("no_alloc", ctypes.c_bool))


@cache
def _libraries() -> tuple[ctypes.CDLL, ...]:
    spec = importlib.util.find_spec("llama_cpp")
    folders = [str(Path(place, "lib")) + "/" for place in (spec and spec.submodule_search_locations) or ()]
    for folder in (*folders, ""):
        try:
            found = tuple(ctypes.CDLL(f"{folder}libggml-{part}.so") for part in ("base", "cpu"))
        except OSError:
            continue
        found[0].ggml_log_set(_SILENT, None)
        found[1].ggml_cpu_init()
        return found
    raise Skip("ggml is not installed: pip install llama-cpp-python")


def versions() -> dict[str, str]:
    """Of the ggml found: empty without one, or where it is too old to tell."""
    try:
        return {"ggml": ctypes.string_at(_call("version")).decode()}
    except Skip:
        return {}


def _call(name: str, *arguments: Any) -> int:
    """ggml_<name>: plain integers are pointers, other numbers come as the ctypes that they are passed as."""
    for library in _libraries():
        function = getattr(library, f"ggml_{name}", None)
        if function is not None:
            function.restype = _Pointer
            return function(*(_Pointer(a) if isinstance(a, int) else a for a in arguments)) or 0
    raise Skip(f"this ggml has no ggml_{name}")


class Graphs:
    """Tensors and the graphs over them, on as many threads as torch has."""

    def __init__(self) -> None:
        self.contexts = [_call("init", _Parameters(_MEMORY, None, True)) for _ in range(2)]
        self.backend = _call("backend_cpu_init")
        _call("backend_cpu_set_n_threads", self.backend, ctypes.c_int(torch.get_num_threads()))
        self.buffers: list[int] = []
        self.kept: list[Tensor] = []
        weakref.finalize(self, _free, self.backend, self.contexts, self.buffers)

    def tensor(self, kind: int, *sizes: int, weight: bool = False) -> int:
        sizes_ = (ctypes.c_int64 * len(sizes))(*sizes)
        return _call("new_tensor", self.contexts[weight], ctypes.c_int(kind), ctypes.c_int(len(sizes)), sizes_)

    def op(self, name: str, *arguments: Any) -> int:
        return _call(name, self.contexts[0], *arguments)

    def graph(self, out: int) -> int:
        found = self.op("new_graph")
        _call("build_forward_expand", found, out)
        return found

    def allocate(self, repack: bool) -> None:
        """Gives every tensor its memory; low-bit weights where ggml lays them out anew, if it can."""
        plain = _call("backend_cpu_buffer_type")
        weights = repack and self._repacking()
        for context, kind in zip(self.contexts, (plain, weights or plain), strict=True):
            buffer = _call("backend_alloc_ctx_tensors_from_buft", context, kind)
            if not buffer:  # there are no tensors of this kind
                continue
            self.buffers.append(buffer)
            begin, size = (_call(f"backend_buffer_get_{what}", buffer) for what in ("base", "size"))
            prefer_large_pages(begin, size)  # as ours lie: small ones take longer to look up

    def _repacking(self) -> int:
        name = ctypes.c_char_p(b"ggml_backend_dev_get_extra_bufts")
        registry = _call("backend_cpu_reg")
        address = _call("backend_reg_get_proc_address", registry, name)
        if not address:
            return 0
        device = _call("backend_reg_dev_get", registry, ctypes.c_size_t(0))
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(_Pointer), _Pointer)(address)(device)
        for i in itertools.count():  # up to a null pointer
            if not kinds or not kinds[i]:
                return 0
            if b"REPACK" in ctypes.string_at(_call("backend_buft_name", kinds[i])):
                return int(kinds[i])
        return 0

    def place(self, tensor: int, values: Tensor) -> None:
        """Gives a tensor the memory of `values`, before the others get theirs."""
        self.kept.append(values)
        self.buffers.append(_call("backend_cpu_buffer_from_ptr", values.data_ptr(), ctypes.c_size_t(values.nbytes)))
        _call("backend_tensor_alloc", self.buffers[-1], tensor, values.data_ptr())

    def set(self, tensor: int, values: Tensor) -> None:
        values = values.contiguous()
        size = ctypes.c_size_t(values.nbytes)
        _call("backend_tensor_set", tensor, values.data_ptr(), ctypes.c_size_t(0), size)

    def get(self, tensor: int, *shape: int) -> Tensor:
        out = torch.empty(shape)
        _call("backend_tensor_get", tensor, out.data_ptr(), ctypes.c_size_t(0), ctypes.c_size_t(out.nbytes))
        return out

    def run(self, graph: int) -> None:
        _call("backend_graph_compute", self.backend, graph)


def q4_0(codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    """Rows of 4-bit codes and their float16 scales, one for 32 columns, as ggml stores them: a scale, and in byte i the
    codes i and i + 16."""
    numbers = unpack_codes(codes, 4, columns).view(-1, 2, 16)
    return torch.cat([scales.reshape(-1, 1).view(torch.uint8), numbers[:, 0] | numbers[:, 1] << 4], 1)


def flash_attention(sets: Sequence[tuple[Tensor, ...]], mask: Tensor | None) -> Run:
    """Float32 queries on keys and values of their own dtype, (batch, heads, seqlen, head_dim), which stay where they
    are; a mask is added to the logits. Outputs are (batch, seqlen, heads, head_dim)."""
    (B, H, S, D), (_, G, T, Dv) = sets[0][0].shape, sets[0][2].shape
    kind = {torch.float32: F32, torch.float16: F16}[sets[0][1].dtype]
    graphs = Graphs()
    added = 0 if mask is None else graphs.tensor(F16, T, S)
    numbers = [ctypes.c_float(x) for x in (D**-0.5, 0, 0)]
    built = []
    for _ in sets:
        q, k, v = (graphs.tensor(F32, D, S, H, B), graphs.tensor(kind, D, T, G, B), graphs.tensor(kind, Dv, T, G, B))
        out = graphs.op("flash_attn_ext", q, k, v, added, *numbers)
        built.append((q, k, v, out, graphs.graph(out)))
    for (_, k, v, *_), (_, keys, values) in zip(built, sets, strict=True):
        graphs.place(k, keys)
        graphs.place(v, values)
    graphs.allocate(repack=False)
    for (q, *_), (queries, _, _) in zip(built, sets, strict=True):
        graphs.set(q, queries.float())
    if mask is not None:
        graphs.set(added, mask.half())

    def run(i: int) -> Tensor:
        *_, out, graph = built[i % len(built)]
        graphs.run(graph)
        return graphs.get(out, B, S, H, Dv)

    return run


def _free(backend: int, contexts: list[int], buffers: list[int]) -> None:
    for buffer in buffers:
        _call("backend_buffer_free", buffer)
    _call("backend_free", backend)
    for context in contexts:
        _call("free", context)
