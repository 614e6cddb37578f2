"""`lowrank-ext chat`: a conversation with a base and its adapters."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from lowrank_ext.cli.errors import Interrupted, UserError, as_user_error, near_matches, one_line
from lowrank_ext.cli.files import exists, write_bytes
from lowrank_ext.cli.interrupts import EXIT_INTERRUPTED
from lowrank_ext.cli.sampling import (
    AnswerOptions,
    Message,
    answer,
    check_room,
    encoded_messages,
    encoded_text,
    has_template,
    write_text,
)
from lowrank_ext.cli.variants import BASE, Variants, load_variants, named_adapters
from lowrank_ext.files import quoted

HELP = """\
/reset          begin a new conversation
/adapter NAME   go on with another adapter; without NAME: what there is
/base           go on with the base alone
/save FILE      write the conversation as a line of JSON, which finetune --text reads
/quit           end, as the end of the input does
Ctrl-C ends an answer, a second one the command. A line that begins with a space is no command."""


def run(options: AnswerOptions) -> None:
    """Answers line by line, until /quit or the end of the input."""
    options.check()
    adapters = named_adapters(options.adapters, options.adapter)
    if sys.stdin is None:
        raise UserError("stdin is closed, where the messages would come from")
    variants = load_variants(options, adapters, with_base=True)
    if options.system is not None and not has_template(variants.loaded.tokenizer):
        raise UserError("--system needs a tokenizer with a chat template, this one has none")
    chat = Chat(variants, options)
    chat.greet()
    try:
        while not chat.ended and (line := _read_line()) is not None:
            _take(chat, line)
    except KeyboardInterrupt:
        raise Interrupted("stopped", EXIT_INTERRUPTED) from None


def _take(chat: "Chat", line: str) -> None:
    """A line of the user's. What is wrong with it is said, and the conversation goes on."""
    try:
        chat.take(line)
    except UserError as error:
        _say(f"error: {one_line(error)}")


def _read_line() -> str | None:
    """The next line; None at the end of the input."""
    if sys.stdin.isatty():
        _edit_lines()
        try:
            return input("> ")  # not rich's, over whose prompt the editing of lines writes
        except EOFError:
            typer.echo(err=True)
            return None
    with as_user_error("cannot read stdin", OSError, UnicodeDecodeError):
        line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _edit_lines() -> None:
    """Makes input() know the arrow keys, where Python is built with it."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def _say(text: str) -> None:
    """What is no answer goes to stderr, so that stdout can be piped."""
    typer.echo(text, err=True)


class Chat:
    """A conversation, and the variant that answers.

    Attributes:
        messages: role and content, in order.
        name: of the adapter that answers, or BASE.
        ended: whether the user has asked for the end.
    """

    def __init__(self, variants: Variants, options: AnswerOptions) -> None:
        self.variants = variants
        self.options = options
        self.name = variants.names[1] if len(variants.names) > 1 else BASE
        self.ended = False
        self.messages: list[Message] = []
        self._answers = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/adapter": self._adapter,
            "/base": self._base,
            "/save": self._save,
            "/quit": self._quit,
            "/help": lambda argument: _say(HELP),
        }
        self._begin()

    def greet(self) -> None:
        """Says who answers, and how to get help."""
        others = ", ".join(name for name in self.variants.names if name != self.name)
        there = f"; also there: {others}" if others else ""
        _say(f"{self.variants.loaded.name}, {self.name} answers{there}; /help lists the commands")
        if not has_template(self.variants.loaded.tokenizer):
            _say("the tokenizer has no chat template: the model continues the text as it is")

    def take(self, line: str) -> None:
        """A command or a message. Raises UserError for a wrong one, which changes nothing."""
        if not line.strip():
            return
        if not line.startswith("/"):
            self._answer(line.strip())
            return
        command, _, argument = line.partition(" ")
        if command not in self._commands:
            raise UserError(
                f"no command {quoted(command)}{near_matches(command, list(self._commands))}; "
                f"there are {', '.join(self._commands)}"
            )
        if argument.strip() and command not in ("/adapter", "/save"):
            raise UserError(f"{command} takes no argument, got {quoted(argument.strip())}")
        self._commands[command](argument.strip())

    def _begin(self) -> None:
        system = self.options.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        tokenizer = self.variants.loaded.tokenizer
        ids = _encoded(tokenizer, messages)
        sampling = self.options.sampling(self._answers)
        model = self.variants.using(self.name)
        try:
            check_room(self.variants.loaded.model, ids, sampling.max_new_tokens, "the conversation")
        except UserError as error:
            raise UserError(f"{error}; /reset begins anew") from None
        found = answer(model, tokenizer, ids, sampling, write_text)
        write_text("\n")
        if found.finish_reason == "stopped":
            _say("(stopped; Ctrl-C again ends)")
        self._answers += 1
        self.messages = [*messages, {"role": "assistant", "content": found.text}]

    def _reset(self, argument: str) -> None:
        self._begin()
        self._answers = 0
        _say("a new conversation")

    def _adapter(self, name: str) -> None:
        if name:
            self.variants.check_name(name)
            self.name = name
        there = ", ".join(self.variants.names)
        _say(f"{self.name} answers" if name else f"{self.name} answers; there are: {there}")

    def _base(self, argument: str) -> None:
        self._adapter(BASE)

    def _save(self, argument: str) -> None:
        if not argument:
            raise UserError("/save needs the name of a file")
        path = Path(argument).expanduser()
        if exists(f"/save {argument}", path) or path.is_symlink():
            raise UserError(f"/save {argument}: it is there already; give another name")
        record = json.dumps({"messages": self.messages}, ensure_ascii=False)
        write_bytes(path, (record + "\n").encode("utf-8", "backslashreplace"))
        _say(f"wrote {path}")

    def _quit(self, argument: str) -> None:
        self.ended = True


def _encoded(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The conversation in the chat template; without one its texts, a line each."""
    if has_template(tokenizer):
        return encoded_messages(tokenizer, messages)
    return encoded_text(tokenizer, "\n".join(message["content"] for message in messages))
