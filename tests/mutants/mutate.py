"""Mutation check, `make mutants`: plants each fault of mutants.toml and looks whether a test fails.

Works in copies of the tree under build/mutants, where it builds what a mutant needs. Results are
kept in build/mutants/report.json; a mutant runs again when its file, its tests or it has changed.
"""

import argparse
import hashlib
import json
import os
import queue
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutants"
LEAST_KILLED = 0.95
TIMEOUT = 900  # seconds, of the tests; one that hangs has noticed the fault
KILLED, SURVIVED, UNBUILT, BROKEN = "killed", "survived", "does not build", "broken"


@dataclass
class Mutant:
    """A fault: ``old``, which occurs once in ``file``, becomes ``new``; ``tests`` should fail.

    select: pytest's -k, to run only the cases of the tests that may notice.
    """

    name: str
    kind: str
    file: str
    old: str
    new: str
    tests: list[str]
    select: str = ""

    @property
    def build(self) -> str:
        """What has to be built: "simt", "cpu" or nothing."""
        if not self.file.startswith("csrc/"):
            return ""
        return "simt" if self.file.startswith("csrc/cuda/") else "cpu"

    def digest(self, root: Path = ROOT) -> str:
        files = [self.file, *(test.partition("::")[0] for test in self.tests)]
        parts = [repr(asdict(self)), *((root / name).read_text() for name in files)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass
class Result:
    outcome: str
    detail: str = ""
    seconds: float = 0.0


def read_mutants() -> list[Mutant]:
    text = Path(__file__).with_name("mutants.toml").read_text()
    return [Mutant(**entry) for entry in tomllib.loads(text)["mutant"]]


def problem_of(mutant: Mutant, root: Path = ROOT) -> str:
    """Why the mutant cannot be planted any more; empty where it can."""
    path = root / mutant.file
    count = path.read_text().count(mutant.old) if path.is_file() else 0
    return "" if count == 1 else f"{mutant.file} holds the old text {count} times, not once"


@dataclass
class Tree:
    """A copy of the working tree. Files with the same text keep their time, and so their builds."""

    root: Path
    built: set[str] = field(default_factory=set)

    def synchronize(self) -> None:
        listed = run(["git", "ls-files", "-co", "--exclude-standard", "-z"], ROOT).stdout
        names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
        record = self.root / ".files.json"
        before = set(json.loads(record.read_text())) if record.is_file() else set()
        for name in before - names:
            (self.root / name).unlink(missing_ok=True)
        for name in names:
            source, target = ROOT / name, self.root / name
            if not target.is_file() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
        record.write_text(json.dumps(sorted(names)))
        if not (self.root / ".venv").exists():
            (self.root / ".venv").symlink_to((ROOT / ".venv").resolve())

    def build(self, kind: str) -> str:
        """The first error of the compiler; empty where it built."""
        commands = {
            "cpu": [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            # -o: the copy shares .venv, which make must not bring up to date for it.
            "simt": ["make", "-o", ".venv/stamps/dependencies", "simt", f"JOBS={os.cpu_count()}"],
        }
        done = run(commands[kind], self.root, LOWRANK_EXT_CUDA="OFF")
        output = (done.stdout + done.stderr).splitlines()
        errors = [line for line in output if "error" in line.lower()] or output[-1:]
        return "" if done.returncode == 0 else errors[0]

    def test(self, mutant: Mutant) -> subprocess.CompletedProcess[str]:
        options = ["-q", "-x", "--tb=no", "-p", "no:randomly", "-p", "no:cacheprovider"]
        select = ["-k", mutant.select] if mutant.select else []
        python = [sys.executable, "-B", "-m", "pytest"]
        return run([*python, *options, *select, *mutant.tests], self.root, TIMEOUT)

    def prepare(self, kind: str) -> None:
        """Package and executor as they are, once: tests of one import the other."""
        for needed in ("cpu", kind):
            if needed and needed not in self.built:
                if error := self.build(needed):
                    raise SystemExit(f"error: the tree itself does not build: {error}")
                self.built.add(needed)

    def outcome_of(self, mutant: Mutant) -> Result:
        self.prepare(mutant.build)
        path = self.root / mutant.file
        text = path.read_text()
        path.write_text(text.replace(mutant.old, mutant.new))
        try:
            error = self.build(mutant.build) if mutant.build else ""
            return Result(UNBUILT, error) if error else judged(self.test(mutant))
        except subprocess.TimeoutExpired:
            return Result(KILLED, f"more than {TIMEOUT} s")
        finally:
            path.write_text(text)


def judged(done: subprocess.CompletedProcess[str]) -> Result:
    """pytest's exit code 1 is a failed test, a negative one a crash; others are no verdict."""
    lines = done.stdout.splitlines()
    failed = next((line for line in lines if line.startswith("FAILED")), lines[-1] if lines else "")
    if done.returncode == 0:
        return Result(SURVIVED)
    return Result(KILLED if done.returncode in (1, *range(-64, 0)) else BROKEN, failed)


def run(
    command: list[str], cwd: Path, timeout: float | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    settings = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(cwd),
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may have the size and the second of its original
    }
    env = os.environ | settings | environment
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )


class Report:
    """build/mutants/report.json, written after every mutant: an interrupted run goes on there."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        known = path.is_file() and not fresh
        self.entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if known else {}

    def has(self, mutant: Mutant) -> bool:
        entry = self.entries.get(mutant.name, {})
        return entry.get("digest") == mutant.digest() and entry["outcome"] in (KILLED, SURVIVED)

    def add(self, mutant: Mutant, result: Result) -> None:
        about = {"kind": mutant.kind, "file": mutant.file, "digest": mutant.digest()}
        self.entries[mutant.name] = about | asdict(result)
        text = json.dumps(self.entries, indent=1, ensure_ascii=False)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(text + "\n")
        temporary.replace(self.path)


def unharmed(tree: Tree, mutants: list[Mutant]) -> str:
    """A named test that fails without any mutant; empty where all pass."""
    for kind in {mutant.build for mutant in mutants}:
        tree.prepare(kind)
    for selects in ({m.select for m in mutants if m.select}, {""}):
        tests = sorted({test for m in mutants if m.select in selects for test in m.tests})
        together = " or ".join(f"({select})" for select in sorted(selects) if select)
        result = judged(tree.test(Mutant("", "", "", "", "", tests, together)))
        if tests and result.outcome != SURVIVED:
            return result.detail
    return ""


def run_mutants(mutants: list[Mutant], trees: list[Tree], report: Report) -> None:
    free: queue.SimpleQueue[Tree] = queue.SimpleQueue()
    for tree in trees:
        free.put(tree)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress,
        ThreadPoolExecutor(len(trees)) as pool,
    ):
        task = progress.add_task("mutants", total=len(mutants))

        def one(mutant: Mutant) -> None:
            tree = free.get()
            start = time.monotonic()
            try:
                result = tree.outcome_of(mutant)
            finally:
                free.put(tree)
            result.seconds = round(time.monotonic() - start, 1)
            report.add(mutant, result)
            progress.update(task, advance=1, description=f"{result.outcome}: {mutant.name}"[:70])

        for _ in pool.map(one, mutants):
            pass


def show(mutants: list[Mutant], report: Report) -> bool:
    """The table of results; whether enough mutants were killed and all of them had a verdict."""
    table = Table("mutant", "kind", "file", "outcome", "seconds")
    for mutant in mutants:
        entry = report.entries[mutant.name]
        outcome, seconds = entry["outcome"], f"{entry['seconds']:.0f}"
        table.add_row(mutant.name, mutant.kind, mutant.file, outcome, seconds)
    Console(width=160).print(table)
    outcomes = [report.entries[mutant.name]["outcome"] for mutant in mutants]
    killed, judgeable = outcomes.count(KILLED), {*outcomes} <= {KILLED, SURVIVED}
    print(f"{killed} of {len(mutants)} killed ({killed / len(mutants):.0%}); {report.path}")
    return judgeable and killed >= LEAST_KILLED * len(mutants)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="part of a name or a file")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time, a tree for each")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    wanted = [
        mutant
        for mutant in sorted(read_mutants(), key=lambda mutant: (mutant.build, mutant.file))
        if not options.only or any(o in mutant.name or o in mutant.file for o in options.only)
    ]
    problems = [f"{m.name}: {problem}" for m in wanted if (problem := problem_of(m))]
    if problems or not wanted:
        sys.exit("\n".join(["error: no mutants to plant", *problems]))
    trees = [Tree(WORK / ("tree" if i == 0 else f"tree{i}")) for i in range(options.jobs)]
    for tree in trees:
        tree.root.mkdir(parents=True, exist_ok=True)
        tree.synchronize()
    report = Report(WORK / "report.json", options.fresh)
    left = [mutant for mutant in wanted if not report.has(mutant)]
    if left and (failed := unharmed(trees[0], left)):
        sys.exit(f"error: without any mutant a named test fails: {failed}")
    run_mutants(left, trees, report)
    return 0 if show(wanted, report) else 1


if __name__ == "__main__":
    sys.exit(main())
