"""How the probe distinguishes an overloaded server from one that hangs."""

import pytest

from tools.probe import CHAINS, hanging_model


def chain(**changes) -> dict[str, tuple[int, int]]:
    return {name: changes.get(name, (5, 0)) for name in CHAINS["explain"]}


@pytest.mark.parametrize(
    ("before", "after", "is_stuck", "hanging"),
    [
        # a request is stuck in a model that makes no progress
        ({}, {"preprocess": (6, 0), "classifier": (6, 0)}, True, "integrated_gradients"),
        # gradients wait and none is computed, whatever waits elsewhere, and whether or not the probe was refused
        (
            {"integrated_gradients": (5, 3)},
            {"preprocess": (9, 4), "integrated_gradients": (5, 4)},
            True,
            "integrated_gradients",
        ),
        ({"integrated_gradients": (5, 3)}, {"integrated_gradients": (5, 4)}, False, "integrated_gradients"),
        # many requests wait, with progress
        ({}, {"preprocess": (9, 40)}, True, None),
        ({"integrated_gradients": (5, 3)}, {"integrated_gradients": (9, 4)}, False, None),
        # all models made progress and nothing waits: the answer was late
        ({}, {name: (6, 0) for name in CHAINS["explain"]}, True, None),
    ],
)
def test_an_overloaded_server_is_distinguished_from_one_that_hangs(before, after, is_stuck, hanging):
    assert hanging_model(chain(**before), chain(**after), is_stuck) == hanging
