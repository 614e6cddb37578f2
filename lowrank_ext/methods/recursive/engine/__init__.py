"""Continuous depth-wise batching.

engine.py      DepthwiseEngine: what a caller has
intake.py      which requests are accepted, and when one has all it asked for
scheduler.py   policies: which rows take the block or the head next, what happens to a row after it
interfaces.py  what the scheduler needs of the model and of the intake
slots.py       a slot: a place in the cache and the sequence in it
requests.py    requests, sampling, results
block.py       embedding, block, head of a recursive model, as the engine runs them
rows.py        the rows of a pass, and their attention over ragged caches
cache.py       keys and values
pass_times.py  measured times of calls, for the decision between head and block
metrics.py     tokens, passes, exits, time
"""

from lowrank_ext.methods.recursive.engine.engine import DepthwiseEngine
from lowrank_ext.methods.recursive.engine.metrics import Metrics
from lowrank_ext.methods.recursive.engine.requests import Result, Sampling, Token
from lowrank_ext.methods.recursive.engine.rows import AttentionWork

__all__ = ["AttentionWork", "DepthwiseEngine", "Metrics", "Result", "Sampling", "Token"]
