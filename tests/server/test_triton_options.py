"""Options of Triton that the documents speak of: the response cache."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from conftest import encode, scene_image
from live_server import infer

from tools.server import EmbeddedServer, Ports, wheel_folder
from tools.triton.process import ServerError

REFUSAL = "must not use Triton's response cache, .*: remove response_cache from"


def repository_with_cache(repository: Path, folder: Path, models: list[str], cached: str) -> Path:
    """A repository of these models, of which one enables the response cache."""
    for model in models:
        (folder / model).mkdir(parents=True)
        for file in (repository / model).iterdir():
            (folder / model / file.name).symlink_to(file)
    config = folder / cached / "config.pbtxt"
    text = config.read_text() + "\nresponse_cache { enable: true }\n"
    config.unlink()
    config.write_text(text)
    return folder


@pytest.fixture(scope="module")
def caching(repository, tmp_path_factory):
    """A server whose `classify` is cached."""
    folder = tmp_path_factory.mktemp("options")
    models = sorted(path.name for path in repository.iterdir())
    caches = wheel_folder("pytriton") / "tritonserver" / "caches"
    options = [f"--cache-directory={caches}", "--cache-config=local,size=67108864"]
    cached = repository_with_cache(repository, folder / "models", models, "classify")
    with EmbeddedServer(cached, Ports.free(), folder / "log", options=options) as server:
        yield server


@pytest.mark.parametrize(
    ("models", "cached"),
    [(["heatmap"], "heatmap"), (["integrated_gradients", "explain"], "explain")],
    ids=["by its own config", "by an ensemble's config"],
)
def test_a_model_that_would_answer_with_anothers_map_does_not_load(repository, tmp_path, models, cached):
    folder = repository_with_cache(repository, tmp_path / "models", models, cached)
    server = EmbeddedServer(folder, Ports.free(), tmp_path / "log")
    with pytest.raises(ServerError, match=f"{cached} {REFUSAL} {cached}/config.pbtxt"), server:
        pass


def test_cached_predictions_are_those_of_their_own_images(caching, triton):
    server = caching
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        for image in ([encode(scene_image(index))] for index in (0, 1, 0)):
            cached, fresh = (
                infer(each, image, outputs=("PROBABILITIES",), model="classify")["PROBABILITIES"]
                for each in (client, triton)
            )
            np.testing.assert_allclose(cached, fresh, atol=1e-6)
    metrics = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    assert 'nv_cache_num_hits_per_model{model="classify",version="1"} 1' in metrics
