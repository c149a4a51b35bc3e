"""`python -m sim`: many seeds on all cores, or one seed with every message. Run it with tests/ on PYTHONPATH."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from sim.faults import CELLS
from sim.trial import Tally, run
from sim.world import World

CHUNK = 25


def main() -> int:
    """Exit 0 if every promise held and every step was crashed at, else 1."""
    parser = argparse.ArgumentParser(prog="python -m sim")
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="replay this one and print every message")
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed)
    started = time.monotonic()
    ranges = [
        range(first, min(first + CHUNK, options.first + options.seeds))
        for first in range(options.first, options.first + options.seeds, CHUNK)
    ]
    total = Tally()
    with ProcessPoolExecutor(options.processes) as pool:
        for tally in pool.map(run, ranges):
            for seed, breach in tally.breaches.items():
                print(f"seed {seed} FAILED, {breach}\n  replay: PYTHONPATH=tests python -m sim --seed {seed}")
            total.add(tally)
    report(total, time.monotonic() - started)
    return 1 if total.breaches or total.missed() else 0


def replay(seed: int) -> int:
    """Run one world and print every message of it; a broken promise is raised."""
    world = World(seed)
    print(f"seed {seed}: {world.kind}, experts on {', '.join(world.replica_names)}")
    world.network.tell = lambda text: print(f"{world.clock.now:9.4f} {text}")
    world.run()
    return 0


def report(total: Tally, seconds: float) -> None:
    """Print what was seen."""
    for name, count in sorted(total.counts.items()):
        print(f"{count:9,} {name}")
    crashes, hits = sum(total.hit.values()), [total.hit[cell] for cell in CELLS]
    print(f"{crashes:9,} crashes at {sum(map(bool, hits))} of {len(CELLS)} steps x actors, {min(hits)} or more at each")
    for cell in total.missed():
        print(f"never crashed: {' '.join(cell)}")
    print(
        f"{total.seeds:,} seeds, {total.events:,} events in {seconds:.1f} s "
        f"({total.seeds / seconds:.0f} seeds/s): {len(total.breaches)} failed"
    )


if __name__ == "__main__":
    sys.exit(main())
