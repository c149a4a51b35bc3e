"""Names that need an optional extra: import their module, or say which `pip install` provides it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .errors import MissingExtra

_PACKAGE = __name__.partition(".")[0]


def load(module: str, what: str, extra: str = "cluster") -> ModuleType:
    """Import a module of this package on demand; `what` is the name that the user imported.

    Raises MissingExtra where a dependency is not installed, and ImportError where a module of this package is missing.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "a dependency").partition(".")[0]
        if missing == _PACKAGE:
            raise
        raise MissingExtra(
            f"{what} needs {missing}, which is not installed; fix it with: pip install '{_PACKAGE}[{extra}]'"
        ) from error
