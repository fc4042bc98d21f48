"""The baselines that a request can name, against Pillow's, SciPy's and torchvision's view of them."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from path_baselines import BaselineError, Baselines, blur, load_images
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, normalize, to_tensor

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BASELINES = Baselines(MEAN, STD)
NAMES = ("zero", "black", "gray", "white", "blur", "noise")


def pixels(size: int = 64, seed: int = 0) -> Tensor:
    return random(3, size, size, seed=seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_is_shaped_like_its_image_and_is_no_view_of_it(name: str) -> None:
    image = pixels()
    baseline = BASELINES.make(name, image)
    assert (baseline.shape, baseline.dtype) == (image.shape, torch.float32)
    storage = baseline.untyped_storage()
    assert storage.data_ptr() != image.untyped_storage().data_ptr()
    if name in Baselines.CONSTANT:
        assert storage.nbytes() <= 3 * 4  # one colour, for each image that waits


@pytest.mark.parametrize("colour", ["black", "white"])
def test_a_colours_baseline_is_an_image_of_it_normalised(colour: str) -> None:
    expected = normalize(to_tensor(Image.new("RGB", (8, 8), colour)), MEAN, STD)
    torch.testing.assert_close(BASELINES.make(colour, pixels(8)), expected)


def test_gray_lies_midway_between_black_and_white() -> None:
    black, gray, white = (BASELINES.make(name, pixels(8)) for name in ("black", "gray", "white"))
    torch.testing.assert_close(gray, (black + white) / 2)


def test_zero_is_the_mean_colour() -> None:
    baseline = BASELINES.make("zero", pixels(8))
    assert not baseline.any()
    mean_colour = torch.tensor(MEAN).view(3, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(normalize(mean_colour, MEAN, STD), baseline)


@pytest.mark.parametrize("name", Baselines.CONSTANT)
def test_a_constant_baseline_depends_on_the_shape_alone(name: str) -> None:
    assert torch.equal(BASELINES.make(name, pixels(8)), BASELINES.make(name, pixels(8, seed=1), seed=5))
    assert BASELINES.make(name, pixels(8)).unique(dim=2).shape == (3, 8, 1)


@pytest.mark.parametrize(
    ("shape", "sigma", "radius"),
    [
        ((3, 224, 224), 10, 30),
        ((3, 448, 448), 20, 60),
        ((3, 112, 160), 5, 15),
        ((1, 200, 56), 2.5, 8),
    ],
    ids=str,
)
def test_blur_is_a_gaussian_filter_that_grows_with_the_shorter_side(shape, sigma: float, radius: int) -> None:
    image = random(*shape)
    expected = np.stack(
        [gaussian_filter(channel, sigma, mode="mirror", radius=radius) for channel in image.numpy().astype(np.float64)]
    )
    # Sums of 121 products in float32 at most, twice.
    np.testing.assert_allclose(BASELINES.make("blur", image), expected, rtol=0, atol=1e-6)


def test_blur_at_224_is_by_exactly_10_pixels() -> None:
    image = pixels(224)
    assert torch.equal(blur(image), gaussian_blur(image, [61, 61], [10.0, 10.0]))


@pytest.mark.parametrize("size", [*range(1, 40), 97, 128, 299, 384])
def test_blur_takes_any_size(size: int) -> None:
    assert blur(random(1, size, size + 3)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_grey_images_have_baselines_too(name: str) -> None:
    image = random(1, 28, 40)
    assert Baselines((0.5,), (0.25,)).make(name, image).shape == image.shape


def test_a_grey_images_colours_are_those_of_its_normalisation() -> None:
    grey = Baselines((0.5,), (0.25,))
    assert [grey.make(name, random(1, 2, 2))[0, 0, 0].item() for name in ("black", "gray", "white")] == [-2, 0, 2]


def test_blur_keeps_the_colour_of_a_plain_image() -> None:
    colour = torch.tensor([-1.5, 0.25, 2.0]).view(3, 1, 1).expand(3, 64, 64)
    # Weights of the kernel add up to 1 within float32 rounding.
    torch.testing.assert_close(BASELINES.make("blur", colour), colour.contiguous(), rtol=1e-5, atol=0)


def test_blur_hides_what_is_smaller_than_its_kernel() -> None:
    image = torch.zeros(3, 224, 224)
    image[:, 110:114, 110:114] = 1
    # The middle of a Gaussian of sigma 10 holds 16 / (2 pi 100) of what lies there, a quarter of a tenth.
    assert BASELINES.make("blur", image).max() < 0.03


def test_noise_is_standard_normal() -> None:
    noise = BASELINES.make("noise", pixels(224), seed=3)
    # Of 150,528 numbers the mean is off by 0.0026 and the deviation by 0.0018, one standard error; this allows four.
    assert noise.mean().item() == pytest.approx(0, abs=0.0104)
    assert noise.std().item() == pytest.approx(1, abs=0.0073)


def test_noise_is_told_by_its_seed_and_not_by_the_image() -> None:
    first = BASELINES.make("noise", pixels(8), seed=4)
    assert torch.equal(first, BASELINES.make("noise", pixels(8, seed=1), seed=4))
    assert not torch.equal(first, BASELINES.make("noise", pixels(8), seed=5))
    assert torch.equal(BASELINES.make("noise", pixels(8)), BASELINES.make("noise", pixels(8), seed=0))


def test_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    BASELINES.make("noise", pixels(8), seed=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("level", [0, 1, 77, 254, 255])
def test_the_blur_of_one_colour_is_that_colour_without_rounding(level: int) -> None:
    image = normalize(to_tensor(Image.new("RGB", (64, 64), (level, level, level))), MEAN, STD)
    assert torch.equal(blur(image), image)


def test_names_stand_for_baselines_with_keys_where_they_are_the_same_for_every_image() -> None:
    image, images = pixels(), [pixels(seed=1), pixels(seed=2)]
    baselines = Baselines(MEAN, STD, images)
    starts = list(baselines.starts(["black", "blur"], image, 0))
    assert [key for _, key in starts] == ["black", None]
    assert torch.equal(starts[1][0], blur(image))
    own = list(baselines.starts(["images"], image, 0))
    assert [torch.equal(start, each) for (start, _), each in zip(own, images)] == [True, True]
    assert len({key for _, key in own} - {None}) == 2
    assert [baselines.count(names) for names in (["black", "blur"], ["images"])] == [2, 2]


def saved(folder: Path, **changes: Any) -> Path:
    file = folder / "baseline_images.npz"
    content: dict[str, Any] = {"pixels": random(2, 3, 8, 8).numpy(), "model_sha256": "mine", **changes}
    np.savez(file, **content)
    return file


def test_images_of_a_network_are_read_from_their_file(tmp_path: Path) -> None:
    assert torch.equal(load_images(saved(tmp_path), "mine", (3, 8, 8)), random(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model_sha256": "another"}, "belongs to another network (sha256 another...)"),
        ({"pixels": random(9, 3, 8, 8).numpy()}, "has no 1 to 8 images of (3, 8, 8)"),
        ({"pixels": random(0, 3, 8, 8).numpy()}, "has no 1 to 8 images"),
        ({"pixels": random(2, 1, 8, 8).numpy()}, "has no 1 to 8 images"),
        ({"pixels": random(2, 3, 8, 8).double().numpy()}, "has no 1 to 8 images"),
        ({"pixels": np.full((1, 3, 8, 8), np.nan, np.float32)}, "has no 1 to 8 images"),
        ({"pixels": np.float32(1)}, "has no 1 to 8 images"),
        ({"pixels": np.array([None])}, "cannot be read"),
    ],
    ids=["another network", "many", "none", "another shape", "another type", "not finite", "a number", "objects"],
)
def test_files_that_are_no_images_of_this_network_are_refused(tmp_path: Path, content, said: str) -> None:
    with pytest.raises(BaselineError, match=re.escape(said)):
        load_images(saved(tmp_path, **content), "mine", (3, 8, 8))


def test_a_missing_or_broken_file_of_images_is_named(tmp_path: Path) -> None:
    file = tmp_path / "baseline_images.npz"
    with pytest.raises(BaselineError, match=r"this network has no baseline_images.npz; python -m tools.calibrate"):
        load_images(file, "mine", (3, 8, 8))
    array = io.BytesIO()
    np.save(array, np.zeros((1, 3, 8, 8), np.float32))
    for content in (b"", b"PK\x03\x04 cut off", b"nothing of the kind", array.getvalue()):
        file.write_bytes(content)
        with pytest.raises(BaselineError, match="cannot be read"):
            load_images(file, "mine", (3, 8, 8))
