"""The training loop: AdamW on fp32 values, warm-up and cosine, clipping, gradual freezing, all
resumable."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.cli.data.blocks import TokenBlocks
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.interrupts import StopRequest, Terminated
from lowrank_ext.cli.methods import Entry, base_dtype, trainable_parameters
from lowrank_ext.cli.models import CausalLM
from lowrank_ext.cli.settings import Settings
from lowrank_ext.recipe import Training

WARM_UP_FRACTION = 0.1
MAX_GRAD_NORM = 1.0
# fp16 gradients below 6e-8 are lost; a constant factor suffices for the small range of adapter
# gradients.
FP16_LOSS_SCALE = 1024.0
NUM_EVALUATIONS = 4


def training_loss(model: CausalLM, tokens: Tensor, training: Training) -> tuple[Tensor, Tensor]:
    """`model_loss`, and the loss for backward, which includes the method's extra loss."""
    loss = model_loss(model, tokens)
    return loss, loss if training.extra_loss is None else loss + training.extra_loss(model)


def model_loss(model: CausalLM, tokens: Tensor) -> Tensor:
    """Mean next-token cross entropy of tokens [batch, seq_len]."""
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


@torch.no_grad()
def count_experts(
    model: CausalLM, batches: list[Tensor], training: Training
) -> dict[str, list[int]] | None:
    """Number of tokens of the batches that each expert gets, by module; None without experts."""
    if training.expert_load is None:
        return None
    with training.expert_load(model) as load:
        held_out_loss(model, batches)
    return {path: counts.tolist() for path, counts in load.counts.items()}


@torch.no_grad()
def held_out_loss(model: CausalLM, batches: list[Tensor]) -> float:
    """Mean loss over the batches in evaluation mode; the model goes back to training mode."""
    model.eval()
    try:
        losses = [model_loss(model, tokens).item() for tokens in batches]
    finally:
        model.train()
    rows = [tokens.shape[0] for tokens in batches]
    return sum(loss * n for loss, n in zip(losses, rows, strict=True)) / sum(rows)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth, then cosine to zero; a function of the step alone."""
    warm_up = max(1, round(WARM_UP_FRACTION * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class Optimizer:
    """AdamW in fp32. A bf16 or fp16 parameter has an fp32 master that is rounded into it once per
    step, so that small updates are not lost; the same for every method."""

    def __init__(
        self, groups: Sequence[tuple[list[nn.Parameter], float]], loss_scale: float
    ) -> None:
        self.parameters = [parameter for parameters, _ in groups for parameter in parameters]
        self.loss_scale = loss_scale
        self.masters = [
            parameter
            if parameter.dtype is torch.float32
            else nn.Parameter(parameter.detach().float())
            for parameter in self.parameters
        ]
        masters = iter(self.masters)
        self.adamw = torch.optim.AdamW(
            [
                {"params": [next(masters) for _ in parameters], "lr": lr, "peak_lr": lr}
                for parameters, lr in groups
            ],
            weight_decay=0.0,
            fused=True,
        )

    def step(self, factor: float) -> bool:
        """One update at peak_lr · factor, clipped; False when it was skipped because fp16
        overflowed."""
        self._grads_to_masters()
        norm = nn.utils.clip_grad_norm_(self.masters, MAX_GRAD_NORM)
        finite = bool(torch.isfinite(norm))
        if finite:
            for group in self.adamw.param_groups:
                group["lr"] = group["peak_lr"] * factor
            self.adamw.step()
            self._masters_to_parameters()
        self.adamw.zero_grad(set_to_none=True)
        return finite

    def _grads_to_masters(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
            if master.grad is not None and self.loss_scale != 1:
                master.grad.div_(self.loss_scale)

    @torch.no_grad()
    def _masters_to_parameters(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and master.grad is not None:
                parameter.copy_(master)

    def forget_frozen(self) -> None:
        """Drops the moments of frozen parameters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if not parameter.requires_grad:
                master.grad = None
                self.adamw.state.pop(master, None)

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state and the fp32 masters."""
        pairs = zip(self.parameters, self.masters, strict=True)
        masters = [None if master is parameter else master.detach() for parameter, master in pairs]
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, see `checkpoints.check_optimizer_state`."""
        self.adamw.load_state_dict(state["adamw"])
        for master, stored in zip(self.masters, state["masters"], strict=True):
            if stored is not None:
                master.copy_(stored)


@dataclass
class Progress:
    """Steps, losses and times of a run so far; stored in checkpoints."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    trainable_at_start: int = 0
    saved_bytes_at_start: int = 0
    expert_load_at_start: dict[str, list[int]] | None = None


@dataclass
class Events:
    """Callbacks of `train`: after a step and for a checkpoint; and the signals that stop it."""

    on_step: Callable[[Progress], None]
    on_checkpoint: Callable[["Trainer"], None]
    stop: StopRequest


class Trainer:
    """Model, optimizer, schedule and progress of one method."""

    def __init__(self, entry: Entry, model: CausalLM, settings: Settings) -> None:
        self.entry = entry
        self.training = entry.training
        self.model = model
        self.settings = settings
        self.progress = Progress()
        self.saved_step = -1
        self.stop = StopRequest()
        self.optimizer = self._new_optimizer()
        self.freezing = self.training.schedule(model, settings)

    def _new_optimizer(self) -> Optimizer:
        """An optimizer of the parameters that train now."""
        loss_scale = FP16_LOSS_SCALE if base_dtype(self.model) is torch.float16 else 1.0
        return Optimizer(self._parameter_groups(), loss_scale)

    def _parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """(parameters, learning rate) pairs, those with the run's rate first."""
        rate = self.settings.learning_rate(self.entry.name)
        groups = self.training.parameter_groups(self.model)
        named = {id(parameter) for parameters, _ in groups for parameter in parameters}
        others = [p for p in trainable_parameters(self.model) if id(p) not in named]
        pairs = [(others, rate), *((parameters, factor * rate) for parameters, factor in groups)]
        return [(parameters, own_rate) for parameters, own_rate in pairs if parameters]

    def loss(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The loss that is reported, and the one for backward."""
        return training_loss(self.model, tokens, self.training)

    def train_step(self, tokens: Tensor) -> float:
        """Forward, backward, update. Raises UserError when loss or gradient are not finite. A stop
        before the update leaves the state of the step before."""
        step, generator = self.progress.step, torch.get_rng_state()
        try:
            return self._train_step(tokens)
        except Terminated:
            if self.progress.step == step:
                torch.set_rng_state(generator)
            raise

    def _train_step(self, tokens: Tensor) -> float:
        started = time.perf_counter()
        loss, total = self.loss(tokens)
        self._check_finite("loss", math.isfinite(total.item()))
        torch.autograd.backward(total * self.optimizer.loss_scale)
        with self.stop.undisturbed():
            updating = time.perf_counter()
            self._update()
            ended = time.perf_counter()
            self.progress.losses.append(loss.item())
            self.progress.step_seconds.append(ended - started)
            self.progress.optimizer_seconds.append(ended - updating)
            self.progress.step += 1
        return loss.item()

    def _update(self) -> None:
        if self.freezing is not None and self.freezing.before_optimizer:
            self.freezing.step()  # before the update, which frozen parameters must not get
        factor = learning_rate_factor(*self._stage_position())
        updated = self.optimizer.step(factor)
        # A scaled gradient may overflow occasionally; that step is skipped.
        self._check_finite("gradient", updated or self.optimizer.loss_scale != 1)
        self.progress.skipped_steps += not updated
        if self.freezing is not None:
            if not self.freezing.before_optimizer:
                self.freezing.step()  # writes frozen values back
            self.optimizer.forget_frozen()

    def _stage_position(self) -> tuple[int, int]:
        """Step and number of steps of the present stage, or of a training without stages."""
        step, stages = self.progress.step, self.training.stages
        if not stages:
            return step, self.settings.steps
        present = self.training.stage_of(self.model)
        before = sum(stage.num_steps(self.settings) for stage in stages[:present])
        return step - before, stages[present].num_steps(self.settings)

    def _enter_stage(self) -> None:
        """Begins the next stage if the present one has had all its steps."""
        stages, present = self.training.stages, self.training.stage_of(self.model)
        if present + 1 >= len(stages):
            return
        step, steps = self._stage_position()
        if step >= steps:
            with self.stop.undisturbed():
                stages[present + 1].begin(self.model)
                self.optimizer = self._new_optimizer()

    def next_batch(self, corpus: TokenBlocks) -> Tensor:
        """The batch of the next step, as transformed by its stage."""
        settings, step = self.settings, self.progress.step
        tokens = corpus.train_batch(step, settings.batch, settings.seed)
        stages = self.training.stages
        if not stages:
            return tokens
        return stages[self.training.stage_of(self.model)].batch(tokens, settings, step)

    def _check_finite(self, what: str, finite: bool) -> None:
        if not finite:
            raise UserError(
                f"{self.entry.name}: the {what} is not finite at step {self.progress.step + 1}; "
                "try a smaller --lr"
            )

    def evaluate(self, batches: list[Tensor]) -> None:
        """Appends (step, held-out loss) to the progress."""
        self.progress.held_out.append((self.progress.step, held_out_loss(self.model, batches)))

    def train(self, corpus: TokenBlocks, batches: list[Tensor], events: Events) -> bool:
        """Steps until the end or until a signal; False when stopped early."""
        self.stop = events.stop
        try:
            with events.stop.leaving_at_any_point():
                return self._train(corpus, batches, events)
        except Terminated:
            if self.saved_step != self.progress.step:
                events.on_checkpoint(self)
            return False

    def _train(self, corpus: TokenBlocks, batches: list[Tensor], events: Events) -> bool:
        settings = self.settings
        self._evaluate_when_due(batches)  # a stop may have cut it off
        while self.progress.step < settings.steps:
            self._enter_stage()
            self.train_step(self.next_batch(corpus))
            step = self.progress.step
            events.on_step(self.progress)
            self._evaluate_when_due(batches)
            last, stop = step == settings.steps, events.stop.requested
            if last or stop or (settings.save_every and step % settings.save_every == 0):
                with events.stop.undisturbed():
                    events.on_checkpoint(self)
                    self.saved_step = step
            if stop:
                return last
        return True

    def _evaluate_when_due(self, batches: list[Tensor]) -> None:
        step, steps, held_out = self.progress.step, self.settings.steps, self.progress.held_out
        every = max(1, math.ceil(steps / NUM_EVALUATIONS))
        done = bool(held_out) and held_out[-1][0] == step
        if step > 0 and not done and (step % every == 0 or step == steps):
            self.evaluate(batches)
