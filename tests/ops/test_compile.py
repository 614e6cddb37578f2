"""torch.compile (whole graph, static and dynamic), checkpointing and dropout in it, and export."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from devices import DtypePair
from lowrank_cases import (
    FP32,
    MIXED,
    OPS,
    OPTIONAL,
    Tensors,
    call,
    make_tensors,
    present,
    seed_tensor,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_ext import ops
from lowrank_ext.nn import LaMDALinear, LoRALinear


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


Run = Callable[..., Tensor]


def gradients(run: Run, tensors: Tensors, **options: object) -> dict[str, Tensor]:
    """y and all gradients of `run(tensors, **options)`."""
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
    names = present(tensors)
    y = run(leaves, **options)
    grads = torch.autograd.grad(y.float().square().sum(), [leaves[name] for name in names])
    return {"y": y.detach()} | dict(zip(names, grads, strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to what a compiler may change: the order of sums, and roundings between fused steps."""
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype and value.shape == expected[name].shape, name
        tolerance = 4 * torch.finfo(value.dtype).eps * max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(
            value, expected[name], rtol=1e-5, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("dtypes", "dynamic"), [(FP32, True), (MIXED, False)], ids=["float32-dynamic", "mixed-static"]
)
@pytest.mark.parametrize("op", OPS)
def test_compiled_equals_eager(device: str, op: str, dtypes: DtypePair, dynamic: bool) -> None:
    """Under inductor, whose first half is aot_eager."""

    def run(tensors: Tensors, seed: Tensor) -> Tensor:
        return call(ops, op, tensors, scaling=2.0, dropout_p=0.3, seed=seed)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for num_rows in (10, 11) if dynamic else (10,):
        tensors = make_tensors(op, (num_rows,), 12, 9, 3, dtypes, device, optional=OPTIONAL)
        seed = seed_tensor(num_rows, device)
        assert_close(gradients(compiled, tensors, seed=seed), gradients(run, tensors, seed=seed))


@pytest.mark.parametrize("op", OPS)
def test_dynamic_rows_compile_once(device: str, op: str) -> None:

    def run(tensors: Tensors) -> Tensor:
        return call(ops, op, tensors)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for lead in ((5,), (10,), (17,), (33,)):
        tensors = make_tensors(op, lead, 12, 9, 3, FP32, device)
        assert_close(gradients(compiled, tensors), gradients(run, tensors))
    assert graphs_compiled() == 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("frozen", [("lora_a",), ("lora_a", "lora_b"), ("lora_b",)], ids="+".join)
def test_compiled_with_frozen_tensors(device: str, op: str, frozen: tuple[str, ...]) -> None:
    tensors = make_tensors(op, (7,), 12, 9, 3, FP32, device, optional=("core",))
    trained = [name for name in present(tensors) if name not in (*frozen, "weight", "bias")]

    def run(*values: Tensor) -> Tensor:
        return call(ops, op, tensors | dict(zip(trained, values, strict=True)))

    leaves = [tensors[name].clone().requires_grad_() for name in trained]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    got = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    assert_close(dict(zip(trained, got, strict=True)), dict(zip(trained, expected, strict=True)))


def test_padded_strides_from_the_compiler(device: str) -> None:
    """RF-09: the op behind a product whose rows the compiler may pad."""
    projection = torch.randn(64, 33, device=device)
    base = make_tensors("lowrank_linear", (1,), 33, 17, 3, FP32, device)

    def run(tensors: Tensors) -> Tensor:
        return call(ops, "lowrank_linear", tensors | {"x": tensors["x"] @ projection})

    compiled = torch.compile(run, fullgraph=True)
    # Any other number of rows costs one graph for all.
    for num_rows, graphs in ((10, 1), (11, 2), (12, 2)):
        tensors = base | {"x": torch.randn(num_rows, 64, device=device)}
        assert_close(gradients(compiled, tensors), gradients(run, tensors))
        assert graphs_compiled() <= graphs


def test_padded_rows_given_to_a_compiled_op(device: str) -> None:
    tensors = make_tensors("lowrank_linear", (10,), 33, 17, 3, FP32, device)
    padded = torch.full((10, 40), torch.nan, device=device)
    padded[:, :33] = tensors["x"]

    def run(tensors: Tensors) -> Tensor:
        return call(ops, "lowrank_linear", tensors)

    expected = gradients(run, tensors)
    tensors["x"] = padded[:, :33]
    compiled = torch.compile(run, fullgraph=True, backend="inductor")
    assert_close(gradients(compiled, tensors), expected)


# Dropout that draws its own seed


def dropped_ones(p: float = 0.5) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], list[Tensor]]:
    def run(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        zeros = torch.zeros(x.shape[0], 1, device=x.device)
        return ops.lowrank_add(zeros, x, lora_a, lora_b, dropout_p=p)

    return run, [torch.ones(4, 64), torch.ones(1, 64), torch.ones(1, 1)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_one_mask_in_compiled_forward_and_backward(
    device: str, backend: str, checkpointed: bool
) -> None:
    """RF-05 compiled. The seed is drawn in the graph at each run, not frozen into it."""
    run, values = dropped_ones()
    leaves = [value.to(device).requires_grad_() for value in values]

    def maybe_checkpointed(*inputs: Tensor) -> Tensor:
        return checkpoint(run, *inputs, use_reentrant=False) if checkpointed else run(*inputs)

    compiled = torch.compile(maybe_checkpointed, fullgraph=True, backend=backend)
    masks = []
    for _ in range(3):
        y = compiled(*leaves)
        dx, dlora_a, _ = torch.autograd.grad(y.sum(), leaves)
        assert set(dx.flatten().tolist()) == {0.0, 2.0}
        assert torch.equal(dx.sum(1, keepdim=True), y)
        assert torch.equal(dx.sum(0, keepdim=True), dlora_a)
        masks.append(dx)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_compiled_dropout_draws_as_eager(device: str, checkpointed: bool) -> None:
    """Where the compiler keeps torch's generator, the same manual_seed gives the eager numbers."""
    run, values = dropped_ones(0.3)
    leaves = [torch.randn_like(value).to(device).requires_grad_() for value in values]

    def maybe_checkpointed(*inputs: Tensor) -> Tensor:
        return checkpoint(run, *inputs, use_reentrant=False) if checkpointed else run(*inputs)

    def results(function: Run) -> dict[str, Tensor]:
        torch.manual_seed(5)
        y = function(*leaves)
        grads = torch.autograd.grad(y.square().sum(), leaves)
        return dict(zip(("y", "dx", "dlora_a", "dlora_b"), (y.detach(), *grads), strict=True))

    compiled = torch.compile(maybe_checkpointed, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled), results(run))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_compiled_autocast(device: str, low: torch.dtype) -> None:
    """RF-14 under the compiler."""
    one = torch.ones(1, 1, device=device)
    x = torch.tensor([[1.00390625]], device=device, requires_grad=True)
    lora_a, lora_b = one.clone().requires_grad_(), one.clone().requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        with torch.autocast(x.device.type, low):
            return ops.lowrank_linear(x, one, None, lora_a, lora_b)

    y = run(x, lora_a, lora_b)
    expected = {torch.bfloat16: 2.0, torch.float16: 2.0078125}[low]
    assert y.dtype == low and y.item() == expected
    grads = torch.autograd.grad(y.sum(), (x, lora_a, lora_b))
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert grads[1].item() == grads[2].item() == expected / 2


# Modules


def make_module(dropout: float = 0.0) -> nn.Sequential:
    layers = [
        LoRALinear.from_linear(nn.Linear(12, 20), r=3, dropout=dropout),
        nn.GELU(),
        LaMDALinear.from_linear(nn.Linear(20, 9), r=2, dropout=dropout),
    ]
    nn.init.normal_(layers[0].lora_b)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("dropout", "backend"), [(0.0, "inductor"), (0.3, "aot_eager")])
def test_compiled_modules(device: str, dropout: float, backend: str) -> None:
    module = make_module(dropout).to(device)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    trained = [p for p in module.parameters() if p.requires_grad]
    for num_rows in (5, 8):
        x = torch.randn(num_rows, 12, device=device)
        y = compiled(x)
        got = torch.autograd.grad(y.square().sum(), trained)
        assert len(got) == len(trained) and all(grad.isfinite().all() for grad in got)
        if dropout == 0:
            expected = torch.autograd.grad(module(x).square().sum(), trained)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    module.eval()
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_compiled_modules_under_checkpointing_with_dropout(device: str) -> None:
    """The recomputed mask is the drawn one: with torch's generator, gradients equal eager ones."""
    module = make_module(0.3).to(device)
    x = torch.randn(6, 12, device=device)
    trained = [p for p in module.parameters() if p.requires_grad]

    def results(run: nn.Module) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return torch.autograd.grad(run(x).square().sum(), trained)

    expected = results(module)
    compiled = torch.compile(Checkpointed(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled), expected, rtol=1e-5, atol=1e-5)


def test_export(device: str, tmp_path: Path) -> None:
    """One program for any number of rows, through a file, holding our op and not its parts."""
    module = make_module().to(device).eval()
    rows = torch.export.Dim("rows", min=1, max=1024)
    example = torch.randn(4, 12, device=device)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: rows},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("lowrank_ext.lowrank_linear" in target for target in targets) == 2
    path = tmp_path / "module.pt2"
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    for num_rows in (1, 4, 33):
        x = torch.randn(num_rows, 12, device=device)
        torch.testing.assert_close(loaded(x), module(x))


def test_export_for_training_draws_dropout(device: str) -> None:
    module = make_module(0.5).to(device)
    x = torch.ones(4, 12, device=device)
    program = torch.export.export(module, (x,)).module()
    assert not torch.equal(program(x), program(x))


@pytest.mark.parametrize("op", OPS)
def test_export_of_the_op_keeps_every_argument(device: str, op: str) -> None:
    class Op(nn.Module):
        def forward(self, tensors: Tensors) -> Tensor:
            return call(ops, op, tensors, scaling=0.5)

    tensors = make_tensors(op, (4,), 12, 9, 3, FP32, device, optional=OPTIONAL)
    program = torch.export.export(Op(), (tensors,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    torch.testing.assert_close(loaded(tensors), call(ops, op, tensors, scaling=0.5))


@pytest.mark.long
def test_ahead_of_time_package(tmp_path: Path) -> None:
    """AOTInductor: the compiled package calls our op from C++."""
    module = make_module()[0].eval()
    x = torch.randn(4, 12)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "module.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # g++ is the slow part
    )
    loaded = torch._inductor.aoti_load_package(package)
    for num_rows in (4, 9):
        x = torch.randn(num_rows, 12)
        torch.testing.assert_close(loaded(x), module(x), rtol=1e-5, atol=1e-5)
