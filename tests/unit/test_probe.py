"""What the probe sends, and how it distinguishes an overloaded server from one that hangs."""

import contextlib
import http.server
import io
import threading
import time
from collections.abc import Iterator

import numpy as np
import probe_requests
import pytest
from PIL import Image

from tools.probe import (
    CHAINS,
    PROBE_ID,
    SIDE,
    NoAnswerError,
    OverloadedError,
    ProbeError,
    grey_png,
    hanging_model,
    probe,
    probe_patiently,
)


def test_the_models_know_the_probe_by_its_id():
    assert PROBE_ID == probe_requests.PROBE_ID


def test_the_probe_sends_a_picture_of_its_own_each_time():
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(grey_png(pixels.tobytes())))), pixels)


def chain(**changes) -> dict[str, tuple[int, int]]:
    return {name: changes.get(name, (5, 0)) for name in CHAINS["explain"]}


@pytest.mark.parametrize(
    ("before", "after", "is_stuck", "hanging"),
    [
        # a request is stuck in a model that makes no progress
        ({}, {"preprocess": (6, 0), "classifier": (6, 0)}, True, "integrated_gradients"),
        # gradients wait and none is computed, whatever waits elsewhere, and whether or not the probe was refused
        (
            {"integrated_gradients": (5, 3)},
            {"preprocess": (9, 4), "integrated_gradients": (5, 4)},
            True,
            "integrated_gradients",
        ),
        ({"integrated_gradients": (5, 3)}, {"integrated_gradients": (5, 4)}, False, "integrated_gradients"),
        # many requests wait, with progress
        ({}, {"preprocess": (9, 40)}, True, None),
        ({"integrated_gradients": (5, 3)}, {"integrated_gradients": (9, 4)}, False, None),
        # all models made progress and nothing waits: the answer was late
        ({}, {name: (6, 0) for name in CHAINS["explain"]}, True, None),
    ],
)
def test_an_overloaded_server_is_distinguished_from_one_that_hangs(before, after, is_stuck, hanging):
    assert hanging_model(chain(**before), chain(**after), is_stuck) == hanging


SECONDS = 0.3  # of the probes here


@contextlib.contextmanager
def answering(status: int | None, body: str, gradients_run: bool) -> Iterator[int]:
    """A server that answers every explanation alike, or not at all; its port.

    Explanations wait for gradients, whose rows grow at each reading of the metrics if ``gradients_run``.
    """
    rows = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if status is None:
                time.sleep(2 * SECONDS)
            else:
                self._answer(status, body)

        def do_GET(self) -> None:
            nonlocal rows
            rows += gradients_run
            done = "".join(f'nv_inference_request_success{{model="{name}"}} {rows}\n' for name in CHAINS["explain"])
            own = f'integrated_gradients_rows_total{{pid="1"}} {rows}\n'
            self._answer(200, f'{done}{own}integrated_gradients_waiting_images{{pid="1"}} 9\n')

        def _answer(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


OVERLOADED = (503, "in ensemble 'explain', [overloaded] requests of 20 gradients an image and more are refused")
LATE = (503, "in ensemble 'explain', [late] the request's timeout of 4 s is over")
SILENT = (None, "")


@pytest.mark.parametrize("answer", [OVERLOADED, LATE, SILENT], ids=["overloaded", "late", "silent"])
def test_a_full_gradient_worker_is_healthy_while_it_makes_progress_and_only_then(answer):
    with answering(*answer, gradients_run=True) as port:
        probe_patiently("127.0.0.1", port, port, seconds=SECONDS)
        with pytest.raises(OverloadedError if answer is OVERLOADED else NoAnswerError):
            probe("127.0.0.1", port, seconds=SECONDS)
    with (
        answering(*answer, gradients_run=False) as port,
        pytest.raises(ProbeError, match="integrated_gradients makes no progress"),
    ):
        probe_patiently("127.0.0.1", port, port, seconds=SECONDS)


@pytest.mark.parametrize("answer", [(500, "stub is dead"), (503, "model is not ready"), (404, "not found")], ids=str)
def test_a_broken_server_is_not_healthy_whatever_makes_progress(answer):
    with answering(*answer, gradients_run=True) as port, pytest.raises(ProbeError, match=answer[1]):
        probe_patiently("127.0.0.1", port, port, seconds=SECONDS)
