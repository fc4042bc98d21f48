"""The mean over several baselines, against the mean of Captum's attributions."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import captum.attr
import pytest
import torch
from attribution_engine import AttributionEngine
from attribution_job import Explanation, Job
from conftest import MEAN, STD, relative_distance, scene_pixels
from path_baselines import Baselines

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
    (integral,) = explain(engine, mean_job(names, method="riemann_middle", n_steps=400))
    error = relative_distance(mean.attributions, integral.attributions)
    assert error <= tolerance
    assert error / 2 <= mean.error_estimate <= tolerance
    assert mean.n_steps < 1.5 * sum(single.n_steps for single in singles)
    delta = mean.attributions.sum() - mean_change(engine, job)
    assert mean.convergence_delta.item() == pytest.approx(delta.item(), abs=1e-9)


def mean_change(engine: AttributionEngine, job: Job) -> torch.Tensor:
    with torch.no_grad():
        ends = engine.network(torch.stack([job.image, *(single.baseline for single in single_jobs(job))]))[:, TARGET]
    return ends[0] - ends[1:].mean()


def test_a_path_that_weighs_little_takes_few_steps(engine):
    """A baseline near the image has small attributions, whose errors hardly count in the mean."""
    pixels = image()
    far, near = torch.zeros_like(pixels), pixels * 0.98
    job = Job(pixels, far, TARGET, 1000, tolerance=0.02, further_baselines=[(near, None)])
    mean, *singles = explain(engine, job, *single_jobs(job))
    assert mean.error_estimate <= 0.02
    assert mean.n_steps < singles[0].n_steps + singles[1].n_steps


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
