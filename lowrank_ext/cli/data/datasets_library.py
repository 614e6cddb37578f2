"""Parquet files and datasets, read through pyarrow and the `datasets` library."""

import importlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from lowrank_ext.cli.data.sources import SAVED, Source, unknown_split
from lowrank_ext.cli.errors import UserError, as_user_error

_ROWS_AT_ONCE = 256
# Splits by part, the first that a dataset has.
_SPLITS = {"train": ("train",), "evaluation": ("validation", "valid", "dev", "eval", "test")}


def parquet_rows(file: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a Parquet file; columns without a value are None."""
    parquet = _library("pyarrow.parquet", name)
    number = 0
    # Exception: pyarrow's own, which derive from several
    with as_user_error(f"cannot read {name}", Exception):
        source = file if file.seekable() and hasattr(file, "fileno") else io.BytesIO(file.read())
        for batch in parquet.ParquetFile(source).iter_batches(batch_size=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def dataset_rows(source: Source, part: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of the split that the source names or that suits the part."""
    dataset, number = _load(source, part), 0
    with as_user_error(f"cannot read {source.location}", Exception):
        for batch in dataset.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def has_evaluation_split(source: Source) -> bool:
    """Whether a dataset without a chosen split has one for evaluation, beside one for training."""
    if not source.is_dataset or source.split is not None:
        return False
    splits = _splits(_open(source))
    return "train" in splits and any(name in splits for name in _SPLITS["evaluation"])


def _load(source: Source, part: str) -> Any:
    found = _open(source)
    splits = _splits(found)
    if not splits:
        return found
    where = f"{source.option} {source.location}"
    if len(splits) == 1:
        return found[splits[0]]
    for name in _SPLITS[part]:
        if name in splits:
            return found[name]
    wanted = " or ".join(_SPLITS[part])
    raise UserError(
        f"{where} has no split named {wanted}; it has: {', '.join(splits)}; choose one by "
        f"{source.location}:SPLIT"
    )


def _splits(dataset: Any) -> list[str]:
    """The names of the splits; none of a dataset that is one split."""
    return list(dataset) if isinstance(dataset, dict) else []


def _open(source: Source) -> Any:
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    datasets = _library("datasets", source.location)
    where = f"{source.option} {source.location}"
    if source.kind == SAVED:
        with as_user_error(f"cannot read {where}", Exception), _quiet(datasets):
            return datasets.load_from_disk(source.location)
    try:
        with as_user_error(f"cannot read {where}", Exception), _quiet(datasets):
            found = datasets.load_dataset(source.location)
    except UserError as error:
        if isinstance(error.__cause__, ConnectionError | datasets.exceptions.DatasetNotFoundError):
            raise UserError(
                f"{where}: no such file, and no dataset of that name in the local cache; "
                "lowrank-ext downloads nothing"
            ) from error
        raise
    if source.split is None:
        return found
    if source.split not in found:
        raise unknown_split(where, source.split, list(found))
    return found[source.split]


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without bars and without notes about the cache: errors say what matters."""
    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{what} needs {name.partition('.')[0]}: pip install 'lowrank-ext[finetune]'"
        ) from error
