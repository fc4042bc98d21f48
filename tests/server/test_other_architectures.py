"""The same model repository with other classifiers, of other sizes: only the export differs."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import captum.attr
import numpy as np
import own_networks
import pytest
import timm
import torch
import tritonclient.grpc
from attribution_metrics import FLUSH_SECONDS
from classifier_files import Preprocessing
from conftest import encode, relative_distance, scene_image, untrained
from live_server import Stream, infer, stub
from path_baselines import Baselines
from path_density import FILE_NAME
from PIL import Image

from explain_client import ExplainClient, RefusedError
from tools.bench.architectures import ARCHITECTURES
from tools.classifiers.loading import load_source
from tools.classifiers.source import Source
from tools.export import WITHOUT_CLASSIFIER, export, read_manifest
from tools.imagenet.photographs import view
from tools.paths import MODEL_REPOSITORY
from tools.server import EmbeddedServer, Ports
from tools.triton.process import ServerError

STEPS = 4


@contextmanager
def served(source: Source, folder: Path) -> Iterator[tuple[EmbeddedServer, tritonclient.grpc.InferenceServerClient]]:
    """A server of a copy of the repository with this classifier."""
    models = folder / "models"
    shutil.copytree(MODEL_REPOSITORY, models, ignore=WITHOUT_CLASSIFIER)
    export(source, models)
    with (
        EmbeddedServer(models, Ports.free(), folder / "log") as server,
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton,
    ):
        yield server, triton


def captums(module: torch.nn.Module, pixels: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    explainer = captum.attr.IntegratedGradients(module)
    maps = [explainer.attribute(each[None], start[None], target=3, n_steps=STEPS).detach() for each in pixels]
    return torch.cat(maps)


def check_explanations(triton, source: Source, images: list[Image.Image], baseline: str = "zero") -> np.ndarray:
    """Answers equal the eager network's and Captum's in float64, as nearly as Captum's in float32; the attributions."""
    encoded = [encode(image) for image in images]
    answer = infer(triton, encoded, [3] * len(images), n_steps=STEPS, baseline=baseline)
    pixels = torch.stack([view(image, source.preprocessing) for image in images])
    start = Baselines(source.preprocessing.mean, source.preprocessing.std).make(baseline, pixels[0])
    module = copy.deepcopy(source.module)
    with torch.no_grad():
        probabilities = module(pixels).softmax(dim=1)
    in_float32 = captums(module, pixels, start)
    exact = captums(module.double(), pixels.double(), start.double())
    torch.testing.assert_close(torch.tensor(answer["PROBABILITIES"]), probabilities, rtol=1e-3, atol=1e-5)
    own, peer = (
        float(np.median([relative_distance(one, true) for one, true in zip(maps, exact)]))
        for maps in (answer["ATTRIBUTIONS"], in_float32)
    )
    print(f"relative distance to float64, median: served {own:.1e}, Captum in float32 {peer:.1e}")
    # One activation that rounds to the other side of zero moves a map of four nodes by about 1e-3.
    assert own <= max(2 * peer, 5e-3)
    assert answer["EXPLAINED_CLASS"].tolist() == [[3]] * len(images)
    assert answer["N_STEPS"].tolist() == [[STEPS]] * len(images)
    height, width = source.preprocessing.crop
    assert Image.open(io.BytesIO(answer["HEATMAP"][0, 0])).size == (width, height)
    np.testing.assert_allclose(answer["SALIENCY"], answer["ATTRIBUTIONS"].sum(1), rtol=1e-4, atol=1e-6)
    return answer["ATTRIBUTIONS"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_is_served_and_explained(tmp_path: Path, architecture: str) -> None:
    if architecture == "lite0":
        source = load_source("lite0")
    else:
        file = tmp_path / "weights.pt"
        torch.manual_seed(0)
        if architecture.startswith("timm:"):
            model = timm.create_model(architecture.removeprefix("timm:"), num_classes=5)
        else:
            model = untrained(architecture, 5)
        torch.save(model.state_dict(), file)
        source = load_source(str(file), architecture)
    # At zeros the layer norms of a vision transformer are singular.
    baseline = "black" if architecture == "vit_b_16" else "zero"
    with served(source, tmp_path) as (_, triton):
        check_explanations(triton, source, [scene_image(index) for index in range(3)], baseline)
        refined = infer(triton, [encode(scene_image(1))], [3], tolerance=0.3, n_steps=40, baseline=baseline)
        manifest = read_manifest(tmp_path / "models")
    assert manifest is not None
    assert manifest["mean_slopes"]
    # Discrete gradients add up to the change of the output, at any number of steps.
    size = np.abs(refined["ATTRIBUTIONS"]).sum()
    assert abs(refined["CONVERGENCE_DELTA"][0, 0]) <= 1e-4 * size
    assert 0 < refined["ERROR_ESTIMATE"][0, 0] < 1


OWN_SIZES = {
    "128 x 128": (own_networks.Gated, Preprocessing(146, (128, 128))),
    "grey, 96 x 160": (own_networks.Tiny, Preprocessing((96, 160), (96, 160), "bicubic", (0.5,), (0.25,))),
}


@pytest.mark.parametrize("name", [pytest.param("128 x 128", marks=pytest.mark.slow), "grey, 96 x 160"])
def test_a_network_is_served_at_its_own_size(tmp_path: Path, name: str) -> None:
    make, preprocessing = OWN_SIZES[name]
    channels, height, width = shape = preprocessing.input_shape
    module = own_networks.seeded(make(5, channels))
    source = Source(module, list("abcde"), "tiny", "somebody's", preprocessing=preprocessing)
    # As large as the input, so that no resizing differs from Pillow's in a rounding.
    image = scene_image(0, 300).resize((width, height))
    image = image if channels == 3 else image.convert("L")
    with served(source, tmp_path) as (server, triton), ExplainClient(server.grpc_url) as client:
        metadata = {tensor.name: list(tensor.shape) for tensor in triton.get_model_metadata("explain").outputs}
        assert metadata["ATTRIBUTIONS"] == [-1, *shape]
        assert metadata["SALIENCY"] == [-1, height, width]
        attributions = check_explanations(triton, source, [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
        blurred = infer(triton, [encode(image)], baseline="blur", n_steps=STEPS)
        assert blurred["ATTRIBUTIONS"].shape == (1, *shape)
        refined = infer(triton, [encode(image)], tolerance=0.1)
        assert abs(refined["CONVERGENCE_DELTA"][0, 0]) <= 1e-4 * np.abs(refined["ATTRIBUTIONS"]).sum()
        heard = Stream(server, [encode(image)], [3], n_steps=STEPS).hear()
        assert heard.error is None
        assert relative_distance(heard.responses[-1]["ATTRIBUTIONS"][0], attributions[0]) <= 1e-5
        result = client.explain(image, n_steps=STEPS)
        assert result.saliency is not None
        assert result.saliency.shape == (height, width)
        assert result.heatmap.size == (width, height)
        assert result.predictions[0].label in "abcde"
        with pytest.raises(
            RefusedError, match=r"this network has no path_density\.json; python -m tools\.calibrate writes"
        ):
            client.explain(image, method="calibrated", n_steps=STEPS)
        write_calibration(tmp_path / "models")
        with pytest.raises(RefusedError, match="calibrated since the server started; restart the server to use it"):
            client.explain(image, method="calibrated", n_steps=STEPS)
        wide = encode(scene_image(0, 300).resize((400, 200)))
        assert client.explain(wide, n_steps=2).heatmap.size == (width, height)


def write_calibration(models: Path) -> None:
    """An even density, with the checksum of the classifier that is served."""
    folder = models / "classifier" / "1"
    manifest = read_manifest(models)
    assert manifest is not None
    law = {"scale": 1.0, "order": 1.2, "margin": 1.5}
    calibration = {
        "model_sha256": manifest["model_sha256"],
        "density": {"logit": [1.0], "probability": [1.0]},
        "error_law": {"logit": law, "probability": law},
    }
    (folder / FILE_NAME).write_text(json.dumps(calibration))


class OneOutput(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))


@pytest.mark.slow  # the sentences are tests of classifier_loading
def test_a_file_that_cannot_be_explained_is_refused_at_start_up(tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(MODEL_REPOSITORY, models, ignore=WITHOUT_CLASSIFIER)
    version = models / "classifier" / "1"
    version.mkdir(exist_ok=True)  # absent where nothing was exported yet
    torch.jit.script(OneOutput()).save(str(version / "model.pt"))
    for model in ("classifier", "explain_stream"):
        (models / model / "labels.txt").write_text("a\nb\nc\n")
    with (
        pytest.raises(ServerError, match=r"model\.pt returns one output instead of \(logits, probabilities\)"),
        EmbeddedServer(models, Ports.free(), tmp_path / "log"),
    ):
        pass


@pytest.mark.slow
def test_ten_thousand_images_take_no_more_memory_than_may_be_kept(tmp_path: Path) -> None:
    """Their answers would take 700 MB; `kept_bytes` allows 64."""
    make, preprocessing = OWN_SIZES["grey, 96 x 160"]
    source = Source(own_networks.seeded(make(5, 1)), list("abcde"), "tiny", "mine", preprocessing=preprocessing)
    random = np.random.default_rng(0)

    def resident(process: int) -> int:
        status = Path(f"/proc/{process}/status").read_text()
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+)", status)[0])

    with served(source, tmp_path) as (server, triton):
        process, sizes = stub(server.process.pid, "integrated_gradients"), []
        for _ in range(5):
            for _ in range(63):
                noise = random.integers(0, 256, (32, 96, 160), np.uint8)
                infer(triton, [encode(Image.fromarray(each)) for each in noise], outputs=["N_STEPS"], n_steps=1)
            time.sleep(2 * FLUSH_SECONDS)
            metrics = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
            kept = float(re.findall(r"^integrated_gradients_kept_bytes{.*} (\S+)$", metrics, re.MULTILINE)[0])
            assert 60e6 < kept <= 64e6
            sizes.append(resident(process))
    print(f"resident memory after each 2,016 images: {[round(size / 1e6) for size in sizes]} MB")
    assert sizes[-1] - sizes[0] < 30e6
