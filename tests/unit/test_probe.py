"""What the probe sends, and how it distinguishes an overloaded server from one that hangs."""

import io

import numpy as np
import probe_requests
import pytest
from PIL import Image

from tools.probe import CHAINS, PROBE_ID, SIDE, grey_png, hanging_model


def test_the_models_know_the_probe_by_its_id():
    assert PROBE_ID == probe_requests.PROBE_ID


def test_the_probe_sends_a_picture_of_its_own_each_time():
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(grey_png(pixels.tobytes())))), pixels)


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
