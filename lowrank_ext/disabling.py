"""disable_adapter: a model as it was before ``adapt``, without a copy of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lowrank_ext.adapt import adapted_modules
from lowrank_ext.base_biases import base_biases
from lowrank_ext.merging import merge_all
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.token_rows import TokenRows
from lowrank_ext.targets import outermost_modules
from lowrank_ext.wrappers import unwrapped

_CALLER = "disable_adapter"


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """A ``with`` block in which ``model`` computes what it computed before ``adapt``.

    The reference of DPO, GRPO or a KL term, without a second model. Its output has the frozen
    base's bits. With a residual start (PiSSA, LaMDA, GOAT) the branch of the start is added to the
    residual weight, so that the output is the base's up to the rounding of that subtraction.

    Modules that are merged are unmerged for the block, and merged again after it. Blocks may be
    nested and may overlap. The whole model is switched: one thread may use it at a time. What
    backward computes again (activation checkpointing) belongs into the block too: call backward
    inside of it, or run the reference under ``torch.no_grad``. A copy made in the block has its
    adapters on.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: the model carries no adapters, is a PEFT model, which has a ``disable_adapter``
            of its own, or has modules_to_save or trained biases (LoRA's ``bias``), which train in
            place and whose earlier values nobody keeps; on leaving, if adapters that were merged
            cannot be merged again: then none is (an exception of the block's own gets a note that
            says so).

    Examples:
        >>> with lr.disable_adapter(model), torch.no_grad():
        ...     reference = model(**batch).logits
    """
    modules = switch_off(model)
    try:
        yield
    except BaseException as error:
        try:
            switch_on(model, modules)
        except ValueError as failed:
            error.add_note(f"{failed}; the adapters are left unmerged")
        raise
    else:
        switch_on(model, modules)


def switch_off(model: nn.Module) -> dict[str, LowRankLinear | TokenRows]:
    """Begin a block: returns its modules, by path."""
    modules = _switchable(model)
    entered: dict[str, LowRankLinear | TokenRows] = {}
    try:
        for path, module in modules.items():
            module.merges_after_blocks |= module.merged
            module.unmerge()
            module.blocks += 1
            entered[path] = module
    except BaseException:
        switch_on(model, entered)
        raise
    return modules


def switch_on(model: nn.Module, modules: dict[str, LowRankLinear | TokenRows]) -> None:
    """End a block of ``modules``."""
    for module in modules.values():
        module.blocks -= 1
    _merge_again(model, modules)


def _switchable(model: nn.Module) -> dict[str, LowRankLinear | TokenRows]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_CALLER}: model must be a torch.nn.Module, got {type(model).__name__}")
    modules = adapted_modules(model, _CALLER)
    config = getattr(unwrapped(model), "lowrank_config", None)
    names = () if config is None else config.modules_to_save
    if names and outermost_modules(model, names):
        raise ValueError(
            f"{_CALLER}: modules_to_save must be empty, they train in place and their earlier "
            f"values are not kept, got {list(names)}"
        )
    if config is not None and base_biases(model, config, modules):
        raise ValueError(
            f"{_CALLER}: bias must be 'none', biases of the base train in place and their earlier "
            f"values are not kept, got {config.bias!r}"
        )
    return modules


def _merge_again(model: nn.Module, modules: dict[str, LowRankLinear | TokenRows]) -> None:
    """Merge what was merged before the first of the blocks, once the last one has ended."""
    waiting = {p: m for p, m in modules.items() if m.merges_after_blocks and not m.blocks}
    for module in waiting.values():
        module.merges_after_blocks = False
    if waiting:
        merge_all(model, waiting, _CALLER)
