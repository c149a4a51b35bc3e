"""A canonical text of arguments, the same in every process, for the digest of a version."""

from __future__ import annotations

import hashlib
import json
import sys
import types

import numpy as np
from torch import Tensor

from ..errors import ConfigError
from ..tensors import byte_view


def canonical(value: object) -> str:
    """The same text for equal values, in every process. Raises ConfigError for a value without such a text."""
    try:
        return json.dumps(_text_keys(value), sort_keys=True, separators=(",", ":"), default=_described)
    except ConfigError:
        raise
    except (RecursionError, ValueError):
        raise ConfigError("an argument of a factory contains itself: pass numbers, text, lists or maps") from None


def named(value: object) -> str:
    """Describe a value by its name: module, qualified name, and the version of the package."""
    module = str(getattr(value, "__module__", None) or type(value).__module__)
    package = sys.modules.get(module.partition(".")[0])
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__
    return f"{module}:{name}@{getattr(package, '__version__', '')}"


def sha256(*texts: str) -> str:
    """The sha256 of a sequence of texts in hexadecimal; it depends on the boundaries between them."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def _text_keys(value: object) -> object:
    """Replace maps with non-text keys by lists of pairs, because JSON would turn the keys into text."""
    if isinstance(value, (list, tuple)):
        return [_text_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    if all(type(key) is str for key in value):
        return {key: _text_keys(item) for key, item in value.items()}
    return ["map", sorted([canonical(key), canonical(item)] for key, item in value.items())]


def _described(value: object) -> object:
    if isinstance(value, Tensor):
        return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(byte_view(value)).hexdigest()]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return ["array", value.dtype.str, list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, (set, frozenset)):
        return ["set", sorted(canonical(item) for item in value)]
    if isinstance(value, (np.generic, complex, bytes)):
        return [type(value).__name__, repr(value)]
    if type(value).__module__ == "torch" or value is Ellipsis:
        return str(value)
    if isinstance(value, types.BuiltinFunctionType) and not isinstance(value.__self__, (types.ModuleType, type)):
        return ["bound", named(value), canonical(value.__self__)]
    if isinstance(value, (type, types.BuiltinFunctionType, np.ufunc)):
        return named(value)
    raise ConfigError(
        f"an argument of type {type(value).__name__} cannot be part of a version's digest: pass numbers, text, lists, "
        "maps, arrays or tensors, and construct the object inside the factory"
    )
