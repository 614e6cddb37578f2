"""Two gloo ranks under DDP and FSDP2 give the gradients of one process."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_cases import end_worker
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("peft")

import peft

from lowrank_ext.config import AdapterConfig
from lowrank_ext.integrations.peft import accelerate
from lowrank_ext.integrations.peft_layer import AcceleratedLoRA
from lowrank_ext.integrations.peft_tuner import peft_config
from lowrank_ext.integrations.peft_tuner.layer import LowRankTunerLayer
from lowrank_ext.methods.aflora.config import AFLoRAConfig
from lowrank_ext.methods.goat.balance import balance_loss
from lowrank_ext.methods.lamda.config import LaMDAConfig
from lowrank_ext.nn import BasisLoRALinear, GOATLinear, LaMDALinear, LoRALinear, LowRankLinear

Gradients = dict[str, Tensor | None]

WORLD = 2
ROWS = 6  # per rank


def make_model(dropout: float, dtype: torch.dtype) -> nn.Sequential:
    """The same numbers in every process. Odd sizes, so that shards are ragged."""
    torch.manual_seed(0)
    linears = [
        nn.Linear(10, 17, dtype=dtype),
        nn.Linear(17, 9, bias=False, dtype=dtype),
        nn.Linear(9, 11, dtype=dtype),
        nn.Linear(7, 5, dtype=dtype),
        nn.Linear(5, 6, dtype=dtype),
        nn.Linear(6, 13, dtype=dtype),
    ]
    model = nn.Sequential(
        LoRALinear.from_linear(linears[0], r=3, alpha=6, dropout=dropout),
        nn.Tanh(),
        LaMDALinear.from_linear(linears[1], r=2, dropout=dropout),
        GOATLinear.from_linear(
            linears[2], r=6, num_experts=3, dropout=dropout, balance_coefficient=0.5
        ),
        accelerated_peft_layer(nn.Linear(11, 7, dtype=dtype), dropout),
        # In its second stage; the masks on its coefficients are drawn by each rank.
        BasisLoRALinear.from_linear(
            linears[3], r=2, residuals=["motion"], residual_coef_dropout=dropout
        ),
        tuner_layer(linears[4], LaMDAConfig(r=2, dropout=dropout, target_modules=["0"])),
        tuner_layer(linears[5], AFLoRAConfig(r=2, dropout=dropout, target_modules=["0"])),
    )
    nn.init.normal_(model[0].lora_b, std=0.3)
    nn.init.normal_(model[5].lora_b, std=0.3)
    return model


def accelerated_peft_layer(linear: nn.Linear, dropout: float) -> nn.Module:
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["0"])
    model = peft.inject_adapter_in_model(config, nn.Sequential(linear))
    nn.init.normal_(model[0].lora_B["default"].weight, std=0.3)
    assert accelerate(model).accelerated
    return model[0]


def tuner_layer(linear: nn.Module, config: AdapterConfig) -> nn.Module:
    """PEFT's layer of one of this library's methods."""
    return peft.inject_adapter_in_model(peft_config(config), nn.Sequential(linear))[0]


def batch(rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(ROWS, 10, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)


def loss(model: nn.Module, rank: int, dtype: torch.dtype) -> Tensor:
    """Each rank draws masks of its own."""
    torch.manual_seed(200 + rank)
    task = model(batch(rank, dtype)).float().square().mean()
    return task + balance_loss(model)


def named_gradients(model: nn.Module) -> Gradients:
    whole: Gradients = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        full = grad.full_tensor() if isinstance(grad, DTensor) else grad
        whole[name.removeprefix("module.")] = full
    return whole


def under_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def under_fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        if isinstance(layer, LowRankLinear | AcceleratedLoRA | LowRankTunerLayer):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": under_ddp, "fsdp": under_fsdp}
# dropout, dtype of the base
CASES = list(itertools.product((0.0, 0.4), (torch.float32, torch.bfloat16)))


def worker(rank: int, wrapper: str, directory: str) -> None:
    """Runs every case for two optimizer steps and writes the gradients of both, by rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(directory, "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results = []
    for dropout, dtype in CASES:
        model = WRAPPERS[wrapper](make_model(dropout, dtype))
        results.append(two_steps(model, [rank], dtype))
    torch.save(results, os.path.join(directory, f"{rank}.pt"))
    end_worker()


def two_steps(model: nn.Module, ranks: list[int], dtype: torch.dtype) -> list[Gradients]:
    """The gradients of both steps, averaged over `ranks`; the second follows an update."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    steps = []
    for _ in range(2):
        optimizer.zero_grad()
        for rank in ranks:
            (loss(model, rank, dtype) / len(ranks)).backward()
        # clone: the next step writes to the same gradients
        grads = named_gradients(model).items()
        steps.append({k: None if g is None else g.clone() for k, g in grads})
        optimizer.step()
    return steps


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_equal_those_of_one_process(wrapper: str, tmp_path: Path) -> None:
    mp.spawn(worker, args=(wrapper, str(tmp_path)), nprocs=WORLD)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for index, (dropout, dtype) in enumerate(CASES):
        expected = two_steps(make_model(dropout, dtype), list(range(WORLD)), dtype)
        # With a bfloat16 base the averaged loss, and so dout, is rounded at another place.
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        for rank, step in itertools.product(range(WORLD), range(2)):
            got, truth = results[rank][index][step], expected[step]
            assert got.keys() == truth.keys()
            for name, grad in truth.items():
                where = f"{name}, dropout {dropout}, {dtype}, rank {rank}, step {step}"
                if grad is None:
                    assert got[name] is None, f"{where} is frozen"
                else:
                    torch.testing.assert_close(
                        got[name],
                        grad,
                        rtol=tolerance,
                        atol=tolerance,
                        msg=lambda text, where=where: f"{where}: {text}",
                    )


def test_frozen_tensors_have_no_gradient() -> None:
    """The comparison above means something: these train, and those do not."""
    grads, _ = two_steps(make_model(0.0, torch.float32), [0], torch.float32)
    trained = {name for name, grad in grads.items() if grad is not None and grad.abs().max() > 0}
    experts = {"3.lora_a", "3.lora_b", "3.router_weight"}
    pefts = {"4.lora_A.default.weight", "4.lora_B.default.weight"}
    lrs = {"0.lora_a", "0.lora_b", "2.lora_b", "2.core", "5.lora_residual_motion"}
    tuners = {
        *("6.lamda_adapters.default.lora_b", "6.lamda_adapters.default.core"),
        "7.aflora_adapters.default.out_scale",
    }
    assert trained == {*lrs, *experts, *pefts, *tuners}
