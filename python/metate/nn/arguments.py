"""What modules are called with: errors name it before torch's own layers see it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metate.errors import fail, require_dense


def require_input(op: str, x: Tensor, shape: str, hidden_size: int, layer: nn.Module) -> None:
    """x of the dimensions of `shape`, as "(batch, seqlen, {})", or of two or more for a "…", the last of hidden_size;
    in the dtype and on the device of a layer that it goes through, where that has a weight of floats."""
    require_dense(op, "x", x)
    dims = x.dim() >= 2 if "…" in shape else x.dim() == shape.count(",") + 1
    if not dims or x.shape[-1] != hidden_size:
        raise fail(op, "x", f"of shape {tuple(x.shape)}", shape.format(hidden_size))
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return
    if x.device != weight.device and not weight.is_meta:  # those of an offloaded layer come when it is called
        raise fail(op, "x", f"on {x.device}", f"{weight.device} like the module; move it with .to()")
    if x.dtype != weight.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise fail(op, "x", x.dtype, f"{weight.dtype} like the module; convert it with .to()", error=TypeError)
