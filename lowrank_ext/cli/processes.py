"""Several processes of one run, as torchrun and accelerate launch start them.

All of them compute. The first one prints and writes, what it decides or fails at the others get to
know, and the first that ends by an error or a signal is the one that says so.
"""

import atexit
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lowrank_ext.cli.errors import UserError, one_line
from lowrank_ext.files import quoted

T = TypeVar("T")

_SET_BY_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
# What accelerate launch may ask for, its value for no, and what says the same here.
_ASKED_OF_ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": ("no", "--dtype"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--compile"),
    "ACCELERATE_USE_FSDP": ("false", "--fsdp"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "--fsdp, or DDP without it"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "--fsdp, or DDP without it"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "--fsdp, or DDP without it"),
}
_TIMEOUT = timedelta(minutes=30)  # the others wait while the first one measures and writes
_ENDS, _EXIT_CODE = "lowrank_ext/ends", "lowrank_ext/exit_code"


class _Joined:
    """What `join` has made."""

    store: Any = None  # a torch.distributed.Store


def num_processes() -> int:
    """Processes of this run, as torchrun and accelerate launch say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process prints and writes."""
    return num_processes() == 1 or int(os.environ["RANK"]) == 0


def process_index() -> int:
    """0 is the one that prints and writes."""
    return int(os.environ["RANK"]) if num_processes() > 1 else 0


def check_alone(command: str) -> None:
    """Raises UserError where torchrun has started several processes of a command for one."""
    if num_processes() > 1:
        raise UserError(
            f"{command} runs in one process, got WORLD_SIZE={num_processes()}; start it without "
            "torchrun or accelerate launch"
        )


def join() -> None:
    """Meets the other processes. Raises UserError where their launcher asks for what is not done.

    With `leave` at the end of the program.
    """
    for name, (no, instead) in _ASKED_OF_ACCELERATE.items():
        value = os.environ.get(name, no)
        if value.lower() not in (no, ""):
            raise UserError(
                f"accelerate launch: {name} must be {no}, got {quoted(value)}; what does this here "
                f"is {instead}"
            )
    if num_processes() == 1:
        return
    if missing := [name for name in _SET_BY_LAUNCHER if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {num_processes()}, but {', '.join(missing)} is not set; start several "
            "processes by torchrun or accelerate launch"
        )
    _Joined.store, _, _ = next(rendezvous("env://"))


def connect(device: torch.device) -> None:
    """Lets the processes exchange tensors, those of the CPU and those of ``device``."""
    if num_processes() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=_Joined.store,
        rank=process_index(),
        world_size=num_processes(),
        timeout=_TIMEOUT,
    )


def device_of_process(device: torch.device, given: str) -> torch.device:
    """The device of this process: the GPU of its own where several share a machine.

    Args:
        device: what --device says.
        given: as it was written.

    Raises:
        UserError: --device names one GPU for several processes, or there are fewer than processes.
    """
    if num_processes() == 1 or device.type != "cuda":
        return device
    if ":" in given:
        raise UserError(
            f"--device must be auto, cpu or cuda for several processes, each of which has a GPU of "
            f"its own, got {given}"
        )
    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > there:
        raise UserError(f"{here} processes need a GPU each, there are {there}; start fewer")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def on_main_process(action: Callable[[], T]) -> T:
    """What ``action`` returns on the first process, on all of them. They wait for it, and a
    UserError there is raised on all."""
    if num_processes() == 1:
        return action()
    outcome: list[Any] = [None]
    if is_main_process():
        try:
            outcome = [(action(), None)]
        except (UserError, OSError) as error:
            outcome = [(None, one_line(error))]
    dist.broadcast_object_list(outcome, src=0)
    result, message = outcome[0]
    if message is not None:
        raise UserError(message)
    return result


def check_equal(what: str, value: str) -> None:
    """Raises UserError unless all processes have the same value."""
    if num_processes() == 1:
        return
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    for index, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"{what} of process {index} must be those of process 0, got others")


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum of a CPU tensor over all processes."""
    if num_processes() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def largest(value: int) -> int:
    """The largest of all processes' values."""
    found = torch.tensor(value)
    if num_processes() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def first_to_end(exit_code: int) -> tuple[bool, int]:
    """Whether this process is the first that an error or a signal ends, which then says so; and the
    exit code of the first."""
    if _Joined.store is None:
        return is_main_process(), exit_code
    try:
        if _Joined.store.add(_ENDS, 1) == 1:
            _Joined.store.set(_EXIT_CODE, str(exit_code))
            return True, exit_code
        return False, int(_Joined.store.get(_EXIT_CODE))
    except RuntimeError:  # the process that held the store has ended before
        return False, exit_code


def leave(exit_code: int) -> None:
    """Ends one of several processes; returns where there is one.

    Without destructors: the last owner of a process group joins gloo's threads while it holds the
    GIL, for which such a thread may be waiting (torch 2.13): rarely, and then for ever. NCCL warns
    of a group that nobody has destroyed.
    """
    if not dist.is_initialized():
        return
    if exit_code == 0:
        dist.barrier()  # nobody leaves while another still needs to hear from it
    atexit._run_exitfuncs()  # loggers send what they still have
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
