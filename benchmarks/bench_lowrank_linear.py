"""lowrank_linear through LoRALinear, against PEFT, torch.compile and the frozen linear.

    python benchmarks/bench_lowrank_linear.py                      # a quarter hour on 2 cores
    python benchmarks/bench_lowrank_linear.py --quick              # a minute
    python benchmarks/bench_lowrank_linear.py --case 2048,1024,1024,16,0.05,bfloat16

Each case is one training step of one layer: x and the adapter require gradients, the base is
frozen. Candidates take turns in every round; figures are medians over the rounds of time / time of
the frozen linear in that round. Rows in which a baseline wins are marked.
"""

import argparse
import itertools
from collections.abc import Iterator

import torch
from command import DTYPES, Row, loss, options_of, print_losses, run
from layers import (
    Case,
    Compiled,
    Data,
    WrongResult,
    allow_many_graphs,
    as_candidate,
    check,
    make_data,
    make_ours,
    make_peft,
    peft_name,
)
from timing import Rounds, time_interleaved
from torch import nn

# The whole product of these is the grid, less what takes minutes a case (see `too_long`).
GRID_M = (16, 256, 2048, 8192)
GRID_K = (576, 1024, 2048, 4096)
GRID_RANK = (8, 16, 64)
GRID_DROPOUT = (0.0, 0.05)
GRID_DTYPE = ("bfloat16", "float32")


def grid() -> Iterator[Case]:
    product = itertools.product(GRID_DTYPE, GRID_M, GRID_K, GRID_RANK, GRID_DROPOUT)
    for dtype, m, k, rank, dropout in product:
        yield Case(m, k, k, rank, dropout, dtype)


def too_long(case: Case) -> bool:
    """Whether a CPU grid leaves the case to --full, because a call takes seconds; in bf16 at the
    usual rank the limit is four times higher."""
    whole = 2**33
    limit = 4 * whole if case.dtype == "bfloat16" and case.rank == 16 else whole
    return case.multiply_adds > limit


def quick() -> Iterator[Case]:
    for dtype, dropout in itertools.product(GRID_DTYPE, GRID_DROPOUT):
        yield Case(16, 1024, 1024, 16, dropout, dtype)
        yield Case(2048, 576, 576, 8, dropout, dtype)
        yield Case(2048, 1024, 1024, 16, dropout, dtype)


def make_candidates(case: Case, data: Data, dynamic: bool) -> dict[str, nn.Module]:
    """Candidates by column, with adapters in fp32, the default of both libraries, or in the base's
    dtype."""
    dtype = DTYPES[case.dtype]
    modules = {
        "frozen": data.linear,
        "ours": make_ours(case, data, torch.float32),
        "peft": make_peft(case, data, torch.float32),
        "compile": Compiled(case, data, dynamic),
    }
    if dtype != torch.float32:
        modules["ours, base dtype"] = make_ours(case, data, dtype)
        modules["peft, base dtype"] = make_peft(case, data, dtype)
    return modules


# Rows


COLUMNS = (
    ("dtype", 8),
    ("M", 5),
    ("K", 5),
    ("N", 5),
    ("r", 4),
    ("drop", 5),
    ("pass", 8),
    ("frozen ms", 10),
    ("TFLOP/s", 8),
    ("ours", 6),
    ("peft", 6),
    ("compile", 7),
    ("ours/base", 9),
    ("peft/base", 9),
    ("rounds", 6),
    ("", 0),
)
RATIOS = ("ours", "peft", "compile", "ours, base dtype", "peft, base dtype")
# The compiled formula has its adapters in the base's dtype.
RIVALS = {"ours": ("peft",), "ours, base dtype": ("peft, base dtype", "compile")}


def run_case(case: Case, device: str, budget: float, dynamic: bool) -> Rounds:
    data = make_data(case, device)
    modules = make_candidates(case, data, dynamic)
    check(case, data, modules)
    candidates = {name: as_candidate(module, data) for name, module in modules.items()}
    return time_interleaved(candidates, device, budget)


def results(case: Case, rounds: Rounds) -> Iterator[Row]:
    """A row for forward, one for forward + backward."""
    for part, passes in (("forward", 1), ("both", 2)):
        frozen = rounds.median("frozen", part)
        ratios = {
            name: rounds.ratio(name, "frozen", part) for name in RATIOS if name in rounds.seconds
        }
        yield {
            **case._asdict(),
            "pass": "forward" if part == "forward" else "fwd+bwd",
            "frozen_ms": frozen * 1e3,
            "frozen_tflops": 2 * passes * case.multiply_adds / frozen / 1e12,
            "ratios": ratios,
            "loses_to": losses(ratios),
            "rounds": len(rounds),
        }


def losses(ratios: dict[str, float]) -> list[str]:
    """Rivals of the same adapter dtype that are faster than ours in this row."""
    rivals = RIVALS if "ours, base dtype" in ratios else {"ours": ("peft", "compile")}
    return [
        rival for ours, others in rivals.items() for rival in others if ratios[rival] < ratios[ours]
    ]


def cells(row: Row) -> tuple[object, ...]:
    ratios = row["ratios"]
    return (
        *(row[name] for name in ("dtype", "num_rows", "in_features", "out_features", "rank")),
        row["dropout"],
        row["pass"],
        f"{row['frozen_ms']:.3f}",
        f"{row['frozen_tflops']:.3f}",
        *(f"{ratios[name]:.2f}" if name in ratios else "-" for name in RATIOS),
        row["rounds"],
        loss(row),
    )


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    if options.case:
        return options.case
    if options.quick:
        return list(quick())
    everything = options.full or options.device == "cuda"
    return [case for case in grid() if everything or not too_long(case)]


def main() -> None:
    options = options_of(
        __doc__, Case, quick="a dozen cases", full="also cases of seconds a call", seconds=2.0
    )
    allow_many_graphs()
    cases = chosen_cases(options)
    # Compiling takes seconds: static shapes for a few cases, dynamic ones for a grid.
    dynamic = len(cases) > 20
    head = (
        "time / time of the frozen linear in the same round, median; forward records for backward",
        "ours, peft: adapters in fp32; compile and /base: adapters in the base's dtype",
        f"peft: {peft_name()}; compile: {'dynamic' if dynamic else 'static'} shapes",
    )

    def rows_of(case: Case) -> Iterator[Row]:
        return results(case, run_case(case, options.device, options.seconds, dynamic))

    try:
        print_losses(run(options, cases, head, COLUMNS, rows_of, cells))
    except WrongResult as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
