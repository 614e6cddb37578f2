"""The training of a guard, on the loop of finetune."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.cli.training.evaluation import Batch
from lowrank_ext.cli.training.trainer import FinetuneTrainer
from lowrank_ext.methods.lora_guard import GuardLoss, average_precision

THRESHOLD = 0.5


class GuardTrainer(FinetuneTrainer):
    """finetune's loop with the loss of a guard."""

    def __init__(self, *stage: Any) -> None:
        super().__init__(*stage)
        self.loss_is_scaled_for_ga = False  # a mean over the batch
        self.criterion = GuardLoss(self.run.corpus.train.labels).to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> Tensor:
        loss, _ = judged(model, inputs, self.criterion)
        self.task_loss += loss.detach() / self.current_gradient_accumulation_steps
        return loss

    def measure(self) -> float:
        """The loss on the held-out texts, with how well their scores tell unsafe from safe."""
        run: Any = self.run
        loss, scores = held_out_scores(run.model, run.held_out, self.criterion)
        return run.record(loss, quality(run.corpus.held_out.unsafe, scores))


def judged(model: nn.Module, batch: Batch, criterion: GuardLoss) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and its unsafe logits [B]."""
    unsafe, categories, _ = model(batch["input_ids"], batch["attention_mask"])
    return criterion(unsafe, categories, batch["categories"]), unsafe[:, 0]


@torch.no_grad()
def held_out_scores(
    model: nn.Module, batches: Sequence[Batch], criterion: GuardLoss
) -> tuple[float, Tensor]:
    """The mean loss over all texts in evaluation mode, and the probability that each is unsafe,
    float64 [N]; the model goes back to its mode."""
    device = criterion.unsafe_pos_weight.device
    total, scores = 0.0, []
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            loss, logits = judged(model, inputs, criterion)
            total += loss.item() * len(logits)
            scores.append(logits.double().sigmoid().cpu())
    finally:
        model.train(was_training)
    found = torch.cat(scores)
    return total / len(found), found


def quality(unsafe: Tensor, scores: Tensor) -> dict[str, float]:
    """AUPRC, and what calling scores from a half on unsafe gives.

    Args:
        unsafe: bool [N], with both values.
        scores: [N].
    """
    called = scores >= THRESHOLD
    hits = float((called & unsafe).sum())
    precision = hits / max(1.0, float(called.sum()))
    recall = hits / float(unsafe.sum())
    return {
        "auprc": average_precision(unsafe, scores),
        "accuracy": float((called == unsafe).double().mean()),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
    }
