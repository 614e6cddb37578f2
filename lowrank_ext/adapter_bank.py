"""AdapterBank: many LoRA adapters on one model, a different one for each sequence of a batch."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lowrank_ext.adapt import replace_modules, set_fused_encoders
from lowrank_ext.adapter_files import open_adapter_files
from lowrank_ext.checkpoint.lora_files import (
    LoRATensors,
    as_lora_file,
    check_adapters,
    read_lora,
    write_lora,
)
from lowrank_ext.checks import check_finite, did_you_mean, normalized_adapter_dtype
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.multi import MultiLoRALinear
from lowrank_ext.nn.quantized import keep_unpacked
from lowrank_ext.nn.rows import DEFAULT_NAMES, ROWS_NUMBERS, check_names, rows_block
from lowrank_ext.targets import is_from_peft
from lowrank_ext.wrappers import named_modules, submodule

__all__ = ["AdapterBank", "BankMemory"]


def check_no_adapters(model: nn.Module, what: str) -> None:
    """Raise ValueError where ``model`` carries adapters of adapt, of PEFT or of a bank."""
    for path, module in named_modules(model):
        adapted = isinstance(module, LowRankLinear | MultiLoRALinear)
        if adapted or is_from_peft(module):
            raise ValueError(
                f"{what} must carry no adapters, got a {type(module).__name__} at "
                f"{path or 'the model itself'}"
            )


class BankMemory(NamedTuple):
    """Bytes on the model's devices: of each adapter, of padding to a common rank, in total."""

    adapters: Mapping[str, int]
    padding: int
    total: int


class AdapterBank:
    """LoRA adapters of one model, side by side, chosen per sequence.

    The first adapter that targets a linear module replaces it by a
    ``lowrank_ext.nn.MultiLoRALinear``; unloading the last one puts the original module back.
    Inside a ``rows`` block each sequence of a batch runs with its own adapter, or with none.
    Outside of one they run with the ``default`` adapter, at first none. Sequences without an
    adapter have the bits that the plain model computes for the same batch. Modules
    that an adapter does not target compute the base's output for its sequences.

    Weights are kept once, in the base's dtype, in stacks padded to a module's largest rank. Loading
    and unloading build the stacks anew and must happen outside of all ``rows`` blocks; a compiled
    model is then compiled again, while entering a block never costs a compilation.

    A deep copy or an unpickled bank has its own model and blocks.

    Args:
        model: a plain model on its final device; the bank changes it in place.
        adapter_dtype: of the stacks, ``"base"`` or, to train them, float32 beside a bfloat16 or
            float16 base.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: model carries adapters of ``lowrank_ext.adapt``, of PEFT or of another bank, or
            holds a 4-bit weight that ``adapt`` refuses.

    Examples:
        >>> bank = lr.AdapterBank(model)
        >>> bank.load("french", "adapters/french")
        >>> bank.load("legal", "adapters/legal")
        >>> with bank.rows(["french", None, "legal"]):
        ...     output = model.generate(**batch_of_three)
        >>> bank.close()
    """

    def __init__(self, model: nn.Module, *, adapter_dtype: torch.dtype | str = "base") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"AdapterBank: model must be a torch.nn.Module, got {model!r:.60}")
        check_no_adapters(model, "AdapterBank: model")
        keep_unpacked(model, "AdapterBank")
        self.model = model
        self.adapter_dtype = normalized_adapter_dtype(adapter_dtype, "AdapterBank")
        self._number = next(ROWS_NUMBERS)
        self._adapters: dict[str, dict[MultiLoRALinear, int]] = {}  # rank in each
        self._originals: dict[MultiLoRALinear, nn.Module] = {}
        self._default: str | None = None
        self._blocks = 0
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters, in the order of loading."""
        return tuple(self._adapters)

    @property
    def default(self) -> str | None:
        """The adapter of all sequences outside of ``rows`` blocks; None: the base alone."""
        return self._default

    def set_default(self, name: str | None) -> None:
        """Choose the adapter of all sequences outside of ``rows`` blocks, or None for the base.

        Raises:
            ValueError: no adapter has this name.
            RuntimeError: a ``rows`` block is active.
        """
        if name is not None:
            self._check_known("set_default", name)
        with self._between_blocks("set_default"):
            self._default = name
            self._register_default()

    def _register_default(self) -> None:
        if self._default is None:
            DEFAULT_NAMES.pop(self._number, None)
        else:
            DEFAULT_NAMES[self._number] = self._default

    def load(self, name: str, path: str | os.PathLike[str]) -> None:
        """Load the adapter in the directory ``path`` as ``name``.

        LoRA in PEFT's format, and of this library's methods those that are a LoRA at inference:
        PiSSA, LaMDA, AFLoRA, Set-and-Sequence (ResLoRA: write it by ``lr.export_lora``).
        use_rslora, rank_pattern and alpha_pattern are honored; ranks and targets may differ from
        those of the other adapters. Dropout is not applied. A checkpoint is refused if it is more
        than a low-rank branch of linear modules: modules_to_save, DoRA, trained biases, an initial
        residual that the file does not hold (PEFT's PiSSA that was not converted), GOAT.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: the name is taken, or a file is damaged, belongs to another model or uses an
                unsupported option; the message names file and key. The model is as it was.
            RuntimeError: a ``rows`` block is active.
        """
        self._check_new("load", name)
        with (
            self._between_blocks("load"),
            open_adapter_files(Path(path), "AdapterBank.load") as files,
        ):
            self._add(name, read_lora(self.model, files).adapters)

    def add(self, name: str, adapters: Mapping[str, LoRATensors]) -> None:
        """Add a LoRA, given as tensors by module path, under ``name``. The tensors are copied.

        Raises:
            ValueError: the name is taken, a path names no linear module, or a shape does not fit
                it. The model is as it was.
            RuntimeError: a ``rows`` block is active.
        """
        self._check_new("add", name)
        with self._between_blocks("add"):
            check_adapters(self.model, adapters, "AdapterBank.add")
            self._add(name, adapters)

    def combine(self, name: str, weights: Mapping[str, float]) -> None:
        """Add the sum of loaded adapters, each times its weight, under ``name``.

            Σ weight · scaling · lora_b lora_a, of the summed rank

        For ``rows``, ``set_default`` and ``save``. Exact, to one rounding of lora_b in the dtype of
        the stacks. The adapters may be unloaded afterwards.

        Raises:
            ValueError: the name is taken, an adapter is unknown, a weight is not finite, or there
                is none. The model is as it was.
            TypeError: a weight is no number.
            RuntimeError: a ``rows`` block is active.

        Examples:
            >>> bank.combine("mix", {"french": 0.7, "legal": 0.3})
        """
        self._check_new("combine", name)
        if not weights:
            raise ValueError("AdapterBank.combine: weights must name at least one adapter")
        for each, weight in weights.items():
            self._check_known("combine", each)
            check_finite(weight, "AdapterBank.combine", f"weights[{each!r}]")
        with self._between_blocks("combine"):
            paths = {module: path for path, module in named_modules(self.model)}
            modules = {module for each in weights for module in self._adapters[each]}
            self._add(name, {paths[module]: _sum_in(module, weights) for module in modules})

    def save(self, name: str, path: str | os.PathLike[str]) -> None:
        """Write an adapter as a LoRA in PEFT's format into the directory ``path``.

        Raises:
            ValueError: no adapter has this name.
            NotADirectoryError: path is a file.
            OSError: the files cannot be written. The directory holds what it held before.
        """
        self._check_known("save", name)
        with self._lock:
            paths = {module: path for path, module in named_modules(self.model)}
            adapters = {
                paths[module]: LoRATensors(*module.adapter(name)) for module in self._adapters[name]
            }
        write_lora(self.model, path, as_lora_file(self.model, adapters), "AdapterBank.save", {})

    def unload(self, name: str) -> None:
        """Remove an adapter and free its memory.

        Raises:
            ValueError: no adapter has this name, or it is the default.
            RuntimeError: a ``rows`` block is active.
        """
        self._check_known("unload", name)
        with self._between_blocks("unload"):
            if name == self._default:
                raise ValueError(
                    f"AdapterBank.unload: name must not be the default, got {name!r}; call "
                    "set_default first"
                )
            modules = self._adapters.pop(name)
            for module in modules:
                module.remove(name)
            self._restore([module for module in modules if not module.names])

    def close(self) -> None:
        """Unload all adapters: the model is the plain one again. The bank stays usable.

        Raises:
            RuntimeError: a ``rows`` block is active.
        """
        with self._between_blocks("close"):
            self._adapters.clear()
            self._default = None
            self._register_default()
            self._restore(list(self._originals))

    def memory(self) -> BankMemory:
        """Memory of the adapters."""
        own = {
            name: sum(module.bytes_of_rank(rank) for module, rank in modules.items())
            for name, modules in self._adapters.items()
        }
        total = sum(
            len(module.names) * module.bytes_of_rank(module.lora_a.shape[1])
            for module in self._originals
        )
        return BankMemory(own, total - sum(own.values()), total)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """A ``with`` block in which sequence b of every batch runs with adapter ``names[b]``.

        None stands for the base alone. The first dimension of every input of an adapted module must
        be the batch. Where that is a multiple of the number of names, each name stands for as many
        rows next to each other: the copies that ``generate`` makes of each sequence with num_beams
        or num_return_sequences. Copies in another order (both halves of classifier-free guidance)
        need a name each.

        The block belongs to the current context (contextvars): other threads and tasks are not
        affected, and a thread started inside it does not inherit it. Of nested blocks the innermost
        applies. Recomputation by activation checkpointing must happen inside the block.

        Raises:
            TypeError: ``names`` is a string, or has an item that is neither a string nor None.
            ValueError: a name is unknown; inside the block, from the first adapted module: the
                number of rows is no multiple of the number of names.
        """
        check_names(names, "AdapterBank.rows")
        with self._lock:
            for name in names:
                if name is not None:
                    self._check_known("rows", name)
            self._blocks += 1
        try:
            with rows_block(self._number, names, "AdapterBank.rows", repeats=True):
                yield
        finally:
            with self._lock:
                self._blocks -= 1

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self) | {"_blocks": 0}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock(), _number=next(ROWS_NUMBERS))
        for module in self._originals:
            module.bank = self._number
        self._register_default()

    def __repr__(self) -> str:
        return f"AdapterBank({type(self.model).__name__}, names={list(self.names)})"

    @contextmanager
    def _between_blocks(self, action: str) -> Iterator[None]:
        """Raise where a rows block is active; holds the lock, so that none begins meanwhile."""
        with self._lock:
            if self._blocks:
                raise RuntimeError(
                    f"AdapterBank.{action}: no rows block may be active, got {self._blocks}"
                )
            yield

    def _check_new(self, action: str, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"AdapterBank.{action}: name must be a non-empty string, got {name!r}")
        if name in self._adapters:
            raise ValueError(
                f"AdapterBank.{action}: name must be new, got {name!r}; unload it first"
            )

    def _check_known(self, action: str, name: str) -> None:
        if name not in self._adapters:
            raise ValueError(
                f"AdapterBank.{action}: name must be one of {list(self.names)}, got {name!r}"
                f"{did_you_mean(name, self.names)}"
            )

    def _add(self, name: str, adapters: Mapping[str, LoRATensors]) -> None:
        """Build everything, then change the model: what fails leaves it as it was."""
        present = {path: submodule(self.model, path) for path in adapters}
        new = {
            module: MultiLoRALinear(module, self._number, self.adapter_dtype)
            for module in present.values()
            if not isinstance(module, MultiLoRALinear)
        }
        modules = {
            path: module if isinstance(module, MultiLoRALinear) else new[module]
            for path, module in present.items()
        }
        stacks = {path: modules[path].stacks_with(name, *adapters[path]) for path in modules}
        for path, module in modules.items():
            module.set_stacks(stacks[path])
        replace_modules(self.model, new)
        set_fused_encoders(self.model, on=False)
        self._originals.update({multi: module for module, multi in new.items()})
        self._adapters[name] = {
            module: adapters[path].lora_a.shape[0] for path, module in modules.items()
        }

    def _restore(self, modules: Sequence[MultiLoRALinear]) -> None:
        """Put the original modules back."""
        originals: dict[nn.Module, nn.Module] = {
            module: module.base_module(self._originals.pop(module)) for module in modules
        }
        replace_modules(self.model, originals)
        if not self._originals:
            set_fused_encoders(self.model, on=True)


@torch.no_grad()
def _sum_in(module: MultiLoRALinear, weights: Mapping[str, float]) -> LoRATensors:
    """The weighted sum of the adapters of one module."""
    present = {name: weight for name, weight in weights.items() if name in module.names}
    parts = [LoRATensors(*module.adapter(name)) for name in present]
    factors = [weight * part.scaling for weight, part in zip(present.values(), parts, strict=True)]
    scaling = max(map(abs, factors)) or 1.0  # so that no lora_b grows out of its dtype
    lora_b = [
        (part.lora_b.double() * (factor / scaling)).to(part.lora_b)
        for part, factor in zip(parts, factors, strict=True)
    ]
    lora_a = torch.cat([part.lora_a for part in parts])
    return LoRATensors(lora_a, torch.cat(lora_b, dim=1), scaling)
