"""The server side of swaps, uploads, histories and leases: frames in, frames out. No gRPC here.

Every field of a frame is checked before the request is passed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from ...experts.errors import (
    ConfigError,
    ExpertMeshError,
    InvalidRequest,
    PermissionDenied,
    RouterUnavailable,
    Unavailable,
)
from ...experts.protocol import from_mapping
from ...experts.spec import Expert
from ...experts.staging.verify import Policy
from ...experts.wire import Frame
from ...router.epochs.epochs import Epochs
from ...router.epochs.leases import Leases
from ..control.messages import Change, SwapRequest, SwapResult
from ..control.ports import ControlPort
from ..rpc.documents import encode_document
from ..rpc.methods import Role
from ..rpc.swaps import (
    DATA,
    MODES,
    ChangeAsked,
    HistoryAsked,
    Lease,
    NothingAsked,
    PinAsked,
    ProgressAsked,
    SwapAsked,
    SwapOutcome,
    UnpinAsked,
    UploadChunk,
    is_upload_id,
)
from ..state.records import check_id, check_swap_id, check_version
from ..state.uploads import Uploads
from .authorise import Caller
from .records import document_of, record_of

FrameHandler = Callable[[Frame, Caller], Awaitable[bytes]]
Call = Callable[..., Awaitable[Any]]
"""Calls a function in another thread: `await call(function, *arguments)`."""


class SwapMethods:
    """Answers the methods that change or list what is served, or lease epochs.

    `call` runs a function in the router's thread, `busy` returns whether the router is serving requests. `uploads` is
    None where the state folder is on another machine.
    `allowed_factories` are the factories that an admin may name over the network.
    """

    def __init__(
        self,
        control: ControlPort,
        uploads: Uploads | None,
        epochs: Epochs,
        leases: Leases,
        call: Call,
        allowed_factories: Collection[str] = (),
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._control = control
        self._uploads = uploads
        self._epochs = epochs
        self._leases = leases
        self._call = call
        self._allowed = frozenset(allowed_factories)
        self._busy = busy
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="uploads")
        self._swaps: set[asyncio.Future[SwapResult]] = set()

    def handlers(self) -> dict[str, FrameHandler]:
        """The handler of each method."""
        return {
            "Upload": self.upload,
            "Swap": self.swap,
            "SwapProgress": self.progress,
            "History": self.history,
            "Pin": self.pin,
            "Unpin": self.unpin,
            "Leases": self.leases,
        }

    def tidy(self) -> None:
        """Drop abandoned uploads, from time to time."""
        if self._uploads is not None and self._uploads.is_untidy():
            asyncio.get_running_loop().run_in_executor(self._disk, self._uploads.tidy)

    def close(self) -> None:
        """Stop the thread that writes uploads."""
        self._disk.shutdown(wait=False, cancel_futures=True)

    async def upload(self, frame: Frame, caller: Caller) -> bytes:
        """Write a chunk of an upload; while requests are served, delay the answer to throttle the client."""
        uploads = self._uploads
        if uploads is None:
            raise RouterUnavailable("this router is not where the cluster's state is: upload through another one")
        chunk = record_of(UploadChunk, frame, "upload", tensors=(DATA,))
        tensor = frame.tensors[DATA]
        if tensor.dtype != "uint8" or len(tensor.shape) != 1:
            raise InvalidRequest("a chunk must be a one-dimensional tensor `data` of dtype uint8")
        loop = asyncio.get_running_loop()
        state = await loop.run_in_executor(self._disk, uploads.write, chunk, tensor.data)
        if self._busy():
            await asyncio.sleep(len(tensor.data) / uploads.limits.upload_rate)
        return encode_document("uploaded", asdict(state))

    async def swap(self, frame: Frame, caller: Caller) -> bytes:
        """Run a swap. It continues if its caller disconnects; a retry with the same swap id returns its outcome."""
        asked = from_mapping(SwapAsked, document_of(frame, "swap"))
        try:
            request = swap_request(asked, caller.role, self._allowed)
        except ExpertMeshError:
            await self.drop_uploads(change.get("upload") for change in asked.changes.values())
            raise
        work = asyncio.ensure_future(self._carry_out(request))
        self._swaps.add(work)
        work.add_done_callback(self._finished)
        result = await asyncio.shield(work)
        outcome = SwapOutcome(**vars(result) | {"pending": list(result.pending), "cluster": self._cluster()})
        return encode_document("swap", outcome.to_document())

    async def progress(self, frame: Frame, caller: Caller) -> bytes:
        """The progress of a swap."""
        asked = record_of(ProgressAsked, frame, "swapprogress")
        check_swap_id(asked.swap_id)
        return encode_document("progress", await self._control.progress(asked.swap_id))

    async def history(self, frame: Frame, caller: Caller) -> bytes:
        """The retained versions of an id."""
        asked = record_of(HistoryAsked, frame, "history")
        check_id(asked.id)
        return encode_document("history", {"id": asked.id, "versions": await self._control.history(asked.id)})

    async def pin(self, frame: Frame, caller: Caller) -> bytes:
        """Lease the current epoch."""
        asked = record_of(PinAsked, frame, "pin")
        lease_id, epoch, ttl = await self._call(self._leases.lease, asked.ttl, caller.id)
        lease = Lease(pin=lease_id, epoch=epoch.number, ttl=ttl, cluster=epoch.cluster)
        return encode_document("lease", asdict(lease))

    async def unpin(self, frame: Frame, caller: Caller) -> bytes:
        """End a lease; a lease that has already ended is not an error."""
        asked = record_of(UnpinAsked, frame, "unpin")
        return encode_document("unpinned", {"was_held": await self._call(self._leases.give_back, asked.pin)})

    async def leases(self, frame: Frame, caller: Caller) -> bytes:
        """All leases, so that an operator can end those that are in the way."""
        record_of(NothingAsked, frame, "leases")
        return encode_document("leases", {"leases": await self._call(self._leases.documents)})

    async def _carry_out(self, request: SwapRequest) -> SwapResult:
        try:
            result = await self._control.swap(request)
        except Unavailable:  # the client may retry with the same uploads
            raise
        except ExpertMeshError:
            await self.drop_uploads(change.upload for change in request.changes.values())
            raise
        # A commit has moved the uploads; those of a dry run remain.
        await self.drop_uploads(change.upload for change in request.changes.values())
        return result

    async def drop_uploads(self, uploads: Iterable[Any]) -> None:
        """Drop uploads by their ids, if they exist."""
        loop = asyncio.get_running_loop()
        for upload_id in uploads:
            if self._uploads is not None and is_upload_id(upload_id):
                await loop.run_in_executor(self._disk, self._uploads.discard, upload_id)

    def _finished(self, work: asyncio.Future[SwapResult]) -> None:
        self._swaps.discard(work)
        if not work.cancelled():
            work.exception()  # the caller may have disconnected: retrieve the error so that asyncio does not log it

    def _cluster(self) -> str:
        return self._epochs.current.cluster if self._epochs.number else ""


def swap_request(asked: SwapAsked, role: Role, allowed_factories: Collection[str] = ()) -> SwapRequest:
    """The controller's request for a swap. Raises InvalidRequest, or PermissionDenied for a factory."""
    check_swap_id(asked.swap_id)
    changes = asked.read_changes()
    for id in (*changes, *asked.expect):
        check_id(id)
    named = {id: change.version for id, change in changes.items() if change.version is not None}
    for id, version in (*asked.expect.items(), *named.items()):
        check_version(id, version)
    if asked.mode not in MODES:
        raise InvalidRequest(f"mode must be one of {', '.join(MODES)}, not {asked.mode[:64]!r}")
    return SwapRequest(
        swap_id=asked.swap_id,
        changes={id: _change(id, change, role, allowed_factories) for id, change in changes.items()},
        expect=asked.expect,
        policy=from_mapping(Policy, asked.policy),
        mode=asked.mode,
        timeout=float(asked.timeout),
        dry_run=asked.dry_run,
        adopts=asked.adopts,
    )


def _change(id: str, asked: ChangeAsked, role: Role, allowed_factories: Collection[str]) -> Change:
    expert = None
    if asked.factory is not None:
        check_factory(id, asked.factory, role, allowed_factories)
        try:
            expert = Expert(asked.factory, args=tuple(asked.args), kwargs=asked.kwargs, framework=asked.framework)
        except ConfigError as error:
            raise InvalidRequest(f"{id}: {error.message}") from None
    return Change(upload=asked.upload, sha256=asked.sha256, version=asked.version, expert=expert)


def check_factory(id: str, factory: str, role: Role, allowed_factories: Collection[str]) -> None:
    """Check that a caller may name a factory. Raises PermissionDenied."""
    if role < Role.ADMIN:
        raise PermissionDenied(f"{id}: another factory needs the role admin, but this token has {role.label}")
    if factory not in allowed_factories:
        raise PermissionDenied(
            f"{id}: {factory[:64]!r} is not in allowed_factories of the cluster: add it, then restart"
        )
