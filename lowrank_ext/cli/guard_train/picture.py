"""guard.png: loss and scores over the steps, and the guard's precision-recall curve."""

import torch
from torch import Tensor

from lowrank_ext.cli.figures import new_figure, png
from lowrank_ext.cli.report import smoothed
from lowrank_ext.cli.single_run import evaluations
from lowrank_ext.cli.training.run import TrainingRun
from lowrank_ext.methods.lora_guard import average_precision, precision_recall


def guard_picture(unsafe: Tensor, scores: Tensor, run: TrainingRun) -> bytes:
    """PNG.

    Args:
        unsafe: bool [N], of the held-out texts.
        scores: [N], the guard's.
    """
    figure = new_figure(12, 4)
    loss, quality, curve = figure.subplots(1, 3)
    measured, losses = evaluations(run.progress), run.progress.losses
    steps = [each.step for each in measured]
    loss.plot(range(1, len(losses) + 1), smoothed(losses), color="C0", label="training, smoothed")
    loss.plot(steps, [each.loss for each in measured], "o-", color="C1", label="held out")
    loss.set(title="Loss", xlabel="step")
    for name, label in (("auprc", "AUPRC"), ("f1", "F1"), ("accuracy", "accuracy")):
        quality.plot(steps, [each.scores[name] for each in measured], "o-", label=label)
    quality.set(title="Held-out texts", xlabel="step", ylim=(-0.02, 1.02))
    found = precision_recall(unsafe, scores)
    recall = torch.cat([torch.zeros(1), found.recall])
    precision = torch.cat([found.precision[:1], found.precision])
    area, share = average_precision(unsafe, scores), float(unsafe.double().mean())
    curve.step(recall, precision, where="pre", label=f"the guard: AUPRC {area:.3f}")
    curve.axhline(share, color="gray", linestyle="--", label=f"everything unsafe: {share:.3f}")
    curve.set(title=f"{len(unsafe)} held-out texts", xlabel="recall", ylabel="precision")
    curve.set(xlim=(0, 1.02), ylim=(0, 1.02))
    for axes, place in ((loss, "upper right"), (quality, "lower right"), (curve, "lower left")):
        axes.grid(alpha=0.3)
        axes.legend(loc=place)
    return png(figure)
