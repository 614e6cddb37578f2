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
_NO_INPUTS = "leaves alone what is tied to other embeddings than the model's input embeddings"

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

    Modules whose weight is an embedding's compute with its rows, as in PEFT; of two modules with
    one weight, each may have its own tokens. The order of a mapping does not matter.

    Args:
        taken: modules that are adapted or trained as a whole.

    Raises:
        ValueError: a name matches nothing, a module is no embedding or head, or is taken, a token
            has no row, a weight has no values, a weight of more than two modules is given different
            tokens, or that of the input embeddings is given tokens under another's name.
    """
    tokens = named_tokens(model, config.trainable_token_indices, caller)
    modules = dict(named_modules(model))
    owners: dict[str, str] = {}
    for tied in _tied(modules, tokens):
        if (owner := _owner(model, modules, tied, tokens, caller)) is not None:
            owners |= {path: owner for path in tied if path != owner}
    tokens = {path: ids for path, ids in tokens.items() if path not in owners}
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
    inputs = _input_embeddings(model)
    for path, owner in targets.owners.items():
        tied = replacements[modules[path]] = TiedTokenRows(modules[path], made[owner])
        if not told:
            tied.differs_in_peft = _UNTOLD
        elif owner != inputs:
            tied.differs_in_peft = _NO_INPUTS
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


def _tied(modules: Mapping[str, nn.Module], tokens: Tokens) -> list[list[str]]:
    """Paths of the modules with one weight, for each weight that several have and that is named."""
    by_weight: dict[nn.Parameter, list[str]] = {}
    for path, module in modules.items():
        if (weight := module._parameters.get("weight")) is not None:
            by_weight.setdefault(weight, []).append(path)
    named = {modules[path]._parameters.get("weight") for path in tokens}
    return [paths for weight, paths in by_weight.items() if weight in named and len(paths) > 1]


def _owner(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    tied: list[str],
    tokens: Tokens,
    caller: str,
) -> str | None:
    """The embedding whose rows all of ``tied`` compute with; None where each has its own."""
    named = [path for path in tied if path in tokens]
    embeddings = [path for path in named if family_of(modules[path]) == EMBEDDING]
    if not embeddings:
        return None
    first, *others = named
    other = next((path for path in others if tokens[path] != tokens[first]), None)
    if other is not None and len(tied) > 2:
        raise ValueError(
            f"{caller}: trainable_token_indices must give the same tokens to modules of one weight "
            f"({', '.join(tied)}), got {list(tokens[first])} for {first} and {list(tokens[other])} "
            f"for {other}"
        )
    if other is not None:
        return None
    inputs = _input_embeddings(model)
    if inputs in tied and inputs not in named:
        raise ValueError(
            f"{caller}: trainable_token_indices must name the input embeddings {inputs} for the "
            f"modules tied to these, got {embeddings[0]}, for which PEFT computes another model"
        )
    return inputs if inputs in tied else embeddings[0]


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
