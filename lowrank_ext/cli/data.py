"""Text to token blocks: documents, the held-out split, and batches that depend on seed and step
alone."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ext.cli.errors import UserError, as_user_error

HELD_OUT_FRACTION = 0.1
# Below this number the tail of each document is held out instead of whole documents.
MIN_DOCUMENTS_TO_SPLIT = 10


@dataclass(frozen=True)
class Corpus:
    """Token blocks [num_blocks, seq_len], int64."""

    train: Tensor
    held_out: Tensor
    description: str

    def train_batch(self, step: int, batch: int, seed: int) -> Tensor:
        """The batch [batch, seq_len] of a step; each epoch's order depends on seed and epoch."""
        num_blocks = self.train.shape[0]
        permutations: dict[int, Tensor] = {}
        rows = []
        for position in range(step * batch, (step + 1) * batch):
            epoch, index = divmod(position, num_blocks)
            if epoch not in permutations:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                permutations[epoch] = torch.randperm(num_blocks, generator=generator)
            rows.append(permutations[epoch][index])
        return self.train[torch.stack(rows)]

    def held_out_batches(self, batch: int, most: int) -> list[Tensor]:
        """At most `most` batches of `batch` rows; a shorter one if the held-out text has fewer."""
        batches = list(self.held_out.split(batch))
        whole = [rows for rows in batches if rows.shape[0] == batch]
        return (whole or batches)[:most]

    def digest(self) -> str:
        """Identifies the tokens, so that --resume notices that the text has changed."""
        digest = hashlib.sha256(self.train.numpy().tobytes())
        digest.update(self.held_out.numpy().tobytes())
        return digest.hexdigest()


def load_documents(paths: tuple[str, ...], field: str) -> list[str]:
    """Documents of .txt files (one per file) and .jsonl files (one per line); without a path
    Python's language topics."""
    if not paths:
        from pydoc_data import topics

        return list(topics.topics.values())
    documents: list[str] = []
    for path in map(Path, paths):
        with as_user_error(f"cannot read {path}", OSError, UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise UserError(f"--text {path}: the file is empty")
        documents += _json_lines(path, text, field) if path.suffix == ".jsonl" else [text]
    return documents


def _json_lines(path: Path, text: str, field: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"--text {path}: line {number} is not JSON: {error}") from error
        value = record.get(field) if isinstance(record, dict) else None
        if isinstance(record, dict) and field in record and not isinstance(value, str):
            raise UserError(
                f"--text {path}: line {number}: {field!r} must be text, got "
                f"{type(value).__name__}; see --field"
            )
        if not isinstance(value, str):
            there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(
                f"--text {path}: line {number} has no text field {field!r} "
                f"(it has: {there}); see --field"
            )
        documents.append(value)
    return documents


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """(train, held-out). Whole documents are held out, chosen by a hash of their text, so that the
    choice depends on neither the order of the files nor --seed; of a few documents the tails."""
    if len(documents) < MIN_DOCUMENTS_TO_SPLIT:
        cuts = [round(len(text) * (1 - HELD_OUT_FRACTION)) for text in documents]
        return (
            [text[:cut] for text, cut in zip(documents, cuts, strict=True)],
            [text[cut:] for text, cut in zip(documents, cuts, strict=True)],
        )
    wanted = HELD_OUT_FRACTION * sum(map(len, documents))
    by_hash = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out: list[str] = []
    while sum(map(len, held_out)) < wanted:
        held_out.append(by_hash[len(held_out)])
    return by_hash[len(held_out) :], held_out


def token_blocks(documents: list[str], tokenizer: Any, seq_len: int) -> Tensor:
    """All documents, joined by the end-of-text token, in rows [num_blocks, seq_len]; a remainder is
    dropped."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for text in documents:
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
    num_blocks = len(tokens) // seq_len
    return torch.tensor(tokens[: num_blocks * seq_len], dtype=torch.int64).view(num_blocks, seq_len)


def load_corpus(paths: tuple[str, ...], field: str, tokenizer: Any, seq_len: int) -> Corpus:
    """Reads, splits, tokenizes. Raises UserError when either part is shorter than one sequence."""
    # ValueError and TypeError: strings that JSON may hold, but that are no text
    with as_user_error("the text cannot be read", ValueError, TypeError, RecursionError):
        documents = load_documents(paths, field)
        train_text, held_out_text = split_documents(documents)
        train = token_blocks(train_text, tokenizer, seq_len)
        held_out = token_blocks(held_out_text, tokenizer, seq_len)
    if min(train.shape[0], held_out.shape[0]) == 0:
        raise UserError(
            f"the text is too short: training and held-out part need {seq_len} tokens each, one "
            "sequence; give more text or a smaller --seq-len"
        )
    source = ", ".join(paths) if paths else "pydoc_data.topics"
    return Corpus(train, held_out, f"{source}: {len(documents)} documents")
