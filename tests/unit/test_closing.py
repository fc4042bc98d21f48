"""How clients end: closed, left with streams under way, or never closed at all."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from scripted_server import Streaming, scripted_server

from explain_client import AsyncExplainClient, Classification, ExplainClient, ExplainError, TensorClient

# Programs that end without closing what they opened.
PROGRAMS = {
    "a client": "client = ExplainClient(url)",
    "a stream that is kept": "client = ExplainClient(url); stream = client.explain_stream(image); next(stream)",
    "a stream that was left": """
client = ExplainClient(url)
for response in client.explain_stream(image):
    break
""",
    "a stream that has not begun": "stream = ExplainClient(url).explain_stream(image)",
    "a stream in a cycle of references": """
keeper = type("Keeper", (), {})()
keeper.own, keeper.stream = keeper, ExplainClient(url).explain_stream(image)
next(keeper.stream)
""",
    "a stream in a thread": """
import threading
def read():
    for response in client.explain_stream(image):
        begun.set()
client, begun = ExplainClient(url), threading.Event()
threading.excepthook = lambda _: None
threading.Thread(target=read, daemon=True).start()
begun.wait(10)
""",
    "several streams": """
streams = [ExplainClient(url).explain_stream(image) for _ in range(3)]
responses = list(map(next, streams))
""",
    "a stream of an asyncio client": """
import asyncio
async def begin():
    global client, stream
    client = AsyncExplainClient(url)
    stream = client.explain_stream(image)
    await anext(stream)
asyncio.run(begin())
""",
    "a client of tensors": "client = TensorClient(url)",
}
BEGIN = "import sys, time; from explain_client import *; url, image = sys.argv[1], b'image'"
END = "print(time.monotonic(), flush=True)"
MOST_SECONDS = 2.0


def output_of(program: str, url: str) -> str:
    """What a program prints."""
    words = [sys.executable, "-c", f"{BEGIN}\n{program}", url]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def seconds_to_end(program: str, url: str) -> float:
    """Seconds from a program's last statement to the end of its process."""
    printed = output_of(f"{program}\n{END}", url)
    return time.monotonic() - float(printed)


@pytest.mark.parametrize(
    "programs",
    [
        pytest.param(["a stream that is kept", "a stream of an asyncio client"], id="two"),
        pytest.param(6 * list(PROGRAMS), id="all of them six times", marks=pytest.mark.slow),
    ],
)
def test_programs_that_never_close_anything_end_at_once(programs: list[str]) -> None:
    with scripted_server(0, Streaming) as (_, url), ThreadPoolExecutor(2) as pool:
        took = pool.map(lambda name: seconds_to_end(PROGRAMS[name], url), programs)
        assert [(name, seconds) for name, seconds in zip(programs, took) if seconds > MOST_SECONDS] == []


def test_a_stream_has_no_threads_that_outlive_its_program() -> None:
    """One that holds a lock as the interpreter ends would keep it from ending, now and then."""
    threads = "import threading; print(*threading.enumerate())"
    with scripted_server(0, Streaming) as (_, url):
        printed = output_of(f"{PROGRAMS['several streams']}\n{threads}", url)
    assert printed.count("Thread(") == 1, printed


def test_closing_a_client_ends_its_streams() -> None:
    with scripted_server(0, Streaming) as (_, url):
        client = ExplainClient(url)
        streams = [client.explain_stream(b"image") for _ in range(2)]
        assert all(isinstance(next(stream), Classification) for stream in streams)
        waiting = ThreadPoolExecutor(1).submit(next, streams[0])
        time.sleep(0.1)
        started = time.monotonic()
        client.close()
        with pytest.raises(ExplainError, match="closed"):
            waiting.result(10)
        with pytest.raises(ExplainError, match="closed"):
            next(streams[1])
        assert time.monotonic() - started < MOST_SECONDS


def test_closing_a_client_ends_its_requests() -> None:
    with scripted_server(0, Streaming) as (servicer, url):
        client = ExplainClient(url)
        waiting = ThreadPoolExecutor(1).submit(client.classify, b"image")
        until = time.monotonic() + 10
        while not servicer.requests and time.monotonic() < until:
            time.sleep(0.01)
        client.close()
        with pytest.raises(ExplainError, match="closed"):
            waiting.result(10)


def test_closing_an_asyncio_client_ends_its_streams_and_requests() -> None:
    async def close_under_way(url: str) -> None:
        client = AsyncExplainClient(url)
        stream = client.explain_stream(b"image")
        assert isinstance(await anext(stream), Classification)
        waiting = asyncio.ensure_future(anext(stream))
        request = asyncio.ensure_future(client.classify(b"image"))
        await asyncio.sleep(0.1)
        await client.close()
        for answer in (waiting, request):
            with pytest.raises(ExplainError, match="the client is closed"):
                await asyncio.wait_for(answer, 10)

    with scripted_server(0, Streaming) as (_, url):
        asyncio.run(close_under_way(url))


def test_a_cancelled_task_of_an_asyncio_client_is_cancelled() -> None:
    async def cancel(url: str) -> None:
        async with AsyncExplainClient(url) as client:
            request = asyncio.ensure_future(client.classify(b"image"))
            await asyncio.sleep(0.1)
            request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    with scripted_server(0, Streaming) as (_, url):
        asyncio.run(cancel(url))


def test_streams_that_are_left_leave_no_threads() -> None:
    with scripted_server(0, Streaming) as (_, url), ExplainClient(url) as client:
        next(client.explain_stream(b"image"))  # gRPC begins threads of its own
        before = {thread for thread in threading.enumerate() if "ThreadPool" not in thread.name}
        for _ in range(5):
            for _ in client.explain_stream(b"image"):
                break
        time.sleep(0.5)
        after = {thread for thread in threading.enumerate() if "ThreadPool" not in thread.name}
        assert len(after) <= len(before)


PIXELS, LOGITS = np.zeros((1, 3, 8, 8), np.float32), np.zeros((1, 5), np.float32)
METHODS: dict[str, Callable[[Any], Any]] = {
    "classify": lambda client: client.classify(b"image"),
    "explain": lambda client: client.explain(b"image"),
    "explain_stream": lambda client: next(client.explain_stream(b"image")),
    "view": lambda client: client.view(),
}


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        *((ExplainClient, call) for call in METHODS.values()),
        (TensorClient, lambda client: client.classify(PIXELS)),
        (TensorClient, lambda client: client.attribute(PIXELS, LOGITS)),
    ],
)
def test_a_client_that_is_closed_says_so(kind: type[Any], call: Callable[[Any], Any]) -> None:
    client = kind("localhost:9")
    client.close()
    client.close()  # again is no error
    with pytest.raises(ExplainError, match="the client is closed"):
        call(client)


@pytest.mark.parametrize("name", ["classify", "explain", "explain_stream", "view", "check"])
def test_an_asyncio_client_that_is_closed_says_so(name: str) -> None:
    async def call_closed() -> None:
        client = AsyncExplainClient("localhost:9")
        await client.close()
        await client.close()
        arguments = [b"image"] if name in METHODS and name != "view" else []
        answer = getattr(client, name)(*arguments)
        await (anext(answer) if name == "explain_stream" else answer)

    with pytest.raises(ExplainError, match="the client is closed"):
        asyncio.run(call_closed())
