"""TRL's DPOTrainer on the loop of finetune."""

from operator import mul
from typing import Any

import torch
import trl
from torch import Tensor

from lowrank_ext.cli.models import CausalLM
from lowrank_ext.cli.training.evaluation import on_device_of
from lowrank_ext.cli.training.plan import training_arguments
from lowrank_ext.cli.training.run import TrainingRun
from lowrank_ext.cli.training.trainer import FinetuneTrainer

# What an evaluation measures, as report.json names it, by TRL's names.
SCORES = {
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "logps/chosen": "chosen_log_probability",
    "logps/rejected": "rejected_log_probability",
}


class DpoTrainer(FinetuneTrainer, trl.DPOTrainer):  # type: ignore[misc]  # untyped base
    """finetune's loop with TRL's loss and TRL's numbers.

    Attributes:
        reference: the frozen model. It shares the weights of the model that trains, as long as the
            method leaves these as they are.
    """

    reference: CausalLM

    def __init__(self, run: TrainingRun, *stage: Any) -> None:
        trained = [(p, p.data) for p in run.model.parameters() if p.requires_grad]
        super().__init__(run, *stage)
        # TRL rounds what trains over a 4-bit base to bf16; here --adapter-dtype says its dtype.
        for parameter, values in trained:
            if parameter.dtype is not values.dtype:
                parameter.data = values

    def trainer_options(self, steps: int) -> dict[str, Any]:
        settings = self.run.settings
        arguments = training_arguments(
            self.run.plan,
            steps,
            self.run.directory,
            trl.DPOConfig,
            bf16=False,  # TRL's default is autocast; the model is in its dtype
            gradient_checkpointing=False,  # the run has switched it on in the model
            # TRL switches it off for the reference, and on again with these.
            gradient_checkpointing_kwargs={"use_reentrant": False},
            max_length=None,  # the pairs are cut
            beta=settings.beta,
            loss_type=[settings.loss],
        )
        return {
            **super().trainer_options(steps),
            "args": arguments,
            "ref_model": self.reference,
            "processing_class": self.run.tokenizer,
        }

    def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """The dataset, which has TRL's columns."""
        return dataset

    def loss_of_pairs(self, inputs: dict[str, Tensor]) -> Tensor:
        """TRL's loss of a batch on the model's device, without a method's extra loss."""
        loss: Tensor = trl.DPOTrainer.compute_loss(self, self.run.model, inputs)
        return loss

    def measure(self) -> float:
        """The loss on the held-out pairs, with their rewards and log-probabilities."""
        run, model = self.run, self.run.model
        losses, pairs = [], []
        was_training = model.training
        model.eval()
        self._metrics["eval"].clear()
        try:
            with torch.no_grad():
                for batch in run.held_out:
                    losses.append(self.loss_of_pairs(on_device_of(model, batch)).item())
                    pairs.append(len(batch["input_ids"]) // 2)  # chosen and rejected
        finally:
            model.train(was_training)
        found = self._metrics["eval"]
        scores = {own: _mean(found[name], pairs) for name, own in SCORES.items()}
        found.clear()
        return run.record(_mean(losses, pairs), scores)


def trainer_with(reference: CausalLM) -> type[DpoTrainer]:
    """The trainer for this reference: a class, to which methods add their mixins."""
    return type("DpoTrainer", (DpoTrainer,), {"reference": reference})


def _mean(values: list[float], pairs: list[int]) -> float:
    """Of the means of batches, over their pairs."""
    return sum(map(mul, values, pairs)) / sum(pairs)
