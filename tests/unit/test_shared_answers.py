"""Equal jobs take gradients once: those under way are shared, earlier ones are kept."""

import queue
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from attribution_engine import AttributionEngine
from attribution_job import Explanation, Job, PathState
from gradient_worker import GradientWorker
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_answers import ENTRY_BYTES, AnswerStore, answer_key, held_bytes, work_key
from request_admission import Admission, OverloadedError
from shared_answers import SharedAnswers
from torch import nn

IMAGE = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def job_of(network, **options) -> Job:
    logits = network(IMAGE[None])[0]
    given = {"target": 2, "n_steps": 20, "image_logits": logits, "baseline_key": "zero", "ends_key": "image, zero"}
    return Job(IMAGE, torch.zeros_like(IMAGE), **{**given, **options})


class Desk:
    """Shared answers around an engine whose passes can be held."""

    def __init__(self, network, max_bytes=10**7, max_waiting=100):
        self.engine, self.sources = AttributionEngine(network), Counter()
        self.go, self.begun = threading.Event(), threading.Event()
        self.go.set()
        gradients = self.engine.passes.gradients

        def held(*arguments):
            self.begun.set()
            assert self.go.wait(60)
            if isinstance(self.failure, Exception):
                raise self.failure
            return gradients(*arguments)

        self.failure, self.engine.passes.gradients = None, held
        self.store = AnswerStore(max_bytes)
        self.worker = GradientWorker(self.engine, torch.device("cpu"), Admission(60.0, max_waiting))
        self.shared = SharedAnswers(self.worker, self.store, lambda source: self.sources.update([source]))

    def send(self, *jobs) -> queue.Queue:
        answers: queue.Queue[tuple[int, Explanation | Exception | None]] = queue.Queue()
        self.shared.submit(jobs, lambda number, outcome: answers.put((number, outcome)))
        return answers

    def ask(self, job):
        return self.send(job).get(timeout=60)[1]

    def spent(self, job) -> tuple[Explanation, int]:
        before = self.engine.rows_passed
        answer = self.ask(job)
        return answer, self.engine.rows_passed - before


@contextmanager
def desk(network, **options):
    opened = Desk(network, **options)
    try:
        yield opened
    finally:
        opened.go.set()
        opened.worker.close()


def same(one: Explanation, other: Explanation) -> bool:
    numbers = one.n_steps == other.n_steps and str(one.error_estimate) == str(other.error_estimate)
    deltas = str(one.convergence_delta) == str(other.convergence_delta)
    return numbers and deltas and torch.equal(one.attributions, other.attributions)


# A mean over two baselines; the key of its ends stands for both.
MEAN: dict[str, Any] = {"further_baselines": [(torch.ones_like(IMAGE), "one")], "ends_key": "image, zero and one"}
OPTIONS = [
    {},
    {"probability": True, "contrast": 1},
    {"method": "riemann_trapezoid", "part": 1, "parts": 4},
    {"nt_samples": 3, "stdevs": 0.2, "seed": 5},
    {"tolerance": 0.05, "n_steps": 200},
    {"tolerance": 0.05, "n_steps": 60, "nt_samples": 2, "stdevs": 0.2},
    MEAN,
    {"tolerance": 0.05, "n_steps": 200, **MEAN},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options))
def test_an_equal_request_takes_no_gradients_and_has_the_bytes_of_a_fresh_one(network, options):
    job = job_of(network, **options)
    (fresh,) = AttributionEngine(network).explain([job])
    with desk(network) as shop:
        first, spent = shop.spent(job)
        again, more = shop.spent(replace(job, image=job.image.clone()))
    assert spent > 0
    assert more == 0
    assert same(first, fresh)
    assert same(again, fresh)
    assert again.seconds == 0
    assert shop.sources == {"miss": 1, "hit": 1}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options))
def test_identical_requests_in_flight_take_the_gradients_of_one(network, options):
    job = job_of(network, **options)
    (fresh,) = AttributionEngine(network).explain([job])
    with desk(network) as shop:
        shop.go.clear()
        answers = [shop.send(job)]
        assert shop.begun.wait(10)
        answers += [shop.send(replace(job)) for _ in range(30)]
        answers.append(shop.send(replace(job), replace(job)))  # two in one request
        assert shop.shared.waiting == 33
        shop.go.set()
        explanations = [heard.get(timeout=60)[1] for heard in answers]
        numbers = {answers[-1].get(timeout=60)[0]}
    assert numbers == {1}
    assert all(same(each, fresh) for each in explanations)
    assert shop.engine.rows_passed == fresh.n_steps
    assert shop.sources == {"miss": 1, "joined": 32}
    assert shop.shared.waiting == 0


@pytest.mark.parametrize("leaver", ["the first", "another"])
def test_one_that_is_cancelled_leaves_the_others_whole(network, leaver):
    gone = threading.Event()
    job = job_of(network)
    with desk(network) as shop:
        shop.go.clear()
        first = shop.send(replace(job, is_cancelled=gone.is_set) if leaver == "the first" else job)
        assert shop.begun.wait(10)
        second = shop.send(replace(job, is_cancelled=gone.is_set) if leaver == "another" else job)
        gone.set()
        shop.go.set()
        outcomes = [heard.get(timeout=60)[1] for heard in (first, second)]
    dropped, kept = outcomes if leaver == "the first" else reversed(outcomes)
    assert dropped is None
    assert same(kept, AttributionEngine(network).explain([job])[0])
    assert shop.engine.rows_passed == 20
    assert shop.shared.waiting == 0


def test_gradients_that_nobody_waits_for_end(network):
    gone = threading.Event()
    job = job_of(network, n_steps=500, is_cancelled=gone.is_set)
    with desk(network) as shop:
        shop.go.clear()
        answers = [shop.send(job), shop.send(replace(job))]
        assert shop.begun.wait(10)
        gone.set()
        shop.go.set()
        assert [heard.get(timeout=60)[1] for heard in answers] == [None, None]
    assert shop.engine.rows_passed < 500


def test_who_joins_one_that_waited_too_long_gets_gradients_all_the_same(network):
    job = job_of(network)
    with desk(network) as shop:
        shop.go.clear()
        long = shop.send(job_of(network, n_steps=500, ends_key="another image"))
        assert shop.begun.wait(10)
        shop.worker._admission = Admission(0.05, 100)
        first = shop.send(replace(job, n_steps=600))
        shop.worker._admission = Admission(60.0, 100)
        second = shop.send(replace(job, n_steps=600))
        time.sleep(0.1)
        shop.go.set()
        assert first.get(timeout=60)[1] is None
        assert second.get(timeout=60)[1].n_steps == 600
        assert long.get(timeout=60)[1].n_steps == 500


def test_a_failure_is_told_to_all_and_kept_for_nobody(network):
    job = job_of(network)
    with desk(network) as shop:
        shop.go.clear()
        answers = [shop.send(job), shop.send(replace(job))]
        assert shop.begun.wait(10)
        shop.failure = ArithmeticError("no such number")
        shop.go.set()
        assert [type(heard.get(timeout=60)[1]) for heard in answers] == [ArithmeticError] * 2
        shop.failure = None
        assert isinstance(shop.ask(job), Explanation)


def test_those_who_join_count_among_those_who_wait(network):
    job = job_of(network)
    with desk(network, max_waiting=2) as shop:
        shop.go.clear()
        shop.send(job)
        shop.send(replace(job))
        with pytest.raises(OverloadedError, match="2 images wait for their gradients, and at most 2 may"):
            shop.send(replace(job))


def test_a_lower_tolerance_goes_on_from_the_stages_that_are_there(network):
    coarse, fine = (job_of(network, n_steps=1000, tolerance=tolerance) for tolerance in (0.1, 0.01))
    (alone,) = AttributionEngine(network).explain([fine])
    with desk(network) as shop:
        first, spent = shop.spent(coarse)
        second, more = shop.spent(fine)
        third, none = shop.spent(replace(coarse, tolerance=0.05))  # which the finer map is within, too
        fourth, fewer = shop.spent(replace(fine, n_steps=first.n_steps + 1))  # more steps are kept than it may have
    assert 0 < spent < more + spent <= 1.15 * alone.n_steps
    assert second.n_steps == spent + more
    assert second.error_estimate <= 0.01
    assert none == 0
    assert torch.equal(third.attributions, second.attributions)
    assert fewer == fourth.n_steps <= first.n_steps + 1
    assert shop.sources == {"miss": 2, "continued": 1, "hit": 1}


@pytest.mark.parametrize("tolerances", [(0.1, 0.02)])
def test_discrete_gradients_go_on_too(served_module, tolerances):
    image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = served_module(image[None])[0][0]
    options = {"n_steps": 1000, "image_logits": logits, "baseline_key": "zero", "ends_key": "image, zero"}
    coarse, fine = (Job(image, torch.zeros_like(image), 4, tolerance=each, **options) for each in tolerances)
    (alone,) = AttributionEngine(served_module).explain([fine])
    with desk(served_module) as shop:
        first, second, again = (shop.ask(job) for job in (coarse, fine, coarse))
    print(f"{first.n_steps} steps, then {second.n_steps} in all; {alone.n_steps} alone")
    assert second.n_steps <= 1.15 * alone.n_steps
    assert second.error_estimate <= tolerances[1]
    assert same(first, again)


def test_a_deadline_goes_on_from_the_stages_that_are_there(network):
    job = job_of(network, n_steps=300, deadline=time.monotonic() + 60)
    with desk(network) as shop:
        first, spent = shop.spent(replace(job, n_steps=50))
        second, more = shop.spent(job)
        third, none = shop.spent(replace(job))
    assert 0 < spent == first.n_steps
    assert more == second.n_steps - first.n_steps > 0
    assert none == 0
    assert torch.equal(third.attributions, second.attributions)


@pytest.mark.parametrize(
    "options",
    [{}, {"tolerance": 0.05, "n_steps": 300}, MEAN, {"tolerance": 0.05, "n_steps": 300, **MEAN}],
    ids=lambda options: ", ".join(options),
)
def test_wrong_logits_of_one_client_do_not_reach_another(network, options):
    """Neither from the store nor from a job under way: the delta and the gap are those of each one's own logits."""
    honest = job_of(network, **options)
    (fresh,) = AttributionEngine(network).explain([honest])
    wrong = replace(honest, image_logits=honest.image_logits + torch.arange(5))
    for together in (False, True):
        with desk(network) as shop:
            if together:
                shop.go.clear()
            heard = [shop.send(wrong)]
            assert shop.begun.wait(10)
            if not together:
                heard[0].get(timeout=60)
            heard.append(shop.send(honest))
            shop.go.set()
            answer = heard[1].get(timeout=60)[1]
        starts = [honest.baseline, *(baseline for baseline, _ in honest.further_baselines)]
        change = honest.objective(honest.image_logits) - sum(network(start[None])[0][2] for start in starts) / len(
            starts
        )
        delta = answer.attributions.sum() - change
        torch.testing.assert_close(answer.convergence_delta, delta, rtol=1e-5, atol=1e-5)
        if "tolerance" in options:
            assert answer.error_estimate <= options["tolerance"]
        else:
            assert same(answer, fresh)


@pytest.mark.parametrize("job_options", [{"ends_key": None}, {"max_bytes": 0}], ids=["a probe", "without a store"])
def test_nothing_is_shared_or_kept(network, job_options):
    options = {"max_bytes": job_options.pop("max_bytes")} if "max_bytes" in job_options else {}
    job = job_of(network, **job_options)
    with desk(network, **options) as shop:
        shop.go.clear()
        answers = [shop.send(job), shop.send(replace(job))]
        shop.go.set()
        for heard in answers:
            heard.get(timeout=60)
        shop.ask(replace(job))
    assert shop.engine.rows_passed + shop.engine.rows_shared >= 60
    assert shop.store.size == 0
    assert not shop.sources


def explanation_of(numbers: int) -> Explanation:
    return Explanation(torch.zeros(numbers), None, 1)


def test_the_store_is_bounded_and_the_least_recently_used_goes_first():
    size = ENTRY_BYTES + 4000
    store = AnswerStore(3 * size)
    for key in "abc":
        store.put(key, explanation_of(1000))
    assert store.size == 3 * size
    store.get("a")
    store.put("d", explanation_of(1000))
    assert [store.get(key) is not None for key in "abcd"] == [True, False, True, True]
    store.put("a", explanation_of(2000))  # in place of the smaller one
    assert store.size <= 3 * size
    store.put("e", explanation_of(10**6))
    assert store.get("e") is None
    assert store.get("a") is not None
    for number in range(1000):
        store.put(number, explanation_of(number))
        assert store.size <= 3 * size


def test_bytes_are_those_of_all_that_the_tensors_keep_in_memory(network):
    part = torch.zeros(2, 1000)[0]
    store = AnswerStore(10**6)
    store.put("part", Explanation(part, None, 1))
    assert store.size == ENTRY_BYTES + 4000  # not the whole that it is part of
    shared = torch.zeros(100)
    assert held_bytes(Explanation(shared, None, 1, state=PathState(shared, attributions=shared))) == 400
    with desk(network) as shop:
        explanation = shop.ask(job_of(network, tolerance=0.1, n_steps=200))
        assert isinstance(explanation, Explanation)
        # The map under its own key; and with the stages the same map, logits, and two sums for each of six panels.
        least = 2 * ENTRY_BYTES + 4 * (2 * IMAGE.numel() + 5 + 12 * IMAGE.numel())
        assert least <= shop.store.size <= least + 1000


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "target": st.sampled_from([0, 2]),
        "contrast": st.sampled_from([None, 1, 3]),
        "probability": st.booleans(),
        "n_steps": st.sampled_from([5, 6]),
        "method": st.sampled_from(["gausslegendre", "riemann_left", "riemann_middle"]),
        "tolerance": st.sampled_from([None, 0.3, 0.01]),
        "noise": st.sampled_from([(1, 0.0), (1, 0.2), (2, 0.2), (2, 0.3)]),
        "seed": st.sampled_from([0, 1]),
        "parts": st.sampled_from([(0, 1), (0, 2), (1, 2)]),
        "ends": st.sampled_from(["zero", "one", "zero and one", "other image"]),
    },
)


def changed_job(network, changes) -> Job:
    changes = dict(changes)
    ends = changes.pop("ends", "zero")
    nt_samples, stdevs = changes.pop("noise", (1, 0.0))
    part, parts = changes.pop("parts", (0, 1))
    job = job_of(network, n_steps=5)
    job = replace(job, nt_samples=nt_samples, stdevs=stdevs, part=part, parts=parts, **changes)
    if job.tolerance is not None:
        job = replace(job, part=0, parts=1, n_steps=6 * job.n_steps)
    if ends == "other image":
        image = IMAGE.flip(1)
        return replace(job, image=image, image_logits=network(image[None])[0], ends_key="other image, zero")
    if ends == "zero and one" and job.paths == 1 and not job.stdevs:
        return replace(job, **MEAN)
    if ends == "one":
        return replace(job, baseline=torch.ones_like(IMAGE), baseline_key="one", ends_key="image, one")
    return job


@settings(max_examples=150, deadline=None)
@given(CHANGES, CHANGES)
def test_whatever_changes_the_map_changes_the_key(network, one, other):
    engine = AttributionEngine(network)
    first, second = changed_job(network, one), changed_job(network, other)
    maps = [engine.explain([job])[0].attributions for job in (first, second)]
    if not torch.equal(*maps):
        assert answer_key(first) != answer_key(second)
        assert work_key(first) != work_key(second)
    if one == other:
        assert answer_key(first) == answer_key(second)


SINGLE_CHANGES = {
    "target": 0,
    "contrast": 1,
    "probability": True,
    "n_steps": 6,
    "method": "riemann_left",
    "tolerance": 0.01,
    "noise": (2, 0.3),
    "seed": 1,
    "parts": (1, 2),
    "ends": "other image",
}
BASES = [{}, {"noise": (2, 0.2)}, {"noise": (1, 0.2)}, {"tolerance": 0.3}, {"ends": "zero and one"}]


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("name", SINGLE_CHANGES)
def test_a_single_change_of_the_map_changes_the_key(network, base, name):
    engine = AttributionEngine(network)
    jobs = [changed_job(network, changes) for changes in (base, {**base, name: SINGLE_CHANGES[name]})]
    first, second = (engine.explain([job])[0].attributions for job in jobs)
    if not torch.equal(first, second):
        assert answer_key(jobs[0]) != answer_key(jobs[1])
        assert work_key(jobs[0]) != work_key(jobs[1])


def test_what_depends_on_the_time_or_on_given_nodes_has_no_key(network):
    job = job_of(network)
    assert work_key(job) is not None
    for change in ({"deadline": 1.0}, {"rule": (torch.zeros(1), torch.ones(1))}, {"ends_key": None}):
        assert work_key(replace(job, **change)) is None


def test_maps_that_are_not_finite_are_not_kept(network):
    job = job_of(network)
    with desk(network) as shop:
        held = shop.engine.passes.gradients
        shop.engine.passes.gradients = lambda *arguments: held(*arguments) * torch.nan
        assert shop.ask(job).attributions.isnan().all()
        shop.engine.passes.gradients = held
        again, spent = shop.spent(job)
    assert spent == 20
    assert again.attributions.isfinite().all()


def test_more_stages_are_not_replaced_by_fewer(network):
    coarse, fine = (job_of(network, n_steps=1000, tolerance=tolerance) for tolerance in (0.1, 0.01))
    with desk(network) as shop:
        few = shop.ask(coarse).n_steps
        shop.ask(fine)
        shop.ask(replace(fine, n_steps=few + 1))
        _, spent = shop.spent(replace(fine, tolerance=0.011))
    assert spent == 0


def test_the_first_level_of_a_stream_is_no_start_for_a_more_exact_answer(network):
    with desk(network) as shop:
        assert shop.ask(job_of(network, n_steps=3, tolerance=0.5)).n_steps == 3
        shop.ask(job_of(network, n_steps=1000, tolerance=0.01))
    assert shop.sources == {"miss": 2}


def test_the_same_stages_can_be_continued_twice(network):
    engine = AttributionEngine(network)
    coarse = job_of(network, n_steps=1000, tolerance=0.1, keeps_state=True)
    state = engine.explain([coarse])[0].state
    one, other = (engine.explain([replace(coarse, tolerance=0.01, state=state)])[0] for _ in range(2))
    assert torch.equal(one.attributions, other.attributions)
    assert one.n_steps == other.n_steps
