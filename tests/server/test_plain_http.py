"""The README's curl commands, run as they are printed."""

from __future__ import annotations

import io
import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, scene_image
from live_server import infer
from PIL import Image
from programs import needs, run

from tools.paths import ROOT
from tools.shapes.dataset import CLASSES


@pytest.fixture
def photograph(tmp_path: Path) -> bytes:
    """In the folder, too."""
    image = encode(scene_image(2), "JPEG")
    (tmp_path / "photo.jpg").write_bytes(image)
    return image


def run_command(model: str, folder: Path, replaced: dict[str, str]) -> str:
    """Run the README's command for a model in a folder, with words replaced; returns what it prints."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (command,) = (block for block in blocks if f"models/{model}/infer" in block)
    for word, other in replaced.items():
        assert command.count(word) == 1
        command = command.replace(word, other)
    result = run("bash", "-euo", "pipefail", "-c", command, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs("curl")
def test_a_prediction_by_curl(server, triton, photograph, tmp_path):
    # The README's network has 1,000 classes.
    replaced = {"localhost:8000": server.http_url, "tail -c 4000": f"tail -c {4 * len(CLASSES)}"}
    number, probability = run_command("classify", tmp_path, replaced).split()
    expected = infer(triton, [photograph], outputs=("PROBABILITIES",), model="classify")["PROBABILITIES"][0]
    assert int(number) == expected.argmax()
    assert float(probability) == pytest.approx(expected.max(), rel=1e-4)


@needs("curl")
def test_a_heatmap_by_curl(server, triton, photograph, tmp_path):
    run_command("explain_image", tmp_path, {"localhost:8000": server.http_url})
    (expected,) = infer(triton, [photograph], outputs=("HEATMAP",))["HEATMAP"][0]
    difference = np.subtract(
        *(np.asarray(Image.open(each), np.float64) for each in (tmp_path / "heatmap.png", io.BytesIO(expected)))
    )
    assert np.abs(difference).max() <= 2  # as the convolutions round


def post_json(server, path: str, body: bytes) -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/{path}", body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def strict(text: bytes) -> dict:
    """JSON as other languages' parsers take it."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    content: dict = json.loads(text, parse_constant=refuse)
    return content


def in_json(image: bytes) -> bytes:
    """The bytes of an image as a string of JSON, as Triton takes it."""
    escaped = (b"\\u%04x" % byte if byte < 0x20 or byte in b'"\\' else bytes((byte,)) for byte in image)
    return b'"' + b"".join(escaped) + b'"'


def test_the_documented_ways_to_strict_json(server):
    tensors = [
        {"name": "PIXELS", "shape": [1, 3, 224, 224], "datatype": "FP32", "data": [0.5] * 3 * 224 * 224},
        {"name": "LOGITS", "shape": [1, len(CLASSES)], "datatype": "FP32", "data": [0.0] * len(CLASSES)},
    ]

    def ask(*outputs: dict, **parameters: object) -> bytes:
        body = {
            "inputs": tensors,
            "outputs": [{"name": "N_STEPS"}, *outputs],
            "parameters": {"n_steps": 3} | parameters,
        }
        status, answer = post_json(server, "integrated_gradients/infer", json.dumps(body).encode())
        assert status == 200, answer
        return answer

    estimate = {"name": "ERROR_ESTIMATE"}
    with pytest.raises(ValueError, match="NaN"):  # the reason why
        strict(ask(estimate))
    assert strict(ask())["outputs"][0]["data"] == [3]
    mixed = ask({**estimate, "parameters": {"binary_data": True}})
    assert np.isnan(np.frombuffer(mixed[-4:], "<f4")[0])
    assert len(strict(mixed[:-4])["outputs"]) == 2
    for parameters in ({"tolerance": "0.5"}, {"deadline_ms": 5000}):
        (number,) = (output for output in strict(ask(estimate, **parameters))["outputs"] if output["name"] != "N_STEPS")
        assert 0 <= number["data"][0] < 100


@pytest.mark.parametrize("path", ["explain_image/generate", "explain_stream/generate_stream"])
def test_the_id_of_the_generate_extension_is_no_parameter(server, photograph, path):
    body = b'{"IMAGE": %s, "n_steps": 1, "id": "a request"}' % in_json(photograph)
    status, answer = post_json(server, path, body)
    assert (status, b"error" in answer) == (200, False), answer[:300]
    assert b'"id":"a request"' in answer
    status, answer = post_json(server, path, body.replace(b'"n_steps"', b'"steps"'))
    assert b"unknown parameter 'steps'" in answer


def test_a_jpeg_file_without_its_end_marker_is_explained_as_the_whole_one(triton, photograph):
    outputs = ("PROBABILITIES", "SALIENCY")
    whole, unended = (infer(triton, [each], outputs=outputs, n_steps=2) for each in (photograph, photograph[:-2]))
    for name in outputs:
        np.testing.assert_allclose(unended[name], whole[name], rtol=1e-3, atol=1e-5)


@needs("curl")
def test_other_models_and_images_that_are_none_are_refused_by_name(server, tmp_path, photograph):
    def refusal(model: str, file: str) -> str:
        headers = ["-H", "Content-Type: application/octet-stream", "-H", "Inference-Header-Content-Length: 0"]
        (tmp_path / "none.jpg").write_text("no picture")
        url = f"{server.http_url}/v2/models/{model}/infer"
        return run("curl", "-s", *headers, "--data-binary", f"@{tmp_path / file}", url).stdout

    assert "in ensemble 'explain_image', [invalid] IMAGE is not a JPEG" in refusal("explain_image", "none.jpg")
    assert "Raw request must only have 1 input" in refusal("explain", "photo.jpg")
