"""Records to examples: known by their keys; what is wrong with one is said."""

from typing import Any

import pytest

pytest.importorskip("transformers")

from lowrank_ext.cli.data import FORMATS, PreferenceExample, to_example
from lowrank_ext.cli.data.formats import ChatExample, CompletionExample, TextExample
from lowrank_ext.cli.data.records import Record
from lowrank_ext.cli.errors import UserError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


def example(value: Any, field: str = "text", chosen: str = "auto") -> Any:
    return to_example(Record(value, "x.jsonl", 3), field, chosen)


def test_a_file_and_a_field_of_text() -> None:
    assert to_example(Record("words", "x.txt", 0), "text") == TextExample("words", "x.txt")
    assert example({"text": "words", "id": 4}).text == "words"
    found = example({"body": "words", "text": 4}, field="body")
    assert (found.text, found.where, found.format) == ("words", "x.jsonl: line 3", "text")


def test_messages() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "content": None}
    found = example({"messages": [USER, call, {**ASSISTANT, "name": None}], "tools": tools})
    assert isinstance(found, ChatExample) and found.format == "messages"
    assert found.messages == [
        USER,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        ASSISTANT,
    ]
    assert found.tools == tools and found.num_prompt == 0
    assert example({"messages": [USER], "tools": '[{"a": 1}]'}).tools == [{"a": 1}]


def test_share_gpt() -> None:
    turns = [("system", "be kind"), ("human", "hi"), ("gpt", "hello")]
    found = example({"conversations": [{"from": name, "value": text} for name, text in turns]})
    roles = [message["role"] for message in found.messages]
    assert roles == ["system", "user", "assistant"]
    assert [message["content"] for message in found.messages] == ["be kind", "hi", "hello"]
    assert example({"conversations": [USER, ASSISTANT]}).messages == [USER, ASSISTANT]


def test_prompt_and_completion() -> None:
    found = example({"prompt": "2 + 2 =", "completion": " 4"})
    assert isinstance(found, CompletionExample)
    assert (found.prompt, found.completion, found.format) == ("2 + 2 =", " 4", "completion")
    found = example({"prompt": [USER], "completion": [ASSISTANT]})
    assert isinstance(found, ChatExample)
    assert (found.messages, found.num_prompt) == ([USER, ASSISTANT], 1)
    assert found.format == "completion"


def test_instructions_have_alpacas_prompt() -> None:
    with_input = example({"instruction": "Add {these}.", "input": "2 {x}", "output": "4"})
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {these}.\n\n### Input:\n2 {x}\n\n### Response:\n"
    )
    assert (with_input.completion, with_input.format) == ("4", "instruction")
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSing.\n\n### Response:\n"
    )
    for empty in ({}, {"input": ""}, {"input": None}):
        assert example({"instruction": "Sing.", "output": "La", **empty}).prompt == without


def test_preference_pairs() -> None:
    row = {"prompt": "hi", "chosen": "hello", "rejected": "go"}
    assert example(row) == PreferenceExample("hi", "hello", "go", "x.jsonl: line 3")
    assert example(row).to_dict() == row
    chats = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}
    assert example(chats).to_dict() == chats
    assert example({**chats, "prompt": "hi"}).to_dict() == chats
    implicit = {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}
    assert example(implicit).to_dict() == implicit
    # The pairs of one prompt are held out together.
    assert example(row).key == example({**row, "chosen": "good day"}).key


def test_a_format_can_be_chosen_where_there_are_several() -> None:
    row = {"text": "all of it", "instruction": "a", "output": "b", "messages": [USER]}
    with pytest.raises(
        UserError, match=r"several formats \(text, messages, instruction\).*--format"
    ):
        example(row)
    assert [example(row, chosen=name).format for name in ("text", "messages", "instruction")] == [
        *("text", "messages", "instruction")
    ]
    with pytest.raises(UserError, match="no known format"):
        example(row, chosen="completion")
    assert set(FORMATS) == {"auto", "text", "messages", "completion", "instruction", "preference"}


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([1], "must be a JSON object, got list"),
    "a number": (4, "must be a JSON object, got int"),
    "a text": ("words", "must be a JSON object, got str"),
    "no keys": ({}, "no known format: its keys are none"),
    "other keys": (
        {"txt": "a", "id": 1},
        r"'txt' \(did you mean text\?\), 'id'; known are 'text', ",
    ),
    "half a format": ({"prompt": "a", "completon": "b"}, r"'completon' \(did you mean completion"),
    "no value": ({"text": None, "id": 1}, "its keys are 'id', without a value: 'text'"),
    "text is a number": ({"text": 5}, "'text' must be text, got int; see --field"),
    "text is NaN": ({"text": float("nan")}, "'text' must be text, got float"),
    "messages are text": ({"messages": "hi"}, "'messages' must be a list of messages, got str"),
    "no messages": ({"messages": []}, "'messages' must be a list of messages, got an empty list"),
    "a message is text": ({"messages": [USER, "hi"]}, r"messages\[1\] must be an object, got str"),
    "no role": ({"messages": [{"content": "a"}]}, r"messages\[0\] must have role and content, its"),
    "content is a list": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        r"messages\[0\]: content must be text, got list",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "content must be text, got NoneType"),
    "an unknown speaker": (
        {"conversations": [{"from": "humn", "value": "a"}]},
        r"from must be one of .* got 'humn' \(did you mean human",
    ),
    "no value of a speaker": ({"conversations": [{"from": "gpt"}]}, "must have from and value"),
    "tools are an object": ({"messages": [USER], "tools": {}}, "'tools' must be a list, got dict"),
    "tools are no JSON": ({"messages": [USER], "tools": "[{"}, "'tools' is not JSON of text"),
    "text and messages": (
        {"prompt": "hi", "completion": [ASSISTANT]},
        "prompt and completion must both be text or both be messages",
    ),
    "completion is a number": (
        {"prompt": "hi", "completion": 4},
        "'completion' must be text, got int",
    ),
    "instruction is a list": ({"instruction": ["a"], "output": "b"}, "'instruction' must be text"),
    "pairs of two kinds": (
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        "prompt, chosen, rejected must all be text or all be messages",
    ),
    "chosen is a number": ({"chosen": 1, "rejected": "b"}, "'chosen' must be text, got int"),
    "control characters": ({"\x1b]0;x\x07": 1}, r"'\\x1b\]0;x\\x07'"),
    "a long key": ({"x" * 5_000: 1}, "its keys are 'xxx"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_names_the_record(case) -> None:
    value, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        example(value)
    text = str(caught.value)
    assert text.startswith("x.jsonl: line 3") and len(text) < 700 and text.isprintable()
