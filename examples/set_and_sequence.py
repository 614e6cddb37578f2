"""Set-and-Sequence on a small video diffusion transformer: a clip's appearance, then its motion.

The base model is trained first: diffusers' WanTransformer3DModel with random weights learns clips
of discs and squares that drift in straight lines. Then one clip is learned in the method's two
stages (arXiv 2502.14844): a two-colored ring on a path that no clip of the base model has. Stage 1
sees its frames one by one, unordered; stage 2 sees the clip and trains the motion residual alone,
over the basis of stage 1.

    python examples/set_and_sequence.py --out build/examples
"""

import copy
import io
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import WanTransformer3DModel
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lowrank_ext as lr

FRAMES, SIZE = 8, 12
REACH, RADIUS = 3.0, 2.6  # pixels
TEXT_DIM = 32
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
RANK = 16
# The paper masks 80 % of the coefficients in stage 1 and 50 % in stage 2, in longer training.
MASK = 0.1
STEPS, QUICK_STEPS = (1000, 500, 900), (6, 6, 6)  # base model, stage 1, stage 2
SAMPLES, EULER_STEPS, SHIFT = 4, 20, 3.0
console = Console()
app = typer.Typer(add_completion=False)


# --------------------------------------------------------------------------------------- clips


def draw(centers: Tensor, shape: Callable[[Tensor, Tensor], Tensor], colors: Tensor) -> Tensor:
    """Frames [3, F, H, W] in [-1, 1]; `shape` gives each color's coverage around the centers."""
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    covers = shape(y - centers[:, 0, None, None], x - centers[:, 1, None, None])
    frames = -torch.ones(3, len(centers), SIZE, SIZE)
    for cover, color in zip(covers, colors, strict=True):  # [F, H, W], [3]
        frames = frames + cover * (color[:, None, None, None] - frames)
    return frames


def soft(distance: Tensor) -> Tensor:
    """1 inside (distance < 0), 0 outside, with an edge of about one pixel."""
    return torch.sigmoid(-3 * distance)


def drifting_clip(is_square: Tensor, color: Tensor, motion: Tensor, frames: int) -> Tensor:
    """A clip for the base model: one color [3] on a line; motion is position and velocity."""
    times = torch.linspace(-1, 1, frames) if frames > 1 else torch.zeros(1)
    centers = REACH * (motion[:2] + times.unsqueeze(1) * motion[2:])

    def shape(y: Tensor, x: Tensor) -> Tensor:
        distance = torch.maximum(y.abs(), x.abs()) if is_square else torch.hypot(y, x)
        return soft(distance - RADIUS).unsqueeze(0)

    return draw(centers, shape, color.unsqueeze(0))


def target_clip() -> Tensor:
    """The concept: an orange ring with a blue core that swings through three quarters of a turn."""
    angle = torch.linspace(0, 1.5 * math.pi, FRAMES)
    centers = REACH * torch.stack([torch.sin(angle), torch.cos(angle)], dim=1)

    def shape(y: Tensor, x: Tensor) -> Tensor:
        distance = torch.hypot(y, x)
        return torch.stack([soft(distance - RADIUS), soft(distance - RADIUS / 2)])

    return draw(centers, shape, torch.tensor([[1.0, 0.2, -0.9], [-0.9, 0.0, 1.0]]))


# --------------------------------------------------------------------------------- model, loss


class Prompts(nn.Module):
    """Replaces a text encoder: three tokens that describe shape, color and motion.

    The concept has the rare tokens [v] for its color and, in a dynamic prompt, [u] for its motion.
    They start at zero, as the paper's [v] does, and are trained.
    """

    shapes: Tensor
    colors: Tensor
    motions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shapes", torch.randn(2, TEXT_DIM))
        self.register_buffer("colors", torch.randn(3, TEXT_DIM))
        self.register_buffer("motions", torch.randn(4, TEXT_DIM))
        self.v = nn.Parameter(torch.zeros(TEXT_DIM))
        self.u = nn.Parameter(torch.zeros(TEXT_DIM))

    def describe(self, is_square: Tensor, color: Tensor, motion: Tensor) -> Tensor:
        """Text [B, 3, TEXT_DIM] of drifting shapes."""
        tokens = [self.shapes[is_square.long()], color @ self.colors, motion @ self.motions]
        return torch.stack(tokens, dim=1)

    def concept(self, batch: int, dynamic: bool = False) -> Tensor:
        """Text [B, 3, TEXT_DIM] of the concept."""
        motion = self.u if dynamic else torch.zeros_like(self.u)
        return torch.stack([self.shapes[0], self.v, motion]).expand(batch, -1, -1)

    @torch.no_grad()
    def text(self, batch: int, dynamic: bool = False) -> Tensor:
        """The same without a graph."""
        return self.concept(batch, dynamic)


def video_model() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=9,  # three colors, and six for the pixel's position and time
        out_channels=3,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=256,
        num_layers=2,
        rope_max_seq_len=32,
    )


def velocity(model: nn.Module, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The model's velocity at clips [B, 3, F, H, W].

    Its attention has relative positions only, so that it could not learn a path: waves along time,
    height and width are added as six more channels. A single frame is at time 0.
    """
    batch, _, frames, _, _ = noisy.shape
    times = torch.linspace(-1, 1, frames) if frames > 1 else torch.zeros(1)
    axis = torch.linspace(-1, 1, SIZE)
    places = torch.stack(torch.meshgrid(times, axis, axis, indexing="ij"))
    waves = torch.cat([torch.sin(math.pi * places), torch.cos(math.pi * places)])
    located = torch.cat([noisy, waves.expand(batch, -1, -1, -1, -1)], dim=1)
    predicted: Tensor = model(located, timestep=1000 * t, encoder_hidden_states=text).sample
    return predicted


def shifted(t: Tensor) -> Tensor:
    """t shifted towards 1, where the noise hides all but position and color."""
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def flow_loss(
    model: nn.Module, clips: Tensor, text: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Flow matching: the velocity noise - clip at (1 - t) clip + t noise, mean squared error."""
    noise = torch.randn(clips.shape, generator=generator)
    t = shifted(torch.rand(len(clips), generator=generator))
    weight = t[:, None, None, None, None]
    predicted = velocity(model, (1 - weight) * clips + weight * noise, t, text)
    return (predicted - (noise - clips)).square().mean()


@torch.no_grad()
def sample(model: nn.Module, text: Tensor) -> Tensor:
    """Clips [B, 3, F, H, W] for text [B, …], by Euler's method from fixed noise."""
    model.eval()
    clips = torch.randn(
        len(text), 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(1)
    )
    times = shifted(torch.linspace(1, 0, EULER_STEPS + 1))
    for t, following in itertools.pairwise(times):
        clips = clips + (following - t) * velocity(model, clips, t.expand(len(text)), text)
    return clips


@torch.no_grad()
def fixed_loss(model: nn.Module, clips: Tensor, text: Tensor) -> float:
    """Loss without masks on fixed noise."""
    model.eval()
    generator = torch.Generator().manual_seed(2)
    losses = [flow_loss(model, clips, text, generator) for _ in range(8)]
    return torch.stack(losses).mean().item()


def train(
    name: str,
    model: nn.Module,
    groups: list[dict[str, object]],
    steps: int,
    batch: Callable[[], tuple[Tensor, Tensor]],
) -> list[float]:
    """AdamW with the paper's betas and weight decay; the loss of each step."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps, pct_start=0.1
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    model.train()
    for _ in track(range(steps), name, console=console, transient=True):
        loss = flow_loss(model, *batch())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
    return losses


def trainable(model: nn.Module, rate: float) -> dict[str, object]:
    return {"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}


# -------------------------------------------------------------------------------------- stages


def pretrain(model: nn.Module, prompts: Prompts, steps: int) -> list[float]:
    """The base model: single frames and clips of drifting discs and squares."""
    step = iter(range(steps))

    def batch() -> tuple[Tensor, Tensor]:
        frames, size = (1, 32) if next(step) % 4 == 0 else (FRAMES, 8)
        is_square = torch.rand(size) < 0.5
        color, motion = (2 * torch.rand(size, n) - 1 for n in (3, 4))
        drawn = zip(is_square, color, motion, strict=True)
        clips = torch.stack([drifting_clip(*values, frames) for values in drawn])
        return clips, prompts.describe(is_square, color, motion)

    return train("base model", model, [trainable(model, 2e-3)], steps, batch)


def set_stage(model: nn.Module, prompts: Prompts, clip: Tensor, steps: int) -> list[float]:
    """Stage 1: the clip's frames as single images, a random choice of them in each step."""
    frames = clip.transpose(0, 1).unsqueeze(2)  # [F, 3, 1, H, W]

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(FRAMES, (16,))
        return frames[chosen], prompts.concept(16)

    groups = [trainable(model, 1e-2), {"params": [prompts.v], "lr": 4e-3}]
    return train("stage 1, set", model, groups, steps, batch)


def sequence_stage(model: nn.Module, prompts: Prompts, clip: Tensor, steps: int) -> list[float]:
    """Stage 2: the whole clip; only the motion residual and the token [u] train."""
    lr.motion.begin_residual_stage(model, "swing")
    prompts.v.requires_grad_(False)

    def batch() -> tuple[Tensor, Tensor]:
        return clip.expand(4, -1, -1, -1, -1), prompts.concept(4, dynamic=True)

    groups = [trainable(model, 1e-2), {"params": [prompts.u], "lr": 4e-3}]
    return train("stage 2, sequence", model, groups, steps, batch)


# ------------------------------------------------------------------------------------- pictures


def errors(clips: Tensor, target: Tensor) -> tuple[float, float]:
    """(look, motion): error of each frame to the target's nearest frame, and to the same frame."""
    pairs = (clips.unsqueeze(3) - target.unsqueeze(1)).square().mean(dim=(1, 4, 5))  # [B, F, F]
    return pairs.min(dim=2).values.mean().item(), pairs.diagonal(dim1=1, dim2=2).mean().item()


def write_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def frame_grid(rows: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(1.1 * FRAMES + 1.6, 1.2 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), FRAMES, squeeze=False)
    for row, (title, clip) in zip(axes, rows.items(), strict=True):
        for index, axis in enumerate(row):
            axis.imshow((clip[:, index].permute(1, 2, 0).clamp(-1, 1).numpy() + 1) / 2)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
    return figure


def loss_figure(stages: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(4 * len(stages), 3.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(stages))
    for axis, (title, losses) in zip(panels, stages.items(), strict=True):
        axis.plot(losses, linewidth=0.8)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("flow-matching loss")
    return figure


def losses_table(measured: dict[str, tuple[float, float]]) -> Table:
    table = Table(
        title="flow-matching loss on the data of each stage, noise the same before and after"
    )
    for heading in ("stage", "before", "after"):
        table.add_column(heading)
    for stage, (before, after) in measured.items():
        table.add_row(stage, f"{before:.4f}", f"{after:.4f}")
    return table


def errors_table(clips: dict[str, Tensor], target: Tensor) -> Table:
    table = Table(title=f"mean squared error of {SAMPLES} sampled clips; pixels are in [-1, 1]")
    for heading in ("sampled by", "look: to the nearest frame", "motion: to its own frame"):
        table.add_column(heading)
    for title, sampled in clips.items():
        look, motion = errors(sampled, target)
        table.add_row(title, f"{look:.4f}", f"{motion:.4f}")
    return table


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Where the pictures and the LoRA go.")] = Path(
        "build/examples"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of each stage, which learn little.")
    ] = False,
) -> None:
    """Learn one clip in two stages and show the frames that each stage samples."""
    torch.manual_seed(0)
    base_steps, set_steps, sequence_steps = QUICK_STEPS if quick else STEPS
    model, prompts, clip = video_model(), Prompts(), target_clip()
    frames, whole = clip.transpose(0, 1).unsqueeze(2), clip.unsqueeze(0)
    curves = {"base model": pretrain(model, prompts, base_steps)}
    clips = {"base model": sample(model, prompts.text(SAMPLES))}
    base = copy.deepcopy(model)

    masks = {"coef_dropout": MASK, "residual_coef_dropout": MASK}
    lr.adapt(model, lr.BasisLoRAConfig(r=RANK, target_modules=TARGETS, **masks))
    before = fixed_loss(model, frames, prompts.text(FRAMES))
    curves["stage 1, set"] = set_stage(model, prompts, clip, set_steps)
    measured = {"1, single frames": (before, fixed_loss(model, frames, prompts.text(FRAMES)))}
    clips["stage 1"] = sample(model, prompts.text(SAMPLES))

    before = fixed_loss(model, whole, prompts.text(1, dynamic=True))
    curves["stage 2, sequence"] = sequence_stage(model, prompts, clip, sequence_steps)
    after = fixed_loss(model, whole, prompts.text(1, dynamic=True))
    measured["2, the clip"] = (before, after)
    clips["stage 2"] = sample(model, prompts.text(SAMPLES, dynamic=True))

    console.print(losses_table(measured))
    console.print(errors_table(clips, clip))
    check_export(model, base, prompts, out)
    check_motion_zero(model, prompts, clips["stage 1"])
    rows = {"the clip": clip, **{title: sampled[0] for title, sampled in clips.items()}}
    for name, figure in (("frames", frame_grid(rows)), ("loss", loss_figure(curves))):
        path = out / f"set_and_sequence_{name}.png"
        write_figure(figure, path)
        console.print(f"wrote {path}", soft_wrap=True)


def check_motion_zero(model: nn.Module, prompts: Prompts, stage1: Tensor) -> None:
    lr.motion.set_scales(model, motion=0.0)
    same = torch.equal(sample(model, prompts.text(SAMPLES)), stage1)
    console.print(f"motion scale 0 samples the clips of stage 1, bit for bit: {same}")
    if not same:
        raise typer.Exit(1)


@torch.no_grad()
def check_export(model: nn.Module, base: nn.Module, prompts: Prompts, out: Path) -> None:
    """Loads the exported LoRA with diffusers on the base model, and compares."""
    directory = out / "set_and_sequence_lora"
    lr.export_lora(model, directory, format="diffusers")
    inputs = (
        torch.randn(1, 3, FRAMES, SIZE, SIZE),
        torch.tensor([0.5]),
        prompts.text(1, dynamic=True),
    )
    ours, without = velocity(model.eval(), *inputs), velocity(base.eval(), *inputs)
    base.load_lora_adapter(
        str(directory), prefix="transformer", weight_name="pytorch_lora_weights.safetensors"
    )
    theirs = velocity(base, *inputs)
    console.print(
        f"wrote {directory}: with it in diffusers the base model's velocity is off by "
        f"{(theirs - ours).abs().max().item():.1e} at most, without it by "
        f"{(without - ours).abs().max().item():.1e}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    app()
