"""Plain data with the file position of each value, and its mistakes with the keys that lead to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ...experts.errors import ConfigError, ExpertMeshError
from ...experts.suggestion import suggestion

Key = TypeVar("Key", str, int)
Keys = tuple[str | int, ...]
"""The path to a value: keys of maps and positions in lists."""
Value = TypeVar("Value")


class Place(NamedTuple):
    """The position of a value: line 12, `mesh.yaml:12`. Line 0 marks a value that is not from the file."""

    line: int
    text: str


@dataclass
class Document:
    """The data of a configuration, with the place of each value by its path; an entry has the place of its key."""

    source: str
    data: Any = None
    places: dict[Keys, Place] = field(default_factory=dict)
    mistakes: set[tuple[Place, str]] = field(default_factory=set)

    def place(self, keys: Keys) -> Place:
        """The place of a value, or of its closest parent if the value is missing."""
        while keys not in self.places:
            keys = keys[:-1]
        return self.places[keys]

    def put(self, keys: Keys, value: object, origin: str) -> None:
        """Set a value that comes from `origin`, such as the command line; missing parent maps are created."""
        ways = [keys[:depth] for depth in range(len(keys) + 1)]
        self.places = {at: place for at, place in self.places.items() if at[: len(keys)] != keys}
        self.places |= {way: Place(0, origin) for way in ways if way not in self.places}
        self.data = _with(self.data, keys, value)

    def raise_if_wrong(self, found: Iterable[tuple[Keys, str]] = ()) -> None:
        """Raise one ConfigError that lists these mistakes and the document's own by line, if there are any."""
        mistakes = self.mistakes | {(self.place(keys), message) for keys, message in found}
        lines = [f"{place.text}: {message}" for place, message in sorted(mistakes)]
        if len(lines) == 1:
            raise ConfigError(lines[0])
        if lines:
            raise ConfigError(f"{self.source} has {len(lines)} mistakes:" + "".join(f"\n  {line}" for line in lines))


class Mistakes:
    """Collects the mistakes in a value while reading continues."""

    def __init__(self) -> None:
        self.found: list[tuple[Keys, str]] = []

    @contextmanager
    def at(self, *keys: str | int) -> Iterator[None]:
        """Record the errors of a block under these keys, and continue after it."""
        try:
            yield
        except ExpertMeshError as error:
            inside = (isinstance(error, ConfigError) and error.mistakes) or (((), error.message),)
            self.found += [((*keys, *inner), message) for inner, message in inside]

    def raise_if_any(self) -> None:
        """Raise a ConfigError with all mistakes, if there are any."""
        if self.found:
            raise ConfigError.of(*self.found)


def each(entries: Mapping[Key, Any], read: Callable[[Key, Any], Value]) -> dict[Key, Value]:
    """Read every entry by its key and value. Raises a ConfigError with the mistakes of all entries."""
    values: dict[Key, Value] = {}
    wrong = Mistakes()
    for key, value in entries.items():
        with wrong.at(key):
            values[key] = read(key, value)
    wrong.raise_if_any()
    return values


def as_map(value: object, name: str) -> dict[str, Any]:
    """Return a value that must be a map. Raises ConfigError."""
    if isinstance(value, dict):
        return value
    raise ConfigError(f"{name} must be a map, not {shown(value)}")


def check_key(key: str, known: Iterable[str], what: str) -> None:
    """Raise ConfigError for an unknown key, and suggest the closest known one."""
    names = list(known)
    if key not in names:
        raise ConfigError(f"{what} has no key {key!r}{suggestion(key, names, 'it takes')}")


def shown(value: object) -> str:
    """A value of the wrong type, as a message shows it."""
    return {dict: "a map", list: "a list", tuple: "a list", type(None): "empty"}.get(type(value), repr(value))


def _with(data: object, keys: Keys, value: object) -> object:
    if not keys:
        return value
    entries = data if isinstance(data, dict) else {}
    return {**entries, keys[0]: _with(entries.get(keys[0]), keys[1:], value)}
