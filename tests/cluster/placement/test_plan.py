"""Which actors a layer needs: a copy of each expert or pack, each expert exactly as often as it asks for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.placement.plan import plan_layer
from expertmesh.experts.errors import ConfigError
from expertmesh.experts.spec import Expert
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer


def layer_of(experts: dict[str, Expert], shared: dict[str, Expert] | None = None) -> Layer:
    return Layer("l", gates.Fixed([1.0] * len(experts)), experts, shared=shared or {})


PACKS = {"p": 2, "q": 1, None: 3}


@given(packs=st.lists(st.sampled_from([*PACKS]), min_size=1, max_size=8), shared=st.integers(0, 2))
def test_every_expert_runs_as_often_as_it_asks_for(packs: list[str | None], shared: int) -> None:
    experts = {f"e{n}": Expert("torch:sin", replicas=PACKS[pack], pack=pack) for n, pack in enumerate(packs)}
    always = {f"s{n}": Expert("torch:cos") for n in range(shared)}
    layer = layer_of(experts, always)
    planned = plan_layer(layer)
    assert len({replica.id for replica in planned}) == len(planned)
    counted = Counter(expert_id for replica in planned for expert_id in replica.expert_ids)
    assert counted == {expert_id: expert.replicas for expert_id, expert in layer.everyone_by_id.items()}
    for replica in planned:
        group, _, copy = replica.id.rpartition("#")
        assert copy.isdigit()
        for expert_id, expert in replica.experts.items():
            assert expert is layer.everyone_by_id[expert_id]
            assert group == f"l/{expert.pack or expert_id.partition('/')[2]}"
            assert replica.placement.placement() == expert.placement()


def test_a_pack_agrees_on_its_place() -> None:
    experts = {"a": Expert("torch:sin", pack="p"), "b": Expert("torch:cos", pack="p", num_cpus=2)}
    with pytest.raises(ConfigError, match="l/p: experts of one pack share an actor"):
        plan_layer(layer_of(experts))


def test_a_pack_has_a_name_of_its_own() -> None:
    experts = {"a": Expert("torch:sin", pack="b"), "b": Expert("torch:cos")}
    with pytest.raises(ConfigError, match="layer l: pack 'b' has the name of an expert"):
        plan_layer(layer_of(experts))
