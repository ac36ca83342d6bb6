# From a fresh clone: `make demo`. `make help` lists the rest. GNU make and Python 3.11 or newer are all that must be there before.
#
# VENV=…      another folder for the virtual environment     PYTHON=…   the interpreter that it is made with
# TORCH=…     another build of PyTorch, as pip names it       PIP_FLAGS=… for every `pip install` (an index, a proxy)
# ARGS=…      more arguments for the command or for pytest

VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
ARGS ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
LOCAL := $(VENV)/.installed-local
DEV := $(VENV)/.installed-dev
COOKBOOK := $(VENV)/cookbook/.installed
PIP = $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check $(PIP_FLAGS)
PYTEST = $(BIN)/python -m pytest -q
# skyrl.py wants an environment of its own, and instructions.py measures nothing.
BENCH := $(filter-out benchmarks/skyrl.py benchmarks/instructions.py,$(wildcard benchmarks/*.py))

.PHONY: help install demo test test-slow check bench bench-engine bench-sampling bench-losses docs clean bench-inference conformance bench-events bench-stats
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: $(LOCAL) ## Train, evaluate and compare a small model, and write a report
	@$(BIN)/crucible demo $(ARGS)

install: $(LOCAL) ## Install Crucible with its local engine into .venv

test: $(DEV) ## Run every test but the slow ones, in parallel
	@$(PYTEST) -n auto --maxprocesses 8 -m "not slow" $(ARGS)

test-slow: $(DEV) ## Run the tests that train a real model
	@$(PYTEST) -n 0 -m slow $(ARGS)

conformance: $(COOKBOOK) ## Run tinker-cookbook's recipes against `crucible serve`
	@$(PYTEST) -n 0 -m "slow or not slow" tests/conformance $(ARGS)

check: $(DEV) ## Run all checks: format, lint, types, import floors, tests with coverage, documentation
	@VENV="$(VENV)" scripts/check $(ARGS)

bench: $(DEV) ## Run the benchmarks
	@for file in $(BENCH); do printf '\n== %s\n' "$$file"; $(BIN)/python "$$file" $(ARGS) || exit 1; done

bench-engine: $(DEV) ## Measure training beside PEFT and the machine's matmul, and keep the figures (8 minutes)
	@$(BIN)/python benchmarks/engine.py --save engine $(ARGS)

bench-sampling: $(DEV) ## Measure sampling beside generate and llama.cpp, and keep the figures
	@$(BIN)/python benchmarks/sampling.py --save sampling $(ARGS)

bench-events: $(DEV) ## Measure what an event costs; fails where a promise of docs/observability.md is not kept
	@$(BIN)/python benchmarks/events.py $(ARGS) --limits

bench-losses: $(DEV) ## Show what the structure losses do (about an hour of one core)
	@$(BIN)/python benchmarks/studies/loss_effects.py $(ARGS)

bench-inference: $(DEV) ## Measure hedging and routing beside the offline optimum and the rivals on PyPI (5 minutes)
	@$(PIP) hedge-python==0.3.0 httpx-hedged==0.5.0 || echo "The rivals could not be installed; the table is without them." >&2
	@$(BIN)/python benchmarks/inference.py $(ARGS)

bench-stats: $(DEV) ## Hold the statistics to their oracles: stored cases, coverage, p-values, time beside pingouin (10 to 20 minutes)
	@$(PIP) --group oracles
	@$(BIN)/python benchmarks/stats.py $(ARGS)

docs: $(DEV) ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # --quiet would hide the warnings from --strict too

clean: ## Remove what builds and checks leave behind (not .venv, not runs)
	@rm -rf site dist build htmlcov .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find src tests examples benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is newer than pyproject.toml where the environment is up to date, so installs happen once.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Crucible needs Python 3.11 or newer and found none. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(LOCAL): pyproject.toml | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) # it was interrupted while being made
	@$(PIP) --upgrade pip
	@echo "Installing $(TORCH) into $(VENV) (once, the largest part)"
	@$(PIP) "$(TORCH)"
	@echo "Installing Crucible with its local engine"
	@$(PIP) -e '.[local]'
	@touch $@

$(COOKBOOK): tests/conformance/requirements.txt scripts/install_cookbook | $(DEV)
	@echo "Installing tinker-cookbook beside the environment, into $(VENV)/cookbook"
	@PIP_FLAGS="$(PIP_FLAGS)" scripts/install_cookbook $(VENV)
	@touch $@

$(DEV): pyproject.toml $(LOCAL)
	@echo "Installing what tests, checks and documentation need"
	@$(PIP) -e '.[local]' --group dev --group docs
	@touch $@
