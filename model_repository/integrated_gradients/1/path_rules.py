"""Which points of a path get a gradient, and how their gradients add up: all of a fixed rule, or stage by stage.

A rule is walked in stages: take the gradients of all steps and ``add`` them, then ask ``refine`` for another stage. A
step is the gradient at one of ``nodes``, or, of a rule whose ``overlap`` is 1 and not 0, the mean gradient from one to
the next, so that there is a node more than steps.
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
# With mean gradients the error falls as this power of the number of steps; README.md shows from what it was read.
ERROR_ORDER = 1.75
# Margin of the error that the difference of two numbers of steps stands for, and the share of it that is corrected.
LADDER_MARGIN = 1.4
LADDER_CORRECTION = 0.5
# A single step is off by less than that law says, so the difference to it stands for more.
SINGLE_STEP_MARGIN = 1.3
# The first number of steps, which only serves to estimate the error of the second, is this part of it.
PILOT_SHARE = 0.25
# The least factor from one number of steps to the next that is worth its gradients.
LEAST_GROWTH = 1.5
# The fewest gradients of a rule that estimates its own error.
LEAST_STEPS = 3
# Relative difference and completeness gap of (sum, difference), both [1, ...].
Judge = Callable[[Tensor, Tensor], tuple[float, float]]


class _Rule:
    """The stage under way: its nodes, the weights of its steps in one sum or several, and those sums."""

    overlap = 0
    error_estimate = math.nan
    # The weighted sum of gradients [1, ...] that is the answer so far; None before there is one.
    gradient: Tensor | None = None

    def __init__(self) -> None:
        self.n_steps = 0

    def _begin(self, nodes: Tensor, weights: Tensor) -> None:
        """``nodes`` [n] on the device where they are wanted; ``weights`` [sums, n - overlap] on the CPU."""
        self.nodes, self._weights = nodes, weights
        self._sums: list[Tensor | None] = [None] * len(weights)

    def add(self, steps: slice, gradients: Tensor) -> None:
        """Take the gradients [n, ...] of some steps."""
        weights = self._weights[:, steps]
        self.n_steps += int(weights.any(dim=0).sum())
        used = weights.any(dim=1).nonzero()[:, 0].tolist()
        for index, own in zip(used, weighted_sums(weights[used].to(gradients.device), gradients).split(1)):
            total = self._sums[index]
            self._sums[index] = own.clone() if total is None else total.add_(own)


class FixedRule(_Rule):
    """Nodes and weights that are known from the start.

    Args:
        nodes: [n], on the device where they are wanted.
        weights: [n]; or [n - 1], each for the mean gradient between two consecutive nodes.
    """

    def __init__(self, nodes: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.overlap = len(nodes) - len(weights)
        self._begin(nodes, weights[None])

    def refine(self, judge: Judge, affordable: float = math.inf) -> bool:
        """Whether there is another stage: never."""
        (self.gradient,) = self._sums
        return False

    def settle(self, taken: int) -> bool:
        """Whether there is an answer after the first ``taken`` steps of the stage: not before the last."""
        return False


class LadderRule(_Rule):
    """Mean gradients over more and more stretches of the path, until two numbers of them agree.

    A number n of steps is off by what falls as n to the ``ERROR_ORDER``, so the difference of two numbers estimates the
    error of the larger, and corrects part of it. The first two are taken in one stage.

    Args:
        edges: number of steps -> that many stretches' ends, from 0 to 1.
        error_scale: what the relative error of one step would be by that law; plans the second number of steps.
        tolerance: relative error, and relative completeness gap, that suffice; None: as many steps as can be afforded.
        n_steps: gradients that may be spent, at least 3.
        affordable: steps that there is time for now; 3 are taken whatever it says.
        device: where nodes are wanted.
    """

    overlap = 1

    def __init__(
        self,
        edges: Callable[[int], Tensor],
        error_scale: float,
        tolerance: float | None,
        n_steps: int,
        affordable: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._edges, self._tolerance, self._most_steps, self._device = edges, tolerance or 0.0, n_steps, device
        self._error_scale = error_scale
        self.error_estimate = math.inf
        first = int(min(n_steps, max(LEAST_STEPS, affordable)))
        planned = max(2, math.floor(first / (1 + PILOT_SHARE)))  # the pilot and what it serves share the limit
        if tolerance is not None:
            planned = min(planned, max(2, math.ceil((error_scale / tolerance) ** (1 / ERROR_ORDER))))
        pilot = max(1, round(PILOT_SHARE * planned))
        planned = min(planned, first - pilot)
        self._coarse: Tensor | None = None
        self._coarse_steps, self._fine_steps = pilot, planned
        coarse, fine = edges(pilot), edges(planned)
        # There and back: the pilot ends where what it serves begins, and no row is between the two.
        weights = torch.zeros(2, pilot + planned, dtype=torch.float64)
        weights[0, :pilot], weights[1, pilot:] = coarse.diff(), fine.diff().flip(0)
        self._begin(torch.cat((coarse, fine.flip(0)[1:])).to(device), weights)

    def refine(self, judge: Judge, affordable: float = math.inf) -> bool:
        """Judge the stage that is complete; whether there is another one, of at most so many affordable steps."""
        fine = self._sums[-1]
        if self._coarse is None:
            self._coarse = self._sums[0]
        share = 1 / ((self._fine_steps / self._coarse_steps) ** ERROR_ORDER - 1)
        difference = fine - self._coarse
        self.gradient = fine + LADDER_CORRECTION * share * difference
        relative, gap = judge(self.gradient, difference)
        margin = LADDER_MARGIN * (SINGLE_STEP_MARGIN if self._coarse_steps == 1 else 1)
        self.error_estimate = margin * share * relative
        if max(self.error_estimate, gap) <= self._tolerance:
            return False
        least = math.ceil(LEAST_GROWTH * self._fine_steps)
        wanted = math.inf
        if self._tolerance and math.isfinite(self.error_estimate):
            growth = (self.error_estimate / self._tolerance) ** (1 / ERROR_ORDER)
            wanted = max(least, math.ceil(growth * self._fine_steps))
        steps = min(wanted, affordable, self._most_steps - self.n_steps)
        if steps < least:
            return False
        self._coarse, self._coarse_steps, self._fine_steps = fine, self._fine_steps, int(steps)
        edges = self._edges(self._fine_steps)
        self._begin(edges.to(self._device), edges.diff()[None])
        return True

    def settle(self, taken: int) -> bool:
        """Make do with the first ``taken`` steps of the stage; whether there is an answer then.

        That of the pilot alone has the error that is expected of its number of steps.
        """
        if self.gradient is None and taken >= self._coarse_steps:
            self.gradient = self._sums[0]
            self.error_estimate = LADDER_MARGIN * self._error_scale / self._coarse_steps**ERROR_ORDER
        return self.gradient is not None


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


class RefinedRule(_Rule):
    """Trapezoid sums whose intervals are halved where it pays, until the estimated error is within a tolerance.

    The trapezoid sum T of n intervals and the midpoint sum M of the same intervals make the trapezoid sum of 2n,
    (T + M) / 2: no gradient is taken twice. T - M estimates its error. The path is cut into panels that are refined on
    their own, those first that promise most for a step, and as many in one stage as the tolerance seems to need.

    Args:
        tolerance: relative error, and relative completeness gap, that suffice; None: as many steps as can be afforded.
        n_steps: gradients that may be spent, at least 3.
        affordable: steps that there is time for now; 3 are taken whatever it says.
        device: where nodes are wanted.
    """

    def __init__(self, tolerance: float | None, n_steps: int, affordable: float, device: torch.device) -> None:
        super().__init__()
        self._tolerance, self._most_steps, self._device = tolerance or 0.0, n_steps, device
        self.error_estimate = math.inf
        first = int(min(n_steps, max(LEAST_STEPS, affordable), 2 * FIRST_PANELS + 1))
        halves = 2 * ((first - 1) // 2)
        nodes = torch.linspace(0, 1, halves + 1, dtype=torch.float64)
        # A trapezoid sum for each half of a panel, then a difference for each panel.
        weights = torch.zeros(halves + halves // 2, halves + 1, dtype=torch.float64)
        for half in range(halves):
            weights[half, half : half + 2] = 0.5 / halves
        for panel in range(halves // 2):
            weights[halves + panel, 2 * panel : 2 * panel + 3] = torch.tensor([1.0, -2.0, 1.0]) / halves
        self._panels: list[_Panel] = []
        self._refining: list[_Panel] = []
        self._begin(nodes.to(device), weights)

    def refine(self, judge: Judge, affordable: float = math.inf) -> bool:
        """Judge the stage that is complete; whether there is another one, of at most so many affordable steps."""
        if self._panels:
            for panel, midpoint_sum in zip(self._refining, self._sums):
                panel.difference = panel.value - midpoint_sum
                panel.spread = panel.difference.norm().item()
                panel.value = (panel.value + midpoint_sum) / 2
                panel.intervals *= 2
        else:
            self._panels = self._first_panels()
        difference = torch.stack([panel.difference for panel in self._panels]).sum(dim=0)
        self.gradient = torch.stack([panel.value for panel in self._panels]).sum(dim=0)
        relative, gap = judge(self.gradient, difference)
        self.error_estimate = ERROR_PER_DIFFERENCE * relative
        if max(self.error_estimate, gap) <= self._tolerance:
            return False
        self._refining = self._choose(min(affordable, self._most_steps - self.n_steps))
        if not self._refining:
            return False
        steps = sum(panel.intervals for panel in self._refining)
        weights = torch.zeros(len(self._refining), steps, dtype=torch.float64)
        first = 0
        for panel, own in zip(self._refining, weights):
            own[first : first + panel.intervals] = (panel.right - panel.left) / panel.intervals
            first += panel.intervals
        self._begin(torch.cat([panel.midpoints() for panel in self._refining]).to(self._device), weights)
        return True

    def settle(self, taken: int) -> bool:
        """Whether there is an answer without the stage that is under way."""
        return self.gradient is not None

    def _first_panels(self) -> list[_Panel]:
        halves = len(self.nodes) - 1
        panels = []
        for half, value in enumerate(self._sums[:halves]):
            # Until it is refined itself, a half is charged with half of the whole panel's difference.
            difference = self._sums[halves + half // 2] / 2
            spread = difference.norm().item() / math.sqrt(2)
            panels.append(_Panel(half / halves, (half + 1) / halves, 1, value, difference, spread))
        return panels

    def _choose(self, steps_left: float) -> list[_Panel]:
        """The panels to refine next: the fewest that should bring the error within the tolerance."""
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
