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
    read_adapter_files,
    write_adapter_files,
)
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
    files = read_adapter_files(Path(path), "load_style")
    config, embedder_options = _read_config(files)
    own: StylePathConfig | None = getattr(model, "style_path_config", None)
    if own is None:
        processors = make_processors(model, config, "load_style")
    else:
        processors = style_processors(model, "load_style")
        _check_agree(files, config, own)
    embedder = None
    if embedder_options is not None:
        try:
            embedder = StyleEmbedder(**embedder_options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"load_style: {files.config_path}: embedder: {error}") from None
    wanted = _tensors(processors, config, embedder)
    _check_tensors(files, wanted)
    device = next(iter(processors.values())).style_path.lam.device
    if embedder is not None:
        dtype = files.tensors["embedder.proj"].dtype
        wanted = _tensors(processors, config, embedder.to(device, dtype))
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(files.tensors[key])
    if own is None:
        install(model, processors, config)
    return embedder


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
            f"got {values.get('peft_type')!r}"
        )
    if embedder is not None and not isinstance(embedder, dict):
        raise ValueError(
            f"load_style: {files.config_path}: embedder must be an object, got {embedder!r}"
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
    for key in files.tensors:
        if key not in wanted:
            raise ValueError(f"{where}: {key} belongs to no cross-attention of the model")
