"""Losses: of a batch, of the held-out batches, and the load of experts on them."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.models import CausalLM, why_not_finite
from lowrank_ext.cli.processes import num_processes, process_index, summed
from lowrank_ext.recipe import Training

# Arguments of the model: input_ids and labels [B, T], position_ids or attention_mask.
Batch: TypeAlias = Mapping[str, Tensor]
IGNORED = -100  # label of a token that no loss counts


def model_loss(model: CausalLM, batch: Batch) -> Tensor:
    """Mean next-token cross entropy over the labels of a batch."""
    loss: Tensor = model(**on_device_of(model, batch), use_cache=False).loss
    return loss


def training_loss(model: CausalLM, batch: Batch, training: Training) -> tuple[Tensor, Tensor]:
    """`model_loss`, and the loss for backward, which includes the method's extra loss."""
    loss = model_loss(model, batch)
    return loss, loss if training.extra_loss is None else loss + training.extra_loss(model)


def on_device_of(model: CausalLM, batch: Batch) -> dict[str, Tensor]:
    """The batch on the device of the model's input embeddings."""
    device = model.get_input_embeddings().weight.device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def num_targets(batch: Batch) -> int:
    """Number of labels that the loss counts; the first of a row is no target."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def held_out_loss(model: CausalLM, batches: Sequence[Batch]) -> float:
    """Mean loss per target over the batches in evaluation mode; the model goes back to its mode.
    Several processes share the batches, and all get the same number."""
    world = num_processes()
    # A sharded model must run as often in every process: the surplus counts nothing.
    own = range(process_index(), -(-len(batches) // world) * world, world)
    weighted = []
    for index in own:
        batch = batches[index % len(batches)]
        weight = num_targets(batch) if index < len(batches) else 0
        weighted.append((batch, weight))
    loss, total = summed(_weighted_loss(model, weighted)).tolist()
    return loss / total


def check_start(method: str, loss: float, model: CausalLM) -> None:
    """Raises UserError for a held-out loss that is not finite before anything has been trained."""
    if not math.isfinite(loss):
        raise UserError(
            f"{method}: the held-out loss is not finite before the first step; "
            + why_not_finite(model, "try --dtype fp32")
        )


@torch.no_grad()
def _weighted_loss(model: CausalLM, batches: Sequence[tuple[Batch, int]]) -> Tensor:
    """The sum of weighted losses in evaluation mode, and that of the weights."""
    sums = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for batch, weight in batches:
            sums += torch.tensor([model_loss(model, batch).item() * weight, weight])
    finally:
        model.train(was_training)
    return sums


def count_experts(
    model: CausalLM, batches: Sequence[Batch], training: Training
) -> dict[str, list[int]] | None:
    """Number of tokens of the batches that each expert gets, by module; None without experts."""
    if training.expert_load is None:
        return None
    with training.expert_load(model) as load:
        _weighted_loss(model, [(batch, 1) for batch in batches])
    return {path: counts.tolist() for path, counts in load.counts.items()}
