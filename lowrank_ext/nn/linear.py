"""LowRankLinear, the frozen linear map with a low-rank branch, and LoRALinear.

    y = x Wᵀ + bias + scaling · out_scale ⊙ ((rank_scale ⊙ drop(x) lora_aᵀ) coreᵀ) lora_bᵀ

with x [..., K] and W [N, K]. Most methods have neither core nor scales: these are then left out.

A module owns the very Parameters of the module it replaces, so ties survive and the keys
``weight`` and ``bias`` of its state dict stay. A base that is more than a plain dense linear
(quantised, hooked, a subclass with a forward of its own) is kept as ``base_layer`` and the branch
is added to its output.
"""

import importlib
import math
import sys
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext import ops
from lowrank_ext.config.base import AdapterConfig
from lowrank_ext.config.checks import (
    check_alpha,
    check_choice,
    check_dropout,
    check_rank,
    normalised_adapter_dtype,
)

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LowRankLinear(nn.Module):
    """What all methods share: ownership of the base, forward, merging, state dict. Use a subclass.

    Args:
        in_features, out_features: K and N.
        bias: whether the base has a bias.
        r: rank of the branch; any rank of at least 1 (at most min(K, N) for an init by SVD).
        alpha: scaling is alpha / r; None stands for r.
        rslora: scaling is alpha / sqrt(r).
        dropout: probability of dropping an element of the branch's input in training mode.
        init: one of the class's ``inits``; None: the first.
        adapter_dtype: "base" or a floating dtype; over a float64 base always float64.
        base: the module whose weights are taken over (``from_linear`` passes it); without it the
            module makes a weight [N, K] and a bias of its own, on ``device`` and of ``dtype``.

    Attributes:
        weight, bias: the base's Parameters, frozen; weight is [N, K], or [K, N] with
            ``fan_in_fan_out`` (transformers' Conv1D). None when ``base_layer`` holds the base.
        lora_a [r, K], lora_b [N, r] and, where the method has them, core [r, r], rank_scale [r],
            out_scale [N] (else None): the branch, kept in the adapter's dtype.
        merged: whether the branch is inside the base weight right now.
        residual_taken: whether the initial branch has been subtracted from the base weight.

    State dict. Unmerged: the base's keys, the branch's tensors and what rebuilds a residual base.
    Merged: exactly the base's keys, holding the merged weight, as the plain module would have them;
    so it loads into a plain model, and loading it strictly into an adapted one names the missing
    keys rather than adding the branch twice. Loading into a merged module is refused: unmerge
    first.

    A merged module keeps the original weight in the non-persistent buffer ``unmerged_weight``,
    which follows ``.to()``, deepcopy and pickle.
    """

    inits: ClassVar[tuple[str, ...]] = ()
    svd_inits: ClassVar[tuple[str, ...]] = ()
    residual_inits: ClassVar[tuple[str, ...]] = ()
    # Why the branch of this method cannot be put into a weight; "" where it can.
    unmergeable_because: ClassVar[str] = ""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    core: nn.Parameter | None
    rank_scale: nn.Parameter | None
    out_scale: nn.Parameter | None
    base_layer: nn.Module | None
    unmerged_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        r: int = 16,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        init: str | None = None,
        adapter_dtype: torch.dtype | str = "float32",
        base: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        init = self.inits[0] if init is None and self.inits else init
        self.check_options(in_features, out_features, r=r, alpha=alpha, dropout=dropout, init=init)
        self.in_features = in_features
        self.out_features = out_features
        self.r = r
        self.alpha = float(r if alpha is None else alpha)
        self.rslora = rslora
        self.scaling = self._scaling()
        self.dropout = float(dropout)
        self.init = str(init)
        self.fan_in_fan_out = base is not None and is_conv1d(base)
        self.merged = False
        self.residual_taken = False
        if base is None:
            self._make_base(bias, device, dtype)
        else:
            self._take_base(base)
        base_dtype, base_device = self._base_dtype_and_device()
        self._make_adapter(
            adapter_dtype_for(base_dtype, adapter_dtype, type(self).__name__), base_device
        )
        self.register_buffer("unmerged_weight", None, persistent=False)
        if base is not None:
            base.requires_grad_(False)
        elif base_device.type != "meta":
            self.reset_parameters()

    @classmethod
    def check_options(
        cls,
        in_features: int,
        out_features: int,
        *,
        r: int,
        alpha: float | None,
        dropout: float,
        init: str | None,
    ) -> None:
        """Raise ValueError or TypeError, naming the argument, when the options fit no module."""
        owner = cls.__name__
        check_rank(in_features, owner, "in_features")
        check_rank(out_features, owner, "out_features")
        check_rank(r, owner, "r")
        if alpha is not None:
            check_alpha(alpha, owner, "alpha")
        check_dropout(dropout, owner)
        check_choice(init, cls.inits, owner, "init")
        smaller = min(in_features, out_features)
        if init in cls.svd_inits and r > smaller:
            raise ValueError(
                f"{owner}: r must be at most min(in_features, out_features)={smaller} with "
                f"init={init!r}, got {r}"
            )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int = 16,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        init: str | None = None,
        adapter_dtype: torch.dtype | str = "float32",
        initialise: bool = True,
        **method_options: Any,
    ) -> Self:
        """The adapter over ``linear``: nn.Linear, transformers' Conv1D, or any module with integer
        ``in_features`` and ``out_features`` that maps [..., K] to [..., N].

        The base's Parameters are shared and frozen, its train/eval mode is kept.
        ``initialise=False`` leaves the adapter at zero and the base untouched, for a loader that
        fills it.

        Raises:
            TypeError: ``linear`` is nothing of the above.
            ValueError: an option is out of range, or an SVD init meets a base without a dense
                weight.

        Example:
            >>> layer = LoRALinear.from_linear(nn.Linear(64, 32), r=8, alpha=16)
        """
        features = linear_features(linear)
        if features is None:
            raise TypeError(
                f"{cls.__name__}.from_linear: linear must be nn.Linear, Conv1D or a module with "
                f"in_features and out_features, got {type(linear).__name__}"
            )
        module = cls(
            *features,
            r=r,
            alpha=alpha,
            rslora=rslora,
            dropout=dropout,
            init=init,
            adapter_dtype=adapter_dtype,
            base=linear,
            **method_options,
        )
        if initialise:
            module.reset_adapter()
        return module.train(linear.training)

    def _scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def _make_base(
        self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        n, k = self.out_features, self.in_features
        self.weight = nn.Parameter(torch.empty(n, k, device=device, dtype=dtype), False)
        empty = torch.empty(n, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, False))
        self.base_layer = None

    def _take_base(self, base: nn.Module) -> None:
        plain = is_plain(base)
        if self.init in self.svd_inits and not computes_its_weight(base):
            raise ValueError(
                f"{type(self).__name__}: init must be one without an SVD of the base weight for a "
                f"{type(base).__name__} that is not x weightᵀ + bias, got {self.init!r}"
            )
        self.register_parameter("weight", base._parameters["weight"] if plain else None)
        self.register_parameter("bias", base._parameters.get("bias") if plain else None)
        self.base_layer = None if plain else base

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        """Register the adapter's tensors, zero."""
        self.lora_a = nn.Parameter(
            torch.zeros(self.r, self.in_features, dtype=dtype, device=device)
        )
        self.lora_b = nn.Parameter(
            torch.zeros(self.out_features, self.r, dtype=dtype, device=device)
        )
        for name in ("core", "rank_scale", "out_scale"):
            self.register_parameter(name, None)

    def _base_dtype_and_device(self) -> tuple[torch.dtype | None, torch.device]:
        weight = self.base_parameter
        if weight is not None:
            return weight.dtype, weight.device
        tensors = [*self.parameters(), *self.buffers()]  # of a base_layer in a format of its own
        return None, tensors[0].device if tensors else torch.device("cpu")

    @property
    def base_parameter(self) -> nn.Parameter | None:
        """The Parameter that holds the base weight; None when the base has no dense one."""
        return self.weight if self.base_layer is None else dense_weight(self.base_layer)

    @property
    def mergeable_parameter(self) -> nn.Parameter | None:
        """``base_parameter`` if the base computes x weightᵀ + bias with it, else None."""
        trusted = self.base_layer is None or computes_its_weight(self.base_layer)
        return self.base_parameter if trusted else None

    def _require_weight(self, action: str) -> nn.Parameter:
        weight = self.base_parameter
        if weight is None:
            raise TypeError(
                f"{type(self).__name__}.{action}: the base must have a floating-point weight "
                f"[out_features, in_features], got {type(self.base_layer).__name__}"
            )
        return weight

    def reset_parameters(self) -> None:
        """Initialise all the module owns: the base as its class does, then the branch.

        For a module built on the meta device, after ``to_empty``. To start the adapter anew over a
        base that has its weights use :meth:`reset_adapter`. A ``base_layer`` initialises itself.
        """
        self.merged, self.unmerged_weight, self.residual_taken = False, None, False
        if self.weight is not None and self.fan_in_fan_out:
            nn.init.normal_(self.weight, std=0.02)
        elif self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 0.0 if self.fan_in_fan_out else 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Give the adapter its initial values; the layer then computes what its base did.

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

    def _initial_delta(self) -> Tensor:
        """The branch that was taken out of the base weight, fp64 [N, K]. Residual inits only."""
        raise NotImplementedError

    @torch.no_grad()
    def take_residual(self) -> None:
        """Subtract the initial branch from the base weight: W ← round(fp64(W) - initial branch).

        Part of ``reset_adapter``; a loader calls it after filling the buffers of a residual init.
        """
        if not self.residual_taken:
            self._add_to_weight(self._require_weight("take_residual"), -self._initial_delta())
            self.residual_taken = True

    @torch.no_grad()
    def restore_base(self) -> None:
        """Undo ``take_residual``: the base weight is what it was, to one rounding of its dtype."""
        if self.residual_taken:
            self._add_to_weight(self._require_weight("restore_base"), self._initial_delta())
            self.residual_taken = False

    def _add_to_weight(self, weight: Tensor, delta: Tensor) -> None:
        weight.copy_(weight.to(delta.dtype) + (delta.t() if self.fan_in_fan_out else delta))

    def base_weight(self) -> Tensor:
        """The base weight as stored now, [N, K], a view: merged, or less the residual, if so."""
        weight = self._require_weight("base_weight")
        return weight.t() if self.fan_in_fan_out else weight

    @torch.no_grad()
    def original_weight(self) -> Tensor:
        """A copy of the weight before adaptation, [N, K]; after a residual one rounding off."""
        stored = self._require_weight("original_weight")
        unmerged = stored if self.unmerged_weight is None else self.unmerged_weight
        weight = unmerged.t() if self.fan_in_fan_out else unmerged
        if not self.residual_taken:
            return weight.clone()
        return (weight.double() + self._initial_delta()).to(weight.dtype)

    @classmethod
    def connect(cls, model: nn.Module) -> None:
        """Tie the model's modules of this class together, where the method asks for it."""

    @classmethod
    def disconnect(cls, model: nn.Module) -> None:
        """Undo what :meth:`connect` did to other modules of the model."""

    def check_mergeable(self) -> None:
        """Raise ValueError when something that a merged weight depends on is not known yet."""

    def branch_factors(self, training: bool) -> tuple[Tensor, Tensor]:
        """The down and the up projection of the branch, [r, K] and [N, r], in the given mode."""
        return self.lora_a, self.lora_b

    def delta_weight(self) -> Tensor:
        """scaling · diag(out_scale) lora_b core diag(rank_scale) lora_a, [N, K]; differentiable.

        The product is taken in fp64 and rounded once to fp32 (fp64 adapters: not at all), whatever
        the matmul precision settings say.
        """
        lora_a, lora_b = (factor.double() for factor in self.branch_factors(training=False))
        if self.core is not None:
            lora_b = lora_b @ self.core.double()
        if self.rank_scale is not None:
            lora_b = lora_b * self.rank_scale.double()
        if self.out_scale is not None:
            lora_b = lora_b * self.out_scale.double().unsqueeze(1)
        delta = self.scaling * (lora_b @ lora_a)
        return delta.to(torch.promote_types(self.lora_a.dtype, torch.float32))

    @torch.no_grad()
    def merge(self) -> None:
        """Put the branch into the base weight: W ← round(fp32(W) + delta_weight()), one rounding.

        In place in the same Parameter. Merging a merged module does nothing. Another module that
        shares the weight would see the change: ``lowrank_ext.merge`` checks that for a model.

        Raises:
            TypeError: the base does not compute x weightᵀ + bias with a floating-point weight, or
                the branch is no single matrix.
        """
        if self.merged:
            return
        if self.unmergeable_because:
            raise TypeError(
                f"{type(self).__name__}.merge: the branch must be one matrix, "
                f"{self.unmergeable_because}"
            )
        weight = self.mergeable_parameter
        if weight is None:
            raise TypeError(
                f"{type(self).__name__}.merge: the base must compute x weightᵀ + bias with a "
                f"floating-point weight, got {type(self.base_layer).__name__}"
            )
        delta = self.delta_weight()
        self.unmerged_weight = weight.detach().clone()
        self._add_to_weight(weight, delta.to(torch.promote_types(weight.dtype, delta.dtype)))
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base weight the bits it had before :meth:`merge`. Harmless when not merged."""
        if not self.merged:
            return
        assert self.unmerged_weight is not None
        self._require_weight("unmerge").copy_(self.unmerged_weight)
        self.unmerged_weight = None
        self.merged = False

    @torch.no_grad()
    def to_linear(self, merge: bool) -> nn.Module:
        """The plain base module again, the branch merged in or dropped; same Parameters and mode.

        ``merge=False`` after a residual init gives the original weight to one rounding of its
        dtype. The adapter hands its Parameters over and must not be used afterwards.
        """
        if merge:
            self.merge()
        else:
            self.unmerge()
            self.restore_base()
        base = self._new_plain_module() if self.base_layer is None else self.base_layer
        return base.train(self.training)

    def _new_plain_module(self) -> nn.Module:
        with torch.device("meta"):  # no memory, and no draw from any generator
            if self.fan_in_fan_out:
                conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
                plain: nn.Module = conv1d(self.out_features, self.in_features)
            else:
                plain = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        plain.register_parameter("weight", self.weight)
        plain.register_parameter("bias", self.bias)
        return plain

    def base_output(self, x: Tensor) -> Tensor:
        """What the base computes from x with the weight it holds now."""
        if self.base_layer is not None:
            y: Tensor = self.base_layer(x)
            return y
        assert self.weight is not None
        return F.linear(x, self.weight.t() if self.fan_in_fan_out else self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] in x's dtype."""
        if self.merged:
            return self.base_output(x)
        return self.adapted_output(x, *self.branch_factors(self.training), self.scaling)

    def adapted_output(self, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        """The base's output with the branch lora_b core lora_a on it; dropout in training mode."""
        dropout_p = self.dropout if self.training else 0.0
        if self.base_layer is not None:
            return ops.lowrank_add(
                self.base_output(x),
                x,
                lora_a,
                lora_b,
                core=self.core,
                rank_scale=self.rank_scale,
                out_scale=self.out_scale,
                scaling=scaling,
                dropout_p=dropout_p,
            )
        assert self.weight is not None
        return ops.lowrank_linear(
            x,
            self.weight.t() if self.fan_in_fan_out else self.weight,
            self.bias,
            lora_a,
            lora_b,
            core=self.core,
            rank_scale=self.rank_scale,
            out_scale=self.out_scale,
            scaling=scaling,
            dropout_p=dropout_p,
        )

    def extra_repr(self) -> str:
        base = "" if self.base_layer is not None else f", bias={self.bias is not None}"
        merged = ", merged=True" if self.merged else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}{base}, r={self.r}, "
            f"scaling={self.scaling:g}, dropout={self.dropout:g}, init={self.init}{merged}"
        )

    def check_saveable(self, config: AdapterConfig) -> None:
        """Raise ValueError where a file made for ``config`` would not hold what the module is."""
        if self.init in self.residual_inits and not self.residual_taken:
            raise ValueError("must hold its residual base weight, got a restored one")

    def adapter_tensors(self) -> dict[str, Tensor]:
        """All that belongs to the adapter, by name: parameters, then persistent buffers."""
        named = {**self._parameters, **self._buffers}
        base = {"weight", "bias", *self._non_persistent_buffers_set}
        return {name: t for name, t in named.items() if t is not None and name not in base}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name in self.adapter_tensors():
                del destination[prefix + name]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.merged:
            where = prefix.removesuffix(".") or type(self).__name__
            error_msgs.append(f"{where} is merged: call unmerge() before loading a state dict")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        weight_key = "weight" if self.base_layer is None else "base_layer.weight"
        if {f"{prefix}lora_b_init", prefix + weight_key} <= state_dict.keys():
            self.residual_taken = True  # the weight that came with the buffer is the residual


class LoRALinear(LowRankLinear):
    """LoRA (Hu et al., arXiv 2106.09685): y = x Wᵀ + bias + scaling · (drop(x) lora_aᵀ) lora_bᵀ.

    Inits:
        ``kaiming``: lora_a uniform in ±1/sqrt(K), lora_b zero; after the same ``torch.manual_seed``
            these are PEFT's numbers. Drawn in fp32 on the CPU, so they depend on neither device nor
            dtype.
        ``gaussian``: lora_a normal with standard deviation 1/r, lora_b zero; likewise.
        ``pissa`` (arXiv 2404.02948): with W = U diag(sig) Vᵀ, lora_a = sqrt(sig_r / s) V_rᵀ and
            lora_b = U_r sqrt(sig_r / s), s being the scaling, both rounded to the base's dtype; the
            base weight becomes W - s lora_b lora_a. The buffers ``lora_a_init`` and ``lora_b_init``
            rebuild W.
    """

    inits = ("kaiming", "gaussian", "pissa")
    svd_inits = ("pissa",)
    residual_inits = ("pissa",)

    lora_a_init: Tensor
    lora_b_init: Tensor

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_adapter(dtype, device)
        if self.init == "pissa":
            self.register_buffer("lora_a_init", torch.zeros_like(self.lora_a))
            self.register_buffer("lora_b_init", torch.zeros_like(self.lora_b))

    def _init_adapter(self) -> None:
        if self.init == "pissa":
            self._init_pissa()
            return
        self.lora_a.copy_(draw_lora_a(self, gaussian=self.init == "gaussian"))
        self.lora_b.zero_()

    def _init_pissa(self) -> None:
        weight = self.base_weight()
        u, sig, v_t = top_singular_triples(weight, self.r)
        root = (sig / self.scaling).sqrt()
        # The ops round the adapters to x's dtype: rounded here, what the residual leaves out is
        # what the branch computes.
        self.lora_a.copy_((root.unsqueeze(1) * v_t).to(weight.dtype))
        self.lora_b.copy_((u * root).to(weight.dtype))
        self.lora_a_init.copy_(self.lora_a)
        self.lora_b_init.copy_(self.lora_b)

    def _initial_delta(self) -> Tensor:
        return self.scaling * (self.lora_b_init.double() @ self.lora_a_init.double())


def draw_lora_a(module: LowRankLinear, gaussian: bool = False) -> Tensor:
    """PEFT's random start of lora_a, fp32 [r, K] on the CPU, from the default generator."""
    # PEFT makes lora_A and lora_B as nn.Linear; the init that each draws is then overwritten.
    torch.empty(module.r, module.in_features, device="cpu").uniform_()
    torch.empty(module.out_features, module.r, device="cpu").uniform_()
    lora_a = torch.empty(module.r, module.in_features, dtype=torch.float32, device="cpu")
    if gaussian:
        return nn.init.normal_(lora_a, std=1 / module.r)
    return nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))


def top_singular_triples(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_r [N, r], sig_r [r] descending, V_rᵀ [r, K] of ``weight`` [N, K], in fp32 (fp64 for fp64).

    The signs are fixed: the entry of largest magnitude in each column of U_r is positive.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    u, sig, v_t = torch.linalg.svd(wide, full_matrices=False)
    u, sig, v_t = u[:, :r], sig[:r], v_t[:r]
    largest = u.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(u.gather(0, largest).squeeze(0) < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, sig, v_t * sign.unsqueeze(1)


def adapter_dtype_for(
    base_dtype: torch.dtype | None, adapter_dtype: torch.dtype | str, owner: str
) -> torch.dtype:
    """dtype of adapter tensors over a base of ``base_dtype`` (None: no dense weight).

    Raises:
        ValueError: the ops have no such pair: adapters must have the base's dtype, or be float32
            over a bfloat16 or float16 base.
    """
    name = normalised_adapter_dtype(adapter_dtype, owner)
    if base_dtype is None:
        return torch.float32 if name == "base" else getattr(torch, name)
    if name == "base" or base_dtype == torch.float64:
        return base_dtype
    dtype: torch.dtype = getattr(torch, name)
    if dtype not in (base_dtype, torch.float32):
        raise ValueError(
            f"{owner}: adapter_dtype must be 'base', 'float32' or the base's dtype "
            f"{str(base_dtype).removeprefix('torch.')}, got {name!r}"
        )
    return dtype


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D; transformers is not imported for the answer."""
    conv1d = _conv1d_class()
    return conv1d is not None and isinstance(module, conv1d)


def _conv1d_class() -> type[nn.Module] | None:
    # Where transformers has not been imported there is no Conv1D to recognise.
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a module that LowRankLinear can adapt, else None."""
    if is_conv1d(module):
        weight = module.get_parameter("weight")
        return weight.shape[0], weight.shape[1]
    num_in, num_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(module, LowRankLinear) or not isinstance(num_in, int):
        return None
    return (num_in, num_out) if isinstance(num_out, int) else None


def dense_weight(base: nn.Module) -> nn.Parameter | None:
    """The base's weight if it is an ordinary floating Parameter of the right shape, or None."""
    weight = base._parameters.get("weight")
    features = linear_features(base)
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOAT_DTYPES or features is None:
        return None
    shape = features if is_conv1d(base) else features[::-1]
    return weight if weight.shape == shape else None


@torch.no_grad()
def computes_its_weight(base: nn.Module) -> bool:
    """Whether the base's output is x weightᵀ + bias, so that changing its weight changes all of it.

    A base with hooks or a forward of its own is asked: it is called once, on two random rows. (Not
    on the meta device, where it is believed.)
    """
    weight = dense_weight(base)
    if weight is None or weight.is_meta or is_plain(base):
        return weight is not None
    wide = weight.t() if is_conv1d(base) else weight
    own_draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, wide.shape[1], generator=own_draws).to(weight)
    tolerance = torch.finfo(weight.dtype).eps ** 0.5
    with torch.autocast(weight.device.type, enabled=False):
        expected = F.linear(x, wide, base._parameters.get("bias"))
        return torch.allclose(base(x), expected, rtol=tolerance, atol=tolerance)


def is_plain(base: nn.Module) -> bool:
    """Whether x Wᵀ + bias is all that the base does, so that its Parameters are all of it."""
    known = type(base) in (nn.Linear, _conv1d_class())
    return known and not is_hooked(base) and dense_weight(base) is not None


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than the forward of its class: hooks, or a forward put
    on the module itself."""
    own = vars(module)  # asked at every call by layers of lr.accelerate: no detours
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
