"""A recursive model as a directory: config.json with its RecursiveConfig, weights with each tied
tensor once.

``save_pretrained`` of the model writes it (``model.py``); ``load`` reads it: what the files say is
checked before memory is taken for a model.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ext.files import TensorFile, check_pattern, clean_errors, quoted, read_json_object
from lowrank_ext.methods.recursive.config import RecursiveConfig
from lowrank_ext.methods.recursive.conversion import (
    Factors,
    check_targets,
    fold,
    linears_of,
)
from lowrank_ext.methods.recursive.model import (
    CONFIG_KEY,
    CONFIG_NAME,
    PREFIX,
    TYPE_PREFIX,
)
from lowrank_ext.methods.recursive.structure import (
    check_like_layers,
    find_decoder,
    parameters_of,
)

GENERATION_NAME = "generation_config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CALLER = "load"  # in messages


@torch.inference_mode(False)  # whose tensors could not train
@torch.no_grad()
def load(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Any:
    """The recursive model that ``save_pretrained`` wrote into a directory, on the CPU.

    Args:
        path: the directory.
        dtype: of the parameters; None: each as saved.

    Returns:
        The model, a transformers model of its own class, in evaluation mode.

    Raises:
        TypeError: dtype is none.
        FileNotFoundError: a file is missing.
        OSError: a file cannot be read.
        ValueError: a file is damaged, the config describes no recursive model, or weights and
            config do not fit. All name the file.
    """
    where = Path(path)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{CALLER}: dtype must be a torch.dtype, got {dtype!r}")
    with clean_errors():
        described = _description(where / CONFIG_NAME)
        with _weights(where) as weights:
            _check_depth(described, len(weights))
            _check_tensors(_empty_model(described, dtype, "meta"), weights, where)
            model = _empty_model(described, dtype, "cpu")
            _fill(model, weights, dtype)
        if os.path.lexists(where / GENERATION_NAME):
            _set_generation_config(model, where / GENERATION_NAME)
    return model.eval()


class _Description(NamedTuple):
    """What config.json says: the class of transformers, its config object, and ours."""

    path: Path
    own_class: Any
    options: Any
    config: RecursiveConfig


def _description(path: Path) -> _Description:
    fields = read_json_object(path, CALLER)
    config = _recursive_config(fields, path)
    own = _model_class(fields, path)
    plain = {key: value for key, value in fields.items() if key != CONFIG_KEY}
    plain["architectures"] = [own.__name__]
    plain["model_type"] = str(plain.get("model_type")).removeprefix(TYPE_PREFIX)
    expected = own.config_class.model_type
    if plain["model_type"] != expected:
        raise ValueError(
            f"{CALLER}: {path}: model_type must be {TYPE_PREFIX + expected!r} for {own.__name__}, "
            f"got {quoted(fields.get('model_type'))}"
        )
    with _named_errors(path, own):
        return _Description(path, own, own.config_class.from_dict(plain), config)


@contextmanager
def _named_errors(path: Path, own: Any) -> Iterator[None]:
    """A block in which transformers reads a config: for a wrong one it raises any kind of error."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{CALLER}: {path} must describe a {own.__name__}: {error}") from None


def _recursive_config(fields: Mapping[str, Any], path: Path) -> RecursiveConfig:
    own = fields.get(CONFIG_KEY)
    if not isinstance(own, dict):
        raise ValueError(
            f"{CALLER}: {path} must describe a recursive model, got no {CONFIG_KEY!r}; make one "
            "with lowrank_ext.recursive.convert"
        )
    try:
        config = RecursiveConfig.from_dict(own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CALLER}: {path}: {CONFIG_KEY}: {error}") from None
    where = f"{CALLER}: {path}: {CONFIG_KEY}:"
    if isinstance(config.targets, str):
        check_pattern(config.targets, f"{where} targets")
    if isinstance(config.rank, Mapping):
        check_pattern(config.rank, f"{where} rank")
    return config


def _model_class(fields: Mapping[str, Any], path: Path) -> Any:
    """The class of transformers that config.json names."""
    import transformers

    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    own: Any = None
    if isinstance(name, str) and name.startswith(PREFIX) and name.isidentifier():
        own = getattr(transformers, name.removeprefix(PREFIX), None)
    is_class = isinstance(own, type)
    if not (is_class and issubclass(own, transformers.PreTrainedModel)):
        raise ValueError(
            f"{CALLER}: {path}: architectures must name one model of transformers "
            f"{transformers.__version__} after {PREFIX!r}, got {quoted(names)}"
        )
    return own


def _check_depth(described: _Description, num_tensors: int) -> None:
    """Raise ValueError where the files hold too few tensors for so many layers, before those are
    made."""
    num_layers = described.options.get_text_config(decoder=True).num_hidden_layers
    is_number = isinstance(num_layers, int) and not isinstance(num_layers, bool)
    num_loops = described.config.num_loops
    if not is_number or not 0 < num_layers <= num_tensors * num_loops:
        raise ValueError(
            f"{CALLER}: {described.path} must have a number of layers that the {num_tensors} "
            f"stored tensors can be of, got {quoted(num_layers)} with num_loops={num_loops}"
        )


def _empty_model(described: _Description, dtype: torch.dtype | None, device: str) -> Any:
    """The model with parameters that have no values yet."""
    path, own, options, config = described
    with _named_errors(path, own):
        with torch.device(device):
            model = without_init(own, copy.deepcopy(options), dtype)
        decoder = find_decoder(model, CALLER)
        check_like_layers(decoder, config.num_loops, config.init, CALLER)
        check_targets(decoder, config, CALLER)
    length = decoder.num_layers // config.num_loops
    tied = [
        {name: nn.Parameter(value) for name, value in parameters_of(layer).items()}
        for layer in decoder.layers[:length]
    ]
    factors = [_empty_factors(layer, config) for layer in decoder.layers]
    fold(decoder, config, tied, factors)
    return model


def _empty_factors(layer: nn.Module, config: RecursiveConfig) -> Factors:
    factors = {}
    for path, linear in linears_of(layer).items():
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


def _stored_tensors(model: Any) -> dict[str, Tensor]:
    """The parameters and buffers that a file of the model holds, each once."""
    tied = model.all_tied_weights_keys
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name not in tied}


@contextmanager
def _weights(where: Path) -> Iterator[dict[str, TensorFile]]:
    """A block with the open file of each tensor, by the tensor's name."""
    with ExitStack() as opened:

        def open_one(name: str) -> TensorFile:
            return opened.enter_context(closing(TensorFile(where / name, CALLER)))

        if not (where / INDEX_NAME).exists() or (where / WEIGHTS_NAME).exists():
            file = open_one(WEIGHTS_NAME)
            yield dict.fromkeys(file.specs, file)
            return
        found: dict[str, TensorFile] = {}
        for file in map(open_one, _shard_names(where / INDEX_NAME)):
            for name in file.specs:
                if name in found:
                    raise ValueError(
                        f"{CALLER}: {file.path} must hold tensors of its own, got {quoted(name)}, "
                        f"which {found[name].path.name} holds too"
                    )
                found[name] = file
        yield found


def _shard_names(path: Path) -> list[str]:
    """Names of the files that an index lists."""
    index = read_json_object(path, CALLER).get("weight_map")
    names: list[Any] = list(index.values()) if isinstance(index, dict) else [index]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{CALLER}: {path}: weight_map must hold names of files, got {quoted(name)}"
            )
    return sorted(set(names))


def _check_tensors(model: Any, weights: Mapping[str, TensorFile], where: Path) -> None:
    """Raise ValueError unless the files hold exactly the tensors of the model."""
    expected = _stored_tensors(model)
    for name in expected:
        if name not in weights:
            raise ValueError(
                f"{CALLER}: {where} must hold the tensor {name}, got none of that name"
            )
    for name, file in weights.items():
        if name not in expected:
            raise ValueError(
                f"{CALLER}: {file.path} must hold tensors of the model only, got {quoted(name)}"
            )
        got, wanted = file.specs[name], expected[name]
        if got.shape != wanted.shape:
            raise ValueError(
                f"{CALLER}: {file.path}: {name} must be {list(wanted.shape)}, got {list(got.shape)}"
            )
        kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if got.dtype not in (kinds if wanted.is_floating_point() else (wanted.dtype,)):
            raise ValueError(
                f"{CALLER}: {file.path}: {name} must have a dtype of the kind of {wanted.dtype}, "
                f"got {got.dtype}"
            )


def _fill(model: Any, weights: Mapping[str, TensorFile], dtype: torch.dtype | None) -> None:
    targets = _stored_tensors(model)
    for name, file in weights.items():
        value = file.read_one(name)
        if dtype is not None and isinstance(targets[name], nn.Parameter):
            value = value.to(dtype)
            if not value.isfinite().all():
                raise ValueError(f"{CALLER}: {file.path}: {name} must be finite in {dtype}")
        targets[name].data = value


def _set_generation_config(model: Any, path: Path) -> None:
    from transformers import GenerationConfig

    fields = read_json_object(path, CALLER)
    try:
        model.generation_config = GenerationConfig.from_dict(fields)
    except Exception as error:  # as for the model's config
        raise ValueError(f"{CALLER}: {path} must hold generation options: {error}") from None
