"""Quantised checkpoints on disk: which format, which tensors make a module, lowered one by one as they are asked for.

Files are mapped into memory, so that a checkpoint costs what is read of it. No pickle is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from metate.errors import FormatError, fail
from metate.low_bit import QuantizedWeight
from metate.ops.moe import QuantizedExperts
from metate.quant import awq, bitsandbytes, canonical, fp8, gptq
from metate.quant.gguf import MAGIC, GGUFFile
from metate.quant.settings import Settings, complain, parse_json

WRITERS: dict[str, Any] = {
    "gptq": gptq.write, "awq": awq.write, "bitsandbytes": bitsandbytes.write, "metate": canonical.write,
}  # fmt: skip
METHODS = ("gptq", "awq", "bitsandbytes", "fp8", "fbgemm_fp8", "metate")
_INDEX = "model.safetensors.index.json"
_INDEX_BYTES = 32 << 20
_SPLITS = 1000
_PACKED = ("qweight", "qzeros", "scaled_zeros", "scales", "g_idx")
_MARKS = {  # the tensor that makes a module of its neighbours -> how to lower it; None: as the configuration says
    "qweight": None, "SCB": "bitsandbytes", "weight_scale_inv": "fp8", "weight_scale": "fp8", canonical.MARK: "metate",
}  # fmt: skip
_PARTS = {
    "qweight": _PACKED, "SCB": ("weight", "SCB", "weight_format"), canonical.MARK: (*canonical.FIELDS, canonical.MARK),
    "weight_scale_inv": ("weight", "weight_scale_inv"), "weight_scale": ("weight", "weight_scale"),
}  # fmt: skip


class _Safetensors(Mapping[str, Tensor]):
    """Tensor name -> tensor, of several files."""

    def __init__(self, paths: list[Path]) -> None:
        from safetensors import safe_open  # `import metate` needs torch alone

        self._files: dict[str, Any] = {}
        for path in paths:
            file = _guarded(path.name, partial(safe_open, path, framework="pt"))
            for name in _guarded(path.name, file.keys):
                if name in self._files:
                    raise complain(name, f"in {path.name} and another file", "in one")
                self._files[name] = file

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        tensor: Tensor = _guarded(name, partial(file.get_tensor, name))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _guarded(what: str, read: Callable[[], Any]) -> Any:
    """The library's errors about a file become ours."""
    from safetensors import SafetensorError

    try:
        return read()
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise complain(what, f"unreadable ({error})", "a safetensors file") from None


class QuantizedCheckpoint(Mapping[str, "QuantizedWeight | QuantizedExperts | Tensor"]):
    """Module name -> QuantizedWeight, and tensor name -> dense tensor for what is not quantised; made when asked for.

    config: the configuration found beside the tensors, unchecked.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: dict[str, Any], checkpoint_format: str | None) -> None:
        self._tensors, self.config = tensors, config
        self._settings = Settings("configuration", config).section("quantization_config")
        self._version = checkpoint_format
        self._method = self._settings.text("quant_method", None, *METHODS)
        if self._method is None and "bits" in self._settings.values:
            self._method = "gptq"  # quantize_config.json, before methods were named
        elif self._method is None and "w_bit" in self._settings.values:
            self._method = "awq"
        self._overrides = gptq.Overrides(self._settings)
        self._modules: dict[str, dict[str, str]] = {}
        for name in tensors:
            self._find_module(name)
        parts = {name for parts in self._modules.values() for name in parts.values()}
        self._dense = dict.fromkeys(name for name in tensors if name not in parts)
        clash = next((name for name in self._dense if name in self._modules), None)
        if clash is not None:
            raise complain(clash, "the name of a module and of a tensor", "one of them")

    def _find_module(self, name: str) -> None:
        """Remembers a module and its tensors, where `name` marks one."""
        at = name.rfind(bitsandbytes.STATE)
        if at >= 0:
            stem = name[:at].removesuffix(".")  # "….weight"
            if stem != "weight" and not stem.endswith(".weight"):
                raise complain(name, "not of a weight", "….weight.quant_state.…")
            tails = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", name[at:])
            parts = {"weight": stem, **{tail: f"{stem}.{tail}" for tail in tails}}
            self._add(stem.removesuffix("weight").removesuffix("."), parts)
            return
        module, _, tail = name.rpartition(".")
        if tail in _MARKS:
            prefix = f"{module}." if module else ""
            self._add(module, {part: prefix + part for part in _PARTS[tail]})

    def _add(self, module: str, parts: dict[str, str]) -> None:
        if module in self._modules:
            raise complain(module, "quantised twice over", "one format")
        self._modules[module] = {part: name for part, name in parts.items() if name in self._tensors}

    def __getitem__(self, name: str) -> QuantizedWeight | QuantizedExperts | Tensor:
        if name not in self._modules:
            if name not in self._dense:
                raise KeyError(name)
            return self._tensors[name]
        tensors = {part: self._tensors[place] for part, place in self._modules[name].items()}
        try:
            return self._lower(name, tensors)
        except ValueError as error:
            got = f"unreadable: {str(error).removeprefix('metate.load_quantized: ')}"
            raise fail("load_quantized", f"module {name!r}", got, "a consistent state", error=FormatError) from None

    def _lower(self, module: str, tensors: dict[str, Tensor]) -> QuantizedWeight | QuantizedExperts:
        if "qweight" not in tensors:
            if canonical.MARK in tensors:
                return canonical.lower(tensors, self._settings)
            if "weight_scale" in tensors or "weight_scale_inv" in tensors:
                return fp8.lower(tensors, self._settings)
            return bitsandbytes.lower(tensors, self._settings)
        if self._packing(tensors) == "awq":
            return awq.lower(tensors, self._settings)
        return gptq.lower(tensors, self._overrides.of(module), self._version)

    def _packing(self, tensors: Mapping[str, Tensor]) -> str:
        """gptq or awq, of a module with a qweight: as configured; without a configuration, by its tensors."""
        if self._method is not None:
            if self._method not in ("gptq", "awq"):
                raise complain("qweight", f"given under quant_method {self._method}", "gptq or awq")
            return self._method
        if self._version is not None or "g_idx" in tensors:
            return "gptq"
        scales, qweight = tensors.get("scales"), tensors["qweight"]
        packed_rows = scales is not None and scales.dim() == qweight.dim() == 2
        if packed_rows and scales is not None and qweight.shape[1] * 8 == scales.shape[1]:
            return "awq"
        raise complain("quant_method", "not given", "gptq or awq, in a config.json beside the tensors")

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._dense

    def __iter__(self) -> Iterator[str]:
        yield from self._modules
        yield from self._dense

    def __len__(self) -> int:
        return len(self._modules) + len(self._dense)


def load_quantized(path: str | Path, *, checkpoint_format: str | None = None) -> QuantizedCheckpoint | GGUFFile:
    """A quantised checkpoint: GPTQ, AWQ, bitsandbytes, fp8, GGUF, or metate's own, told apart by what is in it.

    Of GGUF all block types that files hold are read. Weights keep about the size that they have in the file, but for
    those of IQ1, IQ2 and IQ3, which take 3.3 to 4.6 bits: a quarter more (IQ3_S) to twice as much (IQ1, IQ2_XXS).

    Args:
        path: a folder with safetensors (and an index, if there are several) and config.json; one .safetensors file,
            with its configuration beside it; or a .gguf file, of a split model any.
        checkpoint_format: how GPTQ zero points are stored, "gptq" (minus one) or "gptq_v2"; None reads it from the
            label and the data, and refuses what is ambiguous.

    Returns:
        a mapping from module name (in GGUF: tensor name) to QuantizedWeight (QuantizedExperts, where one of metate's
        own holds a layer's experts), and from tensor name to dense tensor for the rest, lazily.

    Raises:
        FormatError: what the files hold is not what their format promises. Also raised by access to a module.
    """
    if checkpoint_format is not None and checkpoint_format not in gptq.VERSIONS:
        raise fail("load_quantized", "checkpoint_format", checkpoint_format, " or ".join(gptq.VERSIONS))
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"metate.load_quantized: path is {path}, expected a file or folder that exists")
    files = _files(path)
    if files[0].suffix == ".gguf" or _begins_with(files[0], MAGIC):
        return GGUFFile(*files)
    folder = path if path.is_dir() else path.parent
    return QuantizedCheckpoint(_Safetensors(files), read_configuration(folder), checkpoint_format)


def _begins_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint, safetensors or one GGUF."""
    if path.is_file():
        return _split(path)
    if (path / _INDEX).is_file():
        index = Settings(_INDEX, parse_json(_read(path / _INDEX, _INDEX_BYTES), _INDEX, _INDEX_BYTES))
        names = set(map(str, index.section("weight_map").values.values()))
        for name in names:
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise complain(f"{_INDEX} file", repr(name), "the name of a safetensors file in the same folder")
            if not (path / name).is_file():
                raise complain(f"{_INDEX} file", repr(name), "a file that exists; the checkpoint is incomplete")
        if names:
            return [path / name for name in sorted(names)]
    found = sorted(path.glob("*.safetensors"))
    if len(found) > 1 and (path / "model.safetensors") in found:
        return [path / "model.safetensors"]
    if not found and (first := sorted(path.glob("*.gguf"))) and len(_split(first[0])) == len(first):
        return _split(first[0])
    found = found or sorted(path.glob("*.gguf"))
    if len(found) != 1:
        names_found = ", ".join(file.name for file in found) or "no .safetensors and no .gguf"
        raise complain("path", f"a folder with {names_found}", f"one of them, or {_INDEX}")
    return found


def _split(path: Path) -> list[Path]:
    """All files of a GGUF model that is split into "…-00001-of-00003.gguf"; else the file alone."""
    parts = re.fullmatch(r"(.*-)\d{5}-of-(\d{5})\.gguf", path.name)
    if parts is None:
        return [path]
    count = max(1, min(int(parts[2]), _SPLITS))
    files = [path.with_name(f"{parts[1]}{place:05}-of-{parts[2]}.gguf") for place in range(1, count + 1)]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise complain("path", f"one of {parts[2]} files", f"{missing.name} beside it; the model is incomplete")
    return files


def _read(path: Path, limit: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(limit + 1)


def read_configuration(folder: Path) -> dict[str, Any]:
    """config.json; where it says nothing of quantisation, what older tools wrote beside it."""
    config: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        config = parse_json(_read(folder / "config.json", 2 << 20), "config.json")
    for name in ("quantize_config.json", "quant_config.json"):
        if config.get("quantization_config") is None and (folder / name).is_file():
            config["quantization_config"] = parse_json(_read(folder / name, 2 << 20), name)
    return config


def save_quantized(
    folder: str | Path,
    weights: Mapping[str, QuantizedWeight | QuantizedExperts | Tensor],
    method: str = "metate",
    config: Mapping[str, Any] | None = None,
    *,
    nested: bool = False,
) -> None:
    """Writes model.safetensors and config.json, for `load_quantized` and for the readers of the method's own ecosystem.

    Args:
        folder: made where it is not there; files of these names in it are replaced.
        weights: module name -> QuantizedWeight or QuantizedExperts, tensor name -> dense tensor.
        method: "gptq", "awq", "bitsandbytes" (NF4, FP4), or "metate" for any weight; experts stacked in one have no
            place in the others.
        config: other members of config.json; a quantization_config in it, of that.
        nested: of bitsandbytes, scales are rounded to 8 bits ("double quantisation"), bit for bit as that does it; what
            is read is W with such scales.

    Raises:
        TypeError, ValueError: for what is no weight, or no method, or nested with another method.
        FormatError: for a weight that the method has no place for, as of rows that do not fill its words.
    """
    if method not in WRITERS:
        raise fail("save_quantized", "method", method, " or ".join(WRITERS))
    if nested and method != "bitsandbytes":
        raise fail("save_quantized", "nested", f"True with {method}", "bitsandbytes")
    options = {"nested": True} if nested else {}
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not isinstance(weight, (QuantizedWeight, QuantizedExperts, Tensor)):
            expected = "a QuantizedWeight, QuantizedExperts or dense tensor"
            raise fail("save_quantized", name, type(weight).__name__, expected, error=TypeError)
        if isinstance(weight, QuantizedExperts) and method != "metate":
            raise fail("save_quantized", name, weight, f"a QuantizedWeight for {method}: one expert at a time")
        if not isinstance(weight, Tensor):
            for part, tensor in WRITERS[method](weight, **options).items():
                inside = method == "bitsandbytes" and part != "weight"  # weight, weight.absmax, …
                tensors[f"{name}.weight.{part}" if inside else f"{name}.{part}"] = tensor
        else:
            tensors[name] = weight
    from safetensors.torch import save_file

    described = {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.detach().clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    given = dict(config or {})
    about = {**(given.get("quantization_config") or {}), **_describe(method, described, nested)}
    settings = {**given, "quantization_config": about}
    (folder / "config.json").write_text(json.dumps(settings, indent=2))


def check_writable(method: str, weight: QuantizedWeight) -> None:
    """FormatError where a method has no place for a weight."""
    WRITERS[method](weight)


def _describe(method: str, weights: Mapping[str, QuantizedWeight], nested: bool) -> dict[str, Any]:
    """The `quantization_config`; GPTQ modules unlike the first get an override."""
    if method == "bitsandbytes":
        first = next(iter(weights.values()), None)
        kind = "nf4" if first is None else bitsandbytes.quant_type(first)
        return {
            "quant_method": method,
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
        }
    if method == "metate" or not weights:
        return {"quant_method": method}
    if method == "awq":
        sizes = {weight.group_size for weight in weights.values()}
        if len(sizes) > 1:
            raise fail("save_quantized", "weights", f"of group sizes {sorted(sizes)}", "one group size in AWQ")
        return awq.configuration(next(iter(weights.values())))
    settings = [gptq.configuration(weight, weight.zeros is None) for weight in weights.values()]
    shared = settings[0]
    dynamic = {
        f"+:{re.escape(name)}$": {key: value for key, value in own.items() if value != shared[key]}
        for name, own in zip(weights, settings, strict=True)
        if own != shared
    }
    return {**shared, **({"dynamic": dynamic} if dynamic else {})}
