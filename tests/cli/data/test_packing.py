"""Rows of several documents: no document sees another, and no token is lost."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from lowrank_ext.cli.data import Rows, collate
from lowrank_ext.cli.data.encoding import Pieces
from lowrank_ext.cli.data.packing import pack
from lowrank_ext.cli.data.support import keeps_documents_apart, why_not_packed

LENGTHS = [5, 9, 3, 7, 12, 2, 4]
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(num_key_value_heads=2, **SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(num_key_value_heads=2, head_dim=8, **SIZES),
}


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Seven documents in three rows of at most 16 tokens, some tokens of each not trained."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (sum(LENGTHS),), generator=generator, dtype=torch.int32)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    trained = torch.rand(sum(LENGTHS), generator=generator) < 0.7
    trained[offsets[:-1]], trained[offsets[:-1] + 1] = False, True
    pieces = Pieces(tokens, trained, offsets)
    made = Rows(pieces, pack(pieces.lengths, 16))
    assert len(made) == 3 and made.num_packed == 3
    return made


def make_model(config: Any, attention: str | None = None, dtype: Any = torch.float64) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # so that what is attended to matters
    return model


def summed_loss(model: Any, batch: dict[str, Tensor]) -> float:
    """The sum of the losses of all trained tokens, in fp64: transformers' own is computed in
    fp32."""
    batch = {**batch}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    assert logits.dtype is torch.float64
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()


def loss_of_each(model: Any, rows: Rows) -> float:
    """The same, of one document at a time."""
    total = 0.0
    for number in range(len(rows.pieces)):
        piece = rows.piece(number)
        total += summed_loss(model, {name: piece[name][None] for name in ("input_ids", "labels")})
    return total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_batch_has_the_losses_of_its_documents(rows, name, attention) -> None:
    model = make_model(CONFIGS[name](), attention)
    batch = collate([rows[index] for index in range(len(rows))], pad_id=0)
    wanted = loss_of_each(model, rows)
    precision = 1e-12 if attention == "sdpa" else 1e-6  # eager's softmax is in fp32
    assert summed_loss(model, batch) == pytest.approx(wanted, rel=precision)
    # With a mask of ones the documents see each other: what this test must be able to notice.
    seen = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    assert summed_loss(model, seen) != pytest.approx(wanted, rel=1e-5)


def test_torch_compile_keeps_documents_apart(rows) -> None:
    # transformers decides by the values of position_ids whether rows are packed, but not while it
    # is traced: then it always makes the mask. Dynamo's graph suffices to see that.
    model = make_model(CONFIGS["llama"]())
    batch = collate([rows[index] for index in range(len(rows))], pad_id=0)
    wanted = summed_loss(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert summed_loss(compiled, batch) == pytest.approx(wanted, rel=1e-12)
    single = collate([rows.piece(0)], pad_id=0)
    assert summed_loss(compiled, single) == pytest.approx(summed_loss(model, single), rel=1e-12)


def test_a_padded_batch_has_the_losses_of_its_rows(rows) -> None:
    model = make_model(CONFIGS["llama"]())
    pieces = [rows.piece(number) for number in range(len(rows.pieces))]
    batch = collate(pieces, pad_id=7)
    assert batch["attention_mask"].sum() == sum(LENGTHS) and "position_ids" not in batch
    assert summed_loss(model, batch) == pytest.approx(loss_of_each(model, rows), rel=1e-12)


def test_batches_have_only_what_they_need(rows) -> None:
    whole = collate([rows.piece(4)], pad_id=0)
    assert set(whole) == {"input_ids", "labels"}
    packed = collate([rows[0], rows[2]], pad_id=49)
    assert set(packed) == {"input_ids", "labels", "position_ids"}
    lengths = rows.lengths[[0, 2]]
    assert packed["input_ids"].shape == (2, lengths.max())
    short = int(lengths.argmin())
    padding = slice(int(lengths.min()), None)
    assert (packed["input_ids"][short, padding] == 49).all()
    assert (packed["labels"][short, padding] == -100).all()
    assert packed["position_ids"][short, padding].tolist() == list(range(abs(lengths.diff()[0])))
    assert all(tensor.dtype is torch.int64 for tensor in packed.values())


def test_rows_are_their_pieces(rows) -> None:
    found = [rows.pieces_of(index) for index in range(len(rows))]
    assert sorted(itertools.chain(*found)) == list(range(len(LENGTHS)))
    for index, numbers in enumerate(found):
        row, pieces = rows[index], [rows.piece(number) for number in numbers]
        assert torch.equal(row["input_ids"], torch.cat([piece["input_ids"] for piece in pieces]))
        starts = (row["position_ids"] == 0).nonzero().flatten()
        assert (row["labels"][starts] == -100).all()
        assert len(starts) == len(numbers)
    assert rows.lengths.tolist() == [len(rows[index]["input_ids"]) for index in range(len(rows))]
    assert rows.num_trained == sum(int((rows[i]["labels"] != -100).sum()) for i in range(3))
    with pytest.raises(IndexError):
        rows[3]
    assert torch.equal(rows[-1]["input_ids"], rows[2]["input_ids"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 20), max_size=60))
def test_packing_loses_nothing_and_fits(lengths) -> None:
    found = pack(torch.tensor(lengths, dtype=torch.int64), 20)
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    sums = [sum(lengths[piece] for piece in row) for row in found]
    assert all(0 < total <= 20 for total in sums)
    # No two rows could be one: else one of them would have been filled further.
    smallest = sorted(sums)[:2]
    assert len(smallest) < 2 or sum(smallest) > 20
    assert [row[0] for row in found] == sorted(row[0] for row in found)
    assert pack(torch.tensor(lengths, dtype=torch.int64), 20) == found


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_keep_documents_apart(name) -> None:
    model = make_model(CONFIGS[name]()).train()
    state = torch.get_rng_state()
    assert why_not_packed(model) is None
    assert model.training and torch.equal(torch.get_rng_state(), state)


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (lambda: MambaConfig(**SMALL), "takes no position_ids"),
    "bloom": (
        lambda: BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4),
        "takes no position_ids",
    ),
    "qwen3_next": (
        lambda: Qwen3NextConfig(
            **{**SIZES, "num_hidden_layers": 4, "head_dim": 8, "num_experts": 4},
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "linear_key_head_dim": 8},
            **{"shared_expert_intermediate_size": 16, "linear_num_value_heads": 4},
            **{"linear_num_key_heads": 2, "linear_value_head_dim": 8, "num_key_value_heads": 2},
        ),
        "carry a state",
    ),
    # Its forward takes position_ids, but its masks come from elsewhere: only a run shows it.
    "opt": (
        lambda: OPTConfig(**SMALL, num_attention_heads=4, ffn_dim=32, word_embed_proj_dim=32),
        "opt does not keep the documents of a row apart",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_do_not(name) -> None:
    make, reason = OTHERS[name]
    model = make_model(make(), dtype=torch.float32)
    assert reason in (why_not_packed(model) or "")
    assert not keeps_documents_apart(model)
