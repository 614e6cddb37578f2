"""Registers, launch bounds and SASS of the kernels in a binary, read by cuobjdump.

cuobjdump and nvdisasm come with the CUDA toolkit, or from the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

COMPUTE_TYPES = ("Bf16", "Fp16", "Tf32", "Fp32", "Fp64")
# Element types of the kernels that are instantiated without a compute type.
SCALARS = {"__nv_bfloat16": "Bf16", "__half": "Fp16", "float": "Fp32", "double": "Fp64"}


class Name(NamedTuple):
    """lowrank_ext::cuda::up_kernel<Traits<Bf16, 16>>(Params) has the family up_kernel."""

    family: str
    arguments: str  # of the template
    compute_type: str


class Resources(NamedTuple):
    """Resources per thread, and bytes of static shared memory per block."""

    registers: int
    stack: int
    local: int
    shared: int


class Bounds(NamedTuple):
    """__launch_bounds__(threads, min_blocks); min_blocks is 1 where it is not stated."""

    threads: int
    min_blocks: int


def find_tool(name: str) -> str | None:
    """Path of cuobjdump or nvdisasm: the toolkit's, else that of the Python package."""
    on_path = shutil.which(name)
    if on_path is not None:
        return on_path
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.match(f"bin/{name}")), None)


def why_unreadable() -> str | None:
    """Why binaries cannot be read, or None."""
    missing = [name for name in ("cuobjdump", "nvdisasm", "c++filt") if find_tool(name) is None]
    return f"no {' and no '.join(missing)}" if missing else None


def _lines(binary: Path, *options: str) -> Iterator[str]:
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    assert cuobjdump is not None and nvdisasm is not None
    # cuobjdump looks for nvdisasm on PATH.
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])
    command = [cuobjdump, *options, str(binary)]
    with subprocess.Popen(
        command, env={**os.environ, "PATH": path}, text=True, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}"


@cache
def resources(binary: Path, arch: str) -> dict[str, Resources]:
    """Resources by mangled name, of the machine code of one architecture ("80")."""
    found, name = {}, ""
    for line in _lines(binary, "-res-usage", "-arch", f"sm_{arch}"):
        if line.startswith(" Function "):
            name = line.removeprefix(" Function ").strip().removesuffix(":")
        elif name and line.startswith("  REG:"):
            used = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            found[name] = Resources(used["REG"], used["STACK"], used["LOCAL"], used["SHARED"])
            name = ""
    return found


@cache
def launch_bounds(binary: Path) -> dict[str, Bounds]:
    """Launch bounds by mangled name, from the PTX (machine code does not keep min_blocks)."""
    found, name = {}, ""
    for line in _lines(binary, "-ptx"):
        if match := re.match(r"\.(?:visible|weak) \.entry (\w+)", line):
            name = match[1]
            found[name] = Bounds(0, 1)
        elif match := re.match(r"\.maxntid (\d+)", line):
            found[name] = found[name]._replace(threads=int(match[1]))
        elif match := re.match(r"\.minnctapersm (\d+)", line):
            found[name] = found[name]._replace(min_blocks=int(match[1]))
    return found


@cache
def opcodes(binary: Path, arch: str) -> dict[str, Counter[str]]:
    """Count of each instruction, with its modifiers (LDG.E.128), in each kernel."""
    found: dict[str, Counter[str]] = {}
    here: Counter[str] = Counter()
    for line in _lines(binary, "-sass", "-arch", f"sm_{arch}"):
        if line.startswith("        /*"):  # /*0010*/  @!P0 LDG.E R2, [R4.64] ;  /* its bits */
            _, first, second, *_ = line.split(maxsplit=3)
            here[(second if first.startswith("@") else first).rstrip(";")] += 1
        elif "Function : " in line:
            here = found.setdefault(line.partition("Function : ")[2].strip(), Counter())
    return found


@cache
def has_machine_code(binary: Path) -> frozenset[str]:
    """The architectures of the machine code in the binary."""
    return frozenset(
        match[1] for line in _lines(binary, "-lelf") if (match := re.search(r"\.sm_(\w+)\.", line))
    )


@cache
def has_ptx(binary: Path) -> frozenset[str]:
    return frozenset(
        match[1] for line in _lines(binary, "-lptx") if (match := re.search(r"\.sm_(\w+)\.", line))
    )


def names(mangled: Iterable[str]) -> dict[str, Name]:
    """The readable name of each kernel."""
    ordered = list(mangled)
    done = subprocess.run(
        ["c++filt"], input="\n".join(ordered), text=True, capture_output=True, check=True
    )
    return dict(zip(ordered, map(parse_name, done.stdout.splitlines()), strict=True))


def parse_name(demangled: str) -> Name:
    short = demangled.replace("lowrank_ext::cuda::", "").removeprefix("void ")
    match = re.match(r"(\w+)(?:<(.*?)>)?\(", re.sub(r">\s+(?=[>(])", ">", short))
    assert match is not None, demangled
    family, arguments = match[1], match[2] or ""
    words = re.findall(r"\w+", arguments)
    compute_type = next((word for word in words if word in COMPUTE_TYPES), None)
    compute_type = compute_type or next((SCALARS[word] for word in words if word in SCALARS), "")
    return Name(family, arguments, compute_type)
