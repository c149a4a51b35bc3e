"""C8 to C10 and C13 on the product's own cluster, each in a process: `python -m benchmarks.rows.live ROW QUICK`.

The process prints its lines and its timeline as JSON on the last line; everything else goes to standard error.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.compare import Ratio
from benchmarks.peers.helper import speaking

from . import live_faults, live_skew, live_training
from .verdict import Line

Found = tuple[list[Line], dict[str, Any]]
"""Lines, and a timeline for a plot."""

ROWS: dict[str, Callable[[bool], Found]] = {
    "C8": live_faults.kills,
    "C9": live_faults.swaps,
    "C10": live_skew.run,
    "C13": live_training.run,
}
MOST_SECONDS = 600.0


def main() -> None:
    """Run one row here."""
    with speaking() as say:  # the experiments print
        lines, timeline = ROWS[sys.argv[1]](sys.argv[2] == "quick")
        say({"lines": [asdict(line) for line in lines], "timeline": timeline})


def measured(row: str, *, quick: bool) -> Found:
    """Run one row in a process of its own; a line says why, where that fails."""
    command = [sys.executable, "-m", __name__, row, "quick" if quick else "full"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    patience = threading.Timer(MOST_SECONDS, process.terminate)  # it ends its cluster in good order
    patience.start()
    said, _ = process.communicate()
    patience.cancel()
    if process.returncode or not said.strip():
        return [Line(row, "the whole row", "expertmesh", math.nan, verdict=f"failed: status {process.returncode}")], {}
    told = json.loads(said.splitlines()[-1])
    return [_line(line) for line in told["lines"]], told["timeline"]


def skewed(*, quick: bool, earlier: Found | None) -> Found:
    """C10 measured now, and joined with the round that was measured earlier; there is no timeline."""
    rounds = [found for found in (earlier, measured("C10", quick=quick)) if found is not None]
    failed = [lines for lines, told in rounds if "rates" not in told]
    return (failed[0] if failed else live_skew.lines_of([told["rates"] for _, told in rounds])), {}


def _line(told: dict[str, Any]) -> Line:
    return Line(**{**told, "ratio": Ratio(**told["ratio"]) if told["ratio"] else None})


if __name__ == "__main__":
    main()
