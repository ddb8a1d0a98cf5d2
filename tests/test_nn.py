"""QuantLinear, LoraLinear and quantize_model: values, gradients, states, and life as a module."""

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

import metate
from metate import quantize_model
from metate.nn import LoraLinear, QuantLinear, dequantize_model
from metate.quant import load_quantized, quantize_hqq, quantize_nf4, quantize_rtn, requantize, save_quantized

N, K = 24, 40


def weights():
    """One weight for every set of tensors that a format has."""
    torch.manual_seed(0)
    dense = torch.randn(N, K)
    integers = quantize_rtn(dense, group_size=8, symmetric=False)
    return {
        "nf4": quantize_nf4(dense),
        "int4": quantize_rtn(dense, group_size=16),
        "int3 with zeros": quantize_rtn(dense, 3, 8, symmetric=False),
        "hqq": quantize_hqq(dense, group_size=8),
        "permuted": dataclasses.replace(integers, permutation=torch.randperm(K).int()),
        "two levels": metate.QuantizedWeight(
            (N, K), 4, 8, integers.codes, torch.randint(-60, 60, (N, 5), dtype=torch.int8), torch.rand(N, 3), 2, zero=8
        ),
    }


WEIGHTS = weights()
FORMATS = pytest.mark.parametrize("name", WEIGHTS)


def near(got, want):
    return (got.double() - want).norm() <= 2e-6 * want.norm()


def layer(name="nf4", bias=True):
    return QuantLinear(WEIGHTS[name], nn.Parameter(torch.linspace(-1, 1, N)) if bias else None)


@FORMATS
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_linear_layer_of_its_dequantised_weight(name, bias):
    module = layer(name, bias)
    dense = nn.Linear(K, N, bias).double()
    dense.weight.data.copy_(module.dequantize())
    if bias:
        dense.bias.data.copy_(module.bias)
    x = torch.randn(2, 3, K, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    out, truth = module(x), dense(wide)
    assert out.shape == (2, 3, N)
    assert near(out, truth)
    grad = torch.randn_like(out)
    out.backward(grad)
    truth.backward(grad.double())
    assert near(x.grad, wide.grad)
    if bias:
        assert near(module.bias.grad, dense.bias.grad)
    assert (module.weight.device, module.weight.dtype) == (x.device, torch.uint8)
    assert [p.shape for p in module.parameters()] == ([torch.Size([N])] if bias else [])


@FORMATS
def test_states_come_back_into_a_layer_of_another_format(name):
    x = torch.randn(3, K)
    module = layer(name)
    for other in WEIGHTS:
        for assign in (False, True):
            taken = layer(other)
            taken.bias.data.zero_()
            taken(x)
            taken.load_state_dict(module.state_dict(), assign=assign)
            assert torch.equal(taken(x), module(x))
            assert taken.state_dict().keys() == module.state_dict().keys()
            assert (taken.codes.data_ptr() == module.codes.data_ptr()) == assign


def test_states_that_do_not_fit_are_refused():
    module = layer()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    smaller = QuantLinear(quantize_nf4(torch.randn(N, 32))).state_dict()
    with pytest.raises(RuntimeError, match=r"state is QuantizedWeight\(24 × 32 .* expected of shape \(24, 40\)"):
        module.load_state_dict({**before, **smaller})
    with pytest.raises(RuntimeError, match="scales is shape"):
        module.load_state_dict({**before, "scales": torch.ones(N, 3)})
    with pytest.raises(RuntimeError, match=r"Missing key.*quantized_weight"):
        module.load_state_dict({"bias": before["bias"]})
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@FORMATS
def test_a_state_is_a_checkpoint(name, tmp_path):
    from safetensors.torch import save_file

    model = nn.Sequential(layer(name), nn.ReLU(), nn.Linear(N, 4))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = load_quantized(tmp_path)
    assert torch.equal(found["0"].dequantize(), model[0].dequantize())
    assert torch.equal(found["2.weight"], model[2].weight)
    save_quantized(tmp_path / "again", {"0": found["0"]})
    again = QuantLinear(load_quantized(tmp_path / "again")["0"], model[0].bias)
    assert torch.equal(again(torch.ones(1, K)), model[0](torch.ones(1, K)))


def test_transformers_saves_a_quantised_model(tmp_path):
    """Though its layers have one codebook."""
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model, other = (quantize_model(hf.LlamaForCausalLM(config).eval(), "nf4", skip=["lm_head"]) for _ in range(2))
    model.save_pretrained(tmp_path)
    found = load_quantized(tmp_path)
    part = "model.layers.1.mlp.down_proj"
    assert torch.equal(found[part].dequantize(), model.get_submodule(part).dequantize())
    from safetensors.torch import load_file

    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(other(tokens).logits, model(tokens).logits)


@FORMATS
def test_copies_and_pickles_are_their_own(name):
    module = layer(name).eval()
    x = torch.randn(2, K)
    expected = module(x)
    pickled = io.BytesIO()
    torch.save(module, pickled)
    pickled.seek(0)
    for other in (copy.deepcopy(module), torch.load(pickled, weights_only=False)):
        assert torch.equal(other(x), expected)
        assert not other.training
        assert other.weight.codes is other.codes, "two copies of the weight"
        other.scales.zero_()
        if other.bias is not None:
            other.bias.data.zero_()
        assert torch.equal(module(x), expected)


@FORMATS
def test_dtype_changes_reach_the_bias_alone(name):
    module = layer(name)
    dense, codes = module.dequantize(), module.codes
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        module.to(dtype)
        assert module.bias.dtype == dtype
        assert torch.equal(module.dequantize(), dense)
        assert module(torch.randn(2, K, dtype=dtype)).dtype == dtype
    assert module.codes is codes, "copied though nothing changed"


@FORMATS
def test_meta_device_and_back(name):
    module = layer(name)
    x = torch.randn(2, K)
    expected, state = module(x), module.state_dict()
    module.to("meta")
    assert module.weight.device.type == "meta" and all(t.is_meta for t in module.buffers())
    assert module(x.to("meta")).shape == (2, N)
    module.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module(x), expected)
    skeleton = layer(name).to("meta")
    skeleton.load_state_dict(state, assign=True)
    assert torch.equal(skeleton(x), expected)


def test_buffers_put_in_place_by_others_count():
    module, other = layer("int4"), QuantLinear(quantize_rtn(torch.randn(N, K), group_size=16))
    x = torch.randn(2, K)
    module(x)
    before = module(x)
    buffers = dict(other.named_buffers())
    out = torch.func.functional_call(module, buffers, (x,))
    assert torch.equal(out, metate.quant_linear(x, other.weight, module.bias))
    assert torch.equal(module(x), before)
    module._buffers.update(buffers)
    assert torch.equal(module(x), out)


def test_compiles_whole():
    module = nn.Sequential(layer("nf4"), nn.ReLU(), LoraLinear(QuantLinear(quantize_nf4(torch.randn(8, N))), 2))
    x = torch.randn(3, K)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))


def test_int8_activations_are_asked_for():
    weight, x = WEIGHTS["int4"], torch.randn(3, K)
    rounded = QuantLinear(weight, activation="int8")(x)
    assert torch.equal(rounded, metate.quant_linear(x, weight, activation="int8"))
    assert not torch.equal(rounded, QuantLinear(weight)(x))


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"QuantLinear: weight is Tensor"):
        QuantLinear(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"QuantLinear: bias is of shape \(3,\), expected \(24,\)"):
        QuantLinear(WEIGHTS["nf4"], torch.ones(3))
    with pytest.raises(ValueError, match="method is 'int5'"):
        QuantLinear.from_linear(nn.Linear(2, 2), "int5")
    with pytest.raises(NotImplementedError, match="from_linear"):
        layer().reset_parameters()


# LoraLinear.


def trained(adapters=3, r=4, **options):
    torch.manual_seed(1)
    lora = LoraLinear(layer(), r, alpha=6, adapters=adapters, **options)
    nn.init.normal_(lora.lora_B)
    return lora


def dense_of(lora, adapter):
    return lora.base.dequantize().double() + 6 / lora.r * lora.lora_B[adapter].double() @ lora.lora_A[adapter].double()


def test_begins_as_its_base_and_trains_only_the_update():
    base = layer()
    lora = LoraLinear(base, 8)
    x = torch.randn(5, K)
    assert torch.equal(lora(x), base(x))
    assert {name for name, p in lora.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    target = torch.randn(5, N)
    optimizer = torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(150):
        loss = (lora(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert base.bias.grad is None


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", [(6, K), (6, 2, K)])
def test_adapters_of_a_batch(shape, dense):
    """On a low-bit base in one pass, on a dense one beside it."""
    lora = trained()
    if dense:
        base = nn.Linear(K, N)
        base.weight.data.copy_(lora.base.dequantize())
        base.bias.data.copy_(lora.base.bias)
        lora, low_bit = LoraLinear(base, 4, alpha=6, adapters=3), lora
        lora.load_state_dict({n: t for n, t in low_bit.state_dict().items() if "lora" in n}, strict=False)
    chosen = torch.tensor([2, -1, 0, 2, 0, -1])  # adapter 1 unused
    x = torch.randn(shape, requires_grad=True)
    out = lora(x, chosen)
    grad = torch.randn_like(out)
    out.backward(grad)
    wide = [t.detach().double().requires_grad_() for t in (x, lora.lora_A, lora.lora_B)]
    base = (lora.base.weight if dense else lora.base.dequantize()).double()
    truth = torch.stack([
        entry @ (base if a < 0 else base + 6 / 4 * wide[2][a] @ wide[1][a]).T + lora.base.bias.double()
        for entry, a in zip(wide[0], chosen.tolist(), strict=True)
    ])  # fmt: skip
    truth.backward(grad.double())
    assert near(out, truth)
    for ours, theirs in zip((x, lora.lora_A, lora.lora_B), wide, strict=True):
        assert near(ours.grad, theirs.grad)
    assert not lora.lora_A.grad[1].any()


def test_one_adapter_for_all_and_where_it_is_set():
    lora, x = trained(), torch.randn(4, K)
    for adapter in range(3):
        truth = x.double() @ dense_of(lora, adapter).T + lora.base.bias.double()
        assert near(lora(x, adapter), truth)
    lora.adapter = 2
    assert torch.equal(lora(x), lora(x, 2))
    lora.adapter = torch.tensor([0, 0, 1, 1])
    assert near(lora(x)[2:], lora(x[2:], 1).double())
    assert torch.equal(lora(x, -1), lora.base(x))
    assert lora(x[:0], torch.tensor([], dtype=torch.long)).shape == (0, N)


def test_low_precision_inputs_and_dropout():
    lora = trained(dropout=0.5)
    x = torch.ones(2, K, dtype=torch.bfloat16)
    lora.base.to(torch.bfloat16)
    assert lora(x).dtype == torch.bfloat16
    assert not torch.equal(lora(x), lora(x))
    lora.eval()
    assert torch.equal(lora(x), lora(x))


def test_lora_refuses_what_is_wrong():
    lora, x = trained(), torch.randn(2, K)
    for adapter in (3, -2, torch.tensor([0, 3]), torch.tensor([-2, 0])):
        with pytest.raises(ValueError, match=r"adapter(_ids)? is -?[23].*, expected 0 to 2, or -1"):
            lora(x, adapter)
    for adapter in ([0, 1], "a", 0.5):
        with pytest.raises(ValueError, match=r"adapter is .*, expected 0 to 2, or -1 for none; several as a tensor"):
            lora(x, adapter)
    for adapter in (torch.tensor([0]), torch.tensor([[0, 1]]), torch.tensor(0)):
        with pytest.raises(ValueError, match=r"adapter_ids is of shape .* expected \(2,\)"):
            lora(x, adapter)
    with pytest.raises(TypeError, match=r"adapter_ids is float32, expected a tensor of integers"):
        lora(x, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="r is 0"):
        LoraLinear(layer(), 0)
    with pytest.raises(TypeError, match="base is ReLU"):
        LoraLinear(nn.ReLU(), 2)


# quantize_model.


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.shared = self.blocks[0][0]
        self.tied = nn.Linear(32, 50, bias=False)
        self.tied.weight = self.embed.weight
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.shared(x)[..., :32]), self.tied(x)


@pytest.mark.parametrize("method,loss", [
    ("nf4", 0.2), ("fp4", 0.3), ("int4", 0.25), ("int8", 0.02), ("hqq", 0.2), ("fp8", 0.06),
])  # fmt: skip
def test_quantises_what_it_should(method, loss):
    torch.manual_seed(0)
    model = Model()
    x = torch.randint(50, (2, 7))
    before = model(x)
    original = model.blocks[1][2]
    assert quantize_model(model.eval(), method, skip=["head"]) is model
    quantised = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert quantised == {"blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"}
    assert model.shared is model.blocks[0][0]
    assert model.tied.weight is model.embed.weight
    assert model.blocks[1][2].bias is original.bias
    assert not model.blocks[1][2].training
    own = QuantLinear.from_linear(original, method)
    assert torch.equal(own.dequantize(), model.blocks[1][2].dequantize())
    for got, want in zip(model(x), before, strict=True):
        assert 0 < (got - want).norm() / want.norm() < loss


def test_dequantises_what_was_quantised():
    model = quantize_model(Model().eval(), "int4")
    model.frozen = QuantLinear(WEIGHTS["nf4"], torch.ones(N))
    x, rows = torch.randint(50, (2, 7)), torch.randn(3, K)
    before, frozen = model(x), model.frozen(rows)
    assert dequantize_model(model) is model
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert model.shared is model.blocks[0][0] and not model.shared.training and model.shared.weight.requires_grad
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.frozen(rows), frozen, rtol=1e-4, atol=1e-5)
    assert not model.frozen.bias.requires_grad and model.head.bias.requires_grad
    assert dequantize_model(layer(), torch.bfloat16).weight.dtype == torch.bfloat16


def test_peft_merges_into_dense_layers():
    peft = pytest.importorskip("peft")
    model = quantize_model(nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 8)), "int4", group_size=8)
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    x = torch.randn(5, K)
    before = model(x)
    merged = dequantize_model(model).merge_and_unload()
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-5)


@pytest.fixture
def adapters():
    """PEFT, which knows low-bit layers."""
    peft = pytest.importorskip("peft")
    from metate.compat import peft as adapters

    adapters.enable()
    yield peft
    adapters.disable()


@FORMATS
def test_peft_merges_into_low_bits(name, adapters):
    torch.manual_seed(0)
    model = nn.Sequential(layer(name), nn.ReLU(), nn.Linear(N, 8))
    before = copy.deepcopy(model[0].state_dict())
    config = adapters.LoraConfig(r=4, lora_alpha=64, target_modules=["0", "2"], init_lora_weights=False)
    model = adapters.get_peft_model(model, config).eval()
    low_bit, x = model.base_model.model[0], torch.randn(5, K)
    plain, truth = (
        low_bit.base_layer.dequantize(),
        low_bit.base_layer.dequantize() + low_bit.get_delta_weight("default"),
    )
    adapted = low_bit(x)
    with pytest.warns(UserWarning, match=r"rounds their sum.*dequantize_model"):
        model.merge_adapter()
    assert type(low_bit.base_layer) is QuantLinear and low_bit.merged
    merged = low_bit.base_layer.dequantize()
    assert (merged - truth).norm() < (1.0 if name == "two levels" else 0.3) * (
        plain - truth
    ).norm()  # super scales stay
    assert torch.equal(merged, requantize(WEIGHTS[name], truth).dequantize())
    assert near(low_bit(x), nn.functional.linear(x.double(), merged.double(), low_bit.base_layer.bias.double()))
    model.unmerge_adapter()
    state = low_bit.base_layer.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items()), "to the bit"
    assert torch.equal(low_bit(x), adapted)
    with model.disable_adapter():
        assert torch.equal(low_bit(x), nn.Sequential(layer(name))(x))
    whole = model.merge_and_unload()
    assert type(whole[0]) is QuantLinear and torch.equal(whole[0].dequantize(), merged)


def test_peft_merges_several_adapters_and_their_biases(adapters):
    frozen = QuantLinear(WEIGHTS["int4"], torch.linspace(-1, 1, N, dtype=torch.bfloat16))
    config = adapters.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, lora_bias=True)
    model = adapters.get_peft_model(nn.Sequential(frozen, nn.Linear(N, 2)), config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    low_bit, weight, bias = model.base_model.model[0], frozen.dequantize(), frozen.bias.clone()
    shift = sum(low_bit.lora_B[name].bias * low_bit.scaling[name] for name in ("default", "second"))
    parts = [low_bit.get_delta_weight(name) for name in ("default", "second")]
    model.merge_adapter()
    assert low_bit.merged_adapters == ["default", "second"] and frozen.bias.dtype == torch.bfloat16
    assert torch.equal(frozen.dequantize(), requantize(WEIGHTS["int4"], weight + parts[0] + parts[1]).dequantize())
    torch.testing.assert_close(frozen.bias, (bias + shift).bfloat16(), rtol=1e-2, atol=1e-2)
    model.unmerge_adapter()
    assert torch.equal(frozen.dequantize(), weight) and not low_bit.merged
    nn.init.constant_(low_bit.lora_A["second"].weight, torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter()
    assert torch.equal(frozen.dequantize(), weight) and low_bit.merged_adapters == []
    assert not torch.isnan(frozen.bias).any()


def test_what_merging_needs_is_said():
    """Without the layers of metate.compat.peft."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(layer()), config)
    for safe in (False, True):
        with pytest.raises(AttributeError, match=r"compat\.peft\.enable\(\).*dequantize_model"):
            model.merge_and_unload(safe_merge=safe)
    assert not hasattr(WEIGHTS["nf4"], "data")


@FORMATS
def test_takes_another_weight(name):
    module, x = layer("nf4"), torch.randn(3, K)
    module.weight = WEIGHTS[name]
    assert torch.equal(module(x), layer(name)(x)) and module.state_dict().keys() == layer(name).state_dict().keys()
    with pytest.raises(TypeError, match=r"nn\.QuantLinear: weight is Tensor, expected a metate\.QuantizedWeight"):
        module.weight = torch.ones(N, K)
    with pytest.raises(ValueError, match="of shape"):
        module.weight = quantize_nf4(torch.ones(N, K + 1))


def test_options_reach_the_quantiser():
    model = quantize_model(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8)), "int4", group_size=16, symmetric=False)
    assert model[0].weight.group_size == 16 and model[0].weight.zeros is not None
    fitted = quantize_model(nn.Linear(64, 8), "hqq", bits=3, group_size=16).weight
    assert (fitted.bits, fitted.group_size) == (3, 16) and fitted.offsets is not None
    blocks = quantize_model(nn.Linear(64, 8), "fp8", block=(4, 32)).weight
    assert torch.equal(blocks.scales[:4], blocks.scales[:1].expand(4, 2)) and blocks.scales[0, 0] != blocks.scales[4, 0]
    alone = quantize_model(nn.Linear(64, 4), "nf4", block_size=32)
    assert isinstance(alone, QuantLinear) and alone.weight.group_size == 32


@pytest.mark.parametrize("skip,left", [
    (["blocks.0"], {"blocks.0.0", "blocks.0.2"}), (["blocks.*.2"], {"blocks.0.2", "blocks.1.2"}),
    ("blocks", {"blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"}),
])  # fmt: skip
def test_skip_names_modules_and_all_inside(skip, left):
    model = quantize_model(nn.ModuleDict({"blocks": Model().blocks, "head": nn.Linear(4, 4)}), skip=skip)
    assert {name for name, module in model.named_modules() if type(module) is nn.Linear} == left


def test_skip_that_fits_nothing_is_refused():
    model = Model()
    with pytest.raises(ValueError, match="skip is 'lm_haed', expected the name of a module of Model"):
        quantize_model(model, skip=["lm_haed"])
    with pytest.raises(ValueError, match="method is 'q4'"):
        quantize_model(model, "q4")
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_torch_s_own_encoder_layers_run():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 32)
    before = encoder(x)
    quantize_model(encoder, "int8")
    assert type(encoder.layers[0].linear1) is QuantLinear
    for context in (torch.inference_mode, torch.enable_grad):
        with context():
            assert (encoder(x) - before).norm() / before.norm() < 0.02
