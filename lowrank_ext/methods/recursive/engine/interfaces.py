"""What the scheduler needs: something that runs the model, something that ends requests."""

from typing import Protocol

import torch
from torch import Tensor

from lowrank_ext.methods.recursive.engine.cache import SlotCache
from lowrank_ext.methods.recursive.engine.requests import Request
from lowrank_ext.methods.recursive.engine.rows import Rows


class Runner(Protocol):
    """What runs the model: a BlockRunner, or one that only knows how long it would take."""

    num_loops: int

    @property
    def device(self) -> torch.device: ...
    def clock(self) -> float: ...
    def new_cache(self, num_slots: int, max_length: int) -> SlotCache: ...
    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor: ...
    def run(self, rows: Rows, hidden_states: Tensor) -> Tensor: ...
    def write_keys(self, rows: Rows, hidden_states: Tensor) -> None: ...
    def logits(self, hidden_states: Tensor) -> Tensor: ...


class Ending(Protocol):
    """Knows why a request ends with its last token."""

    def reason_to_end(self, request: Request) -> str | None: ...
