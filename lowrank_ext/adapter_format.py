"""How a method's adapters look in adapter_config.json and adapter_model.safetensors.

Beside PEFT's fields the config file holds the method's ``own_fields``; the tensor file holds, for
each module, the tensors that ``adapter_shapes`` of its config names. A method with other files
subclasses ``AdapterFormat``. Code for all files: ``lowrank_ext/checkpoint``.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ext.adapter_files import AdapterFiles
from lowrank_ext.config import AdapterConfig
from lowrank_ext.nn.base_layer import EMBEDDING, family_of, features_of, kernel_shape, stack_of
from lowrank_ext.nn.low_rank_linear import LowRankLinear

# Module path -> {kind: tensor}. A kind is the part of a tensor's key after the module's path.
Adapters = dict[str, dict[str, Tensor]]

# The kinds of the projections, for the modules of most families and for embeddings.
_PROJECTIONS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_OF_EMBEDDINGS = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}


class StoredConfig(NamedTuple):
    """Content of adapter_config.json.

    Attributes:
        config_class: the config class of the method that the file names.
        fields: the whole JSON object.
        shared: arguments that every config class takes, read from the fields.
        paths: the adapted modules, from the tensor file.
        where: caller and file, for messages.
    """

    config_class: type[AdapterConfig]
    fields: Mapping[str, Any]
    shared: Mapping[str, Any]
    paths: Collection[str]
    where: str


class AdapterFormat:
    """PEFT's fields and tensors, with the method's own beside them.

    Args:
        tensor_names: attribute of a module -> kind, for tensors other than lora_a and lora_b.
        more_names: regular expression of further attributes, in any number, whose kind is
            ``<attribute>.weight``.
    """

    # Options of PEFT's LoRA that the method's files may use, beside those of all methods.
    peft_fields: ClassVar[tuple[str, ...]] = ()
    # Whether ``lora_factors`` of a module needs other modules of the model.
    needs_other_modules = False

    def __init__(
        self, tensor_names: Mapping[str, str] | None = None, more_names: str | None = None
    ) -> None:
        self.kinds = {**_PROJECTIONS, **(tensor_names or {})}
        self._attributes = {kind: attribute for attribute, kind in self.kinds.items()}
        self._attributes |= {kind: attribute for attribute, kind in _OF_EMBEDDINGS.items()}
        self._more_names = None if more_names is None else re.compile(more_names)

    def check_beside(self, other: "AdapterFormat") -> None:
        """Raise ValueError unless each attribute that both formats name has the same kind in both,
        and each kind the same attribute."""
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

    def kind_of(self, attribute: str, module: nn.Module | None = None) -> str:
        """The kind under which a file holds ``attribute`` of a module, a linear one by default."""
        if attribute in _OF_EMBEDDINGS and module is not None and _family(module) == EMBEDDING:
            return _OF_EMBEDDINGS[attribute]
        return self.kinds.get(attribute, f"{attribute}.weight")

    def attribute_of(self, kind: str) -> str:
        """The inverse of ``kind_of``."""
        return self._attributes.get(kind, kind.removesuffix(".weight"))

    def kind_in(self, key: str) -> str | None:
        """The kind at the end of ``key``, a name in a file; None if it is no adapter tensor."""
        named = next((kind for kind in self._attributes if key.endswith(f".{kind}")), None)
        if named is None and self._more_names is not None:
            last = key.removesuffix(".weight").rpartition(".")[2]
            if key.endswith(".weight") and self._more_names.fullmatch(last):
                return f"{last}.weight"
        return named

    def shapes(self, config: AdapterConfig, r: int, module: nn.Module) -> dict[str, list[int]]:
        """Shape of every tensor of ``module``, an adapter or its base, in the file, by kind."""
        features = features_of(module)
        assert features is not None  # the caller has looked
        # Over a stack of E weights PEFT's matrices are as those of rank E r.
        shapes = config.adapter_shapes(r * math.prod(stack_of(module)), *features)
        return {
            self.kind_of(attribute, module): _shape_in_file(module, attribute, shape)
            for attribute, shape in shapes.items()
        }

    def tensors(self, module: LowRankLinear, config: AdapterConfig) -> dict[str, Tensor]:
        """The tensors of ``module`` that the file holds, by kind."""
        shapes = config.adapter_shapes(module.r, module.in_features, module.out_features)
        return self.stored(module, {attribute: getattr(module, attribute) for attribute in shapes})

    def stored(self, module: LowRankLinear, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of ``module``, by attribute, as the file holds them, by kind."""
        found = {}
        for attribute, tensor in tensors.items():
            packed = module.packed(attribute, tensor)
            shape = _shape_in_file(module, attribute, list(packed.shape))
            same = list(packed.shape) == shape
            found[self.kind_of(attribute, module)] = packed if same else packed.reshape(shape)
        return found

    def lora_factors(self, module: LowRankLinear) -> tuple[Tensor, Tensor]:
        """lora_a [R, K] and lora_b [N, R] of an ordinary LoRA, or stacks of them: ``module``, in
        evaluation mode, adds its scaling times lora_b lora_a to the original weight.

        The module's own tensors; where products are taken, in fp64, both in fp32 (fp64 for fp64
        adapters).
        """
        lora_a, lora_b = module.branch_factors(training=False)
        if module.core is None and module.rank_scale is None and module.out_scale is None:
            return lora_a, lora_b
        return rounded(lora_a, lora_a), rounded(module.with_scales(lora_b), lora_b)

    def fields(
        self, config: AdapterConfig, numbers: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The method's own fields of the config file, and metadata for the tensor file.

        Args:
            numbers: r, lora_alpha, rank_pattern and alpha_pattern; a returned field of the same
                name replaces one.
        """
        return {key: getattr(config, key) for key in config.own_fields}, {}

    def unpack(self, files: AdapterFiles, adapters: Adapters) -> tuple[AdapterFiles, Adapters]:
        """Convert what ``tensors`` and ``fields`` wrote to the tensors of modules."""
        return files, adapters

    def start(self, module: LowRankLinear) -> None:
        """Give ``module`` the residual base of a file without the tensors that rebuild it."""
        module.reset_adapter()

    def optional(
        self, config: AdapterConfig, shapes: Mapping[str, list[int]]
    ) -> dict[str, list[int]]:
        """Shapes, by kind, of optional tensors: a file holds them for all modules or for none."""
        return {}

    def options(self, stored: StoredConfig) -> dict[str, Any]:
        """Arguments for the method's config class."""
        own = stored.config_class.own_fields
        return {**stored.shared, **{key: stored.fields[key] for key in own if key in stored.fields}}


def _family(module: nn.Module) -> str | None:
    return module.family if isinstance(module, LowRankLinear) else family_of(module)


def _shape_in_file(module: nn.Module, attribute: str, shape: list[int]) -> list[int]:
    """PEFT's shapes: the projections of a convolution are kernels, the second one of size 1."""
    kernel = kernel_shape(module)
    if len(shape) != 2 or not kernel:
        return shape
    if attribute.startswith("lora_a"):
        return [shape[0], *kernel]
    return [*shape, *(1 for _ in kernel[1:])] if attribute.startswith("lora_b") else shape


def rounded(product: Tensor, like: Tensor) -> Tensor:
    """``product`` in fp32, or in fp64 if ``like`` has that dtype."""
    return product.to(torch.promote_types(like.dtype, torch.float32))
