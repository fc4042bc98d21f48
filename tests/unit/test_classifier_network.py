"""One pass over rows of a tiny network, against autograd in float64.

Not tested here: CUDA graphs (`CapturedPasses`), which need a CUDA device, and float16 convolutions on one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from classifier_network import (
    EagerPasses,
    Network,
    Rows,
    UnsupportedOutputError,
    memory_format,
)
from torch import Tensor, nn

CLASSES = 5


class SplitClassifier(nn.Module):
    """A convolution as the stem, a ReLU network as the tail; float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem_layers = nn.Conv2d(3, 4, 3, stride=2)
        self.layers = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 3, 8), nn.ReLU(), nn.Linear(8, CLASSES))
        self.double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.tail(self.stem(images))
        return logits, logits.softmax(dim=1)

    def stem(self, images: Tensor) -> Tensor:
        return self.stem_layers(images)

    def tail(self, features: Tensor) -> Tensor:
        return self.layers(features)


class LinearClassifier(nn.Module):
    """Features are logits, so that the mean slopes of the tail are its slopes."""

    def forward(self, images: Tensor) -> Tensor:
        return images

    stem = tail = forward

    def mean_slope_tail(self, features: Tensor, paired: Tensor) -> Tensor:
        return features


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(
    features: Tensor,
    classes: list[tuple[int, int]],
    signs: list[tuple[float, float]],
    on_probability: list[bool],
    paired: list[bool] | None = None,
) -> Rows:
    return Rows(
        features,
        torch.tensor(classes),
        torch.tensor(signs, dtype=features.dtype),
        torch.tensor(on_probability)[:, None],
        torch.tensor(paired or [False] * len(features)),
    )


def logit_rows(features: Tensor) -> Rows:
    """Each row explains the logit of class 2."""
    count = len(features)
    return rows_of(features, [(2, 2)] * count, [(1.0, 0.0)] * count, [False] * count)


def test_logits_are_the_first_of_what_a_module_returns() -> None:
    module, images = SplitClassifier(), random(2, 3, 8, 8)
    torch.testing.assert_close(Network(module)(images), module(images)[0], rtol=0, atol=0)
    torch.testing.assert_close(Network(lambda pixels: 2 * pixels)(images), 2 * images, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "hoists", "has_mean_slopes"),
    [(SplitClassifier(), True, False), (LinearClassifier(), True, True), (nn.ReLU(), False, False)],
    ids=["stem and tail", "mean slopes", "neither"],
)
def test_a_module_says_by_its_methods_what_it_can_do(module: nn.Module, hoists: bool, has_mean_slopes: bool) -> None:
    network = Network(module)
    assert (network.hoists, network.has_mean_slopes) == (hoists, has_mean_slopes)


def test_without_a_stem_images_and_gradients_pass_unchanged() -> None:
    images = random(2, 3, 8, 8)
    network = Network(nn.ReLU())
    assert network.stem(images) is images
    assert network.transposed_stem(images, images) is images


def test_a_known_stem_is_evaluated_in_float64() -> None:
    module, images = SplitClassifier().float(), random(2, 3, 8, 8).float()
    weight, bias = (parameter.detach().double() for parameter in module.stem_layers.parameters())
    expected = nn.functional.conv2d(images.double(), weight, bias, stride=2)
    # Float64 rounding alone; float32 would be off by 1e-7.
    torch.testing.assert_close(Network(module).stem(images), expected, rtol=0, atol=1e-14)
    assert Network(module, float64_stem=False).stem(images).dtype == torch.float32
    assert module.stem_layers.weight.dtype == torch.float32


def test_features_lie_in_memory_as_convolutions_like_them() -> None:
    features = Network(SplitClassifier()).stem(random(2, 3, 8, 8))
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert memory_format(features) == torch.channels_last
    assert memory_format(features[0]) == torch.contiguous_format


def test_transposed_stem_is_the_transpose_of_the_stems_jacobian() -> None:
    module, images, gradients = SplitClassifier(), random(2, 3, 8, 8), random(2, 4, 3, 3, seed=2)
    jacobian = torch.autograd.functional.jacobian(module.stem, images[:1])[0, :, :, :, 0]
    expected = torch.einsum("nchw,chwxyz->nxyz", gradients, jacobian)
    # Sums of a few dozen products in float64.
    torch.testing.assert_close(Network(module).transposed_stem(gradients, images), expected, rtol=0, atol=1e-13)


OBJECTIVES: dict[str, tuple[tuple[int, int], tuple[float, float], bool, Callable[[Tensor], Tensor]]] = {
    "logit": ((2, 2), (1.0, 0.0), False, lambda logits: logits[2]),
    "difference of logits": ((2, 4), (1.0, -1.0), False, lambda logits: logits[2] - logits[4]),
    "probability": ((3, 3), (1.0, 0.0), True, lambda logits: logits.softmax(dim=0)[3]),
    "difference of probabilities": (
        (0, 1),
        (1.0, -1.0),
        True,
        lambda logits: logits.softmax(dim=0)[0] - logits.softmax(dim=0)[1],
    ),
    "padding": ((1, 1), (0.0, 0.0), False, lambda logits: 0 * logits[1]),
}


@pytest.mark.parametrize("hoists", [True, False])
def test_each_row_of_a_pass_has_its_own_objective(hoists: bool) -> None:
    module = SplitClassifier()
    network = Network(module if hoists else module.forward)
    features = random(len(OBJECTIVES), *((4, 3, 3) if hoists else (3, 8, 8)))
    classes, signs, on_probability, objectives = zip(*OBJECTIVES.values())
    gradients = network.row_gradients(rows_of(features, list(classes), list(signs), list(on_probability)))
    for name, row, gradient, objective in zip(OBJECTIVES, features, gradients, objectives):
        point = row[None].requires_grad_()
        logits = module.tail(point) if hoists else module(point)[0]
        (expected,) = torch.autograd.grad(objective(logits[0]), point)
        # The same derivative in another order of float64 operations.
        torch.testing.assert_close(gradient, expected[0], rtol=1e-11, atol=1e-13, msg=name)


def test_a_pass_needs_no_autograd_around_it_and_leaves_none_behind() -> None:
    module, features = SplitClassifier(), random(2, 4, 3, 3)
    with torch.no_grad():
        gradients = Network(module).row_gradients(logit_rows(features))
    assert gradients.any()
    assert not gradients.requires_grad
    assert features.grad is None
    assert not features.requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())


def test_probabilities_of_extreme_logits_have_finite_gradients() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    rows = rows_of(logits, [(0, 0)] * 2, [(1.0, 0.0)] * 2, [True] * 2)
    gradients = Network(LinearClassifier()).row_gradients(rows)
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [0.16, -0.04, -0.04, -0.04, -0.04]])
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("shape", [(4,), (4, 2, 3)], ids=str)
def test_outputs_that_are_no_class_scores_are_refused(shape: tuple[int, ...]) -> None:
    network = Network(lambda images: images.flatten(1).sum(dim=1).view(4, *[1] * (len(shape) - 1)).expand(shape))
    with pytest.raises(UnsupportedOutputError):
        network.row_gradients(logit_rows(random(4, 3, 8, 8)))


def test_passes_may_have_another_precision_than_the_module() -> None:
    module, features = SplitClassifier().float(), random(3, 4, 3, 3).float()
    gradients = Network(module, precision=torch.float64).row_gradients(logit_rows(features))
    assert module.layers[2].weight.dtype == torch.float32
    expected = Network(module.double()).row_gradients(logit_rows(features.double()))
    # Float64 rounding alone.
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-13)


def test_small_gradients_survive_float16() -> None:
    module = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, CLASSES, bias=False))
    for weight, value in zip(module.parameters(), (1e-4, 2e-4)):
        nn.init.constant_(weight, value)
    gradients = Network(module, precision=torch.float16).row_gradients(logit_rows(torch.ones(2, 4)))
    assert gradients.dtype == torch.float32
    # 2e-8 is below what float16 can hold; scaled by 64 it lies between numbers that are 6e-8 / 64 = 9e-10 apart.
    torch.testing.assert_close(gradients, torch.full((2, 4), 2e-8), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("logit_change", "tolerance"), [(0.0, 1e-15), (5.0, 1e-8), (10.0, 3e-7), (20.0, 2e-3)])
def test_paired_rows_account_for_the_change_of_a_probability(logit_change: float, tolerance: float) -> None:
    starts = torch.linspace(-logit_change - 5, 5, 101, dtype=torch.float64)
    points = torch.zeros(202, CLASSES, dtype=torch.float64)
    points[::2, 1], points[1::2, 1] = starts, starts + logit_change
    rows = rows_of(points, [(1, 1)] * 202, [(1.0, 0.0)] * 202, [True] * 202, [True, False] * 101)
    gradients = Network(LinearClassifier()).row_gradients(rows, any_paired=True)
    accounted = (gradients[::2] * (points[1::2] - points[::2])).sum(dim=1)
    probabilities = points.softmax(dim=1)[:, 1]
    # The error of 16 Gauss-Legendre nodes is largest where the softmax turns in the middle of a long segment: 7e-9,
    # 2.4e-7 and 1.5e-3 for a logit that moves by 5, 10 and 20.
    torch.testing.assert_close(accounted, probabilities[1::2] - probabilities[::2], rtol=0, atol=tolerance)


def test_paired_rows_account_for_the_change_of_a_difference_of_probabilities() -> None:
    points = random(1, CLASSES) + random(6, CLASSES, seed=2).cumsum(dim=0)
    rows = rows_of(points, [(1, 3)] * 6, [(1.0, -1.0)] * 6, [True] * 6, [True] * 5 + [False])
    gradients = Network(LinearClassifier()).row_gradients(rows, any_paired=True)
    probabilities = points.softmax(dim=1)
    changes = (probabilities[:, 1] - probabilities[:, 3]).diff()
    # Logits move by 5 at most, which sixteen nodes integrate to 1e-8 for each of the two.
    torch.testing.assert_close((gradients[:5] * points.diff(dim=0)).sum(dim=1), changes, rtol=0, atol=2e-8)


def test_rows_that_are_not_paired_are_points_beside_those_that_are() -> None:
    points = 3 * random(4, CLASSES)
    options = ([(1, 1)] * 4, [(1.0, 0.0)] * 4, [True, True, True, False])
    network = Network(LinearClassifier())
    alone = network.row_gradients(rows_of(points, *options))
    mixed = network.row_gradients(rows_of(points, *options, [False, True, False, False]), any_paired=True)
    torch.testing.assert_close(mixed[[0, 2, 3]], alone[[0, 2, 3]], rtol=0, atol=1e-15)
    assert (mixed[1] - alone[1]).abs().max() > 1e-3


def test_a_paired_row_on_a_logit_keeps_the_networks_own_mean_slopes() -> None:
    points = random(2, CLASSES)
    rows = rows_of(points, [(2, 0)] * 2, [(1.0, -1.0)] * 2, [False] * 2, [True, False])
    gradients = Network(LinearClassifier()).row_gradients(rows, any_paired=True)
    assert gradients.tolist() == [[-1, 0, 1, 0, 0]] * 2


def test_buffers_are_laid_out_as_the_features() -> None:
    features = random(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    rows = Rows.like(features, torch.float32, 6)
    assert rows.features.shape == (6, 4, 3, 3)
    assert rows.features.is_contiguous(memory_format=torch.channels_last)
    assert (rows.features.dtype, rows.signs.dtype) == (torch.float32, torch.float32)
    assert (rows.classes.dtype, rows.on_probability.dtype, rows.paired.dtype) == (torch.int64, torch.bool, torch.bool)
    assert [len(getattr(rows, name)) for name in ("classes", "signs", "on_probability", "paired")] == [6] * 4
    assert Rows.like(random(1, 4, 3, 3), torch.float32, 6).features.is_contiguous()


def test_some_rows_of_a_buffer_are_views_of_it() -> None:
    rows = Rows.like(random(1, 4, 3, 3), torch.float64, 6)
    rows[2:4].features.fill_(7)
    rows[2:4].paired.fill_(True)
    assert rows.features[:, 0, 0, 0].tolist() == [0, 0, 7, 7, 0, 0]
    assert rows.paired.tolist() == [False, False, True, True, False, False]


def test_buffers_are_kept_until_features_of_another_kind_come() -> None:
    passes = EagerPasses(Network(SplitClassifier()), max_rows=4)
    features = random(1, 4, 3, 3)
    first = passes.buffers(features, torch.float64)
    assert passes.buffers(random(1, 4, 3, 3, seed=9), torch.float64) is first
    assert passes.buffers(features.contiguous(memory_format=torch.channels_last), torch.float64) is not first
    assert passes.buffers(features, torch.float32).features.dtype == torch.float32
    # Only one buffer is kept, so the first one is gone.
    assert passes.buffers(features, torch.float64) is not first


def test_a_pass_takes_the_first_rows_of_a_buffer_alone() -> None:
    network, features = Network(SplitClassifier()), random(2, 4, 3, 3)
    passes = EagerPasses(network, max_rows=4)
    rows = passes.buffers(features[:1], torch.float64)
    rows.features[:2], rows.features[2:] = features, torch.nan
    rows.classes[:], rows.signs[:, 0] = 2, 1.0
    gradients = passes.gradients(rows, 2)
    torch.testing.assert_close(gradients, network.row_gradients(logit_rows(features)), rtol=0, atol=1e-14)
