"""Plain text as bytes: the documentation that comes with Python, or a file."""

from __future__ import annotations

import ast
import codecs
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from expertmesh.experts.errors import ConfigError


def documentation() -> bytes:
    """The reference of the language, and the docstrings of the standard library's modules, each once."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = dict.fromkeys([*topics.values(), *(text for source in sources for text in docstrings_of(source))])
    return "\n\n".join(texts).encode()


def docstrings_of(source: Path) -> Iterator[str]:
    """The docstrings of a file, which is parsed and never imported."""
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def read_text(path: Path, least: int) -> bytes:
    """The bytes of a file. Raises ConfigError for one that is no text in UTF-8, or has fewer than `least` bytes."""
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: it cannot be read ({error.strerror}): name a text file in UTF-8") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: the text is not UTF-8: save the file as UTF-8") from None
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise ConfigError(f"{path}:{line}: it has a NUL character, so it is no text: name a text file in UTF-8")
    if len(content) < least:
        raise ConfigError(
            f"{path}: it has {len(content):,} bytes: at least {least:,} are needed, so name a longer text"
        )
    if len(set(content)) == 1:
        raise ConfigError(f"{path}:1: it is one character over and over: name a text with something to learn in it")
    return content
