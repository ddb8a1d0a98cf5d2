"""Generation through the paged cache: the texts are those of one prompt alone, whatever happens around it."""

import math
import random

import pytest
import torch

pytest.importorskip("metate._runtime", reason="not built: run `pip install .` in metate's source")
import metate
from metate._runtime import CacheFull
from metate.generate import (
    MatcherConstraint,
    ModelDraft,
    NgramDraft,
    PagedKVCache,
    Part,
    Sampling,
    Scheduler,
    Speculated,
    Wish,
)  # fmt: skip
from metate.models import Llama, LlamaConfig

VOCAB = 61
CONFIG = LlamaConfig(VOCAB, 48, 64, 2, 4, 2, 12)
SAMPLED = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01}


def llama(seed):
    model = Llama(CONFIG).initialize(torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)  # decided enough that rounding decides nothing
    return model


@pytest.fixture(scope="module")
def model():
    return llama(0)


@pytest.fixture(scope="module")
def smaller():
    """Guesses often right: the model with a little noise."""
    model = llama(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def prompts(count=4, seed=0, shared=()):
    rng = random.Random(seed)
    return [[*shared, *rng.choices(range(VOCAB), k=rng.randrange(1, 30))] for _ in range(count)]


def alone(model, texts, new=16, **settings):
    """Each prompt through the contiguous cache of the model, or, where it is drawn, through a batch of its own."""
    if not settings:
        return [model.complete(torch.tensor([t]), new, 0.0, torch.Generator())[0].tolist() for t in texts]
    return [
        metate.generate(model, [text], max_new_tokens=new, seed=i, **settings)[0].tokens for i, text in enumerate(texts)
    ]


def texts_of(generations):
    return [generation.tokens for generation in generations]


def run(scheduler):
    found = {}
    for event in scheduler:
        if event.token is not None:
            found.setdefault(event.request, []).append(event.token)
    scheduler.cache.manager.check()
    assert scheduler.cache.manager.statistics()["used"] == 0
    return found


# Texts.


@pytest.mark.parametrize("drawn", [{}, SAMPLED], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"page_size": 1},
        {"page_size": 7, "token_budget": 8, "max_sequences": 3},  # prompts in pieces of a few tokens
        {"draft": "ngram"},
        {"draft": "ngram", "token_budget": 9, "max_sequences": 4},
    ],
    ids=str,
)
def test_texts_are_those_of_a_prompt_alone(model, drawn, settings):
    texts = prompts()
    found = metate.generate(model, texts, max_new_tokens=16, **drawn, **settings)
    assert texts_of(found) == alone(model, texts, **drawn)
    assert {generation.finished for generation in found} == {"length"}


def test_greedy_with_a_draft_model_is_the_same_text(model, smaller):
    texts = prompts()
    scheduler = Scheduler(model, PagedKVCache(model.cache_layout, 200, 5), draft=smaller)
    for text in texts:
        scheduler.add(text, max_new_tokens=16)
    assert list(run(scheduler).values()) == alone(model, texts)
    assert 0 < scheduler.totals.right < scheduler.totals.guessed
    assert scheduler.totals.steps < 16
    draft = scheduler.draft
    assert draft.cache.manager.statistics()["used"] == 0


def test_drawing_with_the_model_as_its_own_draft_accepts_nearly_all(model):
    scheduler = Scheduler(model, PagedKVCache(model.cache_layout, 200), draft=ModelDraft(model, tokens=3))
    for text in prompts():
        scheduler.add(text, max_new_tokens=16, temperature=1.0)
    run(scheduler)
    assert scheduler.totals.right >= 0.99 * scheduler.totals.guessed > 0


def test_ngrams_guess_repetitions(model):
    text = [1, 2, 3, 4, 5, 6, 7, 8] * 3
    draft = NgramDraft(tokens=4)
    draft.begin(model, None)
    wish = Wish(0, [*text, 1, 2, 3], len(text), 4, Sampling())
    assert [guess.token for guess in draft.propose([wish])[0]] == [4, 5, 6, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_run(model, dtype):
    other = llama(0).to(dtype)
    found = metate.generate(other, prompts(3), max_new_tokens=5)
    assert all(len(generation.tokens) == 5 for generation in found)
    if dtype == torch.float64:
        assert texts_of(found) == [text[:5] for text in alone(model, prompts(3))]


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 0.03), ("fp8", 0.12), ("int4", 0.5)])
@torch.inference_mode()
def test_compressed_caches_are_close(model, dtype, tolerance):
    text = prompts(1, seed=3)[0] * 3
    logits = []
    for each in (None, dtype):
        cache = PagedKVCache(model.cache_layout, 20, 8, dtype=each)
        cache.manager.allocate(0, text)
        cache.append(0, text[:-1])
        model.forward_paged(cache.batch([Part(0, text[:-1], range(len(text) - 1), 0)]))
        logits.append(model.forward_paged(cache.batch([Part(0, text[-1:], cache.append(0, text[-1:]), 1)])))
    apart = (logits[1] - logits[0]).abs().max() / logits[0].abs().max()
    assert 0 < apart < tolerance
    small, whole = (PagedKVCache(model.cache_layout, 4, dtype=each).nbytes for each in (dtype, None))
    columns = CONFIG.head_dim
    assert small / whole == {"int8": columns + 4, "fp8": columns + 4, "int4": columns / 2 + 4}[dtype] / (4 * columns)


def test_log_probabilities(model):
    text = prompts(1)[0]
    for settings in ({}, SAMPLED, {"draft": "ngram"}):
        found = metate.generate(model, [text], max_new_tokens=10, return_logprobs=True, **settings)[0]
        with torch.no_grad():
            logits = model(torch.tensor([text + found.tokens]))[0, len(text) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found.logprobs), expected, rtol=1e-3, atol=1e-3)


def test_ends(model):
    text, found = prompts(1)[0], alone(model, prompts(1))[0]
    eos = next(token for i, token in enumerate(found) if i > 3 and token not in found[:i])
    cut = found.index(eos) + 1
    for draft, ends in ((None, eos), ("ngram", eos), (None, torch.tensor(eos)), (None, torch.tensor([eos, eos]))):
        (got,) = metate.generate(model, [text], max_new_tokens=16, eos=ends, draft=draft)
        assert (got.tokens, got.finished) == (found[:cut], "eos")
        (got,) = metate.generate(model, [text], max_new_tokens=16, stop=[found[cut - 2 : cut], [eos]], draft=draft)
        assert (got.tokens, got.finished) == (found[:cut], "stop")


def test_seeds_go_round(model):
    """torch.initial_seed() may be the last there is, and the next prompt's is one more."""
    texts = prompts(2)
    options = dict(max_new_tokens=4, temperature=1.0)
    first = metate.generate(model, texts, seed=2**64 - 1, **options)
    assert [g.tokens for g in first] == [
        g.tokens for g in metate.generate(model, texts, seed=[2**64 - 1, 0], **options)
    ]


# The scheduler.


def test_shared_prefixes_share_blocks(model):
    shared = prompts(1, seed=5)[0][:1] * 33
    texts = prompts(5, seed=6, shared=shared)
    cache = PagedKVCache(model.cache_layout, 100, 4)
    scheduler = Scheduler(model, cache)
    for text in texts:
        scheduler.add(text, max_new_tokens=10)
    scheduler.step()  # all at once: they find what the first is only about to compute
    assert scheduler.totals.found == 4 * 32
    assert len({tuple(cache.manager.table(i)[:8]) for i in range(5)}) == 1
    assert len(cache.manager.statistics()) and scheduler.totals.computed == sum(map(len, texts)) - 4 * 32
    again = Scheduler(model, cache)
    rest = run(scheduler)
    again.add(texts[2], max_new_tokens=10)
    assert run(again)[0] == alone(model, texts, new=10)[2]
    assert again.totals.found >= len(texts[2]) // 4 * 4 - 4
    without = PagedKVCache(model.cache_layout, 100, 4, prefix_cache=False)
    plain = Scheduler(model, without)
    for text in texts:
        plain.add(text, max_new_tokens=10)
    assert run(plain) == dict(enumerate(alone(model, texts, new=10)))
    assert [text[-9:] for text in rest.values()] == [text[1:] for text in alone(model, texts, new=10)]


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["prefix cache", "none"])
def test_preemption_changes_no_text(model, prefix_cache):
    texts = prompts(8, seed=7)
    longest = max(map(len, texts)) + 16
    cache = PagedKVCache(model.cache_layout, -(-longest // 4) + 4, 4, prefix_cache=prefix_cache)
    scheduler = Scheduler(model, cache, token_budget=32, max_sequences=8, draft="ngram")
    for text in texts:
        scheduler.add(text, max_new_tokens=16)
    ends = []
    found = {i: [] for i in range(8)}
    for event in scheduler:
        found[event.request].append(event.token)
        if event.finished:
            ends.append(event.request)
    assert scheduler.totals.preempted > 0
    assert list(found.values()) == alone(model, texts)
    assert ends[0] == 0, "the oldest is never held up"
    assert cache.manager.statistics()["used"] == 0


def test_requests_come_and_go(model):
    """Random arrivals, cancellations, shared prefixes and guesses in a small cache."""
    rng = random.Random(0)
    base = prompts(3, seed=8)
    scheduler = Scheduler(
        model, PagedKVCache(model.cache_layout, 40, 4), max_sequences=6, token_budget=24, draft="ngram"
    )
    texts, found, cancelled, ended = {}, {}, set(), []
    for _ in range(120):
        if len(texts) < 30 and rng.random() < 0.5:
            text = rng.choice(base) + rng.choices(range(VOCAB), k=rng.randrange(1, 6))
            number = scheduler.add(text, max_new_tokens=12)
            texts[number], found[number] = text, []
        if texts and rng.random() < 0.05:
            number = rng.choice(list(texts))
            if scheduler.cancel(number):
                cancelled.add(number)
        for event in scheduler.step() if scheduler.waiting or scheduler.running else ():
            assert event.request not in cancelled and event.request not in ended
            assert event.index == len(found[event.request])
            found[event.request].append(event.token)
            ended += [event.request] if event.finished else []
        scheduler.cache.manager.check()
    for event in scheduler:
        found[event.request].append(event.token)
    assert cancelled and scheduler.totals.found > 0
    kept = [number for number in texts if number not in cancelled]
    assert [found[number] for number in kept] == alone(model, [texts[number] for number in kept], new=12)
    assert scheduler.cache.manager.statistics()["used"] == 0


def test_cancel_frees_everything(model):
    scheduler = Scheduler(model, PagedKVCache(model.cache_layout, 50, 4), max_sequences=2, draft=llama(0))
    numbers = [scheduler.add(text) for text in prompts(3)]
    scheduler.step()
    assert len(scheduler.running) == 2 and scheduler.cache.manager.statistics()["used"] > 0
    assert all(scheduler.cancel(number) for number in numbers)
    assert not any(scheduler.cancel(number) for number in numbers)
    assert scheduler.step() == []
    for cache in (scheduler.cache, scheduler.draft.cache):
        assert cache.manager.available() == 50 and cache.manager.statistics()["sequences"] == 0
    with pytest.raises(ValueError, match="number is 3, expected one that add returned"):
        scheduler.cancel(3)
    with pytest.raises(TypeError, match="number is '0', expected one that add returned"):
        scheduler.cancel("0")


def test_a_request_whose_number_is_taken_waits(model):
    cache = PagedKVCache(model.cache_layout, 50, 4)
    cache.manager.allocate(0, [1, 2])
    scheduler, text = Scheduler(model, cache), prompts(1)[0]
    scheduler.add(text, max_new_tokens=3)
    for _ in range(2):
        with pytest.raises(ValueError, match="sequence is 0, which is allocated already"):
            scheduler.step()
    cache.manager.free(0)
    assert [event.token for event in scheduler] == metate.generate(model, [text], max_new_tokens=3)[0].tokens


def test_a_loop_may_cancel_and_be_taken_up_again(model):
    scheduler = Scheduler(model, PagedKVCache(model.cache_layout, 50, 4))
    texts, found = prompts(3), {i: [] for i in range(3)}
    for text in texts:
        scheduler.add(text, max_new_tokens=6)
    for event in scheduler:
        found[event.request].append(event.token)
        break  # two events of this step are still to come
    for event in scheduler:
        assert event.request != 2
        found[event.request].append(event.token)
        scheduler.cancel(2)  # before its first event
    assert list(found.values()) == [*alone(model, texts, new=6)[:2], []]


def test_forced_tokens_that_do_not_fit_beside_others_wait(model):
    scheduler = Scheduler(model, PagedKVCache(model.cache_layout, 8, 4))
    scheduler.add([1] * 15, max_new_tokens=8)
    scheduler.add([2] * 3, max_new_tokens=29, constraint=spelled(*range(27), None, 1))
    found = run(scheduler)
    assert found[0] == alone(model, [[1] * 15], new=8)[0]
    assert found[1][:27] + found[1][28:] == [*range(27), 1]


class RightGuesses:
    """Of texts that are known before."""

    tokens = 8

    def __init__(self, texts):
        self.texts = texts

    def begin(self, model, cache):
        pass

    def propose(self, wishes):
        done = {wish.request: len(wish.tokens) - wish.prompt for wish in wishes}
        return {
            wish.request: [Speculated(t) for t in self.texts[wish.request][done[wish.request] :][: wish.count]]
            for wish in wishes
        }

    def forget(self, request):
        pass


@pytest.mark.parametrize("blocks", [35, 41, 50])
def test_blocks_that_guesses_hold_make_no_room_for_others(model, monkeypatch, blocks):
    """They did, and the one who waited was let in and put back for ever within one step."""
    texts = [[2, 3], [4, 5], [6, 7], [8] * 10]
    expected = alone(model, texts)
    admit, tries = Scheduler._admit, iter(range(100))
    monkeypatch.setattr(Scheduler, "_admit", lambda self, budget: (next(tries), admit(self, budget))[1])
    scheduler = Scheduler(model, PagedKVCache(model.cache_layout, blocks, 1), draft=RightGuesses(expected))
    for text in texts:
        scheduler.add(text, max_new_tokens=16)
    assert list(run(scheduler).values()) == expected
    assert scheduler.totals.right > 20


def test_first_come_first_served(model):
    scheduler = Scheduler(model, PagedKVCache(model.cache_layout, 100, 4), max_sequences=2, token_budget=16)
    for text in prompts(6):
        scheduler.add(text, max_new_tokens=3)
    begun = list(dict.fromkeys(event.request for event in scheduler))
    assert begun == sorted(begun)


def test_a_full_cache_is_an_error_that_passes(model):
    cache = PagedKVCache(model.cache_layout, 8, 4)
    scheduler = Scheduler(model, cache)
    with pytest.raises(
        ValueError, match="20 tokens long, max_new_tokens 14, expected together at most 33: the cache has 32"
    ):
        scheduler.add([1] * 20, max_new_tokens=14)
    cache.manager.allocate(77, [])
    cache.append(77, [2] * 30)
    scheduler.add([1] * 5, max_new_tokens=5)
    with pytest.raises(CacheFull, match="request 0 does not fit into the 0 blocks that are free"):
        scheduler.step()
    cache.manager.free(77)
    assert run(scheduler)[0] == alone(model, [[1] * 5], new=5)[0]


def test_a_step_that_fails_leaves_no_trace(model):
    class Failing:
        vocab_size, cache_layout, fails = VOCAB, model.cache_layout, {0, 3, 7}
        calls = -1

        def forward_paged(self, batch):
            self.calls += 1
            if self.calls in self.fails:
                raise MemoryError("no memory")
            return model.forward_paged(batch)

    texts = prompts(4, shared=[3] * 20)
    scheduler = Scheduler(Failing(), PagedKVCache(model.cache_layout, 60, 4), draft="ngram")
    for text in texts:
        scheduler.add(text, max_new_tokens=12)
    found = {i: [] for i in range(4)}
    failures = 0
    while scheduler.waiting or scheduler.running:
        try:
            for event in scheduler.step():
                found[event.request].append(event.token)
        except MemoryError:
            failures += 1
            scheduler.cache.manager.check()
    assert failures == 3
    assert list(found.values()) == alone(model, texts, new=12)


def test_a_model_without_numbers_is_named(model):
    class Broken:
        vocab_size, cache_layout = VOCAB, model.cache_layout

        def forward_paged(self, batch):
            return torch.full((len(batch.rows), VOCAB), math.nan)

    with pytest.raises(ValueError, match="finite numbers from the model for request 0"):
        metate.generate(Broken(), [[1]])


def test_a_stream_that_is_left_frees_its_blocks(model):
    cache = PagedKVCache(model.cache_layout, 50, 4)
    events = metate.generate(model, prompts(3), cache=cache, stream=True)
    assert next(events).index == 0 and cache.manager.statistics()["used"] > 0
    events.close()
    assert cache.manager.statistics()["used"] == 0


# The cache.


@torch.inference_mode()
def test_a_fork_copies_what_it_writes(model):
    text = prompts(1)[0][:6]
    cache = PagedKVCache(model.cache_layout, 20, 4)
    cache.manager.allocate(0, text)
    model.forward_paged(cache.batch([Part(0, text, cache.append(0, text), 1)]))
    cache.manager.fork(0, 1)
    parts = [Part(name, [token], cache.append(name, [token]), 1) for name, token in ((0, 5), (1, 9))]
    assert cache.manager.statistics()["copies"] == 1
    logits = model.forward_paged(cache.batch(parts))
    for row, token in enumerate((5, 9)):
        torch.testing.assert_close(logits[row], model(torch.tensor([[*text, token]]))[0, -1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_prompts_in_pieces_equal_the_whole(model):
    text = (prompts(1, seed=9)[0] * 40)[:50]
    expected = model(torch.tensor([text]))[0]
    cache = PagedKVCache(model.cache_layout, 40, 3)
    cache.manager.allocate(0, text)
    rows = []
    for piece in (text[:1], text[1:30], text[30:]):
        rows.append(model.forward_paged(cache.batch([Part(0, piece, cache.append(0, piece), len(piece))])))
    torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-4, atol=1e-4)


def test_evicted_blocks_are_offered_with_their_tokens(model):
    stored = {}
    cache = PagedKVCache(
        model.cache_layout, 8, 4, on_evict=lambda b, t: stored.update({tuple(t): cache.keys[:, b].clone()})
    )
    first, second = ([token] * 17 for token in (1, 2))
    metate.generate(model, [first], max_new_tokens=4, cache=cache)
    kept = cache.keys[:, cache.manager.table(0)] if cache.manager.statistics()["used"] else cache.keys.clone()
    metate.generate(model, [second], max_new_tokens=16, cache=cache)
    assert stored and all(list(tokens[:17]) == first[: len(tokens)] for tokens in stored)
    assert all(any(torch.equal(block, kept[:, i]) for i in range(8)) for block in stored.values())


def test_settings_are_checked(model):
    for settings, error, message in (
        ({"temperature": -1}, ValueError, "temperature is -1, expected a number ≥ 0"),
        ({"top_p": 0}, ValueError, "top_p is 0"),
        ({"top_k": 1.5}, ValueError, "top_k is 1.5"),
        ({"min_p": 2}, ValueError, "min_p is 2"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": [1, 2]}, ValueError, "2 seeds, expected one, or 1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ({"stop": [[]]}, ValueError, "stop is an empty sequence"),
        ({"draft": "gram"}, ValueError, "draft is 'gram'"),
        ({"cache_dtype": "int3"}, ValueError, "dtype is 'int3'"),
        ({"prompts": [[1], [2, VOCAB]]}, ValueError, "prompt 1 is with token 61, expected .* each 0 to 60"),
        ({"prompts": [[]]}, ValueError, "prompt 0 is empty"),
        ({"prompts": ["text"]}, TypeError, "encode text first"),
        (
            {"prompts": [[1]] * 9, "token_budget": 3},
            ValueError,
            "token_budget is 3, expected at least max_sequences, 9",
        ),
        ({"constraint": [None, None]}, ValueError, "constraint is 2 of them"),
        ({"constraint": 3}, TypeError, "constraint is int, expected a function"),
        ({"prompts": [[1.5]]}, TypeError, r"prompt is \[1.5\], expected a sequence of token numbers"),
        ({"stop": [3]}, TypeError, "stop is 3, expected a sequence of token numbers"),
        ({"temperature": "1"}, TypeError, "temperature is '1', expected a number"),
        ({"page_size": 0}, ValueError, "page_size is 0, expected at least 1"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model is Linear, expected metate.models.Llama"),
    ):
        with pytest.raises(error, match=message):
            metate.generate(**{"model": model, "prompts": [[1]], "max_new_tokens": 2, **settings})


# Constraints.


def spelled(*tokens):
    """A constraint that leaves one token each but the Nones."""

    def constraint(text):
        token = tokens[len(text)]
        return None if token is None else torch.arange(VOCAB) == token

    return constraint


def only(allowed):
    return lambda text: torch.isin(torch.arange(VOCAB), torch.tensor(allowed))


def packed(mask):
    bits = torch.nn.functional.pad(mask, (0, -len(mask) % 32)).view(-1, 32).to(torch.int64)
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)


def test_tokens_without_a_choice_need_no_forward_pass(model):
    scheduler = Scheduler(model, PagedKVCache(model.cache_layout, 20, 4))
    scheduler.add([1, 2], max_new_tokens=8, constraint=spelled(5, 6, 7, None, 8, 9, None, 3), return_logprobs=True)
    events = list(scheduler)
    text = [event.token for event in events]
    assert scheduler.totals.steps == 2 and scheduler.totals.forced == 6
    assert text[:3] + text[4:6] + text[7:] == [5, 6, 7, 8, 9, 3]
    assert [event.logprob == 0.0 for event in events] == [True, True, True, False, True, True, False, True]
    assert text[3] == alone(model, [[1, 2, 5, 6, 7]], new=1)[0][0]
    assert text[6] == alone(model, [[1, 2, *text[:6]]], new=1)[0][0]


@pytest.mark.parametrize("drawn", [{}, SAMPLED], ids=["greedy", "drawn"])
@pytest.mark.parametrize("form", ["bool", "packed"])
def test_only_what_a_constraint_allows(model, drawn, form):
    def constraint(text):  # even and odd in turn, of a few
        mask = only([2, 4, 8, 30] if len(text) % 2 else [3, 9, 31, 33])(text)
        return mask if form == "bool" else packed(mask)

    texts = prompts(4)
    plain, guessed = (
        metate.generate(model, texts, max_new_tokens=16, constraint=constraint, draft=draft, **drawn)
        for draft in (None, "ngram")
    )
    assert all(token in ([2, 4, 8, 30] if i % 2 else [3, 9, 31, 33]) for g in plain for i, token in enumerate(g.tokens))
    assert texts_of(plain) == texts_of(guessed)


def test_a_draft_model_under_a_constraint(model, smaller):
    constraint = only([2, 4, 8, 30])
    texts = prompts(4)
    plain, guessed = (
        metate.generate(model, texts, max_new_tokens=16, constraint=constraint, draft=d) for d in (None, smaller)
    )
    assert texts_of(plain) == texts_of(guessed)
    drawn = metate.generate(model, texts, max_new_tokens=16, constraint=constraint, draft=smaller, temperature=1.0)
    assert {token for generation in drawn for token in generation.tokens} <= {2, 4, 8, 30}


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_a_text_ends_where_nothing_is_allowed(model, draft):
    def constraint(text):
        return only([7, 9] if len(text) < 6 else [])(text)

    (found,) = metate.generate(model, [[7, 7, 7, 7, 7]], max_new_tokens=20, constraint=constraint, draft=draft)
    assert len(found.tokens) == 6 and found.finished == "constraint"


def test_a_constraint_that_fails_names_its_request(model):
    scheduler = Scheduler(model, PagedKVCache(model.cache_layout, 60, 4))
    text = prompts(1)[0]
    scheduler.add(text, max_new_tokens=6)
    bad = scheduler.add(text, max_new_tokens=6, constraint=lambda t: torch.ones(5, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"request 1 failed: .* of 5 elements, expected bool of 61"):
        scheduler.step()
    scheduler.cancel(bad)
    assert run(scheduler)[0] == alone(model, [text], new=6)[0]


class Matcher:
    """What xgrammar.GrammarMatcher offers, for the language (2 3)* 5."""

    def __init__(self):
        self.text = []

    def legal(self):
        if self.text[-1:] == [5]:
            return []
        return [3] if len(self.text) % 2 else [2, 5]

    def accept_token(self, token):
        if token not in self.legal():
            return False
        self.text.append(token)
        return True

    def rollback(self, count):
        assert 0 < count <= len(self.text)
        del self.text[-count:]

    def fill_next_token_bitmask(self, bitmask):
        bitmask[0] = packed(torch.isin(torch.arange(VOCAB), torch.tensor(self.legal(), dtype=torch.int64)))

    def is_terminated(self):
        return self.text[-1:] == [5]


class OtherMatcher:
    """The same language as llguidance.LLMatcher offers it."""

    def __init__(self):
        matcher = Matcher()
        self.consume_token, self.rollback, self.is_stopped = (
            matcher.accept_token,
            matcher.rollback,
            matcher.is_terminated,
        )
        self.matcher = matcher

    def compute_bitmask(self):
        bitmask = torch.empty(1, 2, dtype=torch.int32)
        self.matcher.fill_next_token_bitmask(bitmask)
        return bitmask.numpy().tobytes()


@pytest.mark.parametrize("kind", [Matcher, OtherMatcher])
@pytest.mark.parametrize("draft", [None, "ngram"])
def test_matchers_of_grammar_libraries(model, draft, kind):
    matchers = [kind() for _ in range(3)]
    found = metate.generate(
        model, prompts(3, shared=[2, 3, 2, 3, 5, 2, 3]), max_new_tokens=12, draft=draft, temperature=1.0,
        constraint=[MatcherConstraint(matcher, VOCAB) for matcher in matchers], eos=5,
    )  # fmt: skip
    for generation in found:
        text = generation.tokens
        pairs = text[:-1] if text[-1] == 5 else text
        assert pairs == [2, 3] * (len(pairs) // 2) + [2] * (len(pairs) % 2)
        assert generation.finished == ("eos" if text[-1] == 5 else "length")
    with pytest.raises(ValueError, match="matcher is object, expected one that has accept_token or consume_token"):
        MatcherConstraint(object(), VOCAB)
