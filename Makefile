# The same commands for people and for CI. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help env check fix test test-all wheel bench quickstart clean
help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(VENV)/.ready ## Make .venv with the tested versions

# Torch first and alone: on a CPU machine whose index offers a CPU build, that build then stays. torchvision comes in through
# litdata's metadata, is never imported, and its CUDA wheel breaks a CPU torch: it goes again.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || $(BIN)/pip uninstall --quiet --yes torchvision
	touch $@

check: env ## Format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_imports.py

fix: env ## Let the tools mend what they can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: env ## The fast tests (under a minute)
	$(BIN)/pytest -q -m "not slow and not ray and not slurm and not gpu"

test-all: env ## Every test that needs no GPU
	$(BIN)/pytest -q -m "not gpu"
