"""The demo's text: docstrings of the standard library, or the rows of a CSV file, each with a label."""

from __future__ import annotations

import ast
import csv
import html
import io
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...experts.errors import ConfigError

LABEL = "label"
MIN_WORDS = 3
MIN_ROWS = 100
MIN_ROWS_PER_LABEL = 5
MAX_FIELD = 1 << 24
STANDARD_LIBRARY = {
    "asyncio": "asyncio",
    "decimal": "_pydecimal.py",
    "email": "email",
    "http": "http",
    "importlib": "importlib",
    "logging": "logging",
    "mailbox": "mailbox.py",
    "multiprocessing": "multiprocessing",
    "tarfile": "tarfile.py",
    "turtle": "turtle.py",
    "unittest": "unittest",
    "urllib": "urllib",
    "xml": "xml",
}
"""Packages and large modules that every Python has on every platform: label -> path in the standard library."""

_TAG = re.compile(r"<[^<>]{1,200}>")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+")
_BARE_ENTITY = re.compile(r"(?<!&)#(\d{1,5});")
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class Corpus:
    """Distinct cleaned texts, and the label of each as an index into `names`."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.texts)


def clean(text: str) -> str:
    """Decode entities, and remove tags, addresses and repeated white space.

    Also decodes entities that have lost their ampersand ("#39;").
    """
    text = html.unescape(_BARE_ENTITY.sub(r"&#\1;", text))
    return " ".join(_ADDRESS.sub(" ", _TAG.sub(" ", text)).split())


def standard_library() -> Corpus:
    """The docstrings of some packages of the standard library, labelled by package, in the order of their files.

    Sources are parsed, never imported. Raises ConfigError if this Python's standard library has no sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    pairs = (
        (text, label)
        for label, entry in STANDARD_LIBRARY.items()
        for source in _sources(folder / entry)
        for text in _docstrings(source)
        if len(_WORD.findall(text)) >= MIN_WORDS
    )
    return _corpus(pairs, "docstrings of the standard library")


def read_csv(path: Path) -> Corpus:
    """The rows of a CSV file: its `label` column, and all other columns joined as the text.

    The file is UTF-8 (or UTF-16 with a byte order mark). Raises ConfigError for a file that is missing, has another
    encoding, no `label` or no text column, rows of unequal width, or too few rows or labels to train on.
    """
    return _corpus(_csv_rows(path, _decode(path)), path.name)


def _sources(entry: Path) -> Iterator[Path]:
    if entry.is_file():
        yield entry
    yield from (path for path in sorted(entry.rglob("*.py")) if not {"test", "tests"} & set(path.parts))


def _docstrings(source: Path) -> Iterator[str]:
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError, OSError):  # a template, or a file for another Python version: skip it
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the data: {error.strerror or error}") from None
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: the text is not {encoding[:6]}; save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{path}:{line}: holds a NUL character, so it is not text; save the file as UTF-8 CSV")
    return text


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, str]]:
    previous = csv.field_size_limit(MAX_FIELD)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        column = _label_column(path, header)
        for row in filter(None, reader):
            where = f"{path}:{reader.line_num}"
            if len(row) != len(header):
                raise ConfigError(f"{where}: the row has {len(row)} columns, the header has {len(header)}")
            label = row.pop(column).strip()
            if not label:
                raise ConfigError(f"{where}: the row's {LABEL!r} is empty")
            yield " ".join(row), label
    except csv.Error as error:
        hint = "; is a quotation mark missing before?" if "limit" in str(error) else ""
        raise ConfigError(f"{path}:{reader.line_num}: not CSV: {error}{hint}") from None
    finally:
        csv.field_size_limit(previous)


def _label_column(path: Path, header: list[str]) -> int:
    if not any(header):
        raise ConfigError(f"{path}: the file is empty; its first line must name the columns, one of them {LABEL!r}")
    if header.count(LABEL) != 1:
        columns = ", ".join(repr(name[:40]) for name in header[:8])
        count = "no" if LABEL not in header else "more than one"
        raise ConfigError(f"{path}:1: there is {count} column {LABEL!r}; the columns are {columns}")
    if len(header) < 2:
        raise ConfigError(f"{path}:1: there is no text column beside {LABEL!r}")
    return header.index(LABEL)


def _corpus(pairs: Iterable[tuple[str, str]], source: str) -> Corpus:
    """Clean the texts and drop duplicates, so that no held-out text is also a training text."""
    seen: dict[str, tuple[str, str]] = {}
    for raw, label in pairs:
        text = clean(raw)
        seen.setdefault(" ".join(_WORD.findall(text.casefold())), (text, label))
    seen.pop("", None)
    counts = Counter(label for _, label in seen.values())
    _check_counts(counts, source)
    names = tuple(sorted(counts))
    index = {name: number for number, name in enumerate(names)}
    texts = tuple(text for text, _ in seen.values())
    return Corpus(texts, tuple(index[label] for _, label in seen.values()), names, source)


def _check_counts(counts: Counter[str], source: str) -> None:
    rows = sum(counts.values())
    if rows < MIN_ROWS:
        raise ConfigError(f"{source}: {rows} different texts, but at least {MIN_ROWS} are needed")
    if len(counts) < 2:
        raise ConfigError(f"{source}: every row has the label {next(iter(counts))!r}; at least two labels are needed")
    rare = [name for name, count in counts.items() if count < MIN_ROWS_PER_LABEL]
    if rare:
        examples = ", ".join(repr(name[:40]) for name in sorted(rare)[:3])
        raise ConfigError(
            f"{source}: {len(rare)} of {len(counts)} labels have fewer than {MIN_ROWS_PER_LABEL} rows ({examples}); "
            "merge or drop them"
        )
