"""Exports and refusals of `tools/export`."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from classifier_files import Preprocessing
from conftest import MEAN, STD, scene_pixels
from torch import nn

from tools import export
from tools.classifiers import loading
from tools.classifiers.loading import load_source
from tools.classifiers.source import DownloadError, ExportError, Source
from tools.export import ensure_exported, read_manifest
from tools.imagenet import lite0
from tools.paths import MODEL_REPOSITORY, ROOT
from tools.shapes.dataset import CLASSES
from tools.torchscript import served_classifier
from tools.torchscript.served_classifier import build_served


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    export.export(load_source("shapes"), folder)
    return folder


@pytest.fixture(scope="module")
def exported(repository):
    return torch.jit.load(str(model_file(repository)))


@pytest.fixture(scope="module")
def lite0_repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lite0")
    (folder / "classifier").mkdir()
    export.export(load_source("lite0"), folder)
    return folder


def model_file(repository: Path) -> Path:
    return repository / "classifier" / "1" / "model.pt"


def automatic_copy(repository: Path, copy: Path) -> Path:
    """A repository whose network was exported automatically."""
    shutil.copytree(repository, copy)
    file = model_file(copy).with_name("manifest.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "automatic": True}))
    return copy


@pytest.fixture
def exports(monkeypatch) -> list[tuple[str, bool]]:
    """Replaces `export`: records the network of each call and whether it was automatic."""
    made = []
    monkeypatch.setattr(
        export, "export", lambda source, repository, automatic=False: made.append((source.network, automatic))
    )
    return made


def test_exported_file_equals_the_eager_model(exported, eager_model):
    pixels = torch.stack([scene_pixels(index) for index in range(3)])
    with torch.no_grad():
        logits, probabilities = exported(pixels)
        expected = eager_model(pixels)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(probabilities, expected.softmax(dim=1), rtol=1e-4, atol=1e-5)


def test_batch_norm_is_folded(exported):
    assert not [name for name, _ in exported.named_buffers()]
    assert "batch_norm" not in str(torch.jit.freeze(exported).graph)


def test_tail_of_stem_gives_the_logits_and_stem_is_affine(exported):
    one, other = scene_pixels(0)[None], scene_pixels(1)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported.tail(exported.stem(one)), exported(one)[0])
        mixed = exported.stem(0.25 * one + 0.75 * other)
        torch.testing.assert_close(mixed, 0.25 * exported.stem(one) + 0.75 * exported.stem(other), rtol=0, atol=1e-5)


def test_relu_follows_the_max_pooling_and_gradients_stay_the_same(exported):
    code = exported.tail_layers.code
    assert code.index("max_pool") < code.index("relu")
    eager = load_source("shapes").module.double()
    served = build_served(load_source("shapes").module.double(), (3, 224, 224))
    pixels = scene_pixels(0)[None].double().requires_grad_()
    (expected,) = torch.autograd.grad(eager(pixels)[0, 3], pixels)
    (gradients,) = torch.autograd.grad(served(pixels)[0][0, 3], pixels)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def test_labels_and_manifest_lie_beside_the_model(repository):
    assert (repository / "classifier" / "labels.txt").read_text().split() == list(CLASSES)
    manifest = json.loads((repository / "classifier" / "1" / "manifest.json").read_text())
    model = (repository / "classifier" / "1" / "model.pt").read_bytes()
    assert manifest["model_sha256"] == hashlib.sha256(model).hexdigest()
    assert manifest["architecture"] == "resnet18"
    assert manifest["weights"] == manifest["network"] == "shapes"
    assert manifest["automatic"] is False
    assert manifest["preprocessing"] == {
        "resize": 256,
        "crop": [224, 224],
        "interpolation": "bilinear",
        "mean": list(MEAN),
        "std": list(STD),
    }
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]


def test_exported_lite0_equals_the_eager_network_and_says_what_images_it_wants(lite0_repository):
    exported = torch.jit.load(str(model_file(lite0_repository)))
    assert hasattr(exported, "stem")
    assert hasattr(exported, "mean_slope_tail")
    pixels = torch.stack([scene_pixels(index) for index in range(2)])
    with torch.no_grad():
        logits, probabilities = exported(pixels)
        expected = lite0.load_lite0()(pixels)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(probabilities, expected.softmax(dim=1), rtol=1e-4, atol=1e-5)
    manifest = read_manifest(lite0_repository)
    assert manifest["network"] == "lite0"
    assert manifest["weights_sha256"] == lite0.SHA256
    assert manifest["preprocessing"]["mean"] == manifest["preprocessing"]["std"] == [0.5] * 3
    labels = (lite0_repository / "classifier" / "labels.txt").read_text().splitlines()
    assert len(labels) == manifest["classes"] == 1000
    assert "espresso" in labels


def test_weights_of_lite0_that_are_others_are_named(monkeypatch):
    monkeypatch.setattr(lite0, "SHA256", 64 * "0")
    with pytest.raises(
        ExportError, match=rf"lite0: \S+{lite0.FILE_NAME} is not the file that is known here: sha256 5793"
    ):
        load_source("lite0")


def test_a_missing_package_of_lite0_is_named(monkeypatch):
    monkeypatch.setattr(lite0, "PACKAGE", "package_that_nobody_has")
    with pytest.raises(
        ExportError, match="lite0: the package package-that-nobody-has, which carries the weights, is not installed"
    ):
        load_source("lite0")


SMALL = Preprocessing(146, (128, 128), "bicubic")


def tiny_source() -> Source:
    """A classifier of images of 128 x 128 pixels."""
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return Source(nn.Sequential(*layers).eval(), ["a", "b"], "tiny", "tiny", preprocessing=SMALL)


def with_configs(repository: Path) -> Path:
    """Copy the tracked configs of two models into a repository."""
    for model in ("classifier", "preprocess"):
        (repository / model).mkdir(parents=True, exist_ok=True)
        shutil.copy(MODEL_REPOSITORY / model / "config.pbtxt", repository / model)
    return repository


def config(repository: Path, model: str) -> str:
    return (repository / model / "config.pbtxt").read_text()


def test_the_configs_get_the_networks_shape(tmp_path):
    export.export(tiny_source(), with_configs(tmp_path))
    assert read_manifest(tmp_path)["preprocessing"]["crop"] == [128, 128]
    for model in ("classifier", "preprocess"):
        assert "dims: [ 3, 128, 128 ]" in config(tmp_path, model)
    assert 'value: { string_value: "146" }' in config(tmp_path, "preprocess")
    assert 'value: { string_value: "bicubic" }' in config(tmp_path, "preprocess")


def test_a_config_that_cannot_be_changed_stops_the_export(tmp_path):
    with_configs(tmp_path)
    (tmp_path / "classifier" / "config.pbtxt").write_text('input { name: "INPUT__0" dims: 3 dims: 224 dims: 224 }')
    with pytest.raises(ExportError, match="has INPUT__0, but after it neither dims in brackets"):
        export.export(tiny_source(), tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"config.pbtxt"}
    assert "128" not in config(tmp_path, "preprocess")


@pytest.mark.parametrize("automatic", [False, True])
def test_configs_that_were_restored_get_the_networks_shape_again(tmp_path, exports, monkeypatch, automatic):
    folder = model_file(tmp_path).parent
    folder.mkdir(parents=True)
    model_file(tmp_path).write_bytes(b"a model")
    manifest = {
        "automatic": automatic,
        "network": "lite0",
        "weights": "lite0",
        "weights_sha256": None,
        "model_sha256": hashlib.sha256(b"a model").hexdigest(),
        "exporter_sha256": "mine",
        "preprocessing": asdict(SMALL),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(export, "_exporter_sha256", lambda: "mine")
    for _ in range(2):
        with_configs(tmp_path)
        ensure_exported(tmp_path)
        assert "dims: [ 3, 128, 128 ]" in config(tmp_path, "preprocess")
    assert exports == []


def test_the_configs_of_a_model_file_from_elsewhere_stay(tmp_path):
    with_configs(tmp_path)
    model_file(tmp_path).parent.mkdir(parents=True)
    model_file(tmp_path).write_bytes(b"somebody's own")
    edited = config(tmp_path, "preprocess").replace("[ 3, 224, 224 ]", "[ 3, 99, 99 ]")
    (tmp_path / "preprocess" / "config.pbtxt").write_text(edited)
    ensure_exported(tmp_path)
    assert config(tmp_path, "preprocess") == edited


@pytest.mark.parametrize("network", [None, "shapes"])
def test_what_somebody_exported_stays(repository, exports, network):
    ensure_exported(repository, network)
    assert exports == []


def test_what_somebody_exported_is_not_replaced_by_another_network(repository, exports):
    with pytest.raises(ExportError, match=r"is shapes, .*; python -m tools\.export --weights lite0 does"):
        ensure_exported(repository, "lite0")
    assert exports == []


@pytest.mark.parametrize("network", [None, "shapes"])
def test_what_somebody_exported_and_is_gone_is_named(repository, tmp_path, exports, network):
    shutil.copytree(repository, tmp_path / "copy")
    model_file(tmp_path / "copy").unlink()
    with pytest.raises(ExportError, match=r"model\.pt is missing; shapes was exported there"):
        ensure_exported(tmp_path / "copy", network)
    assert exports == []


def test_a_model_file_from_elsewhere_stays(tmp_path, exports):
    model_file(tmp_path).parent.mkdir(parents=True)
    model_file(tmp_path).write_bytes(b"somebody's own")
    ensure_exported(tmp_path)
    with pytest.raises(ExportError, match=r"python -m tools\.export --weights shapes"):
        ensure_exported(tmp_path, "shapes")
    assert exports == []
    assert model_file(tmp_path).read_bytes() == b"somebody's own"


def test_what_nobody_asked_for_is_replaced_by_what_somebody_does(lite0_repository, tmp_path):
    copy = automatic_copy(lite0_repository, tmp_path / "copy")
    ensure_exported(copy, "shapes")
    manifest = read_manifest(copy)
    assert (manifest["network"], manifest["automatic"]) == ("shapes", True)
    assert manifest["model_sha256"] == hashlib.sha256(model_file(copy).read_bytes()).hexdigest()
    assert (copy / "classifier" / "labels.txt").read_text().split() == list(CLASSES)


@pytest.mark.parametrize("network", [None, "shapes"])
def test_what_nobody_asked_for_is_exported_anew_only_by_another_exporter(
    repository, tmp_path, exports, monkeypatch, network
):
    copy = automatic_copy(repository, tmp_path / "copy")
    ensure_exported(copy, network)
    assert exports == []
    monkeypatch.setattr(export, "_exporter_sha256", lambda: "another's")
    ensure_exported(copy, network)
    assert exports == [("shapes", True)]


def test_without_a_network_a_real_one_is_served_and_what_stands_in_for_it_is_said(
    tmp_path, exports, monkeypatch, capsys
):
    def fail(architecture):
        raise DownloadError("no network")

    monkeypatch.setattr(loading, "_load_imagenet", fail)
    ensure_exported(tmp_path)
    assert exports == [("lite0", True)]
    (said,) = capsys.readouterr().out.splitlines()
    assert "could not be fetched, so EfficientNet-Lite0 serves instead" in said


def test_a_model_that_differs_from_the_eager_one_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(served_classifier, "TOLERANCE", -1.0)  # nothing is near enough
    with pytest.raises(ExportError, match="differ from the eager model"):
        export.export(load_source("shapes"), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("weights", "architecture", "message"),
    [
        ("nowhere.pt", "resnet18", "^nowhere.pt: no such file; give lite0, imagenet, shapes or the path"),
        ("shapes", "resnet9000", "torchvision.models has no 'resnet9000'"),
        ("shapes", "resnet34", "does not hold the weights of a resnet34"),
    ],
)
def test_unfitting_sources_are_refused(weights, architecture, message):
    with pytest.raises(ExportError, match=message):
        load_source(weights, architecture)


def test_labels_must_be_as_many_as_classes(tmp_path):
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    with pytest.raises(ExportError, match="2 labels for 12 classes"):
        load_source("shapes", labels_file=tmp_path / "labels.txt")


def test_failed_download_says_so_and_writes_nothing(tmp_path):
    nobody_listens = "http://127.0.0.1:9"
    environment = {
        **os.environ,
        "TORCH_HOME": str(tmp_path),
        "HTTPS_PROXY": nobody_listens,
        "https_proxy": nobody_listens,
    }
    command = [sys.executable, "-m", "tools.export", "--weights", "imagenet", "--repository", str(tmp_path / "r")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "could not be fetched from https://" in result.stderr
    assert "--weights lite0" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "r").exists()
