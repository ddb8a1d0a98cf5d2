"""metate.nn.LatentAttention against transformers' DeepSeek-V3 attention, and its absorbed decode against itself."""

import pytest
import torch

import metate
from metate.nn import LatentAttention

HIDDEN, HEADS, RANK, NOPE, ROPE, VALUE = 48, 4, 32, 12, 8, 20


def layer(q_lora_rank=None, interleaved=True):
    torch.manual_seed(0)
    return LatentAttention(
        HIDDEN, HEADS, kv_lora_rank=RANK, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE,
        q_lora_rank=q_lora_rank, interleaved=interleaved,
    )  # fmt: skip


def angles():
    frequencies = 100.0 ** -(torch.arange(0, ROPE, 2) / ROPE)
    turns = torch.arange(64)[:, None] * frequencies
    return turns.cos(), turns.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_is_the_layer_of_deepseek(q_lora_rank, interleaved):
    hf = pytest.importorskip("transformers.models.deepseek_v3")
    config = hf.DeepseekV3Config(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=RANK,
        qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE, q_lora_rank=q_lora_rank,
        rope_interleave=interleaved, attn_implementation="eager",
    )  # fmt: skip
    ours = layer(q_lora_rank, interleaved)
    theirs = hf.modeling_deepseek_v3.DeepseekV3Attention(config, 0)
    theirs.load_state_dict(ours.state_dict())
    x, (cos, sin) = torch.randn(2, 17, HIDDEN), angles()
    positions = torch.arange(17)
    doubled = [torch.cat([t, t], -1)[None, :17] for t in (cos, sin)]
    mask = torch.full((17, 17), -torch.inf).triu(1)[None, None]
    want = theirs(x, doubled, mask)[0]
    torch.testing.assert_close(ours(x, cos, sin, positions.expand(2, 17)), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_absorbed_decode_is_the_expanded_attention(page_size):
    module, (cos, sin) = layer(), angles()
    lengths, new = [17, 3, 30], 4  # prompts, then tokens one by one, then some at once
    x = [torch.randn(length + new + 3, HIDDEN) for length in lengths]
    want = [module(row[None], cos, sin, torch.arange(len(row))[None])[0] for row in x]
    pages = -(-40 // page_size)
    cache = torch.full((3 * pages, page_size, 1, RANK + ROPE), torch.nan)
    table = torch.randperm(3 * pages).view(3, pages).int()

    def slots(entry, positions):
        return table[entry, positions // page_size].long() * page_size + positions % page_size

    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in lengths])
    entries = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    packed = torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
    got = module(
        packed, cos, sin, positions, cu_seqlens=starts, cache=cache, slot_mapping=slots(entries, positions)
    ).split(lengths)
    for g, w, length in zip(got, want, lengths, strict=True):
        torch.testing.assert_close(g, w[:length], atol=2e-6, rtol=1e-5)
    for step in range(new):
        at = torch.tensor(lengths) + step
        tokens = torch.stack([row[i] for row, i in zip(x, at, strict=True)])
        got = module.decode(tokens, cos, sin, at, cache, table, (at + 1).int(), slots(torch.arange(3), at))
        for g, w, i in zip(got, want, at, strict=True):
            torch.testing.assert_close(g, w[i], atol=2e-6, rtol=1e-5)
    positions = torch.cat([torch.arange(3) + length + new for length in lengths])
    tokens, seq_lens = torch.cat([row[-3:] for row in x]), (torch.tensor(lengths) + new + 3).int()
    at = slots(torch.arange(3).repeat_interleave(3), positions)
    starts = torch.tensor([0, 3, 6, 9], dtype=torch.int32)
    got = module.decode(tokens, cos, sin, positions, cache, table, seq_lens, at, cu_seqlens_q=starts)
    torch.testing.assert_close(got, torch.cat([w[-3:] for w in want]), atol=2e-6, rtol=1e-5)


def test_gradients_and_errors():
    module, (cos, sin) = layer(q_lora_rank=24), angles()
    x = torch.randn(1, 9, HIDDEN, requires_grad=True)
    module(x, cos, sin, torch.arange(9)[None]).sum().backward()
    assert x.grad is not None and all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    cache = torch.zeros(2, 16, 1, RANK + ROPE)
    with pytest.raises(ValueError, match=r"nn.LatentAttention: slot_mapping is None"):
        module(x, cos, sin, torch.arange(9)[None], cache=cache)
    with pytest.raises(ValueError, match=r"qk_rope_head_dim is 7"):
        LatentAttention(8, 1, qk_rope_head_dim=7)
    with pytest.raises(ValueError, match=r"nn.LatentAttention: num_heads is 0, expected an integer"):
        LatentAttention(8, 0)
    assert metate.nn.LatentAttention is LatentAttention


@pytest.mark.parametrize(
    "kind,message,wrong",
    [
        (TypeError, "x is NoneType", dict(x=None)),
        (ValueError, rf"x is of shape \(2, 3, 5\), expected \(batch, seqlen, {HIDDEN}\)", dict(x=torch.zeros(2, 3, 5))),
        (TypeError, "x is float64, expected float32 like the module",
         dict(x=torch.zeros(2, 3, HIDDEN).double())),
        (ValueError, rf"rotary_cos is of shape \(20, 1\), expected \(max_positions, {ROPE // 2}\)",
         dict(rotary_cos=torch.zeros(20, 1))),
        (ValueError, "rotary_sin is of shape", dict(rotary_sin=torch.zeros(19, ROPE // 2))),
        (TypeError, "positions is float32", dict(positions=torch.zeros(2, 3))),
        (ValueError, r"positions is of shape \(2,\)", dict(positions=torch.zeros(2, dtype=torch.int64))),
        (ValueError, "positions is -1 to 2, expected 0 to", dict(positions=torch.tensor([-1, 0, 2]))),
        (ValueError, "cache is of shape", dict(cache=torch.zeros(2, 16, 1, 3), slot_mapping=torch.arange(6))),
        (ValueError, "slot_mapping is 0 to 99", dict(cache=torch.zeros(2, 16, 1, RANK + ROPE),
                                                     slot_mapping=torch.tensor([0, 1, 2, 3, 4, 99]))),
        (TypeError, "cu_seqlens is int64", dict(x=torch.zeros(3, HIDDEN), positions=torch.arange(3),
                                                cu_seqlens=torch.tensor([0, 3]))),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(kind, message, wrong):
    module, (cos, sin) = layer(q_lora_rank=24), angles()
    right = dict(x=torch.zeros(2, 3, HIDDEN), rotary_cos=cos, rotary_sin=sin, positions=torch.arange(3))
    with pytest.raises(kind, match=f"metate.nn.LatentAttention: {message}"):
        module(**{**right, **wrong})


def test_wrong_arguments_of_decoding_are_named():
    module, (cos, sin) = layer(q_lora_rank=24), angles()
    cache, one = torch.zeros(2, 16, 1, RANK + ROPE), torch.tensor([0])
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    right = dict(x=torch.zeros(1, HIDDEN), positions=one, cache=cache, block_table=table, seq_lens=lens,
                 slot_mapping=one)  # fmt: skip
    module.decode(rotary_cos=cos, rotary_sin=sin, **right)
    for name, value, got in (
        ("cache", cache.double(), "float64"), ("block_table", table + 2, "2"), ("seq_lens", lens + 30, "31"),
        ("x", torch.zeros(1, 2, HIDDEN), "of shape"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=rf"metate.nn.LatentAttention: {name}.* is {got}"):
            module.decode(rotary_cos=cos, rotary_sin=sin, **{**right, name: value})
