"""Linear layers whose dense parameter is quantised when the layer is first moved to a device (the CPU counts)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from metate.compat.bitsandbytes import functional
from metate.compat.bitsandbytes.functional import MatmulLtState, QuantState
from metate.quant.bitsandbytes import STATE

_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE + "nf4", STATE + "fp4")


class _Params(nn.Parameter):
    """A parameter whose attributes survive copies and pickles, and that `_quantize`s itself on its first move."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo.get(id(self))
        if made is None:
            made = _rebuilt(type(self), copy.deepcopy(self.data, memo), self.requires_grad, {})
            memo[id(self)] = made
            made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (type(self), self.data, self.requires_grad, self.__dict__)

    def cpu(self) -> Any:  # type: ignore[override]
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Any:  # type: ignore[override]
        return self.to("cuda" if device is None else torch.device(device), non_blocking=non_blocking)

    def half(self) -> Any:
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        return self.to(torch.bfloat16)

    def float(self) -> Any:
        return self.to(torch.float32)

    def double(self) -> Any:
        return self.to(torch.float64)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self._is_quantized():
            moved = self._codes_for(device).to(device=device, non_blocking=non_blocking)  # no numbers to convert
        elif device is not None and device.type != "meta":
            return self._quantize(device)
        else:
            moved = self.data.to(device=device, dtype=dtype, non_blocking=non_blocking)
        made = _rebuilt(type(self), moved, self.requires_grad, self.__dict__)
        if device is not None:
            made._move(device)
        return made

    def _is_quantized(self) -> bool:
        raise NotImplementedError

    def _codes_for(self, device: torch.device | None) -> Tensor:
        """The codes as they are understood there."""
        return self.data

    def _quantize(self, device: torch.device) -> Any:
        raise NotImplementedError

    def _move(self, device: torch.device) -> None:
        raise NotImplementedError


def _rebuilt(kind: type[_Params], data: Tensor, requires_grad: bool, attributes: Mapping[str, Any]) -> Any:
    made = torch.Tensor._make_subclass(kind, data, requires_grad)
    made.__dict__.update(attributes)
    return made


def _of_state(name: str) -> property:
    """A tensor of the QuantState, as an attribute of the weight: there FSDP looks for the entries of a state dict."""

    def get(self: Params4bit) -> Any:
        state = self.__dict__.get("quant_state")
        if state is None:
            raise AttributeError(f"'Params4bit' object has no attribute {name!r} before it is quantised")
        return getattr(state, name)

    return property(get)


class Params4bit(_Params):
    """A weight that becomes packed NF4 or FP4 codes beside a QuantState."""

    def __new__(
        cls, data: Tensor | None = None, requires_grad: bool = False, quant_state: QuantState | None = None,
        blocksize: int | None = None, compress_statistics: bool = True, quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8, module: nn.Module | None = None, bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:  # fmt: skip
        attributes = {
            "quant_state": quant_state, "blocksize": blocksize or 64, "compress_statistics": compress_statistics,
            "quant_type": quant_type, "quant_storage": quant_storage, "bnb_quantized": bnb_quantized,
        }  # fmt: skip
        made: Params4bit = _rebuilt(cls, torch.empty(0) if data is None else data, requires_grad, attributes)
        return made

    quant_state: QuantState | None
    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_storage: torch.dtype
    bnb_quantized: bool
    absmax, code, quant_map = _of_state("absmax"), _of_state("code"), _of_state("quant_map")
    nested_absmax, nested_quant_map = _of_state("nested_absmax"), _of_state("nested_quant_map")

    @classmethod
    def from_prequantized(
        cls, data: Tensor, quantized_stats: dict[str, Any], requires_grad: bool = False,
        device: torch.device | str = "cuda", module: nn.Module | None = None, **kwargs: Any,
    ) -> Params4bit:  # fmt: skip
        """From the tensors of a checkpoint."""
        state = QuantState.from_dict(quantized_stats, device)
        made = cls(
            data.to(device), requires_grad, state, state.blocksize, state.nested, str(state.quant_type), data.dtype,
            bnb_quantized=True,
        )  # fmt: skip
        made._lower()
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Parts of a weight keep what is known of it: FSDP2 cuts its parameters."""
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if func not in (torch.chunk, torch.split):
            return result
        whole = args[0]
        return tuple(_rebuilt(cls, part, whole.requires_grad, whole.__dict__) for part in result)

    def _is_quantized(self) -> bool:
        return self.bnb_quantized

    def _codes_for(self, device: torch.device | None) -> Tensor:
        return self.data if device is None or device.type == "cpu" else functional.unpack_tiles(self.data)

    def pack(self) -> None:
        """Puts the codes in tiles, on a CPU and where they can be."""
        if self.quant_state is not None and self.dim() != functional.IN_TILES:
            self.data = functional.pack_tiles(self.data, self.quant_state)

    def _quantize(self, device: torch.device) -> Params4bit:
        self.data, self.quant_state = functional.quantize_4bit(
            self.data.to(device), blocksize=self.blocksize, compress_statistics=self.compress_statistics,
            quant_type=self.quant_type, quant_storage=self.quant_storage,
        )  # fmt: skip
        self.bnb_quantized = True
        self._lower()
        return self

    def _move(self, device: torch.device) -> None:
        if self.quant_state is not None:
            self.quant_state.to(device)
            self._lower()

    def _lower(self) -> None:
        """Before the first call, which may be one that is being compiled."""
        if self.quant_state is not None and len(self.quant_state.shape or ()) == 2 and not self.is_meta:
            self.quant_state.lower(self.data)


class Linear4bit(nn.Linear):
    """nn.Linear whose weight becomes NF4 or FP4 when the layer is moved to a device, and stays frozen.

    Computes in `compute_dtype`: by default in the dtype of the first input, in float32 for a float16 one. On a CPU the
    first call outside of training puts the codes in tiles (`QuantizedWeight.in_tiles`), in which `functional` reads
    them too; states have rows.
    """

    weight: Params4bit

    def __init__(
        self, input_features: int, output_features: int, bias: bool = True, compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True, quant_type: str = "fp4", quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data, compress_statistics=compress_statistics, quant_type=quant_type,
            quant_storage=quant_storage,
        )  # fmt: skip
        self.compute_dtype = compute_dtype
        self.quant_storage = quant_storage

    @property
    def quant_state(self) -> QuantState | None:
        return self.weight.quant_state

    def forward(self, x: Tensor) -> Tensor:
        state = self.weight.quant_state
        if state is None:
            raise RuntimeError("metate.Linear4bit: weight is not quantised yet, call .to(device)")
        if not self.training and not is_dynamo_compiling():
            self.weight.pack()
        dtype = x.dtype if self.compute_dtype is None else self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.matmul_4bit(x.to(dtype), self.weight, state, bias=bias).to(x.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.quant_state is not None:
            destination[f"{prefix}weight"] = functional.unpack_tiles(destination[f"{prefix}weight"])
            for name, tensor in self.weight.quant_state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{name}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        stem = f"{prefix}weight"
        stats = {part: state_dict[f"{stem}.{part}"] for part in _PARTS if f"{stem}.{part}" in state_dict}
        if stats and stem in state_dict:
            device = self.weight.device if self.weight.device.type != "meta" else state_dict[stem].device
            try:
                self.weight = Params4bit.from_prequantized(state_dict[stem].clone(), stats, device=device)
            except ValueError as error:
                error_msgs.append(f"{stem}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        known = {f"{stem}.{part}" for part in stats}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in known]


class _LinearOfType(Linear4bit):
    """A Linear4bit that is told its type by its class, not by an argument."""

    _quant_type: ClassVar[str]

    def __init__(
        self, input_features: int, output_features: int, bias: bool = True, compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True, quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, self._quant_type, quant_storage,
            device,
        )  # fmt: skip


class LinearFP4(_LinearOfType):
    _quant_type = "fp4"


class LinearNF4(_LinearOfType):
    _quant_type = "nf4"


class Int8Params(_Params):
    """A weight that becomes int8 with the absmax of its rows in SCB, unless `has_fp16_weights`."""

    SCB: Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls, data: Tensor | None = None, requires_grad: bool = True, has_fp16_weights: bool = False,
        CB: Tensor | None = None, SCB: Tensor | None = None, **kwargs: Any,
    ) -> Int8Params:  # fmt: skip
        data = torch.empty(0) if data is None else data
        requires_grad = requires_grad and data.is_floating_point()
        made: Int8Params = _rebuilt(cls, data, requires_grad, {"SCB": SCB, "has_fp16_weights": has_fp16_weights})
        return made

    @property
    def CB(self) -> Tensor | None:
        return self.data if self._is_quantized() else None

    def _is_quantized(self) -> bool:
        return self.data.dtype == torch.int8

    def _quantize(self, device: torch.device) -> Any:
        if self.has_fp16_weights:
            return _rebuilt(type(self), self.data.to(device), self.requires_grad, self.__dict__)
        self.requires_grad = False
        self.data, self.SCB, _ = functional.int8_vectorwise_quant(self.data.to(device, torch.float16))
        return self

    def _move(self, device: torch.device) -> None:
        self.SCB = None if self.SCB is None else self.SCB.to(device)


class Linear8bitLt(nn.Linear):
    """nn.Linear whose weight becomes int8 when the layer is moved to a device, unless `has_fp16_weights`.

    Activations stay floating: `threshold`, which keeps outliers out of their rounding, changes nothing.
    """

    weight: Int8Params

    def __init__(
        self, input_features: int, output_features: int, bias: bool = True, has_fp16_weights: bool = True,
        threshold: float = 0.0, index: Tensor | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(input_features, output_features, bias, device)
        self.index = index
        self.weight = Int8Params(self.weight.data, has_fp16_weights, has_fp16_weights)
        self._kept = MatmulLtState(threshold=threshold, has_fp16_weights=has_fp16_weights)

    @property
    def state(self) -> MatmulLtState:
        """The int8 weight, as it is now."""
        self._kept.CB, self._kept.SCB, self._kept.is_training = self.weight.CB, self.weight.SCB, self.training
        return self._kept

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype != torch.int8 and not self.weight.has_fp16_weights:
            raise RuntimeError("metate.Linear8bitLt: weight is not quantised yet, call .to(device)")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.matmul(x, self.weight, bias=bias, state=self.state)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scales = getattr(self.weight, "SCB", None)  # a weight tied to another layer's is a plain parameter
        if scales is not None:
            destination[f"{prefix}SCB"] = scales if keep_vars else scales.detach()
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        data, scales = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}SCB")
        if scales is not None and not isinstance(self.weight, Int8Params):  # tied to another layer's
            raise RuntimeError("Loading a quantized checkpoint into non-quantized Linear8bitLt is not supported")
        if data is not None and scales is not None:
            if int(state_dict.get(f"{prefix}weight_format", 0)) != 0:
                error_msgs.append(f"{prefix}weight_format: only rows (0) are read")
                return
            device = self.weight.device if self.weight.device.type != "meta" else data.device
            self.weight = Int8Params(data.to(device, copy=True), False, SCB=scales.to(device, copy=True))
            self._kept.has_fp16_weights = False
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        known = {f"{prefix}SCB", f"{prefix}weight_format"} if scales is not None else set()
        unexpected_keys[:] = [key for key in unexpected_keys if key not in known]
