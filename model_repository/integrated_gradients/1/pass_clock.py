"""How long passes take on this device under its present load, for deadlines and admission."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Weight of the latest pass in the running mean: the estimate follows a change of load within a few passes.
FOLLOWING = 0.3
# What each further pass leaves of those before it in the rate of rows, so that a small pass hardly counts.
MEMORY = 0.9


class Pass(NamedTuple):
    """What the time of a pass depends on: its rows, and whether any is paired, which takes longer.

    ``further``: gradients of further classes that share the forward pass.
    """

    rows: int
    paired: bool
    further: int = 0


class PassClock:
    """Running means of the seconds of a pass, including the engine's work around it."""

    def __init__(self) -> None:
        self._seconds: dict[Pass, float] = {}
        self._recent = 0.0, 0.0  # rows and seconds of late

    def record(self, passes: Sequence[Pass], seconds: float) -> None:
        """Record passes that took ``seconds`` together."""
        kept = MEMORY ** len(passes)
        rows, total = self._recent
        self._recent = kept * rows + sum(key.rows + key.further for key in passes), kept * total + seconds
        known_all = all(self._seconds.get(key) for key in passes)  # else the time is divided by rows
        expected = [self._seconds[key] if known_all else float(key.rows + key.further) for key in passes]
        for key, share in zip(passes, expected):
            if key.further:  # no pass is planned by its time
                continue
            measured = seconds * share / sum(expected)
            known = self._seconds.get(key, measured)
            self._seconds[key] = known + FOLLOWING * (measured - known)

    def estimate(self, rows: int, paired: bool) -> float:
        """Seconds of a pass of ``rows`` rows, interpolated where none was recorded; NaN before any was."""
        known = {key.rows: seconds for key, seconds in self._seconds.items() if key.paired == paired}
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
        """Rows that fit into ``seconds`` in passes of at most ``largest`` rows; None before any was recorded."""
        full = self.estimate(largest, paired)
        if math.isnan(full):
            return None
        passes = max(0, int(seconds / full)) if full > 0 else 0
        left = seconds - passes * full
        rest = next((rows for rows in range(largest - 1, 0, -1) if self.estimate(rows, paired) <= left), 0)
        return passes * largest + rest

    def seconds(self, rows: int) -> float:
        """Seconds of ``rows`` rows at the rate of late; 0 before any pass was recorded. From any thread."""
        recent_rows, recent_seconds = self._recent
        return rows * recent_seconds / recent_rows if recent_rows else 0.0
