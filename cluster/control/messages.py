"""What owner, controller, replicas and routers tell each other, as plain records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...experts.errors import FailedPrecondition
from ...experts.spec import ANY, Expert, TensorSpec
from ...experts.staging.stage import Proposal
from ...experts.staging.verify import Policy
from ...router.fanout.replica_view import Replica
from ...router.fanout.telemetry import ReplicaLoad, Scaled
from ...router.gates import Gate
from ...router.mixture.layer import Layer


@dataclass(frozen=True, kw_only=True)
class Desired:
    """What the owner declares: layers, and the replicas with the experts each is for; a higher revision is newer.

    `handles` is how the transport reaches each replica; the controller only passes it on. `redeclare` are the ids whose
    declaration replaces even a version that was swapped in. `renewed` are the ids that are built again although their
    declaration is the same, and `unverified` lets them be what could not be run. `owner` is the id of the process that
    declares. `needs` is what each replica reserves, by Ray's names. `settings` are those of the cluster, as plain JSON.

    `declaration` is the revision that these layers were declared with, this one by default; a later one with the same
    changes only what runs them. The `draining` among the replicas are not chosen any more. `scaled` are the numbers of
    replicas by group that were asked for in place of those declared; they are kept for the next start.

    The `resumed` ids are declared by what the registry says of them. The `removed` ids were taken away by name, and are
    in no epoch from now on; of a layer that is in `removed`, a restart must be told to have it back. `versions` are
    those that some ids had before and come back with, and `adopts` digests that are written down as what they are
    declared.
    """

    revision: int = 0
    owner: str = ""
    layers: Mapping[str, Layer] = field(default_factory=dict)
    redeclare: frozenset[str] = frozenset()
    renewed: frozenset[str] = frozenset()
    unverified: bool = True
    replicas: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    handles: Mapping[str, Any] = field(default_factory=dict)
    routers: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    declaration: int = 0
    draining: frozenset[str] = frozenset()
    scaled: Mapping[str, int] = field(default_factory=dict)
    resumed: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()
    adopts: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "declaration", self.declaration or self.revision)

    @property
    def stays(self) -> dict[str, tuple[str, ...]]:
        """The replicas that do not drain, each with its experts."""
        return {name: experts for name, experts in self.replicas.items() if name not in self.draining}

    @property
    def ends(self) -> frozenset[str]:
        """The ids of which every replica drains."""
        there, stay = ({id for ids in replicas.values() for id in ids} for replicas in (self.replicas, self.stays))
        return frozenset(there - stay)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A version to be: what it is built from. `version` is its name where that is known already.

    An expert has `expert`, whose weights are the file `weights`; a gate has `gate`, and a layer `layer`. `input` and
    `output` are the rows of the layer. `replaces` is the version that it is compared with. `tensor_digest`, where it is
    known, is what a receipt has to name. An `uploaded` file of weights is moved into the version's folder.
    `names_code`: it was asked for by its code, and not by weights for what serves. `note` is for people. A member may
    take `timeout` seconds to stage it.
    """

    id: str
    counter: int
    expert: Expert | None = None
    gate: Gate | None = None
    layer: Layer | None = None
    weights: Path | None = None
    version: str | None = None
    replaces: str | None = None
    input: TensorSpec = ANY
    output: TensorSpec = ANY
    policy: Policy = field(default_factory=Policy)
    mode: str = "double"
    origin: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    uploaded: bool = False
    names_code: bool = False
    tensor_digest: str | None = None
    timeout: float = math.inf


def proposal_of(candidate: Candidate) -> Proposal:
    """What a replica is asked to build for a candidate; where its weights are is left to the transport."""
    if candidate.expert is None:
        raise FailedPrecondition(f"{candidate.id} is no expert, and replicas run experts")
    return Proposal(
        id=candidate.id,
        counter=candidate.counter,
        expert=candidate.expert,
        version=candidate.version,
        input=candidate.input,
        output=candidate.output,
        policy=candidate.policy,
        recipe=candidate.origin.get("recipe", 1),
        names_code=candidate.names_code,
        timeout=candidate.timeout,
    )


@dataclass(frozen=True, kw_only=True)
class RouterUpdate:
    """What a router is told every turn: the replicas, the epochs that requests may pin, and the current one.

    `session` is that of this router's last report, or "" before the first, and `given_up` the one of it that may not
    answer any more. `cluster_id` is that of the registry, whose epochs these are. `broken` are the ids whose current
    version cannot be loaded, and why. `routers` are the facts of every router, by name, as it last reported them, and
    its "state". `scaled` are the experts and packs that are scaled by their load.
    """

    replicas: tuple[Replica, ...]
    epochs: Mapping[int, Mapping[str, str]]
    current: int
    session: str = ""
    given_up: str = ""
    cluster_id: str = ""
    broken: Mapping[str, str] = field(default_factory=dict)
    routers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scaled: Mapping[str, Scaled] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RouterReport:
    """What a router says of itself: what it was told, its epoch and pins, what it holds, and what it counted.

    `gates` are the gates and layers that it holds. `loads` are by replica, for those to which it sends; the `busy` ones
    owe it an answer. `facts` are for the status: where it is, and what it is doing.
    """

    incarnation: str
    revision: int
    epoch: int
    oldest_pinned: int
    gates: frozenset[tuple[str, str]]
    loads: Mapping[str, ReplicaLoad] = field(default_factory=dict)
    busy: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one id is to become: what is `declared`, a `version` that there was, or what came over the network.

    Over the network come the weights of an `upload`, an `expert` of another factory, or both.
    """

    declared: bool = False
    version: str | None = None
    upload: str | None = None
    sha256: str | None = None
    expert: Expert | None = None

    @property
    def new_code(self) -> bool:
        """Whether it may bring other code than that of the version that serves, and not only other weights."""
        return self.declared or self.expert is not None


@dataclass(frozen=True, kw_only=True)
class SwapRequest:
    """A swap that is asked for: all changes at once, or none. `expect` is compared with the current versions.

    `timeout` bounds staging, in seconds. With `dry_run` everything up to the commit is done, and then undone. With
    `declares` it brings what the owner declares, and those `by_name` were asked for. Ids that are not declared any more
    stay in the epoch, but for those that it `removes`. Where all ids are `renewed` and none is another than before,
    nothing is committed. `adopts` are the digests of the declarations that the changes carry out, by id. `note` is for
    people.
    """

    swap_id: str
    changes: Mapping[str, Change]
    expect: Mapping[str, str] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)
    mode: str = "double"
    timeout: float = 60.0
    dry_run: bool = False
    declares: bool = False
    by_name: frozenset[str] = frozenset()
    removes: frozenset[str] = frozenset()
    renewed: frozenset[str] = frozenset()
    adopts: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ScaleRequest:
    """Other numbers of replicas that are asked for, by the id of an expert or pack, to be there within some seconds."""

    change_id: str
    replicas: Mapping[str, int]
    timeout: float = 120.0


@dataclass(frozen=True, kw_only=True)
class SwapResult:
    """What became of a swap: the epoch, the versions before and after, and the drift of each on its probe rows.

    `unmeasured` says of each id without a drift why it was not measured.
    """

    swap_id: str
    epoch: int
    before: Mapping[str, str]
    after: Mapping[str, str]
    drift: Mapping[str, float | None] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    committed: bool = True
    flipped: bool = True
    pending: tuple[str, ...] = ()
