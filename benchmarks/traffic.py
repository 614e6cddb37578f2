"""Memory traffic of the CUDA kernels as the SIMT executor counts it: `make traffic`. Needs no GPU.

    python benchmarks/traffic.py                    # every kernel of a training step, bf16 first
    python benchmarks/traffic.py --kinds bf16 --rows 1024 --in-features 1024 --out-features 1024

Runs csrc/cuda under tests/simt at one shape per compute type. Registers are nvcc's, the most that
any variant of a kernel takes on any architecture of _C.so.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cuda_binary
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowrank_ext import _build_info

ROOT = Path(__file__).resolve().parents[1]
Report = Mapping[str, Any]
Compiled = dict[tuple[str, str, int], int]  # registers by family, compute type and threads

# dtype of x and adapters, allow_tf32, and the compute type of the kernels.
KINDS = {
    "bf16": (torch.bfloat16, False, "Bf16"),
    "fp16": (torch.float16, False, "Fp16"),
    "tf32": (torch.float32, True, "Tf32"),
    "fp32": (torch.float32, False, "Fp32"),
    "fp64": (torch.float64, False, "Fp64"),
}

# Partial sums between kernels.
WORKSPACES = {"g", "p", "partials", "z", "dw"}
# Streams, a byte of which counts each time it is asked for: [M, K] and [M, N] tensors and
# workspaces. Everything else has at most r rows or columns and stays in L2 once it was read.
STREAMS = WORKSPACES | {"x", "dout", "large", "source", "base", "out"}
NOTE = """\
moved      bytes that cross device memory. [M, K] and [M, N] tensors and partial sums count each
           time they are asked for; adapter tensors, h and dh, which blocks read again from L2, once
needed     every argument once; partial sums only where they are read
asked      all bytes that are asked for, each time
sectors    32-byte sectors per request of a warp; sector B / B: their bytes over those asked for
           (lanes that read the same element count it once each)
conflicts  wavefronts of shared memory beyond those that the accesses' width needs, of all
registers  the most that any variant of the kernel takes for this kind, on any architecture\
"""


# ExpertPlan of csrc/cuda/experts/plan_experts.h: grouped, dense_up_backward.
DENSE, GROUPED, GROUPED_DENSE_UP = (False, False), (True, False), (True, True)


LARGE_EXPERTS, LARGE_EXPERT_RANK = 16, 32


class Sizes(NamedTuple):
    num_rows: int
    in_features: int
    out_features: int
    rank: int
    dropout: float
    num_experts: int = 8
    top_k: int = 2
    num_adapters: int = 8

    @property
    def expert_rank(self) -> int:
        """The experts share the rank among them."""
        return max(1, self.rank // self.num_experts)


def load_simt() -> Any:
    sys.path.insert(0, str(ROOT / "build" / "simt"))
    try:
        import _simt
    except ImportError:
        raise SystemExit(
            "error: traffic: the SIMT executor is not built, run `make simt`"
        ) from None
    return _simt


def values(kind: str, *shape: int) -> Tensor:
    return torch.randn(shape).to(KINDS[kind][0])


def step_tensors(sizes: Sizes, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, dout and base_out."""
    torch.manual_seed(0)
    m, k, n = sizes[:3]
    return values(kind, m, k), values(kind, m, n), values(kind, m, n)


def launches_of(simt: Any, call: Callable[[], Any]) -> tuple[Any, list[Report]]:
    """What the call returns, and its launches."""
    simt.clear_reports()
    return call(), simt.reports()


def run_step(simt: Any, sizes: Sizes, kind: str) -> tuple[list[Report], list[Report]]:
    """The launches of a forward and of a backward with every gradient, through lowrank_add."""
    x, dout, base = step_tensors(sizes, kind)
    _, k, n, r, p = sizes[:5]
    adapter = (values(kind, r, k), values(kind, n, r), None, None, None)
    options = (2.0, p, torch.tensor([1]), KINDS[kind][1])
    ops = torch.ops.lowrank_ext_simt
    (_, h), forward = launches_of(simt, lambda: ops.lowrank_add(base, x, *adapter, *options))
    needs = (True, True, True, False, False, False)
    _, backward = launches_of(
        simt, lambda: ops.lowrank_add_backward(dout, x, h, *adapter, *options, *needs)
    )
    return forward, backward


def run_moe_step(
    simt: Any, sizes: Sizes, kind: str, form: tuple[bool, bool] | None = None
) -> tuple[list[Report], list[Report]]:
    """The same through moe_lowrank_add, with a mask for each expert; form: in place of the plan."""
    simt.host.fix_expert_plan(*form) if form else simt.host.plan_experts_by_sizes()
    x, dout, base = step_tensors(sizes, kind)
    k, n, experts, rank = sizes[1], sizes[2], sizes.num_experts, sizes.expert_rank
    shapes = (experts, k), (experts, rank, k), (experts, n, rank)
    weights = tuple(values(kind, *shape) for shape in shapes)
    options = (2.0, sizes.dropout, torch.tensor([1]), False, None)
    ops = torch.ops.lowrank_ext_simt
    (_, h, probs, ids, gates, loss, counts), forward = launches_of(
        simt, lambda: ops.moe_lowrank_add(base, x, *weights, sizes.top_k, *options)
    )
    saved = (h, probs, ids, gates, counts)
    _, backward = launches_of(
        simt,
        lambda: ops.moe_lowrank_add_backward(
            dout, loss, x, *weights, *saved, *options, *[True] * 4
        ),
    )
    return forward, backward


def run_routing(simt: Any, sizes: Sizes, kind: str) -> list[Report]:
    """The launches of moe_route and its backward."""
    torch.manual_seed(0)
    logits = values(kind, sizes.num_rows, sizes.num_experts)
    ops = torch.ops.lowrank_ext_simt

    def step() -> None:
        weights, ids, counts, loss, *_ = ops.moe_route(logits, sizes.top_k, None)
        upstream = torch.ones_like(weights), torch.ones_like(loss)
        ops.moe_route_backward(*upstream, logits, ids, counts, None)

    return launches_of(simt, step)[1]


def run_segments(simt: Any, sizes: Sizes, kind: str) -> list[Report]:
    """The launches of multi_lowrank_add, rows taking turns at the adapters, and its backward."""
    x, dout, base = step_tensors(sizes, kind)
    m, k, n, r, p = sizes[:5]
    adapters = sizes.num_adapters
    ids, scaling = torch.arange(m) % adapters, torch.ones(adapters)
    rest = (values(kind, adapters, r, k), values(kind, adapters, n, r), ids, scaling, None)
    options = (p, torch.tensor([1]))
    ops = torch.ops.lowrank_ext_simt

    def step() -> None:
        _, h = ops.multi_lowrank_add(base, x, *rest, *options)
        ops.multi_lowrank_add_backward(dout, x, h, *rest, *options, True, True, True)

    return launches_of(simt, step)[1]


# What a report says


def moved(report: Report) -> int:
    read = sum(
        tensor["bytes_read" if tensor["name"] in STREAMS else "unique_bytes_read"]
        for tensor in report["tensors"]
    )
    return read + report["bytes_written"]


def partial_sums_read(report: Report) -> int:
    """Bytes that the kernel before wrote: less to move if they are still in L2."""
    return sum(t["bytes_read"] for t in report["tensors"] if t["name"] in WORKSPACES)


def requested(report: Report) -> int:
    return report["bytes_read"] + report["bytes_written"]


def needed(report: Report) -> int:
    return sum(
        bool(tensor["bytes_read"]) * tensor["bytes"]
        + bool(tensor["bytes_written"] and tensor["name"] not in WORKSPACES) * tensor["bytes"]
        for tensor in report["tensors"]
    )


def sector_share(report: Report) -> float:
    """Bytes of the sectors touched over bytes asked for."""
    return 32 * (report["sectors_read"] + report["sectors_written"]) / requested(report)


def conflicts(report: Report) -> str:
    if not report["shared_requests"]:
        return "-"
    return f"{report['shared_conflicts'] / report['shared_wavefronts']:.1%}"


def needed_by_pass(sizes: Sizes, element_bytes: int) -> tuple[int, int]:
    """Forward: x, h, base, y and the branch's weights. Backward: the passes over dout, x and dx,
    with the weights, their gradients, h and dh."""
    m, k, n, r = sizes[:4]
    weights = r * (k + n)
    forward = m * k + m * r + 2 * m * n + weights
    backward = m * n + 2 * m * k + 2 * m * r + 2 * weights
    return forward * element_bytes, backward * element_bytes


def needed_by_experts(sizes: Sizes, element_bytes: int) -> tuple[int, int]:
    """The router's columns too."""
    rank = sizes.num_experts * (sizes.expert_rank + 1)
    return needed_by_pass(sizes._replace(rank=rank), element_bytes)


# Registers


def compiled_registers() -> Compiled:
    """Empty where _C.so has no kernels to read."""
    if not _build_info.CUDA_ARCHS or cuda_binary.why_unreadable() is not None:
        return {}
    library = ROOT / "lowrank_ext" / "_C.so"
    bounds = cuda_binary.launch_bounds(library)
    names = cuda_binary.names(bounds)
    found: Compiled = {}
    for arch in _build_info.CUDA_ARCHS:
        for mangled, used in cuda_binary.resources(library, arch).items():
            name = names[mangled]
            key = (name.family, name.compute_type, bounds[mangled].threads)
            found[key] = max(found.get(key, 0), used.registers)
    return found


def registers(report: Report, compute_type: str, compiled: Compiled) -> str:
    """Of a kernel that this type has no variant of, such as one of integers, the most that any
    takes."""
    kernel, threads = f"{report['kernel']}_kernel", report["block"][0]
    if (kernel, compute_type, threads) in compiled:
        return str(compiled[kernel, compute_type, threads])
    own = (kernel, threads)
    return str(max((used for (f, _, t), used in compiled.items() if (f, t) == own), default="-"))


# The table


COLUMNS = (
    *("moved KB", "needed KB", "ratio", "asked KB", "sectors", "sector B / B"),
    *("conflicts", "barriers", "mma", "registers", "shared KiB"),
)


def make_table() -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("kernel", no_wrap=True)
    table.add_column("kind")
    for title in COLUMNS:
        table.add_column(title, justify="right", min_width=max(map(len, title.split())))
    return table


def add_launch(table: Table, kind: str, report: Report, used: str) -> None:
    table.add_row(
        report["kernel"],
        kind,
        f"{moved(report) / 1e3:.0f}",
        f"{needed(report) / 1e3:.0f}",
        f"{moved(report) / needed(report):.3f}",
        f"{requested(report) / 1e3:.0f}",
        f"{report['sectors_per_request']:.1f}",
        f"{sector_share(report):.3f}",
        conflicts(report),
        f"{report['barriers_per_block']:.0f}",
        str(report["mma"]),
        used,
        f"{report['shared_bytes'] / 1024:.1f}",
    )


def add_pass(table: Table, name: str, kind: str, reports: Sequence[Report], wanted: int) -> None:
    total = sum(map(moved, reports))
    row = (f"{total / 1e3:.0f}", f"{wanted / 1e3:.0f}", f"{total / wanted:.3f}")
    asked = sum(map(requested, reports))
    table.add_row(f"all of {name}", kind, *row, f"{asked / 1e3:.0f}", style="bold")
    if reread := sum(map(partial_sums_read, reports)):
        in_l2 = total - reread
        row = (f"{in_l2 / 1e3:.0f}", f"{wanted / 1e3:.0f}", f"{in_l2 / wanted:.3f}")
        table.add_row("  partial sums kept in L2", kind, *row)
    table.add_section()


def rows_of(simt: Any, sizes: Sizes, kind: str) -> Iterator[tuple[str, list[Report], int]]:
    """(pass, its launches, bytes needed)."""
    forward, backward = run_step(simt, sizes, kind)
    wanted = needed_by_pass(sizes, KINDS[kind][0].itemsize)
    yield "forward", forward, wanted[0]
    yield "backward", backward, wanted[1]
    large = sizes._replace(rank=LARGE_EXPERTS * LARGE_EXPERT_RANK, num_experts=LARGE_EXPERTS)
    for name, of, form in (
        ("dense moe", sizes, DENSE),
        ("grouped moe", sizes, GROUPED_DENSE_UP),
        ("large grouped moe", large, GROUPED),
    ):
        forward, backward = run_moe_step(simt, of, kind, form)
        wanted = needed_by_experts(of, KINDS[kind][0].itemsize)
        yield f"{name} forward", forward, wanted[0]
        yield f"{name} backward", backward, wanted[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--in-features", type=int, default=1024)
    parser.add_argument("--out-features", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--sms", type=int, default=4, help="multiprocessors that plans count on")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    sizes = Sizes(
        options.rows,
        options.in_features,
        options.out_features,
        options.rank,
        options.dropout,
        options.experts,
        options.top_k,
        options.adapters,
    )
    simt = load_simt()
    simt.host.set_num_sms(options.sms)
    start = time.perf_counter()
    compiled = compiled_registers()
    table = make_table()
    for kind in options.kinds:
        compute_type = KINDS[kind][2]
        for name, reports, wanted in rows_of(simt, sizes, kind):
            for report in reports:
                add_launch(table, kind, report, registers(report, compute_type, compiled))
            add_pass(table, name, kind, reports, wanted)
        statistics = "Fp32" if compute_type == "Tf32" else compute_type  # no products
        for report in run_routing(simt, sizes, kind):
            add_launch(table, kind, report, registers(report, statistics, compiled))
        table.add_section()
        if compute_type == "Tf32":
            continue  # multi_lowrank_add never takes it
        for report in run_segments(simt, sizes, kind):
            add_launch(table, kind, report, registers(report, compute_type, compiled))
        table.add_section()
    m, k, n, r, p, experts, top_k, adapters = sizes
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(f"lowrank_add, M={m} K={k} N={n} r={r} dropout={p}, {options.sms} SMs")
    console.print(
        f"moe_lowrank_add, {experts} experts of rank {sizes.expert_rank}, k={top_k}; large: "
        f"{LARGE_EXPERTS} of rank {LARGE_EXPERT_RANK}"
    )
    console.print(f"moe_route, T={m} E={experts} k={top_k}")
    console.print(f"multi_lowrank_add, n={adapters}, else as lowrank_add")
    console.print(table)
    console.print(NOTE, highlight=False)
    if not compiled:
        reason = cuda_binary.why_unreadable() or "_C.so was built without nvcc"
        console.print(f"no registers: {reason}")
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
