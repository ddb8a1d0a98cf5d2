"""Tile shapes to try, by the width of a head and the size of an element; the interpreter runs one fixed shape.

Each entry is (BLOCK_M, BLOCK_N, warps, stages). The tuner measures the entries of one class once per head dimension,
dtype and query length class, and keeps the result on disk.
"""

from collections.abc import Callable
from typing import Any

import triton

INTERPRETED = triton.knobs.runtime.interpret

# Arguments whose value must not make a new kernel.
RUNTIME = [
    *("sequences", "tokens_q", "tokens_k", "heads", "group", "left", "right", "bottom_right", "block_m", "block_n"),
    *("seed_lo", "seed_hi", "offset", "threshold"),
]

Shape = tuple[int, int, int, int]
SHAPES: dict[str, dict[str, list[Shape]]] = {
    "forward": {
        "half 64": [(64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
        "half 128": [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
        "half 256": [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)],
        "half 512": [(64, 32, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1)],
        "float 64": [(64, 32, 4, 2), (32, 32, 4, 2)],
        "float 128": [(32, 32, 4, 2), (32, 32, 8, 1)],
        "float 256": [(16, 32, 4, 1), (16, 16, 4, 1)],
        "float 512": [(16, 16, 4, 1), (16, 16, 8, 1)],
        "short": [(16, 64, 4, 3), (16, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1)],
    },
    "keys": {
        "half 64": [(32, 128, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2)],
        "half 128": [(32, 128, 8, 2), (32, 64, 4, 2), (64, 128, 8, 2)],
        "half 256": [(32, 64, 8, 1), (32, 32, 4, 1), (16, 64, 8, 1)],
        "half 512": [(16, 32, 8, 1), (16, 16, 4, 1)],
        "float 64": [(32, 32, 4, 1), (16, 32, 4, 1)],
        "float 128": [(16, 32, 4, 1), (16, 16, 4, 1)],
        "float 256": [(16, 16, 4, 1), (16, 16, 8, 1)],
        "float 512": [(16, 16, 8, 1)],
    },
    "queries": {
        "half 64": [(128, 32, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)],
        "half 128": [(128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
        "half 256": [(64, 32, 8, 1), (32, 32, 4, 1), (64, 16, 8, 1)],
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
    if INTERPRETED:
        return triton.autotune([_config((64, 64, 1, 1))], key=[])  # type: ignore[no-any-return]
    classes = {name: [_config(shape) for shape in shapes] for name, shapes in SHAPES[kind].items()}

    def fitting(configs: list[triton.Config], given: dict[str, Any], **named: Any) -> list[triton.Config]:
        if named.get("SHORT") and "short" in classes:
            return classes["short"]
        width = max(64, named["BLOCK_D"], named.get("BLOCK_V", 0))
        return classes[f"{'float' if named['q'].element_size() == 4 else 'half'} {width}"]

    def decorate(kernel: Any) -> Any:
        return triton.autotune(
            [config for group in classes.values() for config in group],
            key=[name for name in ("DIM", "VALUE_DIM", "SHORT") if name in kernel.arg_names],
            prune_configs_by={"early_config_prune": fitting},
            cache_results=True,
        )(kernel)

    return decorate
