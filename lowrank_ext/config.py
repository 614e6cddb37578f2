"""What to adapt and how: one immutable dataclass per method.

Every check that needs no model happens when a config is built. A changed copy is made with
``dataclasses.replace(config, r=8)``.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch

ALL_LINEAR = "all-linear"
ADAPTER_DTYPES = ("base", "float32", "bfloat16", "float16", "float64")


@dataclass(kw_only=True, frozen=True)
class AdapterConfig:
    """What every method has in common; use a subclass.

    Attributes:
        r: rank of the adapters.
        alpha: the branch is scaled by ``alpha / r``; None stands for alpha = r, so the scaling is 1
            (sqrt(r) with ``rslora``).
        rslora: scale by ``alpha / sqrt(r)``, r being the rank of the module at hand.
        dropout: probability of dropping an element of the branch's input while training.
        target_modules: names, where a module matches when its path equals a name or ends with
            ``"." + name``; or one regular expression for the whole path; or ``"all-linear"``.
        exclude_modules: modules to leave alone, matched as target_modules are.
        rank_pattern, alpha_pattern: values for single modules. A key is a name suffix or a regular
            expression; the first key with ``re.match(rf"(.*\\.)?({key})$", path)`` counts, as in
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

    r: int = 16
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    adapter_dtype: torch.dtype | str = "float32"
    init: str = ""

    def __post_init__(self) -> None:
        if not self.peft_type:
            raise TypeError(
                "AdapterConfig: use LoRAConfig, LaMDAConfig or GOATConfig, AdapterConfig itself is "
                "no method"
            )
        owner = type(self).__name__
        check_rank(self.r, owner, "r")
        if self.alpha is not None:
            check_alpha(self.alpha, owner, "alpha")
        check_dropout(self.dropout, owner)
        check_choice(self.init, self.inits, owner, "init")
        for key, rank in self.rank_pattern.items():
            _check_regex(key, owner, "rank_pattern")
            check_rank(rank, owner, f"rank_pattern[{key!r}]")
        for key, alpha in self.alpha_pattern.items():
            _check_regex(key, owner, "alpha_pattern")
            check_alpha(alpha, owner, f"alpha_pattern[{key!r}]")
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"{owner}: modules_to_save must be a sequence of names, "
                f"got the string {self.modules_to_save!r}"
            )
        self._set("target_modules", _normalised_names(self.target_modules, owner, "target_modules"))
        if not self.target_modules:
            raise ValueError(f"{owner}: target_modules must name at least one module, got none")
        if self.exclude_modules is not None:
            self._set(
                "exclude_modules", _normalised_names(self.exclude_modules, owner, "exclude_modules")
            )
        self._set(
            "modules_to_save", _normalised_names(self.modules_to_save, owner, "modules_to_save")
        )
        self._set("rank_pattern", dict(self.rank_pattern))
        self._set("alpha_pattern", dict(self.alpha_pattern))
        self._set("adapter_dtype", normalised_adapter_dtype(self.adapter_dtype, owner))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen: only while the object is being built

    def rank_for(self, path: str) -> int:
        """Rank of the module at ``path``."""
        key = matching_pattern(self.rank_pattern, path)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_for(self, path: str) -> float | None:
        """alpha of the module at ``path``; None stands for that module's rank."""
        key = matching_pattern(self.alpha_pattern, path)
        return self.alpha if key is None else self.alpha_pattern[key]

    def module_options(self, path: str) -> dict[str, Any]:
        """Keyword arguments for ``from_linear`` of the module class of this method."""
        return {
            "r": self.rank_for(path),
            "alpha": self.alpha_for(path),
            "rslora": self.rslora,
            "dropout": self.dropout,
            "init": self.init,
            "adapter_dtype": self.adapter_dtype,
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``peft_type`` as values that JSON can hold."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {"peft_type": self.peft_type, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that :meth:`to_dict` described.

        Called on AdapterConfig, ``peft_type`` selects the method; called on a method it may be
        absent.

        Raises:
            ValueError: ``peft_type`` is missing, unknown or another method's, or a key is no field.
        """
        values = dict(values)
        peft_type = values.pop("peft_type", cls.peft_type)
        known = {c.peft_type: c for c in _methods()}
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


@dataclass(kw_only=True, frozen=True)
class LoRAConfig(AdapterConfig):
    """LoRA: y = x Wᵀ + bias + scaling · (drop(x) lora_aᵀ) lora_bᵀ, both projections train.

    Attributes:
        init: ``"kaiming"``: lora_a uniform as in PEFT, lora_b zero. ``"gaussian"``: lora_a normal
            with standard deviation 1/r, lora_b zero. ``"pissa"``: the top-r singular triples of W,
            which are taken out of the base weight (Meng et al., arXiv 2404.02948).
    """

    peft_type: ClassVar[str] = "LORA"
    inits: ClassVar[tuple[str, ...]] = ("kaiming", "gaussian", "pissa")

    init: str = "kaiming"


@dataclass(kw_only=True, frozen=True)
class LaMDAConfig(AdapterConfig):
    """LaMDA and LaMDA++: the branch has a trainable core [r, r] between frozen projections.

    (Azizi et al., arXiv 2406.12832.) lora_a never trains. lora_b trains until a freezing schedule
    (``FreezeSchedule``) has frozen its columns.

    Attributes:
        init: ``"svd_residual"``: the top-r singular triples of W, taken out of the base weight.
            Dropout then falls on the principal part of W itself: on SmolLM2 a dropout of 0.05 takes
            the first training loss from 2.7 to 6.8, so leave it at 0 there.
            ``"svd_zero_core"``: the same projections with a zero core and W untouched.
            ``"lora"``: lora_a Kaiming, lora_b zero, core as ``nn.Linear`` starts.
        train_lora_b: False freezes lora_b from the start.
        rank_budget: None, or what LaMDA++'s rank allocation keeps: ``"rank"`` (mean rank) or
            ``"params"`` (sum of squared ranks). The ranks are found by ``adapt``, which stores them
            in ``rank_pattern`` of the model's ``lowrank_config``; a non-empty ``rank_pattern`` is
            used as it is.
        direction: which spectra get larger ranks, ``"flat_gets_more"`` or
            ``"concentrated_gets_more"``.
    """

    peft_type: ClassVar[str] = "LAMDA"
    inits: ClassVar[tuple[str, ...]] = ("svd_residual", "svd_zero_core", "lora")

    init: str = "svd_residual"
    train_lora_b: bool = True
    rank_budget: str | None = None
    direction: str = "flat_gets_more"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_train_lora_b(self.train_lora_b, self.init, owner)
        if self.rank_budget is not None:
            check_choice(self.rank_budget, ("rank", "params"), owner, "rank_budget")
        check_choice(
            self.direction, ("flat_gets_more", "concentrated_gets_more"), owner, "direction"
        )

    def module_options(self, path: str) -> dict[str, Any]:
        return {**super().module_options(path), "train_lora_b": self.train_lora_b}


@dataclass(kw_only=True, frozen=True)
class GOATConfig(AdapterConfig):
    """GOAT and plain mixtures of LoRA experts: a router picks top_k of num_experts per token.

    (Fan et al., arXiv 2502.16894.) y = x Wᵀ + bias + scaling · Σ wᵢ Bᵢ Aᵢ dropᵢ(x) over the chosen
    experts, whose weights w are the router's probabilities, renormalised. The balance loss of the
    routers is added to the task's with ``lr.balance_loss``. Such an adapter cannot be merged.

    Attributes:
        r: total rank; every expert has r / num_experts of it, so num_experts must divide r (and
            every rank in rank_pattern).
        alpha: as elsewhere, None stands for r; used by scale ``"alpha_over_re"``.
        dropout: drawn anew for every expert; the router sees x without it. The paper's is 0.05.
        init: ``"goat"``: the singular triples of W are cut into num_experts segments and each
            expert starts from the top r / num_experts of its own, divided by rho. ``"goat_mini"``:
            from the last ones. Both take residual_factor times the sum of all experts out of the
            base weight. ``"zero"``: every lora_a Kaiming, every lora_b zero, W untouched: a plain
            mixture of LoRA experts.
        num_experts, top_k: 1 <= top_k <= num_experts.
        rho: what the singular values of an expert's start are divided by.
        residual_factor: c in W - c · scaling · Σ Bᵢ Aᵢ, the residual base; None stands for
            1 / num_experts, with which balanced routing leaves W as it was on average. A single
            token sees only top_k experts, so the output is not exactly the base's at the start.
        scale: ``"alpha_over_re"``, alpha / (r / num_experts), the released code's, or ``"theory"``,
            sqrt(3 · eta · in_features / (r / num_experts)), for which alpha must be None.
        eta: learning rate of full fine-tuning over the adapter's, for ``"theory"``.
        shared_dropout: one dropout mask for all experts.
        balance_coefficient: factor of each module's balance loss in ``lr.balance_loss``; 0 switches
            it off.
    """

    peft_type: ClassVar[str] = "GOAT"
    inits: ClassVar[tuple[str, ...]] = ("goat", "goat_mini", "zero")

    init: str = "goat"
    num_experts: int = 8
    top_k: int = 2
    rho: float = 10.0
    residual_factor: float | None = None
    scale: str = "alpha_over_re"
    eta: float = 1.0
    shared_dropout: bool = False
    balance_coefficient: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_goat_options(owner, self.r, self.alpha, self.rslora, **self._own_options())
        for key, rank in self.rank_pattern.items():
            check_divisible(rank, self.num_experts, owner, f"rank_pattern[{key!r}]")
        if self.scale == "theory" and self.alpha_pattern:
            raise ValueError(
                f"{owner}: alpha_pattern must be empty with scale='theory', which does not use it, "
                f"got {dict(self.alpha_pattern)!r}"
            )

    @property
    def taken_out(self) -> float:
        """residual_factor, or the number that None stands for."""
        return 1 / self.num_experts if self.residual_factor is None else self.residual_factor

    def _own_options(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "rho": self.rho,
            "residual_factor": self.residual_factor,
            "scale": self.scale,
            "eta": self.eta,
            "shared_dropout": self.shared_dropout,
            "balance_coefficient": self.balance_coefficient,
        }

    def module_options(self, path: str) -> dict[str, Any]:
        return {**super().module_options(path), **self._own_options()}


def _methods() -> tuple[type[AdapterConfig], ...]:
    return (LoRAConfig, LaMDAConfig, GOATConfig)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"`` for the known names nearest to ``name``, or nothing."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def matching_pattern(keys: Iterable[str], path: str) -> str | None:
    """First key that applies to ``path`` by PEFT's rule, or None."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), None)


def check_rank(rank: object, owner: str, name: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{owner}: {name} must be an int, got {rank!r}")
    if rank < 1:
        raise ValueError(f"{owner}: {name} must be at least 1, got {rank}")


def check_alpha(alpha: object, owner: str, name: str) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"{owner}: {name} must be a number or None, got {alpha!r}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"{owner}: {name} must be positive and finite, got {alpha}")


def check_dropout(dropout: object, owner: str) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise TypeError(f"{owner}: dropout must be a number, got {dropout!r}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"{owner}: dropout must be between 0 and 1, got {dropout}")


def check_choice(value: object, choices: Sequence[str], owner: str, name: str) -> None:
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {list(choices)}, got {value!r}")


def check_train_lora_b(train_lora_b: bool, init: str, owner: str) -> None:
    # lora_b starts at zero there: with lora_b frozen the core's gradient would stay zero for ever.
    if init == "lora" and not train_lora_b:
        raise ValueError(
            f"{owner}: train_lora_b must be True with init='lora' (lora_b starts at zero), "
            "got False"
        )


def check_goat_options(
    owner: str,
    r: int,
    alpha: float | None,
    rslora: bool,
    *,
    num_experts: int,
    top_k: int,
    rho: float,
    residual_factor: float | None,
    scale: str,
    eta: float,
    shared_dropout: bool,
    balance_coefficient: float,
) -> None:
    """Raise ValueError or TypeError, naming the argument, for what no GOATLinear can be."""
    check_rank(r, owner, "r")
    check_rank(num_experts, owner, "num_experts")
    check_rank(top_k, owner, "top_k")
    if top_k > num_experts:
        raise ValueError(f"{owner}: top_k must be at most num_experts={num_experts}, got {top_k}")
    check_divisible(r, num_experts, owner, "r")
    _check_number(rho, owner, "rho", positive=True)
    _check_number(eta, owner, "eta", positive=True)
    _check_number(balance_coefficient, owner, "balance_coefficient")
    if residual_factor is not None:
        _check_number(residual_factor, owner, "residual_factor")
    check_choice(scale, ("alpha_over_re", "theory"), owner, "scale")
    if not isinstance(shared_dropout, bool):
        raise TypeError(f"{owner}: shared_dropout must be a bool, got {shared_dropout!r}")
    if rslora:
        raise ValueError(f"{owner}: rslora must be False, scale says how to scale, got True")
    if scale == "theory" and alpha is not None:
        raise ValueError(
            f"{owner}: alpha must be None with scale='theory', which does not use it, got {alpha}"
        )


def goat_scaling(scale: str, alpha: float, eta: float, expert_rank: int, in_features: int) -> float:
    """What GOAT's branch is multiplied by."""
    theory = scale == "theory"
    return math.sqrt(3 * eta * in_features / expert_rank) if theory else alpha / expert_rank


def check_divisible(rank: int, num_experts: int, owner: str, name: str) -> None:
    if rank % num_experts:
        raise ValueError(
            f"{owner}: {name}, the total rank, must be a multiple of num_experts={num_experts}, "
            f"got {rank}"
        )


def _check_number(value: object, owner: str, name: str, *, positive: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        least = "positive" if positive else "at least 0"
        raise ValueError(f"{owner}: {name} must be {least} and finite, got {value}")


def normalised_adapter_dtype(dtype: torch.dtype | str, owner: str) -> str:
    """The dtype's name without ``torch.``, one of ADAPTER_DTYPES."""
    name = str(dtype).removeprefix("torch.")
    check_choice(name, ADAPTER_DTYPES, owner, "adapter_dtype")
    return name


def _normalised_names(
    names: str | Iterable[str], owner: str, argument: str
) -> str | tuple[str, ...]:
    if isinstance(names, str):
        _check_regex(names, owner, argument)
        return names
    # A set has no order of its own; sorted, the config is the same in every process.
    ordered = tuple(sorted(names) if isinstance(names, set | frozenset) else names)
    for name in ordered:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{owner}: {argument} must hold non-empty strings, got {name!r}")
    return ordered


def _check_regex(pattern: str, owner: str, argument: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{owner}: {argument} must be a valid regular expression, got {pattern!r}: {error}"
        ) from None


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
