"""`lowrank-ext export-lora`: an adapter as a plain LoRA in PEFT's format."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import lowrank_ext as lr
from lowrank_ext.cli.adapters import find_adapter, find_base, load_adapter
from lowrank_ext.cli.checks import check_at_least
from lowrank_ext.cli.error_lines import warnings_as_lines
from lowrank_ext.cli.errors import as_user_error
from lowrank_ext.cli.files import MEBIBYTE, cannot_write, new_directory, require_free_space
from lowrank_ext.cli.interrupts import sigterm_raises
from lowrank_ext.cli.machine import check_machine
from lowrank_ext.cli.methods import count
from lowrank_ext.cli.models import load_model, resolve_device
from lowrank_ext.cli.results import check_replaceable, write_record

RECORD = "exported_from.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    adapter: Path
    out: Path
    rank: int | None
    model: str | None
    device: str
    threads: int | None

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        if self.rank is not None:
            check_at_least("--rank", self.rank, 1)
        check_machine("auto", self.threads)


def run(options: Options, console: Console) -> None:
    """Loads base and adapter in fp32, writes the branches as products of two factors."""
    options.check()
    adapter = find_adapter(options.adapter)
    base = find_base([adapter], options.model)
    check_replaceable(options.out, RECORD, [str(adapter.directory), base.location])
    device, out = resolve_device(options.device), options.out
    with sigterm_raises():
        console.print(f"loading {base.name} in fp32", markup=False, soft_wrap=True)
        loaded = load_model(base, torch.float32, device)
        before = count(loaded.model.parameters())
        model = load_adapter(loaded.model, adapter)
        with cannot_write(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        added = count(model.parameters()) - before
        require_free_space(out.parent, 8 * added + 16 * MEBIBYTE)  # fp32, at most of rank 2 r
        with new_directory(out) as temporary, warnings_as_lines():
            with as_user_error(f"cannot export {adapter.path}", ValueError, TypeError):
                lr.export_lora(model, temporary, rank=options.rank)
            write_record(
                temporary, RECORD, {"base": Path(base.name).name, "method": adapter.method}
            )
    console.print(f"wrote {out}", markup=False, soft_wrap=True)
