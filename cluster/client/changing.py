"""The flows that change what a cluster declares: numbers of replicas, experts and layers that come and go."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ...experts.errors import DeadlineExceeded, ExpertMeshError, InvalidRequest, Unavailable
from ...experts.wire import Frame, WireTensor
from ..rpc.changes import LayersAsked, ScaleAsked, read_expert
from ..rpc.documents import MAX_DEPTH, NAME, decode_document, is_deep, to_tensor
from .requests import check_timeout, scale_asked, with_unknown_outcome
from .retry import Flow, RetryBudget, RetryPolicy
from .routers.balance import Stay
from .sending import Sending
from .upload import Progress, Upload, prepare, with_file_names

ANSWER_SECONDS = 15.0
"""Seconds beyond its staging timeout that a swap may take to be committed and adopted by all routers."""

CHANGE_SECONDS = 60.0
"""Seconds beyond its timeout that a change of layers may take until it is known what became of it."""

PATIENT = RetryPolicy(attempts=1000, first_pause=0.2, longest_pause=2.0)
Self = TypeVar("Self", bound="Changing")


class Changing(Sending):
    """The flows of an operator, and of an admin, for one token."""

    def declared(self, *, timeout: float | None = None) -> Flow[dict[str, Any]]:
        """What the cluster declares, as maps by section: layers, gates, experts, their places and replicas, settings.

        It is what `expertmesh apply` compares with a file. Needs the role operator.
        """
        frame = yield from self._ask("Declared", {}, {}, timeout, self.new_id())
        return decode_document(frame, "declared")

    def scale(
        self,
        what: str | Mapping[str, int],
        replicas: int | None = None,
        *,
        timeout: float = 120.0,
        change_id: str | None = None,
    ) -> Flow[dict[str, dict[str, int]]]:
        """Give an expert or pack ("news/e3"), or several ({"news/e3": 4}), other numbers of replicas, all or none.

        New replicas are chosen once they hold what serves, and replicas are ended once they have answered all that they
        got. Returns then, with the number "before" and "after" by expert or pack: an expert of a pack stands for the
        pack. The numbers are kept for the next start. No version changes. Repeating a `change_id` returns the outcome
        of the first change. `timeout` bounds the change, in seconds. Needs the role operator.

        Raises NotFound, InvalidRequest, ConfigError where no node has room, and Unavailable where replicas are not
        ready in time or the process that owns the cluster does not answer; then all is as before.
        """
        asked = ScaleAsked(
            change_id=uuid.uuid4().hex if change_id is None else change_id,
            replicas=scale_asked(what, replicas),
            timeout=timeout,
        )
        patient = self._patient()
        seconds = check_timeout(timeout) + ANSWER_SECONDS
        try:
            frame = yield from patient._ask("Scale", {}, {NAME: to_tensor(asdict(asked))}, seconds, self.new_id())
        except (Unavailable, DeadlineExceeded) as error:
            raise with_unknown_outcome(error, asked.change_id, "change") from None
        return decode_document(frame, "scale")

    def add_expert(
        self,
        /,
        expert_id: str,
        factory: str,
        *,
        gate: object = None,
        shared: bool = False,
        timeout: float = 120.0,
        change_id: str | None = None,
        allow_unverified: bool = False,
        progress: Progress | None = None,
        **expert: Any,
    ) -> Flow[dict[str, Any]]:
        """Add an expert ("news/e8") to a layer, with the layer's new gate, in one epoch, under traffic.

        `gate` is a file that `Gate.save` wrote, or an object with such a method; a `shared` expert needs none. The
        expert is the last one of the gate. `expert` are further fields of `Expert`: args, kwargs, weights (a local
        safetensors file), framework, input and output as ([16], "float32"), replicas, pack, num_cpus, num_gpus,
        resources, autoscale as {"max": 4}. The factory must be in `allowed_factories` of the cluster.

        Returns the new "epoch", by layer the names of its experts "before" and "after", and the "versions" of what is
        new. The change is kept for the next start. `timeout`, `change_id` and `progress` are as in `scale` and `swap`.
        Needs the role admin.

        Raises InvalidRequest for a gate that does not pick among as many experts, or an expert that is there already,
        NotFound, PermissionDenied, ConfigError where no node has room, FailedPrecondition for an expert that cannot be
        tried unless `allow_unverified`, and what is wrong with the expert; then all is as before.
        """
        layer, _, name = expert_id.partition("/")
        comes = {name: {"factory": factory, **expert}}
        edit = {"shared": comes} if shared else {"experts": comes, "gate": gate}
        options = _options(timeout, change_id, allow_unverified, progress)
        return (yield from self.change_layers({layer: edit}, **options))

    def remove_expert(
        self,
        /,
        expert_id: str,
        *,
        gate: object = None,
        timeout: float = 120.0,
        change_id: str | None = None,
        progress: Progress | None = None,
    ) -> Flow[dict[str, Any]]:
        """Remove an expert from a layer, with the layer's new gate, in one epoch, under traffic.

        Requests that have begun are answered by it, and leases keep it. Returns and raises as `add_expert`.
        """
        layer, _, name = expert_id.partition("/")
        edit = {"remove": [name], "gate": gate}
        options = _options(timeout, change_id, False, progress)
        return (yield from self.change_layers({layer: edit}, **options))

    def add_layer(
        self,
        /,
        layer: str,
        experts: Mapping[str, Mapping[str, Any]],
        gate: object,
        *,
        shared: Mapping[str, Mapping[str, Any]] | None = None,
        timeout: float = 120.0,
        change_id: str | None = None,
        allow_unverified: bool = False,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Flow[dict[str, Any]]:
        """Add a layer, under traffic: {"e0": {"factory": "mine:make", "weights": "e0.safetensors"}, ...} and its gate.

        `settings` are combine, on_missing, max_lost_mass, on_dropped, capacity as {"factor": 1.25}, and input as
        ([16], "float32"). Returns and raises as `add_expert`.
        """
        edit = {"kind": "add", "experts": experts, "shared": shared or {}, "gate": gate, "settings": settings}
        options = _options(timeout, change_id, allow_unverified, progress)
        return (yield from self.change_layers({layer: edit}, **options))

    def remove_layer(self, layer: str, *, timeout: float = 120.0, change_id: str | None = None) -> Flow[dict[str, Any]]:
        """Remove a layer, under traffic; it must not be the last one. Returns and raises as `add_expert`."""
        return (yield from self.change_layers({layer: {"kind": "remove"}}, timeout=timeout, change_id=change_id))

    def change_layers(
        self,
        layers: Mapping[str, Mapping[str, Any]],
        *,
        timeout: float = 120.0,
        change_id: str | None = None,
        allow_unverified: bool = False,
        progress: Progress | None = None,
        adopts: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> Flow[dict[str, Any]]:
        """Change layers, by name, in one epoch: all of them or none.

        Each is a map of: "kind" ("add", "remove", or "change", the default), "experts" and "shared" that come, as in
        `add_layer`, the names to "remove", the "order" of all routed experts afterwards, the "gate", "settings", and
        rules of "autoscale" by expert or pack, None to have none. `adopts` are the digests of the declarations that are
        carried out, by id, as in `declared()`. `versions` are those of experts and gates that come back, by id, as far
        as they are kept: a gate among them needs no file. Returns and raises as `add_expert`.
        """
        if not isinstance(layers, Mapping) or not layers or not all(isinstance(v, Mapping) for v in layers.values()):
            raise InvalidRequest('say what to change, as in change_layers({"news": {"remove": ["e3"], "gate": gate}})')
        with ExitStack() as stack:
            files = _Files(stack)
            named = {}
            for name, edit in layers.items():
                named[name] = yield from files.of_layer(name, edit)
            asked = LayersAsked(
                change_id=uuid.uuid4().hex if change_id is None else change_id,
                layers=named,
                adopts=dict(adopts or {}),
                versions=dict(versions or {}),
                timeout=check_timeout(timeout),
                allow_unverified=allow_unverified,
            )
            document = _document(asked)
            one = replace(self, stay=Stay())  # a router hashes uploads as they come
            try:
                for id, upload in files.uploads.items():
                    yield from upload.send(id, one._send_chunk, self.max_message_bytes, progress)
                return (yield from one._change(asked, document))
            except ExpertMeshError as error:
                raise with_file_names(error, files.uploads.values()) from None

    def _change(self, asked: LayersAsked, document: WireTensor) -> Flow[dict[str, Any]]:
        """Ask for a change until there is an answer; asking again with its id does not repeat it."""
        patient = self._patient()
        try:
            frame = yield from patient._ask(
                "Change", {}, {NAME: document}, asked.timeout + CHANGE_SECONDS, self.new_id()
            )
        except (Unavailable, DeadlineExceeded) as error:
            raise with_unknown_outcome(error, asked.change_id, "change") from None
        return decode_document(frame, "change")

    def _patient(self: Self) -> Self:
        """The same calls, repeated until there is an answer."""
        reserve = RetryBudget(ratio=0.0, reserve=float(PATIENT.attempts))
        return replace(self, retries=replace(self.retries, policy=PATIENT, budget=reserve))

    def _send_chunk(self, fields: dict[str, Any], tensors: dict[str, WireTensor]) -> Flow[Frame]:
        return (yield from self._ask("Upload", fields, tensors, None, self.new_id()))


@dataclass
class _Files:
    """The files of a change, to be uploaded; what has no file yet is saved to a folder that `stack` removes."""

    stack: ExitStack
    uploads: dict[str, Upload] = field(default_factory=dict)

    def of_layer(self, name: str, edit: Mapping[str, Any]) -> Flow[dict[str, Any]]:
        """The edit of a layer, with uploads in place of files, in plain JSON."""
        plain = {key: value for key, value in edit.items() if value is not None}
        for group in ("experts", "shared"):
            comes = plain.get(group, {})
            if not isinstance(comes, Mapping) or not all(isinstance(entry, Mapping) for entry in comes.values()):
                raise InvalidRequest(f"layer {name}: {group} must be a map of names to the fields of an expert")
            if comes:
                found = {}
                for expert, entry in comes.items():
                    found[expert] = yield from self._of_expert(f"{name}/{expert}", entry)
                plain[group] = found
        if "gate" in plain:
            plain["gate"] = yield from self._of_file(f"{name}/gate", self._saved(plain["gate"]))
        if "settings" in plain and "input" in plain["settings"]:
            plain["settings"] = {**plain["settings"], "input": _rows(plain["settings"]["input"])}
        for key in ("remove", "order"):
            if isinstance(plain.get(key), (tuple, list)):
                plain[key] = list(plain[key])
        return plain

    def _of_expert(self, id: str, entry: Mapping[str, Any]) -> Flow[dict[str, Any]]:
        plain = {key: value for key, value in entry.items() if value is not None}
        for key in ("input", "output"):
            if key in plain:
                plain[key] = _rows(plain[key])
        if isinstance(plain.get("args"), tuple):
            plain["args"] = list(plain["args"])
        if "weights" in plain:
            plain["weights"] = yield from self._of_file(id, plain["weights"])
        read_expert(id, plain)
        return plain

    def _of_file(self, id: str, path: object) -> Flow[dict[str, Any]]:
        upload = self.uploads[id] = yield from prepare(id, path)
        return {"upload": upload.upload_id, "sha256": upload.sha256}

    def _saved(self, gate: Any) -> Any:
        if isinstance(gate, (str, os.PathLike)) or not callable(getattr(gate, "save", None)):
            return gate
        path = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="expertmesh-"))) / "gate.safetensors"
        gate.save(path)
        return path


def _document(asked: LayersAsked) -> WireTensor:
    """The request as it is sent, with the checks of the server. Raises InvalidRequest."""
    plain = asdict(asked)
    if is_deep(plain):
        raise InvalidRequest(f"the change cannot be sent: its args or kwargs are nested deeper than {MAX_DEPTH}")
    asked.read()
    try:
        return to_tensor(plain)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the change cannot be sent as JSON: {error}") from None


def _rows(spec: Any) -> Any:
    """The rows of `TensorSpec`, or of a pair of shape and dtype, as a list."""
    pair = (spec.shape, spec.dtype) if hasattr(spec, "shape") and hasattr(spec, "dtype") else spec
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidRequest('rows are declared as (shape, dtype), as in ([16], "float32")')
    shape, dtype = pair
    return [list(shape) if isinstance(shape, Iterable) else shape, dtype]


def _options(
    timeout: float, change_id: str | None, allow_unverified: bool, progress: Progress | None
) -> dict[str, Any]:
    return {"timeout": timeout, "change_id": change_id, "allow_unverified": allow_unverified, "progress": progress}
