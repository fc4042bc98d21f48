"""Many calls with a bounded number in flight, for both clients; results come in the order of the items."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Items taken beyond the first without a result, for each call in flight: a slow one does not idle the others.
AHEAD = 4


def in_order(call: Callable[[Item], Result], items: Iterable[Item], concurrency: int) -> Iterator[Result]:
    """The result of each call, at most ``concurrency`` at a time in threads; items are taken as they are needed.

    Raises:
        ValueError: ``concurrency`` is below 1.
    """
    _check(concurrency)
    pool, results = ThreadPoolExecutor(concurrency), deque[Future[Result]]()
    try:
        for item in items:
            results.append(pool.submit(call, item))
            while results and (len(results) >= AHEAD * concurrency or results[0].done()):
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


async def in_order_async(
    call: Callable[[Item], Awaitable[Result]], items: Iterable[Item], concurrency: int
) -> AsyncIterator[Result]:
    """``in_order`` for coroutines.

    Raises:
        ValueError: ``concurrency`` is below 1.
    """
    _check(concurrency)
    slots, results = asyncio.Semaphore(concurrency), deque[asyncio.Task[Result]]()

    async def call_in_turn(item: Item) -> Result:
        async with slots:
            return await call(item)

    try:
        for item in items:
            results.append(asyncio.create_task(call_in_turn(item)))
            await asyncio.sleep(0)  # else no call begins before AHEAD items are taken
            while results and (len(results) >= AHEAD * concurrency or results[0].done()):
                yield await results.popleft()
        while results:
            yield await results.popleft()
    finally:
        for task in results:
            task.cancel()


def _check(concurrency: int) -> None:
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, not {concurrency}")
