"""save_style and load_style: files of the style path and its embedder, without the base models.

The same two files as every adapter's, replaced as a pair (``lowrank_ext/adapter_files.py``). With P
for ``unet.<path of the attention>``:

    P.to_k_style.weight [C, style_dim]    P.to_v_style.weight [C, style_dim]
    P.to_q_style.weight [C, query_dim]      with share_query=False
    P.to_out_style.weight [query_dim, C]    with share_out=False
    P.lam []                                unet.lam [] with one λ for all layers
    embedder.<name in its state dict>       if a StyleEmbedder is saved
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.adapter_files import (
    AdapterFiles,
    open_adapter_files,
    write_adapter_files,
)
from lowrank_ext.files import quoted
from lowrank_ext.files.tensor_file import is_finite
from lowrank_ext.methods.style_adapter.config import StylePathConfig
from lowrank_ext.methods.style_adapter.embedder import StyleEmbedder
from lowrank_ext.methods.style_adapter.install import (
    find_unet,
    install,
    make_processors,
    style_processors,
)
from lowrank_ext.methods.style_adapter.processor import TwoPathAttnProcessor

__all__ = ["load_style", "save_style"]

_EMBEDDER_OPTIONS = {"width", "out_dim", "num_tokens", "num_layers", "num_heads"}
# Tensors whose shapes are an embedder's options.
_EMBEDDER_SIZES = {
    "embedder.proj": ("width", "out_dim"),
    "embedder.queries": ("num_tokens", "width"),
}


def save_style(
    unet: nn.Module, path: str | os.PathLike[str], embedder: StyleEmbedder | None = None
) -> None:
    """Write the style path of ``unet``, and the embedder that makes its tokens, into a directory.

    Tensors keep their dtype. The present style and the scales are not saved.

    Raises:
        TypeError: embedder is no StyleEmbedder.
        ValueError: the model has no style path. Nothing is written.
        OSError: the files cannot be written. The directory holds what it held before.

    Examples:
        >>> lr.style.save_style(unet, "out/style", embedder)
    """
    if embedder is not None and not isinstance(embedder, StyleEmbedder):
        raise TypeError(
            f"save_style: embedder must be a StyleEmbedder, got {type(embedder).__name__}"
        )
    model = find_unet(unet, "save_style")
    processors = style_processors(model, "save_style")
    config: StylePathConfig = model.style_path_config
    tensors = _tensors(processors, config, embedder)
    fields = {
        **config.to_dict(),
        "embedder": None if embedder is None else embedder.options,
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
    }
    stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_adapter_files(Path(path), fields, stored, {})


def load_style(unet: nn.Module, path: str | os.PathLike[str]) -> StyleEmbedder | None:
    """Load the style path that ``save_style`` wrote into ``unet``; returns its embedder, if any.

    A model without a style path gets one, as from ``add_style_path``; a style path with the same
    options gets the file's values.

    Returns:
        The embedder, on the device of the style path, in the dtype of the file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are damaged, of another kind, or do not fit the model, which is as
            before; the message names the file and what does not fit.
    """
    model = find_unet(unet, "load_style")
    with open_adapter_files(Path(path), "load_style") as files:
        return _load(model, files)


def _load(model: nn.Module, files: AdapterFiles) -> StyleEmbedder | None:
    """Compare what the file says with its tensors and the model, then make and fill modules."""
    config, options = _read_config(files)
    own: StylePathConfig | None = getattr(model, "style_path_config", None)
    if own is None:
        _check_style_dim(files, config)
        processors = make_processors(model, config, "load_style")
    else:
        processors = style_processors(model, "load_style")
        _check_agree(files, config, own)
    embedder = None if options is None else _empty_embedder(files, options)
    wanted = _tensors(processors, config, embedder)
    _check_tensors(files, wanted)
    values = files.with_values().tensors
    device = next(iter(processors.values())).style_path.lam.device
    if embedder is not None:
        embedder = embedder.to(values["embedder.proj"].dtype).to_empty(device=device)
        wanted = _tensors(processors, config, embedder)
    for key, tensor in wanted.items():
        if not is_finite(values[key].to(tensor.dtype)):
            raise ValueError(
                f"{files.caller}: {files.weights_path}: {key} must be finite in {tensor.dtype}, as "
                "in the model"
            )
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(values[key])
    if own is None:
        install(model, processors, config)
    return embedder


def _check_style_dim(files: AdapterFiles, config: StylePathConfig) -> None:
    """Compare the config's style_dim, which sizes the modules, with the file's tensors."""
    for key, tensor in files.tensors.items():
        if key.endswith(".to_k_style.weight") and config.style_dim is not None:
            if tensor.dim() == 2 and tensor.shape[1] == config.style_dim:
                return
            raise ValueError(
                f"{files.caller}: {files.weights_path}: {key} must be [C, "
                f"style_dim={config.style_dim}], got {list(tensor.shape)}"
            )
    if config.style_dim is not None:
        raise ValueError(
            f"{files.caller}: {files.weights_path} must hold to_k_style.weight of a cross-attention"
        )


def _empty_embedder(files: AdapterFiles, options: dict[str, Any]) -> StyleEmbedder:
    """The embedder on the meta device, once the file's tensors have the sizes in ``options``."""
    where = f"{files.caller}: {files.config_path}: embedder"
    tensors = files.tensors
    if options.keys() != _EMBEDDER_OPTIONS:
        raise ValueError(
            f"{where}: options must be {', '.join(sorted(_EMBEDDER_OPTIONS))}, got "
            f"{quoted(sorted(options))}"
        )
    for key, names in _EMBEDDER_SIZES.items():
        if key not in tensors:
            raise ValueError(f"{files.caller}: {files.weights_path}: {key} is missing")
        sizes = [options[name] for name in names]
        if list(tensors[key].shape) != sizes:
            raise ValueError(
                f"{files.caller}: {files.weights_path}: {key} must be {quoted(sizes)}, got "
                f"{list(tensors[key].shape)}"
            )
    blocks = {key.split(".")[2] for key in tensors if key.startswith("embedder.blocks.")}
    if options["num_layers"] != len(blocks):
        raise ValueError(
            f"{where}: num_layers must be {len(blocks)} as in the tensor file, got "
            f"{quoted(options['num_layers'])}"
        )
    try:
        return StyleEmbedder(**options, device="meta")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _tensors(
    processors: Mapping[str, TwoPathAttnProcessor],
    config: StylePathConfig,
    embedder: StyleEmbedder | None,
) -> dict[str, Tensor]:
    """The style path's and the embedder's tensors, by their names in a file."""
    tensors: dict[str, Tensor] = {}
    for path, processor in processors.items():
        for name, parameter in processor.style_path.named_parameters():
            is_global = name == "lam" and config.lam == "global"
            tensors["unet.lam" if is_global else f"unet.{path}.{name}"] = parameter
    if embedder is not None:
        tensors |= {f"embedder.{key}": t for key, t in embedder.state_dict().items()}
    return tensors


def _read_config(files: AdapterFiles) -> tuple[StylePathConfig, dict[str, Any] | None]:
    values = dict(files.config)
    values.pop("base_model_name_or_path", None)
    embedder = values.pop("embedder", None)
    if values.get("peft_type") != StylePathConfig.peft_type:
        raise ValueError(
            f"load_style: {files.config_path}: peft_type must be {StylePathConfig.peft_type!r}, "
            f"got {quoted(values.get('peft_type'))}"
        )
    if embedder is not None and not isinstance(embedder, dict):
        raise ValueError(
            f"load_style: {files.config_path}: embedder must be an object, got {quoted(embedder)}"
        )
    try:
        return StylePathConfig.from_dict(values), embedder
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_style: {files.config_path}: {error}") from None


def _check_agree(files: AdapterFiles, config: StylePathConfig, own: StylePathConfig) -> None:
    for name in ("share_query", "share_out", "lam"):
        if getattr(config, name) != getattr(own, name):
            raise ValueError(
                f"load_style: {files.config_path}: {name} must be {getattr(own, name)!r} as in the "
                f"model, got {getattr(config, name)!r}"
            )


def _check_tensors(files: AdapterFiles, wanted: Mapping[str, Tensor]) -> None:
    where = f"load_style: {files.weights_path}"
    for key, tensor in wanted.items():
        if key not in files.tensors:
            raise ValueError(f"{where}: {key} is missing")
        got = files.tensors[key]
        if got.shape != tensor.shape:
            raise ValueError(f"{where}: {key} must be {list(tensor.shape)}, got {list(got.shape)}")
        if not got.is_floating_point():
            raise ValueError(f"{where}: {key} must be floating-point, got {got.dtype}")
    for key in files.tensors:
        if key not in wanted:
            raise ValueError(f"{where}: {key} belongs to no cross-attention of the model")
