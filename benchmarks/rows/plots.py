"""Pictures of a result: latency and throughput over rows, throughput over actors, latency over time with its marks."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
    found = [
        _over_rows(folder / "latency_over_rows.png", latency, "p50, ms"),
        _over_rows(folder / "throughput_over_rows.png", rate, "rows/s"),
        _over_actors(folder / "throughput_over_actors.png", over_actors(blocks)),
    ]
    found += [_timeline(folder / f"{row}_timeline.png", row, one) for row, one in timelines.items()]
    return [path for path in found if path is not None]


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


def _over_rows(path: Path, panels: Mapping[str, Mapping[str, Sequence[Point]]], label: str) -> Path | None:
    if not panels:
        return None
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for axis, (title, arms) in zip(axes[0], panels.items(), strict=True):
        for arm, points in arms.items():
            ours = arm.startswith(("expertmesh", "identity", "ffn"))
            axis.plot(*zip(*points, strict=True), marker="o", label=arm, linewidth=2.2 if ours else 1.2)
        axis.set(title=title, xlabel="rows of a call", ylabel=label, xscale="log", yscale="log")
        axis.legend(fontsize=7)
    return _saved(figure, path)


def _over_actors(path: Path, lines: Mapping[str, Sequence[Point]]) -> Path | None:
    if not lines:
        return None
    figure, axis = _pyplot().subplots(figsize=(7, 4.5))
    for title, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=title)
    axis.set(xlabel="actors that share the experts", ylabel="rows/s", yscale="log")
    axis.legend(fontsize=7)
    return _saved(figure, path)


def _timeline(path: Path, row: str, told: Mapping[str, Any]) -> Path:
    figure, axis = _pyplot().subplots(figsize=(11, 4))
    points = [(x, y) for x, y in zip(told["seconds"], told["milliseconds"], strict=True) if y is not None]
    failed = [x for x, y in zip(told["seconds"], told["milliseconds"], strict=True) if y is None]
    if points:
        axis.plot(*zip(*points, strict=True), ".", markersize=2, label="request")
    for number, moment in enumerate(told["marks"]):
        axis.axvline(moment, color="red", linewidth=0.8, label=None if number else told["marked"])
    if failed:
        axis.plot(failed, [1.0] * len(failed), "x", color="black", label="failed")
    axis.set(title=row, xlabel="seconds", ylabel="latency, ms", yscale="log")
    axis.legend(fontsize=8)
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
    return path


def _pyplot() -> Any:
    import matplotlib  # here: only pictures need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
