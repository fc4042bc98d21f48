"""Deletion and insertion curves of a network whose evidence is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from path_baselines import Baselines
from torch import Tensor

from tools.evaluation.faithfulness import POINTS, Curves, curves

SIZE = 32
EVIDENCE = (slice(None), slice(4, 12), slice(20, 28))


def network(images: Tensor) -> Tensor:
    """Class 1's evidence is a bright square."""
    score = images[:, :, 4:12, 20:28].flatten(1).mean(dim=1)
    return torch.stack((torch.zeros_like(score), 4 * score, torch.ones_like(score)), dim=1)


@pytest.fixture(scope="module")
def image() -> Tensor:
    image = 0.1 * torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    image[EVIDENCE] += 1
    return image


@pytest.fixture(scope="module")
def blurred(image: Tensor) -> Tensor:
    return Baselines([0.0] * 3, [1.0] * 3).make("blur", image)


@pytest.fixture
def saliency() -> Tensor:
    """Distinct values, the highest where the evidence is."""
    ranks = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(1)).view(SIZE, SIZE).float()
    ranks[EVIDENCE[1:]] += SIZE * SIZE
    return ranks


def test_curves_run_between_the_image_and_the_blurred_image(image: Tensor, blurred: Tensor, saliency: Tensor) -> None:
    whole, none = network(torch.stack((image, blurred))).softmax(dim=1)[:, 1]
    both = curves(network, image, saliency, 1)
    assert len(both.deletion) == len(both.insertion) == POINTS
    torch.testing.assert_close(both.deletion[[0, -1]], torch.stack((whole, none)))
    torch.testing.assert_close(both.insertion[[0, -1]], torch.stack((none, whole)))


def test_each_point_is_an_image_without_or_with_its_most_salient_pixels(
    image: Tensor, blurred: Tensor, saliency: Tensor
) -> None:
    seen: list[Tensor] = []

    def watched(images: Tensor) -> Tensor:
        seen.extend(images)
        return network(images)

    curves(watched, image, saliency, 1)
    order = np.argsort(-saliency.numpy(), axis=None)
    for point in range(POINTS):
        count = int(np.ceil(point * SIZE * SIZE / (POINTS - 1)))
        most_salient = np.zeros(SIZE * SIZE, bool)
        most_salient[order[:count]] = True
        most_salient = most_salient.reshape(SIZE, SIZE)
        # Pixels are only copied, and the blur is the same function.
        np.testing.assert_array_equal(seen[point], np.where(most_salient, blurred, image))
        np.testing.assert_array_equal(seen[POINTS + point], np.where(most_salient, image, blurred))


def test_equal_saliency_takes_every_pixel_once(image: Tensor, blurred: Tensor) -> None:
    seen: list[Tensor] = []

    def watched(images: Tensor) -> Tensor:
        seen.extend(images)
        return network(images)

    curves(watched, image, torch.zeros(SIZE, SIZE), 1)
    taken = [(each != image).any(dim=0).sum().item() for each in seen[:POINTS]]
    # 1,024 pixels in 28 steps are 36.57 a step, rounded up to whole pixels.
    assert taken == [-(-point * SIZE * SIZE // (POINTS - 1)) for point in range(POINTS)]


def test_a_map_that_finds_the_evidence_has_the_better_areas(image: Tensor, saliency: Tensor) -> None:
    good, bad = curves(network, image, saliency, 1), curves(network, image, -saliency, 1)
    assert good.deletion_area < bad.deletion_area
    assert good.insertion_area > bad.insertion_area


def test_deleting_by_one_map_is_inserting_by_the_reversed_map(image: Tensor, saliency: Tensor) -> None:
    """Deletion leaves what insertion in reverse order has inserted, up to one rounded pixel a point."""
    forward, backward = curves(network, image, saliency, 1), curves(network, image, -saliency, 1)
    # One pixel of 64 that hold the evidence moves the logit by 4 / 64, and the probability by a quarter of that.
    torch.testing.assert_close(forward.deletion, backward.insertion.flip(0), rtol=0, atol=4 / 64 / 4)


def test_areas_are_means_by_the_trapezoid_rule() -> None:
    deletion, insertion = torch.tensor([0.9, 0.4, 0.2, 0.1]), torch.tensor([0.1, 0.8, 0.8, 0.9])
    both = Curves(deletion, insertion)
    assert both.deletion_area == pytest.approx((0.9 / 2 + 0.4 + 0.2 + 0.1 / 2) / 3)
    assert both.insertion_area == pytest.approx((0.1 / 2 + 0.8 + 0.8 + 0.9 / 2) / 3)
    constant = Curves(torch.full((POINTS,), 0.3), torch.ones(POINTS))
    assert constant.deletion_area == pytest.approx(0.3)
    assert constant.insertion_area == pytest.approx(1)


def test_the_class_that_is_watched_is_the_one_asked_for(image: Tensor, saliency: Tensor) -> None:
    total = sum(curves(network, image, saliency, target).deletion for target in range(3))
    torch.testing.assert_close(total, torch.ones(POINTS))


def test_curves_take_no_gradients(image: Tensor, saliency: Tensor) -> None:
    weight = torch.ones(1, requires_grad=True)
    both = curves(lambda images: weight * network(images), image, saliency, 1)
    assert not both.deletion.requires_grad
    assert not both.insertion.requires_grad
