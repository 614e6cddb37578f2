"""Trained rows of embeddings (trainable_token_indices) in PEFT's files.

With P for ``base_model.model.<path>`` the tensor file holds P.token_adapter.trainable_tokens_delta
[t, N], the rows themselves, of every module that owns some. Where PEFT saves embeddings, too, it
repeats the rows for modules that are tied to such a one.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ext.adapt import token_rows_of
from lowrank_ext.adapter_files import AdapterFiles
from lowrank_ext.adapter_format import Adapters
from lowrank_ext.checkpoint.layout import PREFIX, bad_key
from lowrank_ext.config import AdapterConfig
from lowrank_ext.nn.token_rows import TiedTokenRows
from lowrank_ext.token_targets import TokenTargets, named_tokens, token_targets
from lowrank_ext.wrappers import named_modules, unwrapped

ROWS = "token_adapter.trainable_tokens_delta"


class RowsInFile(NamedTuple):
    """What a file says of rows: where they belong, and the names of their tensors."""

    targets: TokenTargets
    keys: dict[str, str]  # by path, of tied modules too


def rows_in_file(
    model: nn.Module,
    files: AdapterFiles,
    config: AdapterConfig,
    others: Mapping[str, Tensor],
    taken: Collection[nn.Module],
) -> RowsInFile:
    """The rows among ``others``, the tensors of a file that belong to no adapter.

    Args:
        taken: modules that the file adapts or holds as a whole.

    Raises:
        ValueError: the config selects other modules than the file has rows for, a shape does not
            fit, or the rows of the model are merged or of other tokens.
    """
    where = f"{files.caller}: {files.config_path}"
    targets = _present(model, config, where)
    if targets is None:
        targets = token_targets(model, config, taken, where)
    keys = {key.removesuffix(f".{ROWS}"): key for key in others if key.endswith(f".{ROWS}")}
    present = dict(named_modules(model))
    for path, tokens in targets.tokens.items():
        if path not in keys:
            raise bad_key(files, f"{PREFIX}{path}.{ROWS}", "is missing")
        _check_shape(files, keys[path], others[keys[path]], len(tokens), present[path])
    for path, key in keys.items():
        if path not in targets.tokens and path not in targets.owners:
            raise bad_key(
                files, PREFIX + key, "belongs to no module of trainable_token_indices in the config"
            )
    return RowsInFile(targets, keys)


def _present(model: nn.Module, config: AdapterConfig, where: str) -> TokenTargets | None:
    """The rows of an adapted model, if it is one and the config says the same."""
    modules = dict(named_modules(model))
    rows = token_rows_of(model)
    tied = {path: m for path, m in modules.items() if isinstance(m, TiedTokenRows)}
    own = getattr(unwrapped(model), "lowrank_config", None)
    if own is None and not rows:
        return None
    tokens = named_tokens(model, config.trainable_token_indices, where)
    for path, module in rows.items():
        if module.merged:
            raise ValueError(f"{where}: {path} must not be merged; call unmerge first")
    expected = {path: module.indices for path, module in rows.items()}
    given = {path: ids for path, ids in tokens.items() if path not in tied}
    repeated = {path: ids for path, ids in tokens.items() if path in tied}
    odd = any(ids != tied[path].owner.indices for path, ids in repeated.items())
    if given != expected or odd:
        raise ValueError(
            f"{where}: trainable_token_indices must be {expected} as in the model, got {tokens}"
        )
    owners = {path: _path_of(rows, module.owner) for path, module in tied.items()}
    return TokenTargets(expected, owners, getattr(own, "trainable_token_indices", None))


def _path_of(modules: Mapping[str, nn.Module], module: nn.Module) -> str:
    return next(path for path, each in modules.items() if each is module)


def _check_shape(
    files: AdapterFiles, key: str, tensor: Tensor, num_tokens: int, module: nn.Module
) -> None:
    weight = getattr(module, "weight", None)
    assert isinstance(weight, Tensor)  # token_targets
    expected = [num_tokens, weight.shape[1]]
    if list(tensor.shape) != expected:
        raise bad_key(files, PREFIX + key, f"must be {expected}, got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise bad_key(files, PREFIX + key, f"must be floating-point, got {tensor.dtype}")


def check_row_values(
    model: nn.Module, files: AdapterFiles, found: RowsInFile, values: Mapping[str, Tensor]
) -> None:
    """Raise ValueError where the rows of two tied modules differ, or overflow in the model."""
    present = dict(named_modules(model))
    for path, owner in found.targets.owners.items():
        key, other = found.keys.get(path), found.keys[owner]
        if key is not None and not torch.equal(values[key], values[other]):
            raise bad_key(
                files, PREFIX + key, f"must equal {PREFIX}{other}, to which the model ties it"
            )
    for path in found.targets.tokens:
        key = found.keys[path]
        weight = getattr(present[path], "weight", None)
        assert isinstance(weight, Tensor)  # token_targets
        if not torch.isfinite(values[key].to(weight.dtype)).all():
            raise bad_key(files, PREFIX + key, f"must be finite in {weight.dtype}, as in the model")


@torch.no_grad()
def fill_rows(model: nn.Module, found: RowsInFile, values: Mapping[str, Tensor]) -> None:
    """Give the adapted model the rows of a file."""
    modules = token_rows_of(model)
    for path in found.targets.tokens:
        modules[path].rows.copy_(values[found.keys[path]])


def rows_to_save(model: nn.Module) -> Adapters:
    """The rows of the model, as ``write_adapter`` takes them."""
    return {path: {ROWS: module.rows} for path, module in token_rows_of(model).items()}
