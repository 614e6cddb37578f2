"""A model directory that brings code of its own: no command runs it, whatever stdin answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke

import lowrank_ext as lr

pytestmark = pytest.mark.usefixtures("quick_runs")
ANSWERS = "y\n" * 100


def add_code(model: Path, witness: Path, part: str) -> None:
    """Makes `part` of a model refer to a module of the directory that writes the file `witness`."""
    (model / "own_code.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    classes = {"AutoModelForCausalLM": "own_code.M"}
    names = {
        "config": ("config.json", {"AutoConfig": "own_code.C", **classes}),
        "model": ("config.json", classes),
        "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["own_code.T", "own_code.F"]}),
    }
    name, auto_map = names[part]
    values = json.loads((model / name).read_text())
    unknown = {"config": {"model_type": "own"}, "model": {}, "tokenizer": {"tokenizer_class": "T"}}
    (model / name).write_text(json.dumps({**values, "auto_map": auto_map, **unknown[part]}))


def guard(model: Path, tmp_path: Path) -> Any:
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "guard_head.safetensors").write_bytes(b"")
    (tmp_path / "texts").write_text("a text\n")
    arguments = (str(tmp_path / "texts"), "--adapter", str(tmp_path / "guard"))
    return invoke("guard", *arguments, "--model", str(model), input=ANSWERS)


def finetune(model: Path, tmp_path: Path) -> Any:
    (tmp_path / "text.txt").write_text("some text " * 100)
    sizes = ("--steps", "1", "--batch", "1", "--seq-len", "16", "--rank", "2", "--dtype", "fp32")
    paths = ("--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"))
    return invoke("finetune", "--model", str(model), *sizes, *paths, input=ANSWERS)


@pytest.mark.parametrize("command", [finetune, guard], ids=["finetune", "guard"])
@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_of_a_model_is_refused(command, part, tiny_model, tmp_path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    add_code(model, tmp_path / "witness", part)
    result = command(model, tmp_path)
    assert not (tmp_path / "witness").exists()
    check_error(result, "cannot load", "own code", "auto_map", "from_pretrained", lr.__name__)


def test_a_model_that_transformers_knows_is_loaded_without_its_code(tiny_model, tmp_path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    add_code(model, tmp_path / "witness", "model")
    result = finetune(model, tmp_path)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "witness").exists()
