"""Several processes of `lowrank-ext finetune`, under torchrun with gloo: one run, one voice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import typer
from finetune_runs import check_error, invoke, report, resume, rows, small_run
from safetensors.torch import load_file

import lowrank_ext as lr
from lowrank_ext.cli import processes
from lowrank_ext.cli.error_lines import errors_as_lines
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.interrupts import StoppedAtOnce, StopRequest
from lowrank_ext.cli.models import resolve_device

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
STEPS = 6
SAVES = {"save_every": 3, "keep": 2}
METHODS = ("lora", "lamda", "goat")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def options(tiny_model: Path, text_file: Path) -> dict[str, Any]:
    return {"model": tiny_model, "text": text_file, "steps": STEPS, "dropout": 0}


@pytest.fixture(scope="module")
def one(folder: Path, options: dict[str, Any]) -> Path:
    """A comparison in one process, which accumulates two batches."""
    compared = small_run(
        compare=f"frozen,{','.join(METHODS)}", accumulate=2, out=folder / "one", **SAVES, **options
    )
    result = invoke("finetune", *compared)
    assert result.exit_code == 0, result.output
    return folder / "one"


@pytest.fixture(scope="module")
def half(folder: Path, options: dict[str, Any]) -> Path:
    """A run of one process that accumulates two batches, as if killed after step 3."""
    run = small_run(method="lora", accumulate=2, out=folder / "half", **SAVES, **options)
    result = invoke("finetune", *run)
    assert result.exit_code == 0, result.output
    return cut_back(folder / "half")


def cut_back(out: Path) -> Path:
    """Takes away what a run of six steps has written after step 3."""
    shutil.rmtree(out / "checkpoint-000006")
    shutil.rmtree(out / "adapter")
    for name in ("result.json", "report.json"):
        (out / name).unlink()
    return out


@pytest.fixture(scope="module")
def two(folder: Path, half: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What two processes have done: exit codes, and the two streams."""
    compared = f"frozen,{','.join(METHODS)}"
    commands = [
        small_run(compare=compared, out=folder / "ddp", **SAVES, **options),
        ["--resume", "--out", str(half)],
        *(
            [*small_run(method=method, out=folder / f"fsdp-{method}", **SAVES, **options), "--fsdp"]
            for method in METHODS
        ),
        [
            *small_run(method="lora", out=folder / "bf16", **{**options, "dtype": "bf16"}),
            *("--fsdp", "--gradient-checkpointing"),
        ],
        small_run(method="lora", out=folder / "error", epochs=-1, steps=None),
        [*small_run(compare=compared, out=folder / "error"), "--fsdp"],
        [*small_run(method="full", out=folder / "error"), "--fsdp"],
    ]
    path = folder / "commands.json"
    path.write_text(json.dumps([["finetune", *command] for command in commands]))
    done = subprocess.run(
        [*TORCHRUN, str(HERE / "process_commands.py"), str(path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    codes = [json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in range(2)]
    return {"codes": codes, "stdout": done.stdout, "stderr": done.stderr}


def check_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two processes add up in another order than one."""
    assert len(got["losses"]) == len(expected["losses"])
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert [step for step, _ in got["held_out"]] == [step for step, _ in expected["held_out"]]
    for (_, ours), (_, theirs) in zip(got["held_out"], expected["held_out"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert got["rows_per_step"] == expected["rows_per_step"]
    assert got["expert_load_at_end"] == expected["expert_load_at_end"]


def test_exit_codes_are_the_same_in_every_process(two) -> None:
    assert two["codes"] == [[0, 0, 0, 0, 0, 0, 2, 2, 2]] * 2


def test_two_processes_are_one_that_accumulates_twice(one, two, folder) -> None:
    ours, theirs = rows(folder / "ddp"), rows(one)
    assert ours.keys() == theirs.keys()
    for method in ours:
        check_same(ours[method], theirs[method])
        assert ours[method]["forward_backward_ratio"] > 0


def test_the_first_process_alone_speaks(two) -> None:
    lines = two["stdout"].splitlines()
    loading = [line for line in lines if line.startswith("loading")]
    assert len(loading) == 6  # runs
    assert sum(line.startswith("method ") for line in lines) == 6  # tables
    assert sum(line.startswith("[2/4] lora  step 1/6") for line in lines) == 1
    errors = [line for line in two["stderr"].splitlines() if "error" in line.lower()]
    assert [line[:12] for line in errors] == ["error: --epo", "error: --fsd", "error: --fsd"]


def test_the_log_has_every_step_once(two, folder) -> None:
    log = (folder / "fsdp-lora" / "finetune.log").read_text()
    assert log.count(" step ") - log.count("from step") == STEPS


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_model_trains_as_a_whole_one(one, two, folder, method) -> None:
    out = folder / f"fsdp-{method}"
    check_same(rows(out)[method], rows(one)[method])
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    expected = load_file(one / method / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == expected.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_what_a_shared_model_has_nothing_to_compare_with_is_not_measured(two, folder) -> None:
    row = rows(folder / "fsdp-lora")["lora"]
    for name in ("saved_bytes_at_end", "saved_bytes_ratio", "forward_backward_ratio"):
        assert row[name] is None
    assert row["peak_bytes"] > 0 and row["optimizer_ms"] > 0
    assert report(folder / "fsdp-lora")["model"]["parameters"] == 78_208


def test_the_adapter_of_a_shared_model_loads_plainly(two, folder, tiny_model) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    lr.load_adapter(model, folder / "bf16" / "adapter")
    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_b" in n)


def test_no_checkpoint_of_a_shared_model_has_the_base(two, folder) -> None:
    found = folder / "fsdp-lora" / "checkpoint-000006"
    names = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
    states = {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
    generators = {"rng_state_0.pth", "rng_state_1.pth"}
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert names == states | generators | adapter | {"identity.json", "progress.json"}


def test_one_process_continues_what_two_have_begun(one, two, folder) -> None:
    out = cut_back(Path(shutil.copytree(folder / "fsdp-lora", folder / "fsdp-lora-cut")))
    check_error(resume(out), "--fsdp", "torchrun")
    result = resume(out, "--no-fsdp")
    assert result.exit_code == 0, result.output
    check_same(rows(out)["lora"], rows(one)["lora"])
    assert "accumulate: 2\n" in (out / "run.yaml").read_text()


def test_two_processes_continue_what_one_has_begun(one, two, half) -> None:
    check_same(rows(half)["lora"], rows(one)["lora"])
    assert "accumulate: 1\n" in (half / "run.yaml").read_text()


def test_rows_that_processes_cannot_share(half, two, monkeypatch) -> None:
    monkeypatch.setattr("lowrank_ext.cli.job.num_processes", lambda: 3)
    check_error(resume(half), "4 rows in batches of 2", "3 processes", "start 1 or 2")


def test_sigterm_stops_all_after_the_same_step(folder, options) -> None:
    steps = 300
    expected = small_run(
        method="lora", accumulate=2, out=folder / "unstopped", **{**options, "steps": steps}
    )
    assert invoke("finetune", *expected).exit_code == 0
    out = folder / "stopped"
    arguments = small_run(method="lora", out=out, **{**options, "steps": steps})
    with subprocess.Popen(
        [*TORCHRUN, "-m", "lowrank_ext", "finetune", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launched:
        wait_for(out / "finetune.log", " step 5 ", launched)
        launched.send_signal(signal.SIGTERM)
        _, stderr = launched.communicate(timeout=120)
    said = [line for line in stderr.splitlines() if line.startswith("stopp")]
    assert len(said) == 2, stderr
    assert said[0] == "stopping and saving"
    assert "everything is saved; continue with: lowrank-ext finetune --resume" in said[1]
    assert len(list(out.glob("checkpoint-*"))) == 1
    done = json.loads((next(out.glob("checkpoint-*")) / "progress.json").read_text())["step"]
    assert 5 <= done < steps
    result = resume(out)
    assert result.exit_code == 0, result.output
    check_same(rows(out)["lora"], rows(folder / "unstopped")["lora"])


def wait_for(path: Path, text: str, process: Any) -> None:
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


# Without torchrun


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The second of two processes."""
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    yield


@pytest.mark.usefixtures("of_two")
def test_each_process_has_a_gpu_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr("lowrank_ext._build_info.CUDA_VERSION", "13.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"--device must be .* got cuda:0"):
        resolve_device("cuda:0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes need a GPU each, there are 1"):
        resolve_device("cuda")


@pytest.mark.usefixtures("of_two")
def test_ctrl_c_that_torchrun_sends_again_is_one(monkeypatch) -> None:
    monkeypatch.setattr("lowrank_ext.cli.interrupts._SENT_TWICE_SECONDS", 60.0)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        monkeypatch.setattr("lowrank_ext.cli.interrupts._SENT_TWICE_SECONDS", 0.0)
        with pytest.raises(StoppedAtOnce):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--dtype"),
        ("ACCELERATE_USE_FSDP", "true", "--fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "--fsdp"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile"),
    ],
)
def test_what_accelerate_is_asked_for_is_asked_here(run, monkeypatch, name, value, words) -> None:
    monkeypatch.setenv(name, value)
    check_error(run(), name, value, words)


def test_what_accelerate_launch_sets_by_itself_is_taken(monkeypatch) -> None:
    for name, value in {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "USE_CPU": "True"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    processes.join()


@pytest.mark.usefixtures("of_two")
def test_processes_that_nobody_has_started(monkeypatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but MASTER_ADDR is not set"):
        processes.join()


@pytest.mark.usefixtures("of_two")
def test_a_process_that_ends_second_is_silent(monkeypatch, capfd) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(processes._Joined, "store", store)
    assert processes.first_to_end(143) == (True, 143)
    with pytest.raises(typer.Exit) as ended, errors_as_lines():
        raise RuntimeError("connection closed by peer")
    assert ended.value.exit_code == 143
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("of_two")
def test_processes_with_other_data_are_refused(monkeypatch) -> None:
    def gather(values: list[str], value: str) -> None:
        values[:] = ["a", value]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    processes.check_equal("the rows of --text", "a")
    with pytest.raises(UserError, match="rows of --text of process 1 must be those of process 0"):
        processes.check_equal("the rows of --text", "b")


@pytest.mark.usefixtures("of_two")
@pytest.mark.parametrize("command", ["doctor", "merge", "recursive"])
def test_other_commands_run_alone(command, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    check_error(invoke(command, "--help" if command == "recursive" else "x"), "in one process")


@pytest.mark.parametrize(
    ("flags", "options", "words"),
    [
        ([], {}, ["several processes", "torchrun"]),
        (["--compile"], {}, ["--compile"]),
        ([], {"dtype": "fp16"}, ["--dtype fp16"]),
        ([], {"optimizer": "sgd"}, ["--optimizer sgd"]),
        ([], {"early_stop": 2}, ["--early-stop"]),
        ([], {"method": "set-and-sequence"}, ["--method", "lora", "set-and-sequence"]),
    ],
)
def test_what_a_shared_model_cannot_do(run, monkeypatch, flags, options, words) -> None:
    if options or flags:
        monkeypatch.setattr("lowrank_ext.cli.sharded.num_processes", lambda: 2)
    check_error(run("--fsdp", *flags, **options), "--fsdp", *words)
