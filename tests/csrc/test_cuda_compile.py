"""What nvcc made of the CUDA kernels, for every architecture in _C.so: no GPU is needed.

The budgets are stated in two places. A kernel's __launch_bounds__ say how many blocks of how many
threads are to be resident on an SM; FAMILIES says the fewest warps that this may come to, and which
instructions the kernel's comments claim.
"""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cuda_binary
import pytest
from cuda_binary import Bounds, Name, Resources

import lowrank_ext
from lowrank_ext import _build_info

LIBRARY = Path(lowrank_ext.__file__).with_name("_C.so")
ARCHS = _build_info.CUDA_ARCHS
MAX_LIBRARY_BYTES = 40 * 2**20

pytestmark = [
    pytest.mark.skipif(not ARCHS, reason="_C.so was built without nvcc"),
    pytest.mark.skipif(
        cuda_binary.why_unreadable() is not None, reason=cuda_binary.why_unreadable() or ""
    ),
]
by_arch = pytest.mark.parametrize("arch", ARCHS or ["none"])


class Sm(NamedTuple):
    """Limits of a multiprocessor (CUDA C++ Programming Guide, "Compute Capabilities")."""

    max_threads: int
    shared_bytes: int
    max_blocks: int
    registers: int = 65536


SMS = {
    "80": Sm(2048, 164 * 1024, 32),
    "86": Sm(1536, 100 * 1024, 16),
    "89": Sm(1536, 100 * 1024, 24),
    "90": Sm(2048, 228 * 1024, 32),
    "100": Sm(2048, 228 * 1024, 32),
    "120": Sm(1536, 100 * 1024, 24),
}
RESERVED_SHARED_BYTES = 1024  # per block, by the driver


class Family(NamedTuple):
    """What all instantiations of one kernel must come to."""

    min_warps: int  # resident on an SM, as far as registers go
    products: bool = False  # mma.sync where the compute type has it
    async_copies: bool = False  # cp.async, 16 bytes at a time, past L1
    wide_loads: int = 0  # at least so many 16-byte loads from global memory in the code
    wide_stores: int = 0  # and stores
    integers: bool = False  # no template over a compute type


FAMILIES = {
    "lowrank_up_kernel": Family(8, True, True, wide_loads=4, wide_stores=4),
    "lowrank_down_backward_x_kernel": Family(8, True, True, wide_loads=4, wide_stores=4),
    "lowrank_up_backward_kernel": Family(8, True, True),
    "lowrank_down_kernel": Family(8, True, True, wide_stores=1),
    "lowrank_up_backward_g_kernel": Family(8, True, True, wide_stores=1),
    "outer_sum_kernel": Family(8, True, True, wide_stores=1),
    "lowrank_mid_backward_kernel": Family(8, True),
    "mid_rows_kernel": Family(8, True, wide_loads=1, wide_stores=1),
    "lora_b_gradients_kernel": Family(16),
    "dense_down_kernel": Family(8, True, True, wide_stores=1),
    "dense_outer_kernel": Family(8, True, True, wide_stores=1),
    "dense_expand_kernel": Family(8, True, True, wide_stores=1),
    "partial_sums_kernel": Family(16),
    "round_adapters_kernel": Family(16),
    "dense_stack_kernel": Family(16),
    "dense_unstack_kernel": Family(16),
    "moe_gate_kernel": Family(16),
    "dense_apply_gates_kernel": Family(16),
    "moe_gate_backward_kernel": Family(16),
    "grouped_gate_kernel": Family(16),
    "grouped_apply_gates_kernel": Family(16),
    "grouped_up_kernel": Family(8, True, True, wide_stores=4),
    "grouped_down_backward_x_kernel": Family(8, True, True, wide_stores=4),
    "segment_down_kernel": Family(8, True, True, wide_stores=1),
    "segment_up_backward_kernel": Family(8, True, True, wide_stores=1),
    "segment_up_kernel": Family(8, True, True, wide_loads=4, wide_stores=4),
    "segment_down_backward_x_kernel": Family(8, True, True, wide_loads=4, wide_stores=4),
    "segment_outer_kernel": Family(8, True, True, wide_stores=1),
    "moe_route_kernel": Family(16),
    "route_tokens_kernel": Family(16),
    "route_many_experts_kernel": Family(24),
    "balance_kernel": Family(32),
    "moe_route_backward_kernel": Family(16),
    "order_slots_kernel": Family(32, integers=True),
    "count_slots_kernel": Family(16, integers=True),
    "scan_slot_counts_kernel": Family(32, integers=True),
    "scatter_slots_kernel": Family(16, integers=True),
}

HMMA = {"Bf16": "HMMA.16816.F32.BF16", "Fp16": "HMMA.16816.F32", "Tf32": "HMMA.1688.F32.TF32"}
FMA = {"Fp32": "FFMA", "Fp64": "DFMA"}


class Kernel(NamedTuple):
    name: Name
    resources: Resources
    bounds: Bounds

    def __str__(self) -> str:
        return f"{self.name.family}<{self.name.arguments}>"

    @property
    def family(self) -> Family:
        return FAMILIES[self.name.family]


def kernels(arch: str) -> dict[str, Kernel]:
    """By mangled name."""
    used = cuda_binary.resources(LIBRARY, arch)
    names = cuda_binary.names(used)
    bounds = cuda_binary.launch_bounds(LIBRARY)
    return {key: Kernel(names[key], used[key], bounds[key]) for key in used}


def resident_blocks(kernel: Kernel, arch: str) -> int:
    """As far as registers and static shared memory go; a warp gets registers in units of 256."""
    sm = SMS[re.sub(r"[af]$", "", arch)]
    warps = -(-kernel.bounds.threads // 32)
    registers = warps * (-(-kernel.resources.registers * 32 // 256) * 256)
    shared = RESERVED_SHARED_BYTES + kernel.resources.shared
    return min(
        sm.registers // registers,
        sm.max_threads // (32 * warps),
        sm.shared_bytes // shared,
        sm.max_blocks,
    )


def complain(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_every_architecture_is_there() -> None:
    """Machine code for each that was asked for; PTX of the lowest and of the newest for others."""
    assert cuda_binary.has_machine_code(LIBRARY) == set(ARCHS)
    plain = sorted((re.sub(r"[af]$", "", arch) for arch in ARCHS), key=int)
    assert cuda_binary.has_ptx(LIBRARY) == {plain[0], plain[-1]}


def test_the_library_is_small() -> None:
    assert LIBRARY.stat().st_size <= MAX_LIBRARY_BYTES


@by_arch
def test_every_kernel_states_its_budget(arch: str) -> None:
    found = kernels(arch)
    assert {kernel.name.family for kernel in found.values()} == FAMILIES.keys()
    complain([f"{k}: no __launch_bounds__" for k in found.values() if not k.bounds.threads])
    without = [k for k in found.values() if not (k.name.compute_type or k.family.integers)]
    complain([f"{k}: no compute type" for k in without])


@by_arch
def test_nothing_is_spilled(arch: str) -> None:
    """Registers that do not suffice and arrays indexed at run time both end on the stack."""
    complain(
        [
            f"sm_{arch} {kernel}: {kernel.resources}"
            for kernel in kernels(arch).values()
            if kernel.resources.stack or kernel.resources.local
        ]
    )


@by_arch
def test_registers_leave_the_stated_warps_resident(arch: str) -> None:
    problems = []
    for kernel in kernels(arch).values():
        blocks = resident_blocks(kernel, arch)
        warps = blocks * kernel.bounds.threads // 32
        if blocks < kernel.bounds.min_blocks or warps < kernel.family.min_warps:
            problems.append(
                f"sm_{arch} {kernel}: {kernel.resources.registers} registers leave {blocks} blocks "
                f"and {warps} warps, stated {kernel.bounds.min_blocks} and "
                f"{kernel.family.min_warps}"
            )
    complain(problems)


def wrong_instructions(kernel: Kernel, code: Counter[str]) -> list[str]:
    """Where the machine code is not what the kernel's comments claim."""

    def count(pattern: str) -> int:
        return sum(n for opcode, n in code.items() if re.fullmatch(pattern, opcode))

    compute_type, family = kernel.name.compute_type, kernel.family
    products = HMMA.get(compute_type) or FMA.get(compute_type, "")
    wanted = {
        r"LDGSTS\.E\.BYPASS\.128.*": family.async_copies,
        r"LDG\.E\.128.*": family.wide_loads,
        r"STG\.E\.128.*": family.wide_stores,
        re.escape(products): family.products,
    }
    wrong = [
        f"{count(pattern)} times {pattern}, expected {int(least)} or more"
        for pattern, least in wanted.items()
        if count(pattern) < least
    ]
    unwanted = {
        r"(LDL|STL).*": "local memory",
        r"(RED|ATOM[GS]?)\b.*\.(F16|F32|F64|BF16).*": "an atomic sum, whose order is not fixed",
    }
    if compute_type in FMA:
        unwanted[r"HMMA.*"] = "a product of lower precision"
    wrong += [f"{count(p)} times {what}" for p, what in unwanted.items() if count(p)]
    return wrong


@by_arch
def test_machine_code_is_what_the_comments_claim(arch: str) -> None:
    code = cuda_binary.opcodes(LIBRARY, arch)
    problems = []
    for key, kernel in kernels(arch).items():
        wrong = wrong_instructions(kernel, code[key])
        problems += [f"sm_{arch} {kernel}: {what}" for what in wrong]
    complain(problems)


# The checks themselves, on a kernel with everything that is forbidden


BAD_KERNEL = """
__global__ void __launch_bounds__(1024, 2) bad_kernel(float* y, const float* x, int n) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = x[i * n + threadIdx.x];
  values[n] += 1;
  for (int i = 0; i < 64; ++i) atomicAdd(&y[i], values[i]);
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_the_checks_see_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, binary = tmp_path / "bad.cu", tmp_path / "bad.fatbin"
    source.write_text(BAD_KERNEL)
    code = "-gencode=arch=compute_80,code=[sm_80,compute_80]"
    subprocess.run(["nvcc", code, "-fatbin", "-o", binary, source], check=True)
    monkeypatch.setitem(FAMILIES, "bad_kernel", Family(64, True, True, 1, 1))
    ((key, used),) = cuda_binary.resources(binary, "80").items()
    bounds = cuda_binary.launch_bounds(binary)[key]
    name = cuda_binary.names([key])[key]._replace(compute_type="Fp32")
    kernel = Kernel(name, used, bounds)
    assert name.family == "bad_kernel"
    assert bounds == Bounds(1024, 2)
    assert used.stack >= 256
    assert resident_blocks(kernel, "80") == 2
    wrong = " ".join(wrong_instructions(kernel, cuda_binary.opcodes(binary, "80")[key]))
    for sign in ("LDGSTS", "LDG", "STG", "FFMA", "local memory", "an atomic sum"):
        assert sign in wrong


def test_names_are_read() -> None:
    assert cuda_binary.parse_name(
        "void lowrank_ext::cuda::a_kernel<lowrank_ext::cuda::Traits<lowrank_ext::cuda::Tf32, "
        "lowrank_ext::cuda::Shape<8, 1> > >(lowrank_ext::cuda::Params<float>)"
    ) == Name("a_kernel", "Traits<Tf32, Shape<8, 1>>", "Tf32")
    assert cuda_binary.parse_name(
        "void lowrank_ext::cuda::b_kernel<__nv_bfloat16>(Params<__nv_bfloat16>)"
    ) == Name("b_kernel", "__nv_bfloat16", "Bf16")
