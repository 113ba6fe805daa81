# Every verb makes .venv when it is missing or when the files that define the installation have changed.
#   make PYTHON=python3.12        another interpreter (3.10 to 3.12)
#   make TORCH=torch==2.11.0      another torch (2.11 to 2.13); or the path of a wheel
#   make test PYTEST_ARGS="-k registry -x"
#   make bench BENCH_ARGS="--parts steps --lengths fixed"
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Named exactly, so that pip takes a CPU build where one is offered: the newest torch may be gigabytes of CUDA.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
BENCH_ARGS ?=

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.10; do \
	if "$$python" -c '$(SUPPORTED)' 2>/dev/null; then echo "$$python"; break; fi; done)

.PHONY: help install demo bench test test-slow chaos lint type format docs clean

help: ## show the verbs
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(STAMP) ## make .venv with the package (editable) and all that the other verbs need

demo: $(STAMP) ## train, score and compare on a small real model, CPU only
	$(BIN)/python scripts/demo.py

bench: $(STAMP) ## compare speed and memory with the peers, CPU only; makes an environment for them
	TORCH="$(TORCH)" $(BIN)/python -m benchmarks.cpu $(BENCH_ARGS)

# One thread: the models of these tests are tiny, and the distributed ones run two processes.
# Whole files go to a worker: their fixtures train models that several tests look at. They go in the order of tests/conftest.py.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP) ## fast tests
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(STAMP) ## tests that take minutes or need the prepared SmolLM2 model
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

chaos: export OMP_NUM_THREADS ?= 1
chaos: $(STAMP) ## kill tiny runs in many ways, resume them, compare the bits
	$(BIN)/python scripts/chaos.py

lint: $(STAMP) ## style, imports and docstrings; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## rewrite files so that lint passes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(STAMP) ## static types
	$(BIN)/mypy

docs: $(STAMP) ## write docs/configs.md from the code
	$(BIN)/python scripts/make_config_reference.py

clean: ## remove .venv, builds and caches; prepared models and outputs stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The hook files are listed because an editable installation copies them.
$(STAMP): pyproject.toml _tokenpref_tune.py tokenpref_tune.pth
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.10, 3.11 or 3.12 found; install one or say make PYTHON=/path/to/python" >&2; exit 1; fi
	@if ! "$(PYTHON)" -c '$(SUPPORTED)'; then \
		echo "error: PYTHON=$(PYTHON) does not start or is not Python 3.10, 3.11 or 3.12" >&2; exit 1; fi
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@
