"""A server that keeps answers: repeated requests, other drawings, identical ones at once, a lower tolerance."""

from __future__ import annotations

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc
from conftest import encode, scene_image
from live_server import infer, rows_passed

from tools.bench.overload import with_settings
from tools.probe import PROBE_ID
from tools.server import EmbeddedServer, Ports

pytestmark = pytest.mark.slow  # a server of its own; tests/unit/test_shared_answers.py has the rest

ATTRIBUTION = ("ATTRIBUTIONS", "CONVERGENCE_DELTA", "N_STEPS", "HEATMAP")


@pytest.fixture(scope="module")
def keeping(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keeping")
    repository = with_settings(folder, "integrated_gradients", kept_bytes=64_000_000)
    with EmbeddedServer(repository, Ports.free(), log_file=folder / "triton.log") as server:
        yield server


def test_repeated_and_identical_requests_take_no_further_gradients(keeping):
    with tritonclient.grpc.InferenceServerClient(keeping.grpc_url) as triton:
        image = [encode(scene_image(3))]

        def spent(ask):
            before = rows_passed(keeping)
            return ask(), rows_passed(keeping) - before

        with ThreadPoolExecutor(32) as pool:
            many, rows = spent(
                lambda: list(pool.map(lambda _: infer(triton, image, outputs=ATTRIBUTION, n_steps=20), range(32)))
            )
        assert rows == 20
        for answer in many:
            for name in ("ATTRIBUTIONS", "N_STEPS", "HEATMAP"):
                np.testing.assert_array_equal(answer[name], many[0][name])
            # The delta is that of the request's own logits, which the classifier rounds by the size of its batch.
            np.testing.assert_allclose(answer["CONVERGENCE_DELTA"], many[0]["CONVERGENCE_DELTA"], atol=1e-4)
        again, rows = spent(lambda: infer(triton, image, outputs=ATTRIBUTION, n_steps=20, polarity="all"))
        assert rows == 0
        np.testing.assert_array_equal(again["ATTRIBUTIONS"], many[0]["ATTRIBUTIONS"])
        assert again["HEATMAP"] != many[0]["HEATMAP"]
        _, rows = spent(lambda: infer(triton, image, outputs=ATTRIBUTION, n_steps=20, output="probability"))
        assert rows == 20
        coarse, first = spent(lambda: infer(triton, image, outputs=ATTRIBUTION, n_steps=400, tolerance="0.1"))
        fine, _ = spent(lambda: infer(triton, image, outputs=ATTRIBUTION, n_steps=400, tolerance="0.02"))
        assert first > 0
        assert fine["N_STEPS"] > coarse["N_STEPS"]
        metrics = urllib.request.urlopen(keeping.metrics_url, timeout=10).read().decode()
        series = re.findall(r'^integrated_gradients_answers_total{.*source="(\w+)".*} (\d+)', metrics, re.MULTILINE)
        counts = {source: int(count) for source, count in series}
        # Those of the 32 that come after the first one's answer find it kept.
        assert counts.pop("joined") + counts.pop("hit") == 31 + 1
        assert counts == {"continued": 1, "miss": 3}
        _, rows = spent(lambda: infer(triton, image * 3, [0, 3, 7], outputs=ATTRIBUTION, n_steps=10))
        assert rows == 30


def test_every_health_check_takes_gradients(keeping):
    with tritonclient.grpc.InferenceServerClient(keeping.grpc_url) as triton:
        for name in ("", PROBE_ID, PROBE_ID):
            before = rows_passed(keeping)
            infer(triton, [encode(scene_image(4))], outputs=ATTRIBUTION, n_steps=4, request_id=name)
            assert rows_passed(keeping) - before == 4
