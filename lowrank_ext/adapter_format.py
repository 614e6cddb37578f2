"""How a method's adapters look in adapter_config.json and adapter_model.safetensors.

Beside PEFT's fields the config file holds the method's ``own_fields``; the tensor file holds, of
each module, what its config's ``adapter_shapes`` names. A method whose files differ from that
derives from :class:`AdapterFormat`. What all files share: ``lowrank_ext/checkpoint``.
"""

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from lowrank_ext.checkpoint.adapter_files import AdapterFiles
    from lowrank_ext.config import AdapterConfig
    from lowrank_ext.nn.low_rank_linear import LowRankLinear

# Module path -> {kind: tensor}, where a kind is what a tensor is called after the path.
Adapters = dict[str, dict[str, Tensor]]

_PROJECTIONS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


class StoredConfig(NamedTuple):
    """What adapter_config.json says.

    Attributes:
        config_class: of the method that it names.
        fields: all of it.
        shared: arguments of the config class that every method has, read from the fields.
        paths: the adapted modules, from the tensor file.
        where: caller and file, for messages.
    """

    config_class: "type[AdapterConfig]"
    fields: Mapping[str, Any]
    shared: Mapping[str, Any]
    paths: Collection[str]
    where: str


class AdapterFormat:
    """PEFT's fields and tensors, with the method's own beside them.

    Args:
        tensor_names: attribute of a module -> kind, for what is there beside lora_a and lora_b.
        more_names: regular expression for attributes whose kind is ``<attribute>.weight``, where
            their number is open.
    """

    def __init__(
        self, tensor_names: Mapping[str, str] | None = None, more_names: str | None = None
    ) -> None:
        self.kinds = {**_PROJECTIONS, **(tensor_names or {})}
        self._attributes = {kind: attribute for attribute, kind in self.kinds.items()}
        self._more_names = None if more_names is None else re.compile(more_names)

    def check_beside(self, other: "AdapterFormat") -> None:
        """Raise ValueError where the two call different tensors the same, or one differently."""
        for attribute, kind in self.kinds.items():
            if other.kinds.get(attribute, kind) != kind:
                raise ValueError(
                    f"register: {attribute} must be called {other.kinds[attribute]!r} in files as "
                    f"by another method, got {kind!r}"
                )
            if other._attributes.get(kind, attribute) != attribute:
                raise ValueError(
                    f"register: {kind!r} must be {other._attributes[kind]} as of another method, "
                    f"got {attribute}"
                )

    def kind_of(self, attribute: str) -> str:
        """What a tensor of a module is called in a file."""
        return self.kinds.get(attribute, f"{attribute}.weight")

    def attribute_of(self, kind: str) -> str:
        """The inverse of :meth:`kind_of`."""
        return self._attributes.get(kind, kind.removesuffix(".weight"))

    def kind_in(self, key: str) -> str | None:
        """The kind that ``key``, a name in a file, ends with; None where it is of no adapter."""
        named = next((kind for kind in self._attributes if key.endswith(f".{kind}")), None)
        if named is None and self._more_names is not None:
            last = key.removesuffix(".weight").rpartition(".")[2]
            if key.endswith(".weight") and self._more_names.fullmatch(last):
                return f"{last}.weight"
        return named

    def shapes(
        self, config: "AdapterConfig", r: int, in_features: int, out_features: int
    ) -> dict[str, list[int]]:
        """Shape of every tensor of a module in memory, by kind."""
        shapes = config.adapter_shapes(r, in_features, out_features)
        return {self.kind_of(attribute): shape for attribute, shape in shapes.items()}

    def tensors(self, module: "LowRankLinear", config: "AdapterConfig") -> dict[str, Tensor]:
        """What the file holds of ``module``, by kind."""
        shapes = self.shapes(config, module.r, module.in_features, module.out_features)
        return {kind: getattr(module, self.attribute_of(kind)) for kind in shapes}

    def fields(
        self, config: "AdapterConfig", numbers: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Fields of the config file beside those that every method has, and metadata for the
        tensor file.

        Args:
            numbers: r, lora_alpha, rank_pattern and alpha_pattern; a field of the same name
                replaces one.
        """
        return {key: getattr(config, key) for key in config.own_fields}, {}

    def unpack(self, files: "AdapterFiles", adapters: Adapters) -> tuple["AdapterFiles", Adapters]:
        """What :meth:`tensors` and :meth:`fields` wrote, in the form that modules have it."""
        return files, adapters

    def optional(
        self, config: "AdapterConfig", shapes: Mapping[str, list[int]]
    ) -> dict[str, list[int]]:
        """Shapes, by kind, of tensors that a file holds of all modules or of none."""
        return {}

    def options(self, stored: StoredConfig) -> dict[str, Any]:
        """Arguments for the method's config class."""
        own = stored.config_class.own_fields
        return {**stored.shared, **{key: stored.fields[key] for key in own if key in stored.fields}}
