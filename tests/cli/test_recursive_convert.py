"""`lowrank-ext recursive convert`, and what all commands say about a wrong directory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke
from recursive_runs import command, convert
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

import lowrank_ext as lr


def test_what_is_written_is_the_converted_model(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = convert(tiny_model, out, init="lower", lora_init="svd", targets="q_proj,up_proj")
    assert result.exit_code == 0, result.output
    config = lr.recursive.RecursiveConfig(
        num_loops=2, rank=4, init="lower", targets=["q_proj", "up_proj"]
    )
    torch.manual_seed(0)
    source = LlamaForCausalLM.from_pretrained(tiny_model)
    before = sum(p.numel() for p in source.parameters())
    wanted = lr.recursive.convert(source, config)
    found = lr.recursive.load(out)
    assert found.recursive_config == config
    torch.testing.assert_close(found.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    own, given = AutoTokenizer.from_pretrained(tiny_model), lr_tokenizer(out)
    assert given("5 times 7").input_ids == own("5 times 7").input_ids
    assert given.eos_token == own.eos_token
    after = sum(p.numel() for p in found.parameters())
    assert "layer 2/2" in result.stdout and "2 loops of 1 layers" in result.stdout
    assert f"stored: {after / 1e3:.3g} k parameters" in result.stdout
    assert f"source: {before / 1e3:.3g} k parameters" in result.stdout
    assert [path.name for path in out.parent.iterdir()] == ["folder"]


def lr_tokenizer(directory: Path) -> Any:
    from lowrank_ext.cli.recursive.models import load_recursive

    return load_recursive(directory, "fp32").tokenizer


def test_another_model_type(tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "neox"
    shutil.copytree(tiny_model, model)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = GPTNeoXConfig(**sizes, num_attention_heads=2, vocab_size=257)
    GPTNeoXForCausalLM(config).save_pretrained(model)
    result = convert(model, tmp_path / "out", loops=4, rank=0)
    assert result.exit_code == 0, result.output
    assert "4 loops of 1 layers" in result.stdout


def test_a_converted_model_is_replaced_and_nothing_else(
    tiny_model: Path, recursive_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(recursive_model, out)
    old = "model-00001-of-00002.safetensors"
    (out / old).touch()
    assert convert(tiny_model, out, rank=0).exit_code == 0
    assert not (out / old).exists()
    assert lr.recursive.load(out).recursive_config.rank == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "letters.txt").touch()
    check_error(convert(tiny_model, other), f"--out {other}", "must be new, empty, or hold")
    check_error(convert(tiny_model, tiny_model), "must be new, empty, or hold")
    assert (other / "letters.txt").exists()
    for name in ("notes.txt", "report.json", "model"):  # a user's, or a run's
        (out / name).mkdir()
        check_error(convert(tiny_model, out), "must be new, empty, or hold", f"it holds {name}")
        assert (out / name).exists()
        (out / name).rmdir()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loops": 3}, ("num_loops must divide the 2 layers", "got 3; possible: 1, 2")),
        ({"loops": 0}, ("--loops must be at least 1, got 0",)),
        ({"rank": -1}, ("--rank must be at least 0, got -1",)),
        ({"rank": 0, "lora_init": "svd"}, ("--lora-init svd needs adapters", "--rank above 0")),
        ({"rank": 0, "targets": "q_proj"}, ("--targets q_proj needs adapters",)),
        ({"init": "averag"}, ("--init must be one of", "did you mean average?")),
        ({"lora_init": "sdv"}, ("--lora-init must be one of", "did you mean svd?")),
        ({"targets": "q_prj"}, ("targets must name linears", "q_prj", "self_attn.q_proj")),
        ({"targets": "(q"}, ("--targets '(q' is not a regular expression",)),
        ({"targets": " "}, ("--targets must be all-linear",)),
        ({"dtype": "bf61"}, ("--dtype must be one of", "did you mean bf16")),
        ({"threads": 0}, ("--threads must be at least 1, got 0",)),
        ({"seed": -1}, ("--seed must be at least 0",)),
        ({"model": "/no/such/model"}, ("/no/such/model",)),
    ],
)
def test_one_line_for_what_is_wrong(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    check_error(convert(**{"model": tiny_model, "out": tmp_path / "out", **options}), *words)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_folded(
    tiny_model: Path, recursive_model: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "unknown"
    shutil.copytree(tiny_model, odd)
    config = json.loads((tiny_model / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    check_error(convert(odd, tmp_path / "out"), "cannot load")
    words = "cannot load", str(recursive_model), "it is recursive already"
    check_error(convert(recursive_model, tmp_path / "out"), *words)


def test_layers_of_unlike_shapes(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from lowrank_ext.cli.recursive import convert as module

    load_model = module.load_model

    def loaded(*arguments: Any) -> Any:
        found = load_model(*arguments)
        found.model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 95, bias=False)
        return found

    monkeypatch.setattr(module, "load_model", loaded)
    words = (
        "layers 0 and 1 must be alike",
        "mlp.up_proj.weight of [96, 64] float32",
        "and [95, 64]",
    )
    check_error(convert(tiny_model, tmp_path / "out"), *words)


def test_a_model_without_a_list_of_layers(
    tiny_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from lowrank_ext.cli.recursive import convert as module

    load_model = module.load_model

    def loaded(*arguments: Any) -> Any:
        found = load_model(*arguments)
        found.model.config.num_hidden_layers = 7
        return found

    monkeypatch.setattr(module, "load_model", loaded)
    words = ("must have one list of its 7 layers, got none",)
    check_error(convert(tiny_model, tmp_path / "out"), *words)


# ---- directories, for all commands that load one

COMMANDS: dict[str, list[str]] = {
    "uptrain": ["--loss", "ce"],
    "evaluate": [],
    "generate": ["--prompt", "a"],
    "bench": [],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_directory_that_holds_no_such_model(
    name: str, recursive_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def refused(directory: Path, *words: str) -> None:
        options = [*COMMANDS[name], "--dtype", "fp32"]
        if name == "uptrain":
            options += ["--out", str(tmp_path / "out")]
        check_error(invoke("recursive", name, str(directory), *options), *words)

    refused(tmp_path / "none", str(tmp_path / "none"), "no such directory")
    refused(tiny_model, "must describe a recursive model", "convert")
    damaged = tmp_path / "damaged"
    shutil.copytree(recursive_model, damaged)
    config = json.loads((damaged / "config.json").read_text())
    config["recursive"]["rank"] = 5
    (damaged / "config.json").write_text(json.dumps(config))
    refused(damaged, "model.safetensors", "lora_a must be [5, 96], got [4, 96]")
    (damaged / "model.safetensors").unlink()
    refused(damaged, "model.safetensors")
    shutil.copytree(recursive_model, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    refused(tmp_path / "mute", "cannot load the tokenizer of")


def test_the_help_imports_neither_transformers_nor_matplotlib() -> None:
    code = (
        "import sys; from lowrank_ext.cli.main import app; "
        "print([m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_have_near_matches(tmp_path: Path) -> None:
    result = command("convert", "--loop", "2", out=tmp_path / "out")
    assert result.exit_code == 2
    assert "--loops" in result.stderr
