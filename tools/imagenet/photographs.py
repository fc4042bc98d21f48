"""Photographs under free licences from installed packages, and crops of them for calibration and evaluation.

The repository has no copy of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from classifier_files import Preprocessing
from image_decoding import MODES, to_pixels
from PIL import Image, ImageOps
from torch import Tensor

# Least share of a photograph's area in a crop, and largest ratio of a crop's sides.
LEAST_AREA, WIDEST = 0.25, 4 / 3


@dataclass(frozen=True)
class Photograph:
    """A file ``path`` in the package ``package``; ``expected`` are class names that fit it."""

    name: str
    package: str
    path: str
    licence: str
    expected: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """Path of the file.

        Raises:
            FileNotFoundError: the package is not installed, or has no such file.
        """
        spec = find_spec(self.package)
        folders = (spec.submodule_search_locations if spec else None) or []
        file = next((Path(folder) / self.path for folder in folders), None)
        if file is None or not file.is_file():
            raise FileNotFoundError(f"{self.path} of the package {self.package} is not installed")
        return file


def _scikit_image(name: str, licence: str, expected: tuple[str, ...] = ()) -> Photograph:
    return Photograph(name.split(".")[0], "skimage", f"data/{name}", licence, expected)


# Licences are from the docstrings of skimage.data and README.txt of sklearn/datasets/images.
CHELSEA = _scikit_image("chelsea.png", "CC0, Stefan van der Walt", ("tabby", "tiger cat", "Egyptian cat"))
COFFEE = _scikit_image("coffee.png", "CC0, Rachel Michetti", ("espresso", "cup", "coffee mug"))
ROCKET = _scikit_image("rocket.jpg", "public domain, SpaceX", ("missile", "projectile", "space shuttle"))
ASTRONAUT = _scikit_image("astronaut.png", "public domain, NASA", ("space shuttle",))
MOTORCYCLE = _scikit_image(
    "motorcycle_left.png", "Middlebury 2014 stereo benchmark, D. Scharstein et al.", ("moped", "motor scooter")
)
CAMERA = _scikit_image("camera.png", "CC0, Lav Varshney", ("tripod", "reflex camera"))
CHINA = Photograph(
    "china", "sklearn", "datasets/images/china.jpg", "CC BY 2.0, danielbuechele", ("palace", "monastery")
)
FLOWER = Photograph("flower", "sklearn", "datasets/images/flower.jpg", "CC BY 2.0, vultilion", ("daisy",))
GRACE_HOPPER = Photograph(
    "grace_hopper",
    "matplotlib",
    "mpl-data/sample_data/grace_hopper.jpg",
    "public domain, US Navy",
    ("military uniform", "suit", "Windsor tie"),
)

DEMO = (CHELSEA, COFFEE, ROCKET, MOTORCYCLE, CHINA, FLOWER, CAMERA, GRACE_HOPPER)
# For calibration, and for evaluation. No photograph is in both.
CALIBRATION = (
    MOTORCYCLE,
    CAMERA,
    _scikit_image("coins.png", "public domain"),
    _scikit_image("hubble_deep_field.jpg", "public domain, NASA"),
    _scikit_image("retina.jpg", "CC0, Mikael Häggström"),
    _scikit_image("horse.png", "CC0, Andreas Preuss"),
    _scikit_image("gravel.png", "CC0, CC0Textures"),
    _scikit_image("brick.png", "CC0, CC0Textures"),
    _scikit_image("ihc.png", "public domain"),
)
HELD_OUT = (CHELSEA, COFFEE, ROCKET, ASTRONAUT, CHINA, FLOWER, GRACE_HOPPER)


def crops(photographs: Sequence[Photograph], count: int) -> Iterator[tuple[str, Image.Image]]:
    """Names and RGB images: each photograph whole, then random crops of each in turn, every other one mirrored.

    They depend on the arguments only.
    """
    opened = []
    for photograph in photographs:
        with Image.open(photograph.file) as image:
            opened.append((photograph.name, image.convert("RGB")))
    generator = np.random.default_rng(0)
    for index in range(count):
        name, image = opened[index % len(opened)]
        number = index // len(opened)
        if number > 0:
            image = _crop(image, generator)
        if number % 2:
            image = ImageOps.mirror(image)
        yield f"{name}_{number}", image


def view(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """The network's input for an RGB image, float32 [channels, height, width], as `preprocess` makes it."""
    return to_pixels(image.convert(MODES[preprocessing.channels]), preprocessing)


def _crop(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A part of random size, shape and place."""
    area = generator.uniform(LEAST_AREA, 1.0) * image.width * image.height
    ratio = WIDEST ** generator.uniform(-1, 1)
    width = min(image.width, round((area * ratio) ** 0.5))
    height = min(image.height, round((area / ratio) ** 0.5))
    left = int(generator.integers(image.width - width + 1))
    top = int(generator.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))
