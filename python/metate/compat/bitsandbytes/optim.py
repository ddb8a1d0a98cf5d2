"""bitsandbytes.optim: optimizers whose states take 8 bits in blocks of 256 (Dettmers et al. 2022), or 32.

Parameters with fewer than `min_8bit_size` elements, and those that a GlobalOptimManager names, keep 32 bits. "Paged"
ones are the same: on a CPU states lie where pages would go, on a GPU they stay there. States are saved under
bitsandbytes' names. AdEMAMix, LAMB and LARS are not there.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from metate.errors import fail
from metate.quant import bitsandbytes as format

_BLOCK = 256
_WRAPPED = "__bnb_optimizer_quant_state__"  # keeps FSDP from gathering tensors that are shaped unlike parameters
_TENSORS = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")


class GlobalOptimManager:
    """Settings of single parameters, as `optim_bits`, for every optimizer."""

    _instance: ClassVar[GlobalOptimManager | None] = None

    def __init__(self) -> None:
        raise RuntimeError("metate.GlobalOptimManager: call get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forgets all."""
        self.pid2config: dict[int, dict[str, Any]] = {}
        self.module_weight_config_triple: list[tuple[torch.nn.Module, str, dict[str, Any]]] = []

    def register_parameters(self, params: Any) -> None:
        """Nothing: parameters are known by what they are, not by their place."""

    def override_config(
        self, parameters: Tensor | Iterable[Tensor], key: str | None = None, value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Other settings for parameters."""
        given = dict(key_value_dict or ({} if key is None else {key: value}))
        for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
            self.pid2config.setdefault(id(parameter), {}).update(given)

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: dict[str, Any]) -> None:
        """Other settings for a parameter of a module, whatever it is when an optimizer first looks for it."""
        self.module_weight_config_triple.append((module, param_name, config))

    def settings(self, parameter: Tensor) -> dict[str, Any]:
        found = dict(self.pid2config.get(id(parameter), {}))
        for module, name, config in self.module_weight_config_triple:
            if getattr(module, name) is parameter:
                found |= config
        return found


def _adam(p: Tensor, g: Tensor, mean: Tensor, square: Any, group: dict[str, Any], step: int) -> None:
    beta1, beta2 = group["betas"]
    mean.mul_(beta1).add_(g, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.mul_(1 - group["lr"] * group["weight_decay"])
    divisor = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    p.addcdiv_(mean, divisor, value=-group["lr"] / (1 - beta1**step))


def _lion(p: Tensor, g: Tensor, mean: Tensor, square: Any, group: dict[str, Any], step: int) -> None:
    beta1, beta2 = group["betas"]
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.add_((mean * beta1 + g * (1 - beta1)).sign_(), alpha=-group["lr"])
    mean.mul_(beta2).add_(g, alpha=1 - beta2)


def _momentum(p: Tensor, g: Tensor, mean: Tensor, square: Any, group: dict[str, Any], step: int) -> None:
    g = g.add(p, alpha=group["weight_decay"])
    mean.mul_(group["betas"][0] if step > 1 else 0).add_(g)
    p.add_(mean, alpha=-group["lr"])


def _rmsprop(p: Tensor, g: Tensor, square: Tensor, none: Any, group: dict[str, Any], step: int) -> None:
    g = g.add(p, alpha=group["weight_decay"])
    beta = group["betas"][0]
    square.mul_(beta).addcmul_(g, g, value=1 - beta)
    p.addcdiv_(g, square.sqrt().add_(group["eps"]), value=-group["lr"])


def _adagrad(p: Tensor, g: Tensor, square: Tensor, none: Any, group: dict[str, Any], step: int) -> None:
    g = g.add(p, alpha=group["weight_decay"])
    square.addcmul_(g, g)
    p.addcdiv_(g, square.sqrt().add_(group["eps"]), value=-group["lr"])


class Optimizer8bit(torch.optim.Optimizer):
    """What all share: 32-bit or blockwise 8-bit states, as `optim_bits` says, around an update in float32.

    Raises ValueError naming the argument.
    """

    _update: ClassVar[Any]  # (values, gradient, state 1, state 2, settings, step), in place
    _states: ClassVar[int] = 1
    _bits: ClassVar[int | None] = None  # of classes that are told by their names

    def __init__(
        self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, optim_bits: int, min_8bit_size: int
    ) -> None:
        op = type(self).__name__
        betas = tuple(ast.literal_eval(betas)) if isinstance(betas, str) else tuple(betas)
        optim_bits = self._bits or optim_bits
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise fail(op, name, value, "0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise fail(op, "betas", betas, "each from 0 to below 1")
        if optim_bits not in (8, 32):
            raise fail(op, "optim_bits", optim_bits, "8 or 32")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.optim_bits, self.min_8bit_size = optim_bits, min_8bit_size

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the loss, if `closure` computes one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)
        return loss

    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        if p.grad is None or p.grad.is_sparse:
            raise fail(type(self).__name__, "grad", "sparse", "a dense gradient")
        settings = {**group, **GlobalOptimManager.get_instance().settings(p)}
        state: dict[str, Any] = self.state[p]
        if not state:
            self._begin(p, state, settings)
        state["step"] += 1
        small = "absmax1" in state
        found: list[Any] = [None, None]
        for place in range(self._states):
            found[place] = _read(state, place + 1) if small else state[f"state{place + 1}"]
        values = p.float()
        self._update(values, p.grad.float(), *found, settings, state["step"])
        p.copy_(values)
        for place in range(self._states if small else 0):
            _write(state, place + 1, found[place])

    def _begin(self, p: Tensor, state: dict[str, Any], settings: dict[str, Any]) -> None:
        small = settings.get("optim_bits", self.optim_bits) == 8 and p.numel() >= self.min_8bit_size
        state["step"] = 0
        for place in range(1, self._states + 1):
            state[f"state{place}"] = torch.zeros_like(p, dtype=torch.uint8 if small else torch.float32)
            if small:
                state[f"qmap{place}"] = format.dynamic_map(place == 1).to(p.device)
                state[f"absmax{place}"] = torch.zeros(-(-p.numel() // _BLOCK), dtype=torch.float32, device=p.device)

    def state_dict(self) -> dict[str, Any]:
        """torch's, the tensors of every parameter in a dict of their own."""
        found = super().state_dict()
        found["state"] = {
            key: {
                **{name: value for name, value in state.items() if name not in _TENSORS},
                _WRAPPED: {name: value for name, value in state.items() if name in _TENSORS},
            }
            for key, state in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """The inverse; tensors keep their dtypes, which torch would make those of the parameters."""
        states = {key: {**state, **state.get(_WRAPPED, {})} for key, state in state_dict["state"].items()}
        plain = {key: {name: value for name, value in state.items() if name not in (*_TENSORS, _WRAPPED)}
                 for key, state in states.items()}  # fmt: skip
        super().load_state_dict({**state_dict, "state": plain})
        parameters = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, p in zip(keys, parameters, strict=True):
            for name in _TENSORS:
                if name in states.get(key, {}):
                    tensor = states[key][name]
                    self.state[p][name] = tensor.to(p.device, copy=True) if move_to_device else tensor.clone()


def _read(state: dict[str, Any], place: int) -> Tensor:
    index, scales = state[f"state{place}"], state[f"absmax{place}"]
    values: Tensor = state[f"qmap{place}"][index.flatten().int()]
    values *= scales.repeat_interleave(_BLOCK)[: values.numel()]
    return values.view(index.shape)


def _write(state: dict[str, Any], place: int, values: Tensor) -> None:
    index, scales = format.nearest_in_blocks(values.flatten(), _BLOCK, state[f"qmap{place}"])
    state[f"state{place}"].copy_(index.view(values.shape))
    state[f"absmax{place}"].copy_(scales)


class Adam(Optimizer8bit):
    """Adam (Kingma & Ba 2015); weight decay is decoupled, here too, as in bitsandbytes."""

    _update, _states = staticmethod(_adam), 2

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        amsgrad: bool = False, optim_bits: int = 32, args: Any = None, min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:  # fmt: skip
        if amsgrad:
            raise fail(type(self).__name__, "amsgrad", True, "False")
        super().__init__(params, lr, betas, eps, weight_decay, optim_bits, min_8bit_size)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2,
        amsgrad: bool = False, optim_bits: int = 32, args: Any = None, min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged)


class Lion(Optimizer8bit):
    """Lion (Chen et al. 2023)."""

    _update = staticmethod(_lion)

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0.0, optim_bits: int = 32,
        args: Any = None, min_8bit_size: int = 4096, is_paged: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas, 0.0, weight_decay, optim_bits, min_8bit_size)


class SGD(Optimizer8bit):
    """Gradient descent with momentum."""

    _update = staticmethod(_momentum)

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False, optim_bits: int = 32, args: Any = None, min_8bit_size: int = 4096,
    ) -> None:  # fmt: skip
        if momentum == 0 or nesterov or dampening:
            expected = "momentum above 0, neither nesterov nor dampening"
            raise fail(type(self).__name__, "momentum", f"{momentum}, nesterov {nesterov}", expected)
        super().__init__(params, lr, (momentum, dampening), 0.0, weight_decay, optim_bits, min_8bit_size)


class RMSprop(Optimizer8bit):
    """RMSprop (Hinton 2012)."""

    _update = staticmethod(_rmsprop)

    def __init__(
        self, params: Any, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0,
        momentum: float = 0.0, centered: bool = False, optim_bits: int = 32, args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:  # fmt: skip
        if not alpha or centered:
            raise fail(type(self).__name__, "alpha", f"{alpha}, centered {centered}", "above 0, not centered")
        super().__init__(params, lr, (alpha, momentum), eps, weight_decay, optim_bits, min_8bit_size)


class Adagrad(Optimizer8bit):
    """Adagrad (Duchi et al. 2011)."""

    _update = staticmethod(_adagrad)

    def __init__(
        self, params: Any, lr: float = 1e-2, lr_decay: float = 0.0, weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0, eps: float = 1e-10, optim_bits: int = 32, args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:  # fmt: skip
        if lr_decay or initial_accumulator_value:
            got = f"{lr_decay}, initial_accumulator_value {initial_accumulator_value}"
            raise fail(type(self).__name__, "lr_decay", got, "0 and 0")
        super().__init__(params, lr, (0.0, 0.0), eps, weight_decay, optim_bits, min_8bit_size)


class Adam8bit(Adam):
    _bits = 8


class Adam32bit(Adam):
    _bits = 32


class AdamW8bit(AdamW):
    _bits = 8


class AdamW32bit(AdamW):
    _bits = 32


class Lion8bit(Lion):
    _bits = 8


class Lion32bit(Lion):
    _bits = 32


class SGD8bit(SGD):
    _bits = 8


class SGD32bit(SGD):
    _bits = 32


class RMSprop8bit(RMSprop):
    _bits = 8


class RMSprop32bit(RMSprop):
    _bits = 32


class Adagrad8bit(Adagrad):
    _bits = 8


class Adagrad32bit(Adagrad):
    _bits = 32


PagedAdam, PagedAdam8bit, PagedAdam32bit = Adam, Adam8bit, Adam32bit
PagedAdamW, PagedAdamW8bit, PagedAdamW32bit = AdamW, AdamW8bit, AdamW32bit
PagedLion, PagedLion8bit, PagedLion32bit = Lion, Lion8bit, Lion32bit
