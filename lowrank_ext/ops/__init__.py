"""The ops. One file per op: public function, fake, autograd and autocast rule, top to bottom."""

from lowrank_ext.ops._flops import register_flops
from lowrank_ext.ops.lowrank_add import lowrank_add
from lowrank_ext.ops.lowrank_linear import lowrank_linear
from lowrank_ext.ops.moe_lowrank_add import moe_lowrank_add
from lowrank_ext.ops.moe_route import moe_route
from lowrank_ext.ops.multi_lowrank_add import multi_lowrank_add

__all__ = ["lowrank_add", "lowrank_linear", "moe_lowrank_add", "moe_route", "multi_lowrank_add"]

register_flops("lowrank_ext")
