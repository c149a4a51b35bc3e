"""Translates errors of user code during staging to refusals that name the staged expert or gate."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ExpertMeshError, FailedPrecondition

log = logging.getLogger(__name__)


@contextmanager
def refusals(name: str, kind: str, see: str) -> Iterator[None]:
    """Prefix errors with `name`; errors of user code are logged and raised as FailedPrecondition with "see {see}"."""
    try:
        yield
    except ExpertMeshError as error:
        raise type(error)(f"{name}: {error.message}") from None
    except BaseException as error:  # constructors, hooks and scorers are foreign code and may raise anything
        log.exception("staging failed", extra={kind: name})
        raise FailedPrecondition(f"{name}: staging raised {type(error).__name__}; see {see}") from None
