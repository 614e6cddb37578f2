"""Plain text as one stream of tokens in blocks of equal length, and batches of them that depend on
seed and step alone."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_ext.cli.data.examples import DEFAULT_SOURCE, default_documents, read_records
from lowrank_ext.cli.data.formats import TEXT, TextExample, to_example
from lowrank_ext.cli.data.report import number_of
from lowrank_ext.cli.data.split import MIN_DOCUMENTS_TO_SPLIT, split_examples
from lowrank_ext.cli.errors import UserError


def text_batch(tokens: Tensor) -> dict[str, Tensor]:
    """Tokens [..., seq_len] as the arguments of a model that is trained on all of them."""
    return {"input_ids": tokens, "labels": tokens}


@dataclass(frozen=True)
class TokenBlocks:
    """Token blocks [num_blocks, seq_len], int64.

    Attributes:
        description: source, number of documents, and how many tokens fill no block.
    """

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


def load_documents(names: tuple[str, ...], field: str) -> list[str]:
    """The texts of files, directories and datasets; without a name Python's language topics."""
    if not names:
        return [text for _, text in default_documents()]
    examples = [to_example(record, field, TEXT) for record in read_records("--text", names)]
    return [example.text for example in examples if isinstance(example, TextExample)]


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """(train, held-out) by `split_examples`, whole documents in the order of their hashes."""
    train, held_out = split_examples([TextExample(text, "") for text in documents])
    if len(documents) >= MIN_DOCUMENTS_TO_SPLIT:
        train = sorted(train, key=lambda each: hashlib.sha256(each.text.encode()).digest())
    return [example.text for example in train], [example.text for example in held_out]


def token_blocks(documents: list[str], tokenizer: Any, seq_len: int) -> tuple[Tensor, int]:
    """All documents, joined by the end-of-text token, in rows [num_blocks, seq_len], and how many
    tokens at the end fill no row and are dropped."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for text in documents:
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
    num_blocks, rest = divmod(len(tokens), seq_len)
    whole = torch.tensor(tokens[: num_blocks * seq_len], dtype=torch.int64)
    return whole.view(num_blocks, seq_len), rest


def load_blocks(names: tuple[str, ...], field: str, tokenizer: Any, seq_len: int) -> TokenBlocks:
    """Reads, splits, tokenizes. Raises UserError when either part is shorter than one block."""
    documents = load_documents(names, field)
    train_text, held_out_text = split_documents(documents)
    train, train_rest = token_blocks(train_text, tokenizer, seq_len)
    held_out, held_out_rest = token_blocks(held_out_text, tokenizer, seq_len)
    if min(train.shape[0], held_out.shape[0]) == 0:
        raise UserError(
            f"the text is too short: training and held-out part need {seq_len} tokens each, one "
            "sequence; give more text or a smaller --seq-len"
        )
    source = ", ".join(names) if names else DEFAULT_SOURCE
    description = f"{source}: {number_of(len(documents), 'documents')}"
    if rest := train_rest + held_out_rest:
        tokens = number_of(rest, "tokens")
        description += f", {tokens} left out at the ends of both parts for want of a whole row"
    return TokenBlocks(train, held_out, description)
