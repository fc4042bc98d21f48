"""How a stream's explanation is cut into levels and accumulated."""

import math
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from attribution_engine import AttributionEngine
from attribution_job import Job
from conftest import relative_distance, scene_pixels
from stream_levels import MOST_NODES, LevelAccumulator, LevelAnswer, PlannedLevel, plan_stream

from tools.evaluation.measuring import explain


def nodes_of(level: PlannedLevel) -> list[int]:
    """The numbers of the nodes that a level's requests take."""
    nodes = []
    for sent in level.requests:
        taken = list(range(sent["part"], int(sent["n_steps"]), sent["parts"]))
        assert 1 <= len(taken) <= MOST_NODES
        nodes += taken
    return nodes


@pytest.mark.parametrize("n_steps", [8, 9, 20, 50, "50", 200, 1000])
def test_levels_take_every_node_once_and_double(n_steps):
    levels = plan_stream({"n_steps": n_steps, "output": "probability"}).levels
    per_level = [nodes_of(level) for level in levels]
    assert sorted(chain.from_iterable(per_level)) == list(range(int(n_steps)))
    so_far = np.cumsum([len(nodes) for nodes in per_level])
    assert so_far[0] >= 8
    assert all(abs(now - 2 * before) <= 1 for before, now in pairwise(so_far))
    assert all(sent["output"] == "probability" for level in levels for sent in level.requests)


@pytest.mark.parametrize(
    "parameters",
    [
        {"n_steps": 7},
        {"n_steps": "x"},
        {"n_steps": None},
        {"n_steps": 2**63 - 1},
        {"n_steps": math.inf},
        {"n_steps": math.inf, "tolerance": 0.1},
        {"tolerance": "?"},
        {"tolerance": 0.5},
        {"part": 1, "parts": 3},
        {"tolerance": 0.1, "method": "riemann_left"},
    ],
    ids=str,
)
def test_what_has_no_levels_or_cannot_be_read_is_asked_as_it_came(parameters):
    (level,) = plan_stream(parameters).levels
    assert list(level.requests) == [parameters]


@pytest.mark.parametrize(
    ("sent", "milliseconds"),
    [
        (400, 400),
        ("400.5", 400.5),
        (0, math.inf),
        (60_001, math.inf),
        ("nan", math.inf),
        (True, math.inf),
        (None, math.inf),
    ],
    ids=str,
)
def test_a_deadline_that_will_be_refused_is_none(sent, milliseconds):
    assert plan_stream({"deadline_ms": sent}).deadline_ms == milliseconds
    assert plan_stream({}).deadline_ms == math.inf


@pytest.mark.parametrize("parameters", [{"tolerance": 0.05}, {"deadline_ms": 400}, {"method": "calibrated"}], ids=str)
def test_a_rough_one_goes_before_what_finds_its_own_steps(parameters):
    rough, whole = plan_stream({"n_steps": 20, **parameters}).levels
    (sent,) = rough.requests
    assert (sent["tolerance"], sent["n_steps"], "method" in sent) == ("0.5", 3, False)
    assert list(whole.requests) == [{"n_steps": 20, **parameters}]


def answer_to(engine: AttributionEngine, image: torch.Tensor, **options) -> LevelAnswer:
    (explanation,) = explain(engine, [Job(image, torch.zeros_like(image), 4, **options)])
    assert explanation.convergence_delta is not None
    return LevelAnswer(
        explanation.attributions[None].numpy(),
        np.array([[explanation.convergence_delta.item()]]),
        np.array([[explanation.n_steps]]),
        np.array([[explanation.error_estimate]]),
        np.array([[explanation.weight_sum]]),
    )


@pytest.mark.parametrize("method", ["gausslegendre", pytest.param("riemann_trapezoid", marks=pytest.mark.slow)])
def test_levels_add_up_to_the_whole(served_module, method):
    engine = AttributionEngine(served_module)
    image = scene_pixels(0)
    asked = {"n_steps": 16, "method": method}
    whole = answer_to(engine, image, **asked)
    integral = answer_to(engine, image, n_steps=128, method="riemann_middle")
    levels = plan_stream(asked).levels
    accumulator = LevelAccumulator()
    assert len(levels) == 2
    for level in levels:
        answers = [answer_to(engine, image, **sent) for sent in level.requests]
        last = accumulator.take(answers, level, level is levels[-1])
        error = relative_distance(last.attributions, integral.attributions)
        # The estimate has the error's order of magnitude and tends to be larger.
        assert 0.5 * error < last.error_estimate[0, 0] < 6 * error
    assert last.n_steps[0, 0] == 16
    assert relative_distance(last.attributions, whole.attributions) <= 1e-5
    assert last.convergence_delta[0, 0] == pytest.approx(whole.convergence_delta[0, 0], abs=1e-4)


def test_steps_of_whole_answers_add_up():
    def answer(value, steps):
        maps = np.full((1, 3, 2, 2), value)
        return LevelAnswer(maps, np.zeros((1, 1)), np.array([[steps]]), np.array([[0.1]]), np.ones((1, 1)))

    accumulator, level = LevelAccumulator(), PlannedLevel([{}], False)
    accumulator.take([answer(1.0, 3)], level, False)
    last = accumulator.take([answer(2.0, 8)], level, True)
    assert last.n_steps[0, 0] == 11
    np.testing.assert_array_equal(last.attributions, 2.0)


@pytest.mark.parametrize("method", ["gausslegendre", "riemann_left", "riemann_trapezoid"])
def test_parts_add_up_to_the_attribution(served_module, method):
    engine = AttributionEngine(served_module)
    image = scene_pixels(2)
    options = {"n_steps": 9, "method": method, "nt_samples": 2, "stdevs": 0.1}
    whole = answer_to(engine, image, **options)
    parts = [answer_to(engine, image, **options, part=part, parts=4) for part in range(4)]
    assert [part.n_steps[0, 0] for part in parts] == [6, 4, 4, 4]
    assert relative_distance(sum(part.attributions for part in parts), whole.attributions) <= 1e-5
    if method == "riemann_trapezoid":  # its weights add up to less than 1
        assert sum(part.weight_sum for part in parts) == pytest.approx(8 / 9)
    else:
        assert sum(part.weight_sum for part in parts) == pytest.approx(1)
        assert sum(part.convergence_delta for part in parts) == pytest.approx(whole.convergence_delta, abs=1e-4)
