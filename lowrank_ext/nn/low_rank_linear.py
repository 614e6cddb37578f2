"""LowRankLinear: a frozen linear map with a low-rank branch, the base class of all methods.

    y = x Wᵀ + bias + scaling · out_scale ⊙ ((rank_scale ⊙ drop(x) lora_aᵀ) coreᵀ) lora_bᵀ

with x [..., K] and W [N, K]. Most methods have neither core nor scales: these are then left out.

A module owns the Parameters of the module it replaces, so ties survive and the keys ``weight`` and
``bias`` of its state dict stay. A base that is more than a plain dense linear (quantized, hooked, a
subclass with its own forward) is kept as ``base_layer`` and the branch is added to its output.
"""

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lowrank_ext import ops
from lowrank_ext.checks import check_rank, check_scaling
from lowrank_ext.config import AdapterConfig
from lowrank_ext.nn.base_layer import (
    adapter_dtype_for,
    family_of,
    features_of,
    has_transposed_weight,
    plain_module,
    stack_of,
)
from lowrank_ext.nn.biases import merged_bias, sum_of_biases
from lowrank_ext.nn.call_arguments import split_call
from lowrank_ext.nn.merged_state import MergedState
from lowrank_ext.nn.merged_weight import merged_weight, without_gradient
from lowrank_ext.nn.residual_base import ResidualBase


class LowRankLinear(MergedState, ResidualBase):
    """Base class of all methods' modules: owns the base, forward, merging, state dict.

    Args:
        in_features, out_features: K and N.
        config: the method's ``config_class``, without patterns; its targets are not used here. Or
            its fields as keyword arguments, such as ``r=8``.
        bias: whether the base has a bias.
        base: the module whose weights are taken over (``from_linear`` passes it); without it the
            module makes its own weight [N, K] and bias, on ``device`` and of ``dtype``.

    Attributes:
        weight: the base's Parameter, frozen, [N, K], or [K, N] with ``fan_in_fan_out``
            (transformers' Conv1D). None, as bias, when ``base_layer`` holds the base.
        bias: the base's Parameter, frozen, [N], or None.
        lora_a: [r, K], as all of the branch in the adapter's dtype. Where the method has them, core
            [r, r], rank_scale [r] and out_scale [N] stand beside it, else None.
        lora_b: [N, r].
        merged: whether the branch is inside the base weight right now.
        residual_taken: whether the initial branch has been subtracted from the base weight.
        blocks: the number of ``lowrank_ext.disable_adapter`` blocks that the module is in.
        stack: (E,) where the base is a linear module for each of E experts: lora_a is then
            [E, r, K] and lora_b [E, N, r]. Else ().

    State dict. Unmerged: the base's keys, the branch's tensors and the buffers of a residual init.
    Merged: exactly the base's keys, holding the merged weight, as the plain module would have them;
    so it loads into a plain model, and loading it strictly into an adapted one names the missing
    keys rather than adding the branch twice. Loading into a merged module is refused: unmerge
    first.

    A merged module keeps the original weight in the non-persistent buffer ``unmerged_weight``,
    which follows ``.to()``, deepcopy and pickle.
    """

    config_class: ClassVar[type[AdapterConfig]]
    # The bases of the class's family, for messages.
    bases: ClassVar[str] = "nn.Linear, Conv1D or a module with in_features and out_features"
    inits: ClassVar[tuple[str, ...]] = ()
    svd_inits: ClassVar[tuple[str, ...]] = ()
    residual_inits: ClassVar[tuple[str, ...]] = ()
    # Why the branch of this method cannot be put into a weight; "" where it can.
    unmergeable_because: ClassVar[str] = ""
    # How far a merge is from the branch, where it is only an estimate of it.
    merge_is_estimate = ""
    # What PEFT's branch of the same tensors does otherwise.
    differs_in_peft = ""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    core: nn.Parameter | None
    rank_scale: nn.Parameter | None
    out_scale: nn.Parameter | None
    base_layer: nn.Module | None
    unmerged_weight: Tensor | None
    unmerged_bias: Tensor | None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "config_class" in vars(cls):
            cls.inits = cls.config_class.inits

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: AdapterConfig | None = None,
        *,
        bias: bool = True,
        base: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        config = self._config(config, options)
        self.check_fits(in_features, out_features, config)
        if base is not None and features_of(base) != (in_features, out_features):
            raise ValueError(
                f"{type(self).__name__}: base must have in_features={in_features} and "
                f"out_features={out_features}, got {features_of(base)}"
            )
        if base is not None:
            self.check_base(base, config)
        self.config = config
        self.in_features = in_features
        self.out_features = out_features
        self.r = config.r
        self.alpha = config.alpha_for("")
        self.scaling = self.start_scaling = config.scaling_for("", in_features)
        self.dropout = float(config.dropout)
        self.init = config.init
        self.fan_in_fan_out = base is not None and has_transposed_weight(base)
        self.stack = () if base is None else stack_of(base)
        self.merged = False
        self.residual_taken = False
        self.blocks = 0
        self.merges_after_blocks = False
        if base is None:
            self._make_base(bias, device, dtype)
        else:
            self._take_base(base)
        base_dtype, base_device = self._base_dtype_and_device()
        adapter_dtype = adapter_dtype_for(base_dtype, config.adapter_dtype, type(self).__name__)
        self._make_adapter(adapter_dtype, base_device)
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.register_buffer("unmerged_bias", None, persistent=False)
        if base is not None:
            base.requires_grad_(False)
        if config.base_biases != "none" and (base_bias := self.base_bias) is not None:
            base_bias.requires_grad_()
        if base is None and base_device.type != "meta":
            self.reset_parameters()

    @classmethod
    def _config(cls, config: AdapterConfig | None, options: dict[str, Any]) -> AdapterConfig:
        """The config of one module: ``config`` itself, or one with ``options`` as fields."""
        if not hasattr(cls, "config_class"):
            raise TypeError(
                f"{cls.__name__}: use a subclass, such as LoRALinear; it is no method itself"
            )
        return cls.config_class.for_one_module(cls.__name__, config, options)

    @classmethod
    def check_fits(cls, in_features: int, out_features: int, config: AdapterConfig) -> None:
        """Raise TypeError or ValueError, naming the argument, where ``config`` does not fit."""
        owner = cls.__name__
        check_rank(in_features, owner, "in_features")
        check_rank(out_features, owner, "out_features")
        check_scaling(config.scaling_for("", in_features), owner)
        smaller = min(in_features, out_features)
        if config.init in cls.svd_inits and config.r > smaller:
            raise ValueError(
                f"{owner}: r must be at most min(in_features, out_features)={smaller} with "
                f"init={config.init!r}, got {config.r}"
            )

    @classmethod
    def check_base(cls, base: nn.Module, config: AdapterConfig) -> None:
        """Raise ValueError, naming the setting, where a base of the family has one that the branch
        cannot follow."""

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config: AdapterConfig | None = None,
        *,
        initialize: bool = True,
        **options: Any,
    ) -> Self:
        """The adapter over ``linear``: nn.Linear, transformers' Conv1D, or any module with integer
        ``in_features`` and ``out_features`` that maps [..., K] to [..., N].

        The base's Parameters are shared and frozen, its train/eval mode is kept.
        ``initialize=False`` leaves the adapter at zero and the base untouched, for a loader that
        fills it. The method's options are a ``config`` or the fields of one, ``r=8, alpha=16``.

        Raises:
            TypeError: ``linear`` is none of these.
            ValueError: an option is out of range, or an SVD init meets a base without a dense
                weight.

        Examples:
            >>> layer = LoRALinear.from_linear(nn.Linear(64, 32), r=8, alpha=16)
        """
        features = features_of(linear)
        if features is None or family_of(linear) != cls.family:
            raise TypeError(
                f"{cls.__name__}.from_linear: linear must be {cls.bases}, not adapted yet, got "
                f"{type(linear).__name__}"
            )
        for name in options.keys() & {"bias", "base", "device", "dtype"}:
            raise TypeError(f"{cls.__name__}.from_linear: {name} is linear's own, got it again")
        module = cls(*features, config, base=linear, **options)
        if initialize:
            module.reset_adapter()
        return module.train(linear.training)

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        """Register the adapter's tensors, zero."""
        self.lora_a = nn.Parameter(
            torch.zeros(*self.stack, self.r, self.in_features, dtype=dtype, device=device)
        )
        self.lora_b = nn.Parameter(
            torch.zeros(*self.stack, self.out_features, self.r, dtype=dtype, device=device)
        )
        for name in ("core", "rank_scale", "out_scale"):
            self.register_parameter(name, None)

    def reset_parameters(self) -> None:
        """Initialize everything that the module owns: the base as its class does, then the branch.

        For a module built on the meta device, after ``to_empty``. To restart only the adapter use
        ``reset_adapter``. A ``base_layer`` initializes itself.
        """
        self.merged, self.residual_taken = False, False
        self.unmerged_weight, self.unmerged_bias = None, None
        if self.weight is not None:
            self._init_base(self.weight, self.bias)
        self.reset_adapter()

    def _init_base(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        if self.fan_in_fan_out:
            nn.init.normal_(weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if bias is not None:
            bound = 0.0 if self.fan_in_fan_out else 1 / math.sqrt(self.in_features)
            nn.init.uniform_(bias, -bound, bound)

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Give the adapter its initial values; the layer's output is then its base's.

        Bit for bit where the branch starts at zero; with a residual init the base weight becomes
        round(W - initial branch), so the sum carries the rounding of one subtraction. On the meta
        device nothing happens.
        """
        self.unmerge()
        self.restore_base()
        if self.lora_a.is_meta:
            return
        self._init_adapter()
        if self.init in self.residual_inits:
            self.take_residual()

    def _init_adapter(self) -> None:
        raise NotImplementedError

    @classmethod
    def connect(cls, model: nn.Module) -> None:
        """Link the model's modules of this class to each other, if the method needs it."""

    @classmethod
    def disconnect(cls, model: nn.Module) -> None:
        """Undo what ``connect`` did to other modules of the model."""

    def check_mergeable(self) -> None:
        """Raise ValueError if a value that the merged weight depends on is missing."""

    def branch_factors(self, training: bool) -> tuple[Tensor, Tensor]:
        """The down and the up projection of the branch, [r, K] and [N, r], in the given mode."""
        return self.tensor("lora_a"), self.tensor("lora_b")

    def branch_bias(self) -> Tensor | None:
        """What the branch adds to every row beside its product, [N]; None for most methods, and
        with a residual init."""
        return None

    def delta_weight(self) -> Tensor:
        """scaling · diag(out_scale) lora_b core diag(rank_scale) lora_a, [N, K]; differentiable.

        The product is taken in fp64 and rounded once to fp32 (fp64 adapters: not at all), whatever
        torch's matmul precision is set to.
        """
        lora_a, lora_b = self.branch_factors(training=False)
        delta = self.scaling * (self.with_scales(lora_b) @ lora_a.double())
        return delta.to(torch.promote_types(self.lora_a.dtype, torch.float32))

    def with_delta(self, weight: Tensor) -> Tensor:
        """fp32(weight) + delta_weight(), in the layout of the base's ``weight``."""
        delta = self.delta_weight()
        wide = torch.promote_types(weight.dtype, delta.dtype)
        return weight.to(wide) + self.in_layout(delta)

    def with_scales(self, lora_b: Tensor) -> Tensor:
        """diag(out_scale) lora_b core diag(rank_scale) in fp64, [N, r]."""
        product = lora_b.double() if self.core is None else lora_b.double() @ self.core.double()
        if self.rank_scale is not None:
            product = product * self.rank_scale.double()
        return product if self.out_scale is None else product * self.out_scale.double().view(-1, 1)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the branch into the base weight: W ← round(fp32(W) + delta_weight()), one rounding.

        In place in the same Parameter. Merging a merged module does nothing. Another module that
        shares the weight would see the change: ``lowrank_ext.merge`` checks that for a model.

        Raises:
            TypeError: the base does not compute x weightᵀ + bias with a floating-point weight, or
                the branch is no single matrix.
            ValueError: the weight has no values (meta, offloaded), the merged one has inf or nan,
                or the adapter is switched off by ``disable_adapter``. In all cases nothing has
                changed.
        """
        if self.merged:
            return
        merged, merged_base_bias = merged_weight(self), merged_bias(self)
        weight = self._require_weight("merge")
        self.unmerged_weight = weight.detach().clone()
        weight.copy_(merged)
        if merged_base_bias is not None:
            assert self.base_bias is not None
            self.unmerged_bias = self.base_bias.detach().clone()
            # A step on the sum would be lost by unmerge.
            self.unmerged_bias_trains = self.base_bias.requires_grad
            self.base_bias.requires_grad_(False).copy_(merged_base_bias)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base weight the bits it had before ``merge``. Harmless when not merged."""
        if not self.merged:
            return
        assert self.unmerged_weight is not None
        self._require_weight("unmerge").copy_(self.unmerged_weight)
        if self.unmerged_bias is not None:
            assert self.base_bias is not None
            self.base_bias.copy_(self.unmerged_bias).requires_grad_(self.unmerged_bias_trains)
        self.unmerged_weight, self.unmerged_bias = None, None
        self.merged = False

    @torch.no_grad()
    def to_linear(self, merge: bool, dense_dtype: torch.dtype | None = None) -> nn.Module:
        """The plain base module again, the branch merged in or dropped; same Parameters and mode.

        ``merge=False`` after a residual init gives the original weight to one rounding of its
        dtype. With ``merge=True`` and ``dense_dtype`` a quantized base becomes an nn.Linear of that
        dtype. The adapter hands its Parameters over and must not be used afterwards.
        """
        if merge and dense_dtype is not None and self.mergeable_parameter is None:
            return self._dense(dense_dtype)
        if merge:
            self.merge()
        else:
            self.unmerge()
            self.restore_base()
        if self.base_layer is not None:
            return self.base_layer.train(self.training)
        return self._plain_base().train(self.training)

    def _plain_base(self) -> nn.Module:
        """A module of torch, or Conv1D, that owns the Parameters of this one's base."""
        features = self.in_features, self.out_features
        return plain_module(features, self.weight, self.bias, self.fan_in_fan_out)

    def _dense(self, dtype: torch.dtype) -> nn.Module:
        """A linear with the quantized base's weight, made dense, and the branch."""
        weight = nn.Parameter(merged_weight(self, dtype), requires_grad=False)
        assert self.base_layer is not None
        bias = merged_bias(self)
        bias = self.base_bias if bias is None else bias
        if bias is not None:
            bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        plain = plain_module((self.in_features, self.out_features), weight, bias, conv1d=False)
        return plain.train(self.training)

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K], also named as by the base (``input`` of nn.Linear), to [..., N] in x's dtype.
        Further arguments go to the base."""
        if x is None or args or kwargs:
            x, args, kwargs = split_call(self, args if x is None else (x, *args), kwargs)
        if self.blocks:
            return self.disabled_output(x, *args, **kwargs)
        if self.merged:
            y = self.base_output(x, *args, **kwargs)
            return without_gradient(self, y) if self.training else y
        return self.unmerged_output(x, *args, **kwargs)

    def disabled_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output as before the adapter, for a module that is not merged."""
        if not self.residual_taken:
            return self.base_output(x, *args, **kwargs)
        start = self.start_branch()
        return self._with_branch(x, start.pop("lora_a"), start.pop("lora_b"), start, args, kwargs)

    def unmerged_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output for these arguments plus the branch; a method may have its own."""
        factors = self.branch_factors(self.training)
        return self.adapted_output(x, *factors, self.scaling, *args, **kwargs)

    def adapted_output(
        self, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The base's output plus the branch lora_b core lora_a; dropout in training mode."""
        options: dict[str, Any] = {
            "core": self.tensor("core"),
            "rank_scale": self.tensor("rank_scale"),
            "out_scale": self.tensor("out_scale"),
            "scaling": scaling,
            "dropout_p": self.dropout if self.training else 0.0,
        }
        return self._with_branch(x, lora_a, lora_b, options, args, kwargs)

    def _with_branch(
        self,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        options: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        branch_bias = self.branch_bias()
        weight, bias = (None, None) if args or kwargs else self.fusible_base()
        if weight is None:
            base_out = self.base_output(x, *args, **kwargs)
            y = ops.lowrank_add(base_out, x, lora_a, lora_b, **options)
            return y if branch_bias is None else y + branch_bias.to(y.dtype)
        total = sum_of_biases(bias, branch_bias, weight.dtype)
        return ops.lowrank_linear(x, weight, total, lora_a, lora_b, **options)

    @property
    def kind(self) -> str:
        """What ``lowrank_ext.summary`` calls the module."""
        return type(self).__name__.removesuffix("Linear")

    def extra_repr(self) -> str:
        base = "" if self.base_layer is not None else f", bias={self.bias is not None}"
        merged = ", merged=True" if self.merged else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}{base}, r={self.r}, "
            f"scaling={self.scaling:g}, dropout={self.dropout:g}, init={self.init}{merged}"
        )

    def check_saveable(self, config: AdapterConfig, modules: list["LowRankLinear"]) -> None:
        """Raise ValueError if a file of ``modules`` with ``config`` could not hold its state."""
        if self.init in self.residual_inits and not self.residual_taken:
            raise ValueError("must hold its residual base weight, got a restored one")

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by name: parameters, then persistent buffers."""
        named = {**self._parameters, **self._buffers}
        base = {"weight", "bias", *self._non_persistent_buffers_set}
        return {name: t for name, t in named.items() if t is not None and name not in base}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        weight_key = "weight" if self.base_layer is None else "base_layer.weight"
        starts = {prefix + name for name in self.residual_starts}
        if not self.merged and prefix + weight_key in state_dict:
            # The weight that came with the start's buffers is the residual.
            self.residual_taken = self.residual_taken or not starts.isdisjoint(state_dict)
