"""AFLoRA's adaptive freezing: each lora_a and lora_b is frozen at a step chosen by its score.

(Liu et al., arXiv 2403.13269; the Trainer's callback: lowrank_ext/integrations/transformers.py.)
Per live projection, with G its gradient at optimizer step t = 0, 1, …, all elementwise in fp32:

    I        mean of |G| over the steps of a window whose gradients are finite
    Ī        beta1 Ī + (1 - beta1) I             when a window ends
    U        beta2 U + (1 - beta2) |I - Ī|       likewise, with the new Ī
    score    mean of all entries of Ī ⊙ U

Between the steps start · T and eta · T the fraction rho(t) falls from 1 to 0, see
``keep_fraction``. At each end of a window in between, tau is the k-th smallest entry of Ī ⊙ U
over all N entries of all live projections, k = int(N (1 - rho)), and every projection with
score < tau is frozen. tau is an entry but a score is a mean, so rho is not the fraction of live
projections. From step eta · T on everything is frozen.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from lowrank_ext.checks import check_choice
from lowrank_ext.freezing import (
    check_fraction,
    check_positive,
    exact,
    frozen_may_leave,
    stop_training,
)
from lowrank_ext.methods.aflora.module import AFLoRALinear
from lowrank_ext.methods.aflora.statistics import (
    STATISTICS,
    Projection,
    everywhere,
    kth_smallest,
    reduced,
)
from lowrank_ext.sharding import Groups
from lowrank_ext.targets import modules_of_kind

__all__ = ["DECAYS", "AdaptiveFreezeSchedule", "keep_fraction", "kth_smallest"]

DECAYS = ("cubic", "quadratic")
_OPTIONS = ("eta", "start", "decay", "window")
_NUMBERS = ("total_steps", "eta", "start", "decay", "window", "beta1", "beta2")


def keep_fraction(step: int, total_steps: int, start: float, eta: float, decay: str) -> float:
    """rho at the optimizer step ``step`` (the first is 0) of ``total_steps``.

    1 until start · T, 0 from eta · T on; between them, with u running from 0 to 1, (1 - u)³ for
    ``"cubic"`` and 1 - u² for ``"quadratic"``. The fractions are exact, as in
    ``num_frozen_columns``.
    """
    first, last = exact(start) * total_steps, exact(eta) * total_steps
    if step >= last:
        return 0.0
    if step <= first:
        return 1.0
    done = (step - first) / (last - first)
    return float((1 - done) ** 3 if decay == "cubic" else 1 - done**2)


def check_schedule(owner: str, eta: object, start: object, decay: object, window: object) -> None:
    """Raise ValueError, naming ``owner`` and the argument, for an invalid option."""
    eta = check_fraction(owner, "eta", eta)
    if start is not None and check_fraction(owner, "start", start) > eta:
        raise ValueError(f"{owner}: start must be at most eta={eta}, got {start!r}")
    check_choice(decay, DECAYS, owner, "decay")
    check_positive(owner, "window", window)


class AdaptiveFreezeSchedule:
    """Freezes the trainable lora_a and lora_b of the model's AFLoRALinears, one after another.

    Call ``step`` once per optimizer step, after the last backward and before
    ``optimizer.step()``. A projection that it freezes loses its gradient, so that the optimizer
    does not move it, its requires_grad and its optimizer state; once a lora_a is frozen, its module
    keeps no x for backward. The vectors go on training.

    The scores use the accumulated, reduced gradients. Clipping these by norm or unscaling them,
    before or after the call, does not change the scores: the norm is also taken at the end of each
    backward, and its change since then is undone. (Clipping by value is no single factor: it is
    not undone.) A step with gradients that are not finite does not change the scores. The host
    waits for the device only in steps that decide, and for the scale of a GradScaler.

    Where torch.distributed is initialized, frozen projections keep requires_grad, and ``step``
    removes their zero gradients (see ``frozen_may_leave``); x stays saved for backward. All ranks
    follow the decision of the first; each rank counts its own entries of DTensors.

    Args:
        model: a model adapted with AFLoRA, after ``fully_shard`` if that is used. Projections that
            are not trainable are left alone.
        total_steps: T, the optimizer steps of the whole training.
        eta, start: fractions of T between which projections are frozen; from eta · T on all are.
            start None stands for eta / 3. The released code for GLUE has eta 0.3 and start 0.05 or
            0.1, that for LLaMA 0.7 and 0.3.
        decay: ``"cubic"``, as for GLUE, or ``"quadratic"``, as for LLaMA; see
            ``keep_fraction``.
        window: optimizer steps in a window; decisions are made at its end.
        beta1, beta2: decay rates of Ī and of U, at least 0 and below 1.
        optimizer: if given, its state for a projection is dropped when that is frozen.
        scaler: the ``torch.amp.GradScaler`` in use, if any, so that a change of its scale does not
            count as a change of the gradients.
        process_group: the ranks that hold the same model (data parallel), by default all.

    Attributes:
        step_count: optimizer steps so far.
        frozen_at: for each frozen projection, by name, the step that froze it.

    To resume, load the model's weights first, then call ``load_state_dict``.

    Raises:
        ValueError: an argument is out of range, or the model has no AFLoRALinear.

    Examples:
        >>> schedule = AdaptiveFreezeSchedule(model, total_steps=1000, optimizer=optimizer)
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     schedule.step()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    before_optimizer: ClassVar[bool] = True
    has_statistics: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        eta: float = 0.3,
        start: float | None = None,
        decay: str = "cubic",
        window: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.95,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        _check_numbers(total_steps, eta, start, decay, window, beta1, beta2)
        self.total_steps = total_steps
        self.eta = float(eta)
        self.start = float(exact(eta) / 3 if start is None else start)
        self.decay, self.window = decay, window
        self.beta1, self.beta2 = float(beta1), float(beta2)
        self.optimizer, self.scaler, self.process_group = optimizer, scaler, process_group
        self.step_count = 0
        self.frozen_at: dict[str, int] = {}
        self._parameters = dict(_scheduled(model))
        self._live = {name: Projection(name, p) for name, p in self._parameters.items()}
        self._hooks = {name: self._watch(p) for name, p in self._parameters.items()}
        self._count = torch.zeros((), dtype=torch.int32, device=self._device())
        self._raw_norm: Tensor | None = None
        self._queued_for = -1

    @classmethod
    def check_options(cls, owner: str, options: Mapping[str, Any]) -> None:
        """Raise ValueError, naming ``owner`` and the argument, for an invalid option."""
        check_schedule(owner, *(options[name] for name in _OPTIONS))

    @classmethod
    def for_training(
        cls, model: nn.Module, total_steps: int, options: Mapping[str, Any], optimizer: Any
    ) -> Self | None:
        """The schedule of ``model`` with these options; None where it has no AFLoRALinear."""
        if not any(isinstance(module, AFLoRALinear) for module in model.modules()):
            return None
        return cls(
            model,
            total_steps,
            **{name: options[name] for name in _OPTIONS},
            optimizer=optimizer,
            scaler=getattr(optimizer, "scaler", None),  # accelerate's wrapper has it
        )

    def _device(self) -> torch.device:
        live = next(iter(self._live.values()), None)
        return torch.device("cpu") if live is None else live.mean.device

    # --------------------------------------------------------- norm of the gradients after backward

    def _watch(self, parameter: nn.Parameter) -> RemovableHandle:
        return parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def _on_gradient(self, parameter: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self._queued_for:
            self._queued_for = backward
            # Queued twice, to run after the callbacks in which DDP and FSDP2 finish their
            # reductions: those may be queued after this one.
            queue_callback = Variable._execution_engine.queue_callback
            queue_callback(lambda: queue_callback(self._measure))

    @torch.no_grad()
    def _measure(self) -> None:
        if gradients := self._gradients():
            self._raw_norm = _norm(gradients.values())

    def _gradients(self) -> dict[Projection, Tensor]:
        found = {projection: projection.gradient for projection in self._live.values()}
        return {projection: g for projection, g in found.items() if g is not None}

    # ------------------------------------------------------------------------------------- the step

    @torch.no_grad()
    def step(self) -> None:
        """Updates the scores with the present gradients, then freezes projections that are due.

        Raises:
            RuntimeError: no live projection has a gradient: backward has not run, or the gradients
                have been zeroed already.
        """
        if self._live:
            if self.step_count % self.window == 0:
                self._close_window()
            self._observe()
            for projection in self._chosen():
                self._freeze(projection.name)
        for name in self.frozen_at:  # they have gradients only where they keep requires_grad
            self._parameters[name].grad = None
        self.step_count += 1

    def _observe(self) -> None:
        gradients = self._gradients()
        if not gradients:
            raise RuntimeError(
                "AdaptiveFreezeSchedule.step: live projections must have gradients, got none; call "
                "it after backward and before zero_grad"
            )
        norm = _norm(gradients.values())
        factor = self._undone(norm)
        finite = norm.isfinite()
        for groups in {projection.groups for projection in self._live.values()}:
            finite = everywhere(finite, groups)
        for projection, gradient in gradients.items():
            scale, counts = (t.to(gradient.device) for t in (factor, finite))
            magnitude = gradient.abs().float().mul_(scale)
            projection.window_sum.add_(torch.where(counts, magnitude, 0.0))
        self._count.add_(finite.to(self._count.device))

    def _undone(self, norm: Tensor) -> Tensor:
        """Factor from the present gradients to those that backward computed, unscaled."""
        raw, self._raw_norm = self._raw_norm, None
        if raw is None:  # the gradients are not from backward
            return torch.ones_like(norm)
        if self.scaler is not None:
            raw = raw / self.scaler.get_scale()
        return torch.where((norm > 0) & raw.isfinite(), raw / norm, 1.0)

    def _close_window(self) -> None:
        # A window without finite gradients changes nothing, such as that before the first step.
        filled = self._count > 0
        weights = [torch.where(filled, 1 - beta, 0.0) for beta in (self.beta1, self.beta2)]
        for projection in self._live.values():
            projection.close_window(self._count, weights)
        self._count.zero_()

    # --------------------------------------------------------------------------------- the decision

    def _chosen(self) -> list[Projection]:
        """The projections that this step freezes."""
        step = self.step_count
        keep = keep_fraction(step, self.total_steps, self.start, self.eta, self.decay)
        if keep == 0:
            return list(self._live.values())
        num_entries = sum(projection.parameter.numel() for projection in self._live.values())
        k = int(num_entries * (1 - keep))
        return self._below(k) if k > 0 and step % self.window == 0 else []

    def _below(self, k: int) -> list[Projection]:
        """The projections whose score is below the k-th smallest entry of all."""
        by_groups: dict[Groups, list[Projection]] = {}
        for projection in self._live.values():
            by_groups.setdefault(projection.groups, []).append(projection)
        entries = {g: [p.mean * p.spread for p in some] for g, some in by_groups.items()}
        threshold = kth_smallest(entries, k)
        ordered, scores = [], []
        for groups, projections in by_groups.items():
            sums = [tensor.sum(dtype=torch.float64) for tensor in entries[groups]]
            total = reduced(torch.stack([t.to(threshold.device) for t in sums]), groups)
            sizes = [projection.parameter.numel() for projection in projections]
            scores.append(total / total.new_tensor(sizes))
            ordered += projections
        below = (torch.cat(scores) < threshold).to(torch.uint8)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(below, group=self.process_group, group_src=0)
        return [p for p, chosen in zip(ordered, below.tolist(), strict=True) if chosen]

    def _freeze(self, name: str) -> None:
        parameter = self._parameters[name]
        self._live.pop(name, None)
        self.frozen_at[name] = self.step_count
        self._hooks[name].remove()
        if frozen_may_leave():
            stop_training(parameter, self.optimizer)
            return
        # Zero from the next backward on, so that clipping counts live gradients only.
        self._hooks[name] = parameter.register_post_accumulate_grad_hook(_zero_gradient)
        if self.optimizer is not None:
            self.optimizer.state.pop(parameter, None)

    # ---------------------------------------------------------------------------------------- state

    def live(self) -> list[str]:
        """Names of the projections that still train, such as "layers.0.q_proj.lora_a"."""
        return list(self._live)

    def num_frozen(self) -> dict[str, int]:
        """Frozen projections, at most two, by module path."""
        counts = {name.rpartition(".")[0]: 0 for name in self._parameters}
        for name in self.frozen_at:
            counts[name.rpartition(".")[0]] += 1
        return counts

    def remove(self) -> None:
        """Removes the hooks from the model. Frozen projections stay frozen; no more are frozen."""
        for hook in self._hooks.values():
            hook.remove()
        self._live.clear()

    def numbers(self) -> dict[str, Any]:
        """The part of the state that JSON can hold: all but the statistics of live projections."""
        options = {key: getattr(self, key) for key in _NUMBERS}
        return {"step": self.step_count, **options, "frozen_at": dict(self.frozen_at)}

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and per live projection three fp32 tensors on the CPU.

        Tensors of sharded models are gathered, so every rank must call this.
        """
        live = {name: projection.state() for name, projection in self._live.items()}
        return {**self.numbers(), "count": int(self._count), "live": live}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the saved schedule: its live projections train, its frozen ones do not.

        Raises:
            ValueError: the state does not fit the model. Nothing has been changed then.
        """
        self._check_state(state)
        self.step_count, self.frozen_at = state["step"], {}
        for key in _NUMBERS:
            setattr(self, key, state[key])
        self.remove()
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(True)
            self._hooks[name] = self._watch(parameter)
            if name in state["live"]:
                self._live[name] = Projection(name, parameter)
                self._live[name].load(state["live"][name])
            else:
                self._freeze(name)
        self.frozen_at = dict(state["frozen_at"])
        self._count.fill_(state["count"])
        self._raw_norm = None

    def _check_state(self, state: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        expected = {"step", *_NUMBERS, "frozen_at", "count", "live"}
        if state.keys() != expected:
            raise ValueError(
                f"{owner}: state must have the keys {sorted(expected)}, got {sorted(state)}"
            )
        _check_numbers(*(state[key] for key in _NUMBERS))
        for key in ("step", "count"):
            number = state[key]
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{owner}: {key} must be an integer of at least 0, got {number!r}")
        for key in ("live", "frozen_at"):
            if not isinstance(state[key], Mapping):
                raise ValueError(f"{owner}: {key} must be a mapping, got {state[key]!r:.60}")
        self._check_names(state["live"].keys(), state["frozen_at"].keys())
        for name, statistics in state["live"].items():
            tensors = isinstance(statistics, Mapping) and all(
                isinstance(tensor, Tensor) and tensor.is_floating_point()
                for tensor in statistics.values()
            )
            if not tensors:
                raise ValueError(
                    f"{owner}: statistics of {name} must be floating-point tensors, got "
                    f"{statistics!r:.60}"
                )
            shapes = {key: tuple(tensor.shape) for key, tensor in statistics.items()}
            fits = {key: tuple(self._parameters[name].shape) for key in STATISTICS}
            if shapes != fits:
                raise ValueError(f"{owner}: statistics of {name} must be {fits}, got {shapes}")

    def _check_names(self, live: Set[str], frozen: Set[str]) -> None:
        # Frozen ones of the state that are not in the model are fine: they may be frozen already.
        own = self._parameters.keys()
        for name in sorted((own - live - frozen) | (live - own)):
            where = "model" if name in own else "state"
            raise ValueError(
                f"{type(self).__name__}: state must be this model's, got {name} in the {where} only"
            )


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    """2-norm of all gradients together, fp32."""
    norms = torch._foreach_norm(list(gradients), 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _zero_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.zero_()


def _check_numbers(
    total_steps: object,
    eta: object,
    start: object,
    decay: object,
    window: object,
    beta1: object,
    beta2: object,
) -> None:
    owner = AdaptiveFreezeSchedule.__name__
    check_positive(owner, "total_steps", total_steps)
    check_schedule(owner, eta, start, decay, window)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if check_fraction(owner, name, beta) == 1:
            raise ValueError(f"{owner}: {name} must be below 1, got {beta!r}")


def _scheduled(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    modules = modules_of_kind(model, AFLoRALinear, "AdaptiveFreezeSchedule")
    for path, module in modules.items():
        module.awaits_schedule = False
        for name in ("lora_a", "lora_b"):
            parameter = module.get_parameter(name)
            if parameter.requires_grad:
                yield f"{path}.{name}".lstrip("."), parameter
