"""Pictures of an application: its models' quality beside what they cost, and a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from .comparison import Comparison

ROW = 0.4
"""Inches of a model in the picture."""


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Plot the first figure of each model with its spread, and beside it the operations of a row."""
    models, (figure, *_) = comparison.models, comparison.figures
    found = [comparison.quality(model, figure) for model in models]
    picture = Figure(figsize=(10, 1.5 + ROW * len(models)), layout="constrained")
    quality, cost = picture.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(models))
    colours = ["tab:blue" if number == 0 else "tab:gray" for number in places]
    quality.barh(places, [one.mean for one in found], xerr=[one.spread for one in found], color=colours)
    quality.set_yticks(places, models)
    quality.invert_yaxis()
    better = "lower" if comparison.lower_is_better else "higher"
    quality.set_xlabel(f"held-out {figure}, {better} is better; {len(comparison.results)} seeds")
    cost.barh(places, [comparison.of(model)[0].flops for model in models], color=colours)
    cost.set_xlabel("floating-point operations per row")
    picture.suptitle(comparison.name.replace("_", " "))
    picture.savefig(path, dpi=120)


def plot_confusion(labels_T: Tensor, answers_T: Tensor, names: Sequence[str], path: Path) -> None:
    """Plot how often each class (int64 [T]) was answered by each class."""
    count = len(names)
    counts = (labels_T * count + answers_T).bincount(minlength=count * count).reshape(count, count)
    picture = Figure(figsize=(2.5 + 0.4 * count, 2 + 0.4 * count), layout="constrained")
    axes = picture.subplots()
    axes.imshow(counts.sqrt().numpy(), cmap="Blues")
    for row in range(count):
        for column in range(count):
            dark = counts[row, column] > counts.max() / 2
            axes.text(
                column, row, str(int(counts[row, column])), ha="center", va="center", color="white" if dark else "black"
            )
    axes.set_xticks(range(count), names, rotation=45, ha="right")
    axes.set_yticks(range(count), names)
    axes.set_xlabel("answer")
    axes.set_ylabel("label")
    picture.savefig(path, dpi=120)
