"""StyleAdapter on synthetic styles: the reference determines the style of a drawing.

A small diffusion UNet first learns to draw four shapes in random colors and textures; the prompt
names only the shape. It is then frozen, and a style path and its embedder learn to take colors and
texture from two reference drawings of other shapes. The picture style_adapter.png has a row for
each prompt and a column for each style; no style was seen in training.

    python examples/style_adapter.py --out build/examples
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import typer
from diffusers import DDIMScheduler, UNet2DConditionModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import lowrank_ext as lr
from lowrank_ext.cli.files import prepare_output, write_bytes

SIZE, TEXT_DIM, REFERENCES = 16, 32, 2
SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("plain", "stripes", "checks")
BASE_STEPS, STYLE_STEPS = 400, 500
console = Console()
app = typer.Typer(add_completion=False)


class Styles(NamedTuple):
    """Styles of N drawings: colors of ink and paper [N, 3] in 0 … 1, ink texture int64 [N]."""

    ink: Tensor
    paper: Tensor
    texture: Tensor

    def pick(self, rows: Tensor) -> "Styles":
        return Styles(*(value[rows] for value in self))


def random_styles(count: int) -> Styles:
    """Random dark inks on random light papers, so that a prompt determines the dark region."""
    ink, paper = 0.6 * torch.rand(count, 3), 0.5 + 0.5 * torch.rand(count, 3)
    return Styles(ink, paper, torch.randint(len(TEXTURES), (count,)))


def held_out_styles() -> Styles:
    """Red stripes on white, plain navy on sky blue, …: the columns of the picture."""
    ink = [[0.6, 0.0, 0.1], [0.0, 0.1, 0.5], [0.1, 0.1, 0.1], [0.0, 0.4, 0.2], [0.4, 0.0, 0.5]]
    paper = [[1.0, 1.0, 0.9], [0.5, 0.8, 1.0], [1.0, 0.9, 0.5], [0.7, 1.0, 0.6], [1.0, 0.6, 0.8]]
    return Styles(torch.tensor(ink), torch.tensor(paper), torch.tensor([1, 0, 2, 0, 1]))


def silhouettes() -> Tensor:
    """The four shapes, [4, SIZE, SIZE], 1 inside."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, SIZE)], indexing="ij")
    disc = x.square() + y.square() < 0.45
    square = (x.abs() < 0.6) & (y.abs() < 0.6)
    triangle = (y < 0.65) & (y > 2 * x.abs() - 0.75)
    cross = ((x.abs() < 0.25) & (y.abs() < 0.8)) | ((y.abs() < 0.25) & (x.abs() < 0.8))
    return torch.stack([disc, square, triangle, cross]).float()


def textures() -> Tensor:
    """Amount of ink at each pixel, [3, SIZE, SIZE]."""
    y, x = torch.meshgrid(*2 * [torch.arange(SIZE)], indexing="ij")
    stripes = (y // 2) % 2
    checks = (x // 2 + y // 2) % 2
    return 1 - 0.7 * torch.stack([torch.zeros_like(x), stripes, checks]).float()


def draw(shapes: Tensor, styles: Styles) -> Tensor:
    """Drawings [N, 3, SIZE, SIZE] in 0 … 1."""
    inked = (silhouettes()[shapes] * textures()[styles.texture]).unsqueeze(1)
    return inked * styles.ink[..., None, None] + (1 - inked) * styles.paper[..., None, None]


class Painter(NamedTuple):
    """The base model: a UNet that predicts the clean drawing, and its prompts."""

    unet: UNet2DConditionModel
    words: nn.Embedding
    scheduler: DDIMScheduler

    def prompts(self, shapes: Tensor) -> Tensor:
        """[N] to [N, 2, TEXT_DIM]."""
        return self.words(shapes).unflatten(1, (2, TEXT_DIM))

    def loss(self, drawings: Tensor, shapes: Tensor, noisy_steps: bool = False) -> Tensor:
        """The loss on drawings; noisy_steps draws steps with much noise more often."""
        clean, noise = 2 * drawings - 1, torch.randn_like(drawings)
        share = torch.rand(len(clean))
        share = share.sqrt() if noisy_steps else share
        steps = (share * self.scheduler.config.num_train_timesteps).long()
        noisy = self.scheduler.add_noise(clean, noise, steps)
        return F.mse_loss(self.unet(noisy, steps, self.prompts(shapes)).sample, clean)

    @torch.no_grad()
    def paint(self, shapes: Tensor, steps: int = 15) -> Tensor:
        """Drawings [N, 3, SIZE, SIZE] in 0 … 1; all start from the same noise."""
        sample = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        sample = sample.repeat(len(shapes), 1, 1, 1)
        self.scheduler.set_timesteps(steps)
        for step in self.scheduler.timesteps:
            predicted = self.unet(sample, step, self.prompts(shapes)).sample
            sample = self.scheduler.step(predicted, step, sample).prev_sample
        return (sample / 2 + 0.5).clamp(0, 1)


def new_painter() -> Painter:
    unet = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        prediction_type="sample", beta_schedule="squaredcos_cap_v2", clip_sample=True
    )
    return Painter(unet, nn.Embedding(len(SHAPES), 2 * TEXT_DIM), scheduler)


class Stylist(NamedTuple):
    """From reference drawings to style tokens: a frozen vision model and the trained embedder."""

    vision: CLIPVisionModel
    embedder: lr.style.StyleEmbedder

    def tokens(self, references: Tensor) -> Tensor:
        """Drawings [N · REFERENCES, 3, SIZE, SIZE] in 0 … 1 to style tokens [N, 4, TEXT_DIM]."""
        features = lr.style.encode_style(self.vision, 2 * references - 1, references=REFERENCES)
        return self.embedder(features)


def new_stylist() -> Stylist:
    config = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=4,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    vision = CLIPVisionModel(config).eval()
    # Its LayerNorm removes the norm of a patch's embedding, and so the brightness of a flat patch,
    # unless position embeddings of similar norm are added, as a trained model has them.
    nn.init.normal_(vision.embeddings.position_embedding.weight, std=0.2)
    embedder = lr.style.StyleEmbedder(64, TEXT_DIM, num_tokens=4, num_layers=2, num_heads=4)
    return Stylist(vision, embedder)


def references_for(shapes: Tensor, styles: Styles) -> Tensor:
    """REFERENCES drawings of other shapes in each drawing's style, consecutive."""
    shifts = torch.stack([torch.randperm(len(SHAPES) - 1)[:REFERENCES] + 1 for _ in shapes])
    others = (shapes.unsqueeze(1) + shifts) % len(SHAPES)
    rows = torch.arange(len(shapes)).repeat_interleave(REFERENCES)
    return draw(others.flatten(), styles.pick(rows))


def train(
    name: str,
    parameters: list[nn.Parameter],
    steps: int,
    learning_rate: float,
    loss_of: Callable[[], Tensor],
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    losses = []
    for _ in track(range(steps), description=name, console=console):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tenth = max(1, steps // 10)
    first, last = (sum(part) / len(part) for part in (losses[:tenth], losses[-tenth:]))
    console.print(f"{name}: loss {first:.4f} in the first tenth, {last:.4f} in the last")


def train_base(painter: Painter, steps: int, batch: int) -> None:
    def loss() -> Tensor:
        shapes = torch.randint(len(SHAPES), (batch,))
        return painter.loss(draw(shapes, random_styles(batch)), shapes)

    parameters = [*painter.unet.parameters(), *painter.words.parameters()]
    train("base model", parameters, steps, 2e-3, loss)


def train_style(painter: Painter, stylist: Stylist, steps: int, batch: int) -> None:
    def loss() -> Tensor:
        shapes, styles = torch.randint(len(SHAPES), (batch,)), random_styles(batch)
        tokens = stylist.tokens(references_for(shapes, styles))
        lr.style.set_style(painter.unet, tokens)
        # Steps with much noise determine the style; with less noise the drawing shows it.
        return painter.loss(draw(shapes, styles), shapes, noisy_steps=True)

    trained = [p for p in painter.unet.parameters() if p.requires_grad]
    train("style path", [*trained, *stylist.embedder.parameters()], steps, 6e-3, loss)
    lr.style.set_style(painter.unet, None)


def paint_grid(painter: Painter, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Every shape without a style [4, 3, SIZE, SIZE], and in each of S styles [4, S, …].

    All are rows of one batch.
    """
    choices: list[Tensor | None] = [None, *tokens]
    shapes = torch.arange(len(SHAPES)).repeat_interleave(len(choices))
    with lr.style.set_style(painter.unet, choices * len(SHAPES)):
        painted = painter.paint(shapes).unflatten(0, (len(SHAPES), len(choices)))
    return painted[:, 0], painted[:, 1:]


class Distances(NamedTuple):
    """Mean color distance per pixel and channel, in 0 … 1."""

    right: float
    wrong: float  # mean over the wrong ones
    nearest_is_right: int
    pictures: int


def distances(differences: Tensor) -> Distances:
    """Distances from [P, C], picture p against each of C candidates; column 0 is the right one."""
    right, wrong = differences[:, 0], differences[:, 1:]
    found = int((right < wrong.min(dim=1).values).sum())
    return Distances(right.mean().item(), wrong.mean().item(), found, len(right))


def measure(styled: Tensor, styles: Styles) -> tuple[Distances, Distances]:
    """Distances of the pictures to their style and to their prompt."""
    num_shapes, num_styles = styled.shape[:2]
    shapes = torch.arange(num_shapes).repeat_interleave(num_styles)
    columns = torch.arange(num_styles).repeat(num_shapes)
    pictures = styled.flatten(0, 1)

    def differences(shape_shift: int, style_shift: int) -> Tensor:
        other = styles.pick((columns + style_shift) % num_styles)
        candidates = draw((shapes + shape_shift) % num_shapes, other)
        return (pictures - candidates).abs().mean(dim=(1, 2, 3))

    by_style = torch.stack([differences(0, i) for i in range(num_styles)], dim=1)
    by_shape = torch.stack([differences(i, 0) for i in range(num_shapes)], dim=1)
    return distances(by_style), distances(by_shape)


def result_table(style: Distances, prompt: Distances) -> Table:
    table = Table(title="color distance of the pictures to the drawing they should be")
    for heading in ("asked", "right", "wrong", "nearest is right"):
        table.add_column(heading, justify="left" if heading == "asked" else "right")
    for name, found in (("style of the reference", style), ("shape of the prompt", prompt)):
        nearest = f"{found.nearest_is_right} of {found.pictures}"
        table.add_row(name, f"{found.right:.3f}", f"{found.wrong:.3f}", nearest)
    return table


def picture(references: Tensor, plain: Tensor, styled: Tensor) -> bytes:
    """The grid as a PNG: a row for each prompt, a column for each style below its references."""
    num_shapes, num_styles = styled.shape[:2]
    figure, axes = plt.subplots(
        1 + num_shapes, 1 + num_styles, figsize=(1.5 * (1 + num_styles), 1.5 * (1 + num_shapes))
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    axes[0, 0].text(0.5, 0.5, "references", ha="center", va="center")
    axes[0, 0].set_xlabel("no style")
    pairs = references.unflatten(0, (num_styles, REFERENCES))
    for column, pair in enumerate(pairs, start=1):
        show(axes[0, column], torch.cat([*pair], dim=2))
    for row, shape in enumerate(SHAPES, start=1):
        axes[row, 0].set_ylabel(shape)
        show(axes[row, 0], plain[row - 1])
        for column in range(num_styles):
            show(axes[row, 1 + column], styled[row - 1, column])
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def show(axis: plt.Axes, drawing: Tensor) -> None:
    axis.imshow(drawing.permute(1, 2, 0).numpy(), interpolation="nearest")


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="directory for the picture and the style path")] = Path(
        "build/examples"
    ),
    quick: Annotated[bool, typer.Option(help="a few steps: shows that it runs, not more")] = False,
    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 0,
) -> None:
    """Train a style path on synthetic styles and show that pictures follow their reference."""
    prepare_output(out)
    torch.manual_seed(seed)
    base_steps, style_steps, batch = (4, 4, 4) if quick else (BASE_STEPS, STYLE_STEPS, 16)
    painter, stylist = new_painter(), new_stylist()
    train_base(painter, base_steps, batch)
    painter.words.requires_grad_(False)
    painter.unet.eval()
    console.print(lr.style.add_style_path(painter.unet))
    train_style(painter, stylist, style_steps, batch)

    styles = held_out_styles()
    references = references_for(torch.zeros(len(styles.ink), dtype=torch.int64), styles)
    with torch.no_grad():
        plain, styled = paint_grid(painter, stylist.tokens(references))
    console.print(result_table(*measure(styled, styles)))
    write_bytes(out / "style_adapter.png", picture(references, plain, styled))
    lr.style.save_style(painter.unet, out / "style_adapter", stylist.embedder)
    console.print(f"{out / 'style_adapter.png'}: rows are prompts, columns references")
    console.print(f"{out / 'style_adapter'}: the style path, for lr.style.load_style")


if __name__ == "__main__":
    app()
