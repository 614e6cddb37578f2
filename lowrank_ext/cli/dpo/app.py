"""The options of `lowrank-ext dpo`: finetune's, without those that pairs have no use for."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank_ext.cli.dpo.settings import LOSSES, DpoSettings
from lowrank_ext.cli.error_lines import errors_as_lines
from lowrank_ext.cli.options import with_options_of

Pairs = Annotated[
    list[str] | None,
    typer.Option(
        help="Pairs: records of chosen and rejected, with a prompt or not, as texts or messages. A "
        "file, a directory of files or of a dataset, or the id of a cached dataset; may be "
        "repeated.",
        show_default=False,
        rich_help_panel="Data",
    ),
]
Batch = Annotated[int, typer.Option(help="Pairs per step.", rich_help_panel="Training")]
Beta = Annotated[
    float,
    typer.Option(help="How close the model keeps to the reference.", rich_help_panel="Training"),
]
Loss = Annotated[
    str,
    typer.Option(help=f"{', '.join(LOSSES)}, as in TRL.", rich_help_panel="Training"),
]


def dpo_command(finetune: Callable[..., None]) -> Callable[..., None]:
    """The command, with options of finetune."""

    @with_options_of(
        finetune,
        without=DpoSettings.fixed,
        defaults={"seq_len": 512, "eval_batches": 25, "out": Path("dpo-output")},
        shown={"lr": "a 300th of the method's own for text", "log_to": "dpo.log"},
    )
    def dpo(
        context: typer.Context,
        text: Pairs = None,
        batch: Batch = 4,
        beta: Beta = 0.1,
        loss: Loss = "sigmoid",
        **shared: Any,
    ) -> None:
        """Train on preference pairs, against the model as it was before (DPO, by TRL).

        The reference is the base model, with --adapter the base with that adapter. Writes adapter/
        (PEFT's format), report.json, rewards.png and dpo.log to --out, with rewards, margins and
        accuracy on held-out pairs before and after. Signals, --resume, --config and a larger
        --steps as in finetune.
        """
        with errors_as_lines():
            from lowrank_ext.cli.dpo.command import Dpo

            Dpo().chosen(DpoSettings, context, shared)

    return dpo
