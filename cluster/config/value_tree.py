"""Values of a configuration that know where they stand, and the list of everything that is wrong with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...experts.errors import ConfigError

_LINE = re.compile(r":(\d+): ")
_KINDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "text": (str, "text"),
    "list": (list, "a list"),
    "map": (dict, "a map"),
    "number": ((int, float), "a number"),
}


@dataclass(frozen=True)
class Located:
    """A scalar, a list or a map of a configuration, with its place: `mesh.yaml:12`, or what else gave it.

    `value` is a plain scalar, a list of Located, or a dict of Located by key. The place of an entry is that of its key.
    """

    value: Any
    where: str

    @classmethod
    def given(cls, value: object, where: str) -> Located:
        """A value that does not come from a file, such as one of the command line, with all it holds."""
        if isinstance(value, Mapping):
            return cls({str(key): cls.given(child, where) for key, child in value.items()}, where)
        if isinstance(value, (list, tuple)):
            return cls([cls.given(child, where) for child in value], where)
        return cls(value, where)

    def plain(self) -> Any:
        """The value without the places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def items(self) -> Iterator[tuple[str, Located]]:
        """The entries of a map; nothing for anything else."""
        return iter(self.value.items() if isinstance(self.value, dict) else ())

    def where_of(self, key: str) -> str:
        """Where an entry of the map stands, or the map itself if it has no such entry."""
        return next((child.where for name, child in self.items() if name == key), self.where)

    def replaced(self, path: tuple[str, ...], value: Located) -> Located:
        """The same tree with another value at a path of keys; maps that are missing are made."""
        if not path:
            return value
        children = dict(self.items())
        child = children.get(path[0], Located({}, value.where))
        return Located({**children, path[0]: child.replaced(path[1:], value)}, self.where)


class Mistakes:
    """Collects what is wrong, each with its place, so that one look mends it all."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, where: str, message: str) -> None:
        """Note a mistake; the same one is noted once."""
        line = f"{where}: {message}"
        if line not in self._found:
            self._found.append(line)

    def check_keys(self, node: Located, known: Iterable[str], what: str) -> None:
        """Note every key of a map that is not known, with the known one that is closest."""
        names = list(known)
        for key, child in node.items():
            if key not in names:
                self.add(child.where, f"{what} has no key {key!r}{suggestion(key, names)}")

    def check_kind(self, node: Located, kind: str, name: str) -> bool:
        """Whether a value is "text", a "list", a "map" or a "number"; noted if it is not."""
        types, wanted = _KINDS[kind]
        if isinstance(node.value, types) and not isinstance(node.value, bool):
            return True
        shown = {dict: "a map", list: "a list", type(None): "empty"}.get(type(node.value), repr(node.value))
        self.add(node.where, f"{name} must be {wanted}, not {shown}")
        return False

    def raise_if_any(self, source: str) -> None:
        """Raise one ConfigError that lists every mistake in the order of the lines, if there is one."""
        found = sorted(self._found, key=_line_number)
        if len(found) == 1:
            raise ConfigError(found[0])
        if found:
            raise ConfigError(f"{source} has {len(found)} mistakes:" + "".join(f"\n  {line}" for line in found))


def suggestion(key: str, known: Iterable[str]) -> str:
    """Text for the end of a message: the known key that is closest, or the list of those that are known."""
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f"; it takes {', '.join(names)}"


def _line_number(mistake: str) -> int:
    found = _LINE.search(mistake)
    return int(found[1]) if found else 0
