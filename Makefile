# make test, make bench: each does all of its own set-up (a virtual environment in .venv, pinned packages, the compiled
# libraries) and then its job; a second call reuses everything. Needs Python >= 3.11, a C++ compiler and make.
#
#   PYTHON=python3.12       interpreter for the virtual environment
#   BENCH_ARGS="--quick"    passed on to `python -m resnet_fused bench`
#   PYTEST_ARGS="-k lazy"   passed on to pytest
#   TEST_PROCESSES=1        of pytest, 2 by default
#   ABI_PYTHON=path         interpreter with another torch, for make abi
#
# make oldest-triton: compile the Triton kernels, with all their options, with the oldest supported version.
#   TRITON_ARCHS="90 100"   for these architectures alone
#
# make budgets: compile all CUDA kernels for all architectures that they run on, and every Triton launch of the tests,
# also those that repeat another but for sizes, a dtype or fewer options: registers, spills, shared memory.

PYTHON ?= python3
TEST_PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
TORCH := torch==2.13.0
TRITON := triton==3.9.0
OLDEST_TRITON := triton==3.6.0
# Of some ten thousand files a few are ever imported, and compiled then: by the first process that does, not by each
# again as where containers set this variable.
INSTALL := -m pip install --no-compile
unexport PYTHONDONTWRITEBYTECODE
ABI_TORCH := torch==2.14.1
ABI_PYTHON ?= .venv-abi/bin/python
CPP_FILES = $(shell git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.h')
SOURCES := $(shell find csrc -type f) setup.py build_support.py pyproject.toml

.PHONY: test bench lint format abi oldest-triton budgets sanitize build clean distclean
.DEFAULT_GOAL := build

build: build/.installed

# Threads that wait for work do not spin, since the processes share the cores.
test: build
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

bench: build
	$(PY) -m resnet_fused bench $(BENCH_ARGS)

lint: $(VENV)/.packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.packages
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# The libraries built against $(TORCH), run by another torch.
abi: build $(if $(findstring .venv-abi,$(ABI_PYTHON)),.venv-abi/.torch)
	$(PY) benchmarks/abi_check.py --other $(ABI_PYTHON)

# Register counts are of $(TRITON), for which tiles were chosen; an older one spills a few.
oldest-triton: build .triton-oldest/.installed
	TRITON_LAUNCHES=oldest PYTHONPATH=$(CURDIR)/.triton-oldest \
	    $(PY) -m pytest tests/triton/test_triton_compile.py -k 'not spills'

budgets: build
	CUDA_ARCHS="80 86 89 90 100 120" $(PY) -m pytest tests/test_cuda_compile.py -k "registers or smallest or shared"
	TRITON_LAUNCHES=all $(PY) -m pytest tests/triton/test_triton_compile.py

# Each tensor in memory of its own, so that what lies beyond it is nobody's.
sanitize: build
	for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(PY) -m pytest tests/ops -k "cuda-" || exit 1; done

.triton-oldest/.installed:
	$(PY) $(INSTALL) --no-deps --target .triton-oldest $(OLDEST_TRITON)
	touch $@

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit("Python %d.%d is too old for the pinned packages; set PYTHON to 3.11 or newer" \
	    % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH): the largest download, a few minutes"
	$(PY) $(INSTALL) $(TORCH)
	$(PY) -c 'import importlib.metadata as m; m.version("triton")' 2>/dev/null || $(PY) $(INSTALL) $(TRITON)
	touch $@

$(VENV)/.packages: requirements-dev.txt $(VENV)/.torch
	$(PY) $(INSTALL) --no-deps -r requirements-dev.txt
	touch $@

build/.installed: $(SOURCES) $(VENV)/.packages
	@echo "Compiling: on two cores some three minutes, four with CUDA kernels"
	$(PY) $(INSTALL) -v --no-build-isolation --no-deps -e .
	touch $@

.venv-abi/.torch:
	$(PYTHON) -m venv .venv-abi
	.venv-abi/bin/python $(INSTALL) $(ABI_TORCH) numpy pytest
	touch $@

clean:
	rm -rf build dist *.egg-info resnet_fused/*.so .pytest_cache .ruff_cache

distclean: clean
	rm -rf $(VENV) .venv-abi .triton-oldest
