"""What the user asked for, checked before anything is loaded."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_ext.cli.errors import UserError, near_matches

# ResLoRA's shortcut by method.
SHORTCUTS = {"reslora-is": "input", "reslora-bs": "block", "reslora-ms": "middle"}
METHODS = (
    "frozen",
    "full",
    "peft-lora",
    "peft-lora-accelerated",
    "lora",
    "lamda",
    "lamda++",
    "aflora",
    "moe-lora",
    "goat",
    *SHORTCUTS,
    "set-and-sequence",
)
WITH_PEFT = frozenset({"peft-lora", "peft-lora-accelerated"})  # methods that train a PeftModel
WITH_EXPERTS = frozenset({"moe-lora", "goat"})  # methods whose modules have a router
DTYPES = ("auto", "bf16", "fp32", "fp16")
FREEZE_DECAYS = ("cubic", "quadratic")
ADAPTER_DTYPES = ("fp32", "bf16", "base")
# Learning rates that work on the default model and text (r = 16, scaling 1).
DEFAULT_LR = {
    "frozen": 0.0,
    "full": 5e-5,
    "peft-lora": 3e-3,
    "peft-lora-accelerated": 3e-3,
    "lora": 3e-3,
    "lamda": 5e-4,
    "lamda++": 5e-4,
    "aflora": 3e-2,
    "moe-lora": 3e-3,
    "goat": 3e-3,
    **dict.fromkeys(SHORTCUTS, 3e-3),
    "set-and-sequence": 3e-3,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the numbers of a run; stored as settings.json for --resume."""

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
    freeze_eta: float
    freeze_start: float | None
    freeze_decay: str
    freeze_window: int | None
    experts: int
    top_k: int
    balance: float
    set_fraction: float
    window: int
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
        _check_at_least("--rank", self.rank, 1)
        _check_at_least("--experts", self.experts, 1)
        _check_at_least("--top-k", self.top_k, 1)
        _check_at_least("--window", self.window, 1)
        _check_at_least("--steps", self.steps, 1)
        _check_at_least("--batch", self.batch, 1)
        _check_at_least("--seq-len", self.seq_len, 2)
        _check_at_least("--eval-batches", self.eval_batches, 1)
        _check_at_least("--save-every", self.save_every, 0)
        _check_at_least("--seed", self.seed, 0)
        if self.threads is not None:
            _check_at_least("--threads", self.threads, 1)
        _check_positive("--alpha", self.alpha)
        _check_positive("--lr", self.lr)
        _check_choice("--dtype", self.dtype, DTYPES)
        _check_choice("--adapter-dtype", self.adapter_dtype, ADAPTER_DTYPES)
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be at least 0 and below 1, got {self.dropout}")
        if not 0 < self.freeze_eta <= 1:
            raise UserError(f"--freeze-eta must be above 0 and at most 1, got {self.freeze_eta}")
        if self.freeze_start is not None and not 0 <= self.freeze_start <= self.freeze_eta:
            raise UserError(
                f"--freeze-start must be at least 0 and at most --freeze-eta {self.freeze_eta}, "
                f"got {self.freeze_start}"
            )
        _check_choice("--freeze-decay", self.freeze_decay, FREEZE_DECAYS)
        if self.freeze_window is not None:
            _check_at_least("--freeze-window", self.freeze_window, 1)
        if not 0 < self.set_fraction < 1:
            raise UserError(f"--set-fraction must be above 0 and below 1, got {self.set_fraction}")
        if "set-and-sequence" in self.methods and 2 * self.window > self.seq_len:
            raise UserError(
                f"--window must be at most half of --seq-len {self.seq_len}, got {self.window}"
            )
        if self.top_k > self.experts:
            raise UserError(f"--top-k must be at most --experts {self.experts}, got {self.top_k}")
        if not (self.balance >= 0 and math.isfinite(self.balance)):
            raise UserError(f"--balance must be at least 0, got {self.balance}")
        if WITH_EXPERTS.intersection(self.methods) and self.rank % self.experts:
            raise UserError(
                f"--rank must be a multiple of --experts {self.experts}, got {self.rank}"
            )
        if not self.targets.strip():
            raise UserError(
                "--targets must be all-linear, names separated by commas, or a regular expression"
            )
        for path in self.text:
            if not Path(path).is_file():
                raise UserError(f"--text {path}: no such file")

    def learning_rate(self, method: str) -> float:
        """--lr, or the method's own default."""
        return DEFAULT_LR[method] if self.lr is None else self.lr

    def score_window(self) -> int:
        """--freeze-window, or AFLoRA's ten steps, fewer where its freezing phase is short: it gets
        at least ten decisions if it has ten steps."""
        if self.freeze_window is not None:
            return self.freeze_window
        start = self.freeze_eta / 3 if self.freeze_start is None else self.freeze_start
        return max(1, min(10, int((self.freeze_eta - start) * self.steps) // 10))

    def set_steps(self) -> int:
        """Steps of set-and-sequence's first stage."""
        return max(1, round(self.set_fraction * self.steps))

    def scaling(self) -> float:
        """The factor of the low-rank branch: alpha / rank, 1 by default."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def method_directory(self, out: Path, method: str) -> Path:
        """OUT/<method> when several methods are compared, OUT itself for one."""
        return out / method if self.compare else out

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Raises UserError when the stored settings are not those of this version."""
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            odd = ", ".join(sorted(set(values) ^ known))
            raise UserError(f"settings.json is not from this version of lowrank-ext: {odd}")
        lists = {name: tuple(values[name]) for name in ("text", "methods")}
        return cls(**{**values, **lists})


def parse_methods(method: str | None, compare: str | None) -> tuple[tuple[str, ...], bool]:
    """(methods, whether they are compared) from --method and --compare; LoRA when neither is
    given."""
    if method is not None and compare is not None:
        raise UserError("give --method for one method or --compare for several, not both")
    if compare is None:
        return (method or "lora",), False
    names = tuple(name.strip() for name in compare.split(",") if name.strip())
    if not names:
        raise UserError(f"--compare needs methods separated by commas, from: {', '.join(METHODS)}")
    return names, True


def _check_methods(methods: tuple[str, ...]) -> None:
    for name in methods:
        if name not in METHODS:
            raise UserError(
                f"unknown method {name!r}{near_matches(name, METHODS)}; known: {', '.join(METHODS)}"
            )
        if methods.count(name) > 1:
            raise UserError(f"--compare names {name} twice")


def _check_at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{option} must be at least {least}, got {value}")


def _check_positive(option: str, value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise UserError(f"{option} must be a positive number, got {value}")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"{option} must be one of {', '.join(choices)}, got {value!r}"
            f"{near_matches(value, choices)}"
        )
