"""Requests, how their tokens are chosen, and what they end as."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ext.checks import check_number

_LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from logits.

    Attributes:
        temperature: logits are divided by it; 0: the most likely token; else at least 1e-6.
        top_k: only the k most likely tokens; None: all.
        top_p: the smallest set of tokens that together have this probability.
        seed: of the request's own generator; None: a random one.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number(self.temperature, "Sampling", "temperature")
        if 0 < self.temperature < _LEAST_TEMPERATURE:
            raise ValueError(
                f"Sampling: temperature must be 0 or at least {_LEAST_TEMPERATURE:g}, got "
                f"{self.temperature}; logits over it would overflow"
            )
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"Sampling: {name} must be an int or None, got {value!r}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"Sampling: seed must be from 0 to 2**64 - 1, got {self.seed}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Sampling: top_k must be at least 1, got {self.top_k}")
        check_number(self.top_p, "Sampling", "top_p", positive=True)
        if self.top_p > 1:
            raise ValueError(f"Sampling: top_p must be at most 1, got {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


class Sampler:
    """Chooses the tokens of one request, with transformers' own filters and a generator."""

    def __init__(self, sampling: Sampling) -> None:
        from transformers.generation import logits_process as processors

        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._processors: list[Any] = []
        if sampling.temperature != 1:
            self._processors.append(processors.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k is not None:
            self._processors.append(processors.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._processors.append(processors.TopPLogitsWarper(sampling.top_p))

    def choose(self, logits: Tensor) -> int:
        """A token for ``logits`` [V]."""
        scores = logits.detach().float().cpu().unsqueeze(0)
        for processor in self._processors:
            scores = processor(None, scores)
        chosen = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        return int(chosen)


class Token(NamedTuple):
    """A new token of a request.

    Attributes:
        request: the request's id.
        token: the token's id, or None where the request has ended without one. What is cancelled
            between two steps gives no Token.
        finish_reason: None while the request goes on; else as in ``Result``.
    """

    request: object
    token: int | None
    finish_reason: str | None


@dataclass
class Result:
    """What has become of a request.

    Attributes:
        tokens: its new tokens so far, without the prompt.
        finish_reason: None while it runs; "stop" (a stop token or string; the token is the last
            one), "length" (max_new_tokens, or the engine's max_length), "cancelled" or "error".
        error: the message, for "error".
        exit_loops: the loop after which each token left the model, 0-based.
        seconds_to_first_token: from ``add`` on.
        seconds: from ``add`` to the last token.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    exit_loops: list[int] = field(default_factory=list)
    seconds_to_first_token: float | None = None
    seconds: float | None = None


@dataclass(eq=False)
class Request:
    """A request as the engine holds it.

    Attributes:
        id: its name.
        prompt: token ids.
        max_new_tokens: at most.
        sampler: None for greedy.
        stop_tokens, stop_strings: what ends it.
        on_token: called with each new token.
        clock: seconds, since any moment.
        added: when it was added.
        result: see ``Result``.
    """

    id: object
    prompt: list[int]
    max_new_tokens: int
    sampler: Sampler | None
    stop_tokens: frozenset[int]
    stop_strings: tuple[str, ...]
    on_token: Callable[[object, int], object] | None
    clock: Callable[[], float]
    added: float
    result: Result = field(default_factory=Result)

    @property
    def tokens(self) -> Sequence[int]:
        return self.result.tokens

    def finish(self, reason: str, error: str | None = None) -> None:
        """End it."""
        self.result.finish_reason, self.result.error = reason, error
        self.result.seconds = self.clock() - self.added
