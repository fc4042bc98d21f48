"""The client: ``ExplainClient("localhost:8001").explain("photo.jpg")``."""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, overload

import grpc
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from explain_client.connection import TLS, Url, connect, response_stream
from explain_client.errors import ExplainError, closed_error, cut_off_error, from_rpc, from_stream, from_triton
from explain_client.images import ImageSource, View
from explain_client.labels import names_labels, with_classes
from explain_client.many import in_order
from explain_client.protocol import (
    VIEW_MODEL,
    Call,
    Model,
    Wanted,
    classes_asked,
    classify_call,
    explain_call,
    is_final,
    labels_call,
    message_of,
    network_call,
    read_explanations,
    read_labels,
    read_network,
    read_predictions,
    read_response,
    read_view,
)
from explain_client.results import (
    Answer,
    Classification,
    Explanation,
    Level,
    Network,
    Prediction,
    has_label,
    with_label,
)
from explain_client.retries import Attempts

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from explain_client.parameters import Parameters

DEFAULT_WANT: tuple[Wanted, ...] = ("saliency", "heatmap")


class ExplainClient:
    """A connection to a server, usable as a context manager and from several threads.

    Args:
        url: host and gRPC port; ``grpcs://HOST:PORT`` for TLS, ``dns:///HOST:PORT`` or several addresses for requests
            to several servers in turn. None: the variable EXPLAIN_URL, else ``localhost:8001``.
        timeout: seconds for a request with its retries; the server stops working on it then, too.
        retries: most repetitions of a request when the server is UNAVAILABLE, with exponential backoff.
        headers: sent with every request, besides those of the variable EXPLAIN_HEADERS (``Name: value``, one a line).
        token: a bearer token, sent in the header ``authorization``.
        tls: files of certificates to trust and of the client's own.
        channel_options: gRPC's channel arguments.

    Raises:
        ValueError: an address or a header is malformed.
        OSError: a file of ``tls`` cannot be read.
        UnavailableError: of several addresses one cannot be resolved.

    Every method raises, besides its own errors:
        RefusedError: the server rejected the request; the message names the fault.
        UnavailableError: the server cannot be reached or has no room, after the retries.
        TimedOutError: there was no answer in time.
        ExplainError: any other failure, as a client that is closed; the base class of these errors.
        OSError: the image's file cannot be read.
        TypeError: the image is an array of the wrong dtype or shape.
        ValueError: the image is a PIL image with values out of range; ``images.encoded`` has the ranges.
    """

    def __init__(
        self,
        url: Url | None = None,
        timeout: float = 300.0,
        retries: int = 2,
        *,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        tls: TLS | None = None,
        channel_options: Mapping[str, str | int] | None = None,
    ) -> None:
        self._server = connect(url, headers, token, tls, channel_options)
        self._timeout, self._retries = timeout, retries
        self._triton = self._server.open()
        # Called at the interpreter's exit at the latest: a channel that is still open then can hang it.
        self._close = weakref.finalize(self, self._triton.close)
        self._view: View | None = None
        self._labels: tuple[str, ...] | None = None

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

    @overload
    def explain(
        self,
        image: ImageSource,
        *,
        target: int | str | None = None,
        targets: None = None,
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: Unpack[Parameters],
    ) -> Explanation: ...

    @overload
    def explain(
        self,
        image: ImageSource,
        *,
        targets: Sequence[int | str],
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: Unpack[Parameters],
    ) -> tuple[Explanation, ...]: ...

    def explain(
        self,
        image: ImageSource,
        *,
        target: int | str | None = None,
        targets: Sequence[int | str] | None = None,
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: Unpack[Parameters],
    ) -> Explanation | tuple[Explanation, ...]:
        """The prediction for one image and the attribution that explains it.

        Args:
            image: a path, the bytes of a JPEG, PNG or WebP file, a PIL image, or a uint8 array [height, width, 3].
            target: the class to explain, by number or label; the predicted one if absent.
            targets: several classes, instead of ``target``: the result has an explanation for each, in their order. The
                server computes them together.
            top_k: how many predictions to return.
            want: tensors to transfer: ``saliency``, ``attributions``, ``heatmap``.
            parameters: request parameters of the serving contract: ``n_steps``, ``tolerance``, ``baseline``, ...

        Raises:
            TypeError: a name in ``parameters`` is none of the contract.
            ValueError: ``target``, ``targets`` or ``contrast`` is a label that the server does not have.
        """
        call = self._call("explain", image, classes_asked(target, targets), top_k, want, parameters)
        started = time.perf_counter()
        result = self._infer(call)
        answers = read_explanations(call, result, 1e3 * (time.perf_counter() - started))
        labelled = tuple([self._labelled(call, answer) for answer in answers])
        return labelled[0] if targets is None else labelled

    def explain_many(
        self,
        images: Iterable[ImageSource],
        *,
        concurrency: int = 8,
        target: int | str | None = None,
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: Unpack[Parameters],
    ) -> Iterator[Explanation | ExplainError | OSError]:
        """For each image, in their order, its explanation or the error that it got instead.

        Images are taken from ``images`` as they are needed. The other arguments are those of ``explain``.

        Args:
            concurrency: requests in flight.
        """

        def explain(image: ImageSource) -> Explanation | ExplainError | OSError:
            try:
                return self.explain(image, target=target, top_k=top_k, want=want, **parameters)
            except (ExplainError, OSError) as error:
                return error

        return in_order(explain, images, concurrency)

    def explain_stream(
        self,
        image: ImageSource,
        *,
        target: int | str | None = None,
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: Unpack[Parameters],
    ) -> Iterator[Classification | Level]:
        """The prediction at once, then attributions that get more exact; the last has ``is_last``.

        If you leave the loop early, the rest is cancelled on the server. Arguments are those of ``explain``.
        """
        return self._stream(self._call("explain_stream", image, classes_asked(target, None), top_k, want, parameters))

    def labels(self) -> tuple[str, ...]:
        """The label of each class: asked for once, then kept."""
        if self._labels is None:
            self._labels = read_labels(self._infer(labels_call()))
        return self._labels

    def view(self) -> View:
        """The classifier's view of an image, for ``images.as_seen``: asked for once, then kept."""
        if self._view is None:
            try:
                answer = self._connection.get_model_config(VIEW_MODEL, client_timeout=self._timeout)
            except InferenceServerException as error:
                raise from_triton(error) from error
            self._view = read_view(answer.config)
        return self._view

    def network(self) -> Network:
        """The network that the server explains."""
        return read_network(self._infer(network_call()))

    @property
    def _connection(self) -> triton.InferenceServerClient:
        if not self._close.alive:
            raise closed_error()
        return self._triton

    def _call(
        self,
        model: Model,
        image: ImageSource,
        targets: Sequence[int | str],
        top_k: int,
        want: Collection[Wanted],
        parameters: Parameters,
    ) -> Call:
        labels = self.labels() if names_labels(targets, parameters) else ()
        classes, numbers = with_classes(targets, parameters, labels)
        return explain_call(model, image, classes, top_k, want, numbers)

    def _labelled(self, call: Call, answer: Answer) -> Answer:
        """The answer with its explained class's label, which is among the predictions or asked for."""
        return answer if has_label(answer) else with_label(answer, self.labels(), call.explains_prediction)

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
                    response = read_response(call, result, 1e3 * (time.perf_counter() - started))
                    yield self._labelled(call, response) if isinstance(response, Classification) else response
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
        infer, headers = response_stream(self._connection), tuple(self._server.headers.items())
        responses = infer(message_of(call, seconds), timeout=seconds, metadata=headers)
        is_ended = False
        try:
            for response in responses:
                if response.error_message:
                    raise from_stream(InferenceServerException(response.error_message))
                result = triton.InferResult(response.infer_response)
                is_ended = is_final(result)  # the server closes the stream next: Triton 2.51 may keep a cancelled one
                yield result
            if not is_ended:
                raise cut_off_error()
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        finally:
            responses.cancel()
