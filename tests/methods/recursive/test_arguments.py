"""Arguments of the measurements, losses and files that cannot be right raise by name."""

import pytest
import torch
from recursive_models import VOCABULARY, tiny_llama, tiny_recursive

import lowrank_ext as lr

MEASUREMENTS = {"evaluate": lr.recursive.evaluate, "calibrate": lr.recursive.calibrate}


@pytest.mark.parametrize("token", [-1, VOCABULARY])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_token_ids_that_the_model_does_not_have(name, token) -> None:
    tokens = torch.ones(4, 5, dtype=torch.int64)
    tokens[2, 3] = token
    message = f"{name}: token ids must be from 0 to {VOCABULARY - 1}, got {token}"
    with pytest.raises(ValueError, match=message):
        MEASUREMENTS[name](tiny_recursive(), [tokens])


@pytest.mark.parametrize("num_items", [-1, 0, torch.tensor(0), torch.tensor(-2)])
def test_a_number_of_items_that_cannot_be(num_items) -> None:
    tokens = torch.ones(2, 5, dtype=torch.int64)
    inputs = {"input_ids": tokens, "labels": tokens}
    with pytest.raises(ValueError, match="num_items must be at least 1"):
        lr.recursive.uptrain_loss(tiny_recursive(), None, inputs, loss="ce", num_items=num_items)


def test_no_items_where_no_token_counts() -> None:
    """As the Trainer asks for it: NaN, as by cross_entropy."""
    tokens = torch.ones(2, 5, dtype=torch.int64)
    inputs = {"input_ids": tokens, "labels": torch.full_like(tokens, -100)}
    for num_items in (None, 0, torch.tensor(0)):
        found = lr.recursive.uptrain_loss(
            tiny_recursive(), None, inputs, loss="ce", num_items=num_items
        )
        assert found.total.isnan()


def test_a_dtype_that_is_a_string(tmp_path) -> None:
    tiny_recursive().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got 'float32'"):
        lr.recursive.load(tmp_path, dtype="float32")


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("lora_init", ["svd", "zero"])
@pytest.mark.parametrize("name", ["lm_head", "model.layers.1.input_layernorm", "model.norm"])
def test_weights_that_are_not_finite(name, lora_init, rank) -> None:
    """What convert would take, load would refuse."""
    model = tiny_llama()
    model.get_submodule(name).weight.data.view(-1)[3] = float("nan")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = lr.recursive.RecursiveConfig(num_loops=3, rank=rank, lora_init=lora_init)
    with pytest.raises(ValueError, match=f"{name}.weight must be finite, got inf or nan"):
        lr.recursive.convert(model, config)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k].nan_to_num(), before[k].nan_to_num()) for k in before)
