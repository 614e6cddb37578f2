"""Modules: parameters, initialisation and one op call in forward."""

from lowrank_ext.nn.aflora import AFLoRALinear
from lowrank_ext.nn.basis import BasisLoRALinear
from lowrank_ext.nn.goat import GOATLinear
from lowrank_ext.nn.lamda import LaMDALinear
from lowrank_ext.nn.linear import LoRALinear, LowRankLinear
from lowrank_ext.nn.multi import MultiLoRALinear
from lowrank_ext.nn.reslora import ResLoRALinear

__all__ = [
    "AFLoRALinear",
    "BasisLoRALinear",
    "GOATLinear",
    "LaMDALinear",
    "LoRALinear",
    "LowRankLinear",
    "MultiLoRALinear",
    "ResLoRALinear",
]
