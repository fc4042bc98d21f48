"""Which points of a path get a gradient, and how their gradients add up: a fixed rule, or one that refines itself.

Both are walked stage by stage: take the gradients of all steps and ``add`` them, then ask ``refine`` for another stage.
A step is the gradient at one of ``nodes``, or, of a rule whose ``overlap`` is 1 and not 0, the mean gradient from one
to the next, so that there is a node more than steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from path_quadrature import weighted_sums
from torch import Tensor

# Of a jump at a random place in an interval, |trapezoid - midpoint| is half, and the error of their mean sqrt(1/48):
# 1/sqrt(12) of it. Gradients of a ReLU network are many jumps. The rest is margin; README.md shows what it buys.
ERROR_PER_DIFFERENCE = 1.07 / math.sqrt(12)
FIRST_PANELS = 3
# Relative difference and completeness gap of (sum, difference), both [1, ...].
Judge = Callable[[Tensor, Tensor], tuple[float, float]]


class FixedRule:
    """Nodes and weights that are known from the start.

    Args:
        nodes: [n], on the device where they are wanted.
        weights: [n]; or [n - 1], each for the mean gradient between two consecutive nodes.
    """

    error_estimate = math.nan

    def __init__(self, nodes: Tensor, weights: Tensor) -> None:
        self.nodes, self._weights = nodes, weights
        self.overlap = len(nodes) - len(weights)
        self.n_steps = len(weights)
        self.gradient: Tensor | None = None

    def add(self, steps: slice, gradients: Tensor) -> None:
        """Take the gradients [n, ...] of some steps: at ``nodes[steps]``, or from there to the next nodes."""
        total = weighted_sums(self._weights[None, steps], gradients)
        self.gradient = total if self.gradient is None else self.gradient.add_(total)

    def refine(self, judge: Judge) -> bool:
        """Whether there is another stage: never."""
        return False


@dataclass
class _Panel:
    """A part of the path in equal intervals: the trapezoid sum of its gradients, and what is known of its error.

    ``difference`` is the trapezoid minus the midpoint sum of the stage before; ``spread`` its norm.
    """

    left: float
    right: float
    intervals: int
    value: Tensor
    difference: Tensor
    spread: float

    def midpoints(self) -> Tensor:
        return self.left + (torch.arange(self.intervals) + 0.5).double() / self.intervals * (self.right - self.left)


class RefinedRule:
    """Trapezoid sums whose intervals are halved where it pays, until the estimated error is within a tolerance.

    The trapezoid sum T of n intervals and the midpoint sum M of the same intervals make the trapezoid sum of 2n,
    (T + M) / 2: no gradient is taken twice. T - M estimates its error. The path is cut into panels that are refined on
    their own, those first that promise most for a step, and as many in one stage as the tolerance seems to need.

    Args:
        tolerance: relative error, and relative completeness gap, that suffice.
        n_steps: gradients that may be spent, at least 3.
        device: where nodes are wanted.
    """

    overlap = 0

    def __init__(self, tolerance: float, n_steps: int, device: torch.device) -> None:
        self._tolerance, self._most_steps, self._device = tolerance, n_steps, device
        self.error_estimate = math.inf
        self.n_steps = self.first_rows(n_steps)
        halves = self.n_steps - 1
        nodes = torch.linspace(0, 1, self.n_steps, dtype=torch.float64)
        # A trapezoid sum for each half of a panel, then a difference for each panel.
        weights = torch.zeros(halves + halves // 2, self.n_steps, dtype=torch.float64)
        for half in range(halves):
            weights[half, half : half + 2] = 0.5 / halves
        for panel in range(halves // 2):
            weights[halves + panel, 2 * panel : 2 * panel + 3] = torch.tensor([1.0, -2.0, 1.0]) / halves
        self._panels: list[_Panel] = []
        self._refining: list[_Panel] = []
        self._begin(nodes, weights)

    @staticmethod
    def first_rows(n_steps: int) -> int:
        """Gradients of the first stage."""
        return 2 * min(FIRST_PANELS, (n_steps - 1) // 2) + 1

    @property
    def gradient(self) -> Tensor:
        """The weighted sum of all gradients [1, ...]."""
        return torch.stack([panel.value for panel in self._panels]).sum(dim=0)

    def _begin(self, nodes: Tensor, weights: Tensor) -> None:
        self.nodes, self._weights = nodes.to(self._device), weights
        self._sums: list[Tensor | None] = [None] * len(weights)

    def add(self, steps: slice, gradients: Tensor) -> None:
        """Take the gradients [n, ...] at ``nodes[steps]``."""
        weights = self._weights[:, steps]
        used = weights.any(dim=1).nonzero()[:, 0].tolist()
        for index, own in zip(used, weighted_sums(weights[used].to(self._device), gradients).split(1)):
            total = self._sums[index]
            self._sums[index] = own.clone() if total is None else total.add_(own)

    def refine(self, judge: Judge) -> bool:
        """Judge the stage that is complete; whether there is another one."""
        if self._panels:
            for panel, midpoint_sum in zip(self._refining, self._sums):
                panel.difference = panel.value - midpoint_sum
                panel.spread = panel.difference.norm().item()
                panel.value = (panel.value + midpoint_sum) / 2
                panel.intervals *= 2
        else:
            self._panels = self._first_panels()
        difference = torch.stack([panel.difference for panel in self._panels]).sum(dim=0)
        relative, gap = judge(self.gradient, difference)
        self.error_estimate = ERROR_PER_DIFFERENCE * relative
        if max(self.error_estimate, gap) <= self._tolerance:
            return False
        self._refining = self._choose()
        if not self._refining:
            return False
        steps = sum(panel.intervals for panel in self._refining)
        weights = torch.zeros(len(self._refining), steps, dtype=torch.float64)
        first = 0
        for panel, own in zip(self._refining, weights):
            own[first : first + panel.intervals] = (panel.right - panel.left) / panel.intervals
            first += panel.intervals
        self.n_steps += steps
        self._begin(torch.cat([panel.midpoints() for panel in self._refining]), weights)
        return True

    def _first_panels(self) -> list[_Panel]:
        halves = self.n_steps - 1
        panels = []
        for half, value in enumerate(self._sums[:halves]):
            # Until it is refined itself, a half is charged with half of the whole panel's difference.
            difference = self._sums[halves + half // 2] / 2
            spread = difference.norm().item() / math.sqrt(2)
            panels.append(_Panel(half / halves, (half + 1) / halves, 1, value, difference, spread))
        return panels

    def _choose(self) -> list[_Panel]:
        """The panels to refine next: the fewest that should bring the error within the tolerance."""
        steps_left = self._most_steps - self.n_steps
        square = sum(panel.spread**2 for panel in self._panels)
        # Refining a panel should halve its part of the error.
        wanted = square * (self._tolerance / self.error_estimate) ** 2 if self.error_estimate else square
        chosen: list[_Panel] = []
        for panel in sorted(self._panels, key=_promise, reverse=True):
            # Refined, the best has an eighth of its promise left, and would still come before the rest.
            if chosen and (square <= wanted or _promise(panel) < _promise(chosen[0]) / 8):
                break
            if panel.intervals <= steps_left:
                chosen.append(panel)
                steps_left -= panel.intervals
                square -= 0.75 * panel.spread**2
        return chosen


def _promise(panel: _Panel) -> float:
    """How much squared error a step in a panel should take away."""
    return panel.spread**2 / panel.intervals
