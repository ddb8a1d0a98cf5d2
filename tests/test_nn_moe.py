"""nn.MoE: values against a plain loop, routing options, losses, low-bit experts, adapters, life as a module."""

import copy
import dataclasses
import io
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metate
from metate import library
from metate.nn import GroupedLinear, LoraGroupedLinear, MoE, QuantGroupedLinear, dequantize_model
from metate.quant import (
    Calibration,
    gguf_blocks,
    quantize_awq,
    quantize_fp4,
    quantize_fp8,
    quantize_gptq,
    quantize_hqq,
    quantize_nf4,
    quantize_rtn,
)

HIDDEN, INNER, EXPERTS = 12, 20, 5


def has_large_pages():
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return enabled.exists() and "[never]" not in enabled.read_text()


def build(**options):
    torch.manual_seed(0)
    return MoE(HIDDEN, INNER, EXPERTS, options.pop("top_k", 2), **options)


def plain(moe, x):
    """Every expert on every token, most of it thrown away. The route is taken as it is."""
    rows = x.reshape(-1, HIDDEN)
    out = torch.zeros_like(rows)
    gate_up, down = moe.experts.gate_up, moe.experts.down
    for e in range(EXPERTS):
        hidden = F.linear(rows, gate_up.weight[e], None if gate_up.bias is None else gate_up.bias[e])
        gate, up = hidden.chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down.weight[e], None if down.bias is None else down.bias[e])
        weight = torch.where(moe.route.experts == e, moe.route.weights, 0).sum(1, keepdim=True)
        out = out + weight * y
    if moe.shared is not None:
        out = out + moe.shared(rows)
    return out.view(x.shape)


def gradients(module, out):
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape)
    found = torch.autograd.grad(out, [p for p in module.parameters() if p.requires_grad], grad)
    return dict(zip((n for n, p in module.named_parameters() if p.requires_grad), found, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "shared_size": 8, "shared_gate": True, "router_bias": True},
        {"top_k": 3, "score": "sigmoid", "renormalise": True, "scaling": 2.5, "correction": True},
        {"top_k": 1, "policy": "switch", "capacity_factor": 0.6},
    ],
    ids=["plain", "biases, shared", "sigmoid", "switch"],
)
def test_equals_every_expert_on_every_token(options):
    moe = build(**options).double()
    if moe.correction_bias is not None:
        moe.correction_bias.copy_(torch.linspace(-1, 1, EXPERTS))
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64, requires_grad=True)
    y = moe(x)
    truth = plain(moe, x)
    torch.testing.assert_close(y, truth)
    if "capacity_factor" in options:
        assert (moe.route.experts == EXPERTS).any(), "nothing was dropped"
    grad = torch.randn_like(y)
    got, want = (torch.autograd.grad(out, [x, *moe.parameters()], grad, retain_graph=True) for out in (y, truth))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("activation", "gating"), [("relu2", "none"), ("gelu", "none"), ("gelu", "gate_up")])
def test_activations_reach_experts_and_the_shared_one(activation, gating):
    moe = build(activation=activation, gating=gating, shared_size=8)
    widths = [layer.weight.shape[-2] for layer in (moe.experts.gate_up, moe.shared.gate_up)]
    assert widths == ([INNER, 8] if gating == "none" else [2 * INNER, 16])
    assert moe(torch.randn(4, HIDDEN)).isfinite().all()


def test_losses_come_from_the_last_route():
    moe = build()
    moe(torch.randn(50, HIDDEN))
    loss = moe.route.load_balance_loss() + 1e-3 * moe.route.z_loss()
    loss.backward()
    assert moe.router.weight.grad.any()
    copied = copy.deepcopy(moe)
    assert copied.route is None
    pickled = io.BytesIO()
    torch.save(moe, pickled)
    pickled.seek(0)
    assert torch.load(pickled, weights_only=False).route is None


def test_correction_bias_evens_the_load_out():
    moe = build(top_k=1, correction=True, score="sigmoid")
    x = torch.randn(200, HIDDEN) + 1
    moe(x)
    before = moe.route.counts().max()
    for _ in range(200):
        moe(x)
        moe.update_bias(0.01)
    assert moe.route.counts().max() < min(before, 60)


def test_noise_is_of_training():
    moe = build(noisy=True)
    x = torch.randn(30, HIDDEN)
    assert not torch.equal(moe(x), moe(x))
    assert torch.equal(moe.eval()(x), moe(x))


def test_compiles_whole_for_any_number_of_tokens():
    moe = build(shared_size=8, renormalise=True)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(moe, backend=count, fullgraph=True, dynamic=True)
    for tokens in (7, 2, 3, 5, 8, 13, 21, 34, 55, 64):
        x = torch.randn(tokens, HIDDEN, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, moe(x))
        (y.sum() + moe.route.load_balance_loss()).backward()
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "options",
    [dict(policy="expert_choice"), dict(policy="sinkhorn"), dict(top_k=1, policy="switch", capacity_factor=0.75),
     dict(top_k=2, policy="gshard"), dict(noisy=True)],
    ids=str,
)  # fmt: skip
def test_every_policy_compiles_whole(options):
    """And in a graph takes the same choices: of random ones, from the same generator."""
    moe = MoE(HIDDEN, INNER, EXPERTS, **{"top_k": 3, **options})
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 20, 33):
        x, results = torch.randn(tokens, HIDDEN, requires_grad=True), []
        for layer in (compiled, moe):
            torch.manual_seed(tokens)
            y = layer(x)
            (y.sum() + moe.route.load_balance_loss()).backward()
            results.append((y.detach(), moe.route.experts, x.grad.clone()))
            x.grad = None
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "kind,message,x",
    [
        (TypeError, "x is list", [1.0]),
        (ValueError, r"x is of shape \(2, 19\), expected \(…, 12\)", torch.zeros(2, 19)),
        (ValueError, r"x is of shape \(12,\), expected \(…, 12\)", torch.zeros(12)),
        (TypeError, "x is float64, expected float32 like the module", torch.zeros(2, 12).double()),
        (ValueError, "x is on meta, expected cpu", torch.zeros(2, 12, device="meta")),
    ],
)
def test_wrong_inputs_are_named(kind, message, x):
    with pytest.raises(kind, match=f"metate.nn.MoE: {message}"):
        build()(x)


def test_offloaded_layers_come_when_they_are_called():
    """Until then accelerate keeps their weights on meta."""
    accelerate = pytest.importorskip("accelerate")
    moe, x = build(shared_size=8), torch.randn(3, HIDDEN)
    expected = moe(x)
    accelerate.cpu_offload(moe, execution_device="cpu")
    assert moe.router.weight.is_meta and torch.equal(moe(x), expected)


METHODS = {
    "nf4": {}, "int4": {"group_size": 8, "symmetric": False}, "int8": {}, "hqq": {"group_size": 16},
    "fp8": {"block": (8, 16)},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_low_bit_experts(method):
    """Those of the dequantised weights, gradients to x, to the router and to biases included."""
    moe = metate.quantize_model(build(bias=True, shared_size=8), method, **METHODS[method])
    assert type(moe.experts.gate_up) is type(moe.experts.down) is QuantGroupedLinear
    assert type(moe.router).__name__ == "Router", "the router stays dense"
    with torch.autocast("cpu"):
        again = metate.quantize_model(build(bias=True, shared_size=8), method, **METHODS[method])
    assert torch.equal(again.experts.down.dequantize(), moe.experts.down.dequantize())
    dense = dequantize_model(copy.deepcopy(moe))
    assert type(dense.experts.down) is GroupedLinear
    x = torch.randn(7, HIDDEN, requires_grad=True)
    low, full = moe(x), dense(x)
    torch.testing.assert_close(low, full, rtol=1e-4, atol=1e-5)
    names = {name for name, _ in moe.named_parameters()}
    assert {"experts.gate_up.bias", "router.weight"} <= names
    got = torch.autograd.grad(low.square().sum(), [x, *moe.parameters()])
    want = torch.autograd.grad(full.square().sum(), [x, *(p for n, p in dense.named_parameters() if n in names)])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not library.direct("moe_sort", None), reason="this torch has no C interface for exchanging tensors")
@pytest.mark.parametrize("method", [None, "int4"])
def test_experts_of_few_tokens_are_one_call_unless_somebody_hooks_into_them(method):
    moe = build(bias=True)
    experts = (moe if method is None else metate.quantize_model(moe, method)).experts
    x, route = torch.randn(3, HIDDEN), metate.moe_route(torch.randn(3, experts.num_experts), 2)
    with torch.no_grad():
        experts(x, route)  # each operator is looked at, then the layer
        expected = experts(x, route)
        before = library.direct_calls()
        assert torch.equal(experts(x, route), expected) and library.direct_calls() == before + 1
        seen = []
        experts.down.register_forward_hook(lambda layer, args, out: seen.append(out))
        assert torch.equal(experts(x, route), expected) and len(seen) == 1
        if method is not None:
            del experts.down._forward_hooks[next(iter(experts.down._forward_hooks))]
            experts.gate_up.int8_activations = experts.down.int8_activations = True
            rounded = experts(x, route)
            assert not torch.equal(rounded, expected) and torch.equal(experts(x, route), rounded)


def test_states_come_back_into_another_format(tmp_path):
    from safetensors.torch import load_file, save_file

    x = torch.randn(3, HIDDEN)
    first = metate.quantize_model(build(), "nf4")
    other = metate.quantize_model(build(), "int8")
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), first(x))
    found = metate.load_quantized(tmp_path)
    assert torch.equal(found["experts.down"].dequantize(), first.experts.down.dequantize())
    fewer = metate.quantize_model(MoE(HIDDEN, INNER, 3), "nf4")
    with pytest.raises(RuntimeError, match=r"experts.down.*expected of shape \(3, 12, 20\)"):
        fewer.load_state_dict(first.state_dict())


def forms():
    """Quantisers of every form that a weight can have; float16 numbers of GGUF blocks are drawn, the others as they
    come."""
    calibration = Calibration(256).add(torch.randn(300, 256, generator=torch.Generator().manual_seed(0)))
    found = {
        "nf4": quantize_nf4, "nf4 nested": partial(quantize_nf4, nested=True), "fp4": quantize_fp4, "fp8": quantize_fp8,
        "hqq": quantize_hqq, "gptq": partial(quantize_gptq, calibration=calibration),
        "gptq by use": partial(quantize_gptq, calibration=calibration, act_order=True, group_size=64),
        "awq": lambda w: quantize_awq(w, calibration)[0],
    }  # fmt: skip
    for bits in range(2, 9):
        found[f"int{bits}"] = partial(quantize_rtn, bits=bits, group_size=32)
        found[f"int{bits} with zeros"] = partial(quantize_rtn, bits=bits, group_size=-1, symmetric=False)
    for kind in gguf_blocks.TYPES.values():
        found[kind.name] = partial(blocks, kind)
    return found


def blocks(kind, weight):
    generator = torch.Generator().manual_seed(0)
    size = (weight.shape[0], weight.shape[1] // kind.elements, kind.size)
    low = gguf_blocks.lower(kind, torch.randint(0, 256, size, generator=generator, dtype=torch.uint8))
    names = ("scales", "super_scales", "offsets", "super_offsets")
    floats = {name: t for name in names if (t := getattr(low, name)) is not None and t.is_floating_point()}
    return dataclasses.replace(low, **{name: (torch.rand(t.shape) / 50).to(t.dtype) for name, t in floats.items()})


@pytest.mark.parametrize("form", forms())
def test_every_format_of_a_weight_can_be_stacked(form):
    dense, quantize = torch.randn(3, 20, 256, generator=torch.Generator().manual_seed(1)), forms()[form]
    low = metate.QuantizedExperts.quantize(dense, quantize)
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    gradients = []
    for weight, dtype in ((low, torch.float32), (low.dequantize(torch.float64), torch.float64)):
        x = torch.randn(9, 256, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        out = metate.grouped_linear(x, weight, offsets)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype))
        gradients.append((out.detach().double(), x.grad.double()))
    for got, want in zip(*gradients, strict=True):
        assert (got - want).norm() <= 3e-6 * want.norm()


@pytest.mark.parametrize("low_bit", [False, True])
def test_adapters(low_bit):
    """What they add is scaling · B A of each expert; they alone learn."""
    moe = build(bias=True)
    if low_bit:
        metate.quantize_model(moe, "nf4")
    merged = dequantize_model(copy.deepcopy(moe))
    before = moe(x := torch.randn(9, HIDDEN, requires_grad=True))
    moe.requires_grad_(False)
    for name in ("gate_up", "down"):
        layer = LoraGroupedLinear(getattr(moe.experts, name), 4, alpha=8)
        setattr(moe.experts, name, layer)
    assert torch.equal(moe(x), before), "adapters begin as nothing"
    for name in ("gate_up", "down"):
        layer = getattr(moe.experts, name)
        nn.init.normal_(layer.lora_B, 0, 0.1)
        getattr(merged.experts, name).weight.data += 2 * (layer.lora_B @ layer.lora_A).detach()
    out, want = moe(x), merged(x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    learned = {name for name, p in moe.named_parameters() if p.requires_grad}
    assert learned == {f"experts.{layer}.lora_{m}" for layer in ("gate_up", "down") for m in "AB"}
    (dx,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    torch.testing.assert_close(
        dx, torch.autograd.grad(want.square().sum(), x, retain_graph=True)[0], rtol=1e-3, atol=1e-3
    )
    found, dense = gradients(moe, out), gradients(merged, want)
    for name in ("gate_up", "down"):
        layer, d_weight = getattr(moe.experts, name), dense[f"experts.{name}.weight"]
        torch.testing.assert_close(
            found[f"experts.{name}.lora_A"], 2 * layer.lora_B.mT @ d_weight, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            found[f"experts.{name}.lora_B"], 2 * d_weight @ layer.lora_A.mT, rtol=1e-3, atol=1e-4
        )


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"nn.MoE: top_k is 6, expected 1 to num_experts, 5"):
        build(top_k=6)
    with pytest.raises(TypeError, match=r"nn.QuantGroupedLinear: weight is Tensor"):
        QuantGroupedLinear(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match=r"nn.LoraGroupedLinear: base is Linear"):
        LoraGroupedLinear(nn.Linear(2, 2), 4)
    with pytest.raises(ValueError, match=r"nn.QuantGroupedLinear: bias is of shape \(2,\)"):
        QuantGroupedLinear(metate.quantize_model(build(), "nf4").experts.down.weight, torch.zeros(2))


@pytest.mark.parametrize(
    "kind,message,wrong",
    [
        (ValueError, "gated_activation: activation is 'foo'", dict(activation="foo")),
        (ValueError, "gated_activation: limit is -1.0", dict(limit=-1.0)),
        (ValueError, "moe_route: score is 'tanh'", dict(score="tanh")),
        (ValueError, "moe_route: groups is 2, expected 1: policy 'sinkhorn'", dict(policy="sinkhorn", groups=2)),
        (ValueError, "moe_route: logits is of 5 experts", dict(groups=2)),
        (ValueError, "nn.MoE: hidden_size is 0", dict(hidden_size=0)),
        (ValueError, "nn.MoE: num_experts is 1180591620717411303424", dict(num_experts=2**70)),
        (TypeError, "nn.MoE: bias is 'yes', expected True or False", dict(bias="yes")),
        (TypeError, "moe_route: renormalise is {}, expected True or False", dict(renormalise={})),
        (TypeError, "unexpected keyword argument 'renormalize'", dict(renormalize=True)),
    ],
)
def test_a_layer_that_could_not_compute_is_not_made(kind, message, wrong):
    with pytest.raises(kind, match=message):
        MoE(**{**dict(hidden_size=8, intermediate_size=8, num_experts=5), **wrong})


def test_a_layer_is_made_without_its_random_numbers():
    """What is wrong with its routing comes out in a try, which needs no backend that was asked for either."""
    generator = torch.Generator()
    before = generator.get_state()
    with metate.use("cuda"):
        MoE(8, 8, 5, policy="gshard", generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_the_correction_stays_as_fine_as_its_steps():
    """In bfloat16 0.5 and 0.5 + 1e-3 are one number; and routing took no bias of 16 bits at all."""
    moe = MoE(8, 16, 4, correction=True)
    moe.correction_bias += 0.5 + 1e-3
    kept = moe.correction_bias.clone()
    for half in (moe.bfloat16(), moe.to("cpu", torch.float16), moe.float()):
        assert torch.equal(half.correction_bias, kept)
        half(torch.randn(5, 8, dtype=half.router.weight.dtype))
    assert moe.double().correction_bias.dtype == torch.float64 and "correction_bias" in moe.state_dict()


def test_a_part_of_frozen_adapters_is_frozen():
    layer = LoraGroupedLinear(build().experts.down, 2).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in layer.part(1, 3).parameters())


@pytest.mark.parametrize(
    "shape", [[10**9, 12, 20], [0, 12, 20], [True, 12, 20], [2.0, 12, 20], [5, 12], [1, 5, 12, 20]]
)
def test_states_that_lie_about_their_shape_are_refused(shape):
    layer = metate.quantize_model(build(), "nf4").experts.down
    state = layer.state_dict()
    numbers = {**json.loads(bytes(state["quantized_weight"].tolist())), "shape": shape}
    state["quantized_weight"] = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)
    before = layer.weight.dequantize()
    with pytest.raises(RuntimeError, match="QuantGroupedLinear: metate"):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight.dequantize(), before)


def test_a_route_is_replayed():
    """Whatever has become of the router, its groups and its correction bias: the experts are those of before."""
    torch.manual_seed(0)
    moe = MoE(16, 24, 8, 2, correction=True, score="sigmoid", groups=4, top_groups=2, renormalise=True)
    x = torch.randn(3, 5, 16)
    before, chosen = moe(x), moe.route.chosen
    with torch.no_grad():
        moe.correction_bias += torch.randn(8)
    torch.testing.assert_close(moe(x, experts=chosen), before)
    with torch.no_grad():
        moe.router.weight.copy_(torch.randn(8, 16))
    moe(x, experts=chosen).sum().backward()
    assert torch.equal(moe.route.experts, chosen) and moe.router.weight.grad.abs().sum() > 0
    assert not torch.equal(moe.route.experts, (moe(x), moe.route.experts)[1])


def large_pages_of(tensor):
    """Bytes of the mappings in which a tensor lies that stand in large pages."""
    begin, end, counts, found = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            counts = int(span[1], 16) < end and int(span[2], 16) > begin
        elif counts and line.startswith("AnonHugePages:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(not has_large_pages(), reason="this system gives no large pages to those who ask")
def test_experts_lie_in_large_pages():
    """As they are made and after `to`; with the values that they had, and as storage that torch may resize."""
    layer = GroupedLinear(8, 512, 2048)
    assert large_pages_of(layer.weight) > layer.weight.nbytes // 2
    values = layer.weight.detach().bfloat16()
    layer.bfloat16()
    assert torch.equal(layer.weight, values)
    assert large_pages_of(layer.weight) > layer.weight.nbytes // 2
    assert layer.weight.untyped_storage().resizable()
