"""A recursive model does what its source's class does: it generates, trains in Trainer, is copied,
pickled, cast, compiled, distributed and adapted."""

import copy
import io
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from decoders import VOCABULARY, checkpoint_activations, decoder, tokens
from distributed_cases import end_worker
from snapshots import bits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

import lowrank_ext as lr
from lowrank_ext.methods.recursive import RecursiveConfig, convert, loop_logits, unshare


def recursive(rank: int = 3, num_loops: int = 2, **options: Any) -> Any:
    return convert(decoder(**options), RecursiveConfig(num_loops=num_loops, rank=rank))


def check_tied(model: Any) -> None:
    layers = model.model.layers
    for name, parameter in layers[0].named_parameters():
        if "lora" not in name:
            assert layers[2].get_parameter(name) is parameter, name
    assert layers[0].mlp.up_proj.lora_a is not layers[2].mlp.up_proj.lora_a


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=True, temperature=0.8, top_k=9),
        dict(num_beams=3, do_sample=False, num_return_sequences=2),
        dict(do_sample=False, cache_implementation="static", disable_compile=True),
        dict(do_sample=False, use_cache=False),
    ],
    ids=["sampling", "beams", "static cache", "no cache"],
)
def test_generate(options: dict[str, Any]) -> None:
    """Rank 0, so that the unshared model has the same bits."""
    model, ids = recursive(0), tokens()
    found = []
    for each in (model, unshare(model)):
        torch.manual_seed(3)
        given = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6)
        found.append(each.generate(ids, **given, **options))
    assert torch.equal(*found)
    assert found[0].shape[1] > ids.shape[1]


def test_cache_has_an_entry_for_each_loop_and_position() -> None:
    model, ids = recursive(), tokens()
    cache = model(ids, use_cache=True).past_key_values
    assert len(cache.layers) == 4
    keys = [layer.keys for layer in cache.layers]
    assert all(not torch.equal(keys[i], keys[j]) for i in range(4) for j in range(i))


class Tokens(Dataset):
    def __init__(self, count: int) -> None:
        self.ids = tokens(count, 6)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(model: Any, path: Path, **options: Any) -> Trainer:
    given: dict[str, Any] = dict(
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=0.02,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    arguments = TrainingArguments(str(path), **{**given, **options})
    data = dict(train_dataset=Tokens(8), eval_dataset=Tokens(3))
    return Trainer(model, arguments, **data)


def state(model: Any) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def test_trainer_resumes_to_the_same_bits(tmp_path: Path) -> None:
    start = recursive()
    whole = copy.deepcopy(start)
    trainer(whole, tmp_path / "run").train()
    assert state(whole) != state(start)
    check_tied(whole)
    resumed = copy.deepcopy(start)
    trainer(resumed, tmp_path / "run").train(str(tmp_path / "run" / "checkpoint-2"))
    assert state(resumed) == state(whole)
    check_tied(resumed)
    saved = lr.recursive.load(tmp_path / "run" / "checkpoint-4")
    assert state(saved) == state(whole)


def test_trainer_loads_the_best(tmp_path: Path) -> None:
    """The rate is so high that the loss grows: the first save is the best one."""
    model = recursive()
    options = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_steps=1)
    run = trainer(
        model, tmp_path, **options, max_steps=3, learning_rate=3.0, lr_scheduler_type="constant"
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-3"
    assert state(lr.recursive.load(best)) == state(model)
    check_tied(model)


def test_label_smoothing_shifts_labels(tmp_path: Path) -> None:
    """Trainer does that for the classes whose name it knows."""
    model = recursive()
    ids = tokens()
    loss = trainer(model, tmp_path, label_smoothing_factor=0.1).compute_loss(
        model, {"input_ids": ids, "labels": ids}
    )
    log_p = model(ids).logits[:, :-1].log_softmax(-1)
    nll = -log_p.gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(loss, 0.9 * nll - 0.1 * log_p.mean())


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_models_of_their_own(copied: Any, family: str) -> None:
    model = convert(decoder(family), RecursiveConfig(num_loops=2)).bfloat16()
    other = copied(model)
    assert type(other) is type(model) and lr.recursive.is_recursive(other)
    assert other.recursive_config == model.recursive_config
    assert state(other) == state(model)
    ids = tokens()
    expected = model(ids, labels=ids)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(model(ids).logits, expected.logits)
    expected.loss.backward()
    assert all(p.grad is None for p in other.parameters())
    other(ids, labels=ids).loss.backward()  # through aliases of its own parameters
    assert all(p.grad is not None for p in other.parameters())


def test_casts_and_state_dicts_keep_ties() -> None:
    model = recursive()
    for cast in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float32),
    ):
        cast(model)
        check_tied(model)
    other = recursive()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    found = model.load_state_dict(other.state_dict())
    assert not found.missing_keys and not found.unexpected_keys
    check_tied(model)
    assert state(model) == state(other)
    model.tie_weights()
    model.resize_token_embeddings(VOCABULARY + 3)
    check_tied(model)
    assert model(tokens()).logits.shape[-1] == VOCABULARY + 3


def test_untied_by_hand_each_layer_has_its_own_weights() -> None:
    """Aliases are made of what is tied still: with and without gradients the same is computed."""
    model = recursive().bfloat16()
    linear = model.model.layers[2].mlp.up_proj
    linear.weight = nn.Parameter(-linear.weight.detach())
    with torch.no_grad():
        expected = model(tokens()).logits
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_near_float32(dtype: torch.dtype) -> None:
    model, ids = recursive(), tokens()
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.to(dtype)(ids, labels=ids).logits
    assert 0 < (logits - exact).abs().max() < 0.15


def test_adapters_over_a_recursive_model(tmp_path: Path) -> None:
    """adapt gives every layer an adapter, so each loop its own, over frozen ties."""
    model, ids = recursive(), tokens()
    expected = model(ids).logits
    lr.adapt(model, lr.LoRAConfig(r=2, target_modules="all-linear"))
    assert torch.equal(model(ids).logits, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 4
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    adapted = model(ids, labels=ids)
    adapted.loss.backward()
    assert all(p.grad is not None for p in trained)
    assert (adapted.logits - expected).abs().max() > 0.01
    lr.save_adapter(model, tmp_path)
    other = lr.load_adapter(recursive(), tmp_path)
    assert torch.equal(other(ids).logits, adapted.logits)
    before = state(model)
    with pytest.raises(TypeError, match=r"merge: .* must compute x weightᵀ \+ bias"):
        lr.merge(model)
    for refused in (unshare, lr.recursive.summary, lr.recursive.DepthwiseEngine):
        with pytest.raises(ValueError, match="model must carry no adapters, got a LoRALinear"):
            refused(model)
    assert state(model) == before
    lr.unload(model, merge=False)
    check_tied(model)
    assert torch.equal(model(ids).logits, expected)


def test_functional_gradients() -> None:
    """torch.func replaces tied parameters everywhere, and differentiates through their aliases."""
    model, ids = recursive().bfloat16(), tokens()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        return torch.func.functional_call(model, parameters, kwargs=inputs).loss

    found = torch.func.grad(loss)(dict(model.named_parameters()))
    loss({}).backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=2**-4 * scale)


def test_adapters_over_a_pure_recursion_are_not_merged_into_ties() -> None:
    model = lr.adapt(recursive(0), lr.LoRAConfig(r=2, target_modules=["up_proj"]))
    before = state(model)
    with pytest.raises(ValueError, match="must be its own, got one tied to"):
        lr.merge(model)
    assert state(model) == before


CASES = [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]


def ddp_gradients(
    rank: int, dtype: torch.dtype, autocast: bool, parallel: bool
) -> dict[str, Tensor]:
    model: Any = recursive(num_loops=4).to(dtype).train()
    if autocast:
        checkpoint_activations(model, reentrant=False)
    wrapped = DistributedDataParallel(model) if parallel else model
    ids = tokens(4, 6)[2 * rank : 2 * rank + 2]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = loop_logits(wrapped, input_ids=ids)
    sum(out.float().logsumexp(-1).mean() for out in outputs).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check_reads(directory: str) -> None:
    """In a process that has converted nothing."""
    unpickled = torch.load(f"{directory}/pickle", weights_only=False)
    loaded = lr.recursive.load(directory)
    assert type(unpickled) is type(loaded) and lr.recursive.is_recursive(loaded)
    assert state(unpickled) == state(loaded) == state(recursive())


def ddp_worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    check_reads(directory)
    store = dist.FileStore(os.path.join(directory, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save([ddp_gradients(rank, *case, True) for case in CASES], f"{directory}/{rank}.pt")
    end_worker()


def test_ddp_on_two_ranks(tmp_path: Path) -> None:
    """Gradients of both ranks are the mean of what each has alone; through loop_logits, too."""
    recursive().save_pretrained(tmp_path)
    torch.save(recursive(), tmp_path / "pickle")
    mp.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, *found in zip(CASES, *ranks, strict=True):
        alone = [ddp_gradients(rank, *case, False) for rank in range(2)]
        tolerance = 1e-5 if case[0] == torch.float32 else 2**-7
        for name, first in alone[0].items():
            mean = (first.float() + alone[1][name].float()) / 2
            assert torch.equal(found[0][name], found[1][name]), name
            scale = math.sqrt(mean.square().max().item())
            own = found[0][name].float()
            torch.testing.assert_close(own, mean, rtol=0, atol=tolerance * scale)
