"""The `metate` command: info, verify, bench, quantize, demo."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from metate import __version__, hardware, library
from metate import verify as engine
from metate.backends import BACKENDS
from metate.op import REGISTRY, Op

app = typer.Typer(
    name="metate",
    help="Kernels for transformers and vector search: what runs here, whether it is right, how fast it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console, errors = Console(), Console(stderr=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"metate {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", help="the version", callback=_version, is_eager=True)] = False,
) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a ✓ that its encoding lacks would end an hour's measurement


def progress(where: Console = console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=where,
        transient=True,
    )


# info


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False) -> None:
    """The machine, the instruction sets, the backends and what is missing, the build, the versions."""
    if as_json:
        print(json.dumps(_facts(), indent=1))
    else:
        show_info()


def _facts() -> dict[str, Any]:
    return {
        "machine": hardware.machine(),
        "backends": {name: reason or "available" for name, reason in hardware.backends().items()},
        "operators": {name: {d: [*op.implementations(d)] for d in engine.devices()} for name, op in REGISTRY.items()},
        "build": library.report(),
        "versions": hardware.versions(),
        "warnings": hardware.warnings(),
    }


def show_info() -> None:
    facts = _facts()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan")
    grid.add_column()
    for name, text in _lines(facts):
        grid.add_row(name, text)
    console.print(grid)
    for warning in facts["warnings"]:
        console.print(f"[yellow]![/] {escape(warning)}")


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    machine, build = facts["machine"], facts["build"]
    quota = f", quota {machine['cpu_quota']:g} cores" if machine["cpu_quota"] else ""
    caches = " · ".join(f"{name} {size >> 10} KiB" for name, size in machine["caches"].items())
    isa = (
        [f"[green]{machine['isa'][0]}[/] (in use)", *machine["isa"][1:]] if machine["isa"] else ["no compiled kernels"]
    )
    lines = [
        ("processor", f"{escape(machine['cpu'])}, {machine['cores']} cores, {machine['threads']} threads used{quota}"),
        ("memory", f"{machine['memory_bytes'] / 2**30:.0f} GiB; {caches}"),
        ("ISA", ", ".join(isa)),
    ]
    for gpu in machine["gpus"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        lines.append(("GPU", f"{gpu['name']} ({gpu['capability']}), {gpu['processors']} multiprocessors, {memory}"))
    for name, reason in facts["backends"].items():
        available = reason == "available"
        served = sum(name in found for op in facts["operators"].values() for found in op.values())
        state = f"[green]✓[/] {served} operators" if available else f"[yellow]–[/] {escape(reason)}"
        lines.append((name, state))
    if build:
        archs = build.get("archs")
        cuda = f"CUDA kernels sm_{archs.replace(';', ', sm_')}" if archs else "no CUDA kernels"
        lines.append(("build", f"{build['machine']}, against torch {build['torch']}; {cuda}"))
    lines.append(("versions", escape(" · ".join(f"{name} {version}" for name, version in facts["versions"].items()))))
    return lines


# verify


@app.command()
def verify(
    op: Annotated[str | None, typer.Option(help="one operator; default: all")] = None,
    backend: Annotated[str | None, typer.Option(help=f"{' | '.join(BACKENDS)}; default: all that are here")] = None,
    device: Annotated[str | None, typer.Option(help="cpu | cuda; default: all that are here")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{' | '.join(DTYPES)}; default: all")] = None,
    case: Annotated[int | None, typer.Option(help="one declared case, by number")] = None,
    fuzz: Annotated[int, typer.Option(help="configurations to draw for every operator", min=0)] = 0,
    seed: Annotated[
        int | None, typer.Option(help="first seed of --fuzz; alone: draw this one", min=0, max=2**62)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Compare every operator with its float64 reference on this machine; exit code 1 where one is wrong."""
    ops = [_known("--op", op, REGISTRY)] if op else list(REGISTRY.values())
    dtypes = [_known("--dtype", dtype, DTYPES)] if dtype else list(DTYPES.values())
    if backend:
        _known("--backend", backend, dict.fromkeys(BACKENDS))
    if case is not None and (fuzz or seed is not None):
        raise typer.BadParameter("a declared case or drawn configurations, not both", param_hint="--case")
    where = _where(ops, backend, device)
    if fuzz or seed is not None:
        first = random.SystemRandom().randrange(2**31) if seed is None else seed
        (errors if as_json else console).print(f"seeds {first} to {first + max(fuzz, 1) - 1}", highlight=False)
        checks = list(engine.fuzz(ops, dtypes, where, max(fuzz, 1), first))
    else:
        checks = [check for check in engine.parity(ops, dtypes, where) if case in (None, check.number)]
    if not checks:
        raise typer.BadParameter("no operator has such a case on this machine")
    if not show_checks(checks, as_json):
        raise typer.Exit(1)


def _known(option: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(table)}", param_hint=option)
    return table[name]


def _where(ops: list[Op], backend: str | None, device: str | None) -> list[tuple[str, str]]:
    """The (device, backend) pairs to check: those that this machine has, or the one asked for."""
    found = {
        (place, name)
        for op in ops
        for place in engine.devices()
        for name in op.implementations(place)
        if device in (None, place) and backend in (None, name)
    }
    if not found:
        reason = hardware.backends().get(backend or device or "") or f"nothing runs on {device or 'this machine'}"
        raise typer.BadParameter(reason, param_hint="--backend" if backend else "--device")
    return sorted(found, key=lambda pair: (pair[0], BACKENDS.index(pair[1])))


def show_checks(checks: list[engine.Check], as_json: bool = False) -> bool:
    """Runs the checks under a progress bar, then tells: a table, and for each failure the command that repeats it; or
    all of it as JSON."""
    results: list[engine.Result] = []
    where = errors if as_json else console
    try:
        with progress(where) as bar:
            task = bar.add_task("verify", total=len(checks))
            for check in checks:
                bar.update(task, description=f"{check.op.name} [dim]{check.backend} {_name(check.dtype)}[/]")
                results.append(engine.run(check))
                bar.advance(task)
    except KeyboardInterrupt:
        where.print(f"[yellow]stopped[/] after {len(results)} of {len(checks)} checks", highlight=False)
        raise
    finally:
        if as_json:
            print(json.dumps(_verified(results), indent=1))
        else:
            _show_results(results)
    return not any(result.status == "failed" for result in results)


def _verified(results: list[engine.Result]) -> dict[str, Any]:
    counts = Counter(result.status for result in results)
    checks = [
        {
            "op": check.op.name, "device": check.device, "backend": check.backend, "dtype": _name(check.dtype),
            "seed" if check.drawn else "case": check.number, "status": result.status, "detail": result.detail,
            "seconds": result.seconds, "command": check.reproduction,
        }
        for result, check in ((result, result.check) for result in results)
    ]  # fmt: skip
    return {**{status: counts[status] for status in ("passed", "failed", "refused")}, "checks": checks}


def _show_results(results: list[engine.Result]) -> None:
    console.print(_verify_table(results))
    failures = [result for result in results if result.status == "failed"]
    for result in failures:
        console.print(f"[red]✗[/] {escape(result.detail)}", highlight=False)
        console.print(f"  [dim]{escape(str(result.check.case()))}[/]", highlight=False, soft_wrap=True)
        console.print(f"  {result.check.reproduction}", highlight=False, soft_wrap=True)
    ran = sum(result.status == "passed" for result in results)
    verdict = f"[red]{len(failures)} wrong[/], {ran} right" if failures else f"[green]{ran} right[/], none wrong"
    refused = Counter(result.detail for result in results if result.status == "refused")
    console.print(verdict + (f", {sum(refused.values())} refused:" if refused else ""))
    for reason, count in refused.most_common(5):
        console.print(f"  [dim]{count} × {escape(reason)}[/]", highlight=False)


def _verify_table(results: list[engine.Result]) -> Table:
    dtypes = [dtype for dtype in DTYPES.values() if any(result.check.dtype == dtype for result in results)]
    titles = ["operator", "backend", *map(_name, dtypes), "s"]
    table = Table(*(Column(title, no_wrap=True) for title in titles), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    places: dict[tuple[str, str, str], list[engine.Result]] = {}
    for result in results:
        places.setdefault((result.check.op.name, result.check.device, result.check.backend), []).append(result)
    for (name, device, backend), found in places.items():
        cells = [_cell([r for r in found if r.check.dtype == dtype]) for dtype in dtypes]
        place = backend if device in (backend, "cpu") else f"{backend} on {device}"
        table.add_row(name, place, *cells, f"{sum(r.seconds for r in found):.1f}")
    return table


def _cell(results: list[engine.Result]) -> str:
    counts = Counter(result.status for result in results)
    if counts["failed"]:
        return f"[red]✗ {counts['failed']} of {counts['failed'] + counts['passed']}[/]"
    if counts["passed"]:
        refused = f" [dim]({counts['refused']} refused)[/]" if counts["refused"] else ""
        return f"[green]✓ {counts['passed']}[/]{refused}"
    return "[dim]refused[/]" if counts["refused"] else "[dim]–[/]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# bench


# What holds a measurement to less than the machine: a record's command repeats it.
HOLDS = ("METATE_ISA", "METATE_BACKEND", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")


@app.command()
def bench(
    family: Annotated[
        str | None,
        typer.Argument(help=f"calls, {', '.join(sorted({op.family for op in REGISTRY.values()}))}; default: all"),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="where the record goes, HTML and PNG beside it; default: metate-bench/FAMILY.json"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="small shapes, few repetitions, nothing to compile")] = False,
    largest: Annotated[float | None, typer.Option(help="only cases of at most so many operations, say 1e9")] = None,
) -> None:
    """Measure this machine's ceilings, then every operator beside its rivals; write JSON, an HTML report and a PNG."""
    from metate.bench import run

    families = run.families()
    if family:
        _known("FAMILY", family, families)
    held = [f"{name}={os.environ[name]}" for name in HOLDS if name in os.environ]
    effort, command = run.QUICK if quick else run.Effort(), [*held, "metate bench", *filter(None, [family])]
    if quick:
        command.append("--quick")
    if largest is not None:
        effort = dataclasses.replace(effort, largest=largest)
        command.append(f"--largest {largest:g}".replace("e+", "e"))
    path = json_path or _results(family or "bench")
    if not run_bench(" ".join(command), [family] if family else list(families), effort, path):
        raise typer.Exit(1)


def _results(name: str) -> Path:
    """In a checkout its bench/results/latest, else a folder here: no family's record takes the place of another's."""
    folder = Path("bench/results/latest") if Path("bench/run.py").exists() else Path("metate-bench")
    return folder / f"{name}.json"


def run_bench(command: str, families: list[str], effort: Any, path: Path) -> bool:
    """Measures, shows and writes; whether every result of ours was right."""
    from metate.bench import machine, report, run

    jobs = [job for family in families for job in run.cases(family, effort)]
    if not jobs:
        raise typer.BadParameter("no case is that small", param_hint="--largest")
    if not any(run.timed_backends(workload.op, device) for workload, _, _, device in jobs):
        missing = hardware.backends()[jobs[0][3]]
        console.print(f"[red]✗[/] metate bench times compiled kernels: {escape(missing)}", soft_wrap=True)
        return False
    _check_place(path)
    run.keep_freed_memory()
    before, rows = machine.conditions(), []
    with progress() as bar:
        task = bar.add_task("ceilings", total=len(jobs))
        ceilings = machine.ceilings(jobs[0][3], lambda text: bar.update(task, description=text))
        try:
            for workload, case, dtype, device in jobs:
                bar.update(task, description=f"{workload.label(case)} [dim]{_name(dtype)}[/]")
                found = run.measure(workload, case, dtype, device, effort, ceilings)
                _show_case(bar.console, found)
                rows += found
                bar.advance(task)
        except KeyboardInterrupt:
            if not rows:
                raise
            bar.console.print(f"[yellow]stopped[/] among {len(jobs)} cases")  # what was measured is kept
            command += " (stopped)"
    for written in report.write(run.record(command, ceilings, rows, before), path):
        console.print(f"wrote {escape(str(written))}", highlight=False, soft_wrap=True)
    return not any(row["ours"] and row["status"] in ("wrong", "failed") for row in rows)


def _check_place(path: Path) -> None:
    """That a record can be written there: better known before an hour of measuring than after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path} cannot be written")
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--json") from None


def _show_case(console: Console, rows: list[dict[str, Any]]) -> None:
    """The table of one case, and why contenders are not in it."""
    console.print(_bench_table(rows))
    for row in rows:
        if row["status"] != "ok":
            color = "red" if row["status"] in ("wrong", "failed") else "dim"
            reason = f"{row['contender']} {row['status']}: {row['detail']}"
            console.print(f" [{color}]{escape(reason)}[/]", highlight=False, soft_wrap=True)


def _bench_table(rows: list[dict[str, Any]]) -> Table:
    """The contenders of one case: time, and speed and share of the limit, or recall; ~ where others used our cores."""
    from metate.bench import report

    approximate = any(row["recall"] is not None for row in rows)
    columns = ("ms", "recall") if approximate else ("µs",) if rows[0]["call"] else ("ms", "GFLOP/s", "limit")
    table = Table(
        Column("", min_width=44, no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in (*columns, "× best")),
        title="{workload} [dim]{label} {dtype}[/]".format(**rows[0]),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for row in rows:
        if row["status"] != "ok":
            continue
        name = f"[bold]{escape(row['contender'])}[/]" if row["ours"] else escape(row["contender"])
        ratio = f"{row['times_best_rival']:.2f}" if "times_best_rival" in row and row["ours"] else ""
        color = "green" if ratio and row["times_best_rival"] >= 1 else "yellow"
        noise = " [yellow]~[/]" if row["disturbed"] else ""
        shown = [f"{row['flops_per_second'] / 1e9:.1f}", f"{row['of_limit']:.0%}"]
        if rows[0]["call"]:
            shown = []
        elif approximate:
            shown = ["" if row["recall"] is None else report.recall(row)]
        table.add_row(name + noise, f"{row['p50'] * (1e6 if row['call'] else 1e3):.3g}", *shown, f"[{color}]{ratio}[/]")
    return table


# quantize


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="folder of a Hugging Face checkpoint of a causal language model")],
    out: Annotated[Path, typer.Option("--output", "-o", help="folder of the quantised checkpoint")],
    method: Annotated[str, typer.Option("--format", help="nf4, fp4, gptq, awq, rtn or hqq")] = "nf4",
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8; NF4, FP4 and AWQ have 4")] = 4,
    group_size: Annotated[
        int | None, typer.Option(help="columns that share a scale; 64 for NF4 and FP4, else 128")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="a text file, which GPTQ and AWQ need", exists=True, dir_okay=False)
    ] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="round the scales of NF4 and FP4 to 8 bits themselves")
    ] = False,
    desc_act: Annotated[
        bool, typer.Option("--desc-act", help="groups of GPTQ by the size of inputs, not of neighbours: better, slower")
    ] = False,
    samples: Annotated[int, typer.Option(help="windows of the calibration text", min=1)] = 64,
    length: Annotated[int, typer.Option(help="tokens of a window", min=1)] = 512,
) -> None:
    """Write a low-bit checkpoint in the format's own layout. A stopped run goes on where it was."""
    from metate.models.quantize import CALIBRATED, Recipe, quantize_checkpoint

    try:
        if group_size is None:
            group_size = 64 if method in ("nf4", "fp4") else 128
        recipe = Recipe(method, bits, group_size, double_quant, desc_act)
        if method in CALIBRATED and calibration is None:
            raise ValueError(f"{method} needs a calibration text: --calibration FILE")
        text = calibration.read_text(errors="replace") if calibration else ""
        with progress() as bar:
            task = bar.add_task(f"{method}, {bits} bits", total=None)

            def report(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            quantize_checkpoint(model, recipe, out, text, samples=samples, length=length, report=report)
    except (OSError, ValueError) as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if (out / "unfinished").is_dir():
            console.print("[yellow]stopped[/]: the same command goes on where it was")
        raise
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    console.print(f"wrote {out}: {size / 1e6:.1f} MB")


# demo and documentation


@app.command()
def demo(
    part: Annotated[str | None, typer.Argument(help="search: only that over this machine's docstrings")] = None,
    questions: Annotated[list[str] | None, typer.Argument(help="what to search for; default: five examples")] = None,
    moe: Annotated[bool, typer.Option("--moe", help="only the decoder as a mixture of experts")] = False,
) -> None:
    """The machine, a check, a short benchmark; then a decoder learns to write Python from the standard library."""
    if part is not None:
        _known("PART", part, {"search": None})
        from metate.demo import search

        if not search.play(console, tuple(questions or ())):
            raise typer.Exit(1)
        return
    if moe:
        from metate.demo import mixture

        raise typer.Exit(0 if mixture.play(console) else 1)
    from metate.bench import run
    from metate.demo.train import play

    console.rule("machine", align="left")
    show_info()
    console.rule("verify", align="left")
    ops, dtypes = list(REGISTRY.values()), [torch.float32, torch.bfloat16]
    right = show_checks([check for check in engine.parity(ops, dtypes, _where(ops, None, None)) if check.number < 8])
    console.rule("bench", align="left")
    right &= run_bench("metate demo", ["attention"], run.QUICK, _results("demo"))
    console.rule("train", align="left")
    if not (play(console) and right):
        raise typer.Exit(1)


@app.command(hidden=True)
def docs(
    folder: Annotated[Path, typer.Argument(help="metate's source", exists=True)] = Path(),
    measured: Annotated[
        list[Path] | None, typer.Option(help="a record of `metate bench`; once for each", exists=True)
    ] = None,
) -> None:
    """Write docs/ops.md from the declarations; from records docs/measured.md and README's summary of it."""
    from metate.bench import report

    if not (folder / "docs" / "ops.md").exists():
        raise typer.BadParameter(
            f"{folder} has no docs/ops.md: name the folder of metate's source", param_hint="FOLDER"
        )
    try:
        records = [report.read(path) for path in measured or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--measured") from None
    (folder / "docs" / "ops.md").write_text(operators_page())
    if records:
        (folder / "docs" / "measured.md").write_text(report.page(records))
        readme = folder / "README.md"
        head, begin, rest = readme.read_text().partition("<!-- measured -->\n")
        _, end, tail = rest.partition("<!-- end -->\n")
        readme.write_text(f"{head}{begin}{report.summary(records)}\n{end}{tail}")


def operators_page() -> str:
    """Every operator: arguments, dtypes, outputs, backends and what they refuse, gradient, autocast."""
    lines = ["# Operators", "", "Written by `metate docs` from the declarations; do not edit.", ""]
    for op in REGISTRY.values():
        lines += [f"## {op.name}", "", *_operator_lines(op), ""]
    return "\n".join(lines)


def _operator_lines(op: Op) -> list[str]:
    lines = ["| argument | shape | dtypes |", "|---|---|---|"]
    for name in op.axes:
        dtypes = ", ".join(f"that of `{d}`" if isinstance(d, str) else _name(d) for d in op.dtypes[name])
        lines.append(f"| `{name}` | {op.shape_of(name)} | {dtypes} |")
    scalars = ", ".join(f"`{name}`" for name in op.parameters[op.arity :])
    outputs = [f"`{name}` ({f'that of `{d}`' if isinstance(d, str) else _name(d)})" for name, d in op.outputs.items()]
    stored = f", to the dtype of `{op.storage}` where it has floats" if op.storage else ""
    return [
        *lines,
        "",
        f"- Scalars: {scalars or 'none'}.",
        f"- Outputs: {', '.join(outputs)}.",
        f"- Gradient: {'none: ' + op.gradient if op.gradient else 'yes'}.",
        f"- Autocast: {', '.join(f'`{name}`' for name in op.autocast) or 'leaves the inputs as they are'}{stored}.",
        f"- Declared cases: {len(op.domain.cases)}, beside drawn ones; shapes measured: {len(op.domain.sweep)}.",
        "",
        f"| backend | {' | '.join(DTYPES)} |",
        "|---|" + "---|" * len(DTYPES),
        *(f"| {name} | {' | '.join(_support(op, name, dtype) for dtype in DTYPES.values())} |" for name in BACKENDS),
    ]


def _support(op: Op, backend: str, dtype: torch.dtype) -> str:
    """Whether a backend takes the declared cases at a dtype, and its refusals."""
    answers = dict.fromkeys(op.refusal(backend, op.example(case, dtype)) for case in op.domain.cases)
    refusals = "; ".join(reason for reason in answers if reason)
    if not refusals:
        return "✓"
    return f"✓, but not {refusals}" if None in answers else refusals
