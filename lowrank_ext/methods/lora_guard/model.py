"""GuardModel: a causal language model and its guard, in one set of weights."""

import dataclasses
import inspect
import os
from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_ext.activation_checkpointing import HookHandles, prepare_for_checkpointing
from lowrank_ext.adapter_bank import AdapterBank, check_no_adapters
from lowrank_ext.adapter_files import open_adapter_files
from lowrank_ext.checkpoint.lora_files import LoRAFile, LoRATensors, read_lora, write_lora
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.methods.lora.module import LoRALinear
from lowrank_ext.methods.lora_guard.files import HEAD_NAME, HeadOptions, head_companion, read_head
from lowrank_ext.nn.base_layer import linear_features
from lowrank_ext.nn.init import draw_lora_a
from lowrank_ext.nn.multi import MultiLoRALinear
from lowrank_ext.nn.rows import in_block
from lowrank_ext.targets import find_targets
from lowrank_ext.wrappers import named_modules

if TYPE_CHECKING:
    from rich.table import Table

GUARD = "guard"

# Where the backbone's hook stores its hidden states; None: they are not stored.
_KEPT: ContextVar[dict[nn.Module, Tensor] | None] = ContextVar("kept_hidden", default=None)


class GuardOutput(NamedTuple):
    """What forward returns: logits of the G guard rows, in their order in the batch.

    ``lm_output`` is the base model's own output for the whole batch, None where no row generates.
    """

    unsafe_logits: Tensor  # [G, 1]
    category_logits: Tensor  # [G, num_categories]
    lm_output: Any = None


class Overhead(NamedTuple):
    """Numbers of parameters; ``ratio`` is base / (lora + head)."""

    base: int
    lora: int
    head: int
    ratio: float


class GuardModel(nn.Module):
    """LoRA-Guard (Elesedy et al., arXiv 2407.02987): generation and moderation by one model.

        generation    lm_head(f(x))                       f with the base's weights W
        guard         head(f'(x)[last real token])        f' with W + alpha / r · lora_b lora_a

    Rows that generate have the bits that the base computes for the same batch: the same products
    run on the same shapes, and nothing is added to their outputs. (This compares with a base that
    requires no gradients, as here; torch.matmul takes another product for some weights that do.)
    The base is never merged, cast or written to. Only lora_a, lora_b and the head train.

    Args:
        base_lm: a causal language model of transformers, on its final device; changed in place
            until ``unload``.
        r, alpha, dropout: of the adapters, as in ``lowrank_ext.LoRAConfig``.
        targets: its target_modules; names that match nothing raise.
        num_categories: C, kinds of unsafe content.
        unsafe_head: True: the head has C + 1 outputs, the first is the unsafe logit. False: it has
            C, and the unsafe logit is the largest of them.
        category_names: C names, kept with the model.
        adapter_dtype: ``"base"`` or a floating dtype, of the adapters and the head.

    lora_a starts Kaiming-uniform, after ``torch.manual_seed`` with PEFT's numbers, lora_b zero, the
    head Xavier-uniform with a zero bias.

    Attributes:
        head: nn.Linear, hidden size to outputs.
        bank: the ``lowrank_ext.AdapterBank`` that holds the adapters under the name "guard".
        lora_config, head_options: the options.

    Raises:
        TypeError: base_lm is no causal language model of transformers, or an argument has the wrong
            type.
        ValueError: an argument is out of range, or base_lm carries adapters already. Nothing has
            been changed then.

    Examples:
        >>> model = GuardModel(base_lm, r=8, alpha=16, targets=("q_proj", "v_proj"),
        ...                    num_categories=14)
        >>> unsafe, categories, _ = model.guard(input_ids, attention_mask)
        >>> tokens = model.generate(input_ids=input_ids, attention_mask=attention_mask)
    """

    base_lm: Any
    head: nn.Linear

    def __init__(
        self,
        base_lm: nn.Module,
        r: int = 8,
        alpha: float = 16,
        targets: str | Sequence[str] = ("q_proj", "v_proj"),
        num_categories: int = 1,
        *,
        unsafe_head: bool = True,
        category_names: Sequence[str] | None = None,
        dropout: float = 0.05,
        adapter_dtype: torch.dtype | str = "float32",
    ) -> None:
        owner = type(self).__name__
        names = None if category_names is None else tuple(category_names)
        options = HeadOptions(num_categories, unsafe_head, names)
        options.check(owner)
        _check_base(base_lm, owner)
        config = LoRAConfig.of(
            owner,
            r=r,
            alpha=alpha,
            dropout=dropout,
            target_modules=targets,
            adapter_dtype=adapter_dtype,
        )
        modules = find_targets(base_lm, config, owner)
        adapters = {path: _new_adapter(module, config) for path, module in modules.items()}
        super().__init__()
        self._assemble(base_lm, LoRAFile(config, adapters), options)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _assemble(self, base_lm: Any, lora: LoRAFile, options: HeadOptions) -> None:
        config = lora.config
        bank = AdapterBank(base_lm, adapter_dtype=config.adapter_dtype)
        bank.add(GUARD, lora.adapters)
        self.base_lm, self.bank = base_lm, bank
        self.lora_config, self.head_options = config, options
        base_lm.requires_grad_(False)
        modules = self._adapted()
        for module in modules.values():
            module.dropout = config.dropout
            module.lora_a.requires_grad_()
            module.lora_b.requires_grad_()
        like = next(iter(modules.values())).lora_a
        self.head = nn.utils.skip_init(  # the callers initialize or load it
            nn.Linear,
            _hidden_size(base_lm),
            options.num_outputs,
            dtype=like.dtype,
            device=like.device,
        )
        self.training = base_lm.training
        self.head.train(base_lm.training)
        self._checkpointing: HookHandles | None = None
        # Never removed: hooks must not change while other threads run the model.
        self._hook = self.backbone.register_forward_hook(_keep_hidden)
        parameters = inspect.signature(self.backbone.forward).parameters
        self._takes_positions = "position_ids" in parameters

    # --------------------------------------------------------------------------------- running

    @property
    def backbone(self) -> Any:
        """The transformer below the base's lm_head, which both tasks use.

        ``model.backbone.forward = torch.compile(model.backbone.forward)`` compiles it for both.
        """
        return self.base_lm.base_model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the base model: same arguments and, bit for bit, the same result."""
        return self.base_lm.generate(*args, **kwargs)

    def guard(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> GuardOutput:
        """Classify every row by its last real token.

        Args:
            input_ids: int [B, T], padded on either side with any id.
            attention_mask: [B, T], 0 where a token is padding. None: all tokens are real, also the
                pad id, which may be a text's end-of-text token.

        Returns:
            unsafe_logits [B, 1], category_logits [B, C]; the sigmoid of each is its probability.

        Raises:
            ValueError: a shape is wrong or, on a CPU, a row has no real token. On a GPU, where the
                check would stall the host, such a row gets NaN.
        """
        return self(input_ids, attention_mask)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rows: Sequence[bool] | None = None,
        **lm_options: Any,
    ) -> GuardOutput:
        """Rows to classify and rows to generate from, in one batch.

        In ``lm_output`` the rows with ``rows[b]`` false have the logits and the cache, bit for bit,
        of ``base_lm(input_ids, attention_mask, **lm_options)`` on the whole batch; ignore those of
        guard rows.

        Args:
            input_ids, attention_mask: as in ``guard``.
            rows: B bools, true for the rows to classify. None: all; the lm_head is not run then,
                and positions are counted from each row's first real token.
            lm_options: for the base model (with ``rows=None``: for its backbone), such as
                use_cache or position_ids.

        Raises:
            ValueError: as ``guard``, or ``rows`` has another length.
        """
        _check_tokens(input_ids, attention_mask, type(self).__name__)
        judged = _judged(rows, len(input_ids), type(self).__name__)
        with self.bank.rows([GUARD if judge else None for judge in judged]):
            if all(judged):
                lm_output = None
                hidden = self._judge_all(input_ids, attention_mask, lm_options)
            else:
                kept: dict[nn.Module, Tensor] = {}
                token = _KEPT.set(kept)
                try:
                    lm_output = self.base_lm(
                        input_ids=input_ids, attention_mask=attention_mask, **lm_options
                    )
                finally:
                    _KEPT.reset(token)
                hidden = kept[self.backbone]
        index = torch.tensor(
            [row for row, judge in enumerate(judged) if judge],
            dtype=torch.int64,
            device=hidden.device,
        )
        return GuardOutput(*self._logits(hidden, attention_mask, index), lm_output)

    def _judge_all(
        self, input_ids: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        if not len(input_ids):  # transformers' models cannot run an empty batch
            return self.head.weight.new_zeros((*input_ids.shape, self.head.in_features))
        options = {"use_cache": False} | options
        if attention_mask is not None and self._takes_positions and "position_ids" not in options:
            options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)
        return _hidden_states(
            self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options)
        )

    def _logits(
        self, hidden: Tensor, attention_mask: Tensor | None, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is None:
            features = hidden[index, -1]
        else:
            last = last_token_index(attention_mask.to(hidden.device)[index])
            if last.is_cpu and (last < 0).any():
                raise ValueError(
                    f"{type(self).__name__}: attention_mask must have a real token in each row to "
                    f"judge, got none in row {int(index[last.argmin()])}"
                )
            features = hidden[index, last.clamp(min=0)]
            features = features.masked_fill((last < 0).unsqueeze(-1), torch.nan)
        logits = self.head(features.to(self.head.weight))
        if self.head_options.unsafe_head:
            return logits[:, :1], logits[:, 1:]
        return logits.amax(1, keepdim=True), logits

    # -------------------------------------------------------------------------------- training

    def enable_checkpointing(self, *, use_reentrant: bool = False) -> None:
        """Activation checkpointing of the base's layers, for training the guard.

        The base's own ``gradient_checkpointing_enable`` reruns layers in backward without the
        information which rows are the guard's; this method keeps it.
        """
        self.disable_checkpointing()
        self.base_lm._set_gradient_checkpointing(
            enable=True, gradient_checkpointing_func=partial(_checkpoint_rows, use_reentrant)
        )
        self._checkpointing = prepare_for_checkpointing(self.base_lm)

    def disable_checkpointing(self) -> None:
        """Undo ``enable_checkpointing``."""
        if self._checkpointing is not None:
            self._checkpointing.remove()
            self._checkpointing = None
            self.base_lm._set_gradient_checkpointing(enable=False)

    # ------------------------------------------------------------------------------- reporting

    def overhead(self) -> Overhead:
        """How many parameters the guard adds; a shared parameter counts once."""
        lora = sum(m.lora_a.numel() + m.lora_b.numel() for m in self._adapted().values())
        head = sum(p.numel() for p in self.head.parameters())
        base = sum(p.numel() for p in self.base_lm.parameters()) - lora
        return Overhead(base, lora, head, base / (lora + head))

    def summary(self) -> "Table":
        """A rich table of ``overhead``, compared with a separate guard model."""
        numbers = self.overhead()
        from rich.table import Table  # here, so that import lowrank_ext stays fast

        table = Table(
            title=f"a guard model of the base's size has {numbers.ratio:,.0f} x the parameters of "
            "this guard"
        )
        table.add_column("part")
        table.add_column("parameters", justify="right")
        table.add_column("of the base", justify="right")
        config, options = self.lora_config, self.head_options
        for part, count in (
            ("base, shared and frozen", numbers.base),
            (f"LoRA, rank {config.r}, {len(self._adapted())} modules", numbers.lora),
            (f"head, {options.num_outputs} outputs", numbers.head),
            ("guard in all", numbers.lora + numbers.head),
        ):
            table.add_row(part, f"{count:,}", f"{100 * count / numbers.base:.3g} %")
        return table

    # -------------------------------------------------------------------------------- keeping

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write adapter and head, without the base, into the directory ``path``.

        The adapter is PEFT's LoRA checkpoint of the base model; the head is in a third file. All
        three are replaced together.

        Raises:
            ValueError: a tensor is on the meta device or sharded.
            OSError: the files cannot be written. The directory holds what it held before.
        """
        adapters = {
            path: LoRATensors(m.lora_a[0], m.lora_b[0], m.scaling.item())
            for path, m in self._adapted().items()
        }
        head = {key: t.detach().cpu().contiguous() for key, t in self.head.state_dict().items()}
        write_lora(
            self.base_lm,
            path,
            LoRAFile(self.lora_config, adapters),
            f"{type(self).__name__}.save_pretrained",
            {HEAD_NAME: head_companion(self.head_options, head)},
        )

    @classmethod
    def from_pretrained(
        cls,
        base_lm: nn.Module,
        path: str | os.PathLike[str],
        *,
        trainable: bool = True,
        adapter_dtype: torch.dtype | str = "float32",
    ) -> Self:
        """The guard in the directory ``path`` over ``base_lm``, the model it was trained on.

        Args:
            trainable: with False no parameter requires a gradient.

        Raises:
            FileNotFoundError: one of the three files is missing.
            TypeError, ValueError: as the constructor; or a file is damaged, belongs to another
                model, or the head to another adapter. Nothing has been changed then.
        """
        caller = f"{cls.__name__}.from_pretrained"
        _check_base(base_lm, caller)
        with open_adapter_files(Path(path), caller, HEAD_NAME) as files:
            config, adapters = read_lora(base_lm, files)
            if not isinstance(config, LoRAConfig):
                raise ValueError(
                    f"{caller}: {files.config_path} must be a LoRA, got {config.peft_type}"
                )
            options, head = read_head(files, _hidden_size(base_lm))
            config = dataclasses.replace(config, adapter_dtype=adapter_dtype)
            model = cls.__new__(cls)
            nn.Module.__init__(model)
            model._assemble(base_lm, LoRAFile(config, adapters), options)
        model.head.load_state_dict(head)
        return model if trainable else model.requires_grad_(False)

    def unload(self) -> Any:
        """The original base model with its own modules; no parameter of it requires a gradient.

        The guard must not be used afterwards.
        """
        self.disable_checkpointing()
        self._hook.remove()
        self.bank.close()
        return self.base_lm

    def _adapted(self) -> dict[str, MultiLoRALinear]:
        modules = named_modules(self.base_lm)
        return {path: m for path, m in modules if isinstance(m, MultiLoRALinear)}


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Position of the last nonzero in each row of ``attention_mask`` [B, T], int64 [B]; -1 if none.

    Works for padding on the right, on the left or in between, and for any pad id.
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return torch.where(attention_mask != 0, positions, -1).amax(-1)


def _keep_hidden(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    kept = _KEPT.get()
    if kept is not None:
        kept[module] = _hidden_states(output)


def _hidden_states(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return hidden


def _checkpoint_rows(use_reentrant: bool, function: Any, *args: Any) -> Any:
    return checkpoint(in_block(function), *args, use_reentrant=use_reentrant)


def _new_adapter(module: nn.Module, config: LoRAConfig) -> LoRATensors:
    features = linear_features(module)
    assert features is not None  # find_targets returns only modules with features
    num_in, num_out = features
    shapes = LoRALinear(num_in, num_out, r=config.r, device="meta")
    lora_a = draw_lora_a(shapes)
    return LoRATensors(lora_a, torch.zeros(num_out, config.r), config.scaling_for("", num_in))


def _check_base(base_lm: Any, owner: str) -> None:
    config = getattr(base_lm, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{owner}: base_lm must be a decoder alone, got the encoder-decoder "
            f"{type(base_lm).__name__}"
        )
    backbone = getattr(base_lm, "base_model", None)
    fits = isinstance(base_lm, nn.Module) and callable(getattr(base_lm, "generate", None))
    if not fits or not isinstance(backbone, nn.Module) or backbone is base_lm:
        raise TypeError(
            f"{owner}: base_lm must be a causal language model of transformers, "
            f"got {type(base_lm).__name__}"
        )
    if any(p.is_meta for p in base_lm.parameters()):
        raise ValueError(f"{owner}: base_lm must hold values, got meta tensors")
    check_no_adapters(base_lm, f"{owner}: base_lm")


def _hidden_size(base_lm: Any) -> int:
    config = base_lm.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.hidden_size)


def _check_tokens(input_ids: Tensor, attention_mask: Tensor | None, owner: str) -> None:
    if input_ids.dim() != 2 or not input_ids.shape[1] or input_ids.is_floating_point():
        raise ValueError(
            f"{owner}: input_ids must be integers [B, T] with T > 0, got {input_ids.dtype} "
            f"{list(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"{owner}: attention_mask must be {list(input_ids.shape)} as input_ids, "
            f"got {list(attention_mask.shape)}"
        )


def _judged(rows: Sequence[bool] | None, batch: int, owner: str) -> list[bool]:
    if rows is None:
        return [True] * batch
    judged = list(rows)
    if not all(isinstance(judge, bool) for judge in judged):
        raise TypeError(f"{owner}: rows must hold bools, got {rows!r}")
    if len(judged) != batch:
        raise ValueError(
            f"{owner}: rows must have {batch} entries, one for each row of input_ids, "
            f"got {len(judged)}"
        )
    return judged
