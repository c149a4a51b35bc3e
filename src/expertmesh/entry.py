"""The `expertmesh` command: runs the command line, or says which extra it needs."""

from __future__ import annotations

import sys
from typing import NoReturn

from .experts.errors import MissingExtra
from .experts.optional_imports import load


def main() -> NoReturn:
    """Run the command line of this process and exit: 0 done, 1 failed, 2 wrong usage."""
    try:
        module = load("expertmesh.cluster.cli.main", "the expertmesh command")
    except MissingExtra as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(module.cli(prog_name="expertmesh"))


if __name__ == "__main__":
    main()
