"""The README's curl commands, run as they are printed."""

from __future__ import annotations

import io
import re
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


@needs("curl")
def test_other_models_and_images_that_are_none_are_refused_by_name(server, tmp_path, photograph):
    def refusal(model: str, file: str) -> str:
        headers = ["-H", "Content-Type: application/octet-stream", "-H", "Inference-Header-Content-Length: 0"]
        (tmp_path / "none.jpg").write_text("no picture")
        url = f"{server.http_url}/v2/models/{model}/infer"
        return run("curl", "-s", *headers, "--data-binary", f"@{tmp_path / file}", url).stdout

    assert "in ensemble 'explain_image', [invalid] IMAGE is not a JPEG" in refusal("explain_image", "none.jpg")
    assert "Raw request must only have 1 input" in refusal("explain", "photo.jpg")
