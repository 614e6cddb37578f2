"""`--method full`: the whole model's file is read by the library's reader."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

import safetensors.torch
from small_models import small_llama

from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.methods import Full


class NoTokenizer:
    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.json").write_text(json.dumps({}))


def saved(tmp_path: Path, **options: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    model = small_llama(**options)
    Full("full").save(model, NoTokenizer(), tmp_path)
    return model


def load(tmp_path: Path, **options: Any) -> torch.nn.Module:
    torch.manual_seed(2)
    settings: Any = None
    return Full("full").load(small_llama(**options), settings, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_loads_what_it_saved(tmp_path: Path, tied: bool) -> None:
    expected = saved(tmp_path, tie_word_embeddings=tied).state_dict()
    got = load(tmp_path, tie_word_embeddings=tied)
    assert got.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.state_dict().items())
    assert all(parameter.requires_grad for parameter in got.parameters())
    assert tied == (got.lm_head.weight is got.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, t: path.write_bytes(path.read_bytes()[:-9]), "must be a whole safetensors"),
        (lambda path, t: t.pop("lm_head.weight"), "whole model, got no lm_head.weight"),
        (lambda path, t: t.update({"\x1b]0;x": torch.ones(1)}), r"of this model, got '\\x1b"),
        (lambda path, t: t["lm_head.weight"].fill_(torch.nan), "lm_head.weight must be finite"),
        (lambda path, t: t.update({"lm_head.weight": torch.ones(2)}), "size mismatch"),
    ],
    ids=["cut", "less", "more", "nan", "shape"],
)
def test_damaged_file(tmp_path: Path, damage: Any, message: str) -> None:
    saved(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    before = path.stat().st_size
    damage(path, tensors)
    if path.stat().st_size == before:
        path.write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_nothing_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    for name in ("safetensors.safe_open", "safetensors.torch.safe_open"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("was mapped"))
    load(tmp_path)
