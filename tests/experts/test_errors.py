"""The error tree: its drawing is true, its codes are gRPC's, its errors survive a trip between processes."""

from __future__ import annotations

import pickle
import re

import grpc
import pytest

from expertmesh.experts import errors
from expertmesh.experts.errors import BY_NAME, ExpertMeshError

CLASSES = pytest.mark.parametrize("kind", BY_NAME.values(), ids=BY_NAME)


def drawn() -> list[tuple[int, str, list[str], str]]:
    """The drawing in the docstring: (depth, class, other bases, code) in its order."""
    found = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+)(?: \((\w+)\))? +([A-Z_]+)  +\S", line)
        if match:
            found.append((len(match[1]) // 4, match[2], [match[3]] if match[3] else [], match[4]))
    return found


def actual(kind: type[ExpertMeshError] = ExpertMeshError, depth: int = 0) -> list[tuple[int, str, list[str], str]]:
    others = [base.__name__ for base in kind.__bases__ if not issubclass(base, ExpertMeshError)]
    others = [] if kind is ExpertMeshError else others
    children = [entry for child in kind.__subclasses__() for entry in actual(child, depth + 1)]
    return [(depth, kind.__name__, others, kind.code), *children]


def test_the_drawing_is_the_tree() -> None:
    assert drawn() == actual()


def test_by_name_holds_the_whole_tree() -> None:
    assert list(BY_NAME) == [name for _, name, _, _ in actual()]


@CLASSES
def test_codes_are_grpc_codes(kind: type[ExpertMeshError]) -> None:
    assert kind.code in grpc.StatusCode.__members__
    assert kind.code != "OK"


@CLASSES
def test_every_class_says_whose_doing_it_is(kind: type[ExpertMeshError]) -> None:
    assert (kind.__doc__ or "").strip().partition("\n\n")[0].endswith(".")


@CLASSES
def test_errors_cross_processes(kind: type[ExpertMeshError]) -> None:
    error = kind("what, where, how to mend it", request_id="r1")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - ours, inside this process
    assert type(copy) is kind
    assert (str(copy), copy.message, copy.request_id) == (error.message, error.message, "r1")


def test_retry_after_crosses_processes() -> None:
    copy = pickle.loads(pickle.dumps(errors.Overloaded("full", retry_after=1.5)))  # noqa: S301 - as above
    assert copy.retry_after == 1.5


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(errors.InvalidRequest, ValueError)
    assert issubclass(errors.DeadlineExceeded, TimeoutError)
    assert issubclass(errors.MissingExtra, ImportError)


def test_what_may_be_retried() -> None:
    retryable = {name for name, kind in BY_NAME.items() if kind.retryable}
    assert retryable == {"Overloaded", "Unavailable", "RouterUnavailable", "Aborted", "Fenced"}
