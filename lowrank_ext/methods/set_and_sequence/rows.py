"""rows: a different residual for each row of a batch."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from lowrank_ext.checks import did_you_mean
from lowrank_ext.methods.set_and_sequence.module import IDENTITY, BasisLoRALinear
from lowrank_ext.methods.set_and_sequence.stages import basis_modules
from lowrank_ext.nn.rows import ROWS_NUMBERS, check_names, rows_block

_LOCK = threading.Lock()


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """A ``with`` block in which row b of every batch uses the residual ``names[b]``.

    None stands for the identity alone. A row's residual has scale 1, whatever ``set_scales`` has
    set for it; the identity keeps its scale. The first dimension of every input of an adapted
    module must be the batch.

    The block belongs to the current context (contextvars): other threads and tasks are not
    affected, and a thread started inside it does not inherit it. A second run by activation
    checkpointing must happen inside it. A compiled model is recompiled once, at its first block.

    Raises:
        ValueError: the model has no BasisLoRALinear or is merged, or a name is unknown; inside the
            block: the batch has another number of rows.
        TypeError: ``names`` is a string, or has an item that is neither a string nor None.
        RuntimeError: the model is in training mode.

    Examples:
        >>> with lr.motion.rows(model, ["dance", "wave", None]):
        ...     velocity = model(latents_of_three, timestep, text)
    """
    caller = "motion.rows"
    check_names(names, caller)
    modules = basis_modules(model, caller)
    _check(modules, [name for name in names if name is not None], caller)
    number = _number_of(modules)
    with rows_block(number, [IDENTITY if name is None else name for name in names], caller):
        yield


def _check(modules: Mapping[str, BasisLoRALinear], names: Sequence[str], caller: str) -> None:
    for path, module in modules.items():
        if module.merged:
            raise ValueError(f"{caller}: {path} must not be merged, call unmerge first")
        if module.training:
            raise RuntimeError(f"{caller}: {path} must be in evaluation mode, call model.eval()")
        for name in names:
            if name not in module.residuals:
                raise ValueError(
                    f"{caller}: names must be residuals among {list(module.residuals)}, "
                    f"got {name!r}{did_you_mean(name, module.residuals)}"
                )


def _number_of(modules: Mapping[str, BasisLoRALinear]) -> int:
    """The number by which the model's modules find their block, assigned at first use."""
    with _LOCK:
        numbers = {module.rows_number for module in modules.values()}
        if len(numbers) > 1 or -1 in numbers:
            numbers = {next(ROWS_NUMBERS)}
            for module in modules.values():
                module.rows_number = max(numbers)
        return max(numbers)
