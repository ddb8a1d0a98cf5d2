"""The `metate` command as a person types it."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from metate import __version__, hardware, library
from metate import verify as engine
from metate.bench import run
from metate.cli import app
from metate.demo import mixture
from metate.demo.train import PLAN, play
from metate.models import LlamaConfig
from metate.op import REGISTRY

compiled = pytest.mark.skipif(library.load()["cpu"].module is None, reason="no compiled CPU kernels")


def metate(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


def test_info_tells_the_machine_and_what_is_missing():
    text = metate("info")
    for word in ("processor", "memory", "ISA", "cpu", "cuda", "triton", "reference", "versions", "torch"):
        assert word in text
    for reason in filter(None, hardware.backends().values()):
        assert reason.split()[0] in text


def test_version():
    assert metate("--version").strip() == f"metate {__version__}"


def test_info_where_no_process_is_bound_to_cores(monkeypatch):
    """macOS knows no affinity."""
    monkeypatch.delattr(hardware.os, "sched_getaffinity")
    assert hardware.machine()["affinity"] == list(range(hardware.os.cpu_count()))
    hardware.warnings()


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("AMD EPYC", "AMD EPYC (family 26, model 2)"),
        ("Intel(R) Xeon(R) Processor @ 2.50GHz", "Intel(R) Xeon(R) Processor @ 2.50GHz (family 26, model 2)"),
        ("AMD  EPYC 9755 128-Core Processor", "AMD EPYC 9755 128-Core Processor"),
    ],
)
def test_a_processor_that_hides_its_number_is_told_apart(monkeypatch, called, name):
    cores = f"processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {called}\n\n" * 2
    monkeypatch.setattr(hardware, "_read", lambda path: cores)
    assert hardware.cpu_name() == name


def test_info_as_json():
    facts = json.loads(metate("info", "--json"))
    assert set(facts) == {"machine", "backends", "operators", "build", "versions", "warnings"}
    assert facts["machine"]["threads"] >= 1
    assert "reference" in facts["operators"]["attention"]["cpu"]
    assert facts["backends"]["reference"] == "available"


def test_warnings_name_what_to_do(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 0.5)
    monkeypatch.setattr(library, "refused_isa", lambda: "avx1024")
    monkeypatch.setattr(library, "isas", lambda: ["avx2", "baseline"])
    monkeypatch.setenv("METATE_BACKEND", "tritn")
    text = " ".join(metate("info").split())
    assert "0.5 cores' time: torch.set_num_threads(1)" in text
    assert "METATE_ISA=avx1024 is none of avx2, baseline; avx2 is in use" in text
    assert "METATE_BACKEND=tritn is no backend" in text


def test_verify_one_case():
    text = metate("verify", "--op", "merge_attention_states", "--dtype", "float32", "--case", "1")
    assert "none wrong" in text


def test_verify_a_seed():
    text = metate("verify", "--op", "merge_attention_states", "--backend", "reference", "--fuzz", "3", "--seed", "7")
    assert "seeds 7 to 9" in text
    assert "3 right, none wrong" in text


def test_verify_as_json():
    command = [sys.executable, "-m", "metate", "verify", "--json", "--op", "merge_attention_states", "--fuzz", "2"]
    run = subprocess.run([*command, "--seed", "7"], capture_output=True, text=True)
    found = json.loads(run.stdout)
    assert run.returncode == 0 and "seeds 7 to 8" in run.stderr
    assert (found["passed"] + found["refused"], found["failed"]) == (len(found["checks"]), 0)
    assert {check["seed"] for check in found["checks"]} == {7, 8} and found["passed"] >= 2
    first = found["checks"][0]
    assert first["op"] == "merge_attention_states" and first["command"].startswith("metate verify --op merge_")


def test_verify_as_json_tells_what_is_wrong(monkeypatch):
    monkeypatch.setattr(engine, "run", lambda check: engine.Result(check, "failed", "off by 2"))
    arguments = ["--op", "merge_attention_states", "--dtype", "float32", "--backend", "cpu", "--case", "1"]
    found = json.loads(metate("verify", "--json", *arguments, code=1))
    assert found["failed"] == 1 and found["checks"][0]["detail"] == "off by 2" and found["checks"][0]["case"] == 1


def test_a_stopped_verification_tells_what_it_found(monkeypatch):
    run_one, ran = engine.run, []

    def some(check):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(check)
        return run_one(check)

    monkeypatch.setattr(engine, "run", some)
    text = metate("verify", "--op", "merge_attention_states", "--backend", "reference", code=130)
    assert "stopped after 3 of" in text and "3 right, none wrong" in text


def test_letters_that_the_output_lacks_end_nothing():
    command = [sys.executable, "-m", "metate", "verify", "--op", "merge_attention_states", "--case", "1"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0 and "? 1" in run.stdout and "none wrong" in run.stdout


def test_the_package_is_the_command():
    assert subprocess.check_output([sys.executable, "-m", "metate", "--version"], text=True).split()[0] == "metate"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "atention"], "'atention' is not one of attention"),
        (["--dtype", "int3"], "'int3' is not one of float32"),
        (["--case", "99999"], "no operator has such a case"),
        (["--device", "tpu"], "nothing runs on tpu"),
        (["--backend", "rocm"], "'rocm' is not one of cpu, cuda, triton, reference"),
        (["--case", "1", "--fuzz", "2"], "a declared case or drawn configurations"),
        (["--seed", str(2**70)], "'--seed'"),
    ],
)
def test_verify_names_what_it_does_not_know(arguments, message):
    assert message in " ".join(metate("verify", *arguments, code=2).replace("│", " ").split())


def test_verify_says_why_a_backend_is_missing(monkeypatch):
    monkeypatch.setattr(hardware, "backends", lambda: {"cuda": "no nvcc: install it"})
    monkeypatch.setattr("metate.cli._where", lambda ops, backend, device: _missing(backend))
    assert "no nvcc: install it" in metate("verify", "--backend", "cuda", code=2)


def _missing(backend):
    import typer

    raise typer.BadParameter(hardware.backends()[backend])


@compiled
def test_bench_writes_a_record_a_page_and_a_picture(tmp_path):
    text = metate("bench", "attention", "--quick", "--largest", "5e6", "--json", tmp_path / "here" / "delta.json")
    assert "metate cpu" in text
    record = json.loads((tmp_path / "here" / "delta.json").read_text())
    assert {"machine", "versions", "ceilings", "protocol", "conditions", "git", "rows"} <= set(record)
    assert record["command"] == "metate bench attention --quick --largest 5e06"
    assert record["ceilings"]["all"]["float32"] > 1e9
    ours = [row for row in record["rows"] if row["ours"]]
    rivals = [row for row in record["rows"] if not row["ours"]]
    assert {row["dtype"] for row in ours} == {"float32", "bfloat16"}
    assert rivals
    for row in ours:
        assert row["status"] == "ok"
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["error"] <= row["allowed"]
        assert row["of_limit"] > 0
        if row["bound"] == "memory":
            assert row["of_limit"] == pytest.approx(row["bytes_per_second"] / row["memory"])
        assert row["times_best_rival"] > 0
    assert "memory" in {row["bound"] for row in ours}
    assert len({row["memory"] for row in ours}) == len(ours)  # what memory gave beside each row, not once before all
    page = (tmp_path / "here" / "delta.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "here" / "delta.png").read_bytes().startswith(b"\x89PNG") or "matplotlib" not in sys.modules


@compiled
def test_bench_says_before_it_measures_that_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "x.json", tmp_path):
        text = metate("bench", "attention", "--quick", "--largest", "5e8", "--json", place, code=2)
        assert "--json" in text and "metate cpu" not in text


@compiled
def test_a_stopped_bench_keeps_what_it_has_measured(monkeypatch, tmp_path):
    measure, measured = run.measure, []

    def once(*args):
        if measured:
            raise KeyboardInterrupt
        measured.extend(measure(*args))
        return measured

    monkeypatch.setattr(run, "measure", once)
    peaks = {"float32": 1e11, "bfloat16": 1e11, "memory": 1e10}
    monkeypatch.setattr("metate.bench.machine.ceilings", lambda device, tell: {"all": peaks})
    path = tmp_path / "attention.json"
    assert "stopped" in metate("bench", "attention", "--quick", "--largest", "5e8", "--json", path)
    record = json.loads(path.read_text())
    assert len(record["rows"]) == len(measured) and record["command"].endswith("(stopped)")


def test_records_of_families_stand_side_by_side(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metate.cli.run_bench", lambda command, families, effort, path: places.append(path) or True)
    places = []
    for family in ("attention", "moe"):
        metate("bench", family)
    metate("bench")
    assert [path.name for path in places] == ["attention.json", "moe.json", "bench.json"]


def test_bench_names_what_it_does_not_know():
    shown = metate("bench", "--help")
    assert all(family in shown for family in run.families())
    assert "'atention' is not one of attention" in metate("bench", "atention", code=2).replace("│", " ")
    assert "no case is that small" in metate("bench", "--largest", "1", code=2)


def test_bench_without_kernels_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "backends", lambda: dict.fromkeys(("cpu", "cuda"), "not built: run `pip install .`"))
    monkeypatch.setattr("metate.bench.run.timed_backends", lambda op, device: [])
    text = metate("bench", "--largest", "5e8", "--json", tmp_path / "x.json", code=1)
    assert "not built: run `pip install .`" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3", '{"command": "metate bench"}'])
def test_docs_names_a_file_that_is_no_record(text, tmp_path):
    record, page = tmp_path / "foreign.json", tmp_path / "docs" / "ops.md"
    record.write_text(text)
    shown = " ".join(metate("docs", tmp_path, "--measured", record, code=2).replace("│", " ").split())
    assert "has no docs/ops.md" in shown
    page.parent.mkdir()
    page.write_text("")
    shown = " ".join(metate("docs", tmp_path, "--measured", record, code=2).replace("│", " ").split())
    assert "expected a record of" in shown and not page.read_text()


def test_the_decoder_learns_and_both_attentions_agree():
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    screen = io.StringIO()
    plan = dataclasses.replace(PLAN, config=config, length=96, compared=6, seconds=0, written=20, served=(5, 8, 33))
    assert play(Console(file=screen, width=120), plan)
    text = screen.getvalue()
    assert "6 losses of metate and naive attention differ by at most" in text
    assert "7 steps" in text
    before, after = text.split("held-out ")[1].split(" nats")[0].split(" → ")
    assert float(after) < float(before)
    assert "what it writes" in text
    rows = {line.split()[0]: line.split() for line in text.partition("file, MB")[2].splitlines() if line.strip()}
    assert {float(rows[name][2]) < float(rows["float32"][2]) for name in ("nf4", "gptq", "awq")} == {True}
    if "cpu" not in REGISTRY["paged_attention"].implementations("cpu"):
        assert "nothing is served: paged attention has no compiled kernel here" in text
        return
    for served in ("one by one", "all at once", "beginning once", "from repetitions"):
        (line,) = (line for line in text.splitlines() if served in line and " of 5" in line)
        assert "5 of 5" in line or "logits of size" in text


def test_the_mixture_learns_and_tells_its_load():
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = LlamaConfig(**sizes, **experts, num_attention_heads=4, num_key_value_heads=2)
    screen = io.StringIO()
    plan = dataclasses.replace(mixture.PLAN, config=config, length=96, seconds=0, written=8)
    assert mixture.play(Console(file=screen, width=150), plan)
    lines = [line.split() for line in screen.getvalue().splitlines()]
    (title,) = (i for i, line in enumerate(lines) if line[:3] == ["seconds", "steps", "objective"])
    for line in lines[title + 1 : title + 9]:
        shares = [float(cell.removesuffix("%")) for cell in line[3:7]]
        assert abs(sum(shares) - 100) <= 2
    assert any(line[:3] == ["nf4,", "experts", "too"] and float(line[3]) < 6 for line in lines)


def test_importing_metate_stays_light():
    """Nobody who calls an operator pays for the command."""
    heavy = "('typer', 'rich', 'matplotlib', 'safetensors', 'transformers', 'metate.bench', 'metate.models')"
    code = f"import metate, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
