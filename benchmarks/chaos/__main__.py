"""Experiments with faults, on real Ray: `python -m benchmarks.chaos swap|kill|soak|slow [--help]`.

Each prints what it saw beside what was promised, and ends with status 1 where a promise was not kept. An experiment is
a module with its `arguments`, what its `cluster` has beside the usual, and `run`, which returns what was not as it must
be.
"""

from __future__ import annotations

import argparse
import os
import sys

from . import kill, slow, soak, swap
from .figures import say
from .mesh import chaos_mesh

EXPERIMENTS = {"swap": swap, "kill": kill, "soak": soak, "slow": slow}


def main() -> int:
    """Run one experiment."""
    options = _options()
    experiment = EXPERIMENTS[options.what]
    usual = {"experts": options.experts, "replicas": options.replicas, "transport": options.transport}
    with chaos_mesh(f"chaos-{options.what}", **usual, **experiment.cluster(options)) as mesh:
        problems = experiment.run(mesh, options)
        say("rows to replicas", mesh.carried())
        say("load average, CPUs", f"{os.getloadavg()[0]:.1f}, {os.cpu_count()}")  # every figure depends on that
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.partition("An exp")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module in EXPERIMENTS.items():
        one = commands.add_parser(name, description=module.__doc__)
        one.add_argument("--transport", choices=("channel", "ray"), default="channel", help="how rows travel")
        one.add_argument("--experts", type=int, default=8)
        one.add_argument("--replicas", type=int, default=2)
        module.arguments(one)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
