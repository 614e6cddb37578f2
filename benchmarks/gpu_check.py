"""Everything that needs an NVIDIA GPU, in one command and ten minutes: `make gpu-check`.

    make gpu-check                                         # with python3's torch
    make gpu-check PYTHON=/path/to/python GPU_CHECK_ARGS='--only target --only kernels'

Builds lowrank_ext in place for this card, runs the test suite with CUDA, the main job on a tiny
model (`lowrank-ext finetune`) and a small selection of the tests under compute-sanitizer, then
measures against the frozen linear, PEFT and torch.compile. Needs no network: torch (a CUDA build),
the library's own dependencies and nvcc must be there. Without a GPU it says so and does nothing.
Results go to benchmarks/results/, logs to build/gpu-check/.
"""

import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu-check"
SECTIONS = ("build", "tests", "finetune", "sanitizer", "target", "kernels", "experts", "grid")
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")

# Shares of the whole time; the grid, which comes last, gets the rest.
BUILD_SHARE, TESTS_SHARE, FINETUNE_SHARE, SANITIZER_SHARE, EXPERTS_SHARE = 0.5, 0.3, 0.15, 0.15, 0.1
LAST_SECONDS = 5.0  # for printing and writing

# Stated for an H100, M=8192, K=N=4096, r=16, bf16, dropout 0.05.
MAX_RATIO = {
    "ours": ("forward + backward / frozen linear", 1.16),
    "lamda": ("LaMDA with A and B frozen / frozen linear", 1.12),
}
MIN_COPY_SHARE = 0.80


# The machine


def why_no_gpu() -> str | None:
    """None if the driver sees a GPU, else the reason; without importing torch, which is slow."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "the NVIDIA driver, libcuda.so.1, is not installed"
    status = driver.cuInit(0)
    if status != 0:
        return f"cuInit says {status}" if status != 100 else "the driver sees none"
    count = ctypes.c_int(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    return None if count.value else "the driver sees none"


def what_is_missing() -> str | None:
    """The missing requirement of a check on a machine with a GPU, in one line, or None."""
    needed = ("torch", "setuptools", "safetensors", "rich")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    another = "name another Python: make gpu-check PYTHON=..."
    if missing:
        return f"{sys.executable} lacks {', '.join(missing)}; install them or {another}"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} of {sys.executable} does not see the GPU; {another}"
    return None


def environment() -> dict[str, Any]:
    import torch
    from timing import cpu_name, nvidia_smi

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "num_sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": nvidia_smi("driver_version"),
        "clocks": nvidia_smi("clocks.current.sm,clocks.max.sm,clocks.current.memory"),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "cpu": cpu_name(),
        "commit": commit or None,
    }


# The report: one dictionary, on disk after every section


def results_path(directory: Path, card: str, date: str, only: Sequence[str] = ()) -> Path:
    """The file of a run; that of some sections does not replace that of all."""
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return directory / f"{'-'.join(['gpu-check', slug, date[:10], *only])}.json"


class SectionFailed(Exception):
    """A section's failure, in one line; later sections still run."""


class SectionSkipped(Exception):
    """A section's missing requirement, in one line."""


class Check:
    """One run: its clock, its report and the sections' outcomes."""

    def __init__(self, minutes: float, directory: Path, only: Sequence[str]) -> None:
        self.seconds = 60 * minutes
        self.start = time.monotonic()
        self.report: dict[str, Any] = {**environment(), "sections": {}}
        self.path = results_path(directory, self.report["card"], self.report["date"], only)

    @property
    def left(self) -> float:
        return self.seconds - LAST_SECONDS - (time.monotonic() - self.start)

    def share(self, part: float) -> float:
        return max(1.0, min(part * self.seconds, self.left))

    def save(self) -> None:
        from timing import write_json

        write_json(self.path, self.report)

    def run(self, name: str, section: Callable[["Check"], str]) -> str:
        """Runs a section, which returns its summary; an exception is reported and not fatal."""
        print(f"gpu-check: {name} ...", flush=True)
        start = time.monotonic()
        try:
            outcome, summary = "ok", section(self)
        except SectionSkipped as reason:
            outcome, summary = "skipped", str(reason)
        except SectionFailed as error:
            outcome, summary = "FAILED", str(error)
        except Exception as error:
            outcome, summary = "FAILED", f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        self.report["sections"][name] = {"outcome": outcome, "seconds": seconds, "summary": summary}
        self.save()
        print(f"gpu-check: {name} {outcome} after {seconds:.0f} s: {summary}", flush=True)
        return outcome


# Child processes


def child_environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **extra}


def start(command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    LOGS.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, process_group=0
        )


def finish(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit status; None after a timeout. Stopped by SIGINT first, so that pytest reports."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


# build, tests, sanitizer


def build(check: Check) -> str:
    arch = check.report["capability"].replace(".", "")
    options = {"LOWRANK_EXT_CUDA_ARCHS": arch, "LOWRANK_EXT_BENCHMARKS": "ON"}
    env = child_environment(LOWRANK_EXT_CUDA="ON", **options)
    log = LOGS / "build.log"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status = finish(start(command, log, env), check.share(BUILD_SHARE))
    if status != 0:
        raise SectionFailed(f"{last_line(log)} (log: {log.relative_to(ROOT)})")
    size = (ROOT / "lowrank_ext" / "_C.so").stat().st_size
    return f"_C.so for sm_{arch}, {size / 2**20:.1f} MiB"


def pytest_command(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    if importlib.util.find_spec("xdist") is not None:
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        command += ["-n", str(workers), "--dist", "worksteal"]
    return command


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, the names of what failed and the reasons of what was skipped."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skips = [skip for case in cases if (skip := case.find("skipped")) is not None]
    reasons: dict[str, int] = {}
    for skip in skips:
        reason = skip.get("message", "")
        reasons[reason] = reasons.get(reason, 0) + 1
    return {
        "passed": len(cases) - len(failed) - len(skips),
        "failed": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
        "skipped": reasons,
    }


def run_selection(name: str, selection: str, seconds: float) -> dict[str, Any]:
    log, junit = LOGS / f"{name}.log", LOGS / f"{name}.xml"
    junit.unlink(missing_ok=True)
    command = pytest_command("tests", "-k", selection, f"--junitxml={junit}")
    status = finish(start(command, log, child_environment(OMP_NUM_THREADS="2")), seconds)
    if not junit.exists():
        raise SectionFailed(f"pytest: {last_line(log)} (log: {log.relative_to(ROOT)})")
    return {"selection": selection, "finished": status is not None, **read_junit(junit)}


def tests(check: Check) -> str:
    """Runs the GPU tests first, then the rest of the suite, in the remaining time."""
    if importlib.util.find_spec("pytest") is None:
        raise SectionSkipped(f"pytest is not installed for {sys.executable}: no test was run")
    end = time.monotonic() + check.share(TESTS_SHARE)
    outcomes = []
    for name, selection in (("tests-cuda", "cuda"), ("tests-rest", "not cuda")):
        outcomes.append(run_selection(name, selection, max(5.0, end - time.monotonic())))
        check.report["tests"] = outcomes
    summary = "; ".join(
        f"{'' if o['finished'] else 'OUT OF TIME, '}-k '{o['selection']}': {o['passed']} passed, "
        f"{len(o['failed'])} failed, {sum(o['skipped'].values())} skipped"
        for o in outcomes
    )
    failed = [name for outcome in outcomes for name in outcome["failed"]]
    if failed or not outcomes[0]["finished"] or not outcomes[0]["passed"]:
        raise SectionFailed(f"{summary}; {', '.join(failed[:3])} (logs: {LOGS.relative_to(ROOT)}/)")
    return summary


FINETUNE_NEEDS = ("transformers", "accelerate", "matplotlib", "psutil", "typer")


def finetune(check: Check) -> str:
    """Runs the main job on the GPU and, at the same time, on the CPU; their losses must agree."""
    missing = [name for name in FINETUNE_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        lacks = ", ".join(missing)
        raise SectionSkipped(f"{sys.executable} lacks {lacks}: pip install '.[finetune]'")
    found = finetune_on(("cuda", "cpu"), check.share(FINETUNE_SHARE))
    return judge_finetune(check, found["cuda"], found["cpu"])


def finetune_on(devices: Sequence[str], seconds: float) -> dict[str, dict[str, Any]]:
    """The results of gpu_finetune.py by device; the devices run in parallel."""
    running, written = {}, {}
    for device in devices:
        out = LOGS / f"finetune-{device}"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "benchmarks/gpu_finetune.py", "--device", device]
        running[device] = start(
            [*command, "--out", str(out)], LOGS / f"finetune-{device}.log", child_environment()
        )
        written[device] = out / "runs.json"
    end = time.monotonic() + seconds
    for device, process in running.items():
        status = finish(process, max(0.0, end - time.monotonic()))
        if status != 0:
            log = LOGS / f"finetune-{device}.log"
            why = "out of time" if status is None else last_line(log)
            raise SectionFailed(f"on {device}: {why} (log: {log.relative_to(ROOT)})")
    return {device: json.loads(path.read_text()) for device, path in written.items()}


def judge_finetune(check: Check, cuda: Mapping[str, Any], cpu: Mapping[str, Any]) -> str:
    """The comparison of both devices, which goes into the report."""
    import gpu_finetune

    rows = check.report["finetune"] = gpu_finetune.compare(cuda, cpu)
    check.report["finetune_left_out"] = {
        run: found["skipped"] for run, found in cuda.items() if "skipped" in found
    }
    worst = max(rows, key=lambda row: row["difference"])
    said = f"{worst['difference']:.2%} from the CPU's ({worst['run']}, {worst['method']})"
    if any(not row["agrees"] for row in rows):
        raise SectionFailed(f"losses are up to {said}, more than {gpu_finetune.TOLERANCE:.1%}")
    left_out = "".join(f"; {run}: {why}" for run, why in check.report["finetune_left_out"].items())
    return f"losses are at most {said}{left_out}"


def find_sanitizer() -> str | None:
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent)] if nvcc else []
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    directories = [f"{home}/bin" for home in (*homes, "/usr/local/cuda")] + beside
    path = os.pathsep.join([os.environ.get("PATH", ""), *directories])
    return shutil.which("compute-sanitizer", path=path)


def sanitizer(check: Check) -> str:
    """Runs the tests marked `sanitize` under each tool, in parallel."""
    if importlib.util.find_spec("pytest") is None:
        raise SectionSkipped(f"pytest is not installed for {sys.executable}: no test was run")
    program = find_sanitizer()
    if program is None:
        raise SectionSkipped("compute-sanitizer was not found on PATH or in the CUDA toolkit")
    test = [sys.executable, "-m", "pytest", "-q", "-m", "sanitize", "tests/ops/test_cuda.py"]
    # Without torch's cache each tensor is a separate allocation, whose bounds memcheck checks.
    env = child_environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    running = {}
    for tool in SANITIZER_TOOLS:
        options = ["--tool", tool, "--error-exitcode", "99", "--kernel-name", "kns=lowrank_ext"]
        running[tool] = start([program, *options, *test], LOGS / f"{tool}.log", env)
    end = time.monotonic() + check.share(SANITIZER_SHARE)
    results = {tool: finish(p, max(0.0, end - time.monotonic())) for tool, p in running.items()}
    check.report["sanitizer"] = results
    said = {
        tool: "clean"
        if status == 0
        else "OUT OF TIME"
        if status is None
        else f"exit status {status}, {last_line(LOGS / f'{tool}.log')}"
        for tool, status in results.items()
    }
    summary = "; ".join(f"{tool}: {what}" for tool, what in said.items())
    if any(status != 0 for status in results.values()):
        raise SectionFailed(f"{summary} (logs: {LOGS.relative_to(ROOT)}/)")
    return summary


# The measurements; gpu_measure is imported after the build, as it imports lowrank_ext


def measure_target(check: Check) -> str:
    import gpu_measure

    speed = copy_speed(check)
    check.report["target"] = gpu_measure.run_target(speed)
    check.report["lamda"] = gpu_measure.run_lamda(speed)
    ratios = {**check.report["target"]["both"]["ratios"]}
    ratios["LaMDA"] = check.report["lamda"]["both"]["ratios"]["ours"]
    said = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
    return f"{gpu_measure.TARGET}: forward + backward / frozen: {said}"


def measure_kernels(check: Check) -> str:
    import gpu_measure

    rows = gpu_measure.run_kernels(copy_speed(check))
    check.report["kernels"] = rows
    shares = [row["copy_share"] for row in rows if row["copy_share"] is not None]
    return f"{len(rows)} kernels, {min(shares):.0%} to {max(shares):.0%} of a copy's speed"


EXPERT_BENCHES = ("bench_moe", "bench_expert_forms", "bench_multi")


def measure_experts(check: Check) -> str:
    """Runs the scripts for mixtures of experts, their forms, and batches of many adapters."""
    if importlib.util.find_spec("peft") is None:
        raise SectionSkipped(f"peft, bench_multi's baseline, is not installed for {sys.executable}")
    tables = check.report["experts"] = {}
    arguments = ("--device", "cuda", "--quick", "--seconds", "1")
    for name in EXPERT_BENCHES:
        seconds = check.share(EXPERTS_SHARE / len(EXPERT_BENCHES))
        tables[name] = run_bench(name, arguments, seconds)
    return ", ".join(f"{name}: {len(rows)} rows" for name, rows in tables.items())


def run_bench(name: str, arguments: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """The rows of a benchmark; its table is in its log."""
    log, rows = LOGS / f"{name}.log", LOGS / f"{name}.json"
    rows.unlink(missing_ok=True)
    command = [sys.executable, f"benchmarks/{name}.py", "--json", str(rows), *arguments]
    status = finish(start(command, log, child_environment()), seconds)
    if status != 0:
        why = "out of time" if status is None else last_line(log)
        raise SectionFailed(f"{name}: {why} (log: {log.relative_to(ROOT)})")
    return json.loads(rows.read_text())["rows"]


def measure_grid(check: Check) -> str:
    """Measures case by case in the remaining time; a failing case does not stop the others."""
    import gpu_measure
    import torch
    from layers import WrongResult

    speed = copy_speed(check)
    cases = list(gpu_measure.grid())
    rows = check.report["grid"] = []
    failed = check.report["grid_failed"] = []
    for index, case in enumerate(cases):
        check.report["grid_left_out"] = [str(left) for left in cases[index:]]
        if check.left <= 0:
            break
        try:
            # Making and checking a case takes about half of its time.
            rows.append(gpu_measure.run_case(case, check.left / (len(cases) - index) / 2, speed))
        except (WrongResult, torch.OutOfMemoryError) as error:
            failed.append(f"{case}: {str(error).splitlines()[0]}")
        torch.cuda.empty_cache()
        check.save()
    else:
        check.report["grid_left_out"] = []
    if failed:
        raise SectionFailed(f"{len(failed)} cases failed, the first is {failed[0]}")
    return f"{len(rows)} of {len(cases)} cases"


def copy_speed(check: Check) -> float:
    """Speed of a large copy, measured once."""
    import gpu_measure
    from layers import peft_name

    if "copy_bytes_per_second" not in check.report:
        check.report["peft"] = peft_name()
        check.report["copy_bytes_per_second"] = gpu_measure.copy_bandwidth()
    return check.report["copy_bytes_per_second"]


# The tables at the end


def targets(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets with the measured values; None where not measured."""
    found = []
    for key, name in (("target", "ours"), ("lamda", "lamda")):
        text, limit = MAX_RATIO[name]
        value = report[key]["both"]["ratios"]["ours"] if key in report else None
        holds = None if value is None else value <= limit
        found.append({"target": text, "limit": f"<= {limit}", "value": value, "holds": holds})
    for row in report.get("kernels", []):
        if row["pass"]:
            text = f"{row['pass']}, share of copy bandwidth"
            value = row["copy_share"]
            limit = f">= {MIN_COPY_SHARE}"
            holds = value >= MIN_COPY_SHARE
            found.append({"target": text, "limit": limit, "value": value, "holds": holds})
    return found


def print_tables(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    card = f"{report['card']}, driver {report['driver']}, torch {report['torch']}"
    speed = report.get("copy_bytes_per_second")
    copied = f", copy {speed / 1e9:.0f} GB/s" if speed else ""
    console.print(f"\n{card}, {report['date'][:10]}{copied}", highlight=False)

    table = Table("target (stated for an H100)", "limit", "measured", "holds")
    for row in report["targets"]:
        value = "-" if row["value"] is None else f"{row['value']:.3f}"
        holds = {None: "not measured", True: "yes", False: "NO"}[row["holds"]]
        table.add_row(row["target"], row["limit"], value, holds)
    console.print(table)

    if report.get("kernels"):
        table = Table("kernel", "calls", "us", "of copy bandwidth")
        for row in report["kernels"]:
            share = "-" if row["copy_share"] is None else f"{row['copy_share']:.0%}"
            name = row["kernel"].partition("(")[0].removeprefix("void lowrank_ext::cuda::")
            table.add_row(name, str(row["calls"]), f"{row['microseconds']:.1f}", share)
        console.print(table)

    for name in report.get("experts", {}):
        print((LOGS / f"{name}.log").read_text())

    if report.get("finetune"):
        print_finetune(console, report["finetune"])

    if report.get("grid"):
        print_grid(console, report["grid"], report["peft"])
    left_out = report.get("grid_left_out", [])
    if left_out:
        console.print(f"{len(left_out)} cases left out for want of time, from {left_out[0]} on")


def print_finetune(console: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="lowrank-ext finetune --device cuda, a tiny Llama", title_justify="left")
    for name in ("run", "method", "held-out loss", "from the CPU's", "tokens/s", "peak MiB"):
        table.add_column(name, justify="left" if name in ("run", "method") else "right")
    for row in rows:
        speed = row["tokens_per_second"]
        table.add_row(
            row["run"],
            row["method"],
            f"{row['held_out'][0]:.4f} > {row['held_out'][-1]:.4f}",
            f"{row['difference']:.2%}{'' if row['agrees'] else ' NO'}",
            "-" if speed is None else f"{speed:,.0f}",
            f"{row['peak_bytes'] / 2**20:,.1f}",
        )
    console.print(table)


def print_grid(console: Any, rows: Sequence[Mapping[str, Any]], peft: str) -> None:
    from rich.table import Table

    title = f"time / frozen linear, forward and forward + backward; peft: {peft}, bf16 adapters"
    table = Table(title=title, title_justify="left")
    for name in ("M", "K = N", "r", "dropout", "frozen ms", "ours", "peft", "compile"):
        table.add_column(name, justify="right")
    table.add_column("branch, of copy", justify="right")
    table.add_column("us a call, ours / frozen", justify="right")
    for row in rows:
        both, forward = row["both"], row["forward"]
        ratios = [
            f"{forward['ratios'][name]:.2f} {both['ratios'][name]:.2f}"
            if name in both["ratios"]
            else "-"
            for name in ("ours", "peft", "compile")
        ]
        share = both["copy_share"]
        call = row.get("call_microseconds")
        table.add_row(
            str(row["num_rows"]),
            str(row["in_features"]),
            str(row["rank"]),
            str(row["dropout"]),
            f"{both['milliseconds']['frozen']:.3f}",
            *ratios,
            "-" if share is None else f"{share:.0%}",
            f"{call['ours']:.0f} / {call['frozen']:.0f}" if call else "",
        )
    console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", help="this section; may be given several times"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    reason = why_no_gpu()
    if reason is not None:
        print(f"gpu-check: skipped, no CUDA device ({reason})")
        return 0
    missing = what_is_missing()
    if missing is not None:
        print(f"error: gpu-check: {missing}", file=sys.stderr)
        return 1

    sys.path.insert(0, str(ROOT))
    check = Check(options.minutes, options.out, options.only or ())
    measures = [measure_target, measure_kernels, measure_experts, measure_grid]
    sections = [build, tests, finetune, sanitizer, *measures]
    outcomes = {}
    for name, section in zip(SECTIONS, sections, strict=True):
        if options.only and name not in options.only:
            continue
        outcomes[name] = check.run(name, section)
        if (name, outcomes[name]) == ("build", "FAILED"):
            break  # an earlier build must not be measured instead
    check.report["targets"] = targets(check.report)
    check.save()
    print_tables(check.report)
    print(f"{check.path}, {time.monotonic() - check.start:.0f} s")
    failed = [name for name, outcome in outcomes.items() if outcome == "FAILED"]
    if failed:
        print(f"gpu-check: FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
