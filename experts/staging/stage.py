"""Builds a new version beside the serving one and verifies it, or refuses it without leftovers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ..construct.factory import RowFunction, build, with_own_copy
from ..construct.probe import complete
from ..errors import FailedPrecondition, SpecMismatch
from ..identity.canonical import canonical
from ..identity.code_digest import code_digest
from ..identity.version_name import expert_digest, version_name
from ..spec import ANY, Expert, TensorSpec
from ..weights.files import described, joined_digest, load_into, load_tensors, tensor_digest
from ..weights.inspect import LIMITS, ArtefactLimits, Contents, check_described, inspect_artefact, norms_of, survey
from .memory import check_memory, within_memory
from .refusals import refusals
from .verify import Policy, check_applied, check_drift, check_norms, golden_rows, probe, probe_drift


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A proposed version: its declaration, and weights that replace the declared ones.

    `weights` is a safetensors file or tensors by name, `sha256` that of the file, `version` the expected name of the
    version, if known. `input` and `output` are the specs of the layer's rows.
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


@dataclass(frozen=True)
class Receipt:
    """Proof that an incarnation holds a version and has verified it.

    `digest` is the sha256 that the version is named after, `tensor_digest` that of its tensors as read back, `nbytes`
    their size in bytes, `drift` the relative L2 distance on golden rows, None if it was not measured.
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
        contents, tensors = _contents(proposal, old, limits)
        if contents is not None and old is not None and _same_code(proposal.expert, old.expert):
            check_norms(contents.norms, norms_of(old.state()), proposal.policy)
        needed = _size(contents, old)
        for place in {"cpu", device}:
            check_memory(needed, place, free=free)
        function = _built(proposal, contents, tensors, device)
        receipt = _receipt(proposal, function, contents, old, incarnation)
        return function, replace(receipt, seconds=clock() - started)

    with refusals(proposal.id, "expert", "the log of its replica, and fix the expert"):
        return within_memory(work, device)


def _contents(
    proposal: Proposal, old: RowFunction | None, limits: ArtefactLimits
) -> tuple[Contents | None, Mapping[str, Tensor] | Path | None]:
    """Inspect the weights before the build; returns the result, and the tensors or their file."""
    weights = proposal.weights if proposal.weights is not None else proposal.expert.weights
    wanted = described(old.state()) if old is not None and _same_code(proposal.expert, old.expert) else None
    if weights is None:
        return None, None
    if not isinstance(weights, Mapping):
        return inspect_artefact(weights, sha256=proposal.sha256, limits=limits, wanted=wanted), Path(weights)
    if wanted is not None:
        check_described(described(weights), wanted)
    return survey(weights), weights


def _built(
    proposal: Proposal, contents: Contents | None, weights: Mapping[str, Tensor] | Path | None, device: str
) -> RowFunction:
    function = build(with_own_copy(replace(proposal.expert, weights=None), "a new version"), device)
    if contents is None or weights is None:
        return function
    if function.module is None:
        raise SpecMismatch("a plain function has no parameters to load weights into: leave out weights")
    tensors = load_tensors(weights)[0] if isinstance(weights, Path) else weights
    check_described(described(tensors), described(function.state()))
    load_into(function.module, tensors, "it")
    check_applied(function.state(), contents.digests)
    return function


def _receipt(
    proposal: Proposal, function: RowFunction, contents: Contents | None, old: RowFunction | None, incarnation: str
) -> Receipt:
    state = function.state()
    # The bytes read back were already compared with the contents.
    tensors = tensor_digest(state) if contents is None else joined_digest(described(state), contents.digests)
    digest = expert_digest(proposal.expert, function.function, tensors)  # before the probes run its code
    version = version_name(proposal.counter, digest)
    if proposal.version is not None and version != proposal.version:
        raise FailedPrecondition(
            f"it was built as {version}, but {proposal.version} was expected: code, arguments or weights differ "
            "between nodes; give all nodes the same ones, code by runtime_env"
        )
    nbytes = sum(tensor.nbytes for tensor in state.values())
    input_spec, output_spec = _specs(proposal, function)
    drift = _drift(proposal, function, old, input_spec)
    return Receipt(proposal.id, version, incarnation, digest, tensors, drift, nbytes, 0.0, input_spec, output_spec)


def _specs(proposal: Proposal, function: RowFunction) -> tuple[TensorSpec, TensorSpec]:
    specs = complete(function, "it")
    for what, spec, wanted in zip(("takes", "returns"), specs, (proposal.input, proposal.output), strict=True):
        if not spec.agrees(wanted):
            raise SpecMismatch(
                f"it {what} rows of {spec}, but the layer's rows are {wanted}: swap in an expert that fits"
            )
    return specs


def _drift(proposal: Proposal, function: RowFunction, old: RowFunction | None, rows: TensorSpec) -> float | None:
    golden = golden_rows(rows.filled(proposal.input), proposal.policy.probe_rows)
    if golden is None or old is None:
        if golden is not None:
            probe(function, golden, proposal.output)
        drift = None
    else:
        drift = probe_drift(function, old, golden, proposal.output)
    check_drift(drift, proposal.policy)
    return drift


def _same_code(one: Expert, other: Expert) -> bool:
    """Whether two declarations differ at most in their weights, so that tensors can be compared by name."""
    if one.factory != other.factory:
        return False
    if one.live is not None:
        return one.live is other.live or code_digest(one.live) == code_digest(other.live)
    return canonical([one.args, dict(one.kwargs)]) == canonical([other.args, dict(other.kwargs)])


def _size(contents: Contents | None, old: RowFunction | None) -> int:
    """The size of the new version in bytes: of its weights if given, else that of the old version."""
    if contents is not None:
        return contents.tensor_bytes
    return sum(tensor.nbytes for tensor in old.state().values()) if old is not None else 0
