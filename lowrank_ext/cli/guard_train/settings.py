"""The settings of the training of a guard, which are checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.settings import Settings, method_options

RATE = 1e-3  # what examples/guard.py has been measured with
# Defaults of GuardModel, where they are others than finetune's.
DEFAULTS: dict[str, Any] = {
    "rank": 8,
    "alpha": 16.0,
    "dropout": 0.05,
    "targets": "q_proj,v_proj",
    "batch": 8,
    "seq_len": 256,
}


@dataclass(frozen=True, kw_only=True)
class GuardSettings(Settings):
    """Everything that determines the results of a run; stored as run.yaml for --resume."""

    # A guard is a model around its base: what other adapters do to theirs, it has not.
    fixed: ClassVar[Mapping[str, Any]] = {
        "method": "lora",
        "compare": None,
        "adapter": None,
        "train_on": "all",
        "packing": "off",
        "format": "auto",
        "chat_template": None,
        "quantize": None,
        "gradient_checkpointing": False,
        "compile": False,
        "fsdp": False,
        "early_stop": None,
        "neftune": None,
        "modules_to_save": None,
        "exclude": None,
        "layers": None,
        "rslora": False,
        "eval_batches": 1,  # all held-out texts are scored
        **{option.name: option.default for option in method_options()},
    }

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        super().check()
        if not self.text:
            raise UserError("guard train needs --text: records of a text and a label")
        if self.eval_split == 0:
            raise UserError(
                "--eval-split must be above 0 for guard train, which reports on held-out texts"
            )

    def learning_rate(self, method: str) -> float:
        """--lr, or a rate that works on SmolLM2-135M."""
        return RATE if self.lr is None else self.lr
