"""Options of Triton that the documents speak of: the response cache, traces, and parameters in HTTP headers."""

from __future__ import annotations

import http.client
import http.server
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from conftest import encode, scene_image
from live_server import infer

from tools.paths import ROOT
from tools.server import EmbeddedServer, Ports
from tools.triton.installation import wheel_folder
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


def documented(document: str, option: str) -> list[str]:
    """The words of a document that set an option of Triton."""
    words = re.findall(rf"--{option}=(?:'[^']*'|[^\s'`]+)", (ROOT / "docs" / document).read_text())
    assert words
    return [word.replace("'", "") for word in words]


class Collector(http.server.BaseHTTPRequestHandler):
    """Gives its server the spans that are posted to it."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/traces":
            for resource in body["resourceSpans"]:
                for scope in resource["scopeSpans"]:
                    self.server.spans.extend(scope["spans"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


class CollectorServer(http.server.ThreadingHTTPServer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.spans: list[dict] = []


@contextmanager
def collector() -> Iterator[tuple[str, list[dict]]]:
    """The address of an OpenTelemetry collector, and its spans."""
    with CollectorServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", server.spans
        server.shutdown()


@pytest.fixture(scope="module")
def traced(repository, tmp_path_factory):
    """A server with these options, whose `classify` is cached, and the spans that it sends."""
    folder = tmp_path_factory.mktemp("options")
    models = sorted(path.name for path in repository.iterdir())
    caches = wheel_folder("pytriton") / "tritonserver" / "caches"
    with collector() as (address, spans):
        options = [
            f"--cache-directory={caches}",
            "--cache-config=local,size=67108864",
            *(word.replace("collector:4318", address) for word in documented("operations.md", "trace-config")),
            *documented("contract.md", "http-header-forward-pattern"),
        ]
        cached = repository_with_cache(repository, folder / "models", models, "classify")
        with EmbeddedServer(cached, Ports.free(), folder / "log", options=options) as server:
            yield server, spans


def post(server: EmbeddedServer, model: str, image: bytes, **headers: str) -> tuple[int, bytes]:
    """Status and answer of a request whose body is the image."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    try:
        plain = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"}
        connection.request("POST", f"/v2/models/{model}/infer", image, plain | headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("models", "cached"),
    [
        pytest.param(["heatmap"], "heatmap", id="by its own config", marks=pytest.mark.slow),
        pytest.param(["integrated_gradients", "explain"], "explain", id="by an ensemble's config"),
    ],
)
def test_a_model_that_would_answer_with_anothers_map_does_not_load(repository, tmp_path, models, cached):
    folder = repository_with_cache(repository, tmp_path / "models", models, cached)
    server = EmbeddedServer(folder, Ports.free(), tmp_path / "log")
    with pytest.raises(ServerError, match=f"{cached} {REFUSAL} {cached}/config.pbtxt"), server:
        pass


def test_cached_predictions_are_those_of_their_own_images(traced, triton):
    server, _ = traced
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        for image in ([encode(scene_image(index))] for index in (0, 1, 0)):
            cached, fresh = (
                infer(each, image, outputs=("PROBABILITIES",), model="classify")["PROBABILITIES"]
                for each in (client, triton)
            )
            np.testing.assert_allclose(cached, fresh, atol=1e-6)
    metrics = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    assert 'nv_cache_num_hits_per_model{model="classify",version="1"} 1' in metrics


def test_headers_become_parameters(traced):
    server, _ = traced
    status, answer = post(server, "explain_image", encode(scene_image(0)), n_steps="0")
    assert status == 400
    assert b"'n_steps' must be an integer from 1" in answer
    status, answer = post(server, "explain_image", encode(scene_image(0)), n_steps="1")
    assert status == 200
    assert b"\x89PNG" in answer


def test_spans_of_a_request_and_its_steps_reach_a_collector(traced):
    server, spans = traced
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    status, _ = post(
        server, "explain_image", encode(scene_image(1)), n_steps="1", traceparent=f"00-{trace}-00f067aa0ba902b7-01"
    )
    assert status == 200
    expected = {"InferRequest", "explain_image", "preprocess", "classifier", "integrated_gradients", "heatmap"}
    until = time.monotonic() + 20
    while missing := expected - {span["name"] for span in spans if span["traceId"] == trace}:
        assert time.monotonic() < until, missing
        time.sleep(0.2)  # Triton sends spans every 5 s
