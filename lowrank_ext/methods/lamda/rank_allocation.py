"""LaMDA++: a rank for every module from the spectrum of its pretrained weight, without training.

With singular values sig_1 >= sig_2 >= … of a weight, the energy captured at rank r is
E(r) = sum_{i<=r} sig_i² / sum_i sig_i². All modules start at the smallest candidate rank. As long
as the budget allows, the module with the largest gain per added cost goes up to its next one:

    flat_gets_more            gain = log E(next) - log E(now)
    concentrated_gets_more    gain = log(1 - E(now)) - log(1 - E(next))

The first is largest for a flat spectrum (captured energy grows by the largest factor), the second
for a concentrated one (missing energy falls by the largest factor), at any rank. The plain
difference E(next) - E(now) has no such fixed direction: at ranks far below min(N, K) it favors
concentrated spectra, and once these are exhausted flat ones. The paper (arXiv 2406.12832)
says that a normalized energy score drives the ranks; formula, candidates and budget are our choice.
"""

import dataclasses
import heapq
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ext.checks import check_choice, check_rank
from lowrank_ext.config import ALL_LINEAR, AdapterConfig
from lowrank_ext.methods.lamda.config import LaMDAConfig
from lowrank_ext.nn.base_layer import dense_weight
from lowrank_ext.targets import find_targets

__all__ = ["allocate_ranks", "captured_energy", "default_candidates"]

Energy = tuple[float, float]  # captured and missing fraction
Gain = Callable[[Energy, Energy], float]
_COLUMNS_PER_BLOCK = 1024  # converted to float64 at a time: bounds the extra memory


def allocate_ranks(
    model: nn.Module,
    r: int,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    *,
    budget: str = "rank",
    direction: str = "flat_gets_more",
    candidates: Sequence[int] | None = None,
    progress: bool = False,
) -> dict[str, int]:
    """A rank for each target module: a dict from module path to rank, in the order of the model.

    Args:
        model: not adapted yet; its weights are only read, in float64 on their device.
        r: target rank.
        target_modules: as in LaMDAConfig.
        budget: ``"rank"`` keeps the sum of ranks of L modules within L · r, ``"params"`` the sum of
            squared ranks (what LaMDA trains in the end) within L · r².
        direction: which spectra get larger ranks, ``"flat_gets_more"`` or
            ``"concentrated_gets_more"``.
        candidates: ranks to choose from, increasing, the first at most r. Default: r/2, r, 3r/2, in
            whole eights where r is a multiple of 8 and at least 16.
        progress: show a progress bar while the spectra are computed.

    No rank exceeds min(N, K) of its weight [N, K]. Modules that share a weight get one rank, which
    counts in the budget for each of them. Equal gains go to the module that comes first.

    Raises:
        TypeError: r or a candidate is no int, or a target has no dense weight.
        ValueError: an argument is out of range, a target is missing, a weight holds inf or nan.

    Examples:
        >>> allocate_ranks(model, 32, ["q_proj", "v_proj"])
        {'model.layers.0.self_attn.q_proj': 16, 'model.layers.0.self_attn.v_proj': 48, …}
    """
    check_rank(r, "allocate_ranks", "r")
    check_choice(budget, tuple(_COSTS), "allocate_ranks", "budget")
    check_choice(direction, tuple(_GAINS), "allocate_ranks", "direction")
    ranks = default_candidates(r) if candidates is None else _checked_candidates(candidates, r)
    config = LaMDAConfig(target_modules=target_modules)
    targets = find_targets(model, config, "allocate_ranks")
    return _allocated(targets, r, ranks, budget, direction, progress)


def _allocated(
    targets: Mapping[str, nn.Module],
    r: int,
    ranks: list[int],
    budget: str,
    direction: str,
    progress: bool = False,
) -> dict[str, int]:
    weights = _weights_of(targets)
    groups = _shared(weights)
    shown = _with_progress(groups) if progress else groups
    units = [_unit(names, weights[names[0]], ranks, _GAINS[direction]) for names in shown]
    cost = _COSTS[budget]
    chosen = _greedy(units, cost, len(weights) * cost(r))
    rank_of = {name: rank for unit, rank in zip(units, chosen, strict=True) for name in unit.names}
    return {name: rank_of[name] for name in weights}


def with_allocated_ranks(
    model: nn.Module, config: AdapterConfig, targets: Mapping[str, nn.Module]
) -> AdapterConfig:
    """LaMDA++: the config with a rank for every target in rank_pattern."""
    if not isinstance(config, LaMDAConfig) or config.rank_budget is None or config.rank_pattern:
        return config
    candidates = default_candidates(config.r)
    ranks = _allocated(targets, config.r, candidates, config.rank_budget, config.direction)
    # Anchored, so that a path does not match as the end of a longer one.
    pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items()}
    return dataclasses.replace(config, rank_pattern=pattern)


def _with_progress(groups: list[list[str]]) -> Iterable[list[str]]:
    from rich.progress import track  # here, so that import lowrank_ext stays fast

    return track(groups, "spectra")


def default_candidates(r: int) -> list[int]:
    """r - d, r, r + d with d = r/2, rounded down to a multiple of 8 if r is one and at least 16."""
    step = r // 16 * 8 if r >= 16 and r % 8 == 0 else r // 2
    return sorted({r - step, r, r + step})


def captured_energy(weight: Tensor, ranks: Iterable[int]) -> list[Energy]:
    """(E(r), 1 - E(r)) of a weight [N, K] for each rank, in float64.

    From the eigenvalues of the smaller Gram matrix, which are the squared singular values. Each of
    the two is a sum, so neither loses digits to a subtraction from 1. A zero weight counts as
    captured: (1, 0).
    """
    short = weight if weight.shape[0] <= weight.shape[1] else weight.mT
    gram = torch.zeros(short.shape[0], short.shape[0], dtype=torch.float64, device=weight.device)
    for block in short.split(_COLUMNS_PER_BLOCK, dim=1):
        block64 = block.to(torch.float64)
        gram.addmm_(block64, block64.mT)
    squares = torch.linalg.eigvalsh(gram).flip(0).cpu()
    # Eigenvalues this small are rounding noise of exact zeros.
    noise = float(squares[0]) * len(squares) * torch.finfo(torch.float64).eps
    squares = torch.where(squares > noise, squares, 0)
    total = float(squares.sum())
    if total == 0:
        return [(1.0, 0.0) for _ in ranks]
    return [(float(squares[:r].sum()) / total, float(squares[r:].sum()) / total) for r in ranks]


def _rank_cost(rank: int) -> int:
    return rank


def _params_cost(rank: int) -> int:
    return rank * rank


_COSTS: dict[str, Callable[[int], int]] = {"rank": _rank_cost, "params": _params_cost}


def _growth_of_captured(now: Energy, after: Energy) -> float:
    return math.log(after[0]) - math.log(now[0])


def _decay_of_missing(now: Energy, after: Energy) -> float:
    if now[1] == 0:
        return 0.0  # no energy is missing
    return math.inf if after[1] == 0 else math.log(now[1]) - math.log(after[1])


_GAINS = {"flat_gets_more": _growth_of_captured, "concentrated_gets_more": _decay_of_missing}


def _checked_candidates(candidates: Iterable[int], r: int) -> list[int]:
    ranks = list(candidates)
    for rank in ranks:
        check_rank(rank, "allocate_ranks", "candidates")
    if not ranks or ranks != sorted(set(ranks)) or ranks[0] > r:
        raise ValueError(
            f"allocate_ranks: candidates must increase and start at no more than r={r}, got {ranks}"
        )
    return ranks


def _weights_of(targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, module in targets.items():
        weight = dense_weight(module)
        if weight is None:
            raise TypeError(
                f"allocate_ranks: {name} must have a floating-point weight [N, K], "
                f"got {type(module).__name__}"
            )
        if weight.is_meta:
            raise ValueError(
                f"allocate_ranks: weight of {name} must hold values, got a meta tensor"
            )
        weights[name] = weight.detach()
    return weights


def _shared(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of modules, those with a common weight together, in the order of their first."""
    groups = defaultdict(list)
    for name, weight in weights.items():
        groups[weight.data_ptr(), weight.shape, weight.stride(), weight.device].append(name)
    return list(groups.values())


class _Unit(NamedTuple):
    """Modules that share one weight: their ranks to choose from, and the gain of each step up."""

    names: list[str]
    ranks: list[int]
    gains: list[float]  # gains[i]: from ranks[i] to ranks[i + 1]


def _unit(names: list[str], weight: Tensor, candidates: Iterable[int], gain: Gain) -> _Unit:
    if not torch.isfinite(weight).all():
        raise ValueError(f"allocate_ranks: weight of {names[0]} must be finite, got inf or nan")
    cap = min(weight.shape)
    ranks = sorted({min(rank, cap) for rank in candidates})
    energies = captured_energy(weight, ranks)
    return _Unit(names, ranks, [gain(now, after) for now, after in pairwise(energies)])


def _greedy(units: Sequence[_Unit], cost: Callable[[int], int], budget: int) -> list[int]:
    """Rank of each unit: all start at the first rank; then the step up with the largest gain per
    cost is taken, as long as one fits the budget."""
    levels = [0] * len(units)
    left = budget - sum(len(unit.names) * cost(unit.ranks[0]) for unit in units)

    heap: list[tuple[float, int]] = []  # (-gain per cost, unit): the first unit wins a tie

    def added_cost(idx: int) -> int:
        ranks, level = units[idx].ranks, levels[idx]
        return cost(ranks[level + 1]) - cost(ranks[level])

    def push(idx: int) -> None:
        gains, level = units[idx].gains, levels[idx]
        if level < len(gains) and gains[level] > 0:
            heapq.heappush(heap, (-gains[level] / added_cost(idx), idx))

    for idx in range(len(units)):
        push(idx)
    while heap:
        _, idx = heapq.heappop(heap)
        price = len(units[idx].names) * added_cost(idx)
        if price <= left:  # a step that no longer fits never will: the budget only shrinks
            left -= price
            levels[idx] += 1
            push(idx)
    return [unit.ranks[level] for unit, level in zip(units, levels, strict=True)]
