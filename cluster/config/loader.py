"""Loads a configuration: command line over environment over YAML file over defaults; reports all mistakes at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...experts.errors import ConfigError
from ..rpc.methods import Role
from .cluster_config import SETTINGS, ClusterConfig, TokenEntry
from .code_folder import put_on_path
from .declarations import DeclarationReader
from .document import Document, Mistakes, Place, as_map, check_key, each, shown
from .records import Readers
from .yaml_file import parse_value, read_document, read_trusted

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
    """Read a configuration file; the command line (`overrides`) and the environment take precedence over it.

    A key of `overrides` may name a nested value, as in "layers.news.combine". Paths in the file are relative to it.
    The file names code that will be run, so it must belong to this user or root and must not be writable by others.
    Modules beside it are found, if that is true of their folder, too.

    Raises one ConfigError that lists every mistake with file and line.
    """
    document = read_document(read_trusted(Path(path)), str(path))
    folder = Path(path).absolute().parent
    put_on_path(folder)
    _put_environment(document, os.environ if environ is None else environ)
    for key, value in (overrides or {}).items():
        document.put(tuple(key.split(".")), _from_here(key, value), f"override {key}")
    readers, values, wrong = _readers(document, folder), dict[str, Any](), Mistakes()
    for key, value in document.data.items():
        with wrong.at(key):
            check_key(key, SETTINGS, "the configuration")
            values[key] = readers[key](value) if key in readers else value
    refused = {keys[0] for keys, _ in wrong.found}
    try:
        config = ClusterConfig(**values)
    except ConfigError as error:
        wrong.found += [mistake for mistake in error.mistakes if mistake[0][0] not in refused]
    document.raise_if_wrong(wrong.found)
    return config


def parse_override(text: str) -> tuple[str, object]:
    """Parse "key=value" from the command line; the value is YAML. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} must be key=value, as in port=50052 or layers.news.combine=mean")
    return key.strip(), parse_value(value)


def _put_environment(document: Document, environ: Mapping[str, str]) -> None:
    for variable, text in sorted(environ.items()):
        name, origin = variable.removeprefix(PREFIX).lower(), f"environment {variable}"
        if not variable.startswith(PREFIX) or not text or name not in _SCALARS:
            continue
        try:
            document.put((name,), _from_here(name, text if name in _TEXTS else parse_value(text)), origin)
        except ConfigError as error:
            document.mistakes.add((Place(0, origin), error.message))


def _from_here(key: str, value: object) -> object:
    """Paths from the command line or environment are relative to the working folder."""
    return str(Path(value).absolute()) if key in _PATHS and isinstance(value, (str, Path)) else value


def _readers(document: Document, folder: Path) -> Readers:
    """Readers for the settings whose form in a file differs from that in a ClusterConfig."""
    environment = document.data.get("runtime_env")
    reader = DeclarationReader(folder, code_elsewhere=environment is not None)
    return {
        "layers": reader.layers,
        "tokens": _tokens,
        "runtime_env": lambda value: None if value is None else reader.runtime_env(value),
        **dict.fromkeys(_PATHS, lambda value: folder / value if isinstance(value, str) else value),
    }


def _tokens(declared: object) -> tuple[TokenEntry, ...]:
    if not isinstance(declared, (list, tuple, type(None))):
        raise ConfigError(f"tokens must be a list, not {shown(declared)}")
    return tuple(each(dict(enumerate(declared or ())), _token).values())


def _token(index: int, declared: object) -> TokenEntry:
    entries = as_map(declared, "an entry of tokens")
    each(entries, lambda key, _: check_key(key, ("role", "sha256", "expires"), "an entry of tokens"))
    role, sha256, expires = Role.parse(entries.get("role")), entries.get("sha256", ""), entries.get("expires")
    return TokenEntry(role=role, sha256=sha256, expires=expires)
