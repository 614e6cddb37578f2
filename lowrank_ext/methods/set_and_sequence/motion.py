"""Set-and-Sequence on whole models: stages, scales, residuals per row, residual files.

The method: docs/methods/set_and_sequence.md; one module: ``lowrank_ext.nn.BasisLoRALinear``.
"""

from lowrank_ext.methods.set_and_sequence.residual_files import load_residual, save_residual
from lowrank_ext.methods.set_and_sequence.rows import rows
from lowrank_ext.methods.set_and_sequence.stages import begin_residual_stage, set_scales

__all__ = [
    "begin_residual_stage",
    "load_residual",
    "rows",
    "save_residual",
    "set_scales",
]
