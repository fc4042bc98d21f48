"""How an explanation is cut into levels. Each level requests gradients that the levels before left out.

A rule with known nodes is requested in interleaved parts: every eighth node, then those halfway between, and so on. The
parts so far, divided by the sum of their weights, approximate the attribution. All parts add up to it. A tolerance, a
deadline and the method ``calibrated`` have no such parts; they are preceded by a coarse request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from attribution_parameters import AttributionParameters, read_parameters

# Fewest nodes of a part that still represents the whole path.
LEAST_NODES = 4
# Most nodes of one request, for each image: a stream can be cancelled only between requests.
MOST_NODES = 32
# Most steps of a request that is cut into levels: a client must not cause a list of arbitrary length.
MOST_STEPS = 10_000
# The coarse request before one whose number of steps depends on the image.
COARSE_TOLERANCE = 0.5
COARSE_STEPS = 3
# Two interleaved sums of n nodes each relate like a trapezoid and a midpoint sum: for a jump at a random place, the
# difference is half an interval, and the error of their mean 1/sqrt(12) of it. The rest is margin.
ERROR_PER_DIFFERENCE = 1.07 / math.sqrt(12)

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedLevel:
    """The parameters of each of a level's requests to `integrated_gradients`.

    ``is_part``: the answers are parts of one attribution; otherwise the answer is an attribution by itself.
    """

    requests: Sequence[Parameters]
    is_part: bool


@dataclass(frozen=True)
class Plan:
    """The requests of a stream, and its deadline.

    ``levels``: after the last one the answer is that of `explain`. ``deadline_ms`` counts from the stream's arrival and
    is infinite without a deadline.
    """

    levels: Sequence[PlannedLevel]
    deadline_ms: float


def plan_stream(parameters: Parameters) -> Plan:
    """Plan a stream from its request's parameters.

    Parameters that are not valid are passed on; `integrated_gradients` refuses them.
    """
    requested = read_parameters(parameters)
    if requested is None:
        return Plan([PlannedLevel([parameters], False)], math.inf)
    deadline_ms = math.inf if requested.deadline_ms is None else requested.deadline_ms
    return Plan(_plan_levels(parameters, requested), deadline_ms)


def _plan_levels(parameters: Parameters, requested: AttributionParameters) -> list[PlannedLevel]:
    whole = PlannedLevel([parameters], False)
    if requested.parts > 1 or requested.n_steps > MOST_STEPS:
        return [whole]
    if requested.tolerance is not None or requested.deadline_ms is not None or requested.method == "calibrated":
        if requested.n_steps <= COARSE_STEPS or (requested.tolerance or 0) >= COARSE_TOLERANCE:
            return [whole]  # no coarse request is coarser
        coarse = {name: value for name, value in parameters.items() if name != "method"}
        return [PlannedLevel([{**coarse, "tolerance": str(COARSE_TOLERANCE), "n_steps": COARSE_STEPS}], False), whole]
    parts = 1
    while requested.n_steps >= 2 * parts * LEAST_NODES:
        parts *= 2
    if parts == 1:
        return [whole]
    levels = [[(0, parts), (parts // 2, parts)]]
    while parts > 2:
        parts //= 2
        levels.append([(parts // 2, parts)])
    return [
        PlannedLevel(
            [{**parameters, "part": part, "parts": parts} for part, parts in _split(level, requested.n_steps)], True
        )
        for level in levels
    ]


def _split(level: Sequence[tuple[int, int]], n_steps: int) -> list[tuple[int, int]]:
    """Split parts of a level into parts of at most ``MOST_NODES`` nodes."""
    split = []
    for part, parts in level:
        pieces = math.ceil(n_steps / parts / MOST_NODES)
        split += [(part + piece * parts, pieces * parts) for piece in range(pieces)]
    return split


@dataclass(frozen=True)
class LevelAnswer:
    """The answer of `integrated_gradients` for n images.

    ``attributions`` is [n, ...]; the others are [n, 1].
    """

    attributions: np.ndarray
    convergence_delta: np.ndarray
    n_steps: np.ndarray
    error_estimate: np.ndarray
    weight_sum: np.ndarray


class LevelAccumulator:
    """Sums the parts of an attribution level by level."""

    def __init__(self) -> None:
        self._parts: LevelAnswer | None = None
        self._steps: np.ndarray | None = None

    def take(self, answers: Sequence[LevelAnswer], level: PlannedLevel, is_last: bool) -> LevelAnswer:
        """Add the answers to a level's requests; returns the attribution so far.

        Its ``n_steps`` counts the steps of all levels so far.
        """
        spent = reduce(np.add, [answer.n_steps for answer in answers])
        self._steps = steps = spent if self._steps is None else self._steps + spent
        if not level.is_part:
            (answer,) = answers
            return replace(answer, n_steps=steps)
        if self._parts is None:  # the first level: the pieces of one part, then as many of another
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
        if is_last:  # not divided by its weights: those of Captum's trapezoid add up to less than 1
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
    """The sum of attributions minus the whole change of the output, [n, 1].

    The delta of a part subtracts its weights' share of that change, and all weights may add up to less than 1.
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
