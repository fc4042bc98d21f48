"""What can go wrong, as exceptions that say who has to act."""

from __future__ import annotations

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
    """The request is not one that the server takes; sent again it will be refused again."""


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


# How messages begin with which a stream ends. They come without a status: with the header that asks for one, Triton
# 2.51 now and then crashes.
_STREAM_BEGINNINGS = {
    "INVALID_ARGUMENT": ("parameter ", "unknown parameter ", "IMAGE ", "TARGET "),
    "UNAVAILABLE": ("the request's timeout ", "the most streams ", "integrated_gradients is overloaded"),
}


def from_stream(error: InferenceServerException) -> ExplainError:
    """The exception for the error that ended a stream."""
    message = error.message() or str(error)
    if error.status() is None:
        for status, beginnings in _STREAM_BEGINNINGS.items():
            if message.startswith(beginnings):
                return _BY_STATUS[status](message, status)
    return from_triton(error)
