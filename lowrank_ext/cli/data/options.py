"""The options that say what a command reads."""

from dataclasses import dataclass, fields
from typing import Any, Self

from lowrank_ext.cli.checks import check_at_least, check_choice
from lowrank_ext.cli.data.chat import TRAIN_ON
from lowrank_ext.cli.data.formats import FORMATS
from lowrank_ext.cli.data.sources import check_source
from lowrank_ext.cli.errors import UserError

PACKING = ("auto", "on", "off")


@dataclass(frozen=True)
class DataOptions:
    """The options that say what a command reads, and what of it it trains on.

    Attributes:
        text: files, directories, datasets; without one Python's language topics.
        eval: the same for evaluation; without one a validation split, or a part of `text`.
        field: the key of plain text.
        seq_len: the most tokens of a row.
        train_on: auto, all, completion or assistant.
        packing: auto, on or off.
        format: auto, or that of all records.
        eval_split: part of `text` that is held out, in place of its own validation split; 0: none,
            and None: a tenth where nothing else is there for evaluation.
        max_rows: the most records of `text`, and of `eval`, that are read.
    """

    text: tuple[str, ...]
    eval: tuple[str, ...] = ()
    field: str = "text"
    seq_len: int = 256
    train_on: str = "auto"
    packing: str = "auto"
    format: str = "auto"
    eval_split: float | None = None
    max_rows: int | None = None

    @classmethod
    def of(cls, settings: Any) -> Self:
        """Those that a run's settings hold under the same names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        check_at_least("--seq-len", self.seq_len, 2)
        if self.max_rows is not None:
            check_at_least("--max-rows", self.max_rows, 1)
        self._check_split()
        for option, value, known in (
            ("--train-on", self.train_on, TRAIN_ON),
            ("--packing", self.packing, PACKING),
            ("--format", self.format, FORMATS),
        ):
            check_choice(option, value, known)
        for option, names in (("--text", self.text), ("--eval", self.eval)):
            for name in names:
                check_source(option, name)

    def _check_split(self) -> None:
        if self.eval_split is None:
            return
        if not 0 <= self.eval_split < 1:
            raise UserError(
                f"--eval-split must be a fraction, at least 0 and below 1, got {self.eval_split}"
            )
        if self.eval_split and self.eval:
            raise UserError("--eval-split holds out a part of --text; give it or --eval, not both")
