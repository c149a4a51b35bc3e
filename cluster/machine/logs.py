"""Structured logs: one JSON object per line, with the request id if there is one."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextlib import suppress
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from .run_files import home

MOST_LOG_BYTES = 64 * 2**20
KEPT_LOGS = 3

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON: time, level, logger, message, and the fields of `extra`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logs(process: str, level: str, path: str | None) -> None:
    """Send the logs of expertmesh to the file that all processes of a cluster append to, or else to standard error."""
    logger = logging.getLogger("expertmesh")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handler = logging.StreamHandler(sys.stderr)
    if path is not None and os.access(Path(path).parent, os.W_OK):  # a node without this disk logs to stderr
        handler = _SharedFile(path, encoding="utf-8")
    handler.setFormatter(JsonFormatter(process))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def log_file(name: str) -> str:
    """The path of the log file of a cluster name, home()/log/<name>.jsonl; its folder is created."""
    folder = home() / "log"
    folder.mkdir(mode=0o700, exist_ok=True)
    return str(folder / f"{name}.jsonl")


def rotate(path: str | os.PathLike[str]) -> None:
    """Rename a log of more than `MOST_LOG_BYTES` to <path>.1, and earlier ones likewise; the oldest is dropped.

    One process of a cluster does this; all of them begin a new file with their next line.
    """
    with suppress(OSError):  # no log yet, or a disk that takes no change: the next turn tries again
        if os.stat(path).st_size > MOST_LOG_BYTES:
            for number in range(KEPT_LOGS - 1, 0, -1):
                with suppress(FileNotFoundError):
                    os.replace(f"{path}.{number}", f"{path}.{number + 1}")
            os.replace(path, f"{path}.1")


class _SharedFile(WatchedFileHandler):
    """Appends to a file that another process may rotate."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; a file that cannot be opened again is no error of the code that logs."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)
