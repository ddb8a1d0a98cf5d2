"""A graph as a request of OpenVINO on as many threads as torch has."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from metate import library
from metate.bench.run import Skip

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def opset() -> tuple[ModuleType, ModuleType]:
    """openvino and its operators."""
    if importlib.util.find_spec("openvino") is None:
        raise Skip("needs openvino")
    import openvino
    from openvino import opset13

    return openvino, opset13


def request(output: Any, parameters: Sequence[Any], dtype: torch.dtype, **settings: Any) -> Any:
    """Computes the output in a dtype."""
    if dtype == torch.bfloat16 and "avx512bf16" not in library.isas():
        raise Skip("emulates bfloat16 on this processor")
    openvino, operators = opset()
    settings |= {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
    }
    model = openvino.Model([operators.result(output)], list(parameters), "graph")
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
