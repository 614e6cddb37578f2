"""allocate_ranks on weights with known spectra: budgets, directions, brute force on tiny cases."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.methods.lamda.rank_allocation import captured_energy, default_candidates

BUDGETS = {"rank": lambda r: r, "params": lambda r: r * r}
DIRECTIONS = ("flat_gets_more", "concentrated_gets_more")


def weight_with(spectrum: Sequence[float], n: int, k: int, seed: int) -> Tensor:
    """fp64 [n, k] with the given singular values (the rest zero) and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=generator))
    count = len(spectrum)
    return u[:, :count] * torch.tensor(spectrum, dtype=torch.float64) @ v[:, :count].mT


def power_law(decay: float, count: int = 24) -> list[float]:
    return [(i + 1) ** -decay for i in range(count)]


def model_of(*weights: Tensor, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Independent linears 0, 1, …; the model is never run."""
    linears = []
    for weight in weights:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.to(dtype))
        linears.append(linear)
    return nn.Sequential(*linears)


def with_decays(decays: Sequence[float]) -> nn.Sequential:
    return model_of(*(weight_with(power_law(d), 24, 32, seed) for seed, d in enumerate(decays)))


def energy(spectrum: Sequence[float], r: int) -> float:
    return sum(s * s for s in spectrum[:r]) / sum(s * s for s in spectrum)


@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (24, 24), (24, 2100)])
def test_captured_energy_of_a_known_spectrum(shape: tuple[int, int]) -> None:
    spectrum = power_law(0.7)
    weight = weight_with(spectrum, *shape, seed=1)
    for r, (captured, missing) in zip(
        (1, 5, 23, 24), captured_energy(weight, (1, 5, 23, 24)), strict=True
    ):
        assert captured == pytest.approx(energy(spectrum, r), abs=1e-12)
        assert missing == pytest.approx(1 - energy(spectrum, r), abs=1e-12)


def test_captured_energy_keeps_tiny_rests_and_drops_noise() -> None:
    tiny = weight_with([1.0, 1e-5, 1e-6], 8, 8, seed=2)
    (_, missing), (_, nothing) = captured_energy(tiny, (2, 3))
    assert missing == pytest.approx(1e-12, rel=1e-2)
    assert nothing == 0
    assert captured_energy(torch.zeros(4, 6), (1, 2)) == [(1.0, 0.0), (1.0, 0.0)]


@pytest.mark.parametrize(
    ("r", "candidates"),
    [
        (1, [1]),
        (2, [1, 2, 3]),
        (7, [4, 7, 10]),
        (8, [4, 8, 12]),
        (16, [8, 16, 24]),
        (20, [10, 20, 30]),
        (24, [16, 24, 32]),
        (32, [16, 32, 48]),
        (64, [32, 64, 96]),
    ],
)
def test_default_candidates(r: int, candidates: list[int]) -> None:
    assert default_candidates(r) == candidates


@pytest.mark.parametrize("budget", BUDGETS)
def test_directions(budget: str) -> None:
    """From flat to concentrated: ranks fall in one direction and rise in the other."""
    model = with_decays([0.1, 2.0, 0.8, 1.4, 0.4])
    by_decay = ["0", "4", "2", "3", "1"]
    flat = lr.allocate_ranks(model, 8, budget=budget, direction="flat_gets_more")
    concentrated = lr.allocate_ranks(model, 8, budget=budget, direction="concentrated_gets_more")
    assert [flat[name] for name in by_decay] == sorted(flat.values(), reverse=True)
    assert [concentrated[name] for name in by_decay] == sorted(concentrated.values())
    assert flat["0"] > flat["1"]
    assert concentrated["0"] < concentrated["1"]
    assert list(flat) == ["0", "1", "2", "3", "4"]


def brute_force(
    gains: Callable[[int, int], float],
    ranks: Sequence[Sequence[int]],
    cost: Callable[[int], int],
    budget: int,
) -> tuple[int, ...]:
    allowed = [c for c in itertools.product(*ranks) if sum(map(cost, c)) <= budget]
    return max(allowed, key=lambda c: sum(gains(idx, r) for idx, r in enumerate(c)))


@pytest.mark.parametrize("seed", range(6))
def test_equals_brute_force(seed: int) -> None:
    """With one step size and log E concave in r, the greedy order maximizes the sum of log E."""
    generator = torch.Generator().manual_seed(100 + seed)
    decays = (2 * torch.rand(5, generator=generator)).tolist()
    candidates = [2, 4, 6, 8]
    expected = brute_force(
        lambda idx, r: math.log(energy(power_law(decays[idx]), r)),
        [candidates] * 5,
        BUDGETS["rank"],
        5 * 5,
    )
    ranks = lr.allocate_ranks(with_decays(decays), 5, candidates=candidates)
    assert tuple(ranks.values()) == expected


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_definition(budget: str, direction: str, seed: int) -> None:
    """The greedy rule written as a plain loop over the exact spectra."""
    generator = torch.Generator().manual_seed(200 + seed)
    decays = (2 * torch.rand(6, generator=generator)).tolist()
    candidates, r, cost = [1, 3, 6, 11, 16], 6, BUDGETS[budget]
    spectra = [power_law(decay) for decay in decays]

    def gain(idx: int, now: int, after: int) -> float:
        e_now, e_after = energy(spectra[idx], now), energy(spectra[idx], after)
        if direction == "flat_gets_more":
            return math.log(e_after / e_now)
        return math.log((1 - e_now) / (1 - e_after))

    level = [0] * 6
    while True:
        used = sum(cost(candidates[i]) for i in level)
        steps = [
            (gain(i, candidates[at], candidates[at + 1]) / added, -i)
            for i, at in enumerate(level)
            if at + 1 < len(candidates)
            and used + (added := cost(candidates[at + 1]) - cost(candidates[at])) <= 6 * cost(r)
        ]
        if not steps:
            break
        level[-max(steps)[1]] += 1
    ranks = lr.allocate_ranks(
        with_decays(decays), r, budget=budget, direction=direction, candidates=candidates
    )
    assert list(ranks.values()) == [candidates[i] for i in level]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_budget_is_kept_and_used(budget: str, direction: str) -> None:
    cost = BUDGETS[budget]
    model = with_decays([0.1 * i for i in range(1, 12)])
    ranks = lr.allocate_ranks(model, 8, budget=budget, direction=direction)
    spent = sum(cost(r) for r in ranks.values())
    cheapest = min(
        cost(after) - cost(now) for now, after in ((4, 8), (8, 12)) if now in ranks.values()
    )
    assert 11 * cost(8) - cheapest < spent <= 11 * cost(8)


def test_equal_spectra_go_to_the_first_modules() -> None:
    weight = weight_with(power_law(1.0), 24, 32, seed=3)
    model = model_of(weight, weight.clone(), weight.clone(), weight.clone())
    for direction in DIRECTIONS:
        ranks = lr.allocate_ranks(model, 6, candidates=[4, 7], direction=direction)
        assert list(ranks.values()) == [7, 7, 4, 4]


def test_ranks_end_at_the_smaller_dimension() -> None:
    """Grouped-query attention: k and v are narrow, what they cannot use goes to the others."""
    narrow = weight_with([1.0] * 5, 5, 32, seed=4)
    wide = weight_with(power_law(1.0), 24, 32, seed=5)
    ranks = lr.allocate_ranks(model_of(narrow, wide), 8, candidates=[4, 8, 11])
    assert ranks == {"0": 5, "1": 11}
    ranks = lr.allocate_ranks(model_of(weight_with([1.0] * 3, 3, 9, seed=6), wide), 8)
    assert ranks == {"0": 3, "1": 12}


def test_weights_of_low_rank_and_zero_weights_ask_for_nothing() -> None:
    exhausted = weight_with([3.0, 2.0], 24, 32, seed=7)
    rich = weight_with(power_law(0.5), 24, 32, seed=8)
    for direction in DIRECTIONS:
        model = model_of(exhausted, torch.zeros(24, 32), rich, dtype=torch.float64)
        assert lr.allocate_ranks(model, 8, direction=direction) == {"0": 4, "1": 4, "2": 12}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tied_weights_get_one_rank_that_counts_twice(direction: str) -> None:
    decays = [0.2, 1.0, 2.0]
    model = with_decays(decays)
    model.append(nn.Linear(32, 24, bias=False))
    model[3].weight = model[0].weight
    ranks = lr.allocate_ranks(model, 8, direction=direction)
    assert ranks["0"] == ranks["3"]
    assert sum(ranks.values()) <= 4 * 8
    extreme = ("0", 12) if direction == "flat_gets_more" else ("2", 12)
    assert ranks[extreme[0]] == extreme[1]


def test_same_result_for_every_dtype_orientation_and_run() -> None:
    decays = [0.1, 2.0, 0.8, 1.4, 0.4]
    weights = [weight_with(power_law(d), 24, 32, seed) for seed, d in enumerate(decays)]
    expected = lr.allocate_ranks(model_of(*weights), 8)
    assert lr.allocate_ranks(model_of(*weights), 8) == expected
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert lr.allocate_ranks(model_of(*weights, dtype=dtype), 8) == expected
    assert lr.allocate_ranks(model_of(*(w.mT for w in weights)), 8) == expected


def test_model_and_generator_are_left_alone() -> None:
    model = with_decays([0.1, 1.0])
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    lr.allocate_ranks(model, 8, progress=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("budget", BUDGETS)
def test_adapt_uses_the_ranks(budget: str) -> None:
    decays = [0.1, 2.0, 0.8]
    ranks = lr.allocate_ranks(with_decays(decays), 8, budget=budget)
    model = lr.adapt(with_decays(decays), lr.LaMDAConfig(r=8, rank_budget=budget))
    assert {name: module.r for name, module in model.named_children()} == ranks
    assert len(set(ranks.values())) > 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 2.0}, TypeError, r"r must be an int, got 2\.0"),
        ({"r": 4, "budget": "mean"}, ValueError, "budget must be one of"),
        ({"r": 4, "direction": "up"}, ValueError, "direction must be one of"),
        ({"r": 4, "candidates": []}, ValueError, "candidates must increase"),
        ({"r": 4, "candidates": [2, 2]}, ValueError, "candidates must increase"),
        ({"r": 4, "candidates": [5, 6]}, ValueError, "no more than r=4, got"),
        ({"r": 4, "candidates": [0, 4]}, ValueError, "candidates must be at least 1, got 0"),
        ({"r": 4, "target_modules": ["7"]}, ValueError, "got '7', which matches none"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^allocate_ranks: .*{message}"):
        lr.allocate_ranks(with_decays([1.0]), **arguments)  # type: ignore[arg-type]


def test_unusable_weights() -> None:
    bad = with_decays([1.0])
    with torch.no_grad():
        bad[0].weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="allocate_ranks: weight of 0 must be finite"):
        lr.allocate_ranks(bad, 4)
    with pytest.raises(ValueError, match="allocate_ranks: weight of 0 must hold values"):
        lr.allocate_ranks(nn.Sequential(nn.Linear(3, 3, device="meta")), 1)
