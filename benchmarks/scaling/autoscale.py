"""`autoscale`: a Zipf load on four experts that wait grows the hot one, which then shrinks; answers are looked at."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from benchmarks.chaos.figures import say
from benchmarks.home import own_home

from expertmesh import AsyncClient, Autoscale, Cluster, Expert, Layer, TensorSpec, errors, gates

EXPERTS = 4
ROWS = 8200


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument("--seconds", type=float, default=60.0, help="of load")
    parser.add_argument("--quiet", type=float, default=60.0, help="seconds after it in which it must shrink")
    parser.add_argument("--most", type=int, default=4, help="replicas of each expert")
    parser.add_argument("--rate", type=float, default=110.0, help="requests a second, of one batch each")
    parser.add_argument("--zipf", type=float, default=1.5, help="expert n gets a share of 1 / n**zipf")


@dataclass
class Seen:
    """What came of the requests, and the replicas of each expert, second by second."""

    answered: Counter[int] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    replicas: list[tuple[float, dict[str, int]]] = field(default_factory=list)


def run(options: argparse.Namespace) -> list[str]:
    """Load, then quiet."""
    rows = TensorSpec((EXPERTS,), "float32")
    rule = Autoscale(min=1, max=options.most, target_queue_ms=50.0, up_after=3.0, down_after=10.0)
    specs: dict[str, Any] = {"framework": "numpy", "num_cpus": 0, "input": rows, "output": rows}
    made = Expert("benchmarks.scaling.waits:wait", autoscale=rule, **specs)
    gate = gates.TopK(EXPERTS, EXPERTS, k=1)
    gate.load_state_dict({"weight": 10 * torch.eye(EXPERTS)})
    layer = Layer("zipf", gate, {f"e{number}": made for number in range(EXPERTS)}, input=rows)
    with own_home() as folder:
        settings: dict[str, Any] = {"name": "autoscale", "port": 0, "metrics_port": None, "start_timeout": 600}
        settings["max_rows_in_flight"] = 1000 * ROWS  # what waits while a replica starts must not be refused
        with Cluster.start([layer], state_dir=folder / "state", **settings) as cluster:
            seen = Seen()
            asyncio.run(_load(cluster, options, seen))
    return _said(options, seen)


async def _load(cluster: Cluster, options: argparse.Namespace, seen: Seen) -> None:
    draw, asked = random.Random(0), set[asyncio.Task[None]]()
    shares = [1 / (number + 1) ** options.zipf for number in range(EXPERTS)]
    inputs = [np.zeros((ROWS, EXPERTS), np.float32) for _ in range(EXPERTS)]
    for number, x in enumerate(inputs):
        x[:, number] = 1.0  # the gate picks expert `number`
    begin = last = due = time.monotonic()
    async with AsyncClient(cluster.endpoint, timeout=30.0) as client:

        async def ask(number: int) -> None:
            try:
                reply = await client.call("zipf", inputs[number])
            except errors.ExpertMeshError as error:
                seen.failed[f"{type(error).__name__}: {error.message[:100]}"] += 1
            else:
                seen.answered[number] += 1
                named = {"zipf/gate", f"zipf/e{number}"}
                seen.wrong += reply.versions.keys() != named or not np.array_equal(reply.output, inputs[number])

        while (now := time.monotonic()) - begin < options.seconds + options.quiet:
            if now - last >= 1.0:
                last = now
                seen.replicas.append((now - begin, await asyncio.to_thread(_replicas, cluster)))
            if now - begin < options.seconds and now >= due:
                task = asyncio.create_task(ask(draw.choices(range(EXPERTS), shares)[0]))
                asked.add(task)
                task.add_done_callback(asked.discard)
                due += draw.expovariate(options.rate)
            await asyncio.sleep(0.002 if now - begin < options.seconds else 0.1)
        await asyncio.gather(*asked)


def _replicas(cluster: Cluster) -> dict[str, int]:
    ready = [id for id, seen in cluster.status()["replicas"].items() if seen["state"] == "ready"]
    return dict(sorted(Counter(id.partition("#")[0] for id in ready).items()))


def _said(options: argparse.Namespace, seen: Seen) -> list[str]:
    before: dict[str, int] = {}
    for moment, replicas in seen.replicas:
        if replicas != before:
            print(f"  {moment:5.0f} s  " + ", ".join(f"{id} {number}" for id, number in replicas.items()), flush=True)
            before = replicas
    say("requests answered, of each expert", ", ".join(str(seen.answered[number]) for number in range(EXPERTS)))
    say("failed, wrong", f"{sum(seen.failed.values())}, {seen.wrong}", "0, 0")
    for error, count in seen.failed.most_common(3):
        print(f"    failed {count} times: {error}")
    most = {id: max(found.get(id, 0) for _, found in seen.replicas) for id in seen.replicas[0][1]}
    hot, cold = most["zipf/e0"], most[f"zipf/e{EXPERTS - 1}"]
    last = seen.replicas[-1][1]
    say("most replicas of the hot expert", hot, ">= 2")
    say("most replicas of the coldest", cold, "1")
    say("replicas at the end", ", ".join(str(number) for number in last.values()), "1 of each")
    problems = [f"{sum(seen.failed.values())} failed, {seen.wrong} wrong"] if seen.failed or seen.wrong else []
    problems += ["the hot expert did not grow"] if hot < 2 else []
    problems += ["the coldest expert grew"] if cold != 1 else []
    return problems + (["the replicas did not shrink"] if set(last.values()) != {1} else [])
