"""What a recursive model loses by exits, on real text: losses and agreement of each loop, and of
each way of treating keys and values of loops that a token has skipped.

The text is given, not generated: every token leaves by the rule, and later tokens see what it has
left in the cache. A loop runs over all tokens at once. That is exact: what a token sees of earlier
ones in a loop depends on where those left before it, which earlier loops have decided.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ext.checks import check_choice, check_count
from lowrank_ext.methods.recursive.engine.block import cache_name
from lowrank_ext.methods.recursive.exits import (
    SKIPPED,
    ExitRows,
    ExitRule,
    check_rule,
    exit_decisions,
    oracle_loops,
)
from lowrank_ext.methods.recursive.loop_outputs import collected_loops, exit_logits
from lowrank_ext.methods.recursive.losses import token_cross_entropy
from lowrank_ext.methods.recursive.model import Loops
from lowrank_ext.wrappers import unwrapped

_CHUNK_LOGITS = 2**23
_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class ExitOutcome:
    """Tokens that left by a rule, under one treatment of skipped loops.

    Attributes:
        loss: mean cross entropy of the logits with which each token left.
        exits: number of tokens by exit loop.
        agreement: share of all tokens whose most likely next token is that of full depth.
        exited_agreement: the same among those that left before the last loop; None where none did.
    """

    loss: float
    exits: tuple[int, ...]
    agreement: float
    exited_agreement: float | None

    @property
    def mean_loops(self) -> float:
        """Loops per token."""
        return sum((loop + 1) * n for loop, n in enumerate(self.exits)) / sum(self.exits)


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
        num_tokens: tokens with a next token.
        losses: mean cross entropy of each loop's logits; the last is the model's own.
        agreement: share of tokens whose most likely next token after each loop is the last loop's.
        oracle: number of tokens by the first loop whose most likely token is the last loop's.
        outcomes: by treatment ("backfill", …), with a rule only.
    """

    num_tokens: int
    losses: tuple[float, ...]
    agreement: tuple[float, ...]
    oracle: tuple[int, ...]
    outcomes: dict[str, ExitOutcome]

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        return asdict(self)


def evaluate(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    rule: ExitRule | None = None,
    skipped: Sequence[str] = SKIPPED,
    prompt_tokens: int = 1,
) -> Evaluation:
    """Measure each loop, and exits by a rule, on text.

    Args:
        model: a recursive model; in evaluation mode during the call.
        batches: token ids, int64 [B, T], without padding.
        rule: when tokens leave; ids of requests are the numbers of the sequences, from 0. None:
            loops alone are measured.
        skipped: treatments of skipped loops to be measured, as ``DepthwiseEngine`` has them.
            ``"backfill"`` is the full pass with each token's logits taken at its exit.
        prompt_tokens: the first tokens of each sequence, which run at full depth as an engine's
            prompt does; at least 1.

    Raises:
        TypeError, ValueError: the model is not recursive, an option is unknown, a batch is no
            int64 [B, T] with T of at least 2, or there is none.
    """
    owner = "evaluate"
    num_loops = Loops(model, owner).num_loops
    for name in skipped:
        check_choice(name, SKIPPED, owner, "skipped")
    check_count(prompt_tokens, 1, owner, "prompt_tokens")
    check_rule(rule, num_loops, owner)
    totals = _Totals(num_loops)
    with evaluating(model):
        for tokens in checked_batches(model, batches, owner, 2):
            where = _Where(totals.num_sequences, tokens.shape, prompt_tokens)
            full = _full_pass(model, tokens, rule, where)
            totals.add_loops(full, tokens)
            if rule is not None:
                for name in skipped:
                    trace = (
                        full.trace
                        if name == "backfill"
                        else _masked_pass(model, tokens, rule, where, name)
                    )
                    totals.add_outcome(name, trace, full, tokens)
            totals.num_sequences += tokens.shape[0]
    return totals.result()


class ExitTrace(NamedTuple):
    """Where each token left, and with what: all [B, T].

    Attributes:
        loops: int64, the exit loop.
        tokens: int64, the most likely next token there.
        losses: cross entropy with the next token; of each sequence's last token 0.
    """

    loops: Tensor
    tokens: Tensor
    losses: Tensor


def exit_trace(
    model: nn.Module, tokens: Tensor, rule: ExitRule, skipped: str, prompt_tokens: int = 1
) -> ExitTrace:
    """Exits of a batch of token ids [B, T]: see ``evaluate``. As ``DepthwiseEngine`` takes them for
    requests 0 … B - 1, whose prompts are the first ``prompt_tokens`` tokens and whose generated
    tokens are the rest."""
    owner = "exit_trace"
    check_choice(skipped, SKIPPED, owner, "skipped")
    (checked,) = checked_batches(model, [tokens], owner, 1)
    where = _Where(0, checked.shape, prompt_tokens)
    with evaluating(model):
        if skipped == "backfill":
            return _full_pass(model, checked, rule, where).trace
        return _masked_pass(model, checked, rule, where, skipped)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in evaluation mode, without gradients."""
    inner = unwrapped(model)
    was = [(module, module.training) for module in inner.modules()]
    inner.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was:
            module.training = training


def checked_batches(
    model: nn.Module, batches: Iterable[Tensor], owner: str, least: int
) -> Iterator[Tensor]:
    """The batches, each checked to be the model's token ids [B, T], T of at least ``least``."""
    inner: Any = unwrapped(model)
    vocabulary, found = inner.get_input_embeddings().weight.shape[0], False
    for tokens in batches:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{owner}: batches must hold tensors, got {type(tokens).__name__}")
        fits = tokens.dim() == 2 and tokens.shape[0] > 0 and tokens.shape[1] >= least
        if tokens.dtype is not torch.int64 or not fits:
            raise ValueError(
                f"{owner}: batches must be int64 [B, T] with T of at least {least}, got "
                f"{tokens.dtype} {list(tokens.shape)}"
            )
        lowest, highest = (int(token) for token in tokens.aminmax())
        if lowest < 0 or highest >= vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"{owner}: token ids must be from 0 to {vocabulary - 1}, got {wrong}")
        found = True
        yield tokens
    if not found:
        raise ValueError(f"{owner}: batches must hold at least one, got none")


def rows_of_loops(model: nn.Module, tokens: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Logits [n, V] after each loop, for parts of the B · T tokens in their order."""
    inner: Any = unwrapped(model)
    tokens = tokens.to(inner.device)
    with collected_loops(model) as states:
        last = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    rows = [state.flatten(0, 1) for state in states[:-1]]
    for part in _parts(last.shape[0], last.shape[-1]):
        yield part, [*(_tail(inner, row[part]) for row in rows), last[part]]


def _parts(count: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, min(_CHUNK_TOKENS, _CHUNK_LOGITS // vocabulary))
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


def _tail(inner: nn.Module, states: Tensor) -> Tensor:
    """Logits [n, V] of states [n, D]."""
    return exit_logits(inner, states.unsqueeze(0))[0]


# ---- exits


class _Where:
    """Sequence and position of each of the B · T tokens of a batch."""

    def __init__(self, first: int, shape: Sequence[int], prompt_tokens: int) -> None:
        rows, length = shape
        self.sequences = torch.arange(first, first + rows).repeat_interleave(length)
        # The row that reads a prompt's last token gives generated token 0, at full depth.
        self.indices = torch.arange(length).repeat(rows) - (prompt_tokens - 1)

    @property
    def may_exit(self) -> Tensor:
        return self.indices > 0


def _exits(
    rule: ExitRule, loop: int, rows: Tensor, where: _Where, logits: Tensor, earlier: Tensor | None
) -> Tensor:
    """bool [n]: which of the tokens ``rows`` [n] leave after ``loop``; logits [n, V]."""
    asked = where.may_exit[rows]
    leaves = torch.zeros(rows.shape[0], dtype=torch.bool)
    if not asked.any():
        return leaves
    own = asked.to(logits.device)
    leaves[asked] = exit_decisions(
        rule,
        ExitRows(
            loop,
            where.sequences[rows][asked].tolist(),
            where.indices[rows][asked].tolist(),
            logits[own],
            None if earlier is None else earlier[own],
        ),
    )
    return leaves


class _FullPass(NamedTuple):
    """All loops of all tokens: losses and most likely tokens [num_loops, B · T], first loops that
    agree with the last [B · T], and the exits of a rule."""

    losses: Tensor
    tokens: Tensor
    oracle: Tensor
    trace: ExitTrace


def _next_tokens(tokens: Tensor) -> Tensor:
    """The next token of each, flattened; of the last ones any."""
    return tokens.roll(-1, dims=1).flatten()


def _full_pass(model: nn.Module, tokens: Tensor, rule: ExitRule | None, where: _Where) -> _FullPass:
    labels = _next_tokens(tokens)
    losses, best, oracle, left = [], [], [], []
    for part, logits in rows_of_loops(model, tokens):
        own = labels[part].to(logits[0].device)
        losses.append(torch.stack([token_cross_entropy(each, own) for each in logits]).cpu())
        best.append(torch.stack([each.argmax(-1) for each in logits]).cpu())
        oracle.append(oracle_loops(logits).cpu())
        rows = torch.arange(part.start, part.stop)
        loops = torch.full((rows.shape[0],), len(logits) - 1)
        for loop in range(len(logits) - 1) if rule is not None else ():
            assert rule is not None
            earlier = None if loop == 0 else logits[loop - 1].argmax(-1)
            leaves = _exits(rule, loop, rows, where, logits[loop], earlier)
            loops[leaves & (loops > loop)] = loop
        left.append(loops)
    at = torch.cat(left)
    all_losses, all_best = torch.cat(losses, 1), torch.cat(best, 1)
    trace = _trace(at, all_best.gather(0, at[None])[0], all_losses.gather(0, at[None])[0], tokens)
    return _FullPass(all_losses, all_best, torch.cat(oracle), trace)


def _trace(loops: Tensor, best: Tensor, losses: Tensor, tokens: Tensor) -> ExitTrace:
    losses = losses.view(tokens.shape).clone()
    losses[:, -1] = 0
    return ExitTrace(loops.view(tokens.shape), best.view(tokens.shape), losses)


# ---- skipped keys and values


class _Masked:
    """A pass in which tokens leave: hooks on the layers of a model.

    ``copy``: a token that has left enters every later layer with the state that it left with, of
    which that layer makes its keys and values. ``share-first``: its later keys and values are
    those of its exit loop.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, rule: ExitRule, where: _Where) -> None:
        self.model: Any = unwrapped(model)
        self.shape = tokens.shape
        self.rule, self.where = rule, where
        self.labels = _next_tokens(tokens)
        count = tokens.numel()
        self.loops = torch.full((count,), -1)
        self.best = torch.zeros(count, dtype=torch.int64)
        self.losses = torch.zeros(count)
        self.earlier = torch.zeros(count, dtype=torch.int64)
        self.states: Tensor | None = None

    @property
    def has_left(self) -> Tensor:
        """bool [B, T]."""
        return (self.loops >= 0).view(self.shape).to(self.model.device)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A layer's hook: tokens that have left come with their last states."""
        if self.states is None:
            return None
        states, has_left = self.states, self.has_left.unsqueeze(-1)
        if args:
            return (torch.where(has_left, states, args[0]), *args[1:]), kwargs
        entering = torch.where(has_left, states, kwargs["hidden_states"])
        return args, {**kwargs, "hidden_states": entering}

    def end_of(self, loop: int, output: Any) -> None:
        """What has left after the loop."""
        states = output[0] if isinstance(output, tuple) else output
        rows = states.flatten(0, 1)
        staying = (self.loops < 0).nonzero().squeeze(1)
        before = self.has_left
        for part in _parts(staying.shape[0], self._vocabulary):
            own = staying[part]
            logits = _tail(self.model, rows[own.to(rows.device)])
            earlier = None if loop == 0 else self.earlier[own].to(logits.device)
            leaves = _exits(self.rule, loop, own, self.where, logits, earlier)
            self.earlier[own] = logits.argmax(-1).cpu()
            self.leave(loop, own[leaves], logits[leaves.to(logits.device)])
        if self.states is None:
            self.states = states
        self.states = torch.where(before.unsqueeze(-1), self.states, states)

    def leave(self, loop: int, rows: Tensor, logits: Tensor) -> None:
        """The tokens ``rows`` leave with their logits."""
        self.loops[rows] = loop
        self.best[rows] = logits.argmax(-1).cpu()
        own = self.labels[rows].to(logits.device)
        self.losses[rows] = token_cross_entropy(logits, own).float().cpu()

    @property
    def _vocabulary(self) -> int:
        vocabulary: int = self.model.get_output_embeddings().weight.shape[0]
        return vocabulary


def _masked_pass(
    model: nn.Module, tokens: Tensor, rule: ExitRule, where: _Where, skipped: str
) -> ExitTrace:
    loops = Loops(model, "evaluate")
    masked = _Masked(model, tokens, rule, where)
    options: dict[str, Any] = {"use_cache": False}
    with ExitStack() as hooks:
        for loop in range(loops.num_loops - 1):
            last = loops.layers(loop)[-1]
            handle = last.register_forward_hook(
                lambda module, args, output, loop=loop: masked.end_of(loop, output)
            )
            hooks.callback(handle.remove)
        if skipped == "copy":
            for loop in range(1, loops.num_loops):
                for layer in loops.layers(loop):
                    handle = layer.register_forward_pre_hook(masked.enter, with_kwargs=True)
                    hooks.callback(handle.remove)
        else:
            cache = _sharing_cache(masked, loops.length)
            options = {"use_cache": True, cache_name(type(masked.model)): cache}
        logits = model(input_ids=tokens.to(masked.model.device), **options).logits.flatten(0, 1)
    staying = (masked.loops < 0).nonzero().squeeze(1)
    for part in _parts(staying.shape[0], logits.shape[-1]):
        own = staying[part]
        masked.leave(loops.num_loops - 1, own, logits[own.to(logits.device)])
    return _trace(masked.loops, masked.best, masked.losses, tokens)


def _sharing_cache(masked: _Masked, length: int) -> Any:
    """A cache in which tokens that have left keep the entries of their exit loop."""
    from transformers import DynamicCache

    class SharingCache(DynamicCache):  # type: ignore[misc]  # untyped base
        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            loop, position = divmod(layer_idx, length)
            if loop:
                has_left = masked.has_left[:, None, :, None]
                pairs = zip(entries[position], found, strict=True)
                found = tuple(torch.where(has_left, kept, own) for kept, own in pairs)
            entries[position] = found
            return found

    entries: dict[int, tuple[Tensor, Tensor]] = {}
    return SharingCache()


# ---- sums


class _Totals:
    """Sums over batches, in float64."""

    def __init__(self, num_loops: int) -> None:
        self.num_loops = num_loops
        self.num_sequences = self.num_tokens = 0
        self.losses = torch.zeros(num_loops, dtype=torch.float64)
        self.agreeing = torch.zeros(num_loops, dtype=torch.int64)
        self.oracle = torch.zeros(num_loops, dtype=torch.int64)
        self.outcomes: dict[str, dict[str, Any]] = {}

    def add_loops(self, full: _FullPass, tokens: Tensor) -> None:
        counted = _counted(tokens)
        self.num_tokens += int(counted.sum())
        self.losses += full.losses[:, counted].double().sum(1)
        best = full.tokens[:, counted]
        self.agreeing += (best == best[-1]).sum(1)
        self.oracle += torch.bincount(full.oracle[counted], minlength=self.num_loops)

    def add_outcome(self, name: str, trace: ExitTrace, full: _FullPass, tokens: Tensor) -> None:
        counted = _counted(tokens)
        loops = trace.loops.flatten()[counted]
        agrees = trace.tokens.flatten()[counted] == full.tokens[-1, counted]
        early = loops < self.num_loops - 1
        sums = self.outcomes.setdefault(
            name, {"loss": 0.0, "agrees": 0, "early": 0, "exits": torch.zeros_like(self.oracle)}
        )
        sums["loss"] += float(trace.losses.flatten()[counted].double().sum())
        sums["agrees"] += int(agrees.sum())
        sums["early"] += int((agrees & early).sum())
        sums["exits"] += torch.bincount(loops, minlength=self.num_loops)

    def result(self) -> Evaluation:
        count = self.num_tokens
        return Evaluation(
            count,
            tuple((self.losses / count).tolist()),
            tuple((self.agreeing / count).tolist()),
            tuple(self.oracle.tolist()),
            {name: self._outcome(sums) for name, sums in self.outcomes.items()},
        )

    def _outcome(self, sums: dict[str, Any]) -> ExitOutcome:
        exits = tuple(sums["exits"].tolist())
        early = sum(exits[:-1])
        return ExitOutcome(
            sums["loss"] / self.num_tokens,
            exits,
            sums["agrees"] / self.num_tokens,
            sums["early"] / early if early else None,
        )


def _counted(tokens: Tensor) -> Tensor:
    """bool [B · T]: tokens with a next one."""
    counted = torch.ones(tokens.shape, dtype=torch.bool)
    counted[:, -1] = False
    return counted.flatten()
