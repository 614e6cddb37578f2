"""LoRALinear and LaMDALinear as single modules."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from devices import DtypePair
from module_cases import (
    ALL_METHODS,
    BASES,
    DENSE_BASES,
    EXPERTS,
    IN,
    METHODS,
    METHODS_AND_BASES,
    OUT,
    PLAIN_BASES,
    RANK,
    RESIDUAL,
    RESIDUAL_EXPERTS,
    STARTS_AT_BASE,
    ZERO_BRANCH,
    Int8Linear,
    Method,
    branch,
    conv1d,
    plain_linear,
    randomize,
    weight_of,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_ext.nn import (
    AFLoRALinear,
    BasisLoRALinear,
    LaMDALinear,
    LoRALinear,
    LowRankLinear,
    ResLoRALinear,
)
from lowrank_ext.nn.init import top_singular_triples

by_method = pytest.mark.parametrize("method", METHODS, ids=str)
by_any_method = pytest.mark.parametrize("method", ALL_METHODS, ids=str)
by_method_and_merged = pytest.mark.parametrize(
    "method, merged",
    [(m, merged) for m in ALL_METHODS for merged in (False, True) if not merged or m in METHODS],
    ids=str,
)


def make(method: Method, base: nn.Module, **options) -> LowRankLinear:
    return method.module.from_linear(
        base, r=RANK, init=method.init, **method.options(RANK), **options
    )


def make_random(method: Method, base: nn.Module, **options) -> LowRankLinear:
    module = make(method, base, **options)
    randomize(module)
    return module


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("method, kind", METHODS_AND_BASES, ids=str)
def test_forward_and_gradients_are_the_formula(method: Method, kind: str) -> None:
    base = BASES[kind](torch.float64)
    module = make_random(method, base, alpha=6.0, adapter_dtype="float64")
    plain = module.to_linear(merge=False) if module.base_layer is None else module.base_layer
    trains = [p for p in module.parameters() if p.requires_grad]
    if module.residual_taken:
        module.restore_base()
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 5, OUT, dtype=torch.float64)

    y = module(x)
    expected = plain(x) + branch(module, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, [x, *trains], dout),
        torch.autograd.grad(expected, [x, *trains], dout),
    )


@pytest.mark.parametrize(
    "method, kind", [(m, kind) for m, kind in METHODS_AND_BASES if m in ZERO_BRANCH], ids=str
)
def test_zero_branch_leaves_the_output_bit_for_bit(
    method: Method, kind: str, dtype: torch.dtype
) -> None:
    base = BASES[kind](dtype)
    x = torch.randn(4, IN, dtype=dtype)
    expected = base(x)
    module = make(method, base, dropout=0.5, adapter_dtype=dtype).train()
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("kind", DENSE_BASES)
@pytest.mark.parametrize("method", RESIDUAL, ids=str)
def test_residual_leaves_the_output_to_rounding(
    method: Method, kind: str, dtype: torch.dtype
) -> None:
    base = BASES[kind](dtype)
    x = torch.randn(64, IN, dtype=dtype)
    weight = weight_of(base).detach().double()
    expected = base(x).double()
    module = make(method, base, alpha=4.5)
    # Each of the three products of the branch rounds once; the residual is rounded once more.
    size = x.double().abs() @ weight.abs().mT + module.delta_weight().abs().double().sum(1)
    bound = 4 * torch.finfo(dtype).eps * (size + expected.abs() + 1)
    assert ((module(x).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("method", RESIDUAL, ids=str)
def test_residual_takes_the_top_of_the_spectrum(method: Method) -> None:
    base = plain_linear()
    weight = base.weight.detach().clone()
    module = make(method, base, alpha=7.0, rslora=True)
    sig = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(module.delta_weight())[:RANK], sig[:RANK])
    torch.testing.assert_close(
        torch.linalg.svdvals(module.base_weight())[: min(IN, OUT) - RANK], sig[RANK:]
    )
    torch.testing.assert_close(module.base_weight() + module.delta_weight(), weight)


def test_lamda_starts_from_orthonormal_projections_and_a_diagonal_core() -> None:
    base = plain_linear()
    sig = torch.linalg.svdvals(base.weight)
    module = LaMDALinear.from_linear(base, r=RANK, alpha=6.0)
    torch.testing.assert_close(module.lora_a @ module.lora_a.mT, torch.eye(RANK))
    torch.testing.assert_close(module.lora_b.mT @ module.lora_b, torch.eye(RANK))
    torch.testing.assert_close(module.core.detach(), torch.diag(sig[:RANK] / 2))
    zero_core = LaMDALinear.from_linear(plain_linear(), r=RANK, init="svd_zero_core")
    assert not zero_core.core.any() and zero_core.lora_b.any()


def test_singular_vectors_have_fixed_signs() -> None:
    weight = torch.randn(OUT, IN)
    u, sig, v_t = top_singular_triples(weight, RANK)
    negated = top_singular_triples(-weight, RANK)
    torch.testing.assert_close(negated[0], u)
    torch.testing.assert_close(negated[2], -v_t)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    assert (sig.diff() <= 0).all()


def test_pissa_is_pefts_up_to_signs() -> None:
    peft = pytest.importorskip("peft")
    base = plain_linear()
    config = peft.LoraConfig(r=RANK, lora_alpha=6, init_lora_weights="pissa", target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    ours = LoRALinear.from_linear(base, r=RANK, alpha=6.0, init="pissa")
    torch.testing.assert_close(ours.delta_weight(), theirs.get_delta_weight("default"))
    torch.testing.assert_close(ours.lora_a.abs(), theirs.lora_A["default"].weight.abs())
    torch.testing.assert_close(ours.weight, theirs.base_layer.weight)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_seed_gives_pefts_numbers(init: str) -> None:
    peft = pytest.importorskip("peft")
    base = plain_linear()
    config = peft.LoraConfig(
        r=RANK, init_lora_weights=init == "kaiming" or init, target_modules=["0"]
    )
    torch.manual_seed(5)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    torch.manual_seed(5)
    ours = LoRALinear.from_linear(base, r=RANK, init=init)
    assert torch.equal(ours.lora_a, theirs.lora_A["default"].weight)
    assert torch.equal(ours.lora_b, theirs.lora_B["default"].weight)


def test_the_seed_gives_the_same_numbers_in_every_dtype() -> None:
    starts = []
    for dtype in (torch.float32, torch.bfloat16):
        base = plain_linear(dtype)
        torch.manual_seed(1)
        starts.append(LoRALinear.from_linear(base, r=RANK).lora_a)
    assert torch.equal(*starts)


@by_any_method
@pytest.mark.parametrize("kind", PLAIN_BASES)
def test_the_base_parameters_are_the_same_objects_and_frozen(method: Method, kind: str) -> None:
    base = BASES[kind](torch.float32)
    weight, bias = base.weight, base.bias
    module = make(method, base)
    assert module.weight is weight and module.bias is bias
    assert not weight.requires_grad and (bias is None or not bias.requires_grad)
    assert {"weight", "lora_a", "lora_b"} <= module.state_dict().keys()
    plain = module.to_linear(merge=False)
    assert type(plain) is type(base)
    assert plain.weight is weight and plain.bias is bias


@by_method
def test_what_trains(method: Method) -> None:
    module = make(method, plain_linear())
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    assert (
        trains
        == {
            LoRALinear: {"lora_a", "lora_b"},
            LaMDALinear: {"lora_b", "core"},
            AFLoRALinear: {"lora_a", "lora_b", "rank_scale", "out_scale"},
            ResLoRALinear: {"lora_a", "lora_b"},
            BasisLoRALinear: {"lora_a", "lora_b"},
        }[method.module]
    )
    if method.module is AFLoRALinear:
        vectors = make(method, plain_linear(), train_projections=False)
        names = [n for n, p in vectors.named_parameters() if p.requires_grad]
        assert names == ["rank_scale", "out_scale"]
    if method.module is LaMDALinear and method.init != "lora":
        frozen_b = make(method, plain_linear(), train_lora_b=False)
        assert [n for n, p in frozen_b.named_parameters() if p.requires_grad] == ["core"]


@by_method
@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept_and_dropout_acts_in_training_only(method: Method, training: bool) -> None:
    module = make_random(method, plain_linear().train(training), dropout=0.5)
    assert module.training is training
    assert module.to_linear(merge=True).training is training
    module.unmerge()
    x = torch.randn(32, IN)
    state = torch.get_rng_state()
    differs = not torch.equal(module(x), module.eval()(x))
    assert differs is training
    assert torch.equal(torch.get_rng_state(), state) is not training


@pytest.mark.parametrize(
    "r, alpha, rslora, scaling",
    [
        (4, None, False, 1.0),
        (4, None, True, 2.0),
        (4, 8, False, 2.0),
        (4, 8, True, 4.0),
        (1, 3, True, 3.0),
    ],
)
def test_scaling(r: int, alpha: float | None, rslora: bool, scaling: float) -> None:
    for module_class in (LoRALinear, LaMDALinear):
        module = module_class.from_linear(plain_linear(), r=r, alpha=alpha, rslora=rslora)
        assert module.scaling == scaling


@pytest.mark.parametrize(
    "base, asked, expected",
    [
        (torch.float32, "float32", torch.float32),
        (torch.bfloat16, "float32", torch.float32),
        (torch.bfloat16, "base", torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float16, "float32", torch.float32),
        (torch.float64, "float32", torch.float64),
        (torch.float64, "bfloat16", torch.float64),
    ],
)
def test_adapter_dtype(base: torch.dtype, asked: str | torch.dtype, expected: torch.dtype) -> None:
    for module_class in (LoRALinear, LaMDALinear):
        module = module_class.from_linear(plain_linear(base), r=RANK, adapter_dtype=asked)
        assert {t.dtype for t in module.adapter_tensors().values()} == {expected}
        assert module.weight.dtype == base
        y = module(torch.randn(2, IN, dtype=base))
        assert y.dtype == base


@pytest.mark.parametrize(
    "base, asked",
    [
        (torch.float32, "bfloat16"),
        (torch.bfloat16, "float16"),
        (torch.bfloat16, "float64"),
    ],
)
def test_adapter_dtype_that_the_ops_lack_is_refused(base: torch.dtype, asked: str) -> None:
    with pytest.raises(ValueError, match=f"LoRALinear: adapter_dtype must be .*, got '{asked}'"):
        LoRALinear.from_linear(plain_linear(base), adapter_dtype=asked)


@by_method
@pytest.mark.parametrize("kind", DENSE_BASES)
def test_merge_rounds_once_and_unmerge_restores_the_bits(
    method: Method, kind: str, dtypes: DtypePair
) -> None:
    asked = str(dtypes.adapter).removeprefix("torch.")
    module = make_random(method, BASES[kind](dtypes.base), alpha=2.0, adapter_dtype=asked).eval()
    x = torch.randn(6, IN, dtype=dtypes.base)
    before, unmerged_y = module.base_weight().clone(), module(x)
    parameter = module.base_parameter
    delta = module.delta_weight()
    wide = torch.promote_types(dtypes.base, torch.float32)
    assert delta.dtype == wide

    module.merge()
    merged = (before.to(wide) + delta).to(dtypes.base)
    assert torch.equal(module.base_weight(), merged)
    assert module.base_parameter is parameter and not parameter.requires_grad
    assert parameter.dtype == dtypes.base
    bias = module.base_layer.bias if module.base_layer else module.bias
    assert torch.equal(module(x), F.linear(x, merged, bias))
    module.merge()
    assert torch.equal(module.base_weight(), merged)

    module.unmerge()
    assert torch.equal(module.base_weight(), before)
    assert module.unmerged_weight is None
    assert torch.equal(module(x), unmerged_y)
    module.unmerge()
    assert torch.equal(module.base_weight(), before)


@by_method
@pytest.mark.parametrize("kind", PLAIN_BASES)
def test_merged_output_is_the_unmerged_one(method: Method, kind: str) -> None:
    module = make_random(method, BASES[kind](torch.float64)).eval()
    x = torch.randn(3, IN, dtype=torch.float64)
    unmerged = module(x)
    module.merge()
    torch.testing.assert_close(module(x), unmerged)
    torch.testing.assert_close(module.to_linear(merge=True)(x), unmerged)


def test_delta_weight_is_exact_whatever_the_matmul_precision() -> None:
    module = LoRALinear.from_linear(nn.Linear(64, 64), r=8)
    randomize(module)
    expected = (module.lora_b.double() @ module.lora_a.double()).float()
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(module.delta_weight(), expected)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_delta_weight_is_differentiable() -> None:
    module = LaMDALinear.from_linear(plain_linear(), r=RANK)
    module.delta_weight().square().sum().backward()
    assert module.core.grad.any() and module.lora_b.grad.any()


@by_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_original_weight_survives_a_residual(method: Method, dtype: torch.dtype) -> None:
    base = plain_linear(dtype)
    weight = base.weight.detach().clone()
    module = make_random(method, base, alpha=5.0)
    within_one_rounding = dict(rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    for merged in (False, True):
        if merged:
            module.merge()
        torch.testing.assert_close(module.original_weight(), weight, **within_one_rounding)
    plain = module.to_linear(merge=False)
    torch.testing.assert_close(plain.weight.detach(), weight, **within_one_rounding)
    if method not in RESIDUAL:
        assert torch.equal(plain.weight, weight)


@pytest.mark.parametrize("method", RESIDUAL + RESIDUAL_EXPERTS, ids=str)
def test_a_residual_is_rebuilt_bit_for_bit_from_its_buffers(method: Method) -> None:
    base = plain_linear(torch.bfloat16)
    fresh = copy.deepcopy(base)
    trained = make(method, base, alpha=5.0)
    rebuilt = method.module.from_linear(
        fresh, r=RANK, alpha=5.0, init=method.init, initialize=False, **method.options(RANK)
    )
    assert torch.equal(fresh.weight, rebuilt.weight) and not rebuilt.lora_b.any()
    with torch.no_grad():
        for name, tensor in rebuilt.adapter_tensors().items():
            tensor.copy_(trained.adapter_tensors()[name])
    rebuilt.take_residual()
    assert torch.equal(rebuilt.weight, trained.weight)
    rebuilt.take_residual()
    assert torch.equal(rebuilt.weight, trained.weight), "taken twice"


@by_method_and_merged
@pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)
def test_copies_are_equal_and_independent(method: Method, merged: bool, copy_of) -> None:
    module = make_random(method, plain_linear(torch.bfloat16), dropout=0.25).eval()
    before = module.base_weight().clone()
    if merged:
        module.merge()
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    other = copy_of(module)
    assert torch.equal(other(x), module(x))
    assert other.merged is merged and repr(other) == repr(module)
    other.unmerge()
    assert torch.equal(other.base_weight(), before)
    with torch.no_grad():
        other.weight.zero_()
        other.lora_b.zero_()
    assert module.lora_b.any() and module.weight.any()
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in module.named_parameters() if p.requires_grad
    }


@by_method_and_merged
def test_to_moves_everything(method: Method, merged: bool) -> None:
    module = make_random(method, plain_linear(torch.bfloat16))
    before = module.base_weight().float().clone()
    if merged:
        module.merge()
    module.to(torch.float32)
    tensors = [*module.parameters(), *module.buffers()]
    assert {t.dtype for t in tensors} == {torch.float32}
    module.unmerge()
    assert torch.equal(module.base_weight(), before)
    assert module(torch.randn(2, IN)).dtype == torch.float32


@by_any_method
def test_state_dict_round_trip(method: Method) -> None:
    module = make_random(method, plain_linear(), alpha=5.0)
    torch.manual_seed(1)
    other = make(method, plain_linear(), alpha=5.0)
    assert not torch.equal(other.weight, module.weight)
    assert other.load_state_dict(module.state_dict()) == ([], [])
    x = torch.randn(2, IN)
    assert torch.equal(other(x), module(x))
    assert torch.equal(other.original_weight(), module.original_weight())


@by_method
@pytest.mark.parametrize("kind", PLAIN_BASES)
def test_merged_state_dict_is_the_plain_modules(method: Method, kind: str) -> None:
    plain = BASES[kind](torch.float32)
    module = make_random(method, copy.deepcopy(plain))
    module.merge()
    state = module.state_dict()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    x = torch.randn(2, IN)
    torch.testing.assert_close(plain(x), module(x))
    unmerged = make(method, BASES[kind](torch.float32))
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"lora_a", "lora_b"'):
        unmerged.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"is merged: call unmerge\(\) before loading"):
        module.load_state_dict(unmerged.state_dict())


@by_any_method
def test_built_on_the_meta_device(method: Method) -> None:
    with torch.device("meta"):
        module = method.module(
            IN, OUT, r=RANK, init=method.init, dtype=torch.bfloat16, **method.options(RANK)
        )
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    trains = [p.requires_grad for p in module.parameters()]
    module = module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(float("nan"))
    module.reset_parameters()
    assert [p.requires_grad for p in module.parameters()] == trains
    assert all(t.isfinite().all() for t in (*module.parameters(), *module.buffers()))
    assert module.residual_taken is (method.init in method.module.residual_inits)
    if method not in STARTS_AT_BASE:
        return
    x = torch.randn(5, IN, dtype=torch.bfloat16)
    expected = F.linear(x, module.original_weight(), module.bias)
    torch.testing.assert_close(module(x), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", PLAIN_BASES)
@by_any_method
def test_runs_on_the_meta_device(method: Method, kind: str, dropout: float) -> None:
    module = make(method, PLAIN_BASES[kind](torch.float32)).to("meta")
    module.dropout = dropout
    y = module(torch.empty(5, IN, device="meta"))
    assert y.is_meta and y.shape == (5, OUT)
    y.sum().backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert gradients and all(g is not None and g.is_meta for g in gradients)


@by_any_method
def test_adapting_a_meta_module_then_loading_the_base(method: Method) -> None:
    real = plain_linear()
    module = make(method, nn.Linear(IN, OUT, device="meta"))
    assert module.lora_b.is_meta and not module.residual_taken
    module.to_empty(device="cpu")
    module.load_state_dict(real.state_dict(), strict=False)
    module.reset_adapter()
    torch.testing.assert_close(module.original_weight(), real.weight.detach())
    x = torch.randn(3, IN)
    if method in STARTS_AT_BASE:
        torch.testing.assert_close(module(x), real(x))


@by_method
def test_reset_adapter_starts_over_from_the_same_base(method: Method) -> None:
    base = plain_linear()
    weight = base.weight.detach().clone()
    module = make_random(method, base)
    module.merge()
    module.reset_adapter()
    assert not module.merged
    torch.testing.assert_close(module.original_weight(), weight)
    x = torch.randn(3, IN)
    torch.testing.assert_close(module(x), F.linear(x, weight, module.bias))


def test_a_standalone_module_starts_like_nn_linear() -> None:
    torch.manual_seed(3)
    linear = nn.Linear(IN, OUT)
    torch.manual_seed(3)
    module = LoRALinear(IN, OUT, r=RANK)
    assert torch.equal(module.weight, linear.weight) and torch.equal(module.bias, linear.bias)
    assert LoRALinear(IN, OUT, bias=False, r=RANK).bias is None


@pytest.mark.parametrize("kind", ["negated", "doubling", "int8"])
def test_a_base_that_is_not_its_weight_neither_merges_nor_takes_an_svd(kind: str) -> None:
    base = BASES[kind](torch.float32)
    weight = base.weight.detach().clone()
    module = LoRALinear.from_linear(base, r=RANK)
    assert module.base_layer is base and module.weight is None
    name = type(base).__name__
    with pytest.raises(TypeError, match=rf"LoRALinear.merge: the base must compute .*got {name}"):
        module.merge()
    for method in METHODS:
        if method.init in method.module.svd_inits:
            with pytest.raises(ValueError, match=rf"init must be .*{name} .*got '{method.init}'"):
                make(method, base)
    assert not module.merged and torch.equal(base.weight, weight)
    assert module.to_linear(merge=False) is base


def test_a_quantized_base_has_adapters_in_float32() -> None:
    module = LoRALinear.from_linear(Int8Linear(IN, OUT, torch.bfloat16), r=RANK)
    y = module(torch.randn(2, IN, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert module.lora_a.dtype == module.lora_b.grad.dtype == torch.float32


@by_any_method
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiles_without_graph_breaks(method: Method, dropout: float) -> None:
    module = make_random(method, plain_linear(), dropout=dropout).train(dropout > 0)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, IN, requires_grad=True)
        torch.manual_seed(2)
        y = module(x)
        expected = torch.autograd.grad(y.sum(), [x, module.lora_b])
        torch.manual_seed(2)
        compiled_y = compiled(x)
        if dropout == 0:
            torch.testing.assert_close(compiled_y, y)
            actual = torch.autograd.grad(compiled_y.sum(), [x, module.lora_b])
            torch.testing.assert_close(actual, expected)
        else:
            assert compiled_y.isfinite().all() and not torch.equal(compiled_y, module.eval()(x))
            module.train()


@by_method
def test_compiles_when_merged(method: Method) -> None:
    module = make_random(method, conv1d())
    module.merge()
    x = torch.randn(3, IN)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(
    "method, kind", [(m, kind) for m, kind in METHODS_AND_BASES if kind != "int8"], ids=str
)
def test_autocast(method: Method, kind: str) -> None:
    module = make_random(method, BASES[kind](torch.float32))
    x = torch.randn(4, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        y.sum().backward()
        if kind in DENSE_BASES and method in METHODS:
            module.merge()
        assert module(x).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(r=0), ValueError, "LoRALinear: r must be at least 1, got 0"),
        (dict(r=2.0), TypeError, "LoRALinear: r must be an int, got 2.0"),
        (dict(alpha=0), ValueError, "LoRALinear: alpha must be positive and finite, got 0"),
        (dict(dropout=1.5), ValueError, "LoRALinear: dropout must be between 0 and 1, got 1.5"),
        (dict(init="svd"), ValueError, r"LoRALinear: init must be one of \['kaiming'.*got 'svd'"),
        (dict(init="pissa", r=10), ValueError, r"r must be at most min\(.*\)=9 .*got 10"),
        (
            dict(adapter_dtype="int8"),
            ValueError,
            "adapter_dtype must be one of .*, got 'int8'",
        ),
    ],
)
def test_bad_options_leave_the_base_alone(options: dict, error: type, message: str) -> None:
    base = plain_linear()
    weight = base.weight.detach().clone()
    with pytest.raises(error, match=message):
        LoRALinear.from_linear(base, **options)
    assert torch.equal(base.weight, weight) and base.weight.requires_grad


def test_bad_bases_and_combinations() -> None:
    with pytest.raises(TypeError, match=r"from_linear: linear must be nn\.Linear.*got Embedding"):
        LoRALinear.from_linear(nn.Embedding(4, 4))
    with pytest.raises(TypeError, match=r"from_linear: linear must be .*got LoRALinear"):
        LoRALinear.from_linear(LoRALinear(IN, OUT, r=RANK))
    with pytest.raises(ValueError, match="train_lora_b must be True with init='lora'"):
        LaMDALinear.from_linear(plain_linear(), r=RANK, init="lora", train_lora_b=False)


def test_repr_tells_what_it_is() -> None:
    module = LaMDALinear.from_linear(Conv1D(OUT, IN), r=RANK, alpha=6, dropout=0.05)
    module.merge()
    assert repr(module) == (
        f"LaMDALinear(in_features={IN}, out_features={OUT}, bias=True, r=3, scaling=2, "
        "dropout=0.05, init=svd_residual, merged=True)"
    )


@pytest.mark.parametrize(
    "options",
    [{"rank_pattern": {".*": 8}}, {"alpha_pattern": {".*": 2.0}}],
    ids=["rank_pattern", "alpha_pattern"],
)
@by_any_method
def test_patterns_name_modules_of_a_model(method: Method, options: dict) -> None:
    """A pattern that matches everything would give one module another scaling than its rank has."""
    (name,) = options
    if name == "rank_pattern" and method in EXPERTS:
        options = {"rank_pattern": {".*": 2 * RANK}}  # a multiple of the number of experts
    config = method.config(r=RANK, init=method.init, **method.options(RANK), **options)
    with pytest.raises(ValueError, match=f"{name} must be empty for a single module"):
        method.module.from_linear(plain_linear(), config)
    assert method.module.from_linear(plain_linear(), config.for_module("q")).r == config.rank_for(
        "q"
    )


@pytest.mark.parametrize("name", ["bias", "base", "device", "dtype"])
def test_what_the_linear_decides_is_no_option(name: str) -> None:
    with pytest.raises(TypeError, match=f"LoRALinear.from_linear: {name} is linear's own"):
        LoRALinear.from_linear(plain_linear(), r=2, **{name: None})


def test_a_base_of_another_size() -> None:
    with pytest.raises(ValueError, match="base must have in_features=8 and out_features=8"):
        LoRALinear(8, 8, r=4, base=nn.Linear(32, 16))


def test_the_base_class_is_no_method() -> None:
    with pytest.raises(TypeError, match="LowRankLinear: use a subclass"):
        LowRankLinear(32, 16, r=4)
