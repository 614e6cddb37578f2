"""Builds lowrank_ext/_C.so with CMake and Ninja. The metadata is in pyproject.toml.

torch is looked up only when the extension is built: metadata and sdists need setuptools alone.
The environment variables LOWRANK_EXT_CUDA=AUTO|ON|OFF, LOWRANK_EXT_CUDA_ARCHS="80;90" and
LOWRANK_EXT_BENCHMARKS=ON|OFF are passed to CMakeLists.txt, which explains them.
"""

import filecmp
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_FLOOR = (2, 11)  # first release with every stable-ABI call that csrc uses
RETRY = "pip install --no-build-isolation ."
BUILD_OPTIONS = ("LOWRANK_EXT_CUDA", "LOWRANK_EXT_CUDA_ARCHS", "LOWRANK_EXT_BENCHMARKS")


class Torch(NamedTuple):
    root: Path
    version: str


def fail(message: str) -> NoReturn:
    # Not a setuptools error: for those an editable install prints a traceback around the message.
    raise SystemExit(f"error: lowrank_ext: {message}")


def find_torch() -> Torch:
    """Directory and version of the torch that this Python would import, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail(
            f"torch is not installed for {sys.executable}; install torch and build with `{RETRY}` "
            "(pip's isolated build environment hides an installed torch)"
        )
    root = Path(spec.origin).parent
    version = str(runpy.run_path(str(root / "version.py"))["__version__"])
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        fail(f"torch {version} is too old, it must be >= {floor}; run `pip install -U torch`")
    return Torch(root, version)


def find_tool(name: str) -> str:
    """Path of cmake or ninja: the one installed beside this Python, else the one on PATH."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        fail(f"{name} was not found; run `pip install {name}` and then `{RETRY}`")
    return path


def check_compiler() -> None:
    wanted = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in wanted):
        fail(
            f"no C++ compiler was found (looked for {', '.join(wanted)}); install g++ 11 or newer "
            "(Debian: `apt-get install g++`) or set CXX"
        )


def run_cmake(arguments: list[str], otherwise: str, quiet: bool = False) -> None:
    """Runs cmake, showing its output. Its first error, if any, becomes the one-line message."""
    stdout = subprocess.DEVNULL if quiet else None
    done = subprocess.run(arguments, text=True, stdout=stdout, stderr=subprocess.PIPE)
    sys.stderr.write(done.stderr)
    if done.returncode:
        error = re.search(r"CMake Error[^\n]*\n((?:[ \t][^\n]*\n|\n)+)", done.stderr)
        fail(" ".join(error[1].split()) if error else otherwise)


def replace_if_changed(source: Path, target: Path) -> None:
    """Copies through a rename: a process that has the old library mapped keeps it intact."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    temporary.chmod(0o755 if target.suffix == ".so" else 0o644)
    temporary.replace(target)


class CMakeBuild(build_ext):
    def run(self) -> None:
        torch = find_torch()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        check_compiler()
        build_dir = ROOT / "build" / "cmake"
        # What the environment does not name is unset: no value outlives the build that gave it.
        options = [
            f"-D{name}={os.environ[name]}" if os.environ.get(name) else f"-U{name}"
            for name in BUILD_OPTIONS
        ]
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DTORCH_ROOT={torch.root}",
            f"-DTORCH_VERSION={torch.version}",
        ]
        failed = "cmake could not configure the build, see above"
        run_cmake([*configure, *options], failed, quiet=not self.verbose)
        run_cmake([cmake, "--build", str(build_dir)], "compiling csrc failed, see above")

        destination = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        for name in ("_C.so", "_build_info.py"):
            replace_if_changed(build_dir / name, destination / "lowrank_ext" / name)

    def get_ext_filename(self, fullname: str) -> str:
        # torch loads the library, Python never imports it: no CPython tag in its name.
        return fullname.replace(".", os.sep) + ".so"


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the library depends on the platform and on no Python version."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


csrc_files = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()
)

setup(
    # depends, not sources: CMake compiles them, and setuptools puts them into the sdist.
    ext_modules=[Extension("lowrank_ext._C", sources=[], depends=["CMakeLists.txt", *csrc_files])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
