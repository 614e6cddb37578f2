"""Files of a single residual, which can be loaded into any model with the same basis.

The two files of an adapter, with the tensors ``<path>.lora_residual_<name>.weight`` alone. The
weights' metadata hold each module's scaling and the SHA-256 of its basis, which ``load_residual``
compares with the model's.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_ext.adapter_files import (
    AdapterFiles,
    check_can_hold_adapter,
    open_adapter_files,
    write_adapter_files,
)
from lowrank_ext.checks import check_probability
from lowrank_ext.files import parse_json_object, quoted
from lowrank_ext.files.tensor_file import is_finite
from lowrank_ext.methods.set_and_sequence.config import BasisLoRAConfig, residual_attribute
from lowrank_ext.methods.set_and_sequence.module import BasisLoRALinear
from lowrank_ext.methods.set_and_sequence.stages import (
    adapted_config,
    basis_modules,
    begin_residual_stage,
)
from lowrank_ext.sharding import is_sharded

Model = TypeVar("Model", bound=nn.Module)
_PREFIX = "base_model.model."
_BASIS_KEY = "lowrank_ext_basis"  # metadata: scaling and basis_digest by module path


def save_residual(model: nn.Module, path: str | os.PathLike[str], name: str = "motion") -> None:
    """Write the residual ``name`` of ``model`` into the directory ``path``, without its basis.

    Atomic, like ``lr.save_adapter``. ``lr.load_adapter`` refuses such a file, because a residual
    needs the basis that it was trained on, from the adapter of stage 1.

    Raises:
        ValueError: the model was not adapted with BasisLoRAConfig, has no such residual, or is
            sharded.
        OSError: the files cannot be written. The directory holds what it held before.
    """
    caller = "save_residual"
    check_can_hold_adapter(Path(path), caller)
    config = adapted_config(model, caller)
    modules = basis_modules(model, caller)
    for where, module in modules.items():
        if name not in module.residuals:
            raise ValueError(
                f"{caller}: name must be a residual among {list(module.residuals)} of {where}, "
                f"got {name!r}"
            )
        if is_sharded(module.lora_a):
            raise ValueError(f"{caller}: {where} must not be sharded; use save_adapter")
    key = residual_attribute(name)
    tensors = {
        f"{_PREFIX}{where}.{key}.weight": module.get_parameter(key).detach().cpu().clone()
        for where, module in modules.items()
    }
    tensors = {where: tensor.contiguous() for where, tensor in tensors.items()}
    fields = {
        "peft_type": config.peft_type,
        "basis": config.basis,
        "residuals": [name],
        "residual_coef_dropout": config.residual_coef_dropout,
    }
    marks = {where: _mark(module) for where, module in modules.items()}
    write_adapter_files(Path(path), fields, tensors, {_BASIS_KEY: json.dumps(marks)})


def load_residual(model: Model, path: str | os.PathLike[str], name: str | None = None) -> Model:
    """Add the residual in the directory ``path`` to ``model``; returns it.

    Begins a new stage, as ``begin_residual_stage`` does, with the file's values. The residual gets
    scale 1 and trains; earlier residuals get scale 0.

    Args:
        model: adapted with BasisLoRAConfig and holding the basis that the residual was trained on:
            the adapter of stage 1, or one with other residuals.
        name: name of the residual in the model; None: as in the file.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged or holds no residual, the name is taken, or modules, shapes,
            scalings or the basis differ from those of its training; the message names the file.
            Nothing has changed then.

    Examples:
        >>> model = lr.load_adapter(base, "stage1")
        >>> lr.motion.load_residual(model, "dance")
    """
    caller = "load_residual"
    config = adapted_config(model, caller)
    modules = basis_modules(model, caller)
    with open_adapter_files(Path(path), caller) as files:
        stored = _stored_name(files)
        tensors = _checked_tensors(files, stored, config, modules)
        begin_residual_stage(model, stored if name is None else name)
    with torch.no_grad():
        for where, module in modules.items():
            assert module.trained_residual is not None  # begin_residual_stage has set it
            own = module.get_parameter(residual_attribute(module.trained_residual))
            own.copy_(tensors[where])
    return model


def _mark(module: BasisLoRALinear) -> dict[str, Any]:
    """Scaling and digest of the basis that a residual depends on. The digest is of the values in
    fp64, so it is the same in every dtype that represents them."""
    basis = module.lora_a if module.basis == "down" else module.lora_b
    values = basis.detach().cpu().double().contiguous()
    digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    return {"scaling": module.scaling, "basis_digest": digest}


def _stored_name(files: AdapterFiles) -> str:
    fields = files.config
    owner = f"{files.caller}: {files.config_path}"
    names = fields.get("residuals")
    one = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
    ours = fields.get("peft_type") == BasisLoRAConfig.peft_type and _BASIS_KEY in files.metadata
    if not (ours and one):
        raise ValueError(
            f"{owner} must be of one residual, as save_residual writes "
            f"it, got peft_type={quoted(fields.get('peft_type'), 40)} with "
            f"residuals={quoted(names)}"
        )
    try:
        check_probability(fields.get("residual_coef_dropout"), owner, "residual_coef_dropout")
    except TypeError as error:
        raise ValueError(str(error)) from None
    stored: str = fields["residuals"][0]
    return stored


def _checked_tensors(
    files: AdapterFiles,
    name: str,
    config: BasisLoRAConfig,
    modules: Mapping[str, BasisLoRALinear],
) -> dict[str, Tensor]:
    """The file's tensors by module path; raises ValueError if one does not fit."""
    keys = {where: f"{_PREFIX}{where}.{residual_attribute(name)}.weight" for where in modules}
    if files.config.get("basis") != config.basis:
        raise _differs(files, "basis", config.basis, files.config.get("basis"))
    if files.tensors.keys() != set(keys.values()):
        raise _differs(files, "tensors", sorted(keys.values()), sorted(files.tensors))
    marks = _stored_marks(files, modules)
    for where, module in modules.items():
        tensor = files.tensors[keys[where]]
        shapes = config.adapter_shapes(module.r, module.in_features, module.out_features)
        shape = shapes["lora_b" if config.basis == "down" else "lora_a"]
        if list(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{files.caller}: {files.weights_path}: {keys[where]} must be floating-point "
                f"{shape}, got {tensor.dtype} {list(tensor.shape)}"
            )
        for what, expected in _mark(module).items():
            if marks[where][what] != expected:
                raise _differs(files, f"{what} of {where}", expected, marks[where][what])
    values = files.with_values().tensors
    for where, module in modules.items():
        if not is_finite(values[keys[where]].to(module.lora_a.dtype)):
            raise ValueError(
                f"{files.caller}: {files.weights_path}: {keys[where]} must be finite in "
                f"{module.lora_a.dtype}, as in the model"
            )
    return {where: values[key] for where, key in keys.items()}


def _stored_marks(files: AdapterFiles, modules: Collection[str]) -> dict[str, dict[str, Any]]:
    where = f"{files.caller}: {files.weights_path}: metadata {_BASIS_KEY}"
    marks = parse_json_object(files.metadata[_BASIS_KEY], where)
    for path in modules:
        mark = marks.get(path)
        if not isinstance(mark, dict) or mark.keys() != {"scaling", "basis_digest"}:
            raise ValueError(
                f"{where} must hold scaling and basis_digest of {path}, got {quoted(mark)}"
            )
    return marks


def _differs(files: AdapterFiles, what: str, expected: object, got: object) -> ValueError:
    return ValueError(
        f"{files.caller}: {files.config_path}: {what} must be {quoted(expected)} as in the model, "
        f"got {quoted(got)}; a residual needs the adapter of the stage 1 that it was trained over"
    )
