"""One real server for the whole run, and references to compare its answers with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import tritonclient.grpc
from PIL import Image
from torchvision import transforms

from tools.classifiers.loading import load_source
from tools.evaluation.image_files import encode as encode
from tools.export import repository_with
from tools.server import EmbeddedServer, Ports
from tools.shapes.dataset import draw_scene
from tools.torchscript.served_classifier import build_served

# After `tools`, which adds the models' folders to the path.
from attribution_engine import AttributionEngine  # isort: skip
from attribution_job import Job

BROWSER_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISION_TRANSFORM = transforms.Compose(
    [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
)


def scene_image(index: int, size: int = 256) -> Image.Image:
    return Image.fromarray(draw_scene("test", index, size=size).image)


def scene_pixels(index: int) -> torch.Tensor:
    """The classifier's input for ``encode(scene_image(index))``, float32 [3, 224, 224]."""
    return TORCHVISION_TRANSFORM(scene_image(index))


@pytest.fixture(scope="session")
def repository() -> Path:
    """A model repository with the network of drawn shapes; tests must not write to it."""
    return repository_with("shapes")


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory):
    log = tmp_path_factory.mktemp("server") / "triton.log"
    with EmbeddedServer(repository, Ports.free(), log_file=log) as running:
        yield running


@pytest.fixture(scope="session")
def triton(server: EmbeddedServer):
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        yield client


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """A headless Chromium (Debian's chromium and chromium-driver)."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in (*BROWSER_ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, Service(driver)) as running:
        yield running


@pytest.fixture(scope="session")
def eager_model() -> torch.nn.Module:
    """The network of drawn shapes as torchvision builds it, float32: no folding, no scripting."""
    return load_source("shapes").module


@pytest.fixture(scope="session")
def eager_model_float64() -> torch.nn.Module:
    return load_source("shapes").module.double()


@pytest.fixture(scope="session")
def served_module() -> torch.jit.ScriptModule:
    """The module that `tools/export` writes."""
    return torch.jit.script(build_served(load_source("shapes").module, (3, 224, 224))).eval()


@pytest.fixture
def engine(served_module) -> AttributionEngine:
    return AttributionEngine(served_module)


def small_job(n_steps: int, seed: int = 0, **options) -> Job:
    """A quick job, of an image of 32 x 32 random pixels."""
    image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Job(image, torch.zeros_like(image), 4, n_steps, **options)


def untrained(architecture: str, classes: int) -> torch.nn.Module:
    """A torchvision classifier with seeded random weights, in its head too (a vision transformer's starts at zero)."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(architecture, num_classes=classes).eval()
    for parameter in model.parameters():
        if not parameter.any() and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def relative_distance(values: np.ndarray | torch.Tensor, reference: np.ndarray | torch.Tensor) -> float:
    """Relative L2 distance, computed in float64."""
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))
