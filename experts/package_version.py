"""The version of this installation."""

from __future__ import annotations

from importlib import metadata

_PACKAGE = __name__.partition(".")[0]


def version() -> str:
    """The installed version; "0+source" for a checkout that is not installed."""
    try:
        return metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        return "0+source"
