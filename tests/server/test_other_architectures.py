"""The same model repository with other classifiers: only the export differs."""

import shutil

import captum.attr
import pytest
import torch
import tritonclient.grpc
from conftest import MEAN, STD, encode, relative_distance, scene_image, scene_pixels, untrained
from live_server import infer
from path_baselines import Baselines

from tools.classifiers.loading import load_source
from tools.export import export
from tools.paths import MODEL_REPOSITORY
from tools.server import EmbeddedServer, Ports


@pytest.mark.parametrize(
    "architecture",
    [
        "mobilenet_v3_small",
        pytest.param("densenet121", marks=pytest.mark.slow),
        pytest.param("vgg11", marks=pytest.mark.slow),
        pytest.param("vit_b_16", marks=pytest.mark.slow),
    ],
)
def test_repository_serves_another_architecture(tmp_path, architecture):
    models = tmp_path / "models"
    shutil.copytree(MODEL_REPOSITORY, models, ignore=shutil.ignore_patterns("model.pt", "labels.txt", "manifest.json"))
    model = untrained(architecture, 5)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    export(load_source(str(tmp_path / "weights.pt"), architecture), models)
    # At zeros the layer norms of a vision transformer are singular.
    baseline = "black" if architecture == "vit_b_16" else "zero"
    with (
        EmbeddedServer(models, Ports.free(), tmp_path / "log") as server,
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton,
    ):
        answer = infer(triton, [encode(scene_image(0))], [3], n_steps=4, baseline=baseline)

    image = scene_pixels(0)[None]
    start = Baselines(list(MEAN), list(STD)).make(baseline, image[0])[None]
    with torch.no_grad():
        probabilities = model(image).softmax(dim=1)
    torch.testing.assert_close(torch.tensor(answer["PROBABILITIES"]), probabilities, rtol=1e-3, atol=1e-5)
    expected = captum.attr.IntegratedGradients(model).attribute(image, start, target=3, n_steps=4).detach()
    # Float32 is about 1e-3 from float64 at four nodes: one flipped activation is that much.
    assert relative_distance(answer["ATTRIBUTIONS"], expected) <= 5e-3
    assert answer["EXPLAINED_CLASS"].tolist() == [[3]]
    assert answer["N_STEPS"].tolist() == [[4]]
    assert not (answer["HEATMAP"][0] == b"").any()
