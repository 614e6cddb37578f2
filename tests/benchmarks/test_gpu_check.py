"""benchmarks/gpu_check.py as far as it goes without a GPU: skipping, reading results, printing."""

import ctypes
import importlib
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lowrank_ext as lr

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/ is no package: its modules import each other by their names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def gpu_check() -> ModuleType:
    return importlib.import_module("gpu_check")


@pytest.fixture
def gpu_measure() -> ModuleType:
    return importlib.import_module("gpu_measure")


def test_without_a_gpu_it_says_so_and_succeeds() -> None:
    """Whatever Python runs it, and before anything is built."""
    library = ROOT / "lowrank_ext" / "_C.so"
    before = library.stat().st_mtime_ns
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-S", "benchmarks/gpu_check.py"]
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert line.startswith("gpu-check: skipped, no CUDA device (")
    assert library.stat().st_mtime_ns == before


def test_what_is_missing_is_named(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = gpu_check.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_check.importlib.util,
        "find_spec",
        lambda name: None if name in ("torch", "rich") else find_spec(name),
    )
    assert "lacks torch, rich; install them or name another Python" in gpu_check.what_is_missing()
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_torch_for_the_cpu_is_named(gpu_check: ModuleType) -> None:
    assert f"torch {torch.__version__} of" in gpu_check.what_is_missing()


def test_a_run_of_some_sections_has_a_file_of_its_own(gpu_check: ModuleType) -> None:
    path = gpu_check.results_path(Path("d"), "NVIDIA H100 80GB HBM3", "2026-11-25T01:02:03")
    assert path == Path("d/gpu-check-nvidia-h100-80gb-hbm3-2026-11-25.json")
    path = gpu_check.results_path(Path("d"), "Card", "2026-11-25", ["target", "grid"])
    assert path == Path("d/gpu-check-card-2026-11-25-target-grid.json")


@pytest.fixture
def check(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check, "environment", lambda: dict(FAKE_ENVIRONMENT))
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    return gpu_check.Check(1.0, tmp_path / "results", ())


FAKE_ENVIRONMENT = {
    "card": "Card",
    "capability": "9.0",
    "driver": "1",
    "torch": "2",
    "date": "2026-11-25T00:00:00+00:00",
}


def test_a_section_that_raises_does_not_end_the_run(gpu_check: ModuleType, check) -> None:
    def fails(_: object) -> str:
        raise gpu_check.SectionFailed("no compiler")

    def breaks(_: object) -> str:
        raise ZeroDivisionError("oops")

    def absent(_: object) -> str:
        raise gpu_check.SectionSkipped("no sanitizer")

    outcomes = [check.run(f.__name__, f) for f in (fails, breaks, absent, lambda _: "fine")]
    assert outcomes == ["FAILED", "FAILED", "skipped", "ok"]
    written = json.loads(check.path.read_text())
    assert written["card"] == "Card"
    summaries = [section["summary"] for section in written["sections"].values()]
    assert summaries == ["no compiler", "ZeroDivisionError: oops", "no sanitizer", "fine"]
    assert [path.name for path in check.path.parent.iterdir()] == [check.path.name]


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_child_that_takes_too_long_is_stopped(gpu_check: ModuleType, check) -> None:
    log = gpu_check.LOGS / "child.log"
    for source, seconds, status in (("pass", 30.0, 0), ("time.sleep(60)", 0.1, None)):
        command = [sys.executable, "-c", f"import time; print('up', flush=True); {source}"]
        process = gpu_check.start(command, log, gpu_check.child_environment())
        wait_until(lambda: log.read_text() == "up\n")
        assert gpu_check.finish(process, seconds) == status
        assert process.returncode is not None
    assert gpu_check.last_line(log) == "KeyboardInterrupt"


SUITE = """
import pathlib, pytest, time
def test_cuda_passes(): pass
def test_cuda_fails(): assert 0
def test_cuda_is_skipped(): pytest.skip("two GPUs")
def test_rest_is_slow():
    pathlib.Path("tests/running").touch()
    time.sleep(100)
"""


def test_pytest_is_read_and_stopped_in_time(
    gpu_check: ModuleType, check, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gpu_check.ROOT / "tests").mkdir()
    (gpu_check.ROOT / "tests" / "test_it.py").write_text(SUITE)
    (gpu_check.ROOT / "pytest.ini").write_text("[pytest]\n")
    plain = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly"]
    monkeypatch.setattr(gpu_check, "pytest_command", lambda *arguments: [*plain, *arguments])
    outcome = gpu_check.run_selection("cuda", "cuda", 60.0)
    assert outcome == {
        "selection": "cuda",
        "finished": True,
        "passed": 1,
        "failed": ["tests.test_it.test_cuda_fails"],
        "skipped": {"two GPUs": 1},
    }
    finish, running = gpu_check.finish, gpu_check.ROOT / "tests" / "running"

    def finish_while_it_runs(process: subprocess.Popen[bytes], seconds: float) -> int | None:
        wait_until(running.exists)
        return finish(process, seconds)

    monkeypatch.setattr(gpu_check, "finish", finish_while_it_runs)
    outcome = gpu_check.run_selection("rest", "not cuda", 0.1)
    assert not outcome["finished"]
    assert outcome["failed"] == []


def test_tests_that_fail_fail_the_section(
    gpu_check: ModuleType, check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(_: str, selection: str, __: float) -> dict[str, object]:
        failed = ["tests.a.b"] if selection == "cuda" else []
        skipped = {"no": 2}
        return {
            "selection": selection,
            "finished": True,
            "passed": 3,
            "failed": failed,
            "skipped": skipped,
        }

    monkeypatch.setattr(gpu_check, "run_selection", outcome)
    with pytest.raises(gpu_check.SectionFailed, match=r"3 passed, 1 failed, .*tests\.a\.b"):
        gpu_check.tests(check)
    assert [part["passed"] for part in check.report["tests"]] == [3, 3]


# The main job


@pytest.fixture
def gpu_finetune() -> ModuleType:
    return importlib.import_module("gpu_finetune")


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What gpu_finetune.py leaves of runs on the CPU, as `make gpu-check` starts it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    gpu_check = importlib.import_module("gpu_check")
    logs = gpu_check.LOGS
    gpu_check.LOGS = tmp_path_factory.mktemp("finetune")
    try:
        return gpu_check.finetune_on(["cpu"], 300)["cpu"]
    finally:
        gpu_check.LOGS = logs
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_main_job_runs_on_a_device(gpu_finetune: ModuleType, finetuned) -> None:
    """Every run of it: methods side by side, one that is resumed, one over a 4-bit base."""
    methods = {run: list(found["methods"]) for run, found in finetuned.items()}
    assert methods == {
        "compared": ["frozen", "lora", "lamda"],
        "extended": ["lora"],
        "nf4": ["lora"],
    }
    for run, found in finetuned.items():
        for method, row in found["methods"].items():
            steps = 0 if method == "frozen" else gpu_finetune.STEPS
            assert len(row["losses"]) == steps, (run, method)
    # The resumed run has taken its first steps at the rates of a shorter one.
    whole, resumed = (finetuned[run]["methods"]["lora"] for run in ("compared", "extended"))
    assert whole["losses"][0] == resumed["losses"][0]
    assert whole["losses"][-1] != resumed["losses"][-1]


def test_losses_of_the_gpu_are_compared_with_the_cpus(gpu_check: ModuleType, check, finetuned):
    on_gpu = json.loads(json.dumps(finetuned))
    row = on_gpu["compared"]["methods"]["lamda"]
    row["losses"][-1] *= 1.004
    assert gpu_check.judge_finetune(check, on_gpu, finetuned) == (
        "losses are at most 0.40% from the CPU's (compared, lamda)"
    )
    assert [each["agrees"] for each in check.report["finetune"]] == [True] * 5

    row["losses"][-1] *= 1.02
    with pytest.raises(gpu_check.SectionFailed, match=r"up to 2\.41% .*lamda\), more than 0.5%"):
        gpu_check.judge_finetune(check, on_gpu, finetuned)
    row["losses"][-1] = math.nan
    with pytest.raises(gpu_check.SectionFailed, match="up to inf%"):
        gpu_check.judge_finetune(check, on_gpu, finetuned)

    on_gpu["nf4"] = {"skipped": "bitsandbytes is not installed"}
    row["losses"] = finetuned["compared"]["methods"]["lamda"]["losses"]
    said = gpu_check.judge_finetune(check, on_gpu, finetuned)
    assert said.endswith("; nf4: bitsandbytes is not installed")


def test_the_main_job_is_skipped_without_its_packages(
    gpu_check: ModuleType, check, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = gpu_check.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_check.importlib.util,
        "find_spec",
        lambda name: None if name in ("transformers", "accelerate") else find_spec(name),
    )
    assert check.run("finetune", gpu_check.finetune) == "skipped"
    summary = check.report["sections"]["finetune"]["summary"]
    assert "lacks transformers, accelerate: pip install '.[finetune]'" in summary


def test_a_main_job_that_fails_says_why(gpu_check: ModuleType) -> None:
    with pytest.raises(gpu_check.SectionFailed, match=r"on cude: error: --device must be auto, "):
        gpu_check.finetune_on(["cude"], 300)


def row(gpu_measure: ModuleType, copy_speed: float = 1e12) -> dict[str, object]:
    """A row of the grid from invented times: ours takes 1.1 times the frozen linear."""
    from timing import Rounds, Seconds

    frozen = [Seconds(1e-3, 2e-3)] * 3
    seconds = {name: [Seconds(1.1e-3, 2.2e-3)] * 3 for name in ("ours", "peft", "compile")}
    rounds = Rounds({"frozen": frozen, **seconds})
    return gpu_measure.row_of(gpu_measure.TARGET, rounds, copy_speed)


def test_rows_and_targets(gpu_check: ModuleType, gpu_measure: ModuleType) -> None:
    found = row(gpu_measure)
    assert math.isclose(found["both"]["ratios"]["ours"], 1.1)
    # Five passes over a [8192, 4096] matrix of bf16 and a little, in 0.2 ms, against 1 TB/s.
    five_passes = 5 * 2 * 8192 * 4096
    share = five_passes / 2e-4 / 1e12
    assert math.isclose(found["both"]["copy_share"], share, rel_tol=0.01)
    kernels = [
        {"kernel": "a", "pass": "lowrank_up", "calls": 1, "microseconds": 9.0, "copy_share": 0.7},
        {"kernel": "b", "pass": None, "calls": 2, "microseconds": 1.0, "copy_share": None},
    ]
    report = {**FAKE_ENVIRONMENT, "target": found, "kernels": kernels}
    targets = {target["target"]: target for target in gpu_check.targets(report)}
    assert len(targets) == 3
    assert targets["forward + backward / frozen linear"]["holds"] is True
    assert targets["LaMDA with A and B frozen / frozen linear"]["holds"] is None
    assert targets["lowrank_up, share of copy bandwidth"]["holds"] is False


def test_tables_are_printed(
    gpu_check: ModuleType, gpu_measure: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    few = row(gpu_measure) | {"call_microseconds": {"ours": 90.0, "frozen": 40.0}}
    del few["both"]["ratios"]["compile"]
    kernel = "void lowrank_ext::cuda::lowrank_up_kernel<lowrank_ext::cuda::Bf16>(Params)"
    report = {
        **FAKE_ENVIRONMENT,
        "target": row(gpu_measure),
        "kernels": [
            {"kernel": kernel, "pass": "up", "calls": 1, "microseconds": 9.0, "copy_share": 0.7}
        ],
        "grid": [row(gpu_measure), few],
        "grid_left_out": ["bfloat16 M=1 K=2 N=3 r=4 dropout=0.0"],
        "finetune": [
            {
                "run": "compared",
                "method": "lora",
                "difference": 0.0061,
                "agrees": False,
                "held_out": [5.5, 4.25],
                "tokens_per_second": 12345.6,
                "peak_bytes": 3 * 2**20,
            }
        ],
        "peft": "PEFT 1",
        "copy_bytes_per_second": 3e12,
    }
    report["targets"] = gpu_check.targets(report)
    gpu_check.print_tables(report)
    printed = capsys.readouterr().out
    for text in ("1.100", "not measured", "NO", "70%", "90 / 40", "copy 3000 GB/s", "M=1 K=2"):
        assert text in printed, text
    for text in ("5.5000 > 4.2500", "0.61% NO", "12,346", "3.0"):
        assert text in printed, text
    assert "lowrank_up_kernel<" in printed and "void" not in printed


def test_every_pass_is_recognized_by_its_kernel(gpu_measure: ModuleType) -> None:
    kernel = (
        "void lowrank_ext::cuda::{}_kernel<lowrank_ext::cuda::Traits<lowrank_ext::cuda::{}> >()"
    )
    kernels = {
        kernel.format("lowrank_down", "DownOp"): "lowrank_down",
        kernel.format("lowrank_up_backward_g", "UpBackwardOp"): "lowrank_up_backward",
        kernel.format("outer_sum", "OuterSumOp"): "lowrank_down_backward_lora_a",
        kernel.format("lowrank_up", "UpOp"): "lowrank_up",
        kernel.format("lowrank_up_backward", "Bf16"): "lowrank_up_backward",
        kernel.format("lowrank_down_backward_x", "DownBackwardXOp"): "lowrank_down_backward_x",
        kernel.format("partial_sums", "Bf16"): None,
    }
    assert {name: gpu_measure.pass_of(name) for name in kernels} == kernels
    assert set(kernels.values()) - {None} == gpu_measure.pass_bytes(gpu_measure.TARGET).keys()


def test_the_grid_is_the_issues(gpu_measure: ModuleType) -> None:
    cases = list(gpu_measure.grid())
    assert len(cases) == len(set(cases)) == 5 * 3 * 4 * 2
    assert {case.num_rows for case in cases} == {1, 16, 512, 2048, 8192}
    assert {case.rank for case in cases} == {8, 16, 64, 256}
    assert cases[0] == gpu_measure.TARGET


def test_a_case_is_measured(gpu_measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, without compiling: the same checks and the same rows as on a GPU."""
    from layers import PeftFormula

    def uncompiled(case: object, data: object, dynamic: bool) -> torch.nn.Module:
        return PeftFormula(case, data, torch.bfloat16)

    monkeypatch.setattr(gpu_measure, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_measure, "Compiled", uncompiled)
    case = gpu_measure.TARGET._replace(num_rows=16, in_features=64, out_features=48, rank=4)
    found = gpu_measure.run_case(case, 0.05, 1e10)
    assert found["both"]["ratios"].keys() == {"frozen", "ours", "peft", "compile"}
    assert found["both"]["ratios"]["frozen"] == 1
    assert found["call_microseconds"].keys() == {"frozen", "ours", "peft", "compile"}
    assert "compile_error" not in found
    json.dump(found, io.StringIO())

    def no_compiler(*_: object) -> torch.nn.Module:
        return torch.nn.Linear(3, 3)

    monkeypatch.setattr(gpu_measure, "Compiled", no_compiler)
    found = gpu_measure.run_case(case, 0.05, 1e10)
    assert "compile" not in found["both"]["ratios"]
    assert "RuntimeError" in found["compile_error"]


@pytest.mark.parametrize(
    ("name", "case", "rows"),
    [
        ("bench_moe", "5,24,16,4,2,3,0.1,float32", 2),
        ("bench_multi", "2,3,2,24,16,4,float32", 1),
        ("bench_experts", "9,4,2,16,24,2,float32", 2),
    ],
)
def test_benches_of_experts_leave_their_rows(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name, case, rows
) -> None:
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)
    arguments = ("--device", "cpu", "--case", case, "--seconds", "0.01")
    assert len(gpu_check.run_bench(name, arguments, 300)) == rows
    assert case.split(",")[-1] in (tmp_path / f"{name}.log").read_text()


def test_the_bench_of_forms_is_skipped_without_a_gpu() -> None:
    """With success: `make bench` runs every benchmark."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "benchmarks/bench_expert_forms.py", "--quick"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("skipped, no CUDA device")


@pytest.mark.parametrize(("planned", "is_best"), [(1.0, True), (1.3, False)])
def test_rows_of_the_bench_of_forms(gpu_check: ModuleType, planned: float, is_best: bool) -> None:
    """gpu_check has put benchmarks/ on the path."""
    import bench_expert_forms as bench
    from timing import Rounds, Seconds

    times = {"frozen": 1.0, "planned": planned, "dense": 2.0, "grouped": 1.0, "grouped+": 1.5}
    rounds = Rounds({name: [Seconds(t, 2 * t)] * 3 for name, t in times.items()})
    rows = list(bench.results(next(bench.quick()), rounds))
    assert [row["plan_is_best"] for row in rows] == [is_best] * 2
    assert rows[0]["x_dense"] == 2.0 / planned and rows[1]["ratios"]["dense"] == 2.0
    for cells in map(bench.cells, rows):
        assert len(cells) == len(bench.COLUMNS)
        assert ("NOT the fastest" in cells[-1]) != is_best
    assert len(list(bench.grid())) == len(set(bench.grid()))


def test_the_bench_sets_the_form_in_a_build_for_benchmarks_only(gpu_check: ModuleType) -> None:
    import bench_expert_forms as bench

    library = ctypes.CDLL(str(Path(lr.__file__).with_name("_C.so")))
    if not hasattr(library, "lowrank_ext_fix_expert_plan"):
        with pytest.raises(SystemExit, match="build it with LOWRANK_EXT_BENCHMARKS=ON"):
            bench.fix_form("planned")
        return
    for name in (*bench.FORMS, "planned"):
        bench.fix_form(name)


def test_a_bench_that_fails_says_why(gpu_check: ModuleType) -> None:
    with pytest.raises(gpu_check.SectionFailed, match=r"bench_moe: .*sizes must be positive"):
        gpu_check.run_bench("bench_moe", ("--case", "0,1,1,1,1,1,0,float32"), 300)
