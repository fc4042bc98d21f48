"""The HTML of one explained image, without its page: pictures, colour bar, captions, predictions."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

from PIL import Image

from explain_client.captions import Caption, Polarity, percent
from explain_client.images import View, seen_box
from explain_client.pictures import AGAINST, EITHER, FOR, LIGHT_OUTSIDE, SATURATION, STRONGEST_OPACITY
from explain_client.results import Prediction

# A photograph in a page has at most this many pixels a side.
LONGEST_SIDE, THUMBNAIL_SIDE, JPEG_QUALITY = 1280, 96, 85


def style(polarity: Polarity) -> str:
    """The colours of ``pictures`` as CSS custom properties."""
    against, nothing, in_favour = _rgba(AGAINST, STRONGEST_OPACITY), "transparent", _rgba(FOR, STRONGEST_OPACITY)
    ramp = {
        "all": (against, nothing, in_favour),
        "positive": (nothing, in_favour),
        "negative": (against, nothing),
        "absolute": (nothing, _rgba(EITHER, STRONGEST_OPACITY)),
    }[polarity]
    return (
        f"--ramp: linear-gradient(to right, {', '.join(ramp)}); --saturation: {SATURATION}; "
        f"--outside: {_rgba((0, 0, 0), 1 - LIGHT_OUTSIDE)};"
    )


def pictures(picture: Image.Image, layer: Image.Image, view: View, words: Caption) -> str:
    """A photograph, and beside it the same photograph under a colour layer, both with the network's crop as a frame.

    The page's script gives the second photograph the first one's data.
    """
    width, height = picture.size
    left, top, right, bottom = seen_box(picture.size, view)
    place = (
        f"left:{100 * left / width:.3f}%;top:{100 * top / height:.3f}%;"
        f"width:{100 * (right - left) / width:.3f}%;height:{100 * (bottom - top) / height:.3f}%"
    )
    shape = f'style="aspect-ratio:{width}/{height};--ratio:{width / height:.4f}"'
    frame = f'<i class="frame" style="{place}"></i>'
    return (
        f'<div class="pictures"><figure><div class="picture" {shape}>'
        f'<img class="photograph" alt="the photograph" src="{jpeg_url(picture, LONGEST_SIDE)}">{frame}</div>'
        "<figcaption>The photograph</figcaption></figure>"
        f'<figure><button class="picture coloured" {shape} title="enlarge">'
        f'<img class="under" alt="{escape(words.question)} {escape(words.in_favour)}: red">'
        f'<img class="layer" alt="" style="{place}" src="{png_url(layer)}">{frame}</button>'
        f"<figcaption>{escape(words.question)}</figcaption></figure></div>"
    )


def colour_bar(words: Caption) -> str:
    """The colour bar with its ends."""
    return (
        f'<div class="legend"><span>{escape(words.against)}</span><i></i><span>{escape(words.in_favour)}</span></div>'
    )


def prediction_bars(predictions: Iterable[Prediction], explained: int, contrast: int | None = None) -> str:
    """A bar for each class; the explained one and the one it is compared with stand out."""
    kinds = {contrast: " contrast", explained: " explained"}
    bars = [
        f'<span class="label{kinds.get(each.index, "")}" title="{escape(each.label)}">{escape(each.label)}</span>'
        f'<span class="track"><i style="width:{100 * each.probability:.1f}%"></i></span>'
        f'<span class="number">{percent(each.probability)}</span>'
        for each in predictions
    ]
    return f'<div class="predictions">{"".join(bars)}</div>'


def jpeg_url(picture: Image.Image, longest: int) -> str:
    """A data URL of a picture that is reduced, if need be, to ``longest`` pixels a side."""
    reduced = picture.copy()
    reduced.thumbnail((longest, longest))
    file = io.BytesIO()
    reduced.save(file, "JPEG", quality=JPEG_QUALITY)
    return _data_url("image/jpeg", file.getvalue())


def png_url(picture: Image.Image) -> str:
    """A data URL of a picture, without loss."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return _data_url("image/png", file.getvalue())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _rgba(colour: tuple[int, int, int], opacity: float) -> str:
    return f"rgb({colour[0]} {colour[1]} {colour[2]} / {opacity:.2f})"
