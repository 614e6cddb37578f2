"""RF-35: a path that is no adapter's directory says what it is and what to do."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ext as lr

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def load(path: Any) -> None:
    lr.load_adapter(net(), path)


def load_into_bank(path: Any) -> None:
    lr.AdapterBank(net()).load("a", path)


LOADERS: dict[str, Callable[[Any], None]] = {
    "load_adapter": load,
    "AdapterBank.load": load_into_bank,
}


@pytest.mark.parametrize("caller", LOADERS)
@pytest.mark.parametrize("as_text", [False, True])
def test_loading_from_something_else(caller: str, as_text: bool, tmp_path: Path) -> None:
    def refused(path: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=rf"^{re.escape(caller)}: .*{message}"):
            LOADERS[caller](str(path) if as_text else path)

    lr.save_adapter(lr.adapt(net(), lr.LoRAConfig(r=2)), tmp_path / "good")
    for name in (CONFIG, WEIGHTS):
        refused(tmp_path / "good" / name, NotADirectoryError, r"got the file .*; pass .*good$")
    (tmp_path / "lora.bin").write_bytes(b"x")
    refused(
        tmp_path / "lora.bin", NotADirectoryError, "must be the directory of an adapter, got the"
    )
    refused(tmp_path / "none", FileNotFoundError, "none does not exist$")
    refused(
        Path("someone/some-lora"),
        FileNotFoundError,
        r"does not exist; from the Hugging Face Hub: .*snapshot_download\('someone/some-lora'\)",
    )
    old = tmp_path / "old"
    old.mkdir()
    (old / CONFIG).write_text("{}")
    refused(old, FileNotFoundError, f"{WEIGHTS} does not exist$")
    (old / "adapter_model.bin").write_bytes(b"x")
    refused(old, FileNotFoundError, r"adapter_model\.bin is a pickle.*save_pretrained\(path\)")
    (tmp_path / "good" / "adapter_model.bin").write_bytes(b"x")
    LOADERS[caller](tmp_path / "good")


@pytest.mark.parametrize("deep", [False, True])
def test_saving_onto_a_file(deep: bool, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    path = file / "adapter" if deep else file
    basis = lr.adapt(net(), lr.BasisLoRAConfig(r=2, residuals=["dance"]))
    calls: dict[str, Callable[[], object]] = {
        "save_adapter": lambda: lr.save_adapter(lr.adapt(net(), lr.LoRAConfig(r=2)), path),
        "save_residual": lambda: lr.motion.save_residual(basis, path, "dance"),
    }
    for caller, call in calls.items():
        with pytest.raises(
            NotADirectoryError, match=rf"^{caller}: path must be a directory, got the file .*file$"
        ):
            call()
    assert file.read_text() == "kept"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
