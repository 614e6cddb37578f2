"""The settings of a run, which are checked before anything is loaded."""

import dataclasses
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from lowrank_ext import LoRAConfig, registry
from lowrank_ext.cli.chat_template import check_template
from lowrank_ext.cli.data import DataOptions, absolute
from lowrank_ext.cli.errors import UserError, as_user_error, near_matches
from lowrank_ext.cli.quantization import NOT_QUANTIZED, check_quantization
from lowrank_ext.cli.run_file import RUN_FILE
from lowrank_ext.cli.setting_checks import (
    check_combinations,
    check_layers,
    check_length,
    check_names,
    check_numbers,
    check_rates,
)
from lowrank_ext.cli.sharded import check_fsdp
from lowrank_ext.cli.targets import parse_layers, parse_targets
from lowrank_ext.files import quoted
from lowrank_ext.recipe import DROPOUT, Option, Recipe

# Baselines, and learning rates that work for them on the default model and text. The methods are
# the recipes in the registry.
BASELINES = {"frozen": 0.0, "full": 5e-5, "peft-lora": 3e-3, "peft-lora-accelerated": 3e-3}
_BARE = ("frozen", "full")  # without adapters
_OF_TRAINING = {
    *("lr", "warmup", "schedule", "min_lr", "weight_decay", "clip", "optimizer", "betas", "eps"),
    "neftune",
}
DEFAULT_STEPS = 30
# Of methods with adapters; frozen and full have none.
ADAPTER_DEFAULTS: dict[str, Any] = {
    "rank": 16,
    "alpha": None,
    "dropout": None,
    "targets": "all-linear",
    "adapter_dtype": "fp32",
    "modules_to_save": (),
    "rslora": False,
    "exclude": None,
    "layers": None,
}
# Baselines that have the options of our LoRA.
PEFT_METHODS = ("peft-lora", "peft-lora-accelerated")
# Under another name in files, where it is what the user gave.
_STORED_NAMES = {"given_steps": "steps"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines the results of a run; stored as run.yaml for --resume.

    Attributes:
        given_steps: --steps; None with --epochs, whose steps are known once the data is.
        resolved_steps: those of --epochs, see `with_steps`; not stored.
        warmup: below 1 a fraction of the steps, from 1 their number.
        min_lr: where cosine ends, as a fraction of the peak.
        betas: two numbers, as the user wrote them; none: the optimizer's own.
        neftune: alpha of the noise on the embeddings in training; None: no noise.
        clip: the largest norm of the gradient; 0: any.
        eval_every: steps between evaluations; None: four in a run.
        early_stop: evaluations without improvement that end the run; None: it is not ended.
        keep: how many checkpoints stay.
        adapter: directory of the one that the run begins with; None: a new one.
        options: of all methods, by name.
        fixed: options that a subclass's command does not have, and their values.
    """

    fixed: ClassVar[Mapping[str, Any]] = {}

    model: str | None
    revision: str | None
    device: str
    quantize: str | None
    attention: str
    chat_template: str | None
    gradient_checkpointing: bool
    text: tuple[str, ...]
    eval: tuple[str, ...]
    field: str
    format: str
    train_on: str
    packing: str
    eval_split: float | None
    max_rows: int | None
    methods: tuple[str, ...]
    compare: bool
    adapter: str | None
    rank: int
    alpha: float | None
    dropout: float | None
    targets: str
    exclude: str | None
    layers: str | None
    rslora: bool
    modules_to_save: tuple[str, ...]
    given_steps: int | None
    epochs: float | None
    batch: int
    accumulate: int
    seq_len: int
    lr: float | None
    warmup: float
    schedule: str
    min_lr: float
    weight_decay: float
    clip: float
    optimizer: str
    betas: tuple[str, ...]
    eps: float | None
    neftune: float | None
    options: Mapping[str, Any]
    dtype: str
    adapter_dtype: str
    seed: int
    threads: int | None
    eval_batches: int
    eval_every: int | None
    early_stop: int | None
    log_to: tuple[str, ...]
    log_every: int
    run_name: str | None
    save_every: int
    keep: int
    compile: bool
    fsdp: bool
    resolved_steps: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the run. Raises RuntimeError while those of --epochs are unknown."""
        steps = self.given_steps if self.epochs is None else self.resolved_steps
        if steps is None:
            raise RuntimeError("the steps of --epochs are known once the data is: with_steps")
        return steps

    @property
    def adam_betas(self) -> tuple[float, float] | None:
        """--betas as numbers; None: the optimizer's own."""
        if not self.betas:
            return None
        first, second = self.betas
        return float(first), float(second)

    def with_steps(self, steps: int) -> Self:
        """A copy for data in which --epochs are that many steps."""
        return dataclasses.replace(self, resolved_steps=steps)

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        _check_methods(self.methods)
        check_numbers(self)
        check_length(self)
        check_names(self)
        check_rates(self)
        check_combinations(self)
        if not self.targets.strip():
            raise UserError(
                "--targets must be all-linear, names separated by commas, or a regular expression"
            )
        check_layers(self)
        self._check_options()
        check_quantization(self)
        DataOptions.of(self).check()
        if self.chat_template is not None:
            check_template(self.chat_template)
        if self.fsdp:
            check_fsdp(self)

    def _check_options(self) -> None:
        for option in method_options():
            value = self.options[option.name]
            problem = option.check(value, self.options)
            if problem is not None:
                flag = "--" + option.name.replace("_", "-")
                raise UserError(f"{flag} {problem}, got {value!r}")
        for recipe in self.recipes():
            problem = recipe.check(self)
            if problem is not None:
                raise UserError(problem)
            with as_user_error(f"cannot set up {recipe.name}", ValueError, TypeError):
                recipe.config(self.config_fields(recipe.name), self)
        if set(PEFT_METHODS) & set(self.methods):
            with as_user_error("cannot set up PEFT's LoRA", ValueError, TypeError):
                lora_recipe().config(self.config_fields("lora"), self)

    def read_options(self) -> set[str]:
        """The names of the options, of those that not every method reads, that the run's do."""
        read = {option.name for recipe in self.recipes() for option in recipe.options}
        if set(PEFT_METHODS) & set(self.methods):
            read |= {option.name for option in lora_recipe().options}
        if any(name not in _BARE for name in self.methods):
            read |= ADAPTER_DEFAULTS.keys()
        return read

    def check_all_read(self, given: Iterable[str], from_file: Collection[str] = ()) -> None:
        """Raises UserError for a given option that no method of the run reads.

        Args:
            from_file: those of them that a file alone gives; it may have defaults of other methods,
                as run.yaml of a comparison does.
        """
        readers, usual, values = _readers(), _unread(), self.by_option()
        read = self.read_options()
        if any(name != "frozen" for name in self.methods):
            read |= _OF_TRAINING
        for name in given:
            if name in from_file and (name in _OF_TRAINING or values[name] == usual.get(name)):
                continue
            if name in readers and name not in read:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{flag} is of {readers[name]}; the run has {', '.join(self.methods)}"
                )

    def recipes(self) -> list[Recipe]:
        """The recipes of the run's methods, baselines left out, in the order of the list."""
        return [recipe for recipe in registry.recipes() if recipe.name in self.methods]

    def adapter_recipes(self) -> dict[str, Recipe]:
        """The recipe of every method with adapters, by the method's name; PEFT's LoRA has ours."""
        recipes = {recipe.name: recipe for recipe in registry.recipes()}
        recipes |= dict.fromkeys(PEFT_METHODS, lora_recipe())
        return {name: recipes[name] for name in self.methods if name in recipes}

    def learning_rate(self, method: str) -> float:
        """--lr, or the method's own default."""
        rates = BASELINES | {recipe.name: recipe.learning_rate for recipe in registry.recipes()}
        return rates[method] if self.lr is None else self.lr

    def dropout_of(self, method: str) -> float:
        """--dropout, or the method's own default."""
        rates = {recipe.name: recipe.dropout for recipe in registry.recipes()}
        return rates.get(method, DROPOUT) if self.dropout is None else self.dropout

    def dropout_text(self) -> str:
        """The dropout of the run's methods, the most frequent first: "0.05 (lamda 0)"."""
        rates = {name: self.dropout_of(name) for name in self.methods if name not in _BARE}
        most = max([*rates.values()] or [0.0], key=list(rates.values()).count)
        others = [f"{name} {rate:g}" for name, rate in rates.items() if rate != most]
        return f"{most:g} ({', '.join(others)})" if others else f"{most:g}"

    def scaling(self) -> float:
        """The factor of the low-rank branch: alpha / rank, 1 by default."""
        return LoRAConfig(r=self.rank, alpha=self.alpha).scaling_for("", in_features=1)

    def config_fields(self, method: str) -> dict[str, Any]:
        """The fields that the configs of all methods share, but for adapter_dtype."""
        return {
            "r": self.rank,
            "alpha": self.alpha,
            "rslora": self.rslora,
            "dropout": self.dropout_of(method),
            "target_modules": parse_targets(self.targets),
            "exclude_modules": self.exclude and parse_targets(self.exclude, "--exclude"),
            "layers_to_transform": parse_layers(self.layers),
            "modules_to_save": self.modules_to_save,
        }

    def method_directory(self, out: Path, method: str) -> Path:
        """OUT/<method> when several methods are compared, OUT itself for one."""
        return out / method if self.compare else out

    def to_dict(self) -> dict[str, Any]:
        """The options of the run by their names on the command line, as run.yaml and report.json
        store them; of the methods' options those that its methods read."""
        names = {field.name for field in _fields(type(self))} - {"methods", "compare", "options"}
        values = {_STORED_NAMES.get(name, name): getattr(self, name) for name in names}
        name, value = ("compare", self.methods) if self.compare else ("method", self.methods[0])
        values |= {**self.options, name: value}
        unread = _unread().keys() - self.read_options()
        types = option_types(type(self))
        return {name: values[name] for name in types if name in values.keys() - unread}

    def by_option(self) -> dict[str, Any]:
        """The values of all options by name, with the methods as those of --method and --compare,
        for comparisons."""
        methods = {"method": self.methods, "compare": self.methods}
        return {**self.options, **vars(self), "steps": self.given_steps, **methods}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = RUN_FILE) -> Self:
        """The settings of `to_dict`. Raises UserError for those of another version."""
        settings = cls.from_options({**dict.fromkeys(option_types(cls)), **_unread(), **values})
        _check_methods(settings.methods)
        if odd := sorted(values.keys() ^ settings.to_dict().keys()):
            raise UserError(f"{where} is not from this version of lowrank-ext: {quoted(odd)[1:-1]}")
        return settings

    @classmethod
    def from_options(cls, values: Mapping[str, Any]) -> Self:
        """The settings of options by their names on the command line. Paths become absolute, so
        that a run can be resumed from another directory."""
        values = {**values, **cls.fixed}
        methods, is_comparison = parse_methods(values["method"], values["compare"])
        steps, epochs = values["steps"], values["epochs"]
        derived: dict[str, Any] = {
            "methods": methods,
            "compare": is_comparison,
            "model": values["model"] and absolute(values["model"]),
            "quantize": None if values["quantize"] == NOT_QUANTIZED else values["quantize"],
            "chat_template": values["chat_template"] and absolute(values["chat_template"]),
            "text": _paths(values["text"]),
            "eval": _paths(values["eval"]),
            "modules_to_save": comma_separated(values["modules_to_save"]),
            "log_to": comma_separated(values["log_to"]),
            "betas": comma_separated(values["betas"]),
            "given_steps": DEFAULT_STEPS if steps is None and epochs is None else steps,
            "options": {option.name: values[option.name] for option in method_options()},
        }
        plain = {field.name for field in _fields(cls)} - derived.keys()
        return cls(**derived, **{name: values[name] for name in plain})


def _unread() -> dict[str, Any]:
    """Values of options that a run need not read."""
    return ADAPTER_DEFAULTS | {option.name: option.default for option in method_options()}


def _fields(kind: type[Settings]) -> list[dataclasses.Field[Any]]:
    """The fields that are stored."""
    return [field for field in dataclasses.fields(kind) if field.name != "resolved_steps"]


def _paths(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return tuple(map(absolute, [names] if isinstance(names, str) else names or ()))


def option_types(kind: type[Settings] = Settings) -> dict[str, Any]:
    """The types of all options that belong to a run, by name.

    Args:
        kind: the settings of the command.
    """
    types = typing.get_type_hints(kind)
    names = {field.name: _STORED_NAMES.get(field.name, field.name) for field in _fields(kind)}
    shared = {name: types[field] for field, name in names.items()}
    del shared["options"], shared["methods"], shared["compare"]
    own = {
        option.name: option.type if option.default is not None else option.type | None
        for option in method_options()
    }
    methods = {"method": str | None, "compare": tuple[str, ...] | None}
    found = {"model": shared["model"], **methods, **shared, **own}
    return {name: type for name, type in found.items() if name not in kind.fixed}


def lora_recipe() -> Recipe:
    """Our LoRA's, whose options and groups of parameters PEFT's LoRA gets too."""
    return next(recipe for recipe in registry.recipes() if recipe.name == "lora")


def method_names() -> list[str]:
    """The names that --method takes."""
    return [*BASELINES, *(recipe.name for recipe in registry.recipes())]


def method_options() -> list[Option]:
    """The options of all methods; a shared option appears once, with the help of each method."""
    found: dict[str, Option] = {}
    for recipe in registry.recipes():
        for option in recipe.options:
            known = found.setdefault(option.name, option)
            if option.help not in known.help:
                merged = f"{known.help} {option.help}"
                found[option.name] = dataclasses.replace(known, help=merged)
    return list(found.values())


def _readers() -> dict[str, str]:
    """Which methods read an option, by its name, for those that not every method reads."""
    readers = dict.fromkeys(ADAPTER_DEFAULTS, "methods with adapters")
    readers |= dict.fromkeys(_OF_TRAINING, "methods that train")
    for option in method_options():
        names = [r.name for r in registry.recipes() if option.name in {o.name for o in r.options}]
        if "lora" in names:
            names = [*PEFT_METHODS, *names]
        readers[option.name] = ", ".join(names)
    return readers


def parse_methods(
    method: str | None, compare: str | Sequence[str] | None
) -> tuple[tuple[str, ...], bool]:
    """(methods, whether they are compared) from --method and --compare; without both LoRA."""
    if method is not None and compare is not None:
        raise UserError("give --method for one method or --compare for several, not both")
    if compare is None:
        return (method or "lora",), False
    names = comma_separated(compare)
    if not names:
        raise UserError(
            f"--compare needs methods separated by commas, from: {', '.join(method_names())}"
        )
    return names, True


def comma_separated(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in a text, or of a list, without empty ones."""
    listed = (names or "").split(",") if names is None or isinstance(names, str) else names
    return tuple(name.strip() for name in listed if name.strip())


def _check_methods(methods: tuple[str, ...]) -> None:
    known = method_names()
    for name in methods:
        if name not in known:
            raise UserError(
                f"unknown method {name!r}{near_matches(name, known)}; known: {', '.join(known)}"
            )
        if methods.count(name) > 1:
            raise UserError(f"--compare names {name} twice")
