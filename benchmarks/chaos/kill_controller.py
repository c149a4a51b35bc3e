"""The controller dies in the middle of swaps: one committed set, nothing acknowledged is lost, never a third state."""

from __future__ import annotations

import random
import time
from typing import Any

from expertmesh import errors

from .checker import RIGHT
from .exact import rows
from .figures import harm, quantile, say, say_judged
from .mesh import Mesh, processes, wait_until
from .signals import AFTER_COMMIT, RETIRING, STEPS, crash_file
from .swaps import Made, Swapper, make_swap

CONVERGED_SECONDS = 10.0
ANSWER_SECONDS = 60.0


def crash_points(mesh: Mesh, rate: float, count: int) -> list[str]:
    """The controller dies at every step of a swap, under load."""
    swapper, draw, problems = Swapper(mesh), random.Random(1), []
    with mesh.load(rate=rate / 2, count=count) as load:
        for step in STEPS:
            problems += _crash_at(swapper, make_swap(mesh, "gate", draw), step)
    found = say_judged(mesh.checker(), load)
    return problems + ([f"{harm(found)} requests failed or were wrong"] if harm(found) else [])


def _crash_at(swapper: Swapper, made: Made, step: str) -> list[str]:
    """Die at one step, while a client leases the epoch before it; what is leased cannot be retired."""
    _at_rest(swapper.mesh)
    if step == RETIRING:
        return _died_at(swapper, made, step)
    with swapper.mesh.client.pin(ttl=60.0) as lease:
        return [*_died_at(swapper, made, step), *_still_leased(swapper.mesh, lease, step)]


def _still_leased(mesh: Mesh, lease: Any, step: str) -> list[str]:
    """Whether the epoch of a lease is still answered, whatever was committed and restarted since."""
    x = rows(200_000, 16)
    try:
        reply = mesh.client.call(mesh.shape.layer, x, pin=lease)
    except errors.ExpertMeshError as error:
        return [f"killed {step}: the leased epoch {lease.epoch} is not answered: {error}"]
    verdict = mesh.checker().judge(x, reply)
    kept = verdict == RIGHT and reply.epoch == lease.epoch
    return [] if kept else [f"killed {step}: leased was epoch {lease.epoch}, the answer is {verdict} of {reply.epoch}"]


def _died_at(swapper: Swapper, made: Made, step: str) -> list[str]:
    mesh = swapper.mesh
    before = mesh.ledger.current
    file = crash_file(mesh.settings["state_dir"])
    file.write_text(step)
    asked = swapper.begin(made, ANSWER_SECONDS)
    try:
        wait_until(lambda: not file.exists(), 30.0, f"the controller dies {step}", pause=0.001)
    except TimeoutError as error:
        file.unlink(missing_ok=True)
        return [f"{error}; the swap: {asked.result()}"]
    died = time.monotonic()
    converged = _converged(mesh, before, made, died)
    outcome = asked.result()
    after = mesh.state()["versions"]
    changed = {id for id in after if after[id] != before[id]}
    state = "after" if changed == set(made.paths) else "before" if not changed else "a third state"
    say(step, f"{converged:.1f} s", f"set: {state}, answer: {outcome}")
    problems = []
    if state == "a third state" or after != mesh.ledger.current:
        problems.append(f"killed {step}: the cluster is at {after}, acknowledged was {mesh.ledger.current}")
    if (outcome, state) not in (("committed", "after"), ("aborted", "before")):
        problems.append(f"killed {step}: the swap's answer is {outcome}, the cluster is at the set {state}")
    if step in AFTER_COMMIT and state != "after":
        problems.append(f"killed {step}: a committed swap is gone")
    if converged > CONVERGED_SECONDS:
        problems.append(f"killed {step}: it took {converged:.1f} s to converge")
    return problems


def _converged(mesh: Mesh, before: dict[str, str], made: Made, died: float) -> float:
    """Seconds until a new controller serves, and it and the router tell the same epoch: the old set or the new one."""

    def there() -> bool:
        state, router = mesh.cluster.status(), mesh.client.status()
        changed = {id for id in before if state["versions"].get(id) != before[id]}
        heard = router["controller"]["heard_seconds_ago"]
        fresh = heard is not None and heard < time.monotonic() - died
        return fresh and router["epoch"] == state["epoch"] and changed in (set(), set(made.paths))

    wait_until(there, 60.0, "one committed set is served")
    return time.monotonic() - died


def acknowledged_swaps(mesh: Mesh, kills: int) -> list[str]:
    """SIGKILL from outside at a random moment of a swap, again and again; what was acknowledged has to be there."""
    swapper, draw = Swapper(mesh), random.Random(2)
    for _ in range(5):
        swapper.swap(make_swap(mesh, "set", draw))
    usual = quantile(swapper.seconds, 0.5)
    outcomes, lost, problems, back = {"committed": 0, "aborted": 0}, 0, [], []
    for _ in range(kills):
        _at_rest(mesh)
        asked = swapper.begin(make_swap(mesh, draw.choice(("one", "set", "gate")), draw), ANSWER_SECONDS)
        time.sleep(draw.uniform(0.0, 1.2 * usual))
        processes("CrashingControllerActor")[0].kill()
        died = time.monotonic()
        outcome = asked.result()
        versions = mesh.state()["versions"]
        back.append(time.monotonic() - died)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        lost += sum(versions.get(id) != version for id, version in mesh.ledger.current.items())
    answers = ", ".join(f"{number} {name}" for name, number in outcomes.items())
    say("controller killed while committing", kills, answers)
    say("seconds until it answers again, most", max(back, default=0.0))
    say("acknowledged versions lost", lost, "0 wanted")
    if set(outcomes) != {"committed", "aborted"}:
        problems.append(f"a swap ended as neither committed nor aborted: {answers}")
    return problems + ([f"{lost} acknowledged versions were lost"] if lost else [])


def cold_restart(mesh: Mesh, count: int) -> list[str]:
    """Stop everything and start it again: the same versions and the same bits."""
    inputs = [rows(100_000 + number, count) for number in range(50)]
    _at_rest(mesh)
    before = mesh.state()
    answers = [mesh.client.forward(mesh.shape.layer, x) for x in inputs]
    started = time.monotonic()
    mesh.stop()
    mesh.start()
    seconds = time.monotonic() - started
    after, again = mesh.state(), [mesh.client.forward(mesh.shape.layer, x) for x in inputs]
    same = sum(one.tobytes() == other.tobytes() for one, other in zip(answers, again, strict=True))
    say("full stop and start, s", seconds)
    kept = sum(after["versions"][id] == version for id, version in before["versions"].items())
    say("versions that are the same", kept, f"{len(before['versions'])} wanted")
    epochs = f"epoch {before['epoch']} before, {after['epoch']} after"
    say("answers with the same bits", same, f"{len(inputs)} wanted; {epochs}")
    return (
        []
        if after["versions"] == before["versions"] and same == len(inputs)
        else ["a full stop and start changed versions or answers"]
    )


def _at_rest(mesh: Mesh) -> None:
    """Wait until a controller serves and the router has heard of it lately, with no older epoch pinned."""

    def rested() -> bool:
        state, router = mesh.cluster.status(), mesh.client.status()
        ready = all(replica["state"] == "ready" for replica in state["replicas"].values())
        heard = router["controller"]["heard_seconds_ago"]
        return ready and heard is not None and heard < 1.0 and router["epoch"] == state["epoch"]

    wait_until(rested, 60.0, "the controller is at rest")
