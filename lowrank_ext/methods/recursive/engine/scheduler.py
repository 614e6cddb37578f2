"""Scheduler: which rows take the block or the head next, and what becomes of a row after it."""

import itertools
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowrank_ext.methods.recursive.engine.interfaces import Ending, Runner
from lowrank_ext.methods.recursive.engine.metrics import Metrics
from lowrank_ext.methods.recursive.engine.pass_times import PassTimes
from lowrank_ext.methods.recursive.engine.requests import Request, Token
from lowrank_ext.methods.recursive.engine.rows import Rows, Run
from lowrank_ext.methods.recursive.engine.slots import HEAD, RUN, Slot
from lowrank_ext.methods.recursive.exits import ExitRows, ExitRule, exit_decisions


class Scheduler:
    """The slots of an engine and the requests that wait for one.

    Args:
        runner: the model.
        intake: tells when a request has all it asked for.
        queue: requests that wait; the scheduler takes from its left.
        max_rows, max_length, policy, exit_rule, skipped, draft_tokens, prompt_rows: as of
            ``DepthwiseEngine``.

    Attributes:
        slots: all slots.
        metrics: what has been done.
    """

    def __init__(
        self,
        runner: Runner,
        intake: Ending,
        queue: deque[Request],
        *,
        max_rows: int,
        max_length: int,
        policy: str,
        exit_rule: ExitRule | None,
        skipped: str,
        draft_tokens: int,
        prompt_rows: int,
    ) -> None:
        self._runner, self._intake, self._queue = runner, intake, queue
        self._clock = runner.clock
        self.num_loops = runner.num_loops
        self.max_rows, self.max_length, self.policy = max_rows, max_length, policy
        self.exit_rule, self.skipped = exit_rule, skipped
        self.draft_tokens, self.prompt_rows = draft_tokens, prompt_rows
        self.cache = runner.new_cache(max_rows, max_length)
        self.slots = [Slot(index) for index in range(max_rows)]
        self.metrics = Metrics()
        self._block_times, self._head_times = PassTimes(), PassTimes()

    @property
    def num_running(self) -> int:
        """Slots whose sequence has not ended."""
        return sum(self._is_live(slot) for slot in self.slots)

    @torch.inference_mode()
    def drop(self, request: Request) -> None:
        """Free the slot of a request that has ended otherwise."""
        for slot in self.slots:
            if slot.request is request:
                self._leave(slot)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One block pass, or one call of the head; the tokens that it gave."""
        started = self._clock()
        events: list[Token] = []
        try:
            self._admit(events)
            waiting = [slot for slot in self.slots if not slot.is_free and slot.stage == HEAD]
            ready = [slot for slot in self.slots if not slot.is_free and slot.stage == RUN]
            if waiting and (not ready or self._head_pays(len(waiting), len(ready))):
                self._head(waiting, events)
            elif ready:
                self._pass(ready, events)
        finally:
            self.metrics.seconds += self._clock() - started
        return events

    def _is_live(self, slot: Slot) -> bool:
        return not slot.is_free and not slot.ended

    def _admit(self, events: list[Token]) -> None:
        """Free slots take queued requests, when the policy lets them."""
        if self.policy == "static":
            if any(self._is_live(slot) for slot in self.slots):
                return
            for slot in self.slots:
                self._free(slot)
        elif self.policy == "continuous" and not all(
            slot.is_free or (slot.stage == RUN and slot.loop == 0) for slot in self.slots
        ):
            return
        for slot in self.slots:
            while slot.is_free and self._queue:
                request = self._queue.popleft()
                if request.max_new_tokens == 0:
                    request.finish("length")
                    events.append(Token(request.id, None, "length"))
                    continue
                slot.request = request
                slot.prompt_end = len(request.prompt)
                self._read_prompt(slot, events)

    def _read_prompt(self, slot: Slot, events: list[Token]) -> None:
        """The next part of the prompt becomes the slot's rows."""
        assert slot.request is not None
        end = min(slot.start + self.prompt_rows, slot.prompt_end)
        tokens = slot.request.prompt[slot.start : end]
        try:
            slot.states = self._embedded(tokens, range(slot.start, end))
        except NotImplementedError:
            raise
        except (RuntimeError, MemoryError) as error:
            self._fail(slot, error, events)
            return
        slot.stage, slot.loop = RUN, 0

    def _embedded(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        device = self._runner.device
        with self.metrics.timed("embedding", self._clock):
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
        return 1.0 / max(1.0, self.metrics.mean_loops or self.num_loops)

    # ---- the block

    def _pass(self, slots: list[Slot], events: list[Token]) -> None:
        metrics = self.metrics
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
                self._after_pass(slot, events)
        if self.exit_rule is not None and not self.exit_rule.needs_logits:
            waiting = [s for s in slots if not s.is_free and s.stage == HEAD]
            self._go_on_without_head(waiting, events)

    def _in_halves(
        self,
        slots: list[Slot],
        error: BaseException,
        events: list[Token],
        again: Callable[[list[Slot], list[Token]], None],
    ) -> None:
        """After a failure halves are tried, so that one request alone ends with the error."""
        if len(slots) == 1:
            self._fail(slots[0], error, events)
            return
        half = len(slots) // 2
        again(slots[:half], events)
        again(slots[half:], events)

    def _run(self, slots: list[Slot], events: list[Token]) -> None:
        """The slots' rows take a pass."""
        try:
            work = [slot.rows() for slot in slots]
            # Rows of one token lie together.
            order = sorted(range(len(slots)), key=lambda i: work[i][0].count)
            rows = Rows([work[i][0] for i in order], self.cache)
            states = torch.cat([work[i][1] for i in order])
            started = self._clock()
            after = self._runner.run(rows, states)
            seconds = self._clock() - started
        except NotImplementedError:
            raise
        except (RuntimeError, MemoryError) as error:
            self._in_halves(slots, error, events, self._run)
            return
        self.metrics.seconds_in["block"] += seconds
        self._block_times.add(rows.count, seconds)
        for i, part in zip(order, after.split([work[i][0].count for i in order]), strict=True):
            slots[i].took(part)
            slots[i].forget_beyond(self.num_loops)

    def _after_pass(self, slot: Slot, events: list[Token]) -> None:
        """What the slot does next: another loop, the next part of its prompt, or the head."""
        last = slot.loop == self.num_loops - 1
        if slot.is_prompt:
            if not last:
                slot.loop += 1
            elif slot.end < slot.prompt_end:
                slot.start = slot.end
                self._read_prompt(slot, events)
            else:
                slot.start, slot.states = slot.prompt_end - 1, slot.states[-1:]
                slot.prompt_end = 0
                slot.stage = HEAD
        elif self.draft_tokens and slot.loop == 0:
            self._after_draft(slot)
        elif last or self.exit_rule is not None:
            slot.stage = HEAD
        else:
            slot.loop += 1

    def _go_on_without_head(self, slots: list[Slot], events: list[Token]) -> None:
        """Rows that a rule without logits keeps take the next loop."""
        for slot, exits in zip(slots, self._exits(slots, None, events), strict=True):
            if not exits and not slot.is_free:
                slot.stage, slot.loop = RUN, slot.loop + 1

    # ---- the head

    def _head(self, slots: list[Slot], events: list[Token]) -> None:
        """Logits for the slots' rows; each gets a token, or goes on to its next loop."""
        counts = [slot.states.shape[0] for slot in slots]
        states = torch.cat([slot.states for slot in slots])
        started = self._clock()
        try:
            logits = self._runner.logits(states)
            largest, best = logits.max(-1)
            tokens: list[int] = best.tolist()
            finite: list[bool] = torch.isfinite(largest).tolist()
        except NotImplementedError:
            raise
        except (RuntimeError, MemoryError) as error:
            self._in_halves(slots, error, events, self._head)
            return
        seconds = self._clock() - started
        self.metrics.seconds_in["head"] += seconds
        self._head_times.add(len(tokens), seconds)
        self.metrics.head_calls += 1
        self.metrics.head_rows += len(tokens)
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
        going_on, leaving = self._parted(sane, logits, events)
        for slot, at in going_on:
            slot.earlier = tokens[at]
            slot.stage, slot.loop = RUN, slot.loop + 1
        self._fill_skipped([slot for slot, _ in leaving], events)
        self._give_tokens(leaving, logits, tokens, events)

    def _parted(
        self, rows: list[tuple[Slot, int]], logits: Tensor, events: list[Token]
    ) -> tuple[list[tuple[Slot, int]], list[tuple[Slot, int]]]:
        """The rows that the exit rule keeps, and those that get a token now."""
        rule, last = self.exit_rule, self.num_loops - 1
        if rule is None or not rule.needs_logits:
            return [], rows
        open_rows = [(slot, at) for slot, at in rows if slot.loop < last]
        slots = [slot for slot, _ in open_rows]
        index = torch.tensor([at for _, at in open_rows], dtype=torch.int64, device=logits.device)
        exits = self._exits(slots, logits.index_select(0, index), events)
        kept = {slot for slot, leaves in zip(slots, exits, strict=True) if not leaves}
        rows = [(slot, at) for slot, at in rows if not slot.is_free]
        return [r for r in rows if r[0] in kept], [r for r in rows if r[0] not in kept]

    def _exits(self, slots: list[Slot], logits: Tensor | None, events: list[Token]) -> list[bool]:
        """Which of the slots' rows the rule lets go after their loop. Where the rule raises, the
        requests that it was asked about end with the error, and their slots are free."""
        assert self.exit_rule is not None
        decided = [slot.loop == self.num_loops - 1 for slot in slots]
        for loop in {slot.loop for slot in slots} - {self.num_loops - 1}:
            rows = [i for i, slot in enumerate(slots) if slot.loop == loop]
            requests = [slots[i].request for i in rows]
            earlier = [slots[i].earlier for i in rows]
            asked = ExitRows(
                loop,
                [request.id for request in requests if request],
                [len(request.tokens) for request in requests if request],
                None if logits is None else logits[rows],
                None
                if logits is None or None in earlier
                else torch.tensor(earlier, device=logits.device),
            )
            try:
                found = exit_decisions(self.exit_rule, asked).tolist()
                decisions = list(zip(rows, found, strict=True))
            except Exception as error:  # perhaps the caller's own code
                for i in rows:
                    self._fail(slots[i], error, events)
                continue
            for i, leaves in decisions:
                decided[i] = leaves
        return decided

    def _fill_skipped(self, slots: list[Slot], events: list[Token]) -> None:
        """Give the loops that leaving tokens have not run their keys and values."""
        early = [slot for slot in slots if slot.loop < self.num_loops - 1]
        if not early:
            return
        if self.skipped == "backfill":
            for slot in early:
                slot.exited()
            return
        try:
            self._copy_skipped(early)
        except NotImplementedError:
            raise
        except (RuntimeError, MemoryError) as error:
            self._in_halves(early, error, events, self._fill_skipped)

    def _copy_skipped(self, slots: list[Slot]) -> None:
        skipped = [(slot, loop) for slot in slots for loop in range(slot.loop + 1, self.num_loops)]
        with self.metrics.timed("copy", self._clock):
            if self.skipped == "copy":
                runs = [Run(slot.index, loop, slot.start) for slot, loop in skipped]
                states = torch.cat([slot.states for slot, _ in skipped])
                self._runner.write_keys(Rows(runs, self.cache), states)
            else:
                index, device = self.cache.index, self._runner.device
                source = [index(slot.loop, slot.index, slot.start) for slot, _ in skipped]
                target = [index(loop, slot.index, slot.start) for slot, loop in skipped]
                self.cache.share(
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
            if request is None:  # failed, or cancelled by another request's callback
                continue
            if slot.ended:  # of a static batch: the same row again
                slot.stage, slot.loop = RUN, 0
                continue
            token = tokens[at]
            if request.sampler is not None:
                try:
                    token = request.sampler.choose(logits[at])
                except (RuntimeError, ValueError) as error:
                    self._fail(slot, error, events)
                    continue
            if self._accept(slot, token, events):
                going_on.append((slot, token))
        self._next_rows(going_on, events)

    def _next_rows(self, rows: list[tuple[Slot, int]], events: list[Token]) -> None:
        """The slots' new tokens become their rows."""
        # A later slot's callback may have cancelled an earlier one's request.
        tokens = {slot: token for slot, token in rows if self._is_live(slot)}

        def embed(slots: list[Slot], events: list[Token]) -> None:
            try:
                positions = [slot.start + 1 for slot in slots]
                states = self._embedded([tokens[slot] for slot in slots], positions)
            except NotImplementedError:
                raise
            except (RuntimeError, MemoryError) as error:
                self._in_halves(slots, error, events, embed)
                return
            for slot, own in zip(slots, states.split(1), strict=True):
                slot.start += 1
                slot.states, slot.stage, slot.loop, slot.earlier = own, RUN, 0, None

        if tokens:
            embed(list(tokens), events)

    def _accept(self, slot: Slot, token: int, events: list[Token]) -> bool:
        """The request gets a token; whether it goes on. Its slot is free otherwise."""
        request, now = slot.request, self._clock()
        assert request is not None
        result = request.result
        result.tokens.append(token)
        result.exit_loops.append(slot.loop)
        if result.seconds_to_first_token is None:
            result.seconds_to_first_token = now - request.added
            self.metrics.first_token_seconds.append(result.seconds_to_first_token)
        self.metrics.tokens += 1
        self.metrics.exits[slot.loop] += 1
        reason = self._intake.reason_to_end(request)
        events.append(Token(request.id, token, reason))
        if request.on_token is not None:
            try:
                request.on_token(request.id, token)
            except Exception as error:  # the caller's own code
                events.pop()
                if result.finish_reason is None:
                    self._fail(slot, error, events, token)
                else:  # it has cancelled itself before
                    events.append(Token(request.id, token, result.finish_reason))
                return False
        if request.result.finish_reason is not None:  # the callback cancelled it
            events[-1] = Token(request.id, token, request.result.finish_reason)
            return False
        if reason is not None:
            request.finish(reason)
            self._leave(slot)
        return reason is None

    def _leave(self, slot: Slot) -> None:
        """The slot's request has ended."""
        if self.policy == "static":
            slot.ended, slot.stage, slot.loop = True, RUN, 0
        else:
            self._free(slot)

    def _free(self, slot: Slot) -> None:
        """The slot holds nothing: what it leaves in the cache, perhaps NaN, is masked for its next
        sequence, but would be multiplied by zero."""
        self.cache.clear(slot.index, min(slot.end + self.draft_tokens + 1, self.max_length))
        slot.clear()

    def _fail(
        self, slot: Slot, error: BaseException, events: list[Token], token: int | None = None
    ) -> None:
        request = slot.request
        assert request is not None
        if not slot.ended:
            request.finish("error", f"{type(error).__name__}: {error}")
            events.append(Token(request.id, token, "error"))
        self._free(slot)

    # ---- lossless mode

    def _after_draft(self, slot: Slot) -> None:
        """A row has ended loop 0: draft from it, or verify all rows since the last sure token."""
        assert slot.request is not None
        slot.draft_states.append(slot.states)
        request = slot.request
        left = request.max_new_tokens - len(request.tokens)
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
            if slot.is_free:  # cancelled by another request's callback
                continue
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
                    self.metrics.rejected += len(tokens) - 1 - i
                    going_on.append((slot, token))
                    break
        self._next_rows(going_on, events)
