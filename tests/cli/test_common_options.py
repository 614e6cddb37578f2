"""Options that other trainers have too: what they do to a run, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke, losses, report, resume, rows, stop_at
from saved_adapters import TEMPLATE

from lowrank_ext.cli import finetune, job, optimizers
from lowrank_ext.cli.adapters import _own_base, find_adapter
from lowrank_ext.cli.chat_template import use_templates_in
from lowrank_ext.cli.data import DataOptions, load_examples
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.training.trainer import RunCallback
from lowrank_ext.cli.variants import VariantOptions, load_variants

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--betas 0.9", ["--betas must be two numbers", "0.9,0.95", "'0.9'"]),
        ("--betas 0.9,1", ["--betas must be two numbers", "below 1", "'0.9,1'"]),
        ("--betas a,b", ["--betas must be two numbers", "'a,b'"]),
        ("--betas 0.9,0.9 --optimizer sgd", ["--betas is of adamw", "--optimizer sgd"]),
        ("--eps 0", ["--eps must be a positive number"]),
        ("--eps 1e-6 --optimizer lion_8bit", ["--eps is of adamw", "--optimizer lion_8bit"]),
        ("--min-lr 1", ["--min-lr must be a fraction of the peak", "got 1.0"]),
        ("--min-lr 0.1 --schedule linear", ["--min-lr is of --schedule cosine, got linear"]),
        ("--neftune 0", ["--neftune must be a positive number"]),
        ("--neftune 5 --compile", ["--neftune", "--compile"]),
        ("--attention spda", ["--attention must be one of", "did you mean sdpa"]),
        ("--revision v1", ["--revision is of ids of cached models"]),
        ("--chat-template no.jinja", ["--chat-template no.jinja: no such file"]),
        ("--eval-split 1", ["--eval-split must be a fraction", "got 1.0"]),
        ("--eval-split 0.1 --eval .", ["--eval-split", "or --eval, not both"]),
        ("--max-rows 0", ["--max-rows must be at least 1, got 0"]),
        ("--log-every 0", ["--log-every must be at least 1"]),
        ("--log-every 2", ["--log-every is of --log-to"]),
        ("--run-name mine", ["--run-name is of --log-to", "the run has none"]),
        ("--run-name a --log-to tensorboard", ["--run-name is of", "the run has tensorboard"]),
        ("--log-to trackoi", ["--log-to must be one of", "did you mean trackio"]),
        ("--log-to mlflow", ["--log-to mlflow needs the package mlflow: pip install mlflow"]),
    ],
)
def test_refused(
    arguments: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "run", lambda *settings, **more: pytest.fail("it would run"))
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None if name == "mlflow" else name)
    check_error(invoke("finetune", *arguments.split(), "--out", str(tmp_path / "out")), *words)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- optimizer


def test_betas_and_eps_are_those_of_torch(run, tmp_path) -> None:
    """Ours and torch's AdamW agree, and neither is what it is without them."""
    own: dict[str, Any] = {"betas": "0.5,0.6", "eps": 1e-3, "dropout": 0}
    assert run(out=tmp_path / "plain", dropout=0).exit_code == 0
    assert run(out=tmp_path / "ours", **own).exit_code == 0
    assert run(out=tmp_path / "torch", optimizer="adamw_torch", **own).exit_code == 0
    ours, torchs = losses(tmp_path / "ours"), losses(tmp_path / "torch")
    assert ours == pytest.approx(torchs, rel=1e-5)
    assert ours[-1] != pytest.approx(losses(tmp_path / "plain")[-1], rel=1e-5)


def test_optimizers_that_have_betas_and_eps(tmp_path) -> None:
    from importlib.util import find_spec

    from transformers import Trainer, TrainingArguments

    for name, package in optimizers.OPTIMIZERS.items():
        if name == optimizers.OWN_OPTIMIZER or (package is not None and find_spec(package) is None):
            continue
        arguments = TrainingArguments(
            output_dir=str(tmp_path), optim=name, report_to=[], adam_beta1=0.5, adam_epsilon=1e-3
        )
        _, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        assert (options.get("betas", (0,))[0] == 0.5) == optimizers.takes_betas(name), name
        assert (options.get("eps") == 1e-3) == optimizers.takes_eps(name), name


def test_cosine_ends_at_the_lowest_rate(run, monkeypatch) -> None:
    rates: list[float] = []
    before = RunCallback.on_pre_optimizer_step

    def noted(self: RunCallback, *arguments: Any, **options: Any) -> Any:
        rates.append(self.trainer.optimizer.param_groups[0]["lr"])
        return before(self, *arguments, **options)

    monkeypatch.setattr(RunCallback, "on_pre_optimizer_step", noted)
    assert run(min_lr=0.25, warmup=2, steps=6, lr=0.004).exit_code == 0
    falling = [0.25 + 0.75 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx([0, 0.002, *(0.004 * factor for factor in falling)])


def test_noise_on_embeddings_is_in_training_alone(run, tmp_path, monkeypatch) -> None:
    assert run(out=tmp_path / "plain").exit_code == 0
    assert run(out=tmp_path / "least", neftune=1e-9).exit_code == 0
    assert run(out=tmp_path / "whole", neftune=5).exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert run(neftune=5).exit_code == 130
    assert resume(tmp_path / "out").exit_code == 0
    plain, whole = (rows(tmp_path / name)["lora"] for name in ("plain", "whole"))
    assert losses(tmp_path / "least") != pytest.approx(whole["losses"], rel=1e-3)
    assert rows(tmp_path / "out")["lora"]["losses"] == whole["losses"]
    assert rows(tmp_path / "out")["lora"]["held_out"] == whole["held_out"]
    # Before the first step nothing but noise could make a difference.
    assert whole["held_out"][0] == plain["held_out"][0]
    assert whole["saved_bytes_at_start"] == plain["saved_bytes_at_start"]
    assert whole["saved_bytes_at_end"] == plain["saved_bytes_at_end"]


# --------------------------------------------------------------------------------------------- logs


def test_loggers_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(optimizers.LOGGERS) == set(INTEGRATION_TO_CALLBACK) - {"kubeflow"}


def test_means_of_losses_go_to_a_logger_by_name(run, tmp_path, monkeypatch) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    seen: list[Any] = []

    class Logger(TrainerCallback):
        def on_train_begin(self, args: Any, *others: Any, **more: Any) -> None:
            seen.append(args.run_name)

        def on_log(self, args: Any, state: Any, *others: Any, logs: Any, **more: Any) -> None:
            if "loss" in logs:
                seen.append((state.global_step, logs["loss"]))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Logger)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name)
    result = run(log_to="trackio", log_every=3, run_name="mine")
    assert result.exit_code == 0, result.output
    found = losses(tmp_path / "out")
    assert seen[0] == "mine"
    assert seen[1:] == [(3, pytest.approx(mean(found[:3]))), (6, pytest.approx(mean(found[3:6])))]


# ------------------------------------------------------------------------------- model and template


@pytest.fixture
def loaded_models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that runs have loaded."""
    found: list[Any] = []
    load = job.load_model

    def noted(*arguments: Any, **options: Any) -> Any:
        found.append(load(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(job, "load_model", noted)
    return found


def test_attention_is_that_of_the_model_and_keeps_documents_apart(
    run, tmp_path, loaded_models
) -> None:
    text = tmp_path / "short.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} is {n}"}) + "\n" for n in range(60)))
    for name in ("sdpa", "eager"):
        assert run(out=tmp_path / name, text=text, attention=name, dropout=0).exit_code == 0
    kinds = [loaded.model.config._attn_implementation for loaded in loaded_models]
    assert kinds == ["sdpa", "eager"]
    assert report(tmp_path / "eager")["model"]["data"]["parts"][0]["packed_rows"] > 0
    assert losses(tmp_path / "eager") == pytest.approx(losses(tmp_path / "sdpa"), rel=1e-5)


def test_flash_attention_says_what_it_needs(run, monkeypatch) -> None:
    check_error(run(attention="flash_attention_2"), "flash_attention_2 needs a GPU", "cpu")
    gpu = torch.device("cuda")
    with pytest.raises(UserError, match="needs --dtype bf16 or fp16, got fp32"):
        job.check_attention("flash_attention_2", torch.float32, gpu)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package flash-attn: pip install flash-attn"):
        job.check_attention("flash_attention_2", torch.bfloat16, gpu)


def test_a_revision_is_that_of_the_cache(run, tiny_model, tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants
    from transformers.utils import hub

    commits = {"v1": "1" * 40, "main": "2" * 40}
    cached = tmp_path / "cache" / "models--owner--tiny"
    shutil.copytree(tiny_model, cached / "snapshots" / commits["v1"])
    (cached / "snapshots" / commits["main"]).mkdir()
    (cached / "refs").mkdir()
    for name, commit in commits.items():
        (cached / "refs" / name).write_text(commit)
    for module, name in ((constants, "HF_HUB_CACHE"), (hub, "HF_HUB_CACHE")):
        monkeypatch.setattr(module, name, str(tmp_path / "cache"), raising=False)
    check_error(run(model="owner/tiny"), "cannot load owner/tiny")
    check_error(run(model="owner/tiny", revision="v2"), "cannot load owner/tiny")
    result = run(model="owner/tiny", revision="v1")
    assert result.exit_code == 0, result.output
    assert run(out=tmp_path / "local").exit_code == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "local")
    found = _own_base(find_adapter(tmp_path / "out"))
    assert (found.location, found.revision) == ("owner/tiny", "v1")


def test_a_chat_template_is_used_and_kept(run, tmp_path, chat_model, tiny_model) -> None:
    from transformers import AutoTokenizer

    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(_chat(n) for n in range(30)))
    template = tmp_path / "own.jinja"
    template.write_text(TEMPLATE)
    options = {"text": chats, "seq_len": 32}
    check_error(run(**options), "no chat template", "--chat-template")
    assert run(chat_template=template, **options).exit_code == 0
    assert run(model=chat_model, out=tmp_path / "own", **options).exit_code == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "own")
    template.unlink()
    adapter = tmp_path / "out" / "adapter"
    options = VariantOptions(
        adapters=None, adapter=None, model=str(tiny_model), quantize=None,
        device="cpu", dtype="fp32", threads=None,
    )  # fmt: skip
    variants = load_variants(options, {"a": find_adapter(adapter)}, with_base=False)
    assert variants.loaded.tokenizer.chat_template == TEMPLATE
    merged = tmp_path / "merged"
    assert invoke("merge", str(adapter), "--out", str(merged)).exit_code == 0
    assert AutoTokenizer.from_pretrained(merged).chat_template == TEMPLATE


def _chat(n: int) -> str:
    turns = {"user": f"{n}+{n}", "assistant": str(2 * n)}
    messages = [{"role": role, "content": text} for role, text in turns.items()]
    return json.dumps({"messages": messages}) + "\n"


def test_a_damaged_chat_template_is_refused(run, tmp_path) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("{{ messages }}\n{% for m in %}")
    check_error(run(chat_template=template), "--chat-template", "bad.jinja: line 2")


def test_adapters_of_different_templates_are_refused(tmp_path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "chat_template.jinja").write_text(name)
    tokenizer = SimpleNamespace(chat_template=None)
    use_templates_in(tokenizer, [tmp_path / "a", tmp_path])
    assert tokenizer.chat_template == "a"
    with pytest.raises(UserError, match="must have one chat_template"):
        use_templates_in(tokenizer, [tmp_path / "a", tmp_path / "b"])


# --------------------------------------------------------------------------------------------- data


def test_the_part_that_is_held_out(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n:04}"}) + "\n" for n in range(100)))
    for fraction, expected in ((None, 10), (0.25, 25), (0.01, 1)):
        found = load_examples(DataOptions((str(path),), eval_split=fraction))
        assert (len(found.train), len(found.held_out)) == (100 - expected, expected)
    own = DataOptions((str(path),), eval=(str(path),), eval_split=0)
    assert [len(part) for part in (load_examples(own).train, load_examples(own).held_out)] == [
        100,
        100,
    ]
    with pytest.raises(UserError, match="--eval-split 0 leaves nothing to evaluate on"):
        load_examples(DataOptions((str(path),), eval_split=0))


def test_no_more_records_are_read_than_asked_for(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"{n:04}"}) for n in range(20)]
    path.write_text("\n".join([*lines, "this is not read"]))
    found = load_examples(DataOptions((str(path),), eval=(str(path),), max_rows=15))
    assert [example.key for example in found.train] == [f"{n:04}" for n in range(15)]
    assert len(found.held_out) == 15
    assert "15 documents" in found.description
    assert len(load_examples(DataOptions((), max_rows=12)).train) < 12


# ------------------------------------------------------------------------------------------- length


def test_more_epochs_extend_a_run(run, tmp_path, monkeypatch) -> None:
    """To the numbers of a run that was stopped on its way, whose steps so far were the same."""
    text = tmp_path / "few.txt"
    text.write_text("0123456789abcdef" * 12)
    options = {"text": text, "batch": 3, "schedule": "constant_with_warmup", "warmup": 1}
    assert run(epochs=3, out=tmp_path / "whole", **options).exit_code == 0
    assert run(epochs=1.5, **options).exit_code == 0
    out = tmp_path / "out"
    check_error(resume(out, "--epochs", "1"), "--epochs was 1.5, got 1")
    words = "--resume: the run has --epochs 1.5, got --steps 50; give more --epochs to extend it"
    check_error(resume(out, "--steps", "50"), words)
    result = resume(out, "--epochs", "3")
    assert result.exit_code == 0, result.output
    assert "3 epochs instead of 1.5" in result.stdout
    assert losses(out) == losses(tmp_path / "whole")
    assert "\nepochs: 3.0\n" in (out / "run.yaml").read_text()
    assert "already finished" in resume(out).stdout
