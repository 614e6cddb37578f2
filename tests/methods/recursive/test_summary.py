"""The table of a recursive model adds up to its parameters."""

from typing import Any

import pytest
from decoders import decoder
from torch import nn

pytest.importorskip("transformers")

from lowrank_ext.methods.recursive import RecursiveConfig, convert, summary, unshare


def rows(table: Any) -> list[dict[str, str]]:
    names = [column.header for column in table.columns]
    cells = zip(*(list(column.cells) for column in table.columns), strict=True)
    return [dict(zip(names, row, strict=True)) for row in cells]


def numbers(table: Any, name: str) -> int:
    return sum(int(row[name].replace(",", "")) for row in rows(table))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["Llama", "Phi", "GPT2", "Mixtral"])
@pytest.mark.parametrize("num_loops", [1, 2, 4])
def test_the_numbers_add_up(family: str, num_loops: int) -> None:
    rank = 0 if family == "GPT2" else {"q_proj": 3, "k_proj": 100}
    model = convert(decoder(family), RecursiveConfig(num_loops=num_loops, rank=rank))
    table = summary(model)
    assert numbers(table, "tied") + numbers(table, "adapters") == size(model)
    assert numbers(table, "unshared") == size(unshare(model)) == size(decoder(family))
    assert (
        f"{num_loops} loops of {4 // num_loops} layers: {size(model):,} parameters" in table.title
    )
    assert f"{size(decoder(family)):,} unshared" in table.title


def test_ranks() -> None:
    ranks = {"q_proj": 3, "k_proj": 8, "v_proj": 9}
    table = summary(convert(decoder(), RecursiveConfig(num_loops=2, rank=ranks)))
    found = {row["in each layer"]: (row["in → out"], row["rank"]) for row in rows(table)}
    assert found["self_attn.q_proj"] == ("16 → 16", "3")
    assert found["self_attn.k_proj"] == ("16 → 8", "8")
    assert found["self_attn.v_proj"] == ("16 → 8", "8*")  # of 9
    assert found["mlp.up_proj"] == ("16 → 24", "0")
    assert found["input_layernorm"] == ("", "")
    assert table.caption.startswith("* ")
    assert summary(convert(decoder(), RecursiveConfig(num_loops=2, rank=8))).caption is None


def test_what_is_not_recursive() -> None:
    with pytest.raises(TypeError, match=r"summary: model must be recursive .*, got a LlamaFor"):
        summary(decoder())
