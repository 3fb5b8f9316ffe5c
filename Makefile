# make demo | test | test-triton | lint | format | bench | compile-check | gpu-check | wheel | constraints | clean. The
# first of them sets everything up: a virtual environment (the active one, else .venv), the pinned packages of
# constraints.txt, and the native library.

PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Tested against, and installed without its dependencies: nnsight would bring torchvision, whose CUDA build cannot be
# loaded beside a CPU build of torch and takes transformers with it. tests/peers/conftest.py stands in for nnsight.
ALONE := dictionary-learning==0.1.0

# The stamp holds the checkout that was installed into this environment last: another checkout's does not count.
STAMP := $(VENV)/.fastsae-installed
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/include/fastsae/*.h csrc/include/fastsae/*.cuh)

.PHONY: demo test test-triton lint format bench compile-check gpu-check wheel constraints clean

demo: $(STAMP)
	$(BIN)/fastsae demo

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# Every test of an operator on Triton's interpreter, those in float16 and those marked `costly` too, which `make test`
# leaves out: ten minutes of one core.
test-triton: $(STAMP)
	FASTSAE_TEST_BACKENDS=triton $(BIN)/python -m pytest tests/ops tests/saes tests/optim tests/backends $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/typos

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(STAMP)
	$(BIN)/fastsae bench

# Needs no GPU: what each GPU kernel takes of sm_80, sm_90 and sm_100, and whether one spills. Without nvcc or Triton it
# says what it left out, and passes unless ARGS="--require nvcc,triton" names them.
compile-check: $(STAMP)
	$(BIN)/python -m fastsae.backends.compile_check $(ARGS)

# On a machine with a GPU, in the environment that is active there: its torch is the one to be tested, so nothing is
# set up. WHEELS names a folder of wheels for what it lacks and cannot download.
gpu-check:
	python3 benchmarks/gpu_check.py $(or $(OUT),gpu-check) $(if $(WHEELS),--wheels $(WHEELS))

wheel: $(STAMP)
	$(BIN)/python -m build

# Locks what pyproject.toml asks for, for every Python and platform; pins that still fit stay as they are.
constraints: $(BIN)/python
	$(PIP) install --quiet uv
	@mkdir -p build && grep '^#' constraints.txt > build/constraints.head
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-annotate --no-header \
	  pyproject.toml --output-file constraints.txt
	@cat build/constraints.head constraints.txt > build/constraints.txt && mv build/constraints.txt constraints.txt

clean:
	rm -rf build dist *.egg-info fastsae/_cpu*.so fastsae/_cuda*.so \
	  $(STAMP) .pytest_cache .ruff_cache .hypothesis .benchmarks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The build's own tools are installed first and pinned too, so that the native library is built with them
# and without a download: --no-build-isolation. Every other way to install builds in isolation.
$(STAMP): Makefile pyproject.toml setup.py constraints.txt $(NATIVE) | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt setuptools pybind11 ninja
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install --quiet --no-deps $(ALONE)
	@printf %s '$(CURDIR)' > $@
