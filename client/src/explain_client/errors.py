"""Exceptions, by who has to act."""

from __future__ import annotations

import re

import grpc
from tritonclient.utils import InferenceServerException


class ExplainError(Exception):
    """A request got no answer; the message is the server's, or says why there was none.

    Attributes:
        status: the gRPC status, for example ``INVALID_ARGUMENT``; empty if there is none.
    """

    def __init__(self, message: str, status: str = "") -> None:
        super().__init__(message)
        self.status = status


class RefusedError(ExplainError):
    """The server rejected the request; retrying will not help."""


class UnavailableError(ExplainError):
    """The server cannot be reached or has no room now; retrying later may help."""


class TimedOutError(ExplainError):
    """There was no answer within the client's timeout."""


_BY_STATUS = {
    "INVALID_ARGUMENT": RefusedError,
    "NOT_FOUND": RefusedError,
    "UNIMPLEMENTED": RefusedError,
    "UNAUTHENTICATED": RefusedError,  # this and the next: of a proxy before the server
    "PERMISSION_DENIED": RefusedError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": TimedOutError,
}


# What Triton says of a model while it stops: with NOT_FOUND or UNAVAILABLE, and in a stream without a status. Another
# server may answer. Of a model that it does not have it says "not found".
_LEAVING = re.compile(r"has no available versions$|Server is stopping, |: Server not ready$")


def from_triton(error: InferenceServerException) -> ExplainError:
    """This package's exception for one of tritonclient's."""
    message = error.message() or str(error)
    status = "UNAVAILABLE" if _LEAVING.search(message) else str(error.status() or "").removeprefix("StatusCode.")
    return _BY_STATUS.get(status, ExplainError)(message, status)


def from_rpc(error: grpc.RpcError) -> ExplainError:
    """This package's exception for gRPC's, which tritonclient does not convert where it streams."""
    return from_triton(InferenceServerException(error.details(), str(error.code())))


def closed_error() -> ExplainError:
    """The exception for a request to a client that is closed."""
    return ExplainError("the client is closed")


def cut_off_error() -> ExplainError:
    """The exception for a stream without a final response."""
    return ExplainError("the server ended the stream before its last response")


# The server's messages begin with a code in brackets, for example "[invalid] ...". A stream's error has no status,
# because Triton 2.51 sometimes crashes with the header that requests one. Its code gives the status.
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
