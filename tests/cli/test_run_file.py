"""run.yaml: what --config reads, what a run writes, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import yaml
from finetune_runs import check_error, invoke, report, resume, rows, small_run

from lowrank_ext.cli import finetune
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.run_file import MAX_BYTES, RUN_FILE, read_run_file, write_run_file
from lowrank_ext.cli.settings import Settings, option_types

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def settings_in(settings_of: Callable[..., Settings], tmp_path: Path) -> Callable[..., Settings]:
    """The settings of a run with a config of this text."""

    def settings_in(text: str, *arguments: str) -> Settings:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return settings_of("--config", str(path), *arguments)

    return settings_in


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rank: 8", {"rank": 8}),
        ("{}", {"rank": 16}),
        ("seq-len: 8\nadapter_dtype: bf16", {"seq_len": 8, "adapter_dtype": "bf16"}),
        ("lr: 1e-3", {"lr": 1e-3}),  # a text in YAML 1.1
        ("lr: 1", {"lr": 1.0}),
        ("lr: .5", {"lr": 0.5}),
        ("lr: +2.5E-2", {"lr": 0.025}),
        ("lr: null", {"lr": None}),
        ("lr:", {"lr": None}),
        ("packing: on", {"packing": "on"}),  # true in YAML 1.1
        ("targets: no", {"targets": "no"}),
        ("targets: 'null'", {"targets": "null"}),
        ("compile: yes\ngradient-checkpointing: true", {"compile": True}),
        ("compile: off", {"compile": False}),
        ("method: lamda\nfreeze_eta: 0.2", {"methods": ("lamda",), "compare": False}),
        ("compare: [lora, lamda]", {"methods": ("lora", "lamda"), "compare": True}),
        ("compare: lora,lamda", {"methods": ("lora", "lamda"), "compare": True}),
        ("modules_to_save: a, b", {"modules_to_save": ("a", "b")}),
        ("modules_to_save:\n- a\n- b", {"modules_to_save": ("a", "b")}),
        ("modules_to_save:", {"modules_to_save": ()}),
        ("text: [owner/one, owner/two]", {"text": ("owner/one", "owner/two")}),
        ("text: owner/one", {"text": ("owner/one",)}),
        ("epochs: 2", {"epochs": 2.0, "given_steps": None}),
        ("# only\nrank: 8  # the rank\n", {"rank": 8}),
    ],
)
def test_values_are_what_their_options_take(settings_in, text: str, expected: dict) -> None:
    settings = settings_in(text)
    assert {name: getattr(settings, name) for name in expected} == expected


def test_the_command_line_wins(settings_in) -> None:
    text = "rank: 8\nsteps: 5\nmethod: lamda\nlr: 0.5\ncompile: true"
    found = settings_in(text, "--rank", "4", "--epochs", "1", "--compare", "lora,full")
    assert (found.rank, found.given_steps, found.epochs, found.lr) == (4, None, 1.0, 0.5)
    assert (found.methods, found.compare, found.compile) == (("lora", "full"), True, True)


def test_relative_paths_are_of_the_current_directory(settings_in, tmp_path, monkeypatch) -> None:
    """Not of the directory of the file: as on the command line."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path / "here")
    assert settings_in("text: a.txt").text == (str(tmp_path / "here" / "a.txt"),)


BAD = {
    "unknown": ("a: 1\nrnak: 2", "line 1: unknown option 'a'"),
    "near": ("rank: 1\nrnak: 2", "line 2: unknown option 'rnak' (did you mean rank"),
    "of_the_command": ("out: here", "out is no part of a run; give --out on the command line"),
    "both_spellings": ("seq_len: 8\nseq-len: 9", "line 2: seq_len stands there twice"),
    "twice": ("rank: 8\nrank: 8", "line 2: rank stands there twice"),
    "bool_for_int": ("rank: true", "rank must be a whole number, got 'true'"),
    "float_for_int": ("rank: 8.0", "rank must be a whole number, got '8.0'"),
    "octal": ("rank: 010", "rank must be a whole number, got '010'"),
    "hex": ("rank: 0x10", "rank must be a whole number, got '0x10'"),
    "base_60": ("rank: 1:30", "rank must be a whole number, got '1:30'"),
    "underscores": ("rank: 1_0", "rank must be a whole number, got '1_0'"),
    "arabic_digits": ("rank: \u0661", "rank must be a whole number"),
    "quoted_int": ("rank: '8'", "rank must be a whole number, got '8'"),
    "null_int": ("rank: null", "rank must be a whole number, got null"),
    "list_for_int": ("rank: [8]", "rank must be a whole number, got a list of 1"),
    "huge_int": ("rank: 1" + "0" * 5000, "rank must be a whole number"),
    "text_for_float": ("clip: much", "clip must be a number, got 'much'"),
    "bool_for_float": ("clip: true", "clip must be a number, got 'true'"),
    "quoted_float": ("lr: '1e-3'", "lr must be a number or null, got '1e-3'"),
    "nan": ("lr: .nan", "lr must be a number or null, got '.nan'"),
    "int_for_bool": ("compile: 1", "compile must be true or false, got '1'"),
    "list_for_text": ("targets: [a]", "targets must be a text, got a list of 1"),
    "null_for_text": ("targets:", "targets must be a text, got null"),
    "null_in_list": ("text: [a, null]", "text must be a text or a list of texts"),
    "no_mapping": ("- rank", "must be a mapping of options"),
    "a_text": ("rank", "must be a mapping of options"),
    "empty": ("", "must hold options"),
    "only_a_comment": ("# rank: 8", "must hold options"),
    "nested": ("rank:\n  a: 1", "line 2: must be a value or a list of values"),
    "nested_list": ("text: [[a]]", "line 1: must be a value or a list of values"),
    "deep": ("text: " + "[" * 10**5, "line 1: must be a value or a list of values"),
    "list_as_key": ("[a]: 1", "line 1: must be a value or a list of values"),
    "two_documents": ("rank: 1\n---\nrank: 2", "must be one document"),
    "alias": ("text: &a [x]\neval: *a", "line 1: must have no anchor, alias or tag"),
    "tag": ("text: !!python/object:os.system x", "line 1: must have no anchor, alias or tag"),
    "merge": ("<<: {rank: 8}", "must be a value or a list of values"),
    "broken": ('rank: "8', "must be YAML"),
    "open": ("text: [a", "must be YAML"),
    "control": ("rank: \x1b[31m", "must be YAML"),
    "both_lengths": ("steps: 1\nepochs: 1", "--steps or --epochs, not both"),
    "both_methods": ("method: lora\ncompare: [lora]", "method or compare, got both"),
    "no_methods": ("compare: []", "--compare needs methods"),
    "bad_value": ("schedule: cosin", "--schedule must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "run", lambda *settings, **more: pytest.fail("it would run"))
    text, words = BAD[name]
    (tmp_path / "my.yaml").write_text(text)
    out = tmp_path / "out"
    result = invoke("finetune", "--config", str(tmp_path / "my.yaml"), "--out", str(out))
    check_error(result, words)
    assert result.stderr.rstrip("\n").isprintable() and len(result.stderr) < 1_200
    assert not out.exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    def refused(path: Path, words: str, *arguments: str) -> None:
        check_error(invoke("finetune", "--config", str(path), *arguments), words)

    refused(tmp_path / "missing.yaml", "missing.yaml does not exist")
    refused(tmp_path, "must be a regular file")
    (tmp_path / "latin.yaml").write_bytes(b"text: caf\xe9")
    refused(tmp_path / "latin.yaml", "must be YAML")
    (tmp_path / "long.yaml").write_text("#" * (MAX_BYTES + 1))
    refused(tmp_path / "long.yaml", "must have at most")
    (tmp_path / "good.yaml").write_text("rank: 8")
    refused(tmp_path / "good.yaml", "--resume has the options of the run", "--resume")


# ------------------------------------------------------------------------ what every run writes

ODD = (
    "a", "on", "null", "~", "", " a ", "1e-3", "0x1", "a: b", "# a", "- a", "é", "\n", "\x1b",
    "\udcff", "'", '"', "x" * 500, "&a", "*a", "!a", "[a", "2026-01-01",
)  # fmt: skip


def test_every_text_and_number_survives(tmp_path: Path) -> None:
    types: dict[str, Any] = {"text": tuple[str, ...], "lr": float | None, "field": str, "seed": int}
    for text in ODD:
        for number in (1e-5, 1e22, 0.1, 3.0, 5e-324, None):
            values = {"text": (text, text), "lr": number, "field": text, "seed": 2**40}
            write_run_file(tmp_path, values)
            assert read_run_file(tmp_path / RUN_FILE, "--config", types) == values


def test_a_run_writes_its_options_below_its_command(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "finetune", "--targets", "q_proj\n\x1b[1m"])
    assert run(steps=1).exit_code == 0
    text = (tmp_path / "out" / RUN_FILE).read_text()
    first, second, *_ = text.splitlines()
    assert first.startswith("# lowrank-ext 0.") and "finetune --targets" in first
    assert first.isprintable() and second.startswith("# Again: lowrank-ext finetune --config")
    values = yaml.safe_load(text)
    assert (values["method"], values["steps"], values["rank"]) == ("lora", 1, 4)
    assert json.loads(json.dumps(values)) == report(tmp_path / "out")["settings"]
    assert "experts" not in values  # which LoRA does not read
    assert not (tmp_path / "out" / "settings.json").exists()


@pytest.mark.parametrize("method", ["goat", "full"])
def test_a_run_is_repeated_from_its_file(run, tmp_path, method) -> None:
    first, second = tmp_path / "out", tmp_path / "again"
    assert run(method=method, steps=3).exit_code == 0
    result = invoke("finetune", "--config", str(first / RUN_FILE), "--out", str(second))
    assert result.exit_code == 0, result.output
    one, two = rows(first)[method], rows(second)[method]
    for name in ("losses", "held_out", "learning_rate", "trainable_at_start"):
        assert one[name] == two[name], name
    body = [path.read_text().split("\n", 1)[1] for path in (first / RUN_FILE, second / RUN_FILE)]
    assert body[0] == body[1]


def wrong_values() -> list[tuple[str, str]]:
    """A value of another type for each option of LaMDA's runs."""
    pairs = []
    for name, kind in option_types().items():
        wrong = {str: "[a]", int: "x", float: "x", bool: "2"}
        plain = kind if kind in wrong else None
        optional = {str | None: "[a]", int | None: "x", float | None: "x"}
        odd = wrong.get(plain) if plain else optional.get(kind, "[[a]]")
        pairs.append((name, odd or "[[a]]"))
    return pairs


@pytest.mark.parametrize(("name", "value"), wrong_values())
def test_every_stored_option_is_typed(name: str, value: str, tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text(f"{name}: {value}\n")
    with pytest.raises(UserError, match=f"{RUN_FILE}: line 1: .*must be"):
        read_run_file(tmp_path / RUN_FILE, "--resume", option_types())


def test_resume_needs_the_whole_file(tiny_model, text_file, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = small_run(model=tiny_model, text=text_file, out=out, method="lamda", steps=1)
    assert invoke("finetune", *arguments).exit_code == 0
    text = (out / RUN_FILE).read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("#", "- "))]
    for line in lines:
        name = line.split(":")[0]
        kept = [other for other in text.splitlines() if not other.startswith(f"{name}:")]
        if name == "text":
            kept = [other for other in kept if not other.startswith("- ")]
        (out / RUN_FILE).write_text("\n".join(kept))
        check_error(resume(out), "not from this version of lowrank-ext", name)
    (out / RUN_FILE).write_text(text + "experts: 8\n")  # which LaMDA does not read
    check_error(resume(out), "not from this version of lowrank-ext", "experts")
    (out / RUN_FILE).write_text(text + "color: 8\n")
    check_error(resume(out), "unknown option 'color'")
    (out / RUN_FILE).write_text(text)
    assert resume(out).exit_code == 0


# --------------------------------------------------------------------------- options of methods


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--experts 4", "--experts is of moe-lora, goat; the run has lora"),
        ("--method lamda --freeze-window 3", "--freeze-window is of aflora; the run has lamda"),
        ("--method full --rank 8", "--rank is of methods with adapters; the run has full"),
        ("--compare frozen,peft-lora --window 8", "--window is of set-and-sequence; the run has"),
    ],
)
def test_options_that_no_method_of_the_run_reads(arguments, words, tmp_path) -> None:
    check_error(invoke("finetune", *arguments.split(), "--out", str(tmp_path / "out")), words)
    assert not (tmp_path / "out").exists()


def test_a_comparison_needs_one_method_that_reads_an_option(settings_in) -> None:
    settings = settings_in("rank: 8\nexperts: 4", "--compare", "frozen,lora,goat")
    assert settings.options["experts"] == 4


def test_the_file_of_a_comparison_serves_one_of_its_methods(run, tmp_path) -> None:
    first, second = tmp_path / "out", tmp_path / "one"
    assert run(compare="frozen,lamda,goat", steps=1, rank=None, dtype=None).exit_code == 0
    text = (first / RUN_FILE).read_text()
    assert "freeze_eta:" in text and "experts: 2" in text  # the one at its default, the other not

    def again(text: str, *flags: str) -> Any:
        (tmp_path / "my.yaml").write_text(text)
        command = ("finetune", "--config", str(tmp_path / "my.yaml"), "--out", str(second))
        return invoke(*command, *flags)

    usual = "".join(
        line
        for line in text.splitlines(keepends=True)
        if line.partition(":")[0] not in ("experts", "top_k", "window", "lr")
    )
    result = again(usual, "--method", "frozen")
    assert result.exit_code == 0, result.output
    assert (
        not {"freeze_eta", "rank", "balance"}
        & yaml.safe_load((second / RUN_FILE).read_text()).keys()
    )
    check_error(again(text, "--compare", "lora,lamda"), "--experts is of moe-lora, goat")
    check_error(again(usual, "--method", "lora", "--balance", "0.01"), "--balance is of")
    check_error(
        again(usual + "freeze_beta1: 0.5\n", "--method", "lora"), "--freeze-beta1 is of aflora"
    )
