"""The rule that refines itself, on integrands whose integral is known."""

import math

import pytest
import torch
from path_rules import RefinedRule

CPU = torch.device("cpu")


def walk(rule, integrand, chunk=4):
    """Integrate; returns the integral, all nodes, and what each stage's judge saw."""
    nodes, seen = [], []

    def judge(total, difference):
        seen.append((total.clone(), difference.clone()))
        return (difference.norm() / total.norm()).item(), 0.0

    while True:
        for first in range(0, len(rule.nodes), chunk):
            rows = slice(first, min(first + chunk, len(rule.nodes)))
            rule.add(rows, integrand(rule.nodes[rows]))
        nodes += rule.nodes.tolist()
        if not rule.refine(judge):
            return rule.gradient[0], nodes, seen


def smooth(nodes):
    return torch.stack([nodes.exp(), nodes**2, torch.ones_like(nodes)], dim=1)


def jumps(nodes):
    places = torch.tensor([0.11, 0.117, 0.13, 0.152, 0.7], dtype=torch.float64)
    return (nodes[:, None] > places).double()


@pytest.mark.parametrize("tolerance", [0.3, 0.01, 0.001])
def test_integral_is_within_the_tolerance_and_no_node_is_used_twice(tolerance):
    rule = RefinedRule(tolerance, 1000, CPU)
    integral, nodes, _ = walk(rule, smooth)
    exact = torch.tensor([math.e - 1, 1 / 3, 1.0], dtype=torch.float64)
    assert (integral - exact).norm() <= tolerance * exact.norm()
    assert len(set(nodes)) == len(nodes) == rule.n_steps


def test_weights_add_up_to_one_whatever_is_refined():
    integral, _, _ = walk(RefinedRule(0.01, 100, CPU), jumps)
    assert torch.all((integral > 0) & (integral < 1))
    constant, _, _ = walk(RefinedRule(0.01, 100, CPU), lambda nodes: torch.ones(len(nodes), 2, dtype=torch.float64))
    torch.testing.assert_close(constant, torch.ones(2, dtype=torch.float64))


def test_total_is_the_trapezoid_sum_over_all_nodes():
    integral, nodes, _ = walk(RefinedRule(0.02, 200, CPU), jumps)
    nodes = torch.tensor(sorted(nodes), dtype=torch.float64)
    torch.testing.assert_close(integral, torch.trapezoid(jumps(nodes), nodes, dim=0))


def test_steps_go_where_the_integrand_changes():
    places = torch.linspace(0.02, 0.15, 8, dtype=torch.float64)
    _, nodes, _ = walk(RefinedRule(0.001, 60, CPU), lambda nodes: (nodes[:, None] > places).double())
    # All of it changes in the first sixth of the path.
    assert sum(node < 1 / 6 for node in nodes) > 0.5 * len(nodes)


def test_steps_never_exceed_the_limit():
    for n_steps in (3, 4, 7, 20, 33):
        rule = RefinedRule(0.001, n_steps, CPU)
        _, nodes, _ = walk(rule, jumps)
        assert len(nodes) == rule.n_steps <= n_steps


def test_nothing_to_explain_ends_at_once():
    rule = RefinedRule(0.01, 50, CPU)
    rule.add(slice(0, 7), torch.zeros(7, 3))
    assert not rule.refine(lambda total, difference: (0.0, 0.0))
    assert rule.error_estimate == 0
