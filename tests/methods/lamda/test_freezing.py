"""FreezeSchedule: which columns freeze when, and that a frozen column never changes again."""

import copy
import pickle
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from optimizers import OPTIMIZERS
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.methods.lamda.freezing import num_frozen_columns
from lowrank_ext.nn import LaMDALinear

RANK = 6


def make_model(
    dtype: torch.dtype = torch.float32,
    adapter_dtype: str = "base",
    ranks: tuple[int, int] = (RANK, RANK),
) -> nn.Sequential:
    torch.manual_seed(1)
    linears = [nn.Linear(10, 12), nn.Linear(12, 8)]
    adapted = [
        LaMDALinear.from_linear(
            linear.to(dtype), r=r, init="svd_residual", adapter_dtype=adapter_dtype
        )
        for linear, r in zip(linears, ranks, strict=True)
    ]
    model = nn.Sequential(adapted[0], nn.Tanh(), adapted[1])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("core", "lora_b")))
    return model


def lora_b(model: nn.Module) -> list[Tensor]:
    return [m.lora_b for m in model.modules() if isinstance(m, LaMDALinear)]


def snapshot(model: nn.Module) -> list[Tensor]:
    return [b.detach().clone() for b in lora_b(model)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batch(step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(7, 10, generator=generator).to(dtype)


def backward(model: nn.Module, step: int, accumulate: int = 1) -> None:
    dtype = next(model.parameters()).dtype
    for micro in range(accumulate):
        model(batch(step * accumulate + micro, dtype)).float().square().mean().backward()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: lr.FreezeSchedule,
    steps: range,
) -> Iterator[int]:
    for step in steps:
        backward(model, step)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step


@pytest.mark.parametrize(
    ("step", "rank", "total", "eta", "bucket", "expected"),
    [
        (0, 8, 100, 0.3, 1, 0),
        (1, 8, 100, 0.3, 1, 0),
        (4, 8, 100, 0.3, 1, 1),
        (15, 8, 100, 0.3, 1, 4),
        (29, 8, 100, 0.3, 1, 7),
        (30, 8, 100, 0.3, 1, 8),
        (99, 8, 100, 0.3, 1, 8),
        (500, 8, 100, 0.3, 1, 8),
        # 0.1 of 30 steps is 3 steps, although 0.1 * 30 > 3 in floating point
        (3, 4, 30, 0.1, 1, 4),
        (2, 3, 30, 0.1, 1, 2),
        # 4.8 steps, of which a float has a little more: 8 · 3 / 4.8 is 5, not 4.999…
        (3, 8, 48, 0.1, 1, 5),
        # fewer steps than columns: several at a time, still all of them in the end
        (1, 64, 10, 1.0, 1, 6),
        (9, 64, 10, 1.0, 1, 57),
        (10, 64, 10, 1.0, 1, 64),
        (1, 64, 1, 0.3, 1, 64),
        # buckets round down until the end, also when the rank is no multiple of them
        (15, 20, 100, 0.3, 8, 8),
        (29, 20, 100, 0.3, 8, 16),
        (30, 20, 100, 0.3, 8, 20),
        (29, 4, 100, 0.3, 8, 0),
        (0, 5, 10, 0.0, 1, 5),
    ],
)
def test_number_of_frozen_columns(
    step: int, rank: int, total: int, eta: float, bucket: int, expected: int
) -> None:
    assert num_frozen_columns(step, rank, total, eta, bucket) == expected


@pytest.mark.parametrize("numerator", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("total", [30, 48, 100, 1000])
def test_eta_is_the_decimal_number_it_is_written_as(numerator: int, total: int) -> None:
    """Columns in whole numbers: floor(r · t / (n / 10 · T)) is 10 r t // (n T)."""
    for rank in (3, 8, 64):
        for step in range(total + 1):
            expected = min(rank, 10 * rank * step // (numerator * total))
            assert num_frozen_columns(step, rank, total, numerator / 10) == expected


def test_schedule_has_the_factor_r() -> None:
    """The released code lacks it: one column at 30 % of training, two at 60 %, three at 90 %."""
    rank, total = 64, 1000
    counts = [num_frozen_columns(step, rank, total, 0.3) for step in range(total + 1)]
    assert counts[150] == 32
    assert counts[299] == 63
    assert counts[300:] == [64] * 701
    assert all(a <= b <= a + 1 for a, b in pairwise(counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_frozen_columns_never_change(optimizer_name: str, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = OPTIMIZERS[optimizer_name](trained(model))
    schedule = lr.FreezeSchedule(model, 20, eta=0.6)
    frozen_at: dict[tuple[int, int], Tensor] = {}  # (module, column) -> values when it froze
    start = snapshot(model)
    for step in train(model, optimizer, schedule, range(1, 21)):
        count = num_frozen_columns(step, RANK, 20, 0.6)
        for idx, b in enumerate(snapshot(model)):
            for column in range(RANK):
                if (idx, column) in frozen_at:
                    assert torch.equal(b[:, column], frozen_at[idx, column])
                elif column < count:
                    frozen_at[idx, column] = b[:, column].clone()
    assert len(frozen_at) == 2 * RANK
    if (optimizer_name, dtype) == ("sgd_fused", torch.bfloat16):
        return  # torch's own: it skips most bf16 values on the CPU
    # columns that freeze late have trained before
    for before, after in zip(start, snapshot(model), strict=True):
        assert (before != after)[:, 1:].any(dim=0).all()


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd_momentum"])
def test_the_optimizer_alone_would_move_frozen_columns(optimizer_name: str) -> None:
    """Masked gradients do not stop momentum and weight decay, so what step() restores is real."""
    model = make_model()
    optimizer = OPTIMIZERS[optimizer_name](trained(model))
    schedule = lr.FreezeSchedule(model, 20, eta=1.0)
    for _ in train(model, optimizer, schedule, range(1, 11)):
        pass
    kept = snapshot(model)
    frozen = num_frozen_columns(10, RANK, 20, 1.0)
    backward(model, 11)
    optimizer.step()
    moved = lora_b(model)[0].detach() != kept[0]
    assert moved[:, :frozen].any(dim=0).all()
    schedule.step()
    assert torch.equal(lora_b(model)[0][:, :frozen], kept[0][:, :frozen])


def test_gradient_accumulation_and_clipping_see_live_columns_only() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.FreezeSchedule(model, 20, eta=1.0)
    for _ in train(model, optimizer, schedule, range(1, 11)):
        pass
    frozen = num_frozen_columns(10, RANK, 20, 1.0)
    free = copy.deepcopy(model)  # has no hooks: the gradient as it would be
    backward(model, 11, accumulate=3)
    backward(free, 11, accumulate=3)
    for masked, full in zip(lora_b(model), lora_b(free), strict=True):
        assert masked.grad is not None and full.grad is not None
        assert not masked.grad[:, :frozen].any()
        assert full.grad[:, :frozen].any(dim=0).all()
        assert torch.equal(masked.grad[:, frozen:], full.grad[:, frozen:])
        full.grad[:, :frozen] = 0
    norm = nn.utils.clip_grad_norm_(trained(model), 1e-3)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(trained(free), 1e-3))


def test_nan_gradients_of_frozen_columns_do_no_harm() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.FreezeSchedule(model, 20, eta=1.0)
    for _ in train(model, optimizer, schedule, range(1, 11)):
        pass
    kept = snapshot(model)
    frozen = num_frozen_columns(10, RANK, 20, 1.0)
    for b in lora_b(model):
        b.grad = torch.full_like(b, torch.nan)
    optimizer.step()
    schedule.step()
    for b, before in zip(lora_b(model), kept, strict=True):
        assert torch.equal(b[:, :frozen], before[:, :frozen])


def test_all_frozen_gives_up_gradient_and_optimizer_state() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.FreezeSchedule(model, 20, eta=0.25, optimizer=optimizer)
    seen = []
    for step in train(model, optimizer, schedule, range(1, 21)):
        live = [b.requires_grad for b in lora_b(model)]
        seen.append(live)
        assert live == [step < 5] * 2
        assert [b in optimizer.state for b in lora_b(model)] == live
        if step >= 5:
            assert all(b.grad is None for b in lora_b(model))
    cores = [m.core for m in model.modules() if isinstance(m, LaMDALinear)]
    assert all(core.requires_grad and core in optimizer.state for core in cores)
    assert schedule.num_frozen() == {"0": RANK, "2": RANK}
    backward(model, 30)
    assert all(core.grad is not None for core in cores)
    assert all(b.grad is None for b in lora_b(model))


def test_every_module_freezes_by_its_own_rank() -> None:
    model = make_model(ranks=(4, 8))
    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.FreezeSchedule(model, 20, eta=0.5)
    for step in train(model, optimizer, schedule, range(1, 11)):
        assert schedule.num_frozen() == {"0": 4 * step // 10, "2": 8 * step // 10}


def test_frozen_from_the_start_with_eta_zero() -> None:
    model = make_model()
    start = snapshot(model)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    schedule = lr.FreezeSchedule(model, 4, eta=0, optimizer=optimizer)
    assert not any(b.requires_grad for b in lora_b(model))
    for _ in train(model, optimizer, schedule, range(1, 5)):
        assert all(torch.equal(a, b) for a, b in zip(lora_b(model), start, strict=True))


def test_eta_zero_is_refused_while_lora_b_is_zero() -> None:
    model = nn.Sequential(LaMDALinear.from_linear(nn.Linear(4, 4), r=2, init="lora"))
    with pytest.raises(
        ValueError, match=r"FreezeSchedule: eta must be above 0 for 0, whose lora_b is all zero"
    ):
        lr.FreezeSchedule(model, 10, eta=0)


@pytest.mark.parametrize("stop", [1, 7, 11, 12, 15])
@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd_momentum"])
def test_resumed_schedule_is_identical(optimizer_name: str, stop: int, tmp_path: Path) -> None:
    whole = make_model()
    optimizer = OPTIMIZERS[optimizer_name](trained(whole))
    schedule = lr.FreezeSchedule(whole, 20, eta=0.6, bucket=2, optimizer=optimizer)
    for step in train(whole, optimizer, schedule, range(1, 21)):
        if step == stop:
            state = {
                "model": whole.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            torch.save(state, tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt")
    resumed = make_model()
    optimizer = OPTIMIZERS[optimizer_name](trained(resumed))
    # other arguments on purpose: the saved ones count
    schedule = lr.FreezeSchedule(resumed, 1000, eta=0.1, optimizer=optimizer)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    frozen = num_frozen_columns(stop, RANK, 20, 0.6, 2)
    assert schedule.num_frozen() == {"0": frozen, "2": frozen}
    for _ in train(resumed, optimizer, schedule, range(stop + 1, 21)):
        pass
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [b.requires_grad for b in lora_b(resumed)] == [b.requires_grad for b in lora_b(whole)]


def test_loading_an_earlier_state_frees_columns_again() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.FreezeSchedule(model, 10, eta=0.5, optimizer=optimizer)
    early = schedule.state_dict()
    for _ in train(model, optimizer, schedule, range(1, 11)):
        pass
    assert not any(b.requires_grad for b in lora_b(model))
    schedule.load_state_dict(early)
    assert all(b.requires_grad for b in lora_b(model))
    assert schedule.num_frozen() == {"0": 0, "2": 0}
    before = snapshot(model)
    for _ in train(model, optimizer, schedule, range(1, 2)):
        pass
    assert not torch.equal(before[0], lora_b(model)[0])


def test_frozen_modules_are_left_alone() -> None:
    model = make_model()
    lora_b(model)[1].requires_grad_(False)
    schedule = lr.FreezeSchedule(model, 10)
    assert schedule.num_frozen() == {"0": 0}


def test_copies_and_pickles_of_the_model_are_independent() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.FreezeSchedule(model, 10, eta=1.0)
    for _ in train(model, optimizer, schedule, range(1, 6)):
        pass
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        backward(other, 1)
        assert all(b.grad is not None and b.grad.any(dim=0).all() for b in lora_b(other))


def test_remove_takes_the_hooks_off() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.FreezeSchedule(model, 10, eta=1.0)
    for _ in train(model, optimizer, schedule, range(1, 6)):
        pass
    schedule.remove()
    backward(model, 6)
    assert all(b.grad is not None and b.grad.any(dim=0).all() for b in lora_b(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
        ({"total_steps": 2.5}, r"total_steps must be an integer of at least 1, got 2\.5"),
        ({"total_steps": True}, "total_steps must be an integer of at least 1, got True"),
        ({"total_steps": 5, "eta": -0.1}, r"eta must be a number from 0 to 1, got -0\.1"),
        ({"total_steps": 5, "eta": 1.5}, r"eta must be a number from 0 to 1, got 1\.5"),
        ({"total_steps": 5, "eta": float("nan")}, "eta must be a number from 0 to 1, got nan"),
        ({"total_steps": 5, "bucket": 0}, "bucket must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_raise(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^FreezeSchedule: {message}"):
        lr.FreezeSchedule(make_model(), **arguments)  # type: ignore[arg-type]


def test_model_without_lamda_raises() -> None:
    with pytest.raises(ValueError, match="FreezeSchedule: model must contain a LaMDALinear"):
        lr.FreezeSchedule(nn.Linear(3, 3), 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step must be an integer of at least 0, got -1"),
        ({"eta": 2.0}, "eta must be a number from 0 to 1"),
        ({"other": 1}, "state must have the keys"),
    ],
)
def test_bad_state_raises_and_changes_nothing(change: dict[str, float], message: str) -> None:
    schedule = lr.FreezeSchedule(make_model(), 10)
    state = schedule.state_dict()
    with pytest.raises(ValueError, match=f"FreezeSchedule: {message}"):
        schedule.load_state_dict({**state, **change})
    assert schedule.state_dict() == state


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_distributed_models_freeze_the_same_columns(wrapper: str, one_rank_group: None) -> None:
    """One rank: DTensor parameters and DDP's reducer, which must survive a fully frozen lora_b."""
    model = make_model()
    if wrapper == "fsdp2":
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        forward: nn.Module = fully_shard(model, mesh=mesh)
        assert isinstance(lora_b(model)[0], DTensor)
    else:
        forward = nn.parallel.DistributedDataParallel(model)

    def values() -> list[Tensor]:
        return [
            b.detach().full_tensor() if wrapper == "fsdp2" else b.detach() for b in lora_b(model)
        ]

    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.FreezeSchedule(model, 10, eta=0.6, optimizer=optimizer)
    history = []
    for step in range(1, 11):
        forward(batch(step, torch.float32)).square().mean().backward()
        frozen = num_frozen_columns(step - 1, RANK, 10, 0.6)
        for b in lora_b(model):
            assert b.grad is not None
            grad = b.grad.full_tensor() if wrapper == "fsdp2" else b.grad
            assert not grad[:, :frozen].any()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append([value.clone() for value in values()])
    for step, now in enumerate(history, start=1):
        frozen = num_frozen_columns(step, RANK, 10, 0.6)
        for idx, b in enumerate(now):
            assert torch.equal(b[:, :frozen], history[-1][idx][:, :frozen])
            if frozen < RANK:
                assert not torch.equal(b[:, frozen:], history[-1][idx][:, frozen:])

    alone = make_model()
    optimizer = OPTIMIZERS["adamw"](trained(alone))
    schedule = lr.FreezeSchedule(alone, 10, eta=0.6, optimizer=optimizer)
    for _ in train(alone, optimizer, schedule, range(1, 11)):
        pass
    for ours, single in zip(values(), lora_b(alone), strict=True):
        torch.testing.assert_close(ours, single.detach(), rtol=1e-5, atol=1e-6)
