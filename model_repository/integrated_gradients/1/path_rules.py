"""Which points of a path get a gradient, and how their gradients add up: all of a fixed rule, or stage by stage.

A rule is walked in stages: take the gradients of all steps and ``add`` them, then ask ``refine`` for another stage. A
step is the gradient at one of ``nodes``, or, of a rule whose ``overlap`` is 1 and not 0, the mean gradient from one to
the next, so that there is a node more than steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from path_quadrature import even_bounds, share_out, weighted_sums
from torch import Tensor

# Of a jump at a random place in an interval, |trapezoid - midpoint| is half, and the error of their mean sqrt(1/48):
# 1/sqrt(12) of it. Gradients of a ReLU network are many jumps. The rest is margin; README.md shows what it buys.
ERROR_PER_DIFFERENCE = 1.07 / math.sqrt(12)
FIRST_PANELS = 3
# Of the correction that the difference of two numbers of steps stands for: errors of the two are far from parallel.
LADDER_CORRECTION = 0.3
# The cosine between the errors of two numbers of steps: 0.4 to 0.75 for EfficientNet-Lite0 and 9 photographs, with 5 to
# 40 steps and ratios of 1.5 to 4. At 1 the share below were Richardson's.
ERROR_CORRELATION = 0.65
# A single step is off by less than the law says, so the difference to it stands for more.
SINGLE_STEP_MARGIN = 1.3
# The first number of steps, which only serves to estimate the error of the second, is this part of it.
PILOT_SHARE = 0.25
# A first stage that just fails costs a second one of half as many steps again.
PLANNING_RESERVE = 1.15
# The least factor from one number of steps to the next that is worth its gradients.
LEAST_GROWTH = 1.5
# The fewest gradients of a rule that estimates its own error.
LEAST_STEPS = 3
# Without a calibration: the first numbers of steps, which find out where the path's gradients change, and the fewest of
# the next, a quarter of which and a half of which are taken too, to find out how errors fall.
SCOUTING_STEPS = (3, 6)
LEAST_TRIAL_STEPS, MOST_TRIAL_STEPS = 8, 200
# With fewer to spend, even steps from the first on come further.
LEAST_SCOUTED_STEPS = 60
# Steps are placed by that power of the gradients' rate of change; `tools/calibrate` finds a network's own.
TYPICAL_EXPONENT = 0.65
# Relative changes from one gradient to the next that say nothing.
ROUNDING = 1e-6
# Nodes of each stage are placed better than those of the one before, so that only a large step says how errors fall.
TRIAL_GROWTH = 2.0
# Orders that three numbers of steps can tell of; beyond them it is chance.
LEAST_ORDER, MOST_ORDER = 1.2, 1.75
# Relative difference and completeness gap of (sum, difference), both [1, ...].
Judge = Callable[[Tensor, Tensor], tuple[float, float]]


@dataclass(frozen=True)
class ErrorLaw:
    """How the relative error of mean gradients falls with the number n of steps: ``scale`` times n to the -``order``.

    Nine in ten images stay below that. ``margin`` times what the difference of two numbers of steps stands for is at
    least the error of the larger, for 95 in 100.
    """

    scale: float
    order: float
    margin: float

    def error(self, n_steps: int) -> float:
        """What to expect of so many steps."""
        return self.scale / n_steps**self.order

    def share(self, coarse: int, fine: int) -> float:
        """The error of ``fine`` steps as a share of the difference to ``coarse`` ones, both as norms."""
        times = (fine / coarse) ** self.order
        return 1 / math.sqrt(times**2 + 1 - 2 * ERROR_CORRELATION * times)


# For want of a calibration, near that of EfficientNet-Lite0 with ImageNet weights (2.2, 1.2, 1.4).
TYPICAL_LAW = ErrorLaw(scale=2.0, order=1.2, margin=1.2)


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
    """Mean gradients over more and more segments of the path, until two numbers of them agree (Richardson).

    The difference of two numbers of steps estimates the error of the larger, by an ``ErrorLaw``, and corrects part of
    it. The first two are taken in one stage. Without a calibration that stage is a few even steps, which tell where the
    gradients change; the next takes three numbers of steps, placed by that, which tell the law's order.

    Args:
        edges: number of steps -> that many segments' ends, from 0 to 1, float64; None: there is no calibration.
        law: of this network; without ``edges`` a guess.
        tolerance: relative error, and relative completeness gap, that suffice; None: as many steps as can be afforded.
        n_steps: gradients that may be spent, at least 3.
        affordable: steps that there is time for now; 3 are taken whatever it says.
        device: where nodes are wanted.
    """

    overlap = 1

    def __init__(
        self,
        edges: Callable[[int], Tensor] | None,
        law: ErrorLaw,
        tolerance: float | None,
        n_steps: int,
        affordable: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._law, self._tolerance, self._most_steps, self._device = law, tolerance or 0.0, n_steps, device
        self._edges = edges or even_bounds
        self.error_estimate = math.inf
        first = int(min(n_steps, max(LEAST_STEPS, affordable)))
        self._scouts = edges is None and first >= LEAST_SCOUTED_STEPS
        if self._scouts:
            self._walk(SCOUTING_STEPS)
            return
        planned = min(self._planned(), max(2, math.floor(first / (1 + PILOT_SHARE))))  # they share the limit
        pilot = max(1, round(PILOT_SHARE * planned))
        self._walk((pilot, min(planned, first - pilot)))

    def _planned(self) -> float:
        """Steps for which the law expects the estimate to be within the tolerance, with some reserve."""
        if not self._tolerance:
            return math.inf
        estimate = PLANNING_RESERVE * self._law.margin * self._law.scale
        return max(2, math.ceil((estimate / self._tolerance) ** (1 / self._law.order)))

    def _walk(self, counts: Sequence[int]) -> None:
        """Begin a stage that walks the path once for each number of steps, there and back."""
        self._counts = counts
        ends = [self._edges(count) for count in counts]
        nodes, weights = [ends[0][:1]], torch.zeros(len(counts), sum(counts), dtype=torch.float64)
        taken = 0
        for number, own in enumerate(ends):
            lengths = own.diff()
            if number % 2:
                own, lengths = own.flip(0), lengths.flip(0)
            nodes.append(own[1:])  # each walk begins where the one before ended
            weights[number, taken : taken + len(lengths)] = lengths
            taken += len(lengths)
        self._changes: list[Tensor] = []
        self._last_gradient: Tensor | None = None
        self._begin(torch.cat(nodes).to(self._device), weights)

    def add(self, steps: slice, gradients: Tensor) -> None:
        super().add(steps, gradients)
        if not self._scouts:
            return
        gradients = gradients[max(0, sum(self._counts[:-1]) - steps.start) :]  # those of the last walk
        if len(gradients) > 0:
            if self._last_gradient is not None:
                gradients = torch.cat((self._last_gradient, gradients))
            changes = gradients.diff(dim=0).flatten(1).norm(dim=1)
            self._changes.append(changes.where(changes > ROUNDING * gradients[-1].norm(), 0.0))
            self._last_gradient = gradients[-1:].clone()

    def refine(self, judge: Judge, affordable: float = math.inf) -> bool:
        """Judge the stage that is complete; whether there is another one, of at most so many affordable steps."""
        fine, fine_steps = self._sums[-1], self._counts[-1]
        if len(self._counts) > 1:
            self._coarse, self._coarse_steps = self._sums[0], self._counts[0]
        if len(self._counts) > 2:
            before, after = ((two - one).norm().item() for one, two in itertools.pairwise(self._sums))
            self._law = replace(self._law, order=_order(before / after if after else 1.0, *self._counts))
        share = self._law.share(self._coarse_steps, fine_steps)
        difference = fine - self._coarse
        self.gradient = fine + LADDER_CORRECTION * share * difference
        relative, gap = judge(self.gradient, difference)
        margin = self._law.margin * (SINGLE_STEP_MARGIN if self._coarse_steps == 1 else 1)
        self.error_estimate = margin * share * relative
        is_scouting = self._scouts and self._counts == SCOUTING_STEPS
        # The first two stages without a calibration agree by chance where both overlook a part of the path.
        is_placed = not self._scouts or len(self._counts) == 1
        is_exact = relative == gap == 0  # nothing to explain, or nothing that changes
        if is_exact or math.isnan(relative):
            return False
        if is_placed and max(self.error_estimate, gap) <= self._tolerance:
            return False
        steps_left = min(affordable, self._most_steps - self.n_steps)
        if self._scouts:
            self._find_density()
        if is_scouting and steps_left >= _trial_cost(LEAST_TRIAL_STEPS):
            most = max(
                count for count in range(LEAST_TRIAL_STEPS, MOST_TRIAL_STEPS) if _trial_cost(count) <= steps_left
            )
            steps = int(min(most, max(LEAST_TRIAL_STEPS, self._planned())))
            self._walk(_trial(steps))
            return True
        least = math.ceil((TRIAL_GROWTH if self._scouts else LEAST_GROWTH) * fine_steps)
        wanted = math.inf
        if self._tolerance and math.isfinite(self.error_estimate):
            growth = (self.error_estimate / self._tolerance) ** (1 / self._law.order)
            wanted = max(least, math.ceil(growth * fine_steps))
        steps = min(wanted, steps_left)
        if steps < least:
            return False
        self._coarse, self._coarse_steps = fine, fine_steps
        self._walk((int(steps),))
        return True

    def settle(self, taken: int) -> bool:
        """Make do with the first ``taken`` steps of the stage; whether there is an answer then.

        That of the pilot alone has the error that is expected of its number of steps.
        """
        if self.gradient is None and taken >= self._counts[0]:
            self.gradient = self._sums[0]
            self.error_estimate = self._law.margin * self._law.error(self._counts[0])
        return self.gradient is not None

    def _find_density(self) -> None:
        """Place what follows by where the gradients of the last walk change."""
        changes = torch.cat(self._changes).double().cpu()
        if not changes.isfinite().all() or not changes.any():
            return
        ends = self._edges(self._counts[-1])
        middles = (ends[1:] + ends[:-1]) / 2
        if len(self._counts) % 2 == 0:  # which went back
            changes = changes.flip(0)
        density = (changes / middles.diff()) ** TYPICAL_EXPONENT
        self._edges = partial(share_out, density, torch.cat((ends[:1], middles[1:-1], ends[-1:])))


def _trial(steps: int) -> tuple[int, int, int]:
    """A quarter, a half and all of so many steps."""
    return round(PILOT_SHARE * steps), round(steps / 2), steps


def _trial_cost(steps: int) -> int:
    return sum(_trial(steps))


def _order(ratio: float, coarsest: int, coarse: int, fine: int) -> float:
    """The order p of errors n**-p whose differences, coarsest to coarse and coarse to fine steps, have that ratio."""

    def expected(order: float) -> float:
        law = ErrorLaw(1.0, order, 1.0)
        return law.error(coarse) / law.share(coarsest, coarse) * law.share(coarse, fine) / law.error(fine)

    low, high = LEAST_ORDER, MOST_ORDER  # the ratio grows with the order
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) < ratio else (low, middle)
    return (low + high) / 2


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
