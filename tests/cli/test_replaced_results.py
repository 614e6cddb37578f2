"""A run replaces what an earlier run has written, and nothing that a user has."""

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error
from recursive_runs import uptrain

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(params=["finetune", "finetune full", "uptrain"])
def job(request: Any, run: Any, recursive_model: Path, text_file: Path) -> Any:
    """A run into a directory, and the name of its result."""
    if request.param == "uptrain":
        return "model", lambda out, model=recursive_model, text=text_file: uptrain(
            model, None, text, out, loss="ce", steps=1
        )
    method = "full" if request.param.endswith("full") else "lora"
    name = "model" if method == "full" else "adapter"

    def start(out: Path, model: Path | None = None, text: Path = text_file) -> Any:
        own = {} if model is None else {"model": model}
        return run(out=out, method=method, text=text, **own)

    return name, start


def test_a_users_directory_is_kept(job: Any, tmp_path: Path) -> None:
    name, start = job
    mine = tmp_path / "out" / name / "mine"
    mine.parent.mkdir(parents=True)
    mine.touch()
    words = f"--out {tmp_path / 'out'}", f"{name} is there, and no run has written it"
    check_error(start(tmp_path / "out"), *words)
    assert mine.exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    mine.unlink()
    assert start(tmp_path / "out").exit_code == 0, "an empty one holds nothing"


def test_a_file_in_its_place_is_kept(job: Any, tmp_path: Path) -> None:
    name, start = job
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    check_error(start(tmp_path / "out"), f"{name} is there, and no run has written it")
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_out_is_outside_of_the_data(job: Any, tmp_path: Path, text_file: Path) -> None:
    """Its log would be a document, and --resume would find other data."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(text_file, data / "text.txt")
    (tmp_path / "link").symlink_to(data)
    for out in (data / "out", data, tmp_path / "link" / "a" / "b"):
        check_error(job[1](out, text=data), f"--out {out}: must be outside of {data}")
    assert [path.name for path in data.iterdir()] == ["text.txt"]
    assert job[1](tmp_path / "data-out", text=data).exit_code == 0


@pytest.mark.parametrize(
    "methods", [{"method": "lora"}, {"method": None, "compare": "frozen,lora"}]
)
def test_an_earlier_run_stays_when_the_new_one_cannot_begin(
    run: Any, tmp_path: Path, methods: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    assert run(out=out, **methods).exit_code == 0

    def files() -> dict[Path, bytes]:
        found = (path for path in out.rglob("*") if path.is_file() and path.suffix != ".log")
        return {path: path.read_bytes() for path in found}

    before, log = files(), (out / "finetune.log").read_text()
    check_error(run(out=out, targets="nope", **methods), "target_modules must match a module")
    assert files() == before
    assert "lora: finished" in log and (out / "finetune.log").read_text().startswith(log)


def test_an_earlier_run_is_replaced(job: Any, tmp_path: Path) -> None:
    name, start = job
    assert start(tmp_path / "out").exit_code == 0
    (tmp_path / "out" / name / "stale").touch()
    assert start(tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out" / name / "stale").exists()


def test_a_run_does_not_replace_its_input(
    job: Any, tiny_model: Path, recursive_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """Neither directly, nor through a link, nor a text that lies within."""
    name, start = job
    out = tmp_path / "out"
    assert start(out).exit_code == 0
    result = out / name
    shutil.rmtree(result)
    shutil.copytree(recursive_model if name == "model" else tiny_model, result)
    shutil.copy(text_file, result / "text.txt")
    (tmp_path / "link").symlink_to(result)
    before = sorted(path.name for path in result.iterdir())
    for inputs in (
        {"model": result},
        {"model": tmp_path / "link"},
        {"text": result / "text.txt"},
    ):
        check_error(start(out, **inputs), f"--out {out}: the run would replace its own input")
        assert sorted(path.name for path in result.iterdir()) == before


def contents(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def test_a_run_writes_nothing_beside_the_weights_that_it_reads(
    request: Any, job: Any, tiny_model: Path, recursive_model: Path, tmp_path: Path
) -> None:
    """Named directly or through a link. A directory below theirs, or above, holds the run alone."""
    name, start = job
    model = tmp_path / "models" / "base"
    is_uptrain = request.node.callspec.params["job"] == "uptrain"
    shutil.copytree(recursive_model if is_uptrain else tiny_model, model)
    (tmp_path / "link").symlink_to(model)
    before = contents(model)
    for out in (model, tmp_path / "link"):
        words = f"--out {out}: it holds the input {model}; give another directory"
        check_error(start(out, model=model), words)
    assert contents(model) == before
    for out in (model / "runs" / "a", model.parent):
        result = start(out, model=model)
        assert result.exit_code == 0, result.output
        assert (out / name).is_dir()


def test_nor_beside_a_teacher_an_adapter_or_one_of_several_results(
    run: Any, recursive_model: Path, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_model, tmp_path / "runs" / "lora")
    words = f"it holds the input {teacher}; give another directory"
    before = contents(teacher)
    check_error(uptrain(recursive_model, teacher, text_file, teacher), words)
    several = {"method": None, "compare": "frozen,lora"}
    check_error(run(out=tmp_path / "runs", model=teacher, **several), words)
    assert contents(tmp_path / "runs") == {teacher, *before}
    first = tmp_path / "first"
    assert run(out=first).exit_code == 0
    before = contents(first / "adapter")
    for out, words in (
        (first / "adapter", f"it holds the input {first / 'adapter'}"),
        (first, f"the run would replace its own input {first / 'adapter'}"),
    ):
        check_error(run(out=out, adapter=first, rank=None), words)
    assert contents(first / "adapter") == before
