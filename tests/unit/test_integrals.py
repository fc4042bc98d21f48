"""Gradients along a path and their integral, against autograd and Captum in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import captum.attr
import numpy as np
import pytest
import torch
from attribution_engine import AttributionEngine
from classifier_loading import load_classifier
from engine_loading import build_engine
from torch import Tensor, nn

from tools.evaluation.integrals import EXPLAINED_OUTPUTS, integrands, integrate, load_or_integrate

SHAPE = (3, 8, 8)
TARGET = 3
ROWS = 4  # of one pass


class Split(nn.Module):
    """A stem, and a tail whose gradients change smoothly, so that few points give the integral; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.stem_layers = nn.Conv2d(3, 4, 3, stride=2)
        self.tail_layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 5))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        self.double()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.tail(self.stem(images))
        return logits, logits.softmax(dim=1)

    @torch.jit.export
    def stem(self, images: Tensor) -> Tensor:
        return self.stem_layers(images)

    @torch.jit.export
    def tail(self, features: Tensor) -> Tensor:
        return self.tail_layers(features)


class Whole(nn.Module):
    """The same network without parts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = Split()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.parts(images)


OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "logit": lambda images: Split()(images)[0],
    "probability": lambda images: Split()(images)[1],
}


@pytest.fixture(scope="module", params=[Split, Whole], ids=["hoisted", "whole"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AttributionEngine:
    file = tmp_path_factory.mktemp("model") / "model.pt"
    torch.jit.script(request.param()).save(str(file))
    return build_engine(load_classifier(file, torch.device("cpu")), torch.device("cpu"), SHAPE, max_rows=ROWS)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_both_outputs_are_explained() -> None:
    assert tuple(OUTPUTS) == EXPLAINED_OUTPUTS


def test_integrands_are_gradients_at_the_nodes_times_the_image(engine: AttributionEngine, image: Tensor) -> None:
    nodes = torch.tensor([0.0, 0.1, 0.35, 0.5, 0.8, 1.0], dtype=torch.float64)
    chunks = list(integrands(engine, image, TARGET, nodes))
    assert [len(chunk["logit"]) for chunk in chunks] == [ROWS, 2]
    for name, output in OUTPUTS.items():
        points = (nodes.view(-1, 1, 1, 1) * image).requires_grad_()
        (gradients,) = torch.autograd.grad(output(points)[:, TARGET].sum(), points)
        values = torch.cat([chunk[name] for chunk in chunks])
        # The same derivatives in another order of float64 operations.
        torch.testing.assert_close(values, gradients * image, rtol=0, atol=1e-13)


def test_the_integral_is_captums_by_the_midpoint_rule(engine: AttributionEngine, image: Tensor) -> None:
    integrals = integrate(engine, image, TARGET, 10)
    for name, output in OUTPUTS.items():
        expected = captum.attr.IntegratedGradients(output).attribute(
            image[None], target=TARGET, n_steps=10, method="riemann_middle"
        )
        assert integrals[name].dtype == torch.float64
        # Captum rounds its nodes and weights to float32, by 3e-8 of the path.
        torch.testing.assert_close(integrals[name], expected[0].detach(), rtol=0, atol=1e-7)


def test_the_integral_is_complete_as_points_grow(engine: AttributionEngine, image: Tensor) -> None:
    integrals = {points: integrate(engine, image, TARGET, points) for points in (16, 32)}
    for name, output in OUTPUTS.items():
        ends = output(torch.stack((torch.zeros_like(image), image)))[:, TARGET]
        change = (ends[1] - ends[0]).item()
        gaps = [abs(integral[name].sum().item() - change) for integral in integrals.values()]
        # The midpoint rule's error falls with the square of the points: by 4 from 16 points to 32.
        assert gaps[1] == pytest.approx(gaps[0] / 4, rel=0.05)


def test_an_integral_takes_no_more_rows_a_pass_than_the_engine_has(engine: AttributionEngine, image: Tensor) -> None:
    nodes = torch.linspace(0, 1, 2 * ROWS + 1, dtype=torch.float64)
    assert [len(chunk["probability"]) for chunk in integrands(engine, image, TARGET, nodes)] == [ROWS, ROWS, 1]


def test_a_kept_integral_is_not_computed_again(engine: AttributionEngine, image: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "new" / "integral.npz"
    first = load_or_integrate(file, engine, image, TARGET, 6)
    for name, expected in integrate(engine, image, TARGET, 6).items():
        torch.testing.assert_close(first[name], expected, rtol=0, atol=0)
    # No valid image or class: the integral must come from the file.
    again = load_or_integrate(file, engine, torch.full(SHAPE, torch.nan), -1, 6)
    assert all(torch.equal(again[name], first[name]) for name in EXPLAINED_OUTPUTS)
    assert [each.name for each in file.parent.iterdir()] == ["integral.npz"]


def test_an_integral_that_was_not_finished_is_computed(
    engine: AttributionEngine, image: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "integral.npz"
    file.with_suffix(".part.npz").write_bytes(b"half a file")
    integrals = load_or_integrate(file, engine, image, TARGET, 3)
    with np.load(file) as kept:
        np.testing.assert_array_equal(kept["logit"], integrals["logit"])
    assert [each.name for each in tmp_path.iterdir()] == ["integral.npz"]
