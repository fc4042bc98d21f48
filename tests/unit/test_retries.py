"""When a request is retried, and after how long."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from scripted_server import scripted_server

from explain_client import AsyncExplainClient, ExplainClient
from explain_client.errors import ExplainError, RefusedError, TimedOutError, UnavailableError
from explain_client.retries import FIRST_DELAY, LONGEST_DELAY, Attempts

NO_ROOM = UnavailableError("no room", "UNAVAILABLE")


@pytest.fixture
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: (low + high) / 2)


@pytest.mark.usefixtures("no_jitter")
def test_delays_double_up_to_the_longest() -> None:
    attempts = Attempts(timeout=1000, retries=8)
    delays = [attempts.delay_after(NO_ROOM) for _ in range(8)]
    assert delays == pytest.approx([min(FIRST_DELAY * 2**number, LONGEST_DELAY) for number in range(8)])
    assert delays[-1] == delays[-2] == LONGEST_DELAY


def test_delays_are_spread_by_half_of_themselves() -> None:
    random.seed(0)
    delays = [Attempts(timeout=1000, retries=1).delay_after(NO_ROOM) for _ in range(1000)]
    assert 0.5 * FIRST_DELAY <= min(delays) < 0.51 * FIRST_DELAY
    assert 1.49 * FIRST_DELAY < max(delays) <= 1.5 * FIRST_DELAY


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_the_error_itself_is_raised_once_no_retry_is_left(retries: int) -> None:
    attempts = Attempts(timeout=1000, retries=retries)
    for _ in range(retries):
        attempts.delay_after(NO_ROOM)
    for _ in range(2):
        with pytest.raises(UnavailableError) as raised:
            attempts.delay_after(NO_ROOM)
        assert raised.value is NO_ROOM


@pytest.mark.parametrize("error", [ExplainError("?"), RefusedError("no"), TimedOutError("late")], ids=repr)
def test_only_a_server_without_room_is_asked_again(error: ExplainError) -> None:
    attempts = Attempts(timeout=1000, retries=1)
    with pytest.raises(type(error)) as raised:
        attempts.delay_after(error)
    assert raised.value is error
    # That did not use a retry.
    assert attempts.delay_after(NO_ROOM) > 0


@pytest.mark.usefixtures("no_jitter")
def test_a_delay_that_would_end_after_the_timeout_is_not_begun() -> None:
    assert Attempts(timeout=1.5 * FIRST_DELAY, retries=5).delay_after(NO_ROOM) == pytest.approx(FIRST_DELAY)
    with pytest.raises(TimedOutError, match="no answer in time; at last: no room") as raised:
        Attempts(timeout=0.9 * FIRST_DELAY, retries=5).delay_after(NO_ROOM)
    assert raised.value.status == "UNAVAILABLE"
    assert raised.value.__cause__ is NO_ROOM


def test_an_attempt_has_the_time_that_is_left_of_all() -> None:
    attempts = Attempts(timeout=5, retries=2)
    first = attempts.seconds_left
    time.sleep(0.02)
    assert first <= 5
    assert attempts.seconds_left <= first - 0.02


@pytest.mark.parametrize("timeout", [0, -3])
def test_a_deadline_that_has_passed_leaves_an_instant(timeout: float) -> None:
    """gRPC takes no timeout of zero or less for a deadline."""
    assert Attempts(timeout=timeout, retries=0).seconds_left == 1e-3


@pytest.mark.parametrize(("unavailable", "requests"), [(0, 1), (2, 3), (3, 3)])
def test_only_a_server_without_room_is_asked_again_and_not_for_ever(unavailable, requests):
    async def classify(url):
        async with AsyncExplainClient(url, timeout=20) as client:
            return await client.classify(b"image")

    for run in (lambda url: ExplainClient(url, timeout=20).classify(b"image"), lambda url: asyncio.run(classify(url))):
        with scripted_server(unavailable) as (servicer, url):
            if unavailable < 3:
                assert run(url)[0].label == "star"
            else:
                with pytest.raises(UnavailableError, match="no room"):
                    run(url)
            assert servicer.requests == requests
