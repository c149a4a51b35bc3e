"""How a session of training is used, and what its steps tell."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from ....experts.errors import ExpertMeshError, InvalidRequest
from ....experts.wire import WireTensor
from .schedule import Schedule

POLICIES = ("error", "leave_out")
PATIENCE = {"error": 60.0, "leave_out": 1.0}
"""Seconds that an expert is waited for, by policy."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a session trains; `Client.train` says what each means."""

    lr: float
    schedule: Schedule
    clip_norm: float | None = None
    accumulate: int = 1
    durable_every: int | None = 100
    on_missing: str = "error"
    patience: float | None = None
    replay_bytes: int = 256 * 2**20
    seed: int | None = None

    @property
    def seconds(self) -> float:
        """How long an expert that does not answer is waited for."""
        return PATIENCE[self.on_missing] if self.patience is None else self.patience

    def __post_init__(self) -> None:
        if self.on_missing not in POLICIES:
            raise InvalidRequest(f"on_missing must be one of {', '.join(POLICIES)}, not {self.on_missing!r}")
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise InvalidRequest(f"accumulate must be a whole number of 1 or more, not {self.accumulate!r}")
        if self.durable_every is not None and (type(self.durable_every) is not int or self.durable_every < 1):
            raise InvalidRequest(
                f"durable_every must be a whole number of 1 or more, or None, not {self.durable_every!r}"
            )
        for name, value in (("lr", self.lr), ("clip_norm", self.clip_norm), ("patience", self.patience)):
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise InvalidRequest(f"{name} must be a number of 0 or more, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did: `applied` is False while gradients are accumulated.

    `step` is the number of steps that are applied, `durable` of those that survive the loss of every process. `norm` is
    that of the gradients of all experts before clipping. `updated` are the experts that learned, `left_out` those that
    did not answer, with the reason: an update that they missed is made up for, a backward pass is not.
    """

    step: int
    durable: int
    applied: bool
    lr: float
    norm: float
    updated: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Passed:
    """The answer to a pass: its tensors by name, and the errors of experts that were left out, by id."""

    tensors: Mapping[str, WireTensor]
    left_out: Mapping[str, ExpertMeshError]


def checked_rate(lr: float) -> float:
    """A learning rate. Raises InvalidRequest for one that is negative or not finite."""
    if not isinstance(lr, (int, float)) or not 0 <= lr < math.inf:
        raise InvalidRequest(f"the learning rate must be a finite number of 0 or more, not {lr!r}")
    return float(lr)


def holder() -> str:
    """Who opens a session, for people: process and machine."""
    return f"process {os.getpid()} on {socket.gethostname()}"
