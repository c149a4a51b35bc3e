# Set-up needs only `make demo` and `make test`: each makes .venv when it is missing or its inputs changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.PHONY: help demo examples test test-fast test-ray check format clean bench bench-quick bench-plane
.PHONY: sim chaos-swap chaos-kill chaos-slow chaos-break chaos-routers chaos-train scaling soak-swap leak

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("expertmesh needs Python 3.10 or newer, but \
	$(PYTHON) is %d.%d: name another one, as in `make PYTHON=python3.11 demo`" % v[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cluster,demo,examples,dev]'
	@touch $@

# What the peers of the benchmark need beside it: Ray Serve, matplotlib.
$(BENCH_STAMP): $(STAMP) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@touch $@

demo: $(STAMP) ## train experts on real text, serve them, replace one under traffic
	$(BIN)/expertmesh demo

examples: $(STAMP) ## every application at small size (minutes); `expertmesh example NAME` runs one at full size
	@for name in $$($(BIN)/python -c 'from expertmesh.cluster.cli.applications.examples import NAMES; print(*NAMES)'); do $(BIN)/expertmesh example $$name --small --seeds 1 --out out/examples/$$name || exit 1; done

test: $(STAMP) ## the whole suite, on real Ray and real gRPC too (minutes): what needs no Ray by two processes, then the rest
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not gpu"
	$(BIN)/python -m pytest -m "ray or gpu"

FAST := tests/experts tests/router tests/cluster tests/house

test-fast: $(STAMP) ## the inner loop, under a minute: not tests/{live,ray,sim,bench}, nor what is marked ray, gpu or slow
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not ray and not gpu and not slow" $(FAST)

test-ray: $(STAMP) ## the tests on real Ray once more, with rows through Ray's calls in place of the channel
	$(BIN)/python -m pytest tests/ray --transport ray

check: $(STAMP) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put the code in the form that check wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

BENCH = OMP_NUM_THREADS=1 GRPC_ENABLE_FORK_SUPPORT=0 $(BIN)/python -m benchmarks
RESULTS := out/bench

bench: $(BENCH_STAMP) ## every comparison with limits and peers, C1 to C13 (up to 30 minutes)
	@mkdir -p $(RESULTS)
	$(BENCH) --json $(RESULTS)/bench.json --plots $(RESULTS)

bench-quick: $(BENCH_STAMP) ## fewer, shorter blocks, without the slowest rows and arms (5 minutes)
	@mkdir -p $(RESULTS)
	$(BENCH) --quick --json $(RESULTS)/bench-quick.json

bench-plane: $(BENCH_STAMP) ## C1 to C4, the data plane, and where the time of a call goes (5 minutes)
	@mkdir -p $(RESULTS)
	$(BENCH) C1 C2 C3 C4 --seconds 0.2 --without expertmesh_4 --without ray_good --json $(RESULTS)/bench-plane.json --plots $(RESULTS)

sim: $(STAMP) ## the controller in 2,000 simulated worlds that crash, delay and lose
	PYTHONPATH=tests $(BIN)/python -m sim

chaos-swap: $(STAMP) ## 100 swaps in a minute under load on real Ray, every answer recomputed; then mutants, to be caught
	$(BIN)/python -m benchmarks.chaos swap
	$(BIN)/python -m benchmarks.chaos swap --experts 2 --seconds 10 --steady 2 --swaps 10 --mutant early
	$(BIN)/python -m benchmarks.chaos swap --experts 2 --seconds 10 --steady 2 --swaps 10 --mutant newest

chaos-kill: $(STAMP) ## replicas and the controller are killed under load and in the middle of swaps
	$(BIN)/python -m benchmarks.chaos kill

soak-swap: $(STAMP) ## 2,000 swaps in a row: memory, file descriptors and latencies must not drift
	$(BIN)/python -m benchmarks.chaos soak

chaos-slow: $(STAMP) ## a slow layer at twice what it bears must not slow down another one
	$(BIN)/python -m benchmarks.chaos slow

chaos-break: $(STAMP) ## what breaks around a cluster: frozen, overloaded, full disks, damage, lost heads (15 minutes)
	@mkdir -p $(RESULTS)
	$(BIN)/python -m benchmarks.breakage --json $(RESULTS)/chaos-break.json

chaos-routers: $(STAMP) ## two routers and an attached one, each killed and frozen under load and swaps (5 minutes)
	$(BIN)/python -m benchmarks.scaling routers

chaos-train: $(STAMP) ## 1,000 updates under kills and repetitions, failing experts, and training beside requests (6 minutes)
	$(BIN)/python -m benchmarks.training kills
	$(BIN)/python -m benchmarks.training failures
	$(BIN)/python -m benchmarks.training serving

scaling: $(STAMP) ## replicas up and down fifty times, what four carry, and scaling by load (12 minutes)
	$(BIN)/python -m benchmarks.scaling replicas
	$(BIN)/python -m benchmarks.scaling autoscale

leak: $(STAMP) ## starts, stops and kills in great number: nothing may be left (12 minutes at most)
	$(BIN)/python -m benchmarks.leak

clean: ## remove what these targets made
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis out
