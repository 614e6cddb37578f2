"""What a run has done so far, which is stored in its checkpoints."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.typed import check_types

PROGRESS_NAME = "progress.json"


@dataclass
class Progress:
    """Steps, losses and times of a run, over all its stages.

    Attributes:
        step: optimizer steps taken.
        losses: mean loss per trained token of each step, without a method's extra loss.
        held_out: (step, held-out loss) of each evaluation.
        scores: what else each evaluation has measured; empty where that is the loss alone.
        tokens: that each step has read, over all processes, without padding of rows.
        step_seconds, optimizer_seconds: of each step, and of its update alone.
        skipped_steps: updates that fp16's overflow has skipped.
        rows_per_step: of all processes together.
        ended_early: whether --early-stop has ended it.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    rows_per_step: int = 0
    ended_early: bool = False
    trainable_at_start: int = 0
    saved_bytes_at_start: int | None = None
    expert_load_at_start: dict[str, list[int]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "Progress":
        """What `to_dict` gave. Raises UserError for values that do not fit each other."""
        check_types(cls, values, where)
        held_out = [(step, loss) for step, loss in values["held_out"]]
        progress = cls(**{**values, "held_out": held_out})
        for name in ("losses", "tokens", "step_seconds", "optimizer_seconds"):
            if len(getattr(progress, name)) != progress.step:
                raise UserError(
                    f"{where}: {name} must have step={progress.step} entries, got "
                    f"{len(getattr(progress, name))}"
                )
        if not progress.held_out:
            raise UserError(f"{where}: held_out must have an entry, got none")
        if len(progress.scores) not in (0, len(progress.held_out)):
            raise UserError(
                f"{where}: scores must have an entry for each of held_out, got "
                f"{len(progress.scores)} for {len(progress.held_out)}"
            )
        return progress

    @property
    def best(self) -> tuple[int, float]:
        """(step, held-out loss) of the best evaluation after a step, the first of equal ones."""
        trained = [pair for pair in self.held_out if pair[0] > 0]
        return min(trained or self.held_out, key=lambda pair: pair[1])

    def tokens_per_second(self, window: int) -> float:
        """Over the last steps, `window` at most; 0 before the first."""
        seconds = sum(self.step_seconds[-window:])
        return sum(self.tokens[-window:]) / seconds if seconds else 0.0

    def evaluations_without_gain(self) -> int:
        """Evaluations since the best one."""
        best, _ = self.best
        return sum(step > best for step, _ in self.held_out)
