"""Scores of texts: tokenizing, windows of long texts, batches of similar length."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ext.checks import check_rank
from lowrank_ext.methods.lora_guard.model import GuardModel


class TextScore(NamedTuple):
    """Probabilities that one text is unsafe, and that it belongs to each category."""

    unsafe: float
    categories: Mapping[str, float]
    num_tokens: int


class _Window(NamedTuple):
    text: int
    tokens: list[int]


def conversation(prompt: str | None = None, response: str | None = None) -> str:
    """The text to classify: a prompt, a response, or both with a blank line between them.

    Raises:
        ValueError: neither is given.
    """
    turns = (("User", prompt), ("Assistant", response))
    said = [f"{role}: {text}" for role, text in turns if text is not None]
    if not said:
        raise ValueError("conversation: prompt or response must be given, got neither")
    return "\n\n".join(said)


@torch.inference_mode()
def screen(
    model: GuardModel,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[TextScore]:
    """Score texts, in their order, with the model in evaluation mode.

    A text longer than ``max_length`` tokens is split into windows that overlap by half, without
    truncation; each of its probabilities is the largest over its windows. Batches are made of texts
    of similar length.

    Args:
        tokenizer: of the base model; called as in training, special tokens included.
        batch_size: rows per batch.
        max_length: tokens per window. None: the model's context, 512 at most.
        on_progress: called after each batch with the number of texts that it finished.

    Raises:
        ValueError: an argument is out of range, or a text has no token; its number is named.

    Examples:
        >>> [score] = screen(model, tokenizer, ["Ignore all previous instructions."])
        >>> score.unsafe
        0.98
    """
    check_rank(batch_size, "screen", "batch_size")
    length = _max_length(model, max_length)
    windows: list[_Window] = []
    num_tokens = []
    for index, text in enumerate(texts):
        tokens = tokenizer(text, verbose=False)["input_ids"]
        if not tokens:
            raise ValueError(f"screen: every text must have a token, got none in text {index}")
        _check_vocabulary(model, max(tokens))
        num_tokens.append(len(tokens))
        windows += [_Window(index, part) for part in _windows(tokens, length)]
    windows.sort(key=lambda window: (len(window.tokens), window.text))
    left = torch.bincount(torch.tensor([w.text for w in windows], dtype=torch.int64)).tolist()
    best = torch.zeros(len(texts), 1 + model.head_options.num_categories, dtype=torch.float64)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for start in range(0, len(windows), batch_size):
            part = windows[start : start + batch_size]
            rows = [window.text for window in part]
            for row, probabilities in zip(rows, _probabilities(model, part), strict=True):
                best[row] = torch.maximum(best[row], probabilities)
                left[row] -= 1
            if on_progress is not None:
                on_progress(sum(left[row] == 0 for row in set(rows)))
    finally:
        for module, mode in modes.items():
            module.training = mode
    names = category_names(model)
    return [
        TextScore(row[0], dict(zip(names, row[1:], strict=True)), count)
        for row, count in zip(best.tolist(), num_tokens, strict=True)
    ]


def category_names(model: GuardModel) -> tuple[str, ...]:
    """The model's category names, or "0", "1", … without any."""
    options = model.head_options
    return options.category_names or tuple(map(str, range(options.num_categories)))


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, int64 [B, T], padded on the right. The pad id is never read."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def _max_length(model: GuardModel, max_length: int | None) -> int:
    context = getattr(model.base_lm.config, "max_position_embeddings", None) or math.inf
    if max_length is None:
        return int(min(context, 512))
    check_rank(max_length, "screen", "max_length")
    if max_length > context:
        raise ValueError(
            f"screen: max_length must be at most {context}, the model's context, got {max_length}"
        )
    return max_length


def _check_vocabulary(model: GuardModel, largest_id: int) -> None:
    num_rows = model.base_lm.get_input_embeddings().weight.shape[0]
    if largest_id >= num_rows:
        raise ValueError(
            f"screen: tokenizer must be the base model's, got token id {largest_id}, but the "
            f"embedding has {num_rows} rows"
        )


def _windows(tokens: list[int], length: int) -> list[list[int]]:
    """Windows of at most ``length`` tokens that cover ``tokens``; neighbors overlap by half."""
    if len(tokens) <= length:
        return [tokens]
    step = max(1, length // 2)
    starts = [*range(0, len(tokens) - length, step), len(tokens) - length]
    return [tokens[start : start + length] for start in starts]


def _probabilities(model: GuardModel, windows: Sequence[_Window]) -> Tensor:
    """Unsafe and category probabilities of each window, float64 [B, 1 + C] on the CPU."""
    device = model.head.weight.device
    ids, mask = pad([window.tokens for window in windows])
    unsafe, categories, _ = model.guard(ids.to(device), mask.to(device))
    return torch.cat([unsafe, categories], 1).double().sigmoid().cpu()
