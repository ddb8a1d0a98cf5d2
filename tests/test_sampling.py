"""How tokens are drawn: from the probabilities that were asked for, and with speculation from the same."""

import math
from itertools import product

import pytest
import torch

pytest.importorskip("metate._runtime", reason="not built: run `pip install .` in metate's source")
import metate
from metate.generate import CacheLayout, ModelDraft, Sampling, Speculated
from metate.generate.sampling import TEXT, Uniforms, choose, draw, probabilities


def chi_square(counts, expected):
    """How many deviations the statistic lies above its mean; cells of few are put together."""
    cells = sorted(zip(expected, counts, strict=True))
    rare = [cell for cell in cells if cell[0] < 10]
    cells = cells[len(rare) :] + ([tuple(map(sum, zip(*rare, strict=True)))] if rare else [])
    statistic = sum((count - mean) ** 2 / mean for mean, count in cells if mean > 0)
    freedom = len(cells) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_drawing_follows_the_probabilities():
    p = torch.tensor([0.5, 0.0, 0.25, 0.2, 0.05])
    uniforms = Uniforms(3, TEXT)
    drawn = torch.tensor(draw(p.expand(20000, 5), [uniforms.at(i)[0] for i in range(20000)]))
    assert abs(chi_square(drawn.bincount(minlength=5).tolist(), (20000 * p).tolist())) < 5
    assert draw(p.expand(2, 5), [0.0, 1.0 - 2.0**-53]) == [0, 4]


def test_cuts():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]]).repeat(6, 1)
    logits[5, 0] = -math.inf
    settings = [
        Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.7), Sampling(1.0, top_p=0.6), Sampling(1.0, min_p=0.3),
        Sampling(0.0), Sampling(1.0, top_k=3, top_p=0.99),
    ]  # fmt: skip
    p = probabilities(logits, settings)
    e = [math.exp(x) for x in (3.0, 1.0, 2.0, 0.0)]
    expected = [
        [e[0], 0, e[2], 0], [e[0], 0, e[2], 0], [1, 0, 0, 0], [e[0], 0, e[2], 0], [1, 0, 0, 0], [0, e[1], e[2], e[3]],
    ]  # fmt: skip
    expected = torch.tensor([[x / sum(row) for x in row] for row in expected])
    torch.testing.assert_close(p, expected)
    torch.testing.assert_close(probabilities(logits[:1] * 1e4, [Sampling(1e-30)])[0], torch.eye(4)[0])


def test_speculated_tokens_are_accepted_so_that_the_distribution_stays():
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.1, 0.5, 0.0])
    uniforms, guesses, count = Uniforms(1, TEXT), Uniforms(1, 1), 20000
    guessed = draw(q.expand(count, 4), [guesses.at(i)[0] for i in range(count)])
    texts = choose(
        p.expand(2 * count, 4),
        [[Speculated(token, q)] for token in guessed],
        [uniforms.at(i) for i in range(2 * count)],
    )
    first = torch.tensor([text[0] for text in texts]).bincount(minlength=4)
    assert abs(chi_square(first.tolist(), (count * p).tolist())) < 5
    accepted = sum(len(text) == 2 for text in texts) / count
    assert abs(accepted - torch.minimum(p, q).sum()) < 0.02
    second = torch.tensor([text[1] for text in texts if len(text) == 2])
    assert abs(chi_square(second.bincount(minlength=4).tolist(), (len(second) * p).tolist())) < 5


class Markov:
    """A model whose next token depends on the last one only, by a known table of probabilities."""

    def __init__(self, seed):
        self.table = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1).pow(3)
        self.table /= self.table.sum(-1, keepdim=True)
        self.vocab_size = 4
        self.cache_layout = CacheLayout(1, 1, 2, 2, torch.float32, torch.device("cpu"))

    def forward_paged(self, batch):
        return self.table[batch.tokens[batch.rows]].log()


@pytest.mark.parametrize("draft", [None, "ngram", "model"])
@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 3}, {"temperature": 0.6, "top_k": 3, "top_p": 0.9, "min_p": 0.05}, {"temperature": 1.7}],
    ids=str,
)  # fmt: skip
def test_speculation_keeps_the_distribution_of_whole_texts(draft, cut):
    model, count, length = Markov(0), 1500, 3
    draft = ModelDraft(Markov(1), tokens=2) if draft == "model" else draft
    prompt, drawn = [0, 1, 2, 3, 0, 2], {"temperature": 1.0, **cut}
    found = metate.generate(model, [prompt] * count, max_new_tokens=length, draft=draft, max_sequences=256, **drawn)
    p = probabilities(model.table.log(), [Sampling(**drawn)] * 4)
    texts = list(product(range(4), repeat=length))
    expected = [count * math.prod(float(p[a, b]) for a, b in zip((2, *text), text, strict=False)) for text in texts]
    index = {text: i for i, text in enumerate(texts)}
    counts = torch.tensor([index[tuple(generation.tokens)] for generation in found]).bincount(minlength=len(texts))
    assert abs(chi_square(counts.tolist(), expected)) < 5
