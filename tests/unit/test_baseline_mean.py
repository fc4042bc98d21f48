"""The mean over several baselines, against the mean of Captum's attributions."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import captum.attr
import pytest
import torch
from attribution_engine import AttributionEngine
from attribution_job import Explanation, Job
from baseline_mean import BaselineMean, fair_share
from conftest import MEAN, STD, relative_distance, scene_pixels
from error_law import ErrorLaw
from integration_path import StageError
from path_baselines import Baselines
from path_density import PathDensity

from tools.torchscript.served_classifier import build_served

BASELINES = Baselines(list(MEAN), list(STD))
NAMES = ("black", "white", "blur")
METHODS = ("gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid")
TARGET = 3


@pytest.fixture(scope="module")
def eager() -> torch.nn.Module:
    """A small network with random weights."""
    torch.manual_seed(0)
    layers = (
        torch.nn.Conv2d(3, 8, 3, 2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, 2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(256, 32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, 5),
    )
    return torch.nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def network(eager) -> torch.jit.ScriptModule:
    return torch.jit.script(build_served(eager, (3, 64, 64))).double()


@pytest.fixture
def engine(network) -> AttributionEngine:
    return AttributionEngine(network)


def image(index: int = 0) -> torch.Tensor:
    return scene_pixels(index)[:, 60:124, 60:124].double()


def mean_job(names=NAMES, index: int = 0, **options) -> Job:
    pixels = image(index)
    (first, *others) = (
        (BASELINES.make(name, pixels).double(), name if name in Baselines.CONSTANT else None) for name in names
    )
    return Job(pixels, first[0], TARGET, baseline_key=first[1], further_baselines=others, **options)


def single_jobs(job: Job) -> list[Job]:
    """A job for each of the baselines."""
    starts = [(job.baseline, job.baseline_key), *job.further_baselines]
    return [replace(job, baseline=start, baseline_key=key, further_baselines=()) for start, key in starts]


def explain(engine: AttributionEngine, *jobs: Job) -> list[Explanation]:
    explanations = [each for each in engine.explain(jobs) if each is not None]
    assert len(explanations) == len(jobs)
    return explanations


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_equals_that_of_captums_attributions(engine, eager, method):
    job = mean_job(method=method, n_steps=7)
    expected, deltas = [], []
    for single in single_jobs(job):
        attributions, delta = captum.attr.IntegratedGradients(eager.double()).attribute(
            job.image[None],
            baselines=single.baseline[None],
            target=TARGET,
            method=method,
            n_steps=7,
            return_convergence_delta=True,
        )
        expected.append(attributions[0].detach())
        deltas.append(delta.item())
    (mean,) = explain(engine, job)
    assert relative_distance(mean.attributions, torch.stack(expected).mean(dim=0)) < 1e-9
    assert mean.convergence_delta.item() == pytest.approx(sum(deltas) / 3, rel=1e-8, abs=1e-10)
    assert mean.n_steps == 21
    assert math.isnan(mean.error_estimate)


def test_parts_of_the_mean_add_up_to_it(engine):
    whole, *parts = explain(
        engine, mean_job(n_steps=6), *(mean_job(n_steps=6, part=part, parts=2) for part in range(2))
    )
    assert relative_distance(sum(part.attributions for part in parts), whole.attributions) < 1e-12
    assert sum(part.weight_sum for part in parts) == pytest.approx(1)
    assert sum(part.convergence_delta for part in parts) == pytest.approx(whole.convergence_delta)


@pytest.mark.parametrize("points", [False, True], ids=["mean gradients", "points"])
@pytest.mark.parametrize("names", [NAMES, ("zero", "blur")], ids=",".join)
def test_the_tolerance_holds_for_the_mean(engine, names, points):
    engine.network.has_mean_slopes = not points
    tolerance = 0.1
    job = mean_job(names, tolerance=tolerance, n_steps=1000)
    mean, *singles = explain(engine, job, *single_jobs(job))
    (integral,) = explain(engine, mean_job(names, method="riemann_middle", n_steps=4000))
    error = relative_distance(mean.attributions, integral.attributions)
    assert error <= tolerance
    assert error / 2 <= mean.error_estimate <= tolerance
    assert mean.n_steps < 1.5 * sum(single.n_steps for single in singles)
    change = mean_change(engine, job)
    gap = mean.convergence_delta.abs() / max(change.abs(), 0.1 * mean.attributions.abs().sum())
    assert gap <= tolerance
    delta = mean.attributions.sum() - change
    assert mean.convergence_delta.item() == pytest.approx(delta.item(), abs=1e-9)


def mean_change(engine: AttributionEngine, job: Job) -> torch.Tensor:
    with torch.no_grad():
        ends = engine.network(torch.stack([job.image, *(single.baseline for single in single_jobs(job))]))[:, TARGET]
    return ends[0] - ends[1:].mean()


def test_a_path_that_weighs_little_takes_few_steps(engine):
    """A baseline near the image has small attributions, whose errors hardly count in the mean."""
    engine.network.has_mean_slopes = False
    pixels = image()
    far, near = torch.zeros_like(pixels), pixels * 0.98
    job = Job(pixels, far, TARGET, 1000, tolerance=0.02, further_baselines=[(near, None)])
    mean, *singles = explain(engine, job, *single_jobs(job))
    assert mean.error_estimate <= 0.02
    assert mean.n_steps <= singles[0].n_steps + singles[1].n_steps  # 15 more, if the two had to be equally exact


class MadeUpPath:
    """A path after a stage, with the given sizes of its attributions, its error and its completeness gap."""

    def __init__(self, error: float, surplus: float, size: float = 1.0) -> None:
        self.attributions, self.rule, self.aimed = torch.tensor([size]), self, math.nan
        self.stage = StageError(
            self.attributions, torch.tensor([error]), error / size, 1.0, surplus, size, surplus / size
        )
        self.is_trusted = True

    def aim(self, tolerance: float) -> None:
        self.aimed = tolerance

    def refine(self, affordable: float) -> bool:
        assert self.stage is not None
        return max(self.stage.difference, self.stage.gap) > self.aimed


@pytest.mark.parametrize(
    ("paths", "going_on"),
    [
        ([(0.01, 0.01), (0.01, 0.01)], []),
        ([(0.01, 0.12), (0.01, 0.13)], [0, 1]),  # their gaps add up to more than the mean may have
        ([(0.01, 0.01), (0.01, 0.3)], [1]),
        ([(0.01, 0.3), (0.15, 0.0)], [0]),
        ([(0.05, 0.0), (0.3, 0.0)], [1]),
    ],
)
def test_paths_go_on_whose_error_or_gap_is_over_its_share(paths, going_on):
    mean = BaselineMean(0.1, len(paths))
    waiting: list[Any] = [MadeUpPath(error, surplus) for error, surplus in paths]
    for path in waiting:
        mean.add(path)
    refined: list[Any] = mean.refine(lambda path: math.inf)
    assert [waiting.index(path) for path in refined] == going_on
    assert len(mean.waiting) == len(paths) - len(going_on)


@pytest.mark.parametrize(
    ("values", "total", "share"),
    [
        ([3, 1], 4, 3),
        ([3, 1], 3, 2),
        ([1, 1, 10], 5, 3),
        ([4, 4, 4], 6, 2),
        ([5], 2, 2),
        ([1, 2], 9, 8),
        ([1, math.inf], 4, 3),
    ],
)
def test_what_smaller_values_leave_is_divided_equally(values, total, share):
    assert fair_share(values, total) == pytest.approx(share)


def test_each_baseline_takes_no_more_than_n_steps(engine):
    mean, *singles = explain(engine, *(mean_job(tolerance=0.001, n_steps=9),), *single_jobs(mean_job(n_steps=9)))
    assert mean.n_steps <= 27
    assert mean.error_estimate > 0.001  # and says so
    assert sum(single.n_steps for single in singles) == 27


@pytest.mark.parametrize("points", [False, True], ids=["mean gradients", "points"])
def test_after_the_deadline_every_baseline_still_counts(engine, points):
    engine.network.has_mean_slopes = not points
    (mean,) = explain(engine, mean_job(deadline=time.monotonic() - 1, n_steps=100))
    (integral,) = explain(engine, mean_job(method="riemann_middle", n_steps=100))
    assert 3 <= mean.n_steps <= 3 * 5
    assert relative_distance(mean.attributions, integral.attributions) < 1
    assert 0 < mean.error_estimate < math.inf


class Clock:
    """Time in which each row takes a millisecond, until so many have been passed; then it is far ahead."""

    def __init__(self, monkeypatch, engine: AttributionEngine, rows: int) -> None:
        explain(engine, mean_job(tolerance=0.3, n_steps=20))  # measures the passes
        self.engine, self.rows, self.started = engine, engine.rows_passed + rows, time.monotonic()
        monkeypatch.setattr("time.monotonic", self)

    def __call__(self) -> float:
        left = self.rows - self.engine.rows_passed
        return self.started + (1e9 if left <= 0 else -1e-3 * left)


def test_a_deadline_in_the_middle_of_a_stage_leaves_the_estimate_of_the_one_before(engine, monkeypatch):
    (integral,) = explain(engine, mean_job(method="riemann_middle", n_steps=400))
    clock = Clock(monkeypatch, engine, 3 * 9 + 60)  # every first stage, and some of the second
    (mean,) = explain(engine, mean_job(deadline=clock.started + 1e6, tolerance=0.001, n_steps=200))
    error = relative_distance(mean.attributions, integral.attributions)
    assert mean.n_steps > 3 * 9
    assert error / 2 <= mean.error_estimate <= 20 * error


def test_baselines_that_have_not_begun_at_the_deadline_take_the_fewest(network, monkeypatch):
    even = {name: torch.ones(1).double() for name in ("logit", "probability")}
    density = PathDensity(even, dict.fromkeys(even, ErrorLaw(0.1, 1.0, 1.0)))
    engine = AttributionEngine(network, max_rows=4, density=density)
    clock = Clock(monkeypatch, engine, 4)
    names = ("zero", "black", "gray", "white")
    options: dict[str, Any] = {"tolerance": 0.001, "n_steps": 1000, "ends_key": "image"}
    (mean,) = explain(engine, mean_job(names, deadline=clock.started + 1e6, **options))
    # A quarter of 50 planned steps, and what a pass took of the others; 3 and no more of those that had not begun.
    assert mean.n_steps <= 16 + 3 * 3
    assert 0 < mean.error_estimate < math.inf


def test_a_deadline_refines_until_it_is_over(engine):
    engine.explain([mean_job(n_steps=20)])  # measures the passes
    started = time.monotonic()
    rough, fine = (explain(engine, mean_job(deadline=started + s, n_steps=1000))[0] for s in (0.0, 3.0))
    assert fine.n_steps > rough.n_steps
    assert fine.error_estimate < rough.error_estimate


def test_baselines_that_are_the_image_have_nothing_to_explain(engine):
    pixels = image()
    job = Job(pixels, pixels.clone(), TARGET, 100, tolerance=0.1, further_baselines=[(pixels.clone(), None)])
    (mean,) = explain(engine, job)
    assert not mean.attributions.any()
    assert mean.error_estimate == 0


def test_many_means_and_other_jobs_share_the_passes(engine):
    jobs = [mean_job(index=index, tolerance=0.2, n_steps=100) for index in range(4)]
    together = explain(engine, *jobs, *(replace(job, n_steps=3, tolerance=None) for job in jobs))
    for job, explanation in zip(jobs, together):
        (alone,) = explain(engine, job)
        assert explanation.n_steps == alone.n_steps
        assert relative_distance(explanation.attributions, alone.attributions) < 1e-9
    assert all(explanation.n_steps == 9 for explanation in together[4:])


def test_a_cancelled_mean_leaves_the_others(engine):
    calls = iter(range(100))
    cancelled = mean_job(tolerance=0.01, n_steps=500, is_cancelled=lambda: next(calls) > 3)
    answers = engine.explain([cancelled, mean_job(tolerance=0.3, n_steps=50)])
    assert answers[0] is None
    assert answers[1] is not None


def test_noise_is_refused_beside_several_baselines():
    with pytest.raises(ValueError, match="a mean over baselines takes no noise"):
        mean_job(nt_samples=2, stdevs=0.1)
