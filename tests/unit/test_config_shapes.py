"""What the exporter writes into the models' configs, as Triton's own protocol reads them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from classifier_files import Preprocessing
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tools.classifiers.source import ExportError
from tools.paths import MODEL_REPOSITORY
from tools.triton.config_shapes import write_configs

MODELS = sorted(file.parent.name for file in MODEL_REPOSITORY.glob("*/config.pbtxt"))
PIXELS = {
    ("preprocess", "PIXELS"),
    ("classifier", "INPUT__0"),
    ("integrated_gradients", "PIXELS"),
    ("integrated_gradients", "ATTRIBUTIONS"),
    ("explain", "ATTRIBUTIONS"),
    ("explain_stream", "ATTRIBUTIONS"),
    ("heatmap", "PIXELS"),
}
MAPS = {
    ("integrated_gradients", "SALIENCY"),
    ("integrated_gradients", "RELEVANCE"),
    ("explain", "SALIENCY"),
    ("explain_stream", "SALIENCY"),
    ("heatmap", "RELEVANCE"),
}
NETWORKS = [
    Preprocessing(resize=146, crop=(128, 128)),
    Preprocessing(resize=384, crop=(384, 384), interpolation="bicubic"),
    Preprocessing(resize=(299, 299), crop=(299, 299)),
    Preprocessing(resize=(100, 180), crop=(96, 160)),
    Preprocessing(resize=28, crop=(28, 28), mean=(0.5,), std=(0.25,)),
]


def texts(repository: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in repository.glob("*/config.pbtxt")}


def parsed(text: bytes) -> Any:
    return text_format.Parse(text.decode(), model_config_pb2.ModelConfig())


def shapes(repository: Path) -> dict[tuple[str, str], tuple[int, ...]]:
    """(model, tensor) -> dims, of all tensors."""
    return {
        (model, tensor.name): tuple(tensor.dims)
        for model, text in texts(repository).items()
        for tensor in (*parsed(text).input, *parsed(text).output)
    }


def settings(repository: Path) -> dict[str, dict[str, str]]:
    return {
        model: {name: value.string_value for name, value in parsed(text).parameters.items()}
        for model, text in texts(repository).items()
    }


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for model in MODELS:
        (tmp_path / model).mkdir()
        shutil.copy(MODEL_REPOSITORY / model / "config.pbtxt", tmp_path / model)
    return tmp_path


def test_the_tracked_configs_are_those_of_the_default(repository: Path) -> None:
    before = texts(repository)
    times = [file.stat().st_mtime_ns for file in repository.glob("*/config.pbtxt")]
    write_configs(repository, Preprocessing())
    assert texts(repository) == before == texts(MODEL_REPOSITORY)
    assert [file.stat().st_mtime_ns for file in repository.glob("*/config.pbtxt")] == times


@pytest.mark.parametrize("preprocessing", NETWORKS, ids=lambda each: f"{each.input_shape}")
def test_every_tensor_of_images_and_maps_gets_the_networks_shape(
    repository: Path, preprocessing: Preprocessing
) -> None:
    others = shapes(repository)
    write_configs(repository, preprocessing)
    expected = dict.fromkeys(PIXELS, preprocessing.input_shape) | dict.fromkeys(MAPS, preprocessing.crop)
    assert shapes(repository) == others | expected


@pytest.mark.parametrize("preprocessing", NETWORKS, ids=lambda each: f"{each.input_shape}")
def test_clients_can_read_the_resizing(repository: Path, preprocessing: Preprocessing) -> None:
    before = settings(repository)
    write_configs(repository, preprocessing)
    resize = preprocessing.resize if isinstance(preprocessing.resize, tuple) else (preprocessing.resize,)
    before["preprocess"] |= {"resize": ", ".join(map(str, resize)), "interpolation": preprocessing.interpolation}
    assert settings(repository) == before


@pytest.mark.parametrize("preprocessing", NETWORKS, ids=lambda each: f"{each.input_shape}")
def test_comments_stay_and_the_way_back_leads_to_the_same_bytes(repository: Path, preprocessing: Preprocessing) -> None:
    before = texts(repository)
    write_configs(repository, preprocessing)
    changed = {model for model, text in texts(repository).items() if text != before[model]}
    assert changed == set(MODELS) - {"classify", "explain_image"}  # which have no tensors of images or maps
    for model, text in texts(repository).items():
        assert text.count(b"#") == before[model].count(b"#")
    write_configs(repository, Preprocessing())
    assert texts(repository) == before


def test_absent_models_are_skipped(repository: Path) -> None:
    for model in MODELS:
        if model != "classifier":
            shutil.rmtree(repository / model)
    write_configs(repository, NETWORKS[0])
    assert shapes(repository)["classifier", "INPUT__0"] == (3, 128, 128)
    shutil.rmtree(repository / "classifier")
    write_configs(repository, NETWORKS[0])
    assert not list(repository.iterdir())


CONFIG = """
input [ {{ name: "OTHER" dims: [ 3, 224, 224 ] }}, {tensor} ]
"""


@pytest.mark.parametrize(
    "tensor",
    [
        '{ name: "PIXELS" dims: [ 3, 224, 224 ] }',
        '{ name : "PIXELS"\n  data_type: TYPE_FP32\n  dims : [3,224,224] }',
        '{ # name: "RELEVANCE"\n name: "PIXELS"  # dims: [ 1 ] }\n dims: [\n3,\n224,\n224\n] }',
    ],
)
def test_the_form_of_a_config_does_not_matter(tmp_path: Path, tensor: str) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "config.pbtxt"
    file.write_text(CONFIG.format(tensor=tensor))
    write_configs(tmp_path, NETWORKS[0])
    assert shapes(tmp_path) == {("mine", "OTHER"): (3, 224, 224), ("mine", "PIXELS"): (3, 128, 128)}


@pytest.mark.parametrize(
    "tensor",
    [
        '{ name: "PIXELS" dims: 3 dims: 224 dims: 224 }',
        '{ dims: [ 3, 224, 224 ] name: "PIXELS" }',
        '{ name: "PIXELS" }',
    ],
)
def test_a_config_that_cannot_be_changed_is_named_and_nothing_is_written(repository: Path, tensor: str) -> None:
    (repository / "mine").mkdir()
    (repository / "mine" / "config.pbtxt").write_text(CONFIG.format(tensor=tensor))
    before = texts(repository)
    with pytest.raises(ExportError, match=r"mine/config\.pbtxt has PIXELS, but after it neither dims in brackets"):
        write_configs(repository, NETWORKS[0])
    assert texts(repository) == before
