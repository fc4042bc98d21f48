"""Whether a server really answers: ``python3 -m tools.probe`` asks for an explanation, or prediction, of a small image.

Triton's own readiness says nothing of a model's process that died or hangs. For health checks and probes; nothing but
the standard library, so that it runs anywhere. Exit status 0: it answered in time.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import re
import struct
import sys

# A PNG of 8 x 8 grey pixels.
IMAGE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR42mNsYIAAJgaKGAAmCACQtTEKkQAAAABJRU5ErkJggg=="
)
# What is asked of each model, and one of its outputs that only the whole chain makes.
MODELS = {"explain": ("HEATMAP", {"n_steps": 1}), "classify": ("PROBABILITIES", {})}


# The models that a request for an explanation passes, in order.
CHAIN = ("preprocess", "classifier", "integrated_gradients", "heatmap")
DONE = ("nv_inference_request_success", "nv_inference_request_failure")
PENDING = ("nv_inference_pending_request_count",)


class ProbeError(Exception):
    """There was no answer as it should be; the message says what there was."""


class NoAnswerError(ProbeError):
    """There was none in time."""


def probe(host: str, port: int, model: str = "explain", seconds: float = 5.0) -> None:
    """Ask a model for an answer over HTTP.

    Args:
        host: of the server.
        port: its HTTP port.
        model: ``explain`` or ``classify``.
        seconds: how long the answer may take.

    Raises:
        NoAnswerError: it did not answer in time.
        ProbeError: it answered with an error, or cannot be reached.
    """
    output, parameters = MODELS[model]
    image = struct.pack("<I", len(IMAGE)) + IMAGE
    content = {"name": "IMAGE", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(image)}}
    wanted = {"name": output, "parameters": {"binary_data": True}}
    # Whoever gave up is not worked for: a probe must not add to the load that it finds.
    given_up = {"timeout": int(1e6 * seconds)}
    header = json.dumps({"inputs": [content], "outputs": [wanted], "parameters": {**parameters, **given_up}}).encode()
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        path = f"/v2/models/{model}/infer"
        connection.request("POST", path, header + image, {"Inference-Header-Content-Length": str(len(header))})
        answer = connection.getresponse()
        body = answer.read()
    except TimeoutError:
        raise NoAnswerError(f"{model} did not answer in {seconds:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise ProbeError(f"{host}:{port} does not answer: {error!r}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise ProbeError(f"{model} answers {answer.status}: {body[:300].decode(errors='replace')}")


def probe_patiently(host: str, port: int, metrics_port: int, seconds: float = 5.0) -> None:
    """Ask `explain` for an answer; where there is none in time, tell a server with too much to do from one that hangs.

    Raises:
        ProbeError: it cannot be reached, answers with an error, or one of its models does not go on.
    """
    before = _counts(host, metrics_port, seconds)
    try:
        probe(host, port, "explain", seconds)
    except NoAnswerError as failure:
        if hanging := _hanging(before, _counts(host, metrics_port, seconds)):
            raise ProbeError(f"{failure}; {hanging} does not go on") from None


def _hanging(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> str | None:
    """The model that a request must be stuck in, by what was done and was pending at each before and after it."""
    for model in CHAIN:
        done, pending = after[model]
        if done == before[model][0]:
            return model
        if pending:
            return None  # it may be waiting here, where things go on
    return None


def _counts(host: str, port: int, seconds: float) -> dict[str, tuple[int, int]]:
    """For each model of the chain, how many requests it has done and how many wait for it."""
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise ProbeError(f"{host}:{port} gives no metrics: {error!r}") from None
    finally:
        connection.close()
    found = dict.fromkeys(CHAIN, (0, 0))
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        model = next((model for model in CHAIN if f'model="{model}"' in labels), None)
        if model is not None:
            done, pending = found[model]
            found[model] = done + (name in DONE) * int(float(value)), pending + (name in PENDING) * int(float(value))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tools.probe", description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=int(os.environ.get("HTTP_PORT") or 8000))
    parser.add_argument("--metrics-port", type=int, default=int(os.environ.get("METRICS_PORT") or 8002))
    parser.add_argument("--patient", action="store_true", help="a server that has too much to do, and does it, is well")
    parser.add_argument("--model", choices=MODELS, default="explain")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long it may take (default: 5)")
    arguments = parser.parse_args()
    try:
        if arguments.patient:
            probe_patiently(arguments.host, arguments.port, arguments.metrics_port, arguments.seconds)
        else:
            probe(arguments.host, arguments.port, arguments.model, arguments.seconds)
    except ProbeError as error:
        sys.exit(f"probe: {error}")


if __name__ == "__main__":
    main()
