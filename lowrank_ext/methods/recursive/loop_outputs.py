"""Hidden states after every loop, and the logits that an exit there gives."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lowrank_ext.methods.recursive.model import Loops, PassThrough, with_layers
from lowrank_ext.wrappers import unwrapped


@contextmanager
def collected_loops(model: nn.Module) -> Iterator[list[Tensor]]:
    """A block whose forward of ``model`` appends the hidden states [B, T, D] after each loop,
    before the final norm, to the list that it gives. Through any wrapper of the model, DDP too.

    Raises:
        TypeError: the model is not recursive.
        ValueError: the block has ended without the states of every loop.
    """
    states: list[Tensor] = []
    loops = Loops(model, "collected_loops")

    def collect(layer: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(collect) for layer in loops.last_layers()]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
    check_collected(states, loops.num_loops)


def check_collected(states: Sequence[Tensor], num_loops: int) -> None:
    """Raise ValueError unless there are states of every loop: torch.compile may leave out hooks."""
    if len(states) < num_loops:
        raise ValueError(
            f"collected_loops: model must give the states of its {num_loops} loops, got "
            f"{len(states)}; what torch.compile has made of it without hooks runs none: set "
            "torch._dynamo.config.skip_nnmodule_hook_guards = False before it is first called"
        )


def exit_logits(model: nn.Module, hidden_states: Tensor) -> Tensor:
    """The logits of an exit: the model's own final norm, head and whatever it does after it.

        logits = head(norm(hidden_states))

    Args:
        model: a recursive model.
        hidden_states: [B, T, D], after some loop.

    Returns:
        [B, T, V].
    """
    decoder = Loops(model, "exit_logits").decoder
    tail = with_layers(decoder, [PassThrough(hidden_states)])
    logits: Tensor = tail(inputs_embeds=hidden_states, use_cache=False).logits
    return logits


def loop_logits(model: nn.Module, **inputs: Any) -> list[Tensor]:
    """Logits [B, T, V] after each loop, the last of which is the model's own output.

    Args:
        model: a recursive model.
        inputs: as for the model: input_ids, attention_mask, …

    Raises:
        TypeError: the model is not recursive.
    """
    with collected_loops(model) as states:
        output = model(**{"use_cache": False, **inputs})
    inner = unwrapped(model)
    return [*(exit_logits(inner, state) for state in states[:-1]), output.logits]
