"""AdaptiveFreezeSchedule: scores, decisions, and that what is frozen never changes again."""

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_cases import end_worker
from optimizers import OPTIMIZERS
from saved_bytes import bytes_kept_by
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lowrank_ext as lr
from lowrank_ext.methods.aflora.freezing import keep_fraction, kth_smallest
from lowrank_ext.nn import AFLoRALinear

RANK, STEPS = 3, 20
# Freezes at steps 4, 6, … 14 and 15, slowly at first.
PLAN = {"eta": 0.75, "start": 0.1, "window": 2, "decay": "quadratic"}
NAMES = [f"{i}.{name}" for i in (0, 2, 4) for name in ("lora_a", "lora_b")]
State = dict[str, Any]


def make_model(
    dtype: torch.dtype = torch.float32, adapter_dtype: str = "base", device: str = "cpu"
) -> nn.Sequential:
    """Three layers of different gradients, past the first step at which only out_scale has one."""
    torch.manual_seed(1)
    linears = [nn.Linear(10, 12), nn.Linear(12, 8), nn.Linear(8, 6)]
    adapted = [
        AFLoRALinear.from_linear(linear.to(device, dtype), r=RANK, adapter_dtype=adapter_dtype)
        for linear in linears
    ]
    model = nn.Sequential(adapted[0], nn.Tanh(), adapted[1], nn.Tanh(), adapted[2])
    for index, module in enumerate(adapted):
        nn.init.normal_(module.out_scale, std=0.3 * (index + 1))
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def projections(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in projections(model).items()}


def batch(step: int) -> Tensor:
    return torch.randn(7, 10, generator=torch.Generator().manual_seed(1000 + step))


def backward(model: nn.Module, step: int, scale: Tensor | float = 1.0) -> None:
    parameter = next(model.parameters())
    x = batch(step).to(parameter.device, parameter.dtype)
    (model(x).float().square().mean() * scale).backward()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: lr.AdaptiveFreezeSchedule,
    steps: range,
) -> Iterator[int]:
    for step in steps:
        backward(model, step)
        schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def run(
    model: nn.Module, optimizer_name: str = "adamw", steps: int = STEPS, **options: Any
) -> lr.AdaptiveFreezeSchedule:
    optimizer = OPTIMIZERS[optimizer_name](trained(model))
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, **{**PLAN, **options})
    for _ in train(model, optimizer, schedule, range(steps)):
        pass
    return schedule


# -------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("step", "total", "start", "eta", "decay", "expected"),
    [
        (0, 100, 0.1, 0.3, "cubic", 1.0),
        (10, 100, 0.1, 0.3, "cubic", 1.0),
        (11, 100, 0.1, 0.3, "cubic", 0.95**3),
        (15, 100, 0.1, 0.3, "cubic", 0.75**3),
        (20, 100, 0.1, 0.3, "cubic", 0.125),
        (29, 100, 0.1, 0.3, "cubic", 0.05**3),
        (30, 100, 0.1, 0.3, "cubic", 0.0),
        (99, 100, 0.1, 0.3, "cubic", 0.0),
        (30, 100, 0.3, 0.7, "quadratic", 1.0),
        (31, 100, 0.3, 0.7, "quadratic", 1 - 0.025**2),
        (50, 100, 0.3, 0.7, "quadratic", 0.75),
        (69, 100, 0.3, 0.7, "quadratic", 1 - 0.975**2),
        (70, 100, 0.3, 0.7, "quadratic", 0.0),
        # 0.1 of 30 steps is 3 steps, although 0.1 * 30 > 3 in floating point
        (3, 30, 0.0, 0.1, "cubic", 0.0),
        (3, 30, 0.1, 1.0, "cubic", 1.0),
        (2, 30, 0.1, 0.1, "cubic", 1.0),
        (3, 30, 0.1, 0.1, "cubic", 0.0),
        (0, 30, 0.0, 0.0, "cubic", 0.0),
    ],
)
def test_keep_fraction(
    step: int, total: int, start: float, eta: float, decay: str, expected: float
) -> None:
    assert keep_fraction(step, total, start, eta, decay) == pytest.approx(expected, rel=1e-12)


def test_keep_fraction_is_the_released_ones() -> None:
    """t_i = 1 epoch of 20, t_f = 14, of 50 steps each; and final + (initial - final)(1 - u)³."""
    total, t_i, t_f = 1000, 50, 700
    for t in range(t_i + 1, total - t_f):
        released = ((total - t_f - t) / (total - t_i - t_f)) ** 3
        assert keep_fraction(t, total, 0.05, 0.3, "cubic") == pytest.approx(released, rel=1e-12)
        other = 0 + (1 - 0) * (1 - (t - t_i) / (total - t_i - t_f)) ** 3
        assert released == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("sizes", [(1,), (7,), (1000,), (3, 0, 50, 4096)], ids=str)
def test_kth_smallest(device: str, sizes: tuple[int, ...]) -> None:
    kinds: list[Callable[[int], Tensor]] = [
        lambda n: torch.rand(n),
        lambda n: torch.rand(n) * torch.tensor(10.0) ** torch.randint(-44, 38, (n,)),  # denormals
        lambda n: torch.randint(0, 3, (n,)).float(),  # ties, zeros
        lambda n: torch.zeros(n),
        lambda n: torch.full((n,), torch.inf),
    ]
    for make in kinds:
        tensors = [make(n).to(device) for n in sizes]
        if sizes[0] == 1000:
            tensors = [tensor.view(20, 50).t() for tensor in tensors]
        ordered = torch.cat([tensor.flatten() for tensor in tensors]).sort().values
        for k in {1, 2, len(ordered) // 2, len(ordered) - 1, len(ordered)} & {*range(1, 10**6)}:
            if k <= len(ordered):
                found = kth_smallest({(): tensors}, k)
                assert found.shape == () and found.device.type == torch.device(device).type
                assert torch.equal(found, ordered[k - 1]), k


# ---------------------------------------------------------------------------------- the scores


class Released:
    """The arithmetic of the published code in fp64, step j = t mod DT of a window at a time, with
    the decision on the entries of all projections put together."""

    def __init__(self, shapes: dict[str, torch.Size], plan: State) -> None:
        self.total, self.window = STEPS, plan["window"]
        self.first, self.last = plan["start"] * STEPS, plan["eta"] * STEPS
        self.decay = plan["decay"]
        self.i, self.i_bar, self.u = (
            {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
            for _ in range(3)
        )
        self.frozen_at: dict[str, int] = {}

    def step(self, t: int, gradients: dict[str, Tensor]) -> None:
        j = t % self.window
        for name, gradient in gradients.items():
            size = gradient.double().abs()
            if j == 0:
                self.i_bar[name] = 0.85 * self.i_bar[name] + 0.15 * self.i[name]
                deviation = (self.i[name] - self.i_bar[name]).abs()
                self.u[name] = 0.95 * self.u[name] + 0.05 * deviation
                self.i[name] = size
            else:
                self.i[name] = (j * self.i[name] + size) / (j + 1)
        if self.first < t < self.last and j == 0 and self.i:
            self.decide(t, (t - self.first) / (self.last - self.first))
        elif t >= self.last:
            self.freeze(t, list(self.i))

    def decide(self, t: int, done: float) -> None:
        keep = (1 - done) ** 3 if self.decay == "cubic" else 1 - done**2
        scores = {name: self.i_bar[name] * self.u[name] for name in self.i}
        entries = torch.cat([score.flatten() for score in scores.values()])
        k = int(len(entries) * (1 - keep))
        if k > 0:
            tau = entries.kthvalue(k).values
            self.freeze(t, [name for name, score in scores.items() if score.mean() < tau])

    def freeze(self, t: int, names: list[str]) -> None:
        for name in names:
            self.frozen_at[name] = t
            del self.i[name]


@pytest.mark.parametrize("decay", ["cubic", "quadratic"])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_scores_and_decisions_are_the_released_ones(
    device: str, window: int, decay: str, adapter_dtype: str
) -> None:
    model = make_model(getattr(torch, adapter_dtype), device=device)
    plan = {**PLAN, "window": window, "decay": decay}
    released = Released({n: p.shape for n, p in projections(model).items()}, plan)
    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, **plan)
    for t in range(STEPS):
        backward(model, t)
        live = {n: p.grad.cpu() for n, p in projections(model).items() if n in released.i}
        released.step(t, live)
        schedule.step()
        assert schedule.frozen_at == released.frozen_at, t
        for name, statistics in schedule.state_dict()["live"].items():
            for key, expected in (("mean", released.i_bar), ("spread", released.u)):
                torch.testing.assert_close(
                    statistics[key].double(), expected[name], rtol=1e-5, atol=1e-9
                )
        optimizer.step()
        optimizer.zero_grad()
    assert sorted(schedule.frozen_at) == sorted(NAMES)
    # and the decisions were decisions: not all at once, not before the start
    assert len(set(schedule.frozen_at.values())) > 1
    assert 2 < min(schedule.frozen_at.values()) < max(schedule.frozen_at.values()) <= 15


@pytest.mark.parametrize(("step", "frozen"), [(79, []), (81, []), (82, ["lora_a", "lora_b"])])
def test_k_is_truncated(step: int, frozen: list[str]) -> None:
    """As released, k = int(N (1 - rho)): of N = 9 entries 5.6, 5.9 and 6.05 give 5, 5 and 6.

    The 5th smallest entry is 1, which is the score of lora_b; the 6th is above all scores.
    """
    model = AFLoRALinear.from_linear(nn.Linear(2, 1), r=3)
    options = {"eta": 1.0, "start": 0.0, "window": 1, "decay": "quadratic"}
    schedule = lr.AdaptiveFreezeSchedule(model, 100, **options)
    state = schedule.state_dict()
    state["step"] = step
    for name, entries in (("lora_a", [0, 0, 10, 10, 10, 10]), ("lora_b", [1, 1, 1])):
        statistics = state["live"][name]
        statistics["mean"] = torch.tensor(entries).float().view_as(statistics["mean"])
        statistics["spread"] = torch.ones_like(statistics["spread"])
    schedule.load_state_dict(state)
    for projection in (model.lora_a, model.lora_b):
        projection.grad = torch.zeros_like(projection)
    schedule.step()
    assert sorted(schedule.frozen_at) == frozen


def test_accumulated_gradients_count_once_per_optimizer_step() -> None:
    """Three micro-batches: the score is of their sum, and windows are of optimizer steps."""
    model = make_model()
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, **PLAN)
    total = dict.fromkeys(NAMES, 0.0)
    for step in range(3):
        if step == 2:
            assert schedule.state_dict()["count"] == 2
            sums = {n: s["window_sum"] for n, s in schedule.state_dict()["live"].items()}
            for name in NAMES:
                torch.testing.assert_close(sums[name], total[name])
        for micro in range(3):
            backward(model, 3 * step + micro)
        for name, parameter in projections(model).items():
            total[name] = total[name] + parameter.grad.abs()
        schedule.step()
        model.zero_grad()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_does_not_change_the_scores(when: str, accumulate: int) -> None:
    """Every step is clipped to another factor, and the model is not updated, so that the gradients
    of the two runs are the same."""
    plain, clipped = make_model(), make_model()
    schedules = [lr.AdaptiveFreezeSchedule(model, STEPS, **PLAN) for model in (plain, clipped)]
    for step in range(14):
        for model, schedule in zip((plain, clipped), schedules, strict=True):
            for micro in range(accumulate):
                backward(model, accumulate * step + micro, 1.0 if step % 3 else 50.0)
            if model is clipped and when == "before":
                assert nn.utils.clip_grad_norm_(trained(model), 0.01) > 0.01
            schedule.step()
            if model is clipped and when == "after":
                nn.utils.clip_grad_norm_(trained(model), 0.01)
            model.zero_grad()
    assert schedules[0].frozen_at == schedules[1].frozen_at and schedules[0].frozen_at
    states = [schedule.state_dict()["live"] for schedule in schedules]
    assert states[0]
    for name, statistics in states[0].items():
        for key, expected in statistics.items():
            torch.testing.assert_close(states[1][name][key], expected, rtol=1e-5, atol=0)


def test_without_clipping_nothing_is_rounded() -> None:
    model = make_model()
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, **PLAN)
    backward(model, 0)
    schedule.step()
    for name, statistics in schedule.state_dict()["live"].items():
        assert torch.equal(statistics["window_sum"], projections(model)[name].grad.abs())


@pytest.mark.parametrize("unscaled_first", [False, True])
def test_a_grad_scaler_does_not_change_the_scores(unscaled_first: bool) -> None:
    """The scale grows every other step; at step 3 the gradients overflow."""
    scaled, plain = make_model(), make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer = torch.optim.SGD(trained(scaled), lr=0.0)
    schedule = lr.AdaptiveFreezeSchedule(scaled, STEPS, scaler=scaler, **PLAN)
    expected = lr.AdaptiveFreezeSchedule(plain, STEPS, **PLAN)
    scales = []
    for step in range(9):
        scales.append(scaler.get_scale())
        overflow = torch.inf if step == 3 else 1.0
        backward(scaled, step, scaler.scale(torch.tensor(overflow)))
        backward(plain, step, overflow)
        if unscaled_first:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained(scaled), 0.1)
        schedule.step()
        expected.step()
        scaler.step(optimizer)
        scaler.update()
        for model in (scaled, plain):
            model.zero_grad()
    assert len(set(scales)) == 3
    states = [schedule.state_dict(), expected.state_dict()]
    assert states[0]["live"] and states[0]["count"] == states[1]["count"]
    for name, statistics in states[1]["live"].items():
        for key, value in statistics.items():
            assert value.isfinite().all()
            torch.testing.assert_close(states[0]["live"][name][key], value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(bad: float) -> None:
    """The window's mean is of its other steps; a window without any leaves no trace."""
    model = make_model()
    schedule = lr.AdaptiveFreezeSchedule(model, 100, window=3)
    seen = []
    for step, spoiled in enumerate((False, True, False, True, True, True, False)):
        backward(model, step)
        if spoiled:
            model[0].lora_a.grad[1, 1] = bad
        else:
            seen.append(model[2].lora_b.grad.abs())
        schedule.step()
        model.zero_grad()
    statistics = schedule.state_dict()["live"]["2.lora_b"]
    window_mean = (seen[0] + seen[1]) / 2
    torch.testing.assert_close(statistics["mean"], 0.15 * window_mean)
    torch.testing.assert_close(statistics["spread"], 0.05 * 0.85 * window_mean)
    torch.testing.assert_close(statistics["window_sum"], seen[2])


def test_the_host_waits_for_decisions_only() -> None:
    """Fake tensors have no values, so whatever asks for one raises."""
    model, fake = make_model(), FakeTensorMode()
    for module in model:
        for name, parameter in list(module.named_parameters()):
            like = fake.from_tensor(parameter.detach())
            module.register_parameter(name, nn.Parameter(like, parameter.requires_grad))
    with fake:
        schedule = lr.AdaptiveFreezeSchedule(model, STEPS, **{**PLAN, "window": 4})
        for step in range(5):
            for parameter in trained(model):
                parameter.grad = torch.ones_like(parameter)
            if step < 4:
                schedule.step()
        with pytest.raises(DataDependentOutputException):  # the first that decides
            schedule.step()


# ---------------------------------------------------------------------------- what freezing means


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_frozen_projections_never_change(optimizer_name: str, dtype: torch.dtype) -> None:
    """Not by the gradient of the step that freezes them either, nor by momentum or weight decay."""
    model = make_model(dtype)
    optimizer = OPTIMIZERS[optimizer_name](trained(model))
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, optimizer=optimizer, **PLAN)
    kept: dict[str, Tensor] = {}
    vectors = {n: p.detach().clone() for n, p in model.named_parameters() if "_scale" in n}
    start = values(model)
    for step in range(STEPS):
        before = values(model)
        backward(model, step)
        schedule.step()
        kept |= {name: before[name] for name in schedule.frozen_at if name not in kept}
        optimizer.step()
        optimizer.zero_grad()
        for name, value in kept.items():
            assert torch.equal(projections(model)[name], value), (step, name)
    assert sorted(kept) == sorted(NAMES)
    if (optimizer_name, dtype) == ("sgd_fused", torch.bfloat16):
        return  # torch's own: it skips most bf16 values on the CPU
    assert all(not torch.equal(value, start[name]) for name, value in kept.items())
    moved = {n for n, p in model.named_parameters() if n in vectors and not p.equal(vectors[n])}
    assert moved == set(vectors)


def test_frozen_projections_leave_autograd_and_the_optimizer() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, optimizer=optimizer, **PLAN)
    for _ in train(model, optimizer, schedule, range(STEPS)):
        for name, parameter in projections(model).items():
            live = name not in schedule.frozen_at
            assert live == (name in schedule.live()) == parameter.requires_grad
            assert live == (parameter in optimizer.state)
        assert schedule.num_frozen() == {
            path: sum(name.startswith(path) for name in schedule.frozen_at)
            for path in ("0", "2", "4")
        }
    assert schedule.num_frozen() == {"0": 2, "2": 2, "4": 2}
    assert not schedule.state_dict()["live"]
    backward(model, STEPS)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        f"{i}.{name}" for i in (0, 2, 4) for name in ("rank_scale", "out_scale")
    }


def test_a_frozen_lora_a_gives_up_x(device: str) -> None:
    """Bytes kept for backward by one module, before and after the schedule has frozen lora_a."""
    model = make_model(device=device)
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, **PLAN)
    x = torch.randn(50, 12, device=device)
    h_bytes, x_bytes = 50 * RANK * 4, 50 * 12 * 4
    for step in range(STEPS):
        kept = bytes_kept_by(model[2], x)
        assert kept == h_bytes + (0 if "2.lora_a" in schedule.frozen_at else x_bytes)
        backward(model, step)
        schedule.step()
        model.zero_grad()
    assert "2.lora_a" in schedule.frozen_at


def test_before_the_start_and_between_windows_nothing_is_frozen() -> None:
    model = make_model()
    schedule = run(model, steps=3, start=0.1, window=2)
    assert not schedule.frozen_at  # t = 0, 1, 2, and start · T = 2
    model = make_model()
    schedule = run(model, window=4)
    assert {step % 4 for step in schedule.frozen_at.values() if step < 15} == {0}


def test_everything_freezes_at_eta_even_what_has_no_gradient() -> None:
    """With all scores zero none is below the threshold, until the end says so."""
    model = make_model()
    with torch.no_grad():
        for index in (0, 2, 4):
            model[index].out_scale.zero_()
            model[index].out_scale.requires_grad_(False)
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, **PLAN)
    for step in range(STEPS):
        backward(model, step)
        schedule.step()
        assert set(schedule.frozen_at.values()) == ({15} if step >= 15 else set())
    assert sorted(schedule.frozen_at) == sorted(NAMES)


def test_eta_zero_trains_the_vectors_alone() -> None:
    model = make_model()
    start = values(model)
    schedule = run(model, eta=0.0, start=None)
    assert schedule.frozen_at == dict.fromkeys(NAMES, 0)
    assert all(torch.equal(value, start[name]) for name, value in values(model).items())


def test_what_does_not_train_is_left_alone() -> None:
    model = make_model()
    model[0].lora_a.requires_grad_(False)
    model[2].lora_b.requires_grad_(False)
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, **PLAN)
    assert schedule.live() == ["0.lora_b", "2.lora_a", "4.lora_a", "4.lora_b"]
    none_live = lr.adapt(nn.Sequential(nn.Linear(4, 4)), lr.AFLoRAConfig(r=2, live_modules=()))
    schedule = run_nothing(none_live)
    assert schedule.live() == [] and schedule.step_count == 3


def run_nothing(model: nn.Module) -> lr.AdaptiveFreezeSchedule:
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS)
    for _ in range(3):
        schedule.step()
    return schedule


def test_a_module_that_a_step_leaves_out_counts_as_zero() -> None:
    model = make_model()
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, **PLAN)
    model[4](torch.randn(5, 8)).sum().backward()
    schedule.step()
    live = schedule.state_dict()["live"]
    assert not live["0.lora_a"]["window_sum"].any() and live["4.lora_a"]["window_sum"].any()


# -------------------------------------------------------------------- resuming, copies, compilers


@pytest.mark.parametrize("stop", [1, 8, 13, 18])
@pytest.mark.parametrize(
    ("optimizer_name", "dtype"),
    [("adamw", torch.float32), ("sgd_momentum", torch.float32), ("adamw", torch.bfloat16)],
    ids=str,
)
def test_resumed_schedule_is_identical(
    optimizer_name: str, dtype: torch.dtype, stop: int, tmp_path: Path
) -> None:
    plan = {**PLAN, "window": 3, "beta1": 0.7}
    whole = make_model(dtype)
    optimizer = OPTIMIZERS[optimizer_name](trained(whole))
    schedule = lr.AdaptiveFreezeSchedule(whole, STEPS, optimizer=optimizer, **plan)
    for step in train(whole, optimizer, schedule, range(STEPS)):
        if step == stop - 1:
            parts = {"model": whole, "optimizer": optimizer, "schedule": schedule}
            torch.save({k: p.state_dict() for k, p in parts.items()}, tmp_path / "state.pt")
            trains = {name: p.requires_grad for name, p in projections(whole).items()}

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = make_model(dtype)
    optimizer = OPTIMIZERS[optimizer_name](trained(resumed))
    # other arguments on purpose: the saved ones count
    again = lr.AdaptiveFreezeSchedule(resumed, 1000, optimizer=optimizer)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    again.load_state_dict(state["schedule"])
    assert {name: p.requires_grad for name, p in projections(resumed).items()} == trains
    for _ in train(resumed, optimizer, again, range(stop, STEPS)):
        pass
    assert again.frozen_at == schedule.frozen_at
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_loading_an_earlier_state_frees_projections_again() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, optimizer=optimizer, **PLAN)
    for step in train(model, optimizer, schedule, range(STEPS)):
        if step == 12:
            early = schedule.state_dict()
    assert 0 < len(early["frozen_at"]) < len(schedule.frozen_at) == len(NAMES)
    schedule.load_state_dict(early)
    assert sorted(early["live"]) == sorted(schedule.live())
    assert {n for n, p in projections(model).items() if p.requires_grad} == set(early["live"])
    for _ in train(model, optimizer, schedule, range(13, STEPS)):
        pass
    assert len(schedule.frozen_at) == len(NAMES)


def test_a_model_with_frozen_projections_takes_its_own_state_over() -> None:
    """As when the Trainer resumes with the model that it was stopped with."""
    model = make_model()
    state = run(model, steps=13).state_dict()
    assert 0 < len(state["frozen_at"]) < len(NAMES)
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, **PLAN)
    schedule.load_state_dict(state)
    assert schedule.frozen_at == state["frozen_at"] and schedule.live() == list(state["live"])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_scores(use_reentrant: bool) -> None:
    plain, checkpointed = make_model(), make_model()
    states = []
    for model in (plain, checkpointed):
        schedule = lr.AdaptiveFreezeSchedule(model, STEPS, **PLAN)
        for step in range(13):
            x = batch(step).requires_grad_()
            for block in (model[:2], model[2:4], model[4:]):
                x = (
                    block(x)
                    if model is plain
                    else checkpoint(block, x, use_reentrant=use_reentrant)
                )
            x.square().mean().backward()
            nn.utils.clip_grad_norm_(trained(model), 0.1)
            schedule.step()
            model.zero_grad()
        states.append(schedule.state_dict())
    assert states[0]["frozen_at"] == states[1]["frozen_at"]
    for name, statistics in states[0]["live"].items():
        for key, value in statistics.items():
            assert torch.equal(states[1]["live"][name][key], value), (name, key)


def test_compiled_modules_freeze_the_same() -> None:
    """Code compiled for live projections is not used for frozen ones."""
    eager, compiled = make_model(), make_model()
    expected = run(eager)
    compiled[2].compile(fullgraph=True, backend="aot_eager", dynamic=True)
    schedule = run(compiled)
    assert schedule.frozen_at == expected.frozen_at
    for name, value in values(eager).items():
        torch.testing.assert_close(projections(compiled)[name].detach(), value)


def test_two_runs_give_the_same_bits() -> None:
    states = [run(make_model(), steps=13).state_dict() for _ in range(2)]
    assert states[0]["frozen_at"] == states[1]["frozen_at"] and states[0]["live"]
    for name, statistics in states[0]["live"].items():
        for key, value in statistics.items():
            assert torch.equal(value, states[1]["live"][name][key])


def test_copies_and_pickles_of_the_model_are_independent() -> None:
    model = make_model()
    schedule = run(model, steps=6)
    before = schedule.state_dict()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        backward(other, 1)
    after = schedule.state_dict()
    assert before["live"].keys() == after["live"].keys()
    assert schedule._raw_norm is None  # their backward has not been measured as this model's


def test_remove_takes_the_hooks_off() -> None:
    model = make_model()
    schedule = run(model, steps=13)
    frozen = set(schedule.frozen_at)
    assert frozen and schedule.live()
    schedule.remove()
    backward(model, 9)
    assert schedule._raw_norm is None
    schedule.step()
    assert set(schedule.frozen_at) == frozen
    assert {n for n, p in projections(model).items() if p.requires_grad} == set(NAMES) - frozen


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
        ({"eta": 1.5}, r"eta must be a number from 0 to 1, got 1\.5"),
        ({"start": -0.1}, r"start must be a number from 0 to 1, got -0\.1"),
        ({"eta": 0.2, "start": 0.3}, r"start must be at most eta=0\.2, got 0\.3"),
        ({"decay": "linear"}, r"decay must be one of \['cubic', 'quadratic'\], got 'linear'"),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"window": 2.0}, r"window must be an integer of at least 1, got 2\.0"),
        ({"beta1": 1}, "beta1 must be below 1, got 1"),
        ({"beta2": float("nan")}, "beta2 must be a number from 0 to 1, got nan"),
    ],
    ids=str,
)
def test_bad_arguments_raise(arguments: State, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^AdaptiveFreezeSchedule: {message}"):
        lr.AdaptiveFreezeSchedule(make_model(), **{"total_steps": 5, **arguments})


def test_model_without_aflora_raises() -> None:
    with pytest.raises(ValueError, match="AdaptiveFreezeSchedule: model must contain an AFLoRALin"):
        lr.AdaptiveFreezeSchedule(nn.Linear(3, 3), 10)


@pytest.mark.parametrize("misplaced", ["before backward", "after zero_grad"])
def test_a_step_without_gradients_raises(misplaced: str) -> None:
    model = make_model()
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS)
    if misplaced == "after zero_grad":
        backward(model, 0)
        model.zero_grad()
    with pytest.raises(RuntimeError, match=r"AdaptiveFreezeSchedule\.step: live .* got none; call"):
        schedule.step()


def changed(state: State, **changes: Any) -> State:
    return {**state, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: changed(s, step=-1), "step must be an integer of at least 0, got -1"),
        (lambda s: changed(s, count=True), "count must be an integer of at least 0, got True"),
        (lambda s: changed(s, eta=2.0), "eta must be a number from 0 to 1"),
        (lambda s: changed(s, other=1), "state must have the keys"),
        (lambda s: changed(s, live={}), "state must be this model's, got .* in the model only"),
        (
            lambda s: changed(s, live={**s["live"], "9.lora_a": s["live"]["4.lora_b"]}),
            "state must be this model's, got 9.lora_a in the state only",
        ),
        (
            lambda s: changed(s, live=dict.fromkeys(s["live"], s["live"]["4.lora_b"])),
            r"statistics of 0.lora_\w must be .*, got",
        ),
    ],
)
def test_bad_state_raises_and_changes_nothing(change: Callable, message: str) -> None:
    model = make_model()
    schedule = run(model, steps=3)
    state = schedule.state_dict()
    with pytest.raises(ValueError, match=f"AdaptiveFreezeSchedule: {message}"):
        schedule.load_state_dict(change(state))
    assert schedule.numbers() == {k: v for k, v in state.items() if k not in ("count", "live")}
    assert all(p.requires_grad for p in trained(model))


# --------------------------------------------------------------------------------- several ranks

WORLD = 2
WRAPPERS = ("ddp", "ddp with views", "fsdp2")


def rank_batch(step: int, rank: int) -> Tensor:
    return torch.randn(7, 10, generator=torch.Generator().manual_seed(100 * step + rank))


def distributed_run(model: nn.Module, forward: nn.Module, ranks: list[int]) -> State:
    """Trains with clipping and two micro-batches; the state in mid-schedule and at the end."""
    optimizer = OPTIMIZERS["adamw"](trained(model))
    schedule = lr.AdaptiveFreezeSchedule(model, STEPS, optimizer=optimizer, **PLAN)
    middle: State = {}
    for step in range(STEPS):
        for micro in range(2):
            for rank in ranks:
                loss = forward(rank_batch(2 * step + micro, rank)).square().mean() / len(ranks)
                loss.backward()
        nn.utils.clip_grad_norm_(trained(model), 0.05)
        schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        if step == 12:
            middle = schedule.state_dict()
            schedule.load_state_dict(middle)
    whole = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in projections(model).items()
    }
    frozen = [p for name, p in projections(model).items() if p in optimizer.state]
    return {
        "middle": middle,
        "frozen_at": dict(schedule.frozen_at),
        "values": whole,
        "kept_state": len(frozen),
    }


def wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper != "fsdp2":
        view = wrapper == "ddp with views"
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(directory, "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results = {}
    for wrapper in WRAPPERS:
        model = make_model()
        results[wrapper] = distributed_run(model, wrapped(model, wrapper), [rank])
    torch.save(results, os.path.join(directory, f"{rank}.pt"))
    end_worker()


@pytest.mark.long
def test_all_ranks_freeze_what_one_process_freezes(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    alone = make_model()
    expected = distributed_run(alone, alone, list(range(WORLD)))
    assert len(set(expected["frozen_at"].values())) > 2
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for wrapper in WRAPPERS:
        first, second = (results[wrapper] for results in ranks)
        for name, value in first["values"].items():
            assert torch.equal(second["values"][name], value), (wrapper, name)
        for result in (first, second):
            compare(result, expected, wrapper)


def compare(result: State, expected: State, wrapper: str) -> None:
    assert result["frozen_at"] == expected["frozen_at"], wrapper
    assert result["kept_state"] == 0, wrapper
    assert result["middle"]["frozen_at"] == expected["middle"]["frozen_at"], wrapper
    for name, statistics in expected["middle"]["live"].items():
        for key, value in statistics.items():
            got = result["middle"]["live"][name][key]
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-7)
    for name, value in expected["values"].items():
        torch.testing.assert_close(result["values"][name], value, rtol=1e-3, atol=1e-4)
