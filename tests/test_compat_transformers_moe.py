"""Mixtures of experts of transformers on metate against eager: logits and gradients, in float32 and float64."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers as hf

from metate.compat import experts
from metate.compat import transformers as route
from metate.nn import LoraGroupedLinear, MoE, QuantGroupedLinear, dequantize_model, quantize_model

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 96,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
LATENT = {
    **TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 12, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
MODELS = {
    "mixtral": lambda: (hf.MixtralForCausalLM, hf.MixtralConfig(**GROUPED, num_local_experts=5)),
    "qwen2_moe": lambda: (
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig(
            **GROUPED, moe_intermediate_size=12, shared_expert_intermediate_size=20, num_experts=6,
            num_experts_per_tok=3,
        ),
    ),
    "qwen3_moe": lambda: (
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig(**GROUPED, moe_intermediate_size=12, num_experts=6, norm_topk_prob=True, head_dim=8,
                          num_experts_per_tok=2),
    ),
    "olmoe": lambda: (hf.OlmoeForCausalLM, hf.OlmoeConfig(**GROUPED, num_experts=8, num_experts_per_tok=4)),
    "deepseek_v2": lambda: (
        hf.DeepseekV2ForCausalLM, hf.DeepseekV2Config(**LATENT, n_shared_experts=2, topk_method="group_limited_greedy")
    ),
    "deepseek_v3": lambda: (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(**LATENT)),
    "gpt_oss": lambda: (
        hf.GptOssForCausalLM,
        hf.GptOssConfig(**GROUPED, head_dim=8, sliding_window=5, num_local_experts=4, num_experts_per_tok=2,
                         swiglu_limit=0.5),
    ),
    "nemotron_h": lambda: (
        hf.NemotronHForCausalLM,
        hf.NemotronHConfig(**GROUPED, head_dim=8, layers_block_type=["attention", "moe"], n_routed_experts=4,
                           num_experts_per_tok=2, moe_intermediate_size=12, n_group=1, topk_group=1,
                           moe_shared_expert_intermediate_size=12),
    ),
    "jetmoe": lambda: (
        hf.JetMoeForCausalLM,
        hf.JetMoeConfig(**TEXT, num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    ),
    "dbrx": lambda: (
        hf.DbrxForCausalLM,
        hf.DbrxConfig(
            vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        ),
    ),
    "switch": lambda: (
        hf.SwitchTransformersForConditionalGeneration,
        hf.SwitchTransformersConfig(
            vocab_size=97, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=4, num_experts=4, expert_capacity=5,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0, dropout_rate=0.0,
        ),
    ),
    "llama4": lambda: (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(**GROUPED, intermediate_size_mlp=24, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
                            interleave_moe_layer_step=1),
    ),
    "longcat_flash": lambda: (
        hf.LongcatFlashForCausalLM,
        hf.LongcatFlashConfig(
            vocab_size=97, hidden_size=32, ffn_hidden_size=24, expert_ffn_hidden_size=12, num_layers=2, head_dim=8,
            num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
            v_head_dim=8, n_routed_experts=4, zero_expert_num=3, moe_topk=3, max_position_embeddings=64,
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _registered():
    route.enable()
    yield
    route.disable()


def build(name, dtype=torch.float32):
    make, config = MODELS[name]()
    torch.manual_seed(0)
    model = make._from_config(config, attn_implementation="eager").eval().to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 0.7, 0.1)
    return model


def run(model):
    """Logits and every gradient."""
    ids = torch.randint(2, 90, (2, 11), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {}
    model.zero_grad()
    logits = model(input_ids=ids, **more).logits
    (logits * torch.arange(logits.numel()).view(logits.shape).sin()).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(2, 24).view(2, 11)).logits


def assert_same(want, got, within):
    assert (want[0] - got[0]).norm() <= within * want[0].norm()
    for name, gradient in got[1].items():  # eager leaves None where no token came
        expected = want[1].get(name, torch.zeros(()))
        assert (gradient - expected).norm() <= 20 * within * expected.norm(), name
    assert want[1].keys() <= got[1].keys()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, torch.float64) for n in MODELS), *((n, torch.float32) for n in ("mixtral", "gpt_oss", "llama4", "switch"))],
    ids=str,
)
def test_equals_eager(name, dtype, monkeypatch):
    model = route.use_experts(build(name, dtype), "eager")
    want = run(model)
    calls = []
    for function in ("grouped_linear", "moe_sort"):
        monkeypatch.setattr(experts, function, counted(getattr(experts, function), calls))
    route.use_experts(model)
    single = dtype == torch.float32 or name == "nemotron_h"  # whose eager experts add up in float32
    assert_same(want, run(model), 1e-6 if single else 1e-14)
    assert "grouped_linear" in calls
    del calls[:]
    route.use_experts(model, "eager")
    again = run(model)
    assert torch.equal(again[0], want[0])
    assert not calls


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_compile_without_a_break(name):
    experts = next(m for m in route.use_experts(build(name)).modules() if type(m).__name__.endswith("Experts"))
    x, chosen = torch.randn(7, 32, requires_grad=True), torch.randint(0, 4, (7, 2))
    given = x, chosen, torch.rand(7, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    want, got = experts(*given), compiled(*given)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.square().sum(), [x, *experts.parameters()]) for y in (got, want)]
    torch.testing.assert_close(*gradients)


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return call


def test_models_ask_for_it_by_name(tmp_path):
    make, config = MODELS["mixtral"]()
    model = make(config)
    model.save_pretrained(tmp_path)
    loaded = make.from_pretrained(tmp_path, experts_implementation="metate", attn_implementation="metate")
    assert loaded.config._experts_implementation == "metate"
    ids = torch.randint(2, 90, (2, 5))
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    route.disable()
    with pytest.raises(KeyError, match="metate"):
        loaded(ids)
    route.enable()


@pytest.mark.parametrize("name", ["llama4", "dbrx", "switch"])
def test_classes_without_the_interface_are_asked_by_name_too(name, tmp_path, monkeypatch):
    """They ran eager's experts without a word."""
    model = build(name)
    model.save_pretrained(tmp_path)
    want = run(model)
    loaded = type(model).from_pretrained(
        tmp_path, experts_implementation="metate", attn_implementation="eager", dtype=torch.float32
    )
    calls = []
    monkeypatch.setattr(experts, "grouped_linear", counted(experts.grouped_linear, calls))
    assert_same(want, run(loaded.eval()), 1e-6)
    assert calls
    del calls[:]
    loaded.set_experts_implementation("eager")
    run(loaded)
    assert not calls
    model.set_experts_implementation("metate")
    assert_same(want, run(model), 1e-6)
    assert calls


def test_nllb_is_refused_by_every_name(tmp_path):
    """Of its experts transformers runs two, whatever the router says: there is nothing to be equal to."""
    config = hf.NllbMoeConfig(
        vocab_size=97, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, num_experts=4, encoder_sparse_step=1,
        decoder_sparse_step=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.NllbMoeModel(config).eval()
    ids = {"input_ids": torch.arange(2, 9)[None], "decoder_input_ids": torch.arange(2, 6)[None]}
    eager = model(**ids).last_hidden_state.detach()
    for name, parameter in model.named_parameters():
        if "expert_2" in name or "expert_3" in name:
            parameter.data.zero_()
    assert torch.equal(model(**ids).last_hidden_state, eager)  # where this fails, transformers is mended: serve it

    said = "no NllbMoeExperts: transformers reads its router's mask as expert numbers"
    for ask in (route.use_experts, lambda m: m.set_experts_implementation("metate")):
        with pytest.raises(NotImplementedError, match=said):
            ask(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=said):
        hf.NllbMoeModel.from_pretrained(tmp_path, experts_implementation="metate")


def test_numbers_of_no_expert_cost_nothing_and_give_zero():
    layer = build("gpt_oss").model.layers[0].mlp.experts
    layer.config._experts_implementation = "metate"
    x = torch.randn(5, 32, requires_grad=True)
    chosen = torch.tensor([[0, 4], [4, 4], [1, 3], [4, 2], [4, 4]])  # 4: an expert of another process
    weights = torch.rand(5, 2, requires_grad=True)
    y = layer(x, chosen, weights)
    y.sum().backward()
    assert not y[[1, 4]].any()
    assert not x.grad[[1, 4]].any()
    assert torch.equal(weights.grad != 0, chosen < 4)
    alone = layer(x[3:4], chosen[3:4, 1:], weights[3:4, 1:])
    torch.testing.assert_close(y[3:4], alone)


def test_own_activations_are_called():
    """Step-3.7 clamps after its activation, which no operator here does."""
    from types import SimpleNamespace

    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    torch.manual_seed(0)
    config = SimpleNamespace(num_local_experts=3, hidden_size=8, moe_intermediate_size=6, hidden_act="silu")
    layer = Step3p7Experts(config, 0.05)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    inputs = torch.randn(7, 8), torch.randint(0, 3, (7, 2)), torch.rand(7, 2)
    want = layer(*inputs)
    route.use_experts(layer)
    assert "forward" in vars(layer)
    torch.testing.assert_close(layer(*inputs), want)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_low_bit_experts_learn_adapters(name):
    model = route.quantize_experts(build(name), "nf4")
    dense = copy.deepcopy(model)
    for module in dense.modules():
        for part, layer in list(module._modules.items()):
            if isinstance(layer, QuantGroupedLinear):
                weight = layer.dequantize()
                delattr(module, part)
                module.register_parameter(part, nn.Parameter(weight.mT if module.is_transposed else weight))
                if layer.bias is not None:
                    module.register_parameter(f"{part}_bias", layer.bias)
    want = run(route.use_experts(dense, "eager"))
    got = run(model)
    low_bit = [n for n, m in model.named_modules() if isinstance(m, QuantGroupedLinear)]
    assert low_bit
    assert_same(
        (want[0], {n: g for n, g in want[1].items() if n in got[1]}),
        (got[0], {n: g for n, g in got[1].items() if n in want[1]}),
        2e-6,
    )
    for part in low_bit:
        model.set_submodule(part, LoraGroupedLinear(model.get_submodule(part), 4))
    run(model)
    assert all(model.get_submodule(part).lora_B.grad.any() for part in low_bit)


def test_peft_s_lora_learns_on_experts_as_on_eager_s():
    peft = pytest.importorskip("peft")
    tokens, found = torch.arange(40).view(2, 20) + 1, []
    for implementation in ("eager", "metate"):
        make, config = MODELS["mixtral"]()
        torch.manual_seed(0)
        model = make(config)
        model.set_experts_implementation(implementation)
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_parameters=targets))
        learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for i, parameter in enumerate(learned.values()):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
        out = model(input_ids=tokens, labels=tokens)
        out.loss.backward()
        assert len(learned) == 8 and all(p.grad.any() for p in learned.values())
        found.append([out.logits.detach(), *(p.grad for p in learned.values())])
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, out.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.fixture
def adapters():
    """PEFT, which knows low-bit experts."""
    peft = pytest.importorskip("peft")
    from metate.compat import peft as adapters

    adapters.enable()
    yield peft
    adapters.disable()


def low_bit_and_dense(name):
    """A model with low-bit experts, and an eager one of the same weights."""
    model, dense = route.quantize_experts(build(name), "nf4"), route.use_experts(build(name), "eager")
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, QuantGroupedLinear):
                experts, _, part = path.rpartition(".")
                experts, weight = dense.get_submodule(experts), layer.dequantize()
                getattr(experts, part).copy_(weight.mT if experts.is_transposed else weight)
    return model, dense


TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mixer.experts.up_proj", "mixer.experts.down_proj"]


def learned(model, seed=0):
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for i, parameter in enumerate(found.values()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed + i))
    return found


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_peft_s_lora_learns_on_low_bit_experts_as_on_dense_ones(name, adapters, tmp_path):
    found = []
    for model in low_bit_and_dense(name):
        config = adapters.LoraConfig(r=3, lora_alpha=6, target_parameters=TARGETS)
        model = adapters.get_peft_model(model, config)
        parameters = learned(model)
        logits, gradients = run(model)
        assert parameters.keys() == gradients.keys()
        assert all(gradient.any() for gradient in gradients.values())
        found.append((logits, gradients))
        model.save_pretrained(tmp_path / str(len(found)))
    assert_same(*found[::-1], 2e-6)
    model, dense = low_bit_and_dense(name)
    for base, folder, want in ((model, "2", found[0][0]), (dense, "1", found[1][0])):  # each other's files
        loaded = adapters.PeftModel.from_pretrained(base, tmp_path / folder, is_trainable=True)
        assert torch.equal(run(loaded)[0], want)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_adapters_of_low_bit_experts_are_switched_and_merged(name, adapters):
    model, _ = low_bit_and_dense(name)
    plain = logits(model)
    config = adapters.LoraConfig(r=3, target_parameters=TARGETS)
    model = adapters.get_peft_model(model, config)
    learned(model)
    first = logits(model)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert torch.equal(logits(model), plain)  # begins as nothing
    learned(model, seed=100)
    second = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not any(torch.equal(a, b) for a, b in ((plain, first), (first, second), (second, both)))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.warns(UserWarning, match="rounds their sum"):
        model.merge_adapter()
    assert (logits(model) - first).norm() < 0.1 * (plain - first).norm() + 0.1 * first.norm()
    assert not torch.equal(logits(model), plain)
    model.unmerge_adapter()
    assert torch.equal(logits(model), first)
    rounded = copy.deepcopy(model).merge_and_unload()
    assert any(isinstance(module, QuantGroupedLinear) for module in rounded.modules())
    assert not any("lora" in key for key in rounded.state_dict())
    merged = dequantize_model(model).merge_and_unload(safe_merge=True)
    assert not any("lora" in key for key in merged.state_dict())
    torch.testing.assert_close(logits(merged), first, rtol=1e-4, atol=1e-5)


def test_experts_quantised_under_peft_keep_their_adapters(adapters):
    model = adapters.get_peft_model(route.use_experts(build("mixtral")), adapters.LoraConfig(target_parameters=TARGETS))
    learned(model)
    want = run(model)[0]
    got = run(route.quantize_experts(model, "int8"))[0]
    assert any(isinstance(module, QuantGroupedLinear) for module in model.modules())
    assert (got - want).norm() < 0.05 * want.norm()


def test_peft_adapts_the_experts_of_metate_s_own_layer(adapters):
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(MoE(32, 24, num_experts=4)), "nf4")
    x = torch.randn(9, 32)
    plain = model(x)
    model = adapters.get_peft_model(
        model, adapters.LoraConfig(r=3, target_parameters=["experts.gate_up", "experts.down"])
    )
    torch.testing.assert_close(model(x), plain)
    parameters = learned(model)
    got = model(x)
    got.square().sum().backward()
    assert len(parameters) == 4 and all(p.grad.any() for p in parameters.values())
    merged = dequantize_model(model).merge_and_unload()
    torch.testing.assert_close(merged(x), got, rtol=1e-4, atol=1e-5)


def test_peft_is_itself_again(adapters):
    from peft.tuners.lora import layer, model

    from metate.compat import peft

    peft.enable()
    peft.disable()
    assert model.dispatch_default is layer.dispatch_default
    low_bit, _ = low_bit_and_dense("mixtral")
    with pytest.raises(ValueError):  # finds nothing
        adapters.get_peft_model(low_bit, adapters.LoraConfig(target_parameters=TARGETS))
