"""`lowrank-ext recursive convert`: folds a model into loops and writes a directory."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import lowrank_ext as lr
from lowrank_ext.cli.checks import check_at_least, check_choice
from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.files import (
    MEBIBYTE,
    cannot_write,
    exists,
    new_directory,
    require_directory,
    require_free_space,
)
from lowrank_ext.cli.machine import check_machine
from lowrank_ext.cli.models import dtype_name, find_model, is_recursive, load_model, resolve_dtype
from lowrank_ext.cli.recursive.models import SOURCE, num_bytes, numel, write_source
from lowrank_ext.cli.report import human_count
from lowrank_ext.cli.targets import parse_targets
from lowrank_ext.methods.recursive.config import LORA_STARTS, TIED_STARTS


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    model: str | None
    loops: int
    rank: int
    init: str
    lora_init: str | None
    targets: str
    dtype: str
    seed: int
    threads: int | None
    out: Path

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        check_at_least("--loops", self.loops, 1)
        check_at_least("--rank", self.rank, 0)
        check_at_least("--seed", self.seed, 0, most=2**40)
        check_choice("--init", self.init, TIED_STARTS)
        if self.lora_init is not None:
            check_choice("--lora-init", self.lora_init, LORA_STARTS)
            if self.rank == 0:
                raise UserError(
                    f"--lora-init {self.lora_init} needs adapters: give a --rank above 0, got 0"
                )
        if self.targets != "all-linear" and self.rank == 0:
            raise UserError(
                f"--targets {self.targets} needs adapters: give a --rank above 0, got 0"
            )
        if not self.targets.strip():
            raise UserError(
                "--targets must be all-linear, names separated by commas, or a regular expression"
            )
        check_machine(self.dtype, self.threads)
        _check_replaceable(self.out)

    def config(self) -> lr.recursive.RecursiveConfig:
        """What they say about the model."""
        with as_user_error("cannot convert", ValueError, TypeError):
            return lr.recursive.RecursiveConfig(
                num_loops=self.loops,
                init=self.init,
                rank=self.rank,
                lora_init=self.lora_init or "svd",
                targets=parse_targets(self.targets),
            )


# What transformers writes of a model and its tokenizer, and our record of the source.
_WRITTEN = {SOURCE, "config.json", "generation_config.json", "model.safetensors.index.json"}
_WRITTEN |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
_WRITTEN |= {"added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"}
_WRITTEN |= {"chat_template.jinja", "chat_template.json"}


def _check_replaceable(out: Path) -> None:
    """Raises UserError unless the directory is new, empty, or a converted model's alone."""
    what = f"--out {out}"
    if not exists(what, out):
        return
    require_directory(what, out)
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return
    others = [n for n in names if n not in _WRITTEN and not fnmatch(n, "model*.safetensors")]
    if others or not is_recursive(out):
        got = f"; it holds {others[0]}" if others else ""
        raise UserError(
            f"{what}: must be new, empty, or hold a converted model, which is replaced{got}"
        )


def run(options: Options, console: Console) -> None:
    """Loads, converts, writes; prints what is stored."""
    options.check()
    config = options.config()
    source = find_model(options.model)
    dtype = resolve_dtype(options.dtype)
    console.print(f"loading {source.name} in {dtype_name(dtype)}", markup=False)
    loaded = load_model(source, dtype)
    model = loaded.model.eval()
    before = numel(model), num_bytes(model)
    torch.manual_seed(options.seed)
    with (
        _progress(console) as on_layer,
        as_user_error(f"cannot convert {source.name}", ValueError, TypeError),
    ):
        lr.recursive.convert(model, config, on_layer=on_layer)
    _write(model, loaded.tokenizer, options)
    _describe(console, model, before)
    console.print(f"wrote {options.out}", markup=False, soft_wrap=True)


def _write(model: Any, tokenizer: Any, options: Options) -> None:
    out = options.out
    with cannot_write(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(out.parent, num_bytes(model) + 16 * MEBIBYTE)
    with new_directory(out) as temporary:
        save(model, tokenizer, temporary)
        write_source(temporary, options.model)


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes model and tokenizer into a directory."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _describe(console: Console, model: Any, before: tuple[int, int]) -> None:
    after = numel(model), num_bytes(model)
    console.print(lr.recursive.summary(model))
    console.print(
        f"stored: {human_count(after[0])} parameters, {after[1] / MEBIBYTE:,.1f} MiB; source: "
        f"{human_count(before[0])} parameters, {before[1] / MEBIBYTE:,.1f} MiB; "
        f"{after[1] / before[1]:.0%}",
        markup=False,
        soft_wrap=True,
    )


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar over the layers on a terminal, else a line for each quarter."""
    if not console.is_terminal:
        yield lambda done, total: _line(console, done, total)
        return
    columns: list[Any] = [TextColumn("layers"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("layers", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line(console: Console, done: int, total: int) -> None:
    if done == total or done % math.ceil(total / 4) == 0:
        console.print(f"layer {done}/{total}", markup=False)
