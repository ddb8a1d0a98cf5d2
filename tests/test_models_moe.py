"""Mixtures among the Llama decoders: transformers' logits from its checkpoints, low-bit experts, serving over pages."""

import json
from functools import partial

import pytest
import torch

import metate
from metate.errors import FormatError
from metate.models import Llama, LlamaConfig
from metate.models.quantize import Recipe, quantize_decoder
from metate.nn import MoE, QuantGroupedLinear
from metate.quant import quantize_nf4, quantize_rtn, save_quantized

transformers = pytest.importorskip("transformers")
quantised = pytest.importorskip("metate.compat.transformers").quantised

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 5},
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 20, "head_dim": 12, "mlp_only_layers": [2]},
    "Qwen3Moe, every second layer": {"num_experts": 4, "decoder_sparse_step": 2, "norm_topk_prob": True},
    "Olmoe": {"num_experts": 4, "clip_qkv": 0.5, "num_key_value_heads": 4},
}


def theirs(name, **changes):
    torch.manual_seed(0)
    family = name.split(",")[0]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[name], **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 0.7, 0.1)
    return model


def tokens(length, batch=2):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, name):
    model = theirs(name)
    model.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path)
    x = tokens(40)
    torch.testing.assert_close(ours(x), model(x).logits, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, MoE) for module in ours.modules()) == {
        "Qwen3Moe": 2,
        "Qwen3Moe, every second layer": 1,
    }.get(name, 3)
    prompts = [tokens(n, 1)[0].tolist() for n in (7, 3)]
    for prompt, text in zip(prompts, metate.generate(ours, prompts, max_new_tokens=5), strict=True):
        whole = ours.complete(torch.tensor([prompt]), 5, 0.0, torch.Generator())[0].tolist()
        assert text.tokens == whole


LOW_BIT = {
    "metate": quantize_nf4,
    "gptq": partial(quantize_rtn, group_size=16),
    "awq": partial(quantize_rtn, group_size=16, symmetric=False),
    "bitsandbytes": quantize_nf4,
}


@pytest.mark.parametrize(("method", "unlike"), [*((method, False) for method in LOW_BIT), ("metate", True)])
@torch.no_grad()
def test_low_bit_experts_come_from_low_bit_checkpoints(tmp_path, method, unlike):
    model = theirs("Mixtral", intermediate_size=64)  # GPTQ packs 32 rows and columns at a time
    model.save_pretrained(tmp_path / "dense")
    dense = Llama.from_pretrained(tmp_path / "dense")
    weights, found = {}, metate.load_quantized(tmp_path / "dense")
    for name in found:
        if ".experts." in name:
            quantize = quantize_rtn if unlike and ".experts.3." in name else LOW_BIT[method]
            weights[name.removesuffix(".weight")] = low = quantize(found[name])
            part, expert = {"w1": 0, "w3": 1, "w2": 0}[name.split(".")[-2]], int(name.split(".")[-3])
            layer = dense.layers[int(name.split(".")[2])].mlp.experts
            target = layer.down if "w2" in name else layer.gate_up
            rows = low.shape[0]
            target.weight[expert, part * rows : (part + 1) * rows] = low.dequantize()
        else:
            weights[name] = found[name]
    config = json.loads((tmp_path / "dense/config.json").read_text())
    save_quantized(tmp_path / "low", weights, method, config)
    low = Llama.from_pretrained(tmp_path / "low")
    assert isinstance(low.layers[0].mlp.experts.gate_up, QuantGroupedLinear) != unlike
    torch.testing.assert_close(low(tokens(9)), dense(tokens(9)), rtol=1e-4, atol=1e-5)
    with quantised():
        read, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low", output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(read.model.layers[0].mlp.experts.gate_up_proj, QuantGroupedLinear) != unlike
    torch.testing.assert_close(read(tokens(9)).logits, dense(tokens(9)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 6}, r"lacks an expert.*'layers.0', '\w+_proj', 5"),
        ({"num_local_experts": 4}, "too much: .*experts.4"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, expected at most num_experts 5"),
        ({"sliding_window": 64}, "sliding_window is 64, expected none"),
        ({"intermediate_size": 40}, "experts.gate_up.weight"),
    ],
)
def test_wrong_configurations_are_named(tmp_path, change, message):
    theirs("Mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FormatError, match=message):
        Llama.from_pretrained(tmp_path)


def test_a_mixture_learns():
    sizes = {**SIZES, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
    del sizes["max_position_embeddings"]
    model = Llama(LlamaConfig(**sizes)).initialize(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x = tokens(17)
    losses = []
    for _ in range(8):
        logits = model(x[:, :-1])
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()))
        balance = sum(layer.mlp.route.load_balance_loss() for layer in model.layers)
        optimizer.zero_grad()
        (losses[-1] + 0.01 * balance).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5


def test_layerwise_quantisation_refuses_mixtures():
    sizes = {**SIZES, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
    del sizes["max_position_embeddings"]
    with pytest.raises(ValueError, match=r"quantize_decoder: model is a mixture of experts.*metate.quantize_model"):
        quantize_decoder(Llama(LlamaConfig(**sizes)), Recipe("nf4"))
