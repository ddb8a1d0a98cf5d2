"""transformers models on attn_implementation="metate" against eager: logits, gradients and generated tokens."""

import copy
import itertools
import random

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from transformers import masking_utils

import metate
from metate.compat import transformers as route

BATCH, LENGTH = 3, 24
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 96,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
DECODERS = {
    "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: (hf.Qwen2ForCausalLM, hf.Qwen2Config(**GROUPED)),
    "mistral": lambda: (hf.MistralForCausalLM, hf.MistralConfig(**GROUPED, sliding_window=5)),
    "gemma2": lambda: (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, attn_logit_softcapping=2.0),
    ),
    "gpt_oss": lambda: (
        hf.GptOssForCausalLM,
        hf.GptOssConfig(**GROUPED, head_dim=8, sliding_window=5, num_local_experts=4, num_experts_per_tok=2),
    ),
    "gpt2": lambda: (hf.GPT2LMHeadModel, hf.GPT2Config(**TEXT, n_inner=48)),
    "t5": lambda: (
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=96),
    ),
}
ENCODERS = {
    "bert": lambda: (hf.BertForMaskedLM, hf.BertConfig(**TEXT)),
    "vit": lambda: (hf.ViTForImageClassification, hf.ViTConfig(**IMAGE)),
    "clip": lambda: (hf.CLIPModel, hf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16)),
}
MODELS = {**DECODERS, **ENCODERS}
PADDINGS = {
    "full": (slice(0), slice(0)),
    "left": (slice(0, 7), slice(0, 1)),
    "right": (slice(-7, None), slice(-1, None)),
}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    route.enable()
    yield
    route.disable()


def models(name):
    """The same random model on eager and on metate."""
    make, config = MODELS[name]()
    torch.manual_seed(0)
    eager = make._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    metate = make._from_config(copy.deepcopy(config), attn_implementation="metate").eval()
    metate.load_state_dict(eager.state_dict())
    return eager, metate


def inputs_of(name, padding):
    torch.manual_seed(1)
    given = {}
    if name != "vit":
        given["input_ids"] = torch.randint(2, 90, (BATCH, LENGTH))
        given["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
        for row, hole in enumerate(PADDINGS[padding]):
            given["attention_mask"][row, hole] = 0
        if padding == "full":
            del given["attention_mask"]
    if name in ("vit", "clip"):
        given["pixel_values"] = torch.randn(BATCH, 3, 16, 16)
    if name == "clip":
        given["input_ids"][:, 10] = 96  # the text is pooled where it ends
    if name == "t5":
        given["decoder_input_ids"] = torch.randint(2, 90, (BATCH, 11))
    return given


def run(model, given, name):
    """What counts of the output (nothing at padding), and every gradient."""
    model.zero_grad()
    output = model(**given)
    answer = torch.cat([output.text_embeds, output.image_embeds], -1) if name == "clip" else output.logits
    mask = given.get("attention_mask")
    if mask is not None and name not in ("t5", "clip"):
        answer = answer * mask[..., None]
    (answer * torch.arange(answer.numel()).view(answer.shape).sin()).sum().backward()
    return answer.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(want, got):
    scale = want[0].abs().max()
    assert (want[0] - got[0]).abs().max() <= 2e-6 * max(scale, 1)
    assert want[1].keys() == got[1].keys()
    largest = max(g.abs().max() for g in want[1].values())
    for name, gradient in want[1].items():
        error = (gradient - got[1][name]).abs().max()
        assert error <= 1e-5 * gradient.abs().max() + 1e-6 * largest, name


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_eager(name, padding):
    if name == "vit" and padding != "full":
        return
    given = inputs_of(name, padding)
    eager, metate = models(name)
    assert metate.config._attn_implementation == "metate"
    want, got = run(eager, given, name), run(metate, given, name)
    assert_same(want, got)
    learned = {"t5": "relative_attention_bias", "gpt_oss": "sinks"}.get(name)
    if learned:
        assert all(got[1][n].abs().max() > 0 for n in got[1] if learned in n)


@pytest.mark.parametrize("padding", ["full", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generates_the_tokens_of_eager(name, padding):
    given = inputs_of(name, padding)
    given.pop("decoder_input_ids", None)
    tokens = [m.generate(**given, max_new_tokens=9, do_sample=False) for m in models(name)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generates_with_a_static_cache(name):
    given = inputs_of(name, "left")
    options = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    eager, metate = models(name)
    assert torch.equal(eager.generate(**given, **options), metate.generate(**given, **options))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_continuous_batching_generates_the_tokens_of_eager(name, monkeypatch):
    """Where transformers' pages may be read in place, which those of sliding windows may not, they are."""
    eager, metate = models(name)
    read = []
    attend = route.paged_attention
    monkeypatch.setattr(route, "paged_attention", lambda *a, **k: read.append(a) or attend(*a, **k))
    prompts = [torch.randint(2, 90, (length,)).tolist() for length in (5, 3, 20)]
    greedy = hf.GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=96, pad_token_id=0)
    want = [eager.generate(torch.tensor([p]), generation_config=greedy)[0, len(p) :].tolist() for p in prompts]
    room = hf.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)  # else most of this machine's memory
    batch = metate.generate_batch(inputs=prompts, generation_config=greedy, continuous_batching_config=room)
    assert metate.config._attn_implementation == "metate"
    assert [batch[f"req_{i}"].generated_tokens for i in range(3)] == want
    assert bool(read) == (name == "llama")


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences_stay_apart(name):
    given = {"input_ids": inputs_of(name, "full")["input_ids"]}
    given["position_ids"] = torch.cat([torch.arange(n) for n in (9, 1, 14)]).expand(BATCH, -1)
    eager, metate = models(name)
    assert_same(run(eager, given, name), run(metate, given, name))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_takes_masks_with_four_dimensions(dtype):
    eager, metate = models("llama")
    given = inputs_of("llama", "full")
    visible = (torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    want = run(eager, {**given, "attention_mask": added}, "t5")
    assert_same(want, run(metate, {**given, "attention_mask": visible if dtype == torch.bool else added}, "t5"))


def test_compiled_model_gives_the_same():
    eager, metate = models("mistral")
    given = inputs_of("mistral", "left")
    metate.compile(backend="eager")
    assert_same(run(eager, given, "mistral"), run(metate, given, "mistral"))


def test_dropout_drops_in_training_only():
    module = torch.nn.Module()
    q = torch.randn(1, 2, 40, 8)
    v = torch.ones(1, 2, 40, 8)
    out, weights = route._attention(module, q, q, v, None, is_causal=False, dropout=0.5)
    assert weights is None
    assert not torch.allclose(out, torch.ones_like(out), atol=0.05)
    assert abs(out.mean() - 1) < 0.1
    assert torch.allclose(route._attention(module, q, q, v, None, is_causal=False)[0], torch.ones_like(out))


def test_refuses_what_it_would_get_wrong():
    q = torch.randn(1, 2, 4, 8)
    module = torch.nn.Module()
    with pytest.raises(NotImplementedError, match="output_attentions"):
        route._attention(module, q, q, q, None, output_attentions=True)
    with pytest.raises(NotImplementedError, match="block_indices"):
        route._attention(module, q, q, q, None, block_indices=q)
    for mask in (torch.ones(1, 4), torch.ones(1, 1, 4, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="attention_mask"):
            route._attention(module, q, q, q, mask)


def test_disable_takes_the_registration_back():
    route.disable()
    try:
        with pytest.raises(ValueError, match="metate"):
            models("llama")
    finally:
        route.enable()


# Masks: what the layers get means what transformers says, and costs no N × N tensor.


def visible(mask, columns):
    """The bool mask that an int32 mask of the route stands for."""
    keys = torch.arange(columns)
    seen = (keys >= mask[..., :1]) & (keys < mask[..., 1:2])
    if mask.shape[3] > 2:
        seen = seen & (mask[..., 2:][..., keys // 32] >> (keys % 32) & 1).bool()
    return seen


def patterns(rng, batch, rows):
    window = rng.choice([1, 2, 4, 30])
    lengths = [list(itertools.islice(_restarts(rng), rows)) for _ in range(batch)]
    positions = torch.tensor(lengths)
    packed = (positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return {
        "causal": masking_utils.causal_mask_function,
        "sliding": masking_utils.sliding_window_causal_mask_function(window),
        "chunked": masking_utils.chunked_causal_mask_function(window, torch.randint(0, 3, (batch,))),
        "bidirectional": masking_utils.bidirectional_mask_function,
        "bidirectional sliding": masking_utils.sliding_window_bidirectional_mask_function(window),
        "packed": masking_utils.packed_sequence_compatibility_function(
            masking_utils.sliding_window_causal_mask_function(window), positions, packed
        ),
    }


def _restarts(rng):
    while True:
        yield from range(rng.randint(1, 4))


def padding_masks(rng, batch, columns):
    mask = torch.ones(batch, columns, dtype=torch.bool)
    for row in mask:
        kind, n = rng.choice(["left", "right", "holes", "none"]), rng.randint(0, columns - 1)
        if kind == "left":
            row[:n] = False
        elif kind == "right":
            row[columns - n :] = False
        elif kind == "holes":
            row[torch.rand(columns) < 0.3] = False
    return mask


@pytest.mark.parametrize(
    "pattern", ["causal", "sliding", "chunked", "bidirectional", "bidirectional sliding", "packed"]
)
def test_masks_mean_what_transformers_says(pattern):
    rng = random.Random(pattern)
    for _ in range(60):
        batch, rows, past = rng.randint(1, 3), rng.choice([1, 2, 5, 40]), rng.choice([0, 3, 37])
        past = 0 if pattern == "packed" else past
        forgotten = 2 if pattern == "sliding" and past else 0
        columns = rows + past - forgotten
        padding = None if pattern == "packed" or rng.random() < 0.3 else padding_masks(rng, batch, rows + past)
        arguments = {
            "batch_size": batch,
            "q_length": rows,
            "kv_length": columns,
            "q_offset": past,
            "kv_offset": forgotten,
            "mask_function": patterns(rng, batch, rows)[pattern],
            "attention_mask": padding,
        }
        want = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        skips = {
            "allow_is_causal_skip": pattern in ("causal", "sliding", "chunked"),
            "allow_is_bidirectional_skip": pattern.startswith("bidirectional"),
        }
        got = route._mask(**arguments, **skips)
        if got is None:  # the layers tell causal from bidirectional, and count from the top left
            assert pattern in ("causal", "bidirectional")
            got = torch.ones_like(want).tril() if pattern == "causal" and rows > 1 else torch.ones_like(want)
        else:
            assert got.dtype == torch.int32, "an N × N mask where intervals would do"
            got = visible(got, columns).expand(batch, 1, rows, columns)
        assert torch.equal(got, want)


def test_unknown_patterns_stay_bool():
    odd = lambda b, h, q, k: (q + k) % 2 == 0  # noqa: E731
    got = route._mask(1, 4, 4, mask_function=odd, allow_is_causal_skip=False)
    assert got.dtype == torch.bool
    assert torch.equal(got[0, 0], torch.tensor([[(q + k) % 2 == 0 for k in range(4)] for q in range(4)]))
    causal = route._mask(1, 4, 4, allow_is_causal_skip=False)
    assert causal.dtype == torch.bool, "the caller wants a mask to compute with"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt_oss"])
def test_serves_the_texts_of_generate(name):
    """Prompts in pieces, some with a common beginning, beside each other: texts are those of each alone."""
    eager, paged = models(name)
    shared = torch.randint(2, 90, (17,)).tolist()
    prompts = [torch.randint(2, 90, (n,)).tolist() for n in (5, 1, 20)] + [[*shared, 3], [*shared, 4, 5]]
    greedy = hf.GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=96, pad_token_id=0)
    want = [eager.generate(torch.tensor([p]), generation_config=greedy)[0, len(p) :].tolist() for p in prompts]
    served = route.PagedCausalLM(paged)
    options = dict(max_new_tokens=9, eos=96, page_size=8, token_budget=16, max_sequences=3)
    assert [text.tokens for text in metate.generate(served, prompts, **options)] == want


def test_serving_refuses_what_it_would_get_wrong():
    eager, served = models("llama")
    with pytest.raises(ValueError, match='one with "eager", expected a model with attn_implementation="metate"'):
        route.PagedCausalLM(eager)
    served.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(NotImplementedError, match="layers of chunked_attention"):
        route.PagedCausalLM(served)


def test_models_that_attend_by_themselves_are_refused():
    """Bloom asks for a mask by name and computes attention itself: without one it would see the future."""
    config = hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ValueError, match="BloomForCausalLM computes attention by itself"):
        hf.BloomForCausalLM._from_config(config, attn_implementation="metate")
    route.disable()
    try:
        assert not hasattr(hf.PreTrainedModel.get_correct_attn_implementation, "original")
    finally:
        route.enable()


def test_a_mask_that_a_model_changed_is_named():
    mask = torch.zeros(2, 1, 12, 12, dtype=torch.int32)
    q = torch.randn(2, 4, 12, 8)
    with pytest.raises(NotImplementedError, match="the model changes its mask"):
        route._attention(torch.nn.Module(), q, q, q, mask)


def test_a_causal_mask_of_several_queries_is_written_out():
    """Decoders of NLLB-MoE and Pegasus-X have layers that say they are not causal: only the mask says that they are."""
    mask = route._mask(2, 7, 7)
    assert torch.equal(visible(mask, 7)[0, 0], torch.ones(7, 7, dtype=torch.bool).tril())
    layer = torch.nn.Module()
    layer.is_causal = False
    q = torch.randn(2, 4, 7, 8)
    want = metate.attention(*(q.transpose(1, 2),) * 3, causal=True)
    assert torch.equal(route._attention(layer, q, q, q, mask)[0], want)
    assert route._mask(2, 1, 7, 6) is None


def test_a_missing_transformers_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for call in (route.enable, route.enable_quantised):
        with pytest.raises(ModuleNotFoundError, match=rf"{call.__name__}: transformers is not installed; `pip install"):
            call()
