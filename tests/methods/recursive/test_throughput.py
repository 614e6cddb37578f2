"""predict_throughput runs the engine's own scheduler: the same passes, the costs that are given."""

import pytest
import torch
from recursive_models import prompts, tiny_recursive

import lowrank_ext as lr
from lowrank_ext.methods.recursive import (
    AttentionWork,
    BlockSizes,
    DepthwiseEngine,
    ForcedExits,
    HardwareRoofline,
    PassCosts,
    PlannedRequest,
    measure_pass_costs,
    predict_throughput,
    roofline_costs,
)

LENGTHS = [8, 3, 6, 1, 6, 9, 4]
EXITS = [[2, 0, 1], [0], [2, 1, 0, 0], [1], [0, 2], [1, 1, 0], [2]]


def costs(**given) -> PassCosts:
    nothing = {name: lambda rows: 0.0 for name in ("block", "mixed", "head", "embedding", "copy")}
    return PassCosts(**{**nothing, "attention": lambda work: 0.0, **given})


def planned() -> list[PlannedRequest]:
    return [
        PlannedRequest(len(prompt), count, exits)
        for prompt, count, exits in zip(prompts(), LENGTHS, EXITS, strict=True)
    ]


@pytest.mark.parametrize("skipped", ["backfill", "share-first", "copy"])
@pytest.mark.parametrize("policy", ["static", "continuous", "depth-wise"])
def test_the_passes_are_those_of_the_engine(policy, skipped):
    model = tiny_recursive()
    rule = ForcedExits(dict(enumerate(EXITS))) if policy == "depth-wise" else None
    engine = DepthwiseEngine(model, max_rows=3, policy=policy, exit_rule=rule, skipped=skipped)
    # With equal times of head and block the profit test decides alike in both.
    scheduler = engine._scheduler
    for times in (scheduler._block_times, scheduler._head_times):
        times.add = lambda rows, seconds: None
    for prompt, count in zip(prompts(), LENGTHS, strict=True):
        engine.add(prompt, max_new_tokens=count)
    engine.run()
    found = engine.metrics()
    predicted = predict_throughput(
        planned(),
        costs(),
        num_loops=3,
        max_rows=3,
        policy=policy,
        skipped=skipped,
        with_scheduling=False,
    )
    for name in ("tokens", "passes", "rows", "head_calls", "head_rows", "idle_rows", "exits"):
        assert getattr(predicted, name) == getattr(found, name), name


def test_the_time_is_that_of_the_calls():
    block, head, attention = 2.0, 0.5, 0.001
    given = costs(block=lambda n: block, mixed=lambda n: block, head=lambda n: head)
    predicted = predict_throughput(
        planned(), given, num_loops=3, max_rows=3, policy="continuous", with_scheduling=False
    )
    expected = block * predicted.passes + head * predicted.head_calls
    assert predicted.seconds == pytest.approx(expected)
    longer = predict_throughput(
        [PlannedRequest(5, 1, [1])],
        costs(attention=lambda work: attention * work.pairs + 10 * attention * work.reads),
        num_loops=2,
        max_rows=1,
        with_scheduling=False,
    )
    # The prompt's five tokens are read together.
    assert longer.seconds == pytest.approx(2 * (1 + 2 + 3 + 4 + 5 + 10 * 5) * attention)


def test_head_after_every_loop_costs_calls_of_the_head():
    found = [
        predict_throughput(planned(), costs(), num_loops=3, max_rows=3, head_after_every_loop=every)
        for every in (False, True)
    ]
    # A row of the head for each loop that a token has run; a prompt's last row has one.
    loops = sum(
        exits[min(i, len(exits) - 1)] + 1 if i else 1
        for count, exits in zip(LENGTHS, EXITS, strict=True)
        for i in range(count)
    )
    assert [metrics.head_rows for metrics in found] == [sum(LENGTHS), loops]


def test_roofline_by_hand():
    """A block of 1e9 parameters, adapters of 1e8 for each of two loops, in bf16."""
    sizes = BlockSizes(10**9, 10**8, 10**8, 1000, 2000, 10**7, num_loops=2)
    found = roofline_costs(sizes, HardwareRoofline(flops=1e14, bandwidth=1e12))
    assert found.block(1) == pytest.approx(2 * 1.1e9 / 1e12)
    assert found.mixed(1) == pytest.approx(2 * 1.2e9 / 1e12)
    assert found.block(1000) == pytest.approx(2 * 1000 * 1.1e9 / 1e14)
    assert found.head(1) == pytest.approx(2e8 / 1e12)
    assert found.attention(AttentionWork(5, 5, 9)) == pytest.approx(5 * 2000 / 1e12)  # bytes
    of_flops = found.attention(AttentionWork(10**6, 5, 10**6))
    assert of_flops == pytest.approx(4 * 10**6 * 2000 / 1e14)
    assert found.copy(1) == pytest.approx(2 * 10**7 / 1e12)


def test_measured_costs_are_positive_and_leave_the_model_alone():
    model = tiny_recursive(2)
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    found = measure_pass_costs(model, rows=(1, 4), cached_tokens=8, repeats=1)
    for cost in (found.block, found.mixed, found.head, found.embedding, found.copy):
        assert cost(1) > 0
        assert cost(8) > 0
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "deep"}, "predict_throughput: policy must be one of"),
        ({"max_rows": 0}, "predict_throughput: max_rows must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        predict_throughput(planned(), costs(), **{"num_loops": 2, "max_rows": 2, **options})


def test_a_plain_model_is_refused():
    with pytest.raises(TypeError, match="measure_pass_costs: model must be recursive"):
        lr.recursive.measure_pass_costs(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": ()}, ValueError, "rows must be at least 1, got 0"),
        ({"rows": (2, 0)}, ValueError, "rows must be at least 1, got 0"),
        ({"cached_tokens": 0}, ValueError, "cached_tokens must be at least 1"),
        ({"repeats": 0}, ValueError, "repeats must be at least 1"),
        ({"repeats": 1.5}, TypeError, "repeats must be an int"),
    ],
)
def test_options_of_a_measurement(options, error, message):
    with pytest.raises(error, match=f"measure_pass_costs: {message}"):
        measure_pass_costs(tiny_recursive(), **options)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PlannedRequest(0, 2, [1]), "prompt_length must be at least 1, got 0"),
        (PlannedRequest(3, -1, [1]), "new_tokens must be at least 0, got -1"),
        (PlannedRequest(3, 2, [0, 3]), "exit_loops must hold loops from 0 to 2, got 3"),
        (PlannedRequest(3, 2, [-1]), "exit_loops must hold loops from 0 to 2, got -1"),
        (PlannedRequest(3, 2, []), "exit_loops must hold loops from 0 to 2, got none"),
    ],
)
def test_requests_that_cannot_be(request_, message):
    with pytest.raises(ValueError, match=f"predict_throughput: {message}"):
        predict_throughput([request_], costs(), num_loops=3, max_rows=2)
