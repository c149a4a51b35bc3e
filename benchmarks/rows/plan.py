"""Which arms run together: comparisons under one condition share their blocks, and few processes live at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.peers.model import SHAPES

from .case import Comparison, Condition

MOST_PROCESSES = 44
PER_EXPERT = (
    "expertmesh", "expertmesh_client", "ray_naive", "ray_good",
    "ray_serve", "ray_serve_optimised", "ray_serve_batched", "ray_serve_grpc",
)  # fmt: skip
NONE = ("in_process", "identity", "grpc_echo", "grpc_echo_stream")


@dataclass(frozen=True)
class Party:
    """Arms that are measured in turns under one condition."""

    condition: Condition
    arms: tuple[str, ...]

    @property
    def processes(self) -> int:
        """How many processes with an expert they have, about."""
        return sum(processes(arm, self.condition.shape) for arm in self.arms)


def processes(arm: str, shape: str) -> int:
    """How many processes with experts an arm has, about."""
    if arm in NONE:
        return 0
    number = arm.rpartition("_")[2]
    if number.isdecimal():
        return int(number)
    return SHAPES[shape].experts if arm in PER_EXPERT else 2


def parties(comparisons: Iterable[Comparison]) -> list[Party]:
    """The parties that hold all comparisons, in an order in which neighbours share arms.

    Comparisons under one condition that share an arm are measured together, so that its blocks serve both.
    """
    found: list[Party] = []
    for one in comparisons:
        for place, party in enumerate(found):
            joined = Party(one.condition, tuple(dict.fromkeys((*party.arms, *one.arms))))
            fits = joined.processes <= MOST_PROCESSES or joined.processes == party.processes
            if party.condition == one.condition and fits and set(party.arms) & set(one.arms):
                found[place] = joined
                break
        else:
            found.append(Party(one.condition, one.arms))
    return _in_order(found)


def _in_order(left: Sequence[Party]) -> list[Party]:
    """Layer by layer, and next always the party that needs the fewest processes beside those that run."""
    found: list[Party] = []
    waiting = sorted(left, key=_layer)
    while waiting:
        layer = _layer(waiting[0])
        running = {arm for party in found if _layer(party) == layer for arm in party.arms}
        nearest = min(
            (party for party in waiting if _layer(party) == layer),
            key=lambda party: sum(processes(arm, party.condition.shape) for arm in {*party.arms} - running),
        )
        waiting.remove(nearest)
        found.append(nearest)
    return found


def _layer(party: Party) -> tuple[str, str]:
    return party.condition.shape, party.condition.dtype


def groups(planned: Sequence[Party]) -> list[tuple[Party, ...]]:
    """Neighbours of one layer whose arms can all run at once: they take turns, so that the blocks of each are spread
    over the minutes that all of them take."""
    found: list[tuple[Party, ...]] = []
    for party in planned:
        last = found[-1] if found else ()
        arms = {arm for one in (*last, party) for arm in one.arms}
        room = sum(processes(arm, party.condition.shape) for arm in arms) <= MOST_PROCESSES
        if last and _layer(last[0]) == _layer(party) and room:
            found[-1] = (*last, party)
        else:
            found.append((party,))
    return found


def party_of(comparison: Comparison, found: Sequence[Party]) -> Party:
    """The party that measures a comparison."""
    return next(p for p in found if p.condition == comparison.condition and set(comparison.arms) <= set(p.arms))


def spare(running: Sequence[str], wanted: Collection[str], shape: str) -> list[str]:
    """The running arms that have to go before the wanted ones can start: none, while there is room."""
    total = sum(processes(arm, shape) for arm in {*running, *wanted})
    found = []
    for arm in running:
        if total > MOST_PROCESSES and arm not in wanted:
            total -= processes(arm, shape)
            found.append(arm)
    return found
