"""A slot: a place in the cache, and the sequence that it holds at present."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_ext.methods.recursive.engine.requests import Request
from lowrank_ext.methods.recursive.engine.rows import Run

RUN, HEAD = "run", "head"


@dataclass(eq=False)
class Slot:
    """A sequence between two passes.

    Attributes:
        index: its place in the cache.
        request: None while it is free.
        stage: RUN: its rows take a block pass next; HEAD: the head.
        loop: the loop that comes next (RUN), or that has just ended (HEAD).
        start: position of the first row.
        states: [n, D] of its rows.
        prompt_end: where the prompt ends, while it is being read.
        missed: for each loop, states [m, D] of the tokens just before ``start`` that have not run
            it (``skipped="backfill"``).
        earlier: argmax of the logits after the loop before, if the head has run then.
        drafts: tokens drafted from the first loop, not confirmed (lossless mode).
        draft_states: states of their rows after the first loop.
        ended: the request has ended, and a static batch still computes its row.
    """

    index: int
    request: Request | None = None
    stage: str = RUN
    loop: int = 0
    start: int = 0
    states: Tensor = field(default_factory=lambda: torch.empty(0))
    prompt_end: int = 0
    missed: dict[int, Tensor] = field(default_factory=dict)
    earlier: int | None = None
    drafts: list[int] = field(default_factory=list)
    draft_states: list[Tensor] = field(default_factory=list)
    ended: bool = False

    @property
    def is_free(self) -> bool:
        return self.request is None

    @property
    def is_prompt(self) -> bool:
        return self.start < self.prompt_end

    @property
    def end(self) -> int:
        """Position after the last row."""
        return self.start + self.states.shape[0]

    def rows(self) -> tuple[Run, Tensor]:
        """The rows of its next pass, with the tokens before that have missed this loop."""
        missed = self.missed.get(self.loop)
        if missed is None:
            return Run(self.index, self.loop, self.start, self.states.shape[0]), self.states
        count = missed.shape[0]
        run = Run(self.index, self.loop, self.start - count, count + self.states.shape[0])
        return run, torch.cat([missed, self.states])

    def took(self, states: Tensor) -> None:
        """``states`` are those of ``rows()`` after the pass."""
        missed = self.missed.pop(self.loop, None)
        if missed is not None:
            count = missed.shape[0]
            self._miss(self.loop + 1, states[:count])
            states = states[count:]
        self.states = states

    def exited(self) -> None:
        """Its token leaves after ``loop``; the next loops are missed."""
        self._miss(self.loop + 1, self.states)

    def _miss(self, loop: int, states: Tensor) -> None:
        before = self.missed.get(loop)
        self.missed[loop] = states if before is None else torch.cat([before, states])

    def forget_beyond(self, num_loops: int) -> None:
        """Drop what no loop is missing."""
        self.missed.pop(num_loops, None)

    def clear(self) -> None:
        """Make it free."""
        self.__init__(self.index)  # type: ignore[misc]
