"""Which embeddings and heads train single rows: trainable_token_indices of a config."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from lowrank_ext.checks import did_you_mean, matches_names
from lowrank_ext.config import AdapterConfig
from lowrank_ext.nn.base_layer import EMBEDDING, adapter_dtype_for, family_of, offload_device
from lowrank_ext.nn.token_rows import TiedTokenRows, TokenRows
from lowrank_ext.wrappers import named_modules, unwrapped

_NAME = "embed_tokens"  # PEFT's, where a model does not tell its input embeddings
_UNTOLD = "leaves alone what is tied without tie_word_embeddings in the model's config"

Tokens = dict[str, tuple[int, ...]]  # by module path


class TokenTargets(NamedTuple):
    """What ``token_targets`` has found.

    Attributes:
        tokens: of each module whose rows train.
        owners: by path of a module that computes with the rows of another: that one's path.
        indices: trainable_token_indices that select exactly these, here and in PEFT.
    """

    tokens: Tokens
    owners: dict[str, str]
    indices: tuple[int, ...] | Tokens | None


def token_targets(
    model: nn.Module, config: AdapterConfig, taken: Collection[nn.Module], caller: str
) -> TokenTargets:
    """The modules that trainable_token_indices of ``config`` selects; none where it is None.

    Modules whose weight is an embedding's compute with its rows, as in PEFT, unless they are given
    other tokens.

    Args:
        taken: modules that are adapted or trained as a whole.

    Raises:
        ValueError: a name matches nothing, a module is no embedding or head, or is taken, a token
            has no row, or a weight has no values.
    """
    tokens = named_tokens(model, config.trainable_token_indices, caller)
    modules = dict(named_modules(model))
    owners: dict[str, str] = {}
    for path in list(tokens):
        if path in tokens and family_of(modules[path]) == EMBEDDING:
            for other in _tied_to(modules, path):
                if tokens.get(other, tokens[path]) == tokens[path]:
                    tokens.pop(other, None)
                    owners[other] = path
    for path in (*tokens, *owners):
        _check(path, modules[path], tokens[owners.get(path, path)], taken, model, caller)
    alone = isinstance(config.trainable_token_indices, tuple) and _input_embeddings(model)
    indices = config.trainable_token_indices if alone else tokens or None
    return TokenTargets(tokens, owners, indices)


def named_tokens(model: nn.Module, indices: Any, caller: str) -> Tokens:
    """The tokens of each module that ``indices``, of a config, names."""
    modules = dict(named_modules(model))
    if indices is None:
        return {}
    if not isinstance(indices, Mapping):
        inputs = _input_embeddings(model)
        indices = {inputs or _NAME: indices}
    tokens: Tokens = {}
    for name, ids in indices.items():
        found = [path for path in modules if path and matches_names(path, [name])]
        if not found:
            raise ValueError(
                f"{caller}: trainable_token_indices must name modules of the model, got {name!r}, "
                f"which matches none{did_you_mean(name, modules)}"
            )
        tokens |= dict.fromkeys(found, ids)
    return tokens


def token_modules(
    model: nn.Module, targets: TokenTargets, config: AdapterConfig
) -> dict[nn.Module, nn.Module]:
    """The new modules, by those that they replace."""
    modules = dict(named_modules(model))
    made: dict[str, TokenRows] = {}
    for path, tokens in targets.tokens.items():
        base: Any = modules[path]
        dtype = adapter_dtype_for(base.weight.dtype, config.adapter_dtype, "TokenRows")
        made[path] = TokenRows(base, tokens, dtype)
    replacements: dict[nn.Module, nn.Module] = {modules[path]: new for path, new in made.items()}
    told = getattr(getattr(unwrapped(model), "config", None), "tie_word_embeddings", False)
    for path, owner in targets.owners.items():
        tied = replacements[modules[path]] = TiedTokenRows(modules[path], made[owner])
        if not told:
            tied.differs_in_peft = _UNTOLD
    return replacements


def _input_embeddings(model: nn.Module) -> str | None:
    """Path of the model's input embeddings, if it tells them."""
    get = getattr(unwrapped(model), "get_input_embeddings", None)
    try:
        module = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # transformers finds none
        return None
    if not isinstance(module, nn.Module):
        return None
    own = unwrapped(module)
    return next((path for path, each in named_modules(model) if each is own), None)


def _tied_to(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Paths of the other modules with the same weight."""
    weight = modules[path]._parameters.get("weight")
    return [
        other
        for other, module in modules.items()
        if other != path and weight is not None and module._parameters.get("weight") is weight
    ]


def _check(
    path: str,
    module: nn.Module,
    tokens: tuple[int, ...],
    taken: Collection[nn.Module],
    model: nn.Module,
    caller: str,
) -> None:
    if module in taken:
        raise ValueError(
            f"{caller}: trainable_token_indices must name modules that are neither adapted nor in "
            f"modules_to_save, got {path}"
        )
    try:
        TokenRows.check_base(module)
    except ValueError as error:
        raise ValueError(f"{caller}: {path}: {error}") from None
    weight: Any = module._parameters["weight"]
    if max(tokens) >= len(weight):
        raise ValueError(
            f"{caller}: trainable_token_indices must be below {len(weight)}, the number of rows of "
            f"{path}, got {max(tokens)}"
        )
    alone = weight.is_meta and not all(parameter.is_meta for parameter in model.parameters())
    if alone or offload_device(module) is not None:
        raise ValueError(
            f"{caller}: {path}: the weight must hold values for trainable_token_indices, got an "
            "offloaded one; leave it on a device"
        )
