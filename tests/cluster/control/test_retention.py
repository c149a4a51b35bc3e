"""What stays loaded and what may go: nothing that is pinned, recalled or current is ever surplus."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.control.retention import epochs_in_use, unneeded, wanted

IDS = ("l/a", "l/b", "l/gate")
EPOCHS = st.dictionaries(
    st.integers(1, 6), st.dictionaries(st.sampled_from(IDS), st.sampled_from(("v1", "v2", "v3"))), min_size=1
)
NUMBERS = st.lists(st.integers(0, 7), max_size=3)
PAIRS = st.frozensets(st.tuples(st.sampled_from(IDS), st.sampled_from(("v1", "v2", "v3"))))


@given(EPOCHS, NUMBERS, NUMBERS)
def test_the_epochs_in_use_are_the_pinned_the_recalled_and_all_that_followed(
    epochs: dict[int, dict[str, str]], pinned: list[int], recalled: list[int]
) -> None:
    current = max(epochs)
    found = epochs_in_use(epochs, current, pinned, recalled)
    floor = min([current, *pinned])
    assert found == [epochs[n] for n in epochs if n in recalled or n >= floor]
    assert epochs[current] in found


def test_without_pins_the_current_epoch_alone_is_in_use() -> None:
    epochs = {1: {"l/a": "v1"}, 2: {"l/a": "v2"}, 3: {"l/a": "v3"}}
    assert epochs_in_use(epochs, 3, []) == [{"l/a": "v3"}]
    assert epochs_in_use(epochs, 3, [3, 2]) == [{"l/a": "v2"}, {"l/a": "v3"}]
    assert epochs_in_use(epochs, 3, [3], {1}) == [{"l/a": "v1"}, {"l/a": "v3"}]


@given(st.sets(st.sampled_from(IDS)), EPOCHS)
def test_a_replica_has_to_hold_its_own_ids_in_every_epoch_in_use(
    ids: set[str], epochs: dict[int, dict[str, str]]
) -> None:
    needed = wanted(ids, epochs.values())
    assert {id for id, _ in needed} <= ids
    for versions in epochs.values():
        assert {(id, version) for id, version in versions.items() if id in ids} <= needed


@given(PAIRS, PAIRS, st.sets(st.sampled_from(IDS)))
def test_what_is_held_is_needed_or_staged_or_surplus(
    holds: frozenset[tuple[str, str]], needed: frozenset[tuple[str, str]], staging: set[str]
) -> None:
    surplus = unneeded(holds, needed, staging)
    assert surplus == sorted(set(surplus))
    assert set(surplus) == {(id, v) for id, v in holds - needed if id not in staging}
