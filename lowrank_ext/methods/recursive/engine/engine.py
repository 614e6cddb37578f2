"""DepthwiseEngine: continuous batching of requests whose rows may be in any loop of the block."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.checks import check_choice
from lowrank_ext.methods.recursive.engine.block import BlockRunner
from lowrank_ext.methods.recursive.engine.intake import Intake, check_count
from lowrank_ext.methods.recursive.engine.metrics import Metrics
from lowrank_ext.methods.recursive.engine.pass_times import PassTimes
from lowrank_ext.methods.recursive.engine.requests import (
    GREEDY,
    Request,
    Result,
    Sampling,
    Token,
)
from lowrank_ext.methods.recursive.engine.rows import Rows, Run
from lowrank_ext.methods.recursive.engine.slots import HEAD, RUN, Slot
from lowrank_ext.methods.recursive.exits import ExitRows, ExitRule

POLICIES = ("static", "continuous", "depth-wise")
SKIPPED = ("backfill", "copy", "share-first")


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
        max_length: tokens of a sequence, prompt included, at most; None: the model's context, at
            most 1024. The cache has max_rows · num_loops times that.
        tokenizer: needed for prompts and stop strings that are text.
        prompt_rows: prompts are read in parts of at most this many tokens.

    Raises:
        TypeError, ValueError: an argument is out of range, or the model cannot be run so.

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
        check_choice(policy, POLICIES, owner, "policy")
        check_choice(skipped, SKIPPED, owner, "skipped")
        for name, value, least in (
            ("max_rows", max_rows, 1),
            ("draft_tokens", draft_tokens, 0),
            ("prompt_rows", prompt_rows, 1),
        ):
            check_count(value, least, owner, name)
        if policy != "depth-wise" and (exit_rule is not None or draft_tokens):
            raise ValueError(
                f"{owner}: exit_rule and draft_tokens must be left out with policy={policy!r}; "
                "they need policy='depth-wise'"
            )
        if exit_rule is not None and draft_tokens:
            raise ValueError(f"{owner}: give exit_rule or draft_tokens, got both")
        self._runner = BlockRunner(model, owner)
        self.num_loops = self._runner.num_loops
        if draft_tokens and self.num_loops == 1:
            raise ValueError(f"{owner}: draft_tokens must be 0 for a model of one loop")
        context = getattr(
            self._runner.model.config.get_text_config(decoder=True), "max_position_embeddings", None
        )
        if max_length is None:
            max_length = min(context or 1024, 1024)
        check_count(max_length, 1, owner, "max_length")
        if context is not None and max_length > context:
            raise ValueError(
                f"{owner}: max_length must be at most {context}, the model's context, got "
                f"{max_length}"
            )
        self.policy, self.skipped, self.exit_rule = policy, skipped, exit_rule
        self.max_rows, self.max_length = max_rows, max_length
        self.draft_tokens, self.prompt_rows = draft_tokens, prompt_rows
        self._intake = Intake(self._runner.model, max_length, tokenizer)
        self._cache = self._runner.new_cache(max_rows, max_length)
        self._slots = [Slot(index) for index in range(max_rows)]
        self._queue: deque[Request] = deque()
        self._requests: dict[object, Request] = {}
        self._names = itertools.count()
        self._metrics = Metrics()
        self._block_times, self._head_times = PassTimes(), PassTimes()

    # ---- requests

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
            max_new_tokens: at most; 0 ends the request at once.
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
        """
        if self.draft_tokens and isinstance(sampling, Sampling) and not sampling.is_greedy:
            raise ValueError("add: sampling must be greedy in an engine with draft_tokens")
        name: object = id
        if name is None:
            name = next(n for n in self._names if n not in self._requests)
        elif name in self._requests:
            raise ValueError(f"add: id must be new, got {name!r} again")
        request = self._intake.request(name, prompt, max_new_tokens, sampling, stop, on_token)
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
        self._finish(request, "cancelled")
        for slot in self._slots:
            if slot.request is request:
                slot.clear()

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
        return bool(self._queue) or any(self._is_live(slot) for slot in self._slots)

    @property
    def num_running(self) -> int:
        """Slots that hold a sequence."""
        return sum(not slot.is_free for slot in self._slots)

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values."""
        return self._cache.num_bytes

    def metrics(self) -> Metrics:
        """What has been done since the last ``reset_metrics``; goes on counting."""
        return self._metrics

    def reset_metrics(self) -> None:
        """Count from zero."""
        self._metrics = Metrics()

    # ---- generation

    def stream(self) -> Iterator[Token]:
        """Steps until no request is left; gives every token as soon as it is there."""
        while self.has_work:
            yield from self.step()

    def run(self) -> dict[object, Result]:
        """Steps until no request is left; the results by id."""
        for _ in self.stream():
            pass
        return {id: request.result for id, request in self._requests.items()}

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One block pass, or one call of the head; returns the tokens that it gave."""
        started = time.perf_counter()
        events: list[Token] = []
        try:
            self._admit(events)
            waiting = [slot for slot in self._slots if not slot.is_free and slot.stage == HEAD]
            ready = [slot for slot in self._slots if not slot.is_free and slot.stage == RUN]
            if waiting and (not ready or self._head_pays(len(waiting), len(ready))):
                self._head(waiting, events)
            elif ready:
                self._pass(ready, events)
        finally:
            self._metrics.seconds += time.perf_counter() - started
        return events

    def _is_live(self, slot: Slot) -> bool:
        return not slot.is_free and not slot.ended

    def _admit(self, events: list[Token]) -> None:
        """Free slots take queued requests, when the policy lets them."""
        if self.policy == "static":
            if any(self._is_live(slot) for slot in self._slots):
                return
            for slot in self._slots:
                slot.clear()
        elif self.policy == "continuous" and not all(
            slot.is_free or (slot.stage == RUN and slot.loop == 0) for slot in self._slots
        ):
            return
        for slot in self._slots:
            while slot.is_free and self._queue:
                request = self._queue.popleft()
                if request.max_new_tokens == 0:
                    self._finish(request, "length")
                    events.append(Token(request.id, None, "length"))
                    continue
                slot.request = request
                slot.prompt_end = len(request.prompt)
                self._read_prompt(slot)

    def _read_prompt(self, slot: Slot) -> None:
        """The next part of the prompt becomes the slot's rows."""
        assert slot.request is not None
        end = min(slot.start + self.prompt_rows, slot.prompt_end)
        slot.states = self._embedded(slot.request.prompt[slot.start : end], range(slot.start, end))
        slot.stage, slot.loop = RUN, 0

    def _embedded(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        device = self._runner.device
        with self._metrics.timed("embedding"):
            return self._runner.embed(
                torch.tensor(tokens, device=device), torch.tensor(positions, device=device)
            )

    def _head_pays(self, waiting: int, ready: int) -> bool:
        """Whether the head should run now, with ``ready`` rows that could take a pass first.

        Waiting saves a call of the head, by which those rows that end in the pass are joined; it
        costs the waiting rows their place in that pass.
        """
        if self.policy != "depth-wise":
            return False  # in step: all rows take each pass, then all take the head
        ending = max(1, round(ready * self._ending_share()))
        head, block = self._head_times.seconds, self._block_times.seconds
        saved = head(waiting) + head(ending) - head(waiting + ending)
        lost = block(ready) * waiting / (waiting + ready)
        return saved <= lost

    def _ending_share(self) -> float:
        """Share of the rows of a pass that want the head after it."""
        if self.exit_rule is not None and self.exit_rule.needs_logits:
            return 1.0
        return 1.0 / max(1.0, self._metrics.mean_loops or self.num_loops)

    # ---- the block

    def _pass(self, slots: list[Slot], events: list[Token]) -> None:
        metrics = self._metrics
        metrics.passes += 1
        metrics.idle_rows += self.max_rows - len(slots)
        for slot in slots:
            kind = "finished" if slot.ended else "prompt" if slot.is_prompt else "decode"
            metrics.rows[kind] += slot.states.shape[0]
            missed = slot.missed.get(slot.loop)
            metrics.rows["backfill"] += 0 if missed is None else missed.shape[0]
        self._run(slots, events)
        for slot in slots:
            if not slot.is_free:
                self._after_pass(slot)
        if self.exit_rule is not None and not self.exit_rule.needs_logits:
            self._go_on_without_head([s for s in slots if not s.is_free and s.stage == HEAD])

    def _run(self, slots: list[Slot], events: list[Token]) -> None:
        """The slots' rows take a pass. Where it fails, halves are tried, so that one request alone
        ends with the error."""
        try:
            work = [slot.rows() for slot in slots]
            # Rows of one token lie together.
            order = sorted(range(len(slots)), key=lambda i: work[i][0].count)
            rows = Rows([work[i][0] for i in order], self._cache)
            states = torch.cat([work[i][1] for i in order])
            started = time.perf_counter()
            after = self._runner.run(rows, states)
            seconds = time.perf_counter() - started
        except NotImplementedError:
            raise
        except (RuntimeError, MemoryError) as error:
            if len(slots) == 1:
                self._fail(slots[0], error, events)
                return
            half = len(slots) // 2
            self._run(slots[:half], events)
            self._run(slots[half:], events)
            return
        self._metrics.seconds_in["block"] += seconds
        self._block_times.add(rows.count, seconds)
        for i, part in zip(order, after.split([work[i][0].count for i in order]), strict=True):
            slots[i].took(part)
            slots[i].forget_beyond(self.num_loops)

    def _after_pass(self, slot: Slot) -> None:
        """What the slot does next: another loop, the next part of its prompt, or the head."""
        last = slot.loop == self.num_loops - 1
        if slot.is_prompt:
            if not last:
                slot.loop += 1
            elif slot.end < slot.prompt_end:
                slot.start = slot.end
                self._read_prompt(slot)
            else:
                slot.start, slot.states = slot.prompt_end - 1, slot.states[-1:]
                slot.prompt_end = 0
                slot.stage = HEAD
        elif self.draft_tokens and slot.loop == 0:
            self._after_draft(slot)
        elif last or (self.exit_rule is not None and not slot.ended):
            slot.stage = HEAD
        else:
            slot.loop += 1

    def _go_on_without_head(self, slots: list[Slot]) -> None:
        """Rows that a rule without logits keeps take the next loop."""
        for slot, exits in zip(slots, self._exits(slots, None), strict=True):
            if not exits:
                slot.stage, slot.loop = RUN, slot.loop + 1

    # ---- the head

    def _head(self, slots: list[Slot], events: list[Token]) -> None:
        """Logits for the slots' rows; each gets a token, or goes on to its next loop."""
        counts = [slot.states.shape[0] for slot in slots]
        states = torch.cat([slot.states for slot in slots])
        started = time.perf_counter()
        logits = self._runner.logits(states)
        largest, best = logits.max(-1)
        tokens: list[int] = best.tolist()
        finite: list[bool] = torch.isfinite(largest).tolist()
        seconds = time.perf_counter() - started
        self._metrics.seconds_in["head"] += seconds
        self._head_times.add(len(tokens), seconds)
        self._metrics.head_calls += 1
        self._metrics.head_rows += len(tokens)
        first = list(itertools.accumulate(counts, initial=0))
        sane = []
        for slot, at, count in zip(slots, first, counts, strict=False):
            if all(finite[at : at + count]):
                sane.append((slot, at))
            else:
                self._fail(slot, ValueError("the logits must be finite, got inf or nan"), events)
        if self.draft_tokens:
            chosen = [(slot, tokens[at : at + slot.states.shape[0]]) for slot, at in sane]
            self._confirm(chosen, events)
            return
        going_on, leaving = self._parted(sane, logits, tokens)
        for slot, at in going_on:
            slot.earlier = tokens[at]
            slot.stage, slot.loop = RUN, slot.loop + 1
        self._fill_skipped([slot for slot, _ in leaving])
        self._give_tokens(leaving, logits, tokens, events)

    def _parted(
        self, rows: list[tuple[Slot, int]], logits: Tensor, tokens: list[int]
    ) -> tuple[list[tuple[Slot, int]], list[tuple[Slot, int]]]:
        """The rows that the exit rule keeps, and those that get a token now."""
        rule, last = self.exit_rule, self.num_loops - 1
        if rule is None or not rule.needs_logits:
            return [], rows
        open_rows = [(slot, at) for slot, at in rows if slot.loop < last]
        slots = [slot for slot, _ in open_rows]
        index = torch.tensor([at for _, at in open_rows], dtype=torch.int64, device=logits.device)
        exits = self._exits(slots, logits.index_select(0, index))
        kept = {slot for slot, leaves in zip(slots, exits, strict=True) if not leaves}
        return [r for r in rows if r[0] in kept], [r for r in rows if r[0] not in kept]

    def _exits(self, slots: list[Slot], logits: Tensor | None) -> list[bool]:
        """Which of the slots' rows the rule lets go after their loop."""
        assert self.exit_rule is not None
        decided = [slot.loop == self.num_loops - 1 for slot in slots]
        for loop in {slot.loop for slot in slots} - {self.num_loops - 1}:
            rows = [i for i, slot in enumerate(slots) if slot.loop == loop]
            requests = [slots[i].request for i in rows]
            earlier = [slots[i].earlier for i in rows]
            found = self.exit_rule.exits(
                ExitRows(
                    loop,
                    [request.id for request in requests if request],
                    [len(request.tokens) for request in requests if request],
                    None if logits is None else logits[rows],
                    None
                    if logits is None or None in earlier
                    else torch.tensor(earlier, device=logits.device),
                )
            )
            for i, leaves in zip(rows, found.tolist(), strict=True):
                decided[i] = leaves
        return decided

    def _fill_skipped(self, slots: list[Slot]) -> None:
        """Give the loops that leaving tokens have not run their keys and values."""
        early = [slot for slot in slots if slot.loop < self.num_loops - 1]
        if not early:
            return
        if self.skipped == "backfill":
            for slot in early:
                slot.exited()
            return
        skipped = [(slot, loop) for slot in early for loop in range(slot.loop + 1, self.num_loops)]
        with self._metrics.timed("copy"):
            if self.skipped == "copy":
                runs = [Run(slot.index, loop, slot.start) for slot, loop in skipped]
                states = torch.cat([slot.states for slot, _ in skipped])
                self._runner.write_keys(Rows(runs, self._cache), states)
            else:
                index, device = self._cache.index, self._runner.device
                source = [index(slot.loop, slot.index, slot.start) for slot, _ in skipped]
                target = [index(loop, slot.index, slot.start) for slot, loop in skipped]
                self._cache.share(
                    torch.tensor(source, device=device), torch.tensor(target, device=device)
                )

    def _give_tokens(
        self,
        rows: list[tuple[Slot, int]],
        logits: Tensor,
        tokens: list[int],
        events: list[Token],
    ) -> None:
        """Each slot gets a token and, unless its request ends, the row of it."""
        going_on = []
        for slot, at in rows:
            request = slot.request
            assert request is not None
            if slot.ended:  # of a static batch: the same row again
                slot.stage, slot.loop = RUN, 0
                continue
            token = tokens[at]
            if request.sampler is not None:
                token = request.sampler.choose(logits[at])
            if self._accept(slot, token, events):
                going_on.append((slot, token))
        self._next_rows(going_on)

    def _next_rows(self, slots: list[tuple[Slot, int]]) -> None:
        """The slots' new tokens become their rows."""
        if not slots:
            return
        for slot, _ in slots:
            slot.start += 1
        states = self._embedded([token for _, token in slots], [slot.start for slot, _ in slots])
        for (slot, _), own in zip(slots, states.split(1), strict=True):
            slot.states, slot.stage, slot.loop, slot.earlier = own, RUN, 0, None

    def _accept(self, slot: Slot, token: int, events: list[Token]) -> bool:
        """The request gets a token; whether it goes on. Its slot is free otherwise."""
        request, now = slot.request, time.perf_counter()
        assert request is not None
        result = request.result
        result.tokens.append(token)
        result.exit_loops.append(slot.loop)
        if result.seconds_to_first_token is None:
            result.seconds_to_first_token = now - request.added
            self._metrics.first_token_seconds.append(result.seconds_to_first_token)
        self._metrics.tokens += 1
        self._metrics.exits[slot.loop] += 1
        reason = self._intake.reason_to_end(request)
        events.append(Token(request.id, token, reason))
        if request.on_token is not None:
            try:
                request.on_token(request.id, token)
            except Exception as error:  # the caller's own code
                events.pop()
                self._fail(slot, error, events, token)
                return False
        if request.result.finish_reason is not None:  # the callback cancelled it
            events[-1] = Token(request.id, token, request.result.finish_reason)
            return False
        if reason is not None:
            self._finish(request, reason)
            self._leave(slot)
        return reason is None

    def _leave(self, slot: Slot) -> None:
        """The slot's request has ended."""
        if self.policy == "static":
            slot.ended, slot.stage, slot.loop = True, RUN, 0
        else:
            slot.clear()

    def _finish(self, request: Request, reason: str, error: str | None = None) -> None:
        request.result.finish_reason, request.result.error = reason, error
        request.result.seconds = time.perf_counter() - request.added

    def _fail(
        self, slot: Slot, error: BaseException, events: list[Token], token: int | None = None
    ) -> None:
        request = slot.request
        assert request is not None
        if not slot.ended:
            self._finish(request, "error", f"{type(error).__name__}: {error}")
            events.append(Token(request.id, token, "error"))
        slot.clear()

    # ---- lossless mode

    def _after_draft(self, slot: Slot) -> None:
        """A row has ended loop 0: draft from it, or verify all rows since the last sure token."""
        assert slot.request is not None
        slot.draft_states.append(slot.states)
        request = slot.request
        left = request.max_new_tokens - len(request.tokens) - len(slot.drafts)
        room = self.max_length - slot.end
        if len(slot.drafts) < min(self.draft_tokens, left - 1, len(slot.drafts) + room):
            slot.stage = HEAD
            return
        slot.start = slot.end - len(slot.draft_states)
        slot.states = torch.cat(slot.draft_states)
        slot.stage, slot.loop = RUN, 1

    def _confirm(self, slots: list[tuple[Slot, list[int]]], events: list[Token]) -> None:
        """Drafted rows get their next token; of verified rows, those tokens that full depth gives
        are accepted up to the first that was drafted otherwise."""
        going_on = []
        for slot, tokens in slots:
            if slot.loop == 0:
                slot.drafts.append(tokens[0])
                going_on.append((slot, tokens[0]))
                continue
            drafts, start = slot.drafts, slot.start
            slot.drafts, slot.draft_states = [], []
            for i, token in enumerate(tokens):
                slot.start = start + i
                if not self._accept(slot, token, events):
                    break
                if i == len(tokens) - 1 or drafts[i] != token:
                    self._metrics.rejected += len(tokens) - 1 - i
                    going_on.append((slot, token))
                    break
        self._next_rows(going_on)

    def _known(self, id: object) -> Request:
        if id not in self._requests:
            raise KeyError(f"there is no request {id!r}")
        return self._requests[id]
