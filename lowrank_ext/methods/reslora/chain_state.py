"""Tensors that the modules of a chain pass to each other during one call of a model.

A *chain* is a sequence of modules that run one after another, such as the q_proj of every block.
The tensors are kept in a ``Frame``, which exists only during the forward of the chain's *owner*,
the module that runs the blocks. So no tensor outlives the call; nested calls, threads and asyncio
tasks have separate frames, as the current frame is a context variable.

The class of the owner, and of the blocks in between, becomes a subclass whose ``forward`` manages
the frame; its name, module and signature stay those of the class.

Activation checkpointing reruns a block during backward, when the call is over.

- Where a module calls its ``_gradient_checkpointing_func`` (transformers, diffusers), states become
  inputs and outputs of the checkpointed function. Gradients flow through them, so both kinds of
  checkpointing work.
- Where torch's ``checkpoint(block, x, use_reentrant=False)`` is called around a block, the block's
  incoming states are kept with the graph and looked up by x, which the second run receives too.
- With ``use_reentrant=True`` around a block, gradients could not leave it through the chain: the
  second run finds no frame, and the chain's modules raise.
"""

import functools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["ChainState", "Frame", "carry_chains", "find_frame", "open_frame", "stop_carrying"]


class ChainState(NamedTuple):
    """Tensors that the module at ``position`` of a chain stored for later modules."""

    position: int
    tensors: tuple[Tensor, ...]


class Frame:
    """The states of some chains during one call.

    Attributes:
        chains: the chains whose states this frame holds.
        outer: the enclosing frame.
        states: the last state of each chain.
        sums: cache of the last sum (a, b, a + b), which siblings with the same input share.
        carried: whether checkpointing passes the states as arguments.
    """

    def __init__(
        self, chains: frozenset[str], outer: "Frame | None", carried: bool = False
    ) -> None:
        self.chains = chains
        self.outer = outer
        self.states: dict[str, ChainState] = {}
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None
        self.carried = carried

    def sum_of(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b; the same tensor as the call before returned, if a and b are the same."""
        if self.sums is None or self.sums[0] is not a or self.sums[1] is not b:
            self.sums = (a, b, a + b)
        return self.sums[2]


_current: ContextVar[Frame | None] = ContextVar("current_frame", default=None)
# The current frame while dynamo traces, which cannot trace a context variable. It is None before
# and after the traced function.
_traced: Frame | None = None


def current_frame() -> Frame | None:
    """The innermost frame of this thread or task."""
    if not torch.compiler.is_compiling():
        return _current.get()
    if _traced is not None:
        return _traced
    # Imported while tracing only, because it imports torch._dynamo.
    from lowrank_ext.methods.reslora.untraced_frame import untraced_frame

    return untraced_frame(_current)


def find_frame(chain: str) -> Frame | None:
    """The innermost frame that holds ``chain``."""
    frame = current_frame()
    while frame is not None and chain not in frame.chains:
        frame = frame.outer
    return frame


@contextmanager
def _installed(frame: Frame | None) -> Iterator[None]:
    token = _current.set(frame)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def open_frame(chains: frozenset[str]) -> Iterator[None]:
    """A ``with`` block in which ``chains`` start without states."""
    with _installed(Frame(chains, _current.get())):
        yield


# ------------------------------------------------------------------------- owners and their blocks


def carry_chains(module: nn.Module, chains: frozenset[str] = frozenset()) -> None:
    """Make ``module`` an owner of ``chains``; without chains, a block that may be checkpointed."""
    if "_plain_class" not in vars(type(module)):
        module.__class__ = _carrying_class(type(module))
    vars(module)["_owned_chains"] = getattr(module, "_owned_chains", frozenset()) | chains


def stop_carrying(module: nn.Module) -> None:
    """Undo ``carry_chains``. Harmless for other modules."""
    vars(module).pop("_owned_chains", None)
    if "_plain_class" in vars(type(module)):
        module.__class__ = vars(type(module))["_plain_class"]


_carrying_classes: dict[type[nn.Module], type[nn.Module]] = {}  # by the plain class


def _carrying_class(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _carrying_classes:
        _carrying_classes[plain] = _new_carrying_class(plain)
    return _carrying_classes[plain]


def _new_carrying_class(plain: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(plain.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, plain.forward, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        parts: tuple[Any, ...] = plain.__reduce_ex__(self, protocol)  # type: ignore[assignment]
        return (_new_carrying, (plain,), *parts[2:])

    namespace: dict[str, Any] = {
        "__doc__": plain.__doc__,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__reduce_ex__": reduce,  # pickle cannot find the class by name
        "forward": forward,
        "_plain_class": plain,
        "_owned_chains": frozenset(),
        "_gradient_checkpointing_func": property(_checkpoint_function, _set_checkpoint_function),
    }
    # Like a class statement, this uses the metaclass of the plain class.
    return types.new_class(plain.__name__, (plain,), exec_body=lambda body: body.update(namespace))


def _new_carrying(plain: type[nn.Module]) -> nn.Module:
    cls = _carrying_class(plain)
    return cls.__new__(cls)


def _run(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """The forward of a module that carries chains."""
    chains: frozenset[str] = module._owned_chains  # type: ignore[assignment]
    if torch.compiler.is_compiling():
        return _run_traced(module, chains, forward, args, kwargs)
    frame, note = _frame_of_block(module, args, kwargs)
    with _installed(Frame(chains, frame) if chains else frame):
        result = forward(module, *args, **kwargs)
    if note is not None:
        note.leave_to(result)
    return result


def _run_traced(
    module: nn.Module,
    chains: frozenset[str],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    global _traced
    if not chains:
        return forward(module, *args, **kwargs)
    outer = _traced
    _traced = Frame(chains, outer)
    try:
        return forward(module, *args, **kwargs)
    finally:
        _traced = outer


# --------------------------------------------------------- checkpointing called by owner or blocks


class _Layout(NamedTuple):
    """Frames, innermost first, with indices in place of their tensors."""

    frames: list[tuple[frozenset[str], dict[str, tuple[int, list[int]]]]]


def _layout(frame: Frame | None, tensors: list[Tensor]) -> _Layout:
    """Layout of ``frame`` and its outer frames; appends tensors that ``tensors`` lacks."""
    numbers = {id(tensor): i for i, tensor in enumerate(tensors)}
    frames = []
    while frame is not None:
        states: dict[str, tuple[int, list[int]]] = {}
        for chain, state in frame.states.items():
            for tensor in state.tensors:
                if id(tensor) not in numbers:
                    numbers[id(tensor)] = len(tensors)
                    tensors.append(tensor)
            states[chain] = (state.position, [numbers[id(tensor)] for tensor in state.tensors])
        frames.append((frame.chains, states))
        frame = frame.outer
    return _Layout(frames)


def _rebuilt(layout: _Layout, tensors: Sequence[Tensor], carried: bool) -> Frame | None:
    frame: Frame | None = None
    for chains, states in reversed(layout.frames):
        frame = Frame(chains, frame, carried)
        _fill(frame, states, tensors)
    return frame


def _fill(
    frame: Frame, states: Mapping[str, tuple[int, list[int]]], tensors: Sequence[Tensor]
) -> None:
    frame.states = {
        chain: ChainState(position, tuple(tensors[i] for i in numbers))
        for chain, (position, numbers) in states.items()
    }


class _CarryingCheckpoint:
    """A checkpoint function that passes the current frame's states through the checkpointed one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = _current.get()
        if frame is None:
            return self.function(run, *args, **kwargs)
        given: list[Tensor] = []
        before, num_given = _layout(frame, given), len(given)
        # Set by the first run. Holds no tensor, which would live as long as the graph.
        after: dict[str, Any] = {}

        def carried(*inputs: Any, **options: Any) -> tuple[Any, ...]:
            tensors = list(inputs[:num_given])
            inner = _rebuilt(before, tensors, carried=True)
            with _installed(inner):
                result = run(*inputs[num_given:], **options)
            after["layout"] = _layout(inner, tensors)
            leaves, after["spec"] = pytree.tree_flatten(result)
            return (*leaves, *tensors[num_given:])

        # Flattened, because reentrant checkpointing ignores tensors inside of a tuple.
        outputs = self.function(carried, *given, *args, **kwargs)
        num_leaves = after["spec"].num_leaves
        tensors = [*given, *outputs[num_leaves:]]
        outer: Frame | None = frame
        for _, states in after["layout"].frames:
            assert outer is not None
            _fill(outer, states, tensors)
            outer = outer.outer
        return pytree.tree_unflatten(outputs[:num_leaves], after["spec"])


def _checkpoint_function(module: nn.Module) -> Callable[..., Any]:
    function: Callable[..., Any] | None = vars(module).get("_gradient_checkpointing_func")
    if function is None:
        raise AttributeError(
            f"{type(module).__name__} has no attribute '_gradient_checkpointing_func'"
        )
    # Under dynamo the checkpointed region reads the traced frame directly.
    return function if torch.compiler.is_compiling() else _CarryingCheckpoint(function)


def _set_checkpoint_function(module: nn.Module, function: Callable[..., Any]) -> None:
    vars(module)["_gradient_checkpointing_func"] = function


# --------------------------------------------------------------- checkpointing around whole blocks


class _Note:
    """The frames at a block's call, for the second run of that call.

    Owned by the call's graph, so it lives as long; x refers to it weakly.
    """

    def __init__(self, frame: Frame) -> None:
        self.tensors: list[Tensor] = []
        self.layout = _layout(frame, self.tensors)

    def frame(self) -> Frame | None:
        return _rebuilt(self.layout, self.tensors, carried=False)

    def leave_to(self, result: Any) -> None:
        """Make the graph of the block's ``result`` own this note."""
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                owned: dict[Any, Any] = leaf.grad_fn.metadata  # type: ignore[assignment]
                owned.setdefault(_Note, []).append(self)
                return


def _frame_of_block(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Frame | None, _Note | None]:
    """The frame for a call of ``module``, and a note of it if the call may be rerun.

    A first run has the current frame, a second run that of the first.
    """
    frame = _current.get()
    if frame is not None and frame.carried:
        return frame, None
    x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if x is None:
        return frame, None
    if torch._C._current_graph_task_id() != -1:
        notes = _notes(module, x)
        if len(notes) > 1:
            raise RuntimeError(
                f"ResLoRA: a checkpointed {type(module).__name__} must get a tensor of its own in "
                f"each call, got the same in {len(notes)} calls that wait for their backward; pass "
                "x.view_as(x)"
            )
        return (notes[0].frame() if notes else frame), None
    # Without saved-tensor hooks no checkpointing is active, so the call is not rerun.
    if frame is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return frame, None
    note = _Note(frame)
    vars(x).setdefault("_chain_notes", {}).setdefault(id(module), []).append(weakref.ref(note))
    return frame, note


def _notes(module: nn.Module, x: Tensor) -> list[_Note]:
    """The notes on x for calls of ``module`` whose graphs are alive."""
    references = vars(x).get("_chain_notes", {}).get(id(module), [])
    references[:] = [reference for reference in references if reference() is not None]
    return [note for reference in references if (note := reference()) is not None]
