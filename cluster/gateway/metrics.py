"""The metrics page: the router's counters in Prometheus format, for requests with a token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ...experts.errors import ExpertMeshError
from ...router.fanout.telemetry import LATENCY_BUCKETS, Histogram
from ...router.request.forward import Router
from ..machine.ports import family_of
from .authorise import TokenTable

StartResponse = Callable[[str, list[tuple[str, str]]], Any]
STOP_POLL_SECONDS = 0.05
"""How often the server checks whether to stop; the shutdown of a cluster waits for it."""


class RouterCollector:
    """Converts a router's telemetry to metric families at each scrape."""

    def __init__(self, router: Router) -> None:
        self._router = router

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
        yield CounterMetricFamily("expertmesh_retries", "Rows sent again to another replica.", value=counted.retries)
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


class MetricsServer:
    """Serves /metrics over HTTP in a thread; requires a bearer token of any role."""

    def __init__(self, router: Router, tokens: TokenTable, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(RouterCollector(router))
        page = make_wsgi_app(registry)
        server_class = type("_Server", (WSGIServer,), {"address_family": family_of(host)})
        served = _guarded(page, tokens)
        self._server: WSGIServer = make_server(host.strip("[]"), port, served, server_class, _QuietHandler)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_SECONDS,), name="metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()


class _QuietHandler(WSGIRequestHandler):
    timeout = 10

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
