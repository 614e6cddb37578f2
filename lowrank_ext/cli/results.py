"""Directories that a command writes as a whole, and replaces only where it wrote them itself."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lowrank_ext as lr
from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.files import exists, require_directory, write_json
from lowrank_ext.files import printable, read_json_object

_MAX_BYTES = 2**20


def check_replaceable(out: Path, record: str, inputs: Iterable[str]) -> None:
    """Raises UserError unless the directory `out` is new, empty, or holds only what a run of the
    same command has written there, and none of the command's inputs.

    Args:
        record: name of the file that `write_record` writes.
        inputs: paths that the command reads; others are no files, as ids of models.
    """
    what = f"--out {out}"
    if not exists(what, out):
        return
    require_directory(what, out)
    real = Path(os.path.realpath(out))
    for each in inputs:
        path = Path(os.path.realpath(each))
        if os.path.exists(each) and real in (path, *path.parents):
            raise UserError(f"{what}: it holds the input {each}; give another directory")
    there = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    written = _written(out / record) if record in there else set()
    if others := sorted(there - written):
        raise UserError(
            f"{what}: it must be new, empty or written by this command, got one with "
            f"{printable(others[0])}; give another directory"
        )


def _written(path: Path) -> set[str]:
    """The names of files in a record, its own with them."""
    with as_user_error("cannot read", OSError, ValueError):
        files = read_json_object(path, "--out", _MAX_BYTES).get("files")
    names = files if isinstance(files, list) else []
    return {path.name, *(name for name in names if isinstance(name, str))}


def write_record(directory: Path, record: str, facts: Mapping[str, Any]) -> None:
    """Writes what the files of a directory are made of and their names, by which
    `check_replaceable` knows them again."""
    files = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    write_json(directory / record, {"lowrank_ext": lr.__version__, **facts, "files": files})
