"""Low-bit formats to the bit: what is read equals what unpackers in plain numpy (and the gguf package) make of it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import metate
from metate.low_bit import QuantizedWeight, pack_codes, unpack_codes
from metate.quant import (
    awq,
    bitsandbytes,
    fp8,
    gptq,
    quantize_fp4,
    quantize_fp8,
    quantize_hqq,
    quantize_int8,
    quantize_nf4,
    quantize_rtn,
    save_quantized,
)
from metate.quant.gguf_blocks import TYPES, lower
from metate.quant.gguf_grids import points
from metate.quant.patterns import Patterns
from metate.quant.settings import Settings


def rng(seed=0):
    return np.random.default_rng(seed)


def same(a, b):
    """Equal bits, but for the payload of NaN."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a.shape == b.shape and bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def bit_stream(codes, bits):
    """(R, C) codes -> (R, bytes): every code LSB first, one after another."""
    stream = (codes[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(len(codes), codes.shape[1] * bits).astype(np.uint8), axis=1, bitorder="little")


def settings(**values):
    return Settings("configuration", values)


def half(generator, *shape):
    return generator.uniform(0.001, 0.1, shape).astype(np.float16)


# The canonical form.


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [0, 1, 7, 8, 9, 63, 64, 65])
def test_packing_is_a_stream_of_bits(bits, columns):
    codes = rng().integers(0, 2**bits, (3, columns), dtype=np.uint8)
    packed = pack_codes(torch.from_numpy(codes), bits)
    assert (packed.numpy() == bit_stream(codes, bits)).all()
    assert torch.equal(unpack_codes(packed, bits, columns), torch.from_numpy(codes))


@pytest.mark.parametrize("rows,columns,group_size", [(3, 65, 32), (2, 64, 64), (1, 1, 5), (5, 300_000, 48), (0, 8, 8)])
def test_dequantize_is_the_formula(rows, columns, group_size):
    g = rng()
    groups = -(-columns // group_size)
    codes = g.integers(0, 8, (rows, columns), dtype=np.uint8)
    fine = [g.integers(-128, 128, (rows, groups), dtype=np.int8) for _ in range(2)]
    coarse = [half(g, rows, -(-groups // 3)) for _ in range(2)]
    zeros = g.integers(0, 256, (rows, groups), dtype=np.uint8)
    order = g.permutation(columns).astype(np.int32)
    weight = QuantizedWeight(
        (rows, columns), 3, group_size, torch.from_numpy(bit_stream(codes, 3)), torch.from_numpy(fine[0]),
        torch.from_numpy(coarse[0]), 3, zero=7, zeros=torch.from_numpy(zeros), offsets=torch.from_numpy(fine[1]),
        super_offsets=torch.from_numpy(coarse[1]), permutation=torch.from_numpy(order),
    )  # fmt: skip
    group = np.arange(columns) // group_size
    scale, offset = (
        (f.astype(np.float32) * np.repeat(c.astype(np.float32), 3, 1)[:, :groups])[:, group]
        for f, c in zip(fine, coarse, strict=True)
    )
    truth = np.empty((rows, columns), np.float32)
    value = codes.astype(np.float32) - np.float32(7) - zeros[:, group].astype(np.float32)
    truth[:, order] = value * scale + offset
    assert same(weight.dequantize(), truth)
    assert torch.equal(weight.dequantize(torch.bfloat16), torch.from_numpy(truth).bfloat16())
    assert weight.nbytes == sum(tensor.nbytes for tensor in weight.tensors.values())
    assert weight.bits_per_weight == 8 * weight.nbytes / max(1, weight.out_features * weight.in_features)
    meta = weight.to("meta")
    assert meta.device.type == "meta" and meta.shape == weight.shape


def plain(**changes):
    fields = dict(
        shape=(4, 64), bits=4, group_size=32, codes=torch.zeros(4, 32, dtype=torch.uint8), scales=torch.ones(4, 2)
    )  # fmt: skip
    return QuantizedWeight(**{**fields, **changes})


WRONG = [
    ("shape", dict(shape=[4, 64])), ("shape", dict(shape=(4, -1))), ("shape", dict(shape=(4, 64.0))),
    ("bits", dict(bits=0)), ("bits", dict(bits=9)), ("bits", dict(bits=True)), ("bits", dict(bits=float("nan"))),
    ("group_size", dict(group_size=0)), ("group_size", dict(group_size=-1)), ("group_size", dict(group_size=2**80)),
    ("codes", dict(codes=torch.zeros(4, 31, dtype=torch.uint8))), ("codes", dict(codes=torch.zeros(4, 32))),
    ("codes", dict(codes=None)), ("scales", dict(scales=torch.ones(4, 3))), ("scales", dict(scales=torch.ones(2, 4))),
    ("scales", dict(scales=torch.ones(4, 2).double())), ("scales", dict(scales=torch.ones(4, 2, device="meta"))),
    ("scales", dict(scales=torch.ones(4, 2).to_sparse())), ("scales", dict(scales=None)),
    ("super_scales", dict(scales=torch.ones(4, 2, dtype=torch.int8))),
    ("super_scales", dict(super_scales=torch.ones(4, 1), super_groups=2)),
    ("super_groups", dict(super_groups=2)), ("super_groups", dict(super_groups=-2)),
    ("super_scales", dict(scales=torch.ones(4, 2, dtype=torch.int8), super_scales=torch.ones(4, 2), super_groups=2)),
    ("zero", dict(zero=256)), ("zero", dict(zero=-1)), ("zero", dict(zero=0.5)),
    ("zeros", dict(zeros=torch.zeros(4, 2))), ("zeros", dict(zeros=torch.zeros(4, 1, dtype=torch.uint8))),
    ("offsets", dict(offsets=torch.ones(4, 1))), ("super_offsets", dict(offsets=torch.ones(4, 2, dtype=torch.int8))),
    ("codebook", dict(codebook=torch.ones(15))), ("codebook", dict(codebook=torch.ones(16).double())),
    ("codebook", dict(codebook=torch.ones(16), zero=8)),
    ("codebook", dict(codebook=torch.ones(16), zeros=torch.ones(4, 2, dtype=torch.uint8))),
    ("permutation", dict(permutation=torch.arange(64))), ("permutation", dict(permutation=torch.arange(63).int())),
    ("permutation", dict(permutation=torch.arange(64).int() // 2)),
    ("permutation", dict(permutation=torch.arange(64).int() + 1)),
    ("permutation", dict(permutation=torch.arange(64).int() - 1)),
]  # fmt: skip


@pytest.mark.parametrize("field,changes", WRONG)
def test_inconsistent_weights_are_refused_by_field(field, changes):
    assert plain().dequantize().shape == (4, 64)
    with pytest.raises(metate.FormatError, match=f"QuantizedWeight: {field} is "):
        plain(**changes)


# GPTQ.


def gptq_state(g, rows, columns, bits, group_size, *, symmetric=True, order=None, version="gptq", index=None):
    """(tensors, W): packed by hand, and the weight in float32."""
    groups = -(-columns // group_size)
    if index is None:
        index = np.arange(columns) // group_size
        index = index if order is None else index[order]
    q = g.integers(0, 2**bits, (columns, rows))
    zeros = np.full((groups, rows), 2 ** (bits - 1)) if symmetric else g.integers(0, 2**bits, (groups, rows))
    scales = half(g, groups, rows)
    stored = (zeros - (version == "gptq")) % 2**bits
    tensors = {
        "qweight": bit_stream(q.T, bits).view(np.int32).T.copy(), "qzeros": bit_stream(stored, bits).view(np.int32),
        "scales": scales, "g_idx": index.astype(np.int32),
    }  # fmt: skip
    weight = (q - zeros[index]).astype(np.float32) * scales[index].astype(np.float32)
    return {name: torch.from_numpy(array) for name, array in tensors.items()}, weight.T


@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("group_size", [16, 64, 1024, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq(bits, group_size, symmetric, act_order):
    g = rng()
    columns = 160 if group_size != 1024 else 2048
    size = columns if group_size == -1 else group_size
    order = g.permutation(columns) if act_order else None
    for version in gptq.VERSIONS:
        tensors, truth = gptq_state(g, 96, columns, bits, size, symmetric=symmetric, order=order, version=version)
        config = settings(bits=bits, group_size=group_size, sym=symmetric, checkpoint_format=version)
        weight = gptq.lower(tensors, config)
        assert same(weight.dequantize(), truth)
        assert (weight.permutation is not None) == (act_order and size < columns)
        again = gptq.write(weight, version)
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items()), "written as it was read"
        if not act_order:
            del tensors["g_idx"]
            assert same(gptq.lower(tensors, config).dequantize(), truth)


def test_gptq_groups_of_any_length():
    """A shard along the inputs keeps all groups, in whatever lengths its part of g_idx has."""
    g = rng()
    index = np.sort(g.integers(0, 5, 128))
    for permuted in (index, g.permutation(index)):
        tensors, truth = gptq_state(g, 32, 128, 4, 26, symmetric=False, index=permuted)
        assert same(gptq.lower(tensors, settings(bits=4, group_size=26, sym=False, format="gptq")).dequantize(), truth)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
def test_gptq_words_of_other_widths(dtype):
    tensors, truth = gptq_state(rng(), 64, 128, 4, 32)
    rows = tensors["qweight"].t().contiguous().view(torch.uint8)
    tensors["qweight"] = rows.view(dtype).t().contiguous()
    tensors["qzeros"] = tensors["qzeros"].view(dtype)
    assert same(gptq.lower(tensors, settings(bits=4, group_size=32, sym=True)).dequantize(), truth)


CONVENTIONS = [  # (sym, label, stored everywhere, which convention it must be read by: None is refused)
    (True, "gptq", 7, "gptq"), (True, "gptq", 8, "gptq_v2"), (True, "gptq_v2", 7, "gptq"), (True, None, 8, "gptq_v2"),
    (True, "gptq", 3, None), (True, "gptq_v2", 9, None), (None, None, 7, "gptq"), (None, None, 8, "gptq_v2"),
    (None, None, 5, None), (False, "gptq", 7, "gptq"), (False, "gptq_v2", 8, "gptq_v2"), (False, "gptq", 8, None),
    (False, "gptq_v2", 7, None), (False, "gptq", 15, "gptq"), (False, "gptq_v2", 15, "gptq_v2"),
    (False, None, 5, "gptq"), (True, "gptq", "mixed", None), (None, None, "mixed", None),
    (False, "gptq_v2", "mixed", "gptq_v2"), (None, "gptq", "mixed", "gptq"),
]  # fmt: skip


@pytest.mark.parametrize("symmetric,label,stored,version", CONVENTIONS)
def test_gptq_zero_points_by_label_and_data(symmetric, label, stored, version):
    tensors, _ = gptq_state(rng(), 64, 64, 4, 32)
    zeros = rng().integers(0, 16, (2, 64)) if stored == "mixed" else np.full((2, 64), stored)
    tensors["qzeros"] = torch.from_numpy(bit_stream(zeros, 4).view(np.int32))
    config = settings(bits=4, group_size=32, sym=symmetric, checkpoint_format=label)
    for override in (None, *gptq.VERSIONS):
        read_by = override or version
        if read_by is None:
            with pytest.raises(metate.FormatError, match="checkpoint_format="):
                gptq.lower(tensors, config)
            continue
        truth = (zeros + (read_by == "gptq")) % 16
        weight = gptq.lower(tensors, config, override)
        found = np.full((64, 2), weight.zero) + (0 if weight.zeros is None else weight.zeros.numpy())
        assert (found == truth.T).all()


def test_gptq_settings_of_single_modules(tmp_path):
    g = rng()
    dynamic = {r"+:.*\.mlp\.(?:up|down)_proj": {"bits": 8, "group_size": 32}, r"-:.*\.skipped": {}, "+:.*": {}}
    parts = {
        "a.mlp.up_proj": gptq_state(g, 32, 64, 8, 32), "a.mlp.gate_proj": gptq_state(g, 32, 64, 4, 64),
        "a.skipped": gptq_state(g, 32, 64, 4, 64),
    }  # fmt: skip
    save_file({f"{m}.{k}": v for m, (state, _) in parts.items() for k, v in state.items()}, tmp_path / "x.safetensors")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False, "dynamic": dynamic}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    read = metate.load_quantized(tmp_path)
    for module in ("a.mlp.up_proj", "a.mlp.gate_proj"):
        assert same(read[module].dequantize(), parts[module][1])
    with pytest.raises(metate.FormatError, match="dynamic"):
        read["a.skipped"]


def test_patterns_match_as_re_does():
    import re

    g = rng()
    tokens = [*"ab.^$|()*+?", "(?:", "(?!", "(?=", "[ab]", "[^a]", "{1,2}", r"\d", r"\.", "??"]
    compared = 0
    for _ in range(4000):
        pattern = "".join(g.choice(tokens, g.integers(1, 9)))
        for name in ("aab", "b", "", "a1.b"):
            try:
                truth, found = re.match(pattern, name), Patterns([pattern]).first(name)
            except (re.error, metate.FormatError):
                continue
            compared += 1
            assert (found == 0) == bool(truth), (pattern, name)
    assert compared > 2000


# AWQ.


def awq_words(codes):
    """(R, C) -> (R, C / 8) int32, nibble i of a word holding column [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight."""
    return bit_stream(codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(codes.shape), 4).view(
        np.int32
    )


def interleaved(q):
    """gemv_fast: (N, K) codes -> (N / 4, K) int16, element by element from its definition."""
    rows, columns = q.shape
    words = np.zeros((rows // 4, columns), np.uint16)
    within = np.empty(32, int)  # place in the stored 32 -> column of the 32
    for place in range(32):
        eight, rest = divmod(place, 8)
        pair = (rest % 4) * 2 + rest // 4  # even ones first, then odd ones
        fragment, low = divmod(eight * 8 + pair, 2)
        within[place] = (fragment % 4) * 8 + fragment // 4 * 2 + low
    for row in range(rows):
        stored = q[row].reshape(-1, 32)[:, within].reshape(-1, 64)
        for run, values in enumerate(stored):
            for place, value in enumerate(values):
                flat = (row % 4) * 64 + place  # four rows of a run follow each other, four nibbles a word
                words[row // 4, run * 64 + flat // 4] |= int(value) << 4 * (flat % 4)
    return words.view(np.int16)


@pytest.mark.parametrize("packing", ["gemm", "gemv", "gemv_fast", "llm-awq"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_awq(packing, group_size):
    g = rng()
    rows, columns = 24, 256
    size = columns if group_size == -1 else group_size
    groups = columns // size
    q, zeros = g.integers(0, 16, (rows, columns)), g.integers(0, 16, (rows, groups))
    scales = half(g, rows, groups)
    group = np.arange(columns) // size
    truth = (q - zeros[:, group]).astype(np.float32) * scales[:, group].astype(np.float32)
    wide = ((0, 0), (0, 8 * -(-groups // 8) - groups))  # gemv and gemv_fast pad groups to words
    if packing == "gemm":
        tensors = {"qweight": awq_words(q.T), "qzeros": awq_words(zeros.T), "scales": scales.T.copy()}
    elif packing == "gemv":
        qweight, qzeros = bit_stream(q, 4).view(np.int32), bit_stream(np.pad(zeros, wide), 4).view(np.int32)
        tensors = {"qweight": qweight, "qzeros": qzeros, "scales": np.pad(scales, wide)}
    else:
        scaled = -(scales.astype(np.float32) * zeros).astype(np.float16)
        name = "qzeros" if packing == "gemv_fast" else "scaled_zeros"
        fast = {"qweight": interleaved(q), name: np.pad(scaled, wide).T.copy(), "scales": np.pad(scales, wide).T.copy()}
        tensors = fast
        truth = q.astype(np.float32) * scales[:, group].astype(np.float32) + scaled[:, group].astype(np.float32)
    tensors = {name: torch.from_numpy(array) for name, array in tensors.items()}
    weight = awq.lower(tensors, settings(bits=4, group_size=group_size, version=packing.upper()))
    assert same(weight.dequantize(), truth)
    assert same(awq.lower(tensors, settings(w_bit=4, q_group_size=group_size, version=packing)).dequantize(), truth)
    if packing == "gemm":
        again = awq.write(weight)
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_awq_of_an_odd_number_of_inputs():
    g = rng()
    q, zeros, scales = g.integers(0, 16, (16, 33)), g.integers(0, 16, (16, 1)), half(g, 16, 1)
    arrays = {"qweight": awq_words(q.T), "qzeros": awq_words(zeros.T), "scales": scales.T.copy()}
    weight = awq.lower({n: torch.from_numpy(a) for n, a in arrays.items()}, settings(bits=4, group_size=-1))
    assert same(weight.dequantize(), (q - zeros).astype(np.float32) * scales.astype(np.float32))


# bitsandbytes.

GOLDEN = {  # what bitsandbytes 0.50.2 makes of `golden_weight()` on a CPU, blocks of 32, nested
    "nf4": (
        "04c16e29f3b05d17e29f3c05d18e2af4a37b48c5905d17e29f3b05d18e2af4c06c38d4a15b27c38d4a05d17e2af4c06e28e3"
        "a05c16d28e3a15c17d29e4b05e18e2af4c16e18e3b05d17e29f3b05d18e29e4b06e18e3b04d17e29f3b05d17e2af4c06d18e"
        "2a04c7"
    ),
    "fp4": (
        "bf5a92a63c4be5a02d63c4be2a12d73f7d94c15f6bf5a92d63c4be2a12d73c5b95d15c6ae4d95c62f7be5a12d73c5be2d12c"
        "7bf4a95d62c7ae5a02d62f4be2a12d73f5a92a63d4bf5a92d63c4be5a12d62f4be2a63d4bf5a92a63c4be5a12d73c5be2a12"
        "d7bf50"
    ),
}
GOLDEN_JSON = (
    b'{"quant_type": "%s", "blocksize": 32, "dtype": "float32", "shape": [5, 41], "nested_blocksize": 256, '
    b'"nested_dtype": "float32", "nested_offset": 10.383928298950195}'
)


def golden_weight():
    i = torch.arange(5 * 41)
    return (((i * 37) % 101 - 50) / 16.0 * (1 + i // 41)).view(5, 41)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_golden(kind):
    state = bitsandbytes.quantize_4bit(golden_weight(), kind, 32, nested=True)
    assert bytes(state.packed.tolist()).hex() == GOLDEN[kind]
    assert state.absmax.tolist() == [0, 29, 57, 185, 204, 232, 235]
    tensors = state.tensors()
    assert tensors["nested_absmax"].tolist() == [7.258928298950195]
    assert bytes(tensors[bitsandbytes.STATE + kind].tolist()) == GOLDEN_JSON % kind.encode()
    flat = bitsandbytes.quantize_4bit(golden_weight(), kind, 32)
    assert flat.absmax.tolist() == [3.125, 6.125, 9.0, 11.0, 12.5, 15.3125, 15.625]
    first = {"nf4": [-6.125, -1.131737232208252, 3.4460291862487793, -4.264181137084961],
             "fp4": [-6.125, -1.53125, 3.0625, -4.083333492279053]}  # fmt: skip
    assert flat.lower().dequantize()[1, :4].tolist() == first[kind]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(16, 256), (7, 96), (5, 65), (1, 3), (40, 4096)])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4bit(kind, shape, nested):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.linspace(0, 3, shape[0])[:, None]
    for block_size in bitsandbytes.BLOCK_SIZES:
        state = bitsandbytes.quantize_4bit(weight, kind, block_size, nested)
        tensors = state.tensors()
        packed, scales = tensors["weight"].numpy().ravel(), tensors["absmax"].numpy()
        if nested:
            text = json.loads(bytes(tensors[bitsandbytes.STATE + kind].tolist()))
            coarse = np.repeat(tensors["nested_absmax"].numpy(), 256)[: len(scales)]
            scales = tensors["nested_quant_map"].numpy()[scales] * coarse + np.float32(text["nested_offset"])
        codes = np.stack([packed >> 4, packed & 15], 1).ravel()[: weight.numel()]
        truth = tensors["quant_map"].numpy()[codes] * np.repeat(scales, block_size)[: weight.numel()]
        read = bitsandbytes.State4bit.read(tensors)
        assert same(read.lower().dequantize(), truth.reshape(shape))
        assert all(torch.equal(a, b) for a, b in zip(read.tensors().values(), tensors.values(), strict=True))
        stored = {**tensors, "weight": _stored(tensors["weight"], torch.bfloat16)}
        assert same(bitsandbytes.lower(stored, settings()).dequantize(), truth.reshape(shape))
        values = np.sort(bitsandbytes.codebook(kind).numpy())
        if not nested:  # no other code is nearer, up to the rounding of the division
            largest = np.repeat(scales, block_size)[: weight.numel()].clip(1e-30)
            scaled = weight.numpy().ravel() / largest
            nearest = np.abs(scaled[:, None] - values).min(1)
            assert (np.abs(truth / largest - scaled) <= nearest + 1e-6).all()


def _stored(packed, dtype):
    """In `bnb_4bit_quant_storage`, where whole words are filled."""
    return packed.view(-1).view(dtype)[:, None] if packed.numel() % dtype.itemsize == 0 else packed


@pytest.mark.parametrize("columns", [256, 96, 100, 80, 65, 1])
def test_bitsandbytes_writes_blocks_of_rows_and_across_them(columns):
    weight = torch.randn(7, columns)
    for quantize in (quantize_nf4, quantize_fp4):
        for block_size in (32, 64, 1024):
            made = quantize(weight, block_size)
            written = bitsandbytes.write(made)
            assert same(bitsandbytes.lower(written, settings()).dequantize(), made.dequantize())
            fresh = bitsandbytes.quantize_4bit(weight, bitsandbytes.quant_type(made), block_size).tensors()
            assert torch.equal(written["weight"], fresh["weight"])


@pytest.mark.parametrize("columns", [256, 96, 65])
def test_bitsandbytes_writes_nested_scales(columns, tmp_path):
    """As if the dense weight had been quantised so: codes do not depend on it."""
    weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns))
    for quantize in (quantize_nf4, quantize_fp4):
        made = quantize(weight, 32)
        save_quantized(tmp_path, {"m": made}, "bitsandbytes", nested=True)
        config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert config["bnb_4bit_use_double_quant"] is True
        found = metate.load_quantized(tmp_path)["m"]
        if columns % 32 == 0:
            fresh = bitsandbytes.quantize_4bit(weight, bitsandbytes.quant_type(made), 32, nested=True)
            for name, tensor in fresh.tensors().items():
                assert torch.equal(bitsandbytes.write(made, nested=True)[name], tensor), name
            assert same(found.dequantize(), fresh.lower().dequantize())
        assert 0 < float((found.dequantize() - made.dequantize()).norm() / made.dequantize().norm()) < 0.02
    with pytest.raises(ValueError, match="nested is True with gptq"):
        save_quantized(tmp_path, {"m": quantize_rtn(weight)}, "gptq", nested=True)


def test_bitsandbytes_writes_no_other_groups():
    made = quantize_nf4(torch.randn(6, 96), 32)
    other = dict(codebook=made.codebook, codes=made.codes)
    for size, scales in ((48, torch.rand(6, 2)), (64, torch.rand(6, 2)), (16, torch.rand(6, 6))):
        with pytest.raises(metate.FormatError, match="group_size"):
            bitsandbytes.write(QuantizedWeight((6, 96), 4, size, scales=scales, **other))
    with pytest.raises(metate.FormatError, match="NF4 or FP4"):
        bitsandbytes.write(quantize_rtn(torch.randn(6, 96)))


def test_bitsandbytes_int8():
    weight = torch.randn(6, 33)
    tensors = quantize_int8(weight)
    truth = tensors["weight"].numpy().astype(np.float32) * (tensors["SCB"].numpy() / np.float32(127))[:, None]
    assert same(bitsandbytes.lower(tensors, settings()).dequantize(), truth)
    assert (np.abs(truth - weight.numpy()) <= tensors["SCB"].numpy()[:, None] / 254 * 1.0001).all()
    with pytest.raises(metate.FormatError, match="weight_format"):
        bitsandbytes.lower({**tensors, "weight_format": torch.tensor([1], dtype=torch.uint8)}, settings())


# fp8.


@pytest.mark.parametrize("shape,scaled", [((300, 200), (3, 2)), ((64, 96), (1,)), ((64, 96), ()), ((64, 96), (64, 1))])
def test_fp8(shape, scaled):
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(scaled) + 0.5
    name = "weight_scale_inv" if scaled == (3, 2) else "weight_scale"
    read = fp8.lower({"weight": weight, name: scales}, settings(weight_block_size=[128, 128]))
    rows, columns = np.indices(shape)
    spread = scales.numpy().reshape(scaled)
    spread = spread[rows // 128, columns // 128] if scaled == (3, 2) else np.broadcast_to(spread, shape)
    assert same(read.dequantize(), weight.float().numpy() * spread)


def test_quantize_fp8_is_the_nearest_float8():
    weight = torch.randn(130, 257)
    made = quantize_fp8(weight, (64, 100))
    scales = made.scales.repeat_interleave(100, 1)[:, :257]
    assert torch.equal(made.dequantize(), (weight / scales).to(torch.float8_e4m3fn).float() * scales)
    assert torch.allclose(made.dequantize(), weight, rtol=2**-4, atol=2e-3)


# GGUF: tests/test_quant_hostile.py writes its files by hand, here the format's own package does.


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: TYPES[kind].name)
def test_gguf_blocks(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    block = TYPES[kind]
    raw = rng(kind).integers(0, 256, (37, 3 * block.size), dtype=np.uint8)
    if block.name in STREAMS:
        read, truth = lowered(kind, raw), stream_of_codes(raw, *STREAMS[block.name])
    else:
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        writer.add_tensor("w", raw, raw_dtype=gguf.GGMLQuantizationType(kind))
        _finish(writer)
        read = metate.load_quantized(tmp_path / "x.gguf")["w"]
        with np.errstate(all="ignore"):
            truth = gguf.dequantize(raw, gguf.GGMLQuantizationType(kind))
    assert same(read.dequantize(), truth)
    assert read.shape == (37, 3 * block.elements)
    second = slice(block.size, 2 * block.size), slice(block.elements, 2 * block.elements)  # a block alone
    assert same(lowered(kind, raw[:1, second[0]].copy()).dequantize(), truth[:1, second[1]])


STREAMS = {"Q1_0": (-1, 1), "Q2_0": (-1, 0, 1, 2)}  # what the gguf package does not dequantise -> values of codes


def stream_of_codes(raw, *values):
    """Blocks of a scale and a stream of codes."""
    blocks = raw.reshape(-1, 18)
    bits = len(values).bit_length() - 1
    stream = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(len(blocks), -1, bits)
    codes = stream @ (1 << np.arange(bits))
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        return (scales * np.array(values, np.float32)[codes]).reshape(len(raw), -1)


def lowered(kind, raw):
    """The weight of some rows of blocks."""
    return lower(TYPES[kind], torch.from_numpy(raw).view(len(raw), -1, TYPES[kind].size))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: TYPES[kind].name)
def test_gguf_blocks_stay_small_and_multiply(kind):
    """No weight takes much more than twice what the file does; products and gradients are those of W."""
    block = TYPES[kind]
    raw = rng(kind).integers(0, 256, (24, 2 * block.size), dtype=np.uint8)
    weight = lowered(kind, raw)
    assert weight.nbytes <= 2.15 * raw.nbytes
    sane = {name: torch.rand_like(t) + 0.5 for name, t in weight.tensors.items()
            if name != "codebook" and t.is_floating_point()}  # fmt: skip
    weight = dataclasses.replace(weight, **sane)
    dense = weight.dequantize().double()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x = torch.randn(5, dense.shape[1], dtype=dtype, requires_grad=True)
        y = metate.quant_linear(x, weight)
        y.backward(grad := torch.randn_like(y))
        for got, truth in ((y, x.double() @ dense.T), (x.grad, grad.double() @ dense)):
            assert (got.double() - truth).norm() <= tolerance * truth.norm()


def test_gguf_grids_have_the_points_of_their_size():
    """Distinct points, in the order in which the format numbers them; what signs pair up with is an even sum."""
    sizes = {"iq1": 2048, "iq2_xxs": 256, "iq2_xs": 512, "iq2_s": 1024, "iq3_xxs": 256, "iq3_s": 512}
    for grid, size in sizes.items():
        found = points(grid).long()
        values = 8 if grid.startswith("iq3") else 3
        numbers = (found * values ** torch.arange(found.shape[1])).sum(1)
        assert len(found) == size and int(found.max()) == values - 1 and bool((numbers.diff() > 0).all())
        assert not grid.startswith("iq2") or not bool((found.sum(1) % 2).any())


def _finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    metadata = {"general.name": "häm", "a.list": ["x", "", "yz"], "a.numbers": [1, 2, 3], "a.flag": True, "a.f": 0.5}
    writer.add_string("general.name", metadata["general.name"])
    writer.add_array("a.list", metadata["a.list"])
    writer.add_array("a.numbers", metadata["a.numbers"])
    writer.add_bool("a.flag", True)
    writer.add_float32("a.f", 0.5)
    writer.add_custom_alignment(64)
    dense = rng().normal(size=(3, 4, 5)).astype(np.float32)
    experts = rng().integers(0, 256, (2, 6, 36), dtype=np.uint8)
    writer.add_tensor("dense", dense)
    writer.add_tensor("half", dense.astype(np.float16))
    writer.add_tensor("experts", experts, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("integers", np.arange(7, dtype=np.int32))
    writer.add_tensor("unknown", np.zeros((1, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    _finish(writer)
    read = metate.load_quantized(tmp_path / "x.gguf")
    assert {key: read.metadata[key] for key in metadata} == metadata
    assert list(read) == ["dense", "half", "experts", "integers", "unknown"]
    assert same(read["dense"], dense) and torch.equal(read["half"], torch.from_numpy(dense).half())
    assert torch.equal(read["integers"], torch.arange(7, dtype=torch.int32))
    truth = gguf.dequantize(experts, gguf.GGMLQuantizationType.Q4_0).reshape(12, 64)
    assert same(read["experts"].dequantize(), truth)
    with pytest.raises(metate.FormatError, match="type is 15"):
        read["unknown"]


def test_gguf_in_several_files(tmp_path):
    gguf = pytest.importorskip("gguf")
    names = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_uint16("split.no", i)
        writer.add_tensor(f"t{i}", np.full(4, i, np.float32))
        _finish(writer)
    for path in (tmp_path, tmp_path / names[0], tmp_path / names[2]):
        read = metate.load_quantized(path)
        assert [float(read[f"t{i}"][0]) for i in range(3)] == [0, 1, 2] and read.metadata["split.no"] == 0
    (tmp_path / names[1]).unlink()
    for path in (tmp_path, tmp_path / names[0]):
        with pytest.raises(metate.FormatError, match="00002-of-00003"):
            metate.load_quantized(path)


# Checkpoints.


def test_shards_with_an_index(tmp_path):
    g = rng()
    modules = {f"layers.{i}.proj": gptq_state(g, 32, 64, 4, 32) for i in range(3)}
    flat = {f"{m}.{k}": v for m, (state, _) in modules.items() for k, v in state.items()} | {
        "norm.weight": torch.ones(4)
    }
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(flat))}
    for file in set(names.values()):
        save_file({n: flat[n] for n in flat if names[n] == file}, tmp_path / file)
    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True}))
    read = metate.load_quantized(tmp_path)
    assert sorted(read) == [*sorted(modules), "norm.weight"] and len(read) == 4
    assert all(same(read[m].dequantize(), truth) for m, (_, truth) in modules.items())
    assert "norm.weight" in read and "layers.0.proj.qweight" not in read
    with pytest.raises(KeyError):
        read["layers.0.proj.qweight"]


@pytest.mark.parametrize("configured", [True, False])
def test_every_format_comes_back_from_disk(tmp_path, configured):
    """With its configuration, and for the formats that need none, without."""
    weight = torch.randn(64, 128)
    state = bitsandbytes.quantize_4bit(weight, "nf4", 64, nested=True)
    made = {
        "gptq": quantize_rtn(weight, 3, 32), "awq": quantize_rtn(weight, 4, 32, symmetric=False),
        "bitsandbytes": quantize_nf4(weight), "metate": quantize_hqq(weight, 5, 48),
    }  # fmt: skip
    for method, quantized in made.items():
        if method == "awq" and not configured:
            continue  # its tensors do not say how long a group is
        folder = tmp_path / method
        save_quantized(folder, {"m.proj": quantized, "m.proj.bias": torch.ones(64), "norm.weight": weight[0]}, method)
        if not configured:
            (folder / "config.json").unlink()
        for path in (folder, folder / "model.safetensors"):
            read = metate.load_quantized(path)
            assert same(read["m.proj"].dequantize(), quantized.dequantize()), method
            assert torch.equal(read["norm.weight"], weight[0]) and torch.equal(read["m.proj.bias"], torch.ones(64))
            assert len(read) == 3
    parts = {("proj.weight" if name == "weight" else f"proj.weight.{name}"): t for name, t in state.tensors().items()}
    parts |= {f"eight.{name}": tensor for name, tensor in quantize_int8(weight).items()}
    save_file({name: t.contiguous() for name, t in parts.items()}, tmp_path / "mixed.safetensors")
    read = metate.load_quantized(tmp_path / "mixed.safetensors")
    assert sorted(read) == ["eight", "proj"] and same(read["proj"].dequantize(), state.lower().dequantize())


def test_gptq_modules_of_several_kinds_are_saved_with_overrides(tmp_path):
    weight = torch.randn(32, 64)
    made = {"a.x": quantize_rtn(weight, 4, 32), "a.y": quantize_rtn(weight, 8, 16, symmetric=False)}
    save_quantized(tmp_path, made, "gptq", {"model_type": "llama"})
    read = metate.load_quantized(tmp_path)
    assert all(same(read[name].dequantize(), weight.dequantize()) for name, weight in made.items())
    assert read.config["model_type"] == "llama" and read["a.y"].bits == 8


def test_one_broken_module_does_not_hide_the_others(tmp_path):
    good, truth = gptq_state(rng(), 32, 64, 4, 32)
    bad = {**good, "scales": good["scales"][:1]}
    flat = {f"{m}.{k}": v.clone().contiguous() for m, s in (("good", good), ("bad", bad)) for k, v in s.items()}
    save_file(flat, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    read = metate.load_quantized(tmp_path)
    assert same(read["good"].dequantize(), truth)
    with pytest.raises(metate.FormatError, match=r"'bad'.*qzeros"):
        read["bad"]


def test_what_to_do_about_a_broken_module_is_said_in_full(tmp_path):
    tensors, _ = gptq_state(rng(), 32, 64, 4, 32, symmetric=False)
    save_file(
        {f"model.layers.0.proj.{k}": v.clone().contiguous() for k, v in tensors.items()}, tmp_path / "m.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(
        metate.FormatError, match=r"'model.layers.0.proj' is unreadable: .* pass checkpoint_format=\"gptq"
    ):
        metate.load_quantized(tmp_path)["model.layers.0.proj"]
    read = metate.load_quantized(tmp_path, checkpoint_format="gptq")
    assert read["model.layers.0.proj"].shape == (32, 64)


def test_what_cannot_be_written_says_so(tmp_path):
    weight = torch.randn(32, 64)
    with pytest.raises(metate.FormatError, match="multiples of 32"):
        gptq.write(quantize_rtn(weight[:, :63]))
    with pytest.raises(metate.FormatError, match=r"gptq\.write: weight"):
        gptq.write(quantize_nf4(weight))
    with pytest.raises(metate.FormatError, match=r"awq\.write: weight"):
        awq.write(quantize_rtn(weight, 3))
    with pytest.raises(ValueError, match="one group size"):
        save_quantized(tmp_path, {"a": quantize_rtn(weight, 4, 16), "b": quantize_rtn(weight, 4, 32)}, "awq")
    with pytest.raises(ValueError, match="method is pickle"):
        save_quantized(tmp_path, {}, "pickle")
