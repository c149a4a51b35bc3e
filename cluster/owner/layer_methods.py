"""The methods of a cluster that change its layers while it serves."""

from __future__ import annotations

import uuid
from typing import Any

from ...experts.spec import Expert, check_expert
from ...router.gates import Gate
from ...router.mixture.layer import Layer
from ..config.layer_changes import LayerEdit, LayersRequest
from ..rpc.changes import REMOVE


class LayerMethods:
    """Adds and removes experts and layers; who inherits carries the requests out."""

    def add_expert(
        self,
        expert_id: str,
        expert: Expert,
        *,
        gate: Gate | None = None,
        shared: bool = False,
        timeout: float = 120.0,
        allow_unverified: bool = False,
    ) -> dict[str, Any]:
        """Add an expert ("news/e8") to a layer, with the layer's new `gate`, in one epoch, under traffic.

        It is the last one of the gate. A `shared` expert needs no gate. Returns the "epoch", the names of the layer's
        experts "before" and "after", and the "versions" of what is new. It is kept for the next start, unless it is a
        live object.

        Raises InvalidRequest for an expert that is there already, or a gate that does not pick among as many experts,
        NotFound for an unknown layer, ConfigError where no node has room, and any error of the expert; then all is as
        before.
        """
        layer, _, name = expert_id.partition("/")
        check_expert(expert, expert_id)
        comes = {name: expert}
        edit = LayerEdit(shared=comes) if shared else LayerEdit(experts=comes, gate=gate)
        return self._edit(layer, edit, timeout, allow_unverified)

    def remove_expert(self, expert_id: str, *, gate: Gate | None = None, timeout: float = 120.0) -> dict[str, Any]:
        """Remove an expert from a layer, with the layer's new `gate`, in one epoch, under traffic.

        Requests that have begun are answered by it. Its replicas are ended once no request can need it. Returns and
        raises as `add_expert`.
        """
        layer, _, name = expert_id.partition("/")
        return self._edit(layer, LayerEdit(remove=(name,), gate=gate), timeout)

    def add_layer(self, layer: Layer, *, timeout: float = 120.0, allow_unverified: bool = False) -> dict[str, Any]:
        """Add a layer with all its experts, under traffic. Returns and raises as `add_expert`."""
        return self._edit(layer.name, LayerEdit.of(layer), timeout, allow_unverified)

    def remove_layer(self, name: str, *, timeout: float = 120.0) -> dict[str, Any]:
        """Remove a layer, which must not be the last one, under traffic. Returns and raises as `add_expert`."""
        return self._edit(name, LayerEdit(kind=REMOVE), timeout)

    def _carry_out(self, asked: LayersRequest) -> dict[str, Any]:
        raise NotImplementedError

    def _edit(self, layer: str, edit: LayerEdit, timeout: float, unverified: bool = False) -> dict[str, Any]:
        named = {layer: edit}
        return self._carry_out(
            LayersRequest(change_id=uuid.uuid4().hex, layers=named, timeout=timeout, allow_unverified=unverified)
        )
