"""The heatmap's drawing and its parameters."""

import io

import numpy as np
import pytest
from classifier_files import Preprocessing
from heatmap_drawing import draw_heatmap, pictures
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


@pytest.mark.parametrize("overlay", ["blend", "heatmap", "masked"])
@pytest.mark.parametrize("polarity", ["positive", "all"])
@pytest.mark.parametrize("size", [(28, 28), (128, 160), (384, 384)], ids=str)
def test_a_heatmap_is_as_large_as_its_image(size, polarity, overlay):
    relevance = np.random.default_rng(0).normal(size=size).astype(np.float32)
    parameters = parse_parameters({"polarity": polarity, "overlay": overlay})
    file = draw_heatmap(np.zeros((*size, 3), np.uint8), relevance, parameters)
    assert np.asarray(Image.open(io.BytesIO(file))).shape == (*size, 3)


@pytest.mark.parametrize("size", [112, 448])
def test_larger_images_are_smoothed_more(size):
    """The drawing of an image twice as large is nearly the same, at half its size."""

    def drawn(side: int) -> np.ndarray:
        relevance = np.asarray(Image.fromarray(RELEVANCE).resize((side, side), Image.Resampling.NEAREST))
        file = draw_heatmap(np.zeros((side, side, 3), np.uint8), relevance, parse_parameters({"overlay": "heatmap"}))
        return np.asarray(Image.open(io.BytesIO(file)).resize((112, 112), Image.Resampling.BOX)).astype(float)

    difference = np.abs(drawn(size) - drawn(224))
    assert difference.mean() < 1
    # Edges are rounded to whole pixels.
    assert difference.max() < 60


@pytest.mark.parametrize(("mean", "std"), [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,), (0.25,))], ids=str)
def test_pictures_are_the_images_before_normalisation(mean, std):
    preprocessing = Preprocessing(crop=(5, 7), mean=mean, std=std)
    images = np.random.default_rng(0).integers(0, 256, (2, *preprocessing.input_shape), np.uint8)
    columns = (np.array(values)[:, None, None] for values in (mean, std))
    pixels = ((images / 255 - next(columns)) / next(columns)).astype(np.float32)
    drawn = pictures(pixels, preprocessing)
    assert (drawn.shape, drawn.dtype) == ((2, 5, 7, 3), np.uint8)
    np.testing.assert_array_equal(drawn, np.broadcast_to(images.transpose(0, 2, 3, 1), drawn.shape))


def test_unknown_colormap_is_refused_by_name():
    with pytest.raises(ParameterError, match="'colormap' must be one of auto, inferno"):
        parse_parameters({"colormap": "jet"})
