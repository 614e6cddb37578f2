"""The argument contract, generated from the schemas of all ops and backward ops.

Of every tensor argument: device, dtype, shape, layout, required or optional. A call gives the bits
of contiguous copies, or raises the op's own error; it never reads what it does not understand.
"""

import re
from pathlib import Path

import pytest
import torch
from argument_cases import (
    LARGE_SIZES,
    OPS,
    SIZES,
    SMALL,
    TENSORS,
    TOP_K,
    Arguments,
    is_optional,
    layouts_of,
    reference_of,
    run,
    schema,
    tensor_names,
    valid_call,
)
from devices import DTYPE_PAIRS, DTYPES, SIMT, DtypePair, dtype_id
from lowrank_cases import BF16, FP32, FP64, MIXED, Layout, assert_same_bits
from torch import Tensor

from lowrank_ext import ops

every_op = pytest.mark.parametrize("op", OPS)
every_tensor = pytest.mark.parametrize(("op", "name"), TENSORS, ids=lambda value: value)


def assert_same_outputs(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], message: str
) -> None:
    for index, (got, right) in enumerate(zip(actual, expected, strict=True)):
        if got.dtype != right.dtype or not torch.equal(got, right):  # a quick look first
            assert_same_bits(got, right, f"output {index}, {message}")


def error_of(op: str, arguments: Arguments) -> str | None:
    """First line of the op's own error, None where the call is valid; nothing may be written."""
    copies = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    try:
        run(op, arguments)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        assert re.match(rf"{op}: \w+ must .*, got ", message), message
        return message
    finally:
        for name, copy in copies.items():
            if copy.layout == torch.strided and not (copy.is_meta or copy.is_nested):
                assert torch.equal(arguments[name], copy), f"{name} was written to"
    return None


# ---- layout


def check_layouts(
    op: str, name: str, arguments: Arguments, case: str, layouts: tuple[str, ...] = ()
) -> None:
    values = arguments[name]
    of_values = run(op, arguments)
    for layout, laid_out in layouts_of(values, layouts):
        copy = laid_out.clone(memory_format=torch.contiguous_format)
        repeats = not torch.equal(copy, values)  # expanded: other values, so another result
        expected = run(op, arguments | {name: copy}) if repeats else of_values
        got = run(op, arguments | {name: laid_out})
        assert_same_outputs(got, expected, f"{name} as {layout}, {case}")
        assert torch.equal(laid_out, copy), f"{name} was written to"


@pytest.mark.simt(every=13)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
@every_op
def test_any_layout_gives_the_bits_of_a_contiguous_copy(
    device: str, kernels: str, op: str, dtypes: DtypePair
) -> None:
    cases = ["small"] if kernels == SIMT else SIZES
    for case in cases:
        arguments = valid_call(op, SIZES[case], dtypes, device)
        for name in tensor_names(op):
            check_layouts(op, name, arguments, case)


@pytest.mark.parametrize("dtypes", [FP64, FP32, BF16], ids=dtype_id)
@pytest.mark.parametrize("case", LARGE_SIZES)
@every_op
def test_layouts_of_several_blocks_and_tiles(
    device: str, op: str, case: str, dtypes: DtypePair
) -> None:
    arguments = valid_call(op, LARGE_SIZES[case], dtypes, device)
    layouts = ("transposed", "padded_rows", "sliced_columns", "expanded_rows")
    for name in tensor_names(op):
        check_layouts(op, name, arguments, case, layouts)


def test_kernels_get_pointers_from_one_file() -> None:
    """csrc/matrix.h checks the strides that a kernel expects: RF-47 took a pointer elsewhere."""
    csrc = Path(__file__).parents[2] / "csrc"
    kinds = {".h", ".cpp", ".cu", ".cuh"}
    sources = [path for path in csrc.rglob("*") if path.suffix in kinds]
    takers = {path for path in sources if re.search(r"data_ptr\(|get_data_ptr", path.read_text())}
    assert takers == {csrc / "matrix.h"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("op", ["lowrank_linear_backward", "lowrank_add_backward"])
def test_drank_scale_of_padded_h(op: str, dtype: torch.dtype) -> None:
    """RF-47, as it was reported: r = 24, rows of h 29 apart."""
    arguments = valid_call(op, SMALL._replace(rank=24), DtypePair(dtype, dtype))
    padded = torch.zeros(5, 29, dtype=dtype)
    padded[:, :24] = arguments["h"]
    got = run(op, arguments | {"h": padded[:, :24]})
    assert_same_outputs(got, run(op, arguments), "h padded")


# ---- device


OTHER_DEVICES = [
    "meta",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]


@pytest.mark.simt
@pytest.mark.parametrize("other", OTHER_DEVICES)
@every_tensor
def test_one_tensor_on_another_device(device: str, op: str, name: str, other: str) -> None:
    """RF-17: an error that names both devices, wherever the others are."""
    if device == other:
        pytest.skip("one device")
    here = valid_call(op, device=device)
    there = {k: v.to(other) if isinstance(v, Tensor) else v for k, v in here.items()}
    reference = reference_of(op)
    for right, wrong in ((here, there), (there, here)):
        message = error_of(op, right | {name: wrong[name]})
        of_reference = (wrong if name == reference else right)[reference].device
        odd = r"\w+" if name == reference else name
        got = (right if name == reference else wrong)[reference].device
        assert message is not None
        assert re.search(
            rf"{odd} must be on the device of {reference} \({of_reference}\), got {got}$", message
        ), message


@pytest.mark.simt
@every_op
def test_all_tensors_on_meta_give_shapes(device: str, op: str) -> None:
    here = valid_call(op, device=device)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in here.items()}
    for got, right in zip(run(op, meta), run(op, here), strict=True):
        assert got.is_meta and (got.shape, got.dtype) == (right.shape, right.dtype)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_a", "lora_b"])
def test_public_function_with_a_tensor_on_meta(name: str, grad: bool, autocast: bool) -> None:
    """RF-17, as it was reported: the results were uninitialized memory."""
    arguments = valid_call("lowrank_linear")
    tensors = {k: arguments[k] for k in ("x", "weight", "bias", "lora_a", "lora_b")}
    tensors[name] = tensors[name].to("meta").requires_grad_(grad)
    error = pytest.raises(RuntimeError, match=r"must be on the device of x .* got")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), error:
        ops.lowrank_linear(**tensors)


# ---- layouts that are not strided


def sparse(values: Tensor) -> Tensor:
    return values.to_sparse()


def compressed(values: Tensor) -> Tensor:
    return values.to_sparse_csr()


def jagged(values: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(values), layout=torch.jagged)


def nested(values: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(values))


def mkldnn(values: Tensor) -> Tensor:
    return values.to_mkldnn()


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("layout", [sparse, compressed, jagged, nested, mkldnn])
@every_op
def test_tensors_that_are_not_strided_are_refused(op: str, layout: Layout) -> None:
    arguments = valid_call(op)
    for name in tensor_names(op):
        values = arguments[name]
        if values.dim() != 2 or (layout is mkldnn and not values.is_floating_point()):
            continue
        message = error_of(op, arguments | {name: layout(values)})
        assert message is not None and f"{name} must be a strided tensor, got a" in message, message


# ---- dtype

ALL_DTYPES = [
    *DTYPES,
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn),
]
BASE = {"x", "base_out", "weight", "bias", "dout", "h", "router_logits"}
ADAPTER = {"lora_a", "lora_b", "core", "rank_scale", "out_scale", "router_weight"}
STATISTICS = {"router_probs", "topk_weights", "dtopk_weights", "dbalance_loss"}


def dtypes_allowed(name: str, base: torch.dtype) -> set[torch.dtype]:
    """Of an argument, where the reference has dtype base."""
    half = base in (torch.bfloat16, torch.float16)
    if name in BASE:
        return {base}
    if name in ADAPTER:
        return {base, torch.float32} if half else {base}
    if name in STATISTICS:
        return {torch.float64 if base == torch.float64 else torch.float32}
    if name == "scaling":
        return {torch.float32, torch.float64}
    return {torch.bool} if name == "token_mask" else {torch.int64}


@pytest.mark.simt(every=7)
@pytest.mark.parametrize("dtypes", [FP64, FP32, BF16, MIXED], ids=dtype_id)
@every_op
def test_dtypes(device: str, op: str, dtypes: DtypePair) -> None:
    arguments = valid_call(op, dtypes=dtypes, device=device)
    for name in tensor_names(op):
        for dtype in ALL_DTYPES:
            check_dtypes(op, arguments | {name: arguments[name].to(dtype)})


def check_dtypes(op: str, arguments: Arguments) -> None:
    reference = reference_of(op)
    given = {name: arguments[name].dtype for name in tensor_names(op)}
    base = given[reference]
    wrong = {name for name, dtype in given.items() if dtype not in dtypes_allowed(name, base)}
    wrong |= set() if base in DTYPES else {reference}
    message = error_of(op, arguments)
    assert (message is not None) == bool(wrong), f"{given}: {message}"
    if message is not None:
        named = message.split()[1]
        assert named in wrong, message
        assert f", got {str(given[named]).removeprefix('torch.')}" in message, message


# ---- shape


def other_shapes(values: Tensor) -> list[Tensor]:
    """One dimension more or fewer, one longer or shorter by one, one of size zero."""
    shapes = [values.unsqueeze(0), values.unsqueeze(-1)]
    for dim, size in enumerate(values.shape):
        longer = torch.cat([values, values.narrow(dim, 0, 1)], dim)
        shapes += [longer, values.select(dim, 0), values.narrow(dim, 0, 0)]
        shapes += [values.narrow(dim, 0, size - 1)] if size > 1 else []
    return shapes


def may_have_shape(op: str, name: str, right: Tensor, changed: Tensor) -> bool:
    """Where one argument alone may have another shape."""
    if name == "seed":
        return changed.numel() == 1
    if name == "x" and op == "lowrank_linear":
        return changed.dim() >= 1 and changed.shape[-1] == right.shape[-1]
    if name == "router_logits" and op == "moe_route":
        return changed.shape[:-1] == right.shape[:-1] and changed.shape[-1] >= TOP_K
    return False


@pytest.mark.simt(every=4)
@every_tensor
def test_shapes(device: str, op: str, name: str) -> None:
    arguments = valid_call(op, device=device)
    for changed in other_shapes(arguments[name]):
        message = error_of(op, arguments | {name: changed})
        allowed = may_have_shape(op, name, arguments[name], changed)
        assert (message is None) == allowed, f"{name} {tuple(changed.shape)}: {message}"


# ---- required or optional

# An absent one of these changes the call, and is no error.
FREE = {"bias", "core", "rank_scale", "out_scale", "ranks", "token_mask"}
FREE |= {"dtopk_weights", "dbalance_loss"}
# The gradients that a backward op cannot compute without an argument.
NEEDED_BY = {
    "x": {"need_dlora_a", "need_drouter_weight"},
    "core": {"need_dcore"},
    "rank_scale": {"need_drank_scale"},
    "out_scale": {"need_dout_scale"},
    "h": {"need_dlora_b", "need_dcore", "need_drank_scale", "need_dout_scale"},
}
ROUTER_NEEDS_H = {"need_dx", "need_drouter_weight"}


@pytest.mark.simt(every=4)
@every_tensor
def test_none(device: str, op: str, name: str) -> None:
    """None where it is optional; an error where dropout or a gradient needs the tensor."""
    arguments = valid_call(op, device=device)
    if not is_optional(next(argument for argument in schema(op) if argument.name == name)):
        assert error_of(op, arguments | {name: None}) == f"{op}: {name} must be a tensor, got None"
        meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
        assert error_of(op, meta | {name: None}) == f"{op}: {name} must be a tensor, got None"
        return
    needs = [argument for argument in arguments if argument.startswith("need_")]
    needed_by = NEEDED_BY.get(name, set())
    if op == "moe_lowrank_add_backward" and name == "h":
        needed_by = needed_by | ROUTER_NEEDS_H
    for alone in needs or [None]:
        flags = {need: need == alone for need in needs}
        message = error_of(op, arguments | flags | {name: None})
        required = name == "seed" or alone in needed_by
        assert (message is not None) == required, f"{alone}: {message}"
        if message is not None:
            assert message.startswith(f"{op}: {name} must") and message.endswith("got None")
        elif name not in FREE:
            given, absent = (
                run(op, arguments | flags | {name: value}) for value in (arguments[name], None)
            )
            assert_same_outputs(absent, given, f"without {name}, {alone}")
