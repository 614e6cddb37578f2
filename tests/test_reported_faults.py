"""Faults reported against comparable libraries, as cases for our modules.

Each test names its case. LoRA and LaMDA with an identity core have the same formula, so the cases
run for both: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ. Values are chosen so that the arithmetic is exact.
"""

import pytest
import torch
from module_cases import METHODS, Method, lora_product, neutral_middle
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lowrank_ext.activation_checkpointing import prepare_for_checkpointing
from lowrank_ext.adapt import adapt
from lowrank_ext.merging import merge, unload
from lowrank_ext.methods.aflora.config import AFLoRAConfig
from lowrank_ext.methods.lamda.config import LaMDAConfig
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.nn import BasisLoRALinear, LoRALinear, LowRankLinear

# BasisLoRALinear refuses ranks above min(K, N), which the cases have; its formula is LoRA's code.
ONE_PER_FAMILY = [
    m for m in METHODS if m.init in ("kaiming", "lora") and m.module is not BasisLoRALinear
]
by_family = pytest.mark.parametrize("method", ONE_PER_FAMILY, ids=lambda m: m.config.peft_type)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def train_all(module: LowRankLinear) -> LowRankLinear:
    """Also lora_a of LaMDA: the cases ask for its gradient."""
    module.lora_a.requires_grad_()
    module.lora_b.requires_grad_()
    return module


def digits(*shape: int) -> Tensor:
    """Random entries in {-1, 0, 1}, float64."""
    return torch.randint(-1, 2, shape).double()


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    y = x @ weight.T + scaling * (x @ lora_a.T) @ lora_b.T
    return y if bias is None else y + bias


# RF-01: merging rounds the update before adding it.


@by_family
@pytest.mark.parametrize(
    "dtype, exponents, merged",
    [(torch.bfloat16, (-8, -17), 1 + 2**-7), (torch.float16, (-11, -22), 1 + 2**-10)],
    ids=str,
)
@pytest.mark.parametrize("whole_model", [False, True])
def test_rf01_merging_rounds_once(
    method: Method, dtype: torch.dtype, exponents: tuple[int, int], merged: float, whole_model: bool
) -> None:
    lora_b = torch.tensor([[2.0 ** exponents[0], 2.0 ** exponents[1]]], dtype=dtype)
    module = lora_product(
        method, linear_of(torch.ones(1, 1, dtype=dtype)), torch.ones(2, 1, dtype=dtype), lora_b
    )
    weight = module.weight
    merge(nn.Sequential(module)) if whole_model else module.merge()
    assert module.weight is weight
    assert module.weight.item() == merged
    assert weight.dtype == dtype and weight.device.type == "cpu" and not weight.requires_grad


# RF-02: alpha / sqrt(r) is forgotten.


@by_family
@pytest.mark.parametrize("rslora, expected", [(True, 32.0), (False, 16.0)])
def test_rf02_rank_stabilised_scaling(method: Method, rslora: bool, expected: float) -> None:
    module = lora_product(
        method,
        linear_of(torch.zeros(3, 2)),
        torch.ones(4, 2),
        torch.ones(3, 4),
        alpha=8,
        rslora=rslora,
    )
    x = torch.ones(1, 2)
    assert torch.equal(module(x), torch.full((1, 3), expected))
    module.merge()
    assert torch.equal(module.weight, torch.full((3, 2), expected / 2))
    assert torch.equal(module(x), torch.full((1, 3), expected))


@pytest.mark.parametrize("config_class", [LoRAConfig, LaMDAConfig, AFLoRAConfig])
def test_rf02_the_root_is_of_the_modules_own_rank(config_class) -> None:
    model = nn.ModuleDict({n: nn.Linear(16, 16, bias=False) for n in ("small", "large")})
    adapt(model, config_class(r=4, alpha=8, rslora=True, rank_pattern={"large": 16}))
    assert (model.small.scaling, model.large.scaling) == (8 / 2, 8 / 4)
    with torch.no_grad():
        for module in model.values():
            module.weight.zero_()
            module.lora_a.fill_(1)
            module.lora_b.fill_(1)
            neutral_middle(module)
    x = torch.ones(1, 16)
    assert torch.equal(model.large(x), torch.full((1, 16), 2.0 * 16 * 16))
    merge(model)
    assert torch.equal(model.large.weight, torch.full((16, 16), 2.0 * 16))
    assert torch.equal(model.small.weight, torch.full((16, 16), 4.0 * 4))


# RF-03: non-contiguous inputs and gradients.

INPUTS = {
    "transposed": lambda: torch.arange(24.0).reshape(2, 4, 3).transpose(1, 2),
    "sliced": lambda: torch.arange(24.0).reshape(3, 8)[:, ::2],
    "expanded": lambda: torch.arange(4.0).reshape(1, 4).expand(6, 4),
    "1-D": lambda: torch.arange(4.0),
    "4-D": lambda: torch.arange(24.0).reshape(2, 1, 3, 4),
    "no rows": lambda: torch.empty(0, 4),
}
GRADIENTS = {
    "contiguous": lambda shape: torch.randint(-2, 3, shape).float(),
    "transposed": lambda shape: torch.randint(-2, 3, (*shape[:-2], *shape[:-3:-1])).float().mT,
    "expanded": lambda shape: torch.ones(()).expand(shape),
}


@by_family
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", INPUTS)
def test_rf03_strides_do_not_matter(method: Method, kind: str, gradient: str) -> None:
    x = INPUTS[kind]()
    if x.dim() == 1 and gradient == "transposed":
        gradient = "contiguous"  # nothing to transpose
    before = x.clone()
    parts = [torch.randint(-2, 3, shape).float() for shape in ((5, 4), (5,), (2, 4), (5, 2))]
    module = train_all(lora_product(method, linear_of(*parts[:2]), *parts[2:], alpha=4))
    dout = GRADIENTS[gradient]((*x.shape[:-1], 5))
    results = []
    for given, upstream in ((x, dout), (x.contiguous().clone(), dout.contiguous().clone())):
        given = given.detach().requires_grad_()
        y = module(given)
        assert y.shape == (*x.shape[:-1], 5)
        results.append(
            (y, *torch.autograd.grad(y, [given, module.lora_a, module.lora_b], upstream))
        )
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)
    expected = reference(x.double(), *(part.double() for part in parts), scaling=2.0)
    assert torch.equal(results[0][0].double(), expected)
    assert torch.equal(x, before)


# RF-04: only some ranks work.

RANKS = [1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 128]
CASES = [
    (rank, num_in, num_out, dtype)
    for rank, num_in, num_out in [*((rank, 40, 24) for rank in RANKS), (20, 8, 12)]
    for dtype in (torch.float32, torch.bfloat16)
    if dtype == torch.float32 or rank <= 16  # more would leave bf16's exact integers
]


def scatter_nans(*shapes: tuple[int, ...]) -> None:
    """Leave NaN in freed memory of the sizes about to be allocated."""
    for shape in shapes:
        torch.full(shape, float("nan"))


@pytest.mark.parametrize("rank, num_in, num_out, dtype", CASES, ids=str)
@by_family
def test_rf04_every_rank(
    method: Method, rank: int, num_in: int, num_out: int, dtype: torch.dtype
) -> None:
    rows = 6
    x, dout = digits(rows, num_in), digits(rows, num_out)
    weight, lora_a, lora_b = digits(num_out, num_in), digits(rank, num_in), digits(num_out, rank)
    if dtype == torch.bfloat16:  # sparser, so that every result stays an exact integer
        lora_b = lora_b * (torch.rand(lora_b.shape) < 0.3)
    module = train_all(lora_product(method, linear_of(weight.to(dtype)), lora_a, lora_b))
    inputs = [t.clone().requires_grad_() for t in (x, lora_a, lora_b)]
    y64 = reference(inputs[0], weight, None, inputs[1], inputs[2], 1.0)
    expected = (y64, *torch.autograd.grad(y64, inputs, dout))
    if dtype == torch.bfloat16:
        assert max(t.abs().max() for t in expected) <= 256

    scatter_nans((rows, num_out), (rows, rank), (rows, num_in), (rank, num_in), (num_out, rank))
    given = x.to(dtype).requires_grad_()
    y = module(given)
    scatter_nans((rows, num_in), (rank, num_in), (num_out, rank), (rows, rank), (rank, rank))
    actual = (
        y,
        *torch.autograd.grad(y, [given, module.lora_a, module.lora_b], dout.to(dtype)),
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.double(), theirs)
    assert module.state_dict()["lora_a"].shape == (rank, num_in)


# RF-05: the backward forgets the dropout mask.


def dropped(method: Method, weight: Tensor, p: float) -> LowRankLinear:
    module = lora_product(method, linear_of(weight), torch.ones(1, 8), torch.ones(1, 1), dropout=p)
    return train_all(module).train()


@by_family
@pytest.mark.parametrize("seed", range(20))
def test_rf05_the_input_gradient_has_the_mask(method: Method, seed: int) -> None:
    torch.manual_seed(seed)
    module = dropped(method, torch.zeros(1, 8), 0.5)
    x = torch.ones(1, 8, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert set(x.grad.unique().tolist()) <= {0.0, 2.0}
    assert x.grad.sum() == y
    assert torch.equal(module.lora_a.grad, x.grad)
    assert module.lora_b.grad.item() == y.item()


@by_family
def test_rf05_edges(method: Method) -> None:
    weight = torch.arange(8.0).reshape(1, 8)
    x = torch.ones(3, 8, requires_grad=True)
    everything = dropped(method, weight, 0.0)
    everything.dropout = 1.0  # which no config takes
    y = everything(x)
    y.sum().backward()
    assert torch.equal(y, torch.full((3, 1), 28.0))
    assert torch.equal(x.grad, weight.expand(3, 8))
    assert not everything.lora_a.grad.any() and not everything.lora_b.grad.any()

    nothing, half = dropped(method, weight, 0.0), dropped(method, weight, 0.5)
    state = torch.get_rng_state()
    assert torch.equal(nothing(x), nothing.eval()(x))
    assert torch.equal(half.eval()(x), nothing(x))
    assert torch.equal(torch.get_rng_state(), state)


@by_family
def test_rf05_the_base_path_is_not_dropped(method: Method) -> None:
    module = dropped(method, torch.arange(8.0).reshape(1, 8) * 64, 0.5)
    x = torch.ones(50, 8)
    branch = module(x) - x @ module.weight.T
    assert set(branch.unique().tolist()) <= {2.0 * n for n in range(9)}
    assert len(branch.unique()) > 1


@by_family
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_rf05_recomputation_draws_the_same_mask(method: Method, use_reentrant: bool) -> None:
    module = dropped(method, torch.zeros(1, 8), 0.5)
    results = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        x = torch.ones(4, 8, requires_grad=True)
        module.zero_grad()
        y = run(x)
        y.sum().backward()
        results.append((y.detach(), x.grad, module.lora_a.grad, module.lora_b.grad))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


# RF-06: merging twice.


def doubled_merge_case(method: Method) -> LowRankLinear:
    return lora_product(
        method,
        linear_of(torch.eye(2)),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[3.0], [4.0]]),
        alpha=0.5,
    )


@by_family
def test_rf06_merging_twice_adds_once(method: Method) -> None:
    module = doubled_merge_case(method)
    x = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    y = module(x)
    merged = torch.tensor([[2.5, 3.0], [2.0, 5.0]])
    for _ in range(2):
        module.merge()
        assert torch.equal(module.weight, merged)
        assert torch.equal(module(x), y)
    for _ in range(2):
        module.unmerge()
        assert torch.equal(module.weight, torch.eye(2))
        assert torch.equal(module(x), y)


@by_family
@pytest.mark.parametrize("merges_before", [0, 1, 2])
def test_rf06_exporting_after_merging_adds_once(method: Method, merges_before: int) -> None:
    model = nn.Sequential(doubled_merge_case(method))
    for _ in range(merges_before):
        merge(model)
    unload(model, merge=True)
    assert torch.equal(model[0].weight, torch.tensor([[2.5, 3.0], [2.0, 5.0]]))


# RF-07: merging into a tied head changes the embedding.


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            rows = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]]
            self.embed.weight.copy_(torch.tensor(rows))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@by_family
def test_rf07_a_tied_head_is_not_merged(method: Method) -> None:
    model = TiedHead()
    ids, logits = torch.tensor([0, 3]), torch.tensor([[2.0, 0, 1, 1], [3.0, -1, 1, 4]])
    adapt(model, method.config(r=1, init=method.init, target_modules=["head"], **method.options(1)))
    with torch.no_grad():
        model.head.lora_a.copy_(torch.tensor([[1.0, 1.0]]))
        model.head.lora_b.copy_(torch.tensor([[1.0], [0.0], [0.0], [-1.0]]))
    neutral_middle(model.head)
    embedding = model.embed.weight.detach().clone()
    assert torch.equal(model(ids), logits)
    for call in (merge, lambda m: unload(m, merge=True)):
        with pytest.raises(ValueError, match=r"weight of head must be its own.*embed\.weight"):
            call(model)
        assert torch.equal(model(ids), logits)
        assert torch.equal(model.embed.weight, embedding)
    unload(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, embedding)


# RF-09: torch.compile hands over padded strides.


@pytest.mark.parametrize(
    ("method", "dynamic"),
    [(ONE_PER_FAMILY[0], None), *((m, True) for m in ONE_PER_FAMILY)],
    ids=str,
)
def test_rf09_compiled_behind_a_matmul(method: Method, dynamic: bool | None) -> None:
    weight, lora_a, lora_b = torch.randn(17, 33), torch.randn(3, 33), torch.randn(17, 3)
    module = train_all(lora_product(method, linear_of(weight), lora_a, lora_b))
    projection = torch.randn(64, 33)
    backend = CompileCounterWithBackend("inductor")

    def run(x: Tensor) -> Tensor:
        return module(x @ projection)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (10, 11, 1):
        x = torch.randn(rows, 64, requires_grad=True)
        inputs = [x, module.lora_a, module.lora_b]
        expected, actual = run(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
        )
        if rows == 11:
            assert backend.frame_count <= 2
    assert backend.frame_count <= 3  # torch compiles a single row on its own


@by_family
def test_rf09_a_row_stride_wider_than_the_row(method: Method) -> None:
    weight, lora_a, lora_b = digits(17, 33), digits(3, 33), digits(17, 3)
    module = lora_product(method, linear_of(weight.float()), lora_a.float(), lora_b.float())
    wide = torch.full((10, 40), float("nan"))
    x = wide[:, :33].copy_(digits(10, 33).float())
    expected = reference(x.double(), weight, None, lora_a, lora_b, 1.0)
    assert x.stride() == (40, 1)
    assert torch.equal(module(x).double(), expected)


# RF-10: no gradient below reentrant checkpoints when the embedding is frozen.


class CheckpointedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.use_reentrant: bool | None = None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            if self.use_reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def checkpointed_gradients(
    method: Method, use_reentrant: bool | None, switched_on_first: bool, prepare: bool
) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = CheckpointedModel()
    if switched_on_first:
        model.use_reentrant = use_reentrant
    adapt(model, method.config(r=2, init=method.init, **method.options(2)))
    model.use_reentrant = use_reentrant
    if prepare:
        prepare_for_checkpointing(model)
    for block in model.blocks:
        train_all(block)
        nn.init.constant_(block.lora_b, 0.5)
        neutral_middle(block)
    model(torch.tensor([0, 3, 1])).square().sum().backward()
    adapters = [p for p in model.parameters() if p.requires_grad]
    return model, [p.grad for p in adapters]


@by_family
@pytest.mark.parametrize("switched_on_first", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_rf10_checkpointing_keeps_every_gradient(
    method: Method, use_reentrant: bool, switched_on_first: bool
) -> None:
    _, expected = checkpointed_gradients(method, None, False, prepare=False)
    model, gradients = checkpointed_gradients(
        method, use_reentrant, switched_on_first, prepare=use_reentrant
    )
    assert len(gradients) == len(expected) >= 4
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours is not None and torch.equal(ours, theirs)
    assert not model.embed.weight.requires_grad and model.embed.weight.grad is None
    before = [block.lora_b.detach().clone() for block in model.blocks]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for block, old in zip(model.blocks, before, strict=True):
        assert (block.lora_b != old).any()


def test_rf10_the_helper_is_what_makes_it_work() -> None:
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(RuntimeError, match="does not require grad"),
    ):
        checkpointed_gradients(ONE_PER_FAMILY[0], True, False, prepare=False)


# RF-14: autocast is ignored.


def one_by_one(method: Method, base: torch.dtype, adapter: torch.dtype) -> LowRankLinear:
    module = lora_product(
        method, linear_of(torch.ones(1, 1, dtype=base)), torch.ones(1, 1), torch.ones(1, 1)
    )
    module.lora_a.data = module.lora_a.data.to(adapter)
    module.lora_b.data = module.lora_b.data.to(adapter)
    if module.core is not None:
        module.core.data = module.core.data.to(adapter)
    return train_all(module)


@by_family
@pytest.mark.parametrize("compiled", [False, True])
def test_rf14_autocast(method: Method, compiled: bool) -> None:
    module = one_by_one(method, torch.float32, torch.float32)
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    x = torch.tensor([[1.00390625]], requires_grad=True)
    y = call(x)
    assert y.dtype == torch.float32 and y.item() == 2.0078125
    with torch.autocast("cpu", torch.bfloat16):
        y = call(x)
    assert y.dtype == torch.bfloat16 and y.item() == 2.0
    y.sum().backward()
    for parameter in (module.lora_a, module.lora_b):
        assert parameter.grad.dtype == torch.float32 and parameter.grad.item() == 1.0
    assert x.grad.dtype == torch.float32


@by_family
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_rf14_half_base_with_float32_adapters(method: Method, half: torch.dtype) -> None:
    module = one_by_one(method, half, torch.float32)
    x = torch.tensor([[1.00390625]], dtype=half, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.dtype == half and x.grad.dtype == half
    assert module.lora_a.grad.dtype == module.lora_b.grad.dtype == torch.float32
    assert module.lora_a.grad.item() == x.item()


def test_rf14_plain_layers_and_adapted_ones_agree_on_the_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 4), LoRALinear.from_linear(nn.Linear(4, 4), r=2))
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](torch.randn(1, 4)).dtype == model(torch.randn(1, 4)).dtype == torch.bfloat16
