"""What a heatmap's file says of its run."""

import io
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from conftest import encode, scene_image
from PIL import Image

from explain_client import Explanation, Level, Prediction
from explain_client.pictures import colour_layer, strength
from explain_client.records import read_record, with_record
from explain_client.runs import find_sources

PICTURE = encode(scene_image(0).resize((64, 64)))


def explanation(error: float = 0.02, picture: bytes | None = PICTURE) -> Explanation:
    predictions = (Prediction(3, "étoile", 0.75), Prediction(1, "<ring>", 0.2))
    return Explanation(-0.001, 20, error, 12.5, None, None, picture, predictions, 7, "cross")


def test_a_records_saliency_has_the_same_picture(tmp_path):
    saliency = np.zeros((224, 224), np.float32)
    saliency[60:160, 40:80], saliency[61:160, 150:181] = 1e-6, -5e-7
    (tmp_path / "one.png").write_bytes(with_record(replace(explanation(), saliency=saliency), {}))
    kept = read_record(tmp_path / "one.png").explanation.saliency
    assert kept.shape == (56, 56)
    assert strength(kept) == pytest.approx(strength(saliency), rel=0.02)
    layers = [colour_layer(each, strength(saliency)).resize((56, 56)) for each in (saliency, kept)]
    assert np.abs(np.subtract(*(np.asarray(layer, int)[..., 3] for layer in layers))).max() <= 6


@pytest.mark.parametrize("error", [0.02, math.nan])
def test_a_record_is_read_back_and_the_picture_is_the_same(tmp_path, error):
    path = tmp_path / "one.heatmap.png"
    path.write_bytes(with_record(explanation(error), {"target": 7, "baseline": "blur"}))
    record = read_record(path)
    assert record.options == {"target": 7, "baseline": "blur"}
    assert repr(record.explanation) == repr(explanation(error))
    assert record.explanation.predictions == explanation().predictions
    with Image.open(path) as image, Image.open(io.BytesIO(PICTURE)) as drawn:
        image.verify()  # the checksums of its chunks
        assert image.size == drawn.size
    np.testing.assert_array_equal(np.asarray(record.explanation.heatmap), np.asarray(explanation().heatmap))


def test_what_has_no_record_is_none(tmp_path):
    (tmp_path / "plain.png").write_bytes(PICTURE)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "other.png").write_bytes(with_record(explanation(), {}).replace(b'"n_steps"', b'"n_stops"'))
    for name in ("plain.png", "broken.png", "other.png", "absent.png"):
        assert read_record(tmp_path / name) is None
    with pytest.raises(ValueError, match="no heatmap"):
        with_record(explanation(picture=None), {})


def test_heatmaps_are_no_images_and_newer_images_are_seen(tmp_path):
    for name in ("one.png", "one.heatmap.png", "more/two.jpg", "more/two.heatmap.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for arguments in ([str(tmp_path)], [f"{tmp_path}/**/*"], [str(path) for path in tmp_path.rglob("*.*")]):
        sources = find_sources(arguments, tmp_path)
        assert sorted(source.path.name for source in sources) == ["one.png", "two.jpg"]
    assert len(find_sources([str(tmp_path / "one.heatmap.png")], tmp_path)) == 1
    (source,) = find_sources([str(tmp_path / "one.png")], tmp_path)
    assert source.is_older
    os.utime(source.path, (2e9, 2e9))
    assert not source.is_older


def test_results_are_short_in_a_terminal_and_shown_in_a_notebook():
    assert repr(explanation()) == "Explanation(cross, predicted étoile 75.0%, 20 steps, error 2.0%)"
    assert repr(explanation(math.nan)) == "Explanation(cross, predicted étoile 75.0%, 20 steps)"
    page = explanation()._repr_html_()
    assert 'src="data:image/png;base64,' in page
    assert "étoile" in page
    assert "&lt;ring&gt;" in page
    assert "<ring>" not in page
    assert "explanation accurate to about ±2 %" in page
    assert "img" not in explanation(picture=None)._repr_html_()
    level = Level(0.0, 8, 0.051, 10.0, np.zeros((2, 2), np.float32), None, PICTURE, is_last=False)
    assert repr(level) == "Level(8 steps, error 5.1%)"
    assert "about ±5 %" in level._repr_html_()
