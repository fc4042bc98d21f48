"""An attribution by regions: sums over superpixels, the strongest of them, and how they are drawn."""

from __future__ import annotations

import io

import numpy as np
import pytest
from evidence_regions import SHARE, Regions, superpixels
from heatmap_drawing import draw_heatmap
from heatmap_parameters import parse_parameters
from PIL import Image

from tools.shapes.dataset import draw_view

RNG = np.random.default_rng(0)
# Three bands of one colour each, 4 / 7, 2 / 7 and 1 / 7 of an image.
IMAGE = np.zeros((112, 112, 3), np.uint8)
IMAGE[:, 64:96], IMAGE[:, 96:] = (250, 20, 20), (250, 250, 250)


def evidence(left: float, middle: float, right: float) -> np.ndarray:
    """Each band's evidence, spread evenly, but not where the segmentation's smoothing mixes the bands."""
    values = np.zeros((112, 112), np.float32)
    for columns, value in ((slice(0, 60), left), (slice(68, 92), middle), (slice(100, 112), right)):
        values[:, columns] = value / values[:, columns].size
    return values


def drawn(relevance: np.ndarray, image: np.ndarray = IMAGE, polarity: str = "positive") -> np.ndarray:
    file = draw_heatmap(image, relevance, parse_parameters({"overlay": "regions", "polarity": polarity}))
    return np.asarray(Image.open(io.BytesIO(file)))


def shown(relevance: np.ndarray) -> list[bool]:
    """Whether each band is as in the image, away from outlines; the faded bands have no colours or less contrast."""
    picture = drawn(relevance)
    return [bool((picture[50, column] == IMAGE[50, column]).all()) for column in (30, 80, 104)]


@pytest.mark.parametrize("seed", range(3))
def test_a_regions_evidence_is_the_sum_over_its_superpixel(seed: int) -> None:
    image = draw_view("test", seed).image
    relevance = np.random.default_rng(seed).normal(size=image.shape[:2]).astype(np.float32)
    regions = Regions.of(image, relevance)
    assert len(regions.sums) > 3
    np.testing.assert_array_equal(regions.labels, superpixels(image))
    for number, (total, pixels) in enumerate(zip(regions.sums, regions.pixels)):
        inside = relevance[regions.labels == number].astype(np.float64)
        assert pixels == len(inside)
        assert total == pytest.approx(inside.sum(), rel=1e-9, abs=1e-9)
    assert regions.sums.sum() == pytest.approx(relevance.sum(dtype=np.float64), rel=1e-6)
    np.testing.assert_allclose(regions.density, (regions.sums / regions.pixels)[regions.labels])


def test_superpixels_follow_the_edges_of_the_image() -> None:
    labels = superpixels(IMAGE)
    bands = [np.unique(labels[:, columns]).tolist() for columns in (slice(0, 62), slice(66, 94), slice(98, 112))]
    assert [len(band) for band in bands] == [1, 1, 1]
    assert bands[0] != bands[1] != bands[2] != bands[0]


def test_the_strongest_regions_are_the_fewest_pixels_with_half_of_the_evidence() -> None:
    assert shown(evidence(3, 2, 2)) == [False, True, True]  # 4 of 7; the left band has most, but on many more pixels
    assert shown(evidence(1, 1, 5)) == [False, False, True]
    assert shown(evidence(6, 2, 2)) == [True, False, True]  # denser regions come first, whatever they hold
    assert shown(evidence(-9, 1, -3)) == [False, True, False]


@pytest.mark.parametrize("seed", range(5))
def test_regions_are_chosen_best_first_until_half_of_the_evidence_is_covered(seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 40, (30, 30))
    labels = np.unique(labels, return_inverse=True)[1].reshape(30, 30)
    relevance = np.random.default_rng(seed).normal(size=(30, 30))
    sums, pixels = np.bincount(labels.ravel(), relevance.ravel()), np.bincount(labels.ravel())
    regions = Regions(labels, sums, pixels)
    chosen = regions.strongest("positive") > 0
    numbers = set(labels[chosen])
    density = sums / pixels
    left_out = [number for number in range(len(sums)) if number not in numbers]
    assert min(density[list(numbers)]) > max(density[left_out])
    half = SHARE * sums[sums > 0].sum()
    assert sum(sums[list(numbers)]) >= half > sum(sums[list(numbers)]) - sums[min(numbers, key=lambda n: density[n])]


@pytest.mark.parametrize(
    ("polarity", "chosen"),
    [
        ("positive", [0, 0, 1]),
        ("negative", [0, -1, 0]),
        ("absolute", [0, -1, 1]),
        ("all", [0, -1, 1]),
    ],
)
def test_polarity_chooses_which_sums_are_evidence(polarity: str, chosen: list[int]) -> None:
    strongest = Regions.of(IMAGE, evidence(1, -3, 3)).strongest(polarity)
    assert strongest.dtype == np.int8
    assert [int(strongest[50, column]) for column in (30, 80, 104)] == chosen


def test_all_evidence_is_red_and_blue() -> None:
    picture = drawn(evidence(1, -3, 3), polarity="all").astype(int)
    assert picture[50, 104, 0] > picture[50, 104, 2] + 40
    assert picture[50, 80, 2] > IMAGE[50, 80, 2] + 50
    assert picture[50, 80, 0] < IMAGE[50, 80, 0]
    assert drawn(evidence(1, -3, 3), polarity="absolute")[50, 80].tolist() == IMAGE[50, 80].tolist()


def test_regions_have_a_white_outline_outside_of_them() -> None:
    picture = drawn(evidence(0, 1, 0))
    np.testing.assert_array_equal(picture[:, 66:94], IMAGE[:, 66:94])
    is_outline = (picture == 255).all(axis=2)
    assert is_outline[:, 56:68].sum(axis=1).tolist() == is_outline[:, 92:104].sum(axis=1).tolist() == [1] * 112


def test_the_rest_is_grey_whatever_its_colour() -> None:
    picture = drawn(evidence(0, 0, 1))[50, [30, 80]].astype(int)
    assert (np.ptp(picture, axis=1) == 0).all()
    assert 40 < picture.min() < picture.max() < 160


@pytest.mark.parametrize("polarity", ["positive", "negative", "absolute", "all"])
def test_without_evidence_nothing_is_chosen(polarity: str) -> None:
    none = {"positive": evidence(-1, -1, -1), "negative": evidence(1, 1, 1)}.get(polarity, evidence(0, 0, 0))
    assert not Regions.of(IMAGE, none).strongest(polarity).any()
    picture = drawn(none, polarity=polarity).astype(int)
    assert np.ptp(picture, axis=2).max() == 0  # grey
    assert picture.max() < 160  # faded, without an outline


def test_an_image_of_one_colour_is_one_region() -> None:
    plain = np.full((112, 112, 3), 90, np.uint8)
    np.testing.assert_array_equal(drawn(evidence(1, 0, 0), plain), plain)
    assert drawn(evidence(-1, 0, 0), plain).max() < 100


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (28, 28), (128, 160), (384, 384), (700, 300)], ids=str)
@pytest.mark.parametrize("polarity", ["positive", "all"])
def test_pictures_of_any_size_and_content_are_drawn(size: tuple[int, int], polarity: str) -> None:
    image = RNG.integers(0, 256, (*size, 3), np.uint8)
    relevance = RNG.normal(size=size).astype(np.float32) * 1e30
    assert drawn(relevance, image, polarity=polarity).shape == (*size, 3)
    assert np.array_equal(np.unique(superpixels(image)), np.arange(superpixels(image).max() + 1))


def test_large_images_are_reduced_to_be_segmented() -> None:
    large = np.asarray(Image.fromarray(IMAGE).resize((448, 448), Image.Resampling.NEAREST))
    labels = superpixels(large, 112 * 112)
    np.testing.assert_array_equal(labels, superpixels(IMAGE).repeat(4, axis=0).repeat(4, axis=1))
    relevance = np.ones((448, 448), np.float32)
    assert draw_heatmap(large, relevance, parse_parameters({"overlay": "regions"}), 64)
    assert len(np.unique(superpixels(RNG.integers(0, 256, (448, 448, 3), np.uint8), 4))) <= 4
