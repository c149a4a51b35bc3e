"""The one exception tree of expertmesh: whose doing an error is, its wire code, and whether a retry is safe.

    ExpertMeshError                     INTERNAL             our bug
    ├── InvalidRequest (ValueError)     INVALID_ARGUMENT     the caller's: mend the request
    │   ├── ConfigError                 INVALID_ARGUMENT     the operator's: mend the file, at file:line
    │   └── SpecMismatch                INVALID_ARGUMENT     rows or experts whose shapes or dtypes do not fit
    ├── NotFound                        NOT_FOUND            the caller's: no such layer, expert or version
    ├── Unauthenticated                 UNAUTHENTICATED      the caller's: no token, or one that is not known
    ├── PermissionDenied                PERMISSION_DENIED    the caller's: the token's role is too low
    ├── TooLarge                        RESOURCE_EXHAUSTED   the caller's: split the request or raise the limit
    ├── Overloaded                      RESOURCE_EXHAUSTED   load: retry after `retry_after` seconds
    ├── Unavailable                     UNAVAILABLE          an expert or process is down or draining: retry
    ├── DeadlineExceeded (TimeoutError) DEADLINE_EXCEEDED    the deadline passed before the answer was ready
    ├── FailedPrecondition              FAILED_PRECONDITION  the state forbids it: retrying alone does not help
    │   └── VersionGone                 FAILED_PRECONDITION  the version that was asked for is nowhere loaded
    ├── Aborted                         ABORTED              lost a race against another change: look, then retry
    │   └── Fenced                      ABORTED              another writer has taken over: what came of it, it knows
    ├── DataLoss                        DATA_LOSS            bytes are not what they were declared to be
    ├── ExpertFailed                    INTERNAL             the expert's own code raised: mend the expert
    └── MissingExtra (ImportError)      FAILED_PRECONDITION  this name needs an extra that is not installed

A message says what is wrong, where, and how to mend it. It never carries paths of the server, actor ids or tracebacks
to a client.
"""

from __future__ import annotations

from typing import ClassVar


class ExpertMeshError(Exception):
    """Base of every error that expertmesh raises; raised itself only for our own bugs."""

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.message,), self.__dict__)


class InvalidRequest(ExpertMeshError, ValueError):
    """The request is malformed: a bad frame, option, shape or dtype."""

    code = "INVALID_ARGUMENT"


class ConfigError(InvalidRequest):
    """A configuration is wrong; the message names file and line where there is a file."""


class SpecMismatch(InvalidRequest):
    """Rows, weights or experts whose shapes or dtypes do not fit together."""


class NotFound(ExpertMeshError):
    """There is no layer, expert or version of that name."""

    code = "NOT_FOUND"


class Unauthenticated(ExpertMeshError):
    """No token was sent, or one that this cluster does not know."""

    code = "UNAUTHENTICATED"


class PermissionDenied(ExpertMeshError):
    """The token is known, but its role does not allow this method."""

    code = "PERMISSION_DENIED"


class TooLarge(ExpertMeshError):
    """The request is larger than a limit allows; the message names the setting."""

    code = "RESOURCE_EXHAUSTED"


class Overloaded(ExpertMeshError):
    """The request was refused early because too many rows are in flight.

    `retry_after` is in seconds.
    """

    code = "RESOURCE_EXHAUSTED"
    retryable = True

    def __init__(self, message: str, *, retry_after: float = 0.1, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after = retry_after


class Unavailable(ExpertMeshError):
    """An expert, replica or process is down, restarting or draining. Calls are idempotent: a retry is safe."""

    code = "UNAVAILABLE"
    retryable = True


class DeadlineExceeded(ExpertMeshError, TimeoutError):
    """The deadline of the request passed before its answer was ready."""

    code = "DEADLINE_EXCEEDED"


class FailedPrecondition(ExpertMeshError):
    """The state of the cluster forbids the operation."""

    code = "FAILED_PRECONDITION"


class VersionGone(FailedPrecondition):
    """No replica holds the version that the request has pinned."""


class Aborted(ExpertMeshError):
    """The operation lost a race against another change."""

    code = "ABORTED"
    retryable = True


class Fenced(Aborted):
    """Another writer has taken the registry over; this one can change nothing any more."""


class DataLoss(ExpertMeshError):
    """Bytes are truncated or do not match their checksum."""

    code = "DATA_LOSS"


class ExpertFailed(ExpertMeshError):
    """The code of an expert raised, or gave something that is not its rows' answer."""


class MissingExtra(ExpertMeshError, ImportError):
    """A public name needs an extra that is not installed; the message gives the `pip install` that mends it."""

    code = "FAILED_PRECONDITION"


def _tree(cls: type[ExpertMeshError]) -> list[type[ExpertMeshError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _tree(child))]


BY_NAME: dict[str, type[ExpertMeshError]] = {cls.__name__: cls for cls in _tree(ExpertMeshError)}
"""Every class of the tree by its name, which is how an error crosses the wire."""
