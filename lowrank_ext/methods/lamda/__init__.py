"""LaMDA and LaMDA++."""

from lowrank_ext.methods.lamda.command_line import RECIPES
from lowrank_ext.methods.lamda.config import LaMDAConfig
from lowrank_ext.methods.lamda.files import LaMDAFormat
from lowrank_ext.methods.lamda.freezing import FreezeSchedule
from lowrank_ext.methods.lamda.module import LaMDALinear
from lowrank_ext.methods.lamda.rank_allocation import allocate_ranks, with_allocated_ranks
from lowrank_ext.registry import Method, register

__all__ = ["FreezeSchedule", "LaMDAConfig", "allocate_ranks"]

register(
    Method(
        config_class=LaMDAConfig,
        module_class=LaMDALinear,
        file_format=LaMDAFormat(),
        complete_config=with_allocated_ranks,
        schedule_class=FreezeSchedule,
        recipes=RECIPES,
    )
)
