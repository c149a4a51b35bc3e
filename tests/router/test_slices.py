"""A pass in slices: every pair is in one slice of its part, and a part is what its worst slice is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.training.passes import folded, slices_of

EXPERTS = ("a", "b", "c")
sizes = st.lists(st.integers(1, 9), min_size=3, max_size=3)
counts = st.lists(st.integers(1, 4), min_size=3, max_size=3)


@given(sizes, counts)
def test_every_pair_is_in_one_slice_of_its_part(sizes: list[int], counts: list[int]) -> None:
    parts, start = [], 0
    for expert, size in zip(EXPERTS, sizes, strict=True):
        parts.append((expert, "v", start, start + size, 7))
        start += size
    by_expert = dict(zip(EXPERTS, counts, strict=True))
    slices, owners = slices_of(parts, by_expert)
    for at, (expert, version, first, last, _) in enumerate(parts):
        own = [piece for piece, owner in zip(slices, owners, strict=True) if owner == at]
        assert [pair for _, _, a, b, _ in own for pair in range(a, b)] == list(range(first, last))
        assert [number for *_, number in own] == list(range(min(by_expert[expert], last - first)))
        assert {piece[:2] for piece in own} == {(expert, version)}
        lengths = [b - a for _, _, a, b, _ in own]
        assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1))
def test_a_part_is_well_if_all_its_slices_are(slices: list[tuple[int, bool]]) -> None:
    outcomes = {at: {"ok": True} if well else {"error": "Unavailable"} for at, (_, well) in enumerate(slices)}
    found = folded(outcomes, [owner for owner, _ in slices])
    assert {owner: "ok" in outcome for owner, outcome in found.items()} == {
        owner: all(well for other, well in slices if other == owner) for owner, _ in slices
    }
