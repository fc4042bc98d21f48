"""What is drawn for people: colours in proportion to the evidence, where it belongs on the photograph."""

from __future__ import annotations

import io

import numpy as np
import pytest
from conftest import encode
from PIL import Image

from explain_client.images import View, as_seen, photograph, seen_box, share_cut_away
from explain_client.pictures import (
    AGAINST,
    FOR,
    STRONGEST_OPACITY,
    colour_bar,
    colour_layer,
    evidence,
    framed,
    overlay,
    strength,
)

VIEWS = (View(), View((100, 180), (96, 160), "nearest"), View(50, (80, 80)), View(64, (64, 64)))


def halves(value: float, side: int = 64) -> np.ndarray:
    """Evidence for the class on the left, twice as strong against it on the right."""
    values = np.full((side, side), value, np.float32)
    values[:, side // 2 :] *= -2
    return values


def test_smoothing_keeps_the_sum_and_the_sign():
    saliency = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    saliency[:5] += 3  # at the edge, too
    assert evidence(saliency).sum() == pytest.approx(saliency.sum(), rel=1e-4)
    np.testing.assert_allclose(evidence(-saliency), -evidence(saliency), rtol=1e-5)


def test_strength_grows_with_the_evidence():
    assert strength(halves(3.0)) == pytest.approx(3 * strength(halves(1.0)), rel=1e-5)
    assert strength(np.zeros((8, 8), np.float32)) == 0


def test_opacity_is_proportional_to_the_evidence_up_to_the_scale():
    layer = np.asarray(colour_layer(halves(1.0), 4.0))
    assert tuple(layer[30, 16]) == (*FOR, round(255 * STRONGEST_OPACITY / 4))
    assert tuple(layer[30, 48]) == (*AGAINST, round(255 * STRONGEST_OPACITY / 2))
    assert np.asarray(colour_layer(halves(100.0), 4.0))[..., 3].max() == round(255 * STRONGEST_OPACITY)


@pytest.mark.parametrize(
    ("polarity", "left", "right"),
    [("all", 1, 2), ("absolute", 1, 2), ("positive", 1, 0), ("negative", 0, 2)],
)
def test_polarity_chooses_the_sign_on_one_scale(polarity, left, right):
    opacity = np.asarray(colour_layer(halves(1.0), 4.0, polarity))[..., 3]
    for column, parts in ((16, left), (48, right)):
        assert opacity[30, column] == round(255 * STRONGEST_OPACITY * parts / 4)


def test_no_evidence_has_no_colour():
    assert not np.asarray(colour_layer(np.zeros((8, 8), np.float32), 0.0))[..., 3].any()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (400, 100), (64, 64)])
def test_the_box_is_what_the_classifier_sees(view, size):
    """A photograph whose values are its coordinates shows in the crop where its edges come from."""
    x = np.linspace(0, 255, size[0]).round().astype(np.uint8)
    y = np.linspace(0, 255, size[1]).round().astype(np.uint8)
    grid = np.dstack(
        [np.broadcast_to(x, size[::-1]), np.broadcast_to(y[:, None], size[::-1]), np.full(size[::-1], 255)]
    )
    seen = np.asarray(as_seen(encode(Image.fromarray(grid.astype(np.uint8))), view), float)
    inside = seen[..., 2] > 250  # not the border that is added
    left, top, right, bottom = seen_box(size, view)
    for axis, (start, end) in enumerate(((left, right), (top, bottom))):
        values = seen[..., axis][inside]
        side, tolerance = size[axis], 255 * (1 / size[axis] + 1.5 / min(view.crop))
        assert values.min() == pytest.approx(255 * max(start, 0) / side, abs=tolerance)
        assert values.max() == pytest.approx(255 * min(end, side) / side, abs=tolerance)
    area = (min(right, size[0]) - max(left, 0)) * (min(bottom, size[1]) - max(top, 0))
    assert share_cut_away(size, view) == pytest.approx(1 - area / (size[0] * size[1]), abs=1e-9)


def test_overlay_keeps_the_photographs_resolution_and_colours_the_crop_alone():
    picture = Image.new("RGB", (1200, 400), (120, 120, 120))
    drawn = overlay(picture, colour_layer(halves(1.0), 2.0))
    assert drawn.size == picture.size
    left, _, right, _ = map(round, seen_box(picture.size))
    red, blue = drawn.getpixel((left + 50, 200)), drawn.getpixel((right - 50, 200))
    assert red[0] - red[2] > 30
    assert blue[2] - blue[0] > 60
    outside = drawn.getpixel((100, 200))
    assert len(set(outside)) == 1  # no colour, and darker
    assert outside[0] < 100


def test_the_frame_is_seen_where_something_was_cut_away():
    white = (255, 255, 255)
    grey = Image.new("RGB", (300, 200), (90, 90, 90))
    assert white in [colour for _, colour in framed(grey).getcolors()]
    assert framed(grey, View((64, 96), (64, 96))).getcolors() == [(60000, (90, 90, 90))]  # nothing was


@pytest.mark.parametrize(
    ("polarity", "ends"), [("all", "br"), ("positive", "-r"), ("negative", "b-"), ("absolute", "-p")]
)
def test_colour_bar_goes_from_against_to_for(polarity, ends):
    bar = colour_bar(101, 5, polarity)
    kinds = []
    for at in (0, 100):
        red, green, blue = bar.getpixel((at, 2))
        kinds.append("-" if green > 200 else "b" if blue > 1.5 * red else "r" if red > 1.5 * blue else "p")
    assert "".join(kinds) == ends


def test_a_photograph_is_turned_upright():
    image = Image.new("RGB", (30, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    assert photograph(file.getvalue()).size == (20, 30)
