"""examples/quickstart.ipynb: what is committed of it, and all of its code, run on a tiny model."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import save_byte_llama
from page_blocks import ROOT
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from lowrank_ext.cli.main import app

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SHELL = re.compile(r"^!((?:.*\\\n)*.*)$", re.MULTILINE)
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_committed_without_outputs() -> None:
    """In the form of nbformat 4.5, which asks for an id in each cell."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in code_cells():
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]


def as_python(cell: dict[str, Any]) -> str:
    """Commands of the shell as calls; {name} in them is a variable, as in a notebook."""
    return SHELL.sub(lambda found: f'shell(rf"""{found[1]}""")', "".join(cell["source"]))


def run_command(line: str) -> None:
    """Runs lowrank-ext in this process and prints what it says."""
    program, *arguments = shlex.split(line.replace("\\\n", " "))
    assert program == "lowrank-ext", line
    result = CliRunner().invoke(app, arguments)
    print(result.output)
    assert result.exit_code == 0, result.output


def run_cells(parameters: dict[str, Any]) -> dict[str, Any]:
    """All cells in order and in one namespace, as `papermill` runs them: after the cell that is
    tagged so, its parameters are replaced."""
    names: dict[str, Any] = {"__name__": "notebook", "shell": run_command}
    for cell in code_cells():
        exec(compile(as_python(cell), f"cell {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= names.keys()
            names.update(parameters)
    return names


def test_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_byte_llama(tmp_path / "base", context=64)
    sizes = {"rank": 4, "steps": 6, "batch": 2, "seq_len": 32, "num_texts": 3, "out": "there"}
    torch.manual_seed(0)
    names = run_cells({"base": str(tmp_path / "base"), **sizes})

    assert names["trained"].global_step == 6
    assert names["adapter_loss"] < names["base_loss"]
    printed = capsys.readouterr().out
    losses = re.findall(r"^(base|adapter|merged|reloaded) +(\d\.\d{4})", printed, re.MULTILINE)
    assert [name for name, _ in losses] == ["base", "adapter", "merged", "reloaded"]
    assert len({loss for name, loss in losses if name != "base"}) == 1
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "there" / "merged")
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    LlamaForCausalLM.from_pretrained(tmp_path / "there" / "merged-too")
    compared = json.loads((tmp_path / "there" / "compared" / "report.json").read_text())
    assert [row["method"] for row in compared["methods"]] == ["frozen", "lora", "lamda"]


def test_commands_of_a_cell_become_calls() -> None:
    source = ["a = 1\n", "!lowrank-ext --rank {a} \\\n", "  --out y\n", "b = 2"]
    said: list[str] = []
    names: dict[str, Any] = {"shell": said.append}
    exec(as_python({"source": source}), names)
    assert names["b"] == 2
    words = shlex.split(said[0].replace("\\\n", " "))
    assert words == ["lowrank-ext", "--rank", "1", "--out", "y"]
