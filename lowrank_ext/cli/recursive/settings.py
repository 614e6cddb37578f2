"""The settings of an uptraining, which are checked before anything is loaded."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_ext.cli.checks import check_at_least, check_choice, check_positive
from lowrank_ext.cli.data.sources import check_source
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.files import require_directory
from lowrank_ext.cli.machine import check_machine
from lowrank_ext.cli.typed import check_types
from lowrank_ext.files import quoted
from lowrank_ext.methods.recursive.losses import LOSSES


@dataclass(frozen=True, kw_only=True)
class UptrainSettings:
    """Everything that determines the results of a run; stored as settings.json for --resume."""

    directory: str
    teacher: str | None
    text: tuple[str, ...]
    field: str
    steps: int
    batch: int
    seq_len: int
    lr: float
    loss: str
    exits: float
    exit_loss: str
    exit_warm_up: int
    dtype: str
    seed: int
    threads: int | None
    eval_batches: int
    save_every: int

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        for option, value, least in (
            ("--steps", self.steps, 1),
            ("--batch", self.batch, 1),
            ("--seq-len", self.seq_len, 2),
            ("--eval-batches", self.eval_batches, 1),
            ("--save-every", self.save_every, 0),
            ("--exit-warm-up", self.exit_warm_up, 0),
        ):
            check_at_least(option, value, least)
        check_at_least("--seed", self.seed, 0, most=2**40)
        check_positive("--lr", self.lr)
        if not 0 <= self.exits < math.inf:
            raise UserError(f"--exits must be at least 0 and finite, got {self.exits}")
        if self.exit_warm_up and not self.exits:
            raise UserError("--exit-warm-up is of no use without --exits above 0; leave it out")
        check_choice("--loss", self.loss, LOSSES)
        check_choice("--exit-loss", self.exit_loss, LOSSES)
        if self.loss == "ce" and self.teacher is not None:
            raise UserError("--teacher is of no use with --loss ce; leave it out")
        check_machine(self.dtype, self.threads)
        require_directory(self.directory, Path(self.directory))
        for path in self.text:
            check_source("--text", path)

    def learning_rate(self, method: str) -> float:
        """--lr."""
        return self.lr

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "UptrainSettings":
        """The settings of `to_dict`. Raises UserError for those of another version or command, and
        for values of another type."""
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            odd = quoted(sorted(set(values) ^ known))[1:-1]
            raise UserError(
                f"settings.json is not from recursive uptrain of this version of lowrank-ext: {odd}"
            )
        check_types(cls, values, "settings.json")
        return cls(**{**values, "text": tuple(values["text"])})
