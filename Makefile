# The same commands for people and for CI. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SLOW := slow or ray or slurm

.PHONY: help env quickstart check fix test test-slow test-all docs wheel bench chaos clean
help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(VENV)/.ready ## Make .venv with the tested versions

# Torch comes first and alone: where the index offers a CPU build, that build then stays. torchvision arrives through
# litdata's metadata, is never imported, and its CUDA wheel breaks a CPU torch: there it goes again.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || $(BIN)/pip uninstall --quiet --yes torchvision
	touch $@

quickstart: env ## Real text to a model that answers, on this machine's CPUs, in quickstart/
	$(BIN)/python scripts/quickstart.py

check: env ## Format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_imports.py

fix: env ## Let the tools mend what they can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: env ## The fast tests, about a minute
	$(BIN)/pytest -q -m "not gpu and not ($(SLOW))"

test-slow: env ## The rest that needs no GPU: real clusters, kills, whole pipelines
	$(BIN)/pytest -q -m "not gpu and ($(SLOW))"

test-all: test test-slow ## Both

docs: env ## Write docs/reference.md from the functions' signatures
	$(BIN)/python scripts/write_reference.py

wheel: env ## Build the wheel, install it in a clean environment, run it from elsewhere
	rm -rf dist build/wheel
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	tests/check_wheel.sh build/wheel/bin

bench: env ## Every benchmark at a size for this machine; prints tables
	for name in optimize stream pretrain export; do $(BIN)/python benchmarks/$$name.py || exit 1; done

chaos: env ## A thousand kills of optimize and merge, five hundred of training; the result belongs into docs/reliability.md
	$(BIN)/python -m tests.chaos --cases 1000
	$(BIN)/python tests/train/chaos.py --cases 500

clean: ## Remove what the commands above made, the environment excepted
	rm -rf build dist quickstart my *.egg-info .mypy_cache .ruff_cache .pytest_cache
