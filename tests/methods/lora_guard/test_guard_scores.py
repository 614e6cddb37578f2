"""What a guard is trained and judged by, and what it makes of texts: loss, metrics, screening."""

import io
import itertools
import json
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import save_byte_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("typer")

from rich.console import Console
from typer.testing import CliRunner

from lowrank_ext.cli import guard as command
from lowrank_ext.cli.main import app
from lowrank_ext.methods.lora_guard import (
    GuardLoss,
    GuardModel,
    TextScore,
    average_precision,
    conversation,
    positive_weights,
    precision_recall,
    screen,
)
from lowrank_ext.methods.lora_guard.screening import _windows, pad

CONTEXT = 64

# ------------------------------------------------------------------------------------------ loss


def test_positive_weights() -> None:
    labels = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1]])
    assert positive_weights(labels).tolist() == pytest.approx([3, 100, 0.01, 1 / 3])
    assert positive_weights(labels, limit=2).tolist() == [2, 2, 0.5, 0.5]
    assert positive_weights(labels.bool()).dtype == torch.float32


def test_loss_by_hand() -> None:
    labels = torch.tensor([[1.0, 0], [0, 0], [0, 0], [1, 1]])
    unsafe, categories = torch.randn(4, 1, dtype=torch.float64), torch.randn(4, 2).double()
    criterion = GuardLoss(labels, unsafe_share=0.25)

    def bce(logits: Tensor, label: Tensor, weight: float) -> Tensor:
        positive = -weight * label * logits.sigmoid().log()
        return (positive - (1 - label) * (-logits).sigmoid().log()).mean()

    expected = 0.25 * bce(unsafe[:, 0], labels.any(1).double(), 1.0)
    for column, weight in enumerate((1.0, 3.0)):
        expected += 0.75 / 2 * bce(categories[:, column], labels[:, column], weight)
    torch.testing.assert_close(criterion(unsafe, categories, labels), expected)
    low = criterion(unsafe.bfloat16(), categories.bfloat16(), labels.bool())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), expected, rtol=0.02, atol=0.02)
    weights = set(dict(criterion.named_buffers()))
    assert weights == {"category_pos_weight", "unsafe_pos_weight"}


def test_a_category_without_positives_stays_finite() -> None:
    labels = torch.tensor([[1, 0], [0, 0]])
    logits = torch.full((2, 2), 50.0, requires_grad=True)
    loss = GuardLoss(labels)(logits[:, :1], logits, labels)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and (logits.grad[:, 1] > 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: positive_weights(torch.zeros(3)), r"labels must be \[N, C\] with N > 0, got \[3"),
        (lambda: positive_weights(torch.zeros(0, 2)), r"with N > 0, got \[0, 2\]"),
        (lambda: positive_weights(torch.zeros(1, 2), 0.5), "limit must be at least 1, got 0.5"),
        (lambda: GuardLoss(torch.zeros(1, 2), 1.5), "unsafe_share must be at most 1, got 1.5"),
        (lambda: GuardLoss(torch.zeros(1, 2), -1), "unsafe_share must be at least 0"),
        (
            lambda: GuardLoss(torch.zeros(1, 2))(*map(torch.zeros, ((3, 1), (3, 2), (2, 2)))),
            r"must be \[3, 1\], \[3, 2\], \[3, 2\], got \[3, 1\], \[3, 2\], \[2, 2\]",
        ),
    ],
)
def test_wrong_arguments_of_the_loss(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --------------------------------------------------------------------------------------- metrics


def test_average_precision_of_known_curves() -> None:
    """The first is scikit-learn's own example for average_precision_score."""
    labels, scores = torch.tensor([0, 0, 1, 1]), torch.tensor([0.1, 0.4, 0.35, 0.8])
    assert average_precision(labels, scores) == pytest.approx(0.8333333333333333)
    curve = precision_recall(labels, scores)
    assert curve.thresholds.tolist() == pytest.approx([0.8, 0.4, 0.35, 0.1])
    assert curve.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert curve.recall.tolist() == [0.5, 0.5, 1, 1]
    assert average_precision(labels, labels.float()) == 1
    assert average_precision(labels, -labels.float()) == 0.5
    # One positive among three with its score: 1/3. Then the other, alone: 2/4.
    tied = average_precision(torch.tensor([1, 0, 0, 1]), torch.tensor([2.0, 2, 2, 1]))
    assert tied == pytest.approx(0.5 / 3 + 0.5 / 2)


def test_the_order_of_equal_scores_does_not_matter() -> None:
    labels, scores = torch.rand(200) < 0.3, torch.randint(0, 9, (200,))
    expected = average_precision(labels, scores)
    for _ in range(5):
        order = torch.randperm(200)
        assert average_precision(labels[order], scores[order]) == pytest.approx(expected)
    assert average_precision(labels, torch.zeros(200)) == pytest.approx(
        float(labels.double().mean())
    )


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        (torch.zeros(3), torch.zeros(3), "labels must hold a positive, got none"),
        (torch.zeros(0), torch.zeros(0), "labels must hold a positive, got none"),
        (torch.ones(3), torch.zeros(4), r"must be \[N\] both, got \[3\] and \[4\]"),
        (torch.ones(3, 1), torch.zeros(3, 1), r"must be \[N\] both"),
        (torch.ones(1), torch.tensor([torch.nan]), "scores must be numbers, got NaN"),
    ],
)
def test_wrong_arguments_of_the_metrics(labels: Tensor, scores: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"precision_recall: .*{message}"):
        average_precision(labels, scores)


# ------------------------------------------------------------------------------------- screening


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("byte-llama")
    save_byte_llama(path, CONTEXT)
    return path


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    guard_on(base).save_pretrained(path)
    return path


def guard_on(base: Path) -> GuardModel:
    torch.manual_seed(1)
    model = GuardModel(
        AutoModelForCausalLM.from_pretrained(base), 4, 8, num_categories=2,
        category_names=["spam", "other"],
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                nn.init.normal_(parameter, std=0.5)
        model.head.weight.mul_(3)
    return model


@pytest.fixture
def model(base: Path) -> GuardModel:
    return guard_on(base)


@pytest.fixture
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


TEXTS = [
    "one",
    "a somewhat longer text",
    "x",
    "the fourth one",
    "äöü €",
    "seven 7 seven",
    "xy" * 30,
]


def test_each_text_as_if_alone(model: GuardModel, tokenizer: Any) -> None:
    model.train()
    alone = []
    for text in TEXTS:
        ids = torch.tensor([list(tokenizer(text)["input_ids"])])
        with torch.no_grad():
            unsafe, categories, _ = model.eval().guard(ids)
        alone.append(torch.cat([unsafe, categories], 1).sigmoid()[0].tolist())
    model.train()
    model.head.eval()
    for batch_size in (1, 3, 100):
        progress: list[int] = []
        scores = screen(model, tokenizer, TEXTS, batch_size=batch_size, on_progress=progress.append)
        assert model.training and model.base_lm.training and not model.head.training
        assert sum(progress) == len(TEXTS) and len(progress) == -(-len(TEXTS) // batch_size)
        for text, score, expected in zip(TEXTS, scores, alone, strict=True):
            found = [score.unsafe, *score.categories.values()]
            assert found == pytest.approx(expected, abs=1e-5)
            assert score.num_tokens == len(text.encode())
            assert list(score.categories) == ["spam", "other"]
    assert len({round(score.unsafe, 6) for score in scores}) == len(TEXTS)


def test_batches_hold_texts_of_similar_length(
    model: GuardModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, texts = [], ["x" * n for n in range(1, 41)]
    random.Random(0).shuffle(texts)
    judge = GuardModel.guard

    def spy(self: GuardModel, ids: Tensor, mask: Tensor) -> Any:
        shapes.append((ids.shape[0], ids.shape[1], int(mask.sum())))
        return judge(self, ids, mask)

    monkeypatch.setattr(GuardModel, "guard", spy)
    screen(model, tokenizer, texts, batch_size=8)
    assert len(shapes) == 5
    assert sum(rows * length - real for rows, length, real in shapes) == 5 * sum(range(8))


def test_long_texts_are_read_in_windows(model: GuardModel, tokenizer: Any) -> None:
    text = "".join(chr(97 + (7 * n) % 26) for n in range(90))
    [score] = screen(model, tokenizer, [text], max_length=20)
    parts = [text[start : start + 20] for start in (*range(0, 70, 10), 70)]
    scores = screen(model, tokenizer, parts)
    assert score.num_tokens == 90
    assert score.unsafe == pytest.approx(max(s.unsafe for s in scores), abs=1e-6)
    for name in ("spam", "other"):
        expected = max(s.categories[name] for s in scores)
        assert score.categories[name] == pytest.approx(expected, abs=1e-6)
    progress: list[int] = []
    screen(
        model, tokenizer, ["x", text, "yy"], max_length=20, batch_size=2,
        on_progress=progress.append,
    )  # fmt: skip
    assert sum(progress) == 3 and progress[-1] == 1, "a text is finished with its last window"


@pytest.mark.parametrize("length", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("size", [1, 2, 9, 10, 11, 25, 40])
def test_windows_cover_every_token(size: int, length: int) -> None:
    windows = _windows(list(range(size)), length)
    assert {token for window in windows for token in window} == set(range(size))
    assert all(len(window) == min(size, length) for window in windows)
    assert all(window == list(range(window[0], window[-1] + 1)) for window in windows)
    assert len({tuple(window) for window in windows}) == len(windows)
    for left, right in itertools.pairwise(windows):
        assert right[0] - left[0] <= max(1, length // 2)


def test_pad() -> None:
    ids, mask = pad([[5], [6, 7, 8]])
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8]] and mask.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_no_text(model: GuardModel, tokenizer: Any) -> None:
    assert screen(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ["a", ""]}, "every text must have a token, got none in text 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": 65}, "max_length must be at most 64, the model's context, got 65"),
    ],
)
def test_wrong_arguments_of_screen(
    model: GuardModel, tokenizer: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"screen: {message}"):
        screen(model, tokenizer, **({"texts": ["a"]} | options))


def test_a_tokenizer_of_another_model(model: GuardModel) -> None:
    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, 5000]}

    with pytest.raises(
        ValueError, match=r"must be the base model's, got token id 5000, .* 257 row"
    ):
        screen(model, tokenizer, ["a"])


def test_conversation() -> None:
    assert conversation("Hi", "Hello") == "User: Hi\n\nAssistant: Hello"
    assert conversation("Hi") == "User: Hi" and conversation(response="No") == "Assistant: No"
    with pytest.raises(ValueError, match="prompt or response must be given"):
        conversation()


# ------------------------------------------------------------------------------ the command line


@pytest.fixture
def run(base: Path, adapter: Path) -> Callable[..., Any]:
    def invoke(file: Any, *flags: str, stdin: str | bytes | None = None, **options: Any) -> Any:
        arguments = ["guard", str(file), *flags]
        for name, value in ({"model": base, "adapter": adapter, "dtype": "fp32"} | options).items():
            if value is not None:
                arguments += ["--" + name.replace("_", "-"), str(value)]
        return CliRunner().invoke(app, arguments, input=stdin)

    return invoke


@pytest.fixture
def expected(base: Path, adapter: Path, tokenizer: Any) -> list[TextScore]:
    model = GuardModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return screen(model, tokenizer, TEXTS)


def test_a_score_per_line(
    run: Callable[..., Any], expected: list[TextScore], tmp_path: Path
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS) + "\n  \n", encoding="utf-8")  # every second line is empty
    threshold = sorted(score.unsafe for score in expected)[3]
    result = run(file, batch=2, threshold=threshold, threads=torch.get_num_threads())
    assert result.exit_code == 0, result.output
    assert result.stderr == "", "no bar where there is no terminal"
    lines = result.stdout.splitlines()
    assert len(lines) == len(TEXTS)
    for index, (line, score) in enumerate(zip(lines, expected, strict=True)):
        number, shown, verdict = line.split("\t")
        assert int(number) == 2 * index + 1
        assert float(shown) == pytest.approx(score.unsafe, abs=1e-3)
        if score.unsafe != threshold:
            assert verdict == ("unsafe" if score.unsafe > threshold else "safe")


def test_stdin_and_json(run: Callable[..., Any], expected: list[TextScore]) -> None:
    result = run("-", "--json", stdin="\ufeff" + "\r\n".join(TEXTS))
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    for number, (record, score) in enumerate(zip(records, expected, strict=True), start=1):
        assert record["line"] == number and record["tokens"] == score.num_tokens
        assert record["score"] == pytest.approx(score.unsafe, abs=1e-5)
        assert record["verdict"] == ("unsafe" if record["score"] >= 0.5 else "safe")
        assert record["category_scores"] == pytest.approx(dict(score.categories), abs=1e-5)
        assert set(record) == {"line", "score", "verdict", "category_scores", "tokens"}


def test_json_lines(run: Callable[..., Any], expected: list[TextScore], tmp_path: Path) -> None:
    records = [{"text": TEXTS[0]}, {"body": TEXTS[1]}, {"prompt": "Hi", "response": "No"}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    file = tmp_path / "texts.jsonl"
    file.write_text(text)
    for result in (run(file, "--json"), run("-", "--json", "--jsonl", stdin=text)):
        assert result.exit_code == 2
        assert "line 2 has neither a text field 'text' nor prompt and response (it has: body)" in (
            result.stderr
        )
    file.write_text(text.replace('"text":', '"body":'))
    result = run(file, "--json", field="body")
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    scores = [record["score"] for record in found]
    assert scores[:2] == pytest.approx([score.unsafe for score in expected[:2]], abs=1e-5)
    assert found[2]["tokens"] == len(conversation("Hi", "No"))


def test_no_texts(run: Callable[..., Any]) -> None:
    """Nothing is loaded for them."""
    result = run("-", stdin="\n \n", model="/nowhere")
    assert result.exit_code == 0 and result.output == ""


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ([], {"threshold": 1.5}, "--threshold must be between 0 and 1, got 1.5"),
        ([], {"threshold": "nan"}, "--threshold must be between 0 and 1, got nan"),
        ([], {"batch": 0}, "--batch must be at least 1, got 0"),
        ([], {"max_length": 0}, "--max-length must be at least 1, got 0"),
        ([], {"max_length": 65}, "max_length must be at most 64, the model's context, got 65"),
        ([], {"threads": 0}, "--threads must be at least 1, got 0"),
        (
            [],
            {"dtype": "fp23"},
            "--dtype must be one of auto, bf16, fp32, fp16, got 'fp23' (did yo",
        ),
        ([], {"adapter": "/nowhere"}, "--adapter /nowhere: no such directory"),
        ([], {"model": "/nowhere/x.gguf"}, "--model /nowhere/x.gguf: no such file"),
        (["--jsonl"], {}, "stdin: line 1 is not JSON"),
    ],
)
def test_bad_input_is_one_line(
    run: Callable[..., Any], flags: list[str], options: dict[str, Any], message: str
) -> None:
    result = run("-", *flags, stdin="text", **options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_files_that_cannot_be_read(run: Callable[..., Any], adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("ä".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    for file, options, message in (
        (tmp_path / "none", {}, "none: [Errno 2] No such file"),
        (tmp_path / "latin", {}, "latin: 'utf-8' codec"),
        ("-", {"adapter": tmp_path / "empty"}, "holds no guard_head.safetensors"),
    ):
        result = run(file, stdin="text", **options)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in adapter.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[:100])
    result = run("-", stdin="text", adapter=damaged)
    assert result.exit_code == 2 and "error: --adapter: GuardModel.from_pretrained" in result.stderr


def test_ctrl_c(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "screen", interrupted)
    result = run("-", stdin="text")
    assert result.exit_code == 130 and "stopped; scores are printed once" in result.stderr


def test_scores_that_are_not_finite(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "screen", lambda *a, **o: [TextScore(float("nan"), {}, 1)])
    result = run("-", stdin="\ntext")
    assert result.exit_code == 2 and "line 2: the score is not finite" in result.stderr


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(
        command, "Console", lambda **options: Console(file=output, force_terminal=True, width=80)
    )
    with command._progress(3) as advance:
        advance(2)
        advance(1)
    assert "scoring" in output.getvalue() and "3/3" in output.getvalue()


# ------------------------------------------------------------------------------------ the example

EXAMPLE = Path(__file__).parents[3] / "examples" / "guard.py"


def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bastioncorpus")
    save_byte_llama(tmp_path / "model", context=256)
    example = runpy.run_path(str(EXAMPLE))
    example["main"](out=tmp_path / "out", quick=True, model=str(tmp_path / "model"))
    shown = capsys.readouterr().out
    assert "generated as before, to the bit: True" in shown and "guard in all" in shown
    assert (tmp_path / "out" / "guard.png").read_bytes().startswith(b"\x89PNG")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = GuardModel.from_pretrained(base, tmp_path / "out" / "guard-adapter")
    assert len(model.head_options.category_names) == 7


def test_the_example_s_split() -> None:
    pytest.importorskip("bastioncorpus")
    train, held_out, kinds = runpy.run_path(str(EXAMPLE))["load_texts"]()
    assert not set(train.texts) & set(held_out.texts)
    for side in (train, held_out):
        assert side.labels.shape == (len(side.texts), len(kinds))
        assert side.labels.sum(1).max() == 1 and 0.5 < side.unsafe.double().mean() < 0.8
        assert not any("{canary}" in text for text in side.texts)


def test_the_example_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bastioncorpus", None)
    with pytest.raises(SystemExit, match="pip install bastioncorpus"):
        runpy.run_path(str(EXAMPLE))["load_texts"]()
