"""The asyncio client: ``await AsyncExplainClient("localhost:8001").explain("photo.jpg")``."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, overload

import grpc
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from explain_client.client import DEFAULT_WANT
from explain_client.connection import TLS, Url, connect
from explain_client.errors import ExplainError, closed_error, cut_off_error, from_rpc, from_stream, from_triton
from explain_client.images import ImageSource, View
from explain_client.labels import names_labels, with_classes
from explain_client.many import in_order_async
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


class AsyncExplainClient:
    """``ExplainClient`` for asyncio: the same methods, arguments and errors; any number of requests, no threads.

    Cancelling a task cancels its request. The server drops a request that has not begun. A stream that has begun ends
    at its next part; ``explain`` runs on until it is done or its ``timeout`` is over.
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
        self._timeout, self._retries = timeout, retries
        self._triton = connect(url, headers, token, tls, channel_options).open_async()
        self._is_closed = False
        self._view: View | None = None
        self._labels: tuple[str, ...] | None = None

    async def __aenter__(self) -> AsyncExplainClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """See ``ExplainClient.close``."""
        self._is_closed = True
        await self._triton.close()

    async def check(self) -> None:
        """Check that a server answers.

        Raises:
            UnavailableError: the server cannot be reached.
            ExplainError: it is not a Triton server, or does not answer.
        """
        try:
            await self._connection.get_server_metadata(client_timeout=self._timeout)
        except InferenceServerException as error:
            raise from_triton(error) from error

    async def classify(self, image: ImageSource, *, top_k: int = 5) -> tuple[Prediction, ...]:
        """See ``ExplainClient.classify``."""
        return read_predictions(await self._infer(classify_call(image, top_k)))

    @overload
    async def explain(
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
    async def explain(
        self,
        image: ImageSource,
        *,
        targets: Sequence[int | str],
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: Unpack[Parameters],
    ) -> tuple[Explanation, ...]: ...

    async def explain(
        self,
        image: ImageSource,
        *,
        target: int | str | None = None,
        targets: Sequence[int | str] | None = None,
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: Unpack[Parameters],
    ) -> Explanation | tuple[Explanation, ...]:
        """See ``ExplainClient.explain``."""
        call = await self._call("explain", image, classes_asked(target, targets), top_k, want, parameters)
        started = time.perf_counter()
        result = await self._infer(call)
        answers = read_explanations(call, result, 1e3 * (time.perf_counter() - started))
        labelled = tuple([await self._labelled(call, answer) for answer in answers])
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
    ) -> AsyncIterator[Explanation | ExplainError | OSError]:
        """See ``ExplainClient.explain_many``."""

        async def explain(image: ImageSource) -> Explanation | ExplainError | OSError:
            try:
                return await self.explain(image, target=target, top_k=top_k, want=want, **parameters)
            except (ExplainError, OSError) as error:
                return error

        return in_order_async(explain, images, concurrency)

    async def explain_stream(
        self,
        image: ImageSource,
        *,
        target: int | str | None = None,
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: Unpack[Parameters],
    ) -> AsyncIterator[Classification | Level]:
        """See ``ExplainClient.explain_stream``.

        If you leave the loop early, the stream is cancelled when the iterator is closed; ``async with
        contextlib.aclosing(...)`` closes it at once.
        """
        call = await self._call("explain_stream", image, classes_asked(target, None), top_k, want, parameters)
        attempts = Attempts(self._timeout, self._retries)
        started = time.perf_counter()
        while True:
            is_answered = False
            try:
                async for result in self._responses(call, attempts.seconds_left):
                    is_answered = True
                    response = read_response(call, result, 1e3 * (time.perf_counter() - started))
                    yield await self._labelled(call, response) if isinstance(response, Classification) else response
                return
            except ExplainError as error:
                if is_answered:  # responses that the caller has cannot be repeated
                    raise
                await asyncio.sleep(attempts.delay_after(error))

    async def labels(self) -> tuple[str, ...]:
        """See ``ExplainClient.labels``."""
        if self._labels is None:
            self._labels = read_labels(await self._infer(labels_call()))
        return self._labels

    async def view(self) -> View:
        """See ``ExplainClient.view``."""
        if self._view is None:
            try:
                answer = await self._connection.get_model_config(VIEW_MODEL, client_timeout=self._timeout)
            except InferenceServerException as error:
                raise from_triton(error) from error
            self._view = read_view(answer.config)
        return self._view

    async def network(self) -> Network:
        """See ``ExplainClient.network``."""
        return read_network(await self._infer(network_call()))

    @property
    def _connection(self) -> triton.InferenceServerClient:
        if self._is_closed:
            raise closed_error()
        return self._triton

    @contextlib.contextmanager
    def _told_of_closing(self) -> Iterator[None]:
        """Raise ``ExplainError`` where gRPC cancels a call because the client was closed, but nobody the task."""
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            is_cancelled = task is not None and hasattr(task, "cancelling") and task.cancelling()  # from Python 3.11 on
            if self._is_closed and not is_cancelled:
                raise closed_error() from None
            raise

    async def _call(
        self,
        model: Model,
        image: ImageSource,
        targets: Sequence[int | str],
        top_k: int,
        want: Collection[Wanted],
        parameters: Parameters,
    ) -> Call:
        labels = await self.labels() if names_labels(targets, parameters) else ()
        classes, numbers = with_classes(targets, parameters, labels)
        return explain_call(model, image, classes, top_k, want, numbers)

    async def _labelled(self, call: Call, answer: Answer) -> Answer:
        return answer if has_label(answer) else with_label(answer, await self.labels(), call.explains_prediction)

    async def _infer(self, call: Call) -> triton.InferResult:
        attempts = Attempts(self._timeout, self._retries)
        while True:
            seconds = attempts.seconds_left
            try:
                with self._told_of_closing():
                    return await self._connection.infer(**call.options(seconds), client_timeout=seconds)
            except InferenceServerException as error:
                await asyncio.sleep(attempts.delay_after(from_triton(error)))

    async def _responses(self, call: Call, seconds: float) -> AsyncIterator[triton.InferResult]:
        """The responses to one attempt."""

        async def requests() -> AsyncIterator[dict[str, object]]:
            yield call.options(seconds)

        responses = self._connection.stream_infer(requests(), stream_timeout=seconds)
        is_ended = False
        try:
            with self._told_of_closing():
                async for result, error in responses:
                    if error is not None:
                        raise from_stream(error)
                    is_ended = is_final(result)
                    yield result
            if not is_ended:
                raise cut_off_error()
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        finally:
            responses.cancel()
