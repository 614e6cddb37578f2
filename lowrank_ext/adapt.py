"""Model surgery: low-rank modules in place of a model's linear modules; and what was done."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import torch
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank_ext.config import AdapterConfig
from lowrank_ext.nn.base_layer import (
    adapter_dtype_for,
    computes_its_weight,
    dense_weight,
    linear_features,
)
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.multi import MultiLoRALinear
from lowrank_ext.registry import Method, config_names, method_of
from lowrank_ext.targets import (
    find_targets,
    is_from_peft,
    modules_named,
    outermost_modules,
    shared_tensors,
)

_ADAPTED = (LowRankLinear, MultiLoRALinear)
# Eval-mode shortcuts of torch's transformer, which read the weights of linears and never call them.
_FUSED_FLAGS: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}

Model = TypeVar("Model", bound=nn.Module)


def adapt(model: Model, config: AdapterConfig, *, initialise: bool = True) -> Model:
    """Replace the modules ``config`` names by adapted ones, in place, and freeze everything else.

    Afterwards exactly the adapters (what of them trains) and ``modules_to_save`` require gradients.
    The output is the base model's, bit for bit where the init starts with a zero branch (GOAT's SVD
    inits give it on average only, see GOATConfig). A module
    that is registered at several paths is adapted once and stays shared; tied weights stay tied.
    The config, with the ranks LaMDA++ found, is kept as ``model.lowrank_config``. torch's fused
    eval path of nn.TransformerEncoderLayer, which would bypass the adapters, is switched off in
    adapted layers.

    Args:
        model: any torch or transformers model; returned.
        config: of the method, see ``lowrank_ext.config``.
        initialise: False leaves the adapters at zero and the base untouched, for a loader that
            fills them.

    Raises:
        TypeError: model or config has the wrong type, or the model is itself a linear module.
        ValueError: a name matches nothing, a module cannot be adapted with these options, a weight
            that an init would change is tied to another module, or the model carries adapters
            already. All of this is checked before the first change.

    Example:
        >>> model = adapt(model, LoRAConfig(r=8, target_modules=["q_proj", "v_proj"]))
    """
    method = _checked_method(model, config)
    module_class = method.module_class
    targets = find_targets(model, config)
    config = method.complete_config(model, config, targets)
    _check_options(model, config, module_class, targets)
    model.requires_grad_(False)
    replace_modules(
        model,
        {
            module: module_class.from_linear(module, config.for_module(path), initialise=initialise)
            for path, module in targets.items()
        },
    )
    module_class.connect(model)
    _unfreeze(model, config)
    set_fused_encoders(model, on=False)
    model.lowrank_config = config  # type: ignore[assignment]
    return model


def lowrank_modules(model: nn.Module, caller: str) -> dict[str, LowRankLinear]:
    """Path and module of every adapter of the model.

    Raises:
        ValueError: there is none.
    """
    modules = {path: m for path, m in model.named_modules() if isinstance(m, LowRankLinear)}
    if not modules:
        for path, module in model.named_modules():
            if isinstance(module, MultiLoRALinear):
                raise ValueError(
                    f"{caller}: model must carry adapters of adapt, got a MultiLoRALinear at "
                    f"{path or 'the model itself'}, whose adapters are chosen for each row and "
                    "never become a part of the weight; use what made it, an AdapterBank or a "
                    "GuardModel"
                )
        raise ValueError(
            f"{caller}: model must carry adapters, got a {type(model).__name__} with none"
        )
    return modules


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module wherever its old one is registered in the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def set_fused_encoders(model: nn.Module, on: bool) -> None:
    """Switch torch's fused encoder path off where it contains adapters, or on again everywhere."""
    for module in model.modules():
        flag = next((f for cls, f in _FUSED_FLAGS.items() if isinstance(module, cls)), None)
        kept: dict[str, Any] = vars(module)
        if flag is None or (not on and not any(isinstance(m, _ADAPTED) for m in module.modules())):
            continue
        if on and "fused_path_before_adapt" in kept:
            kept[flag] = kept.pop("fused_path_before_adapt")
        elif not on:
            kept["fused_path_before_adapt"], kept[flag] = kept[flag], 0


class TrainableParameters(NamedTuple):
    """Numbers of parameters; ``percent`` is 100 · trainable / total."""

    trainable: int
    total: int
    percent: float


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """How many of the model's parameters train. A parameter with several owners counts once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total = sum(size for size, _ in sizes)
    trainable = sum(size for size, trains in sizes if trains)
    return TrainableParameters(trainable, total, 100 * trainable / total if total else 0.0)


def summary(model: nn.Module) -> Table:
    """A rich table of what was adapted: one row for each kind of module and shape, then the rest.

    Size is the memory of the adapter's own tensors (for modules trained whole: of the module).

    Raises:
        ValueError: the model carries no adapters.
    """
    kinds: dict[tuple[str, str, int, int], list[LowRankLinear]] = {}
    for path, m in lowrank_modules(model, "summary").items():
        name = path.rpartition(".")[2] or "(model)"
        kinds.setdefault((name, type(m).__name__, m.in_features, m.out_features), []).append(m)
    numbers = trainable_parameters(model)
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
            kind.removesuffix("Linear"),
            str(len(modules)),
            f"{num_in} → {num_out}",
            _span([m.r for m in modules]),
            _span([m.scaling for m in modules]),
            *_trainable_and_size(own),
        )
    for name, saved in _saved_modules(model).items():
        tensors = [*saved.parameters(), *saved.buffers()]
        table.add_row(name, type(saved).__name__, "1", "", "", "", *_trainable_and_size(tensors))
    return table


class HookHandles:
    """Removes several hooks at once: ``remove()``, or at the end of a ``with`` block."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def prepare_for_checkpointing(model: nn.Module) -> HookHandles:
    """Let gradients reach the adapters through reentrant activation checkpointing.

    Reentrant checkpointing differentiates a block only if one of its inputs requires a gradient,
    which the output of a frozen embedding does not. A hook makes the output of the input embeddings
    require one; the embedding weights stay frozen. Call it before or after switching checkpointing
    on. With ``use_reentrant=False`` it is not needed and only costs an input gradient.

    The embeddings are what ``model.get_input_embeddings()`` returns, else every nn.Embedding.

    Returns:
        A handle whose ``remove()`` takes the hooks away; also a context manager.

    Raises:
        ValueError: the model has no embedding; make the input tensor require a gradient instead.
    """
    embeddings = _input_embeddings(model)
    if not embeddings:
        raise ValueError(
            f"prepare_for_checkpointing: model must have input embeddings, got a "
            f"{type(model).__name__} with none; call requires_grad_() on its input instead"
        )
    return HookHandles([module.register_forward_hook(_require_grad) for module in embeddings])


def _require_grad(module: nn.Module, args: Any, output: Any) -> None:
    if torch.is_grad_enabled() and isinstance(output, Tensor) and not output.requires_grad:
        output.requires_grad_()


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    get_embeddings = getattr(model, "get_input_embeddings", None)
    if callable(get_embeddings):
        try:
            found = get_embeddings()
        except NotImplementedError:  # transformers raises it where it cannot tell
            found = None
        if isinstance(found, nn.Module):
            return [found]
    return [m for m in model.modules() if isinstance(m, nn.Embedding)]


def _checked_method(model: nn.Module, config: AdapterConfig) -> Method:
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt: model must be a torch.nn.Module, got {type(model).__name__}")
    method = method_of(config) if isinstance(config, AdapterConfig) else None
    if method is None:
        raise TypeError(f"adapt: config must be a {config_names()}, got {type(config).__name__}")
    for path, module in model.named_modules():
        where = path or "the model itself"
        if isinstance(module, _ADAPTED):
            raise ValueError(
                f"adapt: model must not be adapted yet, got a {type(module).__name__} at {where}; "
                "use unload first"
            )
        if is_from_peft(module):
            raise ValueError(
                f"adapt: model must carry no PEFT adapter, got peft's "
                f"{type(module).__qualname__} at {where}; pass the base model"
            )
    return method


def _check_options(
    model: nn.Module,
    config: AdapterConfig,
    module_class: type[LowRankLinear],
    targets: Mapping[str, nn.Module],
) -> None:
    """Raise for whatever would make building one of the modules fail, or change a tied weight."""
    by_svd = config.init in module_class.svd_inits
    residual = config.init in module_class.residual_inits
    weights = {m: w for m in targets.values() if (w := dense_weight(m)) is not None}
    shared = shared_tensors(model, weights) if residual else {}
    for path, module in targets.items():
        features = linear_features(module)
        assert features is not None  # find_targets returns no other modules
        weight = weights.get(module)
        try:
            module_class.check_fits(*features, config.for_module(path))
            adapter_dtype_for(
                None if weight is None else weight.dtype,
                config.adapter_dtype,
                module_class.__name__,
            )
        except ValueError as error:
            raise ValueError(f"adapt: {path}: {error}") from None
        if by_svd and not computes_its_weight(module):
            raise ValueError(
                f"adapt: {path}: init must be one without an SVD of the base weight for a "
                f"{type(module).__name__} that is not x weightᵀ + bias, got {config.init!r}"
            )
        if by_svd and weight is not None and not (weight.is_meta or torch.isfinite(weight).all()):
            raise ValueError(
                f"adapt: {path}: weight must be finite for init={config.init!r}, got inf or nan"
            )
        if shared.get(module):
            raise ValueError(
                f"adapt: {path}: init={config.init!r} would change the weight, which is tied to "
                f"{', '.join(shared[module])}; exclude the module or use an init that leaves the "
                "base alone"
            )


def _unfreeze(model: nn.Module, config: AdapterConfig) -> None:
    if not config.whole_modules_train:
        return
    for module in modules_named(model, config.modules_to_save):
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_()


def _saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Outermost modules that train whole."""
    config = getattr(model, "lowrank_config", None)
    return outermost_modules(model, () if config is None else config.modules_to_save)


def _trainable_and_size(tensors: list[Tensor]) -> tuple[str, str]:
    trainable = sum(t.numel() for t in tensors if t.requires_grad)
    return f"{trainable:,}", decimal(sum(t.numel() * t.element_size() for t in tensors))


def _span(values: list[int] | list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} … {high:g}"
