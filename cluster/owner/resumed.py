"""What a start tells of the state that it found: which epoch goes on, and what of it is not as declared."""

from __future__ import annotations

from ...experts.names import is_layer_id
from ..control.ports import ControllerState

NOT_KEPT = "versions are kept until the cluster stops: give it a name or a state_dir to keep them for the next start"


def resumed(state: ControllerState) -> list[str]:
    """What a start says of a state folder that was there before, line by line; nothing of a new one."""
    lines = []
    if state.resumed:
        lines.append(f"resumed epoch {state.resumed} of its state_dir")
        told = {id for id in state.swapped if id in state.kept or is_layer_id(id)}
        swapped = {id: version for id, version in sorted(state.swapped.items()) if id not in told}
        lines += [f"{id} serves {version}, which was swapped in" for id, version in swapped.items()]
        lines += [f"{id} was replaced: its declaration was edited" for id in sorted(state.edited)]
    lines += [f"{id} is broken and does not serve: {why}" for id, why in sorted(state.broken.items())]
    lines += [
        f"{id} serves {version}, which was swapped in; redeclare {id} to serve its edited declaration"
        for id, version in sorted(state.kept.items())
    ]
    return lines
