"""Requests to the live server, streams, its counters and its processes."""

from __future__ import annotations

import contextlib
import queue
import re
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tritonclient.grpc
from attribution_metrics import FLUSH_SECONDS

from tools.bench.processes import session

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


def infer(
    triton, images, targets=None, outputs=OUTPUTS, model="explain", timeout_seconds=None, request_id="", **parameters
):
    """One request for a list of encoded images; output name -> array [n, ...]."""
    inputs = [tritonclient.grpc.InferInput("IMAGE", [len(images), 1], "BYTES")]
    inputs[0].set_data_from_numpy(np.array(images, np.object_)[:, None])
    if targets is not None:
        inputs.append(tritonclient.grpc.InferInput("TARGET", [len(images), 1], "INT64"))
        inputs[-1].set_data_from_numpy(np.array(targets, np.int64)[:, None])
    requested = [tritonclient.grpc.InferRequestedOutput(name) for name in outputs]
    timeout = timeout_seconds and int(1e6 * timeout_seconds)
    result = triton.infer(
        model, inputs, outputs=requested, parameters=parameters, timeout=timeout, request_id=request_id
    )
    return {name: result.as_numpy(name) for name in outputs}


def executed_batches(triton, model) -> dict[int, int]:
    """Batch size -> how many batches of that size the model has executed."""
    statistics = triton.get_inference_statistics(model).model_stats[0]
    return {entry.batch_size: entry.compute_infer.count for entry in statistics.batch_stats}


def wait_for_batches(triton, model, size, count):
    """Wait until the model has executed ``count`` batches of a size: a batch is counted after its last response."""
    deadline = time.monotonic() + 10
    while executed_batches(triton, model).get(size, 0) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert executed_batches(triton, model).get(size, 0) == count


@dataclass
class Heard:
    """A stream's responses: the outputs of each, whether it was final, and the error if it ended in one."""

    responses: list[dict[str, np.ndarray]] = field(default_factory=list)
    finals: list[bool] = field(default_factory=list)
    error: Exception | None = None


class Stream:
    """One request on its own gRPC stream."""

    def __init__(self, server, images, targets=None, outputs=None, timeout_seconds=None, **parameters):
        self._responses = queue.Queue()
        self.client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
        self.client.start_stream(callback=lambda result, error: self._responses.put((result, error)))
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
        result, error = self._responses.get(timeout=60)
        if error is not None:
            return error
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        return {output.name: result.as_numpy(output.name) for output in response.outputs}, final

    def hear(self) -> Heard:
        """Read the stream to its end and close the connection."""
        heard = Heard()
        while not heard.finals or not heard.finals[-1]:
            response = self.next()
            if isinstance(response, Exception):
                heard.error = response
                break
            heard.responses.append(response[0])
            heard.finals.append(response[1])
        self.client.stop_stream()
        self.client.close()
        return heard


def rows_passed(server) -> int:
    """The rows that `integrated_gradients` has counted, after a wait for its metrics to be flushed."""
    time.sleep(4 * FLUSH_SECONDS)
    text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    return int(float(re.findall(r"^integrated_gradients_rows_total(?:\{.*\})? (\S+)$", text, re.MULTILINE)[0]))


def stub(server_process: int, model: str) -> int:
    """Process number of a model's stub."""
    for process in session(server_process):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
            if "triton_python_backend_stub" in words[0] and any(word.startswith(f"{model}_") for word in words):
                return process
    raise AssertionError(f"{model} has no process")
