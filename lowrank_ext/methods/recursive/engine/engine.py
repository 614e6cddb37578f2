"""DepthwiseEngine: continuous batching of requests whose rows may be in any loop of the block."""

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lowrank_ext.checks import check_choice, check_count
from lowrank_ext.methods.recursive.engine.block import BlockRunner
from lowrank_ext.methods.recursive.engine.intake import Intake
from lowrank_ext.methods.recursive.engine.metrics import Metrics
from lowrank_ext.methods.recursive.engine.model_checks import check_no_autocast, unused_settings
from lowrank_ext.methods.recursive.engine.requests import (
    GREEDY,
    Request,
    Result,
    Sampling,
    Token,
)
from lowrank_ext.methods.recursive.engine.scheduler import Scheduler
from lowrank_ext.methods.recursive.exits import SKIPPED, ExitRule, check_rule

POLICIES = ("static", "continuous", "depth-wise")


class DepthwiseEngine:
    """Generates for many requests at once; a row of a batch is (sequence, loop).

    A pass runs the block once over rows of any loop: the tied weights once for all rows, adapters
    by ``multi_lowrank_add``. Rows that end their last loop, or exit, get a token from the head; a
    slot whose sequence has ended takes the next request.

    Args:
        model: a recursive model; its weights are used where they are.
        max_rows: number of slots: sequences that run at the same time.
        policy: ``"depth-wise"``: a pass takes every sequence, whatever its loop, and new ones at
            once. ``"continuous"``: all sequences run the same loop; new ones join between tokens.
            ``"static"``: a batch runs until its last sequence ends; ended ones are computed along.
        exit_rule: when tokens leave the model early (depth-wise only); None: never.
        skipped: keys and values of the loops that a token has not run. ``"backfill"``: these loops
            are run when a later token of the sequence reaches them: exact. ``"copy"``: the
            deeper layers' keys and values of the state at the exit. ``"share-first"``: those of
            the exit loop.
        draft_tokens: lossless mode with this many drafted tokens: loop 0 drafts, the other loops
            verify all drafts in one pass; tokens are those of full depth (greedy requests only).
        max_length: tokens of a sequence that the cache holds, prompt included, at most; one more
            may come out of the last. None: the model's context, at most 1024. The cache has
            max_rows · num_loops times that.
        tokenizer: needed for prompts and stop strings that are text.
        prompt_rows: prompts are read in parts of at most this many tokens.

    Raises:
        TypeError, ValueError: an argument is out of range, or the model cannot be run so: layers
            that look ahead, have hooks, or differ between loops in more than their adapters.
        RuntimeError: autocast is on.

    Warns of fields of the model's generation_config that ``generate`` would apply and the engine
    does not (``repetition_penalty``, …).

    Examples:
        >>> engine = lr.recursive.DepthwiseEngine(model, max_rows=16)
        >>> engine.add([1, 2, 3], max_new_tokens=20)
        >>> for request, token, finish_reason in engine.stream(): ...

    Source: Relaxed Recursive Transformers, Bae et al. 2024 (arXiv 2410.20672), section 2.5, where
    throughput is estimated; skipped loops, head, scheduling are ours.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_rows: int = 16,
        policy: str = "depth-wise",
        exit_rule: ExitRule | None = None,
        skipped: str = "backfill",
        draft_tokens: int = 0,
        max_length: int | None = None,
        tokenizer: Any = None,
        prompt_rows: int = 512,
    ) -> None:
        owner = type(self).__name__
        check_policy(owner, policy, skipped, max_rows, prompt_rows)
        check_count(draft_tokens, 0, owner, "draft_tokens")
        if policy != "depth-wise" and (exit_rule is not None or draft_tokens):
            raise ValueError(
                f"{owner}: exit_rule and draft_tokens must be left out with policy={policy!r}; "
                "they need policy='depth-wise'"
            )
        if exit_rule is not None and draft_tokens:
            raise ValueError(f"{owner}: give exit_rule or draft_tokens, got both")
        runner = BlockRunner(model, owner)
        check_no_autocast(runner.device, owner)
        for text in unused_settings(runner.model):
            warnings.warn(f"{owner}: {text}", stacklevel=2)
        self.num_loops = runner.num_loops
        check_rule(exit_rule, self.num_loops, owner)
        if draft_tokens and self.num_loops == 1:
            raise ValueError(f"{owner}: draft_tokens must be 0 for a model of one loop")
        context = getattr(
            runner.model.config.get_text_config(decoder=True), "max_position_embeddings", None
        )
        if max_length is None:
            max_length = min(context or 1024, 1024)
        check_count(max_length, 1, owner, "max_length")
        if context is not None and max_length > context:
            raise ValueError(
                f"{owner}: max_length must be at most {context}, the model's context, got "
                f"{max_length}"
            )
        self.max_rows, self.max_length, self.policy = max_rows, max_length, policy
        self._intake = Intake(runner.model, max_length, tokenizer)
        self._queue: deque[Request] = deque()
        self._requests: dict[object, Request] = {}
        self._names = itertools.count()
        self._draft_tokens = draft_tokens
        self._runner = runner
        self._is_stepping = self._was_interrupted = False
        self._scheduler = Scheduler(
            runner,
            self._intake,
            self._queue,
            max_rows=max_rows,
            max_length=max_length,
            policy=policy,
            exit_rule=exit_rule,
            skipped=skipped,
            draft_tokens=draft_tokens,
            prompt_rows=prompt_rows,
        )

    def add(
        self,
        prompt: Sequence[int] | Tensor | str,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stop: Sequence[int | str] | None = None,
        id: object = None,
        on_token: Callable[[object, int], object] | None = None,
    ) -> object:
        """Queue a request.

        Args:
            prompt: token ids, or text where the engine has a tokenizer.
            max_new_tokens: at most; with 0 the request ends when it is its turn.
            sampling: see ``Sampling``; greedy unless given.
            stop: token ids and strings that end it; None: the model's end-of-sequence tokens.
            id: a name, any hashable value; None: the next number.
            on_token: called with id and token; what it raises ends the request.

        Returns:
            The id.

        Raises:
            TypeError, ValueError: the prompt is empty or longer than max_length, holds an id
                outside the vocabulary, the id is taken, or an option is out of range. Nothing is
                queued.
            RuntimeError: the model's modules or parameters are others than when the engine was
                made.
        """
        self._runner.check_unchanged()
        if self._draft_tokens and isinstance(sampling, Sampling) and not sampling.is_greedy:
            raise ValueError("add: sampling must be greedy in an engine with draft_tokens")
        try:
            hash(id)
        except TypeError:
            raise TypeError(f"add: id must be hashable, got {id!r}") from None
        if id is not None and id in self._requests:
            raise ValueError(f"add: id must be new, got {id!r} again")
        request = self._intake.request(prompt, max_new_tokens, sampling, stop, on_token)
        name: object = id
        if name is None:
            name = next(n for n in self._names if n not in self._requests)
        request.id = name
        self._requests[name] = request
        self._queue.append(request)
        return name

    def cancel(self, id: object) -> None:
        """End a request; what it has so far stays in ``result``. No effect once it has ended.

        Raises:
            KeyError: there is no such request.
        """
        request = self._known(id)
        if request.result.finish_reason is not None:
            return
        if request in self._queue:
            self._queue.remove(request)
        request.finish("cancelled")
        self._scheduler.drop(request)

    def result(self, id: object) -> Result:
        """What the request has, at any time.

        Raises:
            KeyError: there is no such request.
        """
        return self._known(id).result

    def forget(self, id: object) -> None:
        """Drop an ended request, so that a long-lived engine does not grow; its id is free again.

        Raises:
            KeyError: there is no such request.
            ValueError: it has not ended.
        """
        if self._known(id).result.finish_reason is None:
            raise ValueError(f"forget: request {id!r} must have ended; cancel it first")
        del self._requests[id]

    @property
    def has_work(self) -> bool:
        """Whether a request is queued or running."""
        return bool(self._queue) or self._scheduler.num_running > 0

    @property
    def num_running(self) -> int:
        """Sequences that are running."""
        return self._scheduler.num_running

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values."""
        return self._scheduler.cache.num_bytes

    def metrics(self) -> Metrics:
        """What has been done since the last ``reset_metrics``; goes on counting."""
        return self._scheduler.metrics

    def reset_metrics(self) -> None:
        """Count from zero."""
        self._scheduler.metrics = Metrics()

    def stream(self) -> Iterator[Token]:
        """Steps until no request is left; gives every token as soon as it is there.

        Raises:
            RuntimeError: see ``step``.
        """
        while self.has_work:
            yield from self.step()

    def run(self) -> dict[object, Result]:
        """Steps until no request is left; the results by id."""
        for _ in self.stream():
            pass
        return {id: request.result for id, request in self._requests.items()}

    def step(self) -> list[Token]:
        """One block pass, or one call of the head; the tokens that it gave.

        Raises:
            RuntimeError: a callback or an exit rule calls it within a step of the same engine; a
                step before was interrupted (Ctrl-C, an error of the model's own), so that some rows
                may have been done and others not: ``result`` still has what there was; autocast is
                on; or the model's modules, settings or parameters are others than when the engine
                was made, which is looked at whenever a request begins.
        """
        if self._is_stepping:
            raise RuntimeError("step: it must not be called within a step of the same engine")
        if self._was_interrupted:
            raise RuntimeError(
                "step: a step before was interrupted, so the engine's rows may be in part done; "
                "make a new engine (result has the tokens so far)"
            )
        check_no_autocast(self._runner.device, "step")
        if self._queue:
            self._runner.check_unchanged()
        self._is_stepping = self._was_interrupted = True
        try:
            events = self._scheduler.step()
        finally:
            self._is_stepping = False
        self._was_interrupted = False
        return events

    def _known(self, id: object) -> Request:
        if id not in self._requests:
            raise KeyError(f"there is no request {id!r}")
        return self._requests[id]


def check_policy(owner: str, policy: str, skipped: str, max_rows: int, prompt_rows: int) -> None:
    """Raise unless the options of scheduling are in range."""
    check_choice(policy, POLICIES, owner, "policy")
    check_choice(skipped, SKIPPED, owner, "skipped")
    check_count(max_rows, 1, owner, "max_rows")
    check_count(prompt_rows, 1, owner, "prompt_rows")
