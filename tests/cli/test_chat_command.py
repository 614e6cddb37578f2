"""`lowrank-ext chat`: a conversation on a pipe and on a terminal."""

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke
from saved_adapters import new_tokens
from transformers import AutoTokenizer

from lowrank_ext.cli import chat as command
from lowrank_ext.cli.data import read_records, to_example

NEW = 4


def chat(*arguments: Any, lines: list[str], **options: Any) -> Any:
    flags = [f for name, value in options.items() for f in (f"--{name}", str(value))]
    greedy = ["--max-new-tokens", str(NEW), "--temperature", "0", "--dtype", "fp32"]
    text = "".join(f"{line}\n" for line in lines)
    return invoke("chat", *map(str, arguments), *greedy, *flags, input=text)


def said(base: Path, adapter: Path | None, prompt: str) -> str:
    tokens = new_tokens(base, adapter, prompt, NEW)
    return AutoTokenizer.from_pretrained(base).decode(tokens, skip_special_tokens=True)


def test_each_message_continues_the_conversation(chat_model) -> None:
    result = chat("--model", chat_model, lines=["hi", "", "go"], system="be")
    assert result.exit_code == 0, result.output
    first = said(chat_model, None, "system:be;user:hi;assistant:")
    second = said(chat_model, None, f"system:be;user:hi;assistant:{first};user:go;assistant:")
    assert result.stdout == f"{first}\n{second}\n"


def test_commands_switch_adapters_reset_and_save(chat_model, adapters, tmp_path) -> None:
    paths = [adapters / name for name in ("a", "goat")]
    file = tmp_path / "saved.jsonl"
    lines = ["hi", "/reset", "/adapter goat", "hi", "/reset", "/base", "hi", f"/save {file}"]
    result = chat(*paths, "--model", chat_model, lines=[*lines, "/quit", "hi"])
    assert result.exit_code == 0, result.output
    prompt = "user:hi;assistant:"
    answers = [said(chat_model, path, prompt) for path in (*paths, None)]
    assert result.stdout.split("\n") == [*answers, ""]
    assert len(set(answers)) == 3
    saved = {"messages": [_message("user", "hi"), _message("assistant", answers[2])]}
    assert json.loads(file.read_text()) == saved
    assert "a answers; also there: base, goat" in result.stderr
    assert "goat answers\n" in result.stderr


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_saved_conversation_is_data_of_every_command(chat_model, tmp_path) -> None:
    file = tmp_path / "saved.jsonl"
    result = chat("--model", chat_model, lines=["hi", f"/save {file}"], system="be")
    (record,) = read_records("--text", (str(file),))
    example = to_example(record, "text", "auto")
    said = result.stdout.removesuffix("\n")
    expected = [("system", "be"), ("user", "hi"), ("assistant", said)]
    assert [(m["role"], m["content"]) for m in example.messages] == expected


def test_without_a_template_the_text_is_continued(tiny_model) -> None:
    result = chat("--model", tiny_model, lines=["hi", "go"])
    first = said(tiny_model, None, "hi")
    second = said(tiny_model, None, f"hi\n{first}\ngo")
    assert result.stdout == f"{first}\n{second}\n"
    assert "no chat template" in result.stderr
    check_error(chat("--model", tiny_model, lines=[], system="x"), "--system needs a tokenizer")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/adaptr a", "no command '/adaptr' (did you mean /adapter?)"),
        ("/adapter c", "no adapter is called 'c', there are: base, a"),
        ("/save", "/save needs the name of a file"),
        ("/save {there}", "it is there already; give another name"),
        ("/save {there}/no/file", "cannot write"),
        ("/reset now", "/reset takes no argument, got 'now'"),
        ("x" * 70, "/reset begins anew"),
    ],
)
def test_what_is_wrong_is_said_and_the_conversation_goes_on(
    chat_model, adapters, tmp_path, line, words
) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    lines = ["hi", line.format(there=there), "go"]
    result = chat(adapters / "a", "--model", chat_model, lines=lines)
    assert result.exit_code == 0, result.output
    (error,) = [each for each in result.stderr.splitlines() if each.startswith("error: ")]
    assert words in error
    alone = chat(adapters / "a", "--model", chat_model, lines=["hi", "go"])
    assert result.stdout == alone.stdout
    assert there.read_text() == "mine"


def test_ctrl_c_ends_an_answer_and_the_next_goes_on(chat_model, monkeypatch) -> None:
    write, pieces = command.write_text, []

    def interrupted(text: str) -> None:
        pieces.append(text)
        write(text)
        if len(pieces) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_text", interrupted)
    result = chat("--model", chat_model, lines=["hi", "go"])
    assert result.exit_code == 0, result.output
    assert "(stopped; Ctrl-C again ends)" in result.stderr
    first, second, _ = result.stdout.split("\n")
    assert second == said(chat_model, None, f"user:hi;assistant:{first};user:go;assistant:")


def test_a_terminal_has_a_prompt_and_a_second_ctrl_c_ends(chat_model) -> None:
    ours, theirs = pty.openpty()
    arguments = ["-m", "lowrank_ext.cli.main", "chat", "--model", str(chat_model)]
    greedy = ["--temperature", "0", "--max-new-tokens", str(NEW), "--dtype", "fp32"]
    process = subprocess.Popen(
        [sys.executable, *arguments, *greedy],
        stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(theirs)
    try:
        shown = _read_until(ours, "> ")
        os.write(ours, b"hi\n")
        shown = _read_until(ours, "\n> ")
        assert said(chat_model, None, "user:hi;assistant:") in shown
        os.write(ours, b"\x03")
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert errors.splitlines()[-1] == "stopped"


def _take_terminal() -> None:
    """Makes stdin the terminal whose Ctrl-C the process gets."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read_until(terminal: int, end: str) -> str:
    shown = ""
    while not re.sub(r"\x1b\[[?\d]*[a-z]|\r", "", shown).endswith(end):
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, f"the terminal shows {shown!r} and no {end!r}"
        shown += os.read(terminal, 4096).decode()
    return shown
