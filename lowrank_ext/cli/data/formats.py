"""Records to examples: a record's format is known by its keys."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from lowrank_ext.cli.data.json_text import parse_json
from lowrank_ext.cli.data.records import Record
from lowrank_ext.cli.errors import UserError, near_matches
from lowrank_ext.files import quoted

Message: TypeAlias = dict[str, Any]  # role and content, and what else the chat template reads

TEXT, MESSAGES, COMPLETION, INSTRUCTION, PREFERENCE = (
    "text",
    "messages",
    "completion",
    "instruction",
    "preference",
)
# Alpaca's: of the records without and with an input.
INSTRUCTION_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
INSTRUCTION_INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# ShareGPT's names of the roles.
_SHARE_GPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class TextExample:
    """A document."""

    text: str
    where: str
    format: str = TEXT

    @property
    def key(self) -> str:
        """What the held-out split hashes."""
        return self.text


@dataclass(frozen=True, slots=True)
class CompletionExample:
    """A prompt and what follows it."""

    prompt: str
    completion: str
    where: str
    format: str

    @property
    def key(self) -> str:
        """What the held-out split hashes."""
        return json.dumps([self.prompt, self.completion])


@dataclass(frozen=True, slots=True)
class ChatExample:
    """Messages, of which the first `num_prompt` are the prompt: 0 where a record does not say."""

    messages: list[Message]
    where: str
    format: str
    num_prompt: int = 0
    tools: list[Any] | None = None

    @property
    def key(self) -> str:
        """What the held-out split hashes."""
        return json.dumps([self.messages, self.tools], default=str)


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """Two answers to a prompt, all texts or all messages. Without a prompt of its own (None) both
    answers begin with it."""

    prompt: str | list[Message] | None
    chosen: str | list[Message]
    rejected: str | list[Message]
    where: str
    format: str = PREFERENCE

    @property
    def key(self) -> str:
        """What the held-out split hashes: pairs of one prompt stay on one side."""
        return json.dumps(self.chosen if self.prompt is None else self.prompt, default=str)

    def to_dict(self) -> dict[str, Any]:
        """The row that TRL's trainers take."""
        found = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return {name: value for name, value in found.items() if value is not None}


Example: TypeAlias = TextExample | CompletionExample | ChatExample | PreferenceExample


FORMATS = ("auto", TEXT, MESSAGES, COMPLETION, INSTRUCTION, PREFERENCE)


def to_example(record: Record, field: str, chosen: str = "auto") -> Example:
    """The example in a record. Raises UserError naming the record: its keys when these are of no
    format or of several, and values of another type than their format's.

    Args:
        field: the key of plain text.
        chosen: one of FORMATS, for records that have the keys of several; auto: the only one.
    """
    if isinstance(record.value, str) and not record.number:
        return TextExample(record.value, record.where)
    if not isinstance(record.value, dict):
        kind = type(record.value).__name__
        raise UserError(
            f"{record.where} must be a JSON object, got {kind}; {_known(field, chosen)}"
        )
    # Arrow fills the fields that a row does not have with None.
    row = {key: value for key, value in record.value.items() if value is not None}
    found = [name for name, keys in _formats(field, chosen).items() if _has(row, keys)]
    if len(found) > 1:
        raise UserError(
            f"{record.where} has the keys of several formats ({', '.join(found)}); choose one by "
            "--format"
        )
    if not found:
        raise UserError(f"{record.where} {_no_format(record.value, row, field, chosen)}")
    return _MAKERS[found[0]](row, record.where, field)


def _formats(field: str, chosen: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The sets of keys of each format that is asked for, any of which makes it."""
    formats: dict[str, tuple[tuple[str, ...], ...]] = {
        TEXT: ((field,),),
        MESSAGES: (("messages",), ("conversations",)),
        COMPLETION: (("prompt", "completion"),),
        INSTRUCTION: (("instruction", "output"),),
        PREFERENCE: (("chosen", "rejected"),),
    }
    return formats if chosen == "auto" else {chosen: formats[chosen]}


def _has(row: dict[str, Any], keys: Iterable[tuple[str, ...]]) -> bool:
    return any(all(key in row for key in every) for every in keys)


def _known(field: str, chosen: str) -> str:
    formats = [" + ".join(map(quoted, every[0])) for every in _formats(field, chosen).values()]
    return f"known are {', '.join(formats)}; see --field"


def _no_format(whole: dict[str, Any], row: dict[str, Any], field: str, chosen: str) -> str:
    """What a record has instead of a format's keys, and the known keys that are near these."""
    known = [key for sets in _formats(field, chosen).values() for every in sets for key in every]
    there = ", ".join(
        quoted(key) + ("" if key in known else near_matches(str(key), known)) for key in row
    )
    empty = [key for key in whole if key not in row and key in known]
    without = f", without a value: {', '.join(map(quoted, empty))}" if empty else ""
    return f"has no known format: its keys are {there or 'none'}{without}; {_known(field, chosen)}"


# ------------------------------------------------------------------------------- one format each


def _text(row: dict[str, Any], where: str, field: str) -> Example:
    return TextExample(_string(row, field, where), where)


def _chat(row: dict[str, Any], where: str, field: str) -> Example:
    key = "messages" if "messages" in row else "conversations"
    return ChatExample(_messages(row, key, where), where, MESSAGES, tools=_tools(row, where))


def _completion(row: dict[str, Any], where: str, field: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = _messages(row, "prompt", where)
        num_prompt = len(messages)
        messages = messages + _messages(row, "completion", where)
        return ChatExample(messages, where, COMPLETION, num_prompt, _tools(row, where))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise UserError(f"{where}: prompt and completion must both be text or both be messages")
    return CompletionExample(
        _string(row, "prompt", where), _string(row, "completion", where), where, COMPLETION
    )


def _instruction(row: dict[str, Any], where: str, field: str) -> Example:
    values = {key: _string(row, key, where) for key in ("instruction", "output")}
    given = _string(row, "input", where) if "input" in row else ""
    template = INSTRUCTION_INPUT_PROMPT if given else INSTRUCTION_PROMPT
    prompt = template.format(instruction=values["instruction"], input=given)
    return CompletionExample(prompt, values["output"], where, INSTRUCTION)


def _preference(row: dict[str, Any], where: str, field: str) -> Example:
    keys = [key for key in ("prompt", "chosen", "rejected") if key in row]
    lists = [key for key in keys if isinstance(row[key], list)]
    # A prompt of text before answers of messages is one message of the user.
    if lists == ["chosen", "rejected"] and isinstance(row.get("prompt"), str):
        row = {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
        lists = keys
    if lists and lists != keys:
        raise UserError(f"{where}: {', '.join(keys)} must all be text or all be messages")
    read = _messages if lists else _string
    values = {key: read(row, key, where) for key in keys}
    return PreferenceExample(values.get("prompt"), values["chosen"], values["rejected"], where)


_MAKERS: dict[str, Callable[[dict[str, Any], str, str], Example]] = {
    TEXT: _text,
    MESSAGES: _chat,
    COMPLETION: _completion,
    INSTRUCTION: _instruction,
    PREFERENCE: _preference,
}


# --------------------------------------------------------------------------------------- values


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        hint = "; see --field" if key == "text" else ""
        raise UserError(f"{where}: {key!r} must be text, got {type(value).__name__}{hint}")
    return value


def _messages(row: dict[str, Any], key: str, where: str) -> list[Message]:
    value = row[key]
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise UserError(f"{where}: {key!r} must be a list of messages, got {got}")
    return [_message(each, f"{where}: {key}[{index}]") for index, each in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object, got {type(value).__name__}")
    message = {key: part for key, part in value.items() if part is not None}
    if "from" in message and "role" not in message:
        message = _from_share_gpt(message, where)
    if not isinstance(message.get("role"), str):
        keys = ", ".join(map(quoted, message)) or "none"
        raise UserError(f"{where} must have role and content, its keys are {keys}")
    # A message that only calls tools has no content.
    if "content" not in message and "tool_calls" in message:
        return message
    if not isinstance(message.get("content"), str):
        got = type(message.get("content")).__name__
        raise UserError(f"{where}: content must be text, got {got}")
    return message


def _from_share_gpt(message: Message, where: str) -> Message:
    name = message["from"]
    if not isinstance(name, str) or name not in _SHARE_GPT_ROLES:
        known = list(_SHARE_GPT_ROLES)
        raise UserError(
            f"{where}: from must be one of {', '.join(known)}, got {quoted(name)}"
            f"{near_matches(str(name), known)}"
        )
    if "value" not in message:
        raise UserError(f"{where} must have from and value, its keys are {', '.join(message)}")
    return {"role": _SHARE_GPT_ROLES[name], "content": message["value"]}


def _tools(row: dict[str, Any], where: str) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # as some datasets store what has no fixed columns
        tools = parse_json(tools, f"{where}: 'tools'")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{where}: 'tools' must be a list, got {type(tools).__name__}")
    return tools
