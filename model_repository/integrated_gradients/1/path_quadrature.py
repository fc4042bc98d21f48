"""Captum's quadrature rules on [0, 1], each computed once per process, and the sums that apply them to a path."""

from __future__ import annotations

from functools import lru_cache

import torch
from captum.attr._utils.approximation_methods import approximation_parameters
from torch import Tensor

# Path points rounded at once: in float64 and with their sources, a block fits an L2 cache.
BLOCK_NUMBERS = 100_000


def quadrature(method: str, n_steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of one of Captum's methods.

    They are Captum's own numbers: the weights of ``riemann_trapezoid`` add up to ``1 - 1 / n_steps``, and the nodes of
    the Riemann rules are rounded to PyTorch's default dtype. They are cached because Gauss-Legendre nodes cost 2.7 ms
    at 100 steps and 14.5 ms at 300.

    Returns:
        (nodes float64, weights float32), each [n_steps] on the CPU. Do not write into them.
    """
    return _quadrature(method, n_steps, torch.get_default_dtype())


@lru_cache(maxsize=1024)
def _quadrature(method: str, n_steps: int, default_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    step_sizes, alphas = approximation_parameters(method)
    with torch.device("cpu"):
        return torch.tensor(alphas(n_steps), dtype=torch.float64), torch.tensor(step_sizes(n_steps)).float()


# Least density as a share of the mean: parts of a path that seem quiet get some nodes too.
LEAST_DENSITY = 0.1


def even_bounds(count: int) -> Tensor:
    """``count`` + 1 places from 0 to 1, float64."""
    return torch.linspace(0, 1, count + 1, dtype=torch.float64)


def share_out(density: Tensor, bounds: Tensor, n_steps: int) -> Tensor:
    """``n_steps`` + 1 places from 0 to 1, with equal density between neighbours.

    Args:
        density: float64 [intervals], at least 0.
        bounds: float64 [intervals + 1], ascending from 0 to 1: the ends of the intervals.
        n_steps: at least 1.

    Returns:
        float64 [n_steps + 1].
    """
    widths = bounds.diff()
    mean = (density * widths).sum()
    density = density.clamp_min(LEAST_DENSITY * mean) if mean > 0 else torch.ones_like(density)
    reached = torch.cat((torch.zeros(1).double(), (density * widths).cumsum(dim=0)))
    wanted = even_bounds(n_steps)[1:-1] * reached[-1]
    interval = torch.searchsorted(reached, wanted, right=True) - 1
    inside = bounds[interval] + (wanted - reached[interval]) / density[interval]
    return torch.cat((torch.zeros(1).double(), inside, torch.ones(1).double()))


def place_points(start: Tensor, displacement: Tensor, nodes: Tensor, points: Tensor) -> None:
    """Write ``start + nodes * displacement`` [n, ...] into ``points``, computed in the dtype of ``start`` [1, ...].

    ``nodes`` is [n]. A wider dtype than that of ``points`` is rounded once, in blocks that fit a CPU's cache.
    """
    column = nodes.to(start.dtype).view(-1, *[1] * (start.dim() - 1))
    if start.dtype == points.dtype and start.device.type == "cpu":
        # Rounded twice, as by Captum: a point may lie where an activation is exactly 0.
        torch.mul(column, displacement, out=points).add_(start)
        return
    if start.dtype == points.dtype:
        torch.addcmul(start, column, displacement, out=points)
        return
    blocks = 1
    if start.dim() > 2 and start.device.type == "cpu":
        blocks = min(start.shape[2], -(-points.numel() // BLOCK_NUMBERS))
    parts = (tensor.tensor_split(blocks, dim=min(2, start.dim() - 1)) for tensor in (start, displacement, points))
    for start_part, displacement_part, points_part in zip(*parts):
        points_part.copy_(torch.addcmul(start_part, column, displacement_part))


def weighted_sums(weights: Tensor, rows: Tensor) -> Tensor:
    """Sums of ``rows`` [n, ...] times each of ``weights`` [sums, n], as [sums, ...] in the same layout."""
    order = sorted(range(1, rows.dim()), key=rows.stride, reverse=True)
    in_memory_order = rows.permute(0, *order)  # lest channels_last rows be copied to be flattened
    totals = weights.to(rows) @ in_memory_order.reshape(len(rows), -1)
    inverse = [1 + order.index(dimension) for dimension in range(1, rows.dim())]
    return totals.view(-1, *in_memory_order.shape[1:]).permute(0, *inverse)
