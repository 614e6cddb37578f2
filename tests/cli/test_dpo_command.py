"""`lowrank-ext dpo`: rewards against plain torch, pairs against TRL's own, runs that continue."""

import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("trl")

import trl
from byte_llama import save_byte_llama
from char_tokenizer import char_tokenizer
from datasets import Dataset
from finetune_runs import check_error, flags_of, invoke, report, stop_at, write_records
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ext as lr
from lowrank_ext.cli.data import DataOptions
from lowrank_ext.cli.dpo import picture as picture_module
from lowrank_ext.cli.dpo import settings as settings_module
from lowrank_ext.cli.dpo.pairs import LONG_PROMPT, SAME, SAME_BEGINNING, load_pairs

STEPS = 6
DRAW = picture_module.rewards_picture
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than such a run; one test draws."""
    monkeypatch.setattr(picture_module, "rewards_picture", lambda progress: b"")


def rows(count: int = 40, start: int = 0) -> list[Row]:
    return [
        {"prompt": f"{n} plus {n}? ", "chosen": f"yes, {2 * n}", "rejected": f"no: {n}"}
        for n in range(start, start + count)
    ]


def messages(row: Row) -> Row:
    user = {"role": "user", "content": row["prompt"]}
    answers = {
        name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")
    }
    return {"prompt": [user], **answers}


def without_prompt(row: Row) -> Row:
    return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}


@pytest.fixture
def dpo(tiny_model: Path, tmp_path: Path) -> Any:
    """Runs dpo with small sizes; keyword arguments override options, None leaves one out."""
    train = write_records(tmp_path / "pairs.jsonl", rows())
    held_out = write_records(tmp_path / "held-out.jsonl", rows(4, start=60))

    def dpo(*flags: str, **options: Any) -> Any:
        defaults: dict[str, Any] = {
            "model": tiny_model,
            "text": train,
            "eval": held_out,
            "out": tmp_path / "out",
            "rank": 4,
            "steps": STEPS,
            "batch": 2,
            "seq_len": 32,
            "dtype": "fp32",
            "lr": 0.01,
            "eval_every": 3,
        }
        return invoke("dpo", *flags, *flags_of({**defaults, **options}))

    return dpo


def resume(out: Path, *flags: str) -> Any:
    return invoke("dpo", "--resume", "--out", str(out), *flags)


def numbers(out: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions: losses, scores, and the adapter's bits."""
    found = report(out)
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    return {"weights": weights, "losses": found["losses"], "held_out": found["held_out"]}


# ------------------------------------------------------------------------------------- rewards


@torch.no_grad()
def log_probabilities(model: Any, tokenizer: Any, row: Row) -> Tensor:
    """Of the chosen and the rejected answer, end of text included, by plain torch; float64 [2]."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    sums = []
    for name in ("chosen", "rejected"):
        answer = [*tokenizer(row[name])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        each = model(ids).logits[0, :-1].double().log_softmax(-1)
        own = each[torch.arange(len(each)), ids[0, 1:]]
        sums.append(own[len(prompt) - 1 :].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("method", ["lora", "lamda", "peft-lora", "full"])
def test_rewards_are_those_of_the_saved_model_beside_the_base(
    method: str, dpo: Any, tiny_model: Path, tmp_path: Path
) -> None:
    rank = None if method == "full" else 4
    result = dpo(method=method, lr=0.02, rank=rank)
    assert result.exit_code == 0, result.output
    out, tokenizer = tmp_path / "out", AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    else:
        fresh = AutoModelForCausalLM.from_pretrained(tiny_model)
        model = lr.load_adapter(fresh, out / "adapter").eval()
    held_out = rows(4, start=60)
    policy, reference = (
        torch.stack([log_probabilities(each, tokenizer, row) for row in held_out])
        for each in (model, base)
    )
    chosen, rejected = 0.1 * (policy - reference).T
    margins = chosen - rejected
    after = report(out)["held_out_after"]
    expected = {
        "loss": -torch.nn.functional.logsigmoid(margins).mean(),
        "chosen_reward": chosen.mean(),
        "rejected_reward": rejected.mean(),
        "margin": margins.mean(),
        "accuracy": (margins > 0).double().mean(),
        "chosen_log_probability": policy[:, 0].mean(),
        "rejected_log_probability": policy[:, 1].mean(),
    }
    assert {name: after[name] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, abs=2e-4
    )
    before = report(out)["held_out_before"]
    assert before["step"] == 0 and before["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert before["chosen_log_probability"] == pytest.approx(
        float(reference[:, 0].mean()), abs=2e-4
    )
    assert after["margin"] > 0.01 > abs(before["margin"])


@pytest.mark.parametrize("method", ["lora", "lamda"])
def test_the_reference_is_the_model_with_its_adapter_off(
    method: str, dpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowrank_ext.cli.dpo.trainer import DpoTrainer

    found = []
    measure = DpoTrainer.measure

    def measured(self: Any) -> float:
        ids = self.run.held_out[0]["input_ids"]
        with torch.no_grad(), lr.disable_adapter(self.run.model):
            off = self.run.model(ids).logits
            found.append((self.ref_model(ids).logits, off))
        own = {p.data_ptr() for p in self.ref_model.parameters()}
        shared = own & {p.data_ptr() for p in self.run.model.parameters()}
        assert (shared == own) is (method == "lora")  # LaMDA's start is taken out of the weights
        return measure(self)

    monkeypatch.setattr(DpoTrainer, "measure", measured)
    assert dpo(method=method).exit_code == 0
    assert len(found) == 3
    for reference, off in found:
        if method == "lora":
            assert torch.equal(reference, off)
        torch.testing.assert_close(reference, off, rtol=1e-4, atol=1e-5)


def test_what_is_written_and_shown(
    dpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_module, "rewards_picture", DRAW)
    result = dpo(loss="ipo", beta=0.2, save_every=2, keep=2)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    names = {"adapter", "report.json", "rewards.png", "dpo.log", "run.yaml"}
    checkpoints = {"checkpoint-000004", "checkpoint-000006"}
    assert {path.name for path in out.iterdir()} == names | checkpoints
    assert (out / "rewards.png").read_bytes().startswith(b"\x89PNG")
    found = report(out)
    assert [each["step"] for each in found["held_out"]] == [0, 3, 6]
    assert found["held_out_before"]["loss"] == pytest.approx((1 / (2 * 0.2)) ** 2)
    assert len(found["losses"]) == STEPS and found["settings"]["beta"] == 0.2
    assert found["trainable_at_start"] == found["trainable_at_end"] > 0
    for words in ("40 examples", "chosen above rejected", "wrote", f"step {STEPS}/{STEPS}"):
        assert words in result.stdout
    again = invoke("dpo", "--config", str(out / "run.yaml"), "--out", str(tmp_path / "again"))
    assert again.exit_code == 0, again.output
    assert numbers(tmp_path / "again") == numbers(out)


@pytest.mark.parametrize(
    ("flags", "options"),
    [(["--gradient-checkpointing"], {}), ([], {"batch": 1, "accumulate": 2})],
)
def test_ways_to_save_memory_change_no_loss(
    flags: list[str], options: Row, dpo: Any, tmp_path: Path
) -> None:
    assert dpo(eval_batches=2).exit_code == 0
    assert dpo(*flags, out=tmp_path / "other", eval_batches=2, **options).exit_code == 0
    expected, found = report(tmp_path / "out"), report(tmp_path / "other")
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)


def test_preview_shows_what_is_trained_on(dpo: Any) -> None:
    result = dpo("--preview", "1", steps=1)
    assert result.exit_code == 0, result.output
    assert "pair 1, chosen: 17 tokens, 7 trained" in result.stdout
    assert "⟦0 plus 0? ⟧yes, 0<eos>" in result.stdout
    assert "⟦0 plus 0? ⟧no: 0<eos>" in result.stdout


def test_dry_run_measures_and_writes_nothing(dpo: Any, tmp_path: Path) -> None:
    result = dpo("--dry-run", method="lamda")
    assert result.exit_code == 0, result.output
    assert "What would train" in result.stdout and "lamda" in result.stdout
    assert not (tmp_path / "out").exists()
    check_error(resume(tmp_path / "out", "--dry-run"), "--dry-run or --resume, not both")


def test_over_a_4_bit_base(dpo: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    save_byte_llama(tmp_path / "model", context=64, intermediate_size=128)
    result = dpo(quantize="nf4", model=tmp_path / "model")
    assert result.exit_code == 0, result.output
    found = report(tmp_path / "out")
    assert found["held_out_before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["held_out_after"]["margin"] > 0.01


def test_early_stop_saves_the_best(dpo: Any, tmp_path: Path) -> None:
    # A rate that grows the loss after the first steps.
    options = {"steps": 20, "eval_every": 1, "early_stop": 2, "schedule": "constant"}
    assert dpo(lr=1.0, warmup=0, clip=0, keep=1, **options).exit_code == 0
    found = report(tmp_path / "out")
    steps = {each["step"]: each["loss"] for each in found["held_out"]}
    assert found["ended_early"] and len(steps) < 21
    assert found["held_out_after"]["step"] == found["saved_step"]
    trained = {step: loss for step, loss in steps.items() if step}
    assert found["held_out_after"]["loss"] == min(trained.values())


def test_default_rate_is_a_share_of_the_methods_own(dpo: Any, tmp_path: Path) -> None:
    assert dpo(lr=None, steps=1).exit_code == 0
    assert report(tmp_path / "out")["learning_rate"] == pytest.approx(1e-5)


# --------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("shape", [lambda row: row, messages, without_prompt])
def test_pairs_are_those_of_trl(shape: Any, tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    train, held_out = ([shape(row) for row in rows(5, start)] for start in (0, 90))
    options = DataOptions(
        text=(str(write_records(tmp_path / "a.jsonl", train)),),
        eval=(str(write_records(tmp_path / "b.jsonl", held_out)),),
        seq_len=64,
        train_on="completion",
        packing="off",
        format="preference",
    )
    found = load_pairs(options, tokenizer)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=64, truncation_mode="keep_start")
    for own, given in ((found.train, train), (found.held_out, held_out)):
        theirs = trl.DPOTrainer._prepare_dataset(
            SimpleNamespace(_tokenizer=tokenizer),
            Dataset.from_list(given),
            tokenizer,
            arguments,
            "",
        )
        assert own.num_rows == 5
        for mine, row in zip(own, theirs, strict=True):
            assert mine == {name: row[name] for name in mine}


def test_what_is_cut_or_left_out_is_said(tmp_path: Path, tiny_model: Path) -> None:
    found = [
        *rows(3),
        {"prompt": "same ", "chosen": "yes", "rejected": "yes"},
        {"prompt": "p" * 16, "chosen": "yes", "rejected": "no"},
        {"prompt": "p" * 10, "chosen": "y" * 8 + "a", "rejected": "y" * 8 + "b"},
        {"prompt": "p" * 10, "chosen": "a" * 9, "rejected": "b"},
    ]
    held_out = write_records(tmp_path / "held-out.jsonl", rows(2, start=5))
    options = DataOptions(
        text=(str(write_records(tmp_path / "pairs.jsonl", found)),),
        eval=(str(held_out),),
        seq_len=16,
        train_on="completion",
        packing="off",
        format="preference",
    )
    pairs = load_pairs(options, AutoTokenizer.from_pretrained(tiny_model))
    [train, _] = pairs.report.parts
    assert train.dropped == {SAME: 1, LONG_PROMPT: 1, SAME_BEGINNING: 1}
    # The last pair, 10 + 9 + 1 tokens, and those of rows() whose chosen sequence has more than 16.
    lengths = [len(row["prompt"]) + len(row["chosen"]) + 1 for row in rows(3)]
    lost = [length - 16 for length in lengths if length > 16] + [4]
    assert (train.pairs, train.truncated, train.truncated_tokens) == (4, len(lost), sum(lost))
    assert pairs.train[3] == {
        "prompt_ids": pairs.train[3]["prompt_ids"],
        "chosen_ids": [ord("a") - ord("!")] * 6,
        "rejected_ids": [ord("b") - ord("!"), 256],
    }
    other = load_pairs(options, AutoTokenizer.from_pretrained(tiny_model))
    assert other.digest() == pairs.digest()
    write_records(held_out, rows(2, start=6))
    changed = load_pairs(options, AutoTokenizer.from_pretrained(tiny_model))
    assert changed.digest() != pairs.digest()


# ------------------------------------------------------------------------------------- resuming


def test_a_terminated_run_continues_to_the_same_bits(
    dpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the first evaluation, then in the middle of a step."""
    from lowrank_ext.cli.dpo.trainer import DpoTrainer

    assert dpo(out=tmp_path / "whole").exit_code == 0
    loss_of_pairs, compute_loss = DpoTrainer.loss_of_pairs, DpoTrainer.compute_loss

    def in_evaluation(self: Any, inputs: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss_of_pairs(self, inputs)

    def in_step(self: Any, *arguments: Any, **options: Any) -> Tensor:
        if self.run.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DpoTrainer, "loss_of_pairs", in_evaluation)
        assert dpo().exit_code == 143
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    with monkeypatch.context() as patch:
        patch.setattr(DpoTrainer, "compute_loss", in_step)
        assert resume(tmp_path / "out").exit_code == 143
    assert (tmp_path / "out" / "checkpoint-000002").is_dir()
    assert resume(tmp_path / "out").exit_code == 0
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("method", ["lora", "lamda"])
@pytest.mark.parametrize("step", [1, 4])
def test_a_stopped_run_continues_to_the_same_bits(
    method: str, step: int, dpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dpo(method=method, out=tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        stopped = dpo(method=method)
    assert stopped.exit_code == 130, stopped.output
    assert "lowrank-ext dpo --resume" in stopped.stderr
    resumed = resume(tmp_path / "out")
    assert resumed.exit_code == 0, resumed.output
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole")


def test_a_run_is_extended(dpo: Any, tmp_path: Path) -> None:
    assert dpo(schedule="constant", warmup=0).exit_code == 0
    steps = str(STEPS + 2)
    whole = tmp_path / "whole"
    assert dpo(schedule="constant", warmup=0, steps=steps, out=whole).exit_code == 0
    assert resume(tmp_path / "out", "--steps", steps).exit_code == 0
    assert numbers(tmp_path / "out")["weights"] == numbers(whole)["weights"]
    check_error(resume(tmp_path / "out", "--beta", "0.5"), "--beta was 0.1, got 0.5")


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "hello"}, ["line 1", "'text'", "'chosen' + 'rejected'"]),
        ({"prompt": "p", "completion": "c"}, ["line 1", "'completion'"]),
        ({"prompt": "p", "chosen": "c", "rejected": ["r"]}, ["all be text or all be messages"]),
    ],
)
def test_other_records_are_refused(row: Row, words: list[str], dpo: Any, tmp_path: Path) -> None:
    check_error(dpo(text=write_records(tmp_path / "other.jsonl", [row] * 4)), *words)


def test_plain_text_is_refused_and_so_are_pairs_in_finetune(
    dpo: Any, text_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    check_error(dpo(text=text_file), "text.txt is text", "lowrank-ext finetune")
    model, pairs = ("--model", str(tiny_model)), ("--text", str(tmp_path / "pairs.jsonl"))
    out = ("--seq-len", "16", "--out", str(tmp_path / "finetuned"))
    check_error(
        invoke("finetune", *model, *pairs, *out),
        "pairs.jsonl: line",
        "lowrank-ext dpo",
    )
    other = [{"role": "user", "content": "b"}]
    unlike = [{"chosen": [{"role": "user", "content": n}], "rejected": other} for n in "acd"]
    check_error(
        dpo(text=write_records(tmp_path / "m.jsonl", unlike)), "begin with the same messages"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": None}, ["dpo needs --text"]),
        ({"method": "frozen", "rank": None}, ["--method frozen trains nothing"]),
        ({"method": "set-and-sequence", "window": 4}, ["stages", "use finetune"]),
        ({"loss": "sigmoit"}, ["--loss must be one of", "did you mean sigmoid"]),
        ({"eval_split": 0, "eval": None}, ["--eval-split must be above 0"]),
        ({"beta": 0}, ["--beta must be a positive number, got 0"]),
        ({"seq_len": 2}, ["no pair is left to train on", LONG_PROMPT]),
        ({"targets": "lm_head,q_proj"}, ["--targets: must leave the output embeddings out"]),
    ],
)
def test_wrong_options(options: Row, words: list[str], dpo: Any, tmp_path: Path) -> None:
    check_error(dpo(**options), *words)
    assert not (tmp_path / "out" / "adapter").exists()


def test_trl_is_asked_for(dpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)
    check_error(dpo(), "needs the package trl", "lowrank-ext[finetune,dpo]")


def test_changed_pairs_are_not_continued(dpo: Any, tmp_path: Path) -> None:
    assert dpo(steps=1).exit_code == 0
    write_records(tmp_path / "pairs.jsonl", rows(41))
    check_error(resume(tmp_path / "out"), "the text or the tokenizer has changed")


def test_what_no_run_has_written_stays(dpo: Any, tmp_path: Path) -> None:
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "adapter" / "mine").write_text("mine")
    check_error(dpo(), "no run has written it")
    assert (tmp_path / "out" / "adapter" / "mine").read_text() == "mine"


def test_nothing_is_written_among_the_weights_of_the_model(
    dpo: Any, tiny_model: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    before = set(base.iterdir())
    check_error(dpo(model=base, out=base), f"--out {base}: it holds the input {base}")
    assert set(base.iterdir()) == before


def test_the_adapter_that_a_run_begins_with_is_not_replaced(dpo: Any, tmp_path: Path) -> None:
    assert dpo(steps=1).exit_code == 0
    out = tmp_path / "out"
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    check_error(dpo(steps=1, adapter=out, rank=None), "the run would replace its own input")
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == weights
