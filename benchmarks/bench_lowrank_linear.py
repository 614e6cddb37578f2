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
import json
import time
from collections.abc import Iterator
from typing import NamedTuple

import peft
import torch
import torch.nn.functional as F
from timing import Candidate, Rounds, Table, machine, progress, time_interleaved
from torch import Tensor, nn

from lowrank_ext import ops, reference
from lowrank_ext.nn import LoRALinear

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SCALING = 2.0

# The whole product of these is the grid, less what takes minutes a case (see `too_long`).
GRID_M = (16, 256, 2048, 8192)
GRID_K = (576, 1024, 2048, 4096)
GRID_RANK = (8, 16, 64)
GRID_DROPOUT = (0.0, 0.05)
GRID_DTYPE = ("bfloat16", "float32")


class Case(NamedTuple):
    num_rows: int
    in_features: int
    out_features: int
    rank: int
    dropout: float
    dtype: str

    @property
    def multiply_adds(self) -> int:
        return self.num_rows * self.in_features * self.out_features

    def __str__(self) -> str:
        m, k, n, r, p, dtype = self
        return f"{dtype} M={m} K={k} N={n} r={r} dropout={p}"


def grid() -> Iterator[Case]:
    product = itertools.product(GRID_DTYPE, GRID_M, GRID_K, GRID_RANK, GRID_DROPOUT)
    for dtype, m, k, rank, dropout in product:
        yield Case(m, k, k, rank, dropout, dtype)


def too_long(case: Case) -> bool:
    """What a CPU grid leaves to --full: seconds a call; and half of them but for the usual rank."""
    whole = 2**33
    limit = 4 * whole if case.dtype == "bfloat16" and case.rank == 16 else whole
    return case.multiply_adds > limit


def quick() -> Iterator[Case]:
    for dtype, dropout in itertools.product(GRID_DTYPE, GRID_DROPOUT):
        yield Case(16, 1024, 1024, 16, dropout, dtype)
        yield Case(2048, 576, 576, 8, dropout, dtype)
        yield Case(2048, 1024, 1024, 16, dropout, dtype)


def parse_case(text: str) -> Case:
    try:
        m, k, n, r, p, dtype = text.split(",")
        case = Case(int(m), int(k), int(n), int(r), float(p), dtype)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a case is M,K,N,r,dropout,dtype, got {text!r}") from None
    if case.dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if min(case[:4]) < 1 or not 0 <= case.dropout <= 1:
        raise argparse.ArgumentTypeError(f"sizes must be positive and dropout in [0, 1]: {text!r}")
    return case


class Data(NamedTuple):
    """What all candidates of a case share. The adapter is held in fp32."""

    x: Tensor
    linear: nn.Linear
    lora_a: Tensor
    lora_b: Tensor
    dout: Tensor


def make_data(case: Case, device: str) -> Data:
    torch.manual_seed(0)
    m, k, n, r, _, name = case
    dtype = DTYPES[name]
    linear = nn.Linear(k, n, bias=False, dtype=dtype, device=device).requires_grad_(False)
    return Data(
        torch.randn(m, k, device=device).to(dtype).requires_grad_(),
        linear,
        torch.randn(r, k, device=device) / k**0.5,
        torch.randn(n, r, device=device) / r**0.5,
        torch.randn(m, n, device=device).to(dtype),
    )


def make_ours(case: Case, data: Data, adapter_dtype: torch.dtype) -> nn.Module:
    module = LoRALinear.from_linear(
        data.linear,
        r=case.rank,
        alpha=SCALING * case.rank,
        dropout=case.dropout,
        adapter_dtype=adapter_dtype,
    )
    with torch.no_grad():
        module.lora_a.copy_(data.lora_a)
        module.lora_b.copy_(data.lora_b)
    return module.train()


def make_peft(case: Case, data: Data, adapter_dtype: torch.dtype) -> nn.Module:
    """PEFT's layer. fp32 adapters are what get_peft_model makes of a half-size base by default."""
    config = peft.LoraConfig(r=case.rank, lora_alpha=SCALING * case.rank, lora_dropout=case.dropout)
    module = peft.tuners.lora.Linear(
        data.linear, "default", config, r=case.rank, lora_alpha=SCALING * case.rank
    )
    lora_a, lora_b = module.lora_A["default"], module.lora_B["default"]
    with torch.no_grad():
        lora_a.to(adapter_dtype).weight.copy_(data.lora_a)
        lora_b.to(adapter_dtype).weight.copy_(data.lora_b)
    return module.train()


class Plain(nn.Module):
    """What one writes without a library."""

    def __init__(self, case: Case, data: Data) -> None:
        super().__init__()
        dtype = DTYPES[case.dtype]
        self.dropout = case.dropout
        self.weight = data.linear.weight
        self.lora_a = nn.Parameter(data.lora_a.to(dtype))
        self.lora_b = nn.Parameter(data.lora_b.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a)
        return F.linear(x, self.weight) + SCALING * F.linear(h, self.lora_b)


def make_candidates(case: Case, data: Data, dynamic: bool) -> dict[str, nn.Module]:
    """By column. Adapters in fp32, as is the default of ours and PEFT's, or in the base's dtype."""
    dtype = DTYPES[case.dtype]
    modules = {
        "frozen": data.linear,
        "ours": make_ours(case, data, torch.float32),
        "peft": make_peft(case, data, torch.float32),
        "compile": torch.compile(Plain(case, data), fullgraph=True, dynamic=dynamic),
    }
    if dtype != torch.float32:
        modules["ours, base dtype"] = make_ours(case, data, dtype)
        modules["peft, base dtype"] = make_peft(case, data, dtype)
    return modules


def as_candidate(module: nn.Module, data: Data) -> Candidate:
    wanted = [data.x, *(p for p in module.parameters() if p.requires_grad)]

    def backward(y: Tensor) -> object:
        return torch.autograd.grad(y, wanted, data.dout)

    return Candidate(lambda: module(data.x), backward)


# Checking: a wrong kernel is not worth a time

CHECKED_ROWS = 32


def check(case: Case, data: Data, modules: dict[str, nn.Module]) -> None:
    """Every candidate's forward without dropout, and the op with dropout, forward and backward.

    Only the first rows are compared: rows are independent, and with a zero gradient elsewhere the
    adapter's gradients are theirs alone.
    """
    rows = slice(0, CHECKED_ROWS)
    weight = data.linear.weight
    adapter = (data.lora_a, data.lora_b)
    truth = _reference(data.x[rows], weight, adapter, data.dout[rows], 0.0, None)
    for name, module in modules.items():
        if name == "frozen":
            continue
        module.eval()
        with torch.no_grad():
            _compare(f"{case}: {name}", {"y": module(data.x)[rows]}, truth)
        module.train()

    seed = torch.tensor([1], device=data.x.device)
    dout = torch.zeros_like(data.dout)
    dout[rows] = data.dout[rows]
    truth = _reference(data.x[rows], weight, adapter, data.dout[rows], case.dropout, seed)
    for dtype in {torch.float32, DTYPES[case.dtype]}:
        lora_a, lora_b = (t.to(dtype).requires_grad_() for t in adapter)
        y = ops.lowrank_linear(
            data.x, weight, None, lora_a, lora_b, scaling=SCALING, dropout_p=case.dropout, seed=seed
        )
        dx, dlora_a, dlora_b = torch.autograd.grad(y, (data.x, lora_a, lora_b), dout)
        got = {"y": y[rows], "dx": dx[rows], "dlora_a": dlora_a, "dlora_b": dlora_b}
        _compare(f"{case}: the op with {dtype} adapters", got, truth)


def _reference(
    x: Tensor,
    weight: Tensor,
    adapter: tuple[Tensor, Tensor],
    dout: Tensor,
    dropout: float,
    seed: Tensor | None,
) -> dict[str, Tensor]:
    wide = [t.detach().double().requires_grad_() for t in (x, *adapter)]
    y = reference.lowrank_linear(
        wide[0], weight.double(), None, *wide[1:], scaling=SCALING, dropout_p=dropout, seed=seed
    )
    grads = torch.autograd.grad(y, wide, dout.double())
    return dict(zip(("y", "dx", "dlora_a", "dlora_b"), (y.detach(), *grads), strict=True))


def _compare(what: str, got: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for name, value in got.items():
        error = (value.double() - truth[name]).abs().max() / truth[name].abs().max()
        limit = 4 * torch.finfo(got["y"].dtype).eps ** (1 if got["y"].element_size() == 2 else 0.8)
        if not error <= limit:
            raise SystemExit(f"{what}: {name} is wrong: relative error {error:.2g} > {limit:.2g}")


# Rows


COLUMNS = (
    ("case", 8),
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
# compile holds its adapters in the base's dtype.
RIVALS = {"ours": ("peft",), "ours, base dtype": ("peft, base dtype", "compile")}


def run_case(case: Case, device: str, budget: float, dynamic: bool) -> Rounds:
    data = make_data(case, device)
    modules = make_candidates(case, data, dynamic)
    check(case, data, modules)
    candidates = {name: as_candidate(module, data) for name, module in modules.items()}
    return time_interleaved(candidates, device, budget)


def results(case: Case, rounds: Rounds) -> Iterator[dict[str, object]]:
    """One for forward, one for forward + backward."""
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


def print_result(table: Table, position: str, result: dict[str, object]) -> None:
    ratios = result["ratios"]
    table.row(
        position,
        result["dtype"],
        result["num_rows"],
        result["in_features"],
        result["out_features"],
        result["rank"],
        result["dropout"],
        result["pass"],
        f"{result['frozen_ms']:.3f}",
        f"{result['frozen_tflops']:.3f}",
        *(f"{ratios[name]:.2f}" if name in ratios else "-" for name in RATIOS),
        result["rounds"],
        f"LOSES to {'; '.join(result['loses_to'])}" if result["loses_to"] else "",
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a dozen cases")
    which.add_argument("--full", action="store_true", help="also cases of seconds a call")
    which.add_argument(
        "--case",
        type=parse_case,
        action="append",
        metavar="M,K,N,r,dropout,dtype",
        help="this case only; may be given several times",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's choice by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per case")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    return parser.parse_args()


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    if options.case:
        return options.case
    if options.quick:
        return list(quick())
    everything = options.full or options.device == "cuda"
    return [case for case in grid() if everything or not too_long(case)]


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    # Every shape may cost a graph of its own; past the limit dynamo would stop compiling.
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    cases = chosen_cases(options)
    # Compiling takes seconds: a graph per shape for a few cases, graphs for any shape in a grid.
    dynamic = len(cases) > 20
    where = machine(options.device)
    print(where)
    print(
        "time / time of the frozen linear in the same round, median; forward records for backward"
    )
    print("ours, peft: adapters in fp32; compile and /base: adapters in the base's dtype")
    print(f"compile: {'dynamic' if dynamic else 'static'} shapes\n")
    table = Table(COLUMNS)
    rows = []
    start = time.perf_counter()
    for index, case in enumerate(cases, 1):
        progress(f"{index}/{len(cases)} {case}, {time.perf_counter() - start:.0f} s so far")
        rounds = run_case(case, options.device, options.seconds, dynamic)
        progress("")
        for result in results(case, rounds):
            print_result(table, f"{index}/{len(cases)}", result)
            rows.append(result)
    lost = sum(bool(row["loses_to"]) for row in rows)
    seconds = time.perf_counter() - start
    print(f"\n{lost} of {len(rows)} rows lose to a baseline; {seconds:.0f} s")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": where, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
