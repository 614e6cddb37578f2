"""--device and the dtype that suits it, on a machine whose GPUs are made up."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from lowrank_ext.cli import models
from lowrank_ext.cli.errors import UserError


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "cuda"), ("cpu", "cpu"), ("cuda", "cuda"), ("cuda:0", "cuda:0"), ("cuda:1",) * 2],
)
@pytest.mark.usefixtures("two_gpus")
def test_devices_of_a_machine_with_two_gpus(name: str, expected: str) -> None:
    assert models.resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ((torch.backends.cuda, "is_built", lambda: False), "built without CUDA; install"),
        ((torch.cuda, "is_available", lambda: False), "torch finds no GPU here"),
        ((models._build_info, "CUDA_VERSION", None), "lowrank_ext is built without CUDA kernels"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_cannot_be_used_is_said_and_auto_is_the_cpu(
    monkeypatch, lacking: tuple[object, str, object], words: str
) -> None:
    monkeypatch.setattr(*lacking)
    if lacking[1] == "is_built":  # torch without CUDA
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.resolve_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"--device {name}: .*{words}"):
            models.resolve_device(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:2", "--device cuda:2: GPUs are cuda:0 to cuda:1"),
        ("cude", "must be auto, cpu, cuda or cuda:N, got 'cude' .did you mean cuda"),
        ("cuda:-1", "got 'cuda:-1'"),
        ("cuda:\u0661", "must be auto"),  # a digit, but not one of ASCII
        ("", "got ''"),
        ("CPU", "got 'CPU'"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_names_of_devices_that_are_not_there(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        models.resolve_device(name)


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_dtype_of_a_gpu_is_one_that_it_multiplies(monkeypatch, fast: bool, dtype) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return fast or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert models.resolve_dtype("auto", torch.device("cuda", 1)) is dtype
    assert models.resolve_dtype("fp32", torch.device("cuda")) is torch.float32


def test_a_model_is_loaded_onto_the_device(tiny_model: Path) -> None:
    source, device = models.find_model(str(tiny_model)), torch.device("meta")
    model = models.load_model(source, torch.bfloat16, device).model
    assert {(each.device, each.dtype) for each in model.parameters()} == {(device, torch.bfloat16)}
    assert {each.device for each in model.buffers()} == {device}
