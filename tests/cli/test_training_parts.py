"""Pieces of the training loop of the command line: order of rows, optimizer, progress, plan."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("typer")

from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.training.evaluation import held_out_loss
from lowrank_ext.cli.training.optimizer import MasterAdamW, forget_frozen
from lowrank_ext.cli.training.order import RowOrder
from lowrank_ext.cli.training.plan import Plan
from lowrank_ext.cli.training.progress import Progress


def some_plan(**changes: Any) -> Plan:
    return Plan(**{"steps": 10, "batch": 2, "seed": 0, "learning_rate": 1e-3, **changes})


def test_every_epoch_has_every_row_once_in_its_own_order() -> None:
    order = list(RowOrder(7, seed=3, start=0, count=21))
    epochs = [order[:7], order[7:14], order[14:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != list(RowOrder(7, seed=4, start=0, count=21))


@pytest.mark.parametrize("start", [0, 1, 6, 7, 20])
def test_an_order_from_a_later_position_is_the_rest_of_the_order(start: int) -> None:
    whole = list(RowOrder(7, seed=3, start=0, count=30))
    part = RowOrder(7, seed=3, start=start, count=30 - start)
    assert len(part) == 30 - start
    assert list(part) == whole[start:]


def groups(*parameters: nn.Parameter, lr: float = 1e-3) -> list[dict[str, Any]]:
    return [{"params": [parameter], "lr": lr, "weight_decay": 0.01} for parameter in parameters]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_optimizer_equals_adamw_in_fp32_and_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    value = torch.randn(64).to(dtype)
    ours, exact = nn.Parameter(value.clone()), nn.Parameter(value.float())
    optimizer = MasterAdamW(groups(ours, lr=1e-4))
    reference = torch.optim.AdamW(groups(exact, lr=1e-4))
    for _ in range(20):
        gradient = torch.randn(64).to(dtype)
        ours.grad, exact.grad = gradient.clone(), gradient.float()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert ours.grad is None
    # Steps of 1e-4 are lost in a sum that is rounded to bf16 after each of them.
    assert torch.equal(ours.detach(), exact.detach().to(dtype))


def test_optimizer_continues_from_its_state() -> None:
    torch.manual_seed(0)
    values = [torch.randn(8).bfloat16(), torch.randn(3, 4)]
    whole = [nn.Parameter(value.clone()) for value in values]
    optimizer = MasterAdamW(groups(*whole))

    def step(own: MasterAdamW, parameters: list[nn.Parameter], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        own.step()

    step(optimizer, whole, 0)
    parts = [nn.Parameter(parameter.detach().clone()) for parameter in whole]
    other = MasterAdamW(groups(*parts))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, parameters in ((optimizer, whole), (other, parts)):
        step(own, parameters, 1)
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))


@pytest.mark.parametrize("kind", [MasterAdamW, torch.optim.AdamW])
def test_frozen_parameters_lose_their_moments_and_stay(kind: Any) -> None:
    first, second = nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.ones(3))
    optimizer = kind(groups(first, second))
    for parameter in (first, second):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert len(optimizer.state) == 2
    first.requires_grad_(False)
    forget_frozen(optimizer)
    before = first.detach().clone()
    second.grad = torch.ones(3)
    optimizer.step()
    assert len(optimizer.state) == 1
    assert torch.equal(first.detach(), before)


def test_held_out_loss_is_a_mean_over_targets(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from byte_llama import save_byte_llama
    from transformers import AutoModelForCausalLM

    save_byte_llama(tmp_path, context=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[1:, 2:] = -100
    batches = [
        {"input_ids": tokens[rows], "labels": labels[rows]} for rows in (slice(1), slice(1, 4))
    ]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    assert model.training is False
    assert held_out_loss(model, batches) == pytest.approx(expected.item(), rel=1e-5)
    assert model.training is False, "the model goes back to its mode"


def test_four_evaluations_or_one_every_given_number_of_steps() -> None:
    def steps(plan: Plan) -> list[int]:
        return [step for step in range(plan.steps + 1) if plan.is_evaluated(step)]

    assert steps(some_plan(steps=30)) == [8, 16, 24, 30]
    assert steps(some_plan(steps=2)) == [1, 2]
    assert steps(some_plan(steps=10, eval_every=4)) == [4, 8, 10]


@pytest.mark.parametrize(("warmup", "expected"), [(0, 0), (0.1, 3), (1, 1), (7, 7), (99, 30)])
def test_warmup_is_a_fraction_or_a_number_of_steps(warmup: float, expected: int) -> None:
    assert some_plan(steps=30, warmup=warmup).warmup_steps(30) == expected


def some_progress(**changes: Any) -> dict[str, Any]:
    values = Progress(
        step=2,
        losses=[3.0, 2.0],
        tokens=[8, 8],
        step_seconds=[0.1, 0.1],
        optimizer_seconds=[0.01, 0.01],
        held_out=[(0, 3.0), (2, 2.5)],
    ).to_dict()
    return {**values, **changes}


def test_progress_survives_json_and_its_best_evaluation_is_one_after_a_step() -> None:
    progress = Progress.from_dict(some_progress(), "progress")
    assert progress.held_out == [(0, 3.0), (2, 2.5)]
    progress.held_out = [(0, 1.0), (2, 2.5), (4, 2.0), (6, 2.0), (8, 2.1)]
    assert progress.best == (4, 2.0)
    assert progress.evaluations_without_gain() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "2"}, "step must be int, got '2'"),
        ({"step": True}, "step must be int, got True"),
        ({"step": 3}, "losses must have step=3 entries, got 2"),
        ({"losses": [1.0, "x"]}, r"losses must be list\[float\]"),
        ({"held_out": []}, "held_out must have an entry"),
        ({"\x1b]0;x\x07": 1}, r"\\x1b\]0;x\\x07"),
    ],
)
def test_progress_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Progress.from_dict(some_progress(**changes), "progress.json")
    short = some_progress()
    del short["losses"]
    with pytest.raises(UserError, match="not from this version of lowrank-ext: 'losses'"):
        Progress.from_dict(short, "progress.json")
