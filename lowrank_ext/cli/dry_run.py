"""`--dry-run`: what would train, and the memory and time of a step, without training."""

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_ext.cli.comparison import adapted_model
from lowrank_ext.cli.files import MEBIBYTE
from lowrank_ext.cli.job import Job
from lowrank_ext.cli.measure import milliseconds, release_memory, saved_bytes
from lowrank_ext.cli.methods import Entry, count, trainable_parameters
from lowrank_ext.cli.quantization import weight_bytes
from lowrank_ext.cli.report import human_count

# AdamW's two moments, in fp32; of a parameter in half precision an fp32 value too.
_MOMENT_BYTES = 2 * 4
_MASTER_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """Bytes of one method's step on the device, and its time.

    Attributes:
        trained: number of elements that train.
        tensors: number of tensors that train.
        weights: all parameters, the frozen ones once where both models share them.
        gradients, optimizer: of what trains.
        kept: what forward keeps for backward, measured.
        step_ms: forward + backward of the batches of a step, from one batch, measured once.
    """

    method: str
    trained: int
    tensors: int
    weights: int
    gradients: int
    optimizer: int
    kept: int
    step_ms: float

    @property
    def total(self) -> int:
        """The sum; temporary buffers of an op come on top."""
        return self.weights + self.gradients + self.optimizer + self.kept


def show(job: Job, console: Console, entries: list[Entry]) -> None:
    """Prints an estimate of every entry of the run."""
    estimates = [estimate(job, each) for each in entries]
    console.print(table(job, estimates))
    console.print("nothing was trained and nothing was written: --dry-run", markup=False)


def estimate(job: Job, found: Entry) -> Estimate:
    """Builds a method's model and runs one forward and backward."""
    release_memory()
    accumulate = job.settings.accumulate
    if not found.trains:
        return Estimate(
            method=found.name,
            trained=0,
            tensors=0,
            weights=weight_bytes(job.base),
            gradients=0,
            optimizer=0,
            kept=job.frozen_saved_bytes or 0,
            step_ms=accumulate * milliseconds(job.frozen_loss),
        )
    model = adapted_model(job, found)
    loss = job.loss_of(model, found)
    trained = trainable_parameters(model)
    halves = count(p for p in trained if p.element_size() == 2)
    beside = weight_bytes(job.base) if found.changes_base(job.settings) else 0
    return Estimate(
        method=found.name,
        trained=count(trained),
        tensors=len(trained),
        weights=weight_bytes(model) + beside,
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=count(trained) * _MOMENT_BYTES + halves * _MASTER_BYTES,
        kept=saved_bytes(model, loss),
        step_ms=accumulate * milliseconds(loss),
    )


_COLUMNS = ("trained", "tensors", "weights", "gradients", "optimizer", "kept", "in all", "a step")


def table(job: Job, estimates: list[Estimate]) -> Table:
    """A row per method; bytes in MiB."""
    settings = job.settings
    caption = (
        f"MiB on {job.device}, for AdamW; kept: by forward for its backward, measured on the first "
        f"batch of {settings.batch} rows; weights: with the frozen model's, which methods share "
        "unless they change it; buffers within an op come on top. A step: forward + backward, "
        f"measured once; the run has {settings.steps} of them."
    )
    found = Table(
        title=Text("What would train"),
        title_justify="left",
        caption=Text(caption),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    found.add_column("method", no_wrap=True)
    for name in _COLUMNS:
        found.add_column(name, justify="right", no_wrap=True)
    for each in estimates:
        sizes = (each.weights, each.gradients, each.optimizer, each.kept, each.total)
        found.add_row(
            each.method,
            human_count(each.trained),
            str(each.tensors),
            *(f"{size / MEBIBYTE:,.1f}" for size in sizes),
            f"{each.step_ms / 1e3:,.2f} s",
        )
    return found
