"""Predicts an engine's throughput from what single passes cost, measured or by roofline.

The engine's own scheduler runs, with a runner that computes nothing and lets a clock go on by what
each call would take. So a prediction has every policy, every wait and every pass of the engine.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_ext.checks import check_count
from lowrank_ext.methods.recursive.engine.cache import SlotCache
from lowrank_ext.methods.recursive.engine.engine import check_policy
from lowrank_ext.methods.recursive.engine.metrics import Metrics
from lowrank_ext.methods.recursive.engine.requests import Request
from lowrank_ext.methods.recursive.engine.rows import Rows
from lowrank_ext.methods.recursive.engine.scheduler import Scheduler
from lowrank_ext.methods.recursive.exits import ExitRows, ExitRule, ForcedExits
from lowrank_ext.methods.recursive.pass_costs import PassCosts


class PlannedRequest(NamedTuple):
    """A request whose course is known.

    Attributes:
        prompt_length: its tokens.
        new_tokens: how many it gets.
        exit_loops: the loop after which each leaves, 0-based; the last entry stands for the rest.
    """

    prompt_length: int
    new_tokens: int
    exit_loops: Sequence[int]


def predict_throughput(
    requests: Sequence[PlannedRequest],
    costs: PassCosts,
    *,
    num_loops: int,
    max_rows: int,
    policy: str = "depth-wise",
    skipped: str = "backfill",
    head_after_every_loop: bool = False,
    prompt_rows: int = 512,
    with_scheduling: bool = True,
) -> Metrics:
    """What a ``DepthwiseEngine`` with these options would do with the requests, in the time that
    ``costs`` say: a prediction, no measurement.

    Args:
        requests: in the order of ``add``, all there at the start.
        costs: see ``measure_pass_costs`` and ``roofline_costs``.
        num_loops, max_rows, policy, skipped, prompt_rows: as of the engine. Tokens exit where the
            requests say with ``"depth-wise"``, and never with the other policies.
        head_after_every_loop: the exit rule needs logits, as ``Confidence``.
        with_scheduling: add the time that scheduling takes in this run.

    Returns:
        The engine's metrics, their seconds predicted.

    Raises:
        TypeError, ValueError: an option is out of range, or a request has no prompt, a negative
            number of new tokens, or no exit loop or one that there is not.
    """
    owner = "predict_throughput"
    check_policy(owner, policy, skipped, max_rows, prompt_rows)
    check_count(num_loops, 1, owner, "num_loops")
    for planned in requests:
        _check_planned(planned, num_loops, owner)
    longest = max((r.prompt_length + r.new_tokens for r in requests), default=1)
    clock = _Clock(with_scheduling)
    runner = _CostRunner(costs, num_loops, clock)
    plan = ForcedExits({i: list(r.exit_loops) for i, r in enumerate(requests)})
    rule: ExitRule = _WithLogits(plan) if head_after_every_loop else plan
    queue: deque[Request] = deque()
    scheduler = Scheduler(
        runner,
        _UntilPlanned(),
        queue,
        max_rows=max_rows,
        max_length=longest,
        policy=policy,
        exit_rule=rule if policy == "depth-wise" else None,
        skipped=skipped,
        draft_tokens=0,
        prompt_rows=prompt_rows,
    )
    for i, planned in enumerate(requests):
        queue.append(
            Request(
                id=i,
                prompt=[0] * planned.prompt_length,
                max_new_tokens=planned.new_tokens,
                sampler=None,
                stop_tokens=frozenset(),
                stop_strings=(),
                on_token=None,
                clock=clock,
                added=clock(),
            )
        )
    while queue or scheduler.num_running:
        scheduler.step()
    return scheduler.metrics


def _check_planned(planned: PlannedRequest, num_loops: int, owner: str) -> None:
    check_count(planned.prompt_length, 1, owner, "prompt_length")
    check_count(planned.new_tokens, 0, owner, "new_tokens")
    loops = list(planned.exit_loops)
    if not loops or not all(0 <= loop < num_loops for loop in loops):
        wrong = next((loop for loop in loops if not 0 <= loop < num_loops), "none")
        raise ValueError(
            f"{owner}: exit_loops must hold loops from 0 to {num_loops - 1}, got {wrong}"
        )


class _Clock:
    """Seconds that calls would have taken, and, if wanted, those that passed meanwhile."""

    def __init__(self, with_real: bool) -> None:
        self._with_real, self._spent = with_real, 0.0

    def spend(self, seconds: float) -> None:
        self._spent += seconds

    def __call__(self) -> float:
        return self._spent + (time.perf_counter() if self._with_real else 0.0)


class _UntilPlanned:
    def reason_to_end(self, request: Request) -> str | None:
        return "length" if len(request.tokens) >= request.max_new_tokens else None


@dataclass(frozen=True)
class _WithLogits:
    """A plan that has the head run after every loop."""

    plan: ForcedExits
    needs_logits = True

    def exits(self, rows: ExitRows) -> Tensor:
        return self.plan.exits(rows)


class _CostRunner:
    """Lets the clock go on; states and logits are single zeros."""

    device = torch.device("cpu")

    def __init__(self, costs: PassCosts, num_loops: int, clock: _Clock) -> None:
        self._costs, self.num_loops, self._spend = costs, num_loops, clock.spend
        self.clock: Callable[[], float] = clock

    def new_cache(self, num_slots: int, max_length: int) -> SlotCache:
        cache = _CostCache(self.num_loops, num_slots, max_length)
        cache.share_seconds, cache.spend = self._costs.share, self._spend
        return cache

    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        self._spend(self._costs.embedding(tokens.shape[0]))
        return torch.zeros(tokens.shape[0], 1)

    def run(self, rows: Rows, hidden_states: Tensor) -> Tensor:
        kinds = rows.loops.unique().numel()
        block = self._costs.block if kinds == 1 else self._costs.mixed
        self._spend(block(rows.count) + self._costs.attention(rows.attention_work))
        return hidden_states

    def write_keys(self, rows: Rows, hidden_states: Tensor) -> None:
        self._spend(self._costs.copy(rows.count))

    def logits(self, hidden_states: Tensor) -> Tensor:
        self._spend(self._costs.head(hidden_states.shape[0]))
        return torch.zeros(hidden_states.shape[0], 1)


class _CostCache(SlotCache):
    """A cache without heads."""

    share_seconds: float
    spend: Callable[[float], None]

    def __init__(self, num_loops: int, num_slots: int, max_length: int) -> None:
        device = torch.device("cpu")
        super().__init__(1, num_loops, num_slots, max_length, 0, 0, torch.float32, device)

    def share(self, source: Tensor, target: Tensor) -> None:
        self.spend(self.share_seconds * target.shape[0])
