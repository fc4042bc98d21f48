"""How an explanation is cut into levels, each of which asks for the gradients that the levels before left out.

A rule with known nodes comes in interleaved parts: every eighth node, then those halfway between, and so on. The parts
so far, divided by the sum of their weights, approximate the attribution. All of them add up to it. A tolerance, a
deadline and the method ``calibrated`` have no such parts; a coarse request goes before them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from attribution_parameters import AttributionParameters, read_parameters

# The fewest nodes of a part that says something about the whole path.
LEAST_NODES = 4
# The most of one request, for each image: between two of them a stream can be cancelled.
MOST_NODES = 32
# Of a request that is cut into levels: a number from a client must not make a list as long.
MOST_STEPS = 10_000
# The coarse request that goes before one whose number of steps depends on the image.
COARSE_TOLERANCE = 0.5
COARSE_STEPS = 3
# Two interleaved sums of as many nodes relate like a trapezoid and a midpoint sum: for a jump at a random place, the
# difference is half an interval, and the error of their mean 1/sqrt(12) of it. The rest is margin.
ERROR_PER_DIFFERENCE = 1.07 / math.sqrt(12)

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedLevel:
    """Requests to `integrated_gradients`, by their parameters.

    Each ``is_part`` of one attribution, or is an attribution by itself.
    """

    requests: Sequence[Parameters]
    is_part: bool


@dataclass(frozen=True)
class Plan:
    """What a stream is going to ask, and by when.

    ``levels``, the last of which makes it what `explain` would answer; ``deadline_ms`` counts from the stream's
    arrival, infinite if there is none.
    """

    levels: Sequence[PlannedLevel]
    deadline_ms: float


def plan_stream(parameters: Parameters) -> Plan:
    """Read a request's parameters, once.

    Those that are not valid are passed on, for `integrated_gradients` to refuse them.
    """
    asked = read_parameters(parameters)
    if asked is None:
        return Plan([PlannedLevel([parameters], False)], math.inf)
    return Plan(_plan_levels(parameters, asked), math.inf if asked.deadline_ms is None else asked.deadline_ms)


def _plan_levels(parameters: Parameters, asked: AttributionParameters) -> list[PlannedLevel]:
    whole = PlannedLevel([parameters], False)
    if asked.parts > 1 or asked.n_steps > MOST_STEPS:
        return [whole]
    if asked.tolerance is not None or asked.deadline_ms is not None or asked.method == "calibrated":
        if asked.n_steps <= COARSE_STEPS or (asked.tolerance or 0) >= COARSE_TOLERANCE:
            return [whole]  # no coarse request is coarser
        coarse = {name: value for name, value in parameters.items() if name != "method"}
        return [PlannedLevel([{**coarse, "tolerance": str(COARSE_TOLERANCE), "n_steps": COARSE_STEPS}], False), whole]
    parts = 1
    while asked.n_steps >= 2 * parts * LEAST_NODES:
        parts *= 2
    if parts == 1:
        return [whole]
    levels = [[(0, parts), (parts // 2, parts)]]
    while parts > 2:
        parts //= 2
        levels.append([(parts // 2, parts)])
    return [
        PlannedLevel(
            [{**parameters, "part": part, "parts": parts} for part, parts in _split(level, asked.n_steps)], True
        )
        for level in levels
    ]


def _split(level: Sequence[tuple[int, int]], n_steps: int) -> list[tuple[int, int]]:
    """The same nodes in parts of at most ``MOST_NODES``."""
    split = []
    for part, parts in level:
        pieces = math.ceil(n_steps / parts / MOST_NODES)
        split += [(part + piece * parts, pieces * parts) for piece in range(pieces)]
    return split


@dataclass(frozen=True)
class LevelAnswer:
    """What `integrated_gradients` answers for n images.

    ``attributions`` [n, ...]; ``convergence_delta``, ``error_estimate`` and ``weight_sum`` [n, 1]; ``n_steps`` [n, 1].
    """

    attributions: np.ndarray
    convergence_delta: np.ndarray
    n_steps: np.ndarray
    error_estimate: np.ndarray
    weight_sum: np.ndarray


class LevelAccumulator:
    """The attribution so far."""

    def __init__(self) -> None:
        self._parts: LevelAnswer | None = None
        self._steps: np.ndarray | None = None

    def take(self, answers: Sequence[LevelAnswer], level: PlannedLevel, is_last: bool) -> LevelAnswer:
        """Take the answers to a level's requests; the attribution that they make with those before.

        Its steps are all that were spent.
        """
        spent = reduce(np.add, [answer.n_steps for answer in answers])
        self._steps = steps = spent if self._steps is None else self._steps + spent
        if not level.is_part:
            (answer,) = answers
            return replace(answer, n_steps=steps)
        if self._parts is None:  # the first level: two parts, or more pieces of them, in order
            half = len(answers) // 2
            before, new = _sum(answers[:half]), _sum(answers[half:])
        else:
            before, new = self._parts, _sum(answers)
        self._parts = total = _sum([before, new])
        change = _mean(before) - _mean(new)
        scale = _norms(_mean(total))
        estimate = np.divide(
            ERROR_PER_DIFFERENCE * _norms(change), scale, out=np.full_like(scale, np.inf), where=scale > 0
        )
        weight, delta = total.weight_sum, total.convergence_delta / total.weight_sum
        if is_last:  # as it is, whatever its weights add up to: Captum's trapezoid ones fall short of 1
            weight, delta = np.ones_like(weight), _whole_delta(total)
            estimate = estimate + np.abs(1 - total.weight_sum)
        return LevelAnswer(
            total.attributions / _like(weight, total.attributions),
            delta,
            steps,
            estimate,
            weight,
        )


def _whole_delta(total: LevelAnswer) -> np.ndarray:
    """[n, 1]: the sum of attributions less the whole change of the output.

    A part's own delta is less its share of that change only, and shares that do not add up to 1 leave some out.
    """
    sums = total.attributions.reshape(len(total.attributions), -1).sum(axis=1, keepdims=True, dtype=np.float64)
    change = (sums - total.convergence_delta) / total.weight_sum
    return (sums - change).astype(total.convergence_delta.dtype)


def _sum(answers: Sequence[LevelAnswer]) -> LevelAnswer:
    return LevelAnswer(
        reduce(np.add, [answer.attributions for answer in answers]),
        reduce(np.add, [answer.convergence_delta for answer in answers]),
        reduce(np.add, [answer.n_steps for answer in answers]),
        np.full_like(answers[0].error_estimate, np.nan),
        reduce(np.add, [answer.weight_sum for answer in answers]),
    )


def _mean(parts: LevelAnswer) -> np.ndarray:
    return parts.attributions / _like(parts.weight_sum, parts.attributions)


def _norms(maps: np.ndarray) -> np.ndarray:
    """[n, ...] -> [n, 1]"""
    return np.linalg.norm(maps.reshape(len(maps), -1), axis=1, keepdims=True)


def _like(column: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """[n, 1] -> [n, 1, ...]"""
    return column.reshape(-1, *[1] * (maps.ndim - 1))
