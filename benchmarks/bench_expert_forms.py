"""The forms of moe_lowrank_add on a GPU, side by side: where the threshold of plan_experts.h lies.

    python benchmarks/bench_expert_forms.py            # minutes on a GPU
    python benchmarks/bench_expert_forms.py --quick
    python benchmarks/bench_expert_forms.py --case 8192,4096,4096,8,2,4,0.05,bfloat16

A case is one training step of one layer as in bench_moe.py; the forms take turns in every round.
Figures are medians over the rounds of time / time of the frozen linear in that round, and of the
dense form's time / the planned one's. A row whose plan is not the fastest form says so.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Iterator
from pathlib import Path

import bench_moe
import torch
from bench_moe import Case, Data, as_candidate, check, make_data, ours, parse_case
from timing import Rounds, Table, machine, progress, time_interleaved
from torch import Tensor

import lowrank_ext

# What lowrank_ext_fix_expert_plan (csrc/cuda/moe_lowrank_add.cu) takes.
FORMS = {"planned": -1, "dense": 0, "grouped": 1, "grouped+": 2}


def fix_form(name: str) -> None:
    """Every call takes this form from here on; grouped+ has a dense up backward."""
    library = Path(lowrank_ext.__file__).with_name("_C.so")
    ctypes.CDLL(str(library)).lowrank_ext_fix_expert_plan(FORMS[name])


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
    """Its backward follows before any other candidate's turn, and so takes the same form."""

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


def results(case: Case, rounds: Rounds) -> Iterator[dict[str, object]]:
    """One for forward, one for forward + backward."""
    for part in ("forward", "both"):
        ratios = {name: rounds.ratio(name, "frozen", part) for name in FORMS}
        best = min(ratios.values())
        yield {
            **case._asdict(),
            "pass": "forward" if part == "forward" else "fwd+bwd",
            "frozen_ms": rounds.median("frozen", part) * 1e3,
            "ratios": ratios,
            "x_dense": rounds.ratio("dense", "planned", part),
            # Within the noise of a round the plan is right.
            "plan_is_best": ratios["planned"] <= 1.03 * best,
            "rounds": len(rounds),
        }


COLUMNS = (
    *(("dtype", 8), ("M", 5), ("K", 5), ("N", 5), ("E", 3), ("k", 2), ("r_e", 4), ("drop", 5)),
    *(("pass", 8), ("frozen ms", 10), ("planned", 8), ("dense", 6), ("grouped", 8)),
    *(("grouped+", 9), ("x dense", 8), ("", 0)),
)


def print_result(table: Table, result: dict[str, object]) -> None:
    table.row(
        *(result[name] for name in ("dtype", "num_tokens", "in_features", "out_features")),
        *(result[name] for name in ("num_experts", "top_k", "rank", "dropout", "pass")),
        f"{result['frozen_ms']:.3f}",
        *(f"{ratio:.2f}" for ratio in result["ratios"].values()),
        f"{result['x_dense']:.2f}",
        "" if result["plan_is_best"] else "the plan is NOT the fastest",
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="six cases")
    which.add_argument(
        "--case",
        type=parse_case,
        action="append",
        metavar="M,K,N,E,k,r_e,dropout,dtype",
        help="this case only; may be given several times",
    )
    parser.add_argument("--device", choices=("cuda",), default="cuda")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per case")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("bench_expert_forms: the CPU has one form for each size; this needs a GPU")
    cases = options.case or list(quick() if options.quick else grid())
    where = machine("cuda")
    print(where)
    table = Table(COLUMNS)
    rows = []
    start = time.perf_counter()
    for index, case in enumerate(cases, 1):
        progress(f"{index}/{len(cases)} {case}, {time.perf_counter() - start:.0f} s so far")
        rounds = run_case(case, options.seconds)
        progress("")
        for result in results(case, rounds):
            print_result(table, result)
            rows.append(result)
    wrong = sum(not row["plan_is_best"] for row in rows)
    print(f"\nin {wrong} of {len(rows)} rows another form than the planned one is faster")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": where, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
