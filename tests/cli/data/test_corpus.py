"""Options to rows: the held-out part, packing, the table before training, the preview."""

import copy
import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    LlamaConfig,
    OPTConfig,
)

from lowrank_ext.cli.data import (
    DataOptions,
    collate,
    load_corpus,
    load_examples,
    load_held_out,
    pad_id_of,
)
from lowrank_ext.cli.data import progress as progress_module
from lowrank_ext.cli.data.formats import TextExample
from lowrank_ext.cli.data.progress import counted
from lowrank_ext.cli.data.split import split_examples
from lowrank_ext.cli.errors import UserError

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    found = AutoTokenizer.from_pretrained(tiny_model)
    found.chat_template = CHAT + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    return found


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def chats(n: int) -> list[Any]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {k}"},
                {"role": "assistant", "content": "a" * (k + 1)},
            ]
        }
        for k in range(n)
    ]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return write(tmp_path / "texts.jsonl", [{"text": f"{k} " * (10 + k)} for k in range(30)])


# -------------------------------------------------------------------------------- held-out part


def test_whole_examples_are_held_out_whatever_their_order(tmp_path) -> None:
    rows = chats(40)
    found = load_examples(DataOptions((write(tmp_path / "a.jsonl", rows),)))
    names = [example.key for example in found.train]
    held_out = [example.key for example in found.held_out]
    everything = [json.dumps([row["messages"], None]) for row in rows]
    assert sorted(names + held_out) == sorted(everything)
    assert names == [key for key in everything if key not in held_out]  # in the file's order
    assert 0.1 <= sum(map(len, held_out)) / sum(map(len, everything)) < 0.15
    again = load_examples(DataOptions((write(tmp_path / "b.jsonl", rows[::-1]),)))
    assert [example.key for example in again.held_out] == held_out
    assert found.description == f"{tmp_path / 'a.jsonl'}: 40 examples"


def test_equal_examples_stay_together(tmp_path) -> None:
    rows = chats(3) * 10
    found = load_examples(DataOptions((write(tmp_path / "a.jsonl", rows),)))
    assert not {each.key for each in found.train} & {each.key for each in found.held_out}
    assert len(found.held_out) == 10
    with pytest.raises(UserError, match=r"10 examples are too few .* or all are equal.*--eval"):
        load_examples(DataOptions((write(tmp_path / "b.jsonl", chats(1) * 10),)))
    with pytest.raises(UserError, match="1 examples are too few"):
        load_examples(DataOptions((write(tmp_path / "c.jsonl", chats(1)),)))


def test_empty_texts_alone_cannot_be_split() -> None:
    empty = [TextExample("", f"line {number}") for number in range(12)]
    with pytest.raises(UserError, match="12 examples are too few to hold some out, or all are eq"):
        split_examples(empty)


def test_of_few_texts_the_tails_are_held_out(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a" * 90 + "b" * 10)
    found = load_examples(DataOptions((str(tmp_path / "a.txt"),)))
    assert [each.key for each in found.train] == ["a" * 90]
    assert [each.key for each in found.held_out] == ["b" * 10]
    assert split_examples(found.train)[1][0].key == "a" * 9


def test_eval_is_held_out_and_all_of_text_is_trained_on(tmp_path) -> None:
    given = write(tmp_path / "a.jsonl", chats(12)), write(tmp_path / "b.jsonl", chats(3))
    found = load_examples(DataOptions(given[:1], eval=given[1:]))
    assert (len(found.train), len(found.held_out)) == (12, 3)


def test_a_validation_split_is_held_out_where_no_eval_is_given(tmp_path, tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": chats(12), "test": chats(2), "validation": chats(4)}
    made = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "data")
    options = DataOptions((str(tmp_path / "data"),), seq_len=64)
    found = load_examples(options)
    assert (len(found.train), len(found.held_out)) == (12, 4)
    assert len(load_corpus(options, tokenizer).held_out) == 4
    given = write(tmp_path / "b.jsonl", chats(3))
    assert len(load_examples(DataOptions(options.text, eval=(given,))).held_out) == 3


SPLIT_FILES: list[tuple[list[str], list[str], list[str], list[str]]] = [
    # files, those trained on, evaluated on (none: a part is held out), not read
    (["train.jsonl", "validation.jsonl"], ["train.jsonl"], ["validation.jsonl"], []),
    (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"], []),
    (["train.jsonl", "dev.jsonl", "test.jsonl"], ["train.jsonl"], ["dev.jsonl"], ["test.jsonl"]),
    (
        ["train-00000-of-2.jsonl", "train-00001-of-2.jsonl", "valid_0.jsonl.gz"],
        ["train-00000-of-2.jsonl", "train-00001-of-2.jsonl"],
        ["valid_0.jsonl.gz"],
        [],
    ),
    (["train/a.jsonl", "test/a.jsonl"], ["train/a.jsonl"], ["test/a.jsonl"], []),
    (["Train.jsonl", "eval.jsonl", "x.jsonl"], ["Train.jsonl", "x.jsonl"], ["eval.jsonl"], []),
    (["a.jsonl", "test.jsonl"], ["a.jsonl", "test.jsonl"], [], []),
    (["train.jsonl", "tests.jsonl"], ["train.jsonl", "tests.jsonl"], [], []),
    (["train.md", "test.md"], ["test.md", "train.md"], [], []),
]


@pytest.mark.parametrize(("files", "trained", "evaluated", "unused"), SPLIT_FILES)
def test_files_of_a_directory_named_as_splits(tmp_path, files, trained, evaluated, unused) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = "\n".join(json.dumps({"text": f"{name} {k} " * 3}) for k in range(12)).encode()
        content = b"of " + name.encode() if name.endswith(".md") else content
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = load_examples(DataOptions((str(tmp_path),)))
    assert found.left_out == [str(tmp_path / name) for name in unused]
    assert set(found.records) == {str(tmp_path / name) for name in trained + evaluated}
    own = write(tmp_path.with_name("own.jsonl"), [{"text": "own"}])
    with_eval = load_examples(DataOptions((str(tmp_path),), eval=(own,)))
    assert [each.key for each in with_eval.held_out] == ["own"]
    in_training = {each.where.partition(": ")[0] for each in with_eval.train}
    assert in_training == {str(tmp_path / name) for name in trained}
    if evaluated:
        in_evaluation = {each.where.partition(": ")[0] for each in found.held_out}
        assert in_evaluation == {str(tmp_path / name) for name in evaluated}
        both = load_examples(DataOptions((own,), eval=(str(tmp_path),)))
        assert [each.key for each in both.held_out] == [each.key for each in found.held_out]


# -------------------------------------------------------------------------------------- packing


def model_of(kind: type[Any], **sizes: int) -> Any:
    return AutoModelForCausalLM.from_config(kind(vocab_size=300, hidden_size=16, **sizes))


def llama() -> Any:
    return model_of(LlamaConfig, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


def test_texts_are_packed_and_chats_are_not(tmp_path, texts, tokenizer) -> None:
    chat = write(tmp_path / "chats.jsonl", chats(12))
    assert load_corpus(DataOptions((texts,), seq_len=64), tokenizer, llama()).is_packed
    for names in ((chat,), (chat, texts)):
        assert not load_corpus(DataOptions(names, seq_len=128), tokenizer, llama()).is_packed
    on = load_corpus(DataOptions((chat,), seq_len=128, packing="on"), tokenizer, llama())
    off = load_corpus(DataOptions((chat,), seq_len=128, packing="off"), tokenizer, llama())
    assert on.is_packed and not off.is_packed and len(on.train) < len(off.train)
    assert on.train.num_tokens == off.train.num_tokens == int(off.train.lengths.sum())
    assert max(on.train.lengths) <= 128


def bloom() -> Any:
    return model_of(BloomConfig, n_layer=1, n_head=2)


def opt() -> Any:
    """Its forward takes position_ids, and its masks come from elsewhere."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
    model = model_of(OPTConfig, word_embed_proj_dim=16, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [(bloom, "bloom takes no position_ids"), (opt, "opt does not keep the documents of a row")],
)
def test_models_that_cannot_pack(texts, tokenizer, make, reason) -> None:
    model = make()
    found = load_corpus(DataOptions((texts,), seq_len=64), tokenizer, model)
    assert not found.is_packed
    assert f"not packed: {reason}" in (found.report.note or "")
    with pytest.raises(UserError, match=f"--packing on: {reason}.*; use off or"):
        load_corpus(DataOptions((texts,), seq_len=64, packing="on"), tokenizer, model)
    off = load_corpus(DataOptions((texts,), seq_len=64, packing="off"), tokenizer, model)
    assert off.report.note is None and off.digest() == found.digest()
    rows, report = load_held_out(DataOptions((texts,), seq_len=64), tokenizer, model)
    assert report.note == found.report.note and len(rows) == len(found.held_out)


# ---------------------------------------------------------------------------- numbers and checks


def test_the_report_counts_what_there_is(tmp_path, tokenizer) -> None:
    rows = [
        {"prompt": "ab", "completion": "cd"},  # 5 tokens, 3 trained
        {"prompt": "ab", "completion": "c" * 20},  # 23 tokens, cut to 8
        {"prompt": "a" * 20, "completion": "b"},  # 22 tokens: nothing left to train on
        {"prompt": "", "completion": "ef"},  # 3 tokens, the first of which is not trained
    ]
    names = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", chats(1))
    found = load_corpus(
        DataOptions(names[:1], eval=names[1:], seq_len=8, train_on="all"), tokenizer
    )
    assert found.report.parts[1].truncated == 1
    options = DataOptions(names[:1], eval=names[:1], seq_len=8)
    found = load_corpus(options, tokenizer)
    part = found.report.parts[0]
    assert part.formats == {"completion": 4}
    assert (part.rows, part.pieces, part.packed_rows) == (3, 3, 0)
    assert (part.tokens, part.trained_tokens) == (5 + 8 + 3, 3 + 6 + 2)
    assert (part.shortest, part.median, part.longest) == (3, 5, 8)
    assert (part.truncated, part.truncated_tokens) == (2, 15 + 14)
    assert part.dropped == {"all trained tokens beyond --seq-len": 1}
    assert part.padding == pytest.approx(1 - 16 / 24)
    stored = json.loads(json.dumps(found.report.to_dict(), allow_nan=False))
    assert stored["records"] == {names[0]: 8}
    assert stored["parts"][0]["trained_tokens"] == 11 and stored["seq_len"] == 8
    console = Console(file=io.StringIO(), width=160)
    console.print(found.report.table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "4 completion",
        "train: 2 examples cut to 8 tokens, 29 tokens lost",
        "train: left out: 1 all trained tokens beyond --seq-len",
        "33.3%",
    ):
        assert words in shown


def test_files_that_were_not_read_are_named(tmp_path, tokenizer) -> None:
    (tmp_path / "README.md").write_text("about")
    write(tmp_path / "a.jsonl", chats(12))
    found = load_corpus(DataOptions((str(tmp_path),), seq_len=64), tokenizer)
    assert found.report.left_out == [str(tmp_path / "README.md")]
    assert found.report.parts[0].formats.keys() == {"messages"}


def test_the_digest_tells_tokens_labels_and_positions_apart(tmp_path, tokenizer) -> None:
    rows = [{"prompt": f"p{k}", "completion": "c" * k} for k in range(1, 20)]
    name = write(tmp_path / "a.jsonl", rows)
    usual = DataOptions((name,), seq_len=64)
    digest = load_corpus(usual, tokenizer).digest()
    assert load_corpus(usual, tokenizer).digest() == digest
    others = [
        load_corpus(DataOptions((name,), seq_len=64, train_on="all"), tokenizer),
        load_corpus(DataOptions((name,), seq_len=64, packing="on"), tokenizer),
        load_corpus(DataOptions((name,), eval=(name,), seq_len=64), tokenizer),
        load_corpus(DataOptions((name,), seq_len=10), tokenizer),
    ]
    assert len({digest, *(each.digest() for each in others)}) == 5


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"seq_len": 1}, "--seq-len must be at least 2, got 1"),
    ({"train_on": "assistent"}, r"--train-on must be one of .* \(did you mean assistant\?\)"),
    ({"packing": "yes"}, "--packing must be one of auto, on, off, got 'yes'"),
    ({"format": "mesages"}, r"--format must be one of .* \(did you mean messages"),
    ({"text": ("missing.txt",)}, "--text missing.txt: no such file"),
    ({"eval": ("missing.txt",)}, "--eval missing.txt: no such file"),
    ({"field": "body"}, "line 1 has no known format: its keys are 'text'; known are 'body'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS)
def test_bad_options(texts, tokenizer, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        load_corpus(DataOptions(**{"text": (texts,), **changes}), tokenizer)


def test_nothing_to_train_on(tmp_path, tokenizer) -> None:
    rows = [{"prompt": "p" * 30 + str(k), "completion": "c"} for k in range(12)]
    name = write(tmp_path / "a.jsonl", rows)
    usual = write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c"}])
    question = write(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    marked = copy.deepcopy(tokenizer)  # without end-of-text token: a completion may be empty
    marked.eos_token = None
    empty = write(tmp_path / "d.jsonl", [{"prompt": "p", "completion": ""}])
    within = "within --seq-len 8; give a larger --seq-len (left out, {}: {} all trained tokens"
    turn = ": the conversations have no turn of the assistant; see --train-on (left out, train: 1 "
    for text, held_out, own, words in (
        (name, usual, tokenizer, "nothing is left to train on " + within.format("train", 12)),
        (usual, name, tokenizer, "nothing is left to evaluate on " + within.format("held out", 12)),
        (question, usual, tokenizer, "nothing is left to train on" + turn),
        (empty, usual, marked, "train on: what would be trained on is empty; see --train-on"),
    ):
        with pytest.raises(UserError) as caught:
            load_corpus(DataOptions((text,), eval=(held_out,), seq_len=8), own)
        assert words in str(caught.value) and "short" not in str(caught.value)
    with pytest.raises(UserError, match="to evaluate on within --seq-len 8; give a larger"):
        load_held_out(DataOptions((), eval=(name,), seq_len=8), tokenizer)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(UserError, match="too short: it holds no example"):
        load_corpus(DataOptions((str(tmp_path / "empty"),)), tokenizer)


def test_the_default_text_needs_no_file(tokenizer) -> None:
    found = load_corpus(DataOptions((), seq_len=64), tokenizer, llama())
    assert found.description.startswith("pydoc_data.topics: ") and found.is_packed
    assert found.train.num_trained > 100_000
    assert found.largest_id <= tokenizer.eos_token_id
    batch = collate([found.train[0], found.train[1]], pad_id_of(tokenizer))
    assert batch["input_ids"].shape == (2, 64)


def test_padding_has_an_id(tokenizer) -> None:
    assert pad_id_of(tokenizer) == tokenizer.eos_token_id
    assert pad_id_of(SimpleNamespace(pad_token_id=3, eos_token_id=4)) == 3
    assert pad_id_of(SimpleNamespace(pad_token_id=None, eos_token_id=None)) == 0


def test_rows_hold_five_bytes_a_token(tokenizer) -> None:
    found = load_corpus(DataOptions((), seq_len=64), tokenizer).train
    own = found.pieces.tokens.nbytes + found.pieces.trained.nbytes
    assert own == 5 * found.num_tokens
    loader = torch.utils.data.DataLoader(found, 4, collate_fn=lambda rows: collate(rows, 0))
    assert sum(int((batch["labels"] != -100).sum()) for batch in loader) == found.num_trained


# -------------------------------------------------------------------------- preview and progress


def shown(corpus: Any, n: int, terminal: bool) -> str:
    options: Any = {"force_terminal": True, "color_system": "standard"} if terminal else {}
    file = io.StringIO()
    corpus.preview(n, Console(file=file, width=80, highlight=False, **options))
    return file.getvalue()


def test_the_preview_marks_what_is_not_trained_on(tmp_path, tokenizer) -> None:
    rows = [{"prompt": f"[{k}]\x1b]0;x\x07", "completion": f"answer {k}"} for k in range(12)]
    name = write(tmp_path / "a.jsonl", rows)
    corpus = load_corpus(DataOptions((name,), eval=(name,), seq_len=64), tokenizer)
    piped = shown(corpus, 2, terminal=False)
    assert "not trained on: between ⟦ ⟧" in piped and "\x1b" not in piped
    assert "⟦[0]\\x1b]0;x\\x07⟧answer 0<eos>" in piped
    assert "⟦[1]" in piped and "⟦[2]" not in piped
    assert "example 1: 18 tokens, 9 trained" in piped
    terminal = shown(corpus, 1, terminal=True)
    assert "not trained on: grey" in terminal and "⟦" not in terminal
    assert "\x1b[2m[0]\\x1b]0;x\\x07\x1b[0manswer 0<eos>" in terminal
    assert "example 12" in shown(corpus, 99, terminal=False)


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch) -> None:
    assert list(counted(range(3), "reading", None)) == [0, 1, 2]
    file = io.StringIO()
    piped = Console(file=file, width=80)
    assert list(counted(range(3), "reading", piped, 3)) == [0, 1, 2]
    assert file.getvalue() == ""  # done before the first line
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    assert list(counted(range(3), "reading", piped, 3)) == [0, 1, 2]
    assert file.getvalue().splitlines() == ["reading  1/3", "reading  2/3", "reading  3/3"]
    terminal = Console(file=(bar := io.StringIO()), width=80, force_terminal=True)
    assert list(counted(range(3), "reading", terminal, 3)) == [0, 1, 2]
    assert "3/3" in bar.getvalue()


def test_a_signal_leaves_between_two_examples(texts, tokenizer, monkeypatch) -> None:
    from lowrank_ext.cli.data import corpus as corpus_module

    calls = []

    def stopped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return render(*arguments)

    render = corpus_module.render
    monkeypatch.setattr(corpus_module, "render", stopped)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(DataOptions((texts,), seq_len=64), tokenizer)
    assert len(calls) == 5
