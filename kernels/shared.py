"""What the families share: how kernels are tuned and launched, what none of them runs on, and products."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.autotuner import Autotuner, OutOfResources

INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)

# The tuner and the interpreter keep the state of a launch in globals.
_launching = threading.Lock()


def launch(kernel: Any, grid: Any, arguments: dict[str, Any], beside: Tensor) -> None:
    """Runs a kernel on the device of `beside` with those of the arguments that it has."""
    given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    with _launching, torch.cuda.device_of(beside):
        try:
            kernel[grid](**given)
        except OutOfResources:
            if not isinstance(kernel, Autotuner):
                raise
            _launch_what_fits(kernel, grid, given)


def _launch_what_fits(kernel: Autotuner, grid: Any, given: dict[str, Any]) -> None:
    """The fastest configuration was found in a call with less to hold in shared memory, without a bias for example."""
    configs = kernel.early_config_prune(kernel.configs, given, **given)
    for config in configs:
        try:
            kernel.fn[grid](**given, **config.all_kwargs())
            return
        except OutOfResources:
            if config is configs[-1]:
                raise


def tuned(
    classes: dict[str, list[triton.Config]],
    class_of: Callable[[dict[str, Any]], str],
    interpreted: triton.Config,
    key: Iterable[str],
) -> Callable[[Any], Any]:
    """Decorator: runs a kernel with the fastest configuration of the class that its arguments are in.

    The tuner measures a class once for each dtype and value of the `key` arguments, and keeps the result on disk. The
    interpreter always runs one configuration.
    """
    if INTERPRETED:
        return triton.autotune([interpreted], key=[])  # type: ignore[no-any-return]

    def fitting(configs: list[triton.Config], given: dict[str, Any], **named: Any) -> list[triton.Config]:
        return classes[class_of(named)]

    def decorate(kernel: Any) -> Any:
        return triton.autotune(
            [config for group in classes.values() for config in group],
            key=[name for name in key if name in kernel.arg_names],
            prune_configs_by={"early_config_prune": fitting},
            cache_results=True,
        )(kernel)

    return decorate


def refusal(x: Tensor) -> str | None:
    """The dtypes and the machines that no kernel takes."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {str(x.dtype).removeprefix('torch.')}: float32, bfloat16 or float16"
    if x.is_cuda and torch.version.cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "a GPU of compute capability below 8.0"
    return None


@triton.jit
def product(a, b, acc=None):
    """a b + acc in float32. The interpreter multiplies bfloat16 as the integers that it stores: widened first there."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(a, b):
    """a b, rounded before it meets a sum: a compiler fuses products and sums, but never two sums."""
    return tl.fma(a, b, 0.0)
