"""Rules that refine themselves, on integrands whose integral is known."""

import math
from dataclasses import replace

import pytest
import torch
from error_law import ERROR_CORRELATION, PLANNING_RESERVE, TYPICAL_LAW, ErrorLaw
from path_quadrature import even_bounds
from path_rules import AdaptiveTrapezoidRule
from richardson_rule import SINGLE_STEP_MARGIN, RichardsonRule

CPU = torch.device("cpu")
LAW = ErrorLaw(scale=1.0, order=1.5, margin=1.4)


def walk(rule, integrand, chunk=4):
    """Integrate; returns the integral and all nodes."""
    nodes = []
    while True:
        for first in range(0, len(rule.nodes), chunk):
            rows = slice(first, min(first + chunk, len(rule.nodes)))
            rule.add(rows, integrand(rule.nodes[rows]))
        nodes += rule.nodes.tolist()
        difference = rule.complete_stage()
        if not rule.refine((difference.norm() / rule.gradient.norm()).item(), 0.0):
            return rule.gradient[0], nodes


def walk_richardson(rule, error=1.0, chunk=5, affordable=math.inf, order=LAW.order):
    """Integrate (1, 0, ...) with mean gradients that make n steps miss by error * n**-order.

    Part of the error is the same for every number of steps, part one's own.
    """

    while True:
        steps = len(rule.nodes) - 1
        for first in range(0, steps, chunk):
            ends = rule.nodes[first : min(first + chunk, steps) + 1]
            missed = error * ends.diff().abs() ** order
            gradients = torch.zeros(len(missed), 402, dtype=torch.float64)
            gradients[:, 0], gradients[:, 1] = 1, math.sqrt(ERROR_CORRELATION) * missed
            own = 2 + (1 / ends.diff().abs()).round().long() % 400
            gradients[torch.arange(len(missed)), own] = math.sqrt(1 - ERROR_CORRELATION) * missed
            rule.add(slice(first, first + len(gradients)), gradients)
        difference = rule.complete_stage()
        if not rule.refine((difference.norm() / rule.gradient[0, 0]).item(), 0.0, affordable):
            return rule


def smooth(nodes):
    return torch.stack([nodes.exp(), nodes**2, torch.ones_like(nodes)], dim=1)


def jumps(nodes):
    places = torch.tensor([0.11, 0.117, 0.13, 0.152, 0.7], dtype=torch.float64)
    return (nodes[:, None] > places).double()


@pytest.mark.parametrize("tolerance", [0.3, 0.01, 0.001])
def test_integral_is_within_the_tolerance_and_no_node_is_used_twice(tolerance):
    rule = AdaptiveTrapezoidRule(tolerance, 1000, math.inf, CPU)
    integral, nodes = walk(rule, smooth)
    exact = torch.tensor([math.e - 1, 1 / 3, 1.0], dtype=torch.float64)
    assert (integral - exact).norm() <= tolerance * exact.norm()
    assert len(set(nodes)) == len(nodes) == rule.n_steps


def test_weights_add_up_to_one_whatever_is_refined():
    integral, _ = walk(AdaptiveTrapezoidRule(0.01, 100, math.inf, CPU), jumps)
    assert torch.all((integral > 0) & (integral < 1))
    constant, _ = walk(
        AdaptiveTrapezoidRule(0.01, 100, math.inf, CPU), lambda nodes: torch.ones(len(nodes), 2, dtype=torch.float64)
    )
    torch.testing.assert_close(constant, torch.ones(2, dtype=torch.float64))


def test_total_is_the_trapezoid_sum_over_all_nodes():
    integral, nodes = walk(AdaptiveTrapezoidRule(0.02, 200, math.inf, CPU), jumps)
    nodes = torch.tensor(sorted(nodes), dtype=torch.float64)
    torch.testing.assert_close(integral, torch.trapezoid(jumps(nodes), nodes, dim=0))


def test_steps_go_where_the_integrand_changes():
    places = torch.linspace(0.02, 0.15, 8, dtype=torch.float64)
    _, nodes = walk(AdaptiveTrapezoidRule(0.001, 60, math.inf, CPU), lambda nodes: (nodes[:, None] > places).double())
    # All of it changes in the first sixth of the path.
    assert sum(node < 1 / 6 for node in nodes) > 0.5 * len(nodes)


def test_steps_never_exceed_the_limit():
    for n_steps in (3, 4, 7, 20, 33):
        rule = AdaptiveTrapezoidRule(0.001, n_steps, math.inf, CPU)
        _, nodes = walk(rule, jumps)
        assert len(nodes) == rule.n_steps <= n_steps


def test_nothing_to_explain_ends_at_once():
    rule = AdaptiveTrapezoidRule(0.01, 50, math.inf, CPU)
    rule.add(slice(0, 7), torch.zeros(7, 3))
    assert not rule.complete_stage().any()
    assert not rule.refine(0.0, 0.0)
    assert rule.error_estimate == 0


@pytest.mark.parametrize("error", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("tolerance", [0.2, 0.05, 0.01])
def test_richardson_comes_within_the_tolerance_and_estimates_its_error(tolerance, error):
    rule = walk_richardson(RichardsonRule(even_bounds, LAW, tolerance, 1000, math.inf, CPU), error)
    assert rule.gradient[0, 0] == pytest.approx(1)
    missed = rule.gradient[0, 1:].norm().item()
    assert missed <= rule.error_estimate <= tolerance
    # The estimate is of the error before part of it is corrected, with its margin.
    margin = LAW.margin * (SINGLE_STEP_MARGIN if rule._coarse_steps == 1 else 1)
    expected = error * rule._counts[-1] ** -LAW.order
    assert missed < 1.05 * expected
    assert rule.error_estimate == pytest.approx(margin * expected)


def test_richardson_plans_its_steps_by_what_error_is_expected():
    steps = [
        len(RichardsonRule(even_bounds, replace(LAW, scale=scale), 0.02, 1000, math.inf, CPU).nodes)
        for scale in (0.5, 1.0, 2.0)
    ]
    assert steps == sorted(set(steps))
    # An image that is as expected takes the first stage alone: coarse steps and the fine ones that they serve.
    expected = math.ceil((PLANNING_RESERVE * LAW.margin * LAW.scale / 0.02) ** (1 / LAW.order))
    rule = walk_richardson(RichardsonRule(even_bounds, LAW, 0.02, 1000, math.inf, CPU), error=1.0)
    assert rule.n_steps == expected + round(expected / 4)


@pytest.mark.parametrize("n_steps", [3, 4, 5, 7, 12, 31, 50])
def test_richardson_never_spends_more_than_its_limit(n_steps):
    for tolerance in (None, 0.3, 0.001):
        rule = walk_richardson(RichardsonRule(even_bounds, LAW, tolerance, n_steps, math.inf, CPU), error=3.0)
        assert 3 <= rule.n_steps <= n_steps
        assert rule.error_estimate > 0.001


@pytest.mark.parametrize("n_steps", [3, 22, 50, 60, 61, 75, 200])
def test_richardson_without_a_calibration_keeps_its_limit_and_a_deadline_that_shrinks(n_steps):
    for affordable in (math.inf, 0, 15, 40):
        rule = walk_richardson(
            RichardsonRule(None, TYPICAL_LAW, 0.001, n_steps, math.inf, CPU), 3.0, affordable=affordable
        )
        assert 3 <= rule.n_steps <= n_steps
        assert 0.001 < rule.error_estimate < math.inf


def test_richardson_ends_where_nothing_changes_and_where_gradients_are_no_numbers():
    for value, estimate in ((0.0, 0.0), (math.nan, math.nan)):
        rule = RichardsonRule(None, TYPICAL_LAW, 0.01, 500, math.inf, CPU)
        steps = len(rule.nodes) - 1
        rule.add(slice(0, steps), torch.full((steps, 2), value))
        rule.complete_stage()
        assert not rule.refine(value, 0.0)
        assert rule.error_estimate == pytest.approx(estimate, nan_ok=True)


def test_richardson_spends_what_it_can_afford_and_at_least_three_steps():
    counts = [
        walk_richardson(RichardsonRule(even_bounds, LAW, None, 1000, affordable, CPU), affordable=0).n_steps
        for affordable in (-5, 0, 3, 10, 30)
    ]
    assert counts[:3] == [3, 3, 3]
    assert 8 <= counts[3] <= 10
    assert 25 <= counts[4] <= 30
    rule = RichardsonRule(even_bounds, LAW, None, 1000, 10, CPU)
    assert walk_richardson(rule, affordable=20).n_steps <= 10 + 20 * 5


def test_each_way_of_richardson_weighs_its_own_length():
    rule = RichardsonRule(lambda n_steps: even_bounds(n_steps) ** 2, LAW, None, 1000, 15, CPU)
    means = (rule.nodes[1:] + rule.nodes[:-1]) / 2  # of the gradient x, between two nodes
    rule.add(slice(0, len(means)), means[:, None])
    assert rule.complete_stage().item() == pytest.approx(0, abs=1e-12)
    assert rule.gradient.item() == pytest.approx(0.5)


def test_richardson_makes_do_with_its_coarse_steps():
    rule = RichardsonRule(even_bounds, LAW, None, 1000, 15, CPU)
    coarse = rule._counts[0]
    assert not rule.finish_early(coarse - 1)
    rule.add(slice(0, coarse), torch.ones(coarse, 2).double())
    assert rule.finish_early(coarse)
    torch.testing.assert_close(rule.gradient, torch.ones(1, 2).double())
    assert rule.error_estimate == pytest.approx(LAW.margin / coarse**LAW.order)
    assert rule.n_steps == coarse


@pytest.mark.parametrize("order", [1.25, 1.4, 1.6])
@pytest.mark.parametrize("tolerance", [0.2, 0.05, 0.01])
def test_richardson_without_a_calibration_finds_the_order_and_comes_within_the_tolerance(tolerance, order):
    rule = walk_richardson(RichardsonRule(None, TYPICAL_LAW, tolerance, 1000, math.inf, CPU), 0.8, order=order)
    assert rule.gradient[0, 1:].norm() <= rule.error_estimate <= tolerance
    assert rule._law.order == pytest.approx(order, abs=0.01)
    assert rule.error_estimate == pytest.approx(TYPICAL_LAW.margin * 0.8 * rule._counts[-1] ** -order, rel=0.02)


def test_richardson_without_a_calibration_places_its_steps_where_the_gradients_change():
    rule = RichardsonRule(None, TYPICAL_LAW, 0.001, 60, math.inf, CPU)
    taken = []

    def change(places):
        return torch.stack((torch.ones_like(places), (6 * places).clamp_max(1)), dim=1)

    while True:
        middles = (rule.nodes[1:] + rule.nodes[:-1]) / 2
        taken.append(rule.nodes)
        for first in range(0, len(middles), 4):
            rows = slice(first, min(first + 4, len(middles)))
            rule.add(rows, change(middles[rows]))
        rule.complete_stage()
        if not rule.refine(0.5, 0.0):
            break
    # All of it changes in the first sixth of the path; the first nodes were even, there and back.
    assert taken[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 5 / 6, 2 / 3, 1 / 2, 1 / 3, 1 / 6, 0])
    assert (taken[1] < 0.25).double().mean() > 0.4


def test_adaptive_trapezoid_rule_keeps_the_last_complete_stage():
    rule = AdaptiveTrapezoidRule(None, 1000, math.inf, CPU)
    assert not rule.finish_early(3)
    rule.add(slice(0, 7), jumps(rule.nodes))
    rule.complete_stage()
    assert rule.refine(0.5, 0.5, 10)
    assert len(rule.nodes) <= 10
    complete = rule.gradient.clone()
    rule.add(slice(0, 1), jumps(rule.nodes[:1]))
    assert rule.finish_early(1)
    torch.testing.assert_close(rule.gradient, complete)


@pytest.mark.parametrize(("tolerance", "all_of_the_plan"), [(0.005, True), (0.02, False)])
def test_a_path_that_goes_on_takes_the_planned_steps_as_far_as_both_cost_little_more(tolerance, all_of_the_plan):
    """Though its own estimate asks for fewer: that of a few steps is rough."""
    rule = RichardsonRule(even_bounds, LAW, 0.1, 1000, math.inf, CPU)
    first = len(rule.nodes) - 1
    rule.add(slice(0, first), torch.ones(first, 2).double())
    rule.complete_stage()
    resumed = rule.completed().resumed(tolerance, 1000)
    spent = resumed.n_steps
    assert resumed.refine(1.01 * tolerance / resumed.error_share, 0.0)
    planned = LAW.planned_steps(tolerance)
    room = int(1.15 * 1.25 * planned - spent)
    assert (planned <= room) == all_of_the_plan
    assert len(resumed.nodes) - 1 == min(planned, room)
