"""Foundations of the benchmarks: the peer answers as the server does, and perf_analyzer runs against the server."""

from __future__ import annotations

import subprocess
import sys

import httpx
import numpy as np
import pytest
from conftest import relative_distance
from live_server import infer

from tools.bench.load import jpeg_images
from tools.bench.perf import read_profile, run
from tools.bench.server import PeerService
from tools.paths import ROOT


@pytest.mark.slow
def test_the_peer_explains_the_same_as_the_server(triton):
    image = jpeg_images()[0]
    with PeerService() as service:
        answer = httpx.post(f"{service.url}/explain", content=image, timeout=120).json()
    served = infer(triton, [image])
    # Captum in float32 is up to 4e-3 from float64 on such images: a flipped activation is that much.
    assert relative_distance(np.array(answer["attributions"]), served["ATTRIBUTIONS"][0]) <= 5e-3
    assert answer["probability"] == pytest.approx(served["PROBABILITIES"].max(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["classify", "explain_stream"])
def test_perf_analyzer_measures_the_models(server, tmp_path, model):
    options = ["--concurrency-range", "1", "--measurement-mode", "count_windows", "--measurement-request-count", "3"]
    options += ["--stability-percentage", "99", "--request-parameter", "n_steps:16:int"]
    assert run(model, server.grpc_url, options, tmp_path).returncode == 0
    (load,) = read_profile(tmp_path / f"{model}.json")
    assert load["requests"] >= 3
    assert load["first_ms"][0] > 0
    assert (load["first_ms"] == load["last_ms"]) == (model == "classify")
    assert (tmp_path / f"{model}.csv").read_text().startswith("Concurrency,")


@pytest.mark.slow
def test_the_wrapper_of_perf_analyzer_takes_its_options(server):
    command = [sys.executable, "-m", "tools.bench.perf", "explain", "-u", server.grpc_url, "--concurrency-range", "1"]
    command += ["--measurement-mode", "count_windows", "--measurement-request-count", "3"]
    command += ["--stability-percentage", "99", "--request-parameter", "n_steps:4:int"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "throughput" in result.stdout
