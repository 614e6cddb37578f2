"""Predicts depth-wise batching of Gemma 2B on GPUs from their rooflines, beside the paper's table.

    python benchmarks/roofline_depthwise.py                 # ten minutes; needs no GPU

No measurement: every pass takes the least time that the device's peak rates allow, max(FLOPs / peak
FLOP/s, bytes / bandwidth) of its block, attention and head; kernel launches, scheduling and the
embedding cost nothing. The engine's own scheduler decides what runs. Prompts have 512 tokens,
answers 1024 to 3072, 2048 in the mean, and there are three sequences for each slot.

The paper's figures are hypothetical too: exits by an oracle, block time on an A100 alone, adapters
of all loops in one product (Bae et al. 2024, arXiv 2410.20672). deep_share of the tokens run both
loops.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from timing import Table, progress, write_json

import lowrank_ext as lr

# Dense bf16 FLOP/s and bytes/s of the data sheets: A100 SXM 80 GB, H200 SXM.
DEVICES = {
    "A100": lr.recursive.HardwareRoofline(flops=312e12, bandwidth=2.039e12),
    "H200": lr.recursive.HardwareRoofline(flops=989e12, bandwidth=4.8e12),
}
# Gemma 2B: 18 layers of q, k, v, o and a gated MLP, as (in_features, out_features).
LAYERS, WIDTH, VOCABULARY, KEY_VALUES = 18, 2048, 256_000, 2 * 256
LINEARS = (
    (2048, 2048),
    (2048, 256),
    (2048, 256),
    (2048, 2048),
    (2048, 16384),
    (2048, 16384),
    (16384, 2048),
)
# Tokens/s over the vanilla model's with static batching, and with continuous batching.
PAPER = {0: (2.66, 1.88), 64: (2.00, 1.41), 512: (1.59, 1.13)}
PROMPT, NEW = 512, (1024, 3072)


class Candidate(NamedTuple):
    name: str
    rank: int
    policy: str
    skipped: str

    @property
    def is_vanilla(self) -> bool:
        return self.policy != "depth-wise"


def sizes_of(num_loops: int, rank: int) -> lr.recursive.BlockSizes:
    length = LAYERS // num_loops
    return lr.recursive.BlockSizes(
        block_parameters=length * sum(k * n for k, n in LINEARS),
        adapter_parameters=length * sum(min(rank, k, n) * (k + n) for k, n in LINEARS),
        head_parameters=WIDTH * VOCABULARY,
        cache_values=length * KEY_VALUES,
        query_values=length * WIDTH,
        key_value_parameters=length * WIDTH * KEY_VALUES,
        num_loops=num_loops,
    )


def make_requests(count: int, deep_share: float) -> list[lr.recursive.PlannedRequest]:
    draw = random.Random(0)
    planned = []
    for _ in range(count):
        length = draw.randint(*NEW)
        exits = [int(draw.random() < deep_share) for _ in range(length)]
        planned.append(lr.recursive.PlannedRequest(PROMPT, length, exits))
    return planned


def candidates() -> Iterator[Candidate]:
    """The vanilla model by both sequence-wise policies, then recursive models."""
    yield Candidate("vanilla, static", 0, "static", "backfill")
    yield Candidate("vanilla, continuous", 0, "continuous", "backfill")
    for rank in PAPER:
        yield Candidate(f"share-first, r = {rank}", rank, "depth-wise", "share-first")
    for rank in (0, 64):
        yield Candidate(f"backfill, r = {rank}", rank, "depth-wise", "backfill")


def predicted(
    candidate: Candidate,
    requests: list[lr.recursive.PlannedRequest],
    num_slots: int,
    roofline: lr.recursive.HardwareRoofline,
) -> Any:
    """The engine's metrics."""
    if candidate.is_vanilla:  # a block of all layers that runs once
        requests = [request._replace(exit_loops=[0]) for request in requests]
    num_loops = 1 if candidate.is_vanilla else 2
    return lr.recursive.predict_throughput(
        requests,
        lr.recursive.roofline_costs(sizes_of(num_loops, candidate.rank), roofline),
        num_loops=num_loops,
        max_rows=num_slots,
        policy=candidate.policy,
        skipped=candidate.skipped,
        with_scheduling=False,
    )


def rows_of(
    device: str, num_slots: int, requests: list[lr.recursive.PlannedRequest]
) -> Iterator[dict[str, Any]]:
    found = {}
    for candidate in candidates():
        progress(f"{device}: {candidate.name}")
        found[candidate] = predicted(candidate, requests, num_slots, DEVICES[device])
    progress("")
    static, continuous, *_ = (metrics.tokens_per_second for metrics in found.values())
    for candidate, metrics in found.items():
        shown = candidate.skipped == "share-first"
        yield {
            "device": device,
            "num_slots": num_slots,
            "candidate": candidate.name,
            "tokens_per_second": metrics.tokens_per_second,
            "over_static": metrics.tokens_per_second / static,
            "over_continuous": metrics.tokens_per_second / continuous,
            "mean_loops": metrics.mean_loops,
            "rows_per_pass": metrics.rows_per_pass,
            "paper": PAPER[candidate.rank] if shown else None,
        }


COLUMNS = (
    ("device", 6),
    ("slots", 5),
    ("candidate", 24),
    ("tokens/s", 9),
    ("x static", 9),
    ("x contin.", 9),
    ("loops", 6),
    ("rows/pass", 9),
    ("paper", 12),
)


def cells(row: dict[str, Any]) -> tuple[object, ...]:
    ratios = (row[name] for name in ("over_static", "over_continuous", "mean_loops"))
    return (
        *(row[name] for name in ("device", "num_slots", "candidate")),
        f"{row['tokens_per_second']:.0f}",
        *(f"{ratio:.2f}" for ratio in ratios),
        f"{row['rows_per_pass']:.1f}",
        "{:.2f}, {:.2f}".format(*row["paper"]) if row["paper"] else "",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=128, help="sequences at once")
    parser.add_argument("--deep-share", type=float, default=0.3, help="tokens that run both loops")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args()
    print("PREDICTION from peak rates, not measured. paper: its own figures, A100, block time only")
    print(f"Gemma 2B in bf16, B = 2, {options.deep_share:.2f} of tokens run both loops\n")
    table = Table(COLUMNS)
    rows: list[dict[str, Any]] = []
    requests = make_requests(3 * options.slots, options.deep_share)
    for device in DEVICES:
        for row in rows_of(device, options.slots, requests):
            table.row(*cells(row))
            rows.append(row)
        if options.json:
            write_json(options.json, {"prediction": True, "rows": rows})


if __name__ == "__main__":
    main()
