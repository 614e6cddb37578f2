"""Texts from a causal language model: prompts as token ids, sampling, streaming."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lowrank_ext.cli.checks import check_at_least
from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.files import require_file
from lowrank_ext.cli.models import CausalLM, check_vocabulary, why_not_finite
from lowrank_ext.cli.variants import VariantOptions

Message: TypeAlias = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and how many at most.

    Attributes:
        temperature, top_p, top_k: None: as the model's generation config says where it samples;
            else the most likely token, and of a given temperature all tokens.
    """

    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        check_at_least("--max-new-tokens", self.max_new_tokens, 1)
        if self.top_k is not None:
            check_at_least("--top-k", self.top_k, 0)
        check_at_least("--seed", self.seed, 0, most=2**40)
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature must be at least 0, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, got {self.top_p}")

    def config(self, model: CausalLM, tokenizer: Any) -> Any:
        """transformers' form of it. A text ends at the tokens that the model or its tokenizer
        names."""
        from transformers import GenerationConfig

        ends = _ids(model.generation_config.eos_token_id) | _ids(tokenizer.eos_token_id)
        pad = tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0) if pad is None else pad,
            **self._choice(bool(model.generation_config.do_sample)),
        )

    def _choice(self, model_samples: bool) -> dict[str, Any]:
        """transformers' options of the choice; those left out are the model's. Raises UserError for
        options of sampling where the most likely token is taken."""
        samples = model_samples if self.temperature is None else self.temperature > 0
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in given.items() if value is not None}
        if samples:
            own = {} if model_samples else {"top_p": 1.0, "top_k": 0}
            return {"do_sample": True, **own, **given}
        if self.top_p is not None or self.top_k is not None:
            raise UserError(
                "--top-p and --top-k are of sampling, and the most likely token is taken here; "
                "give --temperature above 0"
            )
        return {"do_sample": False}


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(VariantOptions):
    """The options of a command whose variants answer."""

    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int
    system: str | None

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        self.sampling(0).check()
        super().check()

    def sampling(self, number: int) -> Sampling:
        """How an answer is chosen; each has a seed of its own."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed + number,
        )


def _ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


@dataclass(frozen=True)
class Answer:
    """A text that the model has made.

    Attributes:
        text: without special tokens.
        tokens: all of them, one that ends the text too.
        finish_reason: "end", "length", or "stopped" by Ctrl-C.
    """

    text: str
    tokens: list[int]
    finish_reason: str


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    require_file(f"--file {path}", path)
    with as_user_error(f"cannot read {path}", OSError, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8")
    # Only line feeds end a prompt: splitlines would also split at form feeds and others.
    prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"--file {path}: the file holds no prompt")
    return prompts


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer says how a conversation is written."""
    return getattr(tokenizer, "chat_template", None) is not None


def encoded_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text to be continued."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def encoded_messages(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, up to where the answer begins.
    Raises UserError where the template refuses it, as some do a system message."""
    with as_user_error("the chat template cannot be applied", Exception):  # templates raise theirs
        ids: list[int] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    return ids


def check_room(model: CausalLM, ids: list[int], new_tokens: int, what: str) -> None:
    """Raises UserError where a prompt has no tokens, tokens without an embedding, or too many for
    the model's context."""
    if not ids:
        raise UserError(f"{what} has no tokens")
    check_vocabulary(model, max(ids))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(ids) + new_tokens > context:
        raise UserError(
            f"{what} has {len(ids)} tokens, to which --max-new-tokens adds {new_tokens}; the "
            f"model's context has {context}"
        )


@torch.inference_mode()
def answer(
    model: CausalLM,
    tokenizer: Any,
    ids: list[int],
    sampling: Sampling,
    on_text: Callable[[str], None],
) -> Answer:
    """Continues the token ids. `on_text` gets the text in pieces, as soon as words are whole.

    Ctrl-C ends the text where it is; it is marked as stopped.
    """
    streamer = _streamer(tokenizer, on_text)
    prompt = torch.tensor([ids], device=model.device)
    config = sampling.config(model, tokenizer)
    torch.manual_seed(sampling.seed)
    stopped = False
    try:
        with as_user_error("cannot generate", ValueError, RuntimeError):
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                streamer=streamer,
                logits_processor=[_finite_logits(model)],
            )
    except KeyboardInterrupt:
        stopped = True
        streamer.end()
    tokens = streamer.tokens
    ended = bool(tokens) and tokens[-1] in _ids(config.eos_token_id)
    reason = "stopped" if stopped else "end" if ended else "length"
    return Answer(tokenizer.decode(tokens, skip_special_tokens=True), tokens, reason)


def _finite_logits(model: CausalLM) -> Any:
    """Raises UserError for logits without a largest one: argmax would take any token."""
    from transformers import LogitsProcessor

    class FiniteLogits(LogitsProcessor):  # type: ignore[misc]  # untyped base
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not scores.max().isfinite():
                cause = why_not_finite(model, "try --dtype fp32")
                raise UserError(f"cannot generate: the logits are not finite; {cause}")
            return scores

    return FiniteLogits()


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """transformers' own, which knows where a character or a word is complete."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]  # untyped base
        tokens: list[int]

        def put(self, value: torch.Tensor) -> None:
            if not self.next_tokens_are_prompt:
                self.tokens.append(int(value))
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.tokens = []
    return streamer


def write_text(text: str) -> None:
    """A piece of a text on stdout: on a terminal without characters that would control it."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()
