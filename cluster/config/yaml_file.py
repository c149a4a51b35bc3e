"""YAML text as values that know their line; the one file that reads YAML, and never more than plain data of it."""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import yaml

from ...experts.errors import ConfigError
from .value_tree import Located, Mistakes

_PLAIN = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, and 1e-3 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_trusted(path: Path) -> str:
    """The text of a file that is trusted like code: it must belong to this user or root, and nobody else may write it.

    Raises ConfigError.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            status = os.fstat(file.fileno())
            if status.st_uid not in (os.geteuid(), 0):
                raise ConfigError(f"{path} belongs to another user, and it names code: use a copy of yours")
            if status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_private_group(status)):
                raise ConfigError(f"others can write {path}, which names code that would be run: chmod go-w it")
            return file.read()
    except FileNotFoundError:
        raise ConfigError(f"there is no file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _is_private_group(status: os.stat_result) -> bool:
    """Whether the file's group is the one that many systems give each user for himself alone."""
    try:
        group, owner = grp.getgrgid(status.st_gid), pwd.getpwuid(status.st_uid)
    except KeyError:
        return False
    return group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name}


def parse_tree(text: str, source: str, found: Mistakes) -> Located:
    """Read the map that a file is, with the line of every entry; keys that stand twice are among the mistakes.

    Raises ConfigError where it is not YAML, or not a map.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{source}:1: the file is empty; it needs `layers`")
        tree = _located(root, f"{source}:1", source, loader, found, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{source}:{mark.line + 1 if mark else 1}: this is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}:1: this is not YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{source}:1: the file must be a map with the key `layers`")
    return tree


def parse_value(text: str) -> object:
    """Read one value written as YAML, as a shell passes it. Raises ConfigError."""
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"{text!r} is not YAML: put it in quotes") from None


def _located(
    node: yaml.Node, where: str, source: str, loader: _Loader, found: Mistakes, inside: tuple[yaml.Node, ...]
) -> Located:
    """A node of YAML with all it holds; `inside` are the nodes round it, so that one that holds itself is refused."""
    if node in inside:
        found.add(where, "an alias (*) stands inside its own anchor (&)")
        return Located(None, where)
    inside = (*inside, node)
    if isinstance(node, yaml.CollectionNode) and node.tag not in _PLAIN:
        found.add(where, f"the tag {node.tag!r} is not understood: leave it out")
        return Located(None, where)
    if isinstance(node, yaml.SequenceNode):
        children = [_located(child, _at(child, source), source, loader, found, inside) for child in node.value]
        return Located(children, where)
    if isinstance(node, yaml.MappingNode):
        entries: dict[str, Located] = {}
        for key, place, child in _entries(node, source, loader, found, inside):
            if key in entries:
                found.add(place, f"key {key!r} stands twice, first at {entries[key].where}")
            else:
                entries[key] = _located(child, place, source, loader, found, inside)
        return Located(entries, where)
    try:
        return Located(loader.construct_object(node), where)
    except (yaml.YAMLError, ValueError):
        kind = node.tag.rpartition(":")[2]
        found.add(where, f"{node.value!r} cannot be read as {kind}: put it in quotes, without a tag")
        return Located(None, where)


def _entries(
    node: yaml.MappingNode, source: str, loader: _Loader, found: Mistakes, inside: tuple[yaml.Node, ...]
) -> Iterator[tuple[str, str, yaml.Node]]:
    """Key, place and value of each entry; those that `<<` takes over come last and only where the map has none."""
    own: set[str] = set()
    merged: list[yaml.Node] = []
    for key_node, child in node.value:
        place = _at(key_node, source)
        if key_node.tag == _MERGE:
            merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
            continue
        key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if isinstance(key, str):
            own.add(key)
            yield key, place, child
        else:
            found.add(place, f"key {getattr(key_node, 'value', key)!r} must be text: put it in quotes")
    for base in merged:
        if not isinstance(base, yaml.MappingNode) or base in inside:
            found.add(_at(base, source), "<< must take over a map")
            continue
        for key, place, child in _entries(base, source, loader, found, (*inside, base)):
            if key not in own:
                own.add(key)
                yield key, place, child


def _at(node: yaml.Node, source: str) -> str:
    return f"{source}:{node.start_mark.line + 1}"
