"""The HTML of one explained image, without its page: pictures, colour bar, captions, predictions."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterable
from html import escape
from importlib.resources import files

from PIL import Image

from explain_client.captions import Caption, percent
from explain_client.images import View, seen_box
from explain_client.parameters import Polarity
from explain_client.pictures import AGAINST, CONTRAST, EITHER, FOR, LIGHT_OUTSIDE, PAPER, SATURATION, STRONGEST_OPACITY
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
        f"--contrast: {CONTRAST}; --paper: {_rgba(PAPER, 1)}; "
        f"--outside: {_rgba((0, 0, 0), 1 - LIGHT_OUTSIDE)};"
    )


def photograph_figure(picture: Image.Image, view: View, url: str) -> str:
    """A photograph with the network's crop as a frame; ``url`` has its data."""
    return (
        f'<figure><div class="picture" {_shape(picture)}><img class="photograph" alt="the photograph" src="{url}">'
        f"{_frame(picture, view)}</div><figcaption>The photograph</figcaption></figure>"
    )


def coloured_figure(picture: Image.Image, view: View, words: Caption, layer: Image.Image | None, url: str = "") -> str:
    """The photograph under its colours.

    Args:
        picture: the photograph.
        view: of the server's classifier.
        words: its caption.
        layer: from ``pictures.colour_layer``; None: there are no colours yet.
        url: data of the photograph; without it the page's script takes that of ``photograph_figure``.
    """
    alternative = f"{words.question} Red {words.in_favour}, blue {words.against}"
    source = f' src="{url}"' if url else ""
    colours = f'<img class="layer" alt="" style="{_place(picture, view)}" src="{png_url(layer)}">' if layer else ""
    return (
        f'<figure><button class="picture coloured" {_shape(picture)} title="enlarge">'
        f'<img class="under" alt="{escape(alternative)}"{source}>{colours}{_frame(picture, view)}</button>'
        f"<figcaption>{escape(words.question)}</figcaption></figure>"
    )


def regions_figure(heatmap: bytes, caption: str) -> str:
    """The server's picture of regions, a PNG file, on a line of its own."""
    image = f'<img alt="{escape(caption)}" src="{_data_url("image/png", heatmap)}">'
    return f'<div class="regions"><figure>{image}<figcaption>{escape(caption)}</figcaption></figure></div>'


def colour_bar(words: Caption) -> str:
    """The colour bar with its ends."""
    return (
        f'<div class="legend"><span>{escape(words.against)}</span><i></i><span>{escape(words.in_favour)}</span></div>'
    )


def prediction_bars(predictions: Iterable[Prediction], explained: Collection[int], contrast: int | None = None) -> str:
    """A bar for each class; the explained ones and the one they are compared with stand out."""
    kinds: dict[int | None, str] = {contrast: " contrast"}
    kinds |= dict.fromkeys(explained, " explained")
    bars = [
        f'<span class="label{kinds.get(each.index, "")}" title="{escape(each.label)}">{escape(each.label)}</span>'
        f'<span class="track"><i style="width:{100 * each.probability:.1f}%"></i></span>'
        f'<span class="number">{percent(each.probability)}</span>'
        for each in predictions
    ]
    return f'<div class="predictions">{"".join(bars)}</div>'


def answer(words: Caption) -> str:
    """The prediction."""
    return f'<p class="answer">The network says <b>{escape(words.prediction)}</b> sure</p>'


def strength_meter(text: str) -> str:
    """The strength beside the run; the meter's length is the CSS property ``--strength``."""
    return f'<p class="strength"><i class="meter"><i></i></i><span>{text}</span></p>'


def warning(words: Caption) -> str:
    """The warning, if there is one."""
    return f'<p class="warning">{escape(words.warning)}.</p>' if words.warning else ""


def facts(parts: Iterable[str]) -> str:
    """A line of facts, each HTML."""
    return f'<p class="facts">{" · ".join(parts)}</p>'


def duration(milliseconds: float) -> str:
    """A time in words."""
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"


def stylesheet() -> str:
    """The CSS of cards; the colours are in ``style``."""
    return files("explain_client").joinpath("card.css").read_text("utf-8")


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


def _shape(picture: Image.Image) -> str:
    width, height = picture.size
    return f'style="aspect-ratio:{width}/{height};--ratio:{width / height:.4f}"'


def _place(picture: Image.Image, view: View) -> str:
    """Where the network's crop lies on the photograph, as CSS."""
    (width, height), (left, top, right, bottom) = picture.size, seen_box(picture.size, view)
    return (
        f"left:{100 * left / width:.3f}%;top:{100 * top / height:.3f}%;"
        f"width:{100 * (right - left) / width:.3f}%;height:{100 * (bottom - top) / height:.3f}%"
    )


def _frame(picture: Image.Image, view: View) -> str:
    return f'<i class="frame" style="{_place(picture, view)}"></i>'


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _rgba(colour: tuple[int, int, int], opacity: float) -> str:
    return f"rgb({colour[0]} {colour[1]} {colour[2]} / {opacity:.2f})"
