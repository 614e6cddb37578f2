"""`lowrank-ext merge`: an adapter merged into its base, written as an ordinary model."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import lowrank_ext as lr
from lowrank_ext.adapt import lowrank_modules, replace_modules
from lowrank_ext.cli.adapters import (
    AdapterSource,
    find_adapter,
    find_base,
    find_quantization,
    load_adapter,
)
from lowrank_ext.cli.chat_template import use_templates_in
from lowrank_ext.cli.checks import check_choice
from lowrank_ext.cli.error_lines import warnings_as_lines
from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.files import MEBIBYTE, cannot_write, new_directory, require_free_space
from lowrank_ext.cli.interrupts import sigterm_raises
from lowrank_ext.cli.machine import check_machine
from lowrank_ext.cli.models import (
    TORCH_DTYPES,
    CausalLM,
    ModelSource,
    dtype_name,
    holds_quantized,
    load_model,
    resolve_device,
    resolve_dtype,
)
from lowrank_ext.cli.results import check_replaceable, write_record
from lowrank_ext.cli.whole_model import save_whole_model
from lowrank_ext.merging import dense_dtype, forget_quantization
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.quantized import dequantized_weight, is_quantized
from lowrank_ext.targets import shared_tensors

RECORD = "merged_from.json"
OWN_DTYPE = "base"
_SHARD_SIZE = re.compile(r"\d+(\.\d+)?([KMGT]i?B)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    adapter: Path
    out: Path
    model: str | None
    quantize: str | None
    dtype: str
    dequantize: bool
    max_shard_size: str
    device: str
    threads: int | None

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        check_choice("--dtype", self.dtype, (OWN_DTYPE, *TORCH_DTYPES))
        if not _SHARD_SIZE.fullmatch(self.max_shard_size):
            raise UserError(
                f"--max-shard-size must be a size as 5GB or 500MB, got {self.max_shard_size!r}"
            )
        check_machine("auto", self.threads)


def run(options: Options, console: Console) -> None:
    """Loads base and adapter in fp32, merges, rounds once, writes."""
    options.check()
    adapter = find_adapter(options.adapter)
    base = find_base([adapter], options.model)
    inputs = [str(adapter.directory), base.location]
    check_replaceable(options.out, RECORD, inputs)
    quantize = find_quantization([adapter], options.quantize)
    if quantize is not None and not options.dequantize:
        raise _needs_dequantize(f"the base is in {quantize}")
    device = resolve_device(options.device)
    with sigterm_raises():
        how = f"fp32, linears in {quantize}" if quantize else "fp32"
        console.print(f"loading {base.name} in {how}", markup=False, soft_wrap=True)
        loaded = load_model(base, _loaded_dtype(adapter, quantize, device), device, quantize)
        _make_fp32(loaded.model)
        dtype = _dtype(options.dtype, base)
        _check_dequantize(loaded.model, base, options.dequantize)
        use_templates_in(loaded.tokenizer, [adapter.directory])
        adapted = load_adapter(loaded.model, adapter)
        with warnings_as_lines():
            model = merged(adapted, adapter).to(dtype)
        facts = {"base": Path(base.name).name, "method": adapter.method, "dtype": dtype_name(dtype)}
        _write(model, loaded.tokenizer, options, facts, console)
    console.print(f"wrote {options.out}", markup=False, soft_wrap=True)


def _dtype(name: str, base: ModelSource) -> torch.dtype:
    """That of --dtype; by default the one that the base is stored in, bf16 for GGUF."""
    if name != OWN_DTYPE:
        return TORCH_DTYPES[name]
    if base.gguf_file:
        return torch.bfloat16
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.location, local_files_only=True)
    found = config.get_text_config().dtype
    return found if found in TORCH_DTYPES.values() else torch.float32


def _loaded_dtype(
    adapter: AdapterSource, quantize: str | None, device: torch.device
) -> torch.dtype:
    """fp32; of what is quantized on loading that of the run, of whose values the codes are."""
    if quantize is None:
        return torch.float32
    return resolve_dtype("auto" if adapter.run is None else adapter.run.dtype, device)


@torch.no_grad()
def _make_fp32(model: CausalLM) -> None:
    """Gives all modules but the quantized ones fp32, in which the merge is done."""
    for module in model.modules():
        if not is_quantized(module):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.float()


def _needs_dequantize(what: str) -> UserError:
    return UserError(
        f"{what}, and a merged weight is dense: give --dequantize to merge into its weights made "
        "dense, or the model before quantization, by --quantize none or --model"
    )


def _check_dequantize(model: CausalLM, base: ModelSource, dequantize: bool) -> None:
    """Raises UserError unless --dequantize is given for a quantized base, and for no other."""
    quantized = holds_quantized(model)
    if quantized and not dequantize:
        raise _needs_dequantize(f"{base.name} is quantized")
    if dequantize and not quantized:
        raise UserError(f"--dequantize is for a quantized base, {base.name} is none; leave it out")


def merged(model: CausalLM, adapter: AdapterSource) -> CausalLM:
    """The adapted model with plain, dense modules that compute what the adapted ones did. Raises
    UserError where none does."""
    modules = lowrank_modules(model, "merge")
    for why in {m.unmergeable_because for m in modules.values() if m.unmergeable_because}:
        raise UserError(
            f"cannot merge {adapter.path}: {adapter.method}: {why}; lowrank-ext generate, chat and "
            "evaluate take the adapter as it is"
        )
    for why in {m.merge_is_estimate for m in modules.values() if m.merge_is_estimate}:
        warnings.warn(f"the merge is an estimate: {why}", stacklevel=2)
    _untie(model, modules)
    with as_user_error(f"cannot merge {adapter.path}", ValueError, TypeError):
        plain = lr.unload(model, merge=True)
    _make_dense(plain)
    return plain


@torch.no_grad()
def _make_dense(model: CausalLM) -> None:
    """Puts a plain linear in place of every quantized one that had no adapter."""
    dtype = dense_dtype(model)
    dense: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        weight = dequantized_weight(module)
        if weight is None:
            continue
        out_features, in_features = weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        dense[module] = linear
    replace_modules(model, dense)
    forget_quantization(model)


def _untie(model: CausalLM, modules: Mapping[str, LowRankLinear]) -> None:
    """Gives adapted modules weights of their own: a tied one would change another module."""
    owners = {m if m.base_layer is None else m.base_layer: m for m in modules.values()}
    weights = {owner: w for owner, m in owners.items() if (w := m.mergeable_parameter) is not None}
    for owner, others in shared_tensors(model, weights).items():
        if others:
            owner.weight = nn.Parameter(weights[owner].detach().clone(), requires_grad=False)


def _write(
    model: CausalLM,
    tokenizer: Any,
    options: Options,
    facts: dict[str, str],
    console: Console,
) -> None:
    """Writes all files at once into a new directory, if the disk has room for them."""
    out, num_bytes = options.out, _num_bytes(model)
    with cannot_write(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(out.parent, num_bytes + 64 * MEBIBYTE)
    console.print(f"writing {num_bytes / MEBIBYTE:,.0f} MiB", markup=False)
    with new_directory(out) as temporary:
        save_whole_model(model, tokenizer, temporary, options.max_shard_size)
        write_record(temporary, RECORD, facts)


def _num_bytes(model: CausalLM) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
