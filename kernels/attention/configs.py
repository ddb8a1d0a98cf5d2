"""Tile shapes to try, by the width of a head and the size of an element; the interpreter runs one fixed shape.

Each entry is (BLOCK_M, BLOCK_N, warps, stages). The tuner measures the entries of one class once per head dimension,
dtype and query length class, and keeps the result on disk. The first entry of 16-bit heads of 128 to 256 compiles for
sm_80 and sm_90 without spills, within 99 KiB of shared memory.
"""

from collections.abc import Callable
from typing import Any

import triton

from .. import shared

# Arguments whose value must not make a new kernel.
RUNTIME = [
    *("sequences", "tokens_q", "tokens_k", "heads", "group", "left", "right", "bottom_right", "block_m", "block_n"),
    *("seed_lo", "seed_hi", "offset", "threshold"),
]

Shape = tuple[int, int, int, int]
SHAPES: dict[str, dict[str, list[Shape]]] = {
    "forward": {
        "half 64": [(64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
        "half 128": [(64, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
        "half 256": [(32, 32, 8, 1), (128, 64, 8, 2), (64, 32, 8, 2)],
        "half 512": [(64, 32, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1)],
        "float 64": [(64, 32, 4, 2), (32, 32, 4, 2)],
        "float 128": [(32, 32, 4, 2), (32, 32, 8, 1)],
        "float 256": [(16, 32, 4, 1), (16, 16, 4, 1)],
        "float 512": [(16, 16, 4, 1), (16, 16, 8, 1)],
        "short": [(16, 64, 4, 3), (16, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1)],
    },
    "keys": {
        "half 64": [(32, 128, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2)],
        "half 128": [(32, 32, 8, 1), (32, 128, 8, 2), (64, 128, 8, 2)],
        "half 256": [(16, 32, 8, 1), (32, 64, 8, 1), (16, 64, 8, 1)],
        "half 512": [(16, 32, 8, 1), (16, 16, 4, 1)],
        "float 64": [(32, 32, 4, 1), (16, 32, 4, 1)],
        "float 128": [(16, 32, 4, 1), (16, 16, 4, 1)],
        "float 256": [(16, 16, 4, 1), (16, 16, 8, 1)],
        "float 512": [(16, 16, 8, 1)],
    },
    "queries": {
        "half 64": [(128, 32, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)],
        "half 128": [(64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)],
        "half 256": [(32, 32, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1)],
        "half 512": [(32, 16, 8, 1), (16, 16, 4, 1)],
        "float 64": [(32, 32, 4, 1), (32, 16, 4, 1)],
        "float 128": [(32, 16, 4, 1), (16, 16, 4, 1)],
        "float 256": [(16, 16, 4, 1), (16, 16, 8, 1)],
        "float 512": [(16, 16, 8, 1)],
    },
}
SHAPES["columns"] = SHAPES["keys"]
SHAPES["bias"] = SHAPES["queries"]


def _config(shape: Shape) -> triton.Config:
    block_m, block_n, warps, stages = shape
    return triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages)


def tuned(kind: str) -> Callable[[Any], Any]:
    """Decorator: runs a kernel with the fastest tile shape of its class."""
    classes = {name: [_config(shape) for shape in shapes] for name, shapes in SHAPES[kind].items()}

    def class_of(named: dict[str, Any]) -> str:
        if named["SHORT"] and "short" in classes:
            return "short"
        width = max(64, named["BLOCK_D"], named.get("BLOCK_V", 0))
        return f"{'float' if named['q'].element_size() == 4 else 'half'} {width}"

    return shared.tuned(classes, class_of, _config((64, 64, 1, 1)), key=("DIM", "VALUE_DIM", "SHORT"))
