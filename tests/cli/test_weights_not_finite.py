"""A base with nan in one weight: every command ends in one line that names the weight."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke, small_run
from safetensors.torch import load_file, save_file

WEIGHT = "model.layers.0.mlp.up_proj.weight"
CAUSE = f"{WEIGHT} holds values that are not finite"


@pytest.fixture
def nan_model(tiny_model: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(copy / "model.safetensors")
    tensors[WEIGHT][1, 2] = torch.nan
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("method", ["frozen", "lora", "full", "peft-lora"])
def test_finetune(nan_model: Path, text_file: Path, tmp_path: Path, method: str) -> None:
    pytest.importorskip("peft")
    options = small_run(model=nan_model, text=text_file, out=tmp_path / "out", method=method)
    words = f"{method}: the held-out loss is not finite before the first step"
    check_error(invoke("finetune", *options), words, WEIGHT.rpartition(".")[0], "not finite")


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_generate(nan_model: Path, temperature: str) -> None:
    sampling = ["--temperature", temperature, "--max-new-tokens", "2", "--dtype", "fp32"]
    result = invoke("generate", "--model", str(nan_model), "--prompt", "a", *sampling)
    check_error(result, "cannot generate: the logits are not finite", CAUSE)


def test_evaluate(nan_model: Path, text_file: Path) -> None:
    options: list[Any] = ["--model", nan_model, "--text", text_file, "--seq-len", 16, "--limit", 2]
    result = invoke("evaluate", *map(str, options), "--dtype", "fp32")
    check_error(result, "base: the loss is not finite", CAUSE)
