"""The methods of the service, and the lowest role that may call each."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

from ...experts.errors import ConfigError

SERVICE = "expertmesh.v1.Mesh"


class Role(IntEnum):
    """The permissions of a token; a higher role includes those below."""

    READER = 1
    OPERATOR = 2
    ADMIN = 3

    @classmethod
    def parse(cls, text: object) -> Role:
        """Parse "reader", "operator" or "admin". Raises ConfigError."""
        for role in cls:
            if text == role.label:
                return role
        raise ConfigError(f"role must be one of {', '.join(_LABELS)}, not {text!r}")

    @property
    def label(self) -> str:
        """The name of the role in files and messages."""
        return self.name.lower()


_LABELS = tuple(role.label for role in Role)

METHODS: Mapping[str, Role] = MappingProxyType(
    {
        "Call": Role.READER,
        "CallStream": Role.READER,
        "Status": Role.READER,
        "Check": Role.READER,
        "Watch": Role.READER,
        "SwapProgress": Role.READER,
        "History": Role.READER,
        "Pin": Role.READER,
        "Unpin": Role.READER,
        "Pass": Role.READER,
        "PassStream": Role.READER,
        "Drain": Role.OPERATOR,
        "Upload": Role.OPERATOR,
        "Swap": Role.OPERATOR,
        "Leases": Role.OPERATOR,
        "Declared": Role.OPERATOR,
        "Scale": Role.OPERATOR,
        "Train": Role.OPERATOR,
        "TrainStream": Role.OPERATOR,
        "Change": Role.ADMIN,
    }
)
"""The lowest role that may call each method; no role may call a method that is not listed.

A swap that names a factory requires the admin role; `gateway/swaps.py` checks that.
"""


def new_request_id() -> str:
    """A new request id: 32 hex digits."""
    return uuid.uuid4().hex
