"""Fills dataclasses from maps: pydantic checks each entry's type, then the record's own rules apply."""

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
    """A record with the entries of a map set one after another; the mistakes of an entry are recorded under its key.

    Null counts as not set. `readers` convert entries whose form in a map differs from that in the record.
    """
    names = [item.name for item in fields(record) if item.name not in ("name", "live")]
    for key, value in declared.items():
        with wrong.at(key):
            check_key(key, names, what)
            if key in readers and value is not None:
                record = replace(record, **{key: readers[key](value)})
            elif value is not None:
                typed(type(record), key, value)
                record = replace(record, **{key: value})
    return record


def typed(kind: type, name: str, value: Any) -> Any:
    """Check a value against the type of a dataclass field; a list is taken as a tuple. Raises ConfigError.

    A field's annotation may hold pydantic bounds and a description of valid values.
    """
    adapter, description = _field(kind, name)
    try:
        return adapter.validate_python(tuple(value) if isinstance(value, list) else value)
    except ValidationError as error:
        errors = error.errors()
    items = [item for item in errors if isinstance(value, dict) and item["loc"] and item["loc"][0] in value]
    if description is None and items:
        one = name.removesuffix("s")
        raise ConfigError.of(*((item["loc"], _message(f"{one} {item['loc'][0]}", item)) for item in items))
    if description is None and isinstance(value, list) and errors[0]["loc"]:
        description = f"a list, each {_KINDS[errors[0]['type']]}"
    raise ConfigError(_message(name, errors[0], description))


def _message(name: str, refused: ErrorDetails, description: str | None = None) -> str:
    return f"{name} must be {description or _KINDS[refused['type']]}, not {shown(refused['input'])}"


@cache
def _field(kind: type, name: str) -> tuple[TypeAdapter[Any], str | None]:
    hint = get_type_hints(kind, include_extras=True)[name]
    infos = [info for info in getattr(hint, "__metadata__", ()) if isinstance(info, FieldInfo)]
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    return TypeAdapter(hint, config=config), infos[0].description if infos else None
