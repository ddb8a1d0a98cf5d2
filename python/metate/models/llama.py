"""Llama-style decoders: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Touvron et al. 2023).

With mixtures of experts in place of SwiGLU they are Mixtral (Jiang et al. 2024), Qwen3-MoE and OLMoE. Reads Hugging
Face checkpoints (config.json beside model.safetensors, or beside shards and their index) and GGUF.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metate import FormatError, QuantizedExperts, QuantizedWeight, load_quantized
from metate import attention as metate_attention
from metate.errors import fail, require_dense
from metate.generate import Batch, CacheLayout
from metate.models.config import LLAMA3, LlamaConfig
from metate.models.experts import Weight, inner_names, stacked_experts
from metate.nn import GroupedLinear, Linear, MoE, QuantGroupedLinear, QuantLinear
from metate.quant import GGUFFile
from metate.quant.gguf_model import GGUFModel


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
        self.q_proj = Linear(width, inner, bias=bias)
        self.k_proj = Linear(width, inner_kv, bias=bias)
        self.v_proj = Linear(width, inner_kv, bias=bias)
        self.o_proj = Linear(inner, width, bias=bias)
        if config.qk_norm:
            widths = (config.head_dim, config.head_dim) if config.qk_norm == "head" else (inner, inner_kv)
            self.q_norm, self.k_norm = (RMSNorm(width, config.rms_norm_eps) for width in widths)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache | Batch | None) -> Tensor:
        q, k, v = self._project(x)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if isinstance(cache, Batch):
            attended = cache.attend(self.layer, q, k, v)
        else:
            if cache is not None:
                k, v = cache.append(self.layer, k, v)
            attended = self.attend(q, k, v)
        out: Tensor = self.o_proj(attended.flatten(-2))
        return out

    def _project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values by head."""
        found = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        config = self.config
        if config.qk_norm == "all":
            found[:2] = self.q_norm(found[0]), self.k_norm(found[1])
        if config.clip_qkv:
            found = [tensor.clamp(-config.clip_qkv, config.clip_qkv) for tensor in found]
        found = [tensor.unflatten(-1, (-1, config.head_dim)) for tensor in found]
        if config.qk_norm == "head":
            found[:2] = self.q_norm(found[0]), self.k_norm(found[1])
        return found


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def mixture(config: LlamaConfig) -> MoE:
    return MoE(
        config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok,
        renormalise=config.norm_topk_prob,
    )  # fmt: skip


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, attention: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = config.num_experts and layer not in config.mlp_only_layers
        self.mlp = mixture(config) if sparse else MLP(config)

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
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def initialize(self, generator: torch.Generator) -> Llama:
        """Weights for training: normal with deviation 0.02, less where layers add to the residual stream."""
        residual = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    deviation = (
                        residual if name.endswith(("o_proj.weight", "down_proj.weight", "down.weight")) else 0.02
                    )
                    parameter.normal_(0, deviation, generator=generator)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (batch, seqlen, vocab_size) of tokens (batch, seqlen), int64 or int32; with a cache the tokens follow
        those it holds.

        Raises:
            TypeError, ValueError: tokens are no integers, or of another shape; the cache has no room for them.
        """
        require_dense("Llama", "tokens", tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise fail("Llama", "tokens", tokens.dtype, "int64 or int32", error=TypeError)
        if tokens.dim() != 2:
            raise fail("Llama", "tokens", f"of shape {tuple(tokens.shape)}", "(batch, seqlen)")
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
        """A Hugging Face Llama, Mistral, Mixtral, Qwen 3, Qwen3-MoE or OLMoE, also GPTQ, AWQ or bitsandbytes, or a GGUF
        file of Llama, Mistral, Mixtral, Qwen 3 or Qwen3-MoE. Nothing is downloaded.

        Args:
            path: a folder, or a .gguf file.
            dtype: of what is not quantised; that of the file (of the embedding, if GGUF) unless given.

        Raises:
            FormatError: the files do not hold such a model. FileNotFoundError: there are none.
        """
        path = Path(path)
        if not path.exists():
            here = "a folder or a .gguf file that is here; `hf download NAME --local-dir FOLDER` brings one"
            raise FileNotFoundError(f"metate.Llama.from_pretrained: path is {path}, expected {here}")
        found: Mapping[str, Weight] = load_quantized(path)
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
        for inner, weight in stacked_experts(found, config) if config.num_experts else inner_names(found):
            if isinstance(weight, Tensor):
                weights[inner] = weight.to(dtype or weight.dtype)
            elif inner == "embed_tokens.weight":
                weights[inner] = weight.dequantize(dtype or torch.float32)
            else:
                put_quantized(model, inner.removesuffix(".weight"), weight)
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


def put_quantized(model: nn.Module, name: str, weight: QuantizedWeight | QuantizedExperts) -> None:
    """Puts a low-bit layer in the place of the linear layer, or the experts', `name`, whose bias it keeps."""
    parent, _, child = name.rpartition(".")
    try:
        linear: Any = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, (nn.Linear, GroupedLinear)) or weight.shape != tuple(linear.weight.shape):
        expected = "a linear layer of its shape"
        raise fail("Llama", name, f"a weight of {weight.shape}", expected, error=FormatError)
    low_bit = QuantLinear(weight, linear.bias) if isinstance(weight, QuantizedWeight) else QuantGroupedLinear(weight)
    setattr(model.get_submodule(parent), child, low_bit)


def frequencies(config: LlamaConfig) -> Tensor:
    """Radians a position of every pair of dimensions; Llama 3.1 slows those of long wavelength."""
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    plain = config.rope_theta ** (-even / config.head_dim)
    if config.rope_factors:
        return plain / torch.tensor(config.rope_factors, dtype=torch.float32, device="cpu")
    if not config.rope_scaling:
        return plain
    factor, low, high, context = (config.rope_scaling[name] for name in LLAMA3)
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
