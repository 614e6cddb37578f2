"""The loop of an uptraining: finetune's, with the loss of uptraining."""

from typing import Any

from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.cli.models import CausalLM
from lowrank_ext.cli.recursive.models import num_loops
from lowrank_ext.cli.training.trainer import FinetuneTrainer


class UptrainTrainer(FinetuneTrainer):
    """finetune's loop with the loss of uptraining, with or without a teacher."""

    def __init__(self, *stage: Any, teacher: CausalLM | None) -> None:
        self.teacher = teacher
        super().__init__(*stage)
        self.loss_is_scaled_for_ga = False  # a mean over the batch

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> Tensor:
        own = self.run.settings
        coefficients = lr.recursive.loop_coefficients(
            num_loops(self.run.model),
            own.exits,
            step=self.run.progress.step,
            warm_up=own.exit_warm_up,
        )
        loss = lr.recursive.uptrain_loss(
            model,
            self.teacher,
            inputs,
            loss=own.loss,
            coefficients=coefficients,
            exit_loss=own.exit_loss,
        ).total
        self.task_loss += loss.detach() / self.current_gradient_accumulation_steps
        return loss
