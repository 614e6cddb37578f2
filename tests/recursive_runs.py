"""What the tests of `lowrank-ext recursive` share."""

from pathlib import Path
from typing import Any

from finetune_runs import flags_of, invoke

STEPS = 4


def command(*arguments: Any, **options: Any) -> Any:
    """Runs lowrank-ext recursive; keyword arguments are options, None leaves one out."""
    return invoke("recursive", *map(str, arguments), *flags_of(options))


def convert(model: Path | None, out: Path, **options: Any) -> Any:
    return command(
        "convert", **{"model": model, "out": out, "loops": 2, "rank": 4, "dtype": "fp32", **options}
    )


def uptrain(directory: Path, teacher: Path | None, text: Path, out: Path, **options: Any) -> Any:
    small = {
        "teacher": teacher,
        "text": text,
        "out": out,
        "steps": STEPS,
        "batch": 2,
        "seq_len": 16,
        "eval_batches": 2,
        "dtype": "fp32",
        "lr": 0.002,
    }
    return command("uptrain", directory, **{**small, **options})
