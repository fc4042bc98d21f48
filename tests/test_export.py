"""What `tools/export` writes, and what it refuses."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import scene_pixels, untrained

from tools import export
from tools.export import ExportError, load_source
from tools.paths import ROOT
from tools.shapes.dataset import CLASSES


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    export.export(load_source("shapes"), folder)
    return folder


@pytest.fixture(scope="module")
def exported(repository):
    return torch.jit.load(str(repository / "classifier" / "1" / "model.pt"))


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
    assert code.index("maxpool") < code.index("relu")
    eager = load_source("shapes").module.double()
    served = export.build_served(load_source("shapes").module.double())
    pixels = scene_pixels(0)[None].double().requires_grad_()
    (expected,) = torch.autograd.grad(eager(pixels)[0, 3], pixels)
    (found,) = torch.autograd.grad(served(pixels)[0][0, 3], pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def test_labels_and_manifest_lie_beside_the_model(repository):
    assert (repository / "classifier" / "labels.txt").read_text().split() == list(CLASSES)
    manifest = json.loads((repository / "classifier" / "1" / "manifest.json").read_text())
    model = (repository / "classifier" / "1" / "model.pt").read_bytes()
    assert manifest["model_sha256"] == hashlib.sha256(model).hexdigest()
    assert manifest["architecture"] == "resnet18"
    assert manifest["weights"] == "shapes"
    assert manifest["preprocessing"]["center_crop"] == 224
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("architecture", "hoistable"),
    [
        ("mobilenet_v3_small", True),
        ("densenet121", True),
        pytest.param("vgg11", True, marks=pytest.mark.slow),
        pytest.param("vit_b_16", False, marks=pytest.mark.slow),
    ],
)
def test_other_architectures_export_from_a_state_dict(tmp_path, architecture, hoistable):
    torch.save(untrained(architecture, 7).state_dict(), tmp_path / "weights.pt")
    path = export.export(load_source(str(tmp_path / "weights.pt"), architecture), tmp_path)
    assert hasattr(torch.jit.load(str(path)), "stem") == hoistable
    assert (tmp_path / "classifier" / "labels.txt").read_text().splitlines() == [f"class {i}" for i in range(7)]


def test_a_model_that_differs_from_the_eager_one_is_not_written(tmp_path, monkeypatch):
    def broken(module):
        served = build_served(module)
        next(served.parameters()).mul_(1.01)
        return served

    build_served = export.build_served
    monkeypatch.setattr(export, "build_served", broken)
    with pytest.raises(ExportError, match="differ from the eager model"):
        export.export(load_source("shapes"), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("weights", "architecture", "message"),
    [
        ("nowhere.pt", "resnet18", "nowhere.pt: no such file"),
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
    assert "--weights shapes" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "r").exists()
