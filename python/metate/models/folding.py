"""Which operation before a linear layer takes the inverse of its inputs' scale (AWQ): found by trying, not by name.

A layer goes on computing the same where the operation does, whether it is a norm, a norm whose weight is added to 1, or
rows of a linear layer, perhaps fused with others or behind a function that scales with its argument (ReLU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metate.models.chain import dense_weight, linears

_TOLERANCE = 1e-3  # of the inputs' and outputs' norm; a wrong place misses by a quarter and more


@dataclass(frozen=True)
class Place:
    """Outputs of a module of a layer, from `first` on. offset: what it adds to its weight, 1 in Gemma's norms."""

    name: str
    first: int = 0
    offset: float = 0.0

    def divide(self, layer: nn.Module, scale: Tensor) -> None:
        """Divides these outputs by a scale (channels), in place."""
        module, rows = layer.get_submodule(self.name), slice(self.first, self.first + scale.numel())
        with torch.no_grad():
            for tensor in _parameters(module):
                part, offset = tensor[rows], self.offset if tensor is module.weight else 0
                part.copy_((part + offset) / (scale if part.dim() == 1 else scale[:, None]) - offset)


def _parameters(module: nn.Module) -> list[Tensor]:
    """Weight, outputs first, and bias."""
    turned = dense_weight(module)
    found = (module.weight if turned is None else turned, getattr(module, "bias", None))
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


@dataclass(frozen=True)
class Group:
    """Linear layers with the same input, in the order of their calls, and the modules called before, the last first."""

    names: tuple[str, ...]
    before: tuple[str, ...]


def groups_of(layer: nn.Module, run: Callable[[], object]) -> list[Group]:
    """The groups of a layer, as `run` calls it."""
    called: list[str] = []
    inputs: list[tuple[Tensor, list[str], tuple[str, ...]]] = []  # tensors are kept, that no other takes their memory
    dense = linears(layer)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name in dense:
                shared = next((names for x, names, _ in inputs if _is_same(x, args[0])), None)
                if shared is None:
                    inputs.append((args[0], [name], tuple(reversed(called))))
                elif name not in shared:
                    shared.append(name)
            called.append(name)

        return enter

    with ExitStack() as stack:
        for name, module in layer.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor):
                stack.callback(module.register_forward_pre_hook(watch(name)).remove)
        run()
    return [Group(tuple(names), before) for _, names, before in inputs]


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def find_place(
    layer: nn.Module, group: Group, run: Callable[[], Tensor], first: Sequence[Place] = ()
) -> Place | None:  # fmt: skip
    """Where the inverse of a scale of a group's inputs belongs; None where the layer has no such place.

    Args:
        run: puts out what the layer adds to some sample.
        first: places to try before any other.
    """
    width = linears(layer)[group.names[0]].shape[1]
    tried: list[Place] = []
    for place in (*first, *_places(layer, group, width)):
        if place not in tried and place.name in group.before:
            tried.append(place)
            if _holds(layer, group, place, run, width):
                return place
    return None


def _places(layer: nn.Module, group: Group, width: int) -> Iterator[Place]:
    for name in dict.fromkeys(group.before):
        if name in group.names:
            continue
        weight = _parameters(layer.get_submodule(name))[0]
        if weight.dim() == 1 and weight.numel() == width:
            yield Place(name)
            yield Place(name, offset=1.0)
        elif name in linears(layer):
            yield from (Place(name, start) for start in reversed(range(0, weight.shape[0] - width + 1, width)))


def _holds(layer: nn.Module, group: Group, place: Place, run: Callable[[], Tensor], width: int) -> bool:
    """Whether the group's inputs come divided by a random scale, and nothing else changes."""
    inputs: list[Tensor] = []
    restoring: Tensor | float = 1.0
    weight = linears(layer)[group.names[0]]
    scale = 2 ** (2 * torch.rand(width, generator=torch.Generator().manual_seed(0)) - 1).to(weight)

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0] * restoring)
        return inputs[-1], *args[1:]

    kept = [tensor.clone() for tensor in _parameters(layer.get_submodule(place.name))]
    with ExitStack() as stack, torch.no_grad():
        for name in group.names:
            stack.callback(layer.get_submodule(name).register_forward_pre_hook(watch).remove)
        before = [run()]
        expected, restoring = inputs[:], scale
        inputs.clear()
        place.divide(layer, scale)
        after = [run()]
        for tensor, old in zip(_parameters(layer.get_submodule(place.name)), kept, strict=True):
            tensor.copy_(old)
    return all(map(_close, expected + before, inputs + after))


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _TOLERANCE * a.norm())
