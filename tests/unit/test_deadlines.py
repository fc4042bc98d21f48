"""Deadlines, by a clock that only passes advance."""

import attribution_engine
import pytest
import row_scheduler
import torch
from attribution_engine import AttributionEngine
from attribution_job import Job
from conftest import scene_pixels, untrained
from pass_clock import Pass, PassClock

from tools.torchscript.served_classifier import build_served


class FakeTime:
    """A clock, and passes that take ``seconds_per_row`` of it; ``chunks`` are the (rows, end) of passes."""

    def __init__(self, engine, seconds_per_row=0.01):
        self.now, self.seconds_per_row, self.chunks = 100.0, seconds_per_row, []
        self._gradients = engine.passes.gradients
        engine.passes.gradients = self.gradients

    def rule(self, monkeypatch):
        for module in (attribution_engine, row_scheduler):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self):
        return self.now

    def gradients(self, rows, count, *rest):
        self.now += count * self.seconds_per_row
        self.chunks.append((count, self.now))
        return self._gradients(rows, count, *rest)


@pytest.fixture
def fake_time(engine, monkeypatch):
    fake = FakeTime(engine)
    fake.rule(monkeypatch)
    # A running server has recorded such passes.
    for rows in (2, 8):
        for paired in (False, True):
            engine.clock.record([Pass(rows, paired)], rows * fake.seconds_per_row)
    return fake


def job(fake_time, milliseconds, index=0, **options):
    image = scene_pixels(index)
    deadline = None if milliseconds is None else fake_time.now + milliseconds / 1000
    return Job(image, torch.zeros_like(image), 4, **{"n_steps": 1000, "deadline": deadline, **options})


@pytest.mark.parametrize("milliseconds", [1, 50, 100, 200, 400, 900])
def test_answer_is_at_most_a_pass_late_and_uses_the_time(engine, fake_time, milliseconds):
    timed_job = job(fake_time, milliseconds)
    (explanation,) = engine.explain([timed_job])
    longest = max(rows for rows, _ in fake_time.chunks) * fake_time.seconds_per_row
    assert fake_time.now <= timed_job.deadline + longest
    assert 0 < explanation.error_estimate < 2
    assert explanation.n_steps >= 3
    if milliseconds >= 200:
        assert fake_time.now >= timed_job.deadline - 0.4 * milliseconds / 1000


def test_more_time_means_more_steps_and_a_smaller_estimate(engine, fake_time):
    explanations = [engine.explain([job(fake_time, milliseconds)])[0] for milliseconds in (60, 150, 400, 1000)]
    steps = [explanation.n_steps for explanation in explanations]
    assert steps == sorted(set(steps))
    estimates = [explanation.error_estimate for explanation in explanations]
    assert estimates == sorted(estimates, reverse=True)


def test_n_steps_and_tolerance_end_it_earlier(engine, fake_time):
    limited, tolerant = engine.explain([job(fake_time, 5000, n_steps=10), job(fake_time, 5000, 1, tolerance=0.1)])
    assert limited.n_steps <= 10
    assert tolerant.error_estimate <= 0.1
    assert tolerant.n_steps < 100  # far fewer than fit into the time


def test_a_job_with_a_near_deadline_goes_before_neighbours_that_take_long(engine, fake_time):
    without_deadline, urgent = job(fake_time, None, n_steps=40), job(fake_time, 300, 1)
    order = []
    for done, explanation in engine.explain_as_done([without_deadline, urgent]):
        order.append((done, fake_time.now))
        assert explanation is not None
    assert [done for done, _ in order] == [urgent, without_deadline]
    assert order[0][1] <= urgent.deadline + 8 * fake_time.seconds_per_row


def test_two_jobs_with_near_deadlines_share_the_time(engine, fake_time):
    jobs = [job(fake_time, 400, index) for index in range(2)]
    alone = engine.explain([job(fake_time, 400)])[0].n_steps
    jobs = [job(fake_time, 400, index) for index in range(2)]
    explanations = engine.explain(jobs)
    assert fake_time.now <= jobs[0].deadline + 8 * fake_time.seconds_per_row
    assert all(3 <= explanation.n_steps < alone for explanation in explanations)


def test_load_that_comes_meanwhile_leaves_the_coarse_steps_as_answer(engine, fake_time):
    timed_job = job(fake_time, 400)
    fake_time.seconds_per_row *= 8  # each pass takes 0.64 s from now on
    (explanation,) = engine.explain([timed_job])
    assert len(fake_time.chunks) == 1
    assert fake_time.now <= timed_job.deadline + 8 * fake_time.seconds_per_row
    assert explanation.error_estimate > 0.01
    # the next one plans with the time that those passes took
    fake_time.chunks.clear()
    slow = job(fake_time, 3000)
    engine.explain([slow])
    assert fake_time.now <= slow.deadline + 8 * fake_time.seconds_per_row


def test_noise_samples_that_there_is_no_time_for_are_left_out(engine, fake_time):
    timed_job = job(fake_time, 300, nt_samples=50, stdevs=0.1)
    (explanation,) = engine.explain([timed_job])
    assert fake_time.now <= timed_job.deadline + 8 * fake_time.seconds_per_row
    assert 3 <= explanation.n_steps < 150


def test_noise_samples_of_an_answered_job_are_not_answered_for_again(engine, fake_time):
    answered = []
    late = job(fake_time, 300, nt_samples=50, stdevs=0.1, is_cancelled=lambda: bool(answered))
    beside = job(fake_time, None, 1, n_steps=100)
    for done, _ in engine.explain_as_done([late, beside]):
        answered.append(done is late)
    assert sorted(answered) == [False, True]


def test_a_far_deadline_does_not_go_before_others(engine, fake_time):
    fake_time.seconds_per_row = 0.05
    for paired in (False, True):
        engine.clock.record([Pass(8, paired)], 8 * fake_time.seconds_per_row)
    far, near, short = job(fake_time, 5000), job(fake_time, 1000, 1), job(fake_time, None, 2, n_steps=12)
    names = {far: "far", near: "near", short: "short"}
    order = [names[done] for done, _ in engine.explain_as_done([far, near, short])]
    assert order == ["near", "short", "far"]


def test_networks_without_mean_slopes_keep_deadlines_too(monkeypatch):
    engine = AttributionEngine(torch.jit.script(build_served(untrained("mobilenet_v3_small", 5), (3, 224, 224))))
    engine.network.has_mean_slopes = False
    fake_time = FakeTime(engine)
    fake_time.rule(monkeypatch)
    engine.clock.record([Pass(8, False)], 0.08)
    explanations = []
    for milliseconds in (10, 150, 400):
        timed_job = job(fake_time, milliseconds)
        explanations += engine.explain([timed_job])
        assert fake_time.now <= timed_job.deadline + 8 * fake_time.seconds_per_row
    assert 3 == explanations[0].n_steps < explanations[1].n_steps < explanations[2].n_steps
    assert all(explanation.error_estimate > 0 for explanation in explanations)


def test_clock_knows_passes_between_and_beyond_those_it_saw():
    clock = PassClock()
    assert clock.rows_within(1.0, 8, False) is None
    assert clock.seconds(100) == 0
    clock.record([Pass(4, False)], 0.4)
    assert clock.estimate(8, False) == pytest.approx(0.8)
    clock.record([Pass(8, False)], 0.6)
    assert clock.estimate(6, False) == pytest.approx(0.5)
    assert clock.estimate(1, False) == 0.4
    assert clock.rows_within(1.3, 8, False) == 16
    assert clock.rows_within(1.75, 8, False) == 16 + 7
    assert clock.rows_within(0.3, 8, False) == clock.rows_within(-1, 8, False) == 0
    assert clock.rows_within(1.0, 8, True) is None  # paired rows take longer, and none was seen
    assert clock.seconds(80) == pytest.approx(80 * (0.9 * 0.4 + 0.6) / (0.9 * 4 + 8))
    for _ in range(20):
        clock.record([Pass(8, False)], 1.2)
    assert clock.estimate(8, False) == pytest.approx(1.2, rel=0.01)


def test_a_small_pass_hardly_changes_the_rate_of_rows():
    clock = PassClock()
    for _ in range(20):
        clock.record([Pass(64, True)], 0.02)
    expected = clock.seconds(1600)
    assert expected == pytest.approx(0.5)
    clock.record([Pass(2, True)], 0.005)
    assert clock.seconds(1600) == pytest.approx(expected, rel=0.05)


def test_clock_shares_out_passes_that_were_timed_together():
    clock = PassClock()
    clock.record([Pass(2, False), Pass(6, False)], 0.8)  # nothing is recorded yet: divided by rows
    assert clock.estimate(2, False) == pytest.approx(0.2)
    assert clock.estimate(6, False) == pytest.approx(0.6)
    for _ in range(30):
        clock.record([Pass(2, False), Pass(2, False)], 0.8)
    assert clock.estimate(2, False) == pytest.approx(0.4, rel=0.01)
    for _ in range(30):
        clock.record([Pass(2, False), Pass(6, False)], 2.0)  # divided by the recorded times: 0.4 to 0.6
    assert clock.estimate(2, False) == pytest.approx(0.8, rel=0.01)
    assert clock.estimate(6, False) == pytest.approx(1.2, rel=0.01)


@pytest.mark.parametrize("count", [3, 8])
def test_all_of_a_batch_are_answered_though_none_has_time(engine, fake_time, count):
    jobs = [job(fake_time, 1, index % 3) for index in range(count)]
    explanations = engine.explain(jobs)
    assert all(explanation is not None and 0 < explanation.error_estimate < 3 for explanation in explanations)


def test_the_first_deadline_of_a_server_uses_its_time_too(engine, monkeypatch):
    fake_time = FakeTime(engine)
    fake_time.rule(monkeypatch)
    one = job(fake_time, 1000)
    (found,) = engine.explain([one])
    assert fake_time.now <= one.deadline + 8 * fake_time.seconds_per_row
    assert found.n_steps > 20


def test_too_few_steps_for_a_deadline_are_refused(engine, fake_time):
    with pytest.raises(ValueError, match="at least 3 steps, not 2"):
        engine.explain([job(fake_time, 100, n_steps=2)])


def test_a_job_given_twice_is_explained_twice(engine):
    twice = Job(scene_pixels(0), torch.zeros_like(scene_pixels(0)), 4, n_steps=3)
    first, second = engine.explain([twice, twice])
    assert torch.equal(first.attributions, second.attributions)
