"""AdapterConfig: the options that all methods share, which modules to adapt and how.

Every method has a subclass, an immutable dataclass. Building a config runs every check that needs
no model. ``dataclasses.replace(config, r=8)`` makes a changed copy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch

from lowrank_ext.checks import (
    check_alpha,
    check_choice,
    check_dropout,
    check_flag,
    check_rank,
    check_regex,
    did_you_mean,
    matching_pattern,
    normalized_adapter_dtype,
    normalized_layers,
    normalized_names,
)
from lowrank_ext.option_names import check_options

ALL_LINEAR = "all-linear"
# Attributes that PEFT reads first of what it takes for its own config.
_OF_PEFT = ("base_model_name_or_path", "is_prompt_learning", "task_type")


@dataclass(kw_only=True, frozen=True)
class AdapterConfig:
    """The options that all methods share; use a subclass.

    Attributes:
        r: rank of the adapters.
        alpha: the branch is scaled by ``alpha / r``; None stands for alpha = r, so the scaling is 1
            (sqrt(r) with ``rslora``).
        rslora: scale by ``alpha / sqrt(r)``, r being the rank of the module at hand.
        dropout: probability of dropping an element of the branch's input while training, below 1.
        target_modules: names, where a module matches when its path equals a name or ends with
            ``"." + name``; or one regular expression for the whole path; or ``"all-linear"``.
        exclude_modules: modules that are not adapted, matched as target_modules are.
        layers_to_transform: numbers of the layers that are adapted, one or several; None stands for
            all. Of target_modules, a list of names, only modules inside of these layers are then
            selected; a name that is a module's whole path selects it in any layer. As in PEFT the
            layer's number is the first in the path with two names before it.
        layers_pattern: names or regular expressions of what holds the layers ("layers", "h"), one
            or several: the number is then the first behind such a name.
        rank_pattern, alpha_pattern: values for single modules. A key is a name suffix or a regular
            expression; the first key with ``re.match(rf"(.*\\.)?({key})$", path)`` applies, as in
            PEFT.
        modules_to_save: names of modules that are trained whole and saved whole.
        adapter_dtype: ``"base"`` or a floating dtype, by name or as ``torch.dtype``. With a float64
            base the adapters are always float64.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: an argument has the wrong type.
    """

    peft_type: ClassVar[str] = ""
    inits: ClassVar[tuple[str, ...]] = ()
    # Fields that adapter_config.json holds under their own names, beside PEFT's.
    own_fields: ClassVar[tuple[str, ...]] = ()
    # The configs of all registered methods, by peft_type.
    registered: ClassVar[dict[str, type["AdapterConfig"]]] = {}
    # Fields that select some of the adapted modules, by names as in target_modules.
    selectors: ClassVar[tuple[str, ...]] = ()
    # Tokens whose rows of the embeddings train; a field of the methods that have it.
    trainable_token_indices: ClassVar[Any] = None

    r: int = 16
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    adapter_dtype: torch.dtype | str = "float32"
    init: str = ""

    def __getattr__(self, name: str) -> Any:
        way_out = "; PEFT and TRL take lr.peft_config(config)" if name in _OF_PEFT else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{way_out}")

    def __new__(cls, *args: Any, **options: Any) -> Self:
        check_options(options, [f.name for f in fields(cls)], cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not self.peft_type:
            raise TypeError(
                f"AdapterConfig: use {config_names()}, AdapterConfig itself is no method"
            )
        owner = type(self).__name__
        check_rank(self.r, owner, "r")
        if self.alpha is not None:
            check_alpha(self.alpha, owner, "alpha")
        check_flag(self.rslora, owner, "rslora")
        check_dropout(self.dropout, owner)
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{owner}: {name} must be a mapping, got {getattr(self, name)!r}")
        check_choice(self.init, self.inits, owner, "init")
        for key, rank in self.rank_pattern.items():
            check_regex(key, owner, "rank_pattern")
            check_rank(rank, owner, f"rank_pattern[{key!r}]")
        for key, alpha in self.alpha_pattern.items():
            check_regex(key, owner, "alpha_pattern")
            check_alpha(alpha, owner, f"alpha_pattern[{key!r}]")
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"{owner}: modules_to_save must be a sequence of names, "
                f"got the string {self.modules_to_save!r}"
            )
        if self.target_modules is None:
            raise TypeError(
                f"{owner}: target_modules must be names, a regular expression or {ALL_LINEAR!r}, "
                f"got None; leave it out for {ALL_LINEAR!r}"
            )
        self._set("target_modules", normalized_names(self.target_modules, owner, "target_modules"))
        if not self.target_modules and not self.target_parameters:
            raise ValueError(f"{owner}: target_modules must name at least one module, got none")
        if self.exclude_modules is not None:
            self._set(
                "exclude_modules", normalized_names(self.exclude_modules, owner, "exclude_modules")
            )
        self._check_layers(owner)
        self._set(
            "modules_to_save", normalized_names(self.modules_to_save, owner, "modules_to_save")
        )
        self._set("rank_pattern", dict(self.rank_pattern))
        self._set("alpha_pattern", dict(self.alpha_pattern))
        self._set("adapter_dtype", normalized_adapter_dtype(self.adapter_dtype, owner))

    def _check_layers(self, owner: str) -> None:
        layers = normalized_layers(self.layers_to_transform, owner)
        patterns = normalized_names(self.layers_pattern or (), owner, "layers_pattern")
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            check_regex(pattern, owner, "layers_pattern")
        for name, value in (("layers_to_transform", layers), ("layers_pattern", patterns)):
            if value and isinstance(self.target_modules, str):
                raise ValueError(
                    f"{owner}: {name} must be None where target_modules is a string, got "
                    f"{self.target_modules!r}; give target_modules as a list of names"
                )
        if patterns and layers is None:
            raise ValueError(
                f"{owner}: layers_pattern must be None without layers_to_transform, got "
                f"{self.layers_pattern!r}"
            )
        self._set("layers_to_transform", layers)
        self._set("layers_pattern", patterns or None)

    @classmethod
    def of(cls, owner: str, **options: Any) -> Self:
        """The config with these fields; errors name ``owner``, which took them as arguments."""
        try:
            return cls(**options)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace(cls.__name__, owner, 1)) from None

    @classmethod
    def for_one_module(
        cls, owner: str, config: "AdapterConfig | None", options: Mapping[str, Any]
    ) -> "AdapterConfig":
        """The config of a single module: ``config`` itself, or one with ``options`` as fields."""
        if config is None:
            config = cls.of(owner, **options)
        elif options:
            raise TypeError(
                f"{owner}: give a config or its fields, got a config and {sorted(options)}"
            )
        if not isinstance(config, cls):
            raise TypeError(
                f"{owner}: config must be a {cls.__name__}, got {type(config).__name__}"
            )
        config.check_no_patterns(owner)
        return config

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen: only while the object is being built

    def rank_for(self, path: str) -> int:
        """Rank of the module at ``path``."""
        key = matching_pattern(self.rank_pattern, path)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_for(self, path: str) -> float:
        """alpha of the module at ``path``: its entry in alpha_pattern, alpha, or else its rank."""
        alpha = self._alpha_setting(path)
        return float(self.rank_for(path) if alpha is None else alpha)

    def _alpha_setting(self, path: str) -> float | None:
        key = matching_pattern(self.alpha_pattern, path)
        return self.alpha if key is None else self.alpha_pattern[key]

    @property
    def default_alpha(self) -> float:
        """alpha of modules that no pattern names."""
        return float(self.r if self.alpha is None else self.alpha)

    def scaling_for(self, path: str, in_features: int) -> float:
        """Factor of the branch of the module at ``path``."""
        r = self.rank_for(path)
        return self.alpha_for(path) / (math.sqrt(r) if self.rslora else r)

    def for_module(self, path: str) -> Self:
        """The config of the module at ``path`` alone: its own rank and alpha, no patterns."""
        return replace(
            self,
            r=self.rank_for(path),
            alpha=self._alpha_setting(path),
            rank_pattern={},
            alpha_pattern={},
        )

    @property
    def base_biases(self) -> str:
        """Which biases of the base train and are saved with the adapters: "none", those of
        "adapted" modules, or "all" of the model."""
        return "none"

    @property
    def beyond_lora(self) -> str:
        """What makes the adapter more than a product of two factors at inference, "" if nothing:
        for the messages of those who need no more than that."""
        return ""

    @property
    def target_parameters(self) -> Sequence[str]:
        """Names of stacked weights that are adapted beside target_modules; a field of methods that
        have it."""
        return ()

    @property
    def whole_modules_train(self) -> bool:
        """Whether modules_to_save train; they are saved in any case."""
        return True

    def adapter_shapes(self, r: int, in_features: int, out_features: int) -> dict[str, list[int]]:
        """Shape of each tensor of one module in a checkpoint, by attribute name."""
        return {"lora_a": [r, in_features], "lora_b": [out_features, r]}

    def must_agree(self) -> dict[str, Any]:
        """Options, beside ranks and scalings, that must be equal for a checkpoint of one config to
        be loaded into modules of another."""
        return {}

    def check_no_patterns(self, owner: str) -> None:
        """Raise ValueError where there is a pattern: a single module has no path to match."""
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                raise ValueError(
                    f"{owner}: {name} must be empty for a single module, which has no path, "
                    f"got {getattr(self, name)!r}; use config.for_module(path)"
                )

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``peft_type`` as values that JSON can hold."""
        values = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        return {"peft_type": self.peft_type, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that ``to_dict`` described.

        Called on AdapterConfig, ``peft_type`` selects the method; called on a subclass, it may be
        absent.

        Raises:
            ValueError: ``peft_type`` is missing, unknown or another method's, or a key is no field.
        """
        values = dict(values)
        peft_type = values.pop("peft_type", cls.peft_type)
        known = cls.registered
        if peft_type not in known:
            raise ValueError(
                f"{cls.__name__}.from_dict: peft_type must be one of {sorted(known)}, "
                f"got {peft_type!r}"
            )
        config_class = known[peft_type]
        if not issubclass(config_class, cls):
            raise ValueError(
                f"{cls.__name__}.from_dict: peft_type must be {cls.peft_type!r}, got {peft_type!r}"
            )
        names = [f.name for f in fields(config_class)]
        for key in values:
            if key not in names:
                raise ValueError(
                    f"{config_class.__name__}.from_dict: {key!r} is not a field"
                    f"{did_you_mean(key, names)}"
                )
        return config_class(**values)


def config_names() -> str:
    """ "LoRAConfig, … or LastConfig": the configs of all methods, for messages."""
    *names, last = (config.__name__ for config in AdapterConfig.registered.values())
    return f"{', '.join(names)} or {last}" if names else last


def plain(value: object) -> object:
    """A field's value as JSON has it."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return value
