"""The state of an optimizer as tensors and plain JSON, and back exactly: `load_state_dict` would cast some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PREFIX = "optimizer."


def state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimizer's state, as "optimizer.<parameter>.<key>", and the rest in plain JSON types."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        plain[str(index)] = {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
        tensors |= {f"{PREFIX}{index}.{key}": value for key, value in entry.items() if isinstance(value, Tensor)}
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Put back what `state_of` returned; other tensors are ignored. Raises KeyError, ValueError or TypeError."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in document["plain"].items()}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            index, _, key = name.removeprefix(PREFIX).partition(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": {}, "param_groups": document["groups"]})
    groups = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    if any(index >= len(groups) for index in state):
        raise ValueError("the optimizer's state is of more parameters than it has")
    for at, own in state.items():
        parameter, group = groups[at]
        counts_there = group.get("capturable") or group.get("fused")  # as torch has it: else "step" stays on the host
        optimizer.state[parameter] = {
            key: value.to(parameter.device) if isinstance(value, Tensor) and (key != "step" or counts_there) else value
            for key, value in own.items()
        }
