"""A model that trains without the schedule of its method says so, once; nothing else does."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import lowrank_ext as lr

CONFIGS = {
    "FreezeSchedule": lr.LaMDAConfig(r=2, target_modules=["0", "1"]),
    "AdaptiveFreezeSchedule": lr.AFLoRAConfig(r=2, target_modules=["0", "1"]),
}
SCHEDULES: dict[str, Callable[..., object]] = {
    "FreezeSchedule": lr.FreezeSchedule,
    "AdaptiveFreezeSchedule": lr.AdaptiveFreezeSchedule,
}


@contextmanager
def count_warnings(expected: int, name: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    assert [f"without a {name}" in str(each.message) for each in said] == [True] * expected


def adapted(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lr.adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.Tanh()), CONFIGS[name])


def train(model: nn.Module, steps: int) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(steps):
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", CONFIGS)
def test_training_without_a_schedule_is_said_once(name: str) -> None:
    model = adapted(name)
    with count_warnings(0, name):
        train(model, 1)
    with count_warnings(1, name):
        train(model, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_schedule_ends_the_waiting(name: str) -> None:
    model = adapted(name)
    SCHEDULES[name](model, 10)
    with count_warnings(0, name):
        train(copy.deepcopy(model), 3)
        train(model, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_no_training_is_not_said(name: str) -> None:
    model = adapted(name)
    x = torch.randn(3, 6)
    with count_warnings(0, name):
        for _ in range(3):
            model(x)  # in training mode, to look at the output
        torch.func.grad(lambda x: model(x).sum())(x)
        with torch.no_grad():
            model(x)
        for _ in range(3):
            model.eval()(x).sum().backward()
        model.train()(x).sum().backward()  # a look at the gradients
        pickle.dumps(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_that_never_train_projections_need_no_schedule(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    options = {"train_lora_b": False} if name == "FreezeSchedule" else {"live_modules": ()}
    lr.adapt(model, type(CONFIGS[name])(r=2, target_modules=["0", "1"], **options))
    with count_warnings(0, name):
        train(model, 3)


def test_trainer_without_the_callback() -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        max_steps=3, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True
    )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = adapted("FreezeSchedule")

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.inner(x).square().mean()}

    def run(callbacks: list[object]) -> None:
        data = [{"x": torch.randn(6)} for _ in range(24)]
        transformers.Trainer(Model(), arguments, train_dataset=data, callbacks=callbacks).train()

    with pytest.warns(UserWarning, match="without a FreezeSchedule.*FreezeCallback"):
        run([])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a FreezeSchedule")
        run([lr.FreezeCallback()])
