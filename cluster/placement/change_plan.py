"""From what runs to what is wanted: the steps of a change in a safe order, each of which can be undone."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...experts.errors import Aborted, DataLoss

Document = Mapping[str, Mapping[str, Any]]
"""What is declared, as plain JSON values by section and key. No value is None: what is not there has no key."""

SECTIONS = ("settings", "layers", "policies", "gates", "experts", "places", "replicas", "autoscale")
"""The sections of a document.

`settings` are those of the cluster. By layer, `layers` name its `experts`, in the order of the gate, its `shared` ones
and its `input`, and `policies` say how answers are combined. By id, `gates` and `experts` say what computes, and their
`digest` tells it from anything else; `places` say where an expert runs, with its `group` ("news/e3", or its pack).
`replicas` and `autoscale` are by group.
"""

ORDER = (
    "add_layer", "add_expert", "swap", "change_experts", "set", "autoscale", "scale", "remove_expert", "remove_layer",
)  # fmt: skip
"""The kinds of steps: what is added comes before what may use it, and what is removed after its last use."""

RESTART, NOTHING = "restart", ""
_LISTS = ("experts", "shared")
_OPPOSITES = {
    "add_layer": "remove_layer", "remove_layer": "add_layer",
    "add_expert": "remove_expert", "remove_expert": "add_expert",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """The change of one key of a section; None is what is not there."""

    section: str
    key: str
    before: Any
    after: Any

    def undone(self) -> Change:
        """The change back."""
        return Change(self.section, self.key, self.after, self.before)


@dataclass(frozen=True)
class Step:
    """Changes that are made together, or not at all.

    `kind` is one of ORDER: experts are added to a layer, removed from it, or both ("change_experts"), with its gate;
    "swap" replaces what experts and gates compute, of all layers at once; "set" changes a setting, or the policies of a
    layer. `subject` is the layer, group or setting.
    """

    kind: str
    subject: str
    changes: tuple[Change, ...]

    def undone(self) -> Step:
        """The step back."""
        kind = _OPPOSITES.get(self.kind, self.kind)
        return Step(kind, self.subject, tuple(change.undone() for change in self.changes))

    def is_done(self, document: Document) -> bool:
        """Whether a document has all that the step brings."""
        return all(_same(document[change.section].get(change.key), change.after) for change in self.changes)

    def carried_out(self, document: Document) -> Document:
        """The document after this step; the same where it was done before.

        Raises Aborted where something is neither as it was when the plan was made, nor as it is to be.
        """
        after = {section: dict(document[section]) for section in SECTIONS}
        for change in self.changes:
            found = after[change.section].pop(change.key, None)
            if not (_same(found, change.before) or _same(found, change.after)):
                what = f"{change.key} ({change.section}) has changed since the plan was made"
                raise Aborted(f"{self.kind} {self.subject}: {what}: plan again")
            if change.after is not None:
                after[change.section][change.key] = change.after
        return after


@dataclass(frozen=True)
class Plan:
    """The steps of a change, in order, and the changes that only a restart brings."""

    steps: tuple[Step, ...] = ()
    restarts: tuple[Change, ...] = ()

    @property
    def digest(self) -> str:
        """The sha256 of the steps, in hexadecimal."""
        text = json.dumps([asdict(step) for step in self.steps], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def undone(self) -> Plan:
        """The plan back: the opposite steps in the opposite order. What a restart brought stays."""
        return Plan(tuple(step.undone() for step in reversed(self.steps)))

    def carried_out(self, document: Document) -> Document:
        """The document after all steps. Raises Aborted as `Step.carried_out`."""
        for step in self.steps:
            document = step.carried_out(document)
        return document

    def remaining(self, document: Document) -> tuple[Step, ...]:
        """The steps that a document lacks, in order. Raises Aborted as `Step.carried_out`."""
        left = tuple(step for step in self.steps if not step.is_done(document))
        self.carried_out(document)
        return left

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {"digest": self.digest, **asdict(self)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Plan:
        """Read what `to_json` made. Raises DataLoss for anything else."""
        try:
            steps = (Step(step["kind"], step["subject"], _changes(step["changes"])) for step in plain["steps"])
            plan = cls(tuple(steps), _changes(plain["restarts"]))
            if plan.digest == plain["digest"]:
                return plan
        except (KeyError, TypeError):
            pass
        raise DataLoss("the plan cannot be read, or is not the one that its digest names")


def plan_changes(runs: Document, wanted: Document, *, live: Collection[str] = ()) -> Plan:
    """The plan from what runs to what is wanted. `live` are the settings that can be changed without a restart.

    A group that is to be scaled by its load keeps the number of replicas that it has.
    """
    steps: defaultdict[tuple[int, str], list[Change]] = defaultdict(list)
    restarts: list[Change] = []
    sorter = _Sorter(runs, wanted, live)
    for change in _differences(runs, wanted):
        kind, subject = sorter.step_of(change)
        if kind == RESTART:
            restarts.append(change)
        elif kind != NOTHING:
            steps[ORDER.index(kind), subject].append(change)
    ordered = (_step(ORDER[place], subject, steps[place, subject]) for place, subject in sorted(steps))
    return Plan(tuple(ordered), tuple(restarts))


def _step(kind: str, subject: str, changes: Sequence[Change]) -> Step:
    layers = dict.fromkeys(change.key.partition("/")[0] for change in changes)
    return Step(kind, subject or ", ".join(sorted(layers)), tuple(changes))


def resumed(begun: Plan | None, runs: Document, wanted: Document, *, live: Collection[str] = ()) -> Plan:
    """The plan that was begun, where it still leads from what runs to what is wanted; else a new one."""
    plan = plan_changes(runs, wanted, live=live)
    if begun is None or not plan.steps:
        return plan
    try:
        leads_there = not plan_changes(begun.carried_out(runs), wanted, live=live).steps
    except Aborted:
        return plan
    return Plan(begun.steps, plan.restarts) if leads_there else plan


class _Sorter:
    """Says of each difference which step brings it."""

    def __init__(self, runs: Document, wanted: Document, live: Collection[str]) -> None:
        self._wanted = wanted
        self._live = live
        self._layers = {name: _layer_kind(runs, wanted, name) for name in {*runs["layers"], *wanted["layers"]}}
        both = runs["places"].keys() & wanted["places"].keys()
        self._moved = {id for id in both if runs["places"][id] != wanted["places"][id]}
        self._moved |= {side["places"][id]["group"] for id in self._moved for side in (runs, wanted)}
        self._stay = runs["replicas"].keys() & wanted["replicas"].keys()

    def step_of(self, change: Change) -> tuple[str, str]:
        """Kind and subject of the step that brings a change."""
        if change.section == "settings":
            return "set" if change.key in self._live else RESTART, change.key
        layer = change.key.partition("/")[0]
        kind = self._layers[layer]
        if kind in ("add_layer", "remove_layer", RESTART):
            return kind, layer
        if change.section in ("replicas", "autoscale"):
            return self._of_group(change, layer, kind)
        if change.section == "places" and change.key in self._moved:
            return RESTART, change.key
        if change.section == "policies":
            return kind if kind == "change_experts" else "set", layer
        if change.section == "experts" and _edited(change.before, change.after):
            return RESTART, change.key
        comes_or_goes = change.section in ("layers", "gates") or None in (change.before, change.after)
        return (kind, layer) if kind != NOTHING and comes_or_goes else ("swap", "")

    def _of_group(self, change: Change, layer: str, kind: str) -> tuple[str, str]:
        if change.key in self._moved:
            return RESTART, change.key
        if change.key not in self._stay:
            return kind, layer
        if change.section == "replicas" and change.key in self._wanted["autoscale"]:
            return NOTHING, change.key
        return {"replicas": "scale"}.get(change.section, change.section), change.key


def _layer_kind(runs: Document, wanted: Document, name: str) -> str:
    """What becomes of a layer and its list of experts. Those that stay must keep their order, which is the gate's."""
    before, after = runs["layers"].get(name), wanted["layers"].get(name)
    if before is None or after is None:
        return "add_layer" if before is None else "remove_layer"
    if before["input"] != after["input"] or any(_reordered(before[key], after[key]) for key in _LISTS):
        return RESTART
    comes = any(set(after[key]) - set(before[key]) for key in _LISTS)
    goes = any(set(before[key]) - set(after[key]) for key in _LISTS)
    return {(True, True): "change_experts", (True, False): "add_expert", (False, True): "remove_expert"}.get(
        (comes, goes), NOTHING
    )


def _reordered(before: Sequence[str], after: Sequence[str]) -> bool:
    return [name for name in before if name in after] != [name for name in after if name in before]


def _differences(runs: Document, wanted: Document) -> Iterator[Change]:
    for section in SECTIONS:
        for key in sorted({*runs[section], *wanted[section]}):
            before, after = runs[section].get(key), wanted[section].get(key)
            if not _same(before, after):
                yield Change(section, key, before, after)


def _edited(before: Any, after: Any) -> bool:
    """Whether the code of a factory is another than before: processes that have imported it keep what it was."""
    if before is None or after is None:
        return False
    return bool(before.get("factory") == after.get("factory") and before.get("code") != after.get("code"))


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same; two declarations also where the files of their weights stand elsewhere."""
    digests = [value.get("digest") if isinstance(value, dict) else None for value in (one, other)]
    return bool(one == other or (digests[0] is not None and digests[0] == digests[1]))


def _changes(plain: Iterable[Mapping[str, Any]]) -> tuple[Change, ...]:
    return tuple(Change(**change) for change in plain)
