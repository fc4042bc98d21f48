"""Write the classifier that the repository serves: ``python -m tools.export --weights WEIGHTS --arch ARCHITECTURE``.

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
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from classifier_files import Preprocessing
from path_baselines import IMAGES_FILE
from path_density import FILE_NAME

from tools.classifiers.architectures import KINDS
from tools.classifiers.loading import NETWORKS, load_default, load_source, sha256_of
from tools.classifiers.preprocessing import OPTIONS, Overrides
from tools.classifiers.source import DownloadError, ExportError, Source
from tools.imagenet import lite0
from tools.paths import MODEL_REPOSITORY, OUTPUTS, ROOT
from tools.shapes.checkpoint import DEMO_CALIBRATION, DEMO_CHECKPOINT
from tools.torchscript.served_classifier import (
    DiscreteGradientClassifier,
    HoistableClassifier,
    ScriptingError,
    script,
)
from tools.triton.config_shapes import write_configs, write_settings

# Files of a network in a repository, by `export` and `tools/calibrate`.
EXPORTED_FILES = ("model.pt", "manifest.json", FILE_NAME, IMAGES_FILE, "labels.txt")
# For `shutil.copytree`: a repository without a classifier.
WITHOUT_CLASSIFIER = shutil.ignore_patterns("__pycache__", *EXPORTED_FILES)
# Calibrations of known networks, by `tools/calibrate`.
CALIBRATIONS = (DEMO_CALIBRATION, lite0.CALIBRATION)
# Models whose probabilities have labels.
LABELLED_MODELS = ("classifier", "explain_stream")


def export(source: Source, repository: Path = MODEL_REPOSITORY, automatic: bool = False) -> Path:
    """Write ``classifier/1/model.pt``, its manifest and the models' ``labels.txt``; returns the model's path.

    Also writes the input's shape into the models' ``config.pbtxt`` where it is another.

    Args:
        source: the classifier to write.
        repository: the model repository to write to.
        automatic: nobody requested this network, so ``ensure_exported`` may replace it.

    Raises:
        ExportError: the scripted model differs from the eager one, or a ``config.pbtxt`` cannot be changed. Nothing is
            written then.
    """
    path = repository / "classifier" / "1" / "model.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    input_shape = source.preprocessing.input_shape
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        try:
            served, difference = script(source.module, input_shape, written)
        except ScriptingError as error:
            raise ExportError(f"{error}; nothing was written") from None
        model_sha256 = sha256_of(written)
        manifest = {
            "architecture": source.architecture,
            "network": source.network,
            "automatic": automatic,
            "weights": source.weights,
            "weights_sha256": source.sha256,
            "classes": len(source.labels),
            "model_sha256": model_sha256,
            "hoistable": isinstance(served, HoistableClassifier),
            "mean_slopes": isinstance(served, DiscreteGradientClassifier),
            "limitation": served.limitation,
            "difference_from_eager": difference,
            "preprocessing": asdict(source.preprocessing),
            "versions": {name: version(name) for name in ("torch", "torchvision")},
            "exporter_sha256": _exporter_sha256(),
        }
        # The model last: if it exists, so do its labels and its manifest, and the configs fit it.
        write_configs(repository, source.preprocessing)
        _replace_calibration(source, path.parent, model_sha256)
        labels = "".join(f"{' '.join(label.split())}\n" for label in source.labels)
        for model in filter(Path.is_dir, (repository / name for name in LABELLED_MODELS)):
            (model / "labels.txt").write_text(labels)
        (path.parent / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        os.replace(written, path)
    return path


def ensure_exported(repository: Path = MODEL_REPOSITORY, network: str | None = None) -> None:
    """Export a classifier into a repository if needed; never replaces one that a person exported there.

    Its configs may be those of another classifier, from git or a copy; they get the shape of the manifest.

    Args:
        repository: the model repository.
        network: see ``load_source``; None: the exported one, or ``load_default`` if there is none.

    Raises:
        ExportError: the classifier that a person exported lacks ``model.pt`` or is not ``network``, or ``network``
            cannot be exported.
    """
    _export_if_needed(repository, network)
    manifest = read_manifest(repository)
    if manifest is not None:
        write_configs(repository, Preprocessing.from_manifest(manifest.get("preprocessing", {})))


def _export_if_needed(repository: Path, network: str | None) -> None:
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
        is_same = checkpoint is None or sha256_of(checkpoint) == manifest["weights_sha256"]
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
    """A copy of the model repository that serves a network of ``NETWORKS``, whatever is served otherwise.

    It is for tests and benchmarks, which repeat requests and count or time their gradients. So it keeps no answers.
    """
    copy = OUTPUTS / "repositories" / network
    copy_models(copy)
    ensure_exported(copy, network)
    write_settings(copy / "integrated_gradients" / "config.pbtxt", kept_bytes=0)
    return copy


def copy_models(repository: Path) -> None:
    """Copy this model repository, without a classifier, into a folder, and delete there the modules of older versions.

    The folder's own times and mode stay as they are: the root of a volume may belong to another user.
    """
    for folder in filter(Path.is_dir, MODEL_REPOSITORY.iterdir()):
        for file in (repository / folder.name / "1").glob("*.py"):
            if not (folder / "1" / file.name).is_file():
                file.unlink()
        shutil.copytree(folder, repository / folder.name, ignore=WITHOUT_CLASSIFIER, dirs_exist_ok=True)


def read_manifest(repository: Path = MODEL_REPOSITORY) -> dict[str, Any] | None:
    """The manifest of the classifier in a repository; None if ``export`` did not write the ``model.pt`` there."""
    folder = repository / "classifier" / "1"
    if not (folder / "manifest.json").is_file():
        return None
    manifest = json.loads((folder / "manifest.json").read_text())
    is_foreign = (folder / "model.pt").is_file() and sha256_of(folder / "model.pt") != manifest["model_sha256"]
    return None if is_foreign else manifest


def describe_served(repository: Path = MODEL_REPOSITORY) -> str:
    """Network, weights, classes and checksum of the classifier in a repository, in one line."""
    checksum = sha256_of(repository / "classifier" / "1" / "model.pt")
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
    code = [
        file for folder in ("classifiers", "torchscript") for file in sorted((ROOT / "tools" / folder).glob("*.py"))
    ]
    files = [Path(__file__), *code, Path(lite0.__file__), *CALIBRATIONS]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights",
        required=True,
        help="lite0, imagenet, shapes, pretrained (by timm), or a file: state dict, TorchScript, torch.export program",
    )
    parser.add_argument("--arch", default="resnet18", help=f"{KINDS}, which runs that code (default: resnet18)")
    parser.add_argument(
        "--labels", type=Path, help="class names, one a line (default: those that come with the weights)"
    )
    group = parser.add_argument_group("preprocessing", "The default is what the weights expect.")
    helps = {
        "size": "sides of the input: N, or HEIGHT WIDTH",
        "resize": "before the crop: the shorter side N, or exactly HEIGHT WIDTH (default: in proportion to --size)",
        "interpolation": "of the resizing: nearest, bilinear, bicubic or lanczos",
        "mean": "of values in [0, 1], one number (grey) or three (RGB)",
        "std": "of values in [0, 1], one number (grey) or three (RGB)",
    }
    for name in OPTIONS:
        group.add_argument(
            f"--{name}", nargs="+", metavar="NAME" if name == "interpolation" else "N", default=(), help=helps[name]
        )
    parser.add_argument("--repository", type=Path, default=MODEL_REPOSITORY)
    arguments = parser.parse_args()
    try:
        overrides = Overrides.read({name: getattr(arguments, name) for name in OPTIONS})
        path = export(load_source(arguments.weights, arguments.arch, arguments.labels, overrides), arguments.repository)
    except ExportError as error:
        sys.exit(f"export: {error}")
    written = path.with_name("manifest.json").read_text()
    print(written, end="")
    if limitation := json.loads(written)["limitation"]:
        print(f"gradients are taken at points, without discrete gradients: {limitation}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
