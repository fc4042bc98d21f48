"""The live server's Prometheus metrics of the gradients."""

from __future__ import annotations

import re
import urllib.request

import pytest
from conftest import encode, scene_image
from live_server import infer, rows_passed
from tritonclient.utils import InferenceServerException


def test_the_live_server_counts_requests_by_outcome_and_images_by_method(server, triton):
    def read() -> dict[str, float]:
        rows_passed(server)  # waits until the metrics have been flushed
        text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
        series = re.findall(r"^(integrated_gradients_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
        return {
            f"{name} {' '.join(re.findall(r'(?:le|method|outcome)=.[^,]*', labels))}": float(value)
            for name, labels, value in series
        }

    before = read()
    image = [encode(scene_image(0))]
    infer(triton, image, outputs=("N_STEPS",), n_steps=5)
    infer(triton, image * 2, outputs=("N_STEPS",), tolerance="0.2")
    with pytest.raises(InferenceServerException):
        infer(triton, image, outputs=("N_STEPS",), n_steps=0)
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    assert grown['integrated_gradients_requests_total outcome="explained"'] == 2
    assert grown['integrated_gradients_requests_total outcome="invalid"'] == 1
    assert grown['integrated_gradients_explanations_total method="gausslegendre"'] == 1
    assert grown['integrated_gradients_explanations_total method="tolerance"'] == 2
    assert grown['integrated_gradients_error_estimate_count method="tolerance"'] == 2
    assert grown['integrated_gradients_steps_bucket le="8" method="gausslegendre"'] == 1
    assert grown['integrated_gradients_steps_sum method="gausslegendre"'] == 5
    assert grown["integrated_gradients_rows_total "] >= 5 + 2 * 4
    assert grown["integrated_gradients_chunks_total "] == grown["integrated_gradients_chunk_fill_count "] >= 2
    assert grown["integrated_gradients_wait_seconds_count "] == 2  # of requests
    assert 0 < grown['integrated_gradients_compute_seconds_sum method="gausslegendre"'] < 60
    assert after["integrated_gradients_waiting_images "] == 0
