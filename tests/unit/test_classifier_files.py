"""Where a model's preprocessing comes from: the classifier's manifest, or the settings of its own config."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from classifier_files import ClassifierFiles, Preprocessing, PreprocessingError, pixels_shape

SETTINGS = {"mean": "0.485, 0.456, 0.406", "std": "0.229, 0.224, 0.225", "unrelated": "yes"}
GREY = {"mean": "0.5", "std": "0.25"}
SHAPE = (3, 224, 224)


def files(folder: Path, preprocessing: Any = None, sha256: str | None = None) -> ClassifierFiles:
    """A classifier's folder, by default without a manifest."""
    (folder / "model.pt").write_bytes(b"a model")
    if preprocessing is not None:
        digest = sha256 or hashlib.sha256(b"a model").hexdigest()
        (folder / "manifest.json").write_text(json.dumps({"model_sha256": digest, "preprocessing": preprocessing}))
    return ClassifierFiles(folder)


@pytest.mark.parametrize(
    "written",
    [
        Preprocessing(),
        Preprocessing(146, (128, 128), "bicubic", (0.5,) * 3, (0.5,) * 3),
        Preprocessing((100, 180), (96, 160), "nearest", (0.5,), (0.25,)),
    ],
    ids=str,
)
def test_the_manifests_preprocessing_comes_back_whatever_the_settings(tmp_path: Path, written: Preprocessing) -> None:
    classifier = files(tmp_path, asdict(written))
    assert classifier.preprocessing({"mean": "9", "std": "9", "resize": "9"}, written.input_shape) == written


def test_an_older_manifest_leaves_things_out(tmp_path: Path) -> None:
    older = {"resize": 256, "center_crop": 224, "mean": [0.5] * 3, "std": [0.5] * 3}
    expected = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
    assert files(tmp_path, older).preprocessing(SETTINGS, SHAPE) == expected


@pytest.mark.parametrize(
    ("settings", "shape", "expected"),
    [
        (SETTINGS, SHAPE, Preprocessing()),
        (
            {**SETTINGS, "resize": "384", "interpolation": "bicubic"},
            (3, 384, 384),
            Preprocessing(384, (384, 384), "bicubic"),
        ),
        (
            {**GREY, "resize": "100, 180"},
            (1, 96, 160),
            Preprocessing((100, 180), (96, 160), "bilinear", (0.5,), (0.25,)),
        ),
    ],
    ids=["default", "384", "grey"],
)
@pytest.mark.parametrize("is_anothers", [False, True], ids=["no manifest", "another's manifest"])
def test_another_file_takes_the_settings_and_the_shape(tmp_path, settings, shape, expected, is_anothers) -> None:
    classifier = files(tmp_path, asdict(Preprocessing(crop=(7, 7))) if is_anothers else None, "another's")
    assert classifier.preprocessing(settings, shape) == expected


@pytest.mark.parametrize(
    ("preprocessing", "shape", "shown"),
    [
        (Preprocessing(146, (128, 128)), SHAPE, ("3 x 128 x 128", "3 x 224 x 224")),
        (Preprocessing(), (3, 128, 128), ("3 x 224 x 224", "3 x 128 x 128")),
        (Preprocessing(mean=(0.5,), std=(0.5,)), SHAPE, ("1 x 224 x 224", "3 x 224 x 224")),
    ],
    ids=["configs from git", "another manifest", "channels"],
)
def test_another_shape_than_the_configs_is_refused_in_one_sentence(tmp_path, preprocessing, shape, shown) -> None:
    with pytest.raises(PreprocessingError) as refusal:
        files(tmp_path, asdict(preprocessing)).preprocessing(SETTINGS, shape)
    assert str(refusal.value) == (
        f"{tmp_path}/manifest.json is for an input of {shown[0]}, but PIXELS in this model's config.pbtxt are "
        f"{shown[1]}; python -m tools.export writes both"
    )


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        (SETTINGS, (1, 28, 28), "the setting mean must be 1 comma-separated numbers, not '0.485, 0.456, 0.406'"),
        ({**SETTINGS, "std": "1, 1"}, SHAPE, "the setting std must be 3 comma-separated numbers, not '1, 1'"),
        ({**SETTINGS, "mean": "a, b, c"}, SHAPE, "the setting mean must be 3 comma-separated numbers, not 'a, b, c'"),
        ({**SETTINGS, "resize": "big"}, SHAPE, "the setting resize must be 1 or 2 comma-separated integers, not 'big'"),
        ({**SETTINGS, "resize": "200"}, SHAPE, "the setting resize must be at least the input of 224 x 224, not 200"),
        (
            {**SETTINGS, "resize": "300, 200"},
            SHAPE,
            "the setting resize must be at least the input of 224 x 224, not 300 x 200",
        ),
        (
            {**SETTINGS, "interpolation": "magic"},
            SHAPE,
            "interpolation must be one of nearest, bilinear, bicubic, lanczos, not 'magic'",
        ),
        ({"mean": "0, 0", "std": "1, 1"}, (2, 8, 8), r"the input must have 1 channel (grey) or 3 (RGB), not 2"),
    ],
)
def test_settings_that_cannot_be_served_are_named(tmp_path, settings, shape, message) -> None:
    with pytest.raises(PreprocessingError) as refusal:
        files(tmp_path).preprocessing(settings, shape)
    assert str(refusal.value) == message


def test_the_shape_is_that_of_pixels_in_or_out() -> None:
    pixels = {"name": "PIXELS", "dims": [1, 28, 28]}
    other = {"name": "IMAGE", "dims": [1]}
    assert pixels_shape({"input": [other], "output": [pixels]}) == (1, 28, 28)
    assert pixels_shape({"input": [pixels], "output": [other]}) == (1, 28, 28)


@pytest.mark.parametrize("is_anothers", [False, True])
def test_the_network_is_named_by_its_own_manifest_alone(tmp_path: Path, is_anothers: bool) -> None:
    sha256 = hashlib.sha256(b"a model").hexdigest()
    (tmp_path / "model.pt").write_bytes(b"a model")
    manifest = {"model_sha256": "another" if is_anothers else sha256, "architecture": "resnet18", "weights": "mine"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    names = {"architecture": "", "weights": ""} if is_anothers else {"architecture": "resnet18", "weights": "mine"}
    assert ClassifierFiles(tmp_path).network == {**names, "sha256": sha256}
