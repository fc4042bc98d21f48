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
import time
from collections.abc import Mapping

# A PNG of 8 x 8 grey pixels.
IMAGE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR42mNsYIAAJgaKGAAmCACQtTEKkQAAAABJRU5ErkJggg=="
)
# What is asked of each model, and one of its outputs that only the whole chain makes.
MODELS = {"explain": ("HEATMAP", {"n_steps": 1}), "classify": ("PROBABILITIES", {})}
# The models that such a request passes, in order.
CHAINS = {
    "explain": ("preprocess", "classifier", "integrated_gradients", "heatmap"),
    "classify": ("preprocess", "classifier"),
}
# The codes with which a server with too much to do answers, and `explain_stream` to what is no image.
OVERLOADED, INVALID = "[overloaded] ", "[invalid] "
# What counts as going on, beside answers: Triton counts those of `preprocess` by the batch, and of
# `integrated_gradients` before they are there.
DONE = ("nv_inference_request_success", "nv_inference_request_failure", "preprocess_images_total")
GRADIENTS_DONE = ("integrated_gradients_rows_total",)
STREAMS_ENDED = "explain_stream_streams_total"
PENDING = ("nv_inference_pending_request_count", "integrated_gradients_waiting_images")


def served_model(settings: Mapping[str, str]) -> str:
    """The model to ask of a server with these settings: `tools.deploy.serve` has them."""
    return "classify" if settings.get("MODELS") == "classify" else "explain"


class ProbeError(Exception):
    """There was no answer as it should be; the message says what there was."""


class NoAnswerError(ProbeError):
    """There was none in time."""


class OverloadedError(ProbeError):
    """It says that it has too much to do."""


def probe(host: str, port: int, model: str = "explain", seconds: float = 5.0) -> None:
    """Ask a model for an answer over HTTP.

    Args:
        host: of the server.
        port: its HTTP port.
        model: ``explain`` or ``classify``.
        seconds: how long the answer may take.

    Raises:
        NoAnswerError: it did not answer in time.
        OverloadedError: it has too much to do.
        ProbeError: it answered with another error, or cannot be reached.
    """
    output, parameters = MODELS[model]
    image = struct.pack("<I", len(IMAGE)) + IMAGE
    content = {"name": "IMAGE", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(image)}}
    wanted = {"name": output, "parameters": {"binary_data": True}}
    # Whoever gave up is not worked for: a probe must not add to the load that it finds.
    given_up = {"timeout": int(1e6 * seconds)}
    header = json.dumps({"inputs": [content], "outputs": [wanted], "parameters": {**parameters, **given_up}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    status, body = _ask(host, port, seconds, "POST", f"/v2/models/{model}/infer", header + image, headers)
    if status == 503 and OVERLOADED.encode() in body:
        raise OverloadedError(f"{model} is overloaded")
    if status != 200:
        raise ProbeError(f"{model} answers {status}: {body[:300].decode(errors='replace')}")


def probe_patiently(host: str, port: int, metrics_port: int, model: str = "explain", seconds: float = 5.0) -> None:
    """Ask for answers; where there is none in time, tell a server with too much to do from one that hangs.

    Raises:
        ProbeError: it cannot be reached, answers with an error, or one of its models does not go on.
    """
    started, before = time.monotonic(), _counts(host, metrics_port, model, seconds)
    try:
        probe(host, port, model, seconds)
    except (NoAnswerError, OverloadedError) as failure:
        time.sleep(max(0.0, started + seconds - time.monotonic()))  # in which something must have gone on
        after = _counts(host, metrics_port, model, seconds)
        if hanging := hanging_model(before, after, isinstance(failure, NoAnswerError)):
            raise ProbeError(f"{failure}; {hanging} does not go on") from None
        return
    if model != "explain":
        return
    try:
        probe_stream(host, port, seconds)
    except NoAnswerError:
        ended = total(read_metrics(host, metrics_port, seconds), STREAMS_ENDED)
        time.sleep(seconds)
        if total(read_metrics(host, metrics_port, seconds), STREAMS_ENDED) == ended:
            raise


def probe_stream(host: str, port: int, seconds: float = 5.0) -> None:
    """See that `explain_stream` answers, by a request that it must refuse: its image is no image.

    Raises:
        NoAnswerError: it did not answer in time.
        ProbeError: it answered something else, or cannot be reached.
    """
    request = json.dumps({"IMAGE": "no image"}).encode()
    _, answer = _ask(host, port, seconds, "POST", "/v2/models/explain_stream/generate_stream", request)
    body = answer.decode(errors="replace")
    if INVALID not in body and OVERLOADED not in body:
        raise ProbeError(f"explain_stream answers {body[:300]}")


Counts = dict[str, "tuple[int, int]"]


def hanging_model(before: Counts, after: Counts, is_stuck: bool) -> str | None:
    """The model that does not go on, by what each had done and had waiting before and after.

    Args:
        before: model -> done, waiting; in the order of the chain.
        after: the same, seconds later.
        is_stuck: whether a request was sent before and has not been answered.
    """
    for model, (done, waiting) in after.items():
        if done == before[model][0] and waiting and before[model][1]:
            return model
    if not is_stuck:
        return None
    for model, (done, waiting) in after.items():
        if waiting:
            return None  # it may be waiting here, where things go on
        if done == before[model][0]:
            return model
    return None


def _counts(host: str, port: int, model: str, seconds: float) -> Counts:
    """For each model of a chain, how much it has done and how much waits for it."""
    found, series = {}, read_metrics(host, port, seconds)
    for each in CHAINS[model]:
        done_names = GRADIENTS_DONE if each == "integrated_gradients" else DONE
        own = [(name, value) for name, labels, value in series if f'model="{each}"' in labels or name.startswith(each)]
        found[each] = (
            sum(int(value) for name, value in own if name in done_names),
            sum(int(value) for name, value in own if name in PENDING),
        )
    return found


Series = list["tuple[str, str, float]"]


def total(series: Series, name: str) -> float:
    """The sum of a metric's values over all its labels."""
    return sum(value for each, _, value in series if each == name)


def read_metrics(host: str, port: int, seconds: float = 10.0) -> Series:
    """Name, labels as they are written, and value of each of a server's metrics that has labels.

    Raises:
        ProbeError: there is no answer.
    """
    _, body = _ask(host, port, seconds, "GET", "/metrics")
    series = re.findall(r"^(\w+)\{(.*)\} (\S+)$", body.decode(), re.MULTILINE)
    return [(name, labels, float(value)) for name, labels, value in series]


def _ask(
    host: str, port: int, seconds: float, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}
) -> tuple[int, bytes]:
    """Status and body of an answer over HTTP.

    Raises:
        NoAnswerError: there was none in time.
        ProbeError: the server cannot be reached, or breaks off.
    """
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read()
    except TimeoutError:
        raise NoAnswerError(f"{host}:{port}{path} did not answer in {seconds:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise ProbeError(f"{host}:{port} does not answer: {error!r}") from None
    finally:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tools.probe", description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=int(os.environ.get("HTTP_PORT") or 8000))
    parser.add_argument("--metrics-port", type=int, default=int(os.environ.get("METRICS_PORT") or 8002))
    parser.add_argument("--patient", action="store_true", help="a server that has too much to do, and does it, is well")
    served = served_model(os.environ)
    parser.add_argument("--model", choices=MODELS, default=served, help=f"default, by MODELS: {served}")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long it may take (default: 5)")
    arguments = parser.parse_args()
    try:
        if arguments.patient:
            probe_patiently(arguments.host, arguments.port, arguments.metrics_port, arguments.model, arguments.seconds)
        else:
            probe(arguments.host, arguments.port, arguments.model, arguments.seconds)
    except ProbeError as error:
        sys.exit(f"probe: {error}")


if __name__ == "__main__":
    main()
