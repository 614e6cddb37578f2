"""AdapterBank and MultiLoRALinear: a different adapter for each sequence of a batch."""

import asyncio
import copy
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch._dynamo.testing
from module_cases import Int8Linear, negated_linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import lowrank_ext as lr
from lowrank_ext.checkpoint import LoRATensors
from lowrank_ext.nn import LoRALinear, MultiLoRALinear
from lowrank_ext.nn.rows import ACTIVE_ROWS

VOCABULARY, LENGTH = 97, 9
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "everything": {
        "r": 7,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {"down_proj": 5},
    },
    "one layer": {"r": 2, "lora_alpha": 3, "target_modules": r".*layers\.1\.mlp\.down_proj"},
}
MIXED = ["everything", None, "attention", "one layer", "everything"]


def llama(dtype: torch.dtype = torch.float32, hidden_size: int = 32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def with_peft(model: nn.Module, path: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), path).eval()


def save_with_peft(model: nn.Module, path: Path, **config: Any) -> Path:
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    torch.manual_seed(len(path.name))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's files of every checkpoint."""
    where = tmp_path_factory.mktemp("adapters")
    model = llama()
    for name, config in CHECKPOINTS.items():
        save_with_peft(model, where / name, **config)
    return where


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture
def bank(model: LlamaForCausalLM, directory: Path) -> lr.AdapterBank:
    bank = lr.AdapterBank(model)
    for name in CHECKPOINTS:
        bank.load(name, directory / name)
    return bank


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
    assert ACTIVE_ROWS.get() == {}, "a block was left active"


def tokens(num_rows: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (num_rows, length))


def generate(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | options
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def test_each_sequence_as_if_alone(bank: lr.AdapterBank, directory: Path) -> None:
    """Logits and greedy tokens of a mixed batch are PEFT's for each sequence with its adapter."""
    model, ids = bank.model, tokens(len(MIXED))
    with bank.rows(MIXED):
        logits = model(ids).logits
        generated = generate(model, ids)
    bank.close()
    for row, name in enumerate(MIXED):
        alone = model if name is None else with_peft(model, directory / name)
        expected = alone(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(generated[row], generate(alone, ids[row : row + 1])[0])
        if name is not None:
            assert (expected - model(ids[row : row + 1]).logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_without_adapter_are_the_base_bit_for_bit(directory: Path, dtype: torch.dtype) -> None:
    model, ids = llama(dtype), tokens(4)
    base, plain = model(ids).logits, generate(model, ids)
    bank = lr.AdapterBank(model)
    for name in CHECKPOINTS:
        bank.load(name, directory / name)
    assert torch.equal(model(ids).logits, base), "outside of a block"
    with bank.rows([None] * 4):
        assert torch.equal(model(ids).logits, base)
        assert torch.equal(generate(model, ids), plain)
    with bank.rows([None, "everything", None, "attention"]):
        mixed = model(ids).logits
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])
    assert not torch.equal(mixed[[1, 3]], base[[1, 3]])


def test_decoding_with_a_cache_agrees_with_the_whole_sequence(bank: lr.AdapterBank) -> None:
    model, ids = bank.model, tokens(3, 12)
    with bank.rows(["attention", None, "everything"]):
        whole = model(ids).logits
        step = model(ids[:, :5], use_cache=True)
        parts = [step.logits]
        for position in range(5, 12):
            step = model(
                ids[:, position : position + 1],
                past_key_values=step.past_key_values,
                use_cache=True,
            )
            parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_modules_without_a_target_are_left_alone(bank: lr.AdapterBank) -> None:
    layers = bank.model.model.layers
    assert layers[0].self_attn.q_proj.names == ("attention", "everything")
    assert layers[0].mlp.down_proj.names == ("everything",)
    assert layers[1].mlp.down_proj.names == ("everything", "one layer")
    assert type(bank.model.lm_head) is nn.Linear
    only = lr.AdapterBank(llama())
    assert not any(isinstance(m, MultiLoRALinear) for m in only.model.modules())


COPIES = {
    "beams": {"num_beams": 2},
    "beams and sequences": {"num_beams": 4, "num_return_sequences": 3},
    "samples": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("options", COPIES.values(), ids=COPIES)
def test_a_name_stands_for_the_copies_of_its_sequence(
    bank: lr.AdapterBank, directory: Path, options: dict[str, Any]
) -> None:
    ids, names = tokens(2), ["attention", None]
    times = options.get("num_return_sequences", 1)
    generated = []
    for given in (names, [name for name in names for _ in range(options.get("num_beams", times))]):
        torch.manual_seed(0)
        with bank.rows(given):
            generated.append(generate(bank.model, ids, **options))
    assert torch.equal(*generated) and len(generated[0]) == 2 * times
    if "num_beams" in options:
        alone = generate(with_peft(llama(), directory / "attention"), ids[:1], **options)
        assert torch.equal(generated[0][:times], alone)


@pytest.mark.parametrize("options", [{}, *COPIES.values()], ids=["greedy", *COPIES])
def test_copies_in_an_encoder_decoder_model(tmp_path: Path, options: dict[str, Any]) -> None:
    """The encoder sees each sequence once, the decoder its copies."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2)
    config = T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    model = T5ForConditionalGeneration(config).eval()
    path = save_with_peft(model, tmp_path / "t5", r=3, lora_alpha=9, target_modules="all-linear")
    ids, names = tokens(3), ["a", None, "a"]
    adapted = with_peft(model, path)
    alone = []
    for row, name in enumerate(names):
        torch.manual_seed(0)
        alone.append(generate(model if name is None else adapted, ids[row : row + 1], **options))
    bank = lr.AdapterBank(model)
    bank.load("a", path)
    with bank.rows(names):
        generated = generate(model, ids, **options)
    if not options.get("do_sample"):  # samples of a batch are drawn in another order
        assert torch.equal(generated, torch.cat(alone))
    else:
        assert len(generated) == 9


def test_rows_that_are_no_copies_raise(bank: lr.AdapterBank) -> None:
    match = "the batch must have 2 rows, one for each name, or a multiple of that, got an input of"
    for rows in (1, 3):
        with pytest.raises(ValueError, match=match), bank.rows(["attention", None]):
            bank.model(tokens(rows))
    layer = bank.model.model.layers[0].self_attn.q_proj
    with bank.rows(["attention", None]):
        assert layer(torch.randn(2, 32)).shape == (2, 32)
        with pytest.raises(ValueError, match=match):  # tokens, in whatever order
            layer(torch.randn(4, 32))
    with pytest.raises(ValueError, match="must have 0 rows"), bank.rows([]):
        bank.model(tokens(1))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_another_number_of_rows_raises(bank: lr.AdapterBank, num_rows: int) -> None:
    with pytest.raises(ValueError, match="the batch must have 2 rows"), bank.rows([None, None]):
        bank.model(tokens(num_rows))


def test_ids_are_made_once_per_block(bank: lr.AdapterBank) -> None:
    """Once for each set of adapters that modules have in common, not for each module or call."""
    modules = [m for m in bank.model.modules() if isinstance(m, MultiLoRALinear)]
    with bank.rows(["attention", "everything"]):
        (block,) = ACTIVE_ROWS.get().values()
        bank.model(tokens(2))
        made = dict(block._ids)
        bank.model(tokens(2))
        assert len(made) == len({m.names for m in modules}) == 3 < len(modules)
        assert block._ids.keys() == made.keys()
        assert all(block._ids[key] is ids for key, ids in made.items())


def test_unload_and_close_restore_the_model(model: LlamaForCausalLM, directory: Path) -> None:
    ids = tokens(2)
    base, modules, keys = model(ids).logits, list(model.modules()), list(model.state_dict())
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    bank = lr.AdapterBank(model)
    for _ in range(2):
        bank.load("a", directory / "attention")
        bank.load("e", directory / "everything")
        with bank.rows(["a", "e"]):
            both = model(ids).logits
        bank.unload("e")
        assert bank.names == ("a",)
        with bank.rows(["a", None]):
            after = model(ids).logits
        torch.testing.assert_close(after[0], both[0])
        assert torch.equal(after[1], base[1])
        assert set(keys) <= set(model.state_dict()), "the base keeps its keys"
        bank.close()
        assert bank.names == ()
        assert list(model.modules()) == modules
        assert list(model.state_dict()) == keys
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
        assert torch.equal(model(ids).logits, base)


def test_memory(bank: lr.AdapterBank) -> None:
    """Stacks hold what the figures say, and shrink with the largest rank."""

    def held() -> int:
        return sum(
            t.untyped_storage().nbytes()
            for m in bank.model.modules()
            if isinstance(m, MultiLoRALinear)
            for t in (m.lora_a, m.lora_b)
        )

    memory = bank.memory()
    # q and v of 2 layers: r = 4, 4-byte elements, q is 32 → 32 and v 32 → 16.
    assert memory.adapters["attention"] == 2 * 4 * 4 * (64 + 48)
    assert memory.adapters["one layer"] == 2 * 4 * (48 + 32)
    assert memory.padding == 2 * (7 - 4) * 4 * (64 + 48) + (7 - 2) * 4 * 80
    assert memory.total == sum(memory.adapters.values()) + memory.padding == held()
    bank.unload("everything")
    assert bank.memory().padding == 0
    assert bank.memory().total == held() == sum(bank.memory().adapters.values())
    bank.close()
    assert bank.memory().total == held() == 0


def test_compiled_once_for_all_blocks(bank: lr.AdapterBank) -> None:
    model = bank.model
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for names in (["attention", None], ["everything"] * 2, [None] * 2, ["one layer", None] * 2):
        ids = tokens(len(names))
        with bank.rows(names):
            got = compiled(input_ids=ids, use_cache=False).logits
            expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, expected)
    assert torch.equal(
        compiled(input_ids=ids, use_cache=False).logits,
        model(input_ids=ids, use_cache=False).logits,
    )
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="must have 3 rows"), bank.rows([None] * 3):
        compiled(input_ids=ids, use_cache=False)


def test_blocks_nest_and_end_with_errors(bank: lr.AdapterBank) -> None:
    model, ids = bank.model, tokens(1)
    outputs = {}
    for name in (None, "attention", "everything"):
        with bank.rows([name]):
            outputs[name] = model(ids).logits
    with bank.rows(["attention"]):
        with bank.rows(["everything"]):
            assert torch.equal(model(ids).logits, outputs["everything"])
        with pytest.raises(KeyError), bank.rows([None]):
            raise KeyError
        assert torch.equal(model(ids).logits, outputs["attention"])
    assert torch.equal(model(ids).logits, outputs[None])


def test_two_banks_do_not_mix(directory: Path) -> None:
    first, second = lr.AdapterBank(llama()), lr.AdapterBank(llama())
    ids = tokens(1)
    for bank in (first, second):
        bank.load("a", directory / "attention")
    base = first.model(ids).logits
    with first.rows(["a"]):
        adapted = first.model(ids).logits
        assert torch.equal(second.model(ids).logits, base)
        with second.rows([None]):
            assert torch.equal(first.model(ids).logits, adapted)


def test_threads_and_tasks_have_blocks_of_their_own(bank: lr.AdapterBank) -> None:
    model, ids = bank.model, tokens(1)
    names = [None, *CHECKPOINTS]
    expected = {}
    for name in names:
        with bank.rows([name]):
            expected[name] = model(ids).logits
    wrong: list[object] = []
    barrier = threading.Barrier(len(names))

    @torch.no_grad()
    def work(name: str | None) -> None:
        with bank.rows([name]):
            barrier.wait()
            for _ in range(5):
                if not torch.allclose(model(ids).logits, expected[name], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    with bank.rows(["attention"]):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        inherited: list[Tensor] = []
        alone = threading.Thread(target=lambda: inherited.append(model(ids).logits.detach()))
        alone.start()
        alone.join()
        assert torch.allclose(inherited[0], expected[None], atol=1e-5), "a thread inherits no block"

    async def task(name: str | None) -> None:
        with bank.rows([name]):
            for _ in range(3):
                await asyncio.sleep(0)
                if not torch.allclose(model(ids).logits, expected[name], atol=1e-5):
                    wrong.append(name)

    async def tasks() -> None:
        await asyncio.gather(*(task(name) for name in names))

    asyncio.run(tasks())
    assert wrong == []


def test_nothing_is_loaded_or_unloaded_inside_a_block(
    bank: lr.AdapterBank, directory: Path
) -> None:
    with bank.rows([None]):
        for act in (
            lambda: bank.load("new", directory / "attention"),
            lambda: bank.unload("attention"),
            bank.close,
        ):
            with pytest.raises(RuntimeError, match="no rows block may be active, got 1"):
                act()
    bank.unload("attention")


def test_wrong_names(bank: lr.AdapterBank, directory: Path) -> None:
    with pytest.raises(ValueError, match=r"rows: name must be one of .* got 'atention'; did you"):
        bank.rows(["atention"]).__enter__()
    with pytest.raises(TypeError, match="rows: names must be a sequence"):
        bank.rows("attention").__enter__()
    with pytest.raises(TypeError, match="rows: names must be a sequence"):
        bank.rows([1]).__enter__()
    with pytest.raises(ValueError, match="load: name must be new, got 'attention'"):
        bank.load("attention", directory / "attention")
    with pytest.raises(TypeError, match="load: name must be a non-empty string"):
        bank.load("", directory / "attention")
    with pytest.raises(ValueError, match="unload: name must be one of"):
        bank.unload("nobody")
    bank.close()  # no block is counted as active


def edited(source: Path, target: Path, **fields: Any) -> Path:
    target.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | fields))
    save_file(load_file(source / "adapter_model.safetensors"), target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "must be a LoRA at inference, got one with magnitudes of its columns"),
        ({"bias": "all"}, "must be a LoRA at inference, got one with trained biases .bias='all'."),
        ({"init_lora_weights": "pissa"}, "must be a LoRA at inference, got a residual base weight"),
        ({"peft_type": "LOHA"}, r"peft_type must be one of 'LORA', .*, got 'LOHA'"),
        ({"r": 5}, r"lora_A.weight must be \[5, 32\], got \[4, 32\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_checkpoints_that_are_refused(
    bank: lr.AdapterBank, directory: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = edited(directory / "attention", tmp_path / "edited", **fields)
    assert_refused(bank, path, message)


def assert_refused(bank: lr.AdapterBank, path: Path, message: str) -> None:
    """Loading raises, in the bank's name, and changes nothing."""
    before = bank.names, bank.memory(), list(bank.model.modules())
    with pytest.raises(ValueError, match=f"^AdapterBank.load: .*{message}"):
        bank.load("new", path)
    assert (bank.names, bank.memory(), list(bank.model.modules())) == before


def test_adapters_of_other_models_are_refused(bank: lr.AdapterBank, tmp_path: Path) -> None:
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )
    other = save_with_peft(gpt2, tmp_path / "gpt2", target_modules=["c_fc"], fan_in_fan_out=True)
    assert_refused(bank, other, "c_fc.* must belong to a linear module, .* no such module")
    path = save_with_peft(
        llama(hidden_size=16), tmp_path / "narrow", r=4, target_modules=["q_proj"]
    )
    assert_refused(bank, path, r"q_proj.lora_A.weight must be \[4, 32\], got \[4, 16\]")
    saved = save_with_peft(
        llama(), tmp_path / "saved", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    assert_refused(bank, saved, "modules_to_save must match no module, .*lm_head")
    with pytest.raises(FileNotFoundError, match=r"AdapterBank.load: .*does not exist"):
        bank.load("new", tmp_path / "nowhere")


def test_models_with_adapters_are_refused(bank: lr.AdapterBank, directory: Path) -> None:
    adapted = lr.adapt(llama(), lr.LoRAConfig(r=2))
    for model in (bank.model, adapted, with_peft(llama(), directory / "attention")):
        with pytest.raises(ValueError, match="model must carry no adapters"):
            lr.AdapterBank(model)
    with pytest.raises(ValueError, match="must not be adapted yet, got a MultiLoRALinear"):
        lr.adapt(bank.model, lr.LoRAConfig(r=2))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        lr.AdapterBank("model")


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_own_checkpoints(tmp_path: Path, init: str) -> None:
    """PiSSA as save_adapter writes it is a LoRA of rank 2r over the original base."""
    model = lr.adapt(llama(), lr.LoRAConfig(r=3, alpha=5, init=init, target_modules=["q_proj"]))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_b.add_(torch.randn_like(module.lora_b), alpha=0.3)
    lr.save_adapter(model, tmp_path)
    bank, ids = lr.AdapterBank(llama()), tokens(2)
    bank.load("own", tmp_path)
    with bank.rows(["own", None]):
        logits = bank.model(ids).logits
    torch.testing.assert_close(logits[0], model(ids).logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits[1], llama()(ids).logits[1])


OTHERS = {
    "lamda": lr.LaMDAConfig(r=3, alpha=5),
    "lamda-lora": lr.LaMDAConfig(r=3, init="lora", rslora=True),
    "lamda-ranks": lr.LaMDAConfig(r=4, rank_pattern={"q_proj": 2}, rank_budget="rank"),
    "aflora": lr.AFLoRAConfig(r=4, alpha=6),
    "basis-down": lr.BasisLoRAConfig(r=4),
    "basis-up": lr.BasisLoRAConfig(r=4, basis="up"),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_methods_that_are_loras(tmp_path: Path, config: Any, bank: lr.AdapterBank) -> None:
    """Beside PEFT's own, over the base as it was before adapt."""
    model = lr.adapt(llama(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    lr.save_adapter(model, tmp_path)
    ids = tokens(3)
    with bank.rows(["attention", None, None]):
        alone = bank.model(ids).logits
    bank.load("own", tmp_path)
    with bank.rows(["attention", None, "own"]):
        logits = bank.model(ids).logits
    torch.testing.assert_close(logits[2], model.eval()(ids).logits[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[0], alone[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits[1], alone[1])


@pytest.mark.parametrize("config", [lr.GOATConfig(r=8), lr.ResLoRAConfig(r=2)])
def test_other_methods_are_refused(bank: lr.AdapterBank, tmp_path: Path, config: Any) -> None:
    lr.save_adapter(lr.adapt(llama(), config), tmp_path)
    assert_refused(bank, tmp_path, f"must be a LoRA at inference, got {config.peft_type}")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_default_outside_of_blocks(bank: lr.AdapterBank, compiled: bool) -> None:
    ids = tokens(2)
    run = torch.compile(bank.model, backend="eager") if compiled else bank.model
    plain = run(ids).logits
    with bank.rows(["attention"] * 2):
        expected = run(ids).logits
    assert bank.default is None
    bank.set_default("attention")
    assert torch.equal(run(ids).logits, expected) and bank.default == "attention"
    with bank.rows([None, "attention"]):  # a block says all, None is the base
        mixed = run(ids).logits
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], expected[1], rtol=1e-5, atol=1e-5)
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        torch.testing.assert_close(other.model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        other.set_default(None)
        torch.testing.assert_close(other.model(ids).logits, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(ids).logits, expected)
    with pytest.raises(ValueError, match="name must not be the default, got 'attention'"):
        bank.unload("attention")
    with pytest.raises(ValueError, match="set_default: name must be one of"):
        bank.set_default("nobody")
    with bank.rows([None] * 2), pytest.raises(RuntimeError, match="no rows block may be active"):
        bank.set_default(None)
    bank.set_default(None)
    torch.testing.assert_close(run(ids).logits, plain, rtol=1e-5, atol=1e-5)
    bank.set_default("everything")
    bank.close()
    assert bank.default is None
    torch.testing.assert_close(bank.model(ids).logits, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [(0.7, -0.4), (0.5, 0.5)])
def test_combining_is_exact(dtype: torch.dtype, weights: tuple[float, float]) -> None:
    """Of adapters over other modules and with other ranks and scalings; then without them."""
    model = llama().to(dtype)
    bank = lr.AdapterBank(model)
    both, alone = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"
    torch.manual_seed(3)
    loras = {
        "first": {both: LoRATensors(torch.randn(5, 48), torch.randn(32, 5), 0.5)},
        "second": {
            both: LoRATensors(torch.randn(3, 48), torch.randn(32, 3), 0.5),
            alone: LoRATensors(torch.randn(2, 32), torch.randn(32, 2), 2.0),
        },
    }
    for name, tensors in loras.items():
        bank.add(name, tensors)
    bank.combine("mix", dict(zip(loras, weights, strict=True)))
    for name in loras:
        bank.unload(name)
    tolerance = 2 * torch.finfo(dtype).eps
    for path in (both, alone):
        lora_a, lora_b, scaling = model.get_submodule(path).adapter("mix")
        expected = sum(
            weight
            * each.scaling
            * (each.lora_b.to(dtype).double() @ each.lora_a.to(dtype).double())
            for weight, tensors in zip(weights, loras.values(), strict=True)
            if (each := tensors.get(path)) is not None
        )
        found = scaling * (lora_b.double() @ lora_a.double())
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_combination_does_not_overflow() -> None:
    """The sum is the adapter itself: no factor of it leaves the range of the stacks' dtype."""
    model = llama().half()
    bank, path = lr.AdapterBank(model), "model.layers.0.mlp.down_proj"
    lora_a, lora_b = torch.full((2, 48), 1e-4), torch.full((32, 2), 50.0)
    for name in ("a", "b"):
        bank.add(name, {path: LoRATensors(lora_a, lora_b, 16.0)})
    bank.combine("mix", {"a": 100.0, "b": -99.0})
    found_a, found_b, scaling = model.get_submodule(path).adapter("mix")
    found = scaling * (found_b.double() @ found_a.double())
    expected = 16 * (lora_b.half().double() @ lora_a.half().double())
    assert (found - expected).abs().max() <= 200 * torch.finfo(torch.float16).eps * expected.max()


def test_saving_a_combination(bank: lr.AdapterBank, tmp_path: Path) -> None:
    """Read back by a bank, by load_adapter and by PEFT."""
    bank.combine("mix", {"attention": 0.5, "everything": -0.25})
    bank.save("mix", tmp_path)
    ids = tokens(2)
    with bank.rows(["mix", "mix"]):
        expected = bank.model(ids).logits
    other = lr.AdapterBank(llama())
    other.load("again", tmp_path)
    with other.rows(["again", "again"]):
        assert torch.equal(other.model(ids).logits, expected)
    for loaded in (
        lr.load_adapter(llama(), tmp_path, trainable=False),
        peft.PeftModel.from_pretrained(llama(), tmp_path),
    ):
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"AdapterBank\.save: name must be one of"):
        bank.save("nobody", tmp_path)


def test_what_cannot_be_combined(bank: lr.AdapterBank) -> None:
    names = bank.names
    for name, weights, error, message in (
        ("attention", {"everything": 1.0}, ValueError, "combine: name must be new"),
        ("mix", {"nobody": 1.0}, ValueError, "combine: name must be one of"),
        ("mix", {}, ValueError, "weights must name at least one adapter"),
        ("mix", {"attention": float("inf")}, ValueError, r"weights\['attention'\] must be finite"),
        ("mix", {"attention": "much"}, TypeError, r"weights\['attention'\] must be a number"),
    ):
        with pytest.raises(error, match=message):
            bank.combine(name, weights)
    with bank.rows([None] * 2), pytest.raises(RuntimeError, match="no rows block may be active"):
        bank.combine("mix", {"attention": 1.0})
    assert bank.names == names


def test_adapters_given_as_tensors(bank: lr.AdapterBank) -> None:
    path, ids = "model.layers.0.mlp.down_proj", tokens(3)
    a, b = torch.randn(5, 48), torch.randn(32, 5)
    bank.add("given", {path: LoRATensors(a, b, 0.5)})
    with bank.rows(["given", None, "attention"]):
        found = bank.model(ids).logits
    with bank.rows([None, None, "attention"]):
        without = bank.model(ids).logits
    assert torch.equal(found[1:], without[1:])
    alone = llama()
    alone.get_submodule(path).weight += 0.5 * b @ a
    torch.testing.assert_close(found[0], alone(ids).logits[0], rtol=1e-4, atol=1e-4)
    a.zero_()
    assert bank.model.get_submodule(path).lora_a[-1].any(), "copied"


@pytest.mark.parametrize(
    ("path", "shapes", "message"),
    [
        ("model.layers.0.mlp.down_prj", ((2, 48), (32, 2)), "got 'model.*did you mean"),
        ("model.layers.0.mlp", ((2, 48), (32, 2)), "got model.layers.0.mlp, a LlamaMLP"),
        (
            "model.layers.0.mlp.down_proj",
            ((2, 47), (32, 2)),
            r"be \[r, 48\] and \[32, r\], got \[2",
        ),
        ("model.layers.0.mlp.down_proj", ((2, 48), (32, 3)), r"and \[32, 3\]"),
        ("model.layers.0.mlp.down_proj", ((0, 48), (32, 0)), r"got \[0, 48\] and \[32, 0\]"),
        ("model.layers.0.mlp.down_proj", ((48,), (32, 2)), r"got \[48\]"),
        ("model.layers.0.mlp.down_proj", None, "scaling must be positive and finite, got 0"),
    ],
)
def test_tensors_that_do_not_fit(
    bank: lr.AdapterBank, path: str, shapes: Any, message: str
) -> None:
    before = bank.names, list(bank.model.modules())
    a, b = map(torch.ones, shapes or ((2, 48), (32, 2)))
    with pytest.raises(ValueError, match=f"AdapterBank.add: .*{message}"):
        bank.add("new", {path: LoRATensors(a, b, 1.0 if shapes else 0)})
    with pytest.raises(ValueError, match=r"AdapterBank.add: .* at least one module, got none"):
        bank.add("new", {})
    with pytest.raises(ValueError, match=r"AdapterBank.add: name must be new, got 'attention'"):
        bank.add("attention", {})
    assert (bank.names, list(bank.model.modules())) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_copies_have_blocks_of_their_own(bank: lr.AdapterBank, copied: Any) -> None:
    ids = tokens(2)
    base = bank.model(ids).logits
    with bank.rows(["everything", None]):
        expected = bank.model(ids).logits
        other = copied(bank)
        assert torch.equal(other.model(ids).logits, base)
        other.unload("attention")  # no block of its own is active
    assert other.names == ("everything", "one layer") and bank.names == tuple(CHECKPOINTS)
    with other.rows(["everything", None]):
        assert torch.equal(other.model(ids).logits, expected)
        assert torch.equal(bank.model(ids).logits, base)
    other.close()
    assert torch.equal(other.model(ids).logits, base)


def test_stacks_in_float32_over_a_bfloat16_base(directory: Path) -> None:
    model, ids = llama(torch.bfloat16), tokens(2)
    base = model(ids).logits
    bank = lr.AdapterBank(model, adapter_dtype="float32")
    bank.load("a", directory / "everything")
    modules = [m for m in model.modules() if isinstance(m, MultiLoRALinear)]
    assert {m.lora_a.dtype for m in modules} == {torch.float32}
    assert bank.memory().total == sum(m.lora_a.nbytes + m.lora_b.nbytes for m in modules)
    with bank.rows(["a", None]):
        assert torch.equal(model(ids).logits[1], base[1])
    with pytest.raises(ValueError, match="AdapterBank: adapter_dtype must be one of"):
        lr.AdapterBank(llama(), adapter_dtype="int8")
    with pytest.raises(ValueError, match="adapter_dtype must be 'base', 'float32' or the base's"):
        lr.AdapterBank(llama(), adapter_dtype="float16").load("a", directory / "everything")


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)).eval()


def test_fused_encoder_layers_do_not_bypass_the_adapters(tmp_path: Path) -> None:
    model, x = encoder(), torch.randn(2, 5, 16)
    path = save_with_peft(model, tmp_path / "a", r=2, target_modules=["linear1", "linear2"])
    base, bank = model(x), lr.AdapterBank(model)
    bank.load("a", path)
    with bank.rows(["a", "a"]):
        torch.testing.assert_close(model(x), lr.load_adapter(encoder(), path)(x))
    bank.close()
    assert torch.equal(model(x), base)


# MultiLoRALinear by itself


def adapter(rank: int, num_in: int = 12, num_out: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, num_in), torch.randn(num_out, rank)


@pytest.mark.parametrize(
    "base",
    [
        lambda: nn.Linear(12, 9),
        lambda: nn.Linear(12, 9, bias=False),
        negated_linear,
        lambda: Conv1D(9, 12),
        lambda: Int8Linear(12, 9, torch.float32),
    ],
    ids=["linear", "no bias", "hooked", "Conv1D", "int8"],
)
def test_layer_over_any_base(base: Any) -> None:
    linear = base()
    layer = MultiLoRALinear.from_linear(linear)
    x, ids = torch.randn(4, 12), torch.tensor([1, -1, 0, 1])
    expected = linear(x)
    assert torch.equal(layer(x), expected)
    parts = {"first": adapter(2), "second": adapter(5)}
    for scaling, (name, (a, b)) in zip((2.0, 0.5), parts.items(), strict=True):
        layer.add(name, a, b, scaling)
        rows = ids == layer.names.index(name)
        expected[rows] += scaling * x[rows] @ a.T @ b.T
    torch.testing.assert_close(layer(x, ids), expected)
    assert torch.equal(layer(x, ids)[1], linear(x)[1])
    layer.remove("first")
    torch.testing.assert_close(layer(x, ids - 1 + (ids == -1).int())[0], expected[0])
    assert layer.lora_a.shape == (1, 5, 12) and layer.ranks.tolist() == [5]


def test_layer_trains_each_adapter_on_its_rows() -> None:
    with torch.enable_grad():
        layer = MultiLoRALinear.from_linear(nn.Linear(12, 9).requires_grad_(False))
        layer.add("a", *adapter(3), 2.0)
        layer.lora_a.requires_grad_()
        layer.lora_b.requires_grad_()
        layer.add("b", *adapter(2), 1.0)
        layer.add("idle", *adapter(1), 1.0)
        assert layer.lora_a.requires_grad and layer.lora_b.requires_grad
        x, ids = torch.randn(6, 12), torch.tensor([0, 1, 0, -1, 1, 0])
        layer(x, ids).square().sum().backward()
        assert torch.count_nonzero(layer.lora_a.grad[2]) == 0
        assert torch.count_nonzero(layer.lora_a.grad[1, 2:]) == 0
        for slot, rank in ((0, 3), (1, 2)):
            alone = LoRALinear.from_linear(nn.Linear(12, 9), r=rank, alpha=rank * (2 - slot))
            alone.weight, alone.bias = layer.weight, layer.bias
            alone.lora_a.data = layer.lora_a[slot, :rank].detach().clone()
            alone.lora_b.data = layer.lora_b[slot, :, :rank].detach().clone()
            alone(x[ids == slot]).square().sum().backward()
            torch.testing.assert_close(layer.lora_a.grad[slot, :rank], alone.lora_a.grad)
            torch.testing.assert_close(layer.lora_b.grad[slot, :, :rank], alone.lora_b.grad)


def test_layer_drops_only_where_it_trains_an_adapter() -> None:
    layer = MultiLoRALinear.from_linear(nn.Linear(12, 9))
    layer.add("a", *adapter(3), 1.0)
    x, ids = torch.randn(400, 12), torch.arange(400) % 2 - 1
    expected = layer(x, ids)
    layer.dropout = 0.5
    assert torch.equal(layer.eval()(x, ids), expected)
    dropped = layer.train()(x, ids)
    assert torch.equal(dropped[::2], expected[::2]) and not torch.equal(dropped, expected)
    layer.dropout = 1.0
    torch.testing.assert_close(layer(x, ids), layer(x))


def test_layer_follows_dtypes_and_copies() -> None:
    layer = MultiLoRALinear.from_linear(nn.Linear(12, 9))
    layer.add("a", *adapter(3), 1 / 3)
    x, ids = torch.randn(4, 12), torch.tensor([0, -1, 0, 0])
    expected = layer(x, ids)
    assert torch.equal(copy.deepcopy(layer)(x, ids), expected)
    again = MultiLoRALinear.from_linear(nn.Linear(12, 9))
    again.add("a", *adapter(3), 1.0)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x, ids), expected)
    layer.to(torch.bfloat16)
    assert layer.scaling.item() == 1 / 3 and layer.lora_a.dtype == torch.bfloat16
    low = layer(x.bfloat16(), ids)
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert again(x, ids).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", *adapter(3), 1.0), "add: name must be new, got 'a'"),
        (("b", torch.ones(2, 11), torch.ones(9, 2), 1.0), r"lora_a must be \[r, in_features=12\]"),
        (("b", torch.ones(2, 12), torch.ones(9, 3), 1.0), r"lora_b must be .*r=2\], got \[9, 3\]"),
        (("b", *adapter(3), float("nan")), "scaling must be positive and finite, got nan"),
    ],
    ids=["name", "lora_a", "lora_b", "scaling"],
)
def test_layer_refuses(arguments: tuple, message: str) -> None:
    layer = MultiLoRALinear.from_linear(nn.Linear(12, 9))
    layer.add("a", *adapter(3), 1.0)
    with pytest.raises(ValueError, match=message):
        layer.add(*arguments)
    assert layer.names == ("a",) and layer.lora_a.shape == (1, 3, 12)
    with pytest.raises(ValueError, match="remove: name must be one of"):
        layer.remove("b")
    with pytest.raises(TypeError, match=r"base must be nn\.Linear"):
        MultiLoRALinear.from_linear(nn.ReLU())
