"""A base and named adapters over it, of which one is used at a time."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import lowrank_ext as lr
from lowrank_ext.cli.adapters import (
    AdapterSource,
    find_adapter,
    find_base,
    find_dtype,
    find_quantization,
    load_adapter,
)
from lowrank_ext.cli.chat_template import use_templates_in
from lowrank_ext.cli.error_lines import warnings_as_lines
from lowrank_ext.cli.errors import UserError, near_matches
from lowrank_ext.cli.machine import check_machine
from lowrank_ext.cli.methods import base_dtype
from lowrank_ext.cli.models import (
    CausalLM,
    LoadedModel,
    load_model,
    resolve_device,
    resolve_dtype,
)
from lowrank_ext.files import quoted

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class VariantOptions:
    """The options of a command that runs a base and its adapters."""

    adapters: list[Path] | None
    adapter: list[str] | None
    model: str | None
    quantize: str | None
    device: str
    dtype: str | None
    threads: int | None

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        check_machine("auto" if self.dtype is None else self.dtype, self.threads)


class Variants:
    """The base and its adapters in evaluation mode, switched by name.

    LoRAs lie beside each other in an AdapterBank on one model. Every other adapter has a copy of
    the base, except where it is the only one and the base is not asked for.

    Attributes:
        loaded: the base, its tokenizer and name.
        names: of what can be used, in the user's order; BASE is the base.
    """

    def __init__(
        self, loaded: LoadedModel, adapters: Mapping[str, AdapterSource], with_base: bool
    ) -> None:
        self.loaded = loaded
        self.names = (*((BASE,) if with_base or not adapters else ()), *adapters)
        self._models: dict[str, CausalLM] = {}
        self._bank: lr.AdapterBank | None = None
        base = loaded.model.eval().requires_grad_(False)
        if len(self.names) == 1:
            for name, adapter in adapters.items():
                self._models[name] = load_adapter(base, adapter)
            self._models.setdefault(BASE, base)
            return
        self._bank = _bank(base)
        loras = [name for name, adapter in adapters.items() if _loaded(self._bank, name, adapter)]
        if len(loras) < len(adapters):
            self._bank.close()  # copies are made of the plain base
            for name, adapter in adapters.items():
                if name not in loras:
                    self._models[name] = load_adapter(copy.deepcopy(base), adapter)
            for name in loras:
                self._bank.load(name, adapters[name].directory)

    def using(self, name: str) -> CausalLM:
        """The model that computes with this adapter, until the next call."""
        if name in self._models:
            return self._models[name]
        assert self._bank is not None  # only one variant has none, and it is in _models
        self._bank.set_default(None if name == BASE else name)
        return self.loaded.model

    def check_name(self, name: str) -> None:
        """Raises UserError for a name that is none of `names`."""
        if name not in self.names:
            known = ", ".join(self.names)
            raise UserError(
                f"no adapter is called {quoted(name)}{near_matches(name, self.names)}, "
                f"there are: {known}"
            )


def _bank(base: CausalLM) -> lr.AdapterBank:
    """A bank whose adapters keep fp32 beside a base of 16 bits, as they are trained."""
    half = base_dtype(base) in (torch.bfloat16, torch.float16)
    return lr.AdapterBank(base, adapter_dtype=torch.float32 if half else "base")


def _loaded(bank: lr.AdapterBank, name: str, adapter: AdapterSource) -> bool:
    """Loads an adapter into the bank, if it is one that a bank takes."""
    try:
        with warnings_as_lines():
            bank.load(name, adapter.directory)
    except (ValueError, OSError):  # what is damaged is said by load_adapter, which gets it next
        return False
    return True


def named_adapters(
    paths: Sequence[Path] | None, named: Sequence[str] | None
) -> dict[str, AdapterSource]:
    """The adapters of ADAPTER… and of --adapter NAME=DIR, by name. Raises UserError where a name
    comes twice, or there is no adapter."""
    found = [("", find_adapter(path)) for path in paths or ()]
    for each in named or ():
        name, equals, path = each.partition("=")
        if not (name and equals and path):
            raise UserError(f"--adapter must be NAME=DIR, got {quoted(each)}")
        found.append((name, find_adapter(Path(path))))
    adapters: dict[str, AdapterSource] = {}
    for given, adapter in found:
        name = given or adapter.name
        if name in adapters or name == BASE:
            raise UserError(
                f"the name {quoted(name)} of {adapter.path} is taken; give another by "
                "--adapter NAME=DIR"
            )
        adapters[name] = adapter
    return adapters


def load_variants(
    options: VariantOptions, adapters: Mapping[str, AdapterSource], with_base: bool
) -> Variants:
    """Loads the base onto the device, and the adapters. Raises UserError for what is not there."""
    sources = list(adapters.values())
    base = find_base(sources, options.model)
    how = find_quantization(sources, options.quantize)
    where = resolve_device(options.device)
    dtype = resolve_dtype(find_dtype(sources, options.dtype), where)
    loaded = load_model(base, dtype, where, how)
    use_templates_in(loaded.tokenizer, [each.directory for each in sources])
    return Variants(loaded, adapters, with_base)
