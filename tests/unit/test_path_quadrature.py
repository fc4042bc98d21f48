"""Quadrature rules, places shared out by a density, and the sums over a path, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import path_quadrature
import pytest
import torch
from path_quadrature import even_bounds, place_points, quadrature, share_out, weighted_sums
from torch import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n_steps", [1, 3, 50])
def test_gauss_legendre_nodes_and_weights_are_numpys_on_the_unit_interval(n_steps: int) -> None:
    nodes, weights = quadrature("gausslegendre", n_steps)
    expected_nodes, expected_weights = np.polynomial.legendre.leggauss(n_steps)
    # Rounded to float32, once for the nodes and once for the weights.
    np.testing.assert_allclose(nodes, (1 + expected_nodes) / 2, rtol=0, atol=6e-8)
    np.testing.assert_allclose(weights, expected_weights / 2, rtol=0, atol=6e-8)


@pytest.mark.parametrize("n_steps", [2, 10, 40])
def test_trapezoid_weights_are_captums_which_add_up_to_less_than_one(n_steps: int) -> None:
    _, weights = quadrature("riemann_trapezoid", n_steps)
    assert weights.sum().item() == pytest.approx(1 - 1 / n_steps, abs=1e-6)


def test_a_rule_is_computed_once() -> None:
    nodes, weights = quadrature("riemann_middle", 17)
    assert quadrature("riemann_middle", 17)[0] is nodes
    assert (nodes.dtype, weights.dtype) == (torch.float64, torch.float32)
    assert nodes.shape == weights.shape == (17,)


def test_even_bounds_are_float64_and_reach_both_ends() -> None:
    assert even_bounds(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert even_bounds(1).dtype == torch.float64


@pytest.mark.parametrize("n_steps", [1, 2, 9, 500])
def test_equal_density_lies_between_shared_places_on_uneven_intervals(n_steps: int) -> None:
    density = torch.tensor([3.0, 1.0, 9.0, 2.0]).double()
    bounds = torch.tensor([0, 0.1, 0.35, 0.4, 1.0]).double()
    places = share_out(density, bounds, n_steps)
    integral = np.concatenate(([0], np.cumsum(density.numpy() * np.diff(bounds.numpy()))))
    reached = np.interp(places.numpy(), bounds.numpy(), integral)
    # Float64 rounding alone.
    np.testing.assert_allclose(reached, np.linspace(0, integral[-1], n_steps + 1), rtol=0, atol=1e-13)
    assert (places[0].item(), places[-1].item()) == (0, 1)
    assert places.dtype == torch.float64


def test_a_quiet_part_gets_a_tenth_of_the_mean_density() -> None:
    bounds = torch.tensor([0, 0.8, 1.0]).double()
    places = share_out(torch.tensor([0.0, 5.0]).double(), bounds, 1080)
    # The mean density is 1: a quiet part of 0.8 x 0.1 against a busy one of 0.2 x 5.
    quiet = 0.1 * 0.8 / (0.1 * 0.8 + 1)
    assert (places < 0.8).sum().item() == pytest.approx(1080 * quiet, abs=1)


def test_without_any_density_places_are_even() -> None:
    places = share_out(torch.zeros(3).double(), torch.tensor([0, 0.2, 0.3, 1.0]).double(), 8)
    torch.testing.assert_close(places, even_bounds(8), rtol=0, atol=1e-15)


def test_a_factor_of_the_density_moves_no_place() -> None:
    density, bounds = random(12).abs(), even_bounds(12)
    torch.testing.assert_close(
        share_out(1e-9 * density, bounds, 30), share_out(1e9 * density, bounds, 30), rtol=0, atol=1e-14
    )


POINT_SHAPES = {"a vector": (7,), "an image": (3, 8, 8), "wide features": (4, 90, 100), "few lines": (40, 2, 400)}


@pytest.mark.parametrize("shape", POINT_SHAPES.values(), ids=POINT_SHAPES)
def test_points_of_a_wider_path_are_rounded_once(shape: tuple[int, ...]) -> None:
    start, displacement, nodes = random(1, *shape), random(1, *shape, seed=1), random(5, seed=2).sigmoid()
    points = torch.full((5, *shape), torch.nan, dtype=torch.float32)
    place_points(start, displacement, nodes, points)
    exact = start + nodes.view(-1, *[1] * len(shape)) * displacement
    # Half the distance of float32 numbers there, and float64's own rounding; two roundings would go beyond.
    assert ((points.double() - exact).abs() <= 2**-24 * exact.abs() + 1e-14).all()


def test_points_are_written_in_blocks_that_fit_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    start, displacement = random(1, 3, 11, 5), random(1, 3, 11, 5, seed=1)
    written = []
    addcmul = torch.addcmul

    def counted(start: Tensor, factor: Tensor, other_factor: Tensor) -> Tensor:
        block = addcmul(start, factor, other_factor)
        written.append(block.numel())
        return block

    monkeypatch.setattr(torch, "addcmul", counted)
    monkeypatch.setattr(path_quadrature, "BLOCK_NUMBERS", 100)
    points = torch.empty(4, 3, 11, 5)
    place_points(start, displacement, even_bounds(3), points)
    assert sum(written) == points.numel()
    # Seven blocks of at most two lines of the eleven.
    assert len(written) == 7
    assert max(written) == 4 * 3 * 2 * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_of_the_paths_own_dtype_need_no_rounding(dtype: torch.dtype) -> None:
    start, displacement = random(1, 3, 4, 5).to(dtype), random(1, 3, 4, 5, seed=1).to(dtype)
    points = torch.empty(3, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    place_points(start, displacement, torch.tensor([0.0, 0.5, 1.0]).double(), points)
    expected = torch.cat((start, start + 0.5 * displacement, start + displacement))
    # A product and a sum in the path's dtype.
    torch.testing.assert_close(points, expected)
    assert points.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 3, 4, 5), (6, 2, 3, 2, 2)], ids=str)
def test_sums_are_weighted_sums_over_the_first_dimension(shape: tuple[int, ...]) -> None:
    weights, rows = random(2, 6), random(*shape, seed=1)
    expected = np.tensordot(weights.numpy(), rows.numpy(), axes=1)
    np.testing.assert_allclose(weighted_sums(weights, rows), expected, rtol=0, atol=1e-13)


def test_sums_lie_in_memory_as_their_rows() -> None:
    weights, rows = random(1, 6), random(6, 3, 4, 5, seed=1).contiguous(memory_format=torch.channels_last)
    sums = weighted_sums(weights, rows)
    assert sums.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(sums, weighted_sums(weights, rows.contiguous()), rtol=0, atol=1e-13)


def test_sums_take_rows_that_are_parts_of_others() -> None:
    weights, source = random(3, 4), random(8, 5, 6, 7, seed=1)
    rows = source[::2, 1:4, :, ::3].transpose(1, 2)
    expected = torch.einsum("sn,nabc->sabc", weights, rows)
    torch.testing.assert_close(weighted_sums(weights, rows), expected, rtol=0, atol=1e-13)


def test_sums_have_the_rows_dtype() -> None:
    assert weighted_sums(random(1, 3), random(3, 4).float()).dtype == torch.float32
