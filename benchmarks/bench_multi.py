"""A batch of mixed adapters: multi_lowrank_add through MultiLoRALinear, against PEFT's loop.

    python benchmarks/bench_multi.py                      # two minutes on 2 cores
    python benchmarks/bench_multi.py --quick
    python benchmarks/bench_multi.py --case 64,1,8,2048,2048,16,bfloat16

PEFT runs a mixed batch (``adapter_names``) as a loop over the adapters: gather, two linears, scale,
scatter. Each case is the forward of one layer over a frozen linear, without gradients, as PEFT
allows it. Candidates take turns in every round. Two figures: the layer as a whole, time / time of
the frozen linear; and "branch", what the layer takes beyond the frozen linear of its round, PEFT's
over ours. Rows in which PEFT wins are marked.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import peft
import torch
from timing import Candidate, Rounds, Table, machine, progress, time_interleaved
from torch import Tensor, nn

from lowrank_ext import reference
from lowrank_ext.nn import MultiLoRALinear

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SCALING = 2.0


class Case(NamedTuple):
    sequences: int
    length: int  # tokens of each: 1 is a decoding step
    adapters: int
    in_features: int
    out_features: int
    rank: int
    dtype: str

    def __str__(self) -> str:
        b, t, n, k, out, r, dtype = self
        return f"{dtype} {b} sequences of {t}, {n} adapters, K={k} N={out} r={r}"


def grid() -> Iterator[Case]:
    for dtype, k in itertools.product(("bfloat16", "float32"), (1024, 2048)):
        for sequences, length, adapters in ((8, 1, 8), (64, 1, 8), (64, 1, 64), (64, 1, 1)):
            yield Case(sequences, length, adapters, k, k, 16, dtype)
        yield Case(8, 128, 4, k, k, 16, dtype)


def quick() -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        yield Case(64, 1, 8, 2048, 2048, 16, dtype)
        yield Case(8, 64, 4, 1024, 1024, 16, dtype)


def parse_case(text: str) -> Case:
    try:
        *sizes, dtype = text.split(",")
        case = Case(*map(int, sizes), dtype)
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"a case is sequences,length,adapters,K,N,r,dtype, got {text!r}"
        ) from None
    if case.dtype not in DTYPES or min(case[:-1]) < 1:
        raise argparse.ArgumentTypeError(
            f"sizes must be positive and dtype one of {', '.join(DTYPES)}, got {text!r}"
        )
    return case


class Data(NamedTuple):
    x: Tensor  # [sequences, length, K]
    linear: nn.Linear
    lora_a: Tensor  # [adapters, r, K], fp32
    lora_b: Tensor
    of_sequence: list[int]  # adapters take turns


def make_data(case: Case, device: str) -> Data:
    torch.manual_seed(0)
    b, t, n, k, out, r, name = case
    dtype = DTYPES[name]
    return Data(
        torch.randn(b, t, k, device=device).to(dtype),
        nn.Linear(k, out, bias=False, dtype=dtype, device=device).requires_grad_(False),
        torch.randn(n, r, k, device=device) / k**0.5,
        torch.randn(n, out, r, device=device) / r**0.5,
        [i % n for i in range(b)],
    )


def make_ours(data: Data) -> Candidate:
    layer = MultiLoRALinear.from_linear(data.linear)
    for i, (lora_a, lora_b) in enumerate(zip(data.lora_a, data.lora_b, strict=True)):
        layer.add(str(i), lora_a, lora_b, SCALING)
    ids = torch.tensor(data.of_sequence, device=data.x.device)
    rows = ids[:, None].expand(data.x.shape[:2])
    return Candidate(lambda: layer(data.x, rows), lambda y: None)


def make_peft(case: Case, data: Data) -> Candidate:
    """PEFT's layer with the adapters in the base's dtype, as ours holds them."""
    config = peft.LoraConfig(r=case.rank, lora_alpha=SCALING * case.rank)
    options = {"r": case.rank, "lora_alpha": SCALING * case.rank}
    layer = peft.tuners.lora.Linear(data.linear, "0", config, **options)
    for i in range(case.adapters):
        if i:
            layer.update_layer(str(i), config=config, **options)
        lora_a, lora_b = layer.lora_A[str(i)], layer.lora_B[str(i)]
        lora_a.to(data.x.dtype).weight.copy_(data.lora_a[i])
        lora_b.to(data.x.dtype).weight.copy_(data.lora_b[i])
    layer.eval()
    names = [str(i) for i in data.of_sequence]
    return Candidate(lambda: layer(data.x, adapter_names=names), lambda y: None)


def check(case: Case, data: Data, candidates: dict[str, Candidate]) -> None:
    """A wrong kernel is not worth a time."""
    ids = torch.tensor(data.of_sequence, device=data.x.device)[:, None].expand(data.x.shape[:2])
    wide = (data.x.double(), data.lora_a.to(data.x.dtype), data.lora_b.to(data.x.dtype))
    base_out = data.x.double() @ data.linear.weight.double().T
    scaling = torch.full((case.adapters,), SCALING, device=data.x.device)
    truth = reference.multi_lowrank_add(base_out, *wide, ids, scaling)
    for name in ("ours", "peft"):
        error = (candidates[name].forward().double() - truth).abs().max() / truth.abs().max()
        limit = 4 * torch.finfo(data.x.dtype).eps ** (1 if data.x.element_size() == 2 else 0.8)
        if not error <= limit:
            raise SystemExit(f"{case}: {name} is wrong: relative error {error:.2g} > {limit:.2g}")


COLUMNS = (
    ("case", 6),
    ("dtype", 8),
    ("B", 4),
    ("T", 4),
    ("n", 3),
    ("K", 5),
    ("N", 5),
    ("r", 4),
    ("frozen ms", 10),
    ("ours", 6),
    ("peft", 6),
    ("layer", 7),
    ("branch", 7),
    ("rounds", 6),
    ("", 0),
)


def branch_ratio(rounds: Rounds) -> float:
    """PEFT's time beyond the frozen linear over ours, medians of the differences by round."""
    extra = {
        name: statistics.median(
            layer.forward - base.forward
            for layer, base in zip(rounds.seconds[name], rounds.seconds["frozen"], strict=True)
        )
        for name in ("ours", "peft")
    }
    return extra["peft"] / extra["ours"]


def run_case(case: Case, device: str, budget: float) -> dict[str, object]:
    data = make_data(case, device)
    candidates = {
        "frozen": Candidate(lambda: data.linear(data.x), lambda y: None),
        "ours": make_ours(data),
        "peft": make_peft(case, data),
    }
    check(case, data, candidates)
    rounds = time_interleaved(candidates, device, budget)
    return {
        **case._asdict(),
        "frozen_ms": rounds.median("frozen", "forward") * 1e3,
        "ours": rounds.ratio("ours", "frozen", "forward"),
        "peft": rounds.ratio("peft", "frozen", "forward"),
        "layer": rounds.ratio("peft", "ours", "forward"),
        "branch": branch_ratio(rounds),
        "rounds": len(rounds),
    }


def print_result(table: Table, position: str, case: Case, result: dict[str, object]) -> None:
    b, t, n, k, out, r, dtype = case
    figures = (f"{result[name]:.2f}" for name in ("ours", "peft", "layer", "branch"))
    lost = "LOSES to peft" if result["layer"] < 1 else ""
    frozen = f"{result['frozen_ms']:.3f}"
    table.row(position, dtype, b, t, n, k, out, r, frozen, *figures, result["rounds"], lost)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="four cases")
    which.add_argument(
        "--case",
        type=parse_case,
        action="append",
        metavar="B,T,n,K,N,r,dtype",
        help="this case only; may be given several times",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's choice by default")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per case")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = options.case or list(quick() if options.quick else grid())
    where = machine(options.device)
    print(where)
    print("forward of one layer; B sequences of T tokens, n adapters taking turns")
    print("ours, peft: time / time of the frozen linear in the same round, median")
    print("layer: peft / ours; branch: the same for what is beyond the frozen linear\n")
    table = Table(COLUMNS)
    rows = []
    for index, case in enumerate(cases, 1):
        progress(f"{index}/{len(cases)} {case}")
        result = run_case(case, options.device, options.seconds)
        progress("")
        print_result(table, f"{index}/{len(cases)}", case, result)
        rows.append(result)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": where, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
