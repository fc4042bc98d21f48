"""Requests that must be refused, on the live server, and the answers to their neighbours in a batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from conftest import encode, relative_distance, scene_image
from live_server import Stream, executed_batches, infer, rows_passed, wait_for_batches
from refusal_cases import INVALID_ARGUMENT, cases
from tritonclient.utils import InferenceServerException

from explain_client.errors import from_stream
from tools.refusals import DOCUMENT, table

CASES = cases()


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [encode(scene_image(index)) for index in range(8)]


@pytest.fixture(scope="module")
def answers(server, triton) -> list[InferenceServerException | None]:
    """To each case, in order."""
    return [refusal.send(triton) for refusal in CASES]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{case.group}: {case.what}" for case in CASES])
def test_refused_by_name(answers, number):
    answer = answers[number]
    assert answer is not None
    assert answer.status() == INVALID_ARGUMENT
    assert CASES[number].names in answer.message()


def test_there_are_enough_and_the_document_has_them_all_as_answered(answers):
    assert len(CASES) >= 60
    assert DOCUMENT.read_text() == table([(case, answer.message()) for case, answer in zip(CASES, answers)])


def test_a_good_request_succeeds_after_them_and_the_log_has_no_content(answers, server, triton, images):
    secret = b"a text that is no image: 4711"
    with pytest.raises(InferenceServerException):
        infer(triton, [secret], n_steps=1)
    with pytest.raises(InferenceServerException):
        infer(triton, images[:1], method="secret-4711")
    infer(triton, images[:1], n_steps=2)
    assert server.process.poll() is None
    assert "4711" not in server.log_file.read_text(errors="replace")


def ask_grpc(server) -> Callable:
    def ask(image: bytes, target: int, parameters: dict) -> np.ndarray | str:
        with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
            try:
                return infer(client, [image], [target], outputs=("ATTRIBUTIONS",), **parameters)["ATTRIBUTIONS"]
            except InferenceServerException as refusal:
                return f"{refusal.status()} {refusal.message()}"

    return ask


def ask_http(server) -> Callable:
    def ask(image: bytes, target: int, parameters: dict) -> np.ndarray | str:
        inputs = [
            tritonclient.http.InferInput("IMAGE", [1, 1], "BYTES"),
            tritonclient.http.InferInput("TARGET", [1, 1], "INT64"),
        ]
        inputs[0].set_data_from_numpy(np.array([[image]], np.object_))
        inputs[1].set_data_from_numpy(np.array([[target]], np.int64))
        outputs = [tritonclient.http.InferRequestedOutput("ATTRIBUTIONS")]
        with tritonclient.http.InferenceServerClient(server.http_url, network_timeout=120) as client:
            try:
                return client.infer("explain", inputs, outputs=outputs, parameters=parameters).as_numpy("ATTRIBUTIONS")
            except InferenceServerException as refusal:
                return f"{refusal.status()} {refusal.message()}"

    return ask


def ask_stream(server) -> Callable:
    def ask(image: bytes, target: int, parameters: dict) -> np.ndarray | str:
        heard = Stream(server, [image], [target], **parameters).hear()
        if heard.error is not None:
            error = from_stream(heard.error)
            return f"{error.status} {error}"
        return heard.responses[-1]["ATTRIBUTIONS"]

    return ask


def block_gradients(triton, images) -> None:
    """Keep the gradients busy for four seconds on any machine, so that other requests gather in the queue."""
    with pytest.raises(InferenceServerException, match="timeout"):
        infer(triton, images[:1], n_steps=1000, nt_samples=5, outputs=("N_STEPS",), timeout_seconds=4)


# A stream's errors are messages without a status (with the header that requests one, Triton 2.51 sometimes crashes);
# the client's exceptions have it.
INVALID = {"gRPC": INVALID_ARGUMENT, "HTTP": "400", "stream": "INVALID_ARGUMENT"}
TRANSPORTS = {"gRPC": ask_grpc, "HTTP": ask_http, "stream": ask_stream}


def ask_as_one_batch(
    triton: Any, model: str, ask: Callable[[int], Any], block: Callable[[], Any], seconds: float
) -> list[Any]:
    """Answers to requests 0 to 7, which gather to one batch of ``model`` while ``block`` keeps it busy.

    Args:
        triton: client of the server.
        model: that executes the batch.
        ask: answers to a number.
        block: a request that takes ``model`` so long.
        seconds: until it has begun.
    """
    before = executed_batches(triton, model).get(8, 0)
    with ThreadPoolExecutor(9) as pool:
        blocker = pool.submit(block)
        time.sleep(seconds)
        answers = list(pool.map(ask, range(8)))
        blocker.result()
    wait_for_batches(triton, model, 8, before + 1)
    return answers


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_three_bad_requests_in_a_batch_of_eight_leave_five_alone(server, triton, images, transport):
    """The bad ones reach the gradients' own batch: preprocessing finds nothing wrong with their images."""
    bad = {1: (2, {"n_steps": 5000}), 4: (40, {}), 6: (2, {"baseline": "?"})}
    names = {1: "'n_steps'", 4: "TARGET", 6: "'baseline'"}
    if transport == "stream":  # the stream's model checks TARGET itself
        bad[4], names[4] = (2, {"seed": -1}), "'seed'"
    ask = TRANSPORTS[transport](server)

    def ask_number(number: int) -> np.ndarray | str:
        target, parameters = bad.get(number, (2, {}))
        return ask(images[number], target, {"n_steps": 4, **parameters})

    alone = {number: ask_number(number) for number in range(8) if number not in bad}
    answers = ask_as_one_batch(triton, "integrated_gradients", ask_number, partial(block_gradients, triton, images), 1)
    for number, answer in enumerate(answers):
        if number in bad:
            assert INVALID[transport] in answer
            assert names[number] in answer
        else:
            assert relative_distance(answer, alone[number]) <= 1e-5


def test_three_bad_images_in_a_batch_of_eight_leave_five_alone(triton, images):
    bad = {0: b"", 3: b"text", 7: images[7][:500]}

    def ask(number: int) -> np.ndarray | InferenceServerException:
        try:
            image = bad.get(number, images[number])
            return infer(triton, [image], model="classify", outputs=("PROBABILITIES",))["PROBABILITIES"]
        except InferenceServerException as refusal:
            return refusal

    alone = {number: ask(number) for number in range(8) if number not in bad}
    large = encode(scene_image(0).resize((7000, 7000)))  # two take seconds to decode: the eight gather meanwhile
    block = partial(infer, triton, [large] * 2, model="classify", outputs=("PROBABILITIES",))
    answers = ask_as_one_batch(triton, "preprocess", ask, block, 0.5)
    for number, answer in enumerate(answers):
        if number in bad:
            assert answer.status() == INVALID_ARGUMENT
            assert "IMAGE" in answer.message()
        else:
            np.testing.assert_allclose(answer, alone[number], atol=1e-5)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_bad_image_harms_no_other_on_any_transport(server, triton, images, transport):
    ask = TRANSPORTS[transport](server)
    with ThreadPoolExecutor(8) as pool:
        files = [b"text", images[0], b"", images[1], images[2], images[3][:500], images[4], images[5]]
        answers = list(pool.map(lambda file: ask(file, 2, {"n_steps": 2}), files))
    for file, answer in zip(files, answers):
        if file in images:
            assert answer.shape == (1, 3, 224, 224)
        else:
            assert INVALID[transport] in answer
            assert "IMAGE" in answer


def test_a_stream_of_too_many_parameters_or_bytes_is_refused(server, images):
    heard = Stream(server, images[:1], **{f"p{number}": 1 for number in range(100)}).hear()
    assert not heard.responses
    assert "parameter count must be at most 64, not 100" in heard.error.message()
    heard = Stream(server, [b"x" * 40_000_000] * 2).hear()
    assert not heard.responses
    assert "a stream takes at most 67108864" in heard.error.message()


def test_a_bad_image_is_named_among_several(triton, images):
    with pytest.raises(InferenceServerException, match=r"\(image 1 of 3\)"):
        infer(triton, [images[0], b"text", images[2]], n_steps=1)


def test_a_timeout_ends_the_work_for_a_request(server, triton, images):
    infer(triton, images[:1], n_steps=4)
    before = rows_passed(server)
    started = time.monotonic()
    with pytest.raises(InferenceServerException, match="timeout of 1 s is over") as refusal:
        infer(triton, images[:1], n_steps=1000, timeout_seconds=1)
    assert refusal.value.status() == "StatusCode.UNAVAILABLE"
    # 1,000 rows take half a minute on 2 cores; the answer may be late by one chunk.
    assert time.monotonic() - started < 5
    infer(triton, images[:1], n_steps=4)
    assert rows_passed(server) - before < 500


def test_a_timeout_ends_a_stream(server, images):
    started = time.monotonic()
    heard = Stream(server, images[:1], timeout_seconds=1, n_steps=1000).hear()
    assert "timeout" in heard.error.message()
    assert set(heard.responses[0]) == {"PROBABILITIES", "EXPLAINED_CLASS"}
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "call", ["get_system_shared_memory_status", "get_model_repository_index", "get_log_settings", "get_trace_settings"]
)
def test_every_api_but_inference_requires_the_key(server, call):
    for module, url, headers in (
        (tritonclient.grpc, server.grpc_url, server.grpc_admin_headers),
        (tritonclient.http, server.http_url, server.http_admin_headers),
    ):
        with module.InferenceServerClient(url) as client:
            for wrong in ({}, dict.fromkeys(headers, "guess")):
                with pytest.raises(InferenceServerException, match="restricted"):
                    getattr(client, call)(headers=wrong)
            getattr(client, call)(headers=headers)


def test_models_cannot_be_changed_even_with_the_key(server, triton):
    with pytest.raises(InferenceServerException, match="not allowed"):
        triton.load_model("heatmap", headers=server.grpc_admin_headers)
    with pytest.raises(InferenceServerException, match="not allowed"):
        triton.unload_model("heatmap", headers=server.grpc_admin_headers)
