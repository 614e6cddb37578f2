"""The list of methods, a line each, in the order in which messages and the command line name them.

Importing a folder registers its method. Names in the folder's ``__all__`` are public in ``lr``;
systems on top of models are public under one name, as ``lr.guard``, ``lr.recursive``, ``lr.style``.
"""

from lowrank_ext.methods.lora import *
from lowrank_ext.methods.lamda import *
from lowrank_ext.methods.aflora import *
from lowrank_ext.methods.goat import *
from lowrank_ext.methods.reslora import *
from lowrank_ext.methods.set_and_sequence import *
from lowrank_ext.methods import lora_guard as guard
from lowrank_ext.methods import recursive
from lowrank_ext.methods import style_adapter as style

# All names imported above, without the folders themselves, but for the one that is its public name.
__all__ = [
    name
    for name, value in list(globals().items())
    if not name.startswith("_")
    and (value is recursive or getattr(value, "__name__", "") != f"{__name__}.{name}")
]
