"""Saving: new files alone are written, links never followed, many savers at once leave one save."""

import json
import multiprocessing
import os
import secrets
import threading
from pathlib import Path

import pytest
import torch

from lowrank_ext.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    open_adapter_files,
    write_adapter_files,
)
from lowrank_ext.files import locked, new_file, write_file


def save(where: Path, tag: int) -> None:
    """A save whose files all hold ``tag``; two of three have equal weights."""
    tensors = {"a": torch.full((tag % 3 + 1, 50), float(tag // 2))}
    companion = {"companion.json": lambda digest: json.dumps({"tag": tag}).encode()}
    write_adapter_files(where, {"tag": tag, "weights": tag // 2}, tensors, {}, companion)


def check_one_save(where: Path) -> int:
    with open_adapter_files(where, "test") as files:
        value = files.with_values().tensors["a"]
        assert value.eq(files.config["weights"]).all(), "config and weights of two saves"
        return files.config["tag"]


def test_names_beside_the_files_are_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies at the name of a temporary file: a link, a FIFO, a file of somebody else."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * count)
    name = f".{CONFIG_NAME}-{'0' * 8}"
    for make in (
        lambda path: path.symlink_to(victim),
        os.mkfifo,
        Path.mkdir,
        lambda path: path.write_text("theirs"),
    ):
        make(out / name)
        with pytest.raises(FileExistsError):
            save(out, 1)
        assert [path.name for path in out.iterdir()] == [name]
        (out / name).rmdir() if (out / name).is_dir() else (out / name).unlink()
    assert victim.read_text() == "kept"
    # the names that earlier versions could be predicted to use
    for old in (CONFIG_NAME, WEIGHTS_NAME):
        (out / f".{old}.{os.getpid()}").symlink_to(victim)
    save(out, 1)
    assert check_one_save(out) == 1 and victim.read_text() == "kept"


def test_links_at_the_names_of_the_files_are_replaced(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    out = tmp_path / "out"
    out.mkdir()
    (out / CONFIG_NAME).symlink_to(victim)
    os.mkfifo(out / WEIGHTS_NAME)
    save(out, 4)
    assert check_one_save(out) == 4 and victim.read_text() == "kept"
    write_file(out / "x", b"new")
    (out / "link").symlink_to(victim)
    write_file(out / "link", b"new")
    assert victim.read_text() == "kept" and not (out / "link").is_symlink()


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME, "companion.json"])
def test_a_directory_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name} must be a file, got a directory"):
        save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        new_file(tmp_path / "x", b"data")
    assert not list(tmp_path.iterdir())


def test_a_lock_excludes_other_threads(tmp_path: Path) -> None:
    inside = []

    def enter(index: int) -> None:
        for _ in range(20):
            with locked(tmp_path):
                inside.append(index)
                assert len(inside) == 1
                inside.pop()

    run_all([threading.Thread(target=enter, args=(i,)) for i in range(4)])


def run_all(workers: list) -> None:
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_many_savers_and_readers_at_once(kind: str, tmp_path: Path) -> None:
    """No saver fails, no reader sees files of two saves, nothing is left beside the files."""
    rounds, failures = 12, []
    save(tmp_path, 0)

    def saver(first: int) -> None:
        try:
            for i in range(rounds):
                save(tmp_path, 100 * first + i)
        except BaseException as error:
            failures.append(error)
            raise

    def reader() -> None:
        try:
            for _ in range(2 * rounds):
                check_one_save(tmp_path)
        except BaseException as error:
            failures.append(error)

    context = multiprocessing.get_context("fork")
    worker = threading.Thread if kind == "threads" else context.Process
    savers = [worker(target=saver, args=(i,)) for i in range(1, 4)]
    run_all([*savers, threading.Thread(target=reader)])
    assert not failures
    if kind == "processes":
        assert [process.exitcode for process in savers] == [0, 0, 0]
    tag = check_one_save(tmp_path)
    assert json.loads((tmp_path / "companion.json").read_text()) == {"tag": tag}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {CONFIG_NAME, WEIGHTS_NAME, "companion.json"}
