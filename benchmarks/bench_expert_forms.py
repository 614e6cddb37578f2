"""The forms of moe_lowrank_add on a GPU, side by side: where the threshold of plan_experts.h lies.

    LOWRANK_EXT_BENCHMARKS=ON make build               # a library that lets it choose the form
    python benchmarks/bench_expert_forms.py            # minutes on a GPU
    python benchmarks/bench_expert_forms.py --quick
    python benchmarks/bench_expert_forms.py --case 8192,4096,4096,8,2,4,0.05,bfloat16

A case is one training step of one layer as in bench_moe.py; the forms take turns in every round.
Figures are medians over the rounds of time / time of the frozen linear in that round, and of the
dense form's time / the planned one's. A row whose plan is not the fastest form says so.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import bench_moe
import torch
from bench_moe import Case, Data, as_candidate, check, make_data, ours
from command import Row, options_of, run
from timing import Rounds, time_interleaved
from torch import Tensor

import lowrank_ext

# What lowrank_ext_fix_expert_plan (csrc/cuda/experts/fix_expert_plan.cpp) takes.
FORMS = {"planned": -1, "dense": 0, "grouped": 1, "grouped+": 2}


def fix_form(name: str) -> None:
    """Make all later calls take this form; grouped+ has a dense up backward."""
    library = ctypes.CDLL(str(Path(lowrank_ext.__file__).with_name("_C.so")))
    try:
        library.lowrank_ext_fix_expert_plan(FORMS[name])
    except AttributeError:
        raise SystemExit(
            "error: bench_expert_forms: _C.so does not let a benchmark choose the form, build it "
            "with LOWRANK_EXT_BENCHMARKS=ON"
        ) from None


def grid() -> Iterator[Case]:
    for dropout in (0.0, 0.05):
        for num_experts, ranks in ((8, (2, 4, 8, 16, 32, 64)), (16, (2, 8, 32)), (64, (2, 8, 64))):
            for rank in ranks:
                yield Case(8192, 4096, 4096, num_experts, 2, rank, dropout, "bfloat16")
        yield Case(8192, 4096, 4096, 64, 8, 8, dropout, "bfloat16")
        yield Case(8192, 2048, 2048, 8, 2, 4, dropout, "float32")
        yield Case(16, 4096, 4096, 8, 2, 16, dropout, "bfloat16")


def quick() -> Iterator[Case]:
    for dropout in (0.0, 0.05):
        for num_experts, rank in ((8, 2), (8, 16), (16, 32)):
            yield Case(8192, 4096, 4096, num_experts, 2, rank, dropout, "bfloat16")


def in_form(name: str) -> bench_moe.Step:
    """A step of one form; backward takes the same form, as it runs before other candidates."""

    def step(case: Case, data: Data) -> tuple[Tensor, ...]:
        fix_form(name)
        return ours(case, data)

    return step


def run_case(case: Case, budget: float) -> Rounds:
    try:
        for name in FORMS:
            fix_form(name)
            check(case, "cuda")
        data = make_data(case, "cuda")
        steps = {"frozen": bench_moe.STEPS["frozen"]} | {name: in_form(name) for name in FORMS}
        candidates = {name: as_candidate(case, data, step) for name, step in steps.items()}
        return time_interleaved(candidates, "cuda", budget)
    finally:
        fix_form("planned")


def results(case: Case, rounds: Rounds) -> Iterator[Row]:
    """A row for forward, one for forward + backward."""
    for part in ("forward", "both"):
        ratios = {name: rounds.ratio(name, "frozen", part) for name in FORMS}
        best = min(ratios.values())
        yield {
            **case._asdict(),
            "pass": "forward" if part == "forward" else "fwd+bwd",
            "frozen_ms": rounds.median("frozen", part) * 1e3,
            "ratios": ratios,
            "x_dense": rounds.ratio("dense", "planned", part),
            # Tolerates the noise between rounds.
            "plan_is_best": ratios["planned"] <= 1.03 * best,
            "rounds": len(rounds),
        }


COLUMNS = (
    *(("dtype", 8), ("M", 5), ("K", 5), ("N", 5), ("E", 3), ("k", 2), ("r_e", 4), ("drop", 5)),
    *(("pass", 8), ("frozen ms", 10), ("planned", 8), ("dense", 6), ("grouped", 8)),
    *(("grouped+", 9), ("x dense", 8), ("", 0)),
)


def cells(row: Row) -> tuple[object, ...]:
    return (
        *(row[name] for name in ("dtype", "num_tokens", "in_features", "out_features")),
        *(row[name] for name in ("num_experts", "top_k", "rank", "dropout", "pass")),
        f"{row['frozen_ms']:.3f}",
        *(f"{ratio:.2f}" for ratio in row["ratios"].values()),
        f"{row['x_dense']:.2f}",
        "" if row["plan_is_best"] else "the plan is NOT the fastest",
    )


def main() -> None:
    options = options_of(__doc__, Case, quick="six cases", devices=("cuda",))
    if not torch.cuda.is_available():
        print("skipped, no CUDA device: the CPU has one form for each size")
        return
    cases = options.case or list(quick() if options.quick else grid())

    def rows_of(case: Case) -> Iterator[Row]:
        return results(case, run_case(case, options.seconds))

    rows = run(options, cases, (), COLUMNS, rows_of, cells)
    wrong = sum(not row["plan_is_best"] for row in rows)
    print(f"in {wrong} of {len(rows)} rows another form than the planned one is faster")


if __name__ == "__main__":
    main()
