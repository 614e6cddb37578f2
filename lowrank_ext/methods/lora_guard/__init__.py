"""LoRA-Guard: a model that generates like its base and classifies texts by LoRA and a head."""

from lowrank_ext.methods.lora_guard.loss import GuardLoss, positive_weights
from lowrank_ext.methods.lora_guard.metrics import (
    PrecisionRecall,
    average_precision,
    precision_recall,
)
from lowrank_ext.methods.lora_guard.model import GuardModel, GuardOutput, Overhead, last_token_index
from lowrank_ext.methods.lora_guard.screening import TextScore, conversation, screen

__all__ = [
    "GuardLoss",
    "GuardModel",
    "GuardOutput",
    "Overhead",
    "PrecisionRecall",
    "TextScore",
    "average_precision",
    "conversation",
    "last_token_index",
    "positive_weights",
    "precision_recall",
    "screen",
]
