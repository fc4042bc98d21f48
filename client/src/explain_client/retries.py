"""When to retry: only if the server was unavailable, nothing was answered, and there is time left."""

from __future__ import annotations

import random
import time

from explain_client.errors import ExplainError, TimedOutError, UnavailableError

FIRST_DELAY, LONGEST_DELAY = 0.1, 2.0


class Attempts:
    """The attempts at one request, which together may take ``timeout`` seconds.

    Requests change nothing on the server, so retries are safe. Only UNAVAILABLE is retried.
    """

    def __init__(self, timeout: float, retries: int) -> None:
        self._until = time.monotonic() + timeout
        self._retries_left = retries
        self._delay = FIRST_DELAY

    @property
    def seconds_left(self) -> float:
        """Seconds for the present attempt."""
        return max(1e-3, self._until - time.monotonic())

    def delay_after(self, error: ExplainError) -> float:
        """Seconds to wait before the next attempt: exponential, with jitter.

        Raises:
            ExplainError: the error, if there is no next attempt.
        """
        delay = self._delay * random.uniform(0.5, 1.5)
        if not isinstance(error, UnavailableError) or self._retries_left <= 0:
            raise error
        if time.monotonic() + delay >= self._until:
            raise TimedOutError(f"no answer in time; at last: {error}", error.status) from error
        self._retries_left -= 1
        self._delay = min(2 * self._delay, LONGEST_DELAY)
        return delay
