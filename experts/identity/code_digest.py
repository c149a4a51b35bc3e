"""A digest of code that is the same in every process: functions, classes, and the values they refer to.

Code of torch, numpy, scipy and the standard library, and whatever is compiled, is described by its name and the version
of its package. Code that is called by a global name is known by that name alone. Our own gates are described by name
and `revision`: rewording or rearranging their code must not make new versions of everybody's gates.
"""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Mapping

from torch import nn

from ..errors import ConfigError
from ..weights.files import tensor_digest, tensors_of
from .canonical import canonical, named, sha256

_FOREIGN = frozenset({"torch", "numpy", "scipy"}) | sys.stdlib_module_names
_OWN_GATES = f"{__name__.partition('.')[0]}.router.gates."
_MODULE_STATE = frozenset(vars(nn.Module()))
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def code_digest(behaviour: object) -> str:
    """The sha256 of the behaviour of a function, module or callable object, in hexadecimal.

    It covers code, defaults, closures, bound arguments, attributes of objects and of their classes. If `behaviour` is
    itself a module, its tensors are excluded: they have a digest of their own, computed from the tensors read back.
    """
    describer = _Describer()
    if isinstance(behaviour, nn.Module):
        return sha256(*describer.module(behaviour))
    return describer.describe(behaviour)


class _Describer:
    """Walks the parts of an object; a repeated part is described by the position of its first occurrence."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, object]] = {}
        self._known: set[type] = set()

    def describe(self, value: object) -> str:
        """A text for any value."""
        if isinstance(value, type):
            return self._once(value)
        try:
            return canonical(value)
        except ConfigError:
            return self._once(value)

    def module(self, module: nn.Module) -> list[str]:
        """The classes, attributes and printed structure of a module and its submodules, without their tensors."""
        texts = [_ADDRESS.sub("", repr(module))]
        for name, child in module.named_modules():
            state = {key: item for key, item in vars(child).items() if key not in _MODULE_STATE}
            loose = {key: child._buffers[key] for key in sorted(child._non_persistent_buffers_set)}
            texts += [name, *self._classes(type(child)), *self._map(state), *self._map(loose)]
        return texts

    def _once(self, value: object) -> str:
        if id(value) in self._seen:
            return f"again:{self._seen[id(value)][0]}"
        self._seen[id(value)] = (len(self._seen), value)
        return sha256(*self._parts(value))

    def _parts(self, value: object) -> list[str]:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return ["method", self.describe(value.__func__), self.describe(value.__self__)]
        if isinstance(value, functools.partial):
            return ["partial", *map(self.describe, (value.func, value.args)), *self._map(value.keywords)]
        if isinstance(value, type):
            return self._classes(value)
        if isinstance(value, (list, tuple)):
            return [type(value).__name__, *map(self.describe, value)]
        if isinstance(value, Mapping):
            return ["map", *(text for key, item in value.items() for text in (self.describe(key), self.describe(item)))]
        if isinstance(value, nn.Module):
            return [*self.module(value), tensor_digest(tensors_of(value))]
        if _is_foreign(type(value)):
            wrapped = getattr(value, "__wrapped__", None)
            return [named(value)] if wrapped is None else [named(value), self.describe(wrapped)]
        return [*self._classes(type(value)), *self._map(_attributes(value))]

    def _function(self, function: types.FunctionType) -> list[str]:
        values = [_content(cell) for cell in function.__closure__ or ()]
        if _is_foreign(function) and not values:
            return [named(function)]
        values += function.__defaults__ or ()
        texts = [function.__qualname__, *self._code(function.__code__), *map(self.describe, values)]
        return texts + self._map(function.__kwdefaults__ or {})

    def _code(self, code: types.CodeType) -> list[str]:
        texts = [code.co_code.hex(), getattr(code, "co_exceptiontable", b"").hex(), *code.co_names]
        for constant in code.co_consts:
            nested = isinstance(constant, types.CodeType)
            texts.append(sha256(*self._code(constant)) if nested else self.describe(constant))
        return texts

    def _classes(self, cls: type) -> list[str]:
        return [text for base in cls.__mro__ for text in self._class(base)]

    def _class(self, cls: type) -> list[str]:
        if _is_foreign(cls):
            return [named(cls)]
        if cls.__module__.startswith(_OWN_GATES):
            return [cls.__qualname__, str(getattr(cls, "revision", 1))]
        if cls in self._known:
            return [f"again:{cls.__qualname__}"]
        self._known.add(cls)
        texts = [cls.__qualname__]
        for name, member in sorted(vars(cls).items()):
            functions = _functions(member)
            if functions or not (name.startswith("__") and name.endswith("__")):
                texts += [name, *map(self.describe, functions or [member])]
        return texts

    def _map(self, values: Mapping[str, object]) -> list[str]:
        return [text for key in sorted(values) for text in (key, self.describe(values[key]))]


def _functions(member: object) -> list[object]:
    if isinstance(member, property):
        return [accessor for accessor in (member.fget, member.fset) if accessor is not None]
    if isinstance(member, (staticmethod, classmethod)):
        return [member.__func__]
    if isinstance(member, functools.cached_property):
        return [member.func]
    return [member] if isinstance(member, types.FunctionType) else []


def _attributes(value: object) -> dict[str, object]:
    slots = [name for cls in type(value).__mro__ for name in vars(cls).get("__slots__", ())]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not assigned yet
        return "(empty)"


def _is_foreign(value: object) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in _FOREIGN
