"""A table of a recursive model: what its loops share, and what each has of its own."""

from typing import TYPE_CHECKING, Any

from torch import nn

from lowrank_ext.methods.recursive.model import Loops
from lowrank_ext.methods.recursive.relaxed_linear import RelaxedLinear
from lowrank_ext.methods.recursive.source_checks import check_no_adapters

if TYPE_CHECKING:
    from rich.table import Table

# Path in a layer, in → out, rank.
Kind = tuple[str, str, str]


def summary(model: nn.Module) -> "Table":
    """A rich table of a recursive model: a row for each kind of module in a layer that holds
    parameters, by path, then everything outside of the layers.

    Tied are the parameters that all loops share, adapters those of all loops together; both are
    stored once. Unshared is what ``unshare`` makes of them. A rank with a star is min(in_features,
    out_features), less than the config asks for.

    Raises:
        TypeError: the model is not recursive.
        ValueError: it is adapted, by ``lowrank_ext.adapt`` or PEFT; ``lowrank_ext.summary`` has a
            table of that.
    """
    from rich.table import Table  # here, so that import lowrank_ext stays fast

    loops = Loops(model, "summary")
    check_no_adapters(loops.decoder.model, "summary")
    kinds = _kinds(loops)
    stored = sum(parameter.numel() for parameter in loops.decoder.model.parameters())
    tied = sum(own for own, _ in kinds.values())
    outside = stored - tied - sum(adapters for _, adapters in kinds.values())
    unshared = outside + tied * loops.num_loops
    table = Table(
        title=f"{loops.num_loops} loops of {loops.length} layers: {stored:,} parameters stored, "
        f"{100 * stored / unshared:.3g} % of {unshared:,} unshared",
    )
    table.add_column("in each layer")
    for heading in ("in → out", "rank", "tied", "adapters", "unshared"):
        table.add_column(heading, justify="right")
    for kind, (own, adapters) in kinds.items():
        table.add_row(*kind, f"{own:,}", f"{adapters:,}", f"{own * loops.num_loops:,}")
    table.add_section()
    table.add_row("outside of the layers", "", "", f"{outside:,}", "0", f"{outside:,}")
    if any(rank.endswith("*") for _, _, rank in kinds):
        table.caption = "* of full rank, below the rank asked for"
    return table


def _kinds(loops: Loops) -> dict[Kind, tuple[int, int]]:
    """Numbers of tied parameters and of adapters' parameters, by kind of module."""
    found: dict[Kind, tuple[int, int]] = {}
    for loop in range(loops.num_loops):
        for layer in loops.layers(loop):
            for path, module in layer.named_modules():
                own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
                if not own:
                    continue
                is_relaxed = isinstance(module, RelaxedLinear)
                adapter = module.lora_a.numel() + module.lora_b.numel() if is_relaxed else 0
                kind = _kind(path, module, loops)
                tied, adapters = found.get(kind, (0, 0))
                # Later loops have the same tied parameters.
                tied += own - adapter if loop == 0 else 0
                found[kind] = tied, adapters + adapter
    return found


def _kind(path: str, module: Any, loops: Loops) -> Kind:
    if not isinstance(module, nn.Linear):
        return path, "", ""
    sizes = f"{module.in_features} → {module.out_features}"
    if not isinstance(module, RelaxedLinear):
        return path, sizes, "0"
    is_clamped = module.r < loops.config.asked_rank(path)
    return path, sizes, f"{module.r}*" if is_clamped else f"{module.r}"
