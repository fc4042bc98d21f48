"""The heatmap's drawing and its parameters."""

import io

import numpy as np
import pytest
from heatmap_drawing import draw_heatmap
from heatmap_parameters import parse_parameters
from PIL import Image
from request_parameters import ParameterError

IMAGE = np.full((224, 224, 3), 128, np.uint8)
RELEVANCE = np.zeros((224, 224), np.float32)
RELEVANCE[40:80, 40:80] = 1
RELEVANCE[140:180, 140:180] = -1
FOR, AGAINST, NEUTRAL = (60, 60), (160, 160), (110, 20)


def draw(relevance=RELEVANCE, **parameters):
    file = draw_heatmap(IMAGE, relevance, parse_parameters(parameters))
    return np.asarray(Image.open(io.BytesIO(file)))


def differs(picture, place, from_place=NEUTRAL):
    return np.abs(picture[place].astype(int) - picture[from_place].astype(int)).max() > 50


def test_default_shows_evidence_for_the_class_only():
    picture = draw()
    assert picture.shape == (224, 224, 3)
    assert differs(picture, FOR)
    np.testing.assert_array_equal(picture[AGAINST], IMAGE[AGAINST])


@pytest.mark.parametrize(
    ("polarity", "shows_for", "shows_against"),
    [("positive", True, False), ("negative", False, True), ("absolute", True, True), ("all", True, True)],
)
def test_polarity_chooses_the_evidence(polarity, shows_for, shows_against):
    picture = draw(polarity=polarity, overlay="heatmap")
    assert differs(picture, FOR) == shows_for
    assert differs(picture, AGAINST) == shows_against


def test_all_evidence_has_two_colours():
    picture = draw(polarity="all").astype(int)
    assert picture[FOR][0] > picture[FOR][2]  # red: for the class
    assert picture[AGAINST][0] < picture[AGAINST][2]  # blue: against it


def test_masked_overlay_keeps_the_image_where_the_evidence_is():
    picture = draw(overlay="masked")
    np.testing.assert_array_equal(picture[FOR], IMAGE[FOR])
    np.testing.assert_array_equal(picture[NEUTRAL], 0)


def test_one_bright_pixel_does_not_darken_the_rest():
    spiked = RELEVANCE.copy()
    spiked[10, 10] = 1000
    assert differs(draw(spiked), FOR)
    assert not differs(draw(spiked, clip_percentile=100), FOR)


def test_no_evidence_draws_the_grey_image():
    for polarity in ("positive", "all"):
        np.testing.assert_array_equal(draw(np.zeros((224, 224), np.float32), polarity=polarity), IMAGE)


def test_unknown_colormap_is_refused_by_name():
    with pytest.raises(ParameterError, match="'colormap' must be one of auto, inferno"):
        parse_parameters({"colormap": "jet"})
