"""The rows of the benchmark: how arms are planned, how verdicts follow from blocks, what is written, and a tiny run."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import benchmarks.__main__ as command
import pytest
from benchmarks.compare import Ratio, ratio
from benchmarks.peers import catalogue as peers
from benchmarks.peers.arm import ArmUnavailable
from benchmarks.peers.measure import Block
from benchmarks.rows import catalogue, facts, hivemind, live, live_skew, plots, report, run, session, stages
from benchmarks.rows.case import ADDED, P50, Comparison, Condition, Row, at_least, at_most
from benchmarks.rows.plan import MOST_PROCESSES, Party, groups, parties, party_of, processes, spare
from benchmarks.rows.session import Effort, Measured
from benchmarks.rows.verdict import Line, decided, figure, lines
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.cluster.runtime.ray_environment import load_backend

SMALL = Condition("S", "bf16", 32, 4)


def blocks(rate: float, p50: float = 0.001, count: int = 7) -> list[Block]:
    return [Block(rate, (p50,), 0.5, 0.01) for _ in range(count)]


@pytest.fixture(scope="module")
def tiny(nothing_left: None) -> run.Result:
    """The machinery of a whole run on the smallest layer, with the product's real actors."""
    load_backend(None)  # Ray is imported once in a test run, and clusters that come later want its authentication
    comparison = Comparison(SMALL, ("expertmesh",), ("in_process",), target=at_least(0.9))
    row = Row("C1", "rows", lambda quick: [comparison], stages=True)
    result = run.Result()
    run.measure([row], run.TINY, lambda text: None, quick=True, tiny=True, result=result)
    return result


@pytest.mark.ray
def test_a_tiny_run_measures_every_arm_and_decides_nothing(tiny: run.Result) -> None:
    (line,) = tiny.lines
    assert (line.row, line.ours, line.verdict) == ("C1", "expertmesh", "")
    assert line.value > 0
    assert line.baselines["in_process"] > 0
    assert line.ratio is not None
    assert set(line.cpu) == {"expertmesh", "in_process"}
    assert set(tiny.versions) == {"expertmesh", "in_process"}


@pytest.mark.ray
def test_the_stages_of_a_call_add_up(tiny: run.Result) -> None:
    (one,) = tiny.stages.values()
    assert all(one.stages[name] > 0 for name in stages.NAMES)
    assert abs(one.unexplained) < 0.25  # on the smallest layer, on any machine; 0.1 is wanted of real ones
    assert sum(one.parts.values()) < one.whole


@pytest.mark.ray
def test_a_result_is_shown_and_written(tiny: run.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = facts.facts(lambda: datetime(2030, 1, 1, tzinfo=timezone.utc))
    report.show(tiny.lines, tiny.stages, machine)
    shown = capsys.readouterr().out
    assert "2030-01-01" in shown
    assert "not explained" in shown
    report.write_json(tmp_path / "x.json", report.document(tiny.lines, tiny.stages, machine, blocks=tiny.blocks()))
    told = json.loads((tmp_path / "x.json").read_text())
    assert told["lines"][0]["row"] == "C1"
    assert told["machine"]["cores"] > 0
    assert {one["arm"] for one in told["blocks"]} == {"expertmesh", "in_process"}


def test_every_row_has_a_module_and_arms_that_exist() -> None:
    assert {*catalogue.DECLARED, *live.ROWS, "C7"} == set(catalogue.NAMES)
    for row in catalogue.DECLARED.values():
        for quick in (False, True):
            compared = run.comparisons_of(row, quick=quick, tiny=False)
            assert {arm for one in compared for arm in one.arms} <= peers.ARMS.keys()
            assert any(one.target for one in compared)


@pytest.mark.parametrize("quick", [False, True])
def test_every_comparison_has_a_party_and_few_processes_run(quick: bool) -> None:
    rows = catalogue.DECLARED.values()
    compared = [one for row in rows for one in run.comparisons_of(row, quick=quick, tiny=False)]
    planned = parties(compared)
    assert all(set(one.arms) <= set(party_of(one, planned).arms) for one in compared)
    assert all(party.processes <= MOST_PROCESSES for party in planned)
    layers = [(party.condition.shape, party.condition.dtype) for party in planned]
    assert sum(one != other for one, other in itertools.pairwise(layers)) == len(set(layers)) - 1
    together = groups(planned)
    assert [party for group in together for party in group] == planned
    for group in together:
        arms = {(arm, party.condition.shape) for party in group for arm in party.arms}
        assert sum(processes(*arm) for arm in arms) <= MOST_PROCESSES


def test_arms_that_are_not_needed_go_only_to_make_room() -> None:
    assert spare(["expertmesh", "ray_naive"], ["expertmesh", "gloo"], "S") == []
    assert spare(["expertmesh", "ray_naive"], ["expertmesh", "ray_good"], "S") == ["ray_naive"]
    assert processes("ray_naive", "L") == 8
    assert Party(SMALL, ("in_process", "expertmesh", "gloo")).processes == 18


@settings(deadline=None)  # thousands of draws each, on a machine that may be busy
@given(st.lists(st.integers(-20, 20).map(lambda n: 2.0 ** (n / 10)), min_size=4, max_size=12), st.floats(1.5, 3.0))
def test_rounds_that_disagree_make_the_interval_wider(values: list[float], apart: float) -> None:
    """The same blocks, seen as one round and as two of which the second is `apart` times the first."""
    ones = [1.0] * (2 * len(values))
    both = [*values, *(apart * value for value in values)]
    plain, known = ratio(both, ones), ratio(both, ones, rounds=[0] * len(values) + [1] * len(values))
    assert known.median == plain.median
    assert known.low <= median(values) * 1.0001
    assert known.high >= apart * median(values) * 0.9999
    assert ratio(values, [1.0] * len(values), rounds=[3] * len(values)) == ratio(values, [1.0] * len(values))


def test_the_better_placement_decides() -> None:
    one = Comparison(SMALL, ("expertmesh", "expertmesh_2"), ("in_process",), target=at_least(0.9))
    seen = {"expertmesh": blocks(80.0), "expertmesh_2": blocks(95.0), "in_process": blocks(100.0)}
    worse, better = lines("C1", one, seen, {})
    assert (worse.verdict, better.verdict) == ("see the other", "reached")
    assert better.ratio is not None
    assert better.ratio.median == pytest.approx(0.95)


def test_added_latency_is_what_is_above_the_limit() -> None:
    one = Comparison(SMALL, ("expertmesh",), ("ray_good", "ray_good_2"), ADDED, at_most(0.2))
    seen = {
        "in_process": blocks(1, 0.001), "expertmesh": blocks(1, 0.002),
        "ray_good": blocks(1, 0.021), "ray_good_2": blocks(1, 0.006),
    }  # fmt: skip
    (line,) = lines("C3", one, seen, {})
    assert line.ratio is not None
    assert line.ratio.median == pytest.approx(0.2)  # 1 ms against the 5 ms of the better of the two
    assert line.value == pytest.approx(2.0)


def test_the_best_of_the_others_is_the_one_to_beat() -> None:
    one = Comparison(SMALL, ("expertmesh_client",), ("ray_serve", "ray_serve_batched"), P50, at_most(1 / 3), limit="")
    seen = {"expertmesh_client": blocks(1, 0.001), "ray_serve": blocks(1, 0.009), "ray_serve_batched": blocks(1, 0.002)}
    (line,) = lines("C5", one, seen, {})
    assert line.verdict == "not reached"


def test_a_verdict_says_which_baseline_it_lacks() -> None:
    one = Comparison(SMALL, ("expertmesh",), ("ray_good", "ray_good_2"), target=at_least(4))
    seen = {"in_process": blocks(1), "expertmesh": blocks(9), "ray_good_2": blocks(1)}
    (line,) = lines("C4", one, seen, {"ray_good": "it died"})
    assert line.verdict == "reached, without ray_good"
    assert line.note == "skipped ray_good: it died"


def test_an_added_latency_is_said_in_milliseconds_too() -> None:
    one = Comparison(SMALL, ("expertmesh_2",), ("expertmesh_client_2",), ADDED, at_most(0.5))
    p50s = {"in_process": 0.001, "expertmesh_2": 0.0015, "expertmesh_client_2": 0.003}
    (line,) = lines("C12", one, {name: blocks(1.0, p50) for name, p50 in p50s.items()}, {})
    assert line.note == "adds 0.50 ms, expertmesh_client_2 2.00 ms"
    assert line.ratio is not None
    assert line.ratio.median == pytest.approx(0.25)
    assert line.verdict == "reached"


class Breaks:
    """An arm that answers until its third call."""

    name, version = "breaks", "1"

    def __init__(self) -> None:
        self.calls = 0

    async def call(self, x_TD: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise OSError("connection reset")
        return x_TD

    def close(self) -> None: ...


def test_an_arm_that_raises_is_left_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answers(Breaks):
        async def call(self, x_TD: Tensor) -> Tensor:
            await asyncio.sleep(0)
            return x_TD

    for arm in (Breaks, Answers):
        monkeypatch.setattr(arm, "echoes", True, raising=False)
    made = {"grpc_echo": Breaks(), "in_process": Answers()}
    monkeypatch.setattr(session.catalogue, "start", lambda name, *given: made[name])
    party = Party(replace(SMALL, shape="T", in_flight=1), tuple(made))
    with session.Session(Effort(3, 0.01), lambda text: None) as running:
        (found,) = running.run([party])
    assert {name: len(some) for name, some in found.blocks.items()} == {"in_process": 3}
    assert found.skipped == {"grpc_echo": "it raised connection reset"}


def test_an_arm_that_cannot_run_is_said_to_be_skipped() -> None:
    one = Comparison(SMALL, ("expertmesh",), ("ray_naive",), target=at_least(4))
    (line,) = lines("C4", one, {"expertmesh": blocks(1), "in_process": blocks(1)}, {"ray_naive": "no Ray here"})
    assert line.verdict == "skipped: ray_naive: no Ray here"
    assert line.value == 1.0


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio(0.95, 0.94, 0.96), "reached"),
        (Ratio(0.95, 0.85, 0.96), "reached (the interval holds the bound)"),
        (Ratio(0.89, 0.85, 0.92), "not reached (the interval holds the bound)"),
        (Ratio(0.80, 0.75, 0.82), "not reached"),
    ],
)
def test_a_verdict_says_whether_it_is_sure(ratio: Ratio, verdict: str) -> None:
    assert decided(ratio, at_least(0.9)) == verdict


def test_stages_and_what_they_leave_out_are_the_whole() -> None:
    trace = stages.Trace(1.0, (1.1, 1.3), 1.4, 2.4, 0.2, 0.3, (2.5, 2.7))
    found = trace.stages(3.0)
    assert found["channel"] == pytest.approx(0.5)
    assert stages.mean([(2.0, found, {})] * 10).unexplained == pytest.approx(0.1 / 2.0)


@given(st.integers(1, 30), st.integers(1, 4))
def test_rounds_share_the_blocks_and_the_first_has_most(count: int, rounds: int) -> None:
    effort = Effort(count, 1.0, rounds)
    parts = [effort.part(round_) for round_ in range(rounds)]
    assert sum(parts) == count
    assert parts == sorted(parts, reverse=True)
    assert parts[0] - parts[-1] <= 1


@given(st.floats(1, 2000), st.floats(0.01, 1), st.floats(100, 3000))
def test_a_second_round_is_as_long_as_the_limit_allows(took: float, share: float, limit: float) -> None:
    effort, timed = Effort(7, 0.6, 2, limit), share * took
    kept = effort.hurried(took, timed).seconds / effort.seconds
    assert 1 / 3 - 1e-9 <= kept <= 1
    second = took - timed * (1 - kept)
    if 2 * took <= limit:
        assert kept == 1
    elif kept > 1 / 3 + 1e-9:
        assert took + second == pytest.approx(limit)


def test_a_later_round_adds_its_blocks() -> None:
    party = Party(SMALL, ("a", "b"))
    first = Measured(party, {"a": blocks(1.0, count=4), "b": blocks(2.0, count=4)}, {})
    later = Measured(party, {"a": blocks(3.0, count=3)}, {"b": "it died"})
    joined = first.joined(later)
    assert [block.rows_per_second for block in joined.blocks["a"]] == [1.0] * 4 + [3.0] * 3
    assert "b" not in joined.blocks  # its blocks would have no counterpart
    assert joined.skipped == {"b": "it died"}


class FakeSession:
    """Notes what it is asked for; `seen` are the rows of the parties that take turns, and blocks, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], int]] = []
        self.versions: dict[str, str] = {}
        self.effort, self.timed = Effort(7, 1.0, 2), 0.0

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *error: object) -> None: ...

    def run(self, group: Sequence[Party], *, blocks: int, round_: int, staged: Collection[Condition]) -> list[Measured]:
        self.seen.append(([party.condition.rows for party in group], blocks))
        made = [Block(1.0, (0.1,), 0.5, 0.0, round=round_)] * blocks
        return [Measured(party, dict.fromkeys(party.arms, made), {}) for party in group]


def test_rounds_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(name: str, rows: int, *, theirs: str = "gloo") -> Row:
        made = Comparison(Condition("S", "bf16", rows, 4), ("expertmesh_2",), (theirs,), target=at_least(1))
        return Row(name, name, lambda quick: [made])

    session, result = FakeSession(), run.Result()
    monkeypatch.setattr(run, "Session", lambda effort, say: session)
    rows = [row("C1", 1), row("C2", 2), row("C3", 3, theirs="ray_naive"), row("C5", 4, theirs="ray_serve")]
    rows += [row("C6", 5, theirs="ray_good"), row("C11", 6, theirs="ray_serve_grpc")]
    run.measure(rows, Effort(7, 1.0, 2), lambda text: None, quick=False, tiny=False, result=result)
    assert session.seen == [([1, 2, 3, 4], 4), ([5, 6], 4), ([1, 2, 3, 4], 3), ([5, 6], 3)]
    assert [len(found.blocks["expertmesh_2"]) for found in result.measured] == [7] * 6
    assert [block.round for block in result.measured[0].blocks["gloo"]] == [0] * 4 + [1] * 3
    assert {line.verdict for line in result.lines} == {"reached"}
    assert session.effort.seconds == 1.0  # the first round took no time

    said: list[str] = []
    session.timed = 1000.0
    run.measure(rows, Effort(7, 1.0, 2, limit=-500.0), said.append, quick=False, tiny=False, result=result)
    assert session.effort.seconds == pytest.approx(0.5, abs=0.05)
    assert said == ["the machine is slow: blocks of 0.50 s in the second round"]


@pytest.fixture
def theirs() -> list[dict[str, float]]:
    return [{"p50": 0.006, "rows_per_second": 5000.0}] * 7


def test_hivemind_is_compared_with_the_same_thing(theirs: list[dict[str, float]]) -> None:
    large, single, layer = hivemind.PARTS
    assert hivemind.line("C7", large, {"ffn": blocks(11_000.0)}, theirs).verdict == "reached"
    alone = hivemind.line("C7", single, {"ffn": blocks(1.0, 0.003), "ffn_in_process": blocks(1.0, 0.001)}, theirs)
    assert alone.baselines == pytest.approx({"hivemind": 6.0, "ffn_in_process": 1.0})
    assert alone.ratio is not None
    assert alone.ratio.median == pytest.approx(2.0)
    assert hivemind.line("C7", layer, {}, theirs).verdict.startswith("skipped")


class FakeHivemind:
    """Notes what it is asked for, and ends after so many blocks."""

    def __init__(self, left: int = 99) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self._left = left

    def block(self, what: str, rows: int, in_flight: int, seconds: float) -> dict[str, float]:
        self.asked.append((what, rows, in_flight))
        if len(self.asked) > self._left:
            raise ArmUnavailable("it ended")
        return {"p50": 0.006, "rows_per_second": 5000.0}

    def close(self) -> None: ...


class TakingTurns(FakeSession):
    """Gives every arm the same blocks."""

    def run(self, group: Sequence[Party], *, between: Callable[[], None]) -> list[Measured]:  # type: ignore[override]
        for _ in range(7):
            between()
        return [Measured(party, {arm: blocks(11_000.0) for arm in party.arms}, {}) for party in group]


def test_hivemind_takes_turns_with_our_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    other = FakeHivemind()
    monkeypatch.setattr(hivemind, "Session", lambda effort, say: TakingTurns())
    monkeypatch.setattr("benchmarks.peers.hivemind.Hivemind", lambda: other)
    found = hivemind.measured("C7", run.FULL, lambda text: None)
    assert other.asked == [("expert", 512, 4), ("expert", 1, 1), ("layer", 512, 1)] * 7
    assert [line.baselines["hivemind"] for line in found] == [5000.0, pytest.approx(6.0), 5000.0]


@pytest.mark.parametrize("left", [0, 5])
def test_without_hivemind_its_row_is_skipped(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    monkeypatch.setattr(hivemind, "Session", lambda effort, say: TakingTurns())
    monkeypatch.setattr("benchmarks.peers.hivemind.Hivemind", lambda: FakeHivemind(left))
    found = hivemind.measured("C7", run.TINY, lambda text: None)
    assert {line.verdict for line in found} == {"skipped: it ended"}


def test_a_figure_is_held_against_its_bound() -> None:
    assert figure("C8", "gap", 120.0, at_most(100)).verdict == "not reached"
    assert figure("C8", "gap", 80.0, at_most(100)).verdict == "reached"
    assert figure("C8", "told", 80.0).verdict == ""


def test_skewed_rows_want_the_hot_expert() -> None:
    batches = live_skew.inputs([0.7, 0.1, 0.1, 0.1])
    wanted = sum(int((x[:, : live_skew.EXPERTS].argmax(axis=1) == 0).sum()) for x in batches)
    assert 0.65 < wanted / (len(batches) * live_skew.COUNT) < 0.8


def test_series_of_plots() -> None:
    measured = [
        {"shape": "L", "dtype": "bf16", "rows": rows, "in_flight": 4, "arm": arm, "blocks": [{"rows_per_second": rate}]}
        for rows, arm, rate in [(512, "expertmesh", 9.0), (512, "expertmesh_2", 8.0), (32, "expertmesh", 3.0)]
    ]
    assert plots.series(measured, "rows_per_second", 1.0)["L bf16, 4 in flight"]["expertmesh"] == [
        (32, 3.0),
        (512, 9.0),
    ]
    assert plots.over_actors(measured) == {"L bf16, 512 rows": [(2, 8.0), (8, 9.0)]}


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = {"seconds": [0.0, 1.0], "milliseconds": [2.0, None], "marks": [0.5], "marked": "kill"}
    (path,) = plots.draw(tmp_path / "new", [], {"C8": told})
    assert path.stat().st_size > 1000


def test_a_row_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["C99"])
    assert "there is no row C99" in capsys.readouterr().err


def test_a_row_on_its_own_cluster_comes_back_as_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line("C9", "p99", "expertmesh", 1.0, {"steady": 2.0}, Ratio(0.5, 0.4, 0.6), "<= 1.5", "reached")
    monkeypatch.setitem(live.ROWS, "C9", lambda quick: ([line], {}))
    monkeypatch.setattr(live.subprocess, "Popen", lambda *given, **options: Said(line))
    assert live.measured("C9", quick=True) == ([line], {})


def test_rounds_of_a_live_row_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"balanced": [10.0] * 4, "none": [5.0] * 4, "extra": [10.0] * 4}
    second = {"balanced": [10.0] * 4, "none": [5.0] * 4, "extra": [8.0] * 4}
    monkeypatch.setattr(live, "measured", lambda row, quick: ([], {"rates": second}))
    alone, timeline = live.skewed(quick=True, earlier=None)
    assert timeline == {}
    assert [line.ratio for line in alone] == [Ratio(0.8, 0.8, 0.8), Ratio(1.6, 1.6, 1.6)]
    (balanced, none), _ = live.skewed(quick=False, earlier=([], {"rates": first}))
    assert balanced.ratio == Ratio(0.9, 0.8, 1.0)  # the rounds disagree, and the interval spans both
    assert (none.ratio, none.value) == (Ratio(1.8, 1.6, 2.0), 9.0)
    failed = [Line("C10", "the whole row", "expertmesh", 0.0, verdict="failed: status 1")]
    assert live.skewed(quick=False, earlier=(failed, {})) == (failed, {})


class Said:
    """A process that has printed a line and ended well."""

    returncode = 0

    def __init__(self, line: Line) -> None:
        self._text = json.dumps({"lines": [live.asdict(line)], "timeline": {}})

    def communicate(self) -> tuple[str, str]:
        return self._text, ""

    def terminate(self) -> None: ...


@given(left_out=st.sets(st.sampled_from(["expertmesh", "expertmesh_2", "ray_good", "ray_good_2"])))
def test_a_comparison_without_arms_keeps_the_others_or_falls_away(left_out: set[str]) -> None:
    whole = Comparison(SMALL, ("expertmesh", "expertmesh_2"), ("ray_good", "ray_good_2"), target=at_least(1))
    left = whole.without(left_out)
    if left is None:
        assert set(whole.ours) <= left_out or set(whole.theirs) <= left_out
    else:
        assert set(left.arms) == set(whole.arms) - left_out
        assert left.target == whole.target


def test_what_the_processor_says_of_itself(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A: B\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n\nprocessor\t: 1\n")
    assert facts.cpu_model(info) == "A: B"
    assert facts.bf16_instructions(info) == "amx_bf16, avx512_bf16"
    info.write_text("flags\t\t: fpu avx2 avx512_bf16x\n")
    assert facts.bf16_instructions(info) == "none"
    assert facts.bf16_instructions(tmp_path / "absent") == "none"
    assert facts.cpu_model(tmp_path / "absent")
