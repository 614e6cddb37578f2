"""What a run does on a GPU, as far as it shows without one: where model and data are placed, what
transformers' Trainer is told, what is asked of torch.cuda. The GPUs are made up; for the steps the
meta device stands for one."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from finetune_runs import invoke, small_run
from transformers import LlamaForCausalLM

from lowrank_ext.cli import job, measure
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.methods import entry
from lowrank_ext.cli.models import CPU, load_model
from lowrank_ext.cli.settings import Settings, method_names
from lowrank_ext.cli.training.evaluation import training_loss
from lowrank_ext.cli.training.plan import Plan, training_arguments
from lowrank_ext.cli.training.run import TrainingRun

META = torch.device("meta")
GPU = torch.device("cuda", 1)


@pytest.fixture
def settings_of(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Settings]:
    """The settings of a command line, which is not run."""
    found: list[Settings] = []
    monkeypatch.setattr("lowrank_ext.cli.finetune.run", lambda settings, *_: found.append(settings))

    def settings_of(**options: Any) -> Settings:
        places = {"model": tiny_model, "text": text_file, "out": tmp_path / "out"}
        result = invoke("finetune", *small_run(**{**places, "dtype": "auto", **options}))
        assert result.exit_code == 0, result.output
        return found.pop()

    return settings_of


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Device and dtype of every model that is loaded; it lies on the CPU instead."""
    found: list[tuple[Any, ...]] = []

    def load(source: Any, dtype: torch.dtype, device: torch.device, *more: Any, **named: Any):
        found.append((device, dtype))
        return load_model(source, torch.float32, CPU)

    monkeypatch.setattr(job, "load_model", load)
    return found


@pytest.mark.parametrize(("name", "placed"), [("cuda:1", GPU), ("auto", torch.device("cuda"))])
@pytest.mark.parametrize("fast", [True, False])
def test_the_base_is_loaded_onto_the_gpu_in_a_dtype_that_it_multiplies(
    two_gpus, settings_of, loads, monkeypatch: pytest.MonkeyPatch, name: str, placed, fast: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: fast)
    _, found = job.load_base(settings_of(device=name), Console(quiet=True))
    assert found == placed
    assert loads == [(placed, torch.bfloat16 if fast else torch.float16)]


def test_adapters_in_half_precision_are_refused_where_gradients_would_be_scaled(
    two_gpus, settings_of, loads
) -> None:
    settings = settings_of(device="cuda:1", dtype="fp16", adapter_dtype="base")
    with pytest.raises(UserError, match="--dtype fp16: what trains must be in fp32"):
        job.load_base(settings, Console(quiet=True))
    assert loads == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_trainer_trains_on_that_gpu_alone(two_gpus, settings_of, tmp_path, dtype: str) -> None:
    """transformers would take cuda:0, and split batches over both."""
    shared = SimpleNamespace(settings=settings_of(device="cuda:1", dtype=dtype), device=GPU)
    plan = job.Job.plan(shared, "lora")
    assert (plan.device, plan.half) == (GPU, dtype == "fp16")
    arguments = training_arguments(plan, plan.steps, tmp_path)
    assert (arguments.device, arguments.n_gpu) == (GPU, 1)
    assert arguments.train_batch_size == plan.batch
    assert (arguments.use_cpu, arguments.dataloader_pin_memory) == (False, True)
    assert (arguments.fp16, arguments.bf16) == (plan.half, False)  # no autocast over a bf16 base
    assert ("set_device", GPU) in two_gpus


def test_a_run_on_the_cpu_leaves_the_gpus_alone(two_gpus, tmp_path: Path) -> None:
    plan = Plan(steps=1, batch=2, seed=0, learning_rate=1e-3, device=CPU)
    arguments = training_arguments(plan, plan.steps, tmp_path)
    assert (arguments.device, arguments.n_gpu, arguments.use_cpu) == (CPU, 0, True)
    assert not arguments.dataloader_pin_memory
    assert two_gpus == []


# What a step computes


class OnlyOnMeta(TorchDispatchMode):
    """Fails for an op that gets a tensor of another device; numbers (0-dim) may be there. Kernels
    of the meta device itself take indices of any."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            for tensor in tree_leaves((args, kwargs)):
                there = isinstance(tensor, torch.Tensor) and tensor.dim() > 0
                assert not there or tensor.device == META, f"{op}: {tensor.device}"
        return op(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> LlamaForCausalLM:
    """Its attention reads masks as they are; another one looks at their values first."""
    model = LlamaForCausalLM.from_pretrained(
        tiny_model, dtype=torch.bfloat16, attn_implementation="eager"
    )
    return model.requires_grad_(False).train()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """On the CPU, where the data is collated."""
    ids = torch.randint(0, 200, (2, 9))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


@pytest.mark.filterwarnings("ignore:accelerate. a layer runs through PEFT's own:UserWarning")
@pytest.mark.parametrize("method", [name for name in method_names() if name != "frozen"])
def test_a_step_of_every_method_stays_on_the_device(
    settings_of, base: LlamaForCausalLM, batch, method: str
) -> None:
    found, settings = entry(method), settings_of(method=method)
    model = found.build(copy.deepcopy(base), settings).to(META)
    with OnlyOnMeta():
        loss = training_loss(model, batch, found.training)[1]
        loss.backward()
    assert loss.device == META
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and {gradient.device for gradient in gradients} == {META}


def test_the_frozen_models_loss_stays_on_the_device(base: LlamaForCausalLM, batch) -> None:
    model = copy.deepcopy(base).to(META)
    with OnlyOnMeta():
        loss = measure.frozen_loss(model, batch)
        loss.backward()
    assert loss.device == META


def test_peak_memory_is_that_of_the_gpu(two_gpus) -> None:
    with measure.PeakMemory(GPU) as peak:
        pass
    assert (peak.num_bytes, peak.source) == (12345, "max_memory_allocated")
    assert two_gpus == [("reset_peak_memory_stats", GPU), ("max_memory_allocated", GPU)]


def test_a_step_that_is_taken_back_takes_back_the_gpus_random_numbers(two_gpus) -> None:
    run: Any = SimpleNamespace(plan=Plan(steps=1, batch=1, seed=0, learning_rate=1.0, device=GPU))
    TrainingRun.remember_generators(run)
    drawn = torch.rand(3)
    TrainingRun._restore_generators(run)
    assert torch.equal(torch.rand(3), drawn)
    (asked, of), (given, state, to) = two_gpus
    assert (asked, of, given, to) == ("get_rng_state", GPU, "set_rng_state", GPU)
    assert state.tolist() == [7]
