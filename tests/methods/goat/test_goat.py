"""GOATLinear: its start, what the released code got wrong, and the balance of its experts."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from module_cases import IDS, IN, OUT, TinyLM, conv1d, plain_linear, randomize, weight_of
from saved_bytes import bytes_kept_by
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_ext as lr
from lowrank_ext import reference
from lowrank_ext.nn import GOATLinear

EXPERTS, TOP_K, RANK = 3, 2, 6  # two singular triples per expert, of segments of three
SVD_INITS = ["goat", "goat_mini"]


def goat(base: nn.Module | None = None, **options) -> GOATLinear:
    sizes = {"r": RANK, "num_experts": EXPERTS, "top_k": TOP_K}
    return GOATLinear.from_linear(base or plain_linear(), **{**sizes, **options})


def goat_model(**options) -> nn.Module:
    """Two blocks whose six linears have four experts each, adapters at random values."""
    config = {"r": 4, "num_experts": 4, "top_k": 2, "balance_coefficient": 0.5, **options}
    model = lr.adapt(TinyLM(), lr.GOATConfig(**config))
    randomize(model)
    return model.train()


def task_loss(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def pending(model: nn.Module) -> list[GOATLinear]:
    """The modules that hold a loss."""
    return [m for m in model.modules() if isinstance(m, GOATLinear) and m._balance_loss is not None]


# ----------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("make_base", [plain_linear, conv1d], ids=["linear", "conv1d"])
@pytest.mark.parametrize("options", [{}, {"alpha": 16.0, "rho": 4.0}, {"scale": "theory"}], ids=str)
@pytest.mark.parametrize("init", SVD_INITS)
def test_experts_start_from_segments_of_the_spectrum(init: str, options: dict, make_base) -> None:
    base = make_base(torch.float64)
    weight = weight_of(base).detach().clone()
    module = goat(base, init=init, adapter_dtype="float64", **options)
    u, sig, v_t = torch.linalg.svd(weight, full_matrices=False)
    rho, segment, rank = options.get("rho", 10.0), min(IN, OUT) // EXPERTS, RANK // EXPERTS
    total = torch.zeros_like(weight)
    for i in range(EXPERTS):
        first = i * segment + (segment - rank if init == "goat_mini" else 0)
        part = slice(first, first + rank)
        expected = (u[:, part] * sig[part]) @ v_t[part] / rho
        expert = module.scaling * module.lora_b[i] @ module.lora_a[i]
        torch.testing.assert_close(expert, expected)
        # sqrt(sig) goes to either side, so the factors are equally large
        torch.testing.assert_close(module.lora_a[i].norm(dim=1), module.lora_b[i].norm(dim=0))
        total += expected
    torch.testing.assert_close(module.base_weight(), weight - total / EXPERTS)
    torch.testing.assert_close(module.original_weight(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("init", SVD_INITS)
def test_the_residual_is_rounded_once(init: str, dtype: torch.dtype) -> None:
    base = nn.Linear(48, 40, dtype=dtype)
    weight = base.weight.detach().clone()
    module = goat(base, init=init)
    taken = module.scaling / EXPERTS * (module.lora_b.double() @ module.lora_a.double()).sum(0)
    assert torch.equal(module.weight, (weight.double() - taken).to(dtype))
    # a difference in the base's dtype, as released, is another one
    assert not torch.equal(module.weight, weight - taken.to(dtype)) or dtype == torch.float32
    # and the experts are what was taken: their values are the base dtype's
    for tensor in (module.lora_a, module.lora_b):
        assert torch.equal(tensor, tensor.to(dtype).float())


def test_residual_factor() -> None:
    for factor, expected in ((None, 1 / EXPERTS), (0.0, 0.0), (0.75, 0.75)):
        base = plain_linear(torch.float64)
        weight = base.weight.detach().clone()
        module = goat(base, residual_factor=factor)
        taken = module.scaling * (module.lora_b @ module.lora_a).sum(0)
        torch.testing.assert_close(module.weight.detach(), weight - expected * taken.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", SVD_INITS)
def test_even_gates_give_the_bases_output(init: str, dtype: torch.dtype) -> None:
    """All experts chosen with weight 1/E: what the residual stands for."""
    base = nn.Linear(32, 24, dtype=dtype)
    x = torch.randn(50, 32, dtype=dtype)
    expected = base(x).double()
    module = goat(base, init=init, r=8, num_experts=4, top_k=4)
    with torch.no_grad():
        module.router_weight.zero_()
    error = (module(x).double() - expected).abs()
    assert error.max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", GOATLinear.inits)
def test_unload_and_reset_restore_the_base(init: str, dtype: torch.dtype) -> None:
    base = plain_linear(dtype)
    weight = base.weight.detach().clone()
    module = goat(base, init=init)
    randomize(module)
    one_rounding = dict(rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    torch.testing.assert_close(module.original_weight(), weight, **one_rounding)
    module.reset_adapter()
    assert module.residual_taken is (init != "zero")
    torch.testing.assert_close(module.original_weight(), weight, **one_rounding)
    plain = lr.unload(module)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain.weight.detach(), weight, **one_rounding)
    if init == "zero":
        assert torch.equal(plain.weight, weight)


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({"r": 8, "num_experts": 8}, 8.0),  # alpha = r
        ({"r": 8, "num_experts": 8, "alpha": 16}, 16.0),  # the released scripts' two
        ({"r": 32, "num_experts": 8, "alpha": 64}, 16.0),
        ({"r": 8, "num_experts": 8, "scale": "theory"}, math.sqrt(3 * 64)),
        ({"r": 16, "num_experts": 4, "scale": "theory", "eta": 0.5}, math.sqrt(1.5 * 64 / 4)),
    ],
    ids=str,
)
def test_scaling(options: dict, scaling: float) -> None:
    module = GOATLinear.from_linear(nn.Linear(64, 64), **options)
    assert module.scaling == pytest.approx(scaling, rel=1e-15)
    assert f"scaling={scaling:g}" in repr(module)


def test_the_seed_gives_the_same_numbers_in_every_dtype() -> None:
    starts = []
    for dtype in (torch.float32, torch.bfloat16):
        base = plain_linear(dtype)
        torch.manual_seed(1)
        starts.append(goat(base, init="zero"))
    a, b = starts
    assert torch.equal(a.lora_a, b.lora_a) and torch.equal(a.router_weight, b.router_weight)
    bound = 1 / math.sqrt(IN)
    for tensor in (a.lora_a, a.router_weight):
        assert 0.8 * bound < tensor.abs().max() <= bound
    assert not a.lora_b.any()
    assert [n for n, p in a.named_parameters() if p.requires_grad] == [
        *("lora_a", "lora_b", "router_weight"),
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 4}, ValueError, r"r, the total rank, must be a multiple of num_experts=3, got 4"),
        ({"r": 1}, ValueError, "r, the total rank, must be a multiple of num_experts=3, got 1"),
        ({"r": 12}, ValueError, r"r must be at most min\(.*\)=9 with init='goat', got 12"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"top_k": 4}, ValueError, "top_k must be at most num_experts=3, got 4"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 1.0}, TypeError, "top_k must be an int, got 1.0"),
        ({"rho": 0}, ValueError, "rho must be positive and finite, got 0"),
        ({"eta": math.inf}, ValueError, "eta must be positive and finite, got inf"),
        ({"residual_factor": -0.1}, ValueError, "residual_factor must be at least 0"),
        ({"balance_coefficient": "1"}, TypeError, "balance_coefficient must be a number"),
        ({"scale": "none"}, ValueError, "scale must be one of .*, got 'none'"),
        ({"rslora": True}, ValueError, "rslora must be False, scale says how"),
        ({"scale": "theory", "alpha": 4}, ValueError, "alpha must be None with scale='theory'"),
        ({"shared_dropout": 0}, TypeError, "shared_dropout must be a bool, got 0"),
        ({"init": "svd"}, ValueError, r"init must be one of \['goat', 'goat_mini', 'zero'\]"),
    ],
    ids=str,
)
def test_bad_options(options: dict, error: type, message: str) -> None:
    base = plain_linear()
    weight = base.weight.detach().clone()
    with pytest.raises(error, match=f"GOATLinear: {message}"):
        goat(base, **options)
    assert torch.equal(base.weight, weight) and base.weight.requires_grad
    if "at most min" not in message:  # what needs no module is checked by the config too
        with pytest.raises(error, match=f"GOATConfig: {message}"):
            lr.GOATConfig(**{"r": RANK, "num_experts": EXPERTS, "top_k": TOP_K, **options})


def test_patterns() -> None:
    with pytest.raises(ValueError, match=r"rank_pattern\['q_proj'\], the total rank, .*got 9"):
        lr.GOATConfig(rank_pattern={"q_proj": 9})
    with pytest.raises(ValueError, match="alpha_pattern must be empty with scale='theory'"):
        lr.GOATConfig(scale="theory", alpha_pattern={"q_proj": 9})
    config = lr.GOATConfig(
        r=4, num_experts=2, alpha=6, rank_pattern={"q_proj": 8}, alpha_pattern={"up_proj": 2}
    )
    model = lr.adapt(TinyLM(), config)
    shapes = {n: (*m.lora_a.shape, m.scaling) for n, m in model.layers[0].named_children()}
    assert shapes == {
        "q_proj": (2, 4, 8, 1.5),
        "up_proj": (2, 2, 8, 1.0),
        "down_proj": (2, 2, 16, 3.0),
    }
    with pytest.raises(ValueError, match=r"adapt: layers\.0\.q_proj: GOATLinear: r must be at"):
        lr.adapt(TinyLM(), lr.GOATConfig(r=16))


def test_it_cannot_be_merged_and_says_why() -> None:
    model = goat_model()
    before = copy.deepcopy(model.state_dict())
    why = "which experts act depends on the input"
    for call in (lr.merge, lambda m: lr.unload(m, merge=True)):
        with pytest.raises(TypeError, match=rf"merge: layers\.0\.q_proj must .*GOATLinear: {why}"):
            call(model)
    with pytest.raises(TypeError, match=f"GOATLinear.merge: .*{why}"):
        model.layers[0].q_proj.merge()
    with pytest.raises(TypeError, match=f"GOATLinear.delta_weight: .*{why}"):
        model.layers[0].q_proj.delta_weight()
    assert lr.unmerge(model) is model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# -------------------------------------------------------------- what the released code got wrong


@pytest.mark.parametrize("expert_rank", [2, 32])
def test_an_expert_without_tokens_is_not_run(expert_rank: int) -> None:
    """Expert 0 is poisoned, so that running it on any token shows."""
    module = goat(nn.Linear(64, 48), r=4 * expert_rank, num_experts=4, init="zero", dropout=0.2)
    randomize(module)
    with torch.no_grad():
        module.router_weight[0] = 0
        module.router_weight[1:] = 1
        module.lora_a[0] = module.lora_b[0] = torch.nan
    x = torch.rand(20, 64, requires_grad=True)  # positive: every token prefers experts 1 to 3
    y = module.train()(x)
    (y.square().mean() + lr.balance_loss(module)).backward()
    for tensor in (y, x.grad, module.router_weight.grad, module.lora_a.grad, module.lora_b.grad):
        assert tensor.isfinite().all()
    assert not module.lora_a.grad[0].any() and not module.lora_b.grad[0].any()
    assert module.router_weight.grad[0].any()  # it can still become attractive


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("num_experts, top_k", [(8, 2), (4, 4)])
def test_no_copy_of_the_activations_is_kept(num_experts: int, top_k: int, dropout: float) -> None:
    """x itself in its own dtype, h, and what the router knows of every token."""
    rows, rank = 50, 16
    linear = nn.Linear(96, 80, dtype=torch.bfloat16)
    module = GOATLinear.from_linear(
        linear, r=rank, num_experts=num_experts, top_k=top_k, dropout=dropout
    )
    x = torch.randn(rows, 96, dtype=torch.bfloat16)
    bf16, fp32, int64 = 2, 4, 8
    per_row = 96 * bf16 + rank * bf16 + num_experts * fp32 + top_k * (int64 + fp32)
    assert bytes_kept_by(module, x) == (
        rows * per_row + num_experts * int64 + (int64 if dropout else 0)
    )


def test_choices_are_counted_right() -> None:
    module = goat(nn.Linear(16, 16), r=8, num_experts=8, top_k=3, balance_coefficient=1.0).train()
    x = torch.randn(5, 7, 16)
    probs = torch.softmax(x @ module.router_weight.mT, -1)
    expected = torch.zeros(8, dtype=torch.int64)
    for row in probs.reshape(-1, 8).tolist():
        for i in sorted(range(8), key=lambda i: -row[i])[:3]:
            expected[i] += 1
    assert torch.equal(module.expert_counts(x), expected)
    assert expected.sum() == 3 * 35
    module(x)
    share, mean = expected / 35, probs.reshape(-1, 8).mean(0)
    torch.testing.assert_close(lr.balance_loss(module), 8 * (share * mean).sum())
    with torch.no_grad():  # even probabilities: the loss is the sum of the shares, top_k
        module.router_weight.zero_()
        module(x)
        assert lr.balance_loss(module).item() == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_counts_are_those_of_the_forward(autocast: bool, dtype: torch.dtype) -> None:
    """Many near ties, so that a rounding elsewhere would show."""
    module = goat(nn.Linear(64, 8, dtype=dtype), r=8, num_experts=8, balance_coefficient=1.0)
    x = torch.randn(4096, 64, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module.router_weight.mul_(1e-3)
        module.train()(x)
        counts = module.expert_counts(x)
    # All probabilities are about 1/8, so the loss hardly tells the shares apart; the op's ids do.
    rounded = x.bfloat16() if autocast else x
    ids = lr.ops.moe_lowrank_add(
        *(torch.zeros(4096, 8, dtype=rounded.dtype), rounded, module.router_weight),
        *(module.lora_a, module.lora_b),
        top_k=TOP_K,
    ).topk_ids
    expected = torch.bincount(ids.flatten(), minlength=8)
    # The op adds its products in another order; a tie to the last bit may fall the other way.
    assert (counts - expected).abs().sum() <= 4


@pytest.mark.parametrize("shared", [False, True])
def test_every_expert_draws_its_own_dropout_unless_shared(shared: bool) -> None:
    module = goat(
        nn.Linear(64, 3, bias=False), init="zero", r=2, num_experts=2, dropout=0.5,
        shared_dropout=shared,
    )  # fmt: skip
    with torch.no_grad():
        module.weight.zero_()
        module.router_weight.zero_()
        module.lora_a[0], module.lora_a[1] = 1, -1
        module.lora_b.fill_(1)
    # Under one mask the two experts cancel.
    cancels = not module.train()(torch.ones(20, 64)).any()
    assert cancels is shared


# ------------------------------------------------------------------------------- the balance loss


def reference_balance_loss(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The sum, from the inputs of the modules and the definition alone, differentiable."""
    terms: list[Tensor] = []

    def add(module: GOATLinear, args: tuple[Tensor]) -> None:
        (x,) = args
        logits = x @ module.router_weight.mT
        loss = reference.moe_route(logits, top_k=module.top_k, token_mask=mask)[3]
        terms.append(module.balance_coefficient * loss)

    hooks = [m.register_forward_pre_hook(add) for m in model.modules() if isinstance(m, GOATLinear)]
    model(ids)
    for hook in hooks:
        hook.remove()
    lr.balance_loss(model)  # what this forward left
    return torch.stack(terms).sum()


def test_it_is_the_sum_over_the_modules_with_gradients() -> None:
    model = goat_model()
    for index, module in enumerate(m for m in model.modules() if isinstance(m, GOATLinear)):
        module.balance_coefficient = 0.1 * (index + 1)
    expected = reference_balance_loss(model, IDS)
    expected_gradients = gradients(model, expected)
    model(IDS)
    loss = lr.balance_loss(model)
    torch.testing.assert_close(loss, expected)
    assert loss.shape == () and loss.dtype == torch.float32
    # Experts of earlier modules matter too: they make the inputs of later routers.
    found = gradients(model, loss)
    for name in found.keys() - expected_gradients.keys():  # nothing routes what the last one makes
        assert name.startswith("layers.1.down_proj.lora_") and not found.pop(name).any()
    assert_same(found, expected_gradients)


def test_only_the_balance_loss_is_differentiated() -> None:
    """Nothing reaches y: a module alone, whose experts then get zeros."""
    module = goat().train()
    module(torch.randn(4, IN))
    lr.balance_loss(module).backward()
    assert module.router_weight.grad.any()
    assert not any(t.grad is not None and t.grad.any() for t in (module.lora_a, module.lora_b))


def test_each_forward_is_collected_once() -> None:
    model = goat_model()
    assert lr.balance_loss(model) == 0
    model(IDS)
    assert len(pending(model)) == 6
    assert lr.balance_loss(model) > 0
    assert lr.balance_loss(model) == 0 and not pending(model)


def test_the_last_forward_counts() -> None:
    model = goat_model()
    model(IDS)
    expected = lr.balance_loss(model)
    model(IDS.flip(0, 1))
    model(IDS)
    assert torch.equal(lr.balance_loss(model), expected)


def test_what_backward_has_gone_through_is_not_collected() -> None:
    """Without a call between: the graph is freed, adding it again would raise."""
    model = goat_model()
    task_loss(model).backward()
    assert not pending(model)
    model.layers[0](torch.randn(2, 8))
    loss = lr.balance_loss(model)
    loss.backward()  # three modules of one block, the others' graphs are gone
    kept = task_loss(model)
    other = copy.deepcopy(model)
    task_loss(other).backward()  # another model's backward takes nothing away
    assert len(pending(model)) == 6
    kept.backward()


def test_a_collected_graph_is_freed() -> None:
    """Nothing of a forward stays alive once its loss is collected or differentiated."""
    import gc
    import weakref

    for collect in (True, False):
        model = goat_model()
        loss = task_loss(model)
        alive = weakref.ref(model.layers[0].q_proj._balance_loss)
        if collect:
            lr.balance_loss(model)
        else:
            loss.backward()
        gc.disable()
        try:
            del loss
            assert alive() is None
        finally:
            gc.enable()


def test_evaluation_adds_and_keeps_nothing() -> None:
    model = goat_model().eval()
    model(IDS)
    assert not pending(model) and lr.balance_loss(model) == 0
    model.train()
    model.layers[1].eval()  # a part in evaluation mode, as when half of the model is frozen
    model(IDS)
    assert len(pending(model)) == 3


def test_a_coefficient_of_zero_keeps_nothing() -> None:
    model = goat_model(balance_coefficient=0.0)
    model(IDS)
    assert not pending(model) and lr.balance_loss(model) == 0


def test_gradient_accumulation() -> None:
    model, parts = goat_model(), [IDS[:1], IDS[1:]]
    expected: dict[str, Tensor] = {}
    for part in parts:
        single = gradients(model, task_loss(model, part) + lr.balance_loss(model))
        expected = {n: (expected[n] if expected else 0) + g / 2 for n, g in single.items()}
    model.zero_grad()
    for part in parts:
        ((task_loss(model, part) + lr.balance_loss(model)) / 2).backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, expected)


class Checkpointed(nn.Module):
    """The blocks of a TinyLM under activation checkpointing."""

    def __init__(self, model: TinyLM, reentrant: bool) -> None:
        super().__init__()
        self.model = model
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed(ids)
        if self.reentrant:
            x.requires_grad_()
        for layer in self.model.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.model.lm_head(self.model.norm(x))


@pytest.mark.parametrize("masked", [False, True])
def test_activation_checkpointing(masked: bool) -> None:
    model = goat_model(dropout=0.3)
    wrapped = Checkpointed(model, reentrant=False)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]) if masked else None
    found = []
    for run in (model, wrapped):
        torch.manual_seed(3)
        with lr.token_mask(mask):
            balance_and_task = task_loss(run)
            balance = lr.balance_loss(run)
            found.append((balance.detach(), gradients(model, balance_and_task + balance)))
        # The second forward has left nothing to add once more, and no graph behind.
        assert not pending(model) and lr.balance_loss(run) == 0
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[1][1], found[0][1], rtol=0, atol=0)


def test_reentrant_checkpointing_is_refused() -> None:
    model = goat_model()
    task_loss(wrapped := Checkpointed(model, reentrant=True))
    with pytest.raises(RuntimeError, match=r"layers\.0\.q_proj must have run with gradients"):
        lr.balance_loss(wrapped)


def test_without_gradients_it_is_a_number() -> None:
    model = goat_model()
    with torch.no_grad():
        model(IDS)
        assert lr.balance_loss(model) > 0
        model(IDS)
    model.requires_grad_(False)
    assert not lr.balance_loss(model).requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_do_not_take_the_loss_along(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = goat_model()
    logits = model(IDS)
    other = copied(model)
    assert not pending(other) and len(pending(model)) == 6
    assert torch.equal(other(IDS), logits)
    assert torch.equal(lr.balance_loss(other), lr.balance_loss(model))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_compiled(dropout: float, checkpointed: bool) -> None:
    model = goat_model(dropout=dropout, target_modules=["q_proj", "layers.1.up_proj"])
    run = Checkpointed(model, reentrant=False) if checkpointed else model
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = {}
    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    with torch._dynamo.config.patch({name: checkpointed}):
        for kind in (run, compiled):
            torch.manual_seed(4)
            task = task_loss(kind)
            balance = lr.balance_loss(model)
            found[kind] = (balance.detach(), gradients(model, task + balance))
            assert not pending(model)
    assert found[compiled][0] > 0
    if dropout == 0:  # a compiler draws other masks
        torch.testing.assert_close(found[compiled][0], found[run][0])
        assert_same(found[compiled][1], found[run][1])
    model.eval()
    compiled(IDS[:, :-1])
    assert not pending(model)


def test_compiled_under_a_token_mask() -> None:
    model = goat_model(target_modules=["q_proj"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mask in (None, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), torch.eye(2, 4).bool(), None):
        found = []
        for run in (model, compiled):
            with lr.token_mask(mask):
                run(IDS)
            found.append(lr.balance_loss(model))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("call", [lr.balance_loss, lr.expert_load])
def test_models_without_experts(call: Callable) -> None:
    model = lr.adapt(TinyLM(), lr.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"_lo(ss|ad): model must contain a GOATLinear, got a"):
        call(model)


# ---------------------------------------------------------------------------------- the token mask


def test_padding_does_not_count() -> None:
    module = goat(balance_coefficient=1.0).train()
    x = torch.randn(2, 5, IN)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    y = module(x)
    everything = lr.balance_loss(module)
    with lr.token_mask(mask):
        assert torch.equal(module(x), y)
        masked = lr.balance_loss(module)
        counts = module.expert_counts(x)
    module(x[mask.bool()])
    torch.testing.assert_close(masked, lr.balance_loss(module))
    assert not torch.allclose(masked, everything)
    assert torch.equal(counts, module.expert_counts(x[mask.bool()]))
    with lr.token_mask(torch.zeros(2, 5, dtype=torch.bool)):
        module(x)
        assert lr.balance_loss(module) == 0


def test_masks_nest_and_end_with_their_block() -> None:
    from lowrank_ext.methods.goat.token_mask import current_token_mask

    x, outer, inner = torch.zeros(2, 3, 4), torch.ones(2, 3), torch.eye(2, 3)
    with pytest.raises(KeyError), lr.token_mask(outer.int()):
        with lr.token_mask(inner.bool()):
            assert torch.equal(current_token_mask(x), inner.bool())
            assert current_token_mask(x[0]) is None, "of another shape"
            with lr.token_mask(None):
                assert current_token_mask(x) is None
        assert torch.equal(current_token_mask(x), outer.bool())
        raise KeyError
    assert current_token_mask(x) is None
    for bad in (torch.ones(2, 3), torch.tensor(1)):
        with pytest.raises(ValueError, match="token_mask: mask must be a bool or integer tensor"):
            lr.token_mask(bad)


# --------------------------------------------------------------------------------------- the load


def test_expert_load() -> None:
    model = goat_model()
    inputs: dict[str, list[Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, GOATLinear):
            module.register_forward_pre_hook(
                lambda m, args, path=path: inputs.setdefault(path, []).append(args[0])
            )
    compiled = torch.compile(model, backend="aot_eager")
    compiled(IDS)
    inputs.clear()
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    with lr.expert_load(compiled) as load:
        compiled(IDS)
        with lr.token_mask(mask):
            model.eval()(IDS)
    for path, counts in load.counts.items():
        module = model.get_submodule(path.removeprefix("_orig_mod."))
        whole, part = inputs[path.removeprefix("_orig_mod.")]
        expected = module.expert_counts(whole) + module.expert_counts(part[mask])
        assert torch.equal(counts, expected) and counts.sum() == 2 * (8 + 5)
    shares = next(iter(load.shares().values()))
    assert shares.sum() == pytest.approx(4) and len(load.counts) == 6
    model(IDS)
    assert next(iter(load.counts.values())).sum() == 2 * (8 + 5), "counted after the block"


def test_shares_before_any_forward_are_zero() -> None:
    """And so they are where every token was masked: not nan."""
    model = lr.adapt(TinyLM(width=16, vocab=64), lr.GOATConfig(r=8, num_experts=4))
    load = lr.expert_load(model)
    assert all(torch.equal(shares, torch.zeros(4)) for shares in load.shares().values())
    with load, lr.token_mask(torch.zeros(2, 4, dtype=torch.bool)):
        model(torch.zeros(2, 4, dtype=torch.int64))
    assert all(torch.equal(shares, torch.zeros(4)) for shares in load.shares().values())


def test_training_with_the_loss_balances_the_experts() -> None:
    """And without it the load stays as uneven as it began."""
    busiest = {}
    for coefficient in (0.0, 0.5):
        torch.manual_seed(0)
        config = lr.GOATConfig(r=8, num_experts=8, balance_coefficient=coefficient, init="zero")
        model = lr.adapt(TinyLM(width=16, vocab=64), config).train()
        with torch.no_grad():
            model.embed.weight[:, 0] = 2  # an offset by which routers prefer some experts
        ids = torch.randint(0, 64, (4, 33))
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
        for _ in range(40):
            (task_loss(model, ids) + lr.balance_loss(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with lr.expert_load(model) as load, torch.no_grad():
            model(ids)
        shares = torch.stack(list(load.shares().values()))
        busiest[coefficient] = shares.max(dim=1).values.mean()
    assert busiest[0.5] < 1.5 and busiest[0.0] > 1.3 * busiest[0.5], busiest
