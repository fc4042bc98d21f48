"""The client: ``ExplainClient("localhost:8001").explain("photo.jpg")``."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Collection, Iterator
from types import TracebackType

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from explain_client.errors import ExplainError, TimedOutError, from_stream, from_triton
from explain_client.images import ImageSource, View
from explain_client.protocol import (
    VIEW_MODEL,
    Call,
    ParameterValue,
    Wanted,
    classify_call,
    explain_call,
    is_final,
    network_call,
    read_explanation,
    read_network,
    read_predictions,
    read_response,
    read_view,
)
from explain_client.results import Classification, Explanation, Level, Network, Prediction
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
        ExplainError: any other failure; the base class of these errors.
        OSError: the image's file cannot be read.
        TypeError: the image is an array of the wrong dtype or shape.
    """

    def __init__(self, url: str = DEFAULT_URL, timeout: float = 300.0, retries: int = 2) -> None:
        self._url, self._timeout, self._retries = url, timeout, retries
        self._triton = triton.InferenceServerClient(url)
        self._view: View | None = None

    def __enter__(self) -> ExplainClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._triton.close()

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
                self._view = read_view(self._triton.get_model_config(VIEW_MODEL, client_timeout=self._timeout).config)
            except InferenceServerException as error:
                raise from_triton(error) from error
        return self._view

    def network(self) -> Network:
        """The network that the server explains."""
        return read_network(self._infer(network_call()))

    def _infer(self, call: Call) -> triton.InferResult:
        attempts = Attempts(self._timeout, self._retries)
        while True:
            seconds = attempts.seconds_left
            try:
                return self._triton.infer(**call.options(seconds), client_timeout=seconds)
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
        """The responses to one attempt. A connection takes only one stream, but connections share a channel."""
        responses: queue.Queue[tuple[triton.InferResult, InferenceServerException | None]] = queue.Queue()
        until = time.monotonic() + seconds
        connection = triton.InferenceServerClient(self._url)
        final = False
        try:
            connection.start_stream(lambda result, error: responses.put((result, error)), stream_timeout=seconds)
            with contextlib.suppress(InferenceServerException):  # its error comes as a response
                connection.async_stream_infer(**call.options(seconds))
            while not final:
                try:
                    result, error = responses.get(timeout=max(0.0, until - time.monotonic()) + 1)
                except queue.Empty:
                    raise TimedOutError(f"no answer within {seconds:.1f} s") from None
                if error is not None:
                    raise from_stream(error)
                final = is_final(result)
                yield result
        finally:
            connection.stop_stream(cancel_requests=not final)
            connection.close()
