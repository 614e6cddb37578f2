"""ResLoRALinear: LoRA with shortcuts from earlier modules of its chain; and the chains."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext import ops
from lowrank_ext.config import AdapterConfig
from lowrank_ext.methods.reslora.chain_state import (
    ChainState,
    Frame,
    carry_chains,
    find_frame,
    stop_carrying,
)
from lowrank_ext.methods.reslora.config import ResLoRAConfig
from lowrank_ext.nn.init import draw_lora_a
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.sharding import is_sharded
from lowrank_ext.wrappers import named_modules, submodule, unwrapped

_NUMBERS = itertools.count()


class ResLoRALinear(LowRankLinear):
    """ResLoRA (Shi et al., arXiv 2402.18039): LoRA with a shortcut along a chain of modules.

    For module n of its chain, x its input, s its scaling and m = min(pre_num, n):

        input   y_n = W x_n + bias + s B_n A_n drop(x_n + x_{n-1}),  2 x_0 for the first module
        block   y_n = W x_n + bias + Σ_{j=0..m} s_{n-j} B_{n-j} A_{n-j} drop_j(x_n)
        middle  y_n = W x_n + bias + s B_n Σ_{j=0..m} A_{n-j} drop(x_{n-j})

    ``lr.adapt`` makes the chains; a module on its own is the first of one. lora_a [r, K] (Kaiming,
    PEFT's numbers) and lora_b [N, r] (zero) train.

    ``block`` is one stacked branch of rank Σ r. With a dropout mask for each term, it runs as a
    mixture of experts that chooses all of them. Sums of ``middle`` are kept in float32 (float64 for
    float64 inputs).

    Modules of ``input`` and ``middle`` read tensors that earlier modules stored during the same
    call of the module that runs them all, see ``chain_state.py``. A chain that is run again within
    the call starts anew.

    Attributes:
        shortcut, pre_num, shared_dropout, merge_estimate: as in ``ResLoRAConfig``, where
            merge_estimate is called merge.
        chain: name of the chain; None where it has no other module.
        position: n.
        input_rms: mean over calls of the root mean square of x, a scalar that
            ``lr.reslora_statistics`` measures, or None.
    """

    config_class = ResLoRAConfig

    config: ResLoRAConfig
    input_rms: Tensor | None

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_adapter(dtype, device)
        config = self.config
        self.shortcut = config.shortcut
        self.pre_num = config.pre_num
        self.shared_dropout = config.shared_dropout
        self.merge_estimate = config.merge
        self.chain: str | None = None
        self.position = 0
        # A tuple, so that the module does not become a submodule of this one.
        self._previous: tuple[ResLoRALinear, ...] = ()
        self._merged_norm: Tensor | None = None
        self.register_buffer("input_rms", None, persistent=False)

    def _init_adapter(self) -> None:
        self.lora_a.copy_(draw_lora_a(self))
        self.lora_b.zero_()

    # ---------------------------------------------------------------------------------- the chain

    def follow(self, chain: str, previous: "ResLoRALinear | None") -> None:
        """Make this module the successor of ``previous`` in ``chain``, or its first module."""
        self.chain = chain
        self.position = 0 if previous is None else previous.position + 1
        self._previous = () if previous is None else (previous,)

    def earlier(self) -> Iterator["ResLoRALinear"]:
        """The modules n-1, n-2, …, 0 of the chain."""
        module = self
        while module._previous:
            (module,) = module._previous
            yield module

    def reached(self) -> list["ResLoRALinear"]:
        """The modules of ``earlier`` that contribute to this module's branch."""
        if self.shortcut == "input":
            return list(self._previous)
        return list(itertools.islice(self.earlier(), None if self.pre_num == -1 else self.pre_num))

    @classmethod
    def connect(cls, model: nn.Module) -> None:
        """Make the chains of the model's modules of this class, and their owners carry states."""
        for pattern, modules in _modules_by_pattern(model).items():
            for number, chain in enumerate(_chains(modules)):
                name = f"{pattern}#{number}@{next(_NUMBERS)}"
                previous = None
                for module in chain.values():
                    module.follow(name, previous)
                    previous = module
                if previous is not None and previous.shortcut != "block":
                    _carry(model, name, list(chain))

    @classmethod
    def disconnect(cls, model: nn.Module) -> None:
        """Undo ``connect`` for the modules around the chains."""
        for module in model.modules():
            stop_carrying(module)

    # ------------------------------------------------------------------------------------ forward

    def unmerged_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] to [..., N] in x's dtype.

        Raises:
            RuntimeError: the module is not the first of its chain and is called outside of a call
                that carries the chain's states.
            ValueError: x and the input of earlier modules differ in their leading dimensions, or
                only some modules of the chain are merged.
        """
        if self.shortcut == "block":
            return self._block_output(x, *args, **kwargs)
        frame = self._frame()
        if frame is None:
            return self._first_output(x, *args, **kwargs)
        state = self._earlier_state(frame, x)
        if self.shortcut == "input":
            y, left = self._input_output(frame, state, x, *args, **kwargs)
        else:
            y, left = self._middle_output(state, x, *args, **kwargs)
        assert self.chain is not None
        frame.states[self.chain] = ChainState(self.position, left)
        return y

    def _frame(self) -> Frame | None:
        """The frame with the chain's states; None for a first module outside of such a frame."""
        frame = None if self.chain is None else find_frame(self.chain)
        if frame is None and self.position > 0:
            raise RuntimeError(
                f"ResLoRALinear: module {self.position} of the chain {self._chain_name()} must run "
                "in a forward of the module that contains the chain, which carries what earlier "
                "modules left, got a call outside of one; use `with lr.reslora_call(model):` to "
                "call blocks yourself, and use_reentrant=False to checkpoint them yourself"
            )
        return frame

    def _chain_name(self) -> str:
        return str(self.chain).partition("#")[0]

    def _earlier_state(self, frame: Frame, x: Tensor) -> ChainState | None:
        assert self.chain is not None
        if self._previous and self._previous[0].merged:
            raise ValueError(
                f"ResLoRALinear: the modules of the chain {self._chain_name()} must all be merged "
                f"or none, got module {self.position - 1} merged and {self.position} not"
            )
        state = frame.states.get(self.chain)
        if state is None or state.position >= self.position:
            return None
        lead = state.tensors[0].shape[:-1]
        if lead != x.shape[:-1]:
            raise ValueError(
                f"ResLoRALinear: x of module {self.position} of the chain {self._chain_name()} "
                f"must have the leading dimensions of the earlier modules, {list(lead)}, got "
                f"{list(x.shape[:-1])}; leave modules that see other tokens out, or use "
                "shortcut='block'"
            )
        return state

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _first_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scaling = (2 if self.shortcut == "input" else 1) * self.scaling
        return self.adapted_output(x, self.lora_a, self.lora_b, scaling, *args, **kwargs)

    def _input_output(
        self, frame: Frame, state: ChainState | None, x: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if state is None:
            return self._first_output(x, *args, **kwargs), (x,)
        (previous,) = state.tensors
        y = ops.lowrank_add(
            self.base_output(x, *args, **kwargs),
            frame.sum_of(x, previous.to(x)),
            self.lora_a,
            self.lora_b,
            scaling=self.scaling,
            dropout_p=self._dropout_p(),
        )
        return y, (x,)

    def _middle_output(
        self, state: ChainState | None, x: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        # An identity for the other factor gives one half of the branch.
        identity = torch.eye(self.r, dtype=self.lora_a.dtype, device=x.device)
        h = ops.lowrank_add(
            x.new_zeros((*x.shape[:-1], self.r)),
            x,
            self.lora_a,
            identity,
            dropout_p=self._dropout_p(),
        )
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        earlier = () if state is None else state.tensors
        total = wide
        for part in earlier:
            total = part.to(wide) + total
        base_out = self.base_output(x, *args, **kwargs)
        y = ops.lowrank_add(
            base_out, total.to(h.dtype), identity, self.lora_b, scaling=self.scaling
        )
        left = (total,) if self.pre_num == -1 else (*earlier, h)[-self.pre_num :]
        return y, left

    def _block_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        terms = [self, *self.reached()]
        if len(terms) == 1:
            return self._first_output(x, *args, **kwargs)
        self._check_whole(terms)
        lora_a = [module.lora_a.to(self.lora_a) for module in terms]
        # The op has one scaling: the ratio of the others' to it is multiplied into their lora_b.
        lora_b = [
            module.lora_b.to(self.lora_b) * (module.scaling / self.scaling)
            if module.scaling != self.scaling
            else module.lora_b.to(self.lora_b)
            for module in terms
        ]
        if self._dropout_p() == 0 or self.shared_dropout:
            stacked = torch.cat(lora_a), torch.cat(lora_b, 1)
            return self.adapted_output(x, *stacked, self.scaling, *args, **kwargs)
        rank = max(module.r for module in terms)
        stacked_a = torch.stack([F.pad(a, (0, 0, 0, rank - len(a))) for a in lora_a])
        stacked_b = torch.stack([F.pad(b, (0, rank - b.shape[1])) for b in lora_b])
        return ops.moe_lowrank_add(
            self.base_output(x, *args, **kwargs),
            x,
            # Each expert draws its own mask. All are chosen, with weight 1 / len(terms).
            self.lora_a.new_zeros(len(terms), self.in_features),
            stacked_a,
            stacked_b,
            top_k=len(terms),
            scaling=len(terms) * self.scaling,
            dropout_p=self._dropout_p(),
        ).y

    def _check_whole(self, terms: list["ResLoRALinear"]) -> None:
        """Raise where FSDP2 holds this module whole for its forward, but not the earlier ones."""
        if any(is_sharded(module.lora_a) or is_sharded(module.lora_b) for module in terms):
            raise RuntimeError(
                f"ResLoRALinear: with shortcut='block' module {self.position} of the chain "
                f"{self._chain_name()} needs lora_a and lora_b of the earlier ones whole, got a "
                "DTensor of FSDP2; call fully_shard on the module that contains the chain and on "
                "none inside it, or use DDP or shortcut='input'"
            )

    def check_saveable(self, config: AdapterConfig, modules: list[LowRankLinear]) -> None:
        super().check_saveable(config, modules)
        if self.shortcut == "block" and not set(modules).issuperset(self.reached()):
            raise ValueError(
                f"must find the earlier modules of its chain {self._chain_name()} in the model, "
                "which has lost or copied blocks since adapt; merge and unload it, or adapt the "
                "model with its new blocks"
            )

    # ------------------------------------------------------------------------------------ merging

    def check_mergeable(self) -> None:
        super().check_mergeable()
        if self.shortcut == "block" or self.merge_estimate != "input":
            return
        for module in [self, *self.reached()] if self._previous else []:
            if module.input_rms is None:
                raise ValueError(
                    "ResLoRALinear: merge='input' needs the sizes of the inputs, got none; run "
                    "some batches in `with lr.reslora_statistics(model):` first"
                )

    def delta_weight(self) -> Tensor:
        """The change of a merged weight, [N, K]; fp32 (fp64 for fp64 adapters), differentiable.

        With ratio_j the estimate of |x_{n-j}| / |x_n|:

            input   s B_n A_n (1 + ratio_1), 2 s B_0 A_0 for the first module
            block   Σ_j s_{n-j} B_{n-j} A_{n-j}, exact
            middle  s B_n (A_n + Σ_j ratio_j A_{n-j})
        """
        lora_a, lora_b = self.merged_factors()
        delta = self.scaling * (lora_b @ lora_a)
        return delta.to(torch.promote_types(self.lora_a.dtype, torch.float32))

    @property
    def merge_is_estimate(self) -> str:  # type: ignore[override]
        if self.shortcut == "block" or self.chain is None:
            return ""
        return (
            f"shortcut={self.shortcut!r} lets a branch see inputs of other layers; "
            "lr.reslora_merge_error measures what is lost"
        )

    def merged_factors(self) -> tuple[Tensor, Tensor]:
        """lora_a [R, K] and lora_b [N, R] in fp64: delta_weight is scaling · lora_b lora_a.

        R is r, with shortcut="block" the sum of the ranks of this module and those it reaches.
        """
        self.check_mergeable()
        return self._factors(self._norms_before() if self._estimates_from_weights() else [])

    def _estimates_from_weights(self) -> bool:
        return self.shortcut != "block" and self.merge_estimate == "weight"

    def _factors(self, norms: list[Tensor]) -> tuple[Tensor, Tensor]:
        """merged_factors, from the norms of the merged weights of modules 0 … n-1."""
        lora_a, lora_b = self.lora_a.double(), self.lora_b.double()
        reached = self.reached()
        if self.shortcut == "block":
            others = [(m.scaling / self.scaling) * m.lora_b.double() for m in reached]
            downs = [lora_a, *(m.lora_a.double().to(lora_a) for m in reached)]
            return torch.cat(downs), torch.cat([lora_b, *(b.to(lora_b) for b in others)], dim=1)
        ratios = self._ratios(reached, norms)
        if self.shortcut == "input":
            return lora_a, (1 + (ratios[0] if ratios else 1)) * lora_b
        for module, ratio in zip(reached, ratios, strict=True):
            lora_a = lora_a + ratio * module.lora_a.double().to(lora_a)
        return lora_a, lora_b

    def _ratios(self, reached: list["ResLoRALinear"], norms: list[Tensor]) -> list[Tensor]:
        """The estimates of |x_{n-j}| / |x_n| for j = 1, 2, …, scalars in fp64."""
        sizes: list[Tensor]
        if self._estimates_from_weights():
            # Estimate: each module multiplies the size of its input by the norm of its weight.
            n = len(norms)
            own, sizes = norms[-1:], [norms[max(n - 1 - j, 0)] for j in range(1, len(reached) + 1)]
        else:
            own = [m.input_rms for m in [self] if m.input_rms is not None]
            sizes = [m.input_rms for m in reached if m.input_rms is not None]
        return [_ratio(size, own[0], self.lora_a.device) for size in sizes]

    def _norms_before(self) -> list[Tensor]:
        """Frobenius norms of the merged weights of modules 0 … n-1, in that order."""
        norms: list[Tensor] = []
        for module in reversed(list(self.earlier())):
            norms.append(module._norm_of_merged(norms))
        return norms

    @torch.no_grad()
    def _norm_of_merged(self, norms: list[Tensor]) -> Tensor:
        if self._merged_norm is not None:
            return self._merged_norm
        lora_a, lora_b = self._factors(norms)
        merged = self.original_weight().double() + self.scaling * (lora_b @ lora_a)
        return torch.linalg.matrix_norm(merged)

    @torch.no_grad()
    def merge(self) -> None:
        """As ``LowRankLinear.merge``; exact for ``block``, else see ``delta_weight``.

        The modules of a chain must all be merged or none. ``lr.reslora_merge_error`` measures the
        error of the estimate.

        Raises:
            TypeError: as ``LowRankLinear.merge``.
            ValueError: merge="input" without ``lr.reslora_statistics``.
        """
        if self.merged:
            return
        self.check_mergeable()
        norm = None
        if self._estimates_from_weights() and self.chain is not None:
            norm = self._norm_of_merged(self._norms_before())
        super().merge()
        self._merged_norm = norm  # for later modules of the chain

    @torch.no_grad()
    def unmerge(self) -> None:
        super().unmerge()
        self._merged_norm = None

    def extra_repr(self) -> str:
        reach = "" if self.shortcut == "input" else f", pre_num={self.pre_num}"
        place = "" if self.chain is None else f", position={self.position}"
        return f"{super().extra_repr()}, shortcut={self.shortcut}{reach}{place}"


def _ratio(earlier: Tensor, own: Tensor, device: torch.device) -> Tensor:
    earlier, own = earlier.double().to(device), own.double().to(device)
    known = (earlier > 0) & (own > 0)
    return torch.where(known, earlier / torch.where(known, own, 1.0), 1.0)


# ------------------------------------------------------------------------------------- the chains


def _modules_by_pattern(model: nn.Module) -> dict[str, dict[str, ResLoRALinear]]:
    """The model's modules by path, in its order, grouped by the pattern of their paths."""
    found: dict[str, dict[str, ResLoRALinear]] = {}
    for path, module in named_modules(model):
        if isinstance(module, ResLoRALinear):
            found.setdefault(_pattern(model, path), {})[path] = module
    return found


def _pattern(model: nn.Module, path: str) -> str:
    """``path`` with a star for each number that is the index of a block.

    Within a block the numbers of an nn.Sequential with unlike modules stay: they are names.
    """
    parts: list[str] = []
    container = unwrapped(model)
    for part in path.split("."):
        inside = "*" in parts
        counts = part.isdecimal() and not (inside and _has_parts(container))
        parts.append("*" if counts else part)
        container = submodule(container, part)
    return ".".join(parts)


def _has_parts(container: nn.Module) -> bool:
    """Whether ``container`` is an nn.Sequential whose modules differ in class or features."""

    def kind(module: nn.Module) -> tuple[object, ...]:
        sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
        return type(module), *sizes

    return isinstance(container, nn.Sequential) and len({kind(m) for m in container}) > 1


def _chains(modules: Mapping[str, ResLoRALinear]) -> Iterator[dict[str, ResLoRALinear]]:
    """The chains of two or more modules, cut where a module does not fit its predecessor."""
    chain: dict[str, ResLoRALinear] = {}
    last = None
    for path, module in modules.items():
        if last is not None and not _fits(last, module):
            if len(chain) > 1:
                yield chain
            chain = {}
        chain[path] = last = module
    if len(chain) > 1:
        yield chain


def _fits(previous: ResLoRALinear, module: ResLoRALinear) -> bool:
    same_rank = previous.r == module.r or module.shortcut != "middle"
    return same_rank and (
        (previous.in_features, previous.out_features) == (module.in_features, module.out_features)
    )


def _carry(model: nn.Module, chain: str, paths: list[str]) -> None:
    """Make the modules around a chain carry its states."""
    split = [path.split(".")[:-1] for path in paths]
    levels = zip(*split, strict=True)  # one pattern, so all have equal depth
    depth = len(list(itertools.takewhile(lambda parts: len(set(parts)) == 1, levels)))
    common = split[0][:depth]
    for owner in _owners(model, common):
        carry_chains(owner, frozenset({chain}))
    for parts in split:
        for end in range(depth + 1, len(parts) + 1):
            if parts[end - 1].isdecimal():
                carry_chains(submodule(model, ".".join(parts[:end])))


def _owners(model: nn.Module, parts: list[str]) -> Iterator[nn.Module]:
    """The innermost module at or above ``parts`` that has a forward.

    The parent of an nn.Sequential may loop over its modules instead of calling it, so the parent is
    an owner too.
    """
    for end in range(len(parts), -1, -1):
        module = submodule(model, ".".join(parts[:end]))
        if type(module).forward is not nn.Module.forward:
            yield module
            if not isinstance(module, nn.Sequential):
                return
