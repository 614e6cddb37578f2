"""The table, report.json and rewards.png of a DPO run."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from lowrank_ext.cli.environment import environment
from lowrank_ext.cli.errors import as_user_error
from lowrank_ext.cli.files import write_bytes, write_json
from lowrank_ext.cli.methods import base_dtype, count, trainable_parameters
from lowrank_ext.cli.models import dtype_name, find_model
from lowrank_ext.cli.report import smoothed
from lowrank_ext.cli.training.progress import Progress
from lowrank_ext.cli.training.run import TrainingRun

if TYPE_CHECKING:
    from lowrank_ext.cli.dpo.command import DpoJob

LOG_NAME = "dpo.log"
_ROWS = {
    "chosen_reward": "reward of chosen answers",
    "rejected_reward": "reward of rejected answers",
    "margin": "margin",
    "accuracy": "chosen above rejected",
    "chosen_log_probability": "log-probability of chosen answers",
    "rejected_log_probability": "log-probability of rejected answers",
}


@dataclass(frozen=True)
class Evaluation:
    """What was measured on the held-out pairs after a step."""

    step: int
    loss: float
    scores: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return {"step": self.step, "loss": self.loss, **self.scores}


def evaluations(progress: Progress) -> list[Evaluation]:
    """All of a run, the first before its first step."""
    pairs = zip(progress.held_out, progress.scores, strict=True)
    return [Evaluation(step, loss, scores) for (step, loss), scores in pairs]


def evaluation_at(progress: Progress, step: int) -> Evaluation:
    """The last one up to a step."""
    return [each for each in evaluations(progress) if each.step <= step][-1]


def finish(job: "DpoJob", run: TrainingRun, saved_step: int) -> None:
    """Writes the report and the picture; prints what was gained and written."""
    progress, settings, out = run.progress, job.settings, job.out
    before, after = evaluations(progress)[0], evaluation_at(progress, saved_step)
    saved = str(out / str(run.entry.saved_name))
    report = {
        "settings": settings.to_dict(),
        "model": {
            "name": find_model(settings.model).name,
            "dtype": dtype_name(base_dtype(job.base)),
            "device": str(job.device),
            "parameters": job.num_parameters,
            "data": job.corpus.report.to_dict(),
        },
        "environment": environment(),
        "method": run.entry.name,
        "learning_rate": run.plan.learning_rate,
        "trainable_at_start": progress.trainable_at_start,
        "trainable_at_end": count(trainable_parameters(run.model)),
        "seconds": sum(progress.step_seconds),
        "step_seconds": progress.step_seconds,
        "losses": progress.losses,
        "skipped_steps": progress.skipped_steps,
        "ended_early": progress.ended_early,
        "held_out": [each.to_dict() for each in evaluations(progress)],
        "held_out_before": before.to_dict(),
        "held_out_after": after.to_dict(),
        "saved_step": saved_step,
        "saved_to": saved,
    }
    with as_user_error("the rewards cannot be written", ValueError):  # inf and nan
        write_json(out / "report.json", report)
    write_bytes(out / "rewards.png", rewards_picture(progress))
    job.console.print()
    job.console.print(results_table(before, after))
    for path in (saved, out / "report.json", out / "rewards.png", out / LOG_NAME):
        job.console.print(f"wrote {path}", markup=False, soft_wrap=True)


def results_table(before: Evaluation, after: Evaluation) -> Table:
    """A row for each number, before and after training."""
    table = Table(
        caption=Text(
            "reward: beta times the log-ratio of model and reference, which are the same before "
            "the first step; chosen above rejected: share of the held-out pairs"
        ),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    table.add_column("held-out pairs")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("loss", f"{before.loss:.4f}", f"{after.loss:.4f}")
    for name, label in _ROWS.items():
        kind = ".1%" if name == "accuracy" else ".4f"
        table.add_row(label, *(format(each.scores[name], kind) for each in (before, after)))
    return table


def rewards_picture(progress: Progress) -> bytes:
    """PNG: the loss in training and on held-out pairs, their rewards, and how many are ranked as
    they should be."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # opens no window, whatever backend is configured
    loss, rewards, accuracy = figure.subplots(1, 3)
    measured = evaluations(progress)
    steps = [each.step for each in measured]
    numbers = range(1, len(progress.losses) + 1)
    loss.plot(numbers, smoothed(progress.losses), color="C0", label="training, smoothed")
    loss.plot(steps, [each.loss for each in measured], "o-", color="C1", label="held out")
    loss.set(title="Loss", xlabel="step")
    for name, label, color in (
        ("chosen_reward", "chosen", "C2"),
        ("rejected_reward", "rejected", "C3"),
        ("margin", "margin", "C4"),
    ):
        rewards.plot(
            steps, [each.scores[name] for each in measured], "o-", color=color, label=label
        )
    rewards.set(title="Rewards on held-out pairs", xlabel="step")
    accuracy.plot(steps, [each.scores["accuracy"] for each in measured], "o-", color="C5")
    accuracy.set(title="Held-out pairs, chosen above rejected", xlabel="step", ylim=(-0.02, 1.02))
    for axes in (loss, rewards):
        axes.legend()
    for axes in (loss, rewards, accuracy):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()
