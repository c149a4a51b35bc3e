"""The steps of a plan as calls to a running cluster: all that it can make, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ....experts.errors import FailedPrecondition
from ...client.client import Client
from ...placement.change_plan import Step

CALLS: Mapping[str, Callable[[Client, Step], object]] = {}
"""The call that makes a step, by its kind. What is made already may be asked for again."""


def check_possible(steps: Sequence[Step]) -> None:
    """Raise FailedPrecondition where a running cluster cannot make all of these steps."""
    lacking = [f"{step.kind} {step.subject}" for step in steps if step.kind not in CALLS]
    if lacking:
        raise FailedPrecondition(
            f"nothing was changed: a running cluster cannot {', '.join(lacking)} yet; restart it with the file instead"
        )


def carry_out(client: Client, steps: Sequence[Step], progress: Callable[[str], object]) -> None:
    """Make steps one after another; `progress` is told of each that was made."""
    for number, step in enumerate(steps, start=1):
        CALLS[step.kind](client, step)
        progress(f"{number}/{len(steps)} {step.kind} {step.subject}: done")
