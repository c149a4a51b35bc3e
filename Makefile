# Set-up needs only `make demo` and `make test`: each makes .venv when it is missing or its inputs changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check format clean bench-router sim

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cluster,demo,dev]'
	@touch $@

demo: $(STAMP) ## train experts on real text, serve them, replace one under traffic
	$(BIN)/expertmesh demo

test: $(STAMP) ## the whole suite, on real Ray and real gRPC too (minutes)
	$(BIN)/python -m pytest

check: $(STAMP) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put the code in the form that check wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-router: $(STAMP) ## gate, dispatch and combine against their floor and against transformers
	$(BIN)/python -m benchmarks.router

sim: $(STAMP) ## the controller's decisions in 2,000 simulated worlds that crash, delay and lose
	PYTHONPATH=tests $(BIN)/python -m sim

clean: ## remove what these targets made
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis out
