"""What can go wrong, as exceptions that say who has to act."""

from __future__ import annotations

import re

from tritonclient.utils import InferenceServerException


class ExplainError(Exception):
    """A request got no answer; the message is the server's own, or says what kept it from answering.

    Attributes:
        status: gRPC's name of the status, for example ``INVALID_ARGUMENT``; empty if there is none.
    """

    def __init__(self, message: str, status: str = "") -> None:
        super().__init__(message)
        self.status = status


class RefusedError(ExplainError):
    """The server rejected the request; retrying will not help."""


class UnavailableError(ExplainError):
    """The server cannot be reached or has no room now; later it may answer."""


class TimedOutError(ExplainError):
    """There was no answer within the client's timeout."""


_BY_STATUS = {
    "INVALID_ARGUMENT": RefusedError,
    "NOT_FOUND": RefusedError,
    "UNIMPLEMENTED": RefusedError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": TimedOutError,
}


def from_triton(error: InferenceServerException) -> ExplainError:
    """The exception for one of tritonclient's."""
    status = str(error.status() or "").removeprefix("StatusCode.")
    return _BY_STATUS.get(status, ExplainError)(error.message() or str(error), status)


# The server's messages begin with a code in brackets, for example "[invalid] ...". A stream's error comes without a
# status: with the header that asks for one, Triton 2.51 now and then crashes. Its code says what it is.
STATUS_BY_CODE = {
    "invalid": "INVALID_ARGUMENT",
    "overloaded": "UNAVAILABLE",
    "late": "UNAVAILABLE",
    "cancelled": "CANCELLED",
    "failed": "INTERNAL",
}
_CODE = re.compile(r"\[([a-z]+)\] ")


def from_stream(error: InferenceServerException) -> ExplainError:
    """The exception for the error that ended a stream."""
    message = error.message() or str(error)
    code = _CODE.match(message)
    if error.status() is None and code and code[1] in STATUS_BY_CODE:
        status = STATUS_BY_CODE[code[1]]
        return _BY_STATUS.get(status, ExplainError)(message, status)
    return from_triton(error)
