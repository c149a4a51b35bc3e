"""What a start tells of the state that it found."""

from __future__ import annotations

from expertmesh.cluster.control.ports import ControllerState
from expertmesh.cluster.owner.resumed import resumed

STATE = {"revision": 1, "epoch": 4, "versions": {}, "replicas": ()}


def test_a_new_state_has_nothing_to_tell() -> None:
    assert resumed(ControllerState(**STATE, kept={}, broken={})) == []  # type: ignore[arg-type]


def test_every_difference_has_a_line() -> None:
    state = ControllerState(
        **STATE,  # type: ignore[arg-type]
        resumed=3,
        swapped={"l/b": "v2-b", "l/a": "v2-a"},
        kept={"l/b": "v2-b"},
        edited=("l/c",),
        broken={"l/d": "its weights differ from those stored"},
    )
    assert resumed(state) == [
        "resumed epoch 3 of its state_dir",
        "l/a serves v2-a, which was swapped in",
        "l/c was replaced: its declaration was edited",
        "l/d is broken and does not serve: its weights differ from those stored",
        "l/b serves v2-b, which was swapped in; redeclare l/b to serve its edited declaration",
    ]
