"""Check that a server answers: ``python3 -m tools.probe`` requests an explanation, or prediction, of a small image.

Overload is no fault: a server that sheds requests, or answers late, is alive and ready while its models make progress.
Unready is one that could not answer if it were idle.

For health checks and probes: Triton's own readiness does not notice a model's process that died or hangs. It needs only
the standard library. Exit status 0: the server answered in time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

# The id of a request by which the models know a health check, and count it apart from traffic (`probe_requests.py`).
PROBE_ID = "health-probe"
SIDE = 8  # of the image, in pixels
# For each model, an output that needs the whole chain of models, and the parameters of the request.
MODELS = {"explain": ("HEATMAP", {"n_steps": 1}), "classify": ("PROBABILITIES", {})}
# The models that such a request passes, in order.
CHAINS = {
    "explain": ("preprocess", "classifier", "integrated_gradients", "heatmap"),
    "classify": ("preprocess", "classifier"),
}
# Error codes: of an overloaded server, of a request whose time is over, and of `explain_stream` for what is no image.
OVERLOADED, LATE, INVALID = "[overloaded] ", "[late] ", "[invalid] "
# Counters that show progress. Requests alone do not: Triton counts those of `preprocess` by the batch, and those of
# `integrated_gradients` before they are answered.
DONE = ("nv_inference_request_success", "nv_inference_request_failure", "preprocess_images_total")
GRADIENTS_DONE = ("integrated_gradients_rows_total",)
STREAMS_ENDED = ("explain_stream_streams_total", "explain_stream_probes_total")
PENDING = ("nv_inference_pending_request_count", "integrated_gradients_waiting_images")


def served_model(settings: Mapping[str, str]) -> str:
    """The model to probe on a server with these settings, which are those of `tools.deploy.serve`."""
    return "classify" if settings.get("MODELS") == "classify" else "explain"


class ProbeError(Exception):
    """The server did not answer as it should; the message says what it did."""


class NoAnswerError(ProbeError):
    """There was no answer in time."""


class OverloadedError(ProbeError):
    """The server says that it is overloaded."""


def leaving_file(port: int) -> Path:
    """The file that says, of the server with this HTTP port, that it is about to be stopped (`tools.deploy.drain`)."""
    return Path(tempfile.gettempdir()) / f"explaining_triton_{port}.leaving"


def probe(host: str, port: int, model: str = "explain", seconds: float = 5.0) -> None:
    """Send one request to a model over HTTP and check the answer.

    Args:
        host: of the server.
        port: its HTTP port.
        model: ``explain`` or ``classify``.
        seconds: how long the answer may take.

    Raises:
        NoAnswerError: there was no answer in time.
        OverloadedError: the server is overloaded.
        ProbeError: it answered with another error, or cannot be reached.
    """
    output, parameters = MODELS[model]
    file = grey_png(os.urandom(SIDE * SIDE))
    image = struct.pack("<I", len(file)) + file
    content = {"name": "IMAGE", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(image)}}
    wanted = {"name": output, "parameters": {"binary_data": True}}
    # Triton drops the request after this time: a probe that has given up must not add load.
    timeout = {"timeout": int(1e6 * seconds)}
    request = {"id": PROBE_ID, "inputs": [content], "outputs": [wanted], "parameters": {**parameters, **timeout}}
    header = json.dumps(request).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    status, body = _ask(host, port, seconds, "POST", f"/v2/models/{model}/infer", header + image, headers)
    if status == 503 and OVERLOADED.encode() in body:
        raise OverloadedError(f"{model} is overloaded")
    if status == 503 and LATE.encode() in body:
        raise NoAnswerError(f"{model} did not answer in {seconds:g} s")
    if status != 200:
        raise ProbeError(f"{model} answers {status}: {body[:300].decode(errors='replace')}")


def grey_png(pixels: bytes) -> bytes:
    """A PNG file of ``SIDE`` x ``SIDE`` grey pixels. No response cache has random ones, so each model must answer."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + pixels[start : start + SIDE] for start in range(0, len(pixels), SIDE))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def probe_patiently(host: str, port: int, metrics_port: int, model: str = "explain", seconds: float = 5.0) -> None:
    """Probe a server; if it does not answer in time, find out whether it is overloaded or hangs.

    Raises:
        ProbeError: it cannot be reached, answers with an error, or one of its models makes no progress.
    """
    started, before = time.monotonic(), _counts(host, metrics_port, model, seconds)
    try:
        probe(host, port, model, seconds)
    except (NoAnswerError, OverloadedError) as failure:
        time.sleep(max(0.0, started + seconds - time.monotonic()))  # in this time there must be progress
        after = _counts(host, metrics_port, model, seconds)
        if hanging := hanging_model(before, after, isinstance(failure, NoAnswerError)):
            raise ProbeError(f"{failure}; {hanging} makes no progress") from None
        return
    if model != "explain":
        return
    try:
        probe_stream(host, port, seconds)
    except NoAnswerError:
        ended = total(read_metrics(host, metrics_port, seconds), *STREAMS_ENDED)
        time.sleep(seconds)
        if total(read_metrics(host, metrics_port, seconds), *STREAMS_ENDED) == ended:
            raise


def probe_stream(host: str, port: int, seconds: float = 5.0) -> None:
    """Check that `explain_stream` answers, by a request that it must refuse because its bytes are not an image.

    Raises:
        NoAnswerError: there was no answer in time.
        ProbeError: it answered something else, or cannot be reached.
    """
    request = json.dumps({"id": PROBE_ID, "IMAGE": "no image"}).encode()
    _, answer = _ask(host, port, seconds, "POST", "/v2/models/explain_stream/generate_stream", request)
    body = answer.decode(errors="replace")
    if INVALID not in body and OVERLOADED not in body:
        raise ProbeError(f"explain_stream answers {body[:300]}")


Counts = dict[str, "tuple[int, int]"]


def hanging_model(before: Counts, after: Counts, is_stuck: bool) -> str | None:
    """The first model that makes no progress, from two readings of its counters; None if all do.

    Args:
        before: model -> (requests done, requests waiting), in the order of the chain.
        after: the same, seconds later.
        is_stuck: whether a request that was sent at ``before`` has not been answered.
    """
    for model, (done, waiting) in after.items():
        if done == before[model][0] and waiting and before[model][1]:
            return model
    if not is_stuck:
        return None
    for model, (done, waiting) in after.items():
        if waiting:
            return None  # the request may be waiting here, at a model that makes progress
        if done == before[model][0]:
            return model
    return None


def _counts(host: str, port: int, model: str, seconds: float) -> Counts:
    """Requests done and requests waiting, for each model of a chain."""
    counts, series = {}, read_metrics(host, port, seconds)
    for step in CHAINS[model]:
        done_names = GRADIENTS_DONE if step == "integrated_gradients" else DONE
        values = [(name, value) for name, tags, value in series if f'model="{step}"' in tags or name.startswith(step)]
        counts[step] = (
            sum(int(value) for name, value in values if name in done_names),
            sum(int(value) for name, value in values if name in PENDING),
        )
    return counts


Series = list["tuple[str, str, float]"]


def total(series: Series, *names: str) -> float:
    """The sum of metrics' values over all their labels."""
    return sum(value for metric, _, value in series if metric in names)


def read_metrics(host: str, port: int, seconds: float = 10.0) -> Series:
    """Name, labels as text, and value of each of a server's metrics that has labels.

    Raises:
        ProbeError: the server does not answer.
    """
    _, body = _ask(host, port, seconds, "GET", "/metrics")
    series = re.findall(r"^(\w+)\{(.*)\} (\S+)$", body.decode(), re.MULTILINE)
    return [(name, labels, float(value)) for name, labels, value in series]


def _ask(
    host: str, port: int, seconds: float, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}
) -> tuple[int, bytes]:
    """Status and body of an answer over HTTP.

    Raises:
        NoAnswerError: there was no answer in time.
        ProbeError: the server cannot be reached, or closes the connection.
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
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--patient", action="store_true", help="liveness: a server that makes progress is healthy")
    kinds.add_argument("--ready", action="store_true", help="readiness: the same, and it is not about to be stopped")
    served = served_model(os.environ)
    parser.add_argument("--model", choices=MODELS, default=served, help=f"default, by MODELS: {served}")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for an answer (default: 5)")
    arguments = parser.parse_args()
    is_leaving = leaving_file(arguments.port).exists()
    if is_leaving and arguments.ready:
        sys.exit("probe: the server is about to be stopped")
    if is_leaving and arguments.patient:
        return  # what drains it watches it, and no probe may look like a request of a client
    try:
        if arguments.patient or arguments.ready:
            probe_patiently(arguments.host, arguments.port, arguments.metrics_port, arguments.model, arguments.seconds)
        else:
            probe(arguments.host, arguments.port, arguments.model, arguments.seconds)
    except ProbeError as error:
        sys.exit(f"probe: {error}")


if __name__ == "__main__":
    main()
