"""The client library, against the live server."""

import asyncio
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, relative_distance, scene_image, scene_pixels
from live_server import infer, rows_passed
from PIL import Image

from explain_client import (
    AsyncExplainClient,
    Classification,
    ExplainClient,
    Level,
    RefusedError,
    TensorClient,
    TimedOutError,
    UnavailableError,
)
from explain_client.images import as_seen
from tools.paths import ROOT
from tools.shapes.dataset import CLASSES, draw_scene


@pytest.fixture(scope="module")
def image_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "scene.png"
    scene_image(0).save(path)
    return path


@pytest.fixture(scope="module")
def client(server):
    with ExplainClient(server.grpc_url) as client:
        yield client


def test_explain_returns_typed_results(client, image_file):
    result = client.explain(image_file, n_steps=10, clip_percentile=99.5)
    assert result.predictions[0].label == CLASSES[draw_scene("test", 0).label]
    assert result.explained_class == result.predictions[0].index
    assert result.saliency.shape == (224, 224)
    assert result.saliency.dtype == np.float32
    assert (result.heatmap.mode, result.heatmap.size) == ("RGB", (224, 224))
    assert result.n_steps == 10
    assert math.isnan(result.error_estimate)
    assert result.explained_label == result.predictions[0].label


def test_path_and_bytes_and_target(client, image_file):
    by_path = client.explain(image_file, target=3, n_steps=2)
    by_bytes = client.explain(image_file.read_bytes(), target=3, n_steps=2)
    assert by_path.explained_class == 3
    np.testing.assert_array_equal(by_path.saliency, by_bytes.saliency)


def test_classify_gives_the_likeliest_first(client, image_file):
    predictions = client.classify(image_file, top_k=3)
    assert len(predictions) == 3
    assert sorted((p.probability for p in predictions), reverse=True) == [p.probability for p in predictions]


def test_refusals_carry_the_servers_words(client, image_file):
    with pytest.raises(RefusedError, match="'method' must be one of") as refusal:
        client.explain(image_file, method="guess")
    assert refusal.value.status == "INVALID_ARGUMENT"
    with pytest.raises(RefusedError, match="'method' must be one of"):
        list(client.explain_stream(image_file, method="guess"))


def test_absent_server_is_an_error_not_a_hang(image_file):
    with ExplainClient("127.0.0.1:9", timeout=10) as client:
        with pytest.raises(UnavailableError):
            client.explain(image_file)
        with pytest.raises(UnavailableError):
            next(client.explain_stream(image_file))


def test_timeout_is_an_error_and_ends_the_work(client, server, image_file):
    before = rows_passed(server)
    with ExplainClient(server.grpc_url, timeout=0.8) as hasty:
        with pytest.raises((TimedOutError, UnavailableError)):
            hasty.explain(image_file, n_steps=1000)
        with pytest.raises((TimedOutError, UnavailableError)):
            list(hasty.explain_stream(image_file, n_steps=1000))
    client.explain(image_file, n_steps=2)
    assert rows_passed(server) - before < 500


@pytest.mark.parametrize("kind", ["png bytes", "PIL", "array", "grey array"])
def test_images_come_in_many_forms(client, image_file, kind):
    image = Image.open(image_file)
    if kind == "grey array":
        image = image.convert("L")
    forms = {"png bytes": encode(image), "PIL": image, "array": np.asarray(image), "grey array": np.asarray(image)}
    predictions = client.classify(forms[kind])
    assert predictions == client.classify(encode(image))


def test_arrays_of_another_kind_are_refused(client):
    for array in (np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8), np.zeros(8, np.uint8)):
        with pytest.raises(TypeError, match="an image array must be uint8"):
            client.classify(array)


def test_classes_are_known_by_their_labels(client, image_file):
    assert client.labels() == tuple(CLASSES)
    by_name = client.explain(image_file, target=CLASSES[3], contrast=CLASSES[1], n_steps=2, top_k=1)
    by_number = client.explain(image_file, target=3, contrast=1, n_steps=2)
    np.testing.assert_array_equal(by_name.saliency, by_number.saliency)
    assert by_name.explained_label == by_number.explained_label == CLASSES[3]


def test_many_images_are_explained_in_their_order(client):
    images = [encode(scene_image(index)) for index in range(4)]
    found = list(client.explain_many([*images, b"no picture"], n_steps=2, want=[], concurrency=3))
    assert [each.explained_class for each in found[:4]] == [client.classify(image)[0].index for image in images]
    assert isinstance(found[4], RefusedError)


def test_only_what_is_wanted_is_transferred(client, image_file):
    explanation = client.explain(image_file, n_steps=2, want=["attributions"])
    assert (explanation.saliency, explanation.heatmap_png) == (None, None)
    assert explanation.attributions.shape == (3, 224, 224)
    with pytest.raises(ValueError, match="not requested"):
        _ = explanation.heatmap
    with pytest.raises(ValueError, match="`want` takes saliency, attributions, heatmap, not colours"):
        client.explain(image_file, want=["colours"])


def test_what_is_shown_beside_a_heatmap_is_what_the_classifier_saw(image_file):
    seen = np.asarray(as_seen(image_file.read_bytes()), np.float32) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    served = scene_pixels(0).numpy().transpose(1, 2, 0) * std + mean
    assert np.abs(seen - served).max() <= 1 / 255


def check_stream(responses, triton, image_file) -> None:
    first, *levels = responses
    assert isinstance(first, Classification)
    assert first.predictions[0].label == CLASSES[draw_scene("test", 0).label]
    assert first.explained_label == first.predictions[0].label
    assert all(isinstance(level, Level) for level in levels)
    assert [level.is_last for level in levels] == [False, True]
    assert [level.n_steps for level in levels] == [8, 16]
    assert first.milliseconds < levels[0].milliseconds < levels[1].milliseconds
    whole = infer(triton, [image_file.read_bytes()], n_steps=16)
    assert relative_distance(levels[-1].saliency, whole["SALIENCY"][0]) <= 1e-5
    assert levels[-1].heatmap.size == (224, 224)


def test_stream_is_typed_and_ends_with_the_explanation(client, triton, image_file):
    check_stream(client.explain_stream(image_file, n_steps=16), triton, image_file)


def test_leaving_a_stream_cancels_it(client, server, image_file):
    before = rows_passed(server)
    for response in client.explain_stream(image_file, n_steps=1000):
        assert isinstance(response, Classification)
        break
    time.sleep(2)
    assert rows_passed(server) - before <= 64


def test_asyncio_client_does_the_same(server, triton, image_file):
    async def run():
        async with AsyncExplainClient(server.grpc_url) as client:
            await client.check()
            one, several = await asyncio.gather(
                client.explain(image_file, target=3, n_steps=2), client.classify(image_file, top_k=3)
            )
            responses = [response async for response in client.explain_stream(image_file, n_steps=16)]
            for call in (client.explain(image_file, n_steps=0), anext(client.explain_stream(image_file, target=99))):
                with pytest.raises(RefusedError):
                    await call
            return one, several, responses

    one, several, responses = asyncio.run(run())
    assert one.explained_class == 3
    assert len(several) == 3
    check_stream(responses, triton, image_file)


def test_sixty_four_requests_in_flight_take_no_threads(server, image_file):
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    async def run():
        most = 0
        async with AsyncExplainClient(server.grpc_url) as client:
            await client.classify(image_file)
            before = threads()
            tasks = [asyncio.create_task(client.explain(image_file, n_steps=2, want=[])) for _ in range(64)]
            while not all(task.done() for task in tasks):
                most = max(most, threads())
                await asyncio.sleep(0.01)
            return most - before, [task.result().n_steps for task in tasks]

    more, steps = asyncio.run(run())
    assert steps == [2] * 64
    assert more <= 4


def test_cancelling_a_task_cancels_the_request_on_the_server(server, image_file):
    async def run():
        async with AsyncExplainClient(server.grpc_url) as client:
            is_predicted = asyncio.Event()

            async def watch():
                async for _ in client.explain_stream(image_file, n_steps=1000):
                    is_predicted.set()

            task = asyncio.create_task(watch())
            await is_predicted.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    before = rows_passed(server)
    asyncio.run(run())
    time.sleep(2)
    spent = rows_passed(server) - before
    time.sleep(2)
    assert rows_passed(server) - before == spent <= 64


def test_several_classes_of_one_image_are_one_request_with_an_answer_for_each(server, image_file):
    label = CLASSES[3]
    with ExplainClient(server.grpc_url) as client:
        before = rows_passed(server)
        answers = client.explain(image_file, targets=[0, label, 7], n_steps=4, want=["saliency"])
        assert rows_passed(server) - before == 3 * 4
        alone = [client.explain(image_file, target=each, n_steps=4, want=["saliency"]) for each in (0, 3, 7)]
        with pytest.raises(ValueError, match="`targets` takes at least one class"):
            client.explain(image_file, targets=[])
        with pytest.raises(ValueError, match="`target` must be absent"):
            client.explain(image_file, target=1, targets=[2])

    async def ask():
        async with AsyncExplainClient(server.grpc_url) as client:
            return await client.explain(image_file, targets=[0, label, 7], n_steps=4, want=["saliency"])

    for several in (answers, asyncio.run(ask())):
        assert [each.explained_class for each in several] == [0, 3, 7]
        assert [each.explained_label for each in several] == [CLASSES[0], label, CLASSES[7]]
        for one, other in zip(several, alone):
            assert relative_distance(one.saliency, other.saliency) <= 1e-5
            assert one.convergence_delta == pytest.approx(other.convergence_delta, abs=1e-4)


@pytest.mark.parametrize("shared_memory", [None, "system"])
def test_tensors_go_through_shared_memory_or_the_connection(server, triton, image_file, shared_memory):
    pixels = scene_pixels(0)[None].numpy().repeat(2, axis=0)
    with TensorClient(server.grpc_url, shared_memory=shared_memory, headers=server.grpc_admin_headers) as client:
        logits, probabilities = client.classify(pixels)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
        answer = client.attribute(pixels, logits, [-1, 3], n_steps=4)
        again = client.attribute(pixels[:1], logits[:1], tolerance=0.5)
        regions = triton.get_system_shared_memory_status(headers=server.grpc_admin_headers).regions
        assert len(regions) == (3 if shared_memory else 0)  # pixels to either model, attributions back
        with pytest.raises(RefusedError, match="TARGET"):
            client.attribute(pixels, logits, [0, 12])
    assert not triton.get_system_shared_memory_status(headers=server.grpc_admin_headers).regions
    assert answer.explained_classes.tolist() == [int(logits[0].argmax()), 3]
    assert answer.n_steps.tolist() == [4, 4]
    assert np.isnan(answer.error_estimates).all()
    assert 0 < again.error_estimates[0] <= 0.5
    whole = infer(triton, [image_file.read_bytes()], n_steps=4)
    assert relative_distance(answer.attributions[0], whole["ATTRIBUTIONS"][0]) <= 1e-5
    assert answer.convergence_deltas[0] == pytest.approx(whole["CONVERGENCE_DELTA"][0, 0], abs=1e-4)


def test_restricted_shared_memory_without_the_key_is_an_error(server):
    pixels = scene_pixels(0)[None].numpy()
    client = TensorClient(server.grpc_url, shared_memory="system")
    with client, pytest.raises(UnavailableError, match="restricted"):
        client.classify(pixels)


def test_readme_examples_run_as_printed(server, image_file, tmp_path):
    pages = [(ROOT / page).read_text() for page in ("README.md", "docs/contract.md")]
    examples = [each for page in pages for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
    assert len(examples) == 4
    program = "\n".join(examples).replace("localhost:8001", server.grpc_url).replace("photo.jpg", str(image_file))
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "heatmap.png").is_file()
    assert CLASSES[draw_scene("test", 0).label] in result.stdout
    assert len(re.findall(r"^\d+ steps, error about 0\.\d+$", result.stdout, re.MULTILINE)) == 3
