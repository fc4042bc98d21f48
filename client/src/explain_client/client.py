"""The client: ``ExplainClient("localhost:8001").explain("photo.jpg")``."""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection, Iterator
from types import TracebackType

import grpc
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from explain_client.errors import ExplainError, closed_error, cut_off_error, from_rpc, from_stream, from_triton
from explain_client.images import ImageSource, View
from explain_client.protocol import (
    VIEW_MODEL,
    Call,
    ParameterValue,
    Wanted,
    classify_call,
    explain_call,
    is_final,
    message_of,
    read_explanation,
    read_predictions,
    read_response,
    read_view,
)
from explain_client.results import Classification, Explanation, Level, Prediction
from explain_client.retries import Attempts

DEFAULT_URL = "localhost:8001"
DEFAULT_WANT: tuple[Wanted, ...] = ("saliency", "heatmap")


class ExplainClient:
    """A connection to a server, usable as a context manager and from several threads.

    Args:
        url: host and gRPC port.
        timeout: seconds for a request with its retries; the server stops working on it then, too.
        retries: most repetitions of a request when the server is UNAVAILABLE, with exponential backoff.

    Every method raises, besides its own errors:
        RefusedError: the server rejected the request; the message names the fault.
        UnavailableError: the server cannot be reached or has no room, after the retries.
        TimedOutError: there was no answer in time.
        ExplainError: any other failure, as a client that is closed; the base class of these errors.
        OSError: the image's file cannot be read.
        TypeError: the image is an array of the wrong dtype or shape.
        ValueError: the image is a PIL image with values out of range; ``images.encoded`` has the ranges.
    """

    def __init__(self, url: str = DEFAULT_URL, timeout: float = 300.0, retries: int = 2) -> None:
        self._timeout, self._retries = timeout, retries
        self._triton = triton.InferenceServerClient(url)
        # Called at the interpreter's exit at the latest: a channel that is still open then can hang it.
        self._close = weakref.finalize(self, self._triton.close)
        self._view: View | None = None

    def __enter__(self) -> ExplainClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end its streams: whoever waits for an answer gets an ``ExplainError``."""
        self._close()

    def classify(self, image: ImageSource, *, top_k: int = 5) -> tuple[Prediction, ...]:
        """The likeliest classes of one image, best first."""
        return read_predictions(self._infer(classify_call(image, top_k)))

    def explain(
        self,
        image: ImageSource,
        *,
        target: int | None = None,
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: ParameterValue,
    ) -> Explanation:
        """The prediction for one image and the attribution that explains it.

        Args:
            image: a path, the bytes of a JPEG, PNG or WebP file, a PIL image, or a uint8 array [height, width, 3].
            target: the class to explain; the predicted one if absent.
            top_k: how many predictions to return.
            want: tensors to transfer: ``saliency``, ``attributions``, ``heatmap``.
            parameters: request parameters of the serving contract: ``n_steps``, ``tolerance``, ``baseline``, ...
        """
        call = explain_call("explain", image, target, top_k, want, parameters)
        started = time.perf_counter()
        result = self._infer(call)
        return read_explanation(result, 1e3 * (time.perf_counter() - started))

    def explain_stream(
        self,
        image: ImageSource,
        *,
        target: int | None = None,
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: ParameterValue,
    ) -> Iterator[Classification | Level]:
        """The prediction at once, then attributions that get more exact; the last has ``is_last``.

        If you leave the loop early, the rest is cancelled on the server. Arguments are those of ``explain``.
        """
        return self._stream(explain_call("explain_stream", image, target, top_k, want, parameters))

    def view(self) -> View:
        """The classifier's view of an image, for ``images.as_seen``: asked for once, then kept."""
        if self._view is None:
            try:
                answer = self._connection.get_model_config(VIEW_MODEL, client_timeout=self._timeout)
            except InferenceServerException as error:
                raise from_triton(error) from error
            self._view = read_view(answer.config)
        return self._view

    @property
    def _connection(self) -> triton.InferenceServerClient:
        if not self._close.alive:
            raise closed_error()
        return self._triton

    def _infer(self, call: Call) -> triton.InferResult:
        attempts = Attempts(self._timeout, self._retries)
        while True:
            seconds = attempts.seconds_left
            try:
                return self._connection.infer(**call.options(seconds), client_timeout=seconds)
            except InferenceServerException as error:
                time.sleep(attempts.delay_after(from_triton(error)))

    def _stream(self, call: Call) -> Iterator[Classification | Level]:
        attempts = Attempts(self._timeout, self._retries)
        started = time.perf_counter()
        while True:
            is_answered = False
            try:
                for result in self._responses(call, attempts.seconds_left):
                    is_answered = True
                    yield read_response(result, 1e3 * (time.perf_counter() - started))
                return
            except ExplainError as error:
                if is_answered:  # responses that the caller has cannot be repeated
                    raise
                time.sleep(attempts.delay_after(error))

    def _responses(self, call: Call, seconds: float) -> Iterator[triton.InferResult]:
        """The responses to one attempt, read in the caller's thread.

        A stream of tritonclient's own has a thread that keeps the interpreter from ending, and when it is cancelled it
        leaves another one waiting for ever.
        """
        requests = iter((message_of(call, seconds),))
        responses = self._connection._client_stub.ModelStreamInfer(requests, timeout=seconds)
        try:
            for response in responses:
                if response.error_message:
                    raise from_stream(InferenceServerException(response.error_message))
                result = triton.InferResult(response.infer_response)
                yield result
                if is_final(result):
                    return
            raise cut_off_error()
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        finally:
            responses.cancel()
