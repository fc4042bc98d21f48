"""``explain doctor``: checks whether this client can use a server, and says what is wrong if not."""

from __future__ import annotations

import contextlib
import re
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from explain_client.client import ExplainClient
from explain_client.connection import RESOLVER, TLS, Connection, Url, connect
from explain_client.errors import ExplainError

T = TypeVar("T")
OLDEST_SERVER = (2, 51)
# Outputs that this client requests; those of an older or newer model repository may differ.
CONTRACT = {
    "classify": {"PROBABILITIES"},
    "explain": {
        "PROBABILITIES",
        "EXPLAINED_CLASS",
        "ATTRIBUTIONS",
        "SALIENCY",
        "CONVERGENCE_DELTA",
        "N_STEPS",
        "ERROR_ESTIMATE",
        "HEATMAP",
    },
}
CONTRACT["explain_stream"] = CONTRACT["explain"]
TIMED_CALLS = 5


@dataclass(frozen=True)
class Finding:
    """The result of one check; ``message`` says what is wrong and what to do, or what is there."""

    name: str
    is_good: bool
    message: str


def diagnose(
    url: Url | None = None,
    timeout: float = 30.0,
    headers: Mapping[str, str] | None = None,
    token: str | None = None,
    tls: TLS | None = None,
) -> Iterator[Finding]:
    """Run the checks in order; stop at a fault that makes the others pointless. Arguments as of ``ExplainClient``."""
    try:
        connection = connect(url, headers, token, tls)
    except (ExplainError, OSError, ValueError) as error:
        yield Finding("address", False, str(error))
        return
    fault = _check_port(connection)
    if fault is not None:
        yield fault
        return
    with contextlib.closing(connection.open()) as client:
        metadata = _ask(lambda: client.get_server_metadata(client_timeout=timeout))
        if isinstance(metadata, str):
            yield Finding("server", False, f"{connection.name} is not a Triton server, or cannot answer: {metadata}")
            return
        yield _check_version(metadata.name, metadata.version)
        for model, outputs in CONTRACT.items():
            yield _check_model(client, model, outputs, timeout)
        if not all(_is_ready(client, model, timeout) for model in CONTRACT):
            return
    with ExplainClient(url, timeout, headers=headers, token=token, tls=tls) as explainer:
        yield from _check_latency(explainer)


def _check_port(connection: Connection) -> Finding | None:
    """What is wrong with the port; None if nothing is, or if only gRPC knows where it is."""
    place = re.fullmatch(r"\[?([^/]+?)\]?:(\d+)", connection.target)
    if place is None or RESOLVER.match(connection.target):
        return None
    url = connection.name
    try:
        with socket.create_connection((place[1], int(place[2])), timeout=5) as opened:
            if connection.credentials is not None or not _speaks_http(opened):
                return None
    except OSError as error:
        problem = f"nothing answers at {url} ({error.strerror or error}): the server is down, or listens elsewhere"
        return Finding("connection", False, problem)
    return Finding(
        "protocol", False, f"{url} speaks HTTP, not gRPC: give the gRPC port, by default 8001 where HTTP is 8000"
    )


def _speaks_http(connection: socket.socket) -> bool:
    """Whether a plain HTTP request gets a plain HTTP answer; gRPC answers with frames."""
    connection.sendall(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
    try:
        return connection.recv(7) == b"HTTP/1."
    except OSError:
        return False


def _check_version(name: str, version: str) -> Finding:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    oldest = ".".join(map(str, OLDEST_SERVER))
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_SERVER:
        return Finding("version", False, f"{name} {version} is not what this client was made for: {oldest} or newer")
    return Finding("version", True, f"{name} {version}")


def _check_model(client: triton.InferenceServerClient, model: str, outputs: set[str], timeout: float) -> Finding:
    metadata = _ask(lambda: client.get_model_metadata(model, client_timeout=timeout))
    if isinstance(metadata, str):
        if "not found" in metadata:
            return Finding(model, False, f"the server has no model {model!r}: serve this project's model_repository")
        return Finding(model, False, f"model {model!r} is not ready: {metadata}")
    missing = outputs - {output.name for output in metadata.outputs}
    if missing:
        names = ", ".join(sorted(missing))
        return Finding(model, False, f"model {model!r} has no output {names}: another version of the model repository")
    if not _is_ready(client, model, timeout):
        return Finding(model, False, f"model {model!r} is not ready: see the server's log")
    return Finding(model, True, "ready")


def _is_ready(client: triton.InferenceServerClient, model: str, timeout: float) -> bool:
    return _ask(lambda: client.is_model_ready(model, client_timeout=timeout)) is True


def _check_latency(client: ExplainClient) -> Iterator[Finding]:
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    calls: dict[str, Callable[[], object]] = {
        "classify": lambda: client.classify(image),
        "explain, tolerance 0.05": lambda: client.explain(image, tolerance=0.05),
    }
    for name, call in calls.items():
        seconds = []
        try:
            for _ in range(TIMED_CALLS):
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
        except ExplainError as error:
            yield Finding(f"latency of {name}", False, str(error))
        else:
            median = 1e3 * statistics.median(seconds)
            yield Finding(f"latency of {name}", True, f"{median:.0f} ms, median of {TIMED_CALLS}")


def _ask(call: Callable[[], T]) -> T | str:
    """A call's result, or the message of its error."""
    try:
        return call()
    except InferenceServerException as error:
        return str(error.message() or error)
