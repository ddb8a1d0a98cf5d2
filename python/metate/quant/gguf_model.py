"""Decoders in GGUF files by the names and in the row order of Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metate.low_bit import QuantizedWeight
from metate.quant.gguf import GGUFFile
from metate.quant.settings import Settings, complain

ROTARY_FACTORS = "rope_freqs.weight"  # what the wavelength of every pair of dimensions is multiplied by
_NAME = re.compile(r"(?:blk\.(\d{1,6})\.)?([a-z_]{1,30})\.(weight|bias)")
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_SANDWICHED = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1", "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}  # fmt: skip
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}  # fmt: skip


@dataclass(frozen=True)
class _Family:
    """layer: names of a layer's tensors beside or in place of those above. experts: of its stacks, {} the expert.

    paired: queries and keys come with pairs of rotated dimensions adjacent.
    offset: what is added to the weights of norms.
    """

    layer: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    paired: bool = False
    offset: float = 0.0


_FAMILIES = {
    "llama": _Family({"ffn_gate_inp": "block_sparse_moe.gate"}, _MIXTRAL_EXPERTS, paired=True),
    "qwen2": _Family(), "qwen3": _Family(),
    "qwen2moe": _Family({"ffn_gate_inp": "mlp.gate", **_SHARED_EXPERT}, _EXPERTS),
    "qwen3moe": _Family({"ffn_gate_inp": "mlp.gate"}, _EXPERTS),
    "gemma2": _Family(_SANDWICHED, offset=1.0), "gemma3": _Family(_SANDWICHED, offset=1.0),
}  # fmt: skip


class GGUFModel(Mapping[str, "QuantizedWeight | Tensor"]):
    """Parameter name ("model.layers.0.mlp.up_proj.weight") -> QuantizedWeight or dense tensor, made when asked for.

    architecture: "llama" (Mistral's and Mixtral's too), "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2" or "gemma3".
    experts: of a layer; 0 where every layer is dense. Each has a name of its own, which a stack of all of them has not.
    settings: the metadata of the architecture, by key without its name.
    rotary_factors: (head_dim / 2) of Llama 3.1 and its like, else None.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        architecture = Settings("metadata", file.metadata).text("general.architecture", None, *_FAMILIES)
        if architecture is None:
            raise complain("general.architecture", "not given", " or ".join(_FAMILIES))
        self.architecture, start = architecture, f"{architecture}."
        self._family = _FAMILIES[architecture]
        own = {key.removeprefix(start): file.metadata[key] for key in file.metadata if key.startswith(start)}
        self.settings = Settings(architecture, own)
        self.heads = self.settings.integer("attention.head_count", None, 1, 2**16)
        self.heads_kv = self.settings.integer("attention.head_count_kv", self.heads, 1, 2**16)
        self.rotary_factors = self._dense(ROTARY_FACTORS).float() if ROTARY_FACTORS in file else None
        self.experts = self.settings.integer("expert_count", 0, 0, 2**16)
        self._names: dict[str, tuple[str, int | None]] = {}  # of a parameter -> of its tensor, and which of its experts
        for name in file:
            if name != ROTARY_FACTORS:
                self._add(name)

    def _add(self, name: str) -> None:
        parts = _NAME.fullmatch(name)
        layer, tensor, tail = parts.groups() if parts is not None else (None, "", "")
        start = "" if layer is None else f"model.layers.{int(layer)}."
        known = _MODEL if layer is None else {**_LAYER, **self._family.layer}
        if tensor in known:
            self._names[f"{start}{known[tensor]}.{tail}"] = name, None
        elif layer is not None and tensor in self._family.experts and tail == "weight":
            if self._file.experts(name) != self.experts:
                raise complain(name, f"a stack of {self._file.experts(name)}", f"expert_count {self.experts}")
            for expert in range(self.experts):
                self._names[f"{start}{self._family.experts[tensor].format(expert)}.weight"] = name, expert
        else:
            raise complain(f"tensor {name!r}", "not known", f"one of a decoder of the family {self.architecture}")

    def _dense(self, name: str) -> Tensor:
        found = self._file[name]
        if isinstance(found, QuantizedWeight) or found.dim() != 1:
            raise complain(name, "a matrix", "a dense vector")
        return found

    def __getitem__(self, name: str) -> QuantizedWeight | Tensor:
        tensor, expert = self._names[name]
        found = self._file[tensor] if expert is None else self._file.expert(tensor, expert)
        if self._family.paired and ".self_attn.q_proj." in name:
            return _unpaired(name, found, self.heads)
        if self._family.paired and ".self_attn.k_proj." in name:
            return _unpaired(name, found, self.heads_kv)
        if isinstance(found, Tensor) and self._family.offset and name.endswith("norm.weight"):
            return found - self._family.offset
        if isinstance(found, Tensor) and name.endswith("shared_expert_gate.weight"):
            return found.view(1, -1)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _unpaired(name: str, weight: QuantizedWeight | Tensor, heads: int) -> QuantizedWeight | Tensor:
    """Rows 0 1 2 3 … of a head, turned in pairs, to 0 2 … 1 3 …, of which row i turns with i + head_dim / 2."""
    rows = weight.shape[0]
    if rows % (2 * heads):
        raise complain(name, f"{rows} rows", f"an even number for each of {heads} heads")
    order = torch.arange(rows, device=weight.device).view(heads, -1, 2).transpose(1, 2).flatten()
    if isinstance(weight, Tensor):
        return weight[order]
    of_all = {"codebook": weight.codebook, "permutation": weight.permutation}
    ordered = {field: tensor[order] for field, tensor in weight.tensors.items() if field not in of_all}
    return dataclasses.replace(weight, **ordered)  # type: ignore[arg-type]
