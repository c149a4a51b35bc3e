"""The exception tree of expertmesh: the cause of each error, its wire code, and whether a retry is safe.

    ExpertMeshError                     INTERNAL             a bug in expertmesh
    ├── InvalidRequest (ValueError)     INVALID_ARGUMENT     the caller: fix the request
    │   ├── ConfigError                 INVALID_ARGUMENT     the operator: fix the file, at file:line
    │   └── SpecMismatch                INVALID_ARGUMENT     shapes or dtypes of rows, weights or experts do not fit
    ├── NotFound                        NOT_FOUND            the caller: no such layer, expert or version
    ├── Unauthenticated                 UNAUTHENTICATED      the caller: no token, or an unknown one
    ├── PermissionDenied                PERMISSION_DENIED    the caller: the token's role is too low
    ├── TooLarge                        RESOURCE_EXHAUSTED   the caller: split the request or raise the limit
    ├── Overloaded                      RESOURCE_EXHAUSTED   traffic: retry after `retry_after` seconds
    ├── Unavailable                     UNAVAILABLE          an expert or process is down or draining: retry
    │   └── RouterUnavailable           UNAVAILABLE          this router takes no calls: another one may
    ├── DeadlineExceeded (TimeoutError) DEADLINE_EXCEEDED    the deadline passed before the answer was ready
    ├── FailedPrecondition              FAILED_PRECONDITION  the cluster's state forbids it: a retry does not help
    │   └── VersionGone                 FAILED_PRECONDITION  no replica holds the requested version
    ├── Aborted                         ABORTED              lost a race against another change: check, then retry
    │   └── Fenced                      ABORTED              another writer has taken over and knows the outcome
    ├── DataLoss                        DATA_LOSS            bytes are truncated or do not match their checksum
    ├── ExpertFailed                    INTERNAL             the expert's code raised: fix the expert
    └── MissingExtra (ImportError)      FAILED_PRECONDITION  this name needs an extra that is not installed

A message says what is wrong, where, and how to fix it. Messages to clients never contain server paths, actor ids or
tracebacks.
"""

from __future__ import annotations

from typing import ClassVar


class ExpertMeshError(Exception):
    """Base of every error that expertmesh raises; raised directly only for bugs in expertmesh.

    Example:
        try:
            y = client.forward("news", x)
        except ExpertMeshError as error:
            print(error.code, error.retryable, error.message, error.request_id)
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.message,), self.__dict__)


class InvalidRequest(ExpertMeshError, ValueError):
    """The request is malformed: a bad frame, option, shape or dtype.

    >>> gates.TopK(in_features=16, num_experts=4, k=5)
    Traceback (most recent call last):
    expertmesh.experts.errors.InvalidRequest: k is 5, but must be between 1 and 4, the number of experts of gate 'top_k'
    """

    code = "INVALID_ARGUMENT"


class ConfigError(InvalidRequest):
    """A configuration is wrong; if it comes from a file, the message names file and line.

    `mistakes` lists the mistakes inside a value: the path of keys and positions to each, and its message.

    >>> Expert("torch.nn.Linear")
    Traceback (most recent call last):
    expertmesh.experts.errors.ConfigError: factory must be "module:attribute", as in "torch.nn:Linear"...
    """

    mistakes: tuple[tuple[tuple[str | int, ...], str], ...] = ()

    @classmethod
    def of(cls, *mistakes: tuple[tuple[str | int, ...], str]) -> ConfigError:
        """An error that reports all of these mistakes."""
        error = cls("; ".join(message for _, message in mistakes))
        error.mistakes = mistakes
        return error


class SpecMismatch(InvalidRequest):
    """Rows, weights or experts whose shapes or dtypes do not fit together.

    >>> TensorSpec((16,)).check((8,), "float32", "x")
    Traceback (most recent call last):
    expertmesh.experts.errors.SpecMismatch: x has rows of shape [8], expected [16]
    """


class NotFound(ExpertMeshError):
    """No layer, expert or version has that name.

    >>> Client(name="not-running")
    Traceback (most recent call last):
    expertmesh.experts.errors.NotFound: ...
    """

    code = "NOT_FOUND"


class Unauthenticated(ExpertMeshError):
    """No token was sent, or one that this cluster does not know.

    Example:
        Client("127.0.0.1:50051", token="expired").status()  # raises Unauthenticated
    """

    code = "UNAUTHENTICATED"


class PermissionDenied(ExpertMeshError):
    """The token is known, but its role does not allow this method.

    Example:
        Client("127.0.0.1:50051", token=token_of_a_reader).drain()  # raises PermissionDenied
    """

    code = "PERMISSION_DENIED"


class TooLarge(ExpertMeshError):
    """The request is larger than a limit allows; the message names the setting.

    Example:
        for part in np.array_split(x, 8):
            y = client.forward("news", part)
    """

    code = "RESOURCE_EXHAUSTED"


class Overloaded(ExpertMeshError):
    """The request was rejected before any work because too many rows are in flight.

    `retry_after` is in seconds.

    Example:
        try:
            y = client.forward("news", x)
        except Overloaded as error:
            time.sleep(error.retry_after)
    """

    code = "RESOURCE_EXHAUSTED"
    retryable = True

    def __init__(self, message: str, *, retry_after: float = 0.1, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after = retry_after


class Unavailable(ExpertMeshError):
    """An expert, replica or process is down, restarting or draining. Calls are idempotent: a retry is safe.

    Example:
        reply = client.call("news", x, on_missing="renormalize")  # answers without an expert that is down
    """

    code = "UNAVAILABLE"
    retryable = True


class RouterUnavailable(Unavailable):
    """The router that was asked cannot be reached, or takes no calls: it is starting, draining, behind or fenced.

    Clients of several routers ask another one.

    Example:
        client = Client(["10.0.0.1:50051", "10.0.0.2:50051"], ca_cert="ca.pem")
        y = client.forward("news", x)  # raises RouterUnavailable if neither takes the call
    """


class DeadlineExceeded(ExpertMeshError, TimeoutError):
    """The deadline of the request passed before its answer was ready.

    Example:
        y = client.forward("news", x, timeout=5.0)  # raises DeadlineExceeded after five seconds
    """

    code = "DEADLINE_EXCEEDED"


class FailedPrecondition(ExpertMeshError):
    """The state of the cluster forbids the operation.

    Example:
        client.rollback("news/e3")  # raises FailedPrecondition where no earlier version is kept
    """

    code = "FAILED_PRECONDITION"


class VersionGone(FailedPrecondition):
    """No replica holds the version that the request has pinned.

    Example:
        try:
            again = client.call("news", x, epoch=reply.epoch)
        except VersionGone:
            again = client.call("news", x)  # on the current epoch
    """


class Aborted(ExpertMeshError):
    """The operation lost a race against another change.

    Example:
        current = client.call("news", x).versions["news/e3"]
        client.swap({"news/e3": "e3.safetensors"}, expect={"news/e3": current})  # raises Aborted if it has changed
    """

    code = "ABORTED"
    retryable = True


class Fenced(Aborted):
    """Another writer has taken over the registry; this one can no longer change it.

    Example:
        try:
            outcome = client.swap({"news/e3": "e3.safetensors"}, swap_id="nightly-7")
        except Fenced:  # the outcome is unknown; with the same id the swap happens at most once
            outcome = client.swap({"news/e3": "e3.safetensors"}, swap_id="nightly-7")
    """


class DataLoss(ExpertMeshError):
    """Bytes are truncated or do not match their checksum.

    Example:
        client.swap({"news/e3": "cut_short.safetensors"})  # raises DataLoss: the file is truncated
    """

    code = "DATA_LOSS"


class ExpertFailed(ExpertMeshError):
    """The code of an expert raised, or returned something other than one answer per row.

    Example:
        reply = client.call("news", x, on_missing="fallback:e0")  # e0 answers the rows of an expert that raises
    """


class MissingExtra(ExpertMeshError, ImportError):
    """A public name needs an extra that is not installed; the message gives the `pip install` command.

    Example:
        try:
            from expertmesh import Cluster
        except MissingExtra as error:
            print(error)  # ... pip install 'expertmesh[cluster]'
    """

    code = "FAILED_PRECONDITION"


def _tree(cls: type[ExpertMeshError]) -> list[type[ExpertMeshError]]:
    return [cls, *(error for child in cls.__subclasses__() for error in _tree(child))]


BY_NAME: dict[str, type[ExpertMeshError]] = {cls.__name__: cls for cls in _tree(ExpertMeshError)}
"""Every class of the tree by name; errors are sent by name."""
