"""The Llama decoder: transformers' logits from its checkpoints, the cache, both attentions, hostile folders."""

import json

import pytest
import torch

from metate.errors import FormatError
from metate.models import Cache, Llama, LlamaConfig

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS = {
    "grouped heads": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases, head_dim of its own": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "Llama 3.1 positions": {"rope_parameters": LLAMA3},
}


SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def theirs(**changes):
    return perturbed(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **changes)))


def perturbed(model):
    """In evaluation mode, with norms that are not all ones."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 0.7, 0.1)
    return model.eval()


def tokens(length, batch=2):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    theirs().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("attention", ["metate", "naive"])
@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant, shards, attention):
    model = theirs(**VARIANTS[variant])
    model.save_pretrained(tmp_path, max_shard_size="60KB" if shards == "shards" else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "shards")
    x = tokens(130)
    with torch.no_grad():
        torch.testing.assert_close(Llama.from_pretrained(tmp_path, attention)(x), model(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Mistral", "Qwen3"])
def test_logits_of_other_families(tmp_path, family):
    changes = {"sliding_window": None} if family == "Mistral" else {"head_dim": 24}
    config = getattr(transformers, f"{family}Config")(**SIZES, **changes)
    model = perturbed(getattr(transformers, f"{family}ForCausalLM")(config))
    model.save_pretrained(tmp_path)
    x = tokens(70)
    with torch.no_grad():
        torch.testing.assert_close(Llama.from_pretrained(tmp_path)(x), model(x).logits, rtol=1e-4, atol=1e-4)


def test_gradients_equal_naive_attention(checkpoint):
    gradients = []
    for attention in ("metate", "naive"):
        model = Llama.from_pretrained(checkpoint, attention)
        torch.nn.functional.cross_entropy(model(tokens(70)).flatten(0, 1), tokens(70).roll(-1, 1).flatten()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_dtype_of_the_checkpoint_or_the_one_asked_for(checkpoint):
    assert Llama.from_pretrained(checkpoint)(tokens(5)).dtype == torch.float32
    assert Llama.from_pretrained(checkpoint, dtype=torch.bfloat16)(tokens(5)).dtype == torch.bfloat16


@torch.no_grad()
def test_cache_gives_the_logits_of_the_whole(checkpoint):
    model, x = Llama.from_pretrained(checkpoint), tokens(50)
    cache = Cache(model.config, 2, 50, model.embed_tokens.weight)
    parts = torch.cat([model(part, cache) for part in x.split([20, 1, 1, 28], 1)], 1)
    torch.testing.assert_close(parts, model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"metate.Cache: 51 tokens, expected at most 50"):
        model(x[:, :1], cache)


def test_completion_is_greedy_or_drawn_reproducibly(checkpoint):
    model, x = Llama.from_pretrained(checkpoint), tokens(9)

    def complete(temperature, seed=0):
        return model.complete(x, 12, temperature, torch.Generator().manual_seed(seed))

    with torch.no_grad():
        whole = torch.cat([x, complete(0.0)], 1)
        assert torch.equal(model(whole)[:, 8:-1].argmax(-1), whole[:, 9:])
    assert torch.equal(complete(1.0), complete(1.0))
    assert not torch.equal(complete(1.0), complete(1.0, seed=1))
    assert model.complete(x, 0, 1.0, torch.Generator()).shape == (2, 0)


def test_initialization_is_deterministic(checkpoint):
    config = LlamaConfig.read(checkpoint / "config.json")
    first, second = (Llama(config).initialize(torch.Generator().manual_seed(3)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": "97"}, "vocab_size is '97'"),
        ({"head_dim": 15}, "head_dim is 15, expected an even"),
        ({"num_attention_heads": None}, "lacks or garbles|num_attention_heads is None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"vocab_size": 96}, "embed_tokens.weight"),
        ({"num_hidden_layers": 2}, "layers.2"),
    ],
)
def test_wrong_configurations_are_named(checkpoint, tmp_path, change, message):
    raw = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    with pytest.raises(FormatError, match=message):
        Llama.from_pretrained(tmp_path)


def test_an_index_stays_in_its_folder(checkpoint, tmp_path):
    (tmp_path / "config.json").symlink_to(checkpoint / "config.json")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": str(checkpoint / "model.safetensors")}}))
    with pytest.raises(FormatError, match="in the same folder"):
        Llama.from_pretrained(tmp_path)
    index.write_text("{}")
    with pytest.raises(FormatError, match=r"no \.safetensors and no \.gguf"):
        Llama.from_pretrained(tmp_path)


def test_what_is_no_batch_of_tokens_is_named(checkpoint):
    model = Llama.from_pretrained(checkpoint)
    for wrong, error, message in (
        (tokens(5)[0], ValueError, r"metate.Llama: tokens is of shape \(5,\), expected \(batch, seqlen\)"),
        (tokens(5).float(), TypeError, "tokens is .*float32, expected int64 or int32"),
        (tokens(5).tolist(), TypeError, "tokens is list, expected a torch.Tensor"),
    ):
        with pytest.raises(error, match=message):
            model(wrong)
    with pytest.raises(FileNotFoundError, match=r"path is org/name, expected a folder .* `hf download NAME"):
        Llama.from_pretrained("org/name")


def test_unknown_attention_is_named(checkpoint):
    with pytest.raises(ValueError, match="attention is 'flash', expected 'metate' or 'naive'"):
        Llama.from_pretrained(checkpoint, "flash")
