"""The serving contract with EfficientNet-Lite0 and photographs: the same holds as for shapes."""

import io

import captum.attr
import numpy as np
import pytest
import torch
import tritonclient.grpc
from attribution_engine import AttributionEngine
from attribution_job import Job
from classifier_files import Preprocessing
from conftest import encode, relative_distance
from live_server import Stream, infer
from path_density import PathDensity
from PIL import Image
from torchvision import transforms

from tools.evaluation.measuring import load_engine
from tools.export import describe_served, read_manifest, repository_with
from tools.imagenet.lite0 import load_lite0
from tools.imagenet.photographs import CHELSEA, CHINA, COFFEE, DEMO, view
from tools.server import EmbeddedServer, Ports

TRANSFORM = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
)
STEPS = 8


@pytest.fixture(scope="module")
def lite0_server(tmp_path_factory):
    log = tmp_path_factory.mktemp("lite0") / "triton.log"
    with EmbeddedServer(repository_with("lite0"), Ports.free(), log_file=log) as running:
        yield running


@pytest.fixture(scope="module")
def lite0_triton(lite0_server):
    with tritonclient.grpc.InferenceServerClient(lite0_server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def photographs():
    """Encoded photographs, and the network's inputs, float32 [3, 224, 224]."""
    images = [Image.open(each.file).convert("RGB") for each in (CHELSEA, COFFEE, CHINA)]
    return [(encode(image), TRANSFORM(image)) for image in images]


@pytest.fixture(scope="module")
def eager():
    return load_lite0()


@pytest.fixture(scope="module")
def eager_float64():
    return load_lite0().double()


@pytest.fixture(scope="module")
def engine():
    return load_engine(torch.device("cpu"), "ieee", network="lite0")


def test_what_serves_is_said_and_a_view_is_what_torchvision_makes(photographs):
    assert describe_served(repository_with("lite0")).startswith("efficientnet_lite0, lite0 (ImageNet")
    preprocessing = Preprocessing.from_manifest(read_manifest(repository_with("lite0"))["preprocessing"])
    image = Image.open(CHELSEA.file).convert("RGB")
    torch.testing.assert_close(view(image, preprocessing), photographs[0][1])


def test_photographs_are_called_what_a_person_calls_them(eager):
    named = 0
    labels = (repository_with("lite0") / "classifier" / "labels.txt").read_text().splitlines()
    for photograph in DEMO:
        pixels = TRANSFORM(Image.open(photograph.file).convert("RGB"))
        with torch.no_grad():
            best = eager(pixels[None])[0].topk(5).indices.tolist()
        named += any(labels[index] in photograph.expected for index in best)
    assert named >= 6


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_served_attributions_equal_captums_in_float64(lite0_triton, photographs, eager, eager_float64, output):
    own, captums = [], []
    for encoded, pixels in photographs:
        function = [
            model if output == "logit" else lambda x, m=model: m(x).softmax(dim=1) for model in (eager_float64, eager)
        ]
        target = int(eager(pixels[None]).argmax())
        options = {"baselines": 0, "target": target, "n_steps": STEPS}
        exact, captum_float32 = (
            captum.attr.IntegratedGradients(each).attribute(x, **options)[0].detach()
            for each, x in zip(function, (pixels[None].double(), pixels[None]))
        )
        answer = infer(lite0_triton, [encoded], n_steps=STEPS, output=output)
        own.append(relative_distance(answer["ATTRIBUTIONS"][0], exact))
        captums.append(relative_distance(captum_float32, exact))
        assert answer["EXPLAINED_CLASS"].tolist() == [[target]]
        heatmap = Image.open(io.BytesIO(answer["HEATMAP"][0, 0]))
        assert heatmap.size == (224, 224)
    print(f"relative distance to float64: served {own}, Captum in float32 {captums}")
    assert np.median(own) <= 2 * np.median(captums)


def test_mean_gradients_are_complete_and_a_batch_changes_nothing(engine, photographs):
    pixels = [pixels for _, pixels in photographs]
    jobs = [
        Job(pixels[0], torch.zeros_like(pixels[0]), 285, 5, "calibrated"),
        Job(pixels[1], torch.ones_like(pixels[1]), 967, 6, "calibrated", probability=True),
        Job(pixels[2], torch.zeros_like(pixels[2]), 698, 7, contrast=3),
    ]
    together = engine.explain(jobs)
    for job, explanation in zip(jobs, together):
        (alone,) = engine.explain([job])
        assert relative_distance(explanation.attributions, alone.attributions) <= 1e-5
    for explanation in together[:2]:
        assert abs(explanation.convergence_delta) <= 1e-4 * max(1, explanation.attributions.sum().abs())


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_tolerance_is_kept_with_and_without_a_calibration(engine, photographs, calibrated):
    pixels = photographs[1][1]
    judged = engine if calibrated else AttributionEngine(engine.network, max_rows=engine.max_rows)
    job = Job(pixels, torch.zeros_like(pixels), 967, 300, tolerance=0.1)
    exact = Job(pixels, torch.zeros_like(pixels), 967, 160, "calibrated")  # its error is below 0.01
    (explanation,), (integral,) = judged.explain([job]), engine.explain([exact])
    error = relative_distance(explanation.attributions, integral.attributions)
    assert error <= 0.1
    assert 0.4 * error <= explanation.error_estimate <= 0.1
    assert explanation.n_steps <= (60 if calibrated else 150)


def test_stream_sharpens_to_what_explain_answers(lite0_server, lite0_triton, photographs):
    encoded = [photographs[1][0]]
    heard = Stream(lite0_server, encoded, n_steps=STEPS).hear()
    assert heard.error is None
    assert heard.responses[0]["PROBABILITIES"].shape == (1, 1000)
    whole = infer(lite0_triton, encoded, n_steps=STEPS)
    assert relative_distance(heard.responses[-1]["ATTRIBUTIONS"], whole["ATTRIBUTIONS"]) <= 1e-5


def test_refusals_know_this_networks_classes(lite0_triton, photographs):
    with pytest.raises(tritonclient.grpc.InferenceServerException, match=r"TARGET must be from -1 .* to 999, not 1000"):
        infer(lite0_triton, [photographs[0][0]], [1000])
    with pytest.raises(tritonclient.grpc.InferenceServerException, match="'contrast' must be from 0 to 999, not 1000"):
        infer(lite0_triton, [photographs[0][0]], contrast=1000)


def test_calibration_is_this_networks(engine):
    assert isinstance(engine.density, PathDensity)
    # A real network's errors fall more slowly than those of drawn shapes.
    shapes = load_engine(torch.device("cpu"), "ieee").density
    assert engine.density.law["logit"].order < shapes.law["logit"].order
