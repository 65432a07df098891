# Every target makes the environment it needs; a fresh machine needs Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv demo test check format bench corpus fuzz clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make the environment in .venv
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; give PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## compile the example model for lpu, gpu and host, execute all, compare with onnxruntime
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(STAMP)  ## lint, format, types, import contracts, dead code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture

format: $(STAMP)  ## format and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## run the benchmarks
	$(BIN)/python -m pytest --override-ini addopts= --import-mode=importlib --benchmark-only benchmarks

fuzz: $(STAMP)  ## load 20,000 mutated model files; none may crash, hang or end in a traceback
	$(BIN)/python -m tests.fuzz.run

corpus: $(STAMP)  ## load and run every graph of the corpus in ../shared/corpus (or MAPPER_CORPUS)
	$(BIN)/python -m benchmarks.corpus

clean:  ## remove caches and outputs, not the environment
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks demo-out build dist
