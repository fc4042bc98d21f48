"""How long passes take on this device under its present load: what a deadline is planned with."""

from __future__ import annotations

import math

# Of what the latest pass says, against what was known: the estimate follows a change of load within a few passes.
FOLLOWING = 0.3


class PassClock:
    """Running means of the seconds that a pass takes, by its number of rows."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def record(self, rows: int, seconds: float) -> None:
        """Take note of a pass."""
        known = self._seconds.get(rows, seconds)
        self._seconds[rows] = known + FOLLOWING * (seconds - known)

    def estimate(self, rows: int) -> float:
        """Seconds of a pass of ``rows`` rows: by its neighbours where it was not seen, NaN where nothing was."""
        if rows in self._seconds or not self._seconds:
            return self._seconds.get(rows, math.nan)
        below = max((seen for seen in self._seconds if seen < rows), default=None)
        above = min((seen for seen in self._seconds if seen > rows), default=None)
        if below is None:
            return self._seconds[above]  # a smaller pass takes less time, but not in proportion
        if above is None:
            return self._seconds[below] * rows / below
        part = (rows - below) / (above - below)
        return (1 - part) * self._seconds[below] + part * self._seconds[above]

    def rows_within(self, seconds: float, largest: int) -> int | None:
        """Rows that passes of at most ``largest`` rows get done in that time; None where nothing is known."""
        full = self.estimate(largest)
        if math.isnan(full):
            return None
        passes = max(0, int(seconds / full)) if full > 0 else 0
        left = seconds - passes * full
        rest = next((rows for rows in range(largest - 1, 0, -1) if self.estimate(rows) <= left), 0)
        return passes * largest + rest
