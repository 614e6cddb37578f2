"""BasisLoRALinear: identity and motion coefficients over one basis (Set-and-Sequence).

    y = x Wᵀ + bias + scaling · (drop(x) lora_aᵀ) Bᵀ,    B = s_id lora_b + Σ s_i (mask ⊙ residual_i)

with ``basis="down"``; with ``"up"`` the sum replaces lora_a. The mask acts on the sum, [N, r], and
the ordinary op computes the branch with it, so no [M, N] tensor is masked.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext import ops
from lowrank_ext.checks import check_finite, check_probability
from lowrank_ext.config import AdapterConfig
from lowrank_ext.methods.set_and_sequence.config import (
    BasisLoRAConfig,
    check_residual_name,
    residual_attribute,
)
from lowrank_ext.nn.autocast import without_autocast
from lowrank_ext.nn.init import draw_lora_a
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.rows import ids_of_block, ids_per_row
from lowrank_ext.ops._branch import draw_seed
from lowrank_ext.reference import dropout_scale

# Name of rows without a residual in the layout of a rows block; it is no valid residual name.
IDENTITY = ""


class BasisLoRALinear(LowRankLinear):
    """Set-and-Sequence (arXiv 2502.14844): the LoRA of stage 1, and residuals over its basis.

    The basis is lora_a and the coefficients are lora_b with ``basis="down"``, the other way round
    with ``"up"``. Stage 1 trains both. ``begin_residual_stage`` freezes them and adds a
    residual of the coefficients' shape, initially zero, the only Parameter that trains:
    ``lora_residual_<name>``. Several residuals may share the basis; forward uses their sum, each
    times its scale of ``set_scales``.

    In training mode elements of the coefficients are dropped: of lora_b in stage 1, of the trained
    residual in stage 2. The op's dropout draws the mask, so backward draws it again from the seed
    and no mask is kept. With ``residual_coef_dropout=1`` or a scale of 0 the output is that of
    stage 1, bit for bit. In stage 2 with ``basis="down"`` backward needs h [M, r] and no x.

    Inits, both with coefficients of zero, drawn in fp32 on the CPU:

    - ``kaiming``: the basis uniform in ±1/sqrt(K) (``basis="up"``: ±1/sqrt(N)). With "down" these
      are PEFT's numbers after the same ``torch.manual_seed``.
    - ``gaussian``: the basis normal with standard deviation 1/r.

    r is at most min(K, N).

    Attributes:
        basis, coef_dropout, residual_coef_dropout, mask_rescale, mask_per, mask_identity: as in
            ``BasisLoRAConfig``.
        identity_scale: factor of the coefficients of stage 1.
        residual_scales: factor of each residual, by name, in the order of their stages. A new stage
            sets those of earlier residuals to 0, so each is trained over the identity alone.

    Examples:
        >>> layer = BasisLoRALinear.from_linear(nn.Linear(64, 32), r=8)
        >>> ...  # train on unordered frames
        >>> layer.begin_residual_stage("dance")
        >>> ...  # train on the clip, with a new optimizer
        >>> layer.eval().set_scales(identity=0.7, motion=1.0)
    """

    config_class = BasisLoRAConfig

    config: BasisLoRAConfig

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_adapter(dtype, device)
        config = self.config
        self.basis = config.basis
        self.coef_dropout = float(config.coef_dropout)
        self.residual_coef_dropout = float(config.residual_coef_dropout)
        self.mask_rescale, self.mask_per = config.mask_rescale, config.mask_per
        self.mask_identity = config.mask_identity
        self.identity_scale = 1.0
        self.residual_scales: dict[str, float] = {}
        self.rows_number = -1  # set by lr.motion.rows: the model's number
        for name in config.residuals:
            self._add_residual(name)

    @classmethod
    def check_fits(cls, in_features: int, out_features: int, config: AdapterConfig) -> None:
        super().check_fits(in_features, out_features, config)
        smaller = min(in_features, out_features)
        if config.r > smaller:  # else the basis vectors are linearly dependent
            raise ValueError(
                f"{cls.__name__}: r must be at most min(in_features, out_features)={smaller}, "
                f"got {config.r}"
            )

    def _init_adapter(self) -> None:
        self._basis_factor.copy_(self._draw_basis())
        self._identity.zero_()
        for name in self.residual_scales:
            self._residual(name).zero_()

    def _draw_basis(self) -> Tensor:
        if self.basis == "down":
            return draw_lora_a(self, gaussian=self.init == "gaussian")
        lora_b = torch.empty(self.out_features, self.r, dtype=torch.float32, device="cpu")
        if self.init == "gaussian":
            return nn.init.normal_(lora_b, std=1 / self.r)
        bound = 1 / math.sqrt(self.out_features)
        return nn.init.uniform_(lora_b, -bound, bound)

    @property
    def _basis_factor(self) -> nn.Parameter:
        return self.lora_a if self.basis == "down" else self.lora_b

    @property
    def _identity(self) -> nn.Parameter:
        return self.lora_b if self.basis == "down" else self.lora_a

    def _residual(self, name: str) -> nn.Parameter:
        return self.get_parameter(residual_attribute(name))

    @property
    def residuals(self) -> tuple[str, ...]:
        """Names of the residuals, in the order of their stages."""
        return tuple(self.residual_scales)

    @property
    def trained_residual(self) -> str | None:
        """The residual of the present stage; None in stage 1."""
        return self.residuals[-1] if self.residual_scales else None

    def _add_residual(self, name: str) -> None:
        self.residual_scales = {**dict.fromkeys(self.residual_scales, 0.0), name: 1.0}
        for parameter in (self.lora_a, self.lora_b, *map(self._residual, self.residuals[:-1])):
            # An optimizer would still apply a remaining gradient.
            parameter.requires_grad_(False).grad = None
        self.register_parameter(
            residual_attribute(name), nn.Parameter(torch.zeros_like(self._identity))
        )

    def check_new_residual(self, name: str, coef_dropout: float | None, caller: str) -> None:
        """Raise as ``begin_residual_stage`` does, in the name of ``caller``."""
        check_residual_name(name, self.residuals, caller)
        if coef_dropout is not None:
            check_probability(coef_dropout, caller, "coef_dropout")
        self._check_unmerged(caller)

    def _check_unmerged(self, caller: str) -> None:
        if self.merged:
            raise ValueError(f"{caller}: the adapter must not be merged, call unmerge first")

    def begin_residual_stage(
        self, name: str = "motion", *, coef_dropout: float | None = None
    ) -> None:
        """Freeze all adapter tensors and add the residual ``name``, zero, which trains from now on.

        The output is unchanged, except that earlier residuals get scale 0. Make a new optimizer: an
        old one does not have the new Parameter.

        Args:
            coef_dropout: of the new stage; None keeps ``residual_coef_dropout``.

        Raises:
            ValueError: the name is taken or has other characters than letters, digits, _ and -,
                coef_dropout is no probability, or the adapter is merged.
        """
        self.check_new_residual(name, coef_dropout, f"{type(self).__name__}.begin_residual_stage")
        if coef_dropout is not None:
            self.residual_coef_dropout = float(coef_dropout)
        self._add_residual(name)

    def set_scales(
        self,
        *,
        identity: float | None = None,
        motion: float | Mapping[str, float] | None = None,
    ) -> None:
        """Set the scales: ``identity`` of the coefficients of stage 1, ``motion`` of the residuals.

        Args:
            identity: None keeps it.
            motion: a number for all residuals, or numbers by name; the others keep theirs.

        Raises:
            ValueError: a number is not finite, a name is unknown, motion is given before the first
                residual stage, or the adapter is merged.
            TypeError: a scale is no number.
        """
        scales = self.checked_scales(identity, motion, f"{type(self).__name__}.set_scales")
        self.identity_scale, self.residual_scales = scales

    def checked_scales(
        self,
        identity: float | None,
        motion: float | Mapping[str, float] | None,
        caller: str,
    ) -> tuple[float, dict[str, float]]:
        """identity_scale and residual_scales as ``set_scales`` would set them."""
        self._check_unmerged(caller)
        if motion is not None and not self.residual_scales:
            raise ValueError(f"{caller}: motion must be None before a residual stage, got {motion}")
        changes = motion if isinstance(motion, Mapping) else {}
        if motion is not None and not isinstance(motion, Mapping):
            changes = dict.fromkeys(self.residual_scales, motion)
        for name, scale in changes.items():
            if name not in self.residual_scales:
                raise ValueError(
                    f"{caller}: motion must name residuals among {list(self.residuals)}, "
                    f"got {name!r}"
                )
            check_finite(scale, caller, f"motion[{name!r}]")
        if identity is not None:
            check_finite(identity, caller, "identity")
        residuals = {name: float(changes.get(name, s)) for name, s in self.residual_scales.items()}
        return self.identity_scale if identity is None else float(identity), residuals

    def branch_factors(self, training: bool) -> tuple[Tensor, Tensor]:
        coefficients = self._coefficients(self.residual_scales, self._mask_probability(training))
        if self.basis == "down":
            return self.lora_a, coefficients
        return coefficients, self.lora_b

    def _mask_probability(self, training: bool) -> float:
        if not training:
            return 0.0
        return self.residual_coef_dropout if self.residual_scales else self.coef_dropout

    def _coefficients(
        self, residual_scales: Mapping[str, float], p: float, num_masks: int | None = None
    ) -> Tensor:
        """s_id identity + Σ sᵢ residualᵢ in the coefficients' shape, masked with probability p.

        With ``num_masks``, if anything is masked, a stack of that many, each with its own mask.
        """
        mask_sum = self.trained_residual is None or self.mask_identity
        weighted: list[tuple[Tensor, float]] = [(self._identity, self.identity_scale)]
        for name, scale in residual_scales.items():
            masked = p > 0 and scale != 0 and name == self.trained_residual and not mask_sum
            residual: Tensor = self._residual(name)
            weighted.append((self._masked(residual, p, num_masks) if masked else residual, scale))
        # Terms of scale 0 are left out and those of scale 1 not multiplied, so that no bit changes.
        terms = [t if scale == 1 else scale * t for t, scale in weighted if scale != 0]
        total = sum(terms[1:], terms[0]) if terms else torch.zeros_like(self._identity)
        return self._masked(total, p, num_masks) if mask_sum and p > 0 else total

    def _masked(self, coefficients: Tensor, p: float, num_masks: int | None) -> Tensor:
        """drop(coefficients), or a stack of ``num_masks`` of them.

        Computed by the op's dropout of x with identities as lora_a and lora_b: backward draws the
        mask again from the seed, under torch.compile and activation checkpointing too, and nothing
        of the coefficients' size is kept.
        """
        rows = coefficients if self.basis == "down" else coefficients.mT  # [features, r]
        if num_masks is not None:
            rows = rows.expand(num_masks, *rows.shape)
        kept = 1 / dropout_scale(p) if p < 1 else 0.0  # share of the elements that are kept
        identity = torch.eye(self.r, dtype=rows.dtype, device=rows.device)
        with without_autocast(rows.device):
            masked, _ = torch.ops.lowrank_ext.lowrank_add.default(
                rows.new_zeros(rows.shape),
                rows,
                identity,
                identity,
                None,
                None,
                None,
                1.0 if self.mask_rescale else kept,
                p,
                draw_seed(p, None, rows.device),
                False,  # the coefficients are not rounded to TF32
            )
        return masked if self.basis == "down" else masked.mT

    def unmerged_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        p = self._mask_probability(self.training)
        if p > 0 and self.mask_per == "sample" and x.dim() > 1:
            return self._output_per_sample(x, p, *args, **kwargs)
        if self.rows_number >= 0 and not self.training:
            ids = ids_of_block(x, self.rows_number, (IDENTITY, *self.residuals))
            if ids is not None:
                return self._output_in_block(x, ids, *args, **kwargs)
        return super().unmerged_output(x, *args, **kwargs)

    def _output_per_sample(self, x: Tensor, p: float, *args: Any, **kwargs: Any) -> Tensor:
        samples = x.shape[0]
        coefficients = self._coefficients(self.residual_scales, p, num_masks=samples)
        ids = ids_per_row(torch.arange(samples, device=x.device), x)
        shape = (samples, *coefficients.shape[-2:])
        return self._output_stacked(x, coefficients.expand(shape), ids, *args, **kwargs)

    def _output_in_block(self, x: Tensor, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        alone = [{name: 1.0} for name in self.residuals]
        # The last one is for compiled code outside of a block, where all ids are -1.
        choices: list[dict[str, float]] = [{}, *alone, self.residual_scales]
        stack = torch.stack([self._coefficients(scales, 0.0) for scales in choices])
        ids = torch.where(ids < 0, len(choices) - 1, ids)
        return self._output_stacked(x, stack, ids, *args, **kwargs)

    def _output_stacked(
        self, x: Tensor, coefficients: Tensor, ids: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Output for x in which each row uses the coefficients, of [n, …], at its id."""
        basis = self._basis_factor.expand(coefficients.shape[0], *self._basis_factor.shape)
        down = self.basis == "down"
        return ops.multi_lowrank_add(
            self.base_output(x, *args, **kwargs),
            x,
            basis if down else coefficients,
            coefficients if down else basis,
            ids,
            self.scaling * torch.ones(basis.shape[:1], dtype=torch.float64, device=x.device),
            dropout_p=self.dropout if self.training else 0.0,
        )

    def check_saveable(self, config: AdapterConfig, modules: list[LowRankLinear]) -> None:
        super().check_saveable(config, modules)
        expected = tuple(config.residuals) if isinstance(config, BasisLoRAConfig) else ()
        if self.residuals != expected:
            raise ValueError(
                f"must have the residuals {list(expected)} of the model's config, got "
                f"{list(self.residuals)}; begin stages with lr.motion.begin_residual_stage"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.rows_number = -1  # a copy does not belong to the model of that number

    def extra_repr(self) -> str:
        scales = "".join(f", {name}={scale:g}" for name, scale in self.residual_scales.items())
        return (
            f"{super().extra_repr()}, basis={self.basis}, identity={self.identity_scale:g}{scales}"
        )
