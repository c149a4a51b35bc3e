"""Experiments with a cluster that changes its size: `python -m benchmarks.scaling routers|replicas|autoscale [--help]`.

Each prints what it saw beside what was promised, and ends with status 1 where a promise was not kept.
"""

from __future__ import annotations

import sys

from benchmarks.experiments import run_one

from . import autoscale, replicas, routers

EXPERIMENTS = {"routers": routers, "replicas": replicas, "autoscale": autoscale}

if __name__ == "__main__":
    sys.exit(run_one("python -m benchmarks.scaling", __doc__, EXPERIMENTS))
