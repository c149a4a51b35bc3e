"""The server side of what the owner of a cluster is asked for: replicas, experts and layers. No gRPC here.

Every field of a frame is checked before the request is passed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from ...experts.errors import ConfigError, ExpertMeshError, InvalidRequest, RouterUnavailable, Unavailable
from ...experts.names import GATE
from ...experts.protocol import from_mapping
from ...experts.spec import ANY, Autoscale, Expert, TensorSpec
from ...experts.wire import Frame
from ...router.mixture.capacity import Capacity
from ..config.layer_changes import LayerEdit, LayersRequest
from ..control.messages import ScaleRequest
from ..control.ports import ControlPort
from ..rpc.changes import LayerAsked, LayersAsked, ScaleAsked, UploadAsked, read_expert, read_upload
from ..rpc.documents import encode_document
from ..rpc.swaps import NothingAsked
from ..state.records import check_id, check_swap_id, check_version
from ..state.uploads import Uploads
from .authorise import Caller
from .records import document_of, record_of
from .swaps import FrameHandler, check_factory

Drop = Callable[[Collection[str]], Awaitable[None]]
"""Drops uploads by their ids."""


class ChangeMethods:
    """Answers the methods that change what the owner has declared. `uploads` and `allowed_factories` as of swaps."""

    def __init__(
        self, control: ControlPort, uploads: Uploads | None, drop: Drop, allowed_factories: Collection[str] = ()
    ) -> None:
        self._control = control
        self._uploads = uploads
        self._drop = drop
        self._allowed = frozenset(allowed_factories)
        self._changes: set[asyncio.Future[Any]] = set()

    def handlers(self) -> dict[str, FrameHandler]:
        """The handler of each method."""
        return {"Declared": self.declared, "Scale": self.scale, "Change": self.change}

    async def declared(self, frame: Frame, caller: Caller) -> bytes:
        """The document of what the cluster declares."""
        record_of(NothingAsked, frame, "declared")
        return encode_document("declared", await self._control.declared())

    async def scale(self, frame: Frame, caller: Caller) -> bytes:
        """Have the owner change numbers of replicas; a retry with the same change id returns its outcome."""
        asked = from_mapping(ScaleAsked, document_of(frame, "scale"))
        asked.check()
        check_swap_id(asked.change_id)
        for id in asked.replicas:
            check_id(id)
        return encode_document("scale", await self._control.change(ScaleRequest(**vars(asked))))

    async def change(self, frame: Frame, caller: Caller) -> bytes:
        """Have the owner change layers. It goes on if its caller disconnects; a retry returns its outcome."""
        asked = from_mapping(LayersAsked, document_of(frame, "change"))
        layers, files = asked.read(), dict[str, str]()
        try:
            request = self._request(asked, layers, files, caller)
        except ExpertMeshError:
            await self._drop(files)
            raise
        work = asyncio.ensure_future(self._carry_out(request, files))
        self._changes.add(work)
        work.add_done_callback(self._finished)
        return encode_document("change", await asyncio.shield(work))

    def _request(
        self, asked: LayersAsked, layers: Mapping[str, LayerAsked], files: dict[str, str], caller: Caller
    ) -> LayersRequest:
        """The request to the owner; `files` is filled with the sha256 of its uploads by their ids."""
        check_swap_id(asked.change_id)
        for id in asked.adopts:
            check_id(id)
        for id, version in asked.versions.items():
            check_version(id, version)
        edits = {name: self._edit(name, layer, files, caller) for name, layer in layers.items()}
        return LayersRequest(
            change_id=asked.change_id,
            layers=edits,
            adopts=asked.adopts,
            versions=asked.versions,
            files={self._store().path(upload): sha256 for upload, sha256 in files.items()},
            timeout=float(asked.timeout),
            allow_unverified=asked.allow_unverified,
        )

    def _edit(self, name: str, asked: LayerAsked, files: dict[str, str], caller: Caller) -> LayerEdit:
        gate = None if asked.gate is None else self._file(read_upload(f"{name}/{GATE}", asked.gate), files)
        comes = [
            {expert: self._expert(f"{name}/{expert}", entry, files, caller) for expert, entry in group.items()}
            for group in (asked.experts, asked.shared)
        ]
        rules = {group: None if rule is None else _autoscale(group, rule) for group, rule in asked.autoscale.items()}
        return LayerEdit(
            kind=asked.kind,
            experts=comes[0],
            shared=comes[1],
            remove=tuple(asked.remove),
            order=tuple(asked.order),
            gate=gate,
            settings=_settings(name, asked.settings),
            autoscale=rules,
        )

    def _expert(self, id: str, entry: Mapping[str, Any], files: dict[str, str], caller: Caller) -> Expert:
        asked = read_expert(id, entry)
        check_factory(id, asked.factory, caller.role, self._allowed)
        weights = None if asked.weights is None else self._file(read_upload(id, asked.weights), files)
        try:
            return Expert(
                asked.factory,
                args=tuple(asked.args),
                kwargs=asked.kwargs,
                weights=weights,
                framework=asked.framework,
                input=_spec(asked.input),
                output=_spec(asked.output),
                replicas=asked.replicas,
                pack=asked.pack,
                num_cpus=asked.num_cpus,
                num_gpus=asked.num_gpus,
                resources=asked.resources,
                autoscale=None if asked.autoscale is None else _autoscale(id, asked.autoscale),
            )
        except ConfigError as error:
            raise InvalidRequest(f"{id}: {error.message}") from None

    def _file(self, asked: UploadAsked, files: dict[str, str]) -> Any:
        path = self._store().path(asked.upload)
        files[asked.upload] = asked.sha256
        return path

    def _store(self) -> Uploads:
        if self._uploads is None:
            raise RouterUnavailable("this router is not where the cluster's state is: ask another one")
        return self._uploads

    async def _carry_out(self, request: LayersRequest, files: Mapping[str, str]) -> dict[str, Any]:
        try:
            outcome = await self._control.change(request)
        except Unavailable:  # the client may ask again with the same uploads
            raise
        except ExpertMeshError:
            await self._drop(files)
            raise
        await self._drop(files)
        return outcome

    def _finished(self, work: asyncio.Future[Any]) -> None:
        self._changes.discard(work)
        if not work.cancelled():
            work.exception()  # the caller may have disconnected: retrieve the error so that asyncio does not log it


def _settings(layer: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a layer, whose types `Layer` checks."""
    settings = dict(asked)
    try:
        if settings.get("capacity") is not None:
            settings["capacity"] = _made(Capacity, settings["capacity"])
        if "input" in settings:
            settings["input"] = _spec(settings["input"])
    except (ConfigError, InvalidRequest) as error:
        raise InvalidRequest(f"layer {layer}: {error.message}") from None
    for name in ("combine", "on_missing", "on_dropped"):
        if name in settings and not isinstance(settings[name], str):
            raise InvalidRequest(f"layer {layer}: {name} must be text")
    mass = settings.get("max_lost_mass")
    if mass is not None and type(mass) not in (int, float):
        raise InvalidRequest(f"layer {layer}: max_lost_mass must be a number")
    return settings


def _autoscale(what: str, asked: Mapping[str, Any]) -> Autoscale:
    try:
        rule: Autoscale = _made(Autoscale, asked)
        return rule
    except (ConfigError, InvalidRequest) as error:
        raise InvalidRequest(f"{what}: {error.message}") from None


def _made(kind: Any, asked: object) -> Any:
    if not isinstance(asked, Mapping):
        raise InvalidRequest(f"{kind.__name__.lower()} must be a map of its fields")
    return from_mapping(kind, asked)


def _spec(asked: list[Any] | None) -> TensorSpec:
    """A spec of rows, [shape, dtype]. Raises InvalidRequest or ConfigError."""
    if asked is None:
        return ANY
    if not isinstance(asked, list) or len(asked) != 2:
        raise InvalidRequest('rows are declared as [shape, dtype], as in [[16], "float32"]')
    shape, dtype = asked
    if not (shape is None or (isinstance(shape, list) and all(type(size) is int for size in shape))):
        raise InvalidRequest("the shape of rows is a list of whole numbers, or null")
    if not (dtype is None or isinstance(dtype, str)):
        raise InvalidRequest("the dtype of rows is text, or null")
    return TensorSpec(None if shape is None else tuple(shape), dtype)
