"""Draws docs/pictures/gain.png, the README's picture, from the files in benchmarks/results/.

    python benchmarks/plot_gain.py

Three panels: time and saved memory of a whole model (finetune-*.txt), and PEFT's time over ours for
every row of the one-layer grid (lowrank_linear-*.txt), rows that PEFT wins included. The figures
drawn are stored in the picture's metadata, where a test compares them with the files.
"""

import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import write_picture

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FINETUNE = RESULTS / "finetune-cpu-amd-epyc-2026-11-27.txt"
LAYERS = RESULTS / "lowrank_linear-cpu-amd-epyc-2026-11-27.txt"
PICTURE = ROOT / "docs" / "pictures" / "gain.png"

PEFT_COLOR, OUR_COLOR, LOSS_COLOR = "#9aa3ad", "#3f51b5", "#d1495b"


def read_figures() -> dict[str, Any]:
    """All figures of the picture."""
    return {"step": read_step_times(), "saved": read_saved(), "layers": read_layer_ratios()}


def read_step_times() -> list[tuple[str, float, float]]:
    """(adapters and dropout, PEFT, ours): forward + backward over the frozen model's."""
    row = re.compile(r"\| (float32|bfloat16) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|")
    return [
        (f"{dtype}\ndropout {p}", float(peft), float(ours))
        for dtype, p, peft, ours in row.findall(FINETUNE.read_text())
    ]


def read_saved() -> list[tuple[str, float]]:
    """(method, bytes saved for backward as a multiple of the frozen model's)."""
    names = {"peft-lora": "PEFT\nLoRA", "lora": "LoRA", "lamda": "LaMDA"}
    row = re.compile(r"^(peft-lora|lora|lamda) .* M +(?:> [\d.]+ k +)?[\d,.]+ +([\d.]+) ", re.M)
    found = row.findall(FINETUNE.read_text().partition("\n2. ")[0])
    return [(names[method], float(ratio)) for method, ratio in found]


def read_layer_ratios() -> dict[str, list[tuple[float, bool]]]:
    """(PEFT's time / ours, whether PEFT won) of every row of the grid, by the rows of x."""
    ratios: dict[str, list[tuple[float, bool]]] = {}
    for line in LAYERS.read_text().splitlines():
        if not re.match(r" *\d+/\d+ ", line):
            continue
        fields = line.split()
        ours, peft = float(fields[10]), float(fields[11])
        lost = re.search(r"LOSES to peft(;|$)", line) is not None
        ratios.setdefault(fields[2], []).append((round(peft / ours, 3), lost))
    return ratios


def draw_step_times(axes: Axes, rows: list[tuple[str, float, float]]) -> None:
    for place, (_, peft, ours) in enumerate(rows):
        for shift, value, color in ((-0.2, peft, PEFT_COLOR), (0.2, ours, OUR_COLOR)):
            label_bar(axes.bar(place + shift, value, 0.38, color=color), axes, value)
    axes.set_xticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_title("Forward + backward\ntime / that of the frozen model")
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.legend([axes.patches[0], axes.patches[1]], ["PEFT LoRA", "lowrank_ext"], loc="upper right")


def draw_saved(axes: Axes, rows: list[tuple[str, float]]) -> None:
    for place, (name, value) in enumerate(rows):
        color = PEFT_COLOR if "PEFT" in name else OUR_COLOR
        label_bar(axes.bar(place, value, 0.6, color=color), axes, value)
    axes.set_xticks(range(len(rows)), [name for name, _ in rows])
    axes.set_title("Saved for backward\nbytes / those of the frozen model")
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")


def draw_layer_ratios(axes: Axes, ratios: dict[str, list[tuple[float, bool]]]) -> None:
    for place, rows in enumerate(ratios.values()):
        for rank, (ratio, lost) in enumerate(sorted(rows)):
            across = place + 0.7 * (rank / max(len(rows) - 1, 1) - 0.5)
            axes.plot(across, ratio, ".", color=LOSS_COLOR if lost else OUR_COLOR, markersize=4)
    every = [lost for rows in ratios.values() for _, lost in rows]
    axes.set_yscale("log")
    axes.set_ylim(0.85, 6)
    axes.set_yticks([1, 2, 3, 5], ["1", "2", "3", "5"])
    axes.minorticks_off()
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(ratios)), list(ratios))
    axes.set_xlabel("tokens per call", fontsize=8)
    axes.set_title(f"One layer: PEFT's time / ours\n{len(every)} rows, {sum(every)} lost (red)")


def label_bar(bar: Any, axes: Axes, value: float) -> None:
    axes.margins(y=0.08)
    axes.bar_label(bar, [f"{value:.2f}"], padding=2, fontsize=8)


def draw(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[1.5, 0.8, 1.2])
    draw_step_times(panels[0], figures["step"])
    draw_saved(panels[1], figures["saved"])
    draw_layer_ratios(panels[2], figures["layers"])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.title.set_size(10)
    return figure


if __name__ == "__main__":
    write_picture(__doc__ or "", PICTURE, read_figures(), draw)
