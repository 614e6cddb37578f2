"""Continuous depth-wise batching: the engine's policies side by side on the same requests.

    python benchmarks/bench_depthwise.py                    # an hour on 2 cores
    python benchmarks/bench_depthwise.py --quick
    python benchmarks/bench_depthwise.py --case 2,64,16,64,0.3,bfloat16
    python benchmarks/bench_depthwise.py --model build/examples/recursive/exits-pure
    python benchmarks/bench_depthwise.py --passes           # minutes

A case folds SmolLM2-135M into num_loops loops with adapters of a rank (0: a pure recursion) and
serves requests of mixed lengths, beginnings of real text, with max_rows slots. In a round all
candidates take turns, in a new order each time, of a twentieth of the tokens: what else the machine
does slows all alike. Figures are medians of ratios within rounds, every cost inside.

forced exits: tokens leave where a table says, such that deep_share of them run all loops; the text
is not looked at. confidence: the head runs after every loop, and thresholds let the same share go
on: exits of a model that is not trained for them. With --model, a folder of a recursive model whose
exits are trained, confidence has calibrated thresholds (90 % agreement), and there is the oracle:
each token leaves after the first loop whose most likely token is that of full depth, recorded
before. predicted: by lr.recursive.predict_throughput from pass times measured before and after each
round, the mean of both.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from command import DTYPES, Row, options_of, run
from torch import nn

import lowrank_ext as lr
from lowrank_ext.cli.data.blocks import load_blocks
from lowrank_ext.cli.models import find_model, load_model
from lowrank_ext.methods.recursive.engine.block import BlockRunner
from lowrank_ext.methods.recursive.engine.rows import Rows, Run
from lowrank_ext.methods.recursive.exits import ExitRows, confidence, oracle_loops

SKIPPED = ("share-first", "copy", "backfill")
PROMPT, NEW = (8, 32), (4, 64)  # lengths of prompts and of what is generated
CACHED = 64  # tokens before each row of a timed pass
TURNS = 20  # of each candidate in a round
PASS_ROWS = (8, 16, 32, 64, 128, 256, 512)


class Case(NamedTuple):
    may_be_zero = ("rank",)

    num_loops: int
    rank: int
    max_rows: int
    num_requests: int
    deep_share: float
    dtype: str

    def __str__(self) -> str:
        loops, rank, rows, requests, share, dtype = self
        return f"{dtype} B={loops} r={rank} {rows} slots, {requests} requests, {share:.2f} deep"


def grid(ranks: Sequence[int] = (0, 64), num_loops: int = 2) -> Iterator[Case]:
    for rank in ranks:
        for max_rows in (8, 16, 64):
            yield Case(num_loops, rank, max_rows, max(64, 2 * max_rows), 0.3, "bfloat16")


def quick() -> Iterator[Case]:
    yield Case(2, 64, 8, 8, 0.3, "bfloat16")


class Text(NamedTuple):
    """Token ids: rows to calibrate on, and a stream from which prompts are cut."""

    seen: torch.Tensor
    unseen: list[int]


@cache
def text() -> Text:
    """Real text that a trained model has not seen, and some that it has."""
    tokenizer = load_model(find_model(None), torch.bfloat16).tokenizer
    corpus = load_blocks((), "text", tokenizer, seq_len=128)
    return Text(corpus.train[:64], corpus.held_out.flatten().tolist())


@cache
def recursive_model(num_loops: int, rank: int, dtype: torch.dtype) -> nn.Module:
    model = load_model(find_model(None), dtype).model.eval().requires_grad_(False)
    config = lr.recursive.RecursiveConfig(num_loops=num_loops, rank=rank)
    return lr.recursive.convert(model, config)


@cache
def trained_model(folder: Path) -> nn.Module:
    """In bfloat16, as all cases of it."""
    return lr.recursive.load(folder).to(torch.bfloat16).eval().requires_grad_(False)


class Requests(NamedTuple):
    """Prompts, numbers of new tokens, and the loop after which each token leaves."""

    prompts: list[list[int]]
    new_tokens: list[int]
    exit_loops: list[list[int]]


def make_requests(case: Case) -> Requests:
    draw, stream = random.Random(0), text().unseen
    prompts, lengths, exits = [], [], []
    for _ in range(case.num_requests):
        start, length = draw.randrange(len(stream) - PROMPT[1]), draw.randint(*PROMPT)
        prompts.append(stream[start : start + length])
        lengths.append(draw.randint(*NEW))
        deep = [draw.random() < case.deep_share for _ in range(lengths[-1])]
        exits.append([case.num_loops - 1 if each else 0 for each in deep])
    return Requests(prompts, lengths, exits)


class Threshold:
    """Confidence by top probability, with the share of tokens that go on kept at ``deep_share``:
    exits of a model that is not trained for them, at their full cost."""

    needs_logits = True

    def __init__(self, deep_share: float) -> None:
        self._deep_share, self._seen = deep_share, [0.5]

    def exits(self, rows: ExitRows) -> torch.Tensor:
        assert rows.logits is not None
        scores = confidence(rows.logits, "top_probability").tolist()
        self._seen = (self._seen + scores)[-512:]
        ordered = sorted(self._seen)
        threshold = ordered[int(self._deep_share * len(ordered))]
        return torch.tensor([score >= threshold for score in scores])


def oracle_exits(case: Case, model: nn.Module, requests: Requests) -> list[list[int]]:
    """The exit loops of greedy decoding at full depth, whose tokens are recorded first."""
    engine = make_engine(case, model, requests)
    tables = []
    add_all(engine, requests)
    results = answers(engine)
    for i, prompt in enumerate(requests.prompts):
        inputs = torch.tensor([[*prompt, *results[i].tokens[:-1]]])
        loops = oracle_loops(lr.recursive.loop_logits(model, input_ids=inputs))
        tables.append(loops[0, len(prompt) - 1 :].tolist())
    return tables


def make_engine(case: Case, model: nn.Module, requests: Requests, **options: Any) -> Any:
    longest = max(len(p) + n for p, n in zip(*requests[:2], strict=True))
    shared = {"max_rows": case.max_rows, "max_length": longest}
    return lr.recursive.DepthwiseEngine(model, **shared, **options)


def make_rules(case: Case, model: nn.Module, requests: Requests, trained: bool) -> dict[str, Any]:
    """Exit rules by name."""
    forced = lr.recursive.ForcedExits(dict(enumerate(requests.exit_loops)))
    if not trained:
        return {"forced exits": forced, "confidence": Threshold(case.deep_share)}
    oracle = lr.recursive.ForcedExits(dict(enumerate(oracle_exits(case, model, requests))))
    found = lr.recursive.calibrate(model, text().seen.split(8), target=0.9)
    return {"forced exits": forced, "oracle": oracle, "confidence": found.rule}


def make_engines(
    case: Case, model: nn.Module, requests: Requests, rules: dict[str, Any]
) -> dict[str, Any]:
    engines = {
        policy: make_engine(case, model, requests, policy=policy)
        for policy in ("static", "continuous", "depth-wise")
    }
    for name, rule in rules.items():
        for skipped in SKIPPED:
            options = {"exit_rule": rule, "skipped": skipped}
            engines[f"{name}, {skipped}"] = make_engine(case, model, requests, **options)
    return engines


def add_all(engine: Any, requests: Requests) -> None:
    for i, (prompt, count) in enumerate(zip(*requests[:2], strict=True)):
        engine.add(prompt, max_new_tokens=count, stop=[], id=i)


def answers(engine: Any) -> dict[int, Any]:
    """What the engine generates for all requests, by their numbers."""
    results: dict[int, Any] = engine.run()
    for i, result in results.items():
        if result.finish_reason != "length":
            raise SystemExit(f"request {i} ended by {result.finish_reason}: {result.error}")
        engine.forget(i)
    return results


def serve(engines: dict[str, Any], requests: Requests) -> dict[str, Any]:
    """The engines' metrics for all requests."""
    for engine in engines.values():
        engine.reset_metrics()
        add_all(engine, requests)
    done = dict.fromkeys(engines, 0)
    for turn in range(1, TURNS):
        for name in random.sample(list(engines), len(engines)):
            while done[name] < sum(requests.new_tokens) * turn / TURNS:
                done[name] += len(engines[name].step())
    for name in random.sample(list(engines), len(engines)):
        answers(engines[name])
    return {name: engine.metrics() for name, engine in engines.items()}


def predicted(
    case: Case, requests: Requests, name: str, costs: Sequence[Any], rules: dict[str, Any]
) -> float | None:
    """Tokens per second by the predictor, the mean over costs; None where the exits depend on
    logits."""
    kind, _, skipped = name.partition(", ")
    rule = rules.get(kind)
    if rule is not None and rule.needs_logits:
        return None
    full = [case.num_loops - 1]
    planned = [
        lr.recursive.PlannedRequest(len(prompt), count, rule.loops[i] if rule else full)
        for i, (prompt, count) in enumerate(zip(*requests[:2], strict=True))
    ]
    found = [
        lr.recursive.predict_throughput(
            planned,
            each,
            num_loops=case.num_loops,
            max_rows=case.max_rows,
            policy="depth-wise" if skipped else kind,
            skipped=skipped or "backfill",
        )
        for each in costs
    ]
    return statistics.mean(metrics.tokens_per_second for metrics in found)


def pass_ratio(case: Case, model: nn.Module, budget: float) -> dict[str, float]:
    """Time of a pass of mixed depth over that of the pure block, in turns, and what the adapters'
    multiply-adds are of the block's."""
    pure = recursive_model(case.num_loops, 0, DTYPES[case.dtype])
    runners = {"pure": BlockRunner(pure, "bench"), "relaxed": BlockRunner(model, "bench")}
    width = model.get_input_embeddings().weight.shape[1]
    states = torch.randn(case.max_rows, width, dtype=DTYPES[case.dtype])
    runs = [Run(slot, slot % case.num_loops, CACHED) for slot in range(case.max_rows)]
    rows = {
        name: Rows(runs, runner.new_cache(case.max_rows, CACHED + 1))
        for name, runner in runners.items()
    }
    ratios = []
    start = time.perf_counter()
    while len(ratios) < 5 or time.perf_counter() - start < budget:
        seconds = {}
        for name in random.sample(list(runners), 2):
            began = time.perf_counter()
            runners[name].run(rows[name], states)
            seconds[name] = time.perf_counter() - began
        ratios.append(seconds["relaxed"] / seconds["pure"])
    return {"mixed_pass": statistics.median(ratios[2:]), "flop_share": flop_share(model)}


def flop_share(model: nn.Module) -> float:
    """Multiply-adds of one loop's adapters over those of the block's linears; a pass of mixed depth
    reads the adapters of every loop, so many times as many bytes."""
    linears = [m for m in model.modules() if isinstance(m, lr.recursive.RelaxedLinear)]
    own = sum(m.r * (m.in_features + m.out_features) for m in linears)
    base = sum(m.in_features * m.out_features for m in linears)
    return own / base if base else 0.0


COLUMNS = (
    ("B", 2),
    ("r", 4),
    ("rows", 5),
    ("candidate", 26),
    ("tokens/s", 9),
    ("x static", 9),
    ("x contin.", 9),
    ("predicted", 9),
    ("loops", 6),
    ("rows/pass", 9),
    ("head", 5),
    ("pass", 6),
    ("FLOPs", 6),
    ("bytes", 6),
)


@torch.inference_mode()
def run_case(case: Case, budget: float, folder: Path | None = None) -> list[Row]:
    untrained = (case.num_loops, case.rank, DTYPES[case.dtype])
    model = trained_model(folder) if folder else recursive_model(*untrained)
    requests = make_requests(case)
    rules = make_rules(case, model, requests, folder is not None)
    ratio = pass_ratio(case, model, budget / 4) if case.rank else {}
    engines = make_engines(case, model, requests, rules)
    rounds: dict[str, list[Any]] = {name: [] for name in engines}
    expected: dict[str, list[float | None]] = {name: [] for name in engines}
    start = time.perf_counter()
    while len(rounds["static"]) < 1 or time.perf_counter() - start < budget:
        before = lr.recursive.measure_pass_costs(model, cached_tokens=CACHED)
        for name, metrics in serve(engines, requests).items():
            rounds[name].append(metrics)
        after = lr.recursive.measure_pass_costs(model, cached_tokens=CACHED)
        for name in engines:
            expected[name].append(predicted(case, requests, name, (before, after), rules))
    return [row_of(case, name, rounds, expected[name], ratio) for name in engines]


def row_of(
    case: Case,
    name: str,
    rounds: dict[str, list[Any]],
    expected: list[float | None],
    ratio: dict[str, float],
) -> Row:
    def over(base: str) -> float:
        pairs = zip(rounds[name], rounds[base], strict=True)
        return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs)

    pairs = zip(expected, rounds[name], strict=True)
    errors = [found / each.tokens_per_second for found, each in pairs if found is not None]
    speed = statistics.median(metrics.tokens_per_second for metrics in rounds[name])
    last = rounds[name][-1]
    return {
        **case._asdict(),
        "candidate": name,
        "tokens_per_second": speed,
        "over_static": over("static"),
        "over_continuous": over("continuous"),
        "predicted_over_measured": statistics.median(errors) if errors else None,
        "mean_loops": last.mean_loops,
        "rows_per_pass": last.rows_per_pass,
        "head_calls_per_pass": last.head_calls / last.passes,
        "shares": last.shares(),
        "rounds": len(rounds[name]),
        **ratio,
    }


def cells(row: Row) -> tuple[object, ...]:
    expected = row["predicted_over_measured"]
    mixed = row.get("mixed_pass")
    return (
        *(row[name] for name in ("num_loops", "rank", "max_rows", "candidate")),
        f"{row['tokens_per_second']:.1f}",
        *(f"{row[name]:.2f}" for name in ("over_static", "over_continuous")),
        "" if expected is None else f"{expected:.2f}",
        f"{row['mean_loops']:.2f}",
        f"{row['rows_per_pass']:.1f}",
        f"{row['head_calls_per_pass']:.2f}",
        "" if mixed is None else f"{mixed:.2f}",
        "" if mixed is None else f"{1 + row['flop_share']:.2f}",
        "" if mixed is None else f"{1 + row['num_loops'] * row['flop_share']:.2f}",
    )


HEAD = (
    "x static, x contin.: tokens/s over that policy's in the same round, median of rounds",
    "predicted: predicted over measured tokens/s; loops: per token; head: calls per pass",
    "pass: time of a pass of mixed depth over the pure block's; FLOPs, bytes: of its products",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a recursive model whose exits are trained"
    )
    parser.add_argument(
        "--passes",
        action="store_true",
        help="the time of a pass of mixed depth alone, by its rows, at r = 64 or that of --model",
    )


def cases_of(options: argparse.Namespace) -> list[Case]:
    if options.model is None:
        return options.case or list(quick() if options.quick else grid())
    config = trained_model(options.model).recursive_config
    cases = options.case or list(grid((config.rank,), config.num_loops))
    if any(case[:2] != (config.num_loops, config.rank) for case in cases):
        raise SystemExit(f"--model has num_loops={config.num_loops} and rank={config.rank}")
    return cases[:1] if options.quick else cases


def parsed() -> argparse.Namespace:
    return options_of(
        __doc__,
        Case,
        quick="one case of eight requests",
        devices=("cpu",),
        seconds=120.0,
        more=add_options,
    )


PASS_COLUMNS = (("B", 2), ("r", 4), ("rows", 5), ("pass", 6), ("FLOPs", 6), ("bytes", 6))


@torch.inference_mode()
def run_pass(case: Case, budget: float, folder: Path | None = None) -> list[Row]:
    untrained = (case.num_loops, case.rank, DTYPES[case.dtype])
    model = trained_model(folder) if folder else recursive_model(*untrained)
    return [{**case._asdict(), **pass_ratio(case, model, budget)}]


def pass_cells(row: Row) -> tuple[object, ...]:
    shares = (row["flop_share"], row["num_loops"] * row["flop_share"])
    figures = (row["mixed_pass"], *(1 + share for share in shares))
    sizes = (row["num_loops"], row["rank"], row["max_rows"])
    return (*sizes, *(f"{figure:.2f}" for figure in figures))


def main() -> None:
    options = parsed()
    if options.passes:
        config = options.model and trained_model(options.model).recursive_config
        sizes = (config.num_loops, config.rank) if config else (2, 64)
        cases = [Case(*sizes, rows, 1, 0.0, "bfloat16") for rows in PASS_ROWS]
        seconds = options.seconds / len(PASS_ROWS)
        measure = partial(run_pass, budget=seconds, folder=options.model)
        run(options, cases, HEAD[2:], PASS_COLUMNS, measure, pass_cells)
        return
    cases = cases_of(options)
    measure = partial(run_case, budget=options.seconds, folder=options.model)
    run(options, cases, HEAD, COLUMNS, measure, cells)


if __name__ == "__main__":
    main()
