"""The registry against a model of dicts and lists, under any order of calls, restarts and takeovers."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from helpers.stored import E3, E4, GATE, record
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertmesh.cluster.state.records import EpochRecord, VersionRecord
from expertmesh.cluster.state.registry import Registry
from expertmesh.experts.errors import Aborted, DataLoss, FailedPrecondition, NotFound

IDS = (E3, E4, GATE)
Key = tuple[str, str]


@dataclass
class ModelSwap:
    """A swap as the model knows it; `before` is how many versions had been registered when it began."""

    plan: dict[str, str]
    before: int
    state: str = "open"
    made: EpochRecord | None = None


@dataclass
class Model:
    """What a registry should know."""

    versions: dict[Key, tuple[int, VersionRecord]] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    registered: int = 0
    epochs: list[EpochRecord] = field(default_factory=list)
    swaps: dict[str, ModelSwap] = field(default_factory=dict)
    declared: dict[str, str] = field(default_factory=dict)

    @property
    def current(self) -> dict[str, str]:
        return dict(self.epochs[-1].versions) if self.epochs else {}

    def refusal(self, swap_id: str, changes: dict[str, str], expect: dict[str, str | None]) -> type | None:
        """The error that a commit should raise, for a swap that has not committed yet."""
        if self.swaps[swap_id].state == "aborted":
            return Aborted
        if any(self.current.get(id) != version for id, version in expect.items()):
            return Aborted
        return None if changes.items() <= self.versions.keys() else NotFound

    def collect(self, retain: int, in_use: set[Key]) -> list[VersionRecord]:
        self.epochs = self.epochs[-(retain + 1) :]
        named = in_use | {key for epoch in self.epochs for key in epoch.versions.items()}
        for swap in self.swaps.values():
            if swap.state == "open":
                named |= {key for key in self.versions if key[1] in swap.plan.values()}
                named |= {key for key, (order, _) in self.versions.items() if order > swap.before}
        gone = sorted((order, key) for key, (order, _) in self.versions.items() if key not in named)
        return [self.versions.pop(key)[1] for _, key in gone]


class RegistryMachine(RuleBasedStateMachine):
    """Any sequence of calls; after each the registry says what the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.registry = Registry(self.path, clock=lambda: 1.5)
        self.cluster_id = self.registry.cluster_id
        self.terms = 1
        self.model = Model()

    @property
    def path(self) -> Path:
        return Path(self.folder.name) / "state"

    def pick(self, random: random.Random) -> VersionRecord:
        """One of the versions, or one that never was."""
        known = [made for _, made in self.model.versions.values()]
        return random.choice([*known, record(random.choice(IDS), 10_000)])

    @initialize()
    def first_epoch(self) -> None:
        for id in IDS:
            self.register(id)
        self.begin(random.Random(0))
        self.model_commit("s0", {id: record(id).version for id in IDS}, {}, {})

    @rule(id=st.sampled_from(IDS))
    def register(self, id: str) -> None:
        counter = self.registry.next_counter(id)
        assert counter == self.model.counters.get(id, 0) + 1
        made = record(id, counter)
        self.registry.add_version(made)
        self.model.counters[id] = counter
        self.model.registered += 1
        self.model.versions[id, made.version] = (self.model.registered, made)

    @rule(random=st.randoms(use_true_random=False), other=st.booleans())
    def register_again(self, random: random.Random, other: bool) -> None:
        made = self.pick(random)
        if (made.id, made.version) not in self.model.versions:
            return
        if not other:
            self.registry.add_version(made)
            return
        with pytest.raises(DataLoss):
            self.registry.add_version(replace(made, note="another"))

    @rule(random=st.randoms(use_true_random=False))
    def begin(self, random: random.Random) -> None:
        swap_id = f"s{len(self.model.swaps)}"
        plan = {E3: self.pick(random).version} if random.random() < 0.5 else {}
        self.registry.begin_swap(swap_id, plan)
        self.model.swaps[swap_id] = ModelSwap(plan, self.model.registered)

    @rule(random=st.randoms(use_true_random=False), other=st.booleans())
    def begin_again(self, random: random.Random, other: bool) -> None:
        swap_id, swap = random.choice(sorted(self.model.swaps.items(), key=lambda item: item[0]))
        if not other:
            assert self.registry.begin_swap(swap_id, swap.plan).state == swap.state
            return
        with pytest.raises(FailedPrecondition):
            self.registry.begin_swap(swap_id, {**swap.plan, "other": "plan"})

    @rule(random=st.randoms(use_true_random=False))
    def commit(self, random: random.Random) -> None:
        picked = [self.pick(random) for _ in range(random.randint(0, 2))]
        changes: dict[str, str] = {made.id: made.version for made in picked}
        expect: dict[str, str | None] = {id: self.model.current.get(id) for id in IDS if random.random() < 0.5}
        if random.random() < 0.2:
            expect[random.choice(IDS)] = random.choice([self.pick(random).version, None])
        declared = {id: random.choice(["aa", "bb"]) for id in IDS if random.random() < 0.3}
        self.model_commit(random.choice(sorted(self.model.swaps)), changes, expect, declared)

    def model_commit(
        self,
        swap_id: str,
        changes: dict[str, str],
        expect: dict[str, str | None],
        declared: dict[str, str],
    ) -> None:
        swap = self.model.swaps[swap_id]
        if swap.made is not None:
            self.commit_again(swap_id, swap.made, changes)
            return
        refusal = self.model.refusal(swap_id, changes, expect)
        if refusal is not None:
            with pytest.raises(refusal):
                self.registry.commit(swap_id, changes, expect=expect, declared=declared)
            return
        epoch = self.registry.commit(swap_id, changes, expect=expect, declared=declared)
        self.model.declared |= declared
        after = self.model.current | changes
        number = self.model.epochs[-1].number + 1 if self.model.epochs else 1
        assert epoch == EpochRecord(number=number, versions=after, created=1.5, swap_id=swap_id)
        self.model.epochs.append(epoch)
        swap.state, swap.made = "committed", epoch

    def commit_again(self, swap_id: str, made: EpochRecord, changes: dict[str, str]) -> None:
        same = all(made.versions.get(id) == version for id, version in changes.items())
        if same and made in self.model.epochs:
            again = self.registry.commit(swap_id, changes, expect={"news/e3": "whatever"}, declared={E3: "cc"})
            assert again == made
            return
        with pytest.raises(FailedPrecondition):
            self.registry.commit(swap_id, changes, expect={})

    @rule(random=st.randoms(use_true_random=False), state=st.sampled_from(["committed", "aborted"]))
    def end(self, random: random.Random, state: str) -> None:
        swap_id = random.choice(sorted(self.model.swaps))
        swap = self.model.swaps[swap_id]
        if swap.state == "open" and state == "aborted":
            swap.state = state
        if swap.state == state:
            self.registry.end_swap(swap_id, state)
            return
        with pytest.raises((Aborted, FailedPrecondition)):
            self.registry.end_swap(swap_id, state)

    @rule(random=st.randoms(use_true_random=False), retain=st.integers(0, 3))
    def collect(self, random: random.Random, retain: int) -> None:
        picked = [self.pick(random) for _ in range(random.randint(0, 2))]
        in_use = {(made.id, made.version) for made in picked}
        assert self.registry.collect(retain, in_use) == self.model.collect(retain, in_use)

    @rule()
    def restart(self) -> None:
        self.registry.close()
        self.registry = Registry(self.path, clock=lambda: 1.5)
        self.terms += 1

    @precondition(lambda self: bool(self.model.swaps))
    @rule(random=st.randoms(use_true_random=False))
    def take_over(self, random: random.Random) -> None:
        old, self.registry = self.registry, Registry(self.path, clock=lambda: 1.5)
        self.terms += 1
        with old, pytest.raises(Aborted, match="taken over the registry"):
            old.commit(random.choice(sorted(self.model.swaps)), {}, expect={})

    @invariant()
    def the_registry_says_what_the_model_says(self) -> None:
        assert self.registry.epochs() == self.model.epochs
        assert self.registry.current() == (self.model.epochs[-1] if self.model.epochs else None)
        assert self.registry.known() == set(self.model.versions)
        opened = {swap.swap_id for swap in self.registry.open_swaps()}
        assert opened == {swap_id for swap_id, swap in self.model.swaps.items() if swap.state == "open"}
        assert (self.registry.cluster_id, self.registry.term) == (self.cluster_id, self.terms)

    @invariant()
    def single_facts_agree_too(self) -> None:
        for id in IDS:
            ordered = sorted(made.counter for key, (_, made) in self.model.versions.items() if key[0] == id)
            assert [made.counter for made in self.registry.history(id)] == ordered
            assert self.registry.declared(id) == self.model.declared.get(id)
        kept = {epoch.number: epoch for epoch in self.model.epochs}
        newest = max(kept, default=0)
        for number in range(newest + 2):
            if number in kept:
                assert self.registry.epoch(number) == kept[number]
                continue
            with pytest.raises(FailedPrecondition if 0 < number < newest else NotFound):
                self.registry.epoch(number)

    def teardown(self) -> None:
        self.registry.close()
        self.folder.cleanup()


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
