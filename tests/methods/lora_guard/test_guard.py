"""GuardModel: the base's bits for rows that generate, LoRA and a head for rows to judge."""

import copy
import gc
import hashlib
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lowrank_ext as lr
from lowrank_ext.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from lowrank_ext.methods.lora_guard import GuardLoss, GuardModel, last_token_index
from lowrank_ext.methods.lora_guard.files import HEAD_NAME
from lowrank_ext.nn import MultiLoRALinear

VOCABULARY, HIDDEN, EOS, LENGTH = 97, 32, 2, 9
RIGHT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8, [1] * 8 + [0]])
MASKS = {"none": None, "right": RIGHT, "left": RIGHT.flip(1)}
MIXED = [True, False, True, False]
FILES = {CONFIG_NAME, WEIGHTS_NAME, HEAD_NAME}


def llama(
    dtype: torch.dtype = torch.float32, hidden_size: int = HIDDEN, num_layers: int = 2
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=EOS,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=HIDDEN, n_layer=2, n_head=2,
        bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def trained(base: nn.Module, **options: Any) -> GuardModel:
    """A guard whose lora_b has values that training could give."""
    options = {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"], "num_categories": 3} | options
    model = GuardModel(base, **options)
    for module in adapted(model):
        nn.init.normal_(module.lora_b, std=0.3)
    return model


def adapted(model: nn.Module) -> list[MultiLoRALinear]:
    return [module for module in model.modules() if isinstance(module, MultiLoRALinear)]


def tokens(num_rows: int = 4, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (num_rows, length))


def gradients(model: GuardModel) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def logits(model: GuardModel, *args: Any, **options: Any) -> Tensor:
    """Unsafe and category logits, [G, 1 + C]."""
    return torch.cat(model(*args, **options)[:2], dim=1)


def assert_same(found: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], value, **tolerance)


# ------------------------------------------------------------------------------- the base's bits


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_that_generate_are_the_base_bit_for_bit(
    device: str, dtype: torch.dtype, mask: str
) -> None:
    base, ids = llama(dtype).to(device), tokens().to(device)
    options = {"attention_mask": None if MASKS[mask] is None else MASKS[mask].to(device)}
    with torch.no_grad():
        expected = base(input_ids=ids, **options).logits
        model = trained(base)
        assert torch.equal(base(input_ids=ids, **options).logits, expected)
        for rows in (MIXED, [False] * 4, [True, True, True, False]):
            output = model(ids, rows=rows, **options)
            plain = [not judge for judge in rows]
            assert torch.equal(output.lm_output.logits[plain], expected[plain])
            assert output.unsafe_logits.shape == (sum(rows), 1)
            assert output.category_logits.shape == (sum(rows), 3)
            if any(rows):
                assert not torch.equal(output.lm_output.logits[rows], expected[rows])


def test_minus_zero_stays() -> None:
    class MinusZero(nn.Module):
        in_features, out_features = HIDDEN, HIDDEN

        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, -0.0)

    base = llama()
    base.model.layers[1].self_attn.q_proj = MinusZero()
    model, signs = trained(base, targets=[r"layers.1.self_attn.q_proj"]), []
    (module,) = adapted(model)
    module.register_forward_hook(lambda m, args, output: signs.append(output.signbit()))
    model(tokens(), rows=MIXED)
    assert signs[0][[1, 3]].all() and not signs[0][[0, 2]].all()


@pytest.mark.parametrize("sample", [False, True])
def test_generate_is_the_base_s(sample: bool) -> None:
    options = {
        "input_ids": tokens(),
        "attention_mask": MASKS["left"],
        "max_new_tokens": 8,
        "do_sample": sample,
    }

    def run(generate: Callable[..., Any]) -> Any:
        torch.manual_seed(5)
        return generate(**options, output_logits=True, return_dict_in_generate=True)

    base = llama().requires_grad_(False)  # with weights that train torch takes other products
    expected, model = run(base.generate), trained(base)
    found = run(model.generate)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.logits, expected.logits))


def test_a_mixed_batch_starts_an_answer() -> None:
    """The cache of a mixed batch goes on as the plain model's does."""
    base, ids, step = llama(), tokens(), torch.full((4, 1), 7)
    with torch.no_grad():
        first = base(input_ids=ids, use_cache=True)
        expected = base(input_ids=step, past_key_values=first.past_key_values).logits
        output = trained(base)(ids, rows=MIXED, use_cache=True).lm_output
        found = base(input_ids=step, past_key_values=output.past_key_values).logits
    assert torch.equal(found[[1, 3]], expected[[1, 3]])


def test_the_base_is_never_written_to() -> None:
    base = llama(torch.bfloat16)
    before = {name: (p.data_ptr(), p.clone()) for name, p in base.named_parameters()}
    model, labels = trained(base), torch.eye(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        output = model.train()(tokens(), rows=MIXED)
        GuardLoss(labels)(*output[:2], labels[:2]).backward()
        optimizer.step()
    after = dict(base.named_parameters())
    for name, (address, value) in before.items():
        assert after[name].data_ptr() == address and torch.equal(after[name], value)
        assert after[name].grad is None and after[name].dtype == torch.bfloat16


def test_unload_gives_the_base_back() -> None:
    base, ids = llama(), tokens()
    modules, keys, expected = list(base.modules()), list(base.state_dict()), base(ids).logits
    model = trained(base)
    assert model.unload() is base
    assert list(base.modules()) == modules and list(base.state_dict()) == keys
    assert not base.base_model._forward_hooks
    assert torch.equal(base(ids).logits, expected)
    trained(base)


# ------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize("build", [llama, gpt2])
def test_logits_by_hand(build: Callable[[], nn.Module]) -> None:
    """The head on the final hidden state of PEFT's model with the same adapter."""
    targets = ["q_proj", "v_proj"] if build is llama else ["c_attn"]
    model, ids = trained(build(), targets=targets), tokens()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=build is gpt2
    )
    other = peft.get_peft_model(build(), config).eval()
    with torch.no_grad():
        for path, module in model._adapted().items():
            twin = other.get_submodule(f"base_model.model.{path}")
            twin.lora_A["default"].weight.copy_(module.lora_a[0])
            twin.lora_B["default"].weight.copy_(module.lora_b[0])
        hidden = other.base_model.model.base_model(input_ids=ids).last_hidden_state[:, -1]
        expected = hidden @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(logits(model, ids), expected)
    unsafe, categories, nothing = model.guard(ids)
    torch.testing.assert_close(torch.cat([unsafe, categories], 1), expected)
    assert nothing is None


def test_it_starts_at_the_base() -> None:
    base, ids = llama(), tokens()
    hidden = base.base_model(input_ids=ids).last_hidden_state[:, -1]
    torch.manual_seed(3)
    model = GuardModel(base, 4, 8, ("q_proj", "v_proj"), 3)
    assert torch.equal(logits(model, ids), model.head(hidden))
    assert not model.head.bias.any() and model.head.weight.abs().max() <= (6 / (HIDDEN + 4)) ** 0.5
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    theirs = dict(peft.get_peft_model(llama(), config).named_parameters())
    torch.manual_seed(3)
    for path, module in GuardModel(llama(), 4, 8, ("q_proj", "v_proj"), 3)._adapted().items():
        key = f"base_model.model.{path}.lora_A.default.weight"
        assert torch.equal(module.lora_a[0], theirs[key]) and not module.lora_b.any()


def test_modes_are_kept() -> None:
    base = llama().train()
    base.model.layers[1].eval()
    modes = [module.training for module in base.modules()]
    model = trained(base)
    assert model.training and model.head.training
    assert [m.training for m in model.unload().modules()] == modes
    assert not trained(llama()).training and not trained(llama()).head.training


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[1, 1, 1]], [2]),
        ([[1, 1, 0], [1, 0, 0]], [1, 0]),
        ([[0, 0, 1], [0, 1, 1]], [2, 2]),
        ([[0, 1, 0], [1, 0, 1]], [1, 2]),
        ([[0, 0, 0]], [-1]),
        ([[True, False]], [0]),
        ([[0.5, 0.0]], [0]),
    ],
)
def test_last_token_index(mask: list[list[Any]], expected: list[int]) -> None:
    assert last_token_index(torch.tensor(mask)).tolist() == expected


@pytest.mark.parametrize("build", [llama, gpt2])
def test_padding_changes_nothing(build: Callable[[], nn.Module]) -> None:
    """On either side, with the end-of-text id as padding and inside of the texts."""
    model = trained(build(), targets=["q_proj"] if build is llama else ["c_attn"])
    texts = [[5, EOS, 9, EOS], [EOS], [7, 8, 9, 10, 11, EOS], [4, 4]]
    alone = torch.cat([logits(model, torch.tensor([text])) for text in texts])
    for side in ("right", "left"):
        ids, mask = torch.full((4, 7), EOS), torch.zeros(4, 7, dtype=torch.int64)
        for row, text in enumerate(texts):
            where = slice(0, len(text)) if side == "right" else slice(7 - len(text), 7)
            ids[row, where], mask[row, where] = torch.tensor(text), 1
        torch.testing.assert_close(logits(model, ids, mask), alone)
        torch.testing.assert_close(logits(model, ids, mask.bool()), alone)
        if build is llama:  # its positions are relative, so a mixed batch needs none
            mixed = logits(model, ids, mask, rows=[True, True, True, False])
            torch.testing.assert_close(mixed, alone[:3])


def test_a_row_without_a_real_token(device: str) -> None:
    model, ids = trained(llama().to(device)), tokens().to(device)
    mask = torch.ones_like(ids)
    mask[2] = 0
    if device == "cpu":
        with pytest.raises(ValueError, match=r"must have a real token in each row .* in row 2"):
            model.guard(ids, mask)
    else:
        assert logits(model, ids, mask).isnan().any(1).tolist() == [False, False, True, False]
    assert logits(model, ids, mask, rows=[True, True, False, True]).isfinite().all()


def test_no_rows() -> None:
    model, empty = trained(llama()), torch.zeros(0, 5, dtype=torch.int64)
    for output in (model.guard(empty), model.guard(empty, empty), model(empty, rows=[])):
        assert output.unsafe_logits.shape == (0, 1) and output.category_logits.shape == (0, 3)
    loss = GuardLoss(torch.eye(3))(*output[:2], torch.zeros(0, 3))
    loss.backward()
    assert loss == 0


def test_without_an_unsafe_head() -> None:
    model = trained(llama(), unsafe_head=False)
    assert model.head.out_features == 3
    unsafe, categories, _ = model.guard(tokens())
    assert torch.equal(unsafe, categories.amax(1, keepdim=True))


def test_two_runs_have_the_same_bits() -> None:
    model, ids = trained(llama(), dropout=0.3).train(), tokens()
    found = []
    for _ in range(2):
        torch.manual_seed(2)
        scores = logits(model, ids, rows=MIXED)
        scores.square().sum().backward()
        found.append({"logits": scores.detach()} | gradients(model))
    assert_same(found[1], found[0], rtol=0, atol=0)
    assert not torch.equal(logits(model, ids), logits(model.eval(), ids)), "dropout is drawn"


def test_strided_and_odd_inputs() -> None:
    model, ids = trained(llama()), tokens(3, 13)
    expected = logits(model, ids[:, 1::2].contiguous())
    torch.testing.assert_close(logits(model, ids[:, 1::2]), expected)
    torch.testing.assert_close(logits(model, ids[:, 1::2].int(), torch.ones(3, 6)), expected)
    one = ids[:1, :1].expand(2, 1)
    torch.testing.assert_close(logits(model, one)[0], logits(model, ids[:1, :1])[0])


def test_autocast() -> None:
    model, ids = trained(llama()), tokens()
    expected = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, ids, rows=[True] * 4)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("adapter_dtype", ["base", "float32"])
def test_adapter_dtypes(dtype: torch.dtype, adapter_dtype: str) -> None:
    model = trained(llama(dtype), adapter_dtype=adapter_dtype)
    is_low = dtype == torch.bfloat16
    expected = torch.float32 if is_low and adapter_dtype == "float32" else dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    model.guard(tokens()).unsafe_logits.sum().backward()


def test_threads_do_not_mix() -> None:
    model, wrong = trained(llama()), []
    batches = [tokens() for _ in range(3)]
    masks = [MIXED, [False, True, True, True], [True, False, False, False]]
    expected = [
        logits(model, ids, rows=rows).detach() for ids, rows in zip(batches, masks, strict=True)
    ]
    barrier = threading.Barrier(3)

    def work(index: int) -> None:
        barrier.wait()
        for _ in range(5):
            found = logits(model, batches[index], rows=masks[index])
            if not torch.allclose(found, expected[index], atol=1e-5):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_of_a_forward_is_kept() -> None:
    import weakref

    model, alive = trained(llama()), []
    model.backbone.register_forward_hook(
        lambda m, args, output: alive.append(weakref.ref(output.last_hidden_state))
    )
    with torch.no_grad():
        model(tokens(), rows=MIXED)
    gc.collect()
    assert len(alive) == 1 and alive[0]() is None


# ------------------------------------------------------------------------------------ training


def test_gradients_reach_adapters_and_head_alone() -> None:
    model, labels = trained(llama()), torch.eye(4, 3)
    output = model(tokens(), rows=MIXED)
    loss = GuardLoss(labels)(*output[:2], labels[[0, 2]])
    (loss + output.lm_output.logits.detach().sum()).backward()
    for name, gradient in gradients(model).items():
        trains = "lora_" in name or name.startswith("head.")
        assert (gradient is not None and bool(gradient.any())) is trains, name
    expected = sum(m.lora_a.numel() + m.lora_b.numel() for m in adapted(model)) + 4 * (HIDDEN + 1)
    assert lr.trainable_parameters(model).trainable == expected


def test_base_rows_take_no_part_in_gradients() -> None:
    """To the bit: whatever stands in them. And the others' are those of a batch of their own."""
    model, ids = trained(llama()), tokens()
    found = []
    for _ in range(2):
        ids[[1, 3]] = tokens(2)
        logits(model, ids, MASKS["right"], rows=MIXED).square().sum().backward()
        found.append(gradients(model))
    assert_same(found[1], found[0], rtol=0, atol=0)
    logits(model, ids[[0, 2]], MASKS["right"][[0, 2]]).square().sum().backward()
    assert_same(gradients(model), found[0], rtol=1e-4, atol=1e-6)
    assert model(ids, rows=[False] * 4).lm_output.logits.grad_fn is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rows", [None, MIXED], ids=["judged", "mixed"])
def test_activation_checkpointing(rows: list[bool] | None, reentrant: bool, dropout: float) -> None:
    """Backward comes after the rows block, and runs in another thread too."""
    model, ids = trained(llama(), dropout=dropout).train(), tokens()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_checkpointing(use_reentrant=reentrant)
        torch.manual_seed(6)
        loss = logits(model, ids, rows=rows).square().sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        found.append(gradients(model))
    assert_same(found[1], found[0], rtol=0, atol=0)
    copied = copy.deepcopy(model)
    copied.disable_checkpointing()
    assert not copied.base_lm.get_input_embeddings()._forward_hooks
    assert [m.base_lm.model.layers[0].gradient_checkpointing for m in (model, copied)] == [1, 0]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_forgets_the_rows_raises(reentrant: bool) -> None:
    model = trained(llama()).train()
    model.base_lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.base_lm.enable_input_require_grads()
    loss = logits(model, tokens()).sum()
    with pytest.raises(RuntimeError, match=r"must run a module again inside the rows block"):
        loss.backward()


def test_compiled_once_for_all_batches() -> None:
    """Once for judged batches and once for mixed ones, which the base's forward passes on."""
    model = trained(llama(num_layers=1))
    plain = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounter()
    model.backbone.forward = torch.compile(
        model.backbone.forward, backend=counter, fullgraph=True, dynamic=True
    )
    for rows in (None, MIXED):
        counts = []
        for num_rows, length in ((4, 9), (2, 5), (6, 12)):
            ids = tokens(num_rows, length)
            options = {} if rows is None else {"rows": (rows * 2)[:num_rows], "use_cache": False}
            found, expected = logits(model, ids, **options), logits(plain, ids, **options)
            torch.testing.assert_close(found, expected)
            found.square().sum().backward()
            expected.square().sum().backward()
            assert_same(gradients(model), gradients(plain), rtol=1e-3, atol=1e-5)
            counts.append(counter.frame_count)
        assert counts == [counts[0]] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied: Callable[[GuardModel], GuardModel]) -> None:
    model, ids = trained(llama()), tokens()
    expected, base = logits(model, ids, rows=MIXED), model(ids, rows=[False] * 4).lm_output.logits
    other = copied(model)
    assert torch.equal(logits(other, ids, rows=MIXED), expected)
    with torch.no_grad():
        other.head.weight.zero_()
        adapted(other)[0].lora_b.zero_()
    assert torch.equal(logits(model, ids, rows=MIXED), expected)
    with model.bank.rows(["guard"] * 4):  # a block of the one is none of the other's
        assert torch.equal(other.base_lm(ids).logits, base)
    assert torch.equal(other.unload()(ids).logits, base)
    assert len(adapted(model)) == 4


def test_state_dict() -> None:
    model, other, ids = (
        trained(llama()),
        GuardModel(llama(), 4, 8, ["q_proj", "v_proj"], 3),
        tokens(),
    )
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(one_process_group: None) -> None:
    model, ids = trained(llama()), tokens()
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    for run in (model, wrapped):
        for rows in (None, MIXED):
            torch.cat(run(ids, rows=rows)[:2], dim=1).square().sum().backward()
    assert_same(gradients(wrapped.module), gradients(model), rtol=1e-5, atol=1e-6)


def test_it_learns() -> None:
    """Texts that contain a word are of one category, those that contain another of the second."""
    model = GuardModel(llama(), 4, 8, ("q_proj", "v_proj"), 2).train()
    ids = torch.randint(10, VOCABULARY, (48, LENGTH))
    labels = torch.zeros(48, 2)
    for row in range(48):
        if row % 3:
            ids[row, row % 7], labels[row, row % 3 - 1] = 4 + row % 3, 1
    criterion = GuardLoss(labels)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(40):
        criterion(*model.guard(ids)[:2], labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    unsafe, categories, _ = model.eval().guard(ids)
    assert lr.guard.average_precision(labels.any(1), unsafe[:, 0]) > 0.95
    for column in range(2):
        assert lr.guard.average_precision(labels[:, column], categories[:, column]) > 0.9


# ------------------------------------------------------------------------------------ reporting


def test_overhead() -> None:
    model, base = trained(llama()), sum(p.numel() for p in llama().parameters())
    lora = 2 * 4 * ((32 + 32) + (32 + 16))  # q is 32 -> 32 and v 32 -> 16, in two layers
    assert model.overhead() == (base, lora, 4 * 33, base / (lora + 4 * 33))
    assert model.summary().row_count == 4
    assert [list(column.cells)[3] for column in model.summary().columns][:2] == [
        "guard in all",
        f"{lora + 4 * 33:,}",
    ]


# ------------------------------------------------------------------------------------ the files


def test_save_and_load(tmp_path: Path) -> None:
    model, ids = trained(llama(), category_names=["a", "b", "c"], dropout=0.1), tokens()
    model.save_pretrained(tmp_path / "guard")
    assert {path.name for path in (tmp_path / "guard").iterdir()} == FILES
    assert sum(path.stat().st_size for path in (tmp_path / "guard").iterdir()) < 20_000
    base = llama()
    state = torch.get_rng_state()
    again = GuardModel.from_pretrained(base, tmp_path / "guard")
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert torch.equal(logits(again, ids, rows=MIXED), logits(model, ids, rows=MIXED))
    assert again.head_options == model.head_options
    assert again.lora_config.dropout == 0.1 == adapted(again)[0].dropout
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    again.save_pretrained(tmp_path / "again")
    for name in FILES:
        first, second = (tmp_path / where / name for where in ("guard", "again"))
        assert first.read_bytes() == second.read_bytes(), name
    frozen = GuardModel.from_pretrained(llama(), tmp_path / "guard", trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_peft_reads_the_adapter(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    model = trained(build(), targets=["q_proj", "v_proj"] if build is llama else ["c_attn"])
    ids = tokens()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    with model.bank.rows(["guard"] * 4):
        torch.testing.assert_close(theirs(ids).logits, model.base_lm(ids).logits)
    bank = lr.AdapterBank(build())
    bank.load("guard", tmp_path)


def test_a_head_of_another_adapter_is_refused(tmp_path: Path) -> None:
    trained(llama()).save_pretrained(tmp_path)
    lr.save_adapter(lr.adapt(llama(), lr.LoRAConfig(r=4, target_modules=["q_proj"])), tmp_path)
    assert_refused(llama(), tmp_path, "must belong to the adapter beside it")


def assert_refused(
    base: nn.Module, path: Path, message: str, error: type[Exception] = ValueError
) -> None:
    before = list(base.modules())
    with pytest.raises(error, match=f"^GuardModel.from_pretrained: .*{message}"):
        GuardModel.from_pretrained(base, path)
    assert list(base.modules()) == before
    assert all(p.requires_grad for p in base.parameters())


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    trained(llama()).save_pretrained(tmp_path)
    assert_refused(llama(hidden_size=16), tmp_path, r"q_proj.lora_A.weight must be \[4, 16\]")
    assert_refused(gpt2(), tmp_path, "must belong to a linear module")


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_and_damaged_files(tmp_path: Path, name: str) -> None:
    trained(llama()).save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert_refused(llama(), tmp_path, f"{name}")
    (tmp_path / name).unlink()
    assert_refused(llama(), tmp_path, f"{name} does not exist", FileNotFoundError)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "metadata lowrank_ext_guard must be a JSON object, got None"),
        ("[1]", "metadata lowrank_ext_guard must be a JSON object"),
        ('{"adapter_sha256": "%s"}', "metadata lowrank_ext_guard: .*num_categories"),
        ('{"adapter_sha256": "%s", "num_categories": 0}', "num_categories must be at least 1"),
        ('{"adapter_sha256": "%s", "num_categories": 3, "more": 1}', "unexpected keyword .*more"),
        ('{"adapter_sha256": "%s", "num_categories": 5}', r"must hold .*\[6, 32\].* got"),
        ('{"num_categories": 3}', "must belong to the adapter beside it"),
    ],
)
def test_heads_that_say_something_else(tmp_path: Path, metadata: str | None, message: str) -> None:
    trained(llama()).save_pretrained(tmp_path)
    digest = hashlib.sha256((tmp_path / WEIGHTS_NAME).read_bytes()).hexdigest()
    described = None if metadata is None else {"lowrank_ext_guard": metadata.replace("%s", digest)}
    save_file(load_file(tmp_path / HEAD_NAME), tmp_path / HEAD_NAME, described)
    assert_refused(llama(), tmp_path, message)


@pytest.mark.parametrize("renames", range(6))
def test_an_interrupted_save_leaves_the_old_or_the_new_guard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """The process dies before the n-th rename: all three files are still of one save."""
    ids, old = tokens(), trained(llama())
    new = trained(llama(), num_categories=2)
    old.save_pretrained(tmp_path)
    replace, left = Path.replace, iter([True] * renames)

    class Died(BaseException):
        pass

    def until_death(self: Path, target: Path) -> Path:
        if not next(left, False):
            raise Died
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", until_death)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # as SIGKILL leaves it
        if renames < 5:
            with pytest.raises(Died):
                new.save_pretrained(tmp_path)
        else:
            new.save_pretrained(tmp_path)
    # Two companions wait, then the weights are renamed: that is the commit.
    expected = new if renames >= 3 else old
    found = GuardModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(found, ids), logits(expected, ids))
    old.save_pretrained(tmp_path)
    found = GuardModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(found, ids), logits(old, ids))


def test_a_full_disk_leaves_the_old_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, ids = trained(llama()), tokens()
    old.save_pretrained(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            trained(llama(), num_categories=2).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert torch.equal(logits(GuardModel.from_pretrained(llama(), tmp_path), ids), logits(old, ids))


# ------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "GuardModel: r must be at least 1, got 0"),
        ({"r": 2.5}, TypeError, "GuardModel: r must be an int, got 2.5"),
        ({"alpha": -1}, ValueError, "GuardModel: alpha must be positive and finite, got -1"),
        ({"dropout": 1.5}, ValueError, "GuardModel: dropout must be between 0 and 1, got 1.5"),
        ({"num_categories": 0}, ValueError, "GuardModel: num_categories must be at least 1, got 0"),
        ({"num_categories": 1, "unsafe_head": False}, ValueError, "must be at least 2 without an"),
        ({"unsafe_head": 1}, TypeError, "GuardModel: unsafe_head must be a bool, got 1"),
        ({"category_names": ["a"]}, ValueError, "must be num_categories=3 different names, got"),
        ({"category_names": ["a", "b", "a"]}, ValueError, "must be num_categories=3 different"),
        ({"category_names": ["a", "b", ""]}, TypeError, "must hold non-empty strings"),
        ({"targets": ["q_porj"]}, ValueError, "GuardModel: target_modules must match .*q_proj"),
        ({"targets": ["self_attn"]}, ValueError, "GuardModel: target_modules must name linear"),
        ({"adapter_dtype": "float16"}, ValueError, "adapter_dtype must be 'base', 'float32' or"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    base = llama()
    modules = list(base.modules())
    options = {"num_categories": 3} | options
    with pytest.raises(error, match=message):
        GuardModel(base, **options)
    assert list(base.modules()) == modules and all(p.requires_grad for p in base.parameters())
    assert not base.base_model._forward_hooks


def test_wrong_models() -> None:
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11)
    )
    with pytest.raises(
        ValueError, match="base_lm must be a decoder alone, got the encoder-decoder"
    ):
        GuardModel(encoder_decoder, targets=["q"])
    for wrong in (nn.Linear(3, 3), llama().base_model, "model"):
        with pytest.raises(TypeError, match="base_lm must be a causal language model of transform"):
            GuardModel(wrong)
    with torch.device("meta"):
        on_meta = LlamaForCausalLM(llama().config)
    with pytest.raises(ValueError, match="base_lm must hold values, got meta tensors"):
        GuardModel(on_meta)
    config = lr.LoRAConfig(r=2)
    for carries in (lr.adapt(llama(), config), trained(llama()).base_lm):
        with pytest.raises(ValueError, match="GuardModel: base_lm must carry no adapters, got a"):
            GuardModel(carries)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.zeros(3)}, ValueError, r"input_ids must be integers \[B, T\]"),
        ({"input_ids": tokens(2)[0]}, ValueError, r"input_ids must be integers .* \[9\]"),
        (
            {"input_ids": tokens()[:, :0]},
            ValueError,
            r"input_ids .* T > 0, got .* \[4, 0\]",
        ),
        (
            {"attention_mask": torch.ones(4, 8)},
            ValueError,
            r"attention_mask must be \[4, 9\] .*8\]",
        ),
        ({"rows": [True]}, ValueError, "rows must have 4 entries, .* got 1"),
        ({"rows": [1, 0, 1, 0]}, TypeError, "rows must hold bools"),
        ({"rows": torch.ones(4)}, TypeError, "rows must hold bools"),
    ],
)
def test_wrong_inputs(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = trained(llama())
    with pytest.raises(error, match=f"GuardModel: {message}"):
        model(**({"input_ids": tokens()} | arguments))


def test_what_needs_adapters_of_adapt_refuses(tmp_path: Path) -> None:
    model = trained(llama())
    for call in (lr.merge, lr.unmerge, lr.unload, lr.summary):
        with pytest.raises(ValueError, match=r"got a MultiLoRALinear at .*never become a part"):
            call(model)
    with pytest.raises(ValueError, match="got a MultiLoRALinear"):
        lr.save_adapter(model.base_lm, tmp_path / "nothing")
    with pytest.raises(ValueError, match="must not be adapted yet, got a MultiLoRALinear"):
        lr.adapt(model.base_lm, lr.LoRAConfig(r=2))
    assert not (tmp_path / "nothing").exists()
