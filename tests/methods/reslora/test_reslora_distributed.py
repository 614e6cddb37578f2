"""ResLoRA under DDP and FSDP2: a parameter that several modules use has one gradient, the whole
batch's, or the call is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_cases import end_worker
from module_cases import Block, randomize
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
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


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    if dist.is_initialized():
        pytest.skip("needs torch.distributed with no group of its own yet")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp2_of_the_whole_chain_gives_the_gradients_of_one_process(mesh: DeviceMesh) -> None:
    for case in [(shortcut, False) for shortcut in ("input", "block", "middle")]:
        model, batch = model_and_batch(*case)
        found = gradients(fully_shard(model, mesh=mesh), batch)
        expected = gradients(*model_and_batch(*case))
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name].full_tensor(), gradient)


def test_fsdp2_of_single_blocks_of_the_block_shortcut_is_refused(mesh: DeviceMesh) -> None:
    """RF-36: a block would read the sharded parameters of earlier ones."""
    model, batch = model_and_batch("block", False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    model = fully_shard(model, mesh=mesh)
    with pytest.raises(
        RuntimeError, match=r"module 1 of the chain .*, got a DTensor of FSDP2; call"
    ):
        model(batch)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_fsdp2_of_single_blocks_gives_the_gradients_of_one_process(
    mesh: DeviceMesh, shortcut: str
) -> None:
    model, batch = model_and_batch(shortcut, False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    found = gradients(fully_shard(model, mesh=mesh), batch)
    expected = gradients(*model_and_batch(shortcut, False))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].full_tensor(), gradient)
