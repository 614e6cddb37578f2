"""A recursive model as a directory: config.json with its RecursiveConfig, weights with each tied
tensor once.

``save_pretrained`` of the model writes it (``model.py``); ``load`` reads it: what the files say is
checked before memory is taken for a model.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.files import TensorFile, clean_errors, quoted, read_json_object
from lowrank_ext.methods.recursive.config import RecursiveConfig
from lowrank_ext.methods.recursive.conversion import (
    Factors,
    check_targets,
    fold,
    linears_of,
)
from lowrank_ext.methods.recursive.model import CONFIG_KEY, PREFIX, TYPE_PREFIX
from lowrank_ext.methods.recursive.structure import (
    Decoder,
    check_like_layers,
    find_decoder,
    parameters_of,
)

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def load(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Any:
    """The recursive model that ``save_pretrained`` wrote into a directory, on the CPU.

    Args:
        path: the directory.
        dtype: of the parameters; None: as saved.

    Returns:
        The model, a transformers model of its own class, in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing.
        OSError: a file cannot be read.
        ValueError: a file is damaged, the config describes no recursive model, or weights and
            config do not fit. All name the file.
    """
    caller = "load"
    where = Path(path)
    with clean_errors():
        fields = read_json_object(where / CONFIG_NAME, caller)
        config = _recursive_config(fields, where / CONFIG_NAME, caller)
        with _weights(where, caller) as weights:
            expected = _empty_model(fields, config, where, caller, dtype, "meta")
            _check_tensors(expected, weights, where, caller)
            model = _empty_model(fields, config, where, caller, dtype, "cpu")
            _fill(model, weights)
        if (where / GENERATION_NAME).exists():
            _set_generation_config(model, read_json_object(where / GENERATION_NAME, caller))
    return model.eval()


def _recursive_config(fields: Mapping[str, Any], path: Path, caller: str) -> RecursiveConfig:
    own = fields.get(CONFIG_KEY)
    if not isinstance(own, dict):
        raise ValueError(
            f"{caller}: {path} must describe a recursive model, got no {CONFIG_KEY!r}; make one "
            "with lowrank_ext.recursive.convert"
        )
    try:
        return RecursiveConfig.from_dict(own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{caller}: {path}: {CONFIG_KEY}: {error}") from None


def _model_class(fields: Mapping[str, Any], path: Path, caller: str) -> Any:
    """The class of transformers that config.json names."""
    import transformers

    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    own = None
    if isinstance(name, str) and name.startswith(PREFIX) and name.isidentifier():
        own = getattr(transformers, name.removeprefix(PREFIX), None)
    if not (isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)):
        raise ValueError(
            f"{caller}: {path}: architectures must name one model of transformers "
            f"{transformers.__version__} after {PREFIX!r}, got {quoted(names)}"
        )
    return own


def _empty_model(
    fields: Mapping[str, Any],
    config: RecursiveConfig,
    where: Path,
    caller: str,
    dtype: torch.dtype | None,
    device: str,
) -> Any:
    """The model with parameters that have no values yet."""
    path = where / CONFIG_NAME
    own = _model_class(fields, path, caller)
    plain = {key: value for key, value in fields.items() if key != CONFIG_KEY}
    plain["architectures"] = [own.__name__]
    plain["model_type"] = str(plain.get("model_type")).removeprefix(TYPE_PREFIX)
    try:
        with torch.device(device):
            model = without_init(own, own.config_class.from_dict(plain), dtype)
        decoder = find_decoder(model, caller)
        check_like_layers(decoder, config.num_loops, caller)
        check_targets(decoder, config, caller)
    except Exception as error:  # transformers raises many kinds for a wrong config
        raise ValueError(f"{caller}: {path} must describe a model: {error}") from None
    length = decoder.num_layers // config.num_loops
    tied = [
        {name: nn.Parameter(value) for name, value in parameters_of(layer).items()}
        for layer in decoder.layers[:length]
    ]
    fold(
        decoder,
        config,
        tied,
        [_empty_factors(decoder, config, i) for i in range(len(tied) * config.num_loops)],
    )
    return model


def _empty_factors(decoder: Decoder, config: RecursiveConfig, index: int) -> Factors:
    factors = {}
    for path, linear in linears_of(decoder.layers[index]).items():
        r = config.rank_for(path, linear.in_features, linear.out_features)
        if r:
            weight = linear.weight
            factors[path] = (
                weight.new_empty(r, linear.in_features),
                weight.new_empty(linear.out_features, r),
            )
    return factors


def without_init(own: Any, config: Any, dtype: torch.dtype | None) -> Any:
    """A model of the class ``own`` whose parameters are not initialized."""
    from transformers import initialization

    with initialization.no_init_weights():
        model = own._from_config(config, **({} if dtype is None else {"dtype": dtype}))
    model.tie_weights()
    return model


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors that a file of the model holds, each once."""
    tied = model.all_tied_weights_keys
    return {name: value for name, value in model.state_dict().items() if name not in tied}


@contextmanager
def _weights(where: Path, caller: str) -> Iterator[dict[str, TensorFile]]:
    """A block with the open file of each tensor, by the tensor's name."""
    with ExitStack() as opened:

        def open_one(name: str) -> TensorFile:
            return opened.enter_context(closing(TensorFile(where / name, caller)))

        if not (where / INDEX_NAME).exists() or (where / WEIGHTS_NAME).exists():
            file = open_one(WEIGHTS_NAME)
            yield dict.fromkeys(file.specs, file)
            return
        index = read_json_object(where / INDEX_NAME, caller).get("weight_map")
        names = set(index.values()) if isinstance(index, dict) else set()
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(
                    f"{caller}: {where / INDEX_NAME}: weight_map must hold names of files, got "
                    f"{quoted(name)}"
                )
        files = [open_one(name) for name in sorted(names)]
        yield {name: file for file in files for name in file.specs}


def _check_tensors(model: Any, weights: Mapping[str, TensorFile], where: Path, caller: str) -> None:
    """Raise ValueError unless the files hold exactly the tensors of the model."""
    expected = stored_tensors(model)
    for name in expected:
        if name not in weights:
            raise ValueError(
                f"{caller}: {where} must hold the tensor {name}, got none of that name"
            )
    for name, file in weights.items():
        if name not in expected:
            raise ValueError(
                f"{caller}: {file.path} must hold tensors of the model only, got {quoted(name)}"
            )
        got, wanted = list(file.specs[name].shape), list(expected[name].shape)
        if got != wanted:
            raise ValueError(f"{caller}: {file.path}: {name} must be {wanted}, got {got}")


@torch.no_grad()
def _fill(model: Any, weights: Mapping[str, TensorFile]) -> None:
    targets = stored_tensors(model)
    for name, file in weights.items():
        targets[name].copy_(file.read_one(name))


def _set_generation_config(model: Any, fields: Mapping[str, Any]) -> None:
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_dict(dict(fields))
    except Exception as error:
        raise ValueError(f"load: {GENERATION_NAME} must hold generation options: {error}") from None
