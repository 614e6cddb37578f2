"""disable_adapter: a model as it was before ``adapt``, without a copy of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lowrank_ext.adapt import lowrank_modules
from lowrank_ext.targets import outermost_modules
from lowrank_ext.wrappers import unwrapped


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """A ``with`` block in which ``model`` computes what it computed before ``adapt``.

    The reference of DPO, GRPO or a KL term, without a second model. Its output has the frozen
    base's bits. With a residual start (PiSSA, LaMDA, GOAT) the branch of the start is added to the
    residual weight, so that the output is the base's up to the rounding of that subtraction.

    Modules that are merged are unmerged for the block, and merged again. Blocks may be nested. The
    whole model is switched: one thread may use it at a time.

    Raises:
        ValueError: the model carries no adapters, or has modules_to_save, which train in place and
            whose earlier values nobody keeps.

    Examples:
        >>> with lr.disable_adapter(model), torch.no_grad():
        ...     reference = model(**batch).logits
    """
    caller = "disable_adapter"
    modules = lowrank_modules(model, caller)
    config = getattr(unwrapped(model), "lowrank_config", None)
    names = () if config is None else config.modules_to_save
    if names and outermost_modules(model, names):
        raise ValueError(
            f"{caller}: modules_to_save must be empty, they train in place and their earlier "
            f"values are not kept, got {list(names)}"
        )
    before = [(module, module.enabled) for module in modules.values()]
    merged = [module for module in modules.values() if module.merged]
    try:
        for module in merged:
            module.unmerge()
        for module in modules.values():
            module.enabled = False
        yield
    finally:
        for module, was_enabled in before:
            module.enabled = was_enabled
        for module in merged:
            module.merge()
