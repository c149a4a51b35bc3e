"""The steps of a plan as calls to a running cluster: all that it can make, or none."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....experts.errors import FailedPrecondition
from ....experts.names import GATE
from ....router.gates import Gate
from ...client.client import Client
from ...placement.change_plan import Change, Step
from .edits import LAYER_STEPS, coming, edit_of, has_gate, has_policies, layer_of

SWAP_SECONDS = 300.0
SCALE_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Course:
    """What the steps of a plan need: the client, the gates of the file by id, and what is allowed.

    On the way back, `versions` are those that served before the plan was begun, by id. `factories` are those that the
    cluster allows; None where it allows what was declared when it started, which it knows best. `retain_epochs` are
    those that it keeps before the current one.
    """

    client: Client
    gates: Mapping[str, Gate] = field(default_factory=dict)
    versions: Mapping[str, str] | None = None
    factories: Collection[str] | None = None
    retain_epochs: int = 0
    allow_unverified: bool = False

    def check_possible(self, steps: Sequence[Step]) -> None:
        """Raise FailedPrecondition where a running cluster cannot make all of these steps."""
        lacking = [why for step in steps for why in (*_obstacles(step), *self._forbidden(step))]
        lacking += self._lost(steps)
        if lacking:
            what = f"a running cluster cannot {', and cannot '.join(lacking)}"
            raise FailedPrecondition(f"nothing was changed: {what}. Restart it with the file instead")

    def _lost(self, steps: Sequence[Step]) -> Iterator[str]:
        """The versions to go back to that are kept no more, or will not be when it is their turn.

        Each step before makes an epoch, and so lets an older one go.
        """
        if self.versions is None:
            return
        epoch, before = int(self.client.status()["epoch"]), 0
        for step in steps:
            for change in step.changes if step.kind == "swap" else coming(step):
                version = self.versions.get(change.key)
                found = [item for item in self.client.history(change.key) if item.get("version") == version]
                newest = max(found[0].get("epochs") or [0]) if found else -1
                if not found or not (found[0].get("current") or newest >= epoch + before - self.retain_epochs):
                    yield f"{step.kind} {change.key} back to {version}, which it keeps no more (retain_epochs)"
            before += step.kind != "scale"

    def _forbidden(self, step: Step) -> Iterator[str]:
        """The code that the cluster does not let a client name."""
        for change in step.changes if step.kind == "swap" else coming(step):
            if change.section != "experts" or (step.kind == "swap" and self._by_tensors(change)):
                continue
            factory = change.after["factory"]
            if self.factories is not None and factory not in self.factories:
                yield f"{step.kind} {change.key} with {factory!r}, which is not in its allowed_factories"

    def _by_tensors(self, change: Change) -> bool:
        """Whether a swap names no code: it goes back to a version, or brings weights for what serves."""
        return self.versions is not None or _only_weights(change)

    def make(self, steps: Sequence[Step], progress: Callable[[str], object]) -> list[Any]:
        """Make steps one after another; `progress` is told of each that was made. Returns what became of each."""
        outcomes = []
        for number, step in enumerate(steps, start=1):
            outcomes.append(CALLS[step.kind](self, step))
            progress(f"{number}/{len(steps)} {step.kind} {step.subject}: done")
        return outcomes


def _swap(course: Course, step: Step) -> None:
    """Replace what experts and gates compute, in one transaction, by what is declared."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-") as folder:
        course.client.swap(
            {change.key: _replacement(course, change, Path(folder)) for change in step.changes},
            adopts={change.key: change.after["digest"] for change in step.changes},
            allow_norm=True,
            allow_unverified=course.allow_unverified,
            timeout=SWAP_SECONDS,
        )


def _replacement(course: Course, change: Change, folder: Path) -> dict[str, Any]:
    """The change that a swap asks for: a version that there was, the tensors of a gate, or a declaration."""
    if course.versions is not None:
        return {"version": course.versions[change.key]}
    if change.section == "gates":
        path = folder / f"{change.key.replace('/', '~')}.safetensors"
        course.gates[change.key].save(path)
        return {"weights": path}
    after = change.after
    weights = {} if after["weights"] is None else {"weights": after["weights"]}
    if _only_weights(change):
        return weights
    framework = {} if after["framework"] is None else {"framework": after["framework"]}
    return {"factory": after["factory"], "args": after["args"], "kwargs": after["kwargs"], **framework, **weights}


def _only_weights(change: Change) -> bool:
    """Whether an expert is to have other weights, and the same code."""
    before, after = change.before, change.after
    return after["weights"] is not None and all(before[key] == after[key] for key in ("factory", "args", "kwargs"))


def _obstacles(step: Step) -> Iterator[str]:
    """What of a step a running cluster cannot make."""
    if step.kind not in CALLS or (step.kind == "set" and not has_policies(step)):
        yield f"{step.kind} {step.subject}"
    for change in step.changes if step.kind == "swap" else ():
        if change.section == "gates" and _form(change.before) != _form(change.after):
            yield f"swap {change.key} for a gate of another kind or with other arguments"
        elif change.section == "experts" and change.before["framework"] != change.after["framework"]:
            yield f"swap {change.key} for one with rows of another framework"
    for change in coming(step):
        if change.section == "experts" and change.after["live"]:
            yield f"{step.kind} {change.key}, which is a live object"
    for change in step.changes:
        if change.section == "places" and change.after and change.after["runtime_env"] and step.kind in LAYER_STEPS:
            yield f"{step.kind} {change.key}, which has a runtime_env of its own"


def _form(gate: Mapping[str, Any]) -> tuple[object, ...]:
    """What of a gate no tensors bring: `weights` are tensors also where they are arguments."""
    arguments = gate["arguments"]
    return gate["type"], None if arguments is None else {**arguments, "weights": None}


def _scale(course: Course, step: Step) -> None:
    """Give a group the number of replicas that is declared."""
    course.client.scale({change.key: change.after for change in step.changes}, timeout=SCALE_SECONDS)


def _change_layer(course: Course, step: Step) -> dict[str, Any]:
    """Add or remove experts or a layer, or change a layer's policies, in one epoch."""
    layer, edit, comes = layer_of(step), edit_of(step), list(coming(step))
    options: dict[str, Any] = {"timeout": SCALE_SECONDS, "allow_unverified": course.allow_unverified}
    options["adopts"] = {change.key: change.after["digest"] for change in comes}
    if course.versions is not None:
        options["versions"] = {change.key: course.versions[change.key] for change in comes}
        for group in ("experts", "shared"):
            edit |= {group: {name: {**made, "weights": None} for name, made in edit.get(group, {}).items()}}
    elif has_gate(step):
        edit["gate"] = course.gates[f"{layer}/{GATE}"]
    return course.client.change_layers({layer: edit}, **options)


CALLS: Mapping[str, Callable[[Course, Step], object]] = {
    "swap": _swap,
    "scale": _scale,
    **dict.fromkeys(LAYER_STEPS, _change_layer),
}
"""The call that makes a step, by its kind."""
