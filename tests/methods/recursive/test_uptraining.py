"""The loss of a batch, in a plain loop and in transformers' Trainer."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from small_models import small_llama
from transformers import Trainer, TrainingArguments

import lowrank_ext as lr

T, VOCABULARY = 6, 32
uptrain_loss = lr.recursive.uptrain_loss
OPTIONS: dict[str, Any] = {"loss": "kl", "coefficients": 0.3, "exit_loss": "kl"}


def recursive(rank: int = 2, layers: int = 4, **options: Any) -> Any:
    model = small_llama(**options) if layers == 2 else _deeper(layers)
    config = lr.recursive.RecursiveConfig(num_loops=2, rank=rank)
    return lr.recursive.convert(model, config).train()


def _deeper(layers: int) -> Any:
    config = small_llama().config
    config.num_hidden_layers = layers
    return type(small_llama())(config)


def batch(rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, T))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def grads_of(model: Any, teacher: Any, inputs: Any, **options: Any) -> dict[str, Tensor]:
    uptrain_loss(model, teacher, inputs, **{**OPTIONS, **options}).total.backward()
    return gradients(model)


def test_loss_is_that_of_the_logits() -> None:
    model, teacher, inputs = recursive(), small_llama(), batch()
    found = uptrain_loss(model, teacher, inputs, **OPTIONS)
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    logits = lr.recursive.loop_logits(model, **given)
    wanted = lr.recursive.loop_loss(
        logits,
        inputs["labels"],
        loss="kl",
        teacher_logits=teacher(**given).logits.detach(),
        coefficients=(0.3, 1.0),
    )
    torch.testing.assert_close(found.total, wanted.total)
    torch.testing.assert_close(found.by_loop, wanted.by_loop)
    found.total.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == set()
    assert not gradients(teacher)


def test_without_exits_it_is_the_loss_of_transformers() -> None:
    model, inputs = recursive(), batch()
    found = uptrain_loss(model, None, inputs, loss="ce").total
    torch.testing.assert_close(found, model(**inputs).loss)


def test_earlier_loops_are_trained_by_the_exits_alone_where_the_last_has_no_part() -> None:
    model, inputs = recursive(), batch()
    only = grads_of(model, None, inputs, loss="ce", coefficients=(1.0, 0.0))
    of_loop_1 = [n for n in dict(model.named_parameters()) if ".layers.3." in n and "lora" in n]
    assert of_loop_1 and not only.keys() & set(of_loop_1)
    assert any(".layers.1." in n and only[n].any() for n in only)


def test_accumulated_parts_are_one_batch() -> None:
    model, teacher, inputs = recursive(), small_llama(), batch(rows=4)
    wanted = grads_of(model, teacher, inputs)
    count = int((inputs["labels"][:, 1:] != -100).sum())
    for half in (slice(0, 2), slice(2, 4)):
        part = {key: value[half] for key, value in inputs.items()}
        uptrain_loss(model, teacher, part, num_items=count, **OPTIONS).total.backward()
    torch.testing.assert_close(gradients(model), wanted)


@pytest.mark.parametrize(
    ("dtype", "reentrant"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=str,
)
def test_checkpointed_activations_give_the_same_gradients(
    dtype: torch.dtype, reentrant: bool
) -> None:
    model, teacher, inputs = recursive().to(dtype), small_llama().to(dtype), batch()
    model.enable_input_require_grads()
    wanted = grads_of(model, teacher, inputs)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    exact = {} if reentrant else {"rtol": 0, "atol": 0}  # it sums in another order
    torch.testing.assert_close(grads_of(model, teacher, inputs), wanted, **exact)


def test_all_gradients_pass_through_ddp(one_rank_group: None) -> None:
    # Norm and head run outside the wrapper too: what they add must be in what DDP reduces.
    model, teacher, inputs = recursive(), small_llama(), batch()
    wanted = grads_of(model, teacher, inputs)
    wrapped = nn.parallel.DistributedDataParallel(model)

    def doubled(state: object, bucket: torch.distributed.GradBucket) -> Any:
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer() * 2)
        return future

    doubled.__annotations__["return"] = torch.futures.Future[Tensor]

    wrapped.register_comm_hook(None, doubled)
    uptrain_loss(wrapped, teacher, inputs, **OPTIONS).total.backward()
    found = gradients(model)
    torch.testing.assert_close(found, {name: 2 * value for name, value in wanted.items()})


def test_a_model_that_leaves_out_hooks_is_refused(monkeypatch: Any) -> None:
    # As torch.compile does, by default, with hooks that come after the first call.
    model, inputs = recursive(), batch()
    for index in (1, 3):
        layer = model.model.layers[index]
        nothing = layer.register_forward_hook(lambda *arguments: None)
        monkeypatch.setattr(layer, "register_forward_hook", lambda hook, handle=nothing: handle)
    with pytest.raises(ValueError, match=r"its 2 loops, got 0; .*skip_nnmodule_hook_guards"):
        uptrain_loss(model, small_llama(), inputs, **OPTIONS)
    with pytest.raises(ValueError, match="the states of its 2 loops, got 0"):
        lr.recursive.loop_logits(model, input_ids=inputs["input_ids"])


def test_autocast_in_bfloat16_is_near_float32() -> None:
    model, teacher, inputs = recursive(), small_llama(), batch()
    wanted = uptrain_loss(model, teacher, inputs, **OPTIONS).total
    with torch.autocast("cpu", torch.bfloat16):
        found = uptrain_loss(model, teacher, inputs, **OPTIONS)
    assert found.total.dtype is torch.float32
    torch.testing.assert_close(found.total, wanted, rtol=2e-2, atol=1e-3)
    found.total.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_nothing_of_the_teacher_outlives_the_step() -> None:
    model, teacher, inputs = recursive(), small_llama(), batch()
    kept = []
    hook = teacher.lm_head.register_forward_hook(
        lambda module, args, output: kept.append((weakref.ref(output), output.requires_grad))
    )
    result = uptrain_loss(model, teacher, inputs, **OPTIONS)
    result.total.backward()
    hook.remove()
    loss = result.total.detach()
    del result
    gc.collect()
    assert [(ref(), needs) for ref, needs in kept] == [(None, False)]
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": small_llama()}, TypeError, "model must be recursive"),
        ({"teacher": None}, ValueError, "teacher must be given .* got loss='kl' without one"),
        ({"loss": "ce"}, ValueError, "teacher must be given .* got loss='ce' with one"),
        ({"loss": "mse"}, ValueError, "loss must be one of"),
        ({"coefficients": (0.1, 0.1, 1.0)}, ValueError, "a number or one for each of the 2 loops"),
        ({"inputs": {"input_ids": torch.ones(1, 2)}}, ValueError, "inputs must hold labels"),
    ],
)
def test_wrong_arguments(options: Any, error: type[Exception], message: str) -> None:
    given = {"model": recursive(), "teacher": small_llama(), "inputs": batch(), **options}
    with pytest.raises(error, match=f"^uptrain_loss: .*{message}"):
        uptrain_loss(given.pop("model"), given.pop("teacher"), given.pop("inputs"), **given)


def test_what_does_not_fit_the_model() -> None:
    model, other = recursive(), copy.deepcopy(small_llama())
    for size in (VOCABULARY + 1, 3):  # of the smaller one no token may be looked up
        other.resize_token_embeddings(size)
        with pytest.raises(ValueError, match=f"vocabulary of {VOCABULARY} tokens, got {size}"):
            uptrain_loss(model, other, batch())
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="no loss of its own beside"):
        uptrain_loss(model, small_llama(), batch())


# ----------------------------------------------------------------------------------- Trainer


class Uptrainer(lr.recursive.RecursiveTrainerMixin, Trainer):
    """As a user writes it."""


def rows(count: int) -> list[dict[str, Tensor]]:
    return [{name: t[0] for name, t in batch(rows=2).items()} for _ in range(count)]


def arguments(tmp_path: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return TrainingArguments(**{**defaults, **options})


def stacked(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_of_the_trainer_is_a_step_of_the_plain_loop(
    tmp_path: Path, accumulated: int
) -> None:
    teacher, data = small_llama(), rows(2 * accumulated)
    data[0]["labels"][2:] = -100  # batches with different numbers of tokens
    model = recursive()
    plain = copy.deepcopy(model)
    wanted = uptrain_loss(plain, teacher, stacked(data), **OPTIONS).total
    wanted.backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    args = arguments(tmp_path, gradient_accumulation_steps=accumulated, seed=0)
    trainer = Uptrainer(model, args, train_dataset=data, teacher=teacher.train(), exits=0.3)
    trainer.train()
    assert not teacher.training
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(wanted.item(), rel=1e-3)]


def test_exits_in_a_bfloat16_trainer_run_the_tail_alone(tmp_path: Path, monkeypatch: Any) -> None:
    # accelerate puts a forward of its own on the model: the exits must not run all layers again.
    from lowrank_ext.methods.recursive import uptraining

    taken: list[tuple[Tensor, Tensor]] = []
    exit_logits = uptraining.exit_logits

    def noted(inner: Any, state: Tensor) -> Tensor:
        taken.append((exit_logits(inner, state), inner.lm_head(inner.model.norm(state))))
        return taken[-1][0]

    monkeypatch.setattr(uptraining, "exit_logits", noted)
    args = arguments(tmp_path, bf16=True)
    options = {"train_dataset": rows(2), "teacher": small_llama(), "exits": 0.3}
    Uptrainer(recursive(), args, **options).train()
    ((found, wanted),) = taken
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, wanted)


def test_exits_rise_and_evaluation_is_cross_entropy(tmp_path: Path, monkeypatch: Any) -> None:
    from lowrank_ext.methods.recursive import uptraining

    seen = []
    loop_loss = uptraining.loop_loss

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(options.get("coefficients"))
        return loop_loss(*args, **options)

    monkeypatch.setattr(uptraining, "loop_loss", noted)
    model, data = recursive(), rows(4)
    args = arguments(tmp_path, max_steps=3, activation_checkpointing=True)
    trainer = Uptrainer(
        model, args, train_dataset=data, eval_dataset=data[:2], loss="ce", exits=0.4, exit_warm_up=2
    )
    trainer.train()
    assert seen == [pytest.approx((c, 1.0)) for c in (0.2, 0.4, 0.4)]
    found = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        assert found == pytest.approx(model.eval()(**stacked(data[:2])).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "lk"}, ValueError, "loss must be one of"),
        ({"loss": "kl"}, ValueError, "teacher must be given"),
        ({"exits": -1.0}, ValueError, "earlier must be at least 0"),
        ({"exits": (0.1, 0.1)}, ValueError, "earlier must have an entry"),
        ({"exit_warm_up": -1}, ValueError, "warm_up must be at least 0"),
        ({"compute_loss_func": print}, ValueError, "compute_loss_func must be left out"),
        ({"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor must be 0"),
        ({"model": small_llama()}, TypeError, "model must be recursive"),
    ],
)
def test_the_trainer_refuses(
    tmp_path: Path, options: Any, error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"model": recursive(), "loss": "ce", **options}
    smoothing = given.pop("label_smoothing_factor", 0.0)
    args = arguments(tmp_path, label_smoothing_factor=smoothing)
    with pytest.raises(error, match=message):
        Uptrainer(args=args, train_dataset=rows(2), **given)


def test_several_devices_in_one_process_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = Uptrainer(recursive(), arguments(tmp_path), train_dataset=rows(2), loss="ce")
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    with pytest.raises(RuntimeError, match="start it with torchrun"):
        trainer.training_step(trainer.model, batch())
