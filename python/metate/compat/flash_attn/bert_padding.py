"""Between padded (batch, seqlen, …) and packed (tokens, …) layouts, as flash_attn.bert_padding has them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of the first axis; differentiable."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros of first_axis_dim rows with `values` at rows `indices`; differentiable."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `indices`, and the input itself for a residual connection."""
    return input.index_select(0, indices), input


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens where a mask (batch, seqlen) is set, packed.

    Args:
        hidden_states: (batch, seqlen, …).
        attention_mask: 1 for a valid token.
        unused_mask: 1 for a token that is kept in place but does not count as used.

    Returns:
        The tokens (total, …), their indices in the flattened batch, cu_seqlens (batch + 1) int32, the longest length,
        and how many tokens of each entry attention_mask alone selects (batch) int32.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _starts(lengths), _longest(lengths), attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`unpad_input` for rows that hold several sequences one after another, then padding.

    attention_mask_in_length (batch, seqlen) lists the lengths of the sequences of each row, then zeros.
    """
    used = attention_mask_in_length.sum(-1, keepdim=True)
    positions = torch.arange(attention_mask_in_length.shape[1], device=used.device)
    indices = (positions < used).flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _starts(lengths), _longest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed tokens back at their `indices` of a zero-padded (batch, seqlen, …)."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.reshape(batch, seqlen, *rows.shape[1:])


def _starts(lengths: Tensor) -> Tensor:
    return pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths: Tensor) -> int:
    return int(lengths.max().item()) if lengths.numel() else 0
