"""Trainer under torchrun: two ranks give the run of one process that accumulates two batches."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import base
from trainer_run import result, train

from lowrank_ext.registry import METHODS

WORLD = 2
HERE = Path(__file__).parent


def run_two_ranks(folder: Path) -> None:
    """Two ranks write every method's results into the folder."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    command = [sys.executable, *torchrun, str(HERE / "trainer_run.py"), str(folder), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def check_method(method: str, ranks: Path, alone: dict[str, Any]) -> None:
    first, second = (torch.load(ranks / f"{method}-{rank}.pt") for rank in range(WORLD))
    losses = alone["losses"]
    assert len(losses) == 4 and sum(losses[2:]) < sum(losses[:2])  # of two epochs
    assert first["losses"] == pytest.approx(losses, rel=1e-4)
    checkpoint = peft.PeftModel.from_pretrained(base("llama"), ranks / method / "checkpoint-4")
    loaded = peft.get_peft_model_state_dict(checkpoint)
    assert first["adapter"].keys() == second["adapter"].keys() == loaded.keys()
    for key, tensor in first["adapter"].items():
        assert torch.equal(tensor, second["adapter"][key]) and torch.equal(tensor, loaded[key])
        torch.testing.assert_close(tensor, alone["adapter"][key], rtol=1e-3, atol=1e-4)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*trains without:UserWarning")
def test_two_ranks_are_one_process_with_twice_the_accumulation(tmp_path: Path) -> None:
    run_two_ranks(tmp_path / "ranks")
    for method in METHODS:
        try:
            check_method(method, tmp_path / "ranks", result(train(method, tmp_path, WORLD)))
        except AssertionError as error:
            raise AssertionError(method) from error
