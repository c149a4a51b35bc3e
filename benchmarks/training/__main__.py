"""Experiments with training: `python -m benchmarks.training kills|failures|serving [--help]`.

Each prints what it saw beside what was promised, and ends with status 1 where a promise was not kept.
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.chaos.figures import say

from . import failures, kills, serving

EXPERIMENTS = {"kills": kills, "failures": failures, "serving": serving}


def main() -> int:
    """Run one experiment."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module in EXPERIMENTS.items():
        module.arguments(commands.add_parser(name, description=module.__doc__))
    options = parser.parse_args()
    problems = EXPERIMENTS[options.what].run(options)
    say("load average, CPUs", f"{os.getloadavg()[0]:.1f}, {os.cpu_count()}")  # every figure depends on that
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
