"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, section 2.1): a cache of one short vector a token.

Two ways compute the same. `forward` expands keys and values of every head, for training and prompts. `decode` never
expands them: the up-projections are absorbed into queries and results, which attend to the cached vectors themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metate.errors import fail, renamed, require_dense, require_flag, require_number
from metate.nn.arguments import require_input
from metate.ops.attention import attention, attention_varlen
from metate.ops.paged_attention import append_kv, paged_attention
from metate.ops.paged_attention.rules import least_and_most
from metate.scalars import is_whole, plain

_OP = "nn.LatentAttention"
_REFUSALS = (TypeError, ValueError, NotImplementedError)
_NAMES = {"k_cache": "cache", "v_cache": "cache", "cu_seqlens_q": "cu_seqlens", "cu_seqlens_k": "cu_seqlens",
          "q": "x", "k": "x"}  # fmt: skip


class LatentAttention(nn.Module):
    """Attention whose keys and values are linear in a latent of kv_lora_rank numbers, beside one rotated key.

    Parameters have the names and shapes of DeepSeek-V2 and V3 checkpoints: kv_a_proj_with_mqa, kv_a_layernorm,
    kv_b_proj, o_proj, and q_proj, or q_a_proj, q_a_layernorm and q_b_proj where queries have a latent too. Caches are
    (pages, page_size, 1, kv_lora_rank + qk_rope_head_dim): the normalised latent, then the rotated key.

    Args:
        hidden_size, num_heads: of the layer.
        kv_lora_rank: numbers of the latent. qk_rope_head_dim: of the key that all heads share, even.
        qk_nope_head_dim, v_head_dim: of a head's own keys and values.
        q_lora_rank: numbers of the queries' latent; None: q_proj instead.
        scale: of the scores; default (qk_nope_head_dim + qk_rope_head_dim) ** -0.5. YaRN's mscale goes here.
        interleaved: rotate pairs (2i, 2i + 1), as DeepSeek's weights want; False: (i, i + qk_rope_head_dim / 2).
        eps: of the norms. bias: of q_a_proj, kv_a_proj_with_mqa and o_proj.

    Source: DeepSeek-AI 2024, DeepSeek-V2, section 2.1.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; of calls, too.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        q_lora_rank: int | None = None,
        scale: float | None = None,
        interleaved: bool = True,
        eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__()
        sizes = dict(hidden_size=hidden_size, num_heads=num_heads, kv_lora_rank=kv_lora_rank, v_head_dim=v_head_dim,
                     qk_nope_head_dim=qk_nope_head_dim, qk_rope_head_dim=qk_rope_head_dim)  # fmt: skip
        for name, size in (sizes if q_lora_rank is None else {**sizes, "q_lora_rank": q_lora_rank}).items():
            if not is_whole(plain(size), 1, 2**31 - 1):
                raise fail(_OP, name, repr(size)[:60], "an integer, 1 or more")
        if qk_rope_head_dim % 2:
            raise fail(_OP, "qk_rope_head_dim", qk_rope_head_dim, "an even number (rotary positions)")
        eps, scale = require_number(_OP, "eps", eps), None if scale is None else require_number(_OP, "scale", scale)
        interleaved, bias = require_flag(_OP, "interleaved", interleaved), require_flag(_OP, "bias", bias)
        self.hidden_size = hidden_size
        self.num_heads, self.kv_lora_rank, self.q_lora_rank = num_heads, kv_lora_rank, q_lora_rank
        self.nope, self.rope, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 if scale is None else scale
        self.interleaved = interleaved
        queries = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, eps)
            self.q_b_proj = nn.Linear(q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        positions: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        cache: Tensor | None = None,
        slot_mapping: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of whole sequences, with gradients; keys and values expanded.

        Args:
            x: (batch, seqlen, hidden_size), or packed (tokens, hidden_size) with cu_seqlens (sequences + 1) int32.
            rotary_cos, rotary_sin: (max_positions, qk_rope_head_dim / 2); positions: int, like x without its last
                dimension.
            cache, slot_mapping: where given, the latents are written there for `decode`: slots (tokens), page ·
                page_size + row.

        Returns:
            Like x.
        """
        shape = "(batch, seqlen, {})" if cu_seqlens is None else "(tokens, {})"
        self._check(x, shape, rotary_cos, rotary_sin, positions)
        q, latent = self._project(x, rotary_cos, rotary_sin, positions)
        if cache is not None:
            self._append(cache, slot_mapping, latent)
        keys, values = (
            self.kv_b_proj(latent[..., : self.kv_lora_rank])
            .unflatten(-1, (self.num_heads, -1))
            .split([self.nope, self.v_head_dim], -1)
        )
        shared = latent[..., None, self.kv_lora_rank :].expand(*keys.shape[:-1], self.rope)
        k = torch.cat([keys, shared], -1)
        if cu_seqlens is None:
            out = attention(q, k, values, causal=True, scale=self.scale)
        else:
            try:
                out = attention_varlen(q, k, values, cu_seqlens, cu_seqlens, causal=True, scale=self.scale)
            except _REFUSALS as error:
                raise renamed(error, "attention_varlen", _OP, _NAMES) from None
        result: Tensor = self.o_proj(out.flatten(-2))
        return result

    @torch.no_grad()
    def decode(
        self,
        x: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        positions: Tensor,
        cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        slot_mapping: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of new tokens to a paged cache of latents, after theirs are written into it; no gradient.

        Args:
            x: (batch, hidden_size), one token a sequence, or (tokens, hidden_size) with cu_seqlens_q (batch + 1).
            positions: (batch) or (tokens), of the new tokens. cache: see above, in the dtype of x.
            block_table, seq_lens, slot_mapping: as in `metate.paged_attention` and `metate.append_kv`.
            Others as in `forward`.

        Returns:
            Like x.
        """
        self._check(x, "(batch, {})" if cu_seqlens_q is None else "(tokens, {})", rotary_cos, rotary_sin, positions)
        q, latent = self._project(x, rotary_cos, rotary_sin, positions)
        self._append(cache, slot_mapping, latent)
        up = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        to_latent, to_values = up[:, : self.nope], up[:, self.nope :]
        absorbed = torch.einsum("thn,hnr->thr", q[..., : self.nope], to_latent)
        q = torch.cat([absorbed, q[..., self.nope :]], -1)
        try:
            out = paged_attention(
                q, cache, cache[..., : self.kv_lora_rank], block_table, seq_lens, cu_seqlens_q=cu_seqlens_q,
                causal=True, scale=self.scale,
            )  # fmt: skip
        except _REFUSALS as error:
            raise renamed(error, "paged_attention", _OP, {**_NAMES, "cu_seqlens_q": "cu_seqlens_q"}) from None
        result: Tensor = self.o_proj(torch.einsum("thr,hvr->thv", out, to_values).flatten(-2))
        return result

    def _check(self, x: Tensor, shape: str, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        require_input(_OP, x, shape, self.hidden_size, self.kv_a_proj_with_mqa)
        for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
            require_dense(_OP, name, table)
            if table.dim() != 2 or table.shape[1] != self.rope // 2 or table.shape != cos.shape:
                got, expected = f"of shape {tuple(table.shape)}", f"(max_positions, {self.rope // 2})"
                raise fail(_OP, name, got, f"{expected}, rotary_cos and rotary_sin alike")
            if not table.is_floating_point() or table.device != x.device:
                got = f"{table.dtype} on {table.device}"
                raise fail(_OP, name, got, f"floats on {x.device} like x", error=TypeError)
        require_dense(_OP, "positions", positions)
        if positions.dtype not in (torch.int32, torch.int64) or positions.device != x.device:
            got = f"{positions.dtype} on {positions.device}"
            raise fail(_OP, "positions", got, f"int32 or int64 on {x.device} like x", error=TypeError)
        if positions.shape not in (x.shape[:-1], x.shape[1:-1]):
            raise fail(_OP, "positions", f"of shape {tuple(positions.shape)}", f"{tuple(x.shape[:-1])}, that of x")
        if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
            least, most = least_and_most(positions)
            if least < 0 or most >= cos.shape[0]:
                raise fail(_OP, "positions", f"{least} to {most}", f"0 to {cos.shape[0] - 1}, the rows of rotary_cos")

    def _project(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (…, heads, nope + rope) and what a cache holds of each token (…, kv_lora_rank + rope)."""
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        latent, key = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.rope], -1)
        own, rotated = q.unflatten(-1, (self.num_heads, -1)).split([self.nope, self.rope], -1)
        cos, sin = cos[positions], sin[positions]
        q = torch.cat([own, self._rotate(rotated, cos[..., None, :], sin[..., None, :])], -1)
        return q, torch.cat([self.kv_a_layernorm(latent), self._rotate(key, cos, sin)], -1)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x, in float32, turned by its angles; the order of its columns is free, as only products of them count."""
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else x.float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    def _append(self, cache: Tensor, slot_mapping: Tensor | None, latent: Tensor) -> None:
        if slot_mapping is None:
            raise fail(_OP, "slot_mapping", None, "the slots of the new tokens beside a cache")
        try:
            with torch.no_grad():
                append_kv(latent.detach().reshape(-1, 1, latent.shape[-1]), None, cache, None, slot_mapping)
        except _REFUSALS as error:
            raise renamed(error, "append_kv", _OP, _NAMES) from None
