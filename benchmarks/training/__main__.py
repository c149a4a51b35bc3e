"""Experiments with training: `python -m benchmarks.training kills|failures|serving [--help]`.

Each prints what it saw beside what was promised, and ends with status 1 where a promise was not kept.
"""

from __future__ import annotations

import sys

from benchmarks.experiments import run_one

from . import failures, kills, serving

EXPERIMENTS = {"kills": kills, "failures": failures, "serving": serving}

if __name__ == "__main__":
    sys.exit(run_one("python -m benchmarks.training", __doc__, EXPERIMENTS))
