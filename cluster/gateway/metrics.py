"""The metrics page: the router's counters in Prometheus format, for requests with a token.

Each router has a page of its own, so a family needs no label for the router: `expertmesh_router_info` names it.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ...experts.errors import ExpertMeshError
from ...router.fanout.telemetry import LATENCY_BUCKETS, Histogram
from ...router.request.forward import Router
from ..machine.ports import family_of, is_loopback
from .authorise import TokenTable

log = logging.getLogger(__name__)
StartResponse = Callable[[str, list[tuple[str, str]]], Any]
STOP_POLL_SECONDS = 0.05
"""How often the server checks whether to stop, and for slow connections; the shutdown of a cluster waits for it."""

MOST_CONNECTIONS = 16
CONNECTION_SECONDS = 10.0


class RouterCollector:
    """Converts a router's telemetry to metric families at each scrape. `name` tells it from the cluster's others."""

    def __init__(self, router: Router, name: str) -> None:
        self._router = router
        self._name = name

    def collect(self) -> Iterator[Metric]:
        """All metric families, in the interface of prometheus_client."""
        counted = self._router.telemetry
        yield _counter("expert_rows", "Rows that an expert answered.", "expert", counted.rows)
        yield _counter("expert_errors", "Messages that an expert did not answer.", "expert", counted.errors)
        yield _counter("expert_gate_mass", "Sum of |gate weight| sent to an expert.", "expert", counted.gate_mass)
        yield _counter("replica_messages", "Messages sent to a replica.", "replica", counted.messages)
        yield _counter("replica_queue_seconds", "Seconds in a replica's queue.", "replica", counted.queued)
        yield _counter("replica_compute_seconds", "Seconds that a replica computed.", "replica", counted.computing)
        yield _counter(
            "rows_carried", "Rows sent to replicas, by transport path.", "way", self._router.transport.carried
        )
        yield _counter("layer_batches", "Batches that a layer's gate routed.", "layer", counted.batches)
        yield CounterMetricFamily(
            "expertmesh_retries", "Pieces of work sent again to another replica.", value=counted.retries
        )
        yield CounterMetricFamily(
            "expertmesh_hedges", "Pieces of work sent to a second replica as well.", value=counted.hedges
        )
        scaled = counted.scaled
        wanted = {group: each.wanted for group, each in scaled.items()}
        yield _gauge("autoscale_replicas", "Replicas that autoscaling wants of an expert or pack.", "expert", wanted)
        decisions = CounterMetricFamily(
            "expertmesh_autoscale_decisions", "Decisions of autoscaling.", labels=["expert", "direction"]
        )
        for group, each in scaled.items():
            decisions.add_metric([group, "up"], each.up)
            decisions.add_metric([group, "down"], each.down)
        yield decisions
        requests = CounterMetricFamily("expertmesh_requests", "Requests by status code.", labels=["layer", "code"])
        for (layer, code), value in list(counted.requests.items()):
            requests.add_metric([layer, code], value)
        yield requests
        yield _histogram("request_seconds", "Latency of requests.", "layer", counted.request_latency)
        yield _histogram("expert_seconds", "Latency of messages to an expert.", "expert", counted.expert_latency)
        queued = self._router.fanout.waiting()
        yield _gauge("replica_queued_rows", "Rows queued for a replica.", "replica", queued)
        yield _gauge("replica_rows_in_flight", "Rows in flight.", "replica", self._router.view.rows_in_flight())
        yield _gauge("layer_rows_in_flight", "Admitted rows in flight.", "layer", self._router.admission.by_layer())
        yield GaugeMetricFamily("expertmesh_epoch", "The current epoch.", value=self._router.epochs.number)
        yield _gauge("router_info", "The name of the router whose page this is.", "router", {self._name: 1.0})


class MetricsServer:
    """Serves /metrics in threads; requires a bearer token of any role.

    On loopback it speaks HTTP, elsewhere HTTPS with `tls`, a private key and a certificate chain (PEM). The owner may
    hold the port (`machine/ports.py`). Raises OSError if it cannot listen.
    """

    def __init__(
        self,
        router: Router,
        tokens: TokenTable,
        host: str,
        port: int,
        *,
        name: str = "router-0",
        port_held: bool = False,
        tls: tuple[bytes, bytes] | None = None,
    ) -> None:
        registry = CollectorRegistry()
        registry.register(RouterCollector(router, name))
        context = None if tls is None or is_loopback(host) else _tls_context(*tls)
        self._server = _Server(host, port, port_held, context)
        self._server.set_app(_guarded(make_wsgi_app(registry), tokens))
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_SECONDS,), name="metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection, of which the slow ones and the oldest of too many are ended."""

    daemon_threads = True

    def __init__(self, host: str, port: int, port_held: bool, tls: ssl.SSLContext | None) -> None:
        self.address_family = family_of(host)
        self._port_held = port_held
        self._tls = tls
        self._deadlines: dict[socket.socket, float] = {}
        super().__init__((host.strip("[]"), port), _QuietHandler)

    def server_bind(self) -> None:
        """Bind, without asking the network for the name of this host as HTTPServer does."""
        if self._port_held:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; the thread that reads from it first makes the TLS handshake."""
        request, address = super().get_request()
        if self._tls is not None:
            request = self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        return request, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection; of too many, the oldest makes room."""
        for oldest in list(self._deadlines)[: -MOST_CONNECTIONS + 1]:
            self._end(oldest)
        self._deadlines[request] = time.monotonic() + CONNECTION_SECONDS
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection."""
        super().process_request_thread(request, client_address)
        self._deadlines.pop(request, None)

    def service_actions(self) -> None:
        """End the connections that are too slow."""
        now = time.monotonic()
        for request in [request for request, deadline in list(self._deadlines.items()) if deadline < now]:
            self._end(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a connection broke, which is its client's doing."""
        log.debug("a connection to the metrics page broke", exc_info=True)

    def _end(self, request: socket.socket) -> None:
        self._deadlines.pop(request, None)
        with suppress(OSError):
            socket.socket.shutdown(request, socket.SHUT_RDWR)  # below TLS, whose state its own thread has


def _tls_context(key: bytes, chain: bytes) -> ssl.SSLContext:
    """A server's TLS context from PEM in memory; Python reads only files, so they get one without a name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with os.fdopen(os.memfd_create("tls", os.MFD_CLOEXEC), "wb") as file:
        file.write(key + b"\n" + chain)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return context


class _QuietHandler(WSGIRequestHandler):
    timeout = CONNECTION_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests: the page is scraped every few seconds."""


def _guarded(page: Callable[..., Iterable[bytes]], tokens: TokenTable) -> Callable[..., Iterable[bytes]]:
    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        scheme, _, token = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
        try:
            tokens.authorise("Status", token if scheme.lower() == "bearer" else None, time.time())
        except ExpertMeshError as error:
            start_response("401 Unauthorized", [("Content-Type", "text/plain"), ("WWW-Authenticate", "Bearer")])
            return [f"{error.message}\n".encode()]
        if environ.get("PATH_INFO") != "/metrics":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"not found: the metrics are at /metrics\n"]
        return page(environ, start_response)

    return app


def _family(kind: Any, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family: Metric = kind(f"expertmesh_{name}", text, labels=[label])
    for key, value in list(values.items()):
        family.add_metric([key], value)  # type: ignore[attr-defined]
    return family


_counter, _gauge = partial(_family, CounterMetricFamily), partial(_family, GaugeMetricFamily)


def _histogram(name: str, text: str, label: str, values: dict[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(f"expertmesh_{name}", text, labels=[label])
    bounds = [*(str(bound) for bound in LATENCY_BUCKETS), "+Inf"]
    for key, histogram in list(values.items()):
        running, buckets = 0, []
        for bound, count in zip(bounds, histogram.counts, strict=True):
            running += count
            buckets.append((bound, float(running)))
        family.add_metric([key], buckets, histogram.total)
    return family
