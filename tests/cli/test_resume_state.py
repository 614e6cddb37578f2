"""`finetune --resume` from damaged state: one line that names the file and the key, exit code 2."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke, resume, small_run, stop_at
from transformers import LlamaForCausalLM

from lowrank_ext.cli.checkpoints import restore_trainer
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.methods import entry
from lowrank_ext.cli.run_file import RUN_FILE, read_run_file
from lowrank_ext.cli.settings import Settings, option_types
from lowrank_ext.cli.typed import has_type

CHECKPOINT = "checkpoint-000001"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Path:
    """A run of AFLoRA, which has a schedule with statistics, stopped after its first step."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    options = small_run(model=tiny_model, text=text_file, out=out, method="aflora", dtype="bf16")
    options += ["--adapter-dtype", "bf16"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step=1)
        assert invoke("finetune", *options).exit_code == 130
    return out


def copied(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "out"))


def moments(state: dict[str, Any]) -> dict[str, Any]:
    return next(iter(state["optimizer"]["adamw"]["state"].values()))


Edit = Callable[[dict[str, Any]], object]
EDITS: dict[str, tuple[Edit, str]] = {
    "optimizer missing": (lambda s: s.pop("optimizer"), "not from this version .*optimizer"),
    "more": (lambda s: s.update(more=1), "not from this version of lowrank-ext: 'more'"),
    "optimizer of text": (lambda s: s.update(optimizer="x"), "optimizer must be dict"),
    "optimizer empty": (lambda s: s.update(optimizer={}), "adamw"),
    "adamw of text": (lambda s: s["optimizer"].update(adamw="x"), "training_state.pt"),
    "masters missing": (lambda s: s["optimizer"].pop("masters"), "optimizer must hold"),
    "masters short": (lambda s: s["optimizer"]["masters"].pop(), "masters, got"),
    "master of ints": (
        lambda s: s["optimizer"]["masters"].__setitem__(0, torch.ones(3, dtype=torch.int32)),
        "master 0 must be torch.float32",
    ),
    "groups": (lambda s: s["optimizer"]["adamw"]["param_groups"].pop(), "must have groups of"),
    "betas": (
        lambda s: s["optimizer"]["adamw"]["param_groups"][0].update(betas="x"),
        "betas must be",
    ),
    "moment of another shape": (
        lambda s: moments(s).update(exp_avg=torch.ones(7)),
        r"exp_avg of \d+ must be",
    ),
    "moment missing": (
        lambda s: moments(s).pop("exp_avg"),
        r"state \d+ must be of a parameter",
    ),
    "moment not finite": (
        lambda s: moments(s)["exp_avg"].fill_(torch.nan),
        r"exp_avg of \d+ must be finite",
    ),
    "state of no parameter": (
        lambda s: s["optimizer"]["adamw"]["state"].update({999: {}}),
        "state 999 must be of a parameter",
    ),
    "rng short": (lambda s: s.update(rng=s["rng"][:5]), "rng must be a generator's state"),
    "rng of floats": (lambda s: s.update(rng=s["rng"].float()), "rng must be a generator's state"),
    "rng of text": (lambda s: s.update(rng="x"), "rng must be Tensor"),
    "progress more": (lambda s: s["progress"].update({"\x1b]0;x\x07": 1}), r"\\x1b\]0;x\\x07"),
    "progress missing": (lambda s: s["progress"].pop("step"), "progress is not from this .*step"),
    "progress of text": (lambda s: s["progress"].update(step="3"), "step must be int, got '3'"),
    "progress of a bool": (lambda s: s["progress"].update(step=True), "step must be int, got True"),
    "progress further": (lambda s: s["progress"].update(step=4), "losses must have step=4 entries"),
    "progress of odd losses": (
        lambda s: s["progress"].update(losses=[1.0, "x", 2.0]),
        r"losses must be list\[float\]",
    ),
    "progress without losses": (
        lambda s: s["progress"].update(held_out=[]),
        "held_out must have an entry",
    ),
    "digest": (lambda s: s.update(text_digest=3), "text_digest must be str, got 3"),
    "other digest": (lambda s: s.update(text_digest="3"), "the text or the tokenizer has changed"),
    "no schedule": (lambda s: s.update(freezing=None), "freezing must be a schedule's state"),
    "schedule": (lambda s: s["freezing"].pop("step"), "state must have the keys"),
    "schedule of text": (
        lambda s: s["freezing"].update(live="x"),
        "live must be a mapping, got 'x'",
    ),
    "statistics of text": (
        lambda s: [t.update({k: "x" for k in t}) for t in s["freezing"]["live"].values()],
        "statistics of .* must be floating-point tensors",
    ),
    "statistics": (
        lambda s: [t.update({k: torch.ones(2) for k in t}) for t in s["freezing"]["live"].values()],
        "statistics of .* must be",
    ),
}


@pytest.fixture(scope="module")
def base(stopped: Path) -> LlamaForCausalLM:
    model = stored(stopped)["model"]
    return LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("edit", EDITS)
def test_damaged_training_state(
    edit: str, stopped: Path, base: LlamaForCausalLM, tmp_path: Path
) -> None:
    out = copied(stopped, tmp_path)
    path = out / CHECKPOINT / "training_state.pt"
    state = torch.load(path, weights_only=True)
    digest = state["text_digest"]
    spoil, message = EDITS[edit]
    spoil(state)
    torch.save(state, path)
    settings, before = Settings.from_dict(stored(out)), torch.get_rng_state()
    with pytest.raises(UserError, match=message) as caught:
        restore_trainer(entry("aflora"), copy.deepcopy(base), settings, path.parent, digest)
    text = str(caught.value)
    assert len(text) < 1200 and text.isprintable() and CHECKPOINT in text
    assert torch.equal(torch.get_rng_state(), before)


def test_the_command_ends_with_one_line(stopped: Path, tmp_path: Path) -> None:
    out = copied(stopped, tmp_path)
    path = out / CHECKPOINT / "training_state.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "\x1b]0;x\x07": 1}, path)
    check_error(resume(out), str(path), r"\x1b]0;x\x07")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", None], ids=str)
def test_what_is_no_training_state(content: bytes | None, stopped: Path, tmp_path: Path) -> None:
    out = copied(stopped, tmp_path)
    path = out / CHECKPOINT / "training_state.pt"
    if content is None:
        torch.save([1], path)
    else:
        path.write_bytes(content)
    settings = Settings.from_dict(stored(out))
    with pytest.raises(UserError, match=f"^cannot read: --resume: {path} must"):
        restore_trainer(entry("aflora"), None, settings, path.parent, "")


def stored(stopped: Path) -> dict[str, Any]:
    return read_run_file(stopped / RUN_FILE, "--resume", option_types())


def test_types() -> None:
    assert has_type(1, float) and not has_type(True, int) and not has_type(1.0, int)
    assert has_type(None, int | None) and not has_type("1", int | None)
    assert has_type([1, 2.5], tuple[float, ...]) and not has_type("12", tuple[str, ...])
    assert has_type([[1, 2.0]], list[tuple[int, float]])
    assert not has_type([[1]], list[tuple[int, float]])
    assert has_type({"a": [1]}, dict[str, list[int]]) and not has_type(
        {1: [1]}, dict[str, list[int]]
    )
