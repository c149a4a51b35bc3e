"""One loader of configuration: command line over environment over YAML file over defaults, every mistake at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date, datetime, time, timezone
from pathlib import Path
from typing import Any

from ...experts.errors import ConfigError
from ..rpc.methods import Role
from .cluster_config import DEFAULTS, SETTINGS, ClusterConfig, TokenEntry, mistakes
from .declarations import DeclarationReader
from .value_tree import Located, Mistakes
from .yaml_file import parse_tree, parse_value, read_trusted

__all__ = ["ClusterConfig", "TokenEntry", "load_config", "parse_override"]

PREFIX = "EXPERTMESH_"
_PATHS = ("tls_cert", "tls_key", "state_dir")
_TEXTS = ("name", "host", "transport", "address", "log_level", *_PATHS)
_SCALARS = tuple(name for name in SETTINGS if name not in ("layers", "tokens", "runtime_env", "allowed_factories"))


def load_config(
    path: str | os.PathLike[str],
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> ClusterConfig:
    """Read a configuration file, under what the command line (`overrides`) and the environment say.

    A key of `overrides` may name a deeper value, as in "layers.news.combine". Paths in the file are relative to it.
    The file names code that will be run, so it must belong to this user or root and nobody else may write it.

    Raises one ConfigError that lists every mistake with file and line.
    """
    found = Mistakes()
    tree = parse_tree(read_trusted(Path(path)), str(path), found)
    tree = _with_environment(tree, os.environ if environ is None else environ, found)
    for key, value in (overrides or {}).items():
        tree = tree.replaced(tuple(key.split(".")), Located.given(_from_here(key, value), f"override {key}"))
    found.check_keys(tree, SETTINGS, "the configuration")
    values = _values(tree, Path(path).absolute().parent, found)
    layers_are_wrong = len(found) > 0 and not values["layers"]
    for name, message in mistakes(values):
        if name != "layers" or not layers_are_wrong:
            found.add(tree.where_of(name), message)
    found.raise_if_any(str(path))
    return ClusterConfig(**values)


def parse_override(text: str) -> tuple[str, object]:
    """Read "key=value" of the command line; the value is read as YAML. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} must be key=value, as in port=50052 or layers.news.combine=mean")
    return key.strip(), parse_value(value)


def _with_environment(tree: Located, environ: Mapping[str, str], found: Mistakes) -> Located:
    for variable, text in sorted(environ.items()):
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or not text or name not in _SCALARS:
            continue
        where = f"environment {variable}"
        try:
            value = text if name in _TEXTS else parse_value(text)
        except ConfigError as error:
            found.add(where, str(error))
            continue
        tree = tree.replaced((name,), Located(_from_here(name, value), where))
    return tree


def _from_here(key: str, value: object) -> object:
    """Paths outside the file are relative to the working folder, as a shell completes them."""
    return str(Path(value).absolute()) if key in _PATHS and isinstance(value, (str, Path)) else value


def _values(tree: Located, folder: Path, found: Mistakes) -> dict[str, Any]:
    values = dict(DEFAULTS)
    entries = {key: child for key, child in tree.items() if key in values}
    elsewhere = "runtime_env" in entries and entries["runtime_env"].value is not None
    reader = DeclarationReader(folder, found, code_elsewhere=elsewhere)
    for key, child in entries.items():
        if key == "layers":
            values[key] = reader.layers(child)
        elif key == "runtime_env":
            values[key] = reader.runtime_env(child)
        elif key == "tokens":
            values[key] = _tokens(child, found)
        elif key == "allowed_factories" and isinstance(child.value, list):
            values[key] = tuple(child.plain())
        elif key in _PATHS and isinstance(child.value, str):
            values[key] = folder / child.value
        else:
            values[key] = child.plain()
    return values


def _tokens(node: Located, found: Mistakes) -> tuple[TokenEntry, ...]:
    made: list[TokenEntry] = []
    if node.value is None or not found.check_kind(node, "list", "tokens"):
        return ()
    for child in node.value:
        if not found.check_kind(child, "map", "an entry of tokens"):
            continue
        found.check_keys(child, ("role", "sha256", "expires"), "an entry of tokens")
        given = child.plain()
        try:
            role, expires = Role.parse(given.get("role")), _seconds_since_1970(given.get("expires"))
            made.append(TokenEntry(role=role, sha256=given.get("sha256"), expires=expires))
        except ConfigError as error:
            found.add(child.where, str(error))
    return tuple(made)


def _seconds_since_1970(value: Any) -> Any:
    """YAML's times and dates, and text in ISO form, as seconds; a time without zone is UTC; the rest as it is."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return value
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
    return value
