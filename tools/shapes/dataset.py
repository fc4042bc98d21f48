"""Procedurally drawn shapes with ground-truth masks, for training, tests and localisation of the shapes network.

Every image is one filled shape of random colour, size, rotation and place over a textured, coloured background with
distractor lines and blobs. Image ``index`` of a split depends on ``(split, index)`` alone, so any machine draws the
same sets. Lengths are relative to the side, so training can begin with small images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

CLASSES = (
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "diamond",
    "hexagon",
    "crescent",
    "heart",
    "arrow",
    "semicircle",
)
SPLITS = {"train": 0, "validation": 1, "test": 2, "demo": 3, "calibration": 4}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_SUPERSAMPLING = 2


@dataclass(frozen=True)
class Scene:
    """``image`` uint8 [size, size, 3], ``label`` an index into ``CLASSES``, ``mask`` bool [size, size]."""

    image: np.ndarray
    label: int
    mask: np.ndarray


def draw_scene(split: str, index: int, size: int = 224, label: int | None = None) -> Scene:
    """Draw image ``index`` of ``split`` at ``size`` x ``size`` pixels; ``label`` fixes the class, else it is random."""
    random = np.random.default_rng([SPLITS[split], index])
    drawn_label = int(random.integers(len(CLASSES)))
    label = drawn_label if label is None else label

    background = _texture(random, size, contrast=random.uniform(20, 55))
    canvas = Image.fromarray(background)
    _draw_distractors(random, canvas)
    background = np.asarray(canvas, dtype=np.float32)

    coverage = _shape_coverage(random, CLASSES[label], size)
    under = background[coverage > 0.5].mean(axis=0)
    fill = _texture(random, size, contrast=random.uniform(5, 25), colour=_distinct_colour(random, under))
    image = background + coverage[..., None] * (fill - background)

    image = (image - 128) * random.uniform(0.6, 1.15) + 128 + random.uniform(-20, 20)
    image += random.uniform(0, 10) * random.standard_normal(image.shape, dtype=np.float32)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), label, coverage > 0.5)


def draw_view(split: str, index: int, size: int = 224) -> Scene:
    """The central ``size`` x ``size`` pixels of a scene 8/7 as large, which is the crop of `preprocess`."""
    scene = draw_scene(split, index, round(size * 8 / 7))
    margin = (len(scene.mask) - size) // 2
    centre = slice(margin, margin + size)
    return Scene(scene.image[centre, centre], scene.label, scene.mask[centre, centre])


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 3, h, w] to the network's input, float32 channels_last."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def view_pixels(split: str, indices: Iterable[int]) -> torch.Tensor:
    """Views of a split as the network's input, float32 [n, 3, 224, 224]."""
    views = [torch.from_numpy(draw_view(split, index).image.copy()).permute(2, 0, 1) for index in indices]
    return normalise(torch.stack(views)).contiguous()


class ShapesDataset(torch.utils.data.Dataset):
    """``length`` views of a split from ``start`` on, as (uint8 [3, size, size], label, bool mask [1, size, size])."""

    def __init__(self, split: str, start: int, length: int, size: int) -> None:
        self.split, self.start, self.length, self.size = split, start, length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int, torch.Tensor]:
        view = draw_view(self.split, self.start + item, self.size)
        return (
            torch.from_numpy(view.image.copy()).permute(2, 0, 1),
            view.label,
            torch.from_numpy(view.mask.copy())[None],
        )


def _texture(random: np.random.Generator, size: int, contrast: float, colour: np.ndarray | None = None) -> np.ndarray:
    """Smooth colour noise of three scales around a base colour; uint8 [size, size, 3]."""
    colour = random.uniform(30, 225, 3) if colour is None else colour
    total = np.zeros((size, size, 3), np.float32)
    for cells, weight in ((3, 0.6), (9, 0.3), (random.integers(20, 48), 0.25)):
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        resized = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        total += weight * (np.asarray(resized, np.float32) - 127.5)
    return np.clip(colour + contrast / 50 * total, 0, 255).astype(np.uint8)


def _draw_distractors(random: np.random.Generator, canvas: Image.Image) -> None:
    """Translucent irregular blobs and lines, drawn into ``canvas``."""
    size = canvas.width
    layer = Image.new("RGBA", canvas.size)
    draw = ImageDraw.Draw(layer)
    for _ in range(random.integers(2, 7)):
        angles = np.linspace(0, 2 * np.pi, 9, endpoint=False)
        radii = size * random.uniform(0.03, 0.13) * random.uniform(0.5, 1.5, len(angles))
        centre = random.uniform(0, size, 2)
        points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        draw.polygon([tuple(p) for p in points], fill=_random_fill(random))
    layer = layer.filter(ImageFilter.GaussianBlur(size * random.uniform(0.004, 0.02)))
    canvas.paste(layer, mask=layer)
    draw = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(random.integers(2, 9)):
        ends = random.uniform(-0.1 * size, 1.1 * size, 4)
        width = max(1, round(size * random.uniform(0.004, 0.025)))
        draw.line(list(ends), fill=_random_fill(random), width=width)


def _random_fill(random: np.random.Generator) -> tuple[int, int, int, int]:
    red, green, blue = random.integers(0, 256, 3)
    return int(red), int(green), int(blue), int(random.integers(110, 230))


def _distinct_colour(random: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """A colour that stands out from the mean colour ``under`` it."""
    while True:
        colour = random.uniform(0, 255, 3)
        if np.linalg.norm(colour - under) > 110:
            return colour


def _shape_coverage(random: np.random.Generator, name: str, size: int) -> np.ndarray:
    """Anti-aliased coverage of the shape; float32 [size, size] in [0, 1]."""
    radius = random.uniform(0.17, 0.36)
    # A shape may exceed the central 7/8, which `preprocess` crops to, by at most a tenth of its radius.
    centre = random.uniform(1 / 16 + radius * 0.9, 15 / 16 - radius * 0.9, 2)
    angle = random.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    canvas = Image.new("L", (size * _SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    outline, hole = _outlines(random, name)
    for points, value in ((outline, 255), (hole, 0)):
        if points is not None:
            placed = (centre + radius * points @ rotation.T) * size * _SUPERSAMPLING
            draw.polygon([tuple(p) for p in placed], fill=value)
    return np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32) / 255


def _outlines(random: np.random.Generator, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Outline and hole (or None) of a shape as points [n, 2] in a disc of about unit radius."""
    if name == "circle":
        return _ellipse(), None
    if name == "ring":
        return _ellipse(), _ellipse(random.uniform(0.5, 0.7))
    if name == "crescent":
        return _ellipse(), _ellipse(0.85) + np.array([random.uniform(0.42, 0.55), 0])
    if name == "semicircle":
        angles = np.linspace(0, np.pi, 48)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) - [0, 0.4], None
    if name == "heart":
        t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x, -y - 2.5], axis=1) / 16, None
    if name == "diamond":
        return np.array([[0, 1], [random.uniform(0.5, 0.6), 0], [0, -1], [random.uniform(-0.6, -0.5), 0]]), None
    if name == "star":
        inner = random.uniform(0.38, 0.46)
        return _regular(10) * np.tile([1, inner], 5)[:, None], None
    if name == "cross":
        w = random.uniform(0.28, 0.36)
        quarter = np.array([[w, 1], [w, w], [1, w], [1, -w], [w, -w], [w, -1]])
        return np.concatenate([quarter, -quarter]), None
    if name == "arrow":
        w, neck = random.uniform(0.2, 0.28), random.uniform(-0.1, 0.15)
        return np.array([[-1, w], [neck, w], [neck, 0.75], [1, 0], [neck, -0.75], [neck, -w], [-1, -w]]), None
    return _regular({"triangle": 3, "square": 4, "hexagon": 6}[name]), None


def _ellipse(radius: float = 1.0) -> np.ndarray:
    return radius * _regular(72)


def _regular(corners: int) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)
