"""The same decoder as a mixture: 8 experts in every layer, 2 for a byte. It learns with a loss that evens the load out,
tells which experts the bytes went to, and writes again with its experts in four bits."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from metate.demo.train import PLAN as DENSE
from metate.demo.train import Plan, Text, Trainer, compare, complete
from metate.models import Llama
from metate.nn import MoE, quantize_model

BALANCE = 0.1  # how much the loss of uneven loads counts, in each layer
PLAN = dataclasses.replace(
    DENSE,
    length=512,  # more steps: one alone sends most tokens to a few experts, now these, now those
    rate=1e-3,  # larger steps throw a router off
    config=dataclasses.replace(
        DENSE.config, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True
    ),
)


class Mixture(Trainer):
    """A model with experts, and how many bytes each of them took since the last row of the table."""

    def __init__(self, plan: Plan, model: Llama, device: str) -> None:
        super().__init__(plan, model, device)
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        self.load = torch.zeros(len(self.layers), plan.config.num_experts, dtype=torch.int64)

    def objective(self, tokens: Tensor) -> Tensor:
        loss = self.loss(tokens)
        for i, layer in enumerate(self.layers):
            assert layer.route is not None
            loss = loss + BALANCE * layer.route.load_balance_loss()
            self.load[i] += torch.bincount(layer.route.experts.flatten(), minlength=self.load.shape[1]).cpu()
        return loss

    def shares(self) -> Tensor:
        """Of the bytes that each expert of each layer took; counts anew from here."""
        found = self.load / self.load.sum(1, keepdim=True)
        self.load.zero_()
        return found


def play(console: Console, plan: Plan = PLAN) -> bool:
    """Trains, tells the load, completes a prompt, goes to four bits; whether the model learned."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = Text(plan, device)
    config = plan.config
    trainer = Mixture(plan, Llama(config).initialize(torch.Generator().manual_seed(0)), device)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    idle = sum(p.numel() for layer in trainer.layers for p in layer.experts.parameters())
    active = parameters - idle * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    console.print(
        f"a decoder of {parameters / 1e6:.1f} M parameters, {active / 1e6:.1f} M of them for a byte: "
        f"{config.num_hidden_layers} layers of {config.num_experts} experts, {config.num_experts_per_tok} chosen"
    )
    before = trainer.held_out(text)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console) as bar:
        table = _train(bar, plan, text.windows(), trainer)
    console.print(table)
    after = trainer.held_out(text)
    console.print(
        f"{trainer.steps} steps, {trainer.tokens_per_second():.0f} tokens/s; held-out {before:.3f} → "
        f"[bold]{after:.3f}[/] nats a byte"
    )
    console.print(Panel(escape(complete(trainer.model, plan, device)), title="what it writes", title_align="left"))
    low_bit = quantize_model(copy.deepcopy(trainer.model), "nf4")
    compare(console, plan, text, device, {"float32": trainer.model, "nf4, experts too": low_bit})
    return after < before


def _train(bar: Progress, plan: Plan, windows: Iterator[Tensor], trainer: Mixture, rows: int = 8) -> Table:
    """Steps until the time is up; a row of the table after each part of it."""
    title = "share of the bytes that each expert of the first layer took since the row above; extremes of any layer"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name in ("seconds", "steps", "objective", *map(str, range(plan.config.num_experts)), "least", "most"):
        table.add_column(name, justify="right")
    task = bar.add_task("mixture", total=plan.seconds, state="")
    for row in range(1, rows + 1):
        losses: list[float] = []
        while not losses or math.fsum(trainer.times) < plan.seconds * row / rows:
            losses.append(trainer.step(next(windows)))
            state = f"step {trainer.steps}, objective {losses[-1]:.3f}, {trainer.tokens_per_second():.0f} tokens/s"
            bar.update(task, completed=min(math.fsum(trainer.times), plan.seconds), state=state)
        shares = trainer.shares()
        first = (f"{share:.0%}" for share in shares[0].tolist())
        loss = math.fsum(losses) / len(losses)
        table.add_row(
            f"{math.fsum(trainer.times):.0f}", f"{len(losses)}", f"{loss:.3f}", *first, f"{shares.min():.0%}",
            f"{shares.max():.0%}",
        )  # fmt: skip
    return table
