# `make report` and `make test` set up .venv themselves; PYTHON is the interpreter that it is made from.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
# Two test processes on two cores: one torch thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help report test test-all lint types format wheel-check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

report: .venv/core  ## the main job on the bundled model: report.html
	$(BIN)/moe-interp report -o report.html

test: lint types  ## lint, types, tests, and the wheel in an environment of its own
	$(PYTEST) -m "not slow"
	$(MAKE) wheel-check

test-all: lint types  ## the same with the slow tests, and all annotations run, not only shapes
	ANNOTATIONS=all $(PYTEST)
	$(MAKE) wheel-check

lint: .venv/dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev  ## mypy
	$(BIN)/mypy

format: .venv/dev  ## let ruff put right what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel-check: .venv/dev  ## build the wheel, install it elsewhere, use it there
	$(BIN)/python tests/check_wheel.py

clean:  ## everything that was made here, .venv included
	rm -rf .venv dist build report.html causal_audit.html vision_moe.html vision_*/ .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The files .venv/core and .venv/dev say that the set-up was done, and with which dependencies.
.venv/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "Python 3.11 to 3.13 is needed, $(PYTHON) is another: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up .venv (once; a few minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/dev: .venv/core
	$(PIP) -e ".[dev]"
	@touch $@
