"""A thread that explains jobs as they come. Jobs that arrive while others run join them at the next pass."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from attribution_engine import AttributionEngine
from attribution_job import Explanation, Job
from request_admission import Admission, RequestStart

# Called in the worker's thread with a job's number and its explanation; None if it was given up, an exception if the
# engine failed.
Done = Callable[[int, Explanation | Exception | None], None]


class GradientWorker:
    """Runs the engine in a thread of its own.

    Args:
        engine: all its passes run in that thread.
        device: of the engine.
        admission: which jobs may wait.
    """

    def __init__(self, engine: AttributionEngine, device: torch.device, admission: Admission) -> None:
        self._engine, self._device, self._admission = engine, device, admission
        self._changed = threading.Condition()
        self._arrived: list[Job] = []
        self._unfinished: dict[Job, tuple[int, Done]] = {}
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="gradients")
        self._thread.start()

    def submit(self, jobs: Sequence[Job], done: Done) -> float:
        """Queue jobs of one request; ``done`` is called once for each, with its index in ``jobs``.

        Returns:
            Expected seconds until their first pass.

        Raises:
            OverloadedError: they do not fit; none of them was queued.
        """
        with self._changed:
            wait = self._engine.seconds_before(jobs[0], self._arrived)
            self._admission.check(len(jobs), self._engine.expected_rows(jobs[0]), len(self._unfinished), wait)
            start = RequestStart(time.monotonic() + self._admission.max_wait_seconds)
            taken = [replace(job, request_start=start) for job in jobs]
            self._arrived += taken
            self._unfinished |= {job: (number, done) for number, job in enumerate(taken)}
            self._changed.notify()
        return wait

    def check_room(self, jobs: int, others: int) -> None:
        """Check that so many more jobs may wait, beside ``others`` that take no gradients of their own.

        Raises:
            OverloadedError: they may not.
        """
        self._admission.check(jobs, 0, self.waiting + others, 0.0)

    @property
    def waiting(self) -> int:
        """Jobs that wait or run."""
        return len(self._unfinished)

    def close(self) -> None:
        """End the thread once all queued jobs are explained."""
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
                try:
                    for job, explanation in self._engine.explain_as_done((), arrivals=self._take_arrived):
                        self._tell(job, explanation)
                except Exception as failure:
                    self._fail(failure)

    def _take_arrived(self) -> list[Job]:
        """Called before each pass."""
        with self._changed:
            taken, self._arrived = self._arrived, []
        return taken

    def _tell(self, job: Job, outcome: Explanation | Exception | None) -> None:
        with self._changed:
            number, done = self._unfinished.pop(job)
        done(number, outcome)

    def _fail(self, failure: Exception) -> None:
        """Report the failure for all jobs that the engine had."""
        with self._changed:
            failed = [job for job in self._unfinished if job not in self._arrived]
        for job in failed:
            self._tell(job, failure)
