"""Convolutions by Winograd's algorithm against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
import winograd_convolution
from conftest import relative_distance
from torch.nn import functional
from winograd_convolution import WinogradConvolutions, fits
from winograd_kernels import LANES, MOST_BLOCK_CHANNELS, Threads, transform_weights

# The paper's algorithm rounds more than a direct convolution, whose error is 2e-7.
LARGEST_ERROR = 5e-6
MANY = MOST_BLOCK_CHANNELS + LANES  # these are done without blocks
GEOMETRY = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)


@pytest.fixture
def chosen(monkeypatch) -> WinogradConvolutions:
    """A mode in which each layer that is measured is done by Winograd's algorithm."""
    monkeypatch.setattr(winograd_convolution, "LEAST_GAIN", 0)
    return WinogradConvolutions(2)


def random_layer(count: int, channels: int, kernels: int, height: int, width: int):
    generator = torch.Generator().manual_seed(height)
    images = torch.randn(count, channels, height, width, generator=generator)
    weights = (torch.randn(kernels, channels, 3, 3, generator=generator) / channels).to(
        memory_format=torch.channels_last
    )
    return images, weights, torch.randn(kernels, generator=generator)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("count", "channels", "kernels", "height", "width"),
    [
        (1, 32, 64, 1, 1),
        (2, 64, 32, 4, 8),
        (3, 32, 32, 7, 9),
        (9, 64, 64, 30, 21),  # many blocks
        (1, MANY, 32, 6, 3),
        (5, MANY, 64, 7, 7),
    ],
)
def test_it_convolves(threads, count, channels, kernels, height, width):
    images, weights, bias = random_layer(count, channels, kernels, height, width)
    expected = functional.conv2d(images.double(), weights.double(), padding=1)
    pool = Threads(threads)
    for added in (None, bias):
        outputs = pool.convolve(images, transform_weights(weights), added)
        whole = expected if added is None else expected + added.double()[:, None, None]
        assert outputs.shape == expected.shape
        assert relative_distance(outputs.double(), whole) <= LARGEST_ERROR


@pytest.mark.parametrize("channels", [64, MANY])
def test_gradients_pass_through_it(chosen, channels):
    images, weights, bias = random_layer(2, channels, 32, 9, 6)

    def gradients(images, weights, bias):
        images = images.requires_grad_()
        outputs = functional.conv2d(images, weights, bias, padding=1)
        (found,) = torch.autograd.grad(outputs.square().sum(), images)
        return found

    with chosen, chosen.measuring():
        gradients(images.clone(), weights, bias)
    assert chosen.layers == 2
    calls = []
    convolve = chosen._threads.convolve
    chosen._threads.convolve = lambda *layer: calls.append(layer) or convolve(*layer)
    with chosen:
        found = gradients(images.clone(), weights, bias)
    assert len(calls) == 2
    expected = gradients(images.double(), weights.double(), bias.double())
    assert relative_distance(found.double(), expected) <= 2 * LARGEST_ERROR


def test_a_layer_that_it_makes_no_faster_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(winograd_convolution, "LEAST_GAIN", float("inf"))
    images, weights, bias = random_layer(2, 32, 32, 8, 8)
    mode, expected = WinogradConvolutions(1), functional.conv2d(images, weights, bias, padding=1)
    with mode, mode.measuring():
        functional.conv2d(images, weights, bias, padding=1)
    assert mode.layers == 0
    with mode:
        assert torch.equal(functional.conv2d(images, weights, bias, padding=1), expected)


def test_a_layer_whose_weights_would_take_much_memory_stays_as_it_is(chosen, monkeypatch):
    monkeypatch.setattr(winograd_convolution, "MOST_WEIGHT_BYTES", 4 * 36 * 32 * 32)
    for kernels in (32, 64):
        images, weights, _ = random_layer(1, 32, kernels, 8, 8)
        with chosen, chosen.measuring():
            functional.conv2d(images, weights, padding=1)
    assert chosen.layers == 1


def test_a_layer_that_was_not_measured_is_not_changed(chosen):
    images, weights, _ = random_layer(2, 32, 32, 8, 8)
    with chosen:
        found = functional.conv2d(images, weights, padding=1)
    assert torch.equal(found, functional.conv2d(images, weights, padding=1))
    assert not chosen.layers


def test_layers_of_one_shape_are_timed_once(chosen):
    layers = [random_layer(2, 32, 32, 8, 8) for _ in range(3)]
    timed = []
    with chosen, chosen.measuring():
        for images, weights, _ in layers:
            given = images, weights, None, *GEOMETRY
            chosen.forward(lambda weights=weights: timed.append(weights), *given)
    assert len(timed) == winograd_convolution.TIMED_RUNS
    assert all(weights is layers[0][1] for weights in timed)
    assert chosen.layers == 3


def test_gradients_of_weights_are_pytorchs(chosen):
    images, weights, _ = random_layer(2, 32, 32, 8, 8)
    with chosen, chosen.measuring():
        functional.conv2d(images, weights, padding=1)
        with chosen:
            outputs = functional.conv2d(images.requires_grad_(), weights.requires_grad_(), padding=1)
            found = torch.autograd.grad(outputs.sum(), (images, weights))
    outputs = functional.conv2d(images, weights, padding=1)
    for one, other in zip(found, torch.autograd.grad(outputs.sum(), (images, weights))):
        assert relative_distance(one, other) <= LARGEST_ERROR


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, [2, 2]), (1, [0, 0]), (1, [1, 2]), (2, [2, 2]), (3, True), (5, 2)],
    ids=["stride", "no padding", "uneven padding", "dilation", "transposed", "groups"],
)
def test_other_geometries_are_not_for_it(place, value):
    images, weights, _ = random_layer(1, 64, 32, 8, 8)
    assert fits(images, weights, [*GEOMETRY])
    geometry = [*GEOMETRY]
    geometry[place] = value
    assert not fits(images, weights, geometry)


def test_other_layers_are_not_for_it():
    images, weights, _ = random_layer(1, 64, 32, 8, 8)
    assert not fits(images.double(), weights.double(), [*GEOMETRY])
    assert not fits(images, weights[:, :, :1], [*GEOMETRY])
    assert not fits(images, weights[:30], [*GEOMETRY])
    assert not fits(images[:, :48], weights[:, :48], [*GEOMETRY])
    assert not fits(images.to("meta"), weights.to("meta"), [*GEOMETRY])
    # PyTorch's outputs would not be channels_last, and a network may view them.
    assert not fits(images, weights.contiguous(), [*GEOMETRY])
    assert fits(images.to(memory_format=torch.channels_last), weights.contiguous(), [*GEOMETRY])


def test_weights_at_the_same_place_are_told_apart(chosen):
    images, weights, _ = random_layer(2, 32, 64, 8, 8)
    with chosen:
        with chosen.measuring():
            functional.conv2d(images, weights, padding=1)
        found = functional.conv2d(images, weights[:32], padding=1)
    assert torch.equal(found, functional.conv2d(images, weights[:32], padding=1))


def test_values_that_are_not_finite_stay_so():
    images, weights, _ = random_layer(1, 32, 32, 8, 8)
    images[0, 3, 2, 2] = float("nan")
    found = Threads(1).convolve(images, transform_weights(weights), None)
    assert found[0, :, 1:4, 1:4].isnan().all()
    assert found[0, :, 4:].isfinite().all()
