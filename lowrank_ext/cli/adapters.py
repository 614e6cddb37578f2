"""Adapters that a command reads: where they lie, over which base, and how they are loaded."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import lowrank_ext as lr
from lowrank_ext.cli.checks import DTYPES, check_choice
from lowrank_ext.cli.error_lines import warnings_as_lines
from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.files import exists, require_directory
from lowrank_ext.cli.models import CausalLM, ModelSource, find_model
from lowrank_ext.cli.quantization import NOT_QUANTIZED, QUANTIZATIONS
from lowrank_ext.cli.run_file import RUN_FILE, read_some_options
from lowrank_ext.files import quoted, read_json_object

_CONFIG = "adapter_config.json"
_INSIDE_RUN = "adapter"
INSIDE_GUARD_RUN = "guard"  # of `guard train`
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Run:
    """Of the options of the run that wrote an adapter those by which it is used again."""

    model: str | None = None
    revision: str | None = None
    quantize: str | None = None
    dtype: str = "auto"
    compare: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    field: str = "text"
    format: str = "auto"
    train_on: str = "auto"
    packing: str = "auto"
    eval_split: float | None = None
    max_rows: int | None = None
    seq_len: int | None = None


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's files, and what they and its run say about them.

    Attributes:
        path: as the user has named it.
        directory: holds adapter_config.json and adapter_model.safetensors.
        config: the content of the first.
        run: what the run that wrote it says in its run.yaml, where it lies in its --out.
    """

    path: Path
    directory: Path
    config: dict[str, Any]
    run: Run | None

    @property
    def name(self) -> str:
        """A short name: that of the directory, of the run where it is only called adapter."""
        directory = self.directory.resolve()
        return directory.parent.name if directory.name == _INSIDE_RUN else directory.name

    @property
    def method(self) -> str:
        """The peft_type of its config."""
        return str(self.config.get("peft_type"))


def find_adapter(path: Path) -> AdapterSource:
    """The adapter in the directory `path`, or in that of a run of one method. Raises UserError
    where there is none, and says what there is."""
    require_directory(str(path), path)
    for directory in (path, path / _INSIDE_RUN):
        if os.path.lexists(directory / _CONFIG):
            break
    else:
        raise UserError(f"{path}: it must hold an adapter, {_CONFIG}; {_what_it_holds(path)}")
    with as_user_error(str(path), OSError, ValueError):
        config = read_json_object(directory / _CONFIG, "adapter", _MAX_BYTES)
    return AdapterSource(path, directory, config, _run_of(directory))


def _what_it_holds(path: Path) -> str:
    """For messages: adapters of a comparison, or a whole model."""
    inside = sorted(p.parents[1].name for p in path.glob(f"*/{_INSIDE_RUN}/{_CONFIG}"))
    inside += sorted(p.parent.name for p in path.glob(f"*/{_CONFIG}"))
    if inside:
        return f"give one of those in it: {', '.join(str(path / name) for name in inside)}"
    for whole in (path, path / "model"):
        if (whole / "config.json").is_file():
            return f"{whole} is a whole model, which needs no merge: use it as --model"
    return "lowrank-ext finetune and lr.save_adapter write one"


def _run_of(directory: Path) -> Run | None:
    """The run that wrote the adapter: OUT/adapter, OUT/METHOD/adapter of a comparison, OUT/guard.
    Raises UserError where its run.yaml cannot be read."""
    directory = directory.resolve()
    if directory.name not in (_INSIDE_RUN, INSIDE_GUARD_RUN):
        return None
    for out, method in ((directory.parent, None), (directory.parents[1], directory.parent.name)):
        if exists(str(out), out / RUN_FILE):
            run = Run(**read_some_options(out / RUN_FILE, get_type_hints(Run)))
            if (method in run.compare) if method else not run.compare:
                return run
    return None


def find_base(adapters: Sequence[AdapterSource], model: str | None) -> ModelSource:
    """The base of the adapters: --model, else what they name. Raises UserError where it is not
    here, or they name different ones."""
    if model is not None or not adapters:
        return find_model(model)
    bases = {adapter.path: _own_base(adapter) for adapter in adapters}
    if len(set(bases.values())) > 1:
        named = ", ".join(f"{base.name} ({path})" for path, base in bases.items())
        raise UserError(f"the adapters must have one base, got {named}; give it by --model")
    return bases[adapters[0].path]


def base_options(adapter: AdapterSource) -> dict[str, str | None]:
    """--model and --revision of the adapter's base. Raises UserError where it is not here."""
    _own_base(adapter)
    if adapter.run is not None:
        return {"model": adapter.run.model, "revision": adapter.run.revision}
    return {"model": adapter.config["base_model_name_or_path"], "revision": None}


def _own_base(adapter: AdapterSource) -> ModelSource:
    name = adapter.config.get("base_model_name_or_path")
    if adapter.run is not None:
        name = adapter.run.model
        if name is None:
            return find_model(None)
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter.path}: {_CONFIG} names no base model; give it by --model")
    if os.path.isabs(name) and not os.path.exists(name):
        raise UserError(
            f"{adapter.path}: its base model {quoted(name)} is not there; give it by --model"
        )
    revision = None if adapter.run is None else adapter.run.revision
    try:
        return find_model(name, revision)
    except UserError as error:
        raise UserError(f"{adapter.path}: its base model: {error}") from None


def find_quantization(adapters: Sequence[AdapterSource], quantize: str | None) -> str | None:
    """How the base is quantized: as --quantize says, else as in the adapters' runs. Raises
    UserError for a wrong value, and where the runs differ."""
    if quantize is not None:
        check_choice("--quantize", quantize, (NOT_QUANTIZED, *QUANTIZATIONS))
        return None if quantize == NOT_QUANTIZED else quantize
    found = {each.path: each.run.quantize for each in adapters if each.run is not None}
    if len(set(found.values())) > 1:
        named = ", ".join(f"{how or NOT_QUANTIZED} ({path})" for path, how in found.items())
        raise UserError(f"the runs must have one base, got {named}; give it by --quantize")
    return next(iter(found.values()), None)


def find_dtype(adapters: Sequence[AdapterSource], dtype: str | None) -> str:
    """The name of the base's dtype: --dtype, else that of the adapters' runs, auto without one.
    Raises UserError where the runs differ."""
    if dtype is not None:
        return dtype
    found = {each.path: each.run.dtype for each in adapters if each.run is not None}
    for path, own in found.items():
        check_choice(f"{path}: the dtype of its run", own, DTYPES)
    if len(set(found.values())) > 1:
        named = ", ".join(f"{own} ({path})" for path, own in found.items())
        raise UserError(f"the runs must have one dtype, got {named}; give it by --dtype")
    return next(iter(found.values()), "auto")


def load_adapter(model: CausalLM, adapter: AdapterSource) -> CausalLM:
    """Puts the adapter on the model, in place, for inference: without dropout and gradients."""
    with (
        warnings_as_lines(),
        as_user_error(f"cannot load {adapter.path}", OSError, ValueError, TypeError, RuntimeError),
    ):
        return lr.load_adapter(model, adapter.directory, trainable=False)
