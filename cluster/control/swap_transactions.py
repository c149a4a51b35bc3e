"""Swaps as transactions: from a request to candidates, from receipts to durable versions, from outcome to answer."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ...experts.errors import (
    Aborted,
    DataLoss,
    ExpertMeshError,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from ...experts.names import is_layer_id
from ...experts.staging.stage import Receipt, check_verified
from ...experts.staging.verify import Policy
from ..state.records import ABORTED, COMMITTED, OPEN, REMOVED, VersionRecord
from ..state.registry import Registry
from ..state.version_folders import VersionStore
from .candidates import CandidateBuilder
from .messages import Candidate, Change, Desired, SwapRequest, SwapResult
from .reconciler import refuse_unless_current

log = logging.getLogger(__name__)
NOTHING = Desired()


class SwapTransactions:
    """Prepares swaps, makes them durable, and answers who asked. It alone writes to the registry."""

    def __init__(
        self,
        registry: Registry,
        store: VersionStore,
        builder: CandidateBuilder,
        *,
        retain_epochs: int = 2,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = registry
        self.store = store
        self.builder = builder
        self._retain = retain_epochs
        self._clock = clock
        self._requests: dict[str, SwapRequest] = {}
        self._candidates: dict[str, dict[str, Candidate]] = {}
        self._receipts: dict[str, dict[str, Receipt]] = {}
        self._written: dict[str, list[VersionRecord]] = {}
        self._uncommitted: dict[str, str] = {}
        self._declarations: dict[str, dict[str, str]] = {}
        self._answers: dict[str, asyncio.Future[SwapResult]] = {}
        self.kept: dict[str, str] = {}
        self.swapped: dict[str, str] = {}
        self.edited: tuple[str, ...] = ()
        found = registry.current()
        self.resumed = 0 if found is None else found.number
        for swap in registry.open_swaps():  # of a controller that died: what was not committed is discarded
            registry.end_swap(swap.swap_id, ABORTED, "the controller restarted before the commit")
        for id, version in store.sweep(registry.known()):
            log.warning("%s of %s is in no epoch that is kept: it was moved to quarantine/ of state_dir", version, id)

    def close(self) -> None:
        """Close the registry."""
        self.registry.close()

    @property
    def cluster_id(self) -> str:
        """The id of the cluster whose epochs these are."""
        return self.registry.cluster_id

    @property
    def term(self) -> int:
        """How many controllers have opened the registry, this one included."""
        return self.registry.term

    def timeout(self, swap_id: str) -> float:
        """For how many seconds a member may stage a candidate of a swap; 0 where the swap has ended."""
        request = self._requests.get(swap_id)
        return 0.0 if request is None else request.timeout

    def check_writer(self) -> None:
        """Raise Fenced where another controller has taken over. A disk that cannot be read says nothing of it."""
        with suppress(Unavailable):
            self.registry.check_writer()

    def declare(self, desired: Desired) -> None:
        """Take the layers that an owner declares."""
        self.builder.declare(desired.layers, desired.owner, desired.resumed)

    def recorded(self, id: str, version: str) -> Candidate:
        """The candidate that loads a version of the registry again. Raises NotFound, FailedPrecondition or DataLoss."""
        return self.builder.recorded(id, version)

    def verify(self, id: str, version: str) -> None:
        """Check a stored version against its checksum. Raises DataLoss or NotFound."""
        self.store.verify(id, version)

    def epochs(self) -> dict[int, Mapping[str, str]]:
        """The epochs that are kept, by number."""
        return {epoch.number: epoch.versions for epoch in self.registry.epochs()}

    def epoch(self, number: int) -> Mapping[str, str]:
        """An epoch that is kept. Raises FailedPrecondition or NotFound."""
        return self.registry.epoch(number).versions

    def current(self) -> Mapping[str, str]:
        """The versions of the current epoch."""
        epoch = self.registry.current()
        return {} if epoch is None else epoch.versions

    def declared_swap(self, timeout: float, desired: Desired = NOTHING) -> SwapRequest | None:
        """The swap that brings the cluster to what is declared, or None where nothing is new, edited or renewed.

        Experts and gates that are not declared any more stay in the epochs with their versions, and serve again where
        they are declared again; but for those that were removed by name.
        A version that was swapped in outlives an edited declaration, unless `redeclare` has its id; `kept` names it.
        Raises FailedPrecondition for a gate that was swapped in and does not fit its edited layer.
        """
        redeclare = desired.redeclare
        current = self.current()
        differs = [id for id, digest in self.builder.digests.items() if self.registry.declared(id) != digest]
        self.swapped = {id: current[id] for id in self.builder.digests if self._outlives(id, current)}
        self.kept = {id: current[id] for id in differs if id not in redeclare and id in self.swapped}
        self.edited = tuple(id for id in differs if id in current and id not in self.kept)
        for id, version in self.kept.items():
            if self.builder.declared[id].gate is not None:
                self.builder.check_fits(id, version)
            log.warning("%s: %s was swapped in and serves on, though the declaration was edited", id, version)
        back = {id: Change(version=version) for id, version in desired.versions.items()}
        changes = {
            id: back.get(id, Change(declared=True))
            for id in self.builder.digests
            if id not in current or id in desired.renewed or (id in differs and id not in self.kept)
        }
        removes = {id for id in current if is_layer_id(id) and id not in self.builder.digests}
        removes |= desired.removed & current.keys()
        if not changes and not removes:
            return None
        swap_id = f"declare-{uuid.uuid4().hex[:12]}"
        return SwapRequest(
            swap_id=swap_id,
            changes=changes,
            timeout=timeout,
            policy=Policy(allow_norm=True, allow_unverified=desired.unverified),
            declares=True,
            by_name=redeclare,
            removes=frozenset(removes),
            adopts=_tombstones(desired.removed & current.keys()) | dict(desired.adopts),
            renewed=desired.renewed,
            note="declared",
        )

    def _outlives(self, id: str, current: Mapping[str, str]) -> bool:
        """Whether the current version of an id must not be replaced by a declaration: it was asked for by name."""
        if id not in current:
            return False
        record = self.registry.version(id, current[id])
        return not record.declared and not record.ephemeral

    def prepare(self, request: SwapRequest) -> None:
        """Check a request, write it into the journal, and make its candidates. Raises what is wrong with it."""
        current = self.current()
        unknown = [id for id in request.changes if id not in self.builder.declared]
        if unknown:
            raise self.builder.unknown(unknown[0])
        refuse_unless_current(request.expect, current)
        candidates = {
            id: self.builder.candidate(id, change, request, current) for id, change in request.changes.items()
        }
        plan = {id: {"note": candidate.note, "version": candidate.version} for id, candidate in candidates.items()}
        self.registry.begin_swap(request.swap_id, plan)
        self._requests[request.swap_id], self._candidates[request.swap_id] = request, candidates
        if request.declares:
            self._declarations[request.swap_id] = dict(self.builder.digests)
        self._receipts[request.swap_id] = {}

    def candidate(self, swap_id: str, id: str) -> Candidate | None:
        """A candidate of a swap, or None where the swap has ended."""
        return self._candidates.get(swap_id, {}).get(id)

    def keep_receipt(self, swap_id: str, receipt: Receipt) -> None:
        """Keep what a member said of a candidate: the record is made from it."""
        receipts = self._receipts.get(swap_id)
        if receipts is None:
            return
        kept = receipts.get(receipt.id)
        if kept is None or kept.version != receipt.version or not kept.verified:
            receipts[receipt.id] = receipt  # of several members, one that has verified it speaks for all

    def write(self, swap_id: str, versions: Mapping[str, str]) -> None:
        """Bring a swap's versions to the disk. Raises Aborted for a rehearsal, DataLoss, and what the disk raises."""
        request = self._requests[swap_id]
        check_verified(self._receipts[swap_id].values(), request.policy)
        if request.dry_run:
            self._uncommitted[swap_id] = "rehearsal"
            raise Aborted("a rehearsal ends before the commit")
        if self._changes_nothing(swap_id, request):
            self._uncommitted[swap_id] = "nothing changed"
            raise Aborted("what was built is what serves")
        known = self.registry.known()
        self._written[swap_id] = [
            self._write(request, self._candidates[swap_id][id], self._receipts[swap_id][id])
            for id, version in versions.items()
            if (id, version) not in known
        ]

    def _changes_nothing(self, swap_id: str, request: SwapRequest) -> bool:
        candidates, receipts = self._candidates[swap_id], self._receipts[swap_id]
        if request.removes or not candidates.keys() <= request.renewed:
            return False
        try:
            for id, made in candidates.items():
                self.store.verify(id, made.replaces or "")
                if self.registry.version(id, made.replaces or "").digest != receipts[id].digest:
                    return False
        except (DataLoss, NotFound, InvalidRequest):  # there is none, or it is damaged: the new one takes its place
            return False
        return True

    def commit(self, swap_id: str, versions: Mapping[str, str]) -> tuple[int, Mapping[str, str]]:
        """Make what was written the next epoch, durably; returns it.

        What a declaration has brought is written down with it, so that the next start notices an edited declaration,
        and that alone. Raises Aborted, also where another swap has replaced since what this one was prepared to
        replace; after Unavailable it is open whether the epoch is durable: ask again.
        """
        request = self._requests[swap_id]
        for record in self._written.get(swap_id, ()):
            self.registry.add_version(record)
        declared = dict(request.adopts)
        if request.declares:
            digests = self._declarations[swap_id]  # as prepared: the owner may have declared something else since
            declared = {**{id: digests[id] for id in request.changes}, **request.adopts}
        removes = request.removes
        epoch = self.registry.commit(
            swap_id, versions, expect=self.expected(swap_id), declared=declared, removes=removes
        )
        return epoch.number, epoch.versions

    def expected(self, swap_id: str) -> dict[str, str | None]:
        """What must be current when a swap is committed: what it was prepared to replace, and what was asked for."""
        replaced = {id: candidate.replaces for id, candidate in self._candidates[swap_id].items()}
        return {**replaced, **self._requests[swap_id].expect}

    def collect(self, in_use: Collection[tuple[str, str]], oldest_needed: int) -> dict[int, Mapping[str, str]]:
        """Forget epochs and versions that nobody may ask for any more; returns the epochs that are kept.

        Epochs from `oldest_needed` on are pinned somewhere, and outlive their retention.
        """
        epoch = self.registry.current()
        pinned = 0 if epoch is None else epoch.number - oldest_needed
        for record in self.registry.collect(max(self._retain, pinned), in_use):
            self.store.remove(record.id, record.version)
            self.builder.built.pop((record.id, record.version), None)
        return self.epochs()

    def expect_answer(self, swap_id: str) -> asyncio.Future[SwapResult]:
        """The answer that a swap will have; the same for all who ask for the same swap."""
        if swap_id not in self._answers:
            self._answers[swap_id] = asyncio.get_running_loop().create_future()
        return self._answers[swap_id]

    def is_awaited(self, swap_id: str) -> bool:
        """Whether somebody asked for this swap already and has no answer yet."""
        return swap_id in self._answers

    def on_answer(self, swap_id: str, action: Callable[[], Any]) -> None:
        """Do something when the answer is there."""
        self._answers[swap_id].add_done_callback(lambda _: action())

    def abort(self, swap_id: str, error: ExpertMeshError) -> None:
        """End a swap that never began to stage."""
        self.answer(swap_id, None, error)

    def answer(self, swap_id: str, epoch: int | None, error: ExpertMeshError | None) -> None:
        """Tell who asked, and forget the swap."""
        answer, request = self._answers.pop(swap_id, None), self._requests.pop(swap_id, None)
        candidates, receipts = self._candidates.pop(swap_id, {}), self._receipts.pop(swap_id, {})
        self._written.pop(swap_id, None)
        self._declarations.pop(swap_id, None)
        result = self._result(swap_id, request, candidates, receipts, epoch)
        uncommitted = self._uncommitted.pop(swap_id, None)  # on purpose
        if error is not None:
            self._end(swap_id, uncommitted or error.message)
        if answer is None or answer.done():
            return
        if error is None or uncommitted:
            answer.set_result(result)
        else:
            answer.set_exception(error)
            answer.exception()  # somebody may have stopped waiting: that is no bug

    def _end(self, swap_id: str, message: str) -> None:
        """Note in the journal that a swap was aborted. A journal that cannot be written must not keep back the answer:
        a restart ends what is open."""
        try:
            self.registry.end_swap(swap_id, ABORTED, message)
        except NotFound:
            log.debug("swap %s was refused before it began", swap_id)
        except (Aborted, Unavailable) as error:
            log.warning("swap %s: %s", swap_id, error)

    def result_of(self, swap_id: str) -> SwapResult | None:
        """The result of a swap that was committed, also by a controller before this one, and without the drift.

        Raises Aborted if it was aborted.
        """
        record = self.registry.swap(swap_id)
        if record is None or record.state == OPEN:
            return None
        if record.state != COMMITTED or record.epoch is None:
            raise Aborted(f"swap {swap_id} was not committed: {record.message}")
        after = record.after
        if not after:  # committed by an earlier build
            versions = self.epochs().get(record.epoch, {})
            after = {id: versions[id] for id in record.plan if id in versions}
        return SwapResult(swap_id=swap_id, epoch=record.epoch, before=record.before, after=after)

    def ended(self, swap_id: str) -> dict[str, Any]:
        """What the journal says of a swap that is not under way any more. Raises NotFound."""
        record = self.registry.swap(swap_id)
        if record is None:
            raise NotFound(f"there is no swap {swap_id!r}")
        return {"swap_id": swap_id, "phase": record.state, "epoch": record.epoch, "message": record.message}

    def _result(
        self,
        swap_id: str,
        request: SwapRequest | None,
        candidates: Mapping[str, Candidate],
        receipts: Mapping[str, Receipt],
        epoch: int | None,
    ) -> SwapResult:
        return SwapResult(
            swap_id=swap_id,
            epoch=epoch or 0,
            before={id: candidate.replaces or "" for id, candidate in candidates.items()},
            after={id: receipt.version for id, receipt in receipts.items()},
            drift={id: receipt.drift for id, receipt in receipts.items()},
            unmeasured={id: receipt.unmeasured for id, receipt in receipts.items() if receipt.drift is None},
            committed=epoch is not None,
            flipped=epoch is not None,
        )

    def _write(self, request: SwapRequest, candidate: Candidate, receipt: Receipt) -> VersionRecord:
        id, version = candidate.id, receipt.version
        origin, source, move = candidate.origin, candidate.weights, candidate.uploaded
        if candidate.gate is not None:
            source, move = self.store.upload_path(f"gate-{uuid.uuid4().hex}"), True
            try:
                candidate.gate.save(source)
            except InvalidRequest:  # a live scorer has no text to be written down
                origin, source = {"live": True}, None
        ephemeral = bool(origin.get("live"))
        record = VersionRecord(
            id=id,
            version=version,
            counter=candidate.counter,
            digest=receipt.digest,
            tensor_digest=receipt.tensor_digest,
            origin=origin,
            nbytes=receipt.nbytes,
            created=self._clock(),
            parent=candidate.replaces,
            ephemeral=ephemeral,
            note=request.note or f"swap {request.swap_id}",
            declared=request.declares and id not in request.by_name,
        )
        self.store.write(id, version, source, {"record": record.to_json()}, move=move)
        if ephemeral:
            stored = self.store.weights(id, version)
            self.builder.built[id, version] = replace(candidate, weights=stored, uploaded=False)
        return record


def _tombstones(removed: Collection[str]) -> dict[str, str]:
    """What is written down as the declarations of layers that were removed by name."""
    return {id: REMOVED for id in removed if is_layer_id(id)}
