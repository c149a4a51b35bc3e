"""A digest of code that is the same in every process: functions, classes, and the values they refer to.

Code of torch, numpy, scipy and the standard library, and whatever is compiled, is described by its name and the version
of its package. Functions and classes that are called by a global name are described if they stand in the same module,
and else known by that name alone. Our own gates are described by name and `revision`: rewording or rearranging their
code must not make new versions of everybody's gates.

Objects may hide state: what is compiled or cannot be copied, and objects of the standard library, into which only the
digest of a live object looks. Such a digest is marked `opaque`: equal digests then do not mean equal behaviour.
"""

from __future__ import annotations

import copyreg
import functools
import logging
import random
import re
import sys
import threading
import types
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..weights.files import tensor_digest, tensors_of
from .canonical import canonical, named, sha256

_LIBRARIES = frozenset({"torch", "numpy", "scipy"})
_FOREIGN = _LIBRARIES | sys.stdlib_module_names
_OWN_GATES = f"{__name__.partition('.')[0]}.router.gates."
_MODULE_STATE = frozenset(vars(nn.Module()))
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

RECIPE = 2
"""How new versions are made; a version that is recorded is made again as it was.

1: the digest sees no state of objects of torch, numpy, scipy and the standard library, no hooks of modules, and no code
behind global names; random weights do not depend on the id of the expert. 2: as the text above says.
"""

_STATELESS = (
    types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
    types.MethodWrapperType, types.GetSetDescriptorType, types.MemberDescriptorType, types.ModuleType,
    type(threading.Lock()), type(threading.RLock()), threading.Event, threading.Condition, threading.Semaphore,
    threading.local, weakref.ref, logging.Logger, np.ufunc, torch.Size, type(vars(Mapping)["_abc_impl"]),
)  # fmt: skip
"""Kinds whose objects are known by their names, or only coordinate."""

_PRINTED = (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.finfo,
    torch.iinfo,
    torch.Size,
    torch.qscheme,
)
"""Kinds of torch whose text tells everything."""

_DRAWS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
"""Kinds whose state changes with use."""


@dataclass(frozen=True)
class CodeDigest:
    """The sha256 of a behaviour in hexadecimal; `opaque` where parts of it could not be seen."""

    digest: str
    opaque: bool = False


def code_digest(behaviour: object) -> str:
    """The digest of `examined` by recipe 1: of code that a record or a file names, and so can be constructed again."""
    return examined(behaviour, 1).digest


def examined(behaviour: object, recipe: int = RECIPE, *, live: bool = False) -> CodeDigest:
    """The digest of the behaviour of a function, module or callable object.

    It covers code, defaults, closures, bound arguments, attributes of objects and of their classes. If `behaviour` is
    itself a module, its tensors are excluded: they have a digest of their own, computed from the tensors read back.
    `live` looks into objects of the standard library too: a constructor may fill them with times, paths and numbers of
    processes, which are others in every replica.
    """
    describer = _Describer(recipe, live)
    try:
        if isinstance(behaviour, nn.Module):
            digest = sha256(*describer.module(behaviour))
        else:
            digest = describer.describe(behaviour)
    except RecursionError:
        if recipe == 1:
            raise
        return CodeDigest(sha256("too deep"), opaque=True)
    return CodeDigest(digest, describer.opaque)


def difference(one: object, other: object, recipe: int) -> str | None:
    """What makes the digests of two objects differ: the name of an attribute where it is one; None where nothing."""
    if examined(one, recipe).digest == examined(other, recipe).digest:
        return None
    parts = [_named_parts(value) for value in (one, other)]
    names = (name for name in parts[0] if name in parts[1])
    return next((n for n in names if examined(parts[0][n], recipe) != examined(parts[1][n], recipe)), "its state")


def _named_parts(value: object) -> dict[str, object]:
    """The attributes of an object, of a module's submodules, and the variables of a function, by name."""
    if isinstance(value, nn.Module):
        children = [(f"{name}." if name else "", vars(child)) for name, child in value.named_modules()]
        return {
            f"{path}{key}": item for path, state in children for key, item in state.items() if key not in _MODULE_STATE
        }
    if isinstance(value, types.FunctionType):
        return dict(zip(value.__code__.co_freevars, map(_content, value.__closure__ or ()), strict=True))
    return _attributes(value)


class _Describer:
    """Walks the parts of an object; a repeated part is described by the position of its first occurrence."""

    def __init__(self, recipe: int, live: bool) -> None:
        self.opaque = False
        self._sees = recipe > 1
        self._live = live
        self._seen: dict[int, tuple[int, object]] = {}
        self._known: set[type] = set()

    def describe(self, value: object) -> str:
        """A text for any value."""
        if isinstance(value, type) or (self._sees and _is_special(value)):
            return self._once(value)
        try:
            return canonical(value)
        except ConfigError:
            return self._once(value)

    def module(self, module: nn.Module) -> list[str]:
        """The classes, attributes and printed structure of a module and its submodules, without their tensors."""
        texts = [_ADDRESS.sub("", repr(module))]
        for name, child in module.named_modules():
            if isinstance(child, torch.jit.ScriptModule):  # compiled: its attributes cannot be seen
                self.opaque = True
                texts += [name, child.original_name, str(getattr(child, "code", ""))]
                continue
            state = {key: item for key, item in vars(child).items() if key not in _MODULE_STATE}
            loose = {key: child._buffers[key] for key in sorted(child._non_persistent_buffers_set)}
            texts += [name, *self._classes(type(child)), *self._map(state), *self._map(loose)]
            if self._sees:
                hooks = {key: item for key, item in vars(child).items() if key.endswith("_hooks") and item}
                texts += self._map({key: list(item.values()) for key, item in hooks.items()})
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
            return [type(value).__name__, *map(self.describe, value), *self._more(value)]
        if isinstance(value, Mapping):
            items = (text for key, item in value.items() for text in (self.describe(key), self.describe(item)))
            return ["map", *items, *self._more(value)]
        if isinstance(value, nn.Module):
            return [*self.module(value), tensor_digest(tensors_of(value))]
        if _is_foreign(type(value)):
            wrapped = getattr(value, "__wrapped__", None)
            return [named(value), *self._inside(value)] if wrapped is None else [named(value), self.describe(wrapped)]
        self.opaque |= self._sees and _is_compiled(type(value))
        return [*self._classes(type(value)), *self._map(_attributes(value))]

    def _more(self, value: object) -> list[str]:
        """The attributes of a list or map of a kind of its own."""
        return self._map(_attributes(value)) if self._sees else []

    def _inside(self, value: object) -> list[str]:
        """The state of an object of a library, as copying takes it, if this digest looks into such objects."""
        if not self._sees or (isinstance(value, _STATELESS) and _has_name(value)):
            return []
        if not _attributes(value) and not _is_compiled(type(value)):
            return []  # it marks a place
        looks = self._live or type(value).__module__.partition(".")[0] in _LIBRARIES
        parts = _copied(value) if looks and not isinstance(value, _DRAWS) else None
        self.opaque |= parts is None
        return [] if parts is None else list(map(self.describe, parts))

    def _function(self, function: types.FunctionType) -> list[str]:
        values = [_content(cell) for cell in function.__closure__ or ()]
        if _is_foreign(function) and not values:
            return [named(function)]
        values += function.__defaults__ or ()
        if self._sees:
            values += _behind_names(function)
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


def _is_special(value: object) -> bool:
    """Whether the canonical text of a value does not tell everything: a kind of its own of numbers, arrays or maps."""
    if isinstance(value, (list, tuple)):
        return type(value) not in (list, tuple, torch.Size) or any(map(_is_special, value))
    if isinstance(value, dict):
        return type(value) is not dict or any(_is_special(item) for pair in value.items() for item in pair)
    if isinstance(value, Tensor):
        return type(value) not in (Tensor, nn.Parameter) or value.is_quantized or value.layout != torch.strided
    if isinstance(value, np.ndarray):
        return type(value) is not np.ndarray
    if isinstance(value, np.ufunc):
        return not _has_name(value)
    return type(value).__module__ == "torch" and not isinstance(value, _PRINTED)


def _has_name(value: object) -> bool:
    """Whether a ufunc is one of a library, and not made of a function of somebody's own."""
    if not isinstance(value, np.ufunc):
        return True
    return any(getattr(sys.modules.get(name), value.__name__, None) is value for name in ("numpy", "scipy.special"))


def _is_compiled(kind: type) -> bool:
    """Whether a class, or a base of it, is not written in Python: its objects may hold what attributes do not show."""
    own = (types.WrapperDescriptorType, types.MethodDescriptorType)
    members = ((cls, member) for cls in kind.__mro__ if cls is not object for member in vars(cls).values())
    return any(isinstance(member, own) and member.__objclass__ is cls for cls, member in members)


def _copied(value: object) -> list[object] | None:
    """What copying an object takes from it; None for what cannot be copied."""
    if isinstance(value, (torch.TypedStorage, torch.UntypedStorage, np.ufunc)):
        return None
    if isinstance(value, Tensor):
        return [value.int_repr(), value.dequantize()] if value.is_quantized else None
    reduce = copyreg.dispatch_table.get(type(value))
    try:
        parts = reduce(value) if reduce is not None else value.__reduce_ex__(4)
    except Exception:  # noqa: BLE001 (what cannot be copied raises whatever its author chose)
        return None
    return [parts] if isinstance(parts, str) else [list(part) if hasattr(part, "__next__") else part for part in parts]


def _behind_names(function: types.FunctionType) -> list[object]:
    """What a function calls by global names: functions and classes of its own module; in a script, any value."""
    names, codes = set[str](), [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    found = [function.__globals__[name] for name in sorted(names) if name in function.__globals__]
    if function.__module__ == "__main__":
        return found
    return [
        item
        for item in found
        if isinstance(item, (types.FunctionType, type)) and item.__module__ == function.__module__
    ]


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not assigned yet
        return "(empty)"


def _is_foreign(value: object) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in _FOREIGN
