"""Which points of a path get a gradient, and how their gradients add up: fixed rules and an adaptive trapezoid rule.

A rule runs in stages. First ``add`` takes the gradients of all steps. Then ``complete_stage`` returns the difference
that estimates the error, and ``refine`` takes its relative size and decides whether there is another stage. A step is
the gradient at one of ``nodes``. In a rule whose ``overlap`` is 1, a step is the mean gradient between one node and the
next, so there is one more node than steps.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from path_quadrature import weighted_sums
from torch import Tensor

# Gradients of a ReLU network are many jumps. For a jump at a random place in an interval, |trapezoid - midpoint| is
# half an interval, and the error of their mean is sqrt(1/48): 1/sqrt(12) of it. The rest is margin, see README.md.
ERROR_PER_DIFFERENCE = 1.3 / math.sqrt(12)
FIRST_PANELS = 3
# The fewest gradients of a rule that estimates its own error.
LEAST_STEPS = 3


class Rule:
    """The stage under way: its nodes, the weights of its steps in one sum or several, and those sums.

    Attributes:
        nodes: [n], where the stage takes gradients, on the network's device.
        overlap: 1 if steps are mean gradients between consecutive nodes, else 0.
        n_steps: gradients used so far.
        gradient: the weighted sum [1, ...] that is the answer so far; None before there is one.
        error_estimate: relative error; NaN where the rule does not estimate it.
    """

    overlap = 0
    error_estimate = math.nan
    nodes: Tensor
    gradient: Tensor | None = None

    def __init__(self) -> None:
        self.n_steps = 0

    def _begin(self, nodes: Tensor, weights: Tensor) -> None:
        """Begin a stage: ``nodes`` [n] on the network's device; ``weights`` [sums, n - overlap] on the CPU."""
        self.nodes, self._weights = nodes, weights
        self._sums: dict[int, Tensor] = {}

    def add(self, steps: slice, gradients: Tensor) -> None:
        """Add the gradients [n, ...] of a slice of the steps; slices come in order."""
        weights = self._weights[:, steps]
        self.n_steps += int(weights.any(dim=0).sum())
        used = weights.any(dim=1).nonzero()[:, 0].tolist()
        for index, summand in zip(used, weighted_sums(weights[used].to(gradients.device), gradients).split(1)):
            total = self._sums.get(index)
            self._sums[index] = summand.clone() if total is None else total.add_(summand)

    def complete_stage(self) -> Tensor | None:
        """Set ``gradient`` to the answer of the complete stage.

        Returns:
            The difference [1, ...] that estimates its error; None for a rule of one stage.
        """
        raise NotImplementedError

    @property
    def error_share(self) -> float:
        """The estimated error as a share of the difference that ``complete_stage`` returned."""
        return math.nan

    @property
    def is_trusted(self) -> bool:
        """Whether the error estimate of the complete stage may end the path."""
        return True

    def aim(self, tolerance: float) -> None:
        """Refine to another tolerance from now on."""

    def refine(self, error: float, gap: float, affordable: float = math.inf) -> bool:
        """Begin another stage where one is needed; call it after ``complete_stage``.

        Args:
            error: relative norm of the difference that ``complete_stage`` returned, as attributions.
            gap: relative completeness gap.
            affordable: gradients that fit into the time left.
        """
        return False

    def finish_early(self, taken: int) -> bool:
        """End after the first ``taken`` steps of the stage; whether there is an answer."""
        return self.gradient is not None

    def completed(self) -> Rule:
        """A copy after a complete stage, with no more than ``refine`` reads; call it before ``refine``."""
        kept = copy.copy(self)
        kept.gradient, kept._sums = None, {}
        return kept

    def resumed(self, tolerance: float | None, n_steps: int) -> Rule:
        """A copy of what ``completed`` returned, with another aim; call its ``refine`` next."""
        raise NotImplementedError


class FixedRule(Rule):
    """Nodes and weights that are known from the start.

    Args:
        nodes: [n], on the network's device.
        weights: [n], one for each node; or [n - 1], one for each mean gradient between consecutive nodes.
    """

    def __init__(self, nodes: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.overlap = len(nodes) - len(weights)
        self._begin(nodes, weights[None])

    def complete_stage(self) -> None:
        self.gradient = self._sums[0]


@dataclass
class _Panel:
    """A part of the path in equal intervals: the trapezoid sum of its gradients and the estimate of its error.

    ``difference`` is the trapezoid sum minus the midpoint sum of the stage before; ``spread`` is its norm.
    """

    left: float
    right: float
    intervals: int
    value: Tensor
    difference: Tensor
    spread: float

    def midpoints(self) -> Tensor:
        return self.left + (torch.arange(self.intervals) + 0.5).double() / self.intervals * (self.right - self.left)


class AdaptiveTrapezoidRule(Rule):
    """Trapezoid sums whose intervals are halved where it pays, until the estimated error is within a tolerance.

    The trapezoid sum T of n intervals and the midpoint sum M of the same intervals make the trapezoid sum of 2n,
    (T + M) / 2: no gradient is taken twice. T - M estimates its error. The path is cut into panels. Each stage refines
    the panels that should lower the error most for each step, as few as the tolerance needs.

    Args:
        tolerance: stop at this relative error and relative completeness gap; None: take all affordable steps.
        n_steps: most gradients to take, at least 3.
        affordable: gradients that fit into the time left; at least 3 are taken.
        device: of the network.
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

    def complete_stage(self) -> Tensor:
        if self._panels:
            for number, panel in enumerate(self._refining):
                midpoint_sum = self._sums[number]
                panel.difference = panel.value - midpoint_sum
                panel.spread = panel.difference.norm().item()
                panel.value = (panel.value + midpoint_sum) / 2
                panel.intervals *= 2
        else:
            self._panels = self._first_panels()
        self.gradient = torch.stack([panel.value for panel in self._panels]).sum(dim=0)
        return torch.stack([panel.difference for panel in self._panels]).sum(dim=0)

    @property
    def error_share(self) -> float:
        return ERROR_PER_DIFFERENCE

    def aim(self, tolerance: float) -> None:
        self._tolerance = tolerance

    def refine(self, error: float, gap: float, affordable: float = math.inf) -> bool:
        self.error_estimate = self.error_share * error
        if max(self.error_estimate, gap) <= self._tolerance:
            return False
        self._refining = self._choose(min(affordable, self._most_steps - self.n_steps))
        if not self._refining:
            return False
        steps = sum(panel.intervals for panel in self._refining)
        weights = torch.zeros(len(self._refining), steps, dtype=torch.float64)
        first = 0
        for panel, panel_weights in zip(self._refining, weights):
            panel_weights[first : first + panel.intervals] = (panel.right - panel.left) / panel.intervals
            first += panel.intervals
        self._begin(torch.cat([panel.midpoints() for panel in self._refining]).to(self._device), weights)
        return True

    def completed(self) -> AdaptiveTrapezoidRule:
        kept = super().completed()
        assert isinstance(kept, AdaptiveTrapezoidRule)
        kept._panels, kept._refining = [replace(panel) for panel in self._panels], []
        return kept

    def resumed(self, tolerance: float | None, n_steps: int) -> AdaptiveTrapezoidRule:
        rule = self.completed()
        rule._tolerance, rule._most_steps = tolerance or 0.0, n_steps
        return rule

    def _first_panels(self) -> list[_Panel]:
        halves = len(self.nodes) - 1
        panels = []
        for half in range(halves):
            # Until a half is refined itself, it has half of the whole panel's difference.
            difference = self._sums[halves + half // 2] / 2
            spread = difference.norm().item() / math.sqrt(2)
            panels.append(_Panel(half / halves, (half + 1) / halves, 1, self._sums[half], difference, spread))
        return panels

    def _choose(self, steps_left: float) -> list[_Panel]:
        """The panels to refine next: the fewest that should bring the error within the tolerance."""
        square = sum(panel.spread**2 for panel in self._panels)
        # Refining a panel should halve its part of the error.
        wanted = square * (self._tolerance / self.error_estimate) ** 2 if self.error_estimate else square
        chosen: list[_Panel] = []
        for panel in sorted(self._panels, key=_promise, reverse=True):
            # Once refined, the best panel keeps an eighth of its promise, and would still come before the rest.
            if chosen and (square <= wanted or _promise(panel) < _promise(chosen[0]) / 8):
                break
            if panel.intervals <= steps_left:
                chosen.append(panel)
                steps_left -= panel.intervals
                square -= 0.75 * panel.spread**2
        return chosen


def _promise(panel: _Panel) -> float:
    """The squared error that each step in a panel should remove."""
    return panel.spread**2 / panel.intervals
