"""The final table, report.json and loss.png."""

import dataclasses
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lowrank_ext.cli.environment import environment
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.figures import new_figure, png
from lowrank_ext.cli.files import MEBIBYTE, read_json, write_bytes, write_json
from lowrank_ext.cli.settings import Settings
from lowrank_ext.cli.typed import check_types

_SMOOTHING = 0.85
_METHOD_WIDTH = 12  # longer names are broken at a hyphen


@dataclass(frozen=True, kw_only=True)
class Result:
    """All measurements of one method. "At start" is before the first step, "at end" after the
    last: they differ where a method freezes tensors during training, as LaMDA does. Of several
    processes the first one's. None: not measured, as --fsdp has no frozen model beside it."""

    method: str
    learning_rate: float
    trainable_at_start: int
    trainable_at_end: int
    saved_bytes_at_start: int | None
    saved_bytes_at_end: int | None
    frozen_saved_bytes: int | None
    peak_bytes: int
    peak_source: str
    forward_backward_ms: float | None
    frozen_forward_backward_ms: float | None
    forward_backward_ratio: float | None
    optimizer_ms: float | None
    tokens_per_second: float | None
    skipped_steps: int
    rows_per_step: int
    held_out: list[tuple[int, float]]
    losses: list[float]
    ended_early: bool
    saved_step: int
    expert_load_at_start: dict[str, list[int]] | None
    expert_load_at_end: dict[str, list[int]] | None
    saved_to: str | None

    @property
    def held_out_after(self) -> float:
        """Held-out loss of what was saved: at the end, with --early-stop at the best step."""
        return next(loss for step, loss in reversed(self.held_out) if step <= self.saved_step)

    @property
    def saved_ratio(self) -> float | None:
        """Bytes kept for backward at the end, as a multiple of the frozen model's."""
        if self.saved_bytes_at_end is None or self.frozen_saved_bytes is None:
            return None
        return self.saved_bytes_at_end / self.frozen_saved_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable, with the ratios and the two losses that the table shows."""
        return {
            **dataclasses.asdict(self),
            "saved_bytes_ratio": self.saved_ratio,
            "held_out_before": self.held_out[0][1],
            "held_out_after": self.held_out_after,
        }


def write_result(path: Path, result: Result) -> None:
    """Stores one method's result, so that --resume does not measure it again."""
    write_json(path, dataclasses.asdict(result))


def read_result(path: Path) -> Result:
    """Reads what `write_result` wrote."""
    values = read_json(path)
    check_types(Result, values, str(path))
    held_out = [(step, loss) for step, loss in values["held_out"]]
    if not held_out:
        raise UserError(f"{path}: held_out must have an entry, got none")
    return Result(**{**values, "held_out": held_out})


def write_report(
    out: Path, settings: Settings, model: dict[str, Any], results: list[Result]
) -> list[Path]:
    """Writes report.json, loss.png and, where experts have trained, expert_load.png; returns their
    paths."""
    report = {
        "settings": settings.to_dict(),
        "model": model,
        "environment": environment(),
        "methods": [result.to_dict() for result in results],
    }
    paths = [out / "report.json", out / "loss.png"]
    write_json(paths[0], report)
    write_bytes(paths[1], loss_plot(results))
    if any(result.expert_load_at_end for result in results):
        paths.append(out / "expert_load.png")
        write_bytes(paths[-1], expert_load_plot(results))
    return paths


_COLUMNS = (
    "trained\nparams",
    "saved\nMiB",
    "x\nfrozen",
    "peak\nMiB",
    "fwd +\nbwd ms\n/frozen",
    "x\nfrozen",
    "update\nms",
    "held-out\nbefore",
    "loss\nafter",
)


def results_table(results: list[Result], title: str) -> Table:
    """One row per method, at most 80 characters wide, so that no number is cut off."""
    table = Table(
        title=Text(title),
        title_justify="left",
        caption=Text(_CAPTION),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for name in _COLUMNS:
        # Only the first column may wrap, as it may have "2.54 M > 53.8 k".
        table.add_column(name, justify="right", no_wrap=name != _COLUMNS[0])
    for result in results:
        table.add_row(*_cells(result))
    return table


_CAPTION = (
    "saved: what forward keeps for backward (distinct storages, no parameters); x frozen: against "
    "the same model with every weight frozen and a gradient at its embeddings; times: medians of a "
    "row's own rounds, in which method and frozen model take turns; peak: of the process, the "
    "frozen model included, on a GPU of torch's tensors there; a > b: before the first and after "
    "the last step, where a method freezes tensors in between."
)


def _cells(result: Result) -> list[str]:
    return [
        "\n".join(textwrap.wrap(result.method, _METHOD_WIDTH)),
        _from_to(human_count(result.trainable_at_start), human_count(result.trainable_at_end)),
        _number(result.saved_bytes_at_end, ",.1f", MEBIBYTE),
        _number(result.saved_ratio, ".3f"),
        f"{result.peak_bytes / MEBIBYTE:,.0f}",
        _milliseconds(result),
        _number(result.forward_backward_ratio, ".2f"),
        _number(result.optimizer_ms, ".1f"),
        f"{result.held_out[0][1]:.4f}",
        f"{result.held_out_after:.4f}",
    ]


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else format(value / unit, form)


def _milliseconds(result: Result) -> str:
    """Forward + backward, and below it that of the frozen model in the same rounds."""
    ours, frozen = result.forward_backward_ms, result.frozen_forward_backward_ms
    if ours is None or frozen is None:
        return "-"
    digits = 0 if min(ours, frozen) >= 100 else 1
    if ours == frozen:
        return f"{ours:,.{digits}f}"
    return f"{ours:,.{digits}f}\n/{frozen:,.{digits}f}"


def _from_to(start: str, end: str) -> str:
    return start if start == end else f"{start} > {end}"


def human_count(number: int) -> str:
    """``4884480 -> "4.88 M"``."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def smoothed(losses: list[float]) -> list[float]:
    """Exponential moving average, with bias correction."""
    mean, weight, values = 0.0, 0.0, []
    for loss in losses:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        values.append(mean / weight)
    return values


def loss_plot(results: list[Result]) -> bytes:
    """PNG: smoothed training loss as thin lines, held-out loss as markers, a color per method."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot(
        xlabel="step",
        ylabel="loss (nats per token)",
        title="Training loss (lines, smoothed) and held-out loss (markers)",
    )
    markers = "osD^vP"
    for index, result in enumerate(results):
        # Later methods are drawn thinner, so that coinciding curves stay visible.
        width = 1.2 + 0.8 * (len(results) - 1 - index)
        _plot_result(axes, result, f"C{index}", markers[index % len(markers)], width)
    axes.set_ylim(*loss_range(results))
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)


def loss_range(results: list[Result]) -> tuple[float, float]:
    """Axis limits for the held-out losses and the second half of every training curve: large
    losses of the first steps would flatten the rest."""
    shown = [loss for result in results for _, loss in result.held_out]
    for result in results:
        shown += smoothed(result.losses)[len(result.losses) // 2 :]
    margin = 0.1 * (max(shown) - min(shown)) or 0.1
    return min(shown) - margin, max(shown) + margin


def _plot_result(axes: Any, result: Result, color: str, marker: str, width: float) -> None:
    label = f"{result.method}: held-out {result.held_out[0][1]:.3f} to {result.held_out_after:.3f}"
    steps, losses = zip(*result.held_out, strict=True)
    if not result.losses:  # frozen: nothing was trained
        axes.axhline(
            losses[0],
            color=color,
            linestyle="--",
            label=f"{result.method}: held-out {losses[0]:.3f}",
        )
        return
    numbers = range(1, len(result.losses) + 1)
    axes.plot(numbers, smoothed(result.losses), color=color, alpha=0.7, linewidth=width)
    axes.plot(
        steps,
        losses,
        color=color,
        marker=marker,
        markersize=7,
        fillstyle="none",
        linestyle=":",
        label=label,
    )


def sorted_shares(load: dict[str, list[int]]) -> Tensor:
    """Expert loads [modules, experts] relative to an even share, descending in each module."""
    counts = torch.tensor(list(load.values()), dtype=torch.float64)
    shares = counts * counts.shape[1] / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return shares.sort(dim=1, descending=True).values


def expert_load_plot(results: list[Result]) -> bytes:
    """PNG, a panel per method with experts: load of the busiest, second, … expert of a module,
    median over the modules and the range of the middle 80 %, before the first step and after the
    last."""
    shown = [result for result in results if result.expert_load_at_start]
    figure = new_figure(1 + 4.5 * len(shown), 4.5)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, result in zip(panels, shown, strict=True):
        _plot_load(axes, result)
    panels[0].set_ylabel("tokens, as a multiple of an even share")
    return png(figure)


def _plot_load(axes: Any, result: Result) -> None:
    loads = {"before": result.expert_load_at_start, "after": result.expert_load_at_end}
    for (when, load), color, marker in zip(loads.items(), ("C3", "C0"), "os", strict=True):
        shares = sorted_shares(load or {})
        ranks = range(1, shares.shape[1] + 1)
        low, middle, high = shares.quantile(torch.tensor([0.1, 0.5, 0.9]).double(), dim=0).tolist()
        axes.plot(ranks, middle, color=color, marker=marker, label=f"{when} training")
        axes.fill_between(ranks, low, high, color=color, alpha=0.2, linewidth=0)
    axes.axhline(1.0, color="0.4", linestyle="--", linewidth=1, label="balanced")
    axes.set(
        title=f"{result.method}: {len(shares)} modules on held-out text",
        xlabel="experts of a module, the busiest first",
        xticks=list(ranks),
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
