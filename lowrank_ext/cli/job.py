"""What all methods of a fine-tuning run share: the frozen model, the data, the device."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from lowrank_ext.cli.chat_template import use_template
from lowrank_ext.cli.checks import MOST
from lowrank_ext.cli.data import (
    Corpus,
    DataOptions,
    collate,
    load_corpus,
    pad_id_of,
)
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.files import MEBIBYTE, exists, read_json
from lowrank_ext.cli.interrupts import StopRequest
from lowrank_ext.cli.measure import frozen_loss, saved_bytes
from lowrank_ext.cli.methods import Entry, count
from lowrank_ext.cli.models import (
    CPU,
    CausalLM,
    LoadedModel,
    check_context,
    check_vocabulary,
    dtype_name,
    find_model,
    holds_quantized,
    load_model,
    resolve_adapter_dtype,
    resolve_device,
    resolve_dtype,
)
from lowrank_ext.cli.optimizers import require_package
from lowrank_ext.cli.processes import check_equal, num_processes
from lowrank_ext.cli.quantization import check_methods, num_quantized, weight_bytes
from lowrank_ext.cli.report import human_count
from lowrank_ext.cli.run_settings import RESULT
from lowrank_ext.cli.setting_checks import FLASH
from lowrank_ext.cli.settings import Settings
from lowrank_ext.cli.training.checkpoints import checkpoints
from lowrank_ext.cli.training.evaluation import Batch, training_loss
from lowrank_ext.cli.training.order import RowOrder
from lowrank_ext.cli.training.plan import Plan
from lowrank_ext.cli.training.progress import PROGRESS_NAME
from lowrank_ext.files import quoted


@dataclass
class Job:
    """What all methods of a run share.

    Attributes:
        base: never trained; methods train copies of it and are compared with it as the frozen
            model. With --fsdp it is the model that the method adapts and trains.
        held_out: the batches of all evaluations.
        frozen_saved_bytes: what the base keeps for backward; None where it was not measured.
        num_parameters, weight_bytes: of the base.
    """

    settings: Settings
    out: Path
    resume: bool
    console: Console
    stop: StopRequest
    device: torch.device
    base: CausalLM
    tokenizer: Any
    corpus: Corpus
    held_out: list[Batch] = dataclasses.field(init=False)
    frozen_saved_bytes: int | None = None
    num_parameters: int = dataclasses.field(init=False)
    weight_bytes: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.num_parameters = count(self.base.parameters())
        self.weight_bytes = weight_bytes(self.base)
        self.held_out = self.all_held_out()

    def all_held_out(self) -> list[Batch]:
        """The batches of all evaluations."""
        return held_out_batches(self.corpus, self.settings, self.collate)

    @property
    def batch(self) -> Batch:
        """The batch of all measurements: the first one."""
        settings = self.settings
        order = RowOrder(len(self.corpus.train), settings.seed, 0, settings.batch)
        return self.collate([self.corpus.train[index] for index in order])

    def collate(self, rows: list[Any]) -> Batch:
        """A batch of rows."""
        return collate(rows, pad_id_of(self.tokenizer))

    def frozen_loss(self) -> Tensor:
        """Loss of the frozen model on `batch`."""
        return frozen_loss(self.base, self.batch)

    def loss_of(self, model: CausalLM, entry: Entry) -> Callable[[], Tensor]:
        """The loss for backward of a model of the run, on `batch`."""
        return lambda: training_loss(model, self.batch, entry.training)[1]

    def plan(self, method: str) -> Plan:
        """The numbers of a method's training."""
        settings = self.settings
        shared = {field.name for field in dataclasses.fields(Plan)} - {
            "device",
            "half",
            "learning_rate",
            "betas",
        }
        return Plan(
            device=self.device,
            half=resolve_dtype(settings.dtype, self.device) is torch.float16,
            learning_rate=settings.learning_rate(method),
            betas=settings.adam_betas,
            **{name: getattr(settings, name) for name in shared},
        )

    def training_copy(self, entry: Entry) -> CausalLM:
        """The base model for a method to adapt: a copy, of its modules alone where the method
        leaves the weights as they are."""
        if self.settings.fsdp:
            return self.base
        if entry.changes_base(self.settings):
            return copy.deepcopy(self.base)
        shared: dict[int, Any] = {
            id(tensor): tensor for tensor in (*self.base.parameters(), *self.base.buffers())
        }
        return copy.deepcopy(self.base, shared)


def inputs_of(settings: Settings) -> list[str]:
    """What a run reads, which its --out must not be: data, base and the adapter it begins with."""
    adapter = [settings.adapter] if settings.adapter else []
    return [*settings.text, *settings.eval, find_model(settings.model).location, *adapter]


def rows_per_step(settings: Settings) -> int:
    """Rows of an optimizer step, over all processes."""
    return settings.batch * settings.accumulate * num_processes()


def prepare(
    settings: Settings, out: Path, resume: bool, console: Console, stop: StopRequest
) -> Job:
    """Loads model and data, with all checks that are possible before the first step."""
    if resume:
        settings = with_rows_of_run(settings, out)
    loaded, device = load_base(settings, console)
    corpus = load_corpus(DataOptions.of(settings), loaded.tokenizer, loaded.model, console)
    check_vocabulary(loaded.model, corpus.largest_id)
    check_equal("the rows of --text", corpus.digest())
    job = make_job(Job, settings, out, resume, console, stop, loaded, corpus, device)
    if settings.compile:
        job.base.compile()
    describe(job)
    if not settings.fsdp:
        job.frozen_saved_bytes = saved_bytes(job.base, job.frozen_loss)
    return job


def load_base(settings: Settings, console: Console) -> tuple[LoadedModel, torch.device]:
    """The model of a run on its device, with the checks of what the run asks of it."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    source, device = find_model(settings.model, settings.revision), resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    resolve_adapter_dtype(settings.adapter_dtype, dtype)
    check_half(settings, dtype, device)
    check_early_stop(settings)
    check_attention(settings.attention, dtype, device)
    linears = "" if settings.quantize is None else f", its linears in {settings.quantize}"
    console.print(f"loading {source.name} in {dtype_name(dtype)}{linears}", markup=False)
    where = CPU if settings.fsdp else device
    loaded = load_model(source, dtype, where, settings.quantize, settings.attention)
    if settings.chat_template is not None:
        use_template(loaded.tokenizer, settings.chat_template)
    if holds_quantized(loaded.model):
        check_methods(settings, f"{source.name} is quantized")
        if settings.fsdp:
            raise UserError(f"{source.name} is quantized, which --fsdp cannot share out")
    check_context(loaded.model, settings.seq_len)
    return loaded, device


def with_rows_of_run(settings: Settings, out: Path) -> Settings:
    """The settings of a resumed run for the processes that it has now: --accumulate becomes what
    gives a step its rows. Raises UserError where they cannot be shared among the processes."""
    rows, processes = rows_of_run(settings, out), num_processes()
    if rows is None or rows == rows_per_step(settings):
        return settings
    accumulate, rest = divmod(rows, settings.batch * processes)
    if rest:
        batches = rows // settings.batch
        able = [str(n) for n in range(1, batches + 1) if batches % n == 0]
        raise UserError(
            f"--resume: a step of the run has {rows} rows in batches of {settings.batch}, which "
            f"{processes} processes cannot share; start {' or '.join(able)}"
        )
    return dataclasses.replace(settings, accumulate=accumulate)


def rows_of_run(settings: Settings, out: Path) -> int | None:
    """Rows of a step of the run in `out`; None where it has neither a checkpoint nor a result."""
    for method in settings.methods:
        directory = settings.method_directory(out, method)
        files = [path / PROGRESS_NAME for path in checkpoints(directory)]
        for path in (*files, directory / RESULT):
            if exists(str(path), path):
                rows = read_json(path).get("rows_per_step")
                if type(rows) is not int or rows < 1 or rows % settings.batch:
                    raise UserError(
                        f"{path}: rows_per_step must be a multiple of --batch {settings.batch}, "
                        f"got {quoted(rows)}"
                    )
                return rows
    return None


def with_known_steps(settings: Settings, rows: int) -> Settings:
    """The settings with the steps of --epochs over so many rows, if they have them."""
    if settings.epochs is None:
        return settings
    steps = settings.epochs * rows / rows_per_step(settings)
    if steps > MOST:
        raise UserError(
            f"--epochs must be at most {MOST} steps, got {settings.epochs:g}, {steps:g} of them"
        )
    return settings.with_steps(math.ceil(steps))


def check_half(settings: Settings, dtype: torch.dtype, device: torch.device) -> None:
    """Raises UserError for fp16 where its gradients cannot be scaled."""
    if dtype is not torch.float16 or settings.methods == ("frozen",):
        return
    if device.type == "cpu":
        raise UserError("--dtype fp16 trains on a GPU alone; give bf16 or fp32")
    if settings.adapter_dtype == "base" or "full" in settings.methods:
        raise UserError("--dtype fp16: what trains must be in fp32, see --adapter-dtype; give bf16")


def check_attention(attention: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raises UserError for an attention that this machine or dtype has not."""
    if attention != FLASH:
        return
    if device.type != "cuda":
        raise UserError(f"--attention {FLASH} needs a GPU, the run is on {device}; give sdpa")
    if dtype is torch.float32:
        raise UserError(f"--attention {FLASH} needs --dtype bf16 or fp16, got fp32")
    require_package(f"--attention {FLASH}", "flash-attn", "flash_attn")


def check_early_stop(settings: Settings) -> None:
    """Raises UserError for a method whose later stages cannot go back to an earlier one."""
    staged = [recipe.name for recipe in settings.recipes() if recipe.training.stages]
    if settings.early_stop is not None and staged:
        raise UserError(f"--early-stop: {staged[0]} trains in stages, which all must end")


Kind = TypeVar("Kind", bound=Job)


def make_job(
    kind: type[Kind],
    settings: Settings,
    out: Path,
    resume: bool,
    console: Console,
    stop: StopRequest,
    loaded: LoadedModel,
    corpus: Any,
    device: torch.device,
) -> Kind:
    """A job whose base is frozen, and whose settings have the steps of --epochs."""
    return kind(
        settings=with_known_steps(settings, len(corpus.train)),
        out=out,
        resume=resume,
        console=console,
        stop=stop,
        device=device,
        base=loaded.model.requires_grad_(False),
        tokenizer=loaded.tokenizer,
        corpus=corpus,
    )


def held_out_batches(corpus: Any, settings: Any, collate: Any) -> list[Batch]:
    """At most --eval-batches batches of --batch rows, the last of which may be shorter."""
    rows, size = len(corpus.held_out), settings.batch
    starts = range(0, rows, size)
    return [
        collate([corpus.held_out[index] for index in range(start, min(start + size, rows))])
        for start in starts[: settings.eval_batches]
    ]


def describe(job: Job) -> None:
    """Prints what is trained, and the table of the data."""
    settings = job.settings
    accumulated = f" x {settings.accumulate}" if settings.accumulate > 1 else ""
    processes = f" x {num_processes()} processes" if num_processes() > 1 else ""
    where = f"{torch.get_num_threads()} threads" if job.device.type == "cpu" else str(job.device)
    job.console.print(
        f"{human_count(job.num_parameters)} parameters{_quantized(job)}, {where}; "
        f"rank {settings.rank}, scaling {settings.scaling():g}, dropout {settings.dropout_text()}, "
        f"{settings.targets}{_details(settings)}\n"
        f"{job.corpus.description}; {settings.steps} steps of {settings.batch}{accumulated}"
        f"{processes} rows of at most {settings.seq_len} tokens{_evaluated(job)}",
        markup=False,
        soft_wrap=True,
    )
    job.console.print(job.corpus.report.table())


def _evaluated(job: Job) -> str:
    """What evaluations leave out, if they do."""
    rows, read = len(job.corpus.held_out), sum(len(each["input_ids"]) for each in job.held_out)
    if read >= rows:
        return ""
    return f"; evaluated on {read:,} of {rows:,} held-out rows (--eval-batches)"


def _quantized(job: Job) -> str:
    """Of a quantized base, what is and what all weights take."""
    quantized = num_quantized(job.base)
    if not quantized:
        return ""
    size = job.weight_bytes / MEBIBYTE
    return f", {human_count(quantized)} of them quantized, in {size:,.1f} MiB"


def _details(settings: Settings) -> str:
    """The methods' clauses for the line; equal ones appear once."""
    clauses = (recipe.describe(settings) for recipe in settings.recipes())
    return "".join(f"; {clause}" for clause in dict.fromkeys(clauses) if clause is not None)
