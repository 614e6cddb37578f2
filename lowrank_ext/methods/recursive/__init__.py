"""Relaxed Recursive Transformers: one block of layers that runs several times, with an adapter for
each loop; uptraining, early exits, and an engine that batches rows of any depth."""

from lowrank_ext.methods.recursive.config import RecursiveConfig
from lowrank_ext.methods.recursive.conversion import convert
from lowrank_ext.methods.recursive.engine import (
    DepthwiseEngine,
    Metrics,
    Result,
    Sampling,
    Token,
)
from lowrank_ext.methods.recursive.exits import (
    Agreement,
    Confidence,
    ExitRule,
    FixedDepth,
    ForcedExits,
)
from lowrank_ext.methods.recursive.files import load
from lowrank_ext.methods.recursive.loop_outputs import exit_logits, loop_logits
from lowrank_ext.methods.recursive.losses import LoopLoss, loop_coefficients, loop_loss
from lowrank_ext.methods.recursive.model import is_recursive
from lowrank_ext.methods.recursive.relaxed_linear import RelaxedLinear
from lowrank_ext.methods.recursive.unsharing import unshare
from lowrank_ext.methods.recursive.uptraining import RecursiveTrainerMixin, uptrain_loss

__all__ = [
    "Agreement",
    "Confidence",
    "DepthwiseEngine",
    "ExitRule",
    "FixedDepth",
    "ForcedExits",
    "LoopLoss",
    "Metrics",
    "RecursiveConfig",
    "RecursiveTrainerMixin",
    "RelaxedLinear",
    "Result",
    "Sampling",
    "Token",
    "convert",
    "exit_logits",
    "is_recursive",
    "load",
    "loop_coefficients",
    "loop_logits",
    "loop_loss",
    "unshare",
    "uptrain_loss",
]
