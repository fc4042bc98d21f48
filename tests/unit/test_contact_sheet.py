"""The picture of a whole run."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import encode
from PIL import Image, ImageDraw

from explain_client import Explanation, Prediction
from explain_client.contact_sheet import COLUMNS, ContactSheet, _write


def explanation(value: float) -> Explanation:
    saliency = np.full((224, 224), value, np.float32)
    return Explanation(0.0, 20, 0.02, 1.0, saliency, None, None, (Prediction(0, "star", 0.9),), 0)


def redness(picture: Image.Image) -> int:
    pixels = np.asarray(picture, int)
    return int((pixels[..., 0] - pixels[..., 1]).max())


def test_pictures_of_a_run_are_on_one_scale(tmp_path):
    """The right column, a weak picture, is paler than the left one."""
    file = encode(Image.new("RGB", (300, 300), (128, 128, 128)))
    path = tmp_path / "folder" / "sheet.png"
    with ContactSheet(path) as sheet:
        sheet.add("strong.png", file, explanation(1.0))
        sheet.add("weak.png", file, explanation(0.1))
        assert not path.exists()
    with Image.open(path) as drawn:
        cell = drawn.width // COLUMNS
        strong, weak = (drawn.convert("RGB").crop((at, 60, at + cell, 240)) for at in (0, cell))
        assert redness(strong) > 100
        assert 5 < redness(weak) < redness(strong) / 5


def test_a_sheet_without_images_is_not_written(tmp_path):
    with ContactSheet(tmp_path / "sheet.png"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_saliency_must_be_there(tmp_path):
    answer = Explanation(0.0, 20, 0.02, 1.0, None, None, None, (Prediction(0, "star", 0.9),), 0)
    with ContactSheet(tmp_path / "sheet.png") as sheet, pytest.raises(ValueError, match="`want`"):
        sheet.add("one.png", b"", answer)


def test_a_no_break_space_is_drawn_as_a_space():
    """The font has no glyph for it and would draw a box."""
    pictures = []
    for text in ("61\N{NO-BREAK SPACE}%", "61 %"):
        pictures.append(Image.new("RGB", (100, 30), "white"))
        _write(ImageDraw.Draw(pictures[-1]), (0, 0), text, 20, (0, 0, 0), 100)
    assert pictures[0].tobytes() == pictures[1].tobytes()
