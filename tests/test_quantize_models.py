"""Whole decoders to low-bit checkpoints: written, read back, resumed, and better with calibration than without."""

import copy
import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from metate import FormatError
from metate.cli import app
from metate.models import Llama, LlamaConfig
from metate.models.quantize import METHODS, Recipe, calibration_tokens, quantize_checkpoint, quantize_decoder
from metate.nn import QuantLinear
from metate.quant import QuantizedWeight, quantize_rtn, save_quantized

CONFIG = LlamaConfig(256, 128, 256, 2, 4, 4, 32)
TEXT = "def f(x):\n    return [x + 1 for x in range(10)]\n" * 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = Llama(CONFIG).initialize(torch.Generator().manual_seed(0))
    weights = {name if name.startswith("lm_head") else f"model.{name}": p for name, p in model.named_parameters()}
    sizes = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__ if getattr(CONFIG, name) != {}}
    save_quantized(folder, weights, "metate", {"model_type": "llama", **sizes})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_written_and_read_back(checkpoint, tmp_path, method):
    recipe, seen = Recipe(method, 4, 64), []
    quantize_checkpoint(
        checkpoint, recipe, tmp_path, TEXT, samples=4, length=64, report=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 2), (2, 2)]
    model, dense = Llama.from_pretrained(tmp_path, dtype=torch.float32), Llama.from_pretrained(checkpoint)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    assert not (tmp_path / "unfinished").exists()
    floats = ("norm.weight", "tokens.weight", "head.weight")
    dtypes = [t.dtype for name, t in load_file(tmp_path / "model.safetensors").items() if name.endswith(floats)]
    assert dtypes == [torch.float16] * 7, "transformers' own readers cast nothing"
    tokens = torch.tensor([list(TEXT[:100].encode())])
    far = (model(tokens) - dense(tokens)).abs().max() / dense(tokens).abs().max()
    assert 0 < far < 0.3


def test_rounding_is_rounding_whatever_text_is_given(checkpoint):
    """No scale is left in the weights that nothing before them takes out again."""
    model, dense = Llama.from_pretrained(checkpoint), Llama.from_pretrained(checkpoint)
    quantize_decoder(model, Recipe("rtn", 4, 64), calibration_tokens(checkpoint, TEXT, 256, 2, 64))
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            rounded = quantize_rtn(dense.get_submodule(name).weight, 4, 64)
            assert torch.equal(module.weight.dequantize(), rounded.dequantize()), name


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibration_beats_rounding(checkpoint, method):
    torch.manual_seed(0)
    dense = Llama.from_pretrained(checkpoint)
    for layer in dense.layers:  # inputs of very different size, as trained models have them
        layer.input_layernorm.weight.data *= torch.logspace(-1, 1, 128)[torch.randperm(128)]
        layer.post_attention_layernorm.weight.data *= torch.logspace(-1, 1, 128)[torch.randperm(128)]
    tokens = torch.tensor([list(TEXT[i : i + 64].encode()) for i in range(0, 640, 40)])
    truth = dense(tokens)
    errors = {}
    for name in ("rtn", method):
        model = copy.deepcopy(dense)
        quantize_decoder(model, Recipe(name, 4, 64), tokens)
        errors[name] = (model(tokens) - truth).square().mean()
    assert errors[method] < errors["rtn"]


def test_groups_by_the_size_of_inputs(checkpoint, tmp_path):
    """Written as readers of GPTQ know it: "desc_act", and every column's group in g_idx."""
    recipe = Recipe("gptq", 4, 32, desc_act=True)
    quantize_checkpoint(checkpoint, recipe, tmp_path, TEXT, samples=4, length=64)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] and config["checkpoint_format"] == "gptq" and "dynamic" not in config
    tensors = load_file(tmp_path / "model.safetensors")
    for name in (name for name in tensors if name.endswith("g_idx")):
        index = tensors[name]
        assert (index.bincount() == 32).all() and not torch.equal(index, index.sort().values)
        shared = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        assert torch.equal(index, tensors[shared]), "readers that fuse these layers keep one order"
        assert (tensors[name.replace("g_idx", "qzeros")] == 0x77777777).all(), "8, stored minus one"
    model, dense = Llama.from_pretrained(tmp_path, dtype=torch.float32), Llama.from_pretrained(checkpoint)
    again = quantize_decoder(dense, recipe, calibration_tokens(checkpoint, TEXT, 256, 4, 64))
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(module.dequantize(), again[f"model.{name}"].dequantize()), name
    with pytest.raises(ValueError, match="desc_act is True with awq, expected gptq"):
        Recipe("awq", desc_act=True)


def test_a_stopped_run_goes_on(checkpoint, tmp_path):
    recipe, tokens = Recipe("gptq", 4, 64), calibration_tokens(checkpoint, TEXT, 256, 2, 64)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_decoder(Llama.from_pretrained(checkpoint), recipe, tokens, store=tmp_path, report=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["layer-000"]
    again = quantize_decoder(Llama.from_pretrained(checkpoint), recipe, tokens, store=tmp_path)
    whole = quantize_decoder(Llama.from_pretrained(checkpoint), recipe, tokens)
    for name, weight in whole.items():
        if isinstance(weight, QuantizedWeight):
            assert torch.equal(weight.dequantize(), again[name].dequantize())
    with pytest.raises(ValueError, match="of another recipe"):
        quantize_decoder(Llama.from_pretrained(checkpoint), Recipe("awq", 4, 64), tokens, store=tmp_path)
    with pytest.raises(ValueError, match="of another checkpoint or calibration text"):
        quantize_decoder(Llama.from_pretrained(checkpoint), recipe, tokens.flip(0), store=tmp_path)
    other = Llama(CONFIG).initialize(torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="of another checkpoint or calibration text"):
        quantize_decoder(other, recipe, tokens, store=tmp_path)


def test_biases_come_back_when_a_run_goes_on(tmp_path):
    """AWQ's scales are folded into some of them."""
    torch.manual_seed(0)
    dense = Llama(dataclasses.replace(CONFIG, attention_bias=True, mlp_bias=True))
    dense.initialize(torch.Generator().manual_seed(0))
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    tokens = torch.tensor([list(TEXT[:64].encode())])
    first, again = copy.deepcopy(dense), copy.deepcopy(dense)
    for model in (first, again):
        quantize_decoder(model, Recipe("awq", 4, 64), tokens, store=tmp_path)
    assert not torch.equal(first.layers[0].self_attn.v_proj.bias, dense.layers[0].self_attn.v_proj.bias)
    assert torch.equal(first(tokens), again(tokens))


def test_what_is_missing_is_named(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="calibration text for gptq"):
        quantize_checkpoint(checkpoint, Recipe("gptq"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="at least 512"):
        quantize_checkpoint(checkpoint, Recipe("gptq"), tmp_path, "short")
    with pytest.raises(ValueError, match="method is 'q4'"):
        Recipe("q4")
    with pytest.raises(ValueError, match="with its tokenizer"):
        calibration_tokens(tmp_path, TEXT, 32000, 2, 64)
    quantize_checkpoint(checkpoint, Recipe("nf4"), tmp_path / "once")
    with pytest.raises(ValueError, match="quantised already"):
        quantize_checkpoint(tmp_path / "once", Recipe("nf4"), tmp_path / "twice")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FormatError, match=r"expected 'llama'.*pip install"):
        quantize_checkpoint(tmp_path, Recipe("nf4"), tmp_path / "out")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("gptq", 5), "integers of"),
        (Recipe("rtn", 4, 0), "group_size is 0"),
        (Recipe("awq", 4, 96), "whole groups"),
        (Recipe("nf4", 4, 100), "block_size is 100"),
    ],
    ids=str,
)
def test_what_the_format_cannot_hold_is_said_before_anything_is_quantised(checkpoint, tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(checkpoint, recipe, tmp_path / "out", TEXT, samples=2, length=64)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_written_over_itself(checkpoint, tmp_path):
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="the checkpoint itself"):
        quantize_checkpoint(checkpoint, Recipe("nf4"), checkpoint / ".." / checkpoint.name)
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_no_other_checkpoint_is_written_over(checkpoint, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(checkpoint, Recipe("nf4"), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="out, which holds a checkpoint, expected a new folder"):
        quantize_checkpoint(checkpoint, Recipe("fp4"), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "unfinished").mkdir()  # stopped between the last file and the end
    quantize_checkpoint(checkpoint, Recipe("nf4"), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_file_is_no_folder(checkpoint, tmp_path):
    """Said before anything is quantised."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out is .*file, a file"):
        quantize_checkpoint(checkpoint, Recipe("nf4"), tmp_path / "file")
    with pytest.raises(ValueError, match=r"folder is .*model\.safetensors, a file"):
        quantize_checkpoint(checkpoint / "model.safetensors", Recipe("nf4"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_checkpoint(checkpoint, tmp_path):
    arguments = ["quantize", str(checkpoint), "-o", str(tmp_path), "--format", "nf4", "--double-quant"]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0 and "wrote" in run.output
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_use_double_quant"]
    assert "model.layers.0.mlp.up_proj.weight.nested_absmax" in load_file(tmp_path / "model.safetensors")
    run = CliRunner().invoke(app, [*arguments[:-2], "awq", "--double-quant"])
    assert run.exit_code == 1 and "nf4 or fp4" in run.output
    run = CliRunner().invoke(app, [*arguments[:-1], "--desc-act"])
    assert run.exit_code == 1 and "desc_act is True with nf4" in run.output
    run = CliRunner().invoke(app, ["quantize", str(checkpoint), "-o", str(tmp_path), "--format", "gptq"])
    assert run.exit_code == 1 and "calibration text" in run.output


def test_a_stopped_command_says_how_it_goes_on(checkpoint, tmp_path, monkeypatch):
    def stop(*args, **options):
        (tmp_path / "unfinished").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("metate.models.quantize.quantize_checkpoint", stop)
    run = CliRunner().invoke(app, ["quantize", str(checkpoint), "-o", str(tmp_path)])
    assert run.exit_code == 130 and "the same command goes on" in run.output
