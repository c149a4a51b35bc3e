"""Dataclasses as maps declare them: pydantic reads each entry in the type of its field, then the record judges it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ...experts.errors import ConfigError
from .document import Mistakes, check_key, shown

Record = TypeVar("Record", bound=Any)
Readers = Mapping[str, Callable[[Any], Any]]
_KINDS = {
    "dict_type": "a map",
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "text",
    "tuple_type": "a list",
}


def filled(record: Record, declared: Mapping[str, Any], what: str, wrong: Mistakes, readers: Readers) -> Record:
    """A record with the entries of a map set one after another; each that is refused is noted by its key.

    Null counts as not given. `readers` read what stands otherwise in a map than in the record.
    """
    known = [item.name for item in fields(record) if item.name not in ("name", "live")]
    for key, value in declared.items():
        with wrong.at(key):
            check_key(key, known, what)
            if key in readers and value is not None:
                record = replace(record, **{key: readers[key](value)})
            elif value is not None:
                typed(type(record), key, value)
                record = replace(record, **{key: value})
    return record


def typed(kind: type, name: str, value: Any) -> Any:
    """A value in the type that a dataclass gives a field; a list stands for a tuple. Raises ConfigError.

    A field may be annotated with pydantic's bounds, and with a description of what its value must be.
    """
    adapter, wanted = _field(kind, name)
    try:
        return adapter.validate_python(tuple(value) if isinstance(value, list) else value)
    except ValidationError as error:
        found = error.errors()
    items = [item for item in found if isinstance(value, dict) and item["loc"] and item["loc"][0] in value]
    if wanted is None and items:
        one = name.removesuffix("s")
        raise ConfigError.of(*((item["loc"], _told(f"{one} {item['loc'][0]}", item)) for item in items))
    if wanted is None and isinstance(value, list) and found[0]["loc"]:
        wanted = f"a list, each {_KINDS[found[0]['type']]}"
    raise ConfigError(_told(name, found[0], wanted))


def _told(name: str, refused: ErrorDetails, wanted: str | None = None) -> str:
    return f"{name} must be {wanted or _KINDS[refused['type']]}, not {shown(refused['input'])}"


@cache
def _field(kind: type, name: str) -> tuple[TypeAdapter[Any], str | None]:
    hint = get_type_hints(kind, include_extras=True)[name]
    extras = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, FieldInfo)]
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    return TypeAdapter(hint, config=config), extras[0].description if extras else None
