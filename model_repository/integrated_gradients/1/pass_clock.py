"""How long passes take on this device under its present load: what deadlines and admission are planned with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# The weight of the latest pass in its running mean: the estimate follows a change of load within a few passes.
FOLLOWING = 0.3


class Pass(NamedTuple):
    """What the time of a pass depends on: its rows, and whether any is paired, which takes longer."""

    rows: int
    paired: bool


class PassClock:
    """Running means of the seconds that a pass takes, with all that the engine does around it."""

    def __init__(self) -> None:
        self._seconds: dict[Pass, float] = {}
        self._latest: Pass | None = None

    def record(self, passes: Sequence[Pass], seconds: float) -> None:
        """Take note of passes that took so long together."""
        known_all = all(self._seconds.get(each) for each in passes)  # else they are shared out by their rows
        expected = [self._seconds[each] if known_all else float(each.rows) for each in passes]
        for each, share in zip(passes, expected):
            own = seconds * share / sum(expected)
            known = self._seconds.get(each, own)
            self._seconds[each] = known + FOLLOWING * (own - known)
            self._latest = each

    def estimate(self, rows: int, paired: bool) -> float:
        """Seconds of a pass of so many rows: by its neighbours where it was not seen, NaN where nothing was."""
        known = {each.rows: seconds for each, seconds in self._seconds.items() if each.paired == paired}
        if rows in known or not known:
            return known.get(rows, math.nan)
        below = max((seen for seen in known if seen < rows), default=None)
        above = min((seen for seen in known if seen > rows), default=None)
        if below is None:
            return known[min(known)]  # a smaller pass takes less time, but not in proportion
        if above is None:
            return known[below] * rows / below
        part = (rows - below) / (above - below)
        return (1 - part) * known[below] + part * known[above]

    def rows_within(self, seconds: float, largest: int, paired: bool) -> int | None:
        """Rows that passes of at most ``largest`` rows get done in that time; None where nothing is known."""
        full = self.estimate(largest, paired)
        if math.isnan(full):
            return None
        passes = max(0, int(seconds / full)) if full > 0 else 0
        left = seconds - passes * full
        rest = next((rows for rows in range(largest - 1, 0, -1) if self.estimate(rows, paired) <= left), 0)
        return passes * largest + rest

    def seconds(self, rows: int) -> float:
        """What so many rows take at the rate of the latest pass; 0 while nothing is known."""
        latest = self._latest
        return 0.0 if latest is None else rows * self._seconds[latest] / latest.rows
