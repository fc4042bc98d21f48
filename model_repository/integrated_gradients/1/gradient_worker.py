"""A thread that explains jobs as they come: those that arrive while others are explained join them at the next pass."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from attribution_engine import Explanation, IntegratedGradients, Job, expected_rows

# How far the known pace of passes still counts after the next one: it follows a change of load within some ten passes.
PACE_MEMORY = 0.9
# Called in the worker's thread with a job's number and what became of it: None if it was given up, an exception if the
# engine failed.
Done = Callable[[int, Explanation | Exception | None], None]


class OverloadedError(Exception):
    """Too much waits already; the message says how much.

    Attributes:
        rows: jobs of so many rows, and more, are refused at present; None if that is not known.
        seconds: until then there is likely no room.
    """

    def __init__(self, message: str, rows: int | None, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.rows, self.seconds = rows, seconds


class GradientWorker:
    """The engine in a thread of its own.

    Args:
        engine: whose passes all run in that thread.
        device: of the engine.
        max_wait_seconds: longest wait for a first pass. What would wait longer, by the pace of late, is not taken; what
            has waited longer is given up.
        max_waiting: jobs that may be there at once, which bounds the memory of those that wait.
    """

    def __init__(
        self,
        engine: IntegratedGradients,
        device: torch.device,
        max_wait_seconds: float,
        max_waiting: int,
    ) -> None:
        self._engine, self._device = engine, device
        self._max_wait_seconds, self._max_waiting = max_wait_seconds, max_waiting
        self._changed = threading.Condition()
        self._arrived: list[Job] = []
        self._there: dict[int, tuple[Job, int, Done]] = {}
        self._is_closed = False
        self._pace = _Pace()
        self._thread = threading.Thread(target=self._work, name="gradients")
        self._thread.start()

    def submit(self, jobs: Sequence[Job], done: Done) -> float:
        """Have jobs of one kind explained; ``done`` is called once for each, with its place in ``jobs``.

        Returns:
            For how many seconds they are going to wait for their first pass.

        Raises:
            OverloadedError: none of them was taken.
        """
        with self._changed:
            if self._there and len(self._there) + len(jobs) > self._max_waiting:
                raise OverloadedError(
                    f"{len(self._there)} images wait for their gradients, and at most {self._max_waiting} may",
                    0 if len(jobs) == 1 else None,
                )
            wait = self._pace.seconds(self._engine.rows_before(jobs[0], self._arrived))
            if wait > self._max_wait_seconds:
                raise OverloadedError(
                    f"the gradients that go before take about {wait:.1f} s, and at most {self._max_wait_seconds:g} s "
                    "may be waited",
                    expected_rows(jobs[0]),
                    wait - self._max_wait_seconds,
                )
            start_by = time.monotonic() + self._max_wait_seconds
            taken = [replace(job, start_by=start_by) for job in jobs]
            self._arrived += taken
            self._there |= {id(job): (job, number, done) for number, job in enumerate(taken)}
            self._changed.notify()
        return wait

    @property
    def waiting(self) -> int:
        """Jobs that are there."""
        return len(self._there)

    def close(self) -> None:
        """End the thread, once what is there has been explained."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        on_gpu = self._device.type == "cuda"
        with torch.cuda.device(self._device) if on_gpu else contextlib.nullcontext():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._arrived or self._is_closed)
                    if not self._arrived:
                        return
                self._pace.pause()
                try:
                    for job, explanation in self._engine.explain_as_done((), arrivals=self._take_arrived):
                        self._tell(job, explanation)
                except Exception as failure:
                    self._fail(failure)

    def _take_arrived(self) -> list[Job]:
        """Called before each pass."""
        self._pace.record(self._engine.rows_passed)
        with self._changed:
            taken, self._arrived = self._arrived, []
        return taken

    def _tell(self, job: Job, found: Explanation | Exception | None) -> None:
        with self._changed:
            _, number, done = self._there.pop(id(job))
        done(number, found)

    def _fail(self, failure: Exception) -> None:
        """Tell of all jobs that the engine had when it failed."""
        with self._changed:
            waiting = {id(job) for job in self._arrived}
            lost = [job for key, (job, *_) in self._there.items() if key not in waiting]
        for job in lost:
            self._tell(job, failure)


class _Pace:
    """Seconds a row of late."""

    def __init__(self) -> None:
        self._rows = self._seconds = 0.0
        self._last: tuple[int, float] | None = None

    def pause(self) -> None:
        """Nothing was to do until now."""
        self._last = None

    def record(self, rows_passed: int) -> None:
        """Take note of how many rows have been passed in all by now."""
        now = time.monotonic()
        if self._last is not None and rows_passed > self._last[0]:
            self._rows = PACE_MEMORY * self._rows + rows_passed - self._last[0]
            self._seconds = PACE_MEMORY * self._seconds + now - self._last[1]
        self._last = rows_passed, now

    def seconds(self, rows: int) -> float:
        """What so many rows take; 0 while nothing is known."""
        return rows * self._seconds / self._rows if self._rows else 0.0
