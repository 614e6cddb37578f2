"""The common command line of the benchmarks: cases, options, and the loop over cases."""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
from timing import Table, machine, progress, write_json

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Row = dict[str, Any]


def parse_case(kind: type, text: str) -> Any:
    """A case of the NamedTuple `kind` from its comma-separated fields. Sizes must be positive, but
    those that `kind.may_be_zero` names."""
    fields = get_type_hints(kind)
    parts = text.split(",")
    try:
        values = [read(part) for read, part in zip(fields.values(), parts, strict=True)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"a case is {','.join(fields)}, got {text!r}") from None
    case = kind(*values)
    if case.dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"dtype must be one of {', '.join(DTYPES)}: {text!r}")
    zero = getattr(kind, "may_be_zero", ())
    sizes = [
        value
        for name, value in case._asdict().items()
        if isinstance(value, int) and (value or name not in zero)
    ]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"sizes must be positive: {text!r}")
    if "dropout" in fields and not 0 <= case.dropout <= 1:
        raise argparse.ArgumentTypeError(f"dropout must be in [0, 1]: {text!r}")
    if "top_k" in fields and case.top_k > case.num_experts:
        raise argparse.ArgumentTypeError(f"top_k must be at most num_experts: {text!r}")
    return case


def options_of(
    doc: str,
    kind: type,
    *,
    quick: str,
    full: str | None = None,
    devices: Sequence[str] = ("cpu", "cuda"),
    seconds: float = 4.0,
    more: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> argparse.Namespace:
    """The parsed command line of a benchmark with cases of `kind`. `quick` and `full` are the help
    of these options; without `full` there is no --full. `more` adds a benchmark's own options."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help=quick)
    if full:
        which.add_argument("--full", action="store_true", help=full)
    which.add_argument(
        "--case",
        type=lambda text: parse_case(kind, text),
        action="append",
        metavar=",".join(get_type_hints(kind)),
        help="this case only; may be given several times",
    )
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--threads", type=int, help="of the CPU; torch's choice by default")
    parser.add_argument("--seconds", type=float, default=seconds, help="of timing per case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    more(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def run(
    options: argparse.Namespace,
    cases: Sequence[Any],
    head: Sequence[str],
    columns: Sequence[tuple[str, int]],
    rows_of: Callable[[Any], Iterable[Row]],
    cells_of: Callable[[Row], Sequence[object]],
) -> list[Row]:
    """Measures case by case; prints the machine, the lines of `head` and a table of the rows. The
    JSON file is complete after every case."""
    where = machine(options.device)
    print(where, *head, "", sep="\n")
    table = Table((("case", 8), *columns))
    rows: list[Row] = []
    start = time.perf_counter()
    for index, case in enumerate(cases, 1):
        progress(f"{index}/{len(cases)} {case}, {time.perf_counter() - start:.0f} s so far")
        measured = list(rows_of(case))
        progress("")
        for row in measured:
            table.row(f"{index}/{len(cases)}", *cells_of(row))
        rows += measured
        if options.json:
            write_json(options.json, {"machine": where, "rows": rows})
    print(f"\n{len(rows)} rows in {time.perf_counter() - start:.0f} s")
    return rows


def loss(row: Row) -> str:
    """The last cell of a row, which marks a loss."""
    return f"LOSES to {'; '.join(row['loses_to'])}" if row["loses_to"] else ""


def print_losses(rows: Sequence[Row]) -> None:
    print(f"{sum(bool(row['loses_to']) for row in rows)} of {len(rows)} rows lose to a baseline")
