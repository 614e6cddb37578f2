"""A converted model's directory with its tokenizer, and of which model it was made; exit rules as
users type them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import lowrank_ext as lr
from lowrank_ext.cli.errors import UserError, as_user_error, near_matches
from lowrank_ext.cli.files import exists, require_directory, write_json
from lowrank_ext.cli.models import (
    LoadedModel,
    no_own_code,
    prepare_transformers,
    resolve_dtype,
)
from lowrank_ext.files import quoted, read_json_object
from lowrank_ext.methods.recursive.exits import MEASURES

SOURCE = "source.json"
_MAX_SOURCE_BYTES = 2**16
AGREEMENT, FIXED, NEVER = "agreement", "fixed", "none"
RULE_HELP = (
    "When tokens leave early: MEASURE:THRESHOLD[,THRESHOLD…] (one for each loop but the last; "
    f"none: never there) with {', '.join(MEASURES)}; or agreement; or fixed:LOOP."
)


def load_recursive(directory: Path, dtype: str) -> LoadedModel:
    """The model that `convert` or `uptrain` wrote, in evaluation mode, with its tokenizer. Raises
    UserError for a directory that holds no such model."""
    require_directory(str(directory), directory)
    if not (directory / "config.json").exists() and (directory / "model" / "config.json").exists():
        raise UserError(
            f"{directory} is the --out of uptrain, whose model is {directory / 'model'}"
        )
    prepare_transformers()
    with as_user_error(f"cannot load {directory}", OSError, ValueError, TypeError):
        model = lr.recursive.load(directory, dtype=resolve_dtype(dtype))
    return LoadedModel(model, _tokenizer(directory), str(directory))


def _tokenizer(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    # The config names a model type that AutoTokenizer does not know.
    with as_user_error(f"cannot load the tokenizer of {directory}", Exception), no_own_code():
        return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)


def write_source(directory: Path, model: str | None) -> None:
    """Records of which model, as --model names it, a directory's was made."""
    path = os.path.abspath(model) if model is not None and os.path.exists(model) else model
    write_json(directory / SOURCE, {"lowrank_ext": lr.__version__, "model": path})


def has_source(directory: Path) -> bool:
    """Whether the directory says of which model its own was made."""
    return exists(str(directory), directory / SOURCE)


def read_source(directory: Path) -> str | None:
    """The model that `write_source` has recorded, None for the default one. Raises UserError for
    a damaged record."""
    path = directory / SOURCE
    with as_user_error("cannot read", OSError, ValueError):
        found = read_json_object(path, "--teacher", _MAX_SOURCE_BYTES).get("model", 0)
    if not isinstance(found, str | None):
        raise UserError(f"{path}: model must be a name or null, got {quoted(found)}")
    return found


def parse_rule(text: str, num_loops: int | None = None) -> lr.recursive.ExitRule:
    """The rule that --exit names. Raises UserError for what is none, and for thresholds or loops
    that a model of ``num_loops`` does not have."""
    name, _, rest = text.partition(":")
    known = (*MEASURES, AGREEMENT, FIXED)
    if name not in known:
        raise UserError(
            f"--exit must be one of {', '.join(known)}, got {name!r}{near_matches(name, known)}"
        )
    if name == AGREEMENT:
        if rest:
            raise UserError(f"--exit {AGREEMENT} takes no value, got {rest!r}")
        return lr.recursive.Agreement()
    values = [part.strip() for part in rest.split(",")] if rest else []
    if name == FIXED:
        return _fixed(values, num_loops)
    thresholds = [None if value == NEVER else _threshold(name, value) for value in values]
    if not thresholds:
        raise UserError(f"--exit {name} must have a threshold, {name}:0.9, got none")
    with as_user_error(f"--exit {name}", ValueError):
        rule = lr.recursive.Confidence(name, thresholds)
    if num_loops is not None and len(thresholds) not in (1, num_loops - 1):
        raise UserError(
            f"--exit {name}: a model of {num_loops} loops takes one threshold or {num_loops - 1}, "
            f"got {len(thresholds)}"
        )
    return rule


def _threshold(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(
            f"--exit {name}: thresholds must be numbers or {NEVER!r}, as {name}:0.9, got {value!r}"
        ) from None


def _fixed(values: Sequence[str], num_loops: int | None) -> lr.recursive.ExitRule:
    if len(values) != 1 or not values[0].isdecimal():
        raise UserError(f"--exit {FIXED}: give one loop, from 0, got {','.join(values)!r}")
    loop = int(values[0])
    if num_loops is not None and loop >= num_loops:
        raise UserError(f"--exit {FIXED}: loop must be from 0 to {num_loops - 1}, got {loop}")
    return lr.recursive.FixedDepth(loop)


def shown_rule(rule: Any) -> str:
    """A Confidence rule as --exit takes it."""
    values = (NEVER if value is None else repr(value) for value in rule.thresholds)
    return f"{rule.measure}:{','.join(values)}"


def num_loops(model: nn.Module) -> int:
    """B."""
    config: Any = model.recursive_config
    loops: int = config.num_loops
    return loops


def numel(model: nn.Module) -> int:
    """Stored parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_bytes(model: nn.Module) -> int:
    """Bytes of the stored parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
