"""Relaxed Recursive Transformers: one block of layers that runs several times, with an adapter for
each loop; uptraining, early exits, and an engine that batches rows of any depth."""

from lowrank_ext.methods.recursive.calibration import Agreed, Calibration, calibrate
from lowrank_ext.methods.recursive.config import RecursiveConfig
from lowrank_ext.methods.recursive.conversion import convert
from lowrank_ext.methods.recursive.engine import (
    AttentionWork,
    DepthwiseEngine,
    Metrics,
    Result,
    Sampling,
    Token,
)
from lowrank_ext.methods.recursive.evaluation import Evaluation, ExitOutcome, evaluate
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
from lowrank_ext.methods.recursive.pass_costs import (
    BlockSizes,
    HardwareRoofline,
    PassCosts,
    measure_pass_costs,
    roofline_costs,
)
from lowrank_ext.methods.recursive.relaxed_linear import RelaxedLinear
from lowrank_ext.methods.recursive.summary import summary
from lowrank_ext.methods.recursive.throughput import PlannedRequest, predict_throughput
from lowrank_ext.methods.recursive.unsharing import unshare
from lowrank_ext.methods.recursive.uptraining import RecursiveTrainerMixin, uptrain_loss

__all__ = [
    "Agreed",
    "Agreement",
    "AttentionWork",
    "BlockSizes",
    "Calibration",
    "Confidence",
    "DepthwiseEngine",
    "Evaluation",
    "ExitOutcome",
    "ExitRule",
    "FixedDepth",
    "ForcedExits",
    "HardwareRoofline",
    "LoopLoss",
    "Metrics",
    "PassCosts",
    "PlannedRequest",
    "RecursiveConfig",
    "RecursiveTrainerMixin",
    "RelaxedLinear",
    "Result",
    "Sampling",
    "Token",
    "calibrate",
    "convert",
    "evaluate",
    "exit_logits",
    "is_recursive",
    "load",
    "loop_coefficients",
    "loop_logits",
    "loop_loss",
    "measure_pass_costs",
    "predict_throughput",
    "roofline_costs",
    "summary",
    "unshare",
    "uptrain_loss",
]
