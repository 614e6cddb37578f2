"""A batch of mixed adapters: multi_lowrank_add through MultiLoRALinear, against PEFT's loop.

    python benchmarks/bench_multi.py                      # two minutes on 2 cores
    python benchmarks/bench_multi.py --quick
    python benchmarks/bench_multi.py --case 64,1,8,2048,2048,16,bfloat16

PEFT runs a mixed batch (``adapter_names``) as a loop over the adapters: gather, two linears, scale,
scatter. Each case is the forward of one layer over a frozen linear, without gradients, as PEFT
requires. Candidates take turns in every round. Two figures: of the whole layer, time / time of the
frozen linear; and "branch", the time beyond the frozen linear of the same round, PEFT's over ours.
Rows in which PEFT wins are marked.
"""

import itertools
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import peft
import torch
from command import DTYPES, Row, loss, options_of, print_losses, run
from timing import Candidate, Rounds, time_interleaved
from torch import Tensor, nn

from lowrank_ext import reference
from lowrank_ext.nn import MultiLoRALinear

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
    """PEFT's layer with the adapters in the base's dtype, as in ours."""
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
    """Compare the candidates' outputs, so that only correct kernels are timed."""
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
    """PEFT's time beyond the frozen linear over ours, by medians of the rounds' differences."""
    extra = {
        name: statistics.median(
            layer.forward - base.forward
            for layer, base in zip(rounds.seconds[name], rounds.seconds["frozen"], strict=True)
        )
        for name in ("ours", "peft")
    }
    return extra["peft"] / extra["ours"]


def run_case(case: Case, device: str, budget: float) -> Row:
    data = make_data(case, device)
    candidates = {
        "frozen": Candidate(lambda: data.linear(data.x), lambda y: None),
        "ours": make_ours(data),
        "peft": make_peft(case, data),
    }
    check(case, data, candidates)
    rounds = time_interleaved(candidates, device, budget)
    layer = rounds.ratio("peft", "ours", "forward")
    return {
        **case._asdict(),
        "frozen_ms": rounds.median("frozen", "forward") * 1e3,
        "ours": rounds.ratio("ours", "frozen", "forward"),
        "peft": rounds.ratio("peft", "frozen", "forward"),
        "layer": layer,
        "branch": branch_ratio(rounds),
        "loses_to": ["peft"] if layer < 1 else [],
        "rounds": len(rounds),
    }


def cells(row: Row) -> tuple[object, ...]:
    return (
        *(row[name] for name in ("dtype", "sequences", "length", "adapters")),
        *(row[name] for name in ("in_features", "out_features", "rank")),
        f"{row['frozen_ms']:.3f}",
        *(f"{row[name]:.2f}" for name in ("ours", "peft", "layer", "branch")),
        row["rounds"],
        loss(row),
    )


HEAD = (
    "forward of one layer; B sequences of T tokens, n adapters taking turns",
    "ours, peft: time / time of the frozen linear in the same round, median",
    "layer: peft / ours; branch: the same for what is beyond the frozen linear",
)


@torch.no_grad()
def main() -> None:
    options = options_of(__doc__, Case, quick="four cases")
    cases = options.case or list(quick() if options.quick else grid())

    def rows_of(case: Case) -> list[Row]:
        return [run_case(case, options.device, options.seconds)]

    print_losses(run(options, cases, HEAD, COLUMNS, rows_of, cells))


if __name__ == "__main__":
    main()
