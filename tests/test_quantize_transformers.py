"""Causal language models of transformers to low-bit checkpoints: any module tree, read back by transformers."""

import contextlib
import copy
import shutil

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("transformers")

import transformers as hf

from metate import FormatError
from metate.compat import transformers as route
from metate.models import Llama
from metate.models.apart import apart, take_apart
from metate.models.chain import Chain, decoder_layers, dense_weight, linears
from metate.models.folding import Place, find_place, groups_of
from metate.models.quantize import Recipe, quantize_checkpoint, quantize_decoder
from metate.nn import QuantGroupedLinear, QuantLinear
from metate.quant import QuantizedWeight, load_quantized, quantize_rtn, save_quantized

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT = {
    "vocab_size": 256,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "vocab_size": 256, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "word_embed_proj_dim": 32, "max_position_embeddings": 128,
}  # fmt: skip
MULTI_HEAD = {**SIZES, "num_key_value_heads": 4}
CONFIGS = {
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=16),
    "qwen2": lambda: hf.Qwen2Config(**MULTI_HEAD, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**SIZES),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, sliding_window=16),
    "phi3": lambda: hf.Phi3Config(**MULTI_HEAD),
    "gpt2": lambda: hf.GPT2Config(**GPT),
    "opt": lambda: hf.OPTConfig(**OPT),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        new_decoder_architecture=True,
        num_kv_heads=2,
        alibi=False,
        bias=True,
    ),
    "mamba": lambda: hf.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, time_step_rank=32),
}
MIXTURE = {**SIZES, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}
MIXTURES = {
    "mixtral": lambda: hf.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**MIXTURE, shared_expert_intermediate_size=64, decoder_sparse_step=2),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**MIXTURE),
    "olmoe": lambda: hf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **{**MIXTURE, **MULTI_HEAD, "head_dim": 32}, n_routed_experts=4, first_k_dense_replace=1, n_group=2,
        topk_group=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32,
    ),
}  # fmt: skip
TEXT = "def f(x):\n    return [x + 1 for x in range(10)]\n" * 60
TOKENS = torch.tensor([list(TEXT[start : start + 48].encode()) for start in (0, 40, 100, 150)])


def model_of(family):
    """Weights as trained models have them: inputs of very different size, biases and norms that are not plain."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config({**CONFIGS, **MIXTURES}[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
                parameter += torch.rand_like(parameter)
            elif parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "mamba" not in family:
                parameter *= 2
    return model


def places(model):
    """Where AWQ's scales go, by the linear layers that share them."""
    with torch.no_grad():
        chain = Chain(model, list(TOKENS[:1]))
        run = lambda: next(chain.run(0, 1)) - chain.hidden[0]  # noqa: E731
        return {group.names: find_place(chain.layers[0], group, run) for group in groups_of(chain.layers[0], run)}


QKV, UP = tuple(f"self_attn.{x}_proj" for x in "qkv"), ("mlp.gate_proj", "mlp.up_proj")
LLAMA_LIKE = {
    QKV: Place("input_layernorm"), ("self_attn.o_proj",): None, UP: Place("post_attention_layernorm"),
    ("mlp.down_proj",): Place("mlp.up_proj"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mistral", LLAMA_LIKE),
        ("qwen3", LLAMA_LIKE),
        ("qwen2", {**LLAMA_LIKE, ("self_attn.o_proj",): Place("self_attn.v_proj")}),
        ("gemma2", {
            **LLAMA_LIKE, QKV: Place("input_layernorm", offset=1.0), UP: Place("pre_feedforward_layernorm", offset=1.0),
        }),
        ("phi3", {
            ("self_attn.qkv_proj",): Place("input_layernorm"), ("self_attn.o_proj",): Place("self_attn.qkv_proj", 128),
            ("mlp.gate_up_proj",): Place("post_attention_layernorm"),
            ("mlp.down_proj",): Place("mlp.gate_up_proj", 96),
        }),
        ("gpt2", {
            ("attn.c_attn",): Place("ln_1"), ("attn.c_proj",): Place("attn.c_attn", 128), ("mlp.c_fc",): Place("ln_2"),
            ("mlp.c_proj",): None,
        }),
        ("opt", {
            QKV: Place("self_attn_layer_norm"), ("self_attn.out_proj",): Place("self_attn.v_proj"),
            ("fc1",): Place("final_layer_norm"), ("fc2",): Place("fc1"),
        }),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_places_of_scales_are_found(family, expected):
    model = model_of(family)
    before = copy.deepcopy(model.state_dict())
    assert places(model) == expected
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "awq") for family in CONFIGS), ("gpt2", "gptq"), ("falcon", "nf4"), ("phi3", "gptq"),
     ("qwen2", "gptq desc_act"), ("gemma2", "nf4"), ("opt", "nf4"), ("mamba", "hqq")],
)  # fmt: skip
def test_transformers_reads_what_is_written(family, method, tmp_path):
    dense = model_of(family)
    dense.save_pretrained(tmp_path / "dense")
    method, *desc_act = method.split()
    recipe = Recipe(method, 4, 32, nested=method == "nf4", desc_act=bool(desc_act))
    quantize_checkpoint(tmp_path / "dense", recipe, tmp_path / "out", TEXT, samples=4, length=48)
    found = load_quantized(tmp_path / "out")
    with route.quantised():
        model, info = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, output_loading_info=True
        )  # fmt: skip
    assert not any(info.values()), info
    low_bit = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    name, layers = decoder_layers(dense)
    uncalled = {"mixer.dt_proj"}
    assert low_bit == {f"{name}.{i}.{n}" for i, layer in enumerate(layers) for n in linears(layer) if n not in uncalled}
    with torch.no_grad():
        truth = dense(TOKENS).logits
        for name, weight in found.items():
            if isinstance(weight, QuantizedWeight):
                dense_weight(dense.get_submodule(name)).copy_(weight.dequantize())
            else:
                dense.get_parameter(name).copy_(weight)
        expected, logits = dense(TOKENS).logits, model(TOKENS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert 0 < (logits - truth).norm() < 0.25 * truth.norm()


@pytest.mark.parametrize(
    ("family", "method"),
    [("mixtral", "gptq desc_act"), ("mixtral", "nf4"), ("qwen2_moe", "gptq"), ("qwen2_moe", "nf4"),
     ("qwen3_moe", "hqq"), ("olmoe", "rtn"), ("deepseek_v3", "gptq"), ("deepseek_v3", "nf4")],
)  # fmt: skip
def test_experts_are_written_one_by_one(family, method, tmp_path):
    dense = model_of(family)
    dense.save_pretrained(tmp_path / "dense")
    method, *desc_act = method.split()
    recipe = Recipe(method, 4, 32, desc_act=bool(desc_act))
    quantize_checkpoint(tmp_path / "dense", recipe, tmp_path / "out", TEXT, samples=4, length=48)
    found = load_quantized(tmp_path / "out")
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:  # where transformers wrote them one by one
        shapes = {name.removesuffix(".weight"): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert {name.removesuffix(".weight") for name in found} == shapes.keys()
    low_bit = {name for name in found if isinstance(found[name], QuantizedWeight)}
    assert low_bit == {
        name for name, shape in shapes.items()
        if len(shape) == 2 and not name.endswith(("gate", "embed_tokens", "lm_head"))
    }  # fmt: skip
    with route.quantised():
        model, info = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, output_loading_info=True
        )  # fmt: skip
    assert not any(info.values()), info
    layers = [module for module in model.modules() if isinstance(module, QuantGroupedLinear)]
    assert len(layers) == 2 * (1 if family in ("qwen2_moe", "deepseek_v3") else 2)
    values = {name: w.dequantize() if isinstance(w, QuantizedWeight) else w for name, w in found.items()}
    save_quantized(tmp_path / "values", {n if n not in low_bit else f"{n}.weight": w for n, w in values.items()})
    shutil.copy(tmp_path / "dense" / "config.json", tmp_path / "values")
    same = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "values", dtype=torch.float32)
    with torch.no_grad():
        truth, expected, logits = (m(TOKENS).logits for m in (dense, same, model))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert 0 < (logits - truth).norm() < 0.3 * truth.norm()
    if family in ("mixtral", "qwen3_moe", "olmoe"):
        ours = Llama.from_pretrained(tmp_path / "out", dtype=torch.float32)(TOKENS)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_experts_apart_compute_the_same():
    for family in MIXTURES:
        dense = model_of(family)
        model = take_apart(copy.deepcopy(dense))
        assert len(apart(model)) == (1 if family in ("qwen2_moe", "deepseek_v3") else 2)
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_experts_are_calibrated_on_their_own_tokens(monkeypatch):
    """Or on all, where those are few."""
    model, seen = model_of("qwen3_moe"), []

    def count(weight, recipe, calibration, scale):
        seen.append(calibration.count)
        return quantize_rtn(weight, 4, 32)

    def route_tokens(router, args, output):
        logits, scores, chosen = output
        chosen = torch.tensor([0, 1]).repeat(len(chosen), 1)
        chosen[:10, 1] = 2
        return logits, scores, chosen

    monkeypatch.setattr("metate.models.quantize._quantize", count)
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(route_tokens)
    quantize_decoder(model, Recipe("gptq", 4, 32), TOKENS)
    attention = [192] * 4  # 4 texts of 48 tokens
    few = [192, 192, 40]  # 40 are fewer than the 64 inputs of gate and up, and more than the 32 of down
    assert seen == 2 * [*attention, 192, 192, 192, 152, 152, 152, *few, 192, 192, 192]


def test_calibration_beats_rounding_of_experts():
    dense = model_of("mixtral")
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.post_attention_layernorm.weight *= torch.logspace(-1, 1, 64)[torch.randperm(64)]
        truth, errors = dense(TOKENS).logits, {}
        for method, desc_act in (("rtn", False), ("gptq", False), ("gptq", True)):
            model = copy.deepcopy(dense)
            quantize_decoder(model, Recipe(method, 4, 32, desc_act=desc_act), TOKENS)
            errors[method, desc_act] = float((model(TOKENS).logits - truth).square().mean())
    assert errors["gptq", True] < errors["gptq", False] < 0.5 * errors["rtn", False], errors


def test_calibration_beats_rounding():
    dense = model_of("gpt2")
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter *= torch.logspace(-1, 1, 64)[torch.randperm(64)]
        truth, errors = dense(TOKENS).logits, {}
        for method in ("rtn", "awq", "gptq"):
            model = copy.deepcopy(dense)
            quantize_decoder(model, Recipe(method, 4, 32), TOKENS)
            errors[method] = float((model(TOKENS).logits - truth).square().mean())
    assert errors["awq"] < errors["rtn"] and errors["gptq"] < errors["rtn"], errors


class Shares(hf.MistralForCausalLM):
    """Its second layer gets what the first one computes."""

    def __init__(self, config):
        super().__init__(config)
        first, second = self.model.layers
        first.register_forward_hook(lambda module, args, output: setattr(self, "found", output))
        second.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "skip": self.found}), with_kwargs=True
        )


def test_what_is_not_served_is_named(tmp_path):
    stacked = hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1))
    with pytest.raises(ValueError, match=r"checkpoints have GptOssExperts in one piece.*quantize_experts"):
        quantize_decoder(stacked, Recipe("nf4"))
    with pytest.raises(ValueError, match=r"mixture of experts.*quantize_experts"):
        quantize_decoder(hf.JetMoeForCausalLM(hf.JetMoeConfig(**SIZES, num_local_experts=2)), Recipe("nf4"))
    with pytest.raises(ValueError, match=r"mixture of experts for awq.*gptq and the others"):
        quantize_decoder(model_of("mixtral"), Recipe("awq", 4, 32), TOKENS)
    with pytest.raises(ValueError, match="handed what other layers compute"):
        quantize_decoder(Shares(CONFIGS["mistral"]()), Recipe("gptq", 4, 32), TOKENS)
    with pytest.raises(ValueError, match=r"layers in a torch\.nn\.ModuleList"):
        quantize_decoder(torch.nn.Linear(8, 8), Recipe("nf4"))
    model = model_of("mistral")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "down_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(FormatError, match=r"without or in another shape.*down_proj"):
        quantize_checkpoint(tmp_path, Recipe("nf4"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with contextlib.suppress(ValueError):
        (tmp_path / "config.json").write_text('{"model_type": "no such"}')
        quantize_checkpoint(tmp_path, Recipe("nf4"), tmp_path / "out")
        raise AssertionError("of no known type")
