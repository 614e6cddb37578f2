"""Fixtures of the command line's tests: a tiny random Llama, a text, and short runs of finetune."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only slow models of this size down; --threads is undone afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the collections of garbage between measurements, half of a tiny run's time."""
    from lowrank_ext.cli import finetune, measure

    for module in (finetune, measure):
        monkeypatch.setattr(module, "release_memory", lambda: None)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """A machine with two GPUs, as far as is asked; the calls that would change one."""
    from accelerate.state import AcceleratorState, PartialState

    from lowrank_ext.cli import models

    calls: list[tuple[str, Any]] = []

    def records(name: str, value: Any = None) -> Callable[..., Any]:
        return lambda *arguments, **_: calls.append((name, *arguments)) or value

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(models._build_info, "CUDA_VERSION", "12.9")
    for name, value in (
        ("set_device", None),
        ("reset_peak_memory_stats", None),
        ("max_memory_allocated", 12345),
        ("get_rng_state", torch.tensor([7], dtype=torch.uint8)),
        ("set_rng_state", None),
    ):
        monkeypatch.setattr(torch.cuda, name, records(name, value))
    states = (PartialState, AcceleratorState)
    shared = [state._shared_state.copy() for state in states]
    for state in states:  # accelerate keeps the first device that it has seen
        state._shared_state.clear()
    yield calls
    for state, values in zip(states, shared, strict=True):
        state._shared_state.clear()
        state._shared_state.update(values)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See save_byte_llama."""
    from byte_llama import save_byte_llama
    from finetune_runs import CONTEXT

    path = tmp_path_factory.mktemp("tiny-model")
    save_byte_llama(path, context=CONTEXT)
    return path


@pytest.fixture(scope="session")
def quantizable_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_model with sizes that bitsandbytes takes on a CPU: multiples of 64."""
    from byte_llama import save_byte_llama
    from finetune_runs import CONTEXT

    path = tmp_path_factory.mktemp("quantizable-model")
    save_byte_llama(path, context=CONTEXT, intermediate_size=128)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}; " for n in range(400)))
    return path


@pytest.fixture(scope="session")
def recursive_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_model in two loops of one layer, with adapters of rank 4."""
    from recursive_runs import convert

    path = tmp_path_factory.mktemp("recursive") / "model"
    result = convert(tiny_model, path)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def run(tiny_model: Path, text_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs finetune with small sizes; keyword arguments override options, None leaves one out."""
    from finetune_runs import invoke, small_run

    def run(*flags: str, **options: Any) -> Any:
        defaults = {"model": tiny_model, "text": text_file, "out": tmp_path / "out"}
        return invoke("finetune", *flags, *small_run(**{**defaults, **options}))

    return run


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The settings that finetune with these arguments would run with."""
    from finetune_runs import invoke

    from lowrank_ext.cli import finetune

    runs: list[Any] = []
    monkeypatch.setattr(finetune, "run", lambda settings, *others, **more: runs.append(settings))

    def settings_of(*arguments: str) -> Any:
        runs.clear()
        result = invoke("finetune", *arguments)
        assert result.exit_code == 0, result.output
        return runs[0]

    return settings_of


@pytest.fixture(scope="session")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_model whose tokenizer has a chat template: role:content; for each message."""
    from saved_adapters import save_chat_model

    path = tmp_path_factory.mktemp("chat-model")
    save_chat_model(tiny_model, path)
    return path


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with adapters of tiny_model that say different things: a and b (LoRA), dora,
    goat."""
    from saved_adapters import save_different_adapters

    path = tmp_path_factory.mktemp("adapters")
    save_different_adapters(tiny_model, path)
    return path
