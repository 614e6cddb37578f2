"""The third file of a guard, ``guard_head.safetensors``: its head and the digest of its adapter.

The adapter's two files are PEFT's. The head's metadata holds the options of the model and the
digest of the adapter's weights, so that a head is never used with another adapter. The three files
are replaced together, see ``lowrank_ext/adapter_files.py``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lowrank_ext.adapter_files import AdapterFiles, Companion, serialized
from lowrank_ext.checks import check_rank
from lowrank_ext.files import parse_json_object, quoted

HEAD_NAME = "guard_head.safetensors"
_KEY = "lowrank_ext_guard"


@dataclass(frozen=True)
class HeadOptions:
    """Layout of a guard's outputs."""

    num_categories: int
    unsafe_head: bool = True
    category_names: tuple[str, ...] | None = None

    @property
    def num_outputs(self) -> int:
        return self.num_categories + self.unsafe_head

    def check(self, owner: str) -> None:
        """Raise TypeError or ValueError, naming the argument."""
        check_rank(self.num_categories, owner, "num_categories")
        if not isinstance(self.unsafe_head, bool):
            raise TypeError(f"{owner}: unsafe_head must be a bool, got {self.unsafe_head!r}")
        if self.num_outputs < 2:
            raise ValueError(
                f"{owner}: num_categories must be at least 2 without an unsafe head, got "
                f"{self.num_categories}"
            )
        names = self.category_names
        if names is None:
            return
        if not isinstance(names, tuple | list):
            raise TypeError(f"{owner}: category_names must be a sequence of names, got {names!r}")
        if not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"{owner}: category_names must hold non-empty strings, got {names!r}")
        if len(set(names)) != self.num_categories or len(names) != self.num_categories:
            raise ValueError(
                f"{owner}: category_names must be num_categories={self.num_categories} different "
                f"names, got {list(names)}"
            )


def head_companion(options: HeadOptions, tensors: Mapping[str, Tensor]) -> Companion:
    """Makes the file's bytes from the digest of the adapter's weights."""

    def content(adapter_digest: str) -> bytes:
        described = asdict(options) | {"adapter_sha256": adapter_digest}
        return serialized(tensors, {_KEY: json.dumps(described, sort_keys=True)})

    return content


def read_head(files: AdapterFiles, hidden_size: int) -> tuple[HeadOptions, dict[str, Tensor]]:
    """The options, and weight [outputs, hidden_size] and bias [outputs], on the CPU.

    Raises:
        ValueError: the head is damaged, or belongs to another adapter or model.
    """
    head = files.companion
    assert head is not None  # the caller asked for it
    where = f"{files.caller}: {head.path}"
    described = _described(head.metadata.get(_KEY), where)
    if described.pop("adapter_sha256", None) != files.weights.digest():
        raise ValueError(
            f"{where} must belong to the adapter beside it, which has been replaced since"
        )
    options = _options(described, where)
    shapes = {"weight": [options.num_outputs, hidden_size], "bias": [options.num_outputs]}
    got = {key: list(tensor.shape) for key, tensor in head.specs.items()}
    if got != shapes:
        raise ValueError(f"{where} must hold {shapes} for this model, got {quoted(got)}")
    for key, tensor in head.specs.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {key} must be floating-point, got {tensor.dtype}")
    return options, head.read()


def _described(text: str | None, where: str) -> dict[str, Any]:
    try:
        return parse_json_object(text or "", f"{where}: metadata {_KEY}")
    except ValueError as error:
        raise ValueError(
            f"{where}: metadata {_KEY} must be a JSON object, got {quoted(text, 60)}: {error}"
        ) from None


def _options(described: dict[str, Any], where: str) -> HeadOptions:
    try:
        names = described.pop("category_names", None)
        options = HeadOptions(
            category_names=tuple(names) if isinstance(names, list) else names, **described
        )
        options.check(where)
    except TypeError as error:  # an unknown or missing key, or a value of the wrong type
        raise ValueError(f"{where}: metadata {_KEY}: {error}") from None
    return options
