"""Takes the gradients of equal jobs once: those of jobs under way are shared, and those of earlier jobs are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from attribution_job import Explanation, Job, PathState
from gradient_worker import Done, GradientWorker
from kept_answers import (
    AnswerStore,
    answer_from,
    answer_key,
    finished,
    fits,
    is_plain,
    path_key,
    taking_no_time,
    work_key,
)
from request_admission import OverloadedError, RequestStart

# Fewer are no start for a more exact answer: the coarse level of a stream has 3.
LEAST_KEPT_STEPS = 5


@dataclass(eq=False)
class _Waiter:
    """A job whose answer is waited for."""

    job: Job
    number: int
    done: Done


@dataclass(eq=False)
class _Flight:
    """Jobs with equal work: the gradients of the first are taken for all. There is always one that waits."""

    key: Hashable
    first: _Waiter
    waiters: list[_Waiter] = field(init=False)

    def __post_init__(self) -> None:
        self.waiters = [self.first]


class SharedAnswers:
    """Hands jobs to the worker, unless their answer is there or under way.

    Args:
        worker: takes the gradients.
        store: what is kept. If it keeps nothing, nothing is shared either.
        count: called for each job with ``hit`` (no gradients), ``joined`` (those of a job under way), ``continued``
            (more gradients than are kept) or ``miss``.
    """

    def __init__(self, worker: GradientWorker, store: AnswerStore, count: Callable[[str], None]) -> None:
        self._worker, self._store, self._count = worker, store, count
        self._flights: dict[Hashable, _Flight] = {}
        self._joined = 0
        self._lock = threading.RLock()

    @property
    def waiting(self) -> int:
        """Jobs that wait for gradients or get them, or wait for the answer of an equal job."""
        return self._worker.waiting + self._joined

    def submit(self, jobs: Sequence[Job], done: Done) -> float:
        """See ``GradientWorker.submit``. For a job whose answer is kept, ``done`` is called at once."""
        if not self._store.max_bytes or any(job.ends_key is None for job in jobs):
            return self._worker.submit(jobs, done)
        flights: list[_Flight] = []
        joining: list[tuple[_Flight, _Waiter]] = []
        with self._lock:
            for number, job in enumerate(jobs):
                if (answer := self._kept(job)) is not None:
                    self._count("hit")
                    done(number, answer)  # never the last one of a request with other jobs: those come later
                    continue
                waiter, key = _Waiter(job, number, done), work_key(job)
                mine = next((flight for flight in flights if key is not None and flight.key == key), None)
                flight = mine or (None if key is None else self._flights.get(key))
                if flight is None:
                    flights.append(_Flight(key, waiter))
                else:
                    joining.append((flight, waiter))
            if not flights and not joining:
                return 0.0
            self._worker.check_room(len(flights) + len(joining), self._joined)
            wait = self._launch(flights) if flights else 0.0
            for flight, waiter in joining:
                self._count("joined")
                flight.waiters.append(waiter)
                self._joined += 1
        return wait

    def _kept(self, job: Job) -> Explanation | None:
        """The answer to a job if it takes no gradients."""
        key = answer_key(job)
        explanation = None if key is None else self._store.get(key)
        if explanation is not None:
            return taking_no_time(explanation) if job.refines else answer_from(explanation, job)
        state = self._state(job)
        return None if state is None else finished(state, job)

    def _state(self, job: Job) -> PathState | None:
        """The complete stages of a job's path, if they are kept."""
        if not (job.refines and is_plain(job)):
            return None
        explanation = self._store.get(path_key(job))
        return explanation.state if explanation is not None and fits(explanation.state, job) else None

    def _launch(self, flights: Sequence[_Flight]) -> float:
        """Take the gradients of flights that belong to one request, each for its first waiter.

        Raises:
            OverloadedError: the worker takes none of them.
        """
        jobs = []
        for flight in flights:
            job = flight.first.job
            state = self._state(job)
            self._count("miss" if state is None else "continued")
            jobs.append(replace(job, state=state, keeps_state=True, is_cancelled=partial(self._is_unwanted, flight)))
        wait = self._worker.submit(jobs, lambda number, outcome: self._land(flights[number], outcome))
        self._flights |= {flight.key: flight for flight in flights if flight.key is not None}
        return wait

    def _is_unwanted(self, flight: _Flight) -> bool:
        """Whether nobody waits for a flight. Those who no longer do are told. Called in the worker's thread."""
        with self._lock:
            unwanted = [waiter for waiter in flight.waiters if waiter.job.is_cancelled()]
            if len(unwanted) == len(flight.waiters):
                return True
            flight.waiters = [waiter for waiter in flight.waiters if waiter not in unwanted]
            self._joined -= len(unwanted)
        for waiter in unwanted:
            waiter.done(waiter.number, None)
        return False

    def _land(self, flight: _Flight, outcome: Explanation | Exception | None) -> None:
        """Answer all who wait for a flight. Called in the worker's thread."""
        with self._lock:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
            waiters, flight.waiters = flight.waiters, []
            self._joined -= len(waiters) - 1
            if isinstance(outcome, Explanation):
                self._keep(flight.first.job, outcome)
        for waiter in waiters:
            answer: Explanation | Exception | None = outcome
            if waiter is not flight.first and isinstance(outcome, Explanation):
                answer = answer_from(outcome, waiter.job)
            # By its own logits it may need more gradients, and only the first may have waited too long for one.
            if answer is None and waiter is not flight.first and not waiter.job.is_cancelled():
                self._launch_again(waiter)
            else:
                waiter.done(waiter.number, answer)

    def _launch_again(self, waiter: _Waiter) -> None:
        waiter.job = replace(waiter.job, request_start=RequestStart())
        try:
            with self._lock:
                self._launch([_Flight(None, waiter)])
        except OverloadedError:
            waiter.done(waiter.number, None)

    def _keep(self, job: Job, explanation: Explanation) -> None:
        """Keep an answer, and the stages of its path unless more are kept."""
        if not explanation.attributions.isfinite().all():  # the device may have failed
            return
        if (key := answer_key(job)) is not None:
            self._store.put(key, replace(explanation, state=None) if job.refines else explanation)
        state = explanation.state
        if state is None or state.rule is None or state.attributions is None:
            return
        if state.rule.n_steps < LEAST_KEPT_STEPS:
            return
        kept = self._store.get(path_key(job))
        if kept is None or kept.state is None or kept.n_steps <= state.rule.n_steps:
            whole = replace(explanation, attributions=state.attributions, n_steps=state.rule.n_steps)
            self._store.put(path_key(job), whole)
