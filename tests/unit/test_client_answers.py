"""What both clients make of answers that Triton seldom gives, from a scripted server."""

import asyncio
import threading
import time

import pytest
from scripted_server import CutOff, Guarded, Tied, scripted_server

from explain_client import AsyncExplainClient, ExplainClient, ExplainError, RefusedError
from explain_client.many import AHEAD, in_order, in_order_async


def both(url: str, method: str, *arguments, **options):
    """The answers of the two clients; a list for a stream."""

    async def ask():
        async with AsyncExplainClient(url) as client:
            answer = getattr(client, method)(*arguments, **options)
            return [each async for each in answer] if hasattr(answer, "__aiter__") else await answer

    with ExplainClient(url) as client:
        answer = getattr(client, method)(*arguments, **options)
        answers = [list(answer) if hasattr(answer, "__next__") else answer]
    return [*answers, asyncio.run(ask())]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_first_prediction_is_the_explained_class_where_probabilities_tie(top_k):
    with scripted_server(0, Tied) as (_, url):
        answers = both(url, "explain", b"image", top_k=top_k, want=[])
        answers += [responses[0] for responses in both(url, "explain_stream", b"image", top_k=top_k, want=[])]
    for answer in answers:
        assert (answer.explained_class, answer.explained_label) == (1, "ring")
        assert (answer.predictions[0].label, answer.predictions[0].probability) == ("ring", 0.5)
        assert len(answer.predictions) == top_k


def test_classes_have_their_labels_whatever_is_predicted():
    with scripted_server(0, Tied) as (_, url):
        assert both(url, "labels") == 2 * [("star", "ring", "cross")]
        answers = both(url, "explain", b"image", target="Cross", contrast="ring", top_k=1, want=[])
        answers += [responses[0] for responses in both(url, "explain_stream", b"image", target=2, top_k=1, want=[])]
        with ExplainClient(url) as client, pytest.raises(ValueError, match=r"contrast 'rink' is not .* near are ring"):
            client.explain(b"image", contrast="rink")
    for answer in answers:
        assert (answer.explained_class, answer.explained_label) == (2, "cross")
        assert answer.predictions[0].label == "star"


def test_a_stream_without_a_last_response_is_an_error():
    async def read(url: str) -> None:
        async with AsyncExplainClient(url) as client:
            async for _ in client.explain_stream(b"image"):
                pass

    with scripted_server(0, CutOff) as (_, url):
        with ExplainClient(url) as client, pytest.raises(ExplainError, match="before its last response"):
            list(client.explain_stream(b"image"))
        with pytest.raises(ExplainError, match="before its last response"):
            asyncio.run(read(url))


def test_headers_go_with_every_call_and_a_missing_token_is_no_reason_to_retry(monkeypatch):
    monkeypatch.setenv("EXPLAIN_HEADERS", "X-Team: vision")
    headers = {"X-Model": "a"}
    with scripted_server(0, Tied) as (servicer, url), ExplainClient(url, token="secret", headers=headers) as client:
        client.classify(b"image")
        list(client.explain_stream(b"image", want=[]))
    sent = [{name: each[name] for name in ("x-team", "x-model", "authorization")} for each in servicer.headers]
    assert sent == 2 * [{"x-team": "vision", "x-model": "a", "authorization": "Bearer secret"}]
    with (
        scripted_server(0, Guarded) as (_, url),
        ExplainClient(url) as client,
        pytest.raises(RefusedError, match="token"),
    ):
        client.classify(b"image")


def test_several_servers_share_the_requests():
    with (
        scripted_server(0) as (one, first),
        scripted_server(0) as (other, second),
        ExplainClient([first, second]) as client,
    ):
        until = time.monotonic() + 20  # the first requests go to the server that is connected first
        while not (one.requests and other.requests) and time.monotonic() < until:
            client.classify(b"image")
        before = one.requests
        for _ in range(6):
            client.classify(b"image")
    assert one.requests - before == 3


def test_many_images_give_explanations_and_errors_in_their_order(tmp_path):
    images = [b"image", str(tmp_path / "absent.png"), b"image"]
    with scripted_server(0, Tied) as (_, url):
        for results in both(url, "explain_many", images, concurrency=2, want=[], n_steps=4):
            assert [type(result).__name__ for result in results] == ["Explanation", "FileNotFoundError", "Explanation"]
        with ExplainClient(url) as client, pytest.raises(ValueError, match="concurrency must be at least 1, not 0"):
            next(client.explain_many(images, concurrency=0))


class Counted:
    """Calls of which the first is slow; counts those in flight and the items taken."""

    def __init__(self) -> None:
        self.in_flight = self.most = self.taken = 0
        self.lock = threading.Lock()

    def items(self):
        for item in range(40):
            self.taken += 1
            yield item

    def enter(self, change: int) -> None:
        with self.lock:
            self.in_flight += change
            self.most = max(self.most, self.in_flight)

    def call(self, item: int) -> int:
        self.enter(1)
        time.sleep(0.2 if item == 0 else 0.01)
        self.enter(-1)
        return item

    async def call_async(self, item: int) -> int:
        self.enter(1)
        await asyncio.sleep(0.2 if item == 0 else 0.01)
        self.enter(-1)
        return item


@pytest.mark.parametrize("is_async", [False, True])
def test_calls_in_flight_and_items_taken_ahead_are_bounded(is_async):
    counted = Counted()

    async def run_async():
        results = in_order_async(counted.call_async, counted.items(), 3)
        first = await anext(results)
        ahead = counted.taken
        return [first, *[each async for each in results]], ahead

    if is_async:
        found, ahead = asyncio.run(run_async())
    else:
        results = in_order(counted.call, counted.items(), 3)
        first = next(results)
        ahead = counted.taken
        found = [first, *results]
    assert found == list(range(40))
    assert counted.most == 3
    assert ahead <= AHEAD * 3


@pytest.mark.parametrize("is_async", [False, True])
def test_a_result_is_given_as_soon_as_it_is_there(is_async):
    """While items are slow to come, as photographs from a disk are."""
    taken = []

    def items():
        for item in range(AHEAD):
            taken.append(item)
            time.sleep(0.05)
            yield item

    async def call(item: int) -> int:
        return item

    if is_async:
        assert asyncio.run(anext(in_order_async(call, items(), 1))) == 0
    else:
        assert next(in_order(int, items(), 1)) == 0
    assert len(taken) <= 2
