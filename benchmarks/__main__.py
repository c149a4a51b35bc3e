"""The benchmark: `python -m benchmarks [C1 C5 ...] [--quick] [--json FILE] [--plots FOLDER]`.

Rows are compared in blocks that take turns, after every arm has given the right answer. Without names all rows run.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .home import own_home
from .peers import catalogue as arms
from .rows import catalogue, facts, hivemind, live, plots, report, run
from .rows.verdict import Line

LONG = ("C7", "C10")
"""Rows that a quick run has only when they are asked for by name."""


def main(arguments: list[str] | None = None) -> int:
    """Run rows, show what came of them; 0 unless something could not be run to its end."""
    options = _options(arguments)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    machine = facts.facts()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.1f} s] {text}", file=sys.stderr, flush=True)

    result = run.Result()

    def kept() -> None:
        machine["seconds"] = round(time.monotonic() - begin, 1)
        machine["load after"] = [round(value, 2) for value in os.getloadavg()]
        if options.json:
            more = {"arms": result.versions, "blocks": result.blocks(), "timelines": result.timelines}
            report.write_json(options.json, report.document(result.lines, result.stages, machine, **more))

    try:
        with own_home():
            _run(options, say, result, kept)
    except KeyboardInterrupt:
        say("interrupted: what was measured until now")
        machine["interrupted"] = True
    kept()
    report.show(result.lines, result.stages, machine)
    if options.plots:
        for path in plots.draw(options.plots, result.blocks(), result.timelines):
            say(f"drawn: {path}")
    return 1 if any(line.verdict.startswith(report.BROKEN) for line in result.lines) else 0


def _run(options: Any, say: Any, result: run.Result, kept: Callable[[], None]) -> None:
    """Measure every row into `result`; `kept` is called whenever there is more of it."""
    usual = run.TINY if options.tiny else run.QUICK if options.quick else run.FULL
    effort = replace(usual, blocks=options.blocks or usual.blocks, seconds=options.seconds or usual.seconds)
    if options.blocks or options.seconds:  # who says how long, gets it
        effort = replace(effort, limit=math.inf)
    declared = [catalogue.DECLARED[name] for name in options.rows if name in catalogue.DECLARED]
    sizes = {"quick": options.quick, "tiny": options.tiny}
    run.measure(declared, effort, say, **sizes, result=result, without=options.without, told=kept)
    earlier = None  # the other live rows lie between the two rounds of C10
    if "C10" in options.rows and not (options.quick or options.tiny):
        say("C10: on a cluster of its own, the first of two rounds")
        earlier = live.measured("C10", quick=False)
    for name in options.rows:
        if name in catalogue.DECLARED:
            continue
        if options.tiny or (name in LONG and options.quick and len(options.rows) == len(catalogue.NAMES)):
            left_out = "skipped: not with --tiny" if options.tiny else "skipped: too long for a quick run of all rows"
            result.lines.append(Line(name, "the whole row", "expertmesh", math.nan, verdict=left_out))
        elif name in live.ROWS:
            say(f"{name}: on a cluster of its own")
            if name == "C10":
                lines, timeline = live.skewed(quick=options.quick, earlier=earlier)
            else:
                lines, timeline = live.measured(name, quick=options.quick)
            result.lines += lines
            result.timelines |= {name: timeline} if timeline else {}
        else:
            result.lines += hivemind.measured(name, effort, say)
        result.lines.sort(key=lambda line: catalogue.NAMES.index(line.row))
        kept()


def _options(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(catalogue.NAMES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter blocks")
    parser.add_argument("--blocks", type=int, help="how often each arm has its turn (default 7, quick 4)")
    parser.add_argument("--seconds", type=float, help="of a block (default 0.4, quick 0.2)")
    parser.add_argument("--tiny", action="store_true", help="one short block on the smallest layer: no figures follow")
    without = parser.add_argument("--without", action="append", default=[], help="leave an arm out; repeatable")
    without.metavar, without.choices = "ARM", sorted(arms.ARMS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result for machines")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the result (needs matplotlib)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.rows if name not in catalogue.NAMES]
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; known are {', '.join(catalogue.NAMES)}")
    options.rows = [name for name in catalogue.NAMES if name in options.rows or not options.rows]
    return options


if __name__ == "__main__":
    sys.exit(main())
