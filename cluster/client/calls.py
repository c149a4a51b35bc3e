"""The methods of both clients as flows without sockets: frames and metadata out, replies and errors in.

`Client` and `AsyncClient` both run these flows and show their docstrings. The client generates an id for each swap and
retries with the same id until an answer comes, so that the swap happens once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from ...experts.errors import (
    DataLoss,
    DeadlineExceeded,
    ExpertMeshError,
    FailedPrecondition,
    InvalidRequest,
    Unavailable,
)
from ...experts.protocol import CallOptions
from ...experts.wire import Frame
from ..rpc import health
from ..rpc.documents import NAME, decode_document, to_tensor
from ..rpc.swaps import Lease, SwapAsked, SwapOutcome, read_answer
from .arrays import to_wire
from .changing import ANSWER_SECONDS, Changing
from .reply import Reply, read_reply
from .requests import (
    around,
    call_fields,
    expert_names,
    half_dtype,
    pin_of,
    swap_request,
    with_unknown_outcome,
)
from .retry import Flow, RetryPolicy
from .routers.balance import Stay
from .upload import Progress, Upload, prepare, with_file_names

Array = TypeVar("Array")


class Calls(Changing):
    """The methods of a cluster as flows, for one token."""

    def forward(self, /, layer: str, x: Array, **options: Any) -> Flow[Array]:
        """Send rows `x` [T, ...] through a layer; return its output [T, ...], of the same array type as `x`.

        Takes the same options and raises the same errors as `call`.
        """
        reply = yield from self.call(layer, x, **options)
        output: Array = reply.output
        return output

    def call(
        self,
        layer: str,
        x: Any,
        *,
        gate_input: Any = None,
        top_k_index: Any = None,
        top_k_weights: Any = None,
        top_k: int | None = None,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] | None = None,
        on_missing: str | None = None,
        max_lost_mass: float | None = None,
        return_routing: bool = False,
        epoch: int | None = None,
        pin: Lease | str | None = None,
        raw: bool = False,
        payload_dtype: str | None = None,
        stream: bool | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Flow[Reply]:
        """Send rows `x` [T, ...] through a layer; return the output with its epoch, versions and losses.

        `x` is a numpy array, anything that numpy converts to one, or a torch tensor on the CPU or a GPU. The arrays of
        the reply have the same type and device. In numpy, bfloat16 outputs are converted to float32; `raw=True` keeps
        them as uint16 bits, and sends uint16 arrays as bfloat16.

        `gate_input` [T, ...] replaces `x` as the input of the gate. `top_k_index` [T, K] and `top_k_weights` [T, K]
        set the routing and skip the gate. `top_k`, `allow` and `deny` (ids of experts) restrict the gate's choice.
        `on_missing` ("error", "renormalize", "residual", "fallback:<expert>") and `max_lost_mass` decide what happens
        to rows whose expert gives no answer. `epoch` runs the call on the exact versions of an epoch that the cluster
        retains, such as that of an earlier reply; `pin` runs it on those of a lease.

        `payload_dtype` "float16" or "bfloat16" sends float32 rows (`x` and `gate_input`) in half the bytes, and
        converts half-precision outputs back to float32. The default is the client's setting; "float32" sends rows
        unchanged. Rows and outputs are rounded to nearest even, with a relative error of up to 2**-11 or 2**-8, so a
        gate may choose another expert where two scores are close.

        `stream=True` sends the request in chunks and accepts the reply in chunks, as a reply above `max_message_bytes`
        requires; None does so for requests above a quarter of that limit, or above 4 MiB. Do not change arrays that are
        streamed before the call ends. `timeout` is in seconds. `request_id` names the call in logs; None generates one.

        Raises InvalidRequest, NotFound, TooLarge, Overloaded, Unavailable, DeadlineExceeded, FailedPrecondition (also
        for an epoch that is no longer retained), Unauthenticated or PermissionDenied. Calls that fail with Unavailable
        have already been retried, within their timeout and the client's retry budget.
        """
        half = half_dtype(self.payload_dtype if payload_dtype is None else payload_dtype)
        rows, routing = {"x": x, "gate_input": gate_input}, {"top_k_index": top_k_index, "top_k_weights": top_k_weights}
        described = {k: to_wire(value, name=k, raw=raw, half=half) for k, value in rows.items() if value is not None}
        described |= {k: to_wire(value, name=k, raw=raw) for k, value in routing.items() if value is not None}
        if "x" not in described:
            raise InvalidRequest("x must be an array of rows, not None")
        tensor_x, kind = described["x"]
        if not tensor_x.shape:
            raise InvalidRequest("x must have a first dimension, the rows: pass a single row as x[None]")
        lease_id, route = self._to_holder(pin.pin if isinstance(pin, Lease) else pin)
        options = CallOptions(
            layer=layer,
            request_id=self.new_id() if request_id is None else request_id,
            top_k=top_k,
            allow=expert_names(allow),
            deny=expert_names(deny),
            on_missing=on_missing,
            max_lost_mass=max_lost_mass,
            return_routing=return_routing,
            epoch=epoch,
            pin=lease_id,
            **self.seen_epoch.options(),
        )
        tensors = {name: tensor for name, (tensor, _) in described.items()}
        frame = yield from self._call(call_fields(options), tensors, stream, timeout, route)
        reply = read_reply(frame, rows=tensor_x.shape[0], kind=kind)
        self.seen_epoch.note(reply.cluster, reply.epoch)
        return reply

    def status(self, *, timeout: float | None = None) -> Flow[dict[str, Any]]:
        """The state of the cluster as a JSON object: layers, experts, versions, replicas."""
        frame = yield from self._ask("Status", {}, {}, timeout, self.new_id())
        return decode_document(frame, "status")

    def drain(self, *, timeout: float | None = None) -> Flow[dict[str, Any]]:
        """Make all routers finish accepted calls and refuse new ones; returns the status. For operators."""
        answers = yield from self._ask_each("Drain", {}, timeout, every=True)
        return decode_document(answers[-1][1], "status")

    def health(self, service: str = "", *, timeout: float | None = None) -> Flow[str]:
        """The health of a service, without retries: "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN" or "UNKNOWN".

        Raises Unavailable if the server cannot be reached.
        """
        request = health.encode_request(service)
        once = replace(self.retries, policy=RetryPolicy(attempts=1))
        answer = yield from self._send(once, health.CHECK, request, timeout, self.new_id())
        if isinstance(answer, Frame):
            raise DataLoss("the health reply is a frame")
        try:
            return health.decode_response(bytes(answer)).name
        except InvalidRequest as error:
            raise DataLoss(f"the health reply cannot be read: {error}") from None

    def swap(
        self,
        changes: Mapping[str, str | os.PathLike[str] | Mapping[str, Any]],
        *,
        expect: Mapping[str, str] | None = None,
        mode: str = "double",
        max_drift: float | None = None,
        allow_norm: bool = False,
        allow_unverified: bool = False,
        timeout: float = 60.0,
        dry_run: bool = False,
        swap_id: str | None = None,
        progress: Progress | None = None,
        adopts: Mapping[str, str] | None = None,
    ) -> Flow[SwapOutcome]:
        """Replace the weights of experts and gates with those of local safetensors files, all of them or none.

        `changes` maps ids to files: {"news/e3": "e3_v2.safetensors", "news/gate": "gate.safetensors"}. Every replica
        loads and verifies the new version beside the old one before the commit; requests in flight keep the old one.
        Returns once the new versions are durable and every router serves them.

        Instead of a file, {"factory": "mine:Expert", "args": [...], "kwargs": {...}, "weights": file, "framework":
        "numpy"} creates an expert with other code for the same rows; all keys but `factory` are optional. This requires
        the admin role, and a factory listed in `allowed_factories` of the cluster.

        `expect` names the versions that must be current. `mode` "double" holds old and new on the device at once,
        "staged_cpu" keeps the new one in main memory until the commit. `max_drift` bounds the relative L2 distance
        between old and new outputs on probe rows; `allow_norm` accepts weights of a very different magnitude, and
        `allow_unverified` other code that cannot be tried, because no rows were declared or served. `timeout` bounds
        the staging, in seconds. `dry_run` does everything but the commit. Repeating a `swap_id` returns the outcome of
        the first swap. `progress(id, sent, total)` is called as uploads proceed. `adopts` are the digests of the
        declarations that the changes carry out, by id, as in `declared()`: they are then what is declared.

        Raises NotFound for an id or file, DataLoss, InvalidRequest or FailedPrecondition for a bad file, TooLarge,
        Aborted if a concurrent change came first, or DeadlineExceeded. The old versions then continue to serve, unless
        the message says that the outcome is unknown.
        """
        if not isinstance(changes, Mapping) or not changes:
            raise InvalidRequest('say what to swap, as in swap({"news/e3": "e3_v2.safetensors"})')
        requested: dict[str, dict[str, Any]] = {}
        uploads: dict[str, Upload] = {}
        for id, change in changes.items():
            requested[id] = dict(change) if isinstance(change, Mapping) else {"weights": change}
            if "weights" in requested[id]:
                uploads[id] = yield from prepare(id, requested[id].pop("weights"))
                requested[id] |= {"upload": uploads[id].upload_id, "sha256": uploads[id].sha256}
        policy: dict[str, Any] = {"allow_norm": allow_norm} | ({"allow_unverified": True} if allow_unverified else {})
        if max_drift is not None:
            policy["max_drift"] = max_drift
        request = swap_request(requested, expect, policy, mode, timeout, dry_run, swap_id, adopts)
        one = replace(self, stay=Stay())  # a router hashes uploads as they come
        try:
            for id, upload in uploads.items():
                yield from upload.send(id, one._send_chunk, self.max_message_bytes, progress)
            return (yield from one._swap(request))
        except ExpertMeshError as error:
            raise with_file_names(error, uploads.values()) from None

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
        """Restore earlier versions of experts and gates with one swap, all of them or none.

        `to` names the version, or maps each id to its version; the default is the version before the current one in
        the history. `expect` names the versions that must be current; the default is those in the history.

        Raises NotFound, FailedPrecondition if no earlier version is retained, and the errors of `swap`.
        """
        if not ids or (isinstance(to, str) and len(ids) > 1):
            raise InvalidRequest('say what to roll back, as in rollback("news/e3"); for several ids, `to` is a map')
        targets = {ids[0]: to} if isinstance(to, str) else dict(to or {})
        if not targets.keys() <= set(ids):
            raise InvalidRequest(f"`to` names an id that is not rolled back: {sorted(targets.keys() - set(ids))[0]}")
        current: dict[str, str] = {}
        for id in ids:
            history = yield from self.history(id)
            current[id], before = around(id, history)
            targets.setdefault(id, before or "")
            if not targets[id]:
                raise FailedPrecondition(f"{id} has no version before {current[id]} in its history")
        requested = {id: {"version": version} for id, version in targets.items()}
        wanted = current if expect is None else expect
        request = swap_request(requested, wanted, {"allow_norm": True}, mode, timeout, dry_run, swap_id)
        return (yield from self._swap(request))

    def history(self, id: str, *, timeout: float | None = None) -> Flow[list[dict[str, Any]]]:
        """The versions of an expert or gate that are history, oldest first; "current" marks the one that serves.

        Each tells its version, parent, note, nbytes, when it was created (seconds since 1970), and the epochs that name
        it. Raises NotFound.
        """
        frame = yield from self._ask("History", {"id": id}, {}, timeout, self.new_id())
        versions = decode_document(frame, "history").get("versions")
        if not isinstance(versions, list) or not all(isinstance(item, dict) for item in versions):
            raise DataLoss("the history in the reply is not a list of versions")
        return versions

    def swap_progress(self, swap_id: str, *, timeout: float | None = None) -> Flow[dict[str, Any]]:
        """The progress of a swap: "phase", and while staging the "receipts" so far and "needed". Raises NotFound."""
        frame = yield from self._ask("SwapProgress", {"swap_id": swap_id}, {}, timeout, self.new_id())
        return decode_document(frame, "progress")

    def lease(self, ttl: float = 30.0) -> Flow[Lease]:
        """Lease the current epoch."""
        route = self.routers.route()
        frame = yield from self._ask("Pin", {"ttl": ttl}, {}, None, self.new_id(), route)
        lease = read_answer(Lease, decode_document(frame, "lease"))
        self.seen_epoch.note(lease.cluster, lease.epoch)
        return replace(lease, pin=pin_of(lease.pin, route.tried[-1].address if route.tried else ""))

    def give_back(self, lease: Lease) -> Flow[None]:
        """End a lease; a lease that has already ended is not an error."""
        yield from self.end_lease(lease.pin)

    def leases(self, *, timeout: float | None = None) -> Flow[list[dict[str, Any]]]:
        """All leases on epochs, of every caller. For operators, who may end one that holds up a swap: `end_lease`.

        Each tells its "pin", "epoch", "holder" (an id of the token), and in seconds its "age" and when it "ends_in".
        """
        found: list[dict[str, Any]] = []
        for address, frame in (yield from self._ask_each("Leases", {}, timeout)):
            leases = decode_document(frame, "leases").get("leases")
            if not isinstance(leases, list) or not all(isinstance(item, dict) for item in leases):
                raise DataLoss("the reply is not a list of leases")
            found += [item | {"pin": pin_of(str(item.get("pin")), address)} for item in leases]
        return found

    def end_lease(self, pin: str, *, timeout: float | None = None) -> Flow[None]:
        """End a lease by its id, as in `leases()`; one that has already ended is not an error."""
        lease_id, route = self._to_holder(pin)
        if lease_id == pin:  # it names no router
            yield from self._ask_each("Unpin", {"pin": pin}, timeout)
        else:
            yield from self._ask("Unpin", {"pin": lease_id}, {}, timeout, self.new_id(), route)

    def _swap(self, request: SwapAsked) -> Flow[SwapOutcome]:
        """Request a swap and retry until there is an answer; repeated requests with its id do not repeat the swap."""
        with_code = any(change.get("factory") is not None for change in request.changes.values())
        patient = replace(self._patient(), tokens={} if with_code else self.tokens)
        document = to_tensor(asdict(request))
        try:
            seconds = request.timeout + ANSWER_SECONDS
            frame = yield from patient._ask("Swap", {}, {NAME: document}, seconds, self.new_id())
        except (Unavailable, DeadlineExceeded) as error:
            raise with_unknown_outcome(error, request.swap_id) from None
        outcome = SwapOutcome.from_document(decode_document(frame, "swap"))
        if outcome.committed:
            self.seen_epoch.note(outcome.cluster, outcome.epoch)
        return outcome
