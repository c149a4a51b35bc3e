"""Logs: one JSON object a line, with the request's id, whatever is logged; and no file left open."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.machine import logs
from expertmesh.cluster.machine.logs import KEPT_LOGS, JsonFormatter, configure_logs, log_file, rotate


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    logger = logging.getLogger("expertmesh")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def entry_of(message: str, *args: Any, extra: dict[str, Any] | None = None, **record: Any) -> dict[str, Any]:
    made = logging.makeLogRecord({"name": "expertmesh.router", "msg": message, "args": args, "levelno": 30, **record})
    made.levelname = "WARNING"
    for key, value in (extra or {}).items():
        setattr(made, key, value)
    line = JsonFormatter("router").format(made)
    assert "\n" not in line
    entry: dict[str, Any] = json.loads(line)
    return entry


@given(st.text(), st.dictionaries(st.sampled_from(["request_id", "layer", "seconds"]), st.text() | st.integers()))
def test_whatever_is_logged_is_one_line_of_json(text: str, extra: dict[str, Any]) -> None:
    entry = entry_of("%s", text, extra=extra)
    assert entry["message"] == text
    assert {key: entry[key] for key in extra} == extra
    assert (entry["level"], entry["process"], entry["logger"]) == ("warning", "router", "expertmesh.router")


def test_the_time_is_utc_with_milliseconds() -> None:
    assert entry_of("now", created=1_700_000_000.25, msecs=250.0)["time"] == "2023-11-14T22:13:20.250Z"


def test_a_traceback_is_carried_and_what_json_lacks_becomes_text() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        exc_info = (ValueError, error, error.__traceback__)
    entry = entry_of("it failed", exc_info=exc_info, extra={"path": Path("/a"), "ids": {1}})
    assert entry["traceback"].endswith("ValueError: first\nsecond")
    assert (entry["path"], entry["ids"]) == ("/a", "{1}")


def test_everything_of_ours_goes_to_the_file_and_nothing_below_the_level(own_home: Path) -> None:
    path = log_file("news")
    assert Path(path).parent.stat().st_mode & 0o077 == 0
    configure_logs("router", "info", path)
    logging.getLogger("expertmesh.router.request.batching").info("served", extra={"request_id": "r-1"})
    logging.getLogger("expertmesh.cluster").debug("not this")
    logging.getLogger("other").warning("not this either")
    entries = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert [(entry["message"], entry["request_id"]) for entry in entries] == [("served", "r-1")]
    assert log_file("news") == path
    assert len(Path(path).read_text().splitlines()) == 1  # and is kept at the next start


def test_a_log_that_has_grown_is_rotated_under_all_who_write_to_it(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MOST_LOG_BYTES", 100)
    path = log_file("news")
    rotate(path)  # there is none yet
    configure_logs("router", "info", path)
    other = logs._SharedFile(path, encoding="utf-8")  # as another process has it open
    try:
        for number in range(KEPT_LOGS + 2):
            rotate(path)
            logging.getLogger("expertmesh").info("%d %s", number, "x" * 100)
            other.emit(logging.makeLogRecord({"msg": f"other {number}"}))
        rotate(path)
    finally:
        other.close()
    assert not Path(path).exists()
    found = {file.name: file.read_text() for file in Path(path).parent.iterdir()}
    assert sorted(found) == [f"news.jsonl.{number}" for number in range(1, KEPT_LOGS + 1)]
    for number in range(1, KEPT_LOGS + 1):
        first, second = found[f"news.jsonl.{number}"].splitlines()
        assert json.loads(first)["message"].startswith(f"{KEPT_LOGS + 2 - number} ")
        assert second == f"other {KEPT_LOGS + 2 - number}"


def test_a_log_that_cannot_be_opened_again_harms_nobody_who_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").mkdir()
    configure_logs("router", "info", str(tmp_path / "log" / "x.jsonl"))
    shutil.rmtree(tmp_path / "log")
    logging.getLogger("expertmesh").warning("lost")
    assert "FileNotFoundError" in capsys.readouterr().err


def test_a_second_configuration_closes_the_first_and_lines_do_not_double(tmp_path: Path) -> None:
    configure_logs("one", "info", str(tmp_path / "one.jsonl"))
    (first,) = logging.getLogger("expertmesh").handlers
    assert isinstance(first, logging.FileHandler)
    configure_logs("two", "warning", str(tmp_path / "two.jsonl"))
    assert first.stream is None or first.stream.closed
    logging.getLogger("expertmesh.x").warning("once")
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "one.jsonl").read_text() == ""


def test_without_a_folder_to_write_to_lines_go_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("expert", "info", str(tmp_path / "missing" / "x.jsonl"))
    logging.getLogger("expertmesh").warning("here")
    assert json.loads(capsys.readouterr().err)["message"] == "here"
