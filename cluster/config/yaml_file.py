"""Reads YAML text as plain data with line numbers; the only file that parses YAML, and always safely."""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from ...experts.errors import ConfigError
from .document import Document, Keys, Place

_TEXT, _LIST, _MAP, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map", "merge"))


def read_trusted(path: Path) -> str:
    """The text of a file that is trusted like code: it must belong to this user or root, and only they may write it.

    Raises ConfigError.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            status = os.fstat(file.fileno())
            if status.st_uid not in (os.geteuid(), 0):
                raise ConfigError(f"{path} names code to run, but belongs to another user: use your own copy")
            if others_can_write(status):
                raise ConfigError(f"{path} names code to run, but others can write it: run `chmod go-w {path}`")
            return file.read()
    except FileNotFoundError:
        raise ConfigError(f"there is no file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def read_document(text: str, source: str, needs: str = "layers") -> Document:
    """Read a file that must be a map; unreadable values and duplicate keys are recorded as mistakes of the document.

    `needs` names the keys that such a file must have. Raises ConfigError if the text is not YAML, or not a map.
    """
    loader = _Loader(text)
    loader.document = document = Document(source)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{source}:1: the file is empty; it needs `{needs}`")
        document.data = loader.read(root, (), Place(1, f"{source}:1"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line, problem = mark.line + 1 if mark else 1, getattr(error, "problem", error)
        raise ConfigError(f"{source}:{line}: this is not YAML: {problem}") from None
    finally:
        loader.dispose()
    if not isinstance(document.data, dict):
        raise ConfigError(f"{source}:1: the file must be a map with `{needs}`")
    return document


def parse_value(text: str) -> object:
    """Parse one YAML value from a command line or the environment. Raises ConfigError."""
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"{text!r} is not valid YAML: put it in quotes") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with 1e-3 as a number as in YAML 1.2; `read` records line numbers in a document."""

    document: Document

    def read(self, node: yaml.Node, keys: Keys, place: Place, inside: tuple[yaml.Node, ...] = ()) -> Any:
        """The data of a node, whose parents are `inside`; a node that contains itself is a mistake."""
        self.document.places[keys] = place
        if node in inside:
            return self._refuse(place, "an alias (*) refers to an anchor (&) that contains it")
        inside = (*inside, node)
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            entries = self._entries(node, inside).items()
            return {key: self.read(child, (*keys, key), at, inside) for key, (at, child) in entries}
        if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
            return [self.read(child, (*keys, i), self._place(child), inside) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.CollectionNode):
            return self._refuse(place, f"the tag {node.tag!r} is not supported: remove it")
        try:
            return self.construct_object(node)
        except (yaml.YAMLError, ValueError):
            kind = node.tag.rpartition(":")[2]
            return self._refuse(place, f"{node.value!r} cannot be read as {kind}: put it in quotes, without a tag")

    def _entries(self, node: yaml.MappingNode, inside: tuple[yaml.Node, ...]) -> dict[str, tuple[Place, yaml.Node]]:
        """Place and value of each entry; entries merged by `<<` come last and never replace the map's own."""
        own: dict[str, tuple[Place, yaml.Node]] = {}
        merged: list[dict[str, tuple[Place, yaml.Node]]] = []
        for key, child in node.value:
            place = self._place(key)
            if key.tag == _MERGE:
                for base in child.value if isinstance(child, yaml.SequenceNode) else [child]:
                    if isinstance(base, yaml.MappingNode) and base not in inside:
                        merged.append(self._entries(base, (*inside, base)))
                    else:
                        self._refuse(place, "<< must merge a map or a list of maps")
            elif key.tag != _TEXT:
                self._refuse(place, f"key {key.value!r} must be text: put it in quotes")
            elif key.value in own:
                self._refuse(place, f"key {key.value!r} appears twice, first at {own[key.value][0].text}")
            else:
                own[key.value] = (place, child)
        for entries in merged:
            own |= {key: entry for key, entry in entries.items() if key not in own}
        return own

    def _place(self, node: yaml.Node) -> Place:
        line = node.start_mark.line + 1
        return Place(line, f"{self.document.source}:{line}")

    def _refuse(self, place: Place, message: str) -> None:
        self.document.mistakes.add((place, message))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def others_can_write(status: os.stat_result) -> bool:
    """Whether users other than the owner can write a file, or place files in a folder."""
    return bool(status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_private_group(status)))


def _is_private_group(status: os.stat_result) -> bool:
    """Whether the file's group is the private group that many systems create for each user."""
    try:
        group, owner = grp.getgrgid(status.st_gid), pwd.getpwuid(status.st_uid)
    except KeyError:
        return False
    return group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name}
