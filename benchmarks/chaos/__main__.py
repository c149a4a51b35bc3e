"""Experiments with faults, on real Ray: `python -m benchmarks.chaos swap|kill|soak|slow [--help]`.

Each prints what it saw beside what was promised, and ends with status 1 where a promise was not kept.
"""

from __future__ import annotations

import argparse
import sys

from . import kill, slow, soak, swap

EXPERIMENTS = {"swap": swap, "kill": kill, "soak": soak, "slow": slow}


def main() -> int:
    """Run one experiment."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module in EXPERIMENTS.items():
        one = commands.add_parser(name, description=module.__doc__)
        one.add_argument("--transport", choices=("channel", "ray"), default="channel", help="how rows travel")
        module.arguments(one)
    options = parser.parse_args()
    return EXPERIMENTS[options.what].main(options)


if __name__ == "__main__":
    sys.exit(main())
