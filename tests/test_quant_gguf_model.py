"""GGUF models, written by the gguf package, in transformers and in ours: the dequantised model is the truth."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import gguf
import transformers as hf

import metate
from metate.compat import transformers as route
from metate.models.llama import Llama
from metate.nn import QuantGroupedLinear, QuantLinear

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}  # fmt: skip
TOKENS = torch.randint(2, 90, (2, 21), generator=torch.Generator().manual_seed(0))
Q4_0, Q5_1, Q8_0, F16, F32 = (getattr(gguf.GGMLQuantizationType, n) for n in ("Q4_0", "Q5_1", "Q8_0", "F16", "F32"))
MIXED = {"down_proj": Q8_0, "v_proj": Q5_1, "k_proj": Q5_1, "o_proj": F16, "embed_tokens": Q8_0, "lm_head": Q8_0}
ARCHITECTURES = {
    "mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_accelerate(monkeypatch):
    """transformers asks for accelerate before it reads a GGUF file, and then does not use it on one device."""
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)


def dense_model(kind="Llama", **changes):
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**{**SIZES, **changes}, dtype="float32")
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float(not name.endswith("bias")), 0.1)
    return model


def paired(values, heads):
    """The row order of llama.cpp's converter for queries and keys."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def tensors_of(name, values, config):
    """What llama.cpp's converter makes of a parameter: (name, values) of one tensor, or of two."""
    kind = ARCHITECTURES.get(config.model_type, config.model_type)
    if name.endswith("experts.gate_up_proj"):
        return [(name.replace("gate_up_proj", f"{p}_proj.weight"), half)
                for p, half in zip(("gate", "up"), np.split(values, 2, 1), strict=True)]  # fmt: skip
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", values)]
    if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
        return [(name, paired(values, config.num_attention_heads if ".q_" in name else config.num_key_value_heads))]
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return [(name, values + 1)]
    return [(name, values[0] if name.endswith("shared_expert_gate.weight") else values)]


def write(path, model, kinds=MIXED, **changes):
    """The model as a GGUF file; its own weights become those that the file stands for."""
    config = model.config
    kind = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, changes.get("architecture", kind))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(changes.get("heads", config.num_attention_heads))
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(config.num_local_experts if kind == "llama" else config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy().copy()
        whole = values.ndim == 1 or ".gate." in name or "shared_expert_gate" in name
        stored = F32 if whole else kinds.get(name.split(".")[-2], Q4_0)
        for part, of_file in tensors_of(name, values, config):
            writer.add_tensor(
                names.get_name(part, (".weight", ".bias")), gguf.quantize(of_file, stored), raw_dtype=stored
            )
        parameter.data.copy_(
            torch.from_numpy(gguf.dequantize(gguf.quantize(values, stored), stored).astype(np.float32))
        )
    for name, tensor in changes.get("extra", {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def load(folder, **options):
    with route.quantised():
        model, info = hf.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="x.gguf", output_loading_info=True, **options
        )
    assert not any(info.values()), info
    return model


def low_bit(model):
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


MODELS = {
    "llama": {}, "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama tied": {"tie_word_embeddings": True},
    "mistral": {"kind": "Mistral"}, "qwen2": {"kind": "Qwen2"}, "qwen3": {"kind": "Qwen3", "head_dim": 128},
    "gemma2": {"kind": "Gemma2", "head_dim": 32, "tie_word_embeddings": True},
    "gemma3": {"kind": "Gemma3Text", "head_dim": 32, "tie_word_embeddings": True},
    "mixtral": {"kind": "Mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2 moe": {"kind": "Qwen2Moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 64},
    "qwen3 moe": {"kind": "Qwen3Moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "norm_topk_prob": True, "head_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_transformers(name, tmp_path):
    dense = write(tmp_path / "x.gguf", dense_model(**MODELS[name]))
    model = load(tmp_path, **({"config": dense.config} if re.search("bias|moe|mixtral", name) else {}))
    linears = {n for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear)}
    whole = {n for n in linears if "o_proj" in n or "shared_expert_gate" in n}
    assert low_bit(model) == linears - whole - ({"lm_head"} if dense.config.tie_word_embeddings else set())
    for layer in low_bit(model):
        assert torch.equal(model.get_submodule(layer).dequantize(), dense.get_submodule(layer).weight)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 97}  # none ends early
    assert torch.equal(model.generate(TOKENS, **options), dense.generate(TOKENS, **options))


@pytest.mark.parametrize(
    "name", ["llama", "llama with biases", "llama tied", "mistral", "qwen3", "mixtral", "qwen3 moe"]
)
def test_logits_of_our_llama(name, tmp_path):
    dense = write(tmp_path / "x.gguf", dense_model(**MODELS[name]))
    model = Llama.from_pretrained(tmp_path / "x.gguf")
    layer = 3 if re.search("mixtral|moe", name) else 6
    assert len(low_bit(model)) == 2 * layer + ("tied" not in name)
    assert len([m for m in model.modules() if isinstance(m, QuantGroupedLinear)]) == (4 if layer == 3 else 0)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), dense(TOKENS).logits, rtol=1e-4, atol=1e-5)
    half = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(TOKENS).dtype == torch.bfloat16
    assert half.layers[0].self_attn.q_proj.scales.dtype == torch.float16


def test_files_of_one_float_type_stay_in_it(tmp_path):
    dense = write(tmp_path / "x.gguf", dense_model(), dict.fromkeys([*MIXED, "q_proj", "gate_proj", "up_proj"], F16))
    model = Llama.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float16} and not low_bit(model)
    torch.testing.assert_close(model(TOKENS).float(), dense(TOKENS).logits, rtol=0.02, atol=0.02)
    assert not low_bit(load(tmp_path))


def test_rotary_factors(tmp_path):
    """Llama 3.1: the metadata have the base alone, a tensor what each frequency is divided by."""
    model = dense_model(rope_parameters=LLAMA3)
    plain = dense_model().model.rotary_emb.inv_freq
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == pytest.approx(8.0) and factors.min() < 2
    dense = write(tmp_path / "x.gguf", model, extra={"rope_freqs.weight": factors})
    with torch.no_grad():
        expected = dense(TOKENS).logits
        for found in (load(tmp_path)(TOKENS).logits, load(tmp_path, config=dense.config)(TOKENS).logits,
                      Llama.from_pretrained(tmp_path)(TOKENS)):  # fmt: skip
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dtype_base_model_and_dequantised(tmp_path):
    dense = write(tmp_path / "x.gguf", dense_model())
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half.model.embed_tokens.weight.dtype == half.model.norm.weight.dtype == torch.bfloat16
    assert (half(TOKENS).logits.double() - dense(TOKENS).logits).norm() < 0.02 * dense(TOKENS).logits.norm()
    with route.quantised():
        base = hf.AutoModel.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert low_bit(base) == {n.removeprefix("model.") for n in low_bit(half)} - {"lm_head"}
    torch.testing.assert_close(
        base(TOKENS).last_hidden_state, dense.model(TOKENS).last_hidden_state, rtol=1e-4, atol=1e-4
    )
    plain = load(tmp_path, quantization_config=hf.GgufConfig(dequantize=True))
    assert not low_bit(plain)
    torch.testing.assert_close(plain(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not serializable"):
        half.save_pretrained(tmp_path / "again")


def test_a_gradient_reaches_what_stands_before(tmp_path):
    write(tmp_path / "x.gguf", dense_model())
    model = load(tmp_path)
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    assert embedded.grad.abs().sum() > 0


def test_experts_and_models_without_any_are_told_apart(tmp_path):
    """Of a Mixtral's file transformers makes a Llama, whose layers would stay as they were made."""
    dense = write(tmp_path / "x.gguf", dense_model(**MODELS["mixtral"]))
    with pytest.raises(NotImplementedError, match="4 experts"):
        load(tmp_path)
    write(tmp_path / "x.gguf", dense_model())
    with pytest.raises(NotImplementedError, match="0 experts"):
        load(tmp_path, config=dense.config)


BROKEN = {
    "unknown tensor": ({"extra": {"blk.0.ffn_gate_inp_shexp.weight": np.zeros(64, np.float32)}}, "ffn_gate_inp_shexp"),
    "experts not counted": ({"extra": {"blk.0.ffn_gate_exps.weight": np.zeros((4, 64, 64), np.float32)}}, "stack of 4"),
    "experts no stack": ({"extra": {"blk.0.ffn_gate_exps.weight": np.zeros((4, 64), np.float32)}}, "stack of matrices"),
    "heads": ({"heads": 3}, "heads"),
    "architecture": ({"architecture": "gpt2"}, "general.architecture"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_other_models_are_refused(what, tmp_path):
    changes, named = BROKEN[what]
    write(tmp_path / "x.gguf", dense_model(), **changes)
    with pytest.raises(metate.FormatError, match=named):
        Llama.from_pretrained(tmp_path / "x.gguf")
    with pytest.raises(metate.FormatError, match=named):
        load(tmp_path, config=dense_model().config)
