"""Hostile checkpoints: whatever the bytes, either weights or a FormatError, in bounded time and memory."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import time
from random import Random

import pytest
import torch
from conftest import SLOW, bounded_memory, overwrite, survives
from safetensors.torch import save

import metate
from metate.low_bit import QuantizedWeight
from metate.quant import awq, bitsandbytes, canonical, gptq, quantize_hqq, quantize_int8, quantize_rtn
from metate.quant.checkpoint import QuantizedCheckpoint
from metate.quant.gguf_blocks import TYPES
from metate.quant.patterns import Patterns

MUTANTS = 25 * int(os.environ.get("METATE_TEST_FUZZ", "40"))  # of a format and kind; half a million in the long target
EDGES = [0, 1, 2, 7, 31, 32, 63, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**63 - 1,
         2**64 - 1]  # fmt: skip
VALUES = [
    None, True, False, -1, 0, 1, 3, 4, 5, 33, 2**31, 2**64, -(2**70), 1e300, float("nan"), float("inf"), "", "nf4",
    "fp4", "gptq_v2", "getattr", "__class__", [], [0, 0], [2**40, 2**40], [[]], {}, {"+:(a*)*": {"bits": 3}},
    {"+:.*": 4}, {"-:.*": {}}, {"(": {}},
]  # fmt: skip
DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
          torch.float64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip


# Small sound checkpoints: (tensors, config).


def affine_sample(bits=4, symmetric=False):
    return quantize_rtn(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), bits, 16, symmetric=symmetric)


def configured(**values):
    return {"quantization_config": values}


def gptq_sample():
    config = {**gptq.configuration(affine_sample(), False), "dynamic": {r"+:m\.[a-z]{1,9}": {"bits": 4}}}
    return {f"m.proj.{k}": v for k, v in gptq.write(affine_sample()).items()}, configured(**config)


def awq_sample(version="gemm"):
    tensors = awq.write(affine_sample())
    if version == "gemv":
        shapes = {"qweight": (32, 8), "qzeros": (32, 1), "scales": (32, 8)}
        tensors = {name: tensors[name].flatten().repeat(4)[: a * b].view(a, b) for name, (a, b) in shapes.items()}
    elif version == "gemv_fast":
        words = tensors["qweight"].view(torch.int16).flatten().view(8, 64)
        tensors = {"qweight": words, "scaled_zeros": torch.ones(8, 32).half(), "scales": torch.ones(8, 32).half()}
    config = configured(quant_method="awq", bits=4, group_size=16, zero_point=True, version=version)
    return {f"m.proj.{name}": tensor for name, tensor in tensors.items()}, config


def bitsandbytes_sample(nested=True, columns=64):
    state = bitsandbytes.quantize_4bit(torch.randn(32, columns), "nf4", 32, nested).tensors()
    return {f"m.proj.weight{'' if k == 'weight' else '.' + k}": v for k, v in state.items()}, {}


def int8_sample():
    tensors = {**quantize_int8(torch.randn(32, 64)), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {f"m.proj.{k}": v for k, v in tensors.items()}, configured(quant_method="bitsandbytes")


def fp8_sample():
    tensors = {"weight": torch.randn(32, 64).to(torch.float8_e4m3fn), "weight_scale_inv": torch.rand(2, 4)}
    return {f"m.proj.{k}": v for k, v in tensors.items()}, configured(quant_method="fp8", weight_block_size=[16, 16])


def canonical_sample():
    return {f"m.proj.{k}": v for k, v in canonical.write(quantize_hqq(torch.randn(32, 64), 3, 16)).items()}, {}


SAMPLES = {
    "gptq": gptq_sample, "awq-gemm": awq_sample, "awq-gemv": lambda: awq_sample("gemv"),
    "awq-gemv_fast": lambda: awq_sample("gemv_fast"), "bitsandbytes": bitsandbytes_sample,
    "bitsandbytes-odd": lambda: bitsandbytes_sample(False, 61), "bitsandbytes-int8": int8_sample, "fp8": fp8_sample,
    "metate": canonical_sample,
}  # fmt: skip


def gguf_bytes(*args, **kwargs):
    return b"".join(gguf_parts(*args, **kwargs))


def gguf_parts(tensors, metadata=b"", keys=0, version=3, count=None):
    """Header and data of a GGUF file by hand; tensors: (name, dims, type, offset, data)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if count is None else count, keys) + metadata
    body = b""
    for name, dims, kind, offset, data in tensors:
        head += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
        head += struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)
        body = body.ljust(min(offset, 4096), b"\0") + data
    return head + b"\0" * (-len(head) % 32), body


def string(text):
    return struct.pack("<Q", len(text)) + text


KEYS = [
    (b"general.name", struct.pack("<I", 8) + string(b"x")),
    (b"list", struct.pack("<IIQ", 9, 8, 3) + string(b"a") + string(b"") + string(b"bc")),
    (b"numbers", struct.pack("<IIQ4H", 9, 2, 4, 1, 2, 3, 4)),
    (b"general.alignment", struct.pack("<II", 4, 32)),
]


def gguf_tensors(kinds):
    """Two blocks of each type, and a dense tensor."""
    tensors, offset = [], 0
    for kind in kinds:
        block = TYPES[kind]
        data = Random(kind).randbytes(2 * block.size)
        tensors.append((block.name.encode(), (block.elements, 2), kind, offset, data))
        offset += -(-len(data) // 32) * 32
    return [*tensors, (b"f", (3, 2), 0, offset, bytes(24))]


def gguf_file(tensors, entries=KEYS, **counts):
    metadata = b"".join(string(key) + value for key, value in entries)
    return gguf_parts(tensors, metadata, **{"keys": len(entries), **counts})


# Reading everything there is.


def drain(read):
    """Every tensor of a checkpoint, every key of its metadata; how many of them are sound."""
    checkpoint, sound = read(), 0
    metadata = checkpoint.metadata if isinstance(checkpoint, metate.quant.GGUFFile) else {}
    for key in metadata:
        try:
            metadata[key]
        except metate.FormatError:
            continue
    for name in checkpoint:
        try:
            found = checkpoint[name]
        except metate.FormatError:
            continue
        sound += 1
        if isinstance(found, QuantizedWeight):
            assert found.dequantize().shape == found.shape
        else:
            found.clone()
    return sound


def sound_in(read, what):
    """How many weights of a mutant are sound."""
    return survives(lambda: drain(read), what) or 0


def mutated(data, random):
    """Bytes changed, cut, doubled, or overwritten by integers on the edge."""
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        at = random.randrange(min(len(data), random.choice([64, 512, len(data)])) or 1)
        kind = random.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([random.randrange(256)])
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data[at:at] = data[at : at + random.randrange(1, 64)]
        elif kind == 3:
            del data[at : at + random.randrange(1, 64)]
        elif kind == 4:
            size = random.choice([1, 2, 4, 8])
            data[at : at + size] = (random.choice(EDGES) % 2 ** (8 * size)).to_bytes(size, "little")
        else:
            data[at : at + 1] = bytes([data[at] ^ 1 << random.randrange(8)]) if at < len(data) else b""
    return bytes(data)


def mutated_tensor(tensor, random):
    kind = random.randrange(7)
    if kind == 0:
        return tensor[: random.randrange(tensor.shape[0] + 1)] if tensor.dim() else tensor[None]
    if kind == 1:
        return tensor.flatten()
    if kind == 2:
        return tensor.t() if tensor.dim() == 2 else tensor[None]
    if kind == 3 and tensor.dtype != torch.float8_e4m3fn:
        return torch.cat([tensor.flatten(), tensor.flatten()]).view(-1, *tensor.shape[1:])
    if kind == 4:
        dtype = random.choice(DTYPES)
        flat = tensor.contiguous().flatten().view(torch.uint8)
        return flat[: flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype).view(-1, *tensor.shape[1:][:0])
    if kind == 5:
        return tensor.to(random.choice(DTYPES))
    flat = tensor.contiguous().flatten().view(torch.uint8).clone()
    for _ in range(8 if flat.numel() else 0):
        flat[random.randrange(flat.numel())] = random.choice([0, 1, 127, 128, 255, random.randrange(256)])
    return flat.view(tensor.dtype).view(tensor.shape)


def mutated_state(tensors, config, random):
    """Tensors dropped, of other shapes, dtypes and values; settings replaced."""
    tensors, config = dict(tensors), {name: dict(section) for name, section in config.items()}
    for _ in range(random.choice([1, 1, 2])):
        name = random.choice(list(tensors))
        if random.random() < 0.1 and len(tensors) > 1:
            del tensors[name]
        else:
            tensors[name] = mutated_tensor(tensors[name], random)
    if config and random.random() < 0.5:
        settings = config["quantization_config"]
        key = random.choice([*settings, "bits", "sym", "dynamic", "group_size", "checkpoint_format", "version"])
        settings[key] = random.choice(VALUES)
        if random.random() < 0.05:
            config["quantization_config"] = random.choice(VALUES)
    return tensors, config


def mutated_gguf(tensors, random):
    """A header whose counts, names, dimensions, types, offsets and keys are others; data cut."""
    tensors, keys, counts = [list(tensor) for tensor in tensors], list(KEYS), {}
    for _ in range(random.choice([1, 1, 2, 3])):
        kind, tensor, edge = random.randrange(9), random.choice(tensors), random.choice(EDGES)
        if kind == 0:
            counts[random.choice(["count", "keys"])] = edge
        elif kind == 1:
            counts["version"] = random.randrange(5)
        elif kind == 2:
            dims = [*tensor[1], 1, edge][: random.randrange(5)]
            tensor[1] = [random.choice([edge, d, 2 * d]) % 2**64 for d in dims] if random.random() < 0.7 else dims[::-1]
        elif kind == 3:
            tensor[2] = random.choice([*TYPES, *range(45), edge % 2**32])
        elif kind == 4:
            tensor[3] = random.choice([edge, tensor[3] + 1, tensor[3] + 32, -32]) % 2**64
        elif kind == 5:
            tensor[4] = tensor[4][: random.randrange(len(tensor[4]) + 1)]
        elif kind == 6:
            tensor[0] = random.choice([b"", b"f", b"\xff", b"a" * 70000, tensor[0] * 2])
        elif kind == 7:
            place, value = random.randrange(len(keys)), random.choice(KEYS)[1]
            array = struct.pack("<IIQ", 9, random.randrange(14), edge) + value[: random.randrange(20)]
            keys[place] = (keys[place][0], random.choice([value, struct.pack("<I", edge % 2**32) + value, array]))
        else:
            keys.append(random.choice(KEYS))
    return b"".join(gguf_file(tensors, keys, **counts))


def fuzz_states(name, random, count):
    """Mutants of the tensors and settings of a sample; how many are sound."""
    tensors, config = SAMPLES[name]()
    assert drain(lambda: QuantizedCheckpoint(tensors, config, None)) == 1
    sound = 0
    for _ in range(count):
        mutant = mutated_state(tensors, config, random)
        sound += sound_in(lambda mutant=mutant: QuantizedCheckpoint(*mutant, None), mutant)
    return sound


def fuzz_files(name, random, count, folder):
    """Mutants of the bytes of a safetensors file and its configuration; how many are sound."""
    tensors, config = SAMPLES[name]()
    data, text = save({n: t.contiguous() for n, t in tensors.items()}), json.dumps(config).encode()
    file, beside = folder / "model.safetensors", folder / "config.json"
    file.write_bytes(data)
    beside.write_bytes(text)
    assert drain(lambda: metate.load_quantized(file)) == 1
    sound = 0
    for _ in range(count):
        mutant = mutated(data, random), mutated(text, random) if random.random() < 0.3 else text
        overwrite(file, mutant[0])
        overwrite(beside, mutant[1])
        sound += sound_in(lambda: metate.load_quantized(folder), mutant)
    return sound


def fuzz_gguf(kind, random, count, folder):
    """Mutants of GGUF files of one or two block types; how many of their tensors are sound."""
    file = folder / "model.gguf"
    file.write_bytes(b"".join(gguf_file(gguf_tensors(TYPES))))
    assert drain(lambda: metate.load_quantized(file)) == len(TYPES) + 1
    sound = 0
    for _ in range(count):
        tensors = gguf_tensors(random.sample(list(TYPES), random.choice([1, 2])))
        if kind == "fields":
            mutant = mutated_gguf(tensors, random)
        else:
            header, body = gguf_file(tensors)
            mutant = mutated(header, random) + body if random.random() < 0.7 else mutated(header + body, random)
        overwrite(file, mutant)
        sound += sound_in(lambda: metate.load_quantized(file), mutant)
    return sound


@pytest.mark.parametrize("name", SAMPLES)
def test_mutants_of_states(name):
    with bounded_memory(1 << 16):
        assert 0 < fuzz_states(name, Random(name), MUTANTS) < 3 * MUTANTS, "some mutants are still sound, not all"


@pytest.mark.parametrize("name", SAMPLES)
def test_mutants_of_files(name, tmp_path):
    with bounded_memory(1 << 16):
        assert 0 < fuzz_files(name, Random(name), MUTANTS, tmp_path) < 3 * MUTANTS


@pytest.mark.parametrize("kind", ["fields", "bytes"])
def test_mutants_of_gguf(kind, tmp_path):
    with bounded_memory(1 << 16):
        assert 0 < fuzz_gguf(kind, Random(kind), MUTANTS, tmp_path) < 3 * MUTANTS


# Known attacks, by name.


def one_tensor(dims=(32, 1), kind=2, offset=0, data=bytes(18), name=b"w"):
    return gguf_bytes([(name, dims, kind, offset, data)])


ARRAY = struct.pack("<I", 9)
ATTACKS = {
    "empty": b"",
    "magic": b"GGUF",
    "version 1": gguf_bytes([], version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2**64 keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1),
    "2**64 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0),
    "2**60 numbers": gguf_bytes([], string(b"k") + ARRAY + struct.pack("<IQ", 0, 2**60), 1),
    "2**60 strings": gguf_bytes([], string(b"k") + ARRAY + struct.pack("<IQ", 8, 2**60), 1),
    "2**64 bytes of string": gguf_bytes([], string(b"k") + struct.pack("<IQ", 8, 2**64 - 1), 1),
    "string of an array beyond the end": gguf_bytes([], string(b"k") + ARRAY + struct.pack("<IQQ", 8, 1, 2**63), 1),
    "arrays of arrays": gguf_bytes([], string(b"k") + (ARRAY + struct.pack("<Q", 1)) * 9, 1),
    "unknown kind": gguf_bytes([], string(b"k") + struct.pack("<I", 13), 1),
    "key twice": gguf_bytes([], 2 * (string(b"k") + struct.pack("<IB", 0, 1)), 2),
    "key not UTF-8": gguf_bytes([], string(b"\xff") + struct.pack("<IB", 0, 1), 1),
    "alignment 0": gguf_bytes([], string(b"general.alignment") + struct.pack("<II", 4, 0), 1),
    "alignment 3": gguf_bytes([], string(b"general.alignment") + struct.pack("<II", 4, 3), 1),
    "alignment of text": gguf_bytes([], string(b"general.alignment") + struct.pack("<I", 8) + string(b"x"), 1),
    "0 dimensions": one_tensor(()),
    "5 dimensions": one_tensor((32, 1, 1, 1, 1)),
    "a dimension of 0": one_tensor((0, 4)),
    "dimensions that overflow": one_tensor((2**32, 2**32)),
    "half a block": one_tensor((16, 2)),
    "data missing": one_tensor((32, 2)),
    "offset beyond the end": one_tensor(offset=2**40),
    "offset unaligned": one_tensor(offset=1),
    "tensor twice": gguf_bytes([(b"w", (1,), 0, 0, bytes(4))] * 2),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_gguf_attacks_are_refused_at_once(attack, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(ATTACKS[attack])
    start = time.perf_counter()
    with pytest.raises(metate.FormatError):
        metate.load_quantized(file)
    assert time.perf_counter() - start < 0.05


def test_endless_vocabularies_are_refused(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf_bytes([], string(b"k") + ARRAY + struct.pack("<IQ", 8, 5 * 10**6), 1))
    os.truncate(file, 10**8)
    with pytest.raises(metate.FormatError, match="5000000 strings"):
        metate.load_quantized(file)


def test_sound_gguf_stays_sound(tmp_path):
    (tmp_path / "x.gguf").write_bytes(one_tensor())
    assert metate.load_quantized(tmp_path)["w"].shape == (1, 32)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(.*)(.*)(.*)(.*)x" * 50, "((a?){900}){900}b", "(?=" * 60 + ")" * 60, "((((a{50}){50}){50}){50})"],
)
def test_patterns_cost_little(pattern):
    start = time.process_time()
    with contextlib.suppress(metate.FormatError):
        Patterns([pattern] * 20).first("a" * 200 + "!")
    assert time.process_time() - start < SLOW


@pytest.mark.parametrize(
    "pattern",
    [r"(a)\1", "(?P<x>a)", "(?<=a)b", "(?i)a", "a{1001}", "a{2,1}", "[z-a]", "[a", "(", ")", "*", "a**", "\\", r"\b"],
)
def test_patterns_beyond_the_subset_are_refused(pattern):
    with pytest.raises(metate.FormatError, match="pattern"):
        Patterns([pattern]).first("a")


FOLDERS = {  # files of a folder -> what the complaint says
    "no files": ({}, r"no \.safetensors"),
    "pickle": ({"pytorch_model.bin": b"\x80\x04"}, r"no \.safetensors"),
    "index outside": ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}, "same folder"),
    "index absolute": ({"model.safetensors.index.json": b'{"weight_map": {"a": "/etc/x.safetensors"}}'}, "same folder"),
    "index of nothing": ({"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'}, "incomplete"),
    "index of numbers": ({"model.safetensors.index.json": b'{"weight_map": {"a": 3}}'}, "same folder"),
    "index a list": ({"model.safetensors.index.json": b"[]"}, "a JSON object"),
    "index without end": ({"model.safetensors.index.json": b"[" * 100_000}, "a JSON object"),
    "two models": ({"a.safetensors": save({}), "b.safetensors": save({})}, "one of them"),
    "header too long": ({"a.safetensors": struct.pack("<Q", 2**62) + b"{}"}, "safetensors file"),
    "config not JSON": ({"a.safetensors": save({}), "config.json": b"\xff"}, "JSON"),
    "config of a long number": ({"a.safetensors": save({}), "config.json": b'{"a": ' + b"9" * 9999 + b"}"}, "JSON"),
    "config too long": ({"a.safetensors": save({}), "config.json": b" " * (3 << 20)}, "at most"),
    "unknown method": (
        {"a.safetensors": save({}), "config.json": b'{"quantization_config": {"quant_method": "exl9"}}'}, "gptq or awq"
    ),
}  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_that_are_no_checkpoint(folder, tmp_path):
    files, message = FOLDERS[folder]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(metate.FormatError, match=message):
        metate.load_quantized(tmp_path)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="path"):
        metate.load_quantized(tmp_path / "nothing")
    with pytest.raises(ValueError, match="checkpoint_format is v3"):
        metate.load_quantized(tmp_path, checkpoint_format="v3")


STATES = [  # (sample, tensor or setting, what becomes of it, what the complaint names)
    ("bitsandbytes", "m.proj.weight.absmax", lambda t: t[:3], "absmax"),
    ("bitsandbytes", "m.proj.weight.nested_absmax", lambda t: t[:0], "nested_absmax"),
    ("bitsandbytes", "m.proj.weight", lambda t: t[:-1], "weight"),
    ("bitsandbytes", "m.proj.weight.quant_map", lambda t: t * 2, "quant_map"),
    ("gptq", "m.proj.g_idx", lambda t: t + 1, "g_idx"),
    ("gptq", "m.proj.g_idx", lambda t: t - 1, "g_idx"),
    ("gptq", "m.proj.g_idx", lambda t: t[:-1], "g_idx"),
    ("gptq", "m.proj.qzeros", lambda t: t[:, :-1], "qzeros"),
    ("gptq", "m.proj.scales", lambda t: t[:, :-1], "scales"),
    ("gptq", "group_size", 0, "group_size"),
    ("gptq", "dynamic", {"+:m": {"bits": 5}}, "bits"),
    ("gptq", "dynamic", {"+:m": {"group_size": 0}}, "group_size"),
    ("awq-gemm", "m.proj.scales", lambda t: t[:-1], "scales"),
    ("awq-gemm", "bits", 8, "bits"),
    ("awq-gemv", "m.proj.qzeros", lambda t: t[:, :0], "qzeros"),
    ("awq-gemv_fast", "m.proj.qweight", lambda t: t[:, :-1], "qweight"),
    ("bitsandbytes-int8", "m.proj.SCB", lambda t: t[:-1], "SCB"),
    ("fp8", "m.proj.weight_scale_inv", lambda t: t[:1], "weight_scale_inv"),
    ("fp8", "weight_block_size", [0, 16], "weight_block_size"),
    ("metate", "m.proj.scales", lambda t: t[:, :-1], "scales"),
]  # fmt: skip


@pytest.mark.parametrize("name,key,change,named", STATES)
def test_inconsistent_states_name_what_is_wrong(name, key, change, named):
    tensors, config = SAMPLES[name]()
    if key in tensors:
        tensors[key] = change(tensors[key])
    else:
        config["quantization_config"][key] = change
    with pytest.raises(metate.FormatError, match=named):
        QuantizedCheckpoint(tensors, config, None)["m.proj"]


@pytest.mark.parametrize("text", [
    {"blocksize": 0}, {"blocksize": 2**64}, {"blocksize": 48}, {"shape": [32]}, {"shape": [2**40, 2**40]},
    {"shape": [-32, -64]}, {"shape": "32"}, {"dtype": "__class__"}, {"dtype": "float64"}, {"quant_type": "fp4"},
    {"nested_offset": "0"}, {"nested_offset": 1e999}, {"nested_blocksize": 0}, {"nested_dtype": "bfloat16"},
])  # fmt: skip
def test_bitsandbytes_numbers_are_checked(text):
    tensors, _ = bitsandbytes_sample()
    key = "m.proj.weight." + bitsandbytes.STATE + "nf4"
    state = {**json.loads(bytes(tensors[key].tolist())), **text}
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(metate.FormatError, match=next(iter(text))):
        QuantizedCheckpoint(tensors, {}, None)["m.proj"]


MEMORY = """
import resource, sys, time, torch, metate
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read = metate.load_quantized(sys.argv[1])
weights = [read[name] for name in read]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, sum(w.nbytes for w in weights))
"""


@pytest.mark.parametrize("form", ["gguf", "awq", "nf4"])
def test_memory_stays_near_the_size_of_the_file(form, tmp_path):
    """Peak growth of a process that holds every weight: at most 64 MiB and twice the file (mapped pages included)."""
    rows, columns = 8192, 4096
    if form == "gguf":
        file = tmp_path / "x.gguf"
        file.write_bytes(one_tensor((columns, rows), data=bytes(rows * columns // 32 * 18)))
    elif form == "nf4":  # blocks cross rows
        file, columns = tmp_path / "model.safetensors", 4080
        count = rows * columns
        state = bitsandbytes.State4bit(
            torch.zeros(count // 2, dtype=torch.uint8), torch.ones(count // 64), "nf4", 64, (rows, columns)
        )
        file.write_bytes(save({f"weight.{k}".removesuffix(".weight"): v for k, v in state.tensors().items()}))
    else:
        file = tmp_path / "model.safetensors"
        weight = QuantizedWeight(
            (rows, columns), 4, 64, torch.zeros(rows, columns // 2, dtype=torch.uint8), torch.ones(rows, 64).half(),
            zeros=torch.ones(rows, 64, dtype=torch.uint8),
        )  # fmt: skip
        file.write_bytes(save({f"m.{name}": tensor for name, tensor in awq.write(weight).items()}))
        (tmp_path / "config.json").write_text(json.dumps(configured(**awq.configuration(weight))))
    result = subprocess.run([sys.executable, "-c", MEMORY, str(file)], capture_output=True, text=True, check=True)
    peak, held = map(int, result.stdout.split())
    assert held > 0.9 * file.stat().st_size
    assert peak <= 64 * 2**20 + 2 * file.stat().st_size
