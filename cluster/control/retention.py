"""Which versions a replica has to hold, and which it may forget: pure decisions over epochs, pins and candidates."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

Versions = Mapping[str, str]


def epochs_in_use(
    epochs: Mapping[int, Versions], current: int, oldest_pinned: Iterable[int], recalled: Collection[int] = ()
) -> list[Versions]:
    """The epochs whose versions must stay loaded: the current one, all from the oldest that a router pins on, and those
    that were recalled by number.

    `oldest_pinned` has one entry for every router that is not given up.
    """
    floor = min([current, *oldest_pinned])
    return [versions for number, versions in epochs.items() if number >= floor or number in recalled]


def wanted(ids: Collection[str], in_use: Iterable[Versions]) -> frozenset[tuple[str, str]]:
    """What a replica for these ids has to hold, as (id, version)."""
    return frozenset((id, versions[id]) for versions in in_use for id in ids if id in versions)


def unneeded(
    holds: Collection[tuple[str, str]], needed: Collection[tuple[str, str]], staging: Collection[str]
) -> list[tuple[str, str]]:
    """What a replica may unload: all that it holds and does not need; of ids that a swap stages nothing is touched."""
    return sorted(held for held in holds if held not in needed and held[0] not in staging)
