"""A Llama decoder to low-bit weights, layer by layer: each is calibrated on what the quantised ones before it put out.

Embeddings, norms and the head stay as they are. Checkpoints come out in the formats' own layouts.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from metate.errors import fail
from metate.models.experts import Weight
from metate.models.llama import Layer, Llama, put_quantized
from metate.nn import QuantLinear
from metate.quant import (
    Calibration,
    QuantizedWeight,
    fold_scale,
    load_quantized,
    quantize_awq,
    quantize_fp4,
    quantize_gptq,
    quantize_hqq,
    quantize_nf4,
    quantize_rtn,
    save_quantized,
    search_awq_scale,
)  # fmt: skip
from metate.quant.checkpoint import WRITERS

METHODS = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "gptq": "gptq", "awq": "awq", "rtn": "gptq", "hqq": "metate"}
CALIBRATED = ("gptq", "awq")
_SHARED = (  # linear layers with the same input
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_BEFORE = (
    "input_layernorm",
    "self_attn.v_proj",
    "post_attention_layernorm",
    "mlp.up_proj",
)  # what AWQ's scales fold into
_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Recipe:
    """How weights are quantised: one of METHODS, bits (4 with NF4, FP4 and AWQ), columns that share a scale."""

    method: str
    bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise fail("quantize_llama", "method", repr(self.method), " or ".join(METHODS))
        if self.method in ("nf4", "fp4", "awq") and self.bits != 4:
            raise fail("quantize_llama", "bits", self.bits, f"4 with {self.method}")


def quantize_llama(
    model: Llama,
    recipe: Recipe,
    tokens: Tensor | None = None,
    *,
    store: Path | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, Weight]:
    """Replaces the linear layers of `model` by low-bit ones.

    Args:
        tokens: (samples, length) of calibration text; GPTQ and AWQ need them.
        store: a folder that keeps finished layers, so that a stopped run goes on from there.
        report: is told how many layers are done.

    Returns:
        all weights by the names of a Hugging Face checkpoint, for `save_quantized(…, METHODS[recipe.method])`.

    Raises:
        ValueError: the model has experts; tokens are missing; the store is of another model, text or recipe.
    """
    _check_arguments(model, recipe, tokens)
    with torch.no_grad():
        samples = [] if tokens is None or recipe.method not in CALIBRATED else list(tokens)
        hidden = [model.embed_tokens(sample[None]) for sample in samples]
        source = _checksum([*samples, model.embed_tokens.weight])
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, Layer)
            source = _checksum(layer.parameters(), source)
            finished = None if store is None else _finished(store, i, recipe, source)
            if finished is None:
                finished = _quantize_layer(layer, recipe, _calibrate(model, layer, hidden))
                if store is not None:
                    _keep(store, i, recipe, source, finished)
            _put(layer, finished)
            hidden = [layer(x, model.rotation(0, x.shape[1], x), None) for x in hidden]
            report(i + 1)
    return _weights(model)


def _check_arguments(model: Llama, recipe: Recipe, tokens: Tensor | None) -> None:
    if model.config.num_experts:
        expected = "a dense decoder; metate.quantize_model takes experts to low bits"
        raise fail("quantize_llama", "model", "a mixture of experts", expected)
    if recipe.method in CALIBRATED and (tokens is None or not tokens.numel()):
        raise fail(
            "quantize_llama", "tokens", "none", f"calibration text for {recipe.method}: (samples, length) tokens"
        )


def _calibrate(model: Llama, layer: Layer, hidden: list[Tensor]) -> dict[str, Calibration]:
    """Statistics of the inputs of every linear layer, by the first name of those that share them."""
    statistics: dict[str, Calibration] = {}
    hooks = []
    for first, *_ in _SHARED if hidden else ():
        linear = layer.get_submodule(first)
        assert isinstance(linear, nn.Linear)
        calibration = statistics[first] = Calibration(linear.in_features, linear.weight.device)

        def watch(module: nn.Module, args: tuple[Tensor, ...], calibration: Calibration = calibration) -> None:
            calibration.add(args[0])

        hooks.append(linear.register_forward_pre_hook(watch))
    for x in hidden:
        layer(x, model.rotation(0, x.shape[1], x), None)
    for hook in hooks:
        hook.remove()
    return statistics


def _quantize_layer(layer: Layer, recipe: Recipe, statistics: dict[str, Calibration]) -> dict[str, Weight]:
    scales = _fold(layer, recipe, statistics) if recipe.method == "awq" else {}
    found: dict[str, Weight] = {}
    for first, *others in _SHARED:
        for name in (first, *others):
            linear = layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            found[name] = _quantize(linear.weight, recipe, statistics.get(first), scales.get(first))
            if linear.bias is not None:  # AWQ folds scales into some
                found[f"{name}.bias"] = linear.bias.detach()
    for name in _NORMS:
        found[f"{name}.weight"] = layer.get_parameter(f"{name}.weight").detach()
    return found


def _quantize(weight: Tensor, recipe: Recipe, calibration: Calibration | None, scale: Tensor | None) -> QuantizedWeight:
    bits, group_size = recipe.bits, recipe.group_size
    if recipe.method == "nf4":
        return quantize_nf4(weight, group_size)
    if recipe.method == "fp4":
        return quantize_fp4(weight, group_size)
    if recipe.method == "hqq":
        return quantize_hqq(weight, bits, group_size)
    if recipe.method == "rtn":
        return quantize_rtn(weight, bits, group_size)
    assert calibration is not None
    if recipe.method == "gptq":
        return quantize_gptq(weight, calibration, bits, group_size, act_order=True, static_groups=True, mse=True)
    if scale is not None:
        weight = weight / scale  # AWQ multiplies by it again; what came before has it folded in
    return quantize_awq(weight, calibration, bits, group_size, scale=scale)[0]


def _fold(layer: Layer, recipe: Recipe, statistics: dict[str, Calibration]) -> dict[str, Tensor]:
    """Folds AWQ's scales into the layer, which goes on computing the same; the scales by the first name."""
    scales: dict[str, Tensor] = {}
    for (first, *others), before in zip(_SHARED, _BEFORE, strict=True):
        linears = [layer.get_submodule(name) for name in (first, *others)]
        previous = layer.get_submodule(before)
        weights = [linear.weight for linear in linears if isinstance(linear, nn.Linear)]
        scale = torch.ones_like(weights[0][0], dtype=torch.float32)
        if isinstance(previous.weight, Tensor) and previous.weight.shape[0] == scale.numel():  # not of grouped heads
            scale = search_awq_scale(weights, statistics[first], recipe.bits, recipe.group_size)
            fold_scale(previous, scale)
            for weight in weights:
                weight.mul_(scale)
        scales[first] = scale
    return scales


def _put(layer: Layer, finished: dict[str, Weight]) -> None:
    for name, weight in finished.items():
        if isinstance(weight, Tensor):
            layer.get_parameter(name).data.copy_(weight)
        else:
            put_quantized(layer, name, weight)


def _weights(model: Llama) -> dict[str, Weight]:
    """Every weight by the name that it has in a Hugging Face checkpoint."""
    found: dict[str, Weight] = {}
    low_bit = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, module in low_bit.items():
        found[f"model.{name}"] = module.weight
        if module.bias is not None:
            found[f"model.{name}.bias"] = module.bias.detach()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in low_bit:
            found[name if name.startswith("lm_head") else f"model.{name}"] = parameter.detach()
    return found


# Checkpoints.

_BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def quantize_checkpoint(
    folder: Path,
    recipe: Recipe,
    out: Path,
    text: str = "",
    *,
    samples: int = 64,
    length: int = 512,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """A Hugging Face Llama checkpoint in `folder` to a quantised one in `out`; a stopped run goes on where it was.

    Args:
        text: calibration text, for GPTQ and AWQ; `samples` windows of `length` tokens, evenly spread, are used.
        report: is told how many of how many layers are done.

    Raises:
        ValueError, OSError: naming what is wrong with folder, out or text; before anything is written.
        FormatError (a ValueError): the checkpoint is damaged, or the format has no place for weights of these shapes.
    """
    if out.resolve() == folder.resolve():
        raise fail("quantize_checkpoint", "out", f"{out}, the checkpoint itself", "another folder")
    model = Llama.from_pretrained(folder, dtype=torch.float32)
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise fail("quantize_checkpoint", "folder", f"{folder}, quantised already", "a dense checkpoint")
    if not model.config.num_experts:
        _check_format(model, recipe)
    total = len(model.layers)
    tokens = calibration_tokens(folder, text, model.config.vocab_size, samples, length) if text else None
    _check_arguments(model, recipe, tokens)
    store = out / "unfinished"
    store.mkdir(parents=True, exist_ok=True)
    weights = quantize_llama(model, recipe, tokens, store=store, report=lambda done: report(done, total))
    config = json.loads((folder / "config.json").read_text())
    half = {name: w.half() if isinstance(w, Tensor) else w for name, w in weights.items()}  # other readers never cast
    save_quantized(out, half, METHODS[recipe.method], {**config, "torch_dtype": "float16"})
    for name in _BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    shutil.rmtree(store)


def _check_format(model: Llama, recipe: Recipe) -> None:
    """Whether the format can hold weights of these shapes: better known now than when all are quantised."""
    for shape in {linear.weight.shape for linear in model.layers[0].modules() if isinstance(linear, nn.Linear)}:
        method = {"gptq": "rtn", "awq": "rtn"}.get(recipe.method, recipe.method)
        WRITERS[METHODS[recipe.method]](_quantize(torch.zeros(shape), replace(recipe, method=method), None, None))


def calibration_tokens(folder: Path, text: str, vocab_size: int, samples: int, length: int) -> Tensor:
    """(samples, length) tokens of a text: by the tokenizer beside the checkpoint, else bytes for 256 tokens."""
    if (folder / "tokenizer.json").is_file():
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise fail("quantize_checkpoint", "text", "no tokenizers package", "it; pip install tokenizers") from None
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    elif vocab_size == 256:
        ids = list(text.encode())
    else:
        raise fail("quantize_checkpoint", "folder", f"{folder} without tokenizer.json", "one with its tokenizer")
    if len(ids) < length:
        raise fail("quantize_checkpoint", "text", f"{len(ids)} tokens", f"at least {length}")
    starts = torch.linspace(0, len(ids) - length, samples).long().tolist()
    return torch.tensor([ids[start : start + length] for start in starts])


# Finished layers on disk.


def _checksum(tensors: Iterable[Tensor], before: int = 0) -> int:
    """CRC-32 of what a layer is made of: itself, those before it, and the calibration text."""
    for tensor in tensors:
        before = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, before)
    return before


def _folder(store: Path, i: int) -> Path:
    return store / f"layer-{i:03d}"


def _keep(store: Path, i: int, recipe: Recipe, source: int, finished: dict[str, Weight]) -> None:
    """Under another name first: a layer that is there is whole."""
    partial = store / "partial"
    save_quantized(partial, finished, "metate", {"recipe": vars(recipe), "source": source})
    partial.rename(_folder(store, i))


def _finished(store: Path, i: int, recipe: Recipe, source: int) -> dict[str, Weight] | None:
    folder = _folder(store, i)
    if not folder.is_dir():
        return None
    config = json.loads((folder / "config.json").read_text())
    if config.get("recipe") != vars(recipe):
        raise fail("quantize_llama", "store", f"{store} of another recipe", f"one of {recipe}; delete that folder")
    if config.get("source") != source:
        got = f"{store} of another checkpoint or calibration text"
        raise fail("quantize_llama", "store", got, "one of these; delete that folder")
    found = load_quantized(folder)
    return {name: found[name] for name in found}
