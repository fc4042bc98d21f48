"""Captum's quadrature rules on [0, 1], each computed once per process."""

from __future__ import annotations

from functools import lru_cache

import torch
from captum.attr._utils.approximation_methods import approximation_parameters


@lru_cache(maxsize=1024)
def quadrature(method: str, n_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of one of Captum's methods.

    They are Captum's own numbers, so ``riemann_trapezoid`` keeps its weights, which add up to ``1 - 1 / n_steps``.
    Captum computes them anew in every call; Gauss-Legendre nodes cost 2.7 ms at 100 steps and 14.5 ms at 300.

    Returns:
        (nodes, weights), float32 [n_steps] on the CPU. Do not write into them.
    """
    step_sizes, alphas = approximation_parameters(method)
    return torch.tensor(alphas(n_steps)), torch.tensor(step_sizes(n_steps))
