"""ResLoRA under DDP: a parameter that several modules use has one gradient, the whole batch's."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_cases import end_worker
from module_cases import Block, randomize
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lowrank_ext as lr

WORLD, ROWS, WIDTH = 2, 2, 8


class Blocks(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def model_and_batch(shortcut: str, checkpointed: bool) -> tuple[nn.Module, Tensor]:
    """The same numbers in every process."""
    torch.manual_seed(0)
    model = lr.adapt(Blocks(checkpointed), lr.ResLoRAConfig(r=2, shortcut=shortcut))
    randomize(model)
    return model, torch.randn(WORLD * ROWS, 5, WIDTH)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().mean().backward()
    named = ((n.removeprefix("module."), p.grad) for n, p in model.named_parameters())
    return {name: gradient for name, gradient in named if gradient is not None}


CASES = [(shortcut, kind) for shortcut in ("input", "block", "middle") for kind in (False, True)]


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD
    )
    found = []
    for case in CASES:
        model, batch = model_and_batch(*case)
        own = batch[rank * ROWS : (rank + 1) * ROWS]
        found.append(gradients(DistributedDataParallel(model), own))
    torch.save(found, f"{directory}/{rank}.pt")
    end_worker()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ddp_gives_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    for rank in range(WORLD):
        for case, found in zip(CASES, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            expected = gradients(*model_and_batch(*case))
            assert found.keys() == expected.keys() and len(expected) == 18
            for name, gradient in expected.items():
                torch.testing.assert_close(
                    found[name],
                    gradient,
                    msg=lambda m, where=(case, name): f"{where}: {m}",
                )
