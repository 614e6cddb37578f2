"""rewards.png of a DPO run."""

from lowrank_ext.cli.figures import new_figure, png
from lowrank_ext.cli.report import smoothed
from lowrank_ext.cli.single_run import evaluations
from lowrank_ext.cli.training.progress import Progress


def rewards_picture(progress: Progress) -> bytes:
    """PNG: the loss in training and on held-out pairs, their rewards, and how many are ranked as
    they should be."""
    figure = new_figure(11, 4)
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
    return png(figure)
