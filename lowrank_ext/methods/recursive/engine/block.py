"""The parts of a recursive model as the engine runs them: embedding, block, exit head, keys alone.

Each part is the model's own forward with other layers in its list, so that whatever a model does
around its layers (scaled embeddings, rotary tables, soft-capped logits) is done here too.
"""

import copy
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.methods.recursive.engine.cache import SlotCache
from lowrank_ext.methods.recursive.engine.model_checks import (
    check_config,
    check_like,
    check_no_hooks,
    parts_of,
)
from lowrank_ext.methods.recursive.engine.rows import (
    ATTENTION,
    KeysWritten,
    Rows,
    RowsCache,
    Run,
    active,
    active_rows,
    attention,
)
from lowrank_ext.methods.recursive.model import Loops, PassThrough, with_layers
from lowrank_ext.methods.recursive.relaxed_linear import MixedDepthLinear, RelaxedLinear
from lowrank_ext.methods.recursive.source_checks import check_no_adapters
from lowrank_ext.wrappers import unwrapped

_CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.x: the later name first


class BlockRunner:
    """Runs rows of any loop through the block.

    Args:
        model: a recursive model. Its adapters become views of stacks [B, …]; its values and its
            behaviour stay the same.

    Attributes:
        num_loops, length: B and K.
    """

    def __init__(self, model: nn.Module, caller: str) -> None:
        loops = Loops(model, caller)
        self.num_loops, self.length = loops.num_loops, loops.length
        self.model: Any = loops.decoder.model
        check_no_adapters(self.model, caller)  # of loop 0, they would serve all loops
        config: Any = self.model.config
        check_config(config.get_text_config(decoder=True), loops, caller)
        own = copy.deepcopy(config)
        own._attn_implementation = ATTENTION
        _register_attention()
        self._layers = [
            _engine_copy([loops.layers(loop)[k] for loop in range(self.num_loops)], k, own)
            for k in range(self.length)
        ]
        self._entry = _Entry(self._layers[0])
        self._exit = _Exit(self._entry if self.length == 1 else self._layers[-1])
        block = [self._exit] if self.length == 1 else [self._entry, *self._layers[1:-1], self._exit]
        self._catch, self._pass = _Catch(), PassThrough(torch.empty(0))
        path = loops.decoder.path.rpartition(".")[0]
        self._list_name = loops.decoder.list_name
        self._block: Any = with_layers(loops.decoder, block).get_submodule(path)
        self._embedding: Any = with_layers(loops.decoder, [self._catch]).get_submodule(path)
        self._tail: Any = with_layers(loops.decoder, [self._pass])
        self._cache_name = cache_name(type(self.model))

        for part in (self._block, self._embedding, self._tail):
            _without_dropout(part)
        self._layer_paths = loops.decoder.path
        self._built_on = self._parts()

    def check_unchanged(self) -> None:
        """Raise RuntimeError unless the model has the modules and the memory of parameters that it
        had: values that are written in place are seen, others would not be."""
        before, now = self._built_on, self._parts()
        for path in [*before, *now]:
            if before.get(path) != now.get(path):
                raise RuntimeError(
                    f"DepthwiseEngine: {path or 'the model'} must be what it was when the engine "
                    "was made; after moving, casting, adapting, hooking or replacing parts of a "
                    "model, setting their options, or load_state_dict(assign=True), make a new "
                    "engine"
                )

    def _parts(self) -> dict[str, tuple[object, ...]]:
        return parts_of(self.model, self._layer_paths)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def clock(self) -> float:
        """Seconds, when all calls so far have ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.inference_mode()
    def new_cache(self, num_slots: int, max_length: int) -> SlotCache:
        """A cache for ``num_slots`` sequences, after a trial of two rows.

        Raises:
            ValueError: layers' keys and values differ in shape.
            NotImplementedError: the layers attend, or are called, in a way that the engine does not
                have.
        """
        with self._on_trial():
            tokens = torch.zeros(2, dtype=torch.int64, device=self.device)
            states = self.embed(tokens, torch.arange(2, device=self.device))
            probe = _ShapeProbe(self.length, self.num_loops, 1, 2, 0, 0, states.dtype, self.device)
            self.write_keys(Rows([Run(0, 0, 0, 2)], probe), states)
        if len(probe.shapes) > 1:
            raise ValueError(
                "DepthwiseEngine: keys and values of all layers must have one shape, got "
                f"{', '.join(map(str, sorted(probe.shapes)))}"
            )
        heads, head_dim = probe.shapes.pop()

        def of(slots: int, length: int) -> SlotCache:
            sizes = (self.length, self.num_loops, slots, length, heads, head_dim)
            return SlotCache(*sizes, states.dtype, self.device)

        with self._on_trial():
            self.run(Rows([Run(0, 0, 0, 2)], of(1, 2)), states)
        return of(num_slots, max_length)

    @contextmanager
    def _on_trial(self) -> Iterator[None]:
        """A block in which what a model's own code raises means that the engine cannot run it."""
        try:
            yield
        except NotImplementedError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise NotImplementedError(
                f"DepthwiseEngine: {type(self.model).__name__} must call its layers as the engine "
                f"can, row by row; got {type(error).__name__}: {error}"
            ) from error

    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """What the first layer gets for ``tokens`` [N]: [N, D]."""
        self._embedding(
            input_ids=tokens.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            attention_mask=_no_mask(tokens.shape[0], tokens.device),
            use_cache=False,
        )
        return self._catch.taken()[0]

    def run(self, rows: Rows, hidden_states: Tensor) -> Tensor:
        """``hidden_states`` [N, D] after one more loop; keys and values go to the rows' cache."""
        self._entry.hidden_states = hidden_states.unsqueeze(0)
        with active(rows):
            self._call(rows, RowsCache())
        return self._exit.taken()[0]

    def write_keys(self, rows: Rows, hidden_states: Tensor) -> None:
        """Keys and values of every layer of the rows' loops, each from the same ``hidden_states``
        [N, D]."""
        # A first layer's call tells what the model's forward gives to each of its layers.
        given = self._given_to_layers(rows, hidden_states)
        with active(rows):
            for layer, (arguments, options) in zip(self._layers, given, strict=True):
                try:
                    layer(hidden_states.unsqueeze(0), *arguments, **options)
                except KeysWritten:
                    continue
                raise RuntimeError(f"{type(layer).__name__} must use its cache, it did not")

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [N, V] of ``hidden_states`` [N, D]."""
        self._pass.hidden_states = hidden_states.unsqueeze(0)
        count, device = hidden_states.shape[0], hidden_states.device
        logits: Tensor = self._tail(
            inputs_embeds=self._pass.hidden_states,
            position_ids=torch.zeros((1, count), dtype=torch.int64, device=device),
            attention_mask=_no_mask(count, device),
            use_cache=False,
        ).logits
        return logits[0]

    def _given_to_layers(
        self, rows: Rows, hidden_states: Tensor
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        recorders = [_Recorder() for _ in self._layers]
        kept = self._block._modules[self._list_name]
        self._block._modules[self._list_name] = nn.ModuleList(recorders)
        try:
            self._call(rows, RowsCache(only_write=True), hidden_states)
        finally:
            self._block._modules[self._list_name] = kept
        return [recorder.given for recorder in recorders]

    def _call(self, rows: Rows, cache: RowsCache, hidden_states: Tensor | None = None) -> None:
        states = self._entry.hidden_states if hidden_states is None else hidden_states.unsqueeze(0)
        self._block(
            inputs_embeds=states,
            position_ids=rows.position_ids,
            attention_mask=_no_mask(rows.count, states.device),
            use_cache=True,
            **{self._cache_name: cache},
        )


def _no_mask(count: int, device: torch.device) -> Tensor:
    """A mask of four dimensions, which models pass on as it is."""
    return torch.empty((1, 1, count, 0), device=device)


def cache_name(model_class: type[nn.Module]) -> str:
    names = inspect.signature(inspect.unwrap(model_class.forward)).parameters
    return next(name for name in _CACHE_NAMES if name in names)


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)


def _engine_copy(modules: list[nn.Module], k: int, config: Any) -> nn.Module:
    """The layer at position ``k``, or a part of it, for rows of any loop, from each loop's own."""
    modules = [unwrapped(module) for module in modules]
    first: Any = modules[0]
    check_no_hooks(modules)
    if isinstance(first, RelaxedLinear):
        return _RowsLinear([m for m in modules if isinstance(m, RelaxedLinear)])
    check_like(modules)
    made: nn.Module = first.__class__.__new__(first.__class__)
    made.__dict__.update(vars(first))
    # Those of accelerate and of module.compile() would run as the module itself.
    for name in ("forward", "_compiled_call_impl"):
        made.__dict__.pop(name, None)
    made.__dict__["training"] = False
    if "layer_idx" in vars(first):
        made.__dict__["layer_idx"] = k
    if "config" in vars(first):
        text = config.get_text_config(decoder=True)
        made.__dict__["config"] = text
    made._modules = {
        name: None
        if child is None
        else _engine_copy([m.get_submodule(name) for m in modules], k, config)
        for name, child in first._modules.items()
    }
    return made


def _without_dropout(module: Any) -> None:
    """What with_layers has copied runs as in evaluation, whatever the model's mode."""
    module.training = False
    for name, child in module._modules.items():
        if isinstance(child, nn.Dropout):
            module._modules[name] = nn.Identity()


class _RowsLinear(MixedDepthLinear):
    """A tied linear that takes the loop of each row from the present pass."""

    def __init__(self, loops: list[RelaxedLinear]) -> None:
        super().__init__(
            loops[0].weight,
            loops[0].bias,
            _stacked([each.lora_a for each in loops]),
            _stacked([each.lora_b for each in loops]),
        )
        self.in_features, self.out_features = loops[0].in_features, loops[0].out_features

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # loops are the pass's
        loops = active_rows().loops
        lead = x.shape[:-1]
        if lead == loops.shape:
            return super().forward(x, loops)
        if lead.numel() != loops.numel():  # as an expert, which sees some rows
            raise NotImplementedError(
                f"DepthwiseEngine: linears with adapters must see all {loops.numel()} rows of a "
                f"pass, got {list(x.shape)}"
            )
        return super().forward(x, loops.view(lead))


@torch.no_grad()
def _stacked(parameters: list[nn.Parameter]) -> Tensor:
    """The parameters as one tensor [B, …] of which they become views, so that they exist once and
    what is written to them is seen here."""
    first = parameters[0]
    whole = first.numel() * first.element_size()
    together = all(
        each.data_ptr() == first.data_ptr() + index * whole and each.is_contiguous()
        for index, each in enumerate(parameters)
    )
    if (
        together
        and first.untyped_storage().nbytes()
        >= first.storage_offset() * first.element_size() + whole * len(parameters)
    ):
        return first.detach().as_strided(
            (len(parameters), *first.shape), (first.numel(), *first.stride())
        )
    with torch.inference_mode(False):  # whose tensors could not train
        stack = torch.stack([each.detach() for each in parameters])
        for parameter, own in zip(parameters, stack, strict=True):
            parameter.data = own
    return stack


class _ShapeProbe(SlotCache):
    """A cache that notes [heads, head_dim] of what it is given."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.shapes: set[tuple[int, ...]] = set()

    def write(self, k: int, where: Tensor, keys: Tensor, values: Tensor) -> None:
        self.shapes |= {tuple(keys.shape[1:]), tuple(values.shape[1:])}


class _Entry(nn.Module):
    """The first layer, on hidden states that the engine gives instead of embeddings."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.hidden_states = torch.empty(0)

    def forward(self, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(self.hidden_states, *args, **kwargs)


class _Exit(nn.Module):
    """The last layer; keeps what it returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._kept: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        self._kept = output[0] if isinstance(output, tuple) else output
        return output

    def taken(self) -> Tensor:
        kept, self._kept = self._kept, None
        assert kept is not None
        return kept


class _Catch(_Exit):
    """A layer that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._kept = hidden_states
        return hidden_states


class _Recorder(nn.Module):
    """A layer that notes with which arguments it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.given = args, kwargs
        return hidden_states
