"""The asyncio client: ``await AsyncExplainClient("localhost:8001").explain("photo.jpg")``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from types import TracebackType

import grpc
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from explain_client.client import DEFAULT_URL, DEFAULT_WANT
from explain_client.errors import ExplainError, from_stream, from_triton
from explain_client.images import ImageSource, View
from explain_client.protocol import (
    VIEW_MODEL,
    Call,
    ParameterValue,
    Wanted,
    classify_call,
    explain_call,
    network_call,
    read_explanation,
    read_network,
    read_predictions,
    read_response,
    read_view,
)
from explain_client.results import Classification, Explanation, Level, Network, Prediction
from explain_client.retries import Attempts


class AsyncExplainClient:
    """``ExplainClient`` for asyncio: the same methods, arguments and errors; any number of requests, no threads.

    Cancelling a task cancels its request. The server drops a request that has not begun. A stream that has begun ends
    at its next part; ``explain`` runs on until it is done or its ``timeout`` is over.
    """

    def __init__(self, url: str = DEFAULT_URL, timeout: float = 300.0, retries: int = 2) -> None:
        self._timeout, self._retries = timeout, retries
        self._triton = triton.InferenceServerClient(url)
        self._view: View | None = None

    async def __aenter__(self) -> AsyncExplainClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._triton.close()

    async def check(self) -> None:
        """Check that a server answers.

        Raises:
            UnavailableError: the server cannot be reached.
            ExplainError: it is not a Triton server, or does not answer.
        """
        try:
            await self._triton.get_server_metadata(client_timeout=self._timeout)
        except InferenceServerException as error:
            raise from_triton(error) from error

    async def classify(self, image: ImageSource, *, top_k: int = 5) -> tuple[Prediction, ...]:
        """See ``ExplainClient.classify``."""
        return read_predictions(await self._infer(classify_call(image, top_k)))

    async def explain(
        self,
        image: ImageSource,
        *,
        target: int | None = None,
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: ParameterValue,
    ) -> Explanation:
        """See ``ExplainClient.explain``."""
        call = explain_call("explain", image, target, top_k, want, parameters)
        started = time.perf_counter()
        result = await self._infer(call)
        return read_explanation(result, 1e3 * (time.perf_counter() - started))

    async def explain_stream(
        self,
        image: ImageSource,
        *,
        target: int | None = None,
        top_k: int = 5,
        want: Collection[Wanted] = DEFAULT_WANT,
        **parameters: ParameterValue,
    ) -> AsyncIterator[Classification | Level]:
        """See ``ExplainClient.explain_stream``.

        If you leave the loop early, the stream is cancelled when the iterator is closed; ``async with
        contextlib.aclosing(...)`` closes it at once.
        """
        call = explain_call("explain_stream", image, target, top_k, want, parameters)
        attempts = Attempts(self._timeout, self._retries)
        started = time.perf_counter()
        while True:
            is_answered = False
            try:
                async for result in self._responses(call, attempts.seconds_left):
                    is_answered = True
                    yield read_response(result, 1e3 * (time.perf_counter() - started))
                return
            except ExplainError as error:
                if is_answered:  # responses that the caller has cannot be repeated
                    raise
                await asyncio.sleep(attempts.delay_after(error))

    async def view(self) -> View:
        """See ``ExplainClient.view``."""
        if self._view is None:
            try:
                answer = await self._triton.get_model_config(VIEW_MODEL, client_timeout=self._timeout)
            except InferenceServerException as error:
                raise from_triton(error) from error
            self._view = read_view(answer.config)
        return self._view

    async def network(self) -> Network:
        """See ``ExplainClient.network``."""
        return read_network(await self._infer(network_call()))

    async def _infer(self, call: Call) -> triton.InferResult:
        attempts = Attempts(self._timeout, self._retries)
        while True:
            seconds = attempts.seconds_left
            try:
                return await self._triton.infer(**call.options(seconds), client_timeout=seconds)
            except InferenceServerException as error:
                await asyncio.sleep(attempts.delay_after(from_triton(error)))

    async def _responses(self, call: Call, seconds: float) -> AsyncIterator[triton.InferResult]:
        """The responses to one attempt."""

        async def requests() -> AsyncIterator[dict[str, object]]:
            yield call.options(seconds)

        responses = self._triton.stream_infer(requests(), stream_timeout=seconds)
        try:
            async for result, error in responses:
                if error is not None:
                    raise from_stream(error)
                yield result
        except grpc.RpcError as error:  # tritonclient does not convert it
            raise from_triton(InferenceServerException(error.details(), str(error.code()))) from error
        finally:
            responses.cancel()
