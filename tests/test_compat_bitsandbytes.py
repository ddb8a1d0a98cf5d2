"""bitsandbytes' interface: bits that the library itself computed, its states, its layers, and standing in for it."""

import copy
import gc
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import textwrap
import weakref
from functools import partial

import pytest
import torch

import metate
from metate import compat
from metate.compat import bitsandbytes as bnb
from metate.quant import bitsandbytes as form

F = bnb.functional
A = (((torch.arange(33 * 130) * 7919) % 2003 - 1001) / 256).view(33, 130)
# Of bitsandbytes 0.50.2 on a CPU, for A.
DIGESTS = {
    ("nf4", False): ("6488bb670c593907", "307b5b030efe141e"), ("nf4", True): ("58b1e0b30e1c4e88", "9cb25d5508f9968e"),
    ("fp4", False): ("2c5a53c7436012d2", "6fe68c2dbbaf124e"), ("fp4", True): ("079827181e3bf605", "a33b18d337a395ec"),
    64: ("012b7dadf5e13b43", "6b7453833c3ca6b3"), 4096: ("c13452158e767576", "0fd442c91d735539"),
    0.0: "64222c7571e534a7", 3.9: "09c111ced97d5b37",
}  # fmt: skip


def digest(*tensors):
    data = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors if t is not None)
    return hashlib.sha256(data).hexdigest()[:16]


def stored(state):
    nested = [] if state.state2 is None else [state.offset.view(1), state.state2.absmax]
    return [state.absmax, *nested]


# Functions.


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_4_bit_blocks_have_the_library_s_bits(kind, nested):
    packed, state = F.quantize_4bit(A, quant_type=kind, compress_statistics=nested)
    dense = F.dequantize_4bit(packed, state)
    assert (digest(packed, *stored(state)), digest(dense)) == DIGESTS[kind, nested]
    named, _ = {"nf4": F.quantize_nf4, "fp4": F.quantize_fp4}[kind](A, compress_statistics=nested)
    assert torch.equal(named, packed)


@pytest.mark.parametrize("block_size", [64, 4096])
def test_8_bit_blocks_have_the_library_s_bits(block_size):
    index, state = F.quantize_blockwise(A, blocksize=block_size)
    dense = F.dequantize_blockwise(index, state)
    assert (digest(index, state.absmax), digest(dense)) == DIGESTS[block_size]
    assert torch.equal(F.dequantize_blockwise(index, absmax=state.absmax, blocksize=block_size), dense)
    nested, state = F.quantize_blockwise(A, blocksize=block_size, nested=True)
    assert torch.equal(nested, index) and state.absmax.dtype == torch.uint8
    assert (F.dequantize_blockwise(nested, state) - dense).abs().max() < 0.1


@pytest.mark.parametrize("threshold", [0.0, 3.9])
def test_int8_rows_have_the_library_s_bits(threshold):
    rows, stats, outliers = F.int8_vectorwise_quant(A.half(), threshold)
    assert digest(rows, stats, outliers) == DIGESTS[threshold]
    kept = torch.ones(130, dtype=torch.bool)
    if outliers is not None:
        kept[outliers] = False
    error = F.int8_vectorwise_dequant(rows, stats) - A
    assert error[:, kept].abs().max() <= stats.max() / 127 * 0.51


@pytest.mark.parametrize("shape", [(64, 128), (33, 65), (7,), (3, 4, 5), (5, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_any_shape_comes_back(shape, dtype, storage):
    dense = torch.randn(shape).to(dtype)
    packed, state = F.quantize_4bit(dense, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage and packed.shape[1:] == (1,)
    back = F.dequantize_4bit(packed, state)
    assert back.shape == dense.shape and back.dtype == dtype
    expected = form.quantize_4bit(dense.reshape(1, -1), "nf4").lower().dequantize(dtype)
    assert torch.equal(back.flatten(), expected.flatten())
    given = torch.empty_like(dense)
    F.dequantize_4bit(packed, absmax=state.absmax, out=given, quant_type="nf4")
    assert torch.equal(given, back)
    if len(shape) == 2:
        assert torch.equal(F.dequantize_4bit(packed.t(), state), back.t())


@pytest.mark.parametrize("shape", [(64, 128), (33, 65), (24, 200)])
@pytest.mark.parametrize("nested", [False, True])
def test_products_are_those_of_the_dequantised_weight(shape, nested):
    packed, state = F.quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=nested)
    dense = F.dequantize_4bit(packed, state).double()
    x = torch.randn(2, 3, shape[1], requires_grad=True)
    bias = torch.randn(shape[0], requires_grad=True)
    out = bnb.matmul_4bit(x, packed.t(), state, bias=bias)
    wide = x.detach().double().requires_grad_()
    truth = wide @ dense.T + bias.detach().double()
    grad = torch.randn_like(out)
    out.backward(grad)
    truth.backward(grad.double())
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))
    row = torch.randn(1, shape[1])
    given = torch.empty(1, shape[0])
    assert F.gemv_4bit(row, packed, given, state=state) is given
    assert torch.equal(given, metate.quant_linear(row, state.lower(packed)))


def test_whole_bytes_are_computed_from_as_they_are():
    packed, state = F.quantize_4bit(torch.randn(8, 128), quant_type="fp4")
    assert state.lower(packed).codes.data_ptr() == packed.data_ptr()
    other, _ = F.quantize_4bit(torch.randn(8, 128), quant_type="fp4")
    assert torch.equal(state.lower(other).codes.flatten(), other.flatten()), "kept the weight of another"


@pytest.mark.parametrize("columns", [33, 48, 128])
def test_a_weight_written_over_is_seen(columns):
    """Blocks that cross rows, and odd rows, are copied as they are lowered."""
    weight = torch.randn(8, columns)
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    state.lower(packed)
    packed.copy_(packed.flip(0))
    assert torch.equal(state.lower(packed).dequantize(), F.dequantize_4bit(packed, state))
    with torch.inference_mode():
        packed, state = F.quantize_4bit(weight, quant_type="nf4")
        assert torch.equal(state.lower(packed).dequantize(), F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [False, True])
def test_states_are_those_of_checkpoints(nested):
    weight = torch.randn(16, 64)
    packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    tensors = {"weight": packed, **state.as_dict(packed=True)}
    expected = form.quantize_4bit(weight, "nf4", nested=nested).tensors()
    assert tensors.keys() == expected.keys()
    mark = form.STATE + "nf4"
    for name in tensors:
        if name == mark:
            assert json.loads(bytes(tensors[name])) == json.loads(bytes(expected[name]))
        else:
            assert torch.equal(tensors[name], expected[name])
    del expected["weight"]
    assert F.QuantState.from_dict(expected, "cpu") == state
    assert F.QuantState.from_dict(state.as_dict(), "cpu") == state
    assert state[1] == weight.shape and state[3] == 64 and (state[4] is not None) == nested
    assert F.QuantState.from_dict({**expected, "absmax": expected["absmax"] + 1}, "cpu") != state


@pytest.mark.parametrize("changes", [
    {"dtype": "compile"}, {"dtype": 3}, {"blocksize": 0}, {"blocksize": "64"}, {"quant_type": "nf5"},
    {"shape": [4, -1]}, {"shape": None}, {"shape": 64}, {"nested_offset": "NaN"}, {"nested_blocksize": 0},
])  # fmt: skip
def test_hostile_states_are_refused(changes):
    _, state = F.quantize_4bit(torch.randn(16, 64), compress_statistics=True)
    with pytest.raises(metate.FormatError, match=next(iter(changes))):
        F.QuantState.from_dict({**state.as_dict(), **changes}, "cpu")


@pytest.mark.parametrize("name", ["absmax", "quant_map", "dtype"])
def test_states_that_lack_an_entry_are_refused(name):
    _, state = F.quantize_4bit(torch.randn(16, 64))
    given = state.as_dict()
    del given[name]
    with pytest.raises(metate.FormatError, match=f"{name} is missing"):
        F.QuantState.from_dict(given, "cpu")


@pytest.mark.parametrize("nested", [False, True])
def test_states_of_8_bits_come_back(nested):
    index, state = F.quantize_blockwise(torch.randn(40, 30), blocksize=16, nested=nested)
    again = F.QuantState.from_dict(state.as_dict(), "cpu")
    assert again == state
    assert torch.equal(F.dequantize_blockwise(index, again), F.dequantize_blockwise(index, state))


def test_a_weight_of_columns_is_unpacked():
    x, bias = torch.randn(5, 64, requires_grad=True), torch.randn(96)
    packed, state = F.quantize_4bit(torch.randn(64, 96), quant_type="nf4")
    with pytest.warns(DeprecationWarning, match="out_features, in_features"):
        out = bnb.matmul_4bit(x, packed, state, bias=bias)
    torch.testing.assert_close(out, x @ F.dequantize_4bit(packed, state) + bias, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_named():
    for call, match in [
        (lambda: F.quantize_4bit(A.double()), "A is float64"),
        (lambda: F.quantize_4bit(A, quant_type="int4"), "quant_type is 'int4'"),
        (lambda: F.quantize_4bit(A, blocksize=48), "block_size is 48"),
        (lambda: F.quantize_blockwise(A, blocksize=0), "blocksize is 0"),
        (lambda: F.dequantize_blockwise(A), "A is float32"),
        (lambda: F.gemv_4bit(A, A), "state is None"),
        (lambda: F.dequantize_4bit(A), "quant_state is None"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()


# Layers.


def dense_of(layer):
    if isinstance(layer, bnb.nn.Linear4bit):
        return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    return F.int8_vectorwise_dequant(layer.weight.data, layer.state.SCB).double()


LAYERS = {
    "nf4": lambda: bnb.nn.LinearNF4(64, 24),
    "fp4": lambda: bnb.nn.LinearFP4(64, 24, bias=False, compress_statistics=False),
    "storage": lambda: bnb.nn.Linear4bit(64, 24, quant_type="nf4", quant_storage=torch.bfloat16),
    "int8": lambda: bnb.nn.Linear8bitLt(64, 24, has_fp16_weights=False, threshold=6.0),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)


@KINDS
def test_layers_are_quantised_by_their_first_move(kind):
    layer = LAYERS[kind]()
    original = layer.weight.detach().clone()
    x = torch.randn(3, 5, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"not quantised yet, call \.to\(device\)"):
        layer(x)
    assert layer.to("cpu") is layer
    dense = dense_of(layer)
    assert 0 < (dense - original).norm() < 0.2 * original.norm()
    packed = layer.weight.data_ptr()
    assert layer.to("cpu").to(torch.bfloat16).float().weight.data_ptr() == packed
    out = layer(x)
    bias = 0 if layer.bias is None else layer.bias.double()
    torch.testing.assert_close(out.double(), x.double() @ dense.T + bias, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(grad.double(), torch.ones(3, 5, 24).double() @ dense, rtol=1e-4, atol=1e-5)
    assert not layer.weight.requires_grad


@KINDS
def test_states_of_layers_come_back(kind):
    layer, fresh, moved = (LAYERS[kind]() for _ in range(3))
    state = copy.deepcopy(layer.state_dict())
    moved.load_state_dict(state)  # dense into dense
    assert torch.equal(moved.weight, layer.weight)
    layer.to("cpu")
    moved.to("cpu")
    state = layer.state_dict()
    extra = {"SCB", "weight_format"} if kind == "int8" else {"weight.absmax", "weight.quant_map"}
    assert extra < state.keys()
    for other in (fresh, moved):
        assert not other.load_state_dict(state).unexpected_keys
        x = torch.randn(4, 64)
        assert torch.equal(other(x), layer(x))
        other.weight.data.zero_()
    assert layer.weight.data.any(), "shares memory with the state it was loaded from"
    broken = {name: tensor for name, tensor in state.items() if name not in ("weight.absmax", "SCB")}
    with pytest.raises((RuntimeError, KeyError)):
        LAYERS[kind]().load_state_dict(broken)


@KINDS
def test_copies_keep_what_a_weight_is(kind, tmp_path):
    layer = LAYERS[kind]().to("cpu")
    x = torch.randn(2, 64)
    expected = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    for other in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert type(other.weight) is type(layer.weight)
        assert torch.equal(other(x), expected)
        other.weight.data.zero_()
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_layers_are_packed_once_by_their_first_call(storage, tmp_path):
    layer = bnb.nn.Linear4bit(128, 48, bias=False, quant_type="nf4", quant_storage=storage).to("cpu")
    rows, x = layer.weight.data, torch.randn(3, 128)
    kept = rows.clone()
    expected = layer(x)
    assert layer.weight.data_ptr() == rows.data_ptr(), "packed in training"
    layer.eval()
    assert torch.equal(layer(x), expected)
    tiles = layer.weight.data_ptr()
    assert layer.weight.dtype == storage and layer.weight.nbytes == rows.nbytes and tiles != rows.data_ptr()
    alive = weakref.ref(rows)
    del rows
    gc.collect()
    assert alive() is None, "keeps the rows beside the tiles"
    layer(x)
    assert layer.weight.data_ptr() == tiles == layer.weight.quant_state.lower(layer.weight).codes.data_ptr()
    # Whoever reads the weight of a layer reads it in tiles too.
    state = layer.weight.quant_state
    assert torch.equal(F.dequantize_4bit(layer.weight.data, state), F.dequantize_4bit(kept, state))
    for call in (partial(F.gemv_4bit, state=state), partial(bnb.matmul_4bit, quant_state=state)):
        assert torch.equal(call(x, layer.weight), expected)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, F.dequantize_4bit(kept, state).sum(0).expand(3, 128), rtol=1e-4, atol=1e-5)
    # What leaves it are rows.
    for unpacked in (F.unpack_tiles(layer.weight.data), layer.state_dict()["weight"]):
        assert torch.equal(unpacked.view(torch.uint8), kept.view(torch.uint8))
    torch.save(layer, tmp_path / "layer.pt")
    fresh = bnb.nn.LinearNF4(128, 48, bias=False, quant_storage=storage)
    fresh.load_state_dict(layer.state_dict())
    layer.load_state_dict(fresh.state_dict())
    for other in (layer, fresh, copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert torch.equal(other(x), expected)


def test_weights_that_make_no_tiles_stay_rows():
    for columns, rows in ((128, 24), (96, 48), (33, 16)):
        layer = bnb.nn.LinearNF4(columns, rows).to("cpu").eval()
        packed = layer.weight.data_ptr()
        layer(torch.randn(2, columns))
        assert layer.weight.data_ptr() == packed


def test_computes_in_the_dtype_asked_for():
    layer = bnb.nn.LinearNF4(64, 8, compute_dtype=torch.bfloat16).to("cpu")
    x = torch.randn(3, 64)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())


def test_floating_weights_train():
    layer = bnb.nn.Linear8bitLt(16, 4).to("cpu")
    x = torch.randn(3, 16)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, 16))


@pytest.mark.parametrize("shape", [(64, 24), (33, 7)])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_compile_before_their_first_call(kind, shape):
    layer = {"nf4": bnb.nn.LinearNF4, "int8": partial(bnb.nn.Linear8bitLt, has_fp16_weights=False)}[kind](*shape)
    layer.to("cpu")
    x = torch.randn(3, shape[0])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x), layer(x))
    other = type(layer)(*shape) if kind == "nf4" else type(layer)(*shape, has_fp16_weights=False)
    layer.load_state_dict(other.to("cpu").state_dict())
    assert torch.equal(compiled(x), other(x)), "kept the weight that it was compiled with"


@pytest.mark.parametrize("nested", [False, True])
def test_fsdp_finds_what_it_looks_for(nested):
    layer = bnb.nn.LinearNF4(64, 24, compress_statistics=nested)
    assert not hasattr(layer.weight, "absmax")
    layer.to("cpu")
    for name, tensor in layer.weight.quant_state.as_dict(packed=True).items():
        found = layer.weight
        for part in name.split("."):
            found = getattr(found, part)
        assert torch.equal(found, tensor)
    assert not hasattr(layer.weight.quant_state, "bitsandbytes__fp4")


@pytest.mark.parametrize("quantised", [False, True])
def test_parts_of_a_weight_keep_what_is_known_of_it(quantised):
    """FSDP2 cuts parameters with these."""
    whole = bnb.nn.Params4bit(torch.randn(8, 64), quant_type="nf4", blocksize=32, requires_grad=False)
    whole = whole.to("cpu") if quantised else whole
    for parts in (torch.chunk(whole, 2), torch.split(whole, whole.shape[0] // 2, dim=0)):
        assert torch.equal(torch.cat([part.data for part in parts]), whole.data)
        for part in parts:
            assert type(part) is bnb.nn.Params4bit and not part.requires_grad
            assert (part.quant_type, part.blocksize, part.bnb_quantized) == ("nf4", 32, quantised)
            assert part.quant_state is whole.quant_state


def test_a_weight_tied_to_another_layer_s_stays_dense():
    layer = bnb.nn.Linear8bitLt(8, 4, bias=False, has_fp16_weights=False)
    layer.weight = torch.nn.Parameter(torch.randn(4, 8))
    state = layer.state_dict()
    assert state.keys() == {"weight"}
    with pytest.raises(RuntimeError, match="non-quantized Linear8bitLt"):
        layer.load_state_dict({**state, "SCB": torch.ones(4)}, strict=False)


def test_parameters_from_a_checkpoint():
    made = form.quantize_4bit(torch.randn(24, 64), "nf4", nested=True)
    tensors = made.tensors()
    data = tensors.pop("weight")
    layer = bnb.nn.Linear4bit(64, 24, bias=False, device="meta")
    layer.weight = bnb.nn.Params4bit.from_prequantized(data, tensors, device="cpu", module=layer)
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer(x), metate.quant_linear(x, made.lower()), rtol=1e-5, atol=1e-6)


# Codebooks, integer products, optimizers.


def test_codebooks_have_the_library_s_bits():
    made = [
        F.create_dynamic_map(False), F.create_dynamic_map(True, 5), F.create_dynamic_map(True, 3, 6),
        F.create_linear_map(), F.create_linear_map(False, 5), F.create_fp8_map(), F.create_fp8_map(False, 5, 3),
        F.create_fp8_map(True, 2, 1, 4),
    ]  # fmt: skip
    assert all(table.shape == (256,) for table in made)
    assert digest(*made) == "4ac226d668090593"
    quantiles = F.create_normal_map()
    torch.testing.assert_close(quantiles[quantiles != 0], form.codebook("nf4")[form.codebook("nf4") != 0])
    assert torch.equal(F.create_normal_map(use_extra_value=False), -F.create_normal_map(use_extra_value=False).flip(0))
    with pytest.raises(ValueError, match="total_bits"):
        F.create_fp8_map(True, 5, 3)


def test_integer_products():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator) for shape in ((2, 3, 300), (9, 300)))
    product = F.int8_linear_matmul(a, b)
    assert product.dtype == torch.int32 and torch.equal(product.long(), a.long() @ b.long().T)
    x, w = torch.randn(6, 300, generator=generator), torch.randn(9, 300, generator=generator)
    (xi, xs, _), (wi, ws, _) = F.int8_vectorwise_quant(x.half()), F.int8_vectorwise_quant(w.half())
    y = F.int8_mm_dequant(F.int8_linear_matmul(xi, wi), xs, ws, bias=torch.ones(9))
    assert y.dtype == torch.float16
    truth = x @ w.T + 1
    assert 0 < (y - truth).norm() < 0.02 * truth.norm()


# Of bitsandbytes 0.50.2 on a CPU: codes of the first state, and three parameters, after five steps.
STEPS = {
    "AdamW8bit": ({}, "aaf73fc8dfa2111e", [-3.904953956604004, 0.5421088933944702, -1.7347766160964966]),
    "PagedAdamW8bit": ({}, "aaf73fc8dfa2111e", [-3.904953956604004, 0.5421088933944702, -1.7347766160964966]),
    "Lion8bit": (
        {"weight_decay": 0.125},
        "2c4ec8aae99ba7a0",
        [-3.909412384033203, 0.5463406443595886, -1.7308603525161743],
    ),
    "SGD8bit": (
        {"lr": 0.0625, "momentum": 0.5},
        "90706b8e237c890b",
        [-3.211130380630493, 0.43887120485305786, -1.809545636177063],
    ),
    "RMSprop8bit": ({}, "069d2c4990b7984c", [-3.5848045349121094, 0.11405588686466217, -1.9288043975830078]),
    "Adagrad8bit": ({}, "611c5f04f18214fd", [-3.877699613571167, 0.5036851763725281, -1.7502466440200806]),
}


@pytest.mark.parametrize("name", STEPS)
def test_optimizers_step_as_the_library_s(name):
    options, codes, expected = STEPS[name]
    small, parameter = torch.nn.Parameter(A[:2].clone()), torch.nn.Parameter(A.clone())
    optimizer = getattr(bnb.optim, name)([parameter, small], **options)
    for step in range(5):
        if step == 3:  # goes on from a file
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = getattr(bnb.optim, name)([parameter, small], **options)
            optimizer.load_state_dict(state)
        for p, grads in ((parameter, A), (small, A[:2])):
            p.grad = grads.roll(step + 1, 0) * grads.roll(step, 1) / 8
        optimizer.step()
    torch.testing.assert_close(parameter.flatten()[[0, 1000, 4000]], torch.tensor(expected), rtol=1e-6, atol=0)
    assert digest(optimizer.state[parameter]["state1"]) == codes
    assert optimizer.state[small]["state1"].dtype == torch.float32, "few elements keep 32 bits"


def test_parameters_with_settings_of_their_own():
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    embedding, linear = bnb.nn.StableEmbedding(70, 64), torch.nn.Linear(64, 70)
    optimizer = bnb.optim.Adam8bit([*embedding.parameters(), *linear.parameters()], lr=0.01)
    manager.override_config(linear.weight, "lr", 0.0)
    before = linear.weight.detach().clone()
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(linear(embedding(torch.arange(70))), torch.arange(70))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(linear.weight, before)
    assert optimizer.state[embedding.weight]["state1"].dtype == torch.float32
    assert optimizer.state[linear.weight]["state1"].dtype == torch.uint8
    manager.initialize()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: bnb.optim.AdamW8bit(p, lr=-1), "lr is -1"),
        (lambda p: bnb.optim.AdamW(p, betas=(0.9, 1.0)), "betas"),
        (lambda p: bnb.optim.AdamW(p, optim_bits=4), "optim_bits is 4"),
        (lambda p: bnb.optim.Adam8bit(p, amsgrad=True), "amsgrad"),
        (lambda p: bnb.optim.SGD(p, 0.1), "momentum"),
        (lambda p: bnb.optim.RMSprop(p, centered=True), "centered"),
        (lambda p: bnb.optim.Adagrad(p, lr_decay=0.1), "lr_decay"),
    ],
)
def test_what_optimizers_do_not_have_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make([torch.nn.Parameter(torch.zeros(2))])


# Standing in.


def test_stands_in_for_the_library():
    compat.install("bitsandbytes", force=True)
    try:
        import bitsandbytes
        from bitsandbytes.nn.modules import Params4bit

        assert bitsandbytes is bnb
        assert Params4bit is bnb.nn.Params4bit
        assert importlib.metadata.version("bitsandbytes") == bnb.__version__
    finally:
        compat.uninstall("bitsandbytes")
    assert "bitsandbytes" not in sys.modules


def test_transformers_own_route_runs_on_it(tmp_path):
    """transformers and accelerate look for the package as they are imported: a process of its own."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    script = textwrap.dedent(f"""
        from metate import compat
        compat.install("bitsandbytes")
        import torch, transformers as hf
        model = hf.LlamaForCausalLM(hf.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        )).float()
        model.save_pretrained({str(tmp_path)!r})
        for options in ({{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, {{"load_in_8bit": True}}):
            config = hf.BitsAndBytesConfig(**options)
            loaded = hf.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, quantization_config=config)
            kind = "Linear4bit" if "load_in_4bit" in options else "Linear8bitLt"
            assert type(loaded.model.layers[0].mlp.up_proj).__name__ == kind
            tokens = torch.arange(2, 12)[None]
            got, want = loaded(tokens).logits, model(tokens).logits
            assert (got.float() - want).norm() < 0.3 * want.norm()
            loaded.save_pretrained({str(tmp_path / "again")!r})
            again = hf.AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r})
            assert torch.equal(again(tokens).logits, got)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
