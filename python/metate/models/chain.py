"""Decoders of any make as chains of layers: found in the module tree, and called one by one as the model calls them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metate.errors import fail
from metate.nn import Linear

_TURNED = {  # linear layers of transformers' own classes -> whether they keep W turned
    ("transformers.pytorch_utils", "Conv1D"): True,
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"): False,
}  # fmt: skip
_Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is called with beside the hidden state


def dense_weight(module: nn.Module) -> Tensor | None:
    """W, (out_features, in_features), of a linear layer; of transformers' Conv1D, which keeps it turned, a view."""
    kind = type(module)
    turned = False if kind in (nn.Linear, Linear) else _TURNED.get((kind.__module__, kind.__name__))
    if turned is None:
        return None
    weight: Any = module.weight
    return weight.t() if turned else weight  # type: ignore[no-any-return]


def linears(module: nn.Module) -> dict[str, Tensor]:
    """Name -> W of every linear layer in a module."""
    found = ((name, dense_weight(child)) for name, child in module.named_modules())
    return {name: weight.detach() for name, weight in found if weight is not None}


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the list that holds most of a model's linear weights: its layers, whatever they are called.

    Raises ValueError where no list holds any.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    sizes = {name: sum(map(Tensor.numel, linears(module).values())) for name, module in lists.items()}
    name = max(sizes, key=lambda name: sizes[name], default="")
    if not sizes.get(name):
        expected = "a decoder with its layers in a torch.nn.ModuleList, linear layers in them"
        raise fail("quantize_decoder", "model", f"a {type(model).__name__} without", expected)
    return name, lists[name]


def called_linears(model: nn.Module) -> set[nn.Module]:
    """The linear layers that a model calls; some models have others, whose weights they take into their own hands."""
    called: set[nn.Module] = set()
    with ExitStack() as stack:
        for name in linears(model):
            hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: called.add(module))
            stack.callback(hook.remove)
        _forward(model, torch.zeros(8, dtype=torch.long, device=next(model.parameters()).device))
    return called


class Chain:
    """The layers of a model, and the hidden states of some samples on their way through.

    Layer by layer they are called with what the model hands them beside the hidden state (positions, masks), as it was
    found in one pass through the model with layers that do nothing.

    Args:
        samples: (length) tokens each.

    Raises:
        ValueError: layers are handed something that other layers compute, or the model computes between them.
    """

    def __init__(self, model: nn.Module, samples: Sequence[Tensor]) -> None:
        _, self.layers = decoder_layers(model)
        self.hidden: list[Tensor] = []
        self._calls: list[list[_Call]] = [[] for _ in self.layers]
        for number, sample in enumerate(samples):
            if number == 0:
                form = self._check(model, sample)
            hidden, calls, _ = _record(model, self.layers, sample, form)
            self.hidden.append(hidden)
            for kept, call in zip(self._calls, calls, strict=True):
                kept.append(call)

    def _check(self, model: nn.Module, sample: Tensor) -> Any:
        """What a layer puts out, after a look at whether layers called one by one put out what the model does."""
        hidden, calls, outputs = _record(model, self.layers, sample, None)
        _, still, _ = _record(model, self.layers, sample, outputs[0])
        name = type(model).__name__
        for number, (call, alone) in enumerate(zip(calls, still, strict=True)):
            if not _same(call, alone):
                got = f"a {name}, whose layer {number} is handed what other layers compute"
                raise fail("quantize_decoder", "model", got, "layers that share positions and masks alone")
        for layer, (args, kwargs) in zip(self.layers, calls, strict=True):
            hidden = _hidden(layer(hidden, *args, **kwargs))
        if not torch.allclose(hidden, _hidden(outputs[-1]), rtol=1e-4, atol=1e-4 * float(hidden.abs().max())):
            got = f"a {name}, which computes something between its layers"
            raise fail("quantize_decoder", "model", got, "layers that follow one another")
        return outputs[0]

    def __len__(self) -> int:
        return len(self.hidden)

    def run(self, number: int, count: int | None = None) -> Iterator[Tensor]:
        """What a layer makes of the hidden states, or of the first `count`."""
        for hidden, (args, kwargs) in list(zip(self.hidden, self._calls[number], strict=True))[:count]:
            yield _hidden(self.layers[number](hidden, *args, **kwargs))

    def advance(self, number: int) -> None:
        """Takes the hidden states through a layer."""
        self.hidden = list(self.run(number))
        self._calls[number] = [((), {})] * len(self.hidden)


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _record(
    model: nn.Module, layers: nn.ModuleList, sample: Tensor, form: Any
) -> tuple[Tensor, list[_Call], list[Any]]:  # fmt: skip
    """The first layer's hidden state, what every layer is called with beside it, and what it puts out.

    form: an output of a layer: then they do nothing, and put out their inputs in this form.
    """
    entered: list[tuple[Tensor, _Call]] = []
    outputs: list[Any] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        entered.append((hidden, (args[1:], kwargs)))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
            if form is not None:
                stack.enter_context(_idle(layer, form))
        _forward(model, sample)
    if len(entered) != len(layers):
        got = f"a {type(model).__name__}, which calls {len(entered)} layers of {len(layers)}"
        raise fail("quantize_decoder", "model", got, "each of them once")
    return entered[0][0], [call for _, call in entered], outputs


def _forward(model: nn.Module, sample: Tensor) -> None:
    asks = inspect.signature(model.forward).parameters
    quiet = {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in asks}
    model(sample[None], **quiet)


@contextmanager
def _idle(layer: nn.Module, form: Any) -> Iterator[None]:
    """The layer puts out its input, in the form of another output."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *form[1:]) if isinstance(form, tuple) else hidden_states

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _same(a: Any, b: Any) -> bool:
    """Whether two calls hand over the same tensors; what is no tensor counts as the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b)
