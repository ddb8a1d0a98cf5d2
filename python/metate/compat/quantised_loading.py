"""transformers' quantisers of GPTQ, AWQ, bitsandbytes and GGUF, and one of metate's own form, over metate:
`from_pretrained` makes QuantLinear layers.

Each linear layer stays what transformers built until its tensors arrive; a conversion takes them out of the loader's
hands, lowers them, and leaves a placeholder. After loading the layer makes way for a QuantLinear. Imported through
`metate.compat.transformers.quantised` only, for it needs transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from metate.compat.experts import use_experts
from metate.errors import fail
from metate.models.apart import apart, stacked_parts, take_apart, together
from metate.models.chain import dense_weight
from metate.nn import QuantGroupedLinear, QuantLinear, dequantize_model
from metate.ops.quant_linear import QuantizedWeight
from metate.quant import GGUFFile, awq, bitsandbytes, canonical, gptq, load_quantized
from metate.quant.checkpoint import read_configuration
from metate.quant.gguf_model import GGUFModel
from metate.quant.settings import Settings

if TYPE_CHECKING:
    from transformers import GgufConfig  # not in every version 5

_LOWERED = "_metate_lowered"  # on a layer whose tensors have arrived: its QuantizedWeight
_before: dict[str, Any] = {}


class _Quantizer(HfQuantizer):
    """What the methods share. `serialized_names` are the tensors that a checkpoint has in place of a weight."""

    serialized_names: dict[str, list[str]]
    requires_calibration = True
    one_by_one = False  # experts

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or ()
        self.one_by_one = self._has_low_bit_experts(files)
        if self.one_by_one:
            take_apart(model)
        config = read_configuration(Path(files[0]).parent) if files else {}
        # The classes of transformers drop members that they do not know, "dynamic" of GPTQ among them.
        raw = config.get("quantization_config") or self.quantization_config.to_dict()
        self.settings = Settings("quantization_config", raw)
        kept = model._keep_in_fp32_modules
        self.skipped = self.get_modules_to_not_convert(model, self._skipped(), None if kept is None else list(kept))

    def _has_low_bit_experts(self, files: Iterable[str]) -> bool:
        """Whether a checkpoint has low-bit experts, one by one, which models stack."""
        low_bit = {tail for tails in self.serialized_names.values() for tail in tails} - {"weight"}
        for file in files:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    found = re.search(r"\.experts\.\d+\.\w+\.(.+)", name)
                    if found and found[1] in low_bit:
                        return True
        return False

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Experts that stand apart are not stacked as they are read."""
        kept = [c for c in weight_conversions if not self.one_by_one or stacked_parts(c) is None]
        return super().update_weight_conversions(kept, model)  # type: ignore[no-any-return, no-untyped-call]

    def _skipped(self) -> list[str] | None:
        return getattr(self.quantization_config, "modules_to_not_convert", None)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, layer in list(model.named_modules()):
            weight = layer.__dict__.pop(_LOWERED, None)
            if weight is not None:
                bias = None if layer.bias is None else layer.bias.requires_grad_(False)
                model.set_submodule(name, QuantLinear(weight, bias).train(layer.training))
        for name, experts in apart(model).items():
            model.set_submodule(name, together(experts))
        if self.one_by_one:
            use_experts(model)
        model.__dict__["num_parameters"] = MethodType(num_parameters, model)
        return model

    def is_dense(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these, all there is of a layer, are a weight that the checkpoint did not quantise."""
        return tensors.keys() == {"weight"}

    def lower(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        raise NotImplementedError

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Lower}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return dequantize_model(model, dtype or torch.float32)

    def is_serializable(self) -> bool:
        return False  # transformers would write QuantLinear's own state under the method's name

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def num_parameters(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """transformers' of that name (which its Trainer calls), without bitsandbytes' package; low-bit weights count."""
    excluded: set[int] = set()
    if exclude_embeddings:
        excluded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = sum(
        p.numel() for p in model.parameters() if id(p) not in excluded and (p.requires_grad or not only_trainable)
    )
    low_bit = [m for m in model.modules() if isinstance(m, (QuantLinear, QuantGroupedLinear)) and not only_trainable]
    return int(found + sum(math.prod(layer.weight.shape) for layer in low_bit))


class _GPTQ(_Quantizer):
    serialized_names = {"weight": ["qweight", "qzeros", "scales", "g_idx"]}  # noqa: RUF012

    def lower(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        return gptq.lower(tensors, gptq.Overrides(self.settings).of(module))


class _AWQ(_Quantizer):
    serialized_names = {"weight": ["qweight", "qzeros", "scaled_zeros", "scales"]}  # noqa: RUF012

    def lower(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        return awq.lower(tensors, self.settings)


class _MetateConfig(QuantizationConfigMixin):
    """The `quantization_config` of metate's own form, which every layer describes itself."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method = "metate"  # type: ignore[assignment]


class _Metate(_Quantizer):
    serialized_names = {"weight": [*canonical.FIELDS, canonical.MARK]}  # noqa: RUF012

    def lower(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        weight = canonical.lower(tensors, self.settings)
        if not isinstance(weight, QuantizedWeight):
            expected = "weights of linear layers; metate.models.Llama.from_pretrained reads experts"
            raise fail("compat.transformers", module, "a stack of experts", expected, error=NotImplementedError)
        return weight


class _BitsAndBytes(_Quantizer):
    """Also quantises a dense checkpoint as it is loaded, where `from_pretrained` is given a BitsAndBytesConfig."""

    requires_calibration = False
    quantization_config: BitsAndBytesConfig

    def _skipped(self) -> list[str] | None:
        skipped: list[str] | None = self.quantization_config.llm_int8_skip_modules
        return skipped

    def lower(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        return bitsandbytes.lower(tensors, self.settings)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        layer, tail = get_module_from_name(model, param_name)
        name = param_name.rpartition(".")[0]
        return tail == "weight" and _is_linear(layer) and should_convert_module(name, self.skipped)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        config = self.quantization_config
        if config.load_in_8bit:
            return bitsandbytes.lower_int8(bitsandbytes.quantize_int8(weight))
        nested = config.bnb_4bit_use_double_quant
        return bitsandbytes.quantize_4bit(weight, config.bnb_4bit_quant_type, nested=nested).lower()


class _BitsAndBytes4bit(_BitsAndBytes):
    serialized_names = {  # noqa: RUF012
        "weight": [
            "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
            f"weight.{bitsandbytes.STATE}nf4", f"weight.{bitsandbytes.STATE}fp4",
        ]
    }  # fmt: skip

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model.__dict__["is_loaded_in_4bit"] = True
        return super()._process_model_after_weight_loading(model, **kwargs)


class _BitsAndBytes8bit(_BitsAndBytes):
    serialized_names = {"weight": ["weight", "SCB", "weight_format"]}  # noqa: RUF012

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model.__dict__["is_loaded_in_8bit"] = True
        return super()._process_model_after_weight_loading(model, **kwargs)


class _GGUF(_Quantizer):
    """A `gguf_file`, for which transformers makes the configuration. The loader gets dense tensors, and an empty one of
    bytes for every weight that stays in its blocks."""

    requires_calibration = False
    quantization_config: GgufConfig
    serialized_names = {"weight": ["weight"]}  # noqa: RUF012

    def __init__(self, quantization_config: GgufConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True
        self.lowered: dict[str, QuantizedWeight] = {}

    def read_header(self, gguf_file: str) -> None:
        file = load_quantized(gguf_file)
        if not isinstance(file, GGUFFile):
            raise fail("compat.transformers", "gguf_file", gguf_file, "a GGUF file")
        self.file = GGUFModel(file)

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        self.dtype = dtype or torch.float32
        return self.dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        mixture = any(name.endswith(".experts") for name, _ in model.named_modules())
        if mixture != bool(self.file.experts):  # transformers takes Mixtral's metadata for those of a Llama
            got = f"one of {self.file.experts} experts a layer, for {type(model).__name__}"
            expected = "a file and a model that both have experts, or none; say config= where the file does not tell"
            raise fail("compat.transformers", "gguf_file", got, expected, error=NotImplementedError)

    def get_state_dict(self, checkpoint_file: str, model: PreTrainedModel) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, weight in self.file.items():
            if not isinstance(weight, QuantizedWeight):
                found[name] = weight
            elif self.quantization_config.dequantize or not _is_linear(_module(model, name)):
                found[name] = weight.dequantize(self.dtype)  # embeddings and experts
            else:
                found[name], self.lowered[name] = torch.empty(0, dtype=torch.uint8), weight
        return found

    def is_dense(self, tensors: Mapping[str, Tensor]) -> bool:
        return tensors["weight"].dtype != torch.uint8

    def lower(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        name = f"{module}.weight"
        return self.lowered.pop(name if name in self.lowered else f"model.{name}")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        factors = self.file.rotary_factors
        rotary: Any
        for rotary in model.modules():
            if factors is not None and getattr(rotary, "rope_type", None) == "default":  # as the metadata have it
                for buffer in (rotary.inv_freq, rotary.original_inv_freq):
                    buffer.div_(factors.to(buffer.device))
        del self.file
        return super()._process_model_after_weight_loading(model, **kwargs)


class _Lower(ConversionOps):
    """The tensors of one layer, as a checkpoint holds them."""

    def __init__(self, hf_quantizer: _Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Lower:
        return self  # transformers copies its conversions for every layer, and the quantiser may hold weights

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        found = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        if self.hf_quantizer.is_dense(found):
            return _dense(found["weight"], model, full_layer_name)
        module = full_layer_name.removesuffix(".weight")
        tensors = {name.removeprefix("weight."): tensor.cpu() for name, tensor in found.items()}
        device = next(iter(found.values())).device
        return _place(model, full_layer_name, self.hf_quantizer.lower(module, tensors).to(device))


class _Quantize(ConversionOps):
    """A dense weight that is to be quantised."""

    def __init__(self, hf_quantizer: _BitsAndBytes) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        (value,) = input_dict.values()
        weight: Tensor = value[0] if isinstance(value, list) else value
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        weight = weight.T if isinstance(layer, Conv1D) else weight
        return _place(model, full_layer_name, self.hf_quantizer.quantize(weight))


def _dense(weight: Tensor, model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """A weight that the checkpoint keeps dense, in the dtype that the model wants for it."""
    dtype = model.get_parameter_or_buffer(name).dtype
    return {name: weight.to(dtype) if weight.is_floating_point() else weight}


def _place(model: PreTrainedModel, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Leaves the lowered weight with its layer, and for the loader a tensor of the shape it expects."""
    layer, tail = get_module_from_name(model, name)
    if tail != "weight" or not _is_linear(layer):
        raise fail("compat.transformers", name, f"quantised, in a {type(layer).__name__}", "a linear layer's weight")
    expected = layer.weight.shape
    if weight.shape != tuple(expected if isinstance(layer, nn.Linear) else expected[::-1]):
        raise fail("compat.transformers", name, weight, f"of shape {tuple(expected)}")
    layer.__dict__[_LOWERED] = weight
    placeholder = torch.zeros((), dtype=layer.weight.dtype, device=weight.device).expand(expected)
    return {name: placeholder}


def _module(model: PreTrainedModel, name: str) -> nn.Module | None:
    """The module of a parameter; the name may begin with that of the base model where the model is one."""
    found = dict(model.named_modules())
    module = name.rpartition(".")[0]
    return found.get(module, found.get(module.removeprefix(f"{model.base_model_prefix}.")))


def _is_linear(layer: Any) -> bool:
    return dense_weight(layer) is not None


_QUANTIZERS = {
    "gptq": _GPTQ, "awq": _AWQ, "bitsandbytes_4bit": _BitsAndBytes4bit, "bitsandbytes_8bit": _BitsAndBytes8bit,
    "gguf": _GGUF,
}  # fmt: skip


def enable() -> None:
    """Puts the quantisers above in the place of transformers' own."""
    for name in _QUANTIZERS.keys() & auto.AUTO_QUANTIZER_MAPPING.keys():  # "gguf" is not in every version 5
        _before.setdefault(name, auto.AUTO_QUANTIZER_MAPPING[name])
        auto.AUTO_QUANTIZER_MAPPING[name] = _QUANTIZERS[name]
    auto.AUTO_QUANTIZER_MAPPING["metate"] = _Metate  # without it transformers would leave such layers as they were made
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["metate"] = _MetateConfig


def disable() -> None:
    """Puts transformers' own back."""
    auto.AUTO_QUANTIZER_MAPPING.update(_before)
    _before.clear()
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        mapping.pop("metate", None)
