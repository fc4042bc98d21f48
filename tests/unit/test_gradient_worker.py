"""The worker thread: jobs that arrive join those under way."""

import queue
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from attribution_job import Explanation
from conftest import relative_distance, small_job
from gradient_worker import GradientWorker
from request_admission import Admission, OverloadedError, RequestStart
from row_scheduler import CANCELLATION_CHECK_SECONDS


@contextmanager
def working(engine, max_wait_seconds=60.0, max_waiting=100):
    worker = GradientWorker(engine, torch.device("cpu"), Admission(max_wait_seconds, max_waiting))
    try:
        yield worker
    finally:
        worker.close()


class Held:
    """Makes passes wait until they are released, and then fail if requested."""

    def __init__(self, engine):
        self._gradients = engine.passes.gradients
        engine.passes.gradients = self.gradients
        self.begun, self.let_go = threading.Event(), threading.Event()
        self.failure = None

    def gradients(self, *arguments):
        self.begun.set()
        assert self.let_go.wait(30)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return self._gradients(*arguments)


def test_jobs_that_come_join_those_under_way_and_the_short_overtake(engine):
    held, done = Held(engine), queue.Queue()
    long, short = small_job(200), small_job(5, seed=1)
    with working(engine) as worker:
        worker.submit([long], lambda number, outcome: done.put(("long", outcome)))
        assert held.begun.wait(10)
        worker.submit([short], lambda number, outcome: done.put(("short", outcome)))
        held.let_go.set()
        order = [done.get(timeout=60) for _ in range(2)]
    assert [name for name, _ in order] == ["short", "long"]
    for one, (_, together) in zip((short, long), order):
        (alone,) = engine.explain([one])
        # Other chunk sizes use other convolution kernels, which round differently.
        assert relative_distance(together.attributions, alone.attributions) <= 1e-5
        assert together.n_steps == one.n_steps


def test_a_long_job_is_overtaken_only_until_it_is_due(engine):
    done = []
    long = small_job(30)
    shorts = (small_job(10, seed) for seed in range(1, 100))
    for finished, _ in engine.explain_as_done([long], arrivals=lambda: [next(shorts)]):
        done.append(finished.n_steps)
        if finished is long:
            break
    # 30 rows are due when 300 have been passed: 10 rows each of about 30 short ones.
    assert 15 <= done.index(30) <= 40


def test_parameters_places_and_results_belong_together(engine):
    jobs, explanations = [small_job(3 + index, seed=index) for index in range(6)], {}
    with working(engine) as worker:
        worker.submit(jobs, explanations.__setitem__)
    assert [explanations[number].n_steps for number in range(6)] == [3, 4, 5, 6, 7, 8]


def test_more_images_than_may_wait_are_not_taken(engine):
    held, done = Held(engine), []
    with working(engine, max_waiting=2) as worker:
        worker.submit([small_job(3)] * 3, lambda *outcome: done.append(outcome))  # a single request is never too large
        with pytest.raises(OverloadedError, match="3 images wait for their gradients, and at most 2 may"):
            worker.submit([small_job(3)], lambda *outcome: done.append("taken"))
        held.let_go.set()
    assert [number for number, _ in done] == [0, 1, 2]


def test_what_would_wait_too_long_by_the_pace_of_late_is_not_taken(engine):
    held, done = Held(engine), []
    held.let_go.set()
    with working(engine, max_wait_seconds=0.05) as worker:
        worker.submit([small_job(40)], lambda *outcome: done.append(outcome))  # no pass has been timed yet
        while not done:
            time.sleep(0.01)
        held.let_go.clear()
        held.begun.clear()
        worker.submit([small_job(1000)], lambda *outcome: done.append(outcome))
        assert held.begun.wait(10)
        with pytest.raises(OverloadedError, match=r"take about [\d.]+ s, and at most 0.05 s may be waited"):
            worker.submit([small_job(1001)], lambda *outcome: done.append("taken"))
        worker.submit([small_job(5)], lambda *outcome: done.append(outcome))  # which overtakes it
        held.let_go.set()
    assert [outcome.n_steps for _, outcome in done] == [40, 5, 1000]


def test_a_job_that_has_not_started_in_time_is_given_up(engine):
    done = []
    waiting = small_job(5, seed=1, request_start=RequestStart(time.monotonic() - 1))
    kept = small_job(5)
    for finished, explanation in engine.explain_as_done([kept, waiting]):
        done.append((finished, explanation is not None))
    assert sorted(kept is finished for finished, _ in done) == [False, True]
    assert dict((finished is kept, has) for finished, has in done) == {True: True, False: False}


def test_the_images_of_a_request_share_the_wait_for_its_first_gradient(engine):
    done = []
    with working(engine, max_wait_seconds=0.05) as worker:  # its 60 rows take several times as long
        worker.submit([small_job(20, seed) for seed in range(3)], lambda number, outcome: done.append(outcome))
    assert [outcome is None for outcome in done] == [False] * 3


def test_of_many_that_wait_few_are_asked_before_each_pass_whether_they_still_do(engine, monkeypatch):
    now, asked = [100.0], set()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    done = engine.explain_as_done(
        [small_job(8, seed, is_cancelled=lambda seed=seed: bool(asked.add(seed))) for seed in range(60)]
    )
    next(done)
    assert 1 <= len(asked) <= 20
    now[0] += CANCELLATION_CHECK_SECONDS
    next(done)
    assert len(asked) == 60


def test_a_failing_pass_fails_the_jobs_under_way_and_no_later_one(engine):
    held, done = Held(engine), queue.Queue()
    held.failure = ArithmeticError("no such number")
    with working(engine) as worker:
        worker.submit([small_job(20), small_job(30, seed=1)], lambda *outcome: done.put(outcome))
        assert held.begun.wait(10)
        worker.submit([small_job(4)], lambda *outcome: done.put(outcome))  # not under way yet
        held.let_go.set()
        outcomes = [done.get(timeout=30) for _ in range(3)]
    assert [number for number, _ in outcomes] == [0, 1, 0]
    assert [type(result) for _, result in outcomes] == [ArithmeticError, ArithmeticError, Explanation]
    assert engine.seconds_before(small_job(4)) == 0
