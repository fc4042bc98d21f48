"""Exceptions that say who has to act, by the status of an answer.

Not tested here: the messages that end a stream without a status. The tests of refusals read them from a server.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest
from tritonclient.utils import InferenceServerException

from explain_client.errors import (
    ExplainError,
    RefusedError,
    TimedOutError,
    UnavailableError,
    from_stream,
    from_triton,
)

Converter = Callable[[InferenceServerException], ExplainError]
KINDS = {
    "INVALID_ARGUMENT": RefusedError,
    "NOT_FOUND": RefusedError,
    "UNIMPLEMENTED": RefusedError,
    "UNAUTHENTICATED": RefusedError,
    "PERMISSION_DENIED": RefusedError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": TimedOutError,
}


@pytest.mark.parametrize("convert", [from_triton, from_stream])
@pytest.mark.parametrize("code", grpc.StatusCode, ids=lambda code: code.name)
def test_every_status_has_its_kind(code: grpc.StatusCode, convert: Converter) -> None:
    # tritonclient writes a status as Python prints it.
    error = convert(InferenceServerException("what happened", status=str(code)))
    assert type(error) is KINDS.get(code.name, ExplainError)
    assert error.status == code.name
    assert str(error) == "what happened"


@pytest.mark.parametrize("convert", [from_triton, from_stream])
def test_without_a_status_and_known_words_it_is_an_error_of_no_kind(convert: Converter) -> None:
    error = convert(InferenceServerException("something else"))
    assert type(error) is ExplainError
    assert (str(error), error.status) == ("something else", "")


_STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"
# By the embedded server after SIGTERM: to a request, to a step of an ensemble, and in a stream, which has no status.
LEAVING = [
    ("StatusCode.NOT_FOUND", "Request for unknown model: 'explain' has no available versions"),
    ("StatusCode.UNAVAILABLE", f"in ensemble 'explain', [request id: <id_unknown>] {_STOPPING}"),
    (None, "Request for unknown model: 'explain_stream' has no available versions"),
    (None, f"[request id: <id_unknown>] {_STOPPING}"),
    (None, "Model integrated_gradients - Error when running inference: Server not ready"),
]


@pytest.mark.parametrize("convert", [from_triton, from_stream])
@pytest.mark.parametrize(("status", "message"), LEAVING)
def test_a_server_that_stops_is_unavailable(convert: Converter, status: str | None, message: str) -> None:
    error = convert(InferenceServerException(message, status=status))
    assert type(error) is UnavailableError
    assert (str(error), error.status) == (message, "UNAVAILABLE")


@pytest.mark.parametrize("convert", [from_triton, from_stream])
def test_a_model_that_a_server_does_not_have_is_refused(convert: Converter) -> None:
    message = "Request for unknown model: 'explain' is not found"
    assert type(convert(InferenceServerException(message, status="StatusCode.NOT_FOUND"))) is RefusedError


@pytest.mark.parametrize("kind", [RefusedError, UnavailableError, TimedOutError])
def test_one_class_catches_all_kinds(kind: type[ExplainError]) -> None:
    with pytest.raises(ExplainError) as caught:
        raise kind("message")
    assert caught.value.status == ""
    assert kind("message", "STATUS").status == "STATUS"


def test_an_error_without_a_message_still_says_something() -> None:
    assert "UNAVAILABLE" in str(from_triton(InferenceServerException(None, status="StatusCode.UNAVAILABLE")))
