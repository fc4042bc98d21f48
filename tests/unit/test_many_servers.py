"""Clients of servers that go and come, as pods behind one name do."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest
from name_server import name_server
from scripted_server import Leaving, scripted_server

from explain_client import AsyncExplainClient, ExplainClient, ExplainError, UnavailableError
from explain_client.connection import LOOK_UP_MS, RECONNECT_MS
from tools.triton.options import Ports

# Of the scripted servers' connections, and of look-ups, in milliseconds: short, for the test's sake.
AGE_MS, LOOK_UP_EVERY_MS = 500, 200


async def _asked(url: str, is_stream: bool) -> int:
    async with AsyncExplainClient(url, timeout=20) as client:
        if is_stream:
            return len([response async for response in client.explain_stream(b"image")])
        return (await client.explain(b"image")).explained_class


def _ask(url: str, is_stream: bool) -> int:
    with ExplainClient(url, timeout=20) as client:
        if is_stream:
            return len(list(client.explain_stream(b"image")))
        return client.explain(b"image").explained_class


@pytest.mark.parametrize("is_stream", [False, True], ids=["request", "stream"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_what_a_server_that_stops_does_not_take_another_answers(is_async, is_stream):
    """The second server answers, whichever is asked first."""
    with scripted_server(10**6, Leaving) as (_, leaving), scripted_server(0, Leaving) as (staying, other):
        url = f"{leaving},{other}"
        for _ in "ab":
            assert (asyncio.run(_asked(url, is_stream)) if is_async else _ask(url, is_stream)) == 1
        assert staying.requests == 2


@pytest.mark.parametrize("is_stream", [False, True], ids=["request", "stream"])
def test_a_server_that_stops_and_has_no_other_is_unavailable(is_stream):
    with scripted_server(10**6, Leaving) as (servicer, url):
        with pytest.raises(UnavailableError, match="has no available versions"):
            _ask(url, is_stream)
        assert servicer.requests == 3


def test_servers_that_leave_the_name_are_left_and_new_ones_found_without_losing_a_request():
    """As a rollout: the name loses a server, which stops some time later; another joins it."""
    port, errors, is_over = Ports.free().grpc, [], threading.Event()

    def ask(client: ExplainClient) -> None:
        while not is_over.is_set():
            try:
                client.explain(b"image")
            except ExplainError as error:
                errors.append(error)
            time.sleep(0.01)

    def server(number: int):
        return scripted_server(0, Leaving, f"127.0.0.{number}:{port}", max_connection_age_ms=AGE_MS)

    def until(condition) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with name_server() as names, contextlib.ExitStack() as stack:
        names.addresses = ["127.0.0.1", "127.0.0.2"]
        leaving = contextlib.ExitStack()
        first, _ = leaving.enter_context(server(1))
        second, _ = stack.enter_context(server(2))
        options = {"grpc.dns_min_time_between_resolutions_ms": LOOK_UP_EVERY_MS}
        client = stack.enter_context(
            ExplainClient(f"dns://{names.url}/explain.test:{port}", timeout=20, channel_options=options)
        )
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: len(first.headers) > 10 and len(second.headers) > 10)
            third, _ = stack.enter_context(server(3))
            names.addresses = ["127.0.0.2", "127.0.0.3"]
            until(lambda: len(third.headers) > 10)
            time.sleep(2e-3 * (AGE_MS + LOOK_UP_EVERY_MS))  # connections to the first are over
            taken = len(first.headers)
            time.sleep(1e-3 * AGE_MS)
            assert len(first.headers) == taken
            first.unavailable = 10**9
            leaving.close()
            taken = len(second.headers)
            until(lambda: len(second.headers) > taken + 10)
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
    assert not errors
    # A name is looked up when a connection ends, and at most so often.
    assert names.questions > 2


def test_by_default_servers_are_looked_up_again_within_seconds():
    """With connections of 20 s, which may last a tenth longer, a new server is found within 30 s."""
    assert 20_000 * 1.1 + LOOK_UP_MS < 30_000
    assert RECONNECT_MS < 30_000
