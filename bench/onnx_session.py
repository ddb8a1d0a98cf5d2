"""One node as a session of ONNX Runtime on as many threads as torch has."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from metate.bench.run import Skip

Array = np.ndarray[Any, Any]
Value = tuple[tuple[int, ...], type]  # shape and kind of numbers


def session(
    op: str, inputs: Mapping[str, Value], outputs: Mapping[str, Value], weights: Mapping[str, Array], **attributes: Any
) -> Any:
    """com.microsoft's operator of the inputs, then the weights, which it may lay out anew."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        raise Skip("needs onnx and onnxruntime")
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    def value(name: str, shape: tuple[int, ...], kind: type) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)

    node = helper.make_node(op, [*inputs, *weights], [*outputs], domain="com.microsoft", **attributes)
    described = [[value(name, *form) for name, form in values.items()] for values in (inputs, outputs)]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], op, *described, constants)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=versions)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
