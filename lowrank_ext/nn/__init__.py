"""Modules: parameters, initialisation and one op call in forward."""

from lowrank_ext.nn.lamda import LaMDALinear
from lowrank_ext.nn.linear import LoRALinear, LowRankLinear
from lowrank_ext.nn.multi import MultiLoRALinear

__all__ = ["LaMDALinear", "LoRALinear", "LowRankLinear", "MultiLoRALinear"]
