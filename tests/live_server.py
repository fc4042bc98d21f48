"""Asking the live server: requests, streams, and what it counts."""

from __future__ import annotations

import queue
import re
import time
import urllib.request
from dataclasses import dataclass, field

import numpy as np
import tritonclient.grpc
from attribution_metrics import FLUSH_SECONDS

OUTPUTS = (
    "PROBABILITIES",
    "EXPLAINED_CLASS",
    "ATTRIBUTIONS",
    "SALIENCY",
    "CONVERGENCE_DELTA",
    "N_STEPS",
    "ERROR_ESTIMATE",
    "HEATMAP",
)


def infer(triton, images, targets=None, outputs=OUTPUTS, model="explain", timeout_seconds=None, **parameters):
    """One request for a list of encoded images; output name -> array [n, ...]."""
    inputs = [tritonclient.grpc.InferInput("IMAGE", [len(images), 1], "BYTES")]
    inputs[0].set_data_from_numpy(np.array(images, np.object_)[:, None])
    if targets is not None:
        inputs.append(tritonclient.grpc.InferInput("TARGET", [len(images), 1], "INT64"))
        inputs[-1].set_data_from_numpy(np.array(targets, np.int64)[:, None])
    requested = [tritonclient.grpc.InferRequestedOutput(name) for name in outputs]
    timeout = timeout_seconds and int(1e6 * timeout_seconds)
    result = triton.infer(model, inputs, outputs=requested, parameters=parameters, timeout=timeout)
    return {name: result.as_numpy(name) for name in outputs}


def executed_batches(triton, model) -> dict[int, int]:
    """Batch size -> how many batches of that size the model has executed."""
    statistics = triton.get_inference_statistics(model).model_stats[0]
    return {entry.batch_size: entry.compute_infer.count for entry in statistics.batch_stats}


def wait_for_batches(triton, model, size, count):
    """Until the model has executed so many batches of a size: a batch counts after its last response."""
    deadline = time.monotonic() + 10
    while executed_batches(triton, model).get(size, 0) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert executed_batches(triton, model).get(size, 0) == count


@dataclass
class Heard:
    """What a stream said: outputs of each response, then the error if it ended in one."""

    responses: list[dict[str, np.ndarray]] = field(default_factory=list)
    finals: list[bool] = field(default_factory=list)
    error: Exception | None = None


class Stream:
    """One request on a gRPC stream of its own."""

    def __init__(self, server, images, targets=None, outputs=None, timeout_seconds=None, **parameters):
        self._said = queue.Queue()
        self.client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
        self.client.start_stream(callback=lambda result, error: self._said.put((result, error)))
        inputs = [tritonclient.grpc.InferInput("IMAGE", [len(images), 1], "BYTES")]
        inputs[0].set_data_from_numpy(np.array(images, np.object_)[:, None])
        if targets is not None:
            inputs.append(tritonclient.grpc.InferInput("TARGET", [len(targets), 1], "INT64"))
            inputs[-1].set_data_from_numpy(np.array(targets, np.int64)[:, None])
        requested = outputs and [tritonclient.grpc.InferRequestedOutput(name) for name in outputs]
        timeout = timeout_seconds and int(1e6 * timeout_seconds)
        self.client.async_stream_infer(
            "explain_stream", inputs, outputs=requested, parameters=parameters, timeout=timeout
        )

    def next(self):
        result, error = self._said.get(timeout=60)
        if error is not None:
            return error
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        return {output.name: result.as_numpy(output.name) for output in response.outputs}, final

    def hear(self) -> Heard:
        """All of it; the connection is closed."""
        heard = Heard()
        while not heard.finals or not heard.finals[-1]:
            said = self.next()
            if isinstance(said, Exception):
                heard.error = said
                break
            heard.responses.append(said[0])
            heard.finals.append(said[1])
        self.client.stop_stream()
        self.client.close()
        return heard


def rows_passed(server) -> int:
    """The rows that `integrated_gradients` has counted, once it has told the server of them."""
    time.sleep(4 * FLUSH_SECONDS)
    text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    return int(float(re.findall(r"^integrated_gradients_rows_total(?:\{.*\})? (\S+)$", text, re.MULTILINE)[0]))
