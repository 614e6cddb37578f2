"""Thresholds that keep a stated agreement, and what exits cost on text."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

from decoders import decoder
from small_models import small_llama

import lowrank_ext as lr
from lowrank_ext.methods.recursive import evaluation
from lowrank_ext.methods.recursive.calibration import _loosest
from lowrank_ext.methods.recursive.evaluation import SKIPPED, exit_trace
from lowrank_ext.methods.recursive.exits import MEASURES, confidence, oracle_loops

LOOPS, T, VOCABULARY = 3, 12, 32


def recursive() -> Any:
    """Of three loops, with logits that are neither alike nor all sure."""
    config = small_llama().config
    config.num_hidden_layers = 2 * LOOPS
    model = type(small_llama())(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data *= 40 if "lm_head" in name else 10
    return lr.recursive.convert(model, lr.recursive.RecursiveConfig(num_loops=LOOPS, rank=4)).eval()


def batches(count: int = 2, rows: int = 4) -> list[Tensor]:
    return [torch.randint(VOCABULARY, (rows, T)) for _ in range(count)]


def all_logits(model: Any, tokens: Tensor) -> Tensor:
    """[LOOPS, B, T, V]."""
    with torch.no_grad():
        return torch.stack(lr.recursive.loop_logits(model, input_ids=tokens))


def median_rule(model: Any, measure: str = "top_probability") -> Any:
    """A rule that lets about half of the tokens go after each loop."""
    scores = [confidence(each, measure) for each in all_logits(model, torch.cat(batches()))[:-1]]
    return lr.recursive.Confidence(measure, [float(each.median()) for each in scores])


# -------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("target", [0.3, 0.9])
def test_the_target_is_kept_by_the_rule_itself(measure: str, target: float) -> None:
    model, data = recursive(), batches(count=3)
    found = lr.recursive.calibrate(model, data, measure=measure, target=target)
    assert found.rule.measure == measure and found == lr.recursive.calibrate(
        model, data, measure=measure, target=target
    )
    # Both halves again, through the rule itself.
    rows = torch.cat(data)
    held_out = torch.arange(12) % 4 == 3
    for part, agreed in ((rows[~held_out], found.fitted), (rows[held_out], found.held_out)):
        logits = all_logits(model, part)
        loops = exit_trace(model, part, found.rule, "backfill").loops
        scores = torch.stack([confidence(each, measure) for each in logits])
        sign = -1 if measure == "entropy" else 1
        left = torch.full(part.shape, LOOPS - 1)
        for loop, threshold in reversed(list(enumerate(found.rule.thresholds))):
            if threshold is not None:
                left[sign * scores[loop] >= sign * threshold] = loop
        assert torch.equal(loops[:, 1:], left[:, 1:])
        assert tuple(torch.bincount(left.flatten(), minlength=LOOPS).tolist()) == agreed.exits
        best = logits.argmax(-1)
        for loop, share in enumerate(agreed.agreement):
            agrees = (best[loop] == best[-1])[left == loop]
            assert share == (None if agrees.numel() == 0 else agrees.float().mean())
    fitted = [share for share in found.fitted.agreement if share is not None]
    assert fitted and min(fitted) >= target
    assert found.fitted.num_tokens == 9 * T and found.held_out.num_tokens == 3 * T


def test_extreme_targets() -> None:
    model, data = recursive(), batches()
    everything = lr.recursive.calibrate(model, data, target=0.0)
    assert everything.fitted.exits[1:] == (0, 0) and everything.fitted.agreement[1] is None
    total = lr.recursive.calibrate(model, data, target=1.0)
    assert total.fitted.exited_agreement in (1.0, None)


@pytest.mark.parametrize(
    ("scores", "agrees", "target", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1], 0.75, 0.6),
        ([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1], 0.76, 0.8),
        ([0.9, 0.8, 0.8, 0.6], [1, 1, 0, 0], 1.0, 0.9),  # equal scores exit together
        ([0.6, 0.9, 0.7, 0.8], [1, 1, 0, 1], 0.75, 0.6),
        ([0.9, 0.8], [0, 0], 0.1, None),
        ([0.5, 0.5], [1, 0], 0.6, None),
        ([], [], 0.5, None),
    ],
)
def test_loosest_threshold(
    scores: list[float], agrees: list[int], target: float, expected: float | None
) -> None:
    found = _loosest(torch.tensor(scores), torch.tensor(agrees, dtype=torch.bool), target)
    assert found == (None if expected is None else torch.tensor(expected).item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "sureness"}, "measure must be one of"),
        ({"target": 1.5}, "target must be between 0 and 1"),
        ({"batches": []}, "batches must hold at least one"),
        ({"batches": batches(1, rows=3)}, "batches must hold at least 4 sequences, got 3"),
        ({"batches": [torch.zeros(4, T)]}, r"batches must be int64 \[B, T\]"),
        ({"batches": [torch.zeros(4, dtype=torch.int64)]}, r"batches must be int64 \[B, T\]"),
    ],
)
def test_wrong_arguments(options: Any, message: str) -> None:
    given = {"batches": batches(), **options}
    with pytest.raises(ValueError, match=f"^calibrate: {message}"):
        lr.recursive.calibrate(recursive(), given.pop("batches"), **given)


def test_models_that_cannot_be_calibrated() -> None:
    with pytest.raises(TypeError, match=r"^calibrate: model must be recursive"):
        lr.recursive.calibrate(small_llama(), batches())
    one = lr.recursive.convert(small_llama(), lr.recursive.RecursiveConfig(num_loops=1))
    with pytest.raises(ValueError, match=r"^calibrate: model must have at least two loops"):
        lr.recursive.calibrate(one, batches())
    model = recursive()
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"^calibrate: logits must be finite"):
        lr.recursive.calibrate(model, batches())


# --------------------------------------------------------------------------------- evaluation


def test_loops_are_measured(monkeypatch: Any) -> None:
    monkeypatch.setattr(evaluation, "_CHUNK_TOKENS", 5)
    model, data = recursive().train(), batches()
    found = lr.recursive.evaluate(model, data)
    assert model.training and model.lm_head.training
    tokens = torch.cat(data)
    logits = all_logits(model.eval(), tokens)[:, :, :-1]
    labels = tokens[:, 1:].flatten()
    wanted = [F.cross_entropy(each.flatten(0, 1), labels).item() for each in logits]
    assert found.losses == pytest.approx(wanted, rel=1e-5)
    assert found.num_tokens == labels.numel()
    best = logits.argmax(-1)
    shares = [(each == best[-1]).float().mean().item() for each in best]
    assert found.agreement == pytest.approx(shares, rel=1e-6)
    oracle = torch.bincount(oracle_loops(list(logits)).flatten(), minlength=LOOPS)
    assert found.oracle == tuple(oracle.tolist())
    assert found.outcomes == {}
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert found.losses[-1] == pytest.approx(loss, rel=1e-5)


def test_without_an_exit_every_treatment_is_full_depth() -> None:
    model, data = recursive(), batches()
    found = lr.recursive.evaluate(model, data, rule=lr.recursive.Confidence("margin", [None]))
    assert list(found.outcomes) == list(SKIPPED)
    for outcome in found.outcomes.values():
        assert outcome.loss == pytest.approx(found.losses[-1], rel=1e-6)
        assert outcome.exits == (0, 0, found.num_tokens)
        assert (outcome.agreement, outcome.exited_agreement, outcome.mean_loops) == (1.0, None, 3.0)


def test_exits_of_the_outcome_are_those_of_the_trace(monkeypatch: Any) -> None:
    model, data = recursive(), batches()
    rule = median_rule(model)
    found = lr.recursive.evaluate(model, data, rule=rule, prompt_tokens=3)
    full = all_logits(model, torch.cat(data)).argmax(-1)[-1][:, :-1]
    monkeypatch.setattr(evaluation, "_CHUNK_TOKENS", 7)
    for name, outcome in found.outcomes.items():
        trace = exit_trace(model, torch.cat(data), rule, name, prompt_tokens=3)
        loops, tokens = trace.loops[:, :-1], trace.tokens[:, :-1]
        assert (loops[:, :3] == LOOPS - 1).all()
        assert outcome.exits == tuple(torch.bincount(loops.flatten(), minlength=LOOPS).tolist())
        assert min(outcome.exits) > 0
        assert outcome.loss == pytest.approx(trace.losses[:, :-1].mean().item(), rel=1e-5)
        agrees = tokens == full
        assert outcome.agreement == pytest.approx(agrees.float().mean().item())
        early = agrees[loops < LOOPS - 1].float().mean().item()
        assert outcome.exited_agreement == pytest.approx(early)
    losses = {name: outcome.loss for name, outcome in found.outcomes.items()}
    assert len(set(losses.values())) == 3, "the treatments differ on this model"


RULES = {
    "confidence": median_rule,
    "entropy": lambda model: median_rule(model, "entropy"),
    "agreement": lambda model: lr.recursive.Agreement(),
    "forced": lambda model: lr.recursive.ForcedExits(
        {row: torch.randint(LOOPS, (20,)).tolist() for row in range(3)}
    ),
}


@pytest.mark.parametrize("rule_name", RULES)
@pytest.mark.parametrize("skipped", SKIPPED)
def test_exits_are_those_of_the_engine_that_generates_the_text(
    skipped: str, rule_name: str
) -> None:
    # Every token, and every exit, of a text that the engine has generated itself.
    model, new = recursive(), 9
    rule = RULES[rule_name](model)
    prompts = torch.randint(VOCABULARY, (3, 4))
    engine = lr.recursive.DepthwiseEngine(
        model, max_rows=3, exit_rule=rule, skipped=skipped, max_length=32
    )
    for row, prompt in enumerate(prompts):
        engine.add(prompt, max_new_tokens=new, stop=[], id=row)
    results = engine.run()
    generated = torch.tensor([results[row].tokens for row in range(3)])
    text = torch.cat([prompts, generated[:, :-1]], dim=1)
    trace = exit_trace(model, text, rule, skipped, prompt_tokens=4)
    assert torch.equal(trace.tokens[:, 3:], generated)
    exits = torch.tensor([results[row].exit_loops for row in range(3)])
    assert torch.equal(trace.loops[:, 3:], exits)
    assert len(exits.unique()) > 1


@pytest.mark.parametrize(
    ("family", "options"), [("Mistral", {}), ("GPTNeoX", {"num_key_value_heads": 2})]
)
@pytest.mark.parametrize("skipped", SKIPPED)
def test_exits_of_other_families(skipped: str, family: str, options: dict[str, int]) -> None:
    # A sliding window, and layers that are called in another way.
    config = lr.recursive.RecursiveConfig(num_loops=2, rank=4)
    model = lr.recursive.convert(decoder(family, **options), config)
    prompt, new = torch.randint(VOCABULARY, (1, 4)), 9
    rule = lr.recursive.ForcedExits({0: [1, 0, 1, 0, 0, 1, 0, 0, 1]})
    engine = lr.recursive.DepthwiseEngine(
        model, max_rows=1, exit_rule=rule, skipped=skipped, max_length=32
    )
    engine.add(prompt[0], max_new_tokens=new, stop=[], id=0)
    generated = torch.tensor([engine.run()[0].tokens])
    text = torch.cat([prompt, generated[:, :-1]], dim=1)
    trace = exit_trace(model, text, rule, skipped, prompt_tokens=4)
    assert torch.equal(trace.tokens[:, 3:], generated)
    assert trace.loops[0, 3:].tolist() == rule.loops[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skipped": ["recompute"]}, "skipped must be one of"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
        ({"batches": [torch.ones(2, 1, dtype=torch.int64)]}, "T of at least 2"),
    ],
)
def test_wrong_arguments_of_evaluate(options: Any, message: str) -> None:
    given = {"batches": batches(), **options}
    with pytest.raises(ValueError, match=f"^evaluate: .*{message}"):
        lr.recursive.evaluate(recursive(), given.pop("batches"), **given)
