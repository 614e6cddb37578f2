"""What the engine's calls cost: measured on this machine, or the least that a device allows."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from lowrank_ext.checks import check_count
from lowrank_ext.methods.recursive.engine.block import BlockRunner
from lowrank_ext.methods.recursive.engine.pass_times import PassTimes
from lowrank_ext.methods.recursive.engine.rows import AttentionWork, Rows, Run


@dataclass(frozen=True)
class PassCosts:
    """Seconds of the engine's calls.

    Attributes:
        block: of a pass over n rows of one loop, with short caches.
        mixed: the same for rows of all loops.
        attention: of a pass, over all layers of the block, given its ``AttentionWork``: how many
            pairs of a row and a token that it sees there are, how many cached tokens are read, and
            how many pairs are computed, padding included.
        head: of n rows.
        embedding: of n rows.
        copy: keys and values of the deeper loops for n entries (``skipped="copy"``).
        share: the same by ``"share-first"``.
    """

    block: Callable[[int], float]
    mixed: Callable[[int], float]
    attention: Callable[[AttentionWork], float]
    head: Callable[[int], float]
    embedding: Callable[[int], float]
    copy: Callable[[int], float]
    share: float = 0.0


class HardwareRoofline(NamedTuple):
    """Peak rates of a device.

    Attributes:
        flops: of dense products in the model's dtype, per second.
        bandwidth: bytes of device memory per second.
    """

    flops: float
    bandwidth: float


class BlockSizes(NamedTuple):
    """Sizes of a model, as far as its passes' costs depend on them.

    Attributes:
        block_parameters: of the K stored layers.
        adapter_parameters: of all linears of the block for one loop.
        head_parameters: of the head.
        cache_values: keys and values of a token in one loop of the block.
        query_values: queries of a token in one loop of the block.
        key_value_parameters: of the linears of the block that give keys and values.
        num_loops: B.
        value_bytes: of a parameter, and of a cached value.
    """

    block_parameters: int
    adapter_parameters: int
    head_parameters: int
    cache_values: int
    query_values: int
    key_value_parameters: int
    num_loops: int
    value_bytes: int = 2


@torch.inference_mode()
def measure_pass_costs(
    model: nn.Module,
    *,
    rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    cached_tokens: int = 128,
    repeats: int = 5,
) -> PassCosts:
    """Times single calls of the engine's parts on this machine.

    Args:
        model: a recursive model.
        rows: numbers of rows to measure; between them costs are interpolated.
        cached_tokens: length at which attention is measured.
        repeats: each time is the median of so many calls.

    Raises:
        TypeError: the model is not recursive, or an option is no int.
        ValueError: an option is out of range.
    """
    owner = "measure_pass_costs"
    for count in rows or [0]:
        check_count(count, 1, owner, "rows")
    check_count(cached_tokens, 1, owner, "cached_tokens")
    check_count(repeats, 1, owner, "repeats")
    runner = BlockRunner(model, owner)
    loops, most, device = runner.num_loops, max(rows), runner.device
    cache = runner.new_cache(most, cached_tokens + 1)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    width = runner.embed(zero, zero)
    times = {name: PassTimes() for name in ("block", "mixed", "head", "embedding", "copy")}
    attention = []

    timed = partial(_median_seconds, repeats, runner.clock)
    for count in rows:
        states = width.new_zeros(count, width.shape[1]).normal_(std=0.1)
        tokens = zero.expand(count)
        one = Rows([Run(slot, 0, 0) for slot in range(count)], cache)
        every = Rows([Run(slot, slot % loops, 0) for slot in range(count)], cache)
        deep = Rows([Run(slot, slot % loops, cached_tokens) for slot in range(count)], cache)
        mixed = timed(runner.run, every, states)
        beyond = timed(runner.run, deep, states) - mixed
        attention.append(beyond / (deep.attention_work.computed - every.attention_work.computed))
        times["mixed"].add(count, mixed)
        times["block"].add(count, timed(runner.run, one, states))
        times["head"].add(count, timed(runner.logits, states))
        times["embedding"].add(count, timed(runner.embed, tokens, tokens))
        times["copy"].add(count, timed(runner.write_keys, every, states))
    where = torch.arange(most, device=device)
    of_a_pair = max(0.0, statistics.median(attention))
    return PassCosts(
        block=times["block"].seconds,
        mixed=times["mixed"].seconds,
        attention=lambda work: of_a_pair * work.computed,
        head=times["head"].seconds,
        embedding=times["embedding"].seconds,
        copy=times["copy"].seconds,
        share=timed(cache.share, where, where + most) / most,
    )


def _median_seconds(
    repeats: int, clock: Callable[[], float], call: Callable[..., object], *arguments: object
) -> float:
    call(*arguments)
    seconds = []
    for _ in range(repeats):
        started = clock()
        call(*arguments)
        seconds.append(clock() - started)
    return statistics.median(seconds)


def roofline_costs(sizes: BlockSizes, hardware: HardwareRoofline) -> PassCosts:
    """The least times that the hardware allows: max(FLOPs / flops, bytes / bandwidth) per part."""

    def product(rows: int, parameters: float, read: float) -> float:
        flops = 2 * rows * parameters / hardware.flops
        return max(flops, read * sizes.value_bytes / hardware.bandwidth)

    own = sizes.block_parameters + sizes.adapter_parameters

    def block(rows: int) -> float:
        return product(rows, own, own)

    def mixed(rows: int) -> float:
        return product(rows, own, own + (sizes.num_loops - 1) * sizes.adapter_parameters)

    def attention(work: AttentionWork) -> float:
        flops = 4 * work.pairs * sizes.query_values / hardware.flops
        read = work.reads * sizes.cache_values * sizes.value_bytes / hardware.bandwidth
        return max(flops, read)

    return PassCosts(
        block=block,
        mixed=mixed,
        attention=attention,
        head=lambda rows: product(rows, sizes.head_parameters, sizes.head_parameters),
        embedding=lambda rows: 0.0,
        copy=lambda rows: product(rows, sizes.key_value_parameters, sizes.key_value_parameters),
        share=2 * sizes.cache_values * sizes.value_bytes / hardware.bandwidth,
    )
