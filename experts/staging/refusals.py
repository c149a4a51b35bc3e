"""The border of staging to foreign code: whatever it raises becomes a refusal that names what was staged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ExpertMeshError, FailedPrecondition

log = logging.getLogger(__name__)


@contextmanager
def refusals(name: str, kind: str, see: str) -> Iterator[None]:
    """Begin errors with `name`; what is not ours is logged and raised as FailedPrecondition: "see ..."."""
    try:
        yield
    except ExpertMeshError as error:
        raise type(error)(f"{name}: {error.message}") from None
    except Exception as error:  # constructors, hooks and scorers are foreign code and may raise anything
        log.exception("staging failed", extra={kind: name})
        raise FailedPrecondition(f"{name}: staging raised {type(error).__name__}; see {see}") from None
