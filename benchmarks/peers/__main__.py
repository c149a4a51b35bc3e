"""One arm alone: `python -m benchmarks.peers --arm NAME --shape S --rows 32 --dtype bf16 [--json]`.

Prints latency of one call after the other, and rows a second with several calls in flight. `hivemind` is no arm: it
takes rows and seconds alone, and its lines are what its own client saw.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from typing import Any

import torch

from . import hivemind
from .arm import Arm, ArmUnavailable
from .catalogue import ARMS, start
from .measure import Block, block
from .model import DTYPES, SHAPES, TOLERANCE, difference, reference, rows

HIVEMIND = "hivemind"


def main() -> int:
    """Run one arm."""
    options = _options()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    torch.set_num_threads(1)
    try:
        if options.arm == HIVEMIND:
            return _print_hivemind(options)
        with start(options.arm, SHAPES[options.shape], DTYPES[options.dtype]) as arm:
            found = asyncio.run(measured(arm, options))
    except ArmUnavailable as error:
        print(json.dumps({"arm": options.arm, "skipped": str(error)}) if options.json else f"skipped: {error}")
        return 0
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:<28} {_text(value)}")
    return 0


def _print_hivemind(options: Any) -> int:
    for line in hivemind.measured(rows=options.rows, seconds=options.seconds):
        words = " ".join(
            f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in line.items()
        )
        print(json.dumps(line) if options.json else words)
    return 0


async def measured(arm: Arm, options: Any) -> dict[str, Any]:
    """What is printed of an arm."""
    shape, dtype = SHAPES[options.shape], DTYPES[options.dtype]
    x_TD = rows(shape, options.rows, dtype)
    answer_TD = await arm.call(x_TD)
    wanted_TD = x_TD if getattr(arm, "echoes", False) else reference(shape, dtype)(x_TD)
    apart = difference(answer_TD, wanted_TD)
    await block(arm, x_TD, options.in_flight, min(1.0, options.seconds))  # to warm up
    alone = await block(arm, x_TD, 1, options.seconds)
    loaded = await block(arm, x_TD, options.in_flight, options.seconds)
    return {
        "arm": options.arm,
        "version": arm.version,
        "layer": f"{options.shape} {options.dtype} {options.rows} rows",
        "difference to reference": apart,
        "agrees": apart <= TOLERANCE[dtype],
        **_figures("1 in flight", alone),
        **_figures(f"{options.in_flight} in flight", loaded),
    }


def _figures(title: str, seen: Block) -> dict[str, float]:
    latencies = sorted(seen.latencies)
    return {
        f"{title}: p50 ms": 1000 * seen.p50,
        f"{title}: p99 ms": 1000 * latencies[int(0.99 * (len(latencies) - 1))],
        f"{title}: rows/s": seen.rows_per_second,
        f"{title}: CPU s/1,000 rows": seen.cpu_seconds,
        f"{title}: foreign load": seen.foreign,
    }


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--arm", choices=[*ARMS, HIVEMIND], required=True)
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each block")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
