"""Draws explanations for people: colours over the photograph, the network's crop as a frame, a colour bar.

Red speaks for the explained class, blue against it, and the more strongly the less transparent. Where a picture has no
colour the network found nothing either way. The same strength of colour is the same evidence in all pictures that are
drawn on one ``scale``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageEnhance

from explain_client.images import DEFAULT_VIEW, View, seen_box
from explain_client.parameters import Polarity

FloatArray = npt.NDArray[np.float32]

# Attributions of either sign alternate from pixel to pixel. A Gaussian of this share of the map's shorter side (11
# pixels of 224) adds up what lies together, and keeps the sum. Under 0.03 the eye still sees specks, not parts.
SMOOTHING_SHARE = 0.05
# The value of a map that gets the full colour: a percentile, so that a few pixels do not pale all others.
FULL_COLOUR_PERCENTILE = 99.0
FOR, AGAINST, EITHER = (214, 24, 32), (24, 92, 224), (146, 32, 178)
STRONGEST_OPACITY = 0.85
# The photograph under the colours is grey, so that nobody takes its own colours for evidence. Against a light paper it
# keeps this much of its contrast; the part outside the frame keeps this much of its light.
SATURATION, CONTRAST, PAPER, LIGHT_OUTSIDE = 0.0, 0.7, (222, 222, 226), 0.45
FRAME_SHARE = 1 / 160


def evidence(saliency: FloatArray) -> FloatArray:
    """A saliency map, smoothed for the eye: float32 [height, width], of the same sum and unit (logits a pixel)."""
    height, width = saliency.shape
    sigma = SMOOTHING_SHARE * min(height, width)
    smoothed: FloatArray = _blur(height, sigma) @ saliency @ _blur(width, sigma).T
    return smoothed


def strength(saliency: FloatArray) -> float:
    """The strength of a map's evidence, in logits a pixel: the ``scale`` on which its own strongest parts are opaque.

    Strengths of maps of one network can be compared. It depends on no polarity.
    """
    return float(np.percentile(np.abs(evidence(saliency)), FULL_COLOUR_PERCENTILE))


def colour_layer(saliency: FloatArray, scale: float, polarity: Polarity = "all") -> Image.Image:
    """The evidence as colours: RGBA, as large as the map. Opacity is proportional to the evidence, up to ``scale``.

    Args:
        saliency: float32 [height, width], signed.
        scale: the evidence that gets the full colour, in the unit of ``strength``.
        polarity: which sign to show.
    """
    signed = evidence(saliency)
    shown = {
        "all": np.abs(signed),
        "absolute": np.abs(signed),
        "positive": np.maximum(signed, 0),
        "negative": np.maximum(-signed, 0),
    }[polarity]
    opacity = STRONGEST_OPACITY * np.minimum(shown / max(scale, 1e-12), 1)
    layer = np.empty((*signed.shape, 4), np.uint8)
    layer[..., :3] = EITHER if polarity == "absolute" else np.where(signed[..., None] > 0, FOR, AGAINST)
    layer[..., 3] = np.round(255 * opacity)
    return Image.fromarray(layer, "RGBA")


def overlay(picture: Image.Image, layer: Image.Image, view: View = DEFAULT_VIEW) -> Image.Image:
    """A colour layer over its photograph, RGB, at the photograph's own resolution.

    Args:
        picture: RGB, upright: ``images.photograph``.
        layer: from ``colour_layer``.
        view: of the server's classifier: where the layer belongs.
    """
    box = _rounded(seen_box(picture.size, view))
    drawn = ImageEnhance.Color(picture).enhance(SATURATION)
    drawn = Image.blend(Image.new("RGB", picture.size, PAPER), drawn, CONTRAST)
    placed = layer.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
    drawn.paste(placed.convert("RGB"), box[:2], placed.getchannel("A"))
    return framed(drawn, view)


def framed(picture: Image.Image, view: View = DEFAULT_VIEW) -> Image.Image:
    """A photograph with a frame around what the network saw, and darker outside of it."""
    box = _rounded(seen_box(picture.size, view))
    inside = (max(box[0], 0), max(box[1], 0), min(box[2], picture.width), min(box[3], picture.height))
    drawn = ImageEnhance.Brightness(picture).enhance(LIGHT_OUTSIDE)
    drawn.paste(picture.crop(inside), inside[:2])
    if inside == (0, 0, *picture.size):
        return drawn
    pen, width = ImageDraw.Draw(drawn), max(1, round(FRAME_SHARE * max(picture.size) / 2))
    outer = (inside[0], inside[1], inside[2] - 1, inside[3] - 1)
    pen.rectangle(outer, outline="black", width=2 * width)
    pen.rectangle(outer, outline="white", width=width)
    return drawn


def colour_bar(width: int, height: int, polarity: Polarity = "all", background: int = 255) -> Image.Image:
    """The colours from the strongest evidence against the class, through none, to the strongest for it; RGB."""
    ramp = np.linspace(-1, 1, width, dtype=np.float32)
    signed = {"all": ramp, "positive": (ramp + 1) / 2, "negative": (ramp - 1) / 2, "absolute": (ramp + 1) / 2}[polarity]
    colour = np.array(EITHER) if polarity == "absolute" else np.where(signed[:, None] > 0, FOR, AGAINST)
    opacity = STRONGEST_OPACITY * np.abs(signed)[:, None]
    row = np.round(background * (1 - opacity) + colour * opacity).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row, (height, width, 3)).copy())


@lru_cache
def _blur(side: int, sigma: float) -> FloatArray:
    """The matrix [side, side] that spreads each pixel over its neighbours; columns sum to 1: nothing is lost."""
    distance = np.subtract.outer(np.arange(side), np.arange(side)) / sigma
    weights = np.exp(-0.5 * distance**2)
    return np.asarray(weights / weights.sum(0), np.float32)


def _rounded(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    left, top, right, bottom = map(round, box)
    return left, top, right, bottom
