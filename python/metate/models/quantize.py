"""A decoder of any make to low-bit weights, layer by layer: each is calibrated on what the quantised ones before it
put out.

Embeddings, norms and the head stay as they are. Checkpoints come out in the formats' own layouts.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metate.errors import FormatError, fail
from metate.models.apart import Apart, Expert, apart, checkpoint_names, everyone, gates, take_apart
from metate.models.chain import Chain, called_linears, decoder_layers, linears
from metate.models.config import LlamaConfig
from metate.models.experts import Weight
from metate.models.folding import Group, Place, find_place, groups_of
from metate.models.llama import Llama
from metate.nn import QuantLinear
from metate.quant import (
    Calibration,
    QuantizedWeight,
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
from metate.quant.checkpoint import check_writable, read_configuration

METHODS = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "gptq": "gptq", "awq": "awq", "rtn": "gptq", "hqq": "metate"}
CALIBRATED = ("gptq", "awq")
_SKIPPED = {"bitsandbytes": "llm_int8_skip_modules", "awq": "modules_to_not_convert"}  # where readers look for them


@dataclass(frozen=True)
class Recipe:
    """How weights are quantised: one of METHODS, bits (4 with NF4, FP4 and AWQ), columns that share a scale.

    nested: files of NF4 and FP4 hold scales that are rounded to 8 bits themselves ("double quantisation").
    desc_act: GPTQ's groups are of columns with inputs of like size, the largest first ("activation order"), not of
        neighbours: nearer to the model, at the price of a gather of every layer's inputs.
    """

    method: str
    bits: int = 4
    group_size: int = 128
    nested: bool = False
    desc_act: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise fail("quantize_decoder", "method", repr(self.method), " or ".join(METHODS))
        if self.method in ("nf4", "fp4", "awq") and self.bits != 4:
            raise fail("quantize_decoder", "bits", self.bits, f"4 with {self.method}")
        if self.nested and METHODS[self.method] != "bitsandbytes":
            raise fail("quantize_decoder", "nested", f"True with {self.method}", "nf4 or fp4")
        if self.desc_act and self.method != "gptq":
            raise fail("quantize_decoder", "desc_act", f"True with {self.method}", "gptq")


def quantize_decoder(
    model: nn.Module,
    recipe: Recipe,
    tokens: Tensor | None = None,
    *,
    store: Path | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, Weight]:
    """Replaces the linear layers in the layers of a decoder by low-bit ones, and puts it into evaluation mode.

    AWQ divides what comes before a linear layer by the scale of its inputs: a norm, or (rows of) a linear layer before.
    Where no such place is found, as before the output of grouped-query attention or behind GELU, the inputs are not
    scaled, and only the ranges of the weights cut. A linear layer that the model has but does not call stays dense.

    Experts of transformers become linear layers of their own. GPTQ calibrates each on the tokens that are routed to it,
    or on all, where those are fewer than its inputs. What chooses or weighs experts stays dense.

    Args:
        model: metate's Llama or a causal language model of transformers, with layers that follow one another in a
            torch.nn.ModuleList, in float32.
        tokens: (samples, length) of calibration text; GPTQ and AWQ need them.
        store: a folder that keeps finished layers, so that a stopped run goes on from there.
        report: is told how many layers are done.

    Returns:
        all weights by the names of a Hugging Face checkpoint, for `save_quantized(…, METHODS[recipe.method])`.

    Raises:
        ValueError: the model has experts that are no linear layers in its checkpoints, or any with AWQ, or other than
            plain layers in sequence; tokens are missing; the store is of another model, text or recipe.
    """
    _prepare(model, recipe, tokens)
    model.eval()
    with torch.no_grad():
        chosen = _chosen(model)
        samples = [] if tokens is None or recipe.method not in CALIBRATED else list(tokens)
        chain = Chain(model, samples)
        source = _checksum([*samples, *chain.hidden])
        places: dict[Group, Place] = {}  # layers are mostly alike
        for i, layer in enumerate(chain.layers):
            source = _checksum(layer.parameters(), source)
            finished = None if store is None else _finished(store, i, recipe, source)
            if finished is None:
                finished = _quantize_layer(chain, i, recipe, chosen, places)
                if store is not None:
                    _keep(store, i, recipe, source, finished)
            _put(layer, finished)
            chain.advance(i)
            report(i + 1)
    return _weights(model)


def _prepare(model: nn.Module, recipe: Recipe, tokens: Tensor | None) -> None:
    """Takes experts apart, and says what is not served."""
    take_apart(model)
    name, layers = decoder_layers(model)
    if recipe.method == "awq" and apart(layers):
        got = "a mixture of experts for awq, whose scale of one expert's inputs would change those of all others"
        raise fail("quantize_decoder", "model", got, "a dense decoder; gptq and the others take experts")
    if any(_is_mixture(inner, module) for inner, module in layers.named_modules()):
        expected = (
            "a dense decoder, or experts of transformers' interface; metate.quantize_model, for models of transformers "
            "metate.compat.transformers.quantize_experts, takes others to low bits"
        )
        raise fail("quantize_decoder", "model", "a mixture of experts", expected)
    bare = next((i for i, layer in enumerate(layers) if not linears(layer)), None)
    if bare is not None:
        raise fail("quantize_decoder", "model", f"without linear layers in {name}.{bare}", "some in every layer")
    if recipe.method in CALIBRATED and (tokens is None or not tokens.numel()):
        raise fail(
            "quantize_decoder", "tokens", "none", f"calibration text for {recipe.method}: (samples, length) tokens"
        )


def _is_mixture(name: str, module: nn.Module) -> bool:
    """Whether a module has experts that do not stand apart."""
    if isinstance(module, (Apart, Expert)):
        return False
    return name.rpartition(".")[2] == "experts" or "Expert" in type(module).__name__


def _chosen(model: nn.Module) -> set[nn.Module]:
    """The linear layers to quantise."""
    with everyone(model):
        return called_linears(model).difference(gates(model).values())


def _calibrate(chain: Chain, number: int, groups: Iterable[Group]) -> dict[str, Calibration]:
    """Statistics of the inputs of every linear layer, those of a group together."""
    statistics: dict[str, Calibration] = {}
    layer = chain.layers[number]
    dense = linears(layer)
    with ExitStack() as stack:
        for group in groups:
            first = dense[group.names[0]]
            calibration = Calibration(first.shape[1], first.device)
            statistics |= dict.fromkeys(group.names, calibration)

            def watch(module: nn.Module, args: tuple[Tensor, ...], calibration: Calibration = calibration) -> None:
                calibration.add(args[0])

            stack.callback(layer.get_submodule(group.names[0]).register_forward_pre_hook(watch).remove)
        for _ in chain.run(number):
            pass
    return statistics


def _is_thin(statistics: Mapping[str, Calibration], group: Group) -> bool:
    """Whether inputs were fewer than a weight has columns: GPTQ would fit their noise."""
    calibration = statistics[group.names[0]]
    return calibration.count < calibration.in_features


def _quantize_layer(
    chain: Chain, number: int, recipe: Recipe, chosen: set[nn.Module], places: dict[Group, Place]
) -> dict[str, Weight]:
    layer = chain.layers[number]
    statistics: dict[str, Calibration] = {}
    scales: dict[str, Tensor] = {}
    if recipe.method in CALIBRATED:
        with everyone(layer):
            groups = groups_of(layer, lambda: list(chain.run(number, 1)))
        statistics = _calibrate(chain, number, groups)
        experts = tuple(apart(layer))
        few = [group for group in groups if group.names[0].startswith(experts) and _is_thin(statistics, group)]
        if few:
            with everyone(layer):
                statistics |= _calibrate(chain, number, few)
        if recipe.method == "awq":
            scales = _fold(chain, number, recipe, groups, statistics, places)
    found: dict[str, Weight] = {
        name: _quantize(weight, recipe, statistics.get(name), scales.get(name))
        for name, weight in linears(layer).items()
        if layer.get_submodule(name) in chosen
    }
    for name, parameter in layer.named_parameters():  # AWQ folds scales into some
        if name.removesuffix(".weight") not in found:
            found[name] = parameter.detach()
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
        neighbours = not recipe.desc_act
        return quantize_gptq(weight, calibration, bits, group_size, act_order=True, static_groups=neighbours, mse=True)
    if scale is not None:
        weight = weight / scale  # AWQ multiplies by it again; what came before has it folded in
    return quantize_awq(weight, calibration, bits, group_size, scale=scale)[0]


def _fold(
    chain: Chain, number: int, recipe: Recipe, groups: list[Group], statistics: dict[str, Calibration],
    places: dict[Group, Place],
) -> dict[str, Tensor]:  # fmt: skip
    """Folds AWQ's scales into the layer, which goes on computing the same; the scales by linear layer."""
    layer, dense = chain.layers[number], linears(chain.layers[number])

    def run() -> Tensor:
        return next(chain.run(number, 1)) - chain.hidden[0]

    found: dict[Group, Place] = {}
    for group in groups:  # before any is folded
        known = places.get(group)
        place = find_place(layer, group, run, () if known is None else (known,))
        if place is not None:
            found[group] = places[group] = place
    scales: dict[str, Tensor] = {}
    for group in groups:
        weights = [dense[name] for name in group.names]
        scale = torch.ones_like(weights[0][0], dtype=torch.float32)
        if group in found:
            scale = search_awq_scale(weights, statistics[group.names[0]], recipe.bits, recipe.group_size)
            found[group].divide(layer, scale)
            for weight in weights:
                weight.mul_(scale)
        scales |= dict.fromkeys(group.names, scale)
    return scales


def _put(layer: nn.Module, finished: dict[str, Weight]) -> None:
    for name, weight in finished.items():
        if isinstance(weight, Tensor):
            layer.get_parameter(name).data.copy_(weight)
    for name, weight in finished.items():
        if isinstance(weight, QuantizedWeight):
            linear: Any = layer.get_submodule(name)
            layer.set_submodule(name, QuantLinear(weight, linear.bias).train(linear.training))


def _weights(model: nn.Module) -> dict[str, Weight]:
    """Every weight, once, by the name that it has in a Hugging Face checkpoint."""
    found: dict[str, Weight] = {}
    low_bit = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, module in low_bit.items():
        found[f"{name}.weight"] = module.weight
        if module.bias is not None:
            found[f"{name}.bias"] = module.bias.detach()
    seen: set[int] = set()  # tied weights are written once
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] not in low_bit and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    names = _outer(model, found)
    return {
        names[name] if isinstance(weight, Tensor) else names[name].removesuffix(".weight"): weight
        for name, weight in found.items()
    }


def _outer(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Names in the model -> as checkpoints have them."""
    if apart(model):
        return checkpoint_names(model, names)
    prefix = "model." if isinstance(model, Llama) else ""
    return {name: name if name.startswith("lm_head") else prefix + name for name in names}


# Checkpoints.

_BESIDE = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


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
    """A Hugging Face checkpoint in `folder` to a quantised one in `out`; a stopped run goes on where it was.

    metate's own Llama runs what it can read, transformers (where it is installed) any other causal language model.

    Args:
        text: calibration text, for GPTQ and AWQ; `samples` windows of `length` tokens, evenly spread, are used.
        report: is told how many of how many layers are done.

    Raises:
        ValueError, OSError: naming what is wrong with folder, out or text; before anything is written. A folder `out`
            that holds a checkpoint, of anything, is left alone.
        FormatError (a ValueError): the checkpoint is damaged, or the format has no place for weights of these shapes.
    """
    store = out / "unfinished"
    _check_folders(folder, out, store)
    config = read_configuration(folder)
    if config.get("quantization_config") is not None:
        raise fail("quantize_checkpoint", "folder", f"{folder}, quantised already", "a dense checkpoint")
    model = _dense_model(folder)
    vocab_size = model.vocab_size if isinstance(model, Llama) else model.get_input_embeddings().num_embeddings
    tokens = calibration_tokens(folder, text, vocab_size, samples, length) if text else None
    _prepare(model, recipe, tokens)
    _check_format(model, recipe)
    total = len(decoder_layers(model)[1])
    store.mkdir(parents=True, exist_ok=True)
    weights = quantize_decoder(model, recipe, tokens, store=store, report=lambda done: report(done, total))
    _save(out, model, config, recipe, weights)
    for name in _BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    shutil.rmtree(store)


def _check_folders(folder: Path, out: Path, store: Path) -> None:
    if folder.is_file():
        raise fail("quantize_checkpoint", "folder", f"{folder}, a file", "the folder of a checkpoint")
    if out.exists() and not out.is_dir():
        raise fail("quantize_checkpoint", "out", f"{out}, a file", "a folder, which is made where there is none")
    if out.resolve() == folder.resolve():
        raise fail("quantize_checkpoint", "out", f"{out}, the checkpoint itself", "another folder")
    if not store.is_dir() and any((out / name).exists() for name in ("config.json", "model.safetensors")):
        expected = "a new folder, or that of a stopped run; delete it, or choose another"
        raise fail("quantize_checkpoint", "out", f"{out}, which holds a checkpoint", expected)


def _dense_model(folder: Path) -> Any:
    """A dense model in float32, of our own where it reads the checkpoint and has no experts, else of transformers."""
    try:
        if LlamaConfig.read(folder / "config.json").num_experts:
            raise FormatError("metate.quantize_checkpoint: folder is of a mixture of experts, expected a dense decoder")
    except FormatError as unknown:
        try:
            from transformers import AutoModelForCausalLM
        except ModuleNotFoundError:
            raise FormatError(f"{unknown}; transformers reads other models: pip install 'transformers>=5'") from None
        reader: Any = AutoModelForCausalLM
        model, found = reader.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        wrong = [*found["missing_keys"], *found["mismatched_keys"]]
        if wrong:
            got = f"{folder}, without or in another shape {', '.join(map(str, wrong[:5]))}"
            raise fail("quantize_checkpoint", "folder", got, "a whole checkpoint", error=FormatError) from None
        return model
    return Llama.from_pretrained(folder, dtype=torch.float32)


def _check_format(model: nn.Module, recipe: Recipe) -> None:
    """Whether the format can hold weights of these shapes: better known now than when all are quantised."""
    method = {"gptq": "rtn", "awq": "rtn"}.get(recipe.method, recipe.method)
    plain = replace(recipe, method=method, desc_act=False)
    layers, chosen = decoder_layers(model)[1], _chosen(model)
    weights = {name: weight for name, weight in linears(layers).items() if layers.get_submodule(name) in chosen}
    for shape in dict.fromkeys(tuple(weight.shape) for weight in weights.values()):
        check_writable(METHODS[recipe.method], _quantize(torch.zeros(shape, dtype=torch.float32), plain, None, None))


def _save(out: Path, model: nn.Module, config: dict[str, Any], recipe: Recipe, weights: dict[str, Weight]) -> None:
    dense = {name: w for name, w in weights.items() if isinstance(w, Tensor) and w.is_floating_point()}
    fits = all(float(w.abs().max()) < torch.finfo(torch.float16).max for w in dense.values() if w.numel())
    dtype = torch.float16 if fits else torch.float32
    wide = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())  # what corrects routers' choices
    cast = {name: w for name, w in dense.items() if not any(part in name for part in wide)}
    written = {**weights, **{name: w.to(dtype) for name, w in cast.items()}}  # other readers never cast
    method = METHODS[recipe.method]
    config = {**config, "dtype" if "dtype" in config else "torch_dtype": str(dtype).removeprefix("torch.")}
    dense_layers = dict.fromkeys([*linears(model), *gates(model)])
    skipped = [name.removesuffix(".weight") for name in _outer(model, [f"{n}.weight" for n in dense_layers]).values()]
    if method in _SKIPPED and skipped != ["lm_head"]:
        config["quantization_config"] = {_SKIPPED[method]: skipped}
    save_quantized(out, written, method, config, nested=recipe.nested)


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
    starts = torch.linspace(0, len(ids) - length, samples, dtype=torch.float32).long().tolist()
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
        raise fail("quantize_decoder", "store", f"{store} of another recipe", f"one of {recipe}; delete that folder")
    if config.get("source") != source:
        got = f"{store} of another checkpoint or calibration text"
        raise fail("quantize_decoder", "store", got, "one of these; delete that folder")
    found = load_quantized(folder)
    return {name: found[name] for name in found}
