"""How a client swaps, rolls back, and leases epochs, as flows without sockets: files are read and sent in chunks.

A swap has an id that the client draws, and is asked for with the same id until an answer comes: it happens once.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...experts.errors import (
    DataLoss,
    DeadlineExceeded,
    ExpertMeshError,
    FailedPrecondition,
    InvalidRequest,
    Unavailable,
)
from ...experts.protocol import from_mapping
from ...experts.wire import WireTensor
from ..rpc.documents import NAME, decode_document, to_tensor
from ..rpc.swaps import CHUNK_BYTES, DATA, Lease, SwapAsked, SwapOutcome, UploadState, read_answer
from .calls import Calls
from .retry import Flow, RetryBudget, RetryPolicy, Work
from .upload_file import LocalFile

Progress = Callable[[str, int, int], None]
"""Is told how an upload gets on: the id that it is for, the bytes that have arrived, and all there are."""

ANSWER_SECONDS = 15.0
"""How much longer than its staging a swap may take, to be committed and adopted by all routers."""

FRAME_BYTES = 4096
STALLS = 5
PATIENT = RetryPolicy(attempts=1000, first_pause=0.2, longest_pause=2.0)


@dataclass(frozen=True)
class _Sent:
    """A file that is sent, under the id of its upload."""

    upload_id: str
    file: LocalFile
    total: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SwapCalls(Calls):
    """The methods that change versions, tell of them, or lease epochs."""

    def swap(
        self,
        changes: Mapping[str, str | os.PathLike[str] | Mapping[str, Any]],
        *,
        expect: Mapping[str, str] | None = None,
        mode: str = "double",
        max_drift: float | None = None,
        allow_norm: bool = False,
        timeout: float = 60.0,
        dry_run: bool = False,
        swap_id: str | None = None,
        progress: Progress | None = None,
    ) -> Flow[SwapOutcome]:
        """Replace the weights of experts and gates by those of safetensors files here, all at once or none of them.

        `changes` maps ids to files: {"news/e3": "e3_v2.safetensors", "news/gate": "gate.safetensors"}. Every replica
        loads and verifies the new version beside the old one before it is committed; requests under way keep theirs.
        Returns once it is durable and every router serves it.

        In the place of a file, {"factory": "mine:Expert", "args": [...], "kwargs": {...}, "weights": file} makes an
        expert of other code for the same rows; what is not needed is left out. That takes an admin, and a factory that
        `allowed_factories` of the cluster names.

        `expect` names the versions that must be current. `mode` "double" holds old and new on the device at once,
        "staged_cpu" keeps the new one in main memory until the commit. `max_drift` bounds how far the answers to probe
        rows may move, as relative L2 distance; `allow_norm` lets weights be of another magnitude. `timeout` bounds the
        staging, in seconds. With `dry_run` all is done but the commit. The same `swap_id` again gives the same
        outcome. `progress(id, sent, total)` is told of the uploads.

        Raises NotFound for an id or file, DataLoss, InvalidRequest or FailedPrecondition for what is wrong with a file,
        TooLarge, Aborted where another change was faster, DeadlineExceeded; the old versions then serve on, unless
        the message says that the outcome is open.
        """
        if not isinstance(changes, Mapping) or not changes:
            raise InvalidRequest('say what to swap, as in swap({"news/e3": "e3_v2.safetensors"})')
        asked: dict[str, dict[str, Any]] = {}
        sent: dict[str, _Sent] = {}
        for id, change in changes.items():
            asked[id] = dict(change) if isinstance(change, Mapping) else {"weights": change}
            if "weights" in asked[id]:
                sent[id] = yield from _described(id, asked[id].pop("weights"))
                asked[id] |= {"upload": sent[id].upload_id, "sha256": sent[id].sha256}
        policy: dict[str, Any] = {"allow_norm": allow_norm}
        if max_drift is not None:
            policy["max_drift"] = max_drift
        request = _request(asked, expect, policy, mode, timeout, dry_run, swap_id)
        try:
            for id, file in sent.items():
                yield from self._upload(id, file, progress)
            return (yield from self._swap(request))
        except ExpertMeshError as error:
            raise _with_names(error, sent.values()) from None

    def rollback(
        self,
        *ids: str,
        to: str | Mapping[str, str] | None = None,
        expect: Mapping[str, str] | None = None,
        mode: str = "double",
        timeout: float = 60.0,
        dry_run: bool = False,
        swap_id: str | None = None,
    ) -> Flow[SwapOutcome]:
        """Bring earlier versions of experts and gates back, all at once: a swap like any other.

        `to` names the version, or the version of each id; by default each gets the one before its current one in its
        history. `expect` names the versions that must be current; by default those that the history showed.

        Raises NotFound, FailedPrecondition where no earlier version is kept, and what `swap` raises.
        """
        if not ids or (isinstance(to, str) and len(ids) > 1):
            raise InvalidRequest('name what to roll back, as in rollback("news/e3"); for several ids `to` is a map')
        given = {ids[0]: to} if isinstance(to, str) else dict(to or {})
        if not given.keys() <= set(ids):
            raise InvalidRequest(f"`to` names ids that are not rolled back: {sorted(given.keys() - set(ids))[0]}")
        current: dict[str, str] = {}
        for id in ids:
            kept = yield from self.history(id)
            current[id], before = _around(id, kept)
            given.setdefault(id, before or "")
            if not given[id]:
                raise FailedPrecondition(f"{id} has no version before {current[id]} that is kept: see its history")
        asked = {id: {"version": version} for id, version in given.items()}
        wanted = current if expect is None else expect
        request = _request(asked, wanted, {"allow_norm": True}, mode, timeout, dry_run, swap_id)
        return (yield from self._swap(request))

    def history(self, id: str, *, timeout: float | None = None) -> Flow[list[dict[str, Any]]]:
        """The versions of an expert or gate that are kept, oldest first; "current" marks the one that serves.

        Each tells its version, parent, note, nbytes, when it was created (seconds since 1970), and the epochs that name
        it. Raises NotFound.
        """
        frame = yield from self._ask("History", {"id": id}, {}, timeout, self.new_id())
        versions = decode_document(frame, "history").get("versions")
        if not isinstance(versions, list) or not all(isinstance(item, dict) for item in versions):
            raise DataLoss("the history in the reply is not a list of versions")
        return versions

    def swap_progress(self, swap_id: str, *, timeout: float | None = None) -> Flow[dict[str, Any]]:
        """How far a swap is: "phase", and while it is staged "receipts" there and "needed". Raises NotFound."""
        frame = yield from self._ask("SwapProgress", {"swap_id": swap_id}, {}, timeout, self.new_id())
        return decode_document(frame, "progress")

    def lease(self, ttl: float = 30.0) -> Flow[Lease]:
        """Lease the current epoch."""
        frame = yield from self._ask("Pin", {"ttl": ttl}, {}, None, self.new_id())
        lease = read_answer(Lease, decode_document(frame, "lease"))
        self.seen_epoch.note(lease.cluster, lease.epoch)
        return lease

    def give_back(self, lease: Lease) -> Flow[None]:
        """End a lease; one that is over is no error."""
        yield from self._ask("Unpin", {"pin": lease.pin}, {}, None, self.new_id())

    def _swap(self, request: SwapAsked) -> Flow[SwapOutcome]:
        """Ask for a swap until there is an answer; it happens once, however often it is asked for."""
        retries = replace(self.retries, policy=PATIENT, budget=RetryBudget(ratio=0.0, reserve=float(PATIENT.attempts)))
        patient = replace(self, retries=retries)
        document = to_tensor(asdict(request))
        try:
            seconds = request.timeout + ANSWER_SECONDS
            frame = yield from patient._ask("Swap", {}, {NAME: document}, seconds, self.new_id())
        except (Unavailable, DeadlineExceeded) as error:
            raise _open_ended(error, request.swap_id) from None
        outcome = SwapOutcome.from_document(decode_document(frame, "swap"))
        if outcome.committed:
            self.seen_epoch.note(outcome.cluster, outcome.epoch)
        return outcome

    def _upload(self, id: str, sent: _Sent, progress: Progress | None) -> Flow[None]:
        """Send a file chunk by chunk, from where the server says; chunks that were sent twice do no harm."""
        offset, stalls = 0, 0
        while True:
            state = yield from self._send_chunk(sent, offset)
            if progress is not None:
                progress(id, state.next, sent.total)
            if state.done:
                return
            stalls = 0 if state.next > offset else stalls + 1
            if stalls > STALLS or not 0 <= state.next <= sent.total:
                raise Unavailable(f"the upload of {sent.file.path.name} does not get on: try again in a moment")
            offset = state.next

    def _send_chunk(self, sent: _Sent, offset: int) -> Flow[UploadState]:
        size = max(0, min(CHUNK_BYTES, self.max_message_bytes - FRAME_BYTES, sent.total - offset))
        data = yield from _worked(partial(sent.file.read, offset, size))
        last = offset + size == sent.total
        meta = {"upload_id": sent.upload_id, "offset": offset, "total": sent.total, "sha256": sent.sha256, "last": last}
        tensors = {DATA: WireTensor("uint8", (size,), data)}
        frame = yield from self._ask("Upload", meta, tensors, None, self.new_id())
        return read_answer(UploadState, decode_document(frame, "uploaded"))


def _described(id: str, given: Any) -> Flow[_Sent]:
    """A file that is to be sent for an id."""
    if not isinstance(given, (str, os.PathLike)):
        raise InvalidRequest(f"{id} becomes what a safetensors file holds: give its path, not {given!r}")
    file = LocalFile(Path(given))
    total = file.size()
    sha256 = yield from _worked(file.sha256)
    return _Sent(uuid.uuid4().hex, file, total, sha256.hex())


def _request(
    changes: dict[str, dict[str, Any]],
    expect: Mapping[str, str] | None,
    policy: dict[str, Any],
    mode: str,
    timeout: float,
    dry_run: bool,
    swap_id: str | None,
) -> SwapAsked:
    """The request for a swap, checked here as the server will check it."""
    fields = {
        "swap_id": uuid.uuid4().hex if swap_id is None else swap_id, "changes": changes, "expect": dict(expect or {}),
        "policy": policy, "mode": mode, "timeout": timeout, "dry_run": dry_run,
    }  # fmt: skip
    request = from_mapping(SwapAsked, fields)
    request.read_changes()
    try:
        to_tensor(asdict(request))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the swap holds what cannot be sent: {error}") from None
    return request


def _worked(action: Callable[[], bytes]) -> Flow[bytes]:
    """What a piece of work returns."""
    answer = yield Work(action)
    if not isinstance(answer, bytes):
        raise ExpertMeshError("a piece of work was answered with nothing")
    return answer


def _around(id: str, kept: list[dict[str, Any]]) -> tuple[str, str | None]:
    """The current version of a history, and the one before it."""
    versions = [str(item.get("version")) for item in kept]
    places = [place for place, item in enumerate(kept) if item.get("current")]
    if not places:
        raise FailedPrecondition(f"{id} has no current version: is the cluster still starting?")
    return versions[places[0]], versions[places[0] - 1] if places[0] else None


def _with_names(error: ExpertMeshError, files: Iterable[_Sent]) -> ExpertMeshError:
    """The error with the names of files in place of the ids of their uploads, which say nothing to anybody."""
    for sent in files:
        error.message = error.message.replace(sent.upload_id, sent.file.path.name)
    error.args = (error.message,)
    return error


def _open_ended(error: ExpertMeshError, swap_id: str) -> ExpertMeshError:
    """The error of a swap that may yet happen, or has."""
    error.message += f"; the outcome of swap {swap_id} may be open: ask again with swap_id={swap_id!r}"
    error.args = (error.message,)
    return error
