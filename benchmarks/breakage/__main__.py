"""What breaks around a cluster, on real Ray: frozen members, overload, full disks, damage, lost heads, half messages.

Each scenario runs in a process of its own, with a cluster and a folder of its own. The table has the promise beside
what was seen; the exit status is 1 where a promise was not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import disk, doors, frozen, head, overload, owners
from .scenario import Scenario, Seen

SCENARIOS: tuple[Scenario, ...] = (
    *frozen.SCENARIOS,
    *overload.SCENARIOS,
    *disk.SCENARIOS,
    *owners.SCENARIOS,
    *head.SCENARIOS,
    *doors.SCENARIOS,
)
LIMIT_SECONDS = 240.0
"""A scenario that takes longer has hung."""


def main() -> int:
    """Run the scenarios that are wanted; with `--one`, run that one here and print what it saw as JSON."""
    options = _options()
    if options.one:
        seen = next(one for one in SCENARIOS if one.name == options.one).run()
        Path(options.into).write_text(json.dumps(asdict(seen)))
        return 0
    wanted = [one for one in SCENARIOS if not options.only or one.name in options.only]
    results = [(one, *_apart(one)) for one in wanted]
    _show(results)
    if options.json:
        table = [{"name": s.name, "promise": s.promise, "seconds": t, **asdict(seen)} for s, seen, t in results]
        options.json.write_text(json.dumps(table, indent=2) + "\n")
    return 1 if any(seen.broken for _, seen, _ in results) else 0


def _apart(scenario: Scenario) -> tuple[Seen, float]:
    """Run a scenario in a process of its own, so that no state of Ray or gRPC is carried over."""
    print(f"{scenario.name} ...", flush=True)
    began = time.monotonic()
    into = Path(f"/tmp/expertmesh-breakage-{os.getpid()}.json")
    command = [sys.executable, "-m", "benchmarks.breakage", "--one", scenario.name, "--into", str(into)]
    try:
        ended = subprocess.run(command, timeout=LIMIT_SECONDS, stdout=sys.stderr, check=False)
        seen = Seen(**json.loads(into.read_text())) if into.exists() else Seen()
        if ended.returncode:
            seen.note(f"the scenario ended with status {ended.returncode}", False)
    except subprocess.TimeoutExpired:
        seen = Seen()
        seen.note(f"not over after {LIMIT_SECONDS:g} s", False)
    finally:
        into.unlink(missing_ok=True)
    return seen, time.monotonic() - began


def _show(results: list[tuple[Scenario, Seen, float]]) -> None:
    table = Table("what breaks", "promised", "seen", "kept", "s", show_lines=True)
    for scenario, seen, seconds in results:
        kept = "[red]no[/red]" if seen.broken else "yes"
        table.add_row(scenario.name, scenario.promise, "\n".join(seen.figures), kept, f"{seconds:.0f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs")
    for scenario, seen, _ in results:
        for figure in seen.broken:
            print(f"FAILED: {scenario.name}: {figure}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breakage", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=[one.name for one in SCENARIOS], help="these scenarios alone")
    parser.add_argument("--json", type=Path, help="write the table as JSON, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--into", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
