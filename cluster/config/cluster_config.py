"""The configuration of a cluster as one frozen record, and every rule that it must obey."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...experts.errors import ConfigError
from ...experts.spec import is_import_string
from ...experts.weights.inspect import LIMITS
from ...experts.wire import MAX_FRAME_BYTES
from ...router.mixture.layer import Layer, check_name
from ..machine.tokens import check_digest
from ..rpc.methods import Role
from ..rpc.streams import MAX_REQUEST_BYTES

TRANSPORTS = ("channel", "ray", "local")
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_GRPC_BYTES = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class TokenEntry:
    """A token that the cluster accepts beside its own: only its sha256 is known. `expires`: seconds since 1970."""

    role: Role
    sha256: str = field(repr=False)
    expires: float | None = None

    def __post_init__(self) -> None:
        check_digest(self.sha256)
        if self.expires is not None and not _is_number(self.expires):
            raise ConfigError("expires must be a time, in seconds since 1970 or as 2030-01-31T12:00:00Z")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Everything that a cluster is started with.

    `port` 0 takes any free port; `metrics_port` 0 likewise, and None serves no metrics. `transport` is "channel"
    (expert actors, rows by direct sockets), "ray" (the same, rows through Ray's calls) or "local" (experts in the
    router's process). `address` joins a Ray cluster ("auto" or its address); by
    default one is started. `runtime_env` is Ray's, for all experts. Times are in seconds.

    `max_message_bytes` bounds one gRPC message; what is larger crosses in chunks, up to `max_request_bytes` for a
    request or a reply, and up to `max_stream_bytes` for all streams that are under way together.

    `state_dir` is where versions and epochs are kept, by default a folder of the cluster's name; `retain_epochs` is how
    many epochs before the current one can still be asked for, and rolled back to. `max_upload_bytes` bounds one upload
    of weights, `max_uploads_bytes` all that no version has taken yet, and `upload_rate` the bytes a second of an upload
    while requests are served. `allowed_factories` are the factories that an admin may swap in over the network, by
    default those of `layers`.

    Raises ConfigError that lists every mistake.

    >>> layer = Layer("waves", gates.Fixed([1.0]), {"sin": Expert("numpy:sin")})
    >>> ClusterConfig(layers=[layer], name="demo", port=0).transport
    'channel'
    """

    name: str = "default"
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int | None = 0
    transport: str = "channel"
    address: str | None = None
    layers: tuple[Layer, ...] = ()
    runtime_env: Mapping[str, Any] | None = None
    tokens: tuple[TokenEntry, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_message_bytes: int = MAX_FRAME_BYTES
    max_request_bytes: int = MAX_REQUEST_BYTES
    max_stream_bytes: int = 2 * MAX_REQUEST_BYTES
    max_rows_in_flight: int = 65536
    default_timeout: float = 30.0
    start_timeout: float = 120.0
    log_level: str = "info"
    state_dir: Path | None = None
    retain_epochs: int = 2
    max_upload_bytes: int = LIMITS.max_bytes
    max_uploads_bytes: int = 2 * LIMITS.max_bytes
    upload_rate: int = 64 * 2**20
    allowed_factories: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("tls_cert", "tls_key", "state_dir"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("layers", "tokens", "allowed_factories"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        found = mistakes(vars(self))
        if found:
            raise ConfigError("; ".join(message for _, message in found))


SETTINGS = tuple(item.name for item in fields(ClusterConfig))
DEFAULTS: Mapping[str, Any] = {item.name: item.default for item in fields(ClusterConfig)}


def allowed_factories(config: ClusterConfig) -> tuple[str, ...]:
    """The factories that may be named over the network: those that are listed, by default those of the layers."""
    if config.allowed_factories is not None:
        return config.allowed_factories
    named = {expert.factory for layer in config.layers for expert in layer.everyone.values()}
    return tuple(sorted(factory for factory in named if factory is not None))


def mistakes(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every mistake in the values of a ClusterConfig, as (setting, message); the message names the setting."""
    found: list[tuple[str, str]] = []
    for name, (fits, wanted) in _RULES.items():
        if not fits(values[name]):
            found.append((name, f"{name} must be {wanted}, not {values[name]!r}"))
    try:
        check_name(values["name"], "cluster")
    except ConfigError as error:
        found.append(("name", str(error)))
    found += _layer_mistakes(values["layers"])
    wrong = {name for name, _ in found}
    if not wrong & {"host", "tls_cert", "tls_key"}:
        found += _tls_mistakes(values["host"], values["tls_cert"], values["tls_key"])
    for least, most in pairwise(("max_message_bytes", "max_request_bytes", "max_stream_bytes")):
        if not wrong & {least, most} and values[least] > values[most]:
            found.append(
                (most, f"{most} is {values[most]}, less than {least}, {values[least]}: raise it, or lower that")
            )
    return found


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _layer_mistakes(layers: object) -> Iterable[tuple[str, str]]:
    if not isinstance(layers, tuple) or not all(isinstance(layer, Layer) for layer in layers):
        yield "layers", "layers must be a list of expertmesh.Layer"
        return
    if not layers:
        yield "layers", "layers is empty: a cluster serves at least one layer"
    names = [layer.name for layer in layers]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield "layers", f"layers must have different names, {name!r} stands twice"


def _tls_mistakes(host: str, cert: Path | None, key: Path | None) -> Iterable[tuple[str, str]]:
    if (cert is None) != (key is None):
        given, missing = ("tls_key", "tls_cert") if cert is None else ("tls_cert", "tls_key")
        yield given, f"{given} is given without {missing}: TLS needs both"
    elif cert is None and not is_loopback(host):
        yield (
            "host",
            f"host {host!r} can be reached from other machines, which requires TLS: give tls_cert and tls_key, "
            "or listen on 127.0.0.1",
        )
    for name, path in (("tls_cert", cert), ("tls_key", key)):
        if path is not None and not path.is_file():
            yield name, f"{name}: there is no file {str(path)!r}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _seconds(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 86400


def _host(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.:\[\]%-]{1,255}", value) is not None


def _tokens(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(entry, TokenEntry) for entry in value)


def _factories(value: Any) -> bool:
    return isinstance(value, tuple) and all(is_import_string(factory) for factory in value)


def _optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "host": (_host, "the address to listen on, as 127.0.0.1"),
    "port": (_whole(0, 65535), "a whole number from 0 to 65535"),
    "metrics_port": (_optional(_whole(0, 65535)), "a whole number from 0 to 65535, or null for no metrics"),
    "transport": (lambda value: value in TRANSPORTS, f"one of {', '.join(TRANSPORTS)}"),
    "address": (_optional(_is(str)), 'the address of a Ray cluster, "auto", or null to start one'),
    "runtime_env": (_optional(_is(Mapping)), "a map, as Ray takes it"),
    "tokens": (_tokens, "a list of tokens, each with role and sha256"),
    "tls_cert": (_optional(_is(Path)), "the path of a PEM file"),
    "tls_key": (_optional(_is(Path)), "the path of a PEM file"),
    "max_message_bytes": (_whole(4096, MAX_GRPC_BYTES), f"a whole number from 4096 to {MAX_GRPC_BYTES}"),
    "max_request_bytes": (_whole(4096, 1 << 40), f"a whole number from 4096 to {1 << 40}"),
    "max_stream_bytes": (_whole(4096, 1 << 50), "a whole number of at least 4096"),
    "max_rows_in_flight": (_whole(1, 1 << 40), "a whole number of at least 1"),
    "default_timeout": (_seconds, "a number of seconds above 0, at most 86400"),
    "start_timeout": (_seconds, "a number of seconds above 0, at most 86400"),
    "state_dir": (_optional(_is(Path)), "the path of a folder"),
    "retain_epochs": (_whole(0, 1000), "a whole number from 0 to 1000"),
    "max_upload_bytes": (_whole(1, LIMITS.max_bytes), f"a whole number from 1 to {LIMITS.max_bytes}"),
    "max_uploads_bytes": (_whole(1, 1 << 50), "a whole number of at least 1"),
    "upload_rate": (_whole(1 << 23, 1 << 50), f"a whole number of bytes a second, at least {1 << 23}"),
    "allowed_factories": (_optional(_factories), 'a list of factories, each "module:attribute"'),
    "log_level": (lambda value: value in LOG_LEVELS, f"one of {', '.join(LOG_LEVELS)}"),
}
