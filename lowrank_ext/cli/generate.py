"""`lowrank-ext generate`: texts from a base and its adapters, streamed."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_ext.cli.errors import Interrupted, UserError, as_user_error
from lowrank_ext.cli.interrupts import EXIT_INTERRUPTED
from lowrank_ext.cli.sampling import (
    Answer,
    AnswerOptions,
    answer,
    check_room,
    encoded_messages,
    encoded_text,
    has_template,
    read_prompts,
    write_text,
)
from lowrank_ext.cli.variants import BASE, load_variants, named_adapters
from lowrank_ext.files import printable

_LONGEST_STDIN = 2**24  # characters


@dataclass(frozen=True, kw_only=True)
class Options(AnswerOptions):
    """The options of the command."""

    prompt: list[str] | None
    file: Path | None
    compare_base: bool
    raw: bool
    json: bool

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        if self.prompt and self.file is not None:
            raise UserError("give --prompt, which may be repeated, or --file, not both")
        if self.raw and self.system is not None:
            raise UserError(
                "--system is a message of a conversation, and --raw has none; leave out one"
            )
        super().check()


def run(options: Options) -> None:
    """Prints for each prompt the text of each variant, as soon as words are there."""
    options.check()
    adapters = named_adapters(options.adapters, options.adapter)
    prompts = _prompts(options)
    variants = load_variants(options, adapters, options.compare_base)
    tokenizer, model = variants.loaded.tokenizer, variants.loaded.model
    ids = [_encoded(tokenizer, prompt, options) for prompt in prompts]
    for number, own in enumerate(ids, start=1):
        check_room(model, own, options.max_new_tokens, f"prompt {number}")
    for number, prompt in enumerate(prompts):
        for name in variants.names:
            show = _silent if options.json else write_text
            if not options.json:
                write_text(_heading(number, prompt, name, len(prompts), variants.names))
            text = answer(
                variants.using(name), tokenizer, ids[number], options.sampling(number), show
            )
            if options.json:
                print(_record(prompt, name, text), flush=True)
            else:
                write_text("\n")
            if text.finish_reason == "stopped":
                raise Interrupted("stopped; the text above is not whole", EXIT_INTERRUPTED)


def _silent(text: str) -> None:
    return None


def _prompts(options: Options) -> list[str]:
    """Of --prompt, of --file, or all of stdin as one."""
    if options.prompt:
        return options.prompt
    if options.file is not None:
        return read_prompts(options.file)
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("give --prompt, which may be repeated, --file, or a text on stdin")
    with as_user_error("cannot read stdin", OSError, UnicodeDecodeError):
        text = sys.stdin.read(_LONGEST_STDIN)
    if not text.strip():
        raise UserError("stdin holds no prompt")
    return [text.removesuffix("\n")]


def _encoded(tokenizer: Any, prompt: str, options: Options) -> list[int]:
    """A prompt in the chat template, or as it is with --raw and where there is no template."""
    if options.raw or not has_template(tokenizer):
        if options.system is not None:
            raise UserError("--system needs a tokenizer with a chat template, this one has none")
        return encoded_text(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return encoded_messages(tokenizer, messages)


def _heading(number: int, prompt: str, name: str, num_prompts: int, names: tuple[str, ...]) -> str:
    """What stands above a text where there are several."""
    text = ""
    if num_prompts > 1 and name == names[0]:
        text = ("\n" if number else "") + f"> {printable(prompt)}\n"
    return text + (f"[{printable(name)}] " if len(names) > 1 else "")


def _record(prompt: str, name: str, text: Answer) -> str:
    return json.dumps(
        {
            "prompt": prompt,
            "adapter": None if name == BASE else name,
            "text": text.text,
            "tokens": text.tokens,
            "finish_reason": text.finish_reason,
        }
    )
