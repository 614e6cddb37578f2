"""The options that say what a command reads."""

from dataclasses import dataclass

from lowrank_ext.cli.data.chat import TRAIN_ON
from lowrank_ext.cli.data.formats import FORMATS
from lowrank_ext.cli.data.sources import check_source
from lowrank_ext.cli.errors import UserError, near_matches

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
    """

    text: tuple[str, ...]
    eval: tuple[str, ...] = ()
    field: str = "text"
    seq_len: int = 256
    train_on: str = "auto"
    packing: str = "auto"
    format: str = "auto"

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        if self.seq_len < 2:
            raise UserError(f"--seq-len must be at least 2, got {self.seq_len}")
        for option, value, known in (
            ("--train-on", self.train_on, TRAIN_ON),
            ("--packing", self.packing, PACKING),
            ("--format", self.format, FORMATS),
        ):
            if value not in known:
                raise UserError(
                    f"{option} must be one of {', '.join(known)}, got {value!r}"
                    f"{near_matches(value, known)}"
                )
        for option, names in (("--text", self.text), ("--eval", self.eval)):
            for name in names:
                check_source(option, name)
