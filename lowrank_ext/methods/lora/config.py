"""Configuration of LoRA, rsLoRA and PiSSA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from lowrank_ext.checks import (
    check_choice,
    check_flag,
    normalized_names,
    normalized_token_indices,
)
from lowrank_ext.config import ALL_LINEAR, AdapterConfig, plain

_BIASES = {"none": "none", "lora_only": "adapted", "all": "all"}


class _Default(str):
    """target_modules that nobody has given."""

    __slots__ = ()


@dataclass(kw_only=True, frozen=True)
class LoRAConfig(AdapterConfig):
    """LoRA: y = x Wᵀ + bias + scaling · (drop(x) lora_aᵀ) lora_bᵀ; lora_a and lora_b train.

    Attributes:
        init: ``"kaiming"``: lora_a uniform as in PEFT, lora_b zero. ``"gaussian"``: lora_a normal
            with standard deviation 1/r, lora_b zero. ``"pissa"``: the top-r singular triples of W,
            which are subtracted from the base weight (Meng et al., arXiv 2404.02948).
        lora_bias: whether lora_b has a bias of its own, zero at the start, which adds
            scaling · lora_bias to the output; with init="kaiming" only.
        dora: whether the columns of the output have trained magnitudes (DoRA, Liu et al., arXiv
            2402.09353): y = magnitude / ‖W + scaling · lora_b lora_a‖ ⊙ (x Wᵀ + scaling ·
            (x lora_aᵀ) lora_bᵀ) + bias, the norm of each row, without a gradient. Over linear
            modules, dense or quantized; not together with lora_bias.
        bias: which biases of the base train and are saved: ``"none"``, ``"lora_only"`` (those of
            adapted modules) or ``"all"`` of the model. They train in place, so the base is then no
            longer there: ``lr.disable_adapter`` raises.
        target_parameters: names of stacked expert weights [E, ..., ...] that get an adapter for
            each expert, beside target_modules, which are then by default none; a parameter matches
            when its path equals a name or ends with ``"." + name``: ``"experts.gate_up_proj"``. As
            in PEFT without dropout, and without ``pissa``; exclude_modules and layers_to_transform
            do not concern them.
        trainable_token_indices: tokens whose rows of the embeddings train beside the adapters. A
            sequence is for the model's input embeddings, a mapping from names of embeddings or
            heads, matched as target_modules, to sequences for others. Modules that the weight of
            an embedding is tied to compute with the same rows.
    """

    peft_type: ClassVar[str] = "LORA"
    inits: ClassVar[tuple[str, ...]] = ("kaiming", "gaussian", "pissa")

    target_modules: str | Sequence[str] = _Default(ALL_LINEAR)
    init: str = "kaiming"
    target_parameters: Sequence[str] = ()
    lora_bias: bool = False
    dora: bool = False
    bias: str = "none"
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None  # type: ignore[misc]  # a field of this method alone

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if isinstance(self.target_parameters, str):
            raise TypeError(
                f"{owner}: target_parameters must be a sequence of names, got the string "
                f"{self.target_parameters!r}"
            )
        names = normalized_names(self.target_parameters, owner, "target_parameters")
        self._set("target_parameters", names)
        if names and isinstance(self.target_modules, _Default):
            self._set("target_modules", ())  # as in PEFT
        super().__post_init__()
        check_flag(self.lora_bias, owner, "lora_bias")
        check_flag(self.dora, owner, "dora")
        check_choice(self.bias, tuple(_BIASES), owner, "bias")
        if self.lora_bias and self.init != "kaiming":
            raise ValueError(f"{owner}: lora_bias must be False with init={self.init!r}, got True")
        if self.lora_bias and self.dora:
            raise ValueError(f"{owner}: lora_bias must be False with dora=True, got True")
        tokens = normalized_token_indices(self.trainable_token_indices, owner)
        self._set("trainable_token_indices", tokens)

    def for_module(self, path: str) -> Self:
        return replace(super().for_module(path), trainable_token_indices=None)

    def check_no_patterns(self, owner: str) -> None:
        super().check_no_patterns(owner)
        if self.trainable_token_indices is not None:
            raise ValueError(
                f"{owner}: trainable_token_indices must be None for a single module, got "
                f"{plain(self.trainable_token_indices)}; use TokenRows over the embedding"
            )

    @property
    def base_biases(self) -> str:
        return _BIASES[self.bias]

    @property
    def beyond_lora(self) -> str:
        if self.dora:
            return "magnitudes of its columns (DoRA)"
        if self.lora_bias:
            return "a bias of lora_b (lora_bias)"
        if self.trainable_token_indices is not None:
            return "trained rows of embeddings (trainable_token_indices)"
        return f"trained biases (bias={self.bias!r})" if self.bias != "none" else ""

    def adapter_shapes(self, r: int, in_features: int, out_features: int) -> dict[str, list[int]]:
        shapes = super().adapter_shapes(r, in_features, out_features)
        if self.lora_bias:
            shapes["lora_bias"] = [out_features]
        return {**shapes, "magnitude": [out_features]} if self.dora else shapes

    def must_agree(self) -> dict[str, Any]:
        return {"lora_bias": self.lora_bias, "dora": self.dora, "bias": self.bias}
