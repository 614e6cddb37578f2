"""loss.png of an uptraining."""

from typing import Any

from lowrank_ext.cli.figures import new_figure, png
from lowrank_ext.cli.report import smoothed
from lowrank_ext.cli.training.progress import Progress


def loss_picture(
    progress: Progress, before: dict[str, Any], after: dict[str, Any], loss: str
) -> bytes:
    """PNG: the training loss, which a distillation measures in its own unit, beside held-out cross
    entropy: of the last loop over the steps, of every loop before and after."""
    figure = new_figure(10, 4)
    training, held_out, loops = figure.subplots(1, 3)
    steps = range(1, len(progress.losses) + 1)
    training.plot(steps, progress.losses, color="C0", alpha=0.3, linewidth=1)
    training.plot(steps, smoothed(progress.losses), color="C0", label="smoothed")
    training.set(title=f"Training loss ({loss})", xlabel="step", ylabel="nats per token")
    held_out.plot(*zip(*progress.held_out, strict=True), "o-", color="C1")
    held_out.set(title="Held-out cross entropy, last loop", xlabel="step")
    numbers = range(len(before["losses"]))
    for shift, measured, label in ((-0.2, before, "before"), (0.2, after, "after")):
        bars = loops.bar([n + shift for n in numbers], measured["losses"], 0.4, label=label)
        loops.bar_label(bars, fmt="%.2f", fontsize=8)
    loops.set(title="Held-out cross entropy, by loop", xlabel="loop", xticks=list(numbers))
    for axes in (training, loops):
        axes.legend()
    for axes in (training, held_out, loops):
        axes.grid(alpha=0.3)
    return png(figure)
