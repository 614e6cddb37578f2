"""FreezeCallback, with LaMDA and AFLoRA, and BalanceLossMixin inside transformers' Trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from small_models import llama_sizes
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lowrank_ext as lr
from lowrank_ext.methods.lamda.freezing import num_frozen_columns
from lowrank_ext.nn import AFLoRALinear, LaMDALinear

RANK, STEPS, ETA = 6, 10, 0.8


class Tokens(Dataset):
    """Random token ids, the same every time."""

    def __init__(self, count: int = 2 * STEPS) -> None:
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(0, 37, (count, 9), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[idx], "labels": self.ids[idx]}


class History(TrainerCallback):
    """lora_b of every module, and the frozen columns, after every optimizer step."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, Tensor]] = {}
        self.requires_grad: dict[int, set[bool]] = {}
        self.stop_at = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        modules = lora_modules(model)
        self.values[state.global_step] = {n: m.lora_b.detach().clone() for n, m in modules.items()}
        self.requires_grad[state.global_step] = {m.lora_b.requires_grad for m in modules.values()}
        control.should_training_stop |= state.global_step == self.stop_at


def lora_modules(model: nn.Module) -> dict[str, LaMDALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LaMDALinear)}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(llama_sizes())


def lamda_model(**options: Any) -> LlamaForCausalLM:
    config = {"r": RANK, "target_modules": ["q_proj", "o_proj"], "dropout": 0.1, **options}
    return lr.adapt(llama(), lr.LaMDAConfig(**config))


def trainer(model: nn.Module, out: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        **{
            "output_dir": str(out),
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.02,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **options,
        }
    )
    return lr.AdapterTrainer(
        model=model, args=arguments, train_dataset=Tokens(), callbacks=[*callbacks]
    )


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    state_a, state_b = a.state_dict(), b.state_dict()
    assert state_a.keys() == state_b.keys()
    for name, value in state_a.items():
        assert torch.equal(value, state_b[name]), name


def test_columns_freeze_step_by_step(tmp_path: Path) -> None:
    model, history, callback = lamda_model(), History(), lr.FreezeCallback(eta=ETA)
    run = trainer(model, tmp_path, callback, history)
    run.train()
    assert list(history.values) == list(range(1, STEPS + 1))
    final = history.values[STEPS]
    for step, values in history.values.items():
        frozen = num_frozen_columns(step, RANK, STEPS, ETA)
        assert history.requires_grad[step] == {frozen < RANK}
        for name, lora_b in values.items():
            assert torch.equal(lora_b[:, :frozen], final[name][:, :frozen])
            assert (lora_b != final[name])[:, frozen:].any(dim=0).all()
    modules = lora_modules(model).values()
    assert not any(m.lora_b in run.optimizer.state for m in modules)
    assert all(m.core in run.optimizer.state for m in modules)


@pytest.mark.parametrize(
    ("stop", "restore"),
    [(3, False), (3, True), (8, True)],
    ids=["3-plain", "3-restore_callbacks", "8-restore_callbacks"],
)
def test_resuming_gives_the_same_numbers(stop: int, restore: bool, tmp_path: Path) -> None:
    """Stopped in mid-schedule, and after everything was frozen; dropout is on."""
    options = {"save_strategy": "steps", "save_steps": stop, "save_total_limit": 1}
    whole, expected = lamda_model(), History()
    trainer(whole, tmp_path / "whole", lr.FreezeCallback(eta=ETA, bucket=2), expected).train()

    first = History()
    first.stop_at = stop
    halted = trainer(
        lamda_model(), tmp_path / "cut", lr.FreezeCallback(eta=ETA, bucket=2), first, **options
    )
    halted.train()
    checkpoint = tmp_path / "cut" / f"checkpoint-{stop}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["FreezeCallback"]["attributes"]["saved_schedule"]
    assert saved == {"step": stop, "total_steps": STEPS, "eta": ETA, "bucket": 2}

    resumed, second = lamda_model(), History()
    # another eta on purpose: the saved schedule counts
    run = trainer(
        resumed,
        tmp_path / "cut",
        lr.FreezeCallback(eta=0.1),
        second,
        restore_callback_states_from_checkpoint=restore,
        **options,
    )
    run.train(resume_from_checkpoint=str(checkpoint))
    assert list(second.values) == list(range(stop + 1, STEPS + 1))
    for step, values in second.values.items():
        for name, lora_b in values.items():
            assert torch.equal(lora_b, expected.values[step][name]), (step, name)
        assert second.requires_grad[step] == expected.requires_grad[step]
    assert_same_state(resumed, whole)


def test_a_longer_resumed_run_keeps_the_first_plan(tmp_path: Path) -> None:
    """With 40 steps instead of 10 a new schedule would free columns that are frozen already."""
    options = {"save_strategy": "steps", "save_steps": 4}
    first = History()
    first.stop_at = 4
    trainer(lamda_model(), tmp_path, lr.FreezeCallback(eta=ETA), first, **options).train()
    second = History()
    second.stop_at = 9
    callback = lr.FreezeCallback(eta=ETA)
    run = trainer(lamda_model(), tmp_path, callback, second, max_steps=40, **options)
    run.train(resume_from_checkpoint=True)
    frozen = num_frozen_columns(4, RANK, STEPS, ETA)
    for name, lora_b in first.values[4].items():
        assert torch.equal(second.values[9][name][:, :frozen], lora_b[:, :frozen])
    assert {step: flags for step, flags in second.requires_grad.items() if step > 4} == {
        step: {step < 8} for step in range(5, 10)
    }


def test_resuming_a_run_that_had_no_callback(tmp_path: Path) -> None:
    history = History()
    history.stop_at = 5
    options = {"save_strategy": "steps", "save_steps": 5}
    trainer(lamda_model(), tmp_path, history, **options).train()
    resumed = History()
    run = trainer(lamda_model(), tmp_path, lr.FreezeCallback(eta=ETA), resumed, **options)
    run.train(resume_from_checkpoint=True)
    frozen = num_frozen_columns(5, RANK, STEPS, ETA)
    for name, lora_b in history.values[5].items():
        assert torch.equal(resumed.values[STEPS][name][:, :frozen], lora_b[:, :frozen])
    assert resumed.requires_grad[STEPS] == {False}


def test_the_callback_class_can_be_passed_and_used_twice(tmp_path: Path) -> None:
    model = lamda_model()
    run = trainer(model, tmp_path, lr.FreezeCallback)
    run.train()
    assert not any(m.lora_b.requires_grad for m in lora_modules(model).values())
    before = {name: m.lora_b.detach().clone() for name, m in lora_modules(model).items()}
    run.train()
    for name, module in lora_modules(model).items():
        assert torch.equal(module.lora_b, before[name])


def test_hooks_are_gone_after_training(tmp_path: Path) -> None:
    model = lamda_model()
    history = History()
    history.stop_at = 3
    trainer(model, tmp_path, lr.FreezeCallback(eta=1.0), history).train()
    ids = Tokens().ids[:2]
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    for module in lora_modules(model).values():
        assert module.lora_b.grad.any(dim=0).all()


def test_lamda_adapter_saved_after_training_continues_on_the_original_base(
    tmp_path: Path,
) -> None:
    model = lamda_model(rank_budget="rank")
    trainer(model, tmp_path, lr.FreezeCallback(eta=ETA)).train()
    lr.save_adapter(model, tmp_path / "adapter")
    loaded = lr.load_adapter(llama(), tmp_path / "adapter")
    assert_same_state(loaded, model)
    ids = Tokens().ids[:2]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


# ------------------------------------------------------------------------ FreezeCallback, AFLoRA

PLAN = {"eta": 0.9, "start": 0.1, "window": 2, "decay": "quadratic"}


class AFLoRAHistory(TrainerCallback):
    """The projections, which of them train, and the schedule's scores after every step."""

    def __init__(self, callback: lr.FreezeCallback, stop_at: int = 0) -> None:
        self.callback = callback
        self.stop_at = stop_at
        self.values: dict[int, dict[str, Tensor]] = {}
        self.live: dict[int, set[str]] = {}
        self.states: dict[int, dict[str, Any]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        found = projections(model)
        self.values[state.global_step] = {n: p.detach().clone() for n, p in found.items()}
        self.live[state.global_step] = {n for n, p in found.items() if p.requires_grad}
        self.states[state.global_step] = self.callback.schedule.state_dict()
        control.should_training_stop |= state.global_step == self.stop_at


def projections(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.endswith(("lora_a", "lora_b"))}


def aflora_model(**options: Any) -> LlamaForCausalLM:
    config = {"r": RANK, "target_modules": ["q_proj", "o_proj", "down_proj"], **options}
    model = lr.adapt(llama(), lr.AFLoRAConfig(**config))
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, AFLoRALinear):  # past the first step, whose scores are all zero
            nn.init.normal_(module.out_scale, std=0.2, generator=generator)
    return model


def aflora_run(model: nn.Module, out: Path, stop_at: int = 0, **options: Any) -> AFLoRAHistory:
    plan = options.pop("plan", PLAN)
    resume = options.pop("resume", None)
    callback = lr.FreezeCallback(**plan)
    history = AFLoRAHistory(callback, stop_at)
    run = trainer(model, out, callback, history, **options)
    run.train(resume_from_checkpoint=resume)
    history.optimizer = run.optimizer
    return history


def test_projections_freeze_one_by_one(tmp_path: Path) -> None:
    model = aflora_model(live_modules=["q_proj", "down_proj"])
    history = aflora_run(model, tmp_path)
    assert all("o_proj" not in name for live in history.live.values() for name in live)
    assert history.live[1] == {n for n in projections(model) if "o_proj" not in n}
    assert history.live[STEPS] == set()
    assert len({frozenset(live) for live in history.live.values()}) > 2
    for step in range(1, STEPS):
        before, after = history.values[step], history.values[step + 1]
        for name in before:
            # what the next step freezes has lost that step's gradient already
            assert torch.equal(before[name], after[name]) == (name not in history.live[step + 1])
    vectors = [p for n, p in model.named_parameters() if n.endswith("_scale")]
    assert all(p in history.optimizer.state for p in vectors)
    assert not any(p in history.optimizer.state for p in projections(model).values())


def test_scores_are_of_the_gradients_before_they_are_clipped(tmp_path: Path) -> None:
    """Without updates the two runs have the same gradients; one clips them to a thousandth."""
    states = []
    for max_norm in (0.0, 1e-3):
        options = {"learning_rate": 0.0, "max_grad_norm": max_norm, "weight_decay": 0.0}
        history = aflora_run(aflora_model(), tmp_path, **options)
        states.append(history.states)
    for step in range(1, STEPS + 1):
        plain, clipped = states[0][step], states[1][step]
        assert plain["frozen_at"] == clipped["frozen_at"]
        for name, statistics in plain["live"].items():
            for key, value in statistics.items():
                torch.testing.assert_close(clipped["live"][name][key], value, rtol=1e-4, atol=0)
    assert states[0][STEPS]["frozen_at"]


@pytest.mark.parametrize("stop", [3, 9])
def test_resuming_aflora_gives_the_same_decisions(stop: int, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": stop, "save_total_limit": 1}
    whole = aflora_model(dropout=0.1)
    expected = aflora_run(whole, tmp_path / "whole")
    cut = tmp_path / "cut"
    aflora_run(aflora_model(dropout=0.1), cut, stop, **options)
    checkpoint = cut / f"checkpoint-{stop}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["FreezeCallback"]["attributes"]["saved_schedule"]
    assert saved["step"] == stop and saved["frozen_at"] == expected.states[stop]["frozen_at"]

    resumed = aflora_model(dropout=0.1)
    # another plan on purpose: the saved schedule counts
    second = aflora_run(resumed, cut, plan={"eta": 0.2}, resume=str(checkpoint), **options)
    assert list(second.values) == list(range(stop + 1, STEPS + 1))
    for step, values in second.values.items():
        assert second.live[step] == expected.live[step]
        for name, value in values.items():
            assert torch.equal(value, expected.values[step][name]), (step, name)
    assert_same_state(resumed, whole)


def test_resuming_aflora_from_elsewhere(tmp_path: Path) -> None:
    """The statistics are looked for in the run's own directory, then where the arguments say."""
    options = {"save_strategy": "steps", "save_steps": 6}
    first = aflora_run(aflora_model(), tmp_path / "a", 6, **options)
    moved = tmp_path / "moved"
    (tmp_path / "a" / "checkpoint-6").rename(moved)
    with pytest.raises(
        FileNotFoundError, match=r"FreezeCallback: freeze_schedule\.pt of step 6 must"
    ):
        aflora_run(aflora_model(), tmp_path / "b", resume=str(moved))
    told = {"resume": str(moved), "resume_from_checkpoint": str(moved)}
    second = aflora_run(aflora_model(), tmp_path / "b", 7, **told)
    assert first.states[6]["frozen_at"].items() <= second.states[7]["frozen_at"].items()


def test_resuming_aflora_that_had_no_callback(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 5}
    history = History()
    history.stop_at = 5
    trainer(aflora_model(), tmp_path, history, **options).train()
    second = aflora_run(aflora_model(), tmp_path, resume=True, **options)
    assert second.states[6]["step"] == 6 and second.live[6]
    assert second.live[STEPS] == set()


# ------------------------------------------------------------------------------ BalanceLossMixin


class BalancedTrainer(lr.BalanceLossMixin, Trainer):
    pass


class PaddedTokens(Tokens):
    """With an attention mask that hides tokens at the end: varying numbers, or always two."""

    def __init__(self, even: bool = False) -> None:
        super().__init__()
        self.even = even

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        ids = self.ids[idx]
        mask = (torch.arange(len(ids)) < len(ids) - (2 if self.even else idx % 4)).long()
        labels = torch.where(mask.bool(), ids, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def goat_llama(**options: Any) -> LlamaForCausalLM:
    names = {"target_modules": ["q_proj", "down_proj"], "balance_coefficient": 0.7}
    sizes = {"r": 4, "num_experts": 4, "top_k": 2, "init": "zero"}
    return lr.adapt(llama(), lr.GOATConfig(**{**sizes, **names, **options}))


def expected_update(model: nn.Module, batches: list[dict[str, Tensor]], rate: float) -> None:
    """One SGD step by hand: the mean over all tokens of the task, over the parts of the balance."""
    num_tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for batch in batches:
        part = int((batch["labels"][:, 1:] != -100).sum())
        with lr.token_mask(batch["attention_mask"]):
            task = model(**batch).loss * part / num_tokens
            (task + lr.balance_loss(model) / len(batches)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("by_the_model", [True, False])
def test_balance_loss_in_the_trainer(
    by_the_model: bool, checkpointing: bool, tmp_path: Path
) -> None:
    """An accumulated step of three micro-batches, whose loss the model or the Trainer divides."""
    data = PaddedTokens(even=not by_the_model)  # to the Trainer all micro-batches count the same
    model = goat_llama()
    arguments = trainer(model, tmp_path).args
    arguments.set_training(learning_rate=0.5, batch_size=2, max_steps=1)
    arguments.gradient_accumulation_steps, arguments.max_grad_norm = 3, 0
    arguments.gradient_checkpointing, arguments.optim = checkpointing, "sgd"
    arguments.lr_scheduler_type, arguments.weight_decay = "constant", 0.0
    run = BalancedTrainer(model=model, args=arguments, train_dataset=data)
    run.model_accepts_loss_kwargs = by_the_model
    seen: list[dict[str, Tensor]] = []
    compute_loss = run.compute_loss

    def recording(model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append({name: tensor.clone() for name, tensor in inputs.items()})
        return compute_loss(model, inputs, *args, **kwargs)

    run.compute_loss = recording
    run.train()
    assert len(seen) == 3
    by_hand = goat_llama().train()
    expected_update(by_hand, seen, 0.5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], msg=name)
    router = by_hand.model.layers[0].mlp.down_proj.router_weight
    assert not torch.equal(router, goat_llama().model.layers[0].mlp.down_proj.router_weight)


def test_evaluation_has_no_balance_loss(tmp_path: Path) -> None:
    model = goat_llama()
    data = PaddedTokens()
    plain = trainer(model, tmp_path).evaluate(data)["eval_loss"]
    arguments = trainer(model, tmp_path).args
    balanced = BalancedTrainer(model=model, args=arguments, train_dataset=data)
    assert balanced.evaluate(data)["eval_loss"] == plain
    loss, outputs = balanced.compute_loss(model.train(), balanced_batch(data), return_outputs=True)
    assert loss > outputs.loss
    assert not any(m._balance_loss for m in model.modules() if isinstance(m, lr.nn.GOATLinear))


def balanced_batch(data: Dataset) -> dict[str, Tensor]:
    rows = [data[0], data[1]]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_balance_loss_errors(tmp_path: Path) -> None:
    arguments = trainer(lamda_model(), tmp_path).args
    lora = lr.adapt(llama(), lr.LoRAConfig(r=2))
    with pytest.raises(ValueError, match="balance_loss: model must contain a GOATLinear"):
        BalancedTrainer(model=lora, args=arguments, train_dataset=Tokens()).train()
    run = BalancedTrainer(model=goat_llama(), args=arguments, train_dataset=Tokens())
    run.args._n_gpu = 2
    with pytest.raises(RuntimeError, match="BalanceLossMixin: training must use at most one GPU"):
        run.training_step(run.model, Tokens()[0])


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FreezeCallback: eta must be a number from 0 to 1, got 2"):
        lr.FreezeCallback(eta=2)
    with pytest.raises(ValueError, match="FreezeCallback: bucket must be an integer of at least 1"):
        lr.FreezeCallback(bucket=0)
    with pytest.raises(
        ValueError, match=r"FreezeCallback: start must be at most eta=0\.3, got 0\.5"
    ):
        lr.FreezeCallback(start=0.5)
    with pytest.raises(ValueError, match=r"FreezeCallback: decay must be one of .*, got 'linear'"):
        lr.FreezeCallback(decay="linear")
    with pytest.raises(ValueError, match="FreezeCallback: window must be an integer of at least 1"):
        lr.FreezeCallback(window=0)
    lora = lr.adapt(llama(), lr.LoRAConfig(r=2))
    with pytest.raises(
        ValueError, match="FreezeCallback: model must contain a LaMDALinear or an AFL"
    ):
        trainer(lora, tmp_path, lr.FreezeCallback()).train()
