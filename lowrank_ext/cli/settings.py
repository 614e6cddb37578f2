"""The settings of a run, which are checked before anything is loaded."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_ext import LoRAConfig, registry
from lowrank_ext.cli.errors import UserError, near_matches
from lowrank_ext.cli.files import require_file
from lowrank_ext.cli.typed import check_types, has_type
from lowrank_ext.files import quoted
from lowrank_ext.recipe import Option, Recipe

# Baselines, and learning rates that work for them on the default model and text. The methods are
# the recipes in the registry.
BASELINES = {"frozen": 0.0, "full": 5e-5, "peft-lora": 3e-3, "peft-lora-accelerated": 3e-3}
DTYPES = ("auto", "bf16", "fp32", "fp16")
MOST_THREADS = 1024  # OpenMP ends the process where it cannot start as many
ADAPTER_DTYPES = ("fp32", "bf16", "base")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines the results of a run; stored as settings.json for --resume."""

    model: str | None
    text: tuple[str, ...]
    field: str
    methods: tuple[str, ...]
    compare: bool
    rank: int
    alpha: float | None
    dropout: float
    targets: str
    steps: int
    batch: int
    seq_len: int
    lr: float | None
    options: Mapping[str, Any]  # of all methods, by name
    dtype: str
    adapter_dtype: str
    seed: int
    threads: int | None
    eval_batches: int
    save_every: int
    compile: bool

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        _check_methods(self.methods)
        check_at_least("--rank", self.rank, 1)
        check_at_least("--steps", self.steps, 1)
        check_at_least("--batch", self.batch, 1)
        check_at_least("--seq-len", self.seq_len, 2)
        check_at_least("--eval-batches", self.eval_batches, 1)
        check_at_least("--save-every", self.save_every, 0)
        check_at_least("--seed", self.seed, 0, most=2**40)
        if self.threads is not None:
            check_at_least("--threads", self.threads, 1, most=MOST_THREADS)
        check_positive("--alpha", self.alpha)
        check_positive("--lr", self.lr)
        check_choice("--dtype", self.dtype, DTYPES)
        check_choice("--adapter-dtype", self.adapter_dtype, ADAPTER_DTYPES)
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be at least 0 and below 1, got {self.dropout}")
        self._check_options()
        if not self.targets.strip():
            raise UserError(
                "--targets must be all-linear, names separated by commas, or a regular expression"
            )
        for path in self.text:
            require_file(f"--text {path}", Path(path))

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

    def recipes(self) -> list[Recipe]:
        """The recipes of the run's methods, baselines left out, in the order of the list."""
        return [recipe for recipe in registry.recipes() if recipe.name in self.methods]

    def learning_rate(self, method: str) -> float:
        """--lr, or the method's own default."""
        rates = BASELINES | {recipe.name: recipe.learning_rate for recipe in registry.recipes()}
        return rates[method] if self.lr is None else self.lr

    def scaling(self) -> float:
        """The factor of the low-rank branch: alpha / rank, 1 by default."""
        return LoRAConfig(r=self.rank, alpha=self.alpha).scaling_for("", in_features=1)

    def method_directory(self, out: Path, method: str) -> Path:
        """OUT/<method> when several methods are compared, OUT itself for one."""
        return out / method if self.compare else out

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable, the methods' options beside the others."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options = values.pop("options")
        return {**values, **options}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """The settings of `to_dict`. Raises UserError for those of another version, and for values
        of another type."""
        own = {option.name: option for option in method_options()}
        known = {field.name for field in dataclasses.fields(cls)} - {"options"} | own.keys()
        if set(values) != known:
            odd = quoted(sorted(set(values) ^ known))[1:-1]
            raise UserError(f"settings.json is not from this version of lowrank-ext: {odd}")
        options = {name: values[name] for name in own}
        shared = {name: value for name, value in values.items() if name not in own}
        check_types(cls, {**shared, "options": options}, "settings.json")
        for name, option in own.items():
            value = options[name]
            if not (has_type(value, option.type) or (value is None and option.default is None)):
                raise UserError(
                    f"settings.json: {name} must be {option.type.__name__}, got {quoted(value)}"
                )
        lists = {name: tuple(values[name]) for name in ("text", "methods")}
        return cls(**{**shared, **lists}, options=options)


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


def parse_methods(method: str | None, compare: str | None) -> tuple[tuple[str, ...], bool]:
    """(methods, whether they are compared) from --method and --compare; without both LoRA."""
    if method is not None and compare is not None:
        raise UserError("give --method for one method or --compare for several, not both")
    if compare is None:
        return (method or "lora",), False
    names = tuple(name.strip() for name in compare.split(",") if name.strip())
    if not names:
        raise UserError(
            f"--compare needs methods separated by commas, from: {', '.join(method_names())}"
        )
    return names, True


def _check_methods(methods: tuple[str, ...]) -> None:
    known = method_names()
    for name in methods:
        if name not in known:
            raise UserError(
                f"unknown method {name!r}{near_matches(name, known)}; known: {', '.join(known)}"
            )
        if methods.count(name) > 1:
            raise UserError(f"--compare names {name} twice")


def check_at_least(option: str, value: int, least: int, most: int = 2**31 - 1) -> None:
    """Raises UserError unless ``least <= value <= most``."""
    if value < least:
        raise UserError(f"{option} must be at least {least}, got {value}")
    if value > most:
        raise UserError(f"{option} must be at most {most}, got {value}")


def check_positive(option: str, value: float | None) -> None:
    """Raises UserError unless the value is None or a positive number."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise UserError(f"{option} must be a positive number, got {value}")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError, with near matches, unless the value is one of the choices."""
    if value not in choices:
        raise UserError(
            f"{option} must be one of {', '.join(choices)}, got {value!r}"
            f"{near_matches(value, choices)}"
        )
