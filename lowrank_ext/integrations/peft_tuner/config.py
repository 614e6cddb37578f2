"""A PeftConfig for each method: its fields are those of adapter_config.json, PEFT's names first."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, ClassVar, Self

from peft import PeftConfig, PeftType
from torch import nn

from lowrank_ext.adapter_format import StoredConfig
from lowrank_ext.checkpoint.layout import whole
from lowrank_ext.checkpoint.peft_config import pattern_of
from lowrank_ext.config import ALL_LINEAR, AdapterConfig
from lowrank_ext.registry import Method
from lowrank_ext.targets import new_heads


@dataclasses.dataclass
class LowRankPeftConfig(PeftConfig):
    """The fields that all methods share, named as by PEFT; see ``AdapterConfig``.

    ``from_pretrained`` remembers that values are to come from a file, so that ``PeftModel`` does
    not compute a start that is then replaced.
    """

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: Any = ALL_LINEAR
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: dict[str, Any] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, Any] = dataclasses.field(default_factory=dict)
    modules_to_save: Any = None
    fan_in_fan_out: bool = False
    bias: str = "none"

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        # No fields, so that no file holds them: whether values are to come from a file, and whether
        # the patterns hold all that depends on the model. PEFT writes inference_mode into files;
        # transformers makes configs of them without from_pretrained of this class.
        self.awaits_values = self.is_complete = self.inference_mode
        self.peft_type = PeftType(self.method.peft_type)
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"{type(self).__name__}: layers_to_transform must be None where target_modules is "
                f"a string, got {self.target_modules!r}; give a list of names"
            )
        if self.bias != "none":
            raise ValueError(f"{type(self).__name__}: bias must be 'none', got {self.bias!r}")
        self.adapter_config(())

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        config: Self = super().from_pretrained(*args, **kwargs)
        config.awaits_values = config.is_complete = True
        return config

    def add_heads(self, model: nn.Module) -> None:
        """Train and save heads that are new for the task, as ``lr.adapt`` does."""
        named = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        saved = tuple(self.modules_to_save or ())
        config = dataclasses.replace(self.adapter_config(()), modules_to_save=saved, **named)
        if heads := new_heads(model, config):
            self.modules_to_save = [*saved, *heads]

    def set_numbers(self, config: AdapterConfig, paths: Collection[str]) -> None:
        """Take over ranks and alphas of the modules ``paths``, which may depend on the model."""
        self.lora_alpha = whole(config.default_alpha)
        ranks = {path: config.rank_for(path) for path in paths}
        alphas = {path: config.alpha_for(path) for path in paths}
        self.rank_pattern = pattern_of(config.rank_pattern, config.r, ranks)
        self.alpha_pattern = pattern_of(config.alpha_pattern, config.default_alpha, alphas)
        self.is_complete = True

    def adapter_config(self, paths: Collection[str]) -> AdapterConfig:
        """The method's own config; ``paths``: the modules of a complete one."""
        shared = {
            "r": self.r,
            "alpha": self.lora_alpha,
            "rslora": self.use_rslora,
            "dropout": self.lora_dropout,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }
        config_class, owner = self.method.config_class, type(self).__name__
        stored = StoredConfig(config_class, dataclasses.asdict(self), shared, paths, owner)
        return config_class.of(owner, **self.method.file_format.options(stored))


@functools.cache
def config_class_for(method: Method) -> type[LowRankPeftConfig]:
    """The PeftConfig of ``method``: the shared fields and the method's own."""
    defaults = {field.name: field for field in dataclasses.fields(method.config_class)}
    own = [
        (name, Any, dataclasses.field(default=_plain_default(defaults[name])))
        for name in method.config_class.own_fields
        if name in defaults
    ]
    name = f"{method.config_class.__name__.removesuffix('Config')}PeftConfig"
    made = dataclasses.make_dataclass(
        name,
        own,
        bases=(LowRankPeftConfig,),
        namespace={"method": method, "__doc__": method.config_class.__doc__},
    )
    made.__module__ = __name__
    globals()[name] = made  # where pickle looks
    return made


def _plain_default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return list(field.default) or None if isinstance(field.default, tuple) else field.default
    raise TypeError(f"config_class_for: {field.name} must have an immutable default")
