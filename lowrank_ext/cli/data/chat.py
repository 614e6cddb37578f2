"""Examples to the text that the model sees, and the parts of it that are trained on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_ext.cli.data.formats import (
    MESSAGES,
    ChatExample,
    CompletionExample,
    Example,
    Message,
    PreferenceExample,
    TextExample,
)
from lowrank_ext.cli.errors import UserError, one_line

ALL, COMPLETION, ASSISTANT = "all", "completion", "assistant"
TRAIN_ON = ("auto", ALL, COMPLETION, ASSISTANT)

Span = tuple[int, int]  # of characters, the end excluded

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text before tokenization.

    Attributes:
        spans: the parts that are trained on; None: all of it.
        is_template: a chat template made it, which writes special tokens itself.
    """

    text: str
    spans: list[Span] | None
    is_template: bool
    example: Example


def render(example: Example, tokenizer: Any, train_on: str) -> Rendered:
    """The text of an example. Raises UserError for a part that its format does not have, and for a
    tokenizer that has no chat template or one that does not fit.

    Args:
        train_on: auto is all for text, completion for prompts with one, assistant for messages.
    """
    if isinstance(example, TextExample):
        if train_on not in ("auto", ALL):
            raise UserError(
                f"{example.where} is plain text, which has no {train_on}: --train-on must be auto "
                "or all"
            )
        return Rendered(example.text, None, False, example)
    if isinstance(example, PreferenceExample):
        raise UserError(
            f"{example.where} is a preference pair, which lowrank-ext dpo trains on; finetune "
            "needs text, messages, or a prompt with one completion"
        )
    if isinstance(example, CompletionExample):
        return _completion(example, train_on)
    return _chat(example, tokenizer, train_on)


def _completion(example: CompletionExample, train_on: str) -> Rendered:
    if train_on == ASSISTANT:
        raise UserError(
            f"{example.where} has no messages, so none of the assistant's: --train-on must be "
            "auto, all or completion"
        )
    text = example.prompt + example.completion
    spans = None if train_on == ALL else [(len(example.prompt), len(text))]
    return Rendered(text, spans, False, example)


def _chat(example: ChatExample, tokenizer: Any, train_on: str) -> Rendered:
    template = _Template(tokenizer, example)
    whole = template.render(example.messages)
    if train_on == "auto":
        train_on = ASSISTANT if example.format == MESSAGES else COMPLETION
    if train_on == ALL:
        spans = None
    elif train_on == ASSISTANT:
        spans = template.assistant_spans(whole)
    elif example.num_prompt:
        spans = [template.span(whole, example.num_prompt, len(example.messages))]
    else:
        spans = template.assistant_spans(whole, only_last=True)
    return Rendered(whole, spans, True, example)


class _Template:
    """The tokenizer's chat template, for the messages of one example."""

    def __init__(self, tokenizer: Any, example: ChatExample) -> None:
        """Raises UserError when there is none."""
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{example.where} holds messages, but the tokenizer has no chat template; use a "
                "model that has one, give one by --chat-template, or write the texts yourself and "
                "name them by --field"
            )
        self.tokenizer, self.example = tokenizer, example

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of these messages."""
        return str(self._apply(messages, add_generation_prompt, tokenize=False))

    def assistant_spans(self, whole: str, only_last: bool = False) -> list[Span]:
        """Where the messages of the assistant stand in the text of all: where the template says so,
        and else where the text of the messages before each ends."""
        first = -1 if only_last else 0
        if self._marks_answers():
            return self._marked_spans()[first:]
        messages = enumerate(self.example.messages)
        turns = [index for index, message in messages if message["role"] == "assistant"]
        return [self.span(whole, index, index + 1) for index in turns[first:]]

    def span(self, whole: str, start: int, end: int) -> Span:
        """Where messages[start:end] stand in the text of all, without what the template writes
        before an answer."""
        messages = self.example.messages
        before = self._before(whole, start)
        through = whole if end == len(messages) else self._ended(whole, self.render(messages[:end]))
        if not (whole.startswith(before) and whole.startswith(through)):
            raise UserError(
                f"{self.example.where}: the chat template renders the first {end} messages "
                "otherwise when more follow, so the assistant's cannot be found in the text; use "
                "--train-on completion for the last answer alone, --train-on all, or a template "
                "that marks answers by {% generation %}"
            )
        return len(before), len(through)

    def _before(self, whole: str, start: int) -> str:
        """The text up to messages[start], with what the template writes before an answer."""
        if start:
            plain = self.render(self.example.messages[:start])
            before = self.render(self.example.messages[:start], add_generation_prompt=True)
            if before != plain and whole.startswith(before):
                return before
            ended = self._ended(whole, plain)
            header = before[len(plain) :] if before.startswith(plain) else ""
            return ended + header if whole.startswith(ended + header) else ended
        # Templates refuse to render no message at all.
        question = [{"role": "user", "content": ""}]
        plain = self.render(question)
        header = self.render(question, add_generation_prompt=True)[len(plain) :]
        return whole[: whole.index(header) + len(header)] if header in whole else ""

    def _ended(self, whole: str, text: str) -> str:
        """The text with the end token that follows it in that of all: some templates write one
        between turns alone, where it ends the turn before it."""
        token = self.tokenizer.eos_token or ""
        return text + token if whole.startswith(text + token) else text

    def _marks_answers(self) -> bool:
        template = self.tokenizer.get_chat_template(None, self.example.tools)
        return _GENERATION.search(template) is not None

    def _marked_spans(self) -> list[Span]:
        """Characters of the tokens that the template marks, which transformers gives by token."""
        found = self._apply(
            self.example.messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        spans: list[Span] = []
        was_marked = False
        for (start, end), marked in zip(
            found["offset_mapping"], found["assistant_masks"], strict=True
        ):
            if marked and was_marked:
                spans[-1] = (spans[-1][0], end)
            elif marked:
                spans.append((start, end))
            was_marked = bool(marked)
        return spans

    def _apply(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, **options: Any
    ) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=self.example.tools,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        except Exception as error:  # a template is a program: whatever it and jinja raise
            raise UserError(
                f"{self.example.where}: the chat template refuses the messages: {one_line(error)}"
            ) from error
