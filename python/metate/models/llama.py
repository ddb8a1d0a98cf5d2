"""Llama-style decoders: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Touvron et al. 2023).

Reads Hugging Face checkpoints (config.json beside model.safetensors, or beside shards and their index) and GGUF files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metate import FormatError, QuantizedWeight, load_quantized
from metate import attention as metate_attention
from metate.errors import fail
from metate.generate import Batch, CacheLayout
from metate.nn import QuantLinear
from metate.quant import GGUFFile
from metate.quant.gguf_model import GGUFModel

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 2**31:
                raise FormatError(f"metate.LlamaConfig: {name} is {value!r}, expected a positive integer")
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
        """config.json of a Hugging Face Llama; FormatError names what this model does not have."""
        raw = json.loads(Path(path).read_text())
        if not isinstance(raw, dict) or raw.get("model_type") != "llama":
            got = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
            raise FormatError(f"metate.LlamaConfig: model_type is {got!r}, expected 'llama'")
        if raw.get("hidden_act", "silu") != "silu":
            raise FormatError(f"metate.LlamaConfig: hidden_act is {raw['hidden_act']!r}, expected 'silu'")
        try:
            heads = raw["num_attention_heads"]
            known = LlamaConfig.__dataclass_fields__.keys() - {"rope_factors"}
            given = {name: raw[name] for name in known if raw.get(name) is not None}
            given.setdefault("num_key_value_heads", heads)
            given.setdefault("head_dim", raw["hidden_size"] // heads)
            given["rope_theta"], given["rope_scaling"] = _rope(raw)
            return LlamaConfig(**given)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise FormatError(f"metate.LlamaConfig: {path} lacks or garbles {error}") from error

    @staticmethod
    def of_gguf(model: GGUFModel) -> LlamaConfig:
        """The metadata of a GGUF file."""
        settings, embedding = model.settings, model.get("model.embed_tokens.weight")
        if model.architecture != "llama" or embedding is None:
            raise FormatError(
                f"metate.LlamaConfig: a {model.architecture} model, expected llama with token_embd.weight"
            )
        settings.text("rope.scaling.type", None, "none")
        width = settings.integer("embedding_length", None, 1, 2**31 - 1)
        head_dim = settings.integer("attention.key_length", width // model.heads, 1, 2**16)
        settings.integer("rope.dimension_count", head_dim, head_dim, head_dim)
        settings.integer("attention.value_length", head_dim, head_dim, head_dim)
        factors = model.rotary_factors
        if factors is not None and factors.numel() != head_dim // 2:
            raise FormatError(f"metate.LlamaConfig: {factors.numel()} rotary factors, expected {head_dim // 2}")
        return LlamaConfig(
            embedding.shape[0], width, settings.integer("feed_forward_length", None, 1, 2**31 - 1),
            settings.integer("block_count", None, 1, 10**6), model.heads, model.heads_kv, head_dim,
            settings.number("attention.layer_norm_rms_epsilon"),
            settings.number("rope.freq_base") if "rope.freq_base" in settings.values else 10000.0,
            rope_factors=() if factors is None else tuple(factors.tolist()),
            attention_bias="model.layers.0.self_attn.o_proj.bias" in model,
            mlp_bias="model.layers.0.mlp.down_proj.bias" in model, tie_word_embeddings="lm_head.weight" not in model,
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
    return float(rope["rope_theta"]), {name: float(rope[name]) for name in _LLAMA3} if kind == "llama3" else {}


class Cache:
    """Keys and values of the tokens seen so far, for every layer, with room for `length` of them."""

    def __init__(self, config: LlamaConfig, batch: int, length: int, like: Tensor) -> None:
        shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.used = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, the new ones last; `used` moves on after the last layer."""
        end = self.used + k.shape[1]
        if end > self.keys.shape[2]:
            raise ValueError(f"metate.Cache: {end} tokens, expected at most {self.keys.shape[2]}; make a longer cache")
        self.keys[layer, :, self.used : end], self.values[layer, :, self.used : end] = k, v
        if layer == len(self.keys) - 1:
            self.used = end
        return self.keys[layer, :, :end], self.values[layer, :, :end]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, attention: str) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.attend = ATTENTION[attention]
        width, bias = config.hidden_size, config.attention_bias
        inner, inner_kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(width, inner_kv, bias=bias)
        self.v_proj = nn.Linear(width, inner_kv, bias=bias)
        self.o_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache | Batch | None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.config.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if isinstance(cache, Batch):
            attended = cache.attend(self.layer, q, k, v)
        else:
            if cache is not None:
                k, v = cache.append(self.layer, k, v)
            attended = self.attend(q, k, v)
        out: Tensor = self.o_proj(attended.flatten(-2))
        return out


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, attention: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache | Batch | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """A decoder. `attention`: "metate", or "naive" for plain torch with the whole score matrix in memory.

    >>> model = Llama.from_pretrained("path/to/checkpoint")
    >>> logits = model(tokens)  # (batch, seqlen) integers -> (batch, seqlen, vocab_size)
    """

    def __init__(self, config: LlamaConfig, attention: str = "metate") -> None:
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"metate.Llama: attention is {attention!r}, expected {' or '.join(map(repr, ATTENTION))}")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i, attention) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def initialize(self, generator: torch.Generator) -> Llama:
        """Weights for training: normal with deviation 0.02, less where layers add to the residual stream."""
        residual = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    deviation = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                    parameter.normal_(0, deviation, generator=generator)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of every token; with a cache the tokens follow those it holds."""
        x = self.embed_tokens(tokens)
        begin = cache.used if cache is not None else 0
        rotation = self.rotation(begin, begin + tokens.shape[1], x)
        for layer in self.layers:
            x = layer(x, rotation, cache)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def cache_layout(self) -> CacheLayout:
        """What `metate.generate` and `PagedKVCache` must know."""
        config, weight = self.config, self.embed_tokens.weight
        heads, width = config.num_key_value_heads, config.head_dim
        return CacheLayout(config.num_hidden_layers, heads, width, width, weight.dtype, weight.device)

    def forward_paged(self, batch: Batch) -> Tensor:
        """Logits (rows, vocab_size) of the tokens `batch.rows`; the cache attends, whatever `attention` is."""
        x = self.embed_tokens(batch.tokens)
        rotation = self._rotation(batch.positions.float(), x)
        for layer in self.layers:
            x = layer(x, rotation, batch)
        logits: Tensor = self.lm_head(self.norm(x[batch.rows]))
        return logits

    def rotation(self, begin: int, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions begin … end-1, (seqlen, 1, head_dim): the same for every head."""
        return self._rotation(torch.arange(begin, end, device=like.device, dtype=torch.float32), like)

    def _rotation(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None] * frequencies(self.config).to(like.device)
        angles = torch.cat((angles, angles), -1)[:, None]
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    @torch.inference_mode()
    def complete(self, tokens: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
        """`count` more tokens after (batch, seqlen) ones, drawn at a temperature; 0 takes the most likely."""
        cache = Cache(self.config, len(tokens), tokens.shape[1] + count, self.embed_tokens.weight)
        found = [tokens]
        for _ in range(count):
            logits = self(found[-1], cache)[:, -1].float()
            if temperature:
                weights = torch.softmax(logits / temperature, -1)
                found.append(torch.multinomial(weights, 1, generator=generator))
            else:
                found.append(logits.argmax(-1, keepdim=True))
        return torch.cat(found[1:], 1) if count else tokens[:, :0]

    @staticmethod
    def from_pretrained(path: str | Path, attention: str = "metate", dtype: torch.dtype | None = None) -> Llama:
        """A Hugging Face Llama checkpoint, also GPTQ, AWQ or bitsandbytes, or a GGUF file.

        Args:
            path: a folder, or a .gguf file.
            dtype: of what is not quantised; that of the file (of the embedding, if GGUF) unless given.
        """
        path = Path(path)
        found: Mapping[str, QuantizedWeight | Tensor] = load_quantized(path)
        if isinstance(found, GGUFFile):
            found = GGUFModel(found)
            config = LlamaConfig.of_gguf(found)
            embedding = found["model.embed_tokens.weight"]
            dtype = dtype or (embedding.dtype if isinstance(embedding, Tensor) else torch.float32)  # norms have another
        else:
            config = LlamaConfig.read((path if path.is_dir() else path.parent) / "config.json")
        with torch.device("meta"):
            model = Llama(config, attention)
        weights: dict[str, Tensor] = {}
        for name, weight in found.items():
            inner = name.removeprefix("model.")
            if isinstance(weight, QuantizedWeight) and inner != "embed_tokens.weight":
                put_quantized(model, inner.removesuffix(".weight"), weight)
            elif not name.endswith("rotary_emb.inv_freq"):
                dense = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
                weights[inner] = dense.to(dtype or dense.dtype)
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights.get("embed_tokens.weight", torch.empty(0))
        expected = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        got = {name: w.shape for name, w in weights.items()}
        if expected != got:
            wrong = sorted({name for name, _ in set(expected.items()) ^ set(got.items())})
            raise FormatError(
                f"metate.Llama: {path} lacks, or has in another shape, or has too much: {', '.join(wrong[:5])}"
            )
        model.load_state_dict(weights, strict=False, assign=True)
        model._tie()
        return model.eval()


def put_quantized(model: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Puts a low-bit layer in the place of the linear layer `name`, whose bias it keeps."""
    parent, _, child = name.rpartition(".")
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear) or weight.shape != (linear.out_features, linear.in_features):
        expected = "a linear layer of its shape"
        raise fail("Llama", name, f"a weight of {weight.shape}", expected, error=FormatError)
    setattr(model.get_submodule(parent), child, QuantLinear(weight, linear.bias))


def frequencies(config: LlamaConfig) -> Tensor:
    """Radians a position of every pair of dimensions; Llama 3.1 slows those of long wavelength."""
    plain = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if config.rope_factors:
        return plain / torch.tensor(config.rope_factors)
    if not config.rope_scaling:
        return plain
    factor, low, high, context = (config.rope_scaling[name] for name in _LLAMA3)
    turns = context * plain / (2 * math.pi)  # within the first context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (keep + (1 - keep) / factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), dimension i paired with i + head_dim / 2."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _metate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = metate_attention(q, k, v, causal=True)
    return out


def _naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
    probabilities = scores.masked_fill(later, -math.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
    out: Tensor = (probabilities @ v).transpose(1, 2)
    return out


ATTENTION = {"metate": _metate, "naive": _naive}
