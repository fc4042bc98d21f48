"""`baseline=images`: the operator's own images, from the tool that writes them to the served attribution."""

from __future__ import annotations

import subprocess
import sys

import captum.attr
import pytest
import torch
import tritonclient.grpc
from conftest import encode, relative_distance, scene_image, scene_pixels
from live_server import Stream, infer
from tritonclient.utils import InferenceServerException

from tools.bench.overload import with_settings
from tools.paths import ROOT
from tools.server import EmbeddedServer, Ports

pytestmark = pytest.mark.slow  # a server of its own; tests/unit/test_path_baselines.py has the rest

TARGET, STEPS, COUNT = 3, 6, 8


def test_images_of_the_operator_are_baselines_and_their_gradients_count(tmp_path, eager_model_float64):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(COUNT + 1):
        scene_image(10 + index).save(folder / f"{index}.png")
    (folder / "0a.txt").write_text("no image")
    repository = with_settings(tmp_path, "integrated_gradients", max_gradients=COUNT * STEPS)
    words = ["--repository", repository, "--baseline-images", folder]
    command = [sys.executable, "-m", "tools.calibrate", *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "wrote 8 images to " in result.stdout
    assert "left out: " in result.stderr

    pixels = scene_pixels(0).double()
    expected = sum(
        captum.attr.IntegratedGradients(eager_model_float64)
        .attribute(pixels[None], scene_pixels(10 + index).double()[None], target=TARGET, n_steps=STEPS)[0]
        .detach()
        for index in range(COUNT)
    )
    assert isinstance(expected, torch.Tensor)
    image = [encode(scene_image(0))]
    with (
        EmbeddedServer(repository, Ports.free(), log_file=tmp_path / "log") as server,
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton,
    ):
        whole = infer(triton, image, [TARGET], baseline="images", n_steps=STEPS)
        assert whole["N_STEPS"][0, 0] == COUNT * STEPS
        assert relative_distance(whole["ATTRIBUTIONS"][0], expected / COUNT) <= 5e-3
        heard = Stream(server, image, [TARGET], baseline="images", n_steps=STEPS).hear()
        assert heard.error is None
        assert relative_distance(heard.responses[-1]["ATTRIBUTIONS"], whole["ATTRIBUTIONS"]) <= 1e-5
        with pytest.raises(InferenceServerException, match=f"not {STEPS + 1} x 1 x {COUNT} x 1 = "):
            infer(triton, image, [TARGET], baseline="images", n_steps=STEPS + 1)
        rough = infer(triton, image, [TARGET], baseline="images", n_steps=STEPS, tolerance="0.3")
        assert 0 < rough["ERROR_ESTIMATE"][0, 0] <= 0.3
        assert relative_distance(rough["ATTRIBUTIONS"], whole["ATTRIBUTIONS"]) <= 0.3
