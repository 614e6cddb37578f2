"""The numbers of a training that every command has, and transformers' arguments made of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowrank_ext.cli.models import CPU

if TYPE_CHECKING:
    from transformers import TrainingArguments

NUM_EVALUATIONS = 4
ADAMW = "adamw"  # ours, in optimizer.py; every other name is transformers'


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a training goes.

    Attributes:
        steps: optimizer steps of all stages.
        batch: rows of a process in one forward.
        accumulate: forwards of a process per step.
        warmup: fraction of the steps, or from 1 on their number.
        min_lr: where cosine ends, as a fraction of the learning rate.
        clip: largest norm of the gradient; 0: any.
        betas, eps: of the optimizers that have them; None: their own.
        neftune: alpha of the noise on the embeddings in training; None: no noise.
        eval_every: steps between evaluations; None: four evaluations.
        early_stop: evaluations without a better loss after which training ends; None: never.
        save_every: steps between checkpoints; 0: at the end and when stopped.
        keep: checkpoints that stay.
        log_to: names of transformers' integrations.
        log_every: steps between what they get.
        run_name: what they call the run; None: their own choice.
        device: where one process trains; several have one each.
        half: whether the model is in fp16, whose gradients are scaled.
        fsdp: whether the processes share the model's parameters (FSDP2).
    """

    steps: int
    batch: int
    seed: int
    learning_rate: float
    accumulate: int = 1
    warmup: float = 0.1
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    min_lr: float = 0.0
    optimizer: str = ADAMW
    betas: tuple[float, float] | None = None
    eps: float | None = None
    neftune: float | None = None
    eval_every: int | None = None
    early_stop: int | None = None
    save_every: int = 0
    keep: int = 1
    log_to: tuple[str, ...] = ()
    log_every: int = 1
    run_name: str | None = None
    device: torch.device = CPU
    half: bool = False
    fsdp: bool = False

    @property
    def evaluation_steps(self) -> int:
        """Steps between evaluations."""
        return self.eval_every or max(1, -(-self.steps // NUM_EVALUATIONS))

    def is_evaluated(self, step: int) -> bool:
        """Whether the held-out loss is computed after a step."""
        return step > 0 and (step % self.evaluation_steps == 0 or step == self.steps)

    def warmup_steps(self, steps: int) -> int:
        """Steps of the warm-up in a stage of ``steps``."""
        return round(self.warmup * steps) if self.warmup < 1 else min(int(self.warmup), steps)


def training_arguments(
    plan: Plan, steps: int, directory: Path, kind: Any = None, **more: Any
) -> "TrainingArguments":
    """transformers' arguments for a stage of ``steps``. Evaluations and checkpoints are not asked
    of them: their steps count over all stages.

    Args:
        kind: a subclass of TrainingArguments to make.
        more: its own arguments, and others.
    """
    from transformers import TrainingArguments

    on_cpu = plan.device.type == "cpu"
    arguments = (kind or TrainingArguments)(
        output_dir=str(directory),
        per_device_train_batch_size=plan.batch,
        gradient_accumulation_steps=plan.accumulate,
        max_steps=steps,
        learning_rate=plan.learning_rate,
        warmup_steps=plan.warmup_steps(steps),
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.clip,
        optim="adamw_torch" if plan.optimizer == ADAMW else plan.optimizer,
        fp16=plan.half,
        seed=plan.seed % 2**32,
        logging_strategy="steps",
        logging_steps=plan.log_every,
        run_name=plan.run_name,
        neftune_noise_alpha=plan.neftune,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=list(plan.log_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        **_rates(plan),
        **more,
    )
    if plan.device.type == "cuda" and arguments.world_size == 1:
        _use_one_gpu(arguments, plan.device)
    return arguments


def _rates(plan: Plan) -> dict[str, Any]:
    """The schedule of the learning rate, and what Adam averages over."""
    found: dict[str, Any] = {"lr_scheduler_type": plan.schedule}
    if plan.min_lr:
        found |= {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": plan.min_lr},
        }
    if plan.betas is not None:
        found |= dict(zip(("adam_beta1", "adam_beta2"), plan.betas, strict=True))
    if plan.eps is not None:
        found["adam_epsilon"] = plan.eps
    return found


def _use_one_gpu(arguments: "TrainingArguments", device: torch.device) -> None:
    """transformers takes cuda:0, and nn.DataParallel over all GPUs that it sees: a process of ours
    uses the one that --device names."""
    torch.cuda.set_device(device)
    arguments._n_gpu = 1
    vars(arguments)["_setup_devices"] = device  # what its cached property has computed
