"""Draws docs/pictures/depthwise.png from the tables of bench_depthwise.py in benchmarks/results/.

    python benchmarks/plot_depthwise.py

A panel for the pure recursion and one for the relaxed model: tokens per second of the candidates
over those of static batching in the same round, by the number of slots. The figures drawn are
stored in the picture's metadata, where a test compares them with the file.
"""

import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import write_picture

ROOT = Path(__file__).resolve().parents[1]
[RESULTS] = (ROOT / "benchmarks" / "results").glob("depthwise-cpu-*.txt")
PICTURE = ROOT / "docs" / "pictures" / "depthwise.png"

COLORS = {
    "static": "#9aa3ad",
    "continuous": "#6b7580",
    "depth-wise": "#b9c0f0",
    "forced exits, share-first": "#3f51b5",
    "forced exits, copy": "#5c6bc0",
    "forced exits, backfill": "#8e99d6",
    "oracle, share-first": "#2e7d6b",
    "confidence, share-first": "#d1495b",
}
# By rank, then number of slots, then candidate.
Figures = dict[str, dict[str, dict[str, float]]]


def read_figures() -> Figures:
    """Tokens per second over static batching's."""
    names = "|".join(map(re.escape, COLORS))
    row = re.compile(rf"^ *\d+/\d+ +\d+ +(\d+) +(\d+) +({names}) +[\d.]+ +([\d.]+) ", re.M)
    figures: Figures = {}
    for rank, slots, name, ratio in row.findall(RESULTS.read_text()):
        figures.setdefault(rank, {}).setdefault(slots, {})[name] = float(ratio)
    return figures


def draw_panel(axes: Axes, rank: str, by_slots: dict[str, dict[str, float]]) -> None:
    width = 0.86 / len(COLORS)
    for place, slots in enumerate(sorted(by_slots, key=int)):
        for index, (name, color) in enumerate(COLORS.items()):
            across = place + width * (index - (len(COLORS) - 1) / 2)
            value = by_slots[slots][name]
            bar = axes.bar(across, value, 0.94 * width, color=color)
            axes.bar_label(bar, [f"{value:.2f}"], padding=1, fontsize=5.5)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(by_slots)), [f"{slots} slots" for slots in sorted(by_slots, key=int)])
    axes.set_title("Pure recursion" if rank == "0" else f"Relaxed, rank {rank}", size=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def draw(figures: Figures) -> Figure:
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, len(figures), sharey=True)
    for axes, (rank, by_slots) in zip(panels, figures.items(), strict=True):
        draw_panel(axes, rank, by_slots)
    panels[0].set_ylabel("tokens/s over static batching", fontsize=8)
    figure.legend(
        panels[0].patches[: len(COLORS)],
        list(COLORS),
        loc="outside lower center",
        ncols=4,
        fontsize=7,
    )
    return figure


if __name__ == "__main__":
    write_picture(__doc__ or "", PICTURE, read_figures(), draw)
