"""LlamaConfig: the sizes and habits of a decoder, read from config.json or from a GGUF file's metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metate import FormatError
from metate.quant.gguf_model import GGUFModel

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

_GGUF_QK_NORM = {"llama": "", "qwen3": "head", "qwen3moe": "head"}  # by architecture
_UNSAID: dict[str, dict[str, Any]] = {  # model_type -> what its config.json leaves unsaid
    "llama": {}, "mistral": {}, "qwen3": {"qk_norm": "head"},
    "mixtral": {"norm_topk_prob": True}, "qwen3_moe": {"qk_norm": "head"}, "olmoe": {"qk_norm": "all"},
}  # fmt: skip
_MIXTURES = ("mixtral", "qwen3_moe", "olmoe")


@dataclass(frozen=True)
class LlamaConfig:
    """The names are those of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, float] = field(default_factory=dict)  # of Llama 3.1, or empty
    rope_factors: tuple[float, ...] = ()  # the same as GGUF has it: divisors of the frequencies, or empty
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    qk_norm: str = ""  # RMSNorm of queries and keys: of every "head", or of "all" heads together
    clip_qkv: float = 0.0  # queries, keys and values are clamped to ± this, unless 0
    num_experts: int = 0  # 0: every layer is dense; else a mixture, but for the layers mlp_only_layers
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False  # whether the weights of the chosen experts add up to 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        moe = ("num_experts", "num_experts_per_tok", "moe_intermediate_size") if self.num_experts else ()
        for name in (*_SIZES, *moe):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 2**31:
                raise FormatError(f"metate.LlamaConfig: {name} is {value!r}, expected a positive integer")
        if self.num_experts_per_tok > self.num_experts:
            raise FormatError(
                f"metate.LlamaConfig: num_experts_per_tok is {self.num_experts_per_tok}, expected at most num_experts "
                f"{self.num_experts}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise FormatError(
                f"metate.LlamaConfig: num_key_value_heads is {self.num_key_value_heads}, expected a divisor of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise FormatError(
                f"metate.LlamaConfig: head_dim is {self.head_dim}, expected an even number (rotary positions)"
            )

    @staticmethod
    def read(path: str | Path) -> LlamaConfig:
        """config.json of a Hugging Face Llama, Mistral, Mixtral, Qwen 3, Qwen3-MoE or OLMoE.

        Raises:
            FormatError: naming what is unknown here, or missing. FileNotFoundError: there is no such file.
        """
        raw = json.loads(Path(path).read_text())
        family = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        if family not in _UNSAID:
            raise FormatError(
                f"metate.LlamaConfig: model_type is {family!r}, expected {' or '.join(map(repr, _UNSAID))}"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise FormatError(f"metate.LlamaConfig: hidden_act is {raw['hidden_act']!r}, expected 'silu'")
        if raw.get("sliding_window") and raw.get("use_sliding_window", True):
            raise FormatError(f"metate.LlamaConfig: sliding_window is {raw['sliding_window']}, expected none")
        try:
            heads = raw["num_attention_heads"]
            known = LlamaConfig.__dataclass_fields__.keys() - {"rope_factors"}
            given = {**_UNSAID[family], **{name: raw[name] for name in known if raw.get(name) is not None}}
            given.setdefault("num_key_value_heads", heads)
            given.setdefault("head_dim", raw["hidden_size"] // heads)
            given["rope_theta"], given["rope_scaling"] = _rope(raw)
            if family in _MIXTURES:
                given.update(_experts(raw))
            return LlamaConfig(**given)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise FormatError(f"metate.LlamaConfig: {path} lacks or garbles {error}") from error

    @staticmethod
    def of_gguf(model: GGUFModel) -> LlamaConfig:
        """The metadata of a GGUF file of Llama, Mixtral, Qwen 3 or Qwen3-MoE."""
        settings, embedding = model.settings, model.get("model.embed_tokens.weight")
        if model.architecture not in _GGUF_QK_NORM or embedding is None:
            raise FormatError(
                f"metate.LlamaConfig: a {model.architecture} model, expected {' or '.join(_GGUF_QK_NORM)} with "
                "token_embd.weight"
            )
        settings.text("rope.scaling.type", None, "none")
        width = settings.integer("embedding_length", None, 1, 2**31 - 1)
        head_dim = settings.integer("attention.key_length", width // model.heads, 1, 2**16)
        settings.integer("rope.dimension_count", head_dim, head_dim, head_dim)
        settings.integer("attention.value_length", head_dim, head_dim, head_dim)
        inner = settings.integer("feed_forward_length", None, 1, 2**31 - 1)
        factors = model.rotary_factors
        mixture: dict[str, Any] = {}
        if model.experts:
            mixture = {
                "num_experts": model.experts,
                "num_experts_per_tok": settings.integer("expert_used_count", None, 1, model.experts),
                "moe_intermediate_size": settings.integer("expert_feed_forward_length", inner, 1, 2**31 - 1),
                "norm_topk_prob": True,
            }
        if factors is not None and factors.numel() != head_dim // 2:
            raise FormatError(f"metate.LlamaConfig: {factors.numel()} rotary factors, expected {head_dim // 2}")
        return LlamaConfig(
            embedding.shape[0], width, inner, settings.integer("block_count", None, 1, 10**6), model.heads,
            model.heads_kv, head_dim,
            settings.number("attention.layer_norm_rms_epsilon"),
            settings.number("rope.freq_base") if "rope.freq_base" in settings.values else 10000.0,
            rope_factors=() if factors is None else tuple(factors.tolist()),
            attention_bias="model.layers.0.self_attn.o_proj.bias" in model,
            mlp_bias="model.layers.0.mlp.down_proj.bias" in model, tie_word_embeddings="lm_head.weight" not in model,
            qk_norm=_GGUF_QK_NORM[model.architecture], **mixture,
        )  # fmt: skip


def _rope(raw: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Base and scaling of the rotary positions, from either spelling of config.json."""
    rope = {
        "rope_theta": raw.get("rope_theta", 10000.0),
        **(raw.get("rope_parameters") or raw.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise FormatError(f"metate.LlamaConfig: rope_type is {kind!r}, expected 'default' or 'llama3'")
    return float(rope["rope_theta"]), {name: float(rope[name]) for name in LLAMA3} if kind == "llama3" else {}


def _experts(raw: dict[str, Any]) -> dict[str, Any]:
    """What differs between the families in config.json of a mixture."""
    every, layers = raw.get("decoder_sparse_step", 1), range(raw["num_hidden_layers"])
    dense = {*(raw.get("mlp_only_layers") or ()), *(layer for layer in layers if (layer + 1) % every)}
    return {
        "num_experts": raw["num_local_experts"] if "num_local_experts" in raw else raw["num_experts"],
        "moe_intermediate_size": raw.get("moe_intermediate_size", raw["intermediate_size"]),
        "mlp_only_layers": tuple(sorted(dense)),
    }
