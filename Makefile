# Every target makes its own virtual environment in $(VENV) and needs nothing installed but Python 3.10+ with venv.
#
# Variables, given as `make test PYTHON=python3.12`:
#   PYTHON       interpreter that the environment is made with
#   TORCH_INDEX  on a machine without a GPU: index to take torch from. Needed where pip's own index serves only the
#                CUDA build (several GB). PyTorch's index of CPU builds is https://download.pytorch.org/whl/cpu
#   EXTRAS       extras of pyproject.toml to install
#   JOBS         test processes; 0: all tests in one, as GPU tests need it that may fill a card
#   PIP_ARGS     further options of `pip install`
#   PYTEST_ARGS  further options of pytest
#   GPU_ARGS     further options of tools/gpu_check.py, as `--only tests,copies` or `--update-baseline`
PYTHON ?= python3
TORCH_INDEX ?=
PIP_ARGS ?=
PYTEST_ARGS ?=
GPU_ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
ifeq ($(HAS_GPU),0)
EXTRAS ?= dev
JOBS ?= 2
CONSTRAINTS := -c constraints-cpu.txt
else
EXTRAS ?= dev,green
JOBS ?= 0
CONSTRAINTS :=
endif

.PHONY: help demo test test-all test-slow lint gpu gpu2 clean

help:
	@echo "make demo      generate text with the shipped checkpoint, over two cards where there are two (or none)"
	@echo "make test      lint, types and every quick test this machine can run; the others skip with a reason"
	@echo "make test-all  make test, then the long tests"
	@echo "make lint      ruff and mypy only"
	@echo "make gpu       on a GPU box: GPU tests, memory checker on the kernels, benchmarks beside docs/baselines"
	@echo "make gpu2      the same on two GPUs, with what needs two"
	@echo "make clean     remove $(VENV), caches and build results"
	@echo "No GPU, and pip would fetch a CUDA build of torch?"
	@echo "               make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@echo "Variables: PYTHON TORCH_INDEX EXTRAS JOBS PIP_ARGS PYTEST_ARGS GPU_ARGS (see the top of the Makefile)"

demo: $(STAMP)
	$(RUN) example_two_gpu.py

test: lint
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: test test-slow

# After `test`, also under `make -j`.
test-slow: test
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -m slow --timeout 1800 $(PYTEST_ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Logs and results.json in build/gpu and build/gpu2. Fails for wrong results, never for speed.
gpu: $(STAMP)
	$(RUN) tools/gpu_check.py --cards 1 $(GPU_ARGS)

gpu2: $(STAMP)
	$(RUN) tools/gpu_check.py --cards 2 $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN):
	$(PYTHON) -m venv $(VENV)

# Two steps with TORCH_INDEX: only torch comes from there, and what is installed is not fetched again.
$(STAMP): pyproject.toml constraints-cpu.txt | $(RUN)
ifeq ($(HAS_GPU),0)
ifneq ($(TORCH_INDEX),)
	$(RUN) -m pip install $(PIP_ARGS) $(CONSTRAINTS) --index-url $(TORCH_INDEX) torch
endif
endif
	$(RUN) -m pip install $(PIP_ARGS) $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $(STAMP)
