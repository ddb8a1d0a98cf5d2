"""The main job on real input: a Llama-style decoder learns to write Python from the standard library's source.

Bytes are the tokens, every tenth file is held out, order and first weights are fixed. The first steps are taken twice,
with metate's attention and with naive attention, in turn: the losses must agree within rounding. Then it serves many
prompts at once; its linear layers go to four bits, by three formats, and low-rank adapters learn on top of one of them.
"""

from __future__ import annotations

import copy
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from metate.generate import PagedKVCache, Scheduler
from metate.models import Llama, LlamaConfig
from metate.models.quantize import Recipe, quantize_decoder
from metate.nn import GroupedLinear, LoraLinear, QuantLinear
from metate.op import REGISTRY

ROUNDING = {"cpu": 1e-4, "cuda": 5e-2}  # of the loss; bfloat16 on a GPU
FOLDERS = ("asyncio", "collections", "email", "http", "importlib", "json", "logging", "unittest")  # beside the top
PROMPT = "def __init__(self"


@dataclass(frozen=True)
class Plan:
    """What is trained and for how long."""

    config: LlamaConfig
    batch: int = 1
    length: int = 1024
    compared: int = 12  # steps taken with both attentions
    seconds: float = 60  # of training with metate's, the compared steps included
    recipes: tuple[Recipe, ...] = (Recipe("nf4", 4, 64), Recipe("gptq", 4, 64), Recipe("awq", 4, 64))
    adapted: float = 20  # seconds of training adapters on the first of these
    written: int = 320  # bytes of the completion
    served: tuple[int, int, int] = (32, 48, 384)  # prompts, bytes written for each, bytes that all begin with
    rate: float = 2e-3


PLAN = Plan(
    LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
    )
)


class Text:
    """The standard library's source as bytes: windows to train on, in a fixed random order, and held-out ones."""

    def __init__(self, plan: Plan, device: str) -> None:
        self.plan, self.device = plan, device
        library = Path(sysconfig.get_path("stdlib"))
        files = [path for folder in (".", *FOLDERS) for path in sorted(Path(library, folder).glob("*.py"))]
        self.train = _join(path for i, path in enumerate(files) if i % 10)
        self.held_out = _join(files[::10])
        self.generator = torch.Generator().manual_seed(0)

    def windows(self) -> Iterator[Tensor]:
        """Batches of (batch, length + 1) tokens, without end."""
        while True:
            starts = torch.randint(len(self.train) - self.plan.length - 1, (self.plan.batch,), generator=self.generator)
            yield torch.stack([self.train[i : i + self.plan.length + 1] for i in starts.tolist()]).to(self.device)

    def tests(self) -> Iterator[Tensor]:
        """Four windows, evenly spread over the held-out files."""
        step = (len(self.held_out) - self.plan.length - 1) // 4
        for start in range(0, 4 * step, step):
            yield self.held_out[start : start + self.plan.length + 1][None].to(self.device)


def _join(paths: Iterator[Path] | list[Path]) -> Tensor:
    text = bytearray().join(path.read_bytes() for path in paths)
    return torch.frombuffer(text, dtype=torch.uint8).long()


class Trainer:
    """One model and its optimizer, with the time its steps took."""

    def __init__(self, plan: Plan, model: Llama, device: str) -> None:
        self.plan, self.model, self.device, self.steps = plan, model.to(device), device, 0
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, plan.rate, betas=(0.9, 0.95), weight_decay=0.01)
        self.times: list[float] = []

    def loss(self, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def objective(self, tokens: Tensor) -> Tensor:
        """What a step makes less."""
        return self.loss(tokens)

    def step(self, tokens: Tensor) -> float:
        began = time.perf_counter()
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * min(1.0, self.steps / 20)
        self.optimizer.zero_grad()
        loss = self.objective(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        value = loss.item()
        self.times.append(time.perf_counter() - began)
        return value

    def tokens_per_second(self) -> float:
        """By the median step, the first two left out: they warm up."""
        return self.plan.batch * self.plan.length / statistics.median(self.times[2:] or self.times)

    @torch.no_grad()
    def held_out(self, text: Text) -> float:
        return statistics.fmean(float(self.loss(tokens)) for tokens in text.tests())


def play(console: Console, plan: Plan = PLAN) -> bool:
    """Trains, compares, completes a prompt; whether the two losses agreed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = Text(plan, device)
    ours, naive = (
        Trainer(plan, Llama(plan.config, attention).initialize(torch.Generator().manual_seed(0)), device)
        for attention in ("metate", "naive")
    )
    parameters = sum(p.numel() for p in ours.model.parameters())
    console.print(
        f"{len(text.train) / 1e6:.1f} MB of Python source; a decoder of {parameters / 1e6:.1f} M parameters, "
        f"{plan.config.num_hidden_layers} layers, {plan.batch} × {plan.length} bytes a step"
    )
    before, windows = ours.held_out(text), text.windows()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console) as bar:
        apart = _compare(bar, plan, windows, ours, naive)
        speeds = [trainer.tokens_per_second() for trainer in (ours, naive)]  # of steps taken in turn
        loss = _train(bar, "metate", plan.seconds, windows, ours)
    agree = apart <= ROUNDING[device]
    console.print(
        f"[{'green' if agree else 'red'}]{plan.compared} losses of metate and naive attention differ by at most "
        f"{apart:.1e}[/] (rounding: {ROUNDING[device]:g})",
        highlight=False,
    )
    console.print(
        f"tokens/s, in turn: metate [bold]{speeds[0]:.0f}[/], naive {speeds[1]:.0f}: {speeds[0] / speeds[1]:.2f} ×"
    )
    after = ours.held_out(text)
    console.print(f"{ours.steps} steps, loss {loss:.3f}; held-out {before:.3f} → [bold]{after:.3f}[/] nats a byte")
    console.print(Panel(escape(complete(ours.model, plan, device)), title="what it writes", title_align="left"))
    serve(console, plan, text, ours)
    compress(console, plan, text, ours)
    return agree


def _compare(bar: Progress, plan: Plan, windows: Iterator[Tensor], ours: Trainer, naive: Trainer) -> float:
    """The same steps with both attentions, taken in turn; the largest difference of their losses."""
    task, apart = bar.add_task("metate beside naive", total=plan.compared, state=""), 0.0
    for i in range(plan.compared):
        tokens = next(windows)
        losses = {trainer: trainer.step(tokens) for trainer in ((ours, naive) if i % 2 else (naive, ours))}
        apart = max(apart, abs(losses[ours] - losses[naive]))
        speeds = f"{ours.tokens_per_second():.0f} and {naive.tokens_per_second():.0f} tokens/s"
        bar.update(task, advance=1, state=f"loss {losses[ours]:.4f} and {losses[naive]:.4f}, {speeds}")
    return apart


def _train(bar: Progress, name: str, seconds: float, windows: Iterator[Tensor], trainer: Trainer) -> float:
    """Steps until so much time has gone into them; the last losses' mean."""
    task = bar.add_task(name, total=seconds, state="")
    losses: list[float] = []
    while not losses or math.fsum(trainer.times) < seconds:
        losses.append(trainer.step(next(windows)))
        mean = statistics.fmean(losses[-20:])
        state = f"step {trainer.steps}, loss {mean:.3f}, {trainer.tokens_per_second():.0f} tokens/s"
        bar.update(task, completed=min(math.fsum(trainer.times), seconds), state=state)
    return statistics.fmean(losses[-20:])


def complete(model: Llama, plan: Plan, device: str) -> str:
    prompt = torch.tensor([list(PROMPT.encode())], device=device)
    written = model.complete(prompt, plan.written, 0.6, torch.Generator(device).manual_seed(0))
    return PROMPT + bytes(written[0].tolist()).decode(errors="replace")


# How the prompts are served: name, at once, prefixes found again, guesses.
SERVED = (
    ("one by one", 1, False, None),
    ("all at once", 64, False, None),
    ("… and the common beginning once", 64, True, None),
    ("… and guesses from repetitions", 64, True, "ngram"),
)


@dataclass
class Serving:
    """All prompts served in one way."""

    texts: list[list[int]]
    seconds: float
    peak: int  # bytes of the blocks in use at one time, at most
    scheduler: Scheduler

    @staticmethod
    def of(
        model: Llama, prompts: list[list[int]], new: int, at_once: int, prefixes: bool, draft: str | None
    ) -> Serving:
        blocks = sum(-(-(len(prompt) + new) // 16) for prompt in prompts)
        cache = PagedKVCache(model.cache_layout, blocks, prefix_cache=prefixes)
        scheduler = Scheduler(model, cache, max_sequences=at_once, token_budget=1024, draft=draft)
        texts: list[list[int]] = [[] for _ in prompts]
        peak, began = 0, time.perf_counter()
        for prompt in prompts:
            scheduler.add(prompt, max_new_tokens=new)
        while scheduler.waiting or scheduler.running:
            for event in scheduler.step():
                texts[event.request].append(event.token or 0)
            peak = max(peak, cache.used_bytes)
        return Serving(texts, time.perf_counter() - began, peak, scheduler)


def serve(console: Console, plan: Plan, text: Text, trained: Trainer) -> None:
    """Many prompts with a common beginning, greedily, in four ways; the texts must be the same."""
    there = REGISTRY["paged_attention"].implementations(trained.device)
    if trained.device == "cpu" and "cpu" not in there:
        console.print("nothing is served: paged attention has no compiled kernel here, plain torch would take minutes")
        return
    count, new, common = plan.served
    model = trained.model
    held_out = text.held_out.tolist()
    prompts = [held_out[:common] + held_out[i * 1000 : i * 1000 + 32] for i in range(1, count + 1)]
    Serving.of(model, prompts[:2], 2, 2, True, None)  # warms up
    table = Table(box=None, pad_edge=False)
    for name in (f"serving {count} prompts", "tokens/s", "×", "steps", "tokens computed", "cache, MB", "same texts"):
        table.add_column(name, justify="left" if name.startswith("serving") else "right")
    first: Serving | None = None
    remarks = []
    for name, at_once, prefixes, draft in SERVED:
        found = Serving.of(model, prompts, new, at_once, prefixes, draft)
        first = first or found
        totals, wrong = found.scheduler.totals, [i for i in range(count) if found.texts[i] != first.texts[i]]
        table.add_row(
            name, f"{count * new / found.seconds:.0f}", f"{first.seconds / found.seconds:.1f}", f"{totals.steps}",
            f"{totals.computed}", f"{found.peak / 1e6:.1f}",
            f"[{'yellow' if wrong else 'green'}]{count - len(wrong)} of {count}[/]",
        )  # fmt: skip
        if totals.guessed:
            remarks.append(f"{totals.right} of {totals.guessed} guesses were right")
        remarks += [f"{name}: {_where_apart(model, prompts[i], first.texts[i], found.texts[i])}" for i in wrong]
    console.print(table)
    for remark in remarks:
        console.print(remark, highlight=False)


@torch.inference_mode()
def _where_apart(model: Llama, prompt: list[int], a: list[int], b: list[int]) -> str:
    """How near the two tokens were between which rounding decided."""
    place = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    tokens = torch.tensor([[*prompt, *a[:place]]], device=model.embed_tokens.weight.device)
    logits = model(tokens)[0, -1]
    gap, size = abs(float(logits[a[place]] - logits[b[place]])), float(logits.abs().max())
    return f"a text differs from byte {place} on, where two logits of size {size:.1f} are {gap:.1e} apart"


def compress(console: Console, plan: Plan, text: Text, trained: Trainer) -> None:
    """The trained model in four bits, by each recipe; then adapters on the first of them."""
    calibration = torch.cat([next(text.windows())[:, :-1] for _ in range(8)])
    models = {"float32": trained.model}
    for recipe in plan.recipes:
        models[recipe.method] = copy.deepcopy(trained.model)
        quantize_decoder(models[recipe.method], recipe, calibration)
    compare(console, plan, text, trained.device, models)
    model = adapt(models[plan.recipes[0].method])
    trainer = Trainer(plan, model, trained.device)
    before = trainer.held_out(text)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console) as bar:
        _train(bar, "adapters", plan.adapted, text.windows(), trainer)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.print(
        f"{trainer.steps} steps of {learned / 1e3:.0f} k adapter weights on {plan.recipes[0].method}: held-out "
        f"{before:.4f} → [bold]{trainer.held_out(text):.4f}[/]"
    )


def compare(console: Console, plan: Plan, text: Text, device: str, models: dict[str, Llama]) -> None:
    """Models beside one another: size, loss, speed of writing."""
    table = Table(box=None, pad_edge=False)
    for name in ("linear layers", "bits a weight", "file, MB", "held-out loss", "tokens/s, one by one"):
        table.add_column(name, justify="left" if name == "linear layers" else "right")
    for name, model in models.items():
        size, weights = linear_size(model)
        began = time.perf_counter()
        complete(model, plan, device)
        speed = plan.written / (time.perf_counter() - began)
        loss = Trainer(plan, model, device).held_out(text)
        table.add_row(name, f"{8 * size / weights:.2f}", f"{file_size(model) / 1e6:.2f}", f"{loss:.4f}", f"{speed:.0f}")
    console.print(table)


def linear_size(model: Llama) -> tuple[int, int]:
    """Bytes and weights of the linear layers inside the decoder's layers."""
    size = weights = 0
    for module in model.layers.modules():
        if isinstance(module, (nn.Linear, GroupedLinear)):
            size += module.weight.nbytes
            weights += math.prod(module.weight.shape)
    return size, weights


def file_size(model: Llama) -> int:
    """Bytes of the whole model as a safetensors file."""
    state = {tensor.data_ptr(): (name, tensor) for name, tensor in model.state_dict().items()}  # tied weights once
    return len(save(dict(state.values())))


def adapt(model: Llama) -> Llama:
    """Low-rank adapters on every low-bit layer; nothing else learns (Hu et al. 2022, Dettmers et al. 2023)."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoraLinear(module, 8))
    return model
