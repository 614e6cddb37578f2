"""Models of lr.adapt by transformers' adapter protocol, and in AdapterTrainer."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("accelerate")

import peft
from safetensors.torch import save_file
from test_peft_trainer import arguments, data
from test_peft_tuner import CONFIGS, llama, logits
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer

import lowrank_ext as lr

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*checkpointing.*:FutureWarning", "ignore:.*trains without:UserWarning"
)
by_name = pytest.mark.parametrize("name", CONFIGS)


def adapted(name: str) -> LlamaForCausalLM:
    torch.manual_seed(11)
    return lr.adapt(llama(), CONFIGS[name])


def trainer(model: nn.Module, out: Path, kind: type[Trainer], **options: Any) -> Trainer:
    given = arguments(out, **options)
    return kind(model, given, train_dataset=data(), eval_dataset=data(4))


@by_name
def test_resumes_bit_for_bit_from_adapter_files(name: str, tmp_path: Path) -> None:
    whole = adapted(name)
    trainer(whole, tmp_path, lr.AdapterTrainer).train()
    checkpoint = tmp_path / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not names & {"config.json", "model.safetensors"}
    resumed = adapted(name)
    training = trainer(resumed, tmp_path, lr.AdapterTrainer)
    training.train(resume_from_checkpoint=str(checkpoint))
    state = resumed.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in whole.state_dict().items())
    from_files = lr.load_adapter(llama(), tmp_path / "checkpoint-6")
    assert torch.equal(logits(from_files), logits(whole))


def inverted(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """The same in training; in evaluation the loss falls where it rose."""

    def compute(model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if model.training:
            return compute_loss(model, inputs, return_outputs, **kwargs)
        loss, outputs = compute_loss(model, inputs, True, **kwargs)
        return (-loss, outputs) if return_outputs else -loss

    return compute


@by_name
def test_reloads_the_best(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    training = trainer(
        model,
        tmp_path,
        lr.AdapterTrainer,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    training.compute_loss = inverted(training.compute_loss)  # the first checkpoint is the best
    training.train()
    best = Path(training.state.best_model_checkpoint)
    assert best.name == "checkpoint-3"
    assert torch.equal(logits(model), logits(lr.load_adapter(llama(), best)))
    training.save_model(str(tmp_path / "final"))
    from_files = lr.load_adapter(llama(), tmp_path / "final")
    assert torch.equal(logits(from_files), logits(model))


def test_the_plain_trainer_warns_that_it_cannot_resume(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"cannot resume from it; use lr\.AdapterTrainer, or"):
        trainer(adapted("lora"), tmp_path, Trainer, max_steps=3).train()
    resumed = trainer(adapted("lora"), tmp_path, lr.AdapterTrainer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6


def test_resumes_from_a_whole_model_of_before(tmp_path: Path) -> None:
    model = adapted("lamda")
    trainer(model, tmp_path, lr.AdapterTrainer, max_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "adapter_model.safetensors").unlink()
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    resumed = adapted("lamda")
    training = trainer(resumed, tmp_path, lr.AdapterTrainer, max_steps=3)
    training.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(logits(resumed), logits(model))


def test_a_model_without_adapters_is_left_to_the_trainer(tmp_path: Path) -> None:
    options = {"max_steps": 3}
    trainer(llama(), tmp_path, lr.AdapterTrainer, **options).train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()
    resumed = trainer(llama(), tmp_path, lr.AdapterTrainer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6


@by_name
def test_save_pretrained_writes_the_adapter(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    model.save_pretrained(tmp_path / "own")
    lr.save_adapter(model, tmp_path / "expected")
    files = sorted(path.name for path in (tmp_path / "own").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "expected").iterdir())
    for file in files:
        expected = (tmp_path / "expected" / file).read_bytes()
        assert (tmp_path / "own" / file).read_bytes() == expected


def test_save_pretrained_of_merged_and_unloaded_models(tmp_path: Path) -> None:
    model = adapted("lamda")
    expected = logits(lr.merge(model))
    model.save_pretrained(tmp_path / "merged")
    assert model._hf_peft_config_loaded  # as before
    lr.unload(model).save_pretrained(tmp_path / "unloaded")
    assert not model._hf_peft_config_loaded
    for directory in (tmp_path / "merged", tmp_path / "unloaded"):
        assert torch.equal(logits(LlamaForCausalLM.from_pretrained(directory)), expected)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    adapted("lora").save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_nothing_is_pushed_without_a_merge(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="push_to_hub must be False for a model with adapters"):
        adapted("lora").save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


@by_name
def test_from_pretrained_of_the_adapters_directory(name: str, tmp_path: Path) -> None:
    """transformers loads the base that the config names, and a LoRA by PEFT; no other method gives
    numbers without its values."""
    lr.register_with_peft()
    llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(11)
    lr.adapt(model, CONFIGS[name])
    for module in model.modules():
        if isinstance(module, lr.nn.LowRankLinear):
            nn.init.normal_(module.lora_b, std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    if name == "lora":
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
        return
    with pytest.raises(RuntimeError, match="from_pretrained of transformers only for LoRA"):
        logits(loaded)


@by_name
def test_adapters_are_disabled_and_enabled(name: str) -> None:
    model = adapted(name)
    for module in model.modules():
        if isinstance(module, lr.nn.LowRankLinear):
            nn.init.normal_(module.lora_b, std=0.02)
    on = logits(model)
    with lr.disable_adapter(model):
        off = logits(model)
    assert model.active_adapters() == ["default"]
    for _ in range(2):  # repeated calls count once
        model.disable_adapters()
    assert torch.equal(logits(model), off)
    copied = copy.deepcopy(model)  # with its adapters on
    copied.enable_adapters()
    assert torch.equal(logits(copied), on)
    assert torch.equal(logits(model), off)
    model.enable_adapters()
    model.enable_adapters()
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("method", ["add_adapter", "load_adapter", "set_adapter", "delete_adapter"])
def test_more_adapters_are_left_to_peft(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method}: a model of lr.adapt has one adapter"):
        getattr(adapted("lora"), method)("other")


def test_copies_and_pickles_save_their_own_adapter(tmp_path: Path) -> None:
    model = adapted("lora")
    for number, copied in enumerate([copy.deepcopy(model), pickle.loads(pickle.dumps(model))]):
        for module in copied.modules():
            if isinstance(module, lr.nn.LowRankLinear):
                nn.init.constant_(module.lora_b, 0.1)
        copied.save_pretrained(tmp_path / str(number))
        from_files = lr.load_adapter(llama(), tmp_path / str(number))
        assert torch.equal(logits(from_files), logits(copied))
        assert not torch.equal(logits(from_files), logits(model))


def test_peft_reads_what_save_pretrained_has_written(tmp_path: Path) -> None:
    model = adapted("lora")
    for module in model.modules():
        if isinstance(module, lr.nn.LowRankLinear):
            nn.init.normal_(module.lora_b, std=0.02)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error:.*cannot resume from it")
def test_models_made_by_model_init_resume(tmp_path: Path) -> None:

    def run() -> Any:
        given = {"args": arguments(tmp_path), "train_dataset": data()}
        return lr.AdapterTrainer(**given, model_init=lambda: adapted("lora"))

    whole, resumed = run(), run()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_a_merged_model_is_not_saved_beside_its_adapter(tmp_path: Path) -> None:
    model = adapted("lora")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="must hold no adapter, which would be applied again"):
        lr.merge(model).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_adapter_with_a_name_is_found(tmp_path: Path) -> None:
    adapted("lora").save_pretrained(tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="but adapters are in its directories mine"):
        lr.load_adapter(llama(), tmp_path)


def test_loading_for_inference_switches_dropout_off(tmp_path: Path) -> None:
    config = lr.LoRAConfig(r=4, dropout=0.5)
    lr.adapt(llama(), config).save_pretrained(tmp_path)
    model = lr.load_adapter(llama().train(), tmp_path, trainable=False)
    assert not any(module.training for module in model.modules())
    assert lr.load_adapter(llama().train(), tmp_path).training
