"""Pictures of a result: latency and throughput over rows, throughput over actors, latency over time with its marks."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers.model import SHAPES

ACTORS = {"expertmesh_2": 2, "expertmesh_4": 4}
Point = tuple[float, float]


def draw(folder: Path, blocks: Sequence[Mapping[str, Any]], timelines: Mapping[str, Any]) -> list[Path]:
    """Draw what there is into a folder; returns the files. Needs matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    latency = series((one for one in blocks if one["in_flight"] == 1), "p50", 1000.0)
    rate = series((one for one in blocks if one["in_flight"] > 1), "rows_per_second", 1.0)
    found = []
    for name, panels, label in (("latency_over_rows", latency, "p50, ms"), ("throughput_over_rows", rate, "rows/s")):
        if panels:
            found.append(folder / f"{name}.png")
            with _picture(found[-1], (6 * len(panels), 4.5), len(panels)) as axes:
                for axis, (title, arms) in zip(axes, panels.items(), strict=True):
                    _over_rows(axis, title, arms, label)
    if actors := over_actors(blocks):
        found.append(folder / "throughput_over_actors.png")
        with _picture(found[-1], (7, 4.5)) as (axis,):
            for title, points in actors.items():
                axis.plot(*zip(*points, strict=True), marker="o", label=title)
            axis.set(xlabel="actors that share the experts", ylabel="rows/s", yscale="log")
    for row, told in timelines.items():
        found.append(folder / f"{row}_timeline.png")
        with _picture(found[-1], (11, 4)) as (axis,):
            _over_time(axis, row, told)
    return found


def series(blocks: Iterable[Mapping[str, Any]], name: str, scale: float) -> dict[str, dict[str, list[Point]]]:
    """{layer, dtype and calls in flight: {arm: [(rows, median), ...]}}."""
    found: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for one in blocks:
        title = f"{one['shape']} {one['dtype']}, {one['in_flight']} in flight"
        found[title][one["arm"]][one["rows"]] = scale * statistics.median(block[name] for block in one["blocks"])
    return {title: {arm: sorted(points.items()) for arm, points in arms.items()} for title, arms in found.items()}


def over_actors(blocks: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """{condition: [(actors, rows a second), ...]} of the product, where more than one placement was measured."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for one in blocks:
        actors = SHAPES[one["shape"]].experts if one["arm"] == "expertmesh" else ACTORS.get(one["arm"])
        if actors is not None and one["in_flight"] > 1:
            title = f"{one['shape']} {one['dtype']}, {one['rows']} rows"
            found[title][actors] = statistics.median(block["rows_per_second"] for block in one["blocks"])
    return {title: sorted(points.items()) for title, points in found.items() if len(points) > 1}


def _over_rows(axis: Any, title: str, arms: Mapping[str, Sequence[Point]], label: str) -> None:
    for arm, points in arms.items():
        ours = arm.startswith(("expertmesh", "identity", "ffn"))
        axis.plot(*zip(*points, strict=True), marker="o", label=arm, linewidth=2.2 if ours else 1.2)
    axis.set(title=title, xlabel="rows of a call", ylabel=label, xscale="log", yscale="log")


def _over_time(axis: Any, row: str, told: Mapping[str, Any]) -> None:
    points = list(zip(told["seconds"], told["milliseconds"], strict=True))
    answered = [(x, y) for x, y in points if y is not None]
    failed = [x for x, y in points if y is None]
    axis.plot([x for x, _ in answered], [y for _, y in answered], ".", markersize=2, label="request")
    for number, moment in enumerate(told["marks"]):
        axis.axvline(moment, color="red", linewidth=0.8, label=None if number else told["marked"])
    if failed:
        axis.plot(failed, [1.0] * len(failed), "x", color="black", label="failed")
    axis.set(title=row, xlabel="seconds", ylabel="latency, ms", yscale="log")


@contextmanager
def _picture(path: Path, inches: tuple[float, float], panels: int = 1) -> Iterator[Any]:
    """The axes of a new picture, which is saved at the end."""
    import matplotlib  # here: only pictures need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=inches, squeeze=False)
    yield axes[0]
    for axis in axes[0]:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
