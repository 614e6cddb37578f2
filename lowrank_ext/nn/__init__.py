"""Modules: parameters, initialisation and one op call in forward."""

from lowrank_ext.nn.lamda import LaMDALinear
from lowrank_ext.nn.linear import LoRALinear, LowRankLinear

__all__ = ["LaMDALinear", "LoRALinear", "LowRankLinear"]
