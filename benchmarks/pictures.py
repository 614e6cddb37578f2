"""Pictures of committed results, with the figures that are drawn in their metadata."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def write_picture(doc: str, default: Path, figures: Any, draw: Callable[[Any], Figure]) -> None:
    """The command line of a script that draws `figures`, with its docstring `doc`: writes the PNG
    to --out or `default`. A test compares the metadata with the results."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=default, help="the PNG to write")
    out = parser.parse_args().out
    FigureCanvasAgg(draw(figures)).print_png(
        out, metadata={"Description": json.dumps(figures), "Software": None}
    )
