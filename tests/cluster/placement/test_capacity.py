"""What no node can hold is said with the replica, what it asks for, and what is there."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import Expert, Layer, gates
from expertmesh.cluster.placement.capacity import needs, unplaceable
from expertmesh.cluster.placement.plan import PlannedReplica, plan_layer

SMALL = {"CPU": 2.0, "memory": 1e9, "node:10.0.0.1": 1.0}
ZONED = {"CPU": 2.0, "GPU": 1.0, "zone_x": 1.0}


def planned(*experts: Expert) -> tuple[PlannedReplica, ...]:
    named = {f"e{number}": expert for number, expert in enumerate(experts)}
    return plan_layer(Layer("l", gates.Fixed([1.0] * len(named)), named))


@pytest.mark.parametrize(
    ("expert", "said"),
    [
        (Expert("torch:sin", num_cpus=64), r"l/e0#0 asks for num_cpus=64, .* the most is num_cpus=2: lower num_cpus"),
        (Expert("torch:sin", num_gpus=0.5), r"l/e0#0 asks for num_gpus=0.5, .* num_gpus=0: to run it on CPU, leave"),
        (Expert("torch:sin", resources={"zone_y": 1}), r"zone_y=1, and no node has that: .* zone_y=0: start a node"),
        (
            Expert("torch:sin", num_cpus=1, replicas=5),
            "together the replicas ask for num_cpus=5, and all nodes have",
        ),
    ],
)
def test_the_replica_what_it_asks_for_and_what_is_there(expert: Expert, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        assert not unplaceable(planned(expert), [SMALL, {"CPU": 2.0}])


def test_things_that_are_there_on_different_nodes() -> None:
    both = planned(Expert("torch:sin", num_gpus=1, resources={"zone_z": 1}))
    assert "not on the same node" in unplaceable(both, [ZONED, {"zone_z": 1.0}])
    assert not unplaceable(both, [{**ZONED, "zone_z": 1.0}])


def test_a_single_process_reserves_nothing_and_has_no_gpu() -> None:
    assert not unplaceable(planned(Expert("torch:sin", num_cpus=64, resources={"zone_x": 1})), None)
    assert "num_gpus=1" in unplaceable(planned(Expert("torch:sin", num_gpus=1)), None)


AMOUNTS = st.dictionaries(st.sampled_from(["zone_a", "zone_b"]), st.integers(1, 3), max_size=2)


@given(AMOUNTS, st.lists(AMOUNTS, min_size=1, max_size=3), st.integers(0, 3))
def test_one_replica_is_placed_where_a_node_has_all_that_it_needs(
    asked: dict[str, int], nodes: list[dict[str, int]], cpus: int
) -> None:
    one = planned(Expert("torch:sin", num_cpus=cpus, resources={name: float(n) for name, n in asked.items()}))
    there = [{"CPU": 2.0, **{name: float(n) for name, n in node.items()}} for node in nodes]
    fits = any(all(node.get(name, 0.0) >= amount for name, amount in needs(one[0]).items()) for node in there)
    assert bool(unplaceable(one, there)) != fits


@given(st.integers(1, 8), st.integers(1, 8))
def test_all_replicas_fit_into_the_sum_of_the_nodes(replicas: int, nodes: int) -> None:
    together = planned(Expert("torch:sin", num_cpus=1, replicas=replicas))
    assert bool(unplaceable(together, [{"CPU": 1.0}] * nodes)) == (replicas > nodes)


def test_fractions_that_add_up_with_an_error_are_not_refused() -> None:
    assert math.fsum([0.1] * 10) == 1.0 != sum([0.1] * 10)
    assert not unplaceable(planned(*[Expert("torch:sin", num_cpus=0.1)] * 10), [{"CPU": 1.0}])
    assert not unplaceable(planned(*[Expert("torch:sin", num_cpus=0.7)] * 10), [{"CPU": 7.0}])
