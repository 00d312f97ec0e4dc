# Every target makes .venv in the checkout when it is missing or older than the pins.
#   make demo test bars lint types docs wheel setup          WORKERS=4 make test          PYTHON=python3.12 make setup
SHELL   := /bin/bash
PYTHON  ?= python3
WORKERS ?= 2
TESTS   ?=
BIN     := .venv/bin
STAMP   := .venv/.stamp

# One thread a process: the workers already fill the cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Tests start hundreds of processes: what these import is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test bars peers lint types docs wheel

help: ## show these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then echo "making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; fi
	@echo "installing dsc and its pinned dependencies into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@

setup: $(STAMP) ## make .venv with everything that development needs
	@echo "ready: $(BIN)/dsc $$($(BIN)/dsc --version)"

demo: $(STAMP) ## compile for a GPU that is not here, then generate text on what is
	@$(BIN)/python -m bench.demo

test: $(STAMP) ## run the tests; TESTS=tests/cli chooses some
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=10 $(TESTS)

bars: $(STAMP) ## measure everything the project promises, as one JSON object
	@$(BIN)/python -m bench.bars

peers: $(STAMP) ## measure dsc beside its peers on this machine; ARGS=--quick for two minutes
	@$(BIN)/python -m bench $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict over dsc, tests and bench
	@$(BIN)/mypy

docs: $(STAMP) ## docs/ as a site in out/site; every code block of it runs in make test
	@$(BIN)/mkdocs build --strict --quiet --site-dir out/site
	@echo "read it: out/site/index.html"

wheel: $(STAMP) ## build the wheel into out/dist and use it from a new environment
	@$(BIN)/python -m tests.wheel
