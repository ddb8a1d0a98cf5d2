"""transformers loads GPTQ, AWQ and bitsandbytes checkpoints on our kernels; the dequantised model is the truth."""

import contextlib
import copy
import dataclasses
import json

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from transformers.quantizers import auto

from metate.compat import transformers as route
from metate.nn import QuantLinear, dequantize_model
from metate.quant import bitsandbytes as bnb
from metate.quant import quantize_hqq, quantize_nf4, quantize_rtn, save_quantized
from metate.quant.checkpoint import load_quantized

CONFIG = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 96,
    "attention_bias": True,
}  # fmt: skip
TOKENS = torch.randint(2, 90, (2, 11), generator=torch.Generator().manual_seed(0))


def llama(**changes):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**CONFIG, **changes}, dtype="float32")).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def write(folder, method, quantise, skip=("lm_head",), model=None):
    """A checkpoint, and the dense model that it stands for."""
    model = model or llama()
    linears = {
        name for name, m in model.named_modules()
        if type(m) in (torch.nn.Linear, hf.pytorch_utils.Conv1D) and not any(s in name for s in skip)
    }  # fmt: skip
    weights = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in linears:
            turned = isinstance(model.get_submodule(module), hf.pytorch_utils.Conv1D)
            weights[module] = quantise(module, tensor.T.contiguous() if turned else tensor)
            dense = weights[module].dequantize()
            model.get_submodule(module).weight.data.copy_(dense.T if turned else dense)
        elif name not in (model.all_tied_weights_keys or {}):
            weights[name] = tensor
    save_quantized(folder, weights, method, {**model.config.to_dict(), "architectures": [type(model).__name__]})
    return model, linears


def rewrite_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def load(folder, **options):
    with route.quantised():
        model, info = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def permuted(weight, group_size, **options):
    """As act-order makes it: columns in another order before they are grouped."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    made = quantize_rtn(weight[:, order], group_size=group_size, **options)
    return dataclasses.replace(made, permutation=order.int())


CHECKPOINTS = {
    "gptq": ("gptq", lambda name, w: quantize_rtn(w, group_size=32)),
    "gptq 8 bits": ("gptq", lambda name, w: quantize_rtn(w, 8, 32)),
    "gptq asymmetric": ("gptq", lambda name, w: quantize_rtn(w, 4, 16, symmetric=False)),
    "gptq desc_act": ("gptq", lambda name, w: permuted(w, 32)),
    "gptq dynamic": ("gptq", lambda name, w: quantize_rtn(w, 8 if "down" in name else 4, 32)),
    "awq": ("awq", lambda name, w: quantize_rtn(w, group_size=32, symmetric=False)),
    "nf4": ("bitsandbytes", lambda name, w: quantize_nf4(w, 32)),
    "metate": ("metate", lambda name, w: quantize_hqq(w, 3, 48) if "down" in name else permuted(w, 7)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_logits_are_those_of_the_dequantised_model(kind, tmp_path):
    method, quantise = CHECKPOINTS[kind]
    dense, linears = write(tmp_path, method, quantise)
    model = load(tmp_path)
    assert {name for name, m in model.named_modules() if isinstance(m, QuantLinear)} == linears
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("proj.bias"))
    for name in linears:
        assert torch.equal(model.get_submodule(name).dequantize(), dense.get_submodule(name).weight)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **options), dense.generate(TOKENS, **options))


def test_low_precision_models(tmp_path):
    dense, _ = write(tmp_path, "gptq", CHECKPOINTS["gptq"][1])
    for dtype in (torch.bfloat16, torch.float16):
        model = load(tmp_path, dtype=dtype)
        assert model.model.embed_tokens.weight.dtype == model.model.layers[0].self_attn.q_proj.bias.dtype == dtype
        assert model.model.layers[0].self_attn.q_proj.scales.dtype == torch.float16
        logits = model(TOKENS).logits
        assert logits.dtype == dtype
        assert (logits.double() - dense(TOKENS).logits).norm() < 0.02 * dense(TOKENS).logits.norm()


def test_layers_that_the_checkpoint_keeps_dense_stay_dense(tmp_path):
    dense, linears = write(tmp_path, "gptq", CHECKPOINTS["gptq"][1], skip=("lm_head", "layers.0.mlp", "k_proj"))
    model = load(tmp_path)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert {name for name, m in model.named_modules() if isinstance(m, QuantLinear)} == linears
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_head_and_tied_weights(tmp_path):
    model, _ = write(tmp_path / "head", "gptq", CHECKPOINTS["gptq"][1], skip=(), model=llama(vocab_size=96))
    loaded = load(tmp_path / "head")
    assert isinstance(loaded.lm_head, QuantLinear)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    tied, _ = write(tmp_path / "tied", "awq", CHECKPOINTS["awq"][1], model=llama(tie_word_embeddings=True))
    loaded = load(tmp_path / "tied")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded(TOKENS).logits, tied(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_layers_that_keep_their_weight_turned(tmp_path):
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=97, n_embd=64, n_layer=1, n_head=4, n_positions=32, dtype="float32")
    dense, linears = write(tmp_path, "gptq", CHECKPOINTS["gptq"][1], model=hf.GPT2LMHeadModel(config).eval())
    assert "transformer.h.0.attn.c_attn" in linears
    torch.testing.assert_close(load(tmp_path)(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_states_that_bitsandbytes_itself_writes(nested, tmp_path):
    """The nested ones, and the int8 ones, which our writer does not make."""
    from safetensors.torch import load_file, save_file

    model, linears = write(tmp_path, "bitsandbytes", CHECKPOINTS["nf4"][1])
    dense = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in dense.items() if not any(n.startswith(f"{name}.weight") for name in linears)}
    for name in linears:
        weight = llama().get_submodule(name).weight
        made = bnb.quantize_4bit(weight, "fp4", nested=nested)
        for part, tensor in made.tensors().items():
            kept[f"{name}.weight" if part == "weight" else f"{name}.weight.{part}"] = tensor.clone()
        model.get_submodule(name).weight.data.copy_(made.lower().dequantize())
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    rewrite_config(tmp_path, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=nested)
    torch.testing.assert_close(load(tmp_path)(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_int8_states(tmp_path):
    from safetensors.torch import load_file, save_file

    model, linears = write(tmp_path, "bitsandbytes", CHECKPOINTS["nf4"][1])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {n: t for n, t in tensors.items() if not any(n.startswith(f"{name}.weight") for name in linears)}
    for name in linears:
        made = bnb.quantize_int8(llama().get_submodule(name).weight.detach())
        tensors |= {f"{name}.{part}": tensor for part, tensor in made.items()}
        tensors[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        model.get_submodule(name).weight.data.copy_(bnb.lower_int8(made).dequantize())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    rewrite_config(tmp_path, load_in_4bit=False, load_in_8bit=True)
    loaded = load(tmp_path)
    assert loaded.is_loaded_in_8bit
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True},
], ids=["nf4", "int8"])  # fmt: skip
def test_quantises_a_dense_checkpoint(options, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, quantization_config=hf.BitsAndBytesConfig(**options), dtype=torch.float32)
    quantised = {name for name, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    assert len(quantised) == 14 and "lm_head" not in quantised
    for name in quantised:
        weight = model.get_submodule(name).weight.detach()
        if "load_in_8bit" in options:
            expected = bnb.lower_int8(bnb.quantize_int8(weight))
        else:
            expected = quantize_nf4(weight, nested=True)
        assert torch.equal(loaded.get_submodule(name).dequantize(), expected.dequantize())
    assert (loaded(TOKENS).logits - model(TOKENS).logits).norm() < 0.2 * model(TOKENS).logits.norm()


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_parameters_are_counted_without_the_package(options, tmp_path):
    """transformers' Trainer asks at every step, and transformers itself imports bitsandbytes to answer."""
    dense = llama()
    dense.save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=hf.BitsAndBytesConfig(**options), dtype=torch.float32)
    for model_of_it in (model, copy.deepcopy(model)):
        assert model_of_it.num_parameters() == dense.num_parameters()
        assert model_of_it.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    model.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 0


def test_dequantises_and_refuses_to_save(tmp_path):
    dense, linears = write(tmp_path, "awq", CHECKPOINTS["awq"][1])
    model = load(tmp_path)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")
    model.dequantize()
    assert all(type(model.get_submodule(name)) is torch.nn.Linear for name in linears)
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_what_is_read_is_what_load_quantized_reads(tmp_path):
    _, linears = write(tmp_path, "gptq", CHECKPOINTS["gptq asymmetric"][1])
    model, found = load(tmp_path), load_quantized(tmp_path)
    for name in linears:
        assert torch.equal(model.get_submodule(name).codes, found[name].codes)


def test_a_broken_checkpoint_is_refused(tmp_path):
    write(tmp_path, "gptq", CHECKPOINTS["gptq"][1])
    rewrite_config(tmp_path, bits=8)
    with pytest.raises(Exception, match=r"(?i)scales|conversion|g_idx"):
        load(tmp_path)


def test_the_registration_is_taken_back():
    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    with contextlib.suppress(KeyError), route.quantised():
        route.enable_quantised()
        assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is not before["gptq"]
        raise KeyError
    assert before == auto.AUTO_QUANTIZER_MAPPING
    route.disable_quantised()
    assert before == auto.AUTO_QUANTIZER_MAPPING


@pytest.mark.parametrize("kind", ["gptq desc_act", "awq", "nf4"])
def test_peft_s_lora_trains_on_top(kind, tmp_path):
    peft = pytest.importorskip("peft")
    method, quantise = CHECKPOINTS[kind]
    write(tmp_path, method, quantise)
    model = load(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 0.02)
    losses = []
    for _ in range(25):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    after = dict(model.get_base_model().named_buffers())
    assert all(torch.equal(t, after[n if n in after else _inside(n)]) for n, t in before.items())


@pytest.mark.parametrize("kind", ["gptq desc_act", "awq", "nf4", "metate"])
def test_peft_merges_into_the_loaded_model(kind, tmp_path):
    peft = pytest.importorskip("peft")
    from metate.compat import peft as adapters

    method, quantise = CHECKPOINTS[kind]
    write(tmp_path, method, quantise)
    model = load(tmp_path).eval()
    plain = model(TOKENS).logits
    adapters.enable()
    try:
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
        adapted = model(TOKENS).logits
        model.merge_adapter()
        rounded = model(TOKENS).logits
        assert (rounded - adapted).norm() < 0.5 * (plain - adapted).norm()
        model.unmerge_adapter()
        assert torch.equal(model(TOKENS).logits, adapted)
        exact = dequantize_model(copy.deepcopy(model)).merge_and_unload()
        torch.testing.assert_close(exact(TOKENS).logits, adapted, rtol=1e-3, atol=1e-4)
        merged = model.merge_and_unload()
        assert torch.equal(merged(TOKENS).logits, rounded)
        assert sum(type(module) is QuantLinear for module in merged.modules()) == 14
    finally:
        adapters.disable()


def _inside(name):
    module, _, tail = name.rpartition(".")
    return f"{module}.base_layer.{tail}"
