"""A router obeys the newest controller alone: one that was frozen and wakes after a takeover changes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from helpers.waiting import eventually

from expertmesh import Client, Cluster, Expert, Layer, gates
from expertmesh.cluster.control.messages import Candidate, RouterUpdate
from expertmesh.cluster.control.orders import Order
from expertmesh.cluster.runtime.local_backend import LocalBackend
from expertmesh.experts.errors import Fenced

pytestmark = pytest.mark.usefixtures("own_home")
GATE = "news/gate"


def test_orders_of_a_replaced_controller_are_refused_and_it_says_so() -> None:
    layer = Layer("news", gates.Fixed([1.0]), {"sin": Expert("numpy:sin")})
    with (
        Cluster.start([layer], transport="local", port=0, name="orders") as cluster,
        Client(cluster.endpoint) as client,
    ):
        backend = cluster._backend
        assert isinstance(backend, LocalBackend)
        service, controller = backend._services["router-0"], backend._controller
        assert controller is not None

        def ordered(work: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(work, backend._loop).result(10)

        version, term = cluster.status()["versions"][GATE], controller.transactions.term
        known = controller.reconciler.known_to_routers()
        update = RouterUpdate(replicas=controller.state().replicas, epochs=known, current=1)
        assert ordered(service.sync(Order(term + 1, 1), update)).epoch == 1  # another one takes over
        nothing = RouterUpdate(replicas=(), epochs={}, current=0)
        for work in (
            service.sync(Order(term, 10**6), nothing),
            service.unload(Order(term, 10**6), GATE, version),
            service.stage(Order(term, 10**6), Candidate(id=GATE, counter=2, gate=layer.gate)),
        ):
            with pytest.raises(Fenced, match="another controller has taken over"):
                ordered(work)
        assert [held for held in service._held if held[0] == GATE] == [(GATE, version)]
        np.testing.assert_allclose(client.forward("news", [1.0]), np.sin([1.0]))
        eventually(lambda: "taken over" in controller.problem, 10.0, "the old one takes no more turns")
        eventually(
            lambda: "taken over" in client.status()["controller"].get("problem", ""), 10.0, "the status says why"
        )
