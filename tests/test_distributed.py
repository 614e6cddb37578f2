"""Two gloo ranks under DDP and FSDP2 give the gradients of one process."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_ext.nn import LaMDALinear, LoRALinear, LowRankLinear

WORLD = 2
ROWS = 6  # per rank


def make_model(dropout: float, dtype: torch.dtype) -> nn.Sequential:
    """The same numbers in every process. Odd sizes, so that shards are ragged."""
    torch.manual_seed(0)
    linears = [nn.Linear(10, 17, dtype=dtype), nn.Linear(17, 9, bias=False, dtype=dtype)]
    model = nn.Sequential(
        LoRALinear.from_linear(linears[0], r=3, alpha=6, dropout=dropout),
        nn.Tanh(),
        LaMDALinear.from_linear(linears[1], r=2, dropout=dropout),
    )
    nn.init.normal_(model[0].lora_b, std=0.3)
    return model


def batch(rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(ROWS, 10, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)


def loss(model: nn.Module, rank: int, dtype: torch.dtype) -> Tensor:
    """Each rank draws masks of its own."""
    torch.manual_seed(200 + rank)
    return model(batch(rank, dtype)).float().square().mean()


def named_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    whole = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        whole[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return whole


def single_process_gradients(dropout: float, dtype: torch.dtype) -> dict[str, Tensor | None]:
    model = make_model(dropout, dtype)
    for rank in range(WORLD):
        (loss(model, rank, dtype) / WORLD).backward()
    return named_gradients(model)


def under_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def under_fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        if isinstance(layer, LowRankLinear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": under_ddp, "fsdp": under_fsdp}
CASES = [
    (wrapper, dropout, dtype)
    for wrapper in WRAPPERS
    for dropout in (0.0, 0.4)
    for dtype in (torch.float32, torch.bfloat16)
]


def worker(rank: int, directory: str) -> None:
    """Runs every case and writes its gradients and those after a second step, by rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(directory, "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results = []
    for wrapper, dropout, dtype in CASES:
        model = WRAPPERS[wrapper](make_model(dropout, dtype))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        steps = []
        for _ in range(2):
            optimizer.zero_grad()
            loss(model, rank, dtype).backward()
            steps.append({k.removeprefix("module."): g for k, g in named_gradients(model).items()})
            optimizer.step()
        results.append(steps)
    torch.save(results, os.path.join(directory, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list]:
    """Per rank, per case, per step: the gradients. Two processes serve all tests of this file."""
    directory: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(directory),), nprocs=WORLD)
    return [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


def second_step_gradients(dropout: float, dtype: torch.dtype) -> dict[str, Tensor | None]:
    model = make_model(dropout, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for rank in range(WORLD):
            (loss(model, rank, dtype) / WORLD).backward()
        optimizer.step()
    return named_gradients(model)


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_gradients_equal_those_of_one_process(results: list[list], index: int) -> None:
    _, dropout, dtype = CASES[index]
    expected = [single_process_gradients(dropout, dtype), second_step_gradients(dropout, dtype)]
    # With a bfloat16 base the averaged loss, and so dout, is rounded at another place.
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for rank in range(WORLD):
        for step, truth in enumerate(expected):
            got = results[rank][index][step]
            assert got.keys() == truth.keys()
            for name, grad in truth.items():
                if grad is None:
                    assert got[name] is None, f"{name} is frozen"
                else:
                    torch.testing.assert_close(got[name], grad, rtol=tolerance, atol=tolerance)


def test_frozen_tensors_have_no_gradient() -> None:
    """The comparison above means something: these train, and those do not."""
    grads = single_process_gradients(0.0, torch.float32)
    trained = {name for name, grad in grads.items() if grad is not None and grad.abs().max() > 0}
    assert trained == {"0.lora_a", "0.lora_b", "2.lora_b", "2.core"}
