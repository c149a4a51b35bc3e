"""The checker of the chaos experiments notices answers that are wrong, mixed or unknown, and passes the right ones."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.chaos.checker import MIXED, RIGHT, UNKNOWN, WRONG, Checker, Ledger
from benchmarks.chaos.exact import CLASSES, WIDTH, Maker, Shape, chosen, rows
from benchmarks.chaos.figures import behind, harm, judged, longest_gap, overlapped, p99_ms, went_back
from benchmarks.chaos.load import Load, SeenEpoch, share
from benchmarks.chaos.swaps import KINDS
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.experts.chaos import ChaosExpert
from expertmesh.router.gates import TopK

SHAPE = Shape(experts=4)
COUNT = 64


@dataclass
class Answered:
    """A reply as the checker sees it."""

    output: Any
    epoch: int
    versions: dict[str, str]
    degraded: bool = False


@dataclass
class World:
    """Two epochs, of which the second swaps two experts and the gate; the layer is computed by torch, not by numpy."""

    ledger: Ledger = field(default_factory=Ledger)
    maker: Maker = field(default_factory=lambda: Maker(SHAPE))

    def __post_init__(self) -> None:
        first = {id: self.maker.tensors(id) for id in SHAPE.ids}
        self.ledger.begin(1, dict.fromkeys(SHAPE.ids, "v1-a"), first)
        swapped = {id: self.maker.tensors(id) for id in (*SHAPE.expert_ids[:2], SHAPE.gate_id)}
        self.ledger.committed(2, dict.fromkeys(swapped, "v2-b"), swapped)

    def reply(self, x: Any, epoch: int, computed: dict[str, str] | None = None) -> Answered:
        """What a cluster answers that names an epoch, and computes with these versions instead where they are given."""
        named = self.ledger.epochs[epoch]
        output, used = forward(self.ledger, x, {**named, **(computed or {})})
        return Answered(output, epoch, {id: named[id] for id in (*used, SHAPE.gate_id)})


def forward(ledger: Ledger, x: Any, versions: dict[str, str]) -> tuple[Any, list[str]]:
    """The layer through the product's gate and experts."""
    gate = TopK(WIDTH, SHAPE.experts, k=2)
    gate.weight.data = torch.from_numpy(ledger.tensors[SHAPE.gate_id, versions[SHAPE.gate_id]]["weight"])
    routing = gate(torch.from_numpy(x))
    assert bool((routing.weights_TK == 0.5).all())  # exactly
    total = torch.zeros(len(x), WIDTH + SHAPE.experts)
    order = list(enumerate(SHAPE.expert_ids))
    random.shuffle(order)  # in any order
    for place, id in order:
        expert = ChaosExpert(WIDTH, SHAPE.experts, place)
        tensors = ledger.tensors[id, versions[id]]
        expert.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
        total += expert(torch.from_numpy(x)) * ((routing.indices_TK == place) * routing.weights_TK).sum(1, keepdim=True)
    used = sorted({SHAPE.expert_ids[place] for place in routing.indices_TK.flatten().tolist()})
    return total.detach().numpy(), used


def verdict(world: World, x: Any, reply: Answered) -> str:
    return Checker(SHAPE, world.ledger).judge(x, reply)


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("number", range(5))
def test_right_answers_pass(epoch: int, number: int) -> None:
    world, x = World(), rows(number, COUNT)
    assert verdict(world, x, world.reply(x, epoch)) == RIGHT


def test_answers_of_the_two_epochs_differ_in_every_row() -> None:
    world, x = World(), rows(0, COUNT)
    one, two = world.reply(x, 1).output, world.reply(x, 2).output
    assert bool((one != two).any(axis=1).mean() > 0.7)  # a swapped gate or expert shows in most rows


@pytest.mark.parametrize("id", [SHAPE.expert_ids[0], SHAPE.gate_id])
@pytest.mark.parametrize(("named", "computed"), [(1, "v2-b"), (2, "v1-a")])
def test_computed_with_another_version_than_it_names(id: str, named: int, computed: str) -> None:
    world, x = World(), rows(0, COUNT)
    assert verdict(world, x, world.reply(x, named, {id: computed})) == WRONG


def test_weights_of_another_expert_under_its_name() -> None:
    world, x = World(), rows(0, COUNT)
    reply = world.reply(x, 2)
    world.ledger.tensors[SHAPE.expert_ids[0], "v2-b"] = world.ledger.tensors[SHAPE.expert_ids[1], "v2-b"]
    assert verdict(world, x, reply) == WRONG


@pytest.mark.parametrize("row", [0, COUNT - 1])
def test_one_bit(row: int) -> None:
    world, x = World(), rows(0, COUNT)
    reply = world.reply(x, 1)
    reply.output[row, 3] = np.nextafter(reply.output[row, 3], np.float32(1e9))
    assert verdict(world, x, reply) == WRONG


def test_another_dtype_shape_order_or_a_degraded_answer() -> None:
    world, x = World(), rows(0, COUNT)
    reply = world.reply(x, 1)
    for output in (reply.output.astype(np.float64), reply.output[:-1], reply.output[::-1], reply.output * np.nan):
        assert verdict(world, x, replace(reply, output=output)) == WRONG
    assert verdict(world, x, replace(reply, degraded=True)) == WRONG


def test_versions_that_did_not_take_part_or_are_kept_back() -> None:
    world, x = World(), rows(0, 1)
    reply = world.reply(x, 1)
    others = dict.fromkeys(SHAPE.ids, "v1-a")
    assert verdict(world, x, replace(reply, versions=others)) == WRONG
    for id in reply.versions:
        fewer = {name: version for name, version in reply.versions.items() if name != id}
        assert verdict(world, x, replace(reply, versions=fewer)) == WRONG


@pytest.mark.parametrize("id", [SHAPE.expert_ids[0], SHAPE.gate_id])
@pytest.mark.parametrize("epoch", [1, 2])
def test_versions_of_two_epochs_in_one_reply_even_if_the_output_fits_them(id: str, epoch: int) -> None:
    world, x = World(), rows(0, COUNT)
    other = world.ledger.epochs[3 - epoch][id]
    reply = world.reply(x, epoch, {id: other})
    assert verdict(world, x, replace(reply, versions={**reply.versions, id: other})) == MIXED


def test_versions_and_epochs_that_nobody_acknowledged() -> None:
    world, x = World(), rows(0, COUNT)
    reply = world.reply(x, 1)
    assert verdict(world, x, replace(reply, epoch=3)) == UNKNOWN
    assert verdict(world, x, replace(reply, versions={**reply.versions, SHAPE.gate_id: "v9-c"})) == UNKNOWN


def test_the_ledger_refuses_acknowledgements_that_contradict_each_other() -> None:
    world, id = World(), SHAPE.expert_ids[0]
    with pytest.raises(ValueError, match="twice"):
        world.ledger.committed(2, {id: "v7-c"}, {})
    with pytest.raises(ValueError, match="two different files"):
        world.ledger.committed(3, {id: "v1-a"}, {id: world.maker.tensors(id)})
    world.ledger.committed(4, {id: "v1-a"}, {})  # a rollback names tensors that are known
    assert world.ledger.current[id] == "v1-a"
    assert world.ledger.current[SHAPE.gate_id] == "v2-b"


@pytest.mark.parametrize("seed", range(20))
def test_every_gate_picks_exactly_two_with_a_margin(seed: int) -> None:
    weight = Maker(Shape(8), seed).tensors("chaos/gate")["weight"]
    x = rows(seed, 200)
    assert set(chosen({"weight": weight}, x).sum(axis=1)) == {2}
    scores = np.sort(x @ weight.T, axis=1)
    assert bool((scores[:, -2] - scores[:, -3] >= 3).all())
    assert set(x[:, :CLASSES].sum(axis=1)) == {1.0}


def test_a_run_counts_every_request_and_what_was_harmed() -> None:
    world = World()
    inputs = [rows(number, 4) for number in range(3)]
    load = Load("nowhere:1", "chaos", rate=1.0, inputs=inputs)
    mixed = world.reply(inputs[1], 1)
    mixed.versions[SHAPE.gate_id] = "v2-b"
    replies = [world.reply(inputs[0], 1), mixed, world.reply(inputs[2], 2, {SHAPE.gate_id: "v1-a"})]
    load.seen = [SeenEpoch(n, n, n, n + 0.5, reply) for n, reply in enumerate(replies)]
    load.seen.append(SeenEpoch(3, 3.0, 3.0, 4.0, error="Unavailable: no"))
    found = judged(Checker(SHAPE, world.ledger), load)
    assert found == {"requests": 4, "right": 1, "failed": 1, "wrong": 1, "mixed": 1, "went back": 0}
    assert harm(found) == 3


def answered(number: int, sent: float, done: float, epoch: int) -> SeenEpoch:
    return SeenEpoch(number, sent, sent, done, Answered(None, epoch, {}))


def test_an_answer_that_is_older_than_one_seen_before_it_was_asked_for() -> None:
    seen = [answered(0, 0.0, 1.0, 2), answered(1, 0.5, 1.5, 1), answered(2, 1.2, 2.0, 1), answered(3, 1.2, 2.0, 2)]
    assert went_back(seen) == 1  # number 1 was asked for before 0 was answered, number 2 after
    assert behind(seen, []) == 0
    assert behind(seen, [(min(one.sent for one in seen) - 1, 10**6)]) == len(seen)  # acknowledged before all were sent


def test_overlaps_gaps_and_latency_from_when_a_request_was_due() -> None:
    seen = [answered(0, 0.0, 1.0, 1), answered(1, 2.0, 6.0, 2), SeenEpoch(2, 3.0, 3.0, 3.5, error="Overloaded")]
    assert overlapped(seen, [0.5]) == 1
    assert overlapped(seen, [1.5, 3.2]) == 1
    assert overlapped(seen, [0.5, 2.5, 3.0]) == 2  # a request counts once, however many flips it outlasts
    assert longest_gap(seen, 0.0, 8.0) == 5.0
    assert p99_ms([SeenEpoch(0, 1.0, 3.0, 4.0, Answered(None, 1, {}))]) == 3000.0
    assert p99_ms(seen) == float("inf")  # a failed request was never answered


def test_enough_sets_and_gates_are_swapped() -> None:
    assert KINDS.count("set") + KINDS.count("gate") >= 0.3 * len(KINDS)
    assert KINDS.count("gate") >= 0.1 * len(KINDS)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6), st.integers(0, 1000), st.integers(1, 1000))
def test_the_shares_of_a_request_in_windows_that_follow_each_other_are_all_of_it(
    cuts: list[int], sent: int, took: int
) -> None:
    one = SeenEpoch(0, sent, sent, sent + took)
    edges = sorted([-1, *cuts, 3000])
    shares = [share(one, begin, end) for begin, end in itertools.pairwise(edges)]
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) >= 0.0
    assert share(one, one.done, one.done + 1) == share(one, one.sent - 1, one.sent) == 0.0
