"""Embeddings of the base model in PEFT's files.

PEFT adds the input and output embeddings to a file when the vocabulary was extended before the
training, or when an adapter targets one of them: then as ``<path>.base_layer.weight``, where rows
train as ``<path>.token_adapter.base_layer.weight``. On loading they replace the model's; so they do
here, with a warning where they differ.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ext.adapter_files import AdapterFiles
from lowrank_ext.checkpoint.layout import PREFIX, bad_key
from lowrank_ext.files import printable
from lowrank_ext.nn.token_rows import WithRows
from lowrank_ext.wrappers import named_modules, unwrapped


class Embedding(NamedTuple):
    """A tensor of the base that a file may hold."""

    tensor: Tensor
    residual: bool  # whether the model's value is, or will be, the base without its initial branch


def held_embeddings(
    model: nn.Module,
    files: AdapterFiles,
    names: Mapping[str, Tensor],
    residual_paths: Collection[str] = (),
    with_rows: Collection[str] = (),
) -> dict[str, Embedding]:
    """The model's embeddings that the tensors ``names`` of a file, which belong to no adapter and
    to no module of modules_to_save, are for.

    Args:
        residual_paths: modules whose base weight lacks an initial branch.
        with_rows: modules with trained rows, whose frozen biases PEFT writes with
            bias="lora_only".

    Raises:
        ValueError: a tensor is no embedding, or its shape differs from the model's.
    """
    known = _embeddings_of(model, residual_paths, with_rows) if names else {}
    for key, tensor in names.items():
        if key not in known:
            raise bad_key(
                files,
                PREFIX + key,
                "belongs to no adapter and to no module of modules_to_save",
            )
        expected = list(known[key].tensor.shape)
        if list(tensor.shape) != expected:
            raise bad_key(
                files,
                PREFIX + key,
                f"must be {expected} as in the model, got {list(tensor.shape)}; the adapter was "
                "trained with another vocabulary: call model.resize_token_embeddings("
                f"{tensor.shape[0]}) before loading",
            )
        if not tensor.is_floating_point():
            raise bad_key(files, PREFIX + key, f"must be floating-point, got {tensor.dtype}")
    return {key: known[key] for key in names}


def _embeddings_of(
    model: nn.Module, residual_paths: Collection[str], with_rows: Collection[str] = ()
) -> dict[str, Embedding]:
    """Input and output embeddings of ``model``, and modules with rows, by each name that PEFT
    writes them under."""
    inner = unwrapped(model)
    owners = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(inner, getter, None)
        try:
            owner = get() if callable(get) else None
        except (NotImplementedError, AttributeError):  # transformers finds none
            continue
        if isinstance(owner, nn.Module):
            owners.append(unwrapped(owner))
    found = {}
    for path, module in named_modules(model):
        rows = path in with_rows or isinstance(module, WithRows)
        if not rows and not any(module is owner for owner in owners):
            continue
        kept = getattr(module, "base_layer", None)
        for name, tensor in (kept if isinstance(kept, nn.Module) else module)._parameters.items():
            if tensor is not None and name in ("weight", "bias"):
                for place in ("", "base_layer.", "token_adapter.base_layer."):
                    found[f"{path}.{place}{name}"] = Embedding(tensor, path in residual_paths)
    return found


def changed_embeddings(
    files: AdapterFiles, held: Mapping[str, Embedding], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The embeddings whose values, in the file's dtype, differ from the model's.

    Raises:
        ValueError: two tied ones differ in the file, or a residual base weight would be replaced.
    """
    changed: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for key, (own, residual) in held.items():
        value = values[key]
        other = seen.setdefault(id(own), key)
        if not torch.equal(values[other], value):
            raise bad_key(
                files, PREFIX + key, f"must equal {PREFIX}{other}, to which the model ties it"
            )
        if own.is_meta:
            raise bad_key(files, PREFIX + key, "must replace a tensor with values, got a meta one")
        if torch.equal(own.detach().cpu().to(value.dtype), value):
            continue
        if residual:
            raise bad_key(
                files,
                PREFIX + key,
                "must equal the model's weight, from which the init of this adapter takes a part; "
                "save from PEFT with save_embedding_layers=False",
            )
        changed[key] = value
    return changed


def say_replaced(files: AdapterFiles, changed: Iterable[str]) -> None:
    """Warn, before the model is touched, of embeddings that the file's will replace."""
    if names := ", ".join(changed):
        warnings.warn(
            printable(
                f"{files.caller}: {files.weights_path} holds {names}, which replaces the model's "
                "other values, as by PEFT"
            ),
            stacklevel=4,  # the caller of load_adapter
        )


@torch.no_grad()
def replace_embeddings(
    model: nn.Module, held: Mapping[str, Embedding], changed: Mapping[str, Tensor]
) -> None:
    """Give the model the file's embeddings, and remember to save them with the adapter."""
    for key, tensor in changed.items():
        held[key].tensor.copy_(tensor)
    if changed:
        unwrapped(model).lowrank_embeddings = tuple(changed)  # type: ignore[assignment]


def embeddings_to_save(model: nn.Module) -> dict[str, Tensor]:
    """The embeddings that came with the model's adapter, by their name in a file."""
    names = getattr(unwrapped(model), "lowrank_embeddings", ())
    present = _embeddings_of(model, ()) if names else {}
    return {name: present[name].tensor for name in names if name in present}
