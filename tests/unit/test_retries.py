"""How often and how long the client asks again."""

import asyncio
import time

import pytest
from scripted_server import scripted_server

from explain_client import AsyncExplainClient, ExplainClient, RefusedError, TimedOutError, UnavailableError
from explain_client.retries import Attempts


@pytest.mark.parametrize(("unavailable", "asked"), [(0, 1), (2, 3), (3, 3)])
def test_only_a_server_without_room_is_asked_again_and_not_for_ever(unavailable, asked):
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
            assert servicer.asked == asked


def test_attempts_end_with_the_time():
    attempts = Attempts(timeout=0.01, retries=5)
    time.sleep(0.02)
    with pytest.raises(TimedOutError, match="no room"):
        attempts.delay_after(UnavailableError("no room"))
    with pytest.raises(RefusedError):
        Attempts(10, 5).delay_after(RefusedError("no"))
