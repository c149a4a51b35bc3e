"""Builds a new version beside the serving one and verifies it, or refuses it without leftovers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ..construct.factory import RowFunction, build, check_unchanged, with_own_copy
from ..construct.probe import complete
from ..errors import ExpertMeshError, FailedPrecondition, SpecMismatch, Unavailable
from ..identity.canonical import canonical
from ..identity.code_digest import RECIPE, difference, examined
from ..identity.version_name import expert_digest, version_name
from ..spec import ANY, Expert, TensorSpec
from ..weights.files import described, joined_digest, load_into, load_tensors, tensor_digest, tensor_digests
from ..weights.inspect import LIMITS, ArtefactLimits, Contents, check_described, inspect_artefact, norms_of, survey
from .memory import check_memory, within_memory
from .refusals import refusals
from .verify import (
    Policy,
    check_applied,
    check_drift,
    check_infinities,
    check_norms,
    finite_rows,
    golden_rows,
    probe,
    probe_drift,
)

TRIED_BYTES = 64 * 2**20
"""The size of the tensors up to which a constructor is tried twice."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A proposed version: its declaration, and weights that replace the declared ones.

    `weights` is a safetensors file or tensors by name, `sha256` that of the file, `version` the expected name of the
    version, if known. `input` and `output` are the specs of the layer's rows. `recipe` says how it is made;
    `names_code` that its code was asked for, which must then be that of its file. After `timeout` seconds nobody waits
    for it any more.
    """

    id: str
    counter: int
    expert: Expert
    weights: Path | Mapping[str, Tensor] | None = None
    sha256: str | None = None
    version: str | None = None
    input: TensorSpec = ANY
    output: TensorSpec = ANY
    policy: Policy = field(default_factory=Policy)
    recipe: int = RECIPE
    names_code: bool = False
    timeout: float = math.inf


@dataclass(frozen=True)
class Receipt:
    """Proof that an incarnation holds a version and has verified it.

    `digest` is the sha256 that the version is named after, `tensor_digest` that of its tensors as read back, `nbytes`
    their size in bytes, `drift` the relative L2 distance on golden rows, None if it was not measured; `unmeasured` says
    why. A version is `verified` if it answered rows, or if it differs from one that serves only in its tensors.
    """

    id: str
    version: str
    incarnation: str
    digest: str
    tensor_digest: str
    drift: float | None
    nbytes: int
    seconds: float
    input: TensorSpec
    output: TensorSpec
    unmeasured: str = ""
    verified: bool = True


@dataclass(frozen=True)
class _Comparison:
    """How a new version answers beside the old one, as a receipt has it."""

    drift: float | None = None
    unmeasured: str = ""
    verified: bool = True


def stage(
    proposal: Proposal,
    old: RowFunction | None,
    *,
    incarnation: str,
    device: str = "cpu",
    limits: ArtefactLimits = LIMITS,
    free: Callable[[str], int | None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[RowFunction, Receipt]:
    """Build a version beside `old`, which it replaces, and verify it, without effect on serving versions.

    `free` replaces `memory.free_memory`.

    Raises NotFound, DataLoss, SpecMismatch, FailedPrecondition, TooLarge or ConfigError, and releases the new version.
    """
    started = clock()

    def work() -> tuple[RowFunction, Receipt]:
        same = old if old is not None and _same_code(proposal.expert, old.expert) else None
        contents, tensors = _contents(proposal, same, limits)
        if contents is not None and same is not None:
            finite = {name: norm for name, norm in contents.norms.items() if name not in contents.infinite}
            check_norms(finite, norms_of(same.state()), proposal.policy)
        needed = _size(contents, old)
        for place in {"cpu", device}:
            check_memory(needed, place, free=free)
        function = _constructed(proposal, device)
        if proposal.version is None and same is None:
            _check_repeatable(proposal, function, contents)
        if contents is not None and tensors is not None:
            _load(function, contents, tensors, old)
        known = proposal.version is not None or (same is not None and not _hides(proposal))
        receipt = _receipt(proposal, function, contents, old, known, incarnation)
        return function, replace(receipt, seconds=clock() - started)

    with refusals(proposal.id, "expert", "the log of its replica, and fix the expert"):
        return within_memory(work, device)


def check_verified(receipts: Iterable[Receipt], policy: Policy) -> None:
    """Check what the receipts of new versions say of them. Raises FailedPrecondition for one that nobody could try."""
    for receipt in receipts:
        if not receipt.verified and not policy.allow_unverified:
            raise FailedPrecondition(
                f"{receipt.id}: whether the new version answers is not known ({receipt.unmeasured}): declare the input "
                "of its layer, send the layer some rows first, or set allow_unverified"
            )


def _contents(
    proposal: Proposal, same: RowFunction | None, limits: ArtefactLimits
) -> tuple[Contents | None, Mapping[str, Tensor] | Path | None]:
    """Inspect the weights before the build; returns the result, and the tensors or their file."""
    weights = proposal.weights if proposal.weights is not None else proposal.expert.weights
    wanted = described(same.state()) if same is not None else None
    if weights is None:
        return None, None
    if not isinstance(weights, Mapping):
        contents = inspect_artefact(weights, sha256=proposal.sha256, limits=limits, wanted=wanted, infinities=True)
        return contents, Path(weights)
    if wanted is not None:
        check_described(described(weights), wanted)
    return survey(weights, infinities=True), weights


def _load(
    function: RowFunction, contents: Contents, weights: Mapping[str, Tensor] | Path, old: RowFunction | None
) -> None:
    if function.module is None:
        raise SpecMismatch("a plain function has no parameters to load weights into: leave out weights")
    tensors = load_tensors(weights)[0] if isinstance(weights, Path) else weights
    check_described(described(tensors), described(function.state()))
    check_infinities(contents.infinite, tensors, function.module, old.module if old is not None else None)
    load_into(function.module, tensors, "it")
    check_applied(function.state(), contents.digests)


def _constructed(proposal: Proposal, device: str) -> RowFunction:
    """The proposed expert before its weights are loaded."""
    if proposal.names_code and proposal.version is None and proposal.expert.factory is not None:
        check_unchanged(proposal.expert.factory)
    expert = with_own_copy(replace(proposal.expert, weights=None), "a new version")
    return build(expert, device, id=proposal.id if proposal.recipe > 1 else "")


def _check_repeatable(proposal: Proposal, function: RowFunction, contents: Contents | None) -> None:
    """Check that a constructor builds the same once more: a replica that restarts has to. Small experts are tried.

    Raises FailedPrecondition that names what differs.
    """
    state = function.state()
    if proposal.expert.factory is None or sum(tensor.nbytes for tensor in state.values()) > TRIED_BYTES:
        return
    try:
        again = _constructed(proposal, "cpu")
    except ExpertMeshError:
        log.info("%s cannot be constructed twice in one process", proposal.id)
        return
    tensors, others = tensor_digests(state), tensor_digests(again.state())
    differs = next((name for name in tensors if contents is None and tensors[name] != others.get(name)), None)
    differs = differs or difference(function.function, again.function, proposal.recipe)
    if differs is not None:
        raise FailedPrecondition(
            f"its constructor does not build the same twice: {differs} differs, so that no replica could restore it "
            "after a restart. Fill it with what does not depend on time, process or chance (random numbers of torch, "
            "numpy and random are seeded), give its tensors by weights, or pass a live object"
        )


def _receipt(
    proposal: Proposal,
    function: RowFunction,
    contents: Contents | None,
    old: RowFunction | None,
    known: bool,
    incarnation: str,
) -> Receipt:
    state = function.state()
    # The bytes read back were already compared with the contents.
    tensors = tensor_digest(state) if contents is None else joined_digest(described(state), contents.digests)
    digest = expert_digest(  # before the probes run its code
        proposal.expert, function.function, tensors, counter=proposal.counter, recipe=proposal.recipe
    )
    version = version_name(proposal.counter, digest)
    if proposal.version is not None and version != proposal.version:
        raise FailedPrecondition(
            f"it was built as {version}, but {proposal.version} was expected: code, arguments, weights or a file that "
            "its factory reads differ between nodes, or have changed since. Give all nodes the same ones, code by "
            "runtime_env, or name it in `redeclare` at the next start"
        )
    nbytes = sum(tensor.nbytes for tensor in state.values())
    input_spec, output_spec = _specs(proposal, function)
    found = _compared(proposal, function, old, input_spec, known)
    identity = (proposal.id, version, incarnation, digest, tensors, found.drift, nbytes, 0.0)
    return Receipt(*identity, input_spec, output_spec, found.unmeasured, found.verified)


def _hides(proposal: Proposal) -> bool:
    """Whether a live object was asked for that may be another than the one that it looks like."""
    live = proposal.expert.live
    return live is not None and proposal.names_code and examined(live, live=True).opaque


def _specs(proposal: Proposal, function: RowFunction) -> tuple[TensorSpec, TensorSpec]:
    specs = complete(function, "it")
    for what, spec, wanted in zip(("takes", "returns"), specs, (proposal.input, proposal.output), strict=True):
        if not spec.agrees(wanted):
            raise SpecMismatch(
                f"it {what} rows of {spec}, but the layer's rows are {wanted}: swap in an expert that fits"
            )
    return specs


def _compared(
    proposal: Proposal, function: RowFunction, old: RowFunction | None, rows: TensorSpec, known: bool
) -> _Comparison:
    """Compare the answers to golden rows: of the declared shape, else like the rows that the old version served last.

    What is `known` to have served, or runs the code of what serves, counts as verified where no rows can be tried.
    Raises FailedPrecondition for answers that do not fit, or a drift above its bound.
    """
    rows, served = rows.filled(proposal.input), old.served if old is not None else None
    declared = rows.shape is not None
    if not declared and served is not None:
        rows = served
        function.served = served
    golden = golden_rows(rows, proposal.policy.probe_rows)
    if golden is None:
        found = _Comparison(None, "not run, because no rows were declared or served", verified=known)
    elif old is None:
        probe(function, golden, proposal.output)
        found = _Comparison(None, "no version serves that it could be compared with")
    else:
        try:
            if declared or proposal.policy.max_drift is not None:
                found = _Comparison(probe_drift(function, old, golden, proposal.output))
            else:
                found = _compared_as_served(proposal, function, old, golden, known)
        except Unavailable:  # the new one has answered: what serves may take long, or hang
            found = _Comparison(None, "the serving version computed other rows all the while")
    check_drift(found.drift, proposal.policy)
    return found


def _compared_as_served(
    proposal: Proposal, function: RowFunction, old: RowFunction, golden: Tensor, known: bool
) -> _Comparison:
    """The same where golden rows are only like those that were served: the old version may refuse them too."""
    try:
        return _Comparison(probe_drift(function, old, golden, proposal.output))
    except FailedPrecondition:
        if _answers(old, golden):
            raise
    why = "the serving version does not answer probe rows like those that it was last sent"
    if _answers(function, golden, proposal.output):
        return _Comparison(None, why)
    return _Comparison(None, f"{why}, and neither does the new one", known)


def _answers(function: RowFunction, golden: Tensor, output: TensorSpec = ANY) -> bool:
    """Whether an expert answers any of the golden rows with finite numbers."""
    try:
        return bool(finite_rows(probe(function, golden, output)).any())
    except FailedPrecondition:
        return False


def _same_code(one: Expert, other: Expert) -> bool:
    """Whether two declarations differ at most in their weights, so that tensors can be compared by name."""
    if one.factory != other.factory:
        return False
    if one.live is not None:
        return one.live is other.live or examined(one.live, live=True) == examined(other.live, live=True)
    return canonical([one.args, dict(one.kwargs)]) == canonical([other.args, dict(other.kwargs)])


def _size(contents: Contents | None, old: RowFunction | None) -> int:
    """The size of the new version in bytes: of its weights if given, else that of the old version."""
    if contents is not None:
        return contents.tensor_bytes
    return sum(tensor.nbytes for tensor in old.state().values()) if old is not None else 0
