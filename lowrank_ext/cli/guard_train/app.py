"""The options of `lowrank-ext guard train`: finetune's, without those that no guard needs."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank_ext.cli.error_lines import errors_as_lines
from lowrank_ext.cli.guard_train.settings import DEFAULTS, GuardSettings
from lowrank_ext.cli.options import with_options_of

Texts = Annotated[
    list[str] | None,
    typer.Option(
        help="Records of a text, or prompt and response, with a label: unsafe or safe, a score, "
        "categories. A file, a directory of files or of a dataset, or the id of a cached dataset; "
        "may be repeated.",
        show_default=False,
        rich_help_panel="Data",
    ),
]
Field = Annotated[
    str,
    typer.Option(help="The key of the text; else prompt and response.", rich_help_panel="Data"),
]
Batch = Annotated[int, typer.Option(help="Texts per step.", rich_help_panel="Training")]


def guard_train_command(finetune: Callable[..., None]) -> Callable[..., None]:
    """The command, with options of finetune."""

    @with_options_of(
        finetune,
        without=GuardSettings.fixed,
        defaults={**DEFAULTS, "out": Path("guard-output")},
        shown={"lr": "0.001", "log_to": "guard.log", "alpha": "16", "dropout": "0.05"},
    )
    def guard_train(
        context: typer.Context,
        text: Texts = None,
        field: Field = "text",
        batch: Batch = DEFAULTS["batch"],
        **shared: Any,
    ) -> None:
        """Train a guard from labelled texts, for `lowrank-ext guard`.

        Writes guard/ (what --adapter of `lowrank-ext guard` reads), report.json, guard.png and
        guard.log to --out, with AUPRC, accuracy, precision, recall and F1 on held-out texts before
        and after. Signals, --resume, --config and a larger --steps as in finetune.
        """
        with errors_as_lines():
            from lowrank_ext.cli.guard_train.command import GuardTraining

            GuardTraining().chosen(GuardSettings, context, shared)

    return guard_train
