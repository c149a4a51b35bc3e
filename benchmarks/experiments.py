"""Runs one experiment of a folder of them, each of which says what was not as it must be."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from types import ModuleType

from benchmarks.chaos.figures import say


def run_one(prog: str, description: str | None, experiments: Mapping[str, ModuleType]) -> int:
    """Run the experiment that the command line names, and return the status to exit with: 1 for broken promises.

    An experiment is a module with its `arguments`, and `run`, which returns what was not as it must be.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module in experiments.items():
        module.arguments(commands.add_parser(name, description=module.__doc__))
    options = parser.parse_args()
    problems = experiments[options.what].run(options)
    say("load average, CPUs", f"{os.getloadavg()[0]:.1f}, {os.cpu_count()}")  # every figure depends on that
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0
