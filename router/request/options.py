"""Checks the options of a request against its layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ...experts.errors import InvalidRequest, SpecMismatch
from ...experts.protocol import CallOptions
from ...experts.tensors import dtype_name
from ..gates import Routing
from ..mixture.layer import Layer
from .batching import GateRequest


def gate_request(
    layer: Layer,
    x: Tensor,
    options: CallOptions,
    features: Tensor | None = None,
    indices: Tensor | None = None,
    weights: Tensor | None = None,
) -> GateRequest:
    """Check rows `x` [T, ...] and options, and build the request to the gate.

    Raises InvalidRequest or SpecMismatch; the message names the option.
    """
    if x.ndim == 0:
        raise SpecMismatch("x must be rows [T, ...]; a single row of width D is [1, D]")
    layer.input.check(tuple(x.shape[1:]), dtype_name(x.dtype), "x")
    layer.policy(options.on_missing or layer.on_missing)
    if options.max_lost_mass is not None and not 0 <= options.max_lost_mass <= 1:
        raise InvalidRequest(f"max_lost_mass must lie between 0 and 1, not {options.max_lost_mass}")
    if features is not None and features.shape[:1] != x.shape[:1]:
        raise SpecMismatch(f"gate_input of shape {list(features.shape)} must have {x.shape[0]} rows, as x has")
    if options.top_k is not None and not 1 <= options.top_k <= len(layer.experts):
        raise InvalidRequest(f"top_k must lie between 1 and {len(layer.experts)}, not {options.top_k}")
    gate_input = x if features is None else features
    if indices is None and weights is None:
        return GateRequest(x, gate_input, allowed_experts(layer, options.allow, options.deny), options.top_k)
    if options.top_k is not None or options.allow is not None or options.deny is not None:
        raise InvalidRequest(
            "top_k, allow and deny cannot be combined with a routing (top_k_index, top_k_weights): leave them out"
        )
    return GateRequest(x, gate_input, routing=own_routing(layer, x, indices, weights))


def allowed_experts(layer: Layer, allow: list[str] | None, deny: list[str] | None) -> Tensor | None:
    """Bool [E], True for each expert that the gate may choose, or None for all. Names are "e3" or "layer/e3".

    Raises InvalidRequest for an unknown name, or if no expert is left.
    """
    if allow is None and deny is None:
        return None
    mask = torch.ones(len(layer.experts), dtype=torch.bool)
    if allow is not None:
        mask = torch.zeros_like(mask)
        mask[_positions(layer, allow, "allow")] = True
    mask[_positions(layer, deny or [], "deny")] = False
    if not mask.any():
        raise InvalidRequest(f"allow and deny leave no expert of layer {layer.name} to choose from: allow at least one")
    return mask


def own_routing(layer: Layer, x: Tensor, indices: Tensor | None, weights: Tensor | None) -> Routing:
    """Check the caller's own `top_k_index` [T, K] and `top_k_weights` [T, K]; index -1 means no choice.

    Raises InvalidRequest or SpecMismatch.
    """
    if indices is None or weights is None:
        raise InvalidRequest("top_k_index and top_k_weights belong together: send both or neither")
    if indices.ndim != 2 or indices.shape != weights.shape or indices.shape[0] != x.shape[0]:
        raise SpecMismatch(
            f"top_k_index {list(indices.shape)} and top_k_weights {list(weights.shape)} must both be [{x.shape[0]}, K]"
        )
    if indices.is_floating_point() or indices.dtype == torch.bool or not weights.is_floating_point():
        raise SpecMismatch("top_k_index must be integers and top_k_weights floating point")
    if indices.numel() and (int(indices.max()) >= len(layer.experts) or int(indices.min()) < -1):
        raise InvalidRequest(f"top_k_index must lie between -1 and {len(layer.experts) - 1}")
    weights = weights.double() if weights.dtype == torch.float64 else weights.float()
    if not bool(weights.isfinite().all()):
        raise InvalidRequest("top_k_weights must be finite")
    indices = indices.long()
    ordered = indices.sort(dim=1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise InvalidRequest("top_k_index names an expert twice for one row")
    if not bool((indices >= 0).any(dim=1).all()):
        raise InvalidRequest("top_k_index leaves a row without any expert")
    return Routing(indices, weights.masked_fill(indices < 0, 0))


def _positions(layer: Layer, names: list[str], option: str) -> list[int]:
    order = {name: position for position, name in enumerate(layer.experts)}
    order |= {name: position for position, name in enumerate(layer.expert_ids)}
    unknown = [name for name in names if name not in order]
    if unknown and unknown[0].removeprefix(f"{layer.name}/") in layer.shared:
        raise InvalidRequest(
            f"{option} names {unknown[0][:64]!r}, a shared expert of layer {layer.name}: shared experts answer every "
            "row, and no request chooses among them; leave it out"
        )
    if unknown:
        raise InvalidRequest(f"{option} names {unknown[0][:64]!r}, which is not an expert of layer {layer.name}")
    return [order[name] for name in names]
