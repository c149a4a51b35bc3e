"""The declaration of a layer: name, gate, experts, how their answers are combined, what happens if one is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NoReturn

from ...experts.errors import ConfigError, InvalidRequest
from ...experts.names import GATE, LAYER, is_name
from ...experts.spec import ANY, Expert, TensorSpec, check_expert
from ..gates import Gate
from .capacity import Capacity
from .combine import METHODS, ON_DROPPED
from .missing import OnMissing


@dataclass(frozen=True)
class Layer:
    """A gate and its experts: y = sum of w_i * f_i(x) over the experts that the gate picks for a row.

    Expert i of the gate is the i-th entry of `experts`. `combine` is "weighted_sum", "mean", "vote" or "residual".
    `on_missing` says what happens to a row whose expert does not answer: "error", "renormalize", "residual" or
    "fallback:<expert>"; a request fails if a row loses more than `max_lost_mass` of its gate weight, by default 0.5,
    and 1 (no limit) with a fallback, which stands in for all that is lost. `input` declares the rows of a request; the
    default is the input of the experts.

    `shared` experts are always on and added outside the gate; if one fails, so does the request. `capacity` limits
    the rows that an expert takes from one request; a row that loses all its experts to it is zero, or the row itself
    with `on_dropped="residual"`.

    Raises ConfigError for an invalid declaration.

    >>> layer = Layer("waves", gates.Fixed([0.5, 0.5]), {"sin": Expert("numpy:sin"), "cos": Expert("numpy:cos")})
    >>> layer.expert_ids
    ('waves/sin', 'waves/cos')
    """

    name: str
    gate: Gate
    experts: Mapping[str, Expert] = field(default_factory=dict)
    combine: str = "weighted_sum"
    on_missing: str = "error"
    max_lost_mass: float | None = None
    input: TensorSpec = ANY
    shared: Mapping[str, Expert] = field(default_factory=dict)
    capacity: Capacity | None = None
    on_dropped: str = "zero"

    def __post_init__(self) -> None:
        check_name(self.name, "layer")
        where = f"layer {self.name}"
        if not isinstance(self.gate, Gate):
            raise ConfigError(f"{where}: gate must be one of expertmesh.gates, not {type(self.gate).__name__}")
        for what, experts in (("experts", self.experts), ("shared", self.shared)):
            if not isinstance(experts, Mapping):
                raise ConfigError(
                    f'{where}: {what} must be a map of names to experts, as in {{"e0": Expert("torch:sin")}}, '
                    f"not {type(experts).__name__}"
                )
        if not self.experts:
            raise ConfigError(f"{where}: it has no experts: declare at least one")
        for name in self.experts.keys() & self.shared.keys():
            raise ConfigError(f"{where}: expert {name} appears both in experts and in shared")
        for name, expert in self.everyone.items():
            check_name(name, f"{where}: expert")
            if name in (GATE, LAYER):
                raise ConfigError(f'{where}: no expert may be called "{name}"')
            check_expert(expert, f"{where}: expert {name}")
        if self.gate.num_experts != len(self.experts):
            raise ConfigError(
                f"{where}: the gate picks among {self.gate.num_experts} experts, but the layer has {len(self.experts)}"
            )
        if self.combine not in METHODS:
            raise ConfigError(f"{where}: combine must be one of {', '.join(METHODS)}, not {self.combine!r}")
        if self.shared and self.combine == "vote":
            raise ConfigError(f"{where}: combine 'vote' takes no shared experts: there is no sum to add them to")
        if self.on_dropped not in ON_DROPPED:
            raise ConfigError(f"{where}: on_dropped must be one of {', '.join(ON_DROPPED)}, not {self.on_dropped!r}")
        if self.max_lost_mass is not None and not 0.0 <= self.max_lost_mass <= 1.0:
            raise ConfigError(f"{where}: max_lost_mass must lie between 0 and 1, not {self.max_lost_mass}")
        try:
            policy = self.policy(self.on_missing)
        except InvalidRequest as error:
            raise ConfigError(f"{where}: {error.message}") from None
        if policy.kind == "residual" and self.combine == "vote":
            raise ConfigError(
                f"{where}: on_missing 'residual' has no meaning for combine 'vote': use 'renormalize' or "
                "'fallback:<expert>'"
            )

    def policy(self, on_missing: str) -> OnMissing:
        """Parse a missing-expert policy for this layer. Raises InvalidRequest, also for an unknown fallback expert."""
        policy = OnMissing.parse(on_missing)
        if policy.expert is not None and policy.expert not in self.experts:
            raise InvalidRequest(f"the fallback {policy.expert!r} is not one of the experts of layer {self.name}")
        return policy

    def without_live_objects(self) -> Layer:
        """A copy for a process that does not run the experts: placeholders replace the live objects."""
        return self.with_experts(
            {name: replace(e, live=not_in_this_process) if e.ephemeral else e for name, e in self.everyone.items()}
        )

    def with_experts(self, everyone: Mapping[str, Expert]) -> Layer:
        """A copy with other declarations of the experts, by name, shared ones included."""
        return replace(
            self,
            experts={name: everyone[name] for name in self.experts},
            shared={name: everyone[name] for name in self.shared},
        )

    @property
    def everyone(self) -> dict[str, Expert]:
        """All experts by name: the routed ones in the order of the gate, then the shared ones."""
        return {**self.experts, **self.shared}

    @property
    def everyone_by_id(self) -> dict[str, Expert]:
        """All experts by their id `layer/expert`."""
        return {f"{self.name}/{name}": expert for name, expert in self.everyone.items()}

    @cached_property
    def packs(self) -> tuple[tuple[int, ...], ...]:
        """The positions of the routed experts, grouped by the replica that they share."""
        packs: dict[str, list[int]] = {}
        for position, (name, expert) in enumerate(self.experts.items()):
            packs.setdefault(f"pack {expert.pack}" if expert.pack else f"expert {name}", []).append(position)
        return tuple(tuple(positions) for positions in packs.values())

    @cached_property
    def shared_ids(self) -> tuple[str, ...]:
        """The ids of the shared experts."""
        return tuple(f"{self.name}/{expert}" for expert in self.shared)

    @cached_property
    def expert_ids(self) -> tuple[str, ...]:
        """The ids of the routed experts, in the order of the gate."""
        return tuple(f"{self.name}/{expert}" for expert in self.experts)

    @property
    def gate_id(self) -> str:
        """The id `layer/gate`."""
        return f"{self.name}/{GATE}"

    @property
    def layer_id(self) -> str:
        """The id `layer/layer`, of which a version is what the layer is made of: its experts, by name, and policies."""
        return f"{self.name}/{LAYER}"

    @property
    def own_ids(self) -> tuple[str, str]:
        """The ids of which routers hold versions: of the gate, and of the layer itself."""
        return self.gate_id, self.layer_id


def check_name(name: object, what: str) -> None:
    """Check the name of a layer, an expert or a cluster. Raises ConfigError."""
    if not is_name(name):
        raise ConfigError(
            f"{what} name {name!r} must be 1 to 64 letters, digits, '_', '-' or '.', not starting with '-' or '.'"
        )


def not_in_this_process(rows: object) -> NoReturn:
    """Stands for a live expert where it does not run. Raises ConfigError."""
    raise ConfigError("this live expert runs in its replica, not here")
