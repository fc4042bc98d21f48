"""A tolerance holds for networks that were never calibrated and that nothing was fitted to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attribution_engine import AttributionEngine
from attribution_job import Explanation, Job
from conftest import relative_distance
from torch import nn

from tools.torchscript.served_classifier import build_served

SHAPE = (3, 32, 32)


def convolutions(pools: bool) -> nn.Sequential:
    """Three convolutions with random weights; with max pooling, whose gradients jump the most, or with strides."""
    layers: list[nn.Module] = []
    for channels, width in ((3, 12), (12, 16), (16, 24)):
        layers += [nn.Conv2d(channels, width, 3, stride=1 if pools else 2, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pools else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 4 * 4, 5)).eval()


def explain(engine: AttributionEngine, job: Job) -> Explanation:
    (explanation,) = engine.explain([job])
    assert explanation is not None
    return explanation


@pytest.mark.parametrize("with_discrete", [False, True], ids=["points", "discrete gradients"])
@pytest.mark.parametrize("pools", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["pooled", "strided"])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_true_error_is_within_the_tolerance(pools: bool, with_discrete: bool, seed: int) -> None:
    torch.manual_seed(seed)
    engine = AttributionEngine(torch.jit.script(build_served(convolutions(pools), SHAPE, with_discrete)), 32)
    job = Job(torch.randn(SHAPE), torch.zeros(SHAPE), 2, 512, "riemann_middle")
    integral = explain(engine, job).attributions
    for tolerance in (0.3, 0.1, 0.05):
        for n_steps in (50, 400):
            explanation = explain(engine, replace(job, n_steps=n_steps, tolerance=tolerance))
            error = relative_distance(explanation.attributions, integral)
            print(f"{tolerance}: {explanation.n_steps} steps, error {error:.4f}, told {explanation.error_estimate:.4f}")
            assert error <= tolerance
            assert explanation.error_estimate <= tolerance
