"""Measure where a network's paths need their nodes: ``python -m tools.calibrate [--images FOLDER]``.

Takes the gradients of both outputs at evenly spaced points of the paths to some images. Writes, beside the served
network and with its checksum, the density of nodes and how errors fall with their number. ``method=calibrated`` places
its nodes by the density; ``tolerance`` and ``deadline_ms`` plan steps and estimate errors with both. Without a folder
the images are crops of photographs from installed packages or, for the network of drawn shapes, its generator's
calibration split. `make quality` uses none of these images.

``--baseline-images FOLDER`` writes the images of ``baseline=images`` instead: up to eight of the folder's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from attribution_engine import AttributionEngine
from attribution_job import Job
from classifier_files import Preprocessing
from classifier_loading import load_classifier
from engine_loading import build_engine
from error_law import ErrorLaw
from image_decoding import ImageLimits, load_pixels, open_image
from image_structure import ImageError
from path_baselines import IMAGES_FILE, MOST_IMAGES
from path_density import FILE_NAME, PathDensity
from richardson_rule import COARSE_SHARE
from torch import Tensor
from tqdm import tqdm

from tools.classifiers.loading import NETWORKS
from tools.evaluation.integrals import EXPLAINED_OUTPUTS, integrands
from tools.evaluation.measuring import default_device, explain
from tools.export import ensure_exported, read_manifest, repository_with
from tools.imagenet.photographs import CALIBRATION, crops, view
from tools.paths import MODEL_REPOSITORY
from tools.shapes.dataset import view_pixels

INTERVALS = 64
# The density is the gradients' mean rate of change to one of these powers. If errors of segments do not cancel and grow
# as the square of their length, 1/2 is best; if they are random and grow as the length, 1 is.
EXPONENTS = (0.5, 0.65, 0.8, 0.95)
# Steps at which the powers are compared, and steps and power of the reference.
COMPARED_STEPS, REFERENCE_STEPS, REFERENCE_EXPONENT = 16, 96, 0.65
# Numbers of steps to which the error law is fitted; those whose quarter is among them also give its margin.
LAW_STEPS = (2, 4, 8, 16, 32)
LAW_FROM = 4
# Percentiles over images: of the error for the law's scale, and of error over estimate for its margin.
SCALE_PERCENTILE, MARGIN_PERCENTILE = 90, 95


def gradient_change(engine: AttributionEngine, image: Tensor, intervals: int = INTERVALS) -> dict[str, Tensor]:
    """For each output, the changes of the integrand from one of ``intervals`` + 1 even points to the next.

    Args:
        engine: of the network.
        image: float32 [channels, height, width], normalised.

    Returns:
        Norms in pixel space relative to the attribution's norm, float64 [intervals].
    """
    with torch.no_grad():
        target = int(engine.network(image[None]).argmax())
    nodes = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    last: dict[str, Tensor] = {}
    totals = {name: torch.zeros_like(image) for name in EXPLAINED_OUTPUTS}
    changes: dict[str, list[Tensor]] = {name: [] for name in EXPLAINED_OUTPUTS}
    for gradients in integrands(engine, image, target, nodes):
        for name, values in gradients.items():
            with_last = torch.cat((last[name], values)) if name in last else values
            changes[name].append(with_last.diff(dim=0).flatten(1).norm(dim=1))
            last[name] = values[-1:]
            totals[name] += values.sum(dim=0)
    return {
        name: torch.cat(changes[name]).double().cpu() / (totals[name] / len(nodes)).norm().item()
        for name in EXPLAINED_OUTPUTS
    }


def attributions(engine: AttributionEngine, image: Tensor, output: str, steps: Sequence[int]) -> list[Tensor]:
    """Attributions of the predicted class, one for each number of steps, by the engine's density."""
    with torch.no_grad():
        target = int(engine.network(image[None]).argmax())
    job = Job(image, torch.zeros_like(image), target, method="calibrated", probability=output == "probability")
    explanations = explain(engine, [replace(job, n_steps=count) for count in steps], with_delta=False)
    return [explanation.attributions for explanation in explanations]


def with_exponent(changes: dict[str, Tensor], exponent: float) -> PathDensity:
    """The density that is the rate of change to a power, for both outputs."""
    return PathDensity({name: change**exponent for name, change in changes.items()}, {})


def fit_output(
    engine: AttributionEngine, images: Sequence[Tensor], changes: dict[str, Tensor], output: str
) -> tuple[float, ErrorLaw]:
    """The power of the rate of change with the smallest errors, and its error law. Changes the engine's density.

    Errors are relative to an attribution of ``REFERENCE_STEPS`` steps.
    """
    references: list[Tensor] = []
    compared: dict[float, list[float]] = {exponent: [] for exponent in EXPONENTS}
    for image in tqdm(images, desc=f"density, {output}"):
        engine.density = with_exponent(changes, REFERENCE_EXPONENT)
        references += attributions(engine, image, output, [REFERENCE_STEPS])
        for exponent, errors in compared.items():
            engine.density = with_exponent(changes, exponent)
            (attribution,) = attributions(engine, image, output, [COMPARED_STEPS])
            errors.append(((attribution - references[-1]).norm() / references[-1].norm()).item())
    exponent = min(EXPONENTS, key=lambda exponent: float(np.median(compared[exponent])))
    engine.density = with_exponent(changes, exponent)
    all_errors: list[list[float]] = []
    differences: list[dict[int, float]] = []
    for image, reference in zip(tqdm(images, desc=f"errors, {output}"), references):
        by_steps = dict(zip(LAW_STEPS, attributions(engine, image, output, LAW_STEPS)))
        all_errors.append([((value - reference).norm() / reference.norm()).item() for value in by_steps.values()])
        differences.append(
            {
                count: ((value - by_steps[round(COARSE_SHARE * count)]).norm() / reference.norm()).item()
                for count, value in by_steps.items()
                if round(COARSE_SHARE * count) in by_steps
            }
        )
    return exponent, fit_law(np.array(all_errors), differences)


def fit_law(errors: np.ndarray, differences: list[dict[int, float]]) -> ErrorLaw:
    """Fit the error law.

    Args:
        errors: relative, [images, numbers of steps], at ``LAW_STEPS``.
        differences: for each image, number of steps -> relative difference to a quarter of them.
    """
    counts = np.array(LAW_STEPS)
    fitted = counts >= LAW_FROM
    slope, _ = np.polyfit(np.log(counts[fitted]), np.log(np.median(errors[:, fitted], axis=0)), 1)
    scale = np.percentile(errors[:, fitted] * counts[fitted] ** -slope, SCALE_PERCENTILE)
    law = ErrorLaw(float(scale), float(-slope), 1.0)
    errors_over_estimates = [
        errors[image, LAW_STEPS.index(count)] / (law.share(round(COARSE_SHARE * count), count) * difference)
        for image, by_count in enumerate(differences)
        for count, difference in by_count.items()
    ]
    return replace(law, margin=float(np.percentile(errors_over_estimates, MARGIN_PERCENTILE)))


def load_folder(folder: Path, count: int, preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Images of a folder as `preprocess` makes them, float32 [channels, height, width]; reports other files."""
    loaded, limits = 0, ImageLimits()
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or loaded == count:
            continue
        try:
            pixels = load_pixels(open_image(file.read_bytes(), preprocessing, limits), preprocessing, limits)
        except ImageError as error:
            print(f"left out: {file}: {error}", file=sys.stderr)
            continue
        loaded += 1
        yield pixels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--images", type=Path, help="a folder of JPEG, PNG and WebP files (default: see above)")
    which.add_argument(
        "--baseline-images",
        type=Path,
        metavar="FOLDER",
        help=f"write {IMAGES_FILE} and nothing else: the first {MOST_IMAGES} images of a folder, for baseline=images",
    )
    parser.add_argument("--count", type=int, default=32, help="images to take (default: %(default)s)")
    served = parser.add_mutually_exclusive_group()
    served.add_argument("--network", choices=NETWORKS, help="one of this repository's, not what is served")
    served.add_argument("--repository", type=Path, default=MODEL_REPOSITORY)
    parser.add_argument("--out", type=Path, help="default: beside the network, by the name that is read there")
    arguments = parser.parse_args()
    repository = repository_with(arguments.network) if arguments.network else arguments.repository
    ensure_exported(repository, arguments.network or os.environ.get("NETWORK"))
    manifest = read_manifest(repository) or {}
    preprocessing = Preprocessing.from_manifest(manifest.get("preprocessing", {}))
    file = repository / "classifier" / "1" / "model.pt"
    model_sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if arguments.baseline_images is not None:
        baselines = list(load_folder(arguments.baseline_images, MOST_IMAGES, preprocessing))
        if not baselines:
            sys.exit(f"calibrate: there is no image in {arguments.baseline_images}")
        out = arguments.out or file.with_name(IMAGES_FILE)
        with out.open("wb") as written:  # by the name that was given: NumPy would add a suffix
            np.savez(written, pixels=torch.stack(baselines).numpy(), model_sha256=model_sha256)
        print(f"wrote {len(baselines)} images to {out}; a running server uses them after a restart")
        return
    module = load_classifier(file, arguments.device)
    engine = build_engine(module, arguments.device, preprocessing.input_shape, precision="ieee")
    if arguments.images is not None:
        images, source = list(load_folder(arguments.images, arguments.count, preprocessing)), arguments.images.name
    elif manifest.get("network") == "shapes":
        images = [view_pixels("calibration", [index])[0] for index in range(arguments.count)]
        source = "the shapes generator's calibration split"
    else:
        images = [view(image, preprocessing) for _, image in crops(CALIBRATION, arguments.count)]
        source = "crops of " + ", ".join(photograph.name for photograph in CALIBRATION)
    if not images:
        sys.exit(f"calibrate: there is no image in {arguments.images}")
    images = [image.to(arguments.device) for image in images]
    by_image = [gradient_change(engine, image) for image in tqdm(images, desc="changes")]
    changes = {name: torch.stack([image[name] for image in by_image]).mean(dim=0) for name in EXPLAINED_OUTPUTS}
    fits = {name: fit_output(engine, images, changes, name) for name in EXPLAINED_OUTPUTS}
    content = {
        "model_sha256": model_sha256,
        "weights_sha256": manifest.get("weights_sha256"),
        "images": f"{len(images)} of {source}",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "torchvision")},
        "exponent": {name: exponent for name, (exponent, _) in fits.items()},
        "error_law": {
            name: {key: round(value, 3) for key, value in vars(law).items()} for name, (_, law) in fits.items()
        },
        "density": {
            name: [float(f"{value:.4g}") for value in (changes[name] ** exponent).tolist()]
            for name, (exponent, _) in fits.items()
        },
    }
    out = arguments.out or file.with_name(FILE_NAME)
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({"exponent": content["exponent"], "error_law": content["error_law"]}))
    print(f"wrote {out}; a running server uses it after a restart")


if __name__ == "__main__":
    main()
