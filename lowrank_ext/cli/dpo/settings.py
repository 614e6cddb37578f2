"""The settings of a DPO run, which are checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from lowrank_ext.cli.checks import check_choice, check_positive
from lowrank_ext.cli.data.formats import PREFERENCE
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.settings import Settings

# Those of TRL's that need no option beside beta. Left out: robust and exo_pair, which need the
# share of wrong labels, and sft, which reads the chosen answer alone.
LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
)
# TRL's own rate for whole models is 1e-6, and the usual one for LoRA ten times that, a 300th of
# what LoRA trains with on text here: other methods get the same share of theirs.
RATE_OF_WHOLE_MODELS = 1e-6
SHARE_OF_RATE = 1 / 300


@dataclass(frozen=True, kw_only=True)
class DpoSettings(Settings):
    """Everything that determines the results of a run; stored as run.yaml for --resume.

    Attributes:
        beta: how much a log-ratio to the reference counts; larger keeps closer to it.
        loss: TRL's loss_type.
    """

    # Dropout, and noise on the embeddings, would be noise in the log-ratios: TRL switches its own
    # dropout off, and so is ours.
    fixed: ClassVar[Mapping[str, Any]] = {
        "compare": None,
        "train_on": "completion",
        "packing": "off",
        "format": PREFERENCE,
        "field": "text",
        "dropout": 0.0,
        "neftune": None,
        "compile": False,
        "fsdp": False,
    }

    beta: float
    loss: str

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        super().check()
        check_positive("--beta", self.beta)
        check_choice("--loss", self.loss, LOSSES)
        if not self.text:
            raise UserError("dpo needs --text: preference pairs, of 'chosen' and 'rejected'")
        if self.eval_split == 0:
            raise UserError("--eval-split must be above 0 for dpo, which reports on held-out pairs")
        [method] = self.methods
        if method == "frozen":
            raise UserError("--method frozen trains nothing, and is the reference of dpo")
        if any(recipe.training.stages for recipe in self.recipes()):
            raise UserError(
                f"--method {method} trains in stages of next-token prediction, which dpo has not; "
                "use finetune"
            )
        if find_spec("trl") is None:
            raise UserError("dpo needs the package trl: pip install 'lowrank-ext[finetune,dpo]'")

    def learning_rate(self, method: str) -> float:
        """--lr, or a share of the method's own for text."""
        if self.lr is not None:
            return self.lr
        if method == "full":
            return RATE_OF_WHOLE_MODELS
        return super().learning_rate(method) * SHARE_OF_RATE
