"""Uptraining: the loss of a recursive model on a batch, for a plain loop and for the Trainer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_ext.checks import check_choice
from lowrank_ext.methods.recursive.loop_outputs import (
    check_collected,
    collected_loops,
    exit_logits,
)
from lowrank_ext.methods.recursive.losses import (
    LOSSES,
    LoopLoss,
    loop_coefficients,
    loop_loss,
)
from lowrank_ext.methods.recursive.model import Loops
from lowrank_ext.wrappers import unwrapped

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # users mix it into the Trainer; transformers is not imported here


def uptrain_loss(
    model: nn.Module,
    teacher: nn.Module | None,
    inputs: Mapping[str, Any],
    *,
    loss: str = "kl",
    coefficients: float | Sequence[float] = 0.0,
    exit_loss: str = "kl",
    num_items: Tensor | int | None = None,
) -> LoopLoss:
    """``lowrank_ext.recursive.loop_loss`` of a batch.

    The teacher runs under no_grad, in the mode that it is in, and its logits live until the step's
    backward has ended. Exits are taken from the states of one forward: norm and head run again for
    each loop that has a coefficient.

    Args:
        model: a recursive model, under any wrapper (DDP, torch.compile); call backward on what this
            returns.
        teacher: the model towards whose logits the last loop is distilled, with the same
            vocabulary; None for loss="ce".
        inputs: of the model: input_ids, attention_mask, …; and labels.
        loss: of the last loop: "ce", "kl", "reverse-kl", "tvd" or "jsd".
        coefficients: of the loops: a number for all earlier ones, or B numbers, the last loop's at
            their end (``lowrank_ext.recursive.loop_coefficients``). 0.0: the last loop alone, which
            the paper trains first.
        exit_loss: of the earlier loops, towards the detached last one.
        num_items: counted tokens of an accumulated step; None: of this batch.

    Raises:
        TypeError: the model is not recursive.
        ValueError: labels are missing, the teacher is missing, not needed or of another vocabulary,
            or the model has a loss of its own beside (routers' balance).

    Examples:
        >>> lr.recursive.uptrain_loss(model, teacher, batch).total.backward()

    Source: Relaxed Recursive Transformers, Bae et al. 2024 (arXiv 2410.20672), sections 3.6, 3.7.
    """
    owner = "uptrain_loss"
    used = _coefficients(model, coefficients, owner)
    check_choice(loss, LOSSES, owner, "loss")
    check_choice(exit_loss, LOSSES, owner, "exit_loss")
    _check_teacher(teacher, loss, owner)
    _check_vocabulary(model, teacher, owner)
    _check_own_loss(model, owner)
    if not isinstance(inputs.get("labels"), Tensor):
        raise ValueError(f"{owner}: inputs must hold labels, got {', '.join(inputs) or 'nothing'}")
    given = {key: value for key, value in inputs.items() if key != "labels"}
    with collected_loops(model) as states:
        logits = model(**{"use_cache": False, **given}).logits
    return _loss_of(
        model, teacher, states, logits, given, inputs["labels"], used, loss, exit_loss, num_items
    )


def _loss_of(
    model: nn.Module,
    teacher: nn.Module | None,
    states: Sequence[Tensor],
    logits: Tensor,
    given: Mapping[str, Any],
    labels: Tensor,
    coefficients: Sequence[float],
    loss: str,
    exit_loss: str,
    num_items: Tensor | int | None,
) -> LoopLoss:
    """The loss, once the model has run."""
    inner = unwrapped(model)
    check_collected(states, len(coefficients))
    by_loop = []
    for state, value in zip(states[:-1], coefficients[:-1], strict=True):
        if value == 0:  # its logits are not looked at
            by_loop.append(logits.detach())
            continue
        by_loop.append(exit_logits(inner, state))
    return loop_loss(
        [*by_loop, logits],
        labels.to(logits.device),
        loss=loss,
        teacher_logits=_teacher_logits(teacher, given, logits),
        coefficients=coefficients,
        exit_loss=exit_loss,
        num_items=num_items,
    )


@torch.no_grad()
def _teacher_logits(
    teacher: nn.Module | None, given: Mapping[str, Any], logits: Tensor
) -> Tensor | None:
    if teacher is None:
        return None
    found: Tensor = teacher(**{"use_cache": False, **given}).logits
    if found.shape != logits.shape:
        raise ValueError(
            f"uptrain_loss: the teacher's logits must be {list(logits.shape)}, as the model's, got "
            f"{list(found.shape)}; both need one vocabulary"
        )
    return found.to(logits.device)


def _coefficients(
    model: nn.Module, coefficients: float | Sequence[float], owner: str
) -> tuple[float, ...]:
    """A coefficient for each loop."""
    num_loops = Loops(model, owner).num_loops
    if not isinstance(coefficients, Sequence):
        return loop_coefficients(num_loops, coefficients)
    if len(coefficients) != num_loops:
        raise ValueError(
            f"{owner}: coefficients must be a number or one for each of the {num_loops} loops, got "
            f"{len(coefficients)}"
        )
    return tuple(coefficients)


def _check_teacher(teacher: nn.Module | None, loss: str, owner: str) -> None:
    if (teacher is None) != (loss == "ce"):
        raise ValueError(
            f"{owner}: teacher must be given for all losses but 'ce', got loss={loss!r} "
            f"{'without' if teacher is None else 'with'} one"
        )


def _check_vocabulary(model: nn.Module, teacher: nn.Module | None, owner: str) -> None:
    """Raise before a token is looked up in a table that does not have it."""
    if teacher is None:
        return
    own, other = (_vocabulary(unwrapped(each)) for each in (model, teacher))
    if own is not None and other is not None and own != other:
        raise ValueError(
            f"{owner}: the teacher must have the model's vocabulary of {own} tokens, got {other}"
        )


def _vocabulary(model: Any) -> int | None:
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embeddings, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _check_own_loss(model: nn.Module, owner: str) -> None:
    """Raise where labels in the model's own forward would add a loss that is not here."""
    config: Any = unwrapped(model).config
    if getattr(config.get_text_config(decoder=True), "output_router_logits", False):
        raise ValueError(
            f"{owner}: model must have no loss of its own beside, got output_router_logits=True"
        )


class RecursiveTrainerMixin(Trainer):  # type: ignore[misc]  # untyped base
    """Uptrains a recursive model in any transformers Trainer, by ``uptrain_loss``.

    Evaluation, and ``eval_loss``, are the last loop's cross entropy. Accumulated gradients, several
    processes and mixed precision are the Trainer's own.

    Args:
        teacher: see ``uptrain_loss``. It is put into evaluation mode, and on the Trainer's device
            unless it is spread over several.
        loss, exit_loss: see ``uptrain_loss``.
        exits: coefficient of each earlier loop, or a sequence of them.
        exit_warm_up: optimizer steps over which these rise from 0.

    Raises:
        TypeError: the model is not recursive.
        ValueError: an option does not fit, or the Trainer has a loss of its own
            (compute_loss_func, label_smoothing_factor).
        RuntimeError: a step begins under nn.DataParallel, whose replicas keep their states.

    Examples:
        >>> class Uptrainer(lr.recursive.RecursiveTrainerMixin, Trainer): ...
        >>> Uptrainer(model, args, train_dataset=data, teacher=teacher).train()
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        loss: str = "kl",
        exits: float | Sequence[float] = 0.0,
        exit_loss: str = "kl",
        exit_warm_up: int = 0,
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        check_choice(loss, LOSSES, owner, "loss")
        check_choice(exit_loss, LOSSES, owner, "exit_loss")
        _check_teacher(teacher, loss, owner)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(f"{owner}: compute_loss_func must be left out, it is the mixin's own")
        super().__init__(*args, compute_loss_func=self._loss_of_loops, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"{owner}: label_smoothing_factor must be 0, got {self.args.label_smoothing_factor}"
            )
        self._num_loops = Loops(self.model, owner).num_loops
        loop_coefficients(self._num_loops, exits, warm_up=exit_warm_up)
        _check_own_loss(self.model, owner)
        self.teacher = teacher
        if teacher is not None:
            teacher.eval()
            if getattr(teacher, "hf_device_map", None) is None:
                teacher.to(self.args.device)
        self._loss, self._exit_loss = loss, exit_loss
        self._exits, self._exit_warm_up = exits, exit_warm_up
        self._now: tuple[nn.Module, list[Tensor], dict[str, Any]] | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        if self.args.n_gpu > 1:
            raise RuntimeError(
                "RecursiveTrainerMixin: training must use at most one GPU per process, got "
                f"{self.args.n_gpu}; start it with torchrun"
            )
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if "labels" not in inputs:
            raise ValueError(
                f"RecursiveTrainerMixin: inputs must hold labels, got {', '.join(inputs)}"
            )
        given = {key: value for key, value in inputs.items() if key != "labels"}
        with collected_loops(model) as states:
            self._now = (model, states, given)
            try:
                # Calls the model, then _loss_of_loops, and scales by the Trainer's own rules.
                return super().compute_loss(model, {"use_cache": False, **inputs}, *args, **kwargs)
            finally:
                self._now = None

    def _loss_of_loops(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        assert self._now is not None
        model, states, given = self._now
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if not model.training:
            return loop_loss([logits], labels, num_items=num_items_in_batch).total
        coefficients = loop_coefficients(
            self._num_loops,
            self._exits,
            step=self.state.global_step,
            warm_up=self._exit_warm_up,
        )
        # The model's forward has a precision of its own, by accelerate: exits and teacher get it.
        with self.accelerator.autocast():
            return _loss_of(
                model,
                self.teacher,
                states,
                logits,
                given,
                labels,
                coefficients,
                self._loss,
                self._exit_loss,
                num_items_in_batch,
            ).total
