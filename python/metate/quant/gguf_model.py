"""Decoders in GGUF files by the names and in the row order of Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from metate.low_bit import QuantizedWeight
from metate.quant.gguf import GGUFFile
from metate.quant.settings import Settings, complain

ROTARY_FACTORS = "rope_freqs.weight"  # what the wavelength of every pair of dimensions is multiplied by
_PAIRED = {"llama": True, "qwen2": False, "qwen3": False}  # architecture -> queries and keys come with pairs adjacent
_NAME = re.compile(r"(?:blk\.(\d{1,6})\.)?([a-z_]{1,30})\.(weight|bias)")
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class GGUFModel(Mapping[str, "QuantizedWeight | Tensor"]):
    """Parameter name ("model.layers.0.mlp.up_proj.weight") -> QuantizedWeight or dense tensor, made when asked for.

    architecture: "llama" (Mistral's too), "qwen2" or "qwen3".
    settings: the metadata of the architecture, by key without its name.
    rotary_factors: (head_dim / 2) of Llama 3.1 and its like, else None.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        architecture = Settings("metadata", file.metadata).text("general.architecture", None, *_PAIRED)
        if architecture is None:
            raise complain("general.architecture", "not given", " or ".join(_PAIRED))
        self.architecture, start = architecture, f"{architecture}."
        own = {key.removeprefix(start): file.metadata[key] for key in file.metadata if key.startswith(start)}
        self.settings = Settings(architecture, own)
        self.heads = self.settings.integer("attention.head_count", None, 1, 2**16)
        self.heads_kv = self.settings.integer("attention.head_count_kv", self.heads, 1, 2**16)
        self.rotary_factors = self._dense(ROTARY_FACTORS).float() if ROTARY_FACTORS in file else None
        self._names = {_name(name): name for name in file if name != ROTARY_FACTORS}

    def _dense(self, name: str) -> Tensor:
        found = self._file[name]
        if isinstance(found, QuantizedWeight) or found.dim() != 1:
            raise complain(name, "a matrix", "a dense vector")
        return found

    def __getitem__(self, name: str) -> QuantizedWeight | Tensor:
        found = self._file[self._names[name]]
        if _PAIRED[self.architecture] and ".self_attn.q_proj." in name:
            return _unpaired(name, found, self.heads)
        if _PAIRED[self.architecture] and ".self_attn.k_proj." in name:
            return _unpaired(name, found, self.heads_kv)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _name(name: str) -> str:
    parts = _NAME.fullmatch(name)
    if parts is not None:
        layer, tensor, tail = parts.groups()
        table, start = (_MODEL, "") if layer is None else (_LAYER, f"model.layers.{int(layer)}.")
        if tensor in table:
            return f"{start}{table[tensor]}.{tail}"
    raise complain(f"tensor {name!r}", "not known", "one of a dense decoder of Llama's kind")


def _unpaired(name: str, weight: QuantizedWeight | Tensor, heads: int) -> QuantizedWeight | Tensor:
    """Rows 0 1 2 3 … of a head, turned in pairs, to 0 2 … 1 3 …, of which row i turns with i + head_dim / 2."""
    rows = weight.shape[0]
    if rows % (2 * heads):
        raise complain(name, f"{rows} rows", f"an even number for each of {heads} heads")
    order = torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()
    if isinstance(weight, Tensor):
        return weight[order]
    of_all = {"codebook": weight.codebook, "permutation": weight.permutation}
    ordered = {field: tensor[order] for field, tensor in weight.tensors.items() if field not in of_all}
    return dataclasses.replace(weight, **ordered)  # type: ignore[arg-type]
