"""What the model sees of each format, and which of its tokens the loss counts."""

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowrank_ext.cli.data import to_example
from lowrank_ext.cli.data.chat import render
from lowrank_ext.cli.data.encoding import cut, encode, parts
from lowrank_ext.cli.data.records import Record
from lowrank_ext.cli.errors import UserError

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The same, with the answers marked.
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]
WHOLE = (
    "<|system|>short<eos>\n<|user|>one?<eos>\n<|assistant|>1<eos>\n<|user|>two?<eos>\n"
    "<|assistant|>2<eos>\n"
)


def byte_tokenizer(merges: list[tuple[str, str]] = [], bos: bool = False) -> Any:  # noqa: B006
    """A token for each byte and each pair of `merges`; with `bos` it begins texts with <bos>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "<eos>", "<bos>", *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", words.index("<bos>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", bos_token="<bos>")


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


def encoded(value: Any, tokenizer: Any, train_on: str = "auto") -> tuple[str, str, list[int]]:
    """(text of all tokens, text of those that the loss counts, tokens) of one record."""
    number = 0 if isinstance(value, str) else 1
    example = to_example(Record(value, "x.jsonl", number), "text")
    found = list(encode(parts([render(example, tokenizer, train_on)]), tokenizer))
    ids = [token for part in found for token in part.ids]
    trained = [is_trained for part in found for is_trained in part.trained]
    counted = [token for token, is_trained in zip(ids, trained, strict=True) if is_trained]
    return tokenizer.decode(ids), tokenizer.decode(counted), ids


def test_text_ends_with_the_end_of_text(tokenizer) -> None:
    for train_on in ("auto", "all"):
        text, trained, _ = encoded("some words", tokenizer, train_on)
        assert text == trained == "some words<eos>"
    assert encoded("ends<eos>", tokenizer)[0] == "ends<eos>"


@pytest.mark.parametrize("train_on", ["completion", "assistant"])
def test_text_has_no_parts(tokenizer, train_on) -> None:
    with pytest.raises(UserError, match=f"plain text, which has no {train_on}: --train-on must be"):
        encoded("some words", tokenizer, train_on)


def test_completions(tokenizer) -> None:
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    for train_on in ("auto", "completion"):
        assert encoded(row, tokenizer, train_on)[:2] == ("2 + 2 = 4<eos>", " 4<eos>")
    assert encoded(row, tokenizer, "all")[1] == "2 + 2 = 4<eos>"
    with pytest.raises(UserError, match="has no messages, so none of the assistant's"):
        encoded(row, tokenizer, "assistant")
    row = {"instruction": "Say é.", "output": "é"}
    text, trained, _ = encoded(row, tokenizer)
    assert text.endswith("### Response:\né<eos>") and trained == "é<eos>"


def test_a_token_on_both_sides_of_the_border_is_trained() -> None:
    tokenizer = byte_tokenizer([("Ġ", "4")])
    text, trained, ids = encoded({"prompt": "2 + 2 = ", "completion": "4"}, tokenizer)
    assert text == "2 + 2 = 4<eos>" and trained == " 4<eos>"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("template", "end"), [(CHAT, "<eos>\n"), (MARKED, "<eos>")])
def test_answers_of_chats(tokenizer, template, end) -> None:
    tokenizer.chat_template = template
    row = {"messages": TURNS}
    greeting = {"messages": [{"role": "assistant", "content": "hi"}, *TURNS[1:3]]}
    assert encoded(greeting, tokenizer)[1] == f"hi{end}1{end}"
    for train_on in ("auto", "assistant"):
        text, trained, ids = encoded(row, tokenizer, train_on)
        assert (text, trained) == (WHOLE, f"1{end}2{end}")
        assert ids == tokenizer.apply_chat_template(TURNS)["input_ids"]
    assert encoded(row, tokenizer, "completion")[1] == f"2{end}"
    assert encoded(row, tokenizer, "all")[1] == WHOLE
    assert encoded({"messages": TURNS[:2]}, tokenizer)[1] == ""  # nobody answers


@pytest.mark.parametrize("header", ["", "<|assistant|>"])
@pytest.mark.parametrize("prompt", ["", "<|assistant|>"])
def test_an_end_token_between_turns_ends_the_turn_before(tokenizer, header, prompt) -> None:
    """With and without a header before answers, and one in the generation prompt."""
    tokenizer.chat_template = (
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}HEADER{% endif %}{{ m.content }}"
            "{% if not loop.last %}<eos>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}PROMPT{% endif %}"
        )
        .replace("HEADER", header)
        .replace("PROMPT", prompt)
    )
    text, trained, _ = encoded({"messages": TURNS}, tokenizer)
    assert text == f"short<eos>one?<eos>{header}1<eos>two?<eos>{header}2"
    own = "" if prompt else header  # a header that the template does not write by itself
    assert trained == f"{own}1<eos>{own}2"
    assert encoded({"messages": TURNS}, tokenizer, "completion")[1] == f"{own}2"
    pair = {"prompt": TURNS[:2], "completion": TURNS[2:]}
    assert encoded(pair, tokenizer)[1] == f"{own}1<eos>two?<eos>{header}2"


def test_a_completion_of_messages_is_all_that_follows_the_prompt(tokenizer) -> None:
    tokenizer.chat_template = CHAT
    row = {"prompt": TURNS[:2], "completion": TURNS[2:]}
    trained = "1<eos>\n<|user|>two?<eos>\n<|assistant|>2<eos>\n"
    assert encoded(row, tokenizer)[:2] == (WHOLE, trained)
    assert encoded(row, tokenizer, "assistant")[1] == "1<eos>\n2<eos>\n"


def test_marked_answers_are_what_transformers_says(tokenizer) -> None:
    tokenizer.chat_template = MARKED
    wanted = tokenizer.apply_chat_template(
        TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    example = to_example(Record({"messages": TURNS}, "x.jsonl", 1), "text")
    [found] = encode(parts([render(example, tokenizer, "assistant")]), tokenizer)
    assert found.ids == wanted["input_ids"]
    assert [int(each) for each in found.trained] == wanted["assistant_masks"]


def test_a_template_that_changes_what_came_before(tokenizer) -> None:
    # Only the last answer keeps its first word, as templates do that drop earlier reasoning.
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content[1:] }}{% else %}{{ m.content }}{% endif %}<eos>{% endfor %}"
    )
    with pytest.raises(
        UserError, match=r"x.jsonl: line 1: .*otherwise when more follow.*--train-on all"
    ):
        encoded({"messages": TURNS}, tokenizer)
    text, trained, _ = encoded({"messages": TURNS}, tokenizer, "all")
    assert text == trained and "<|assistant|><eos>" in text
    assert encoded({"messages": TURNS}, tokenizer, "completion")[1] == "<|assistant|>2<eos>"


def test_a_template_that_refuses_messages(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('only users speak\nhere') }}"
    with pytest.raises(
        UserError, match=r"line 1: the chat template refuses .*only users speak here"
    ):
        encoded({"messages": TURNS}, tokenizer)


def test_a_tokenizer_without_a_template(tokenizer) -> None:
    with pytest.raises(UserError, match=r"has no chat template; .* --field"):
        encoded({"messages": TURNS}, tokenizer)
    with pytest.raises(UserError, match="preference pair, which lowrank-ext dpo trains on"):
        encoded({"chosen": "a", "rejected": "b"}, tokenizer)


def test_tools_reach_the_template(tokenizer) -> None:
    tokenizer.chat_template = "{{ tools[0].function.name }}:" + CHAT
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    text, trained, _ = encoded({"messages": TURNS[1:3], "tools": tools}, tokenizer)
    assert text == "add:<|user|>one?<eos>\n<|assistant|>1<eos>\n" and trained == "1<eos>\n"


def test_the_begin_of_text_is_there_once() -> None:
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.chat_template = "<bos>" + CHAT
    text, trained, _ = encoded("words", tokenizer)
    assert (text, trained) == ("<bos>words<eos>", "words<eos>")
    assert encoded("<bos>words", tokenizer)[0] == "<bos>words<eos>"
    assert encoded({"prompt": "a", "completion": "b"}, tokenizer)[:2] == ("<bos>ab<eos>", "b<eos>")
    assert encoded({"messages": TURNS}, tokenizer)[0] == "<bos>" + WHOLE
    # A tokenizer that has the token but does not write it by itself gets none.
    assert encoded("words", byte_tokenizer())[0] == "words<eos>"


class WithoutPlaces:
    """A tokenizer in Python: it does not say which characters a token stands for."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.own = tokenizer

    def __call__(self, text: Any, **options: Any) -> Any:
        assert not options.pop("return_offsets_mapping", False)
        return self.own(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def test_tokenizers_without_offsets(tokenizer) -> None:
    tokenizer.chat_template = CHAT
    for row in ({"prompt": "a", "completion": "b"}, {"messages": TURNS}):
        assert encoded(row, WithoutPlaces(tokenizer)) == encoded(row, tokenizer)
    with pytest.raises(UserError, match="--train-on all"):
        row = {"prompt": "2 + 2 = ", "completion": "4"}
        encoded(row, WithoutPlaces(byte_tokenizer([("Ġ", "4")])))


# ------------------------------------------------------------------------------------ cutting


def pieces(values: list[Any], tokenizer: Any, seq_len: int, train_on: str = "auto") -> Any:
    examples = [
        to_example(Record(value, "x", int(value != str(value))), "text") for value in values
    ]
    rendered = [render(example, tokenizer, train_on) for example in examples]
    return cut(encode(parts(rendered), tokenizer), seq_len)


def test_text_is_cut_without_a_loss(tokenizer) -> None:
    found, cuts = pieces(["abcdefgh", "xy", "", "abcdef"], tokenizer, 4)
    ends = found.offsets.tolist()
    texts = [
        tokenizer.decode(found.tokens[start:end].tolist())
        for start, end in itertools.pairwise(ends)
    ]
    assert texts == ["abcd", "efgh", "xy<eos>", "abcd", "ef<eos>"]
    assert cuts.dropped == {"rest of one token": 1, "nothing to train on": 1}
    assert cuts.truncated == 0 and cuts.examples == {"text": 4}
    assert not found.trained[found.offsets[:-1]].any()  # predicted from nothing
    assert found.trained.sum() == len(found.tokens) - len(found)


def test_other_examples_are_truncated_and_counted(tokenizer) -> None:
    values = [
        {"prompt": "ab", "completion": "cdefgh"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "abcdef", "completion": "g"},
        {"prompt": "", "completion": ""},
    ]
    found, cuts = pieces(values, tokenizer, 4)
    assert found.lengths.tolist() == [4, 3]
    assert found.trained.tolist() == [False, False, True, True, False, True, True]
    assert (cuts.truncated, cuts.truncated_tokens) == (2, 5 + 4)
    assert cuts.dropped == {"all trained tokens beyond --seq-len": 1, "nothing to train on": 1}
    assert cuts.examples == {"completion": 4}


def test_long_texts_are_tokenized_in_parts(tokenizer, monkeypatch) -> None:
    from lowrank_ext.cli.data import encoding

    text = "".join(f"line {n}\n" for n in range(300))
    wanted = encoded(text, tokenizer)
    sizes = []
    call = encoding._call

    def measured(tokenizer: Any, texts: list[str], *options: bool) -> Any:
        sizes.append(sum(map(len, texts)))
        return call(tokenizer, texts, *options)

    monkeypatch.setattr(encoding, "_CHARACTERS_AT_ONCE", 100)
    monkeypatch.setattr(encoding, "_call", measured)
    assert encoded(text, tokenizer) == wanted
    assert len(sizes) > 10 and max(sizes) < 200  # batches end when they have 100
    assert encoded("x" * 1_000, tokenizer)[0] == "x" * 1_000 + "<eos>"
    whole, _ = pieces(["ab", text, "cd"], tokenizer, 64)
    monkeypatch.undo()
    again, cuts = pieces(["ab", text, "cd"], tokenizer, 64)
    assert whole.tokens.tolist() == again.tokens.tolist()
    assert whole.offsets.tolist() == again.offsets.tolist() and cuts.examples == {"text": 3}


def test_the_tokenizer_of_the_other_tests_is_used_alike(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert encoded("words é", tokenizer)[0] == "words é<eos>"
