"""Draws an attribution over the image it belongs to."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from heatmap_parameters import HeatmapParameters
from matplotlib import colormaps
from PIL import Image, ImageFilter

# Attributions flicker from pixel to pixel; a blur of this many pixels shows where they lie. Drawing only.
SMOOTHING_SIGMA = 1.5
# Share of the heat's colour at its strongest, so that the image stays visible beneath.
STRONGEST_BLEND = 0.85
# Light compression: most of a PNG's time is spent here, and the picture is small.
PNG_COMPRESS_LEVEL = 3


def draw_heatmap(image: np.ndarray, relevance: np.ndarray, parameters: HeatmapParameters) -> bytes:
    """Draw one heatmap.

    Args:
        image: uint8 [height, width, 3], what the classifier saw.
        relevance: float32 [height, width], signed: positive speaks for the explained class.

    Returns:
        A PNG file of the same size.
    """
    strength, colour = _heat(relevance, parameters)
    if parameters.overlay == "heatmap":
        drawn = colour
    elif parameters.overlay == "masked":
        drawn = image * strength[..., None]
    else:
        grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None]
        drawn = grey + STRONGEST_BLEND * strength[..., None] * (colour - grey)
    file = io.BytesIO()
    Image.fromarray(drawn.astype(np.uint8)).save(file, "PNG", compress_level=PNG_COMPRESS_LEVEL)
    return file.getvalue()


def _heat(relevance: np.ndarray, parameters: HeatmapParameters) -> tuple[np.ndarray, np.ndarray]:
    """Strength in [0, 1], float32 [height, width], and colour, uint8 [height, width, 3]."""
    positive, negative = np.maximum(relevance, 0), np.maximum(-relevance, 0)
    colormap = parameters.colormap
    if parameters.polarity == "all":
        scale = _robust_maximum(np.abs(relevance), parameters.clip_percentile)
        signed = _smooth(positive / scale) - _smooth(negative / scale)
        signed /= max(np.abs(signed).max(), 1e-12)
        table = _color_table("coolwarm" if colormap == "auto" else colormap)
        return np.abs(signed), table[np.round(127.5 * (signed + 1)).astype(np.uint8)]
    magnitude = {"positive": positive, "negative": negative, "absolute": np.abs(relevance)}[parameters.polarity]
    strength = _smooth(magnitude / _robust_maximum(magnitude, parameters.clip_percentile))
    strength /= max(strength.max(), 1e-12)
    table = _color_table("inferno" if colormap == "auto" else colormap)
    return strength, table[np.round(255 * strength).astype(np.uint8)]


def _robust_maximum(magnitude: np.ndarray, percentile: float) -> float:
    """The value at which the map saturates, so that a few pixels do not darken all others."""
    return max(float(np.percentile(magnitude, percentile)), 1e-12)


def _smooth(magnitude: np.ndarray) -> np.ndarray:
    """Clip to [0, 1] and blur; float32."""
    levels = Image.fromarray(np.round(255 * np.minimum(magnitude, 1)).astype(np.uint8))
    return np.asarray(levels.filter(ImageFilter.GaussianBlur(SMOOTHING_SIGMA)), np.float32) / 255


@lru_cache
def _color_table(name: str) -> np.ndarray:
    """Colours of 256 levels, uint8 [256, 3]."""
    return np.round(255 * colormaps[name](np.arange(256))[:, :3]).astype(np.uint8)
