"""What --text and --eval may name: files, directories of them, and datasets of the `datasets`
library, saved or cached."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowrank_ext.cli.errors import UserError, as_user_error, near_matches
from lowrank_ext.cli.files import exists, require_file

TEXT, JSON_LINES, JSON, CSV, PARQUET, SAVED, CACHED = (
    "text",
    "JSON lines",
    "JSON",
    "CSV",
    "Parquet",
    "saved dataset",
    "cached dataset",
)
_KINDS = {
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON,
    ".csv": CSV,
    ".tsv": CSV,
    ".parquet": PARQUET,
}
_COMPRESSED = ".gz"
# Formats that people have and that are not read: said by name instead of as text that is none.
_REFUSED = {
    ".zip": "unpack it",
    ".tar": "unpack it",
    ".tgz": "unpack it",
    ".bz2": "unpack it, or compress it by gzip",
    ".xz": "unpack it, or compress it by gzip",
    ".zst": "unpack it, or compress it by gzip",
    ".arrow": "give the directory that save_to_disk has written",
    ".xlsx": "save it as CSV",
    ".pdf": "convert it to text",
    ".docx": "convert it to text",
}
# What describes the data files that it lies beside.
_ABOUT = re.compile(
    r"(readme|licen[sc]e|notice|citation)(\.(md|txt|rst|cff))?|dataset_infos?\.json", re.IGNORECASE
)
_ID = re.compile(r"(?!.*\.\.)\w[\w.-]*(/\w[\w.-]*)?(:[\w.\[\]%:-]+)?")


# Files of a directory that is a dataset by their names, or by those of the folders they are in.
_SPLIT = re.compile(
    r"(?:(train)|(validation|valid|val|dev|eval)|(test))(?:[-_.]?\d.*)?", re.IGNORECASE
)
TRAIN, EVALUATION = "train", "evaluation"


@dataclass(frozen=True)
class Source:
    """A file, a saved or a cached dataset.

    Attributes:
        kind: how it is read, one of the names above.
        location: path, or the id of a cached dataset.
        option: the option that named it, for messages.
        split: of a dataset; None for the one that the part of the corpus asks for.
        may_be_empty: it was found in a directory.
        part: train or evaluation for a file that its name says so of, beside others of that kind.
    """

    kind: str
    location: str
    option: str
    split: str | None = None
    may_be_empty: bool = False
    part: str | None = None

    @property
    def is_dataset(self) -> bool:
        """Whether it may have splits."""
        return self.kind in (SAVED, CACHED)


def file_kind(name: str) -> str:
    """How a file of this name is read; text if nothing else is known of it."""
    return _KINDS.get(_suffix(name), TEXT)


def is_compressed(name: str) -> bool:
    """Whether a file of this name is read through gzip."""
    return name.lower().endswith(_COMPRESSED)


def check_source(option: str, name: str) -> None:
    """Raises UserError unless `name` is a file, a directory, or may be the id of a dataset."""
    what, path = f"{option} {name}", Path(name)
    if exists(what, path):
        if not path.is_dir():
            require_file(what, path)
    elif not _may_be_id(name):
        require_file(what, path)


def absolute(name: str) -> str:
    """The absolute path of a file or directory; another name, as an id, is unchanged."""
    return os.path.realpath(name) if os.path.exists(name) else name


def find_sources(option: str, names: tuple[str, ...]) -> tuple[list[Source], list[str]]:
    """The sources that the names stand for, those of a directory in the order of their paths, and
    the files that were left out because they only describe the others."""
    found: list[Source] = []
    left_out: list[str] = []
    for name in names:
        check_source(option, name)
        path = Path(name)
        if not os.path.exists(path):
            location, _, split = name.partition(":")
            found.append(Source(CACHED, location, option, split or None))
        elif not path.is_dir():
            found.append(_file(option, path))
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found.append(Source(SAVED, name, option))
        else:
            own, about = _in_directory(option, path)
            found += own
            left_out += about
    return found, left_out


def _may_be_id(name: str) -> bool:
    plain = name.partition(":")[0]
    known = {*_KINDS, *_REFUSED, _COMPRESSED, ".txt", ".md"}
    return _ID.fullmatch(name) is not None and Path(plain).suffix.lower() not in known


def _suffix(name: str) -> str:
    """The one that says how a file is read: of `x.JSONL.gz` `.jsonl`."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix == _COMPRESSED else path.suffix


def _file(option: str, path: Path, may_be_empty: bool = False, part: str | None = None) -> Source:
    suffix = _suffix(path.name)
    if suffix in _REFUSED:
        raise UserError(f"{option} {path}: {suffix} is not read; {_REFUSED[suffix]}")
    kind = file_kind(path.name)
    return Source(kind, str(path), option, may_be_empty=may_be_empty, part=part)


def _in_directory(option: str, directory: Path) -> tuple[list[Source], list[str]]:
    files = sorted(_files_below(option, directory))
    if not files:
        raise UserError(f"{option} {directory}: the directory holds no file")
    about = [path for path in files if _ABOUT.fullmatch(path.name)]
    own = [path for path in files if path not in about]
    if all(file_kind(path.name) == TEXT for path in own):
        own, about = files, []  # documents, of which a README is one
    parts, unused = _parts(directory, own)
    found = [_file(option, path, may_be_empty=True, part=parts.get(path)) for path in own]
    return [each for each in found if Path(each.location) not in unused], [
        str(path) for path in (*about, *unused)
    ]


def _parts(directory: Path, files: list[Path]) -> tuple[dict[Path, str], list[Path]]:
    """Part by file, where names tell train and evaluation apart, and the files of neither: of test
    beside validation."""
    by_split: dict[str, list[Path]] = {}
    for path in files:
        if file_kind(path.name) == TEXT and _suffix(path.name) != ".txt":
            continue  # train.py is a document
        relative = path.relative_to(directory)
        for name in (path.name.partition(".")[0], *relative.parts[:-1]):
            if found := _SPLIT.fullmatch(name):
                split = "train" if found[1] else "validation" if found[2] else "test"
                by_split.setdefault(split, []).append(path)
                break
    validation, test = by_split.get("validation", []), by_split.get("test", [])
    if "train" not in by_split or not (validation or test):
        return {}, []
    parts = dict.fromkeys(files, TRAIN)
    parts.update({path: EVALUATION for path in validation or test})
    return parts, test if validation else []


def _files_below(option: str, directory: Path) -> Iterator[Path]:
    """All regular files, without hidden files and directories."""

    def fail(error: OSError) -> None:
        raise error

    with as_user_error(f"{option} {directory}", OSError):
        for folder, folders, files in os.walk(directory, onerror=fail):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if not name.startswith("."):
                    require_file(f"{option} {Path(folder, name)}", Path(folder, name))
                    yield Path(folder, name)


def unknown_split(where: str, split: str, known: list[str]) -> UserError:
    """The error for a split that a dataset does not have."""
    return UserError(
        f"{where} has no split {split!r}{near_matches(split, known)}; it has: {', '.join(known)}"
    )
