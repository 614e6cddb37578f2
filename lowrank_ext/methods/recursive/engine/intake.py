"""What an engine accepts as a request, and when a request has all that it asked for."""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from lowrank_ext.checks import check_count
from lowrank_ext.methods.recursive.engine.requests import Request, Sampler, Sampling

_STOP_WINDOW = 16  # tokens decoded beside a stop string's own length, to find it


class Intake:
    """Checks requests for a model.

    Args:
        model: a transformers model.
        max_length: of a sequence, prompt included.
        tokenizer: for text, or None.
    """

    def __init__(self, model: Any, max_length: int, tokenizer: Any) -> None:
        if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
            raise TypeError(
                f"DepthwiseEngine: tokenizer must be a transformers tokenizer, got {tokenizer!r}"
            )
        self._max_length, self._tokenizer = max_length, tokenizer
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        ends = getattr(model.generation_config, "eos_token_id", None)
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or ())

    def request(
        self,
        prompt: Sequence[int] | Tensor | str,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[int | str] | None,
        on_token: Callable[[object, int], object] | None,
    ) -> Request:
        """The request without an id, checked: see ``DepthwiseEngine.add``."""
        tokens = self._checked_prompt(prompt)
        check_count(max_new_tokens, 0, "add", "max_new_tokens")
        if not isinstance(sampling, Sampling):
            raise TypeError(f"add: sampling must be a Sampling, got {sampling!r}")
        if on_token is not None and not callable(on_token):
            raise TypeError(f"add: on_token must be callable, got {on_token!r}")
        stop_tokens, stop_strings = self._stops(stop)
        return Request(
            id=None,
            prompt=tokens,
            max_new_tokens=max_new_tokens,
            sampler=None if sampling.is_greedy else Sampler(sampling),
            stop_tokens=stop_tokens,
            stop_strings=stop_strings,
            on_token=on_token,
            clock=time.perf_counter,
            added=time.perf_counter(),
        )

    def reason_to_end(self, request: Request) -> str | None:
        """Why the request ends with its last token, or None."""
        tokens = request.tokens
        if tokens[-1] in request.stop_tokens or self._ends_with_stop(request):
            return "stop"
        full = len(request.prompt) + len(tokens) > self._max_length
        return "length" if full or len(tokens) >= request.max_new_tokens else None

    def _ends_with_stop(self, request: Request) -> bool:
        if not request.stop_strings:
            return False
        # A character may be as many tokens as it has bytes.
        longest = max(len(stop.encode()) for stop in request.stop_strings)
        window = request.result.tokens[-(longest + _STOP_WINDOW) :]
        before = self._tokenizer.decode(window[:-1]) if len(window) > 1 else ""
        text = self._tokenizer.decode(window)
        return any(stop in text and stop not in before for stop in request.stop_strings)

    def _checked_prompt(self, prompt: Sequence[int] | Tensor | str) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise TypeError("add: prompt must be token ids in an engine without a tokenizer")
            tokens = list(self._tokenizer(prompt).input_ids)
        elif isinstance(prompt, Tensor):
            if prompt.dim() != 1:
                raise ValueError(f"add: prompt must be [T], got {list(prompt.shape)}")
            tokens = prompt.tolist()
        elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
            tokens = list(prompt)
        else:
            raise TypeError(f"add: prompt must be token ids or text, got {prompt!r}")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"add: prompt must hold token ids, got {token!r}")
            self._check_known(token)
        if not 1 <= len(tokens) <= self._max_length:
            raise ValueError(
                f"add: prompt must have from 1 to max_length={self._max_length} tokens, got "
                f"{len(tokens)}"
            )
        return tokens

    def _check_known(self, token: int) -> None:
        if not 0 <= token < self._vocabulary:
            raise ValueError(
                f"add: token ids must be from 0 to {self._vocabulary - 1}, got {token}"
            )

    def _stops(self, stop: Sequence[int | str] | None) -> tuple[frozenset[int], tuple[str, ...]]:
        if stop is None:
            return self._ends, ()
        if isinstance(stop, str | bytes) or not isinstance(stop, Collection):
            raise TypeError(f"add: stop must be a sequence of ids and strings, got {stop!r}")
        for each in stop:
            if isinstance(each, bool) or not isinstance(each, int | str):
                raise TypeError(f"add: stop must hold ids and strings, got {each!r}")
            if isinstance(each, int):
                self._check_known(each)
        strings = tuple(each for each in stop if isinstance(each, str))
        if strings and self._tokenizer is None:
            raise TypeError("add: stop strings need an engine with a tokenizer")
        if "" in strings:
            raise ValueError("add: stop strings must not be empty")
        return frozenset(each for each in stop if isinstance(each, int)), strings
