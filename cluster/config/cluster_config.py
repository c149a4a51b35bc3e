"""The configuration of a cluster as one frozen record, with all its validation rules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import date, datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, InstanceOf, TypeAdapter

from ...experts.errors import ConfigError
from ...experts.spec import is_import_string
from ...experts.weights.inspect import LIMITS
from ...experts.wire import MAX_FRAME_BYTES
from ...router.mixture.layer import Layer, check_name
from ..machine.ports import is_loopback
from ..machine.tokens import check_digest
from ..rpc.methods import Role
from ..rpc.streams import MAX_REQUEST_BYTES
from .document import Keys, Mistakes
from .records import typed

MOST_ROUTERS = 256
LAST_PORT = 65535


def _whole(least: int, most: int, more: str = "") -> Any:
    return Field(ge=least, le=most, description=f"a whole number from {least} to {most}{more}")


def _one_of(*names: str) -> Any:
    return Field(pattern=f"^({'|'.join(names)})$", description=f"one of {', '.join(names)}")


def _seconds(time: object) -> object:
    """A YAML time or date, or ISO text, as seconds since 1970; a time without a zone is UTC."""
    if isinstance(time, str):
        time = datetime.fromisoformat(time.replace("Z", "+00:00"))
    if isinstance(time, date):
        moment = _TIME.validate_python(time)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    return time


_TIME = TypeAdapter(datetime)
_EXPIRY = Field(allow_inf_nan=False, description="a time, in seconds since 1970 or as 2030-01-31T12:00:00Z")
_HOST = Field(pattern=r"^[A-Za-z0-9_.:\[\]%-]{1,255}$", description="the address to listen on, as 127.0.0.1")
_ADDRESS = Field(description='the address of a Ray cluster, "auto", or null to start one')
_LAYERS = Field(description="a list of expertmesh.Layer")
_TOKENS = Field(description="a list of tokens, each with role and sha256")
_PEM_FILE = Field(strict=False, description="the path of a PEM file")
_SECONDS = Field(gt=0, le=86400, description="a number of seconds above 0, at most 86400")
_FACTORIES = Field(description='a list of factories, each "module:attribute"')


@dataclass(frozen=True, kw_only=True)
class TokenEntry:
    """An additional token that the cluster accepts, known only by its sha256. `expires` is in seconds since 1970."""

    role: Role
    sha256: str = field(repr=False)
    expires: Annotated[float | None, _EXPIRY, BeforeValidator(_seconds)] = None

    def __post_init__(self) -> None:
        check_digest(self.sha256)
        object.__setattr__(self, "expires", typed(TokenEntry, "expires", self.expires))


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """All settings of a cluster.

    `port` 0 and `metrics_port` 0 take any free port; `metrics_port` None serves no metrics. `host` and `metrics_host`
    are the addresses to listen on: any but loopback requires `tls_cert` and `tls_key`. `routers` is how many processes
    answer calls: each has ports of its own, which are `port`, `port` + 1 and so on, and so for `metrics_port`. They are
    spread over the nodes of Ray, unless `host` is loopback: then all are on the owner's. `transport` is "channel"
    (expert actors, rows over direct sockets), "ray" (expert actors, rows over Ray calls) or "local" (experts and
    routers in this process). `address` joins a Ray cluster ("auto" or its address); by default a new one is started.
    `runtime_env` is Ray's runtime environment for all experts. Times are in seconds.

    `hang_seconds` is how long an expert may compute beyond the deadline of its call; then its process is ended and
    started again.

    `max_message_bytes` bounds one gRPC message, of a request at most 4 MiB. What is larger is sent in chunks, up to
    `max_request_bytes` for one request or reply, and up to `max_stream_bytes` for all streams in flight together.

    `state_dir` stores versions and epochs. By default it is a folder with the cluster's name, but for `Cluster.start`
    without a `name`, which keeps nothing for the next start. `retain_epochs` is the number of epochs before the current
    one that calls and rollbacks can still use. `max_upload_bytes` bounds one upload of weights, `max_uploads_bytes` all
    uploads that are not part of a version yet, and `upload_rate` the bytes per second of an upload while requests are
    served. `allowed_factories` are the factories that an admin may swap in over the network, by default those of
    `layers`.

    Raises a ConfigError that lists every mistake.

    >>> layer = Layer("waves", gates.Fixed([1.0]), {"sin": Expert("numpy:sin")})
    >>> ClusterConfig(layers=[layer], name="demo", port=0).transport
    'channel'
    """

    name: str = "default"
    host: Annotated[str, _HOST] = "127.0.0.1"
    port: Annotated[int, _whole(0, LAST_PORT)] = 50051
    metrics_host: Annotated[str, _HOST] = "127.0.0.1"
    metrics_port: Annotated[int | None, _whole(0, LAST_PORT, ", or null for no metrics")] = 0
    routers: Annotated[int, _whole(1, MOST_ROUTERS)] = 1
    transport: Annotated[str, _one_of("channel", "ray", "local")] = "channel"
    address: Annotated[str | None, _ADDRESS] = None
    layers: Annotated[tuple[InstanceOf[Layer], ...], _LAYERS] = ()
    runtime_env: Annotated[Mapping[str, Any] | None, Field(description="a map, as Ray takes it")] = None
    tokens: Annotated[tuple[InstanceOf[TokenEntry], ...], _TOKENS] = ()
    tls_cert: Annotated[Path | None, _PEM_FILE] = None
    tls_key: Annotated[Path | None, _PEM_FILE] = None
    max_message_bytes: Annotated[int, _whole(4096, (1 << 31) - 1)] = MAX_FRAME_BYTES
    max_request_bytes: Annotated[int, _whole(4096, 1 << 40)] = MAX_REQUEST_BYTES
    max_stream_bytes: Annotated[int, _whole(4096, 1 << 50)] = 2 * MAX_REQUEST_BYTES
    max_rows_in_flight: Annotated[int, _whole(1, 1 << 40)] = 65536
    default_timeout: Annotated[float, _SECONDS] = 30.0
    start_timeout: Annotated[float, _SECONDS] = 120.0
    hang_seconds: Annotated[float, _SECONDS] = 60.0
    log_level: Annotated[str, _one_of("debug", "info", "warning", "error")] = "info"
    state_dir: Annotated[Path | None, Field(strict=False, description="the path of a folder")] = None
    retain_epochs: Annotated[int, _whole(0, 1000)] = 2
    max_upload_bytes: Annotated[int, _whole(1, LIMITS.max_bytes)] = LIMITS.max_bytes
    max_uploads_bytes: Annotated[int, _whole(1, 1 << 50)] = 2 * LIMITS.max_bytes
    upload_rate: Annotated[int, _whole(1 << 23, 1 << 50)] = 64 * 2**20
    allowed_factories: Annotated[tuple[str, ...] | None, _FACTORIES] = None

    def __post_init__(self) -> None:
        wrong = Mistakes()
        for name in SETTINGS:
            with wrong.at(name):
                object.__setattr__(self, name, typed(ClusterConfig, name, getattr(self, name)))
        refused = {keys[0] for keys, _ in wrong.found}
        wrong.found += _broken_rules({name: value for name, value in vars(self).items() if name not in refused})
        wrong.raise_if_any()


SETTINGS = tuple(item.name for item in fields(ClusterConfig))


def allowed_factories(config: ClusterConfig) -> tuple[str, ...]:
    """The factories that a swap may name: those that the configuration lists, by default those of the layers."""
    if config.allowed_factories is not None:
        return config.allowed_factories
    factories = {expert.factory for layer in config.layers for expert in layer.everyone.values()}
    return tuple(sorted(factory for factory in factories if factory is not None))


def _broken_rules(values: Mapping[str, Any]) -> Iterator[tuple[Keys, str]]:
    """The broken rules that involve more than a type; `values` holds no setting whose type is wrong."""
    try:
        check_name(values.get("name", "default"), "cluster")
    except ConfigError as error:
        yield ("name",), error.message
    if values.get("layers") == ():
        yield ("layers",), "layers is empty: a cluster needs at least one layer"
    for name, count in Counter(layer.name for layer in values.get("layers", ())).items():
        if count > 1:
            yield ("layers",), f"layers must have different names: {name!r} appears twice"
    for factory in values.get("allowed_factories") or ():
        if not is_import_string(factory):
            yield ("allowed_factories",), f"allowed_factories must be {_FACTORIES.description}, not {factory!r}"
    if values.get("transport") == "local":
        yield from _environments(values.get("runtime_env"), values.get("layers", ()))
    if {"host", "metrics_host", "tls_cert", "tls_key"} <= values.keys():
        yield from _broken_tls_rules(values)
    yield from _broken_port_rules(values)
    for least, most in pairwise(("max_message_bytes", "max_request_bytes", "max_stream_bytes")):
        if values.get(least, 0) > values.get(most, math.inf):
            sizes = f"{most} ({values[most]}) is less than {least} ({values[least]})"
            yield (most,), f"{sizes}: raise {most} or lower {least}"


def _broken_port_rules(values: Mapping[str, Any]) -> Iterator[tuple[Keys, str]]:
    """Each router has the next port; where two of a machine meet, the start is refused."""
    routers = values.get("routers", 1)
    for setting in ("port", "metrics_port"):
        first = values.get(setting)
        if first and first + routers - 1 > LAST_PORT:
            ports = f"{setting} {first} leaves no port for the last of {routers} routers"
            yield (setting,), f"{ports}: use at most {LAST_PORT - routers + 1}, or 0 for any free ones"


def _environments(of_all: object, layers: Iterable[Layer]) -> Iterator[tuple[Keys, str]]:
    """A runtime environment is Ray's; a cluster in one process has the environment of that process."""
    reason = "has no effect with transport local, which runs all experts in this process: leave it out, or use Ray"
    if of_all is not None:
        yield ("runtime_env",), f"runtime_env {reason}"
    for layer in layers:
        for id, expert in layer.everyone_by_id.items():
            if expert.runtime_env:
                yield ("layers", *id.split("/")), f"the runtime_env of {id} {reason}"


def _broken_tls_rules(values: Mapping[str, Any]) -> Iterator[tuple[Keys, str]]:
    cert, key = values["tls_cert"], values["tls_key"]
    if (cert is None) != (key is None):
        present, missing = ("tls_key", "tls_cert") if cert is None else ("tls_cert", "tls_key")
        yield (present,), f"{present} is set without {missing}: TLS needs both"
    for setting in ("host", "metrics_host"):
        if cert is key is None and not is_loopback(values[setting]):
            reason = f"{setting} {values[setting]!r} can be reached from other machines, which requires TLS"
            yield (setting,), f"{reason}: set tls_cert and tls_key, or listen on 127.0.0.1"
    for name, path in (("tls_cert", cert), ("tls_key", key)):
        if path is not None and not path.is_file():
            yield (name,), f"{name}: there is no file {str(path)!r}"
