"""The syntax of names of clusters, layers and experts, which are used in ids, files and folders."""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def is_name(value: object) -> bool:
    """Whether a value is a valid name: 1 to 64 letters, digits, '_', '-' or '.', not starting with '-' or '.'."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


GATE, LAYER = "gate", "layer"
"""What no expert may be called: of layer `news`, `news/gate` is the gate, and `news/layer` what it is made of."""


def is_layer_id(id: str) -> bool:
    """Whether an id is that of a layer, and not of an expert or gate."""
    return id.endswith(f"/{LAYER}")


def is_gate_id(id: str) -> bool:
    """Whether an id is that of a gate."""
    return id.endswith(f"/{GATE}")
