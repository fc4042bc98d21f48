"""The client and its command line, against the live server."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import scene_image
from PIL import Image

from explain_client import ExplainClient, ExplainError
from tools.paths import ROOT
from tools.shapes.dataset import CLASSES, draw_scene

EXPLAIN = str(Path(sys.executable).with_name("explain"))


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


def test_path_and_bytes_and_target(client, image_file):
    one = client.explain(image_file, target=3, n_steps=2)
    other = client.explain(image_file.read_bytes(), target=3, n_steps=2)
    assert one.explained_class == 3
    np.testing.assert_array_equal(one.saliency, other.saliency)


def test_classify_gives_the_likeliest_first(client, image_file):
    predictions = client.classify(image_file, top_k=3)
    assert len(predictions) == 3
    assert sorted((p.probability for p in predictions), reverse=True) == [p.probability for p in predictions]


def test_refusals_carry_the_servers_words(client, image_file):
    with pytest.raises(ExplainError, match="'method' must be one of"):
        client.explain(image_file, method="guess")


def test_absent_server_is_an_error_not_a_hang(image_file):
    with ExplainClient("127.0.0.1:9", timeout=10) as client, pytest.raises(ExplainError):
        client.explain(image_file)


def test_command_explains_what_it_can_and_names_what_it_cannot(server, image_file, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    command = [EXPLAIN, str(image_file), str(broken), str(tmp_path / "absent.jpg"), "--url", server.grpc_url]
    options = ["--n-steps", "4", "--method", "riemann_middle", "--baseline", "blur", "--target", "2"]
    result = subprocess.run(
        [*command, *options, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert re.search(rf"scene.png +\S+ +[\d.]+% +{CLASSES[2]} +4 +-?\d+\.\d+ +\d+\n", result.stdout)
    assert "broken.png: in ensemble 'explain', IMAGE is not a JPEG, PNG or WEBP file" in result.stderr
    assert "absent.jpg" in result.stderr
    with Image.open(tmp_path / "out" / "scene.heatmap.png") as heatmap:
        assert heatmap.size == (224, 224)
    assert not (tmp_path / "out" / "broken.heatmap.png").exists()


def test_readme_examples_run_as_printed(server, image_file, tmp_path):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 3
    program = "\n".join(examples).replace("localhost:8001", server.grpc_url).replace("photo.jpg", str(image_file))
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "heatmap.png").is_file()
    assert CLASSES[draw_scene("test", 0).label] in result.stdout
    assert len(re.findall(r"^\d+ steps, error about 0\.\d+$", result.stdout, re.MULTILINE)) == 3
