"""Numbers of parameters of a model, and a table of its adapters."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from lowrank_ext.adapt import lowrank_modules, token_rows_of
from lowrank_ext.base_biases import base_biases
from lowrank_ext.left_out import LeftOut, left_out
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.targets import outermost_modules
from lowrank_ext.wrappers import unwrapped

if TYPE_CHECKING:
    from rich.table import Table


class TrainableParameters(NamedTuple):
    """Numbers of parameters; ``percent`` is 100 · trainable / total."""

    trainable: int
    total: int
    percent: float


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """How many of the model's parameters train; a shared parameter counts once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total = sum(size for size, _ in sizes)
    trainable = sum(size for size, trains in sizes if trains)
    return TrainableParameters(trainable, total, 100 * trainable / total if total else 0.0)


def summary(model: nn.Module) -> "Table":
    """A rich table of the adapters: a row for each kind of module and shape, then other modules.

    Weights that "all-linear" leaves out, such as experts stacked in one parameter, have rows "not
    adapted". Size is the memory of the adapter's tensors (of the whole module for modules_to_save).

    Raises:
        ValueError: the model carries no adapters.
    """
    kinds: dict[tuple[str, str, int, int], list[LowRankLinear]] = {}
    for path, m in lowrank_modules(model, "summary").items():
        name = path.rpartition(".")[2] or "(model)"
        kinds.setdefault((name, m.kind, m.in_features, m.out_features), []).append(m)
    numbers = trainable_parameters(model)
    from rich.table import Table  # here, so that import lowrank_ext stays fast

    table = Table(
        title=f"{numbers.trainable:,} of {numbers.total:,} parameters train "
        f"({numbers.percent:.3g} %)"
    )
    table.add_column("module")
    table.add_column("kind")
    for heading in ("count", "in → out", "rank", "scaling", "trainable", "size"):
        table.add_column(heading, justify="right")
    for (name, kind, num_in, num_out), modules in kinds.items():
        own = [t for m in modules for t in m.adapter_tensors().values()]
        table.add_row(
            name,
            kind,
            str(len(modules)),
            f"{num_in} → {num_out}",
            _span([m.r for m in modules]),
            _span([m.scaling for m in modules]),
            *_trainable_and_size(own),
        )
    for path, rows in token_rows_of(model).items():
        shape = f"{rows.in_features} → {rows.out_features}"
        row = path.rpartition(".")[2], f"{len(rows.indices)} token rows", "1", shape, "", ""
        table.add_row(*row, *_trainable_and_size([rows.rows]))
    for each in _grouped(left_out(model)):
        tensors = [weight for one in each for weight in one.weights]
        name, kind = each[0].path.rpartition(".")[2] or "(model)", type(each[0].module).__name__
        row = name, f"{kind}, not adapted", str(len(each)), "", "", ""
        table.add_row(*row, *_trainable_and_size(tensors))
    if biases := _trained_biases(model):
        row = "bias", "of the base", str(len(biases)), "", "", ""
        table.add_row(*row, *_trainable_and_size(biases))
    for name, saved in _saved_modules(model).items():
        tensors = [*saved.parameters(), *saved.buffers()]
        table.add_row(name, type(saved).__name__, "1", "", "", "", *_trainable_and_size(tensors))
    return table


def _grouped(missing: Sequence[LeftOut]) -> list[list[LeftOut]]:
    """Those of one name and class together."""
    groups: dict[tuple[str, type[nn.Module]], list[LeftOut]] = {}
    for each in missing:
        groups.setdefault((each.path.rpartition(".")[2], type(each.module)), []).append(each)
    return list(groups.values())


def _saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Outermost modules of modules_to_save."""
    config = getattr(unwrapped(model), "lowrank_config", None)
    return outermost_modules(model, () if config is None else config.modules_to_save)


def _trained_biases(model: nn.Module) -> list[Tensor]:
    """Biases of the base that train with the adapters."""
    config = getattr(unwrapped(model), "lowrank_config", None)
    if config is None:
        return []
    return list(base_biases(model, config, lowrank_modules(model, "summary")).values())


def _trainable_and_size(tensors: list[Tensor]) -> tuple[str, str]:
    from rich.filesize import decimal

    trainable = sum(t.numel() for t in tensors if t.requires_grad)
    return f"{trainable:,}", decimal(sum(t.numel() * t.element_size() for t in tensors))


def _span(values: list[int] | list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} … {high:g}"
